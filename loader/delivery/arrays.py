"""Arrays of the samples' records, such as a robot's actions, stacked to tensors of a batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from shardspec.errors import ConfigError

_DTYPES = {"b": np.bool_, "i": np.int64, "f": np.float32}
"""By the kind of the numbers in the record; float32 is what float32 was before it became JSON."""


def stacked_field(name: str, described: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """Stacks a field of the records of a batch's rows.

    Args:
      name: Of the field: numbers, or lists of numbers to any depth.
      described: Metadata of the rows, with `record`.

    Returns:
      bool, int64 or float32, [B, ...].

    Raises:
      ConfigError: `loader_arrays`: a row has no such field, or one of another shape.

    >>> stacked_field("x", [{"record": {"x": [1.5, 2.0]}}, {"record": {"x": [0.5, 0.0]}}])
    tensor([[1.5000, 2.0000],
            [0.5000, 0.0000]])
    """
    arrays = []
    for one in described:
        value = one["record"].get(name)
        try:
            array = np.array(value)
        except ValueError:  # lists of different lengths
            array = np.array(None)
        if array.dtype.kind not in _DTYPES or not array.size:
            raise ConfigError("loader_arrays.field", where=one.get("key") or "", name=name)
        arrays.append(array)
    shapes = {array.shape for array in arrays}
    kinds = {array.dtype.kind for array in arrays}
    if len(shapes) > 1 or len(kinds) > 1:
        shown = sorted(f"{a.dtype} {list(a.shape)}" for a in arrays)
        raise ConfigError("loader_arrays.shape", name=name, got=", ".join(dict.fromkeys(shown)))
    return torch.from_numpy(np.stack(arrays).astype(_DTYPES[kinds.pop()]))


def stacked_boxes(described: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Stacks where the words of documents are on the crops, padded to the row that has most.

    Args:
      described: Metadata of the rows, with `ocr_boxes` in `record`; None where there are no words.

    Returns:
      `boxes`, float32 [B, M, 4], corners in pixels of the crop; `box_crop` and `box_word`, int64
      [B, M], the number of the crop in the row's `images` and of the word; -1 for padding.
    """
    found = [one["record"].get("ocr_boxes") for one in described]
    most = max(len(each["word"]) if each else 0 for each in found)
    boxes = torch.zeros((len(found), most, 4))
    numbers = {name: torch.full((len(found), most), -1) for name in ("crop", "word")}
    for row, each in enumerate(found):
        if each:
            boxes[row, : len(each["word"])] = torch.from_numpy(each["corners"])
            for name, column in numbers.items():
                column[row, : len(each["word"])] = torch.from_numpy(each[name])
    return {"boxes": boxes, **{f"box_{name}": column for name, column in numbers.items()}}


def without_fields(
    described: Mapping[str, Any], fields: Collection[str], *, bare: bool
) -> dict[str, Any]:
    """Leaves fields of the record out of a row's metadata; with `bare`, all of the record."""
    kept = {name: value for name, value in described.items() if name != "record"}
    if bare:
        return kept
    record = {n: value for n, value in described["record"].items() if n not in fields}
    return {**kept, "record": record}
