"""Kernels: from a stored picture to the rows of `pixel_values` that a family's model takes.

Every step is that of the family's own image processor, in uint8 as long as it is: resize, cut,
normalise, in this order. A *backend* says whose resize and whose roundings:

- "torchvision", the default of transformers: torch's antialiased uint8 resize, and
  (x - 255 mean) / (255 std) in float32;
- "pil": Pillow's resize, and (x / 255 - mean) / std, rounded to float32 after each operation.

Values are looked up in a table of 256 for each channel, so each equals the processor's bit for bit
wherever the pixels do.
"""

# Shape letters: H x W pixels, N rows of pixel_values, R x C squares of patches, m patches per side
# of a square, p side of a patch, S side of a tile.

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from loader.assembly.pixels import resize as resize_torch
from shardspec.families import Family, FixedSize, Gemma3, InternVL, PicturePlan, Qwen2VL

Backend = Literal["torchvision", "pil"]

_PIL = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def unit_shape(family: Family) -> tuple[int, ...]:
    """Returns the shape of one row of `pixel_values`."""
    return _KERNELS[family.kind][0](family)


def write_units(
    family: Family, plan: PicturePlan, pixels: np.ndarray, out: np.ndarray, *, backend: Backend
) -> None:
    """Renders one picture.

    Args:
      family: Whose model.
      plan: Of the source's size.
      pixels: uint8 [H, W, 3], as it is stored.
      out: float32 [plan.num_units, *unit_shape(family)], C-contiguous, to be filled.
      backend: Whose values.
    """
    table = _table(family.mean, family.std, backend)
    _KERNELS[family.kind][1](family, plan, pixels, out, table, backend)


def _resized(
    pixels: np.ndarray, size: tuple[int, int], family: Family, backend: Backend
) -> np.ndarray:
    height, width = size
    if pixels.shape[:2] == size:
        return pixels
    if backend == "torchvision":
        return resize_torch(pixels, width, height, resample=family.filter)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((width, height), _PIL[family.filter]))


@functools.lru_cache(maxsize=64)
def _table(
    mean: tuple[float, float, float], std: tuple[float, float, float], backend: Backend
) -> np.ndarray:
    """Makes the values of the 256 levels of each channel: float32 [3, 256]."""
    if backend == "torchvision":
        levels = torch.arange(256, dtype=torch.float32)[None]
        # As transformers: one factor for both, on float32 tensors.
        scale = 1.0 / (1 / 255)
        mean_C1 = (torch.tensor(mean) * scale)[:, None]
        std_C1 = (torch.tensor(std) * scale)[:, None]
        table = levels.sub(mean_C1).div_(std_C1).numpy()
    else:
        scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
        mean_C, std_C = (np.array(part, np.float32) for part in (mean, std))
        table = (scaled[None] - mean_C[:, None]) / std_C[:, None]
    table.setflags(write=False)
    return table


def _qwen2_vl(
    family: Qwen2VL,
    plan: PicturePlan,
    pixels: np.ndarray,
    out: np.ndarray,
    table: np.ndarray,
    backend: Backend,
) -> None:
    resized = _resized(pixels, plan.resized, family, backend)
    m, p = family.merge, family.patch_px
    rows, cols = plan.grid[0] // m, plan.grid[1] // m
    squares = resized.reshape(rows, m, p, cols, m, p, 3)
    # Moved as bytes: a quarter of what moving floats takes.
    patches_3Npp = np.ascontiguousarray(squares.transpose(6, 0, 3, 1, 4, 2, 5))
    patches_3Npp = patches_3Npp.reshape(3, plan.num_units, p, p)
    cells = out.reshape(plan.num_units, 3, family.temporal_patch, p, p)
    for c in range(3):
        cells[:, c] = table[c][patches_3Npp[c]][:, None]


def _fixed(
    family: FixedSize | Gemma3,
    plan: PicturePlan,
    pixels: np.ndarray,
    out: np.ndarray,
    table: np.ndarray,
    backend: Backend,
) -> None:
    resized = _resized(pixels, plan.resized, family, backend)
    side = family.size_px
    top, left = (resized.shape[0] - side) // 2, (resized.shape[1] - side) // 2
    _put(out[0], resized[top : top + side, left : left + side], table)


def _internvl(
    family: InternVL,
    plan: PicturePlan,
    pixels: np.ndarray,
    out: np.ndarray,
    table: np.ndarray,
    backend: Backend,
) -> None:
    whole, side = _resized(pixels, plan.resized, family, backend), family.size_px
    rows, cols = plan.grid
    for t in range(rows * cols):
        y, x = t // cols * side, t % cols * side
        _put(out[t], whole[y : y + side, x : x + side], table)
    if rows * cols > 1:
        _put(out[rows * cols], _resized(pixels, (side, side), family, backend), table)


def _put(out: np.ndarray, pixels: np.ndarray, table: np.ndarray) -> None:
    """Writes the values of [S, S, 3] levels as [3, S, S]."""
    for c in range(3):
        np.take(table[c], pixels[..., c], out=out[c], mode="clip")  # "raise" would copy


def _square(family: FixedSize | Gemma3 | InternVL) -> tuple[int, ...]:
    return (3, family.size_px, family.size_px)


def _patch(family: Qwen2VL) -> tuple[int, ...]:
    return (3 * family.temporal_patch * family.patch_px**2,)


_KERNELS: Mapping[str, tuple[Callable[[Any], tuple[int, ...]], Callable[..., None]]] = {
    Qwen2VL.kind: (_patch, _qwen2_vl),
    FixedSize.kind: (_square, _fixed),
    Gemma3.kind: (_square, _fixed),
    InternVL.kind: (_square, _internvl),
}
"""By the kind of a family: shape of a row, and what fills the rows of a picture."""
