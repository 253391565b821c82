"""Packed rows: several examples in one sequence, as Molmo's packing lays them out.

Arrays of one value per token are put one after the other; positions begin anew with each example;
example e adds e * PACKED_STRIDE to its subsegments, which hides the examples in front of it
(attention.py). Indices into the tokens and into the patches move along.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loader.assemble import Pictures
from loader.attention import PACKED_STRIDE
from loader.layout import Column
from shardspec.tiling import NO_PATCH

_JOINED = (
    *("input_ids", "labels", "position_ids", "loss_weights"),
    *("images", "image_masks"),
)


def join_examples(examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Joins examples to one packed example.

    Args:
      examples: As `assemble` or `draft` makes them, at least one.

    Returns:
      The same keys: input_ids, labels, position_ids, subsegment_ids, loss_weights [sum of L];
      images, image_masks, image_input_idx, image_end [sum of n]; token_pooling where there;
      `metadata` with the list `examples`.
    """
    joined: dict[str, Any] = {name: _concatenated(examples, name) for name in _JOINED}
    lengths = [len(example["input_ids"]) for example in examples]
    before = np.cumsum([0, *lengths[:-1]])
    joined["subsegment_ids"] = _moved_apart([example["subsegment_ids"] for example in examples])
    for name in ("image_input_idx", "image_end"):
        joined[name] = np.concatenate(
            [
                _moved(example[name], by=int(start))
                for example, start in zip(examples, before, strict=True)
            ]
        )
    if "token_pooling" in examples[0]:
        # Patches are counted through all crops of the row.
        patches = [example["image_masks"].size for example in examples]
        pooling = []
        for example, start in zip(examples, np.cumsum([0, *patches[:-1]]), strict=True):
            own = example["token_pooling"]
            pooling.append(np.where(own == NO_PATCH, NO_PATCH, own + start))
        joined["token_pooling"] = np.concatenate(pooling)
    metadata = [example["metadata"] for example in examples]
    joined["metadata"] = {
        "key": "+".join(entry["key"] for entry in metadata),
        "examples": metadata,
    }
    return joined


def fitting(
    examples: Sequence[dict[str, Any]], *, sequence_length: int, max_crops: int | None
) -> list[dict[str, Any]]:
    """Leaves out substitutes that are longer than the samples they stand for, until all fit.

    Packs are planned for the longest draws, so only substitutes can be too long. The first
    example always stays.
    """
    kept = list(examples)
    while len(kept) > 1 and (
        sum(len(example["input_ids"]) for example in kept) > sequence_length
        or (max_crops is not None and sum(len(example["images"]) for example in kept) > max_crops)
    ):
        substitutes = [e for e in range(1, len(kept)) if "substitutes" in kept[e]["metadata"]]
        del kept[substitutes[-1] if substitutes else -1]
    return kept


def _concatenated(examples: Sequence[Mapping[str, Any]], name: str) -> Any:
    arrays = [example[name] for example in examples]
    if isinstance(arrays[0], Pictures):
        return Pictures.joined(arrays)
    if isinstance(arrays[0], Column):
        return Column(name, [sequence for column in arrays for sequence in column.sequences])
    if name != "images":
        return np.concatenate(arrays)
    with_images = [images for images in arrays if len(images)] or arrays[:1]
    if len(with_images) == 1 or with_images[0].ndim != 4:
        return np.concatenate(with_images)
    # Crops are [n, C, H, W] views of [n, H, W, C] memory; joined, they stay so.
    last = [images.transpose(0, 2, 3, 1) for images in with_images]
    return np.concatenate(last).transpose(0, 3, 1, 2)


def _moved_apart(arrays: Sequence[Any]) -> np.ndarray | Column:
    if isinstance(arrays[0], Column):
        sequences = [sequence for column in arrays for sequence in column.sequences]
        return Column("subsegment_ids", sequences, step=PACKED_STRIDE)
    return np.concatenate([array + e * PACKED_STRIDE for e, array in enumerate(arrays)])


def _moved(positions: np.ndarray, *, by: int) -> np.ndarray:
    moved: np.ndarray = np.where(positions < 0, positions, positions + by)
    return moved
