"""`assemble`: from a prepared sample to the arrays of a training example.

The online half of the pipeline, and the only place that draws, always from the sample's own
generator and in this order: a variant of each turn, the order of the branches, the resolution,
the augmentation of each image. The rest follows from the draws. It needs no tokenizer and no
formatter, and it does not know whether the sample came out of a shard or straight from `prepare`.

It works in two steps: `plan_example` decides everything from the spans and the tokens alone (so
lengths are known without a pixel), `assemble` then makes the arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from loader.augment import Augment, Draw, draw
from loader.layout import (
    IGNORED,
    BranchTurns,
    LossScale,
    Sequence1d,
    TokenIds,
    Tree,
    Turn,
    lay_out,
)
from loader.pixels import Normalization, normalize, patchify, render
from shardspec.errors import ConfigError, SampleError
from shardspec.sample import Geometry, PreparedSample, SpanKind
from shardspec.tiling import (
    NO_PATCH,
    ImageView,
    first_patch_positions,
    image_input_idx,
    image_masks,
    image_token_ids,
    token_pooling,
)

# Plain integers: comparing with a member of an enum costs as much as all the rest of a row.
_TEXT, _IMAGE, _LEAD = SpanKind.TEXT.value, SpanKind.IMAGE.value, SpanKind.LEAD.value


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What one training run wants to see of the samples."""

    image: ImageView = field(default_factory=ImageView)
    """Crops, patches and tokens."""
    high_res: ImageView | None = None
    """Another view of the same stored images, such as 24 instead of 8 crops."""
    high_res_probability: float = 0.0
    """Share of the samples, 0 to 1, that are seen in the view `high_res`, drawn each epoch."""
    augment: Augment = field(default_factory=Augment)
    """Random crops, flips and colour; off by default, and always off for inference."""
    normalize: Normalization | None = None
    """"imagenet", "openai" or "siglip" give float32; None leaves uint8 for the device."""
    pixels: Literal["crops", "patches"] = "crops"
    """"crops": [n, 3, S, S]; "patches": [n, patches, patch * patch * 3], for a linear layer."""
    image_map: Literal["first", "per_token", "pooling"] = "first"
    """How a model finds its image tokens. "first": `image_input_idx` [n], the first patch token of
    each crop. "per_token" (Molmo 1): `image_input_idx` [n, tokens per crop], -100 where a token
    belongs to another crop. "pooling" (Molmo 2): `token_pooling` as well, whose k-th row lists the
    patches of the k-th patch token."""
    sequence_length: int | None = None
    """Longest sequence; text is cut there, images never are."""
    max_images: int | None = None
    """Most images in a sample; None for any."""
    branch_order: Literal["shuffled", "stored"] = "shuffled"
    """Order of a sample's conversations: it decides which ones fit the sequence."""
    tree: Tree = "molmo2"
    loss: LossScale = "flat"
    weight: float = 1.0
    """Factor of `loss_weights` for the whole dataset."""
    purpose: Literal["train", "inference"] = "train"
    """"inference" takes the first variant of each turn, in stored order, and augments nothing."""

    def __post_init__(self) -> None:
        wrong: dict[str, object] = {}
        if not 0 <= self.high_res_probability <= 1:
            wrong["high_res_probability"] = self.high_res_probability
        if self.high_res_probability and self.high_res is None:
            wrong["high_res"] = None
        if self.high_res and self.high_res.size_px != self.image.size_px:
            wrong["high_res.size_px"] = self.high_res.size_px
        if self.weight < 0:
            wrong["weight"] = self.weight
        if wrong:
            raise ConfigError(
                "settings of the view are impossible",
                reason="view",
                facts=wrong,
                fix="a probability needs a high_res view with the same size_px; weights are >= 0",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExamplePlan:
    """Everything about an example but its pixels."""

    sequence: Sequence1d
    view: ImageView
    """The resolution that was drawn."""
    draws: tuple[Draw, ...]
    """Augmentation of each image."""
    sizes: tuple[tuple[int, int], ...]
    """Source (width, height) of each image, in pixels."""
    crops: tuple[int, ...]
    """Crops of each image."""
    first_patches: np.ndarray
    """int64 [n], position of each crop's first patch token."""

    @property
    def num_tokens(self) -> int:
        """Length of the sequence."""
        return len(self.sequence.input_ids)

    @property
    def num_loss_tokens(self) -> int:
        """Positions with loss."""
        return int(np.count_nonzero(self.sequence.labels != IGNORED))

    @property
    def num_crops(self) -> int:
        """Crops of all images."""
        return sum(self.crops)


def plan_example(
    tokens: np.ndarray,
    spans: np.ndarray,
    rng: np.random.RandomState,
    *,
    view: View,
    ids: TokenIds,
    key: str = "",
) -> ExamplePlan:
    """Makes every draw of an example and lays out its tokens.

    Args:
      tokens: int32 [T], the sample's.
      spans: int32 [S, 8], the sample's.
      rng: The sample's generator for this epoch.
      view: What the run wants.
      ids: Special ids of the dataset's tokenizer.
      key: The sample's, for errors.

    Raises:
      SampleError: `too_many_images`, and as `lay_out`.
    """
    training = view.purpose == "train"
    rows = spans.tolist()
    pictures = [row for row in rows if row[0] == _IMAGE]
    if view.max_images is not None and len(pictures) > view.max_images:
        raise SampleError(
            "sample has more images than the view takes",
            reason="too_many_images",
            where=key,
            facts={"images": len(pictures), "max_images": view.max_images},
            fix="raise max_images, or leave such samples out when building",
        )
    texts = [row for row in rows if row[0] == _TEXT]
    branches = _choose(tokens, texts, rng if training else None)
    if training and view.branch_order == "shuffled" and len(branches) > 1:
        branches = [branches[b] for b in rng.permutation(len(branches))]
    image = view.image
    if training and view.high_res is not None:
        image = view.high_res if rng.random_sample() < view.high_res_probability else image
    augment = view.augment if training else Augment()
    draws = tuple(
        draw(augment, rng, geometry=Geometry(row[7]), width=row[2], height=row[3])
        for row in pictures
    )
    sizes = tuple((row[2], row[3]) for row in pictures)
    blocks = [image_token_ids(*size, image, ids.image) for size in sizes]
    sequence = lay_out(
        blocks,
        branches,
        ids=ids,
        leads=[tokens[row[2] : row[3]] for row in rows if row[0] == _LEAD],
        limit=view.sequence_length,
        tree=view.tree,
        loss=view.loss,
        where=key,
    )
    firsts = [first_patch_positions(*size, image, ids.image) for size in sizes]
    starts = sequence.image_starts
    return ExamplePlan(
        sequence=sequence,
        view=image,
        draws=draws,
        sizes=sizes,
        crops=tuple(map(len, firsts)),
        first_patches=_stacked(
            [first + start for first, start in zip(firsts, starts, strict=True)],
            empty=np.zeros(0, dtype=np.int64),
        ),
    )


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
      images: uint8 or float32 [n, 3, S, S] or [n, patches, dim], n crops of all images;
      image_masks: float32 [n, patches]; image_input_idx: int64 [n] or [n, tokens per crop];
      token_pooling: int64 [image tokens, pool], with image_map "pooling"; image_end: int64 [n],
      one past the last token of the crop's image; metadata.

    Raises:
      SampleError: As `plan_example`.
    """
    plan = plan_example(sample.tokens, sample.spans, rng, view=view, ids=ids, key=sample.key)
    sequence = plan.sequence
    example = {
        "input_ids": sequence.input_ids,
        "labels": sequence.labels,
        "position_ids": sequence.position_ids,
        "subsegment_ids": sequence.subsegment_ids,
        "loss_weights": sequence.loss_weights * np.float32(view.weight),
        "images": _images(sample, plan, view),
        "image_masks": _masks(plan),
        "image_input_idx": plan.first_patches,
        "image_end": np.repeat(np.array(sequence.image_ends, dtype=np.int64), plan.crops),
        "metadata": {
            "key": sample.key,
            "images": [
                {"width": width, "height": height, "crops": crops}
                for (width, height), crops in zip(plan.sizes, plan.crops, strict=True)
            ],
            "dropped_branches": sequence.dropped_branches,
        },
    }
    if view.image_map == "per_token":
        example["image_input_idx"] = _token_positions(plan)
    elif view.image_map == "pooling":
        example["token_pooling"] = _pooled_patches(plan)
    return example


def _images(sample: PreparedSample, plan: ExamplePlan, view: View) -> np.ndarray:
    side = plan.view.size_px
    crops = np.empty((plan.num_crops, side, side, 3), dtype=np.uint8)
    done = 0
    for image, (width, height), own, count in zip(
        sample.images, plan.sizes, plan.draws, plan.crops, strict=True
    ):
        render(
            image.pixels,
            source_width=width,
            source_height=height,
            view=plan.view,
            draw=own,
            overview=image.overview,
            out=crops[done : done + count],
        )
        done += count
    pixels = crops if view.normalize is None else normalize(crops, kind=view.normalize)
    if view.pixels == "patches":
        return patchify(pixels, plan.view.patch_px)
    channels_first: np.ndarray = pixels.transpose(0, 3, 1, 2)
    return channels_first


def _masks(plan: ExamplePlan) -> np.ndarray:
    """Share of each patch that is picture: float32 [n, patches]."""
    view = plan.view
    if view.fit == "pad" and plan.sizes:
        return np.concatenate([image_masks(*size, view) for size in plan.sizes])
    return np.ones((plan.num_crops, view.num_patches), dtype=np.float32)


def _choose(
    tokens: np.ndarray, texts: Sequence[Sequence[int]], rng: np.random.RandomState | None
) -> list[BranchTurns]:
    """Draws one variant of every turn, branch by branch; the first one without a generator."""
    grouped: dict[tuple[int, int], list[Sequence[int]]] = {}
    for row in texts:
        grouped.setdefault((row[1], row[2]), []).append(row)
    branches: dict[int, BranchTurns] = {}
    turns: dict[int, list[Turn]] = {}
    for (branch, _), variants in grouped.items():
        row = variants[0 if rng is None else rng.randint(0, len(variants))]
        turn = Turn(prompt=tokens[row[3] : row[4]], response=tokens[row[5] : row[6]])
        turns.setdefault(branch, []).append(turn)
        branches[branch] = BranchTurns(turns=turns[branch], weight=row[7])
    return list(branches.values())


def _token_positions(plan: ExamplePlan) -> np.ndarray:
    """Molmo 1's map: int64 [n, tokens per crop], positions in the sequence or -100."""
    rows, cols = plan.view.crop_tokens
    found = [
        image_input_idx(*size, plan.view, offset=start)
        for size, start in zip(plan.sizes, plan.sequence.image_starts, strict=True)
    ]
    return _stacked(found, empty=np.zeros((0, rows * cols))).astype(np.int64)


def _pooled_patches(plan: ExamplePlan) -> np.ndarray:
    """Molmo 2's map: int64 [image tokens, pool], patches of all crops counted through, or -1."""
    found = []
    crops_before = 0
    for size, count in zip(plan.sizes, plan.crops, strict=True):
        pooled = token_pooling(*size, plan.view)
        shift = crops_before * plan.view.num_patches
        found.append(np.where(pooled == NO_PATCH, NO_PATCH, pooled + shift))
        crops_before += count
    pool = plan.view.pool[0] * plan.view.pool[1]
    return _stacked(found, empty=np.zeros((0, pool), dtype=np.int64))


def _stacked(arrays: Sequence[np.ndarray], *, empty: np.ndarray) -> np.ndarray:
    return np.concatenate(arrays) if arrays else empty
