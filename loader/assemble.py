"""`assemble`: from a prepared sample to the arrays of a training example.

The online half of the pipeline, and the only place that draws: which baked variant of each turn,
then the augmentation of each image, always in this order and from the sample's own generator. The
rest (token layout, crops, masks) follows from the draws. It needs no tokenizer and no formatter,
and it does not know whether the sample came out of a shard or straight from `prepare`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from loader.augment import Augment, draw
from loader.layout import BranchTurns, TokenIds, Turn, lay_out
from loader.pixels import Normalization, normalize, render
from shardspec.sample import Geometry, PreparedSample, image_rows, text_rows
from shardspec.tiling import (
    ImageTokenIds,
    ImageView,
    image_masks,
    image_token_ids,
    num_crops,
    token_pooling,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What one training run wants to see of the samples."""

    image: ImageView = field(default_factory=ImageView)
    """Crops, patches and tokens."""
    augment: Augment = field(default_factory=Augment)
    """Random crops, flips and colour; off by default, and always off for inference."""
    normalize: Normalization | None = None
    """"imagenet", "openai" or "siglip" give float32; None leaves uint8 for the device."""
    sequence_length: int | None = None
    """Longest sequence; text is cut there, images never are."""
    purpose: Literal["train", "inference"] = "train"
    """"inference" takes the first variant of each turn and augments nothing."""


def assemble(
    sample: PreparedSample, rng: np.random.RandomState, *, view: View, ids: TokenIds
) -> dict[str, Any]:
    """Makes the example of one sample in one epoch.

    Args:
      sample: From a shard or from `prepare`.
      rng: The sample's generator for this epoch.
      view: What the run wants.
      ids: Special ids of the dataset's tokenizer.

    Returns:
      input_ids, labels, position_ids, subsegment_ids: int64 [L]; loss_weights: float32 [L];
      images: uint8 or float32 [n, 3, S, S], n crops of all images; image_masks: float32
      [n, patches]; image_input_idx: int64 [n], position of each crop's first patch token;
      image_end: int64 [n], one past the last token of the crop's image; metadata.

    Raises:
      SampleError: `image_cut`, `no_loss`; see `lay_out`.
    """
    training = view.purpose == "train"
    branches = list(_chosen(sample, rng if training else None))
    augment = view.augment if training else Augment()
    pictures = image_rows(sample.spans).tolist()
    draws = [
        draw(augment, rng, geometry=Geometry(row[7]), width=row[2], height=row[3])
        for row in pictures
    ]
    blocks = [image_token_ids(row[2], row[3], view.image, ids.image) for row in pictures]
    sequence = lay_out(blocks, branches, ids=ids, limit=view.sequence_length, where=sample.key)
    counts = [num_crops(row[2], row[3], view.image) for row in pictures]
    side = view.image.size_px
    crops = np.empty((sum(counts), side, side, 3), dtype=np.uint8)
    masks, starts, ends, done = [], [], [], 0
    for i, row in enumerate(pictures):
        width, height = row[2], row[3]
        render(
            sample.images[i].pixels,
            source_width=width,
            source_height=height,
            view=view.image,
            draw=draws[i],
            out=crops[done : done + counts[i]],
        )
        done += counts[i]
        masks.append(image_masks(width, height, view.image))
        first = _first_patches(blocks[i], width, height, view.image, ids.image)
        starts.append(sequence.image_starts[i] + first)
        ends.append(np.full(counts[i], sequence.image_ends[i]))
    images = crops if view.normalize is None else normalize(crops, kind=view.normalize)
    empty = np.zeros(0, dtype=np.int64)
    return {
        "input_ids": sequence.input_ids,
        "labels": sequence.labels,
        "position_ids": sequence.position_ids,
        "subsegment_ids": sequence.subsegment_ids,
        "loss_weights": sequence.loss_weights,
        "images": images.transpose(0, 3, 1, 2),
        "image_masks": np.concatenate(
            [np.zeros((0, view.image.num_patches), dtype=np.float32), *masks]
        ),
        "image_input_idx": np.concatenate([empty, *starts]),
        "image_end": np.concatenate([empty, *ends]),
        "metadata": {"key": sample.key, "dropped_branches": sequence.dropped_branches},
    }


def _chosen(sample: PreparedSample, rng: np.random.RandomState | None) -> Iterator[BranchTurns]:
    """Draws one variant of every turn, branch by branch; the first one without a generator."""
    rows = text_rows(sample.spans)
    for branch in np.unique(rows[:, 1]):
        own = rows[rows[:, 1] == branch]
        turns = []
        for turn in np.unique(own[:, 2]):
            variants = own[own[:, 2] == turn]
            choice = 0 if rng is None else rng.randint(0, len(variants))
            prompt_start, prompt_stop, start, stop = variants[choice, 3:7].tolist()
            turns.append(
                Turn(
                    prompt=sample.tokens[prompt_start:prompt_stop],
                    response=sample.tokens[start:stop],
                )
            )
        yield BranchTurns(turns=turns, weight=int(own[0, 7]))


def _first_patches(
    block: np.ndarray, width: int, height: int, view: ImageView, ids: ImageTokenIds
) -> np.ndarray:
    """Finds each crop's first patch token in its image's block: int64 [crops]."""
    patches = np.flatnonzero(block == ids.im_patch)
    if view.crop_mode == "resize":
        return patches[:1]
    pooled = token_pooling(width, height, view)
    crop_of = np.where(pooled >= 0, pooled // view.num_patches, -1)
    count = num_crops(width, height, view)
    return np.array([patches[np.argmax((crop_of == c).any(axis=1))] for c in range(count)])
