"""Kernels: from a stored picture to the rows of `pixel_values` that a family's model takes.

Every step is that of the family's own image processor, in uint8 as long as it is: resize, cut,
normalise, in this order. A *backend* says whose resize and whose roundings:

- "torchvision", the default of transformers: torch's antialiased uint8 resize, and
  (x - 255 mean) / (255 std) in float32;
- "pil": Pillow's resize, and (x / 255 - mean) / std, rounded to float32 after each operation.

Each operation is rounded as the processor's, so values equal its own bit for bit wherever the
pixels do. They are made a band of rows at a time, which stays in the core's cache between steps.
"""

# Shape letters: H x W pixels, N rows of pixel_values, R x C squares of patches, m patches per side
# of a square, p side of a patch, S side of a tile.

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from loader.assembly.pixels import resize as resize_torch
from shardspec.families import (
    AnyRes,
    Family,
    Filter,
    FixedSize,
    Gemma3,
    Idefics3,
    InternVL,
    PaliGemma,
    PicturePlan,
    Pixtral,
    Processor,
    Qwen2VL,
)

Backend = Literal["torchvision", "pil"]

_OneSize = FixedSize | PaliGemma

_BAND_VALUES = 1 << 16
"""Values that are made at once, of a row of pixels or of patches at least."""

_PIL = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def unit_shape(family: Family, plans: Sequence[PicturePlan]) -> tuple[int, ...]:
    """Returns the shape of one row of `pixel_values` that has these pictures, one at least."""
    if isinstance(family, Processor):  # a guess, by which memory is estimated
        return (3, *plans[0].resized)
    return _KERNELS[family.kind][0](family, plans)


def write_units(
    family: Family, plan: PicturePlan, pixels: np.ndarray, out: np.ndarray, *, backend: Backend
) -> None:
    """Renders one picture.

    Args:
      family: Whose model.
      plan: Of the source's size.
      pixels: uint8 [H, W, 3], as it is stored.
      out: float32 [plan.num_units, *unit_shape(family, plans)], C-contiguous, to be filled; the
        plans have this one among them.
      backend: Whose values.
    """
    values = _Values(family.filter, backend, *_statistics(family.mean, family.std, backend))
    _KERNELS[family.kind][1](family, plan, pixels, out, values)


def write_frame(
    family: Family,
    plan: PicturePlan,
    i: int,
    pixels: np.ndarray,
    out: np.ndarray,
    *,
    backend: Backend,
) -> None:
    """Renders frame i of a video, from 0; the last one fills the last patch along time.

    Args:
      family: Whose model.
      plan: Of the video.
      i: Which frame.
      pixels: uint8 [H, W, 3], as it is stored.
      out: float32 [plan.num_units, *unit_shape(family, plans)], C-contiguous, of the whole video.
      backend: Whose values.
    """
    assert isinstance(family, Qwen2VL)
    values = _Values(family.filter, backend, *_statistics(family.mean, family.std, backend))
    t, first = divmod(i, family.temporal_patch)
    stop = family.temporal_patch if i + 1 == plan.num_frames else first + 1
    squares = plan.num_units // plan.num_times
    own = out[t * squares : (t + 1) * squares]
    _write_patches(family, plan, pixels, own, values, slice(first, stop))


@dataclass(frozen=True, slots=True)
class _Values:
    """Whose pixels and values a kernel makes."""

    filter: Filter
    backend: Backend
    mean: np.ndarray
    """float32 [3, 1, 1], of levels from 0 to 255, or of those of "pil" from 0 to 1."""
    std: np.ndarray

    def resized(self, pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        height, width = size
        if pixels.shape[:2] == size:
            return pixels
        if self.backend == "torchvision":
            if self.filter == "lanczos":
                return _lanczos(pixels, height, width)
            return resize_torch(pixels, width, height, resample=self.filter)
        image = Image.fromarray(np.ascontiguousarray(pixels))
        return np.asarray(image.resize((width, height), _PIL[self.filter]))

    def put(self, out: np.ndarray, pixels: np.ndarray) -> None:
        """Writes the values of [H, W, 3] levels as [3, H, W]."""
        step = max(1, _BAND_VALUES // (3 * pixels.shape[1]))
        for y in range(0, len(pixels), step):
            band = out[:, y : y + step]
            np.copyto(band, pixels[y : y + step].transpose(2, 0, 1))
            self.normalise(band, self.mean, self.std)

    def normalise(self, levels: np.ndarray, mean: np.ndarray, std: np.ndarray) -> None:
        """Makes values of float32 levels, in their place."""
        if self.backend == "pil":
            levels /= 255
        levels -= mean
        levels /= std

    def put_tiles(
        self, out: np.ndarray, whole: np.ndarray, grid: tuple[int, int], side: int
    ) -> None:
        """Writes the tiles of a picture, row by row."""
        rows, cols = grid
        for t in range(rows * cols):
            y, x = t // cols * side, t % cols * side
            self.put(out[t], whole[y : y + side, x : x + side])


def _lanczos(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes with torch's LANCZOS, or BICUBIC where torch has none, as transformers does."""
    if not has_lanczos():
        return resize_torch(pixels, width, height, resample="bicubic")
    image_1CHW = torch.from_numpy(np.require(pixels, np.uint8, ["C", "W"]))[None].permute(
        0, 3, 1, 2
    )
    resized = torch.nn.functional.interpolate(
        image_1CHW, size=(height, width), mode="lanczos", antialias=True
    )
    return np.ascontiguousarray(resized[0].permute(1, 2, 0))


@functools.cache
def has_lanczos() -> bool:
    """Tells whether torch has that filter."""
    image = torch.zeros((1, 3, 8, 8), dtype=torch.uint8)
    try:
        torch.nn.functional.interpolate(image, size=(4, 4), mode="lanczos", antialias=True)
    except (NotImplementedError, ValueError):
        return False
    return True


@functools.lru_cache(maxsize=64)
def _statistics(
    mean: tuple[float, float, float], std: tuple[float, float, float], backend: Backend
) -> tuple[np.ndarray, np.ndarray]:
    """Gives what is subtracted from the levels of each channel, and by what the rest is divided."""
    if backend == "torchvision":
        # As transformers: one factor for both, on float32 tensors.
        scale = 1.0 / (1 / 255)
        found = [(torch.tensor(part) * scale).numpy() for part in (mean, std)]
    else:
        found = [np.array(part, np.float32) for part in (mean, std)]
    mean_C11, std_C11 = (part.reshape(3, 1, 1) for part in found)
    return mean_C11, std_C11


def _qwen2_vl(
    family: Qwen2VL, plan: PicturePlan, pixels: np.ndarray, out: np.ndarray, values: _Values
) -> None:
    _write_patches(family, plan, pixels, out, values, slice(None))


def _write_patches(
    family: Qwen2VL,
    plan: PicturePlan,
    pixels: np.ndarray,
    out: np.ndarray,
    values: _Values,
    times: slice,
) -> None:
    """Writes a picture as those of the frames of its patches that `times` says."""
    resized = values.resized(pixels, plan.resized)
    m, p, n = family.merge, family.patch_px, family.merge**2
    rows, cols = plan.grid[0] // m, plan.grid[1] // m
    squares = resized.reshape(rows, m, p, cols, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    cells = out.reshape(rows, cols * n, 3, family.temporal_patch, p * p)[:, :, :, times]
    # As wide as a patch: far faster than with one value for each channel.
    mean, std = (part[:, 0].repeat(p * p, axis=1) for part in (values.mean, values.std))
    step = max(1, _BAND_VALUES // (3 * cols * n * p * p))
    levels = np.empty((min(step, rows), cols, m, m, 3, p, p), np.uint8)
    band = np.empty((len(levels), cols * n, 3, p * p), np.float32)
    for y in range(0, rows, step):
        count = min(step, rows - y)
        # Moved as bytes: a quarter of what moving floats takes.
        np.copyto(levels[:count], squares[y : y + count])
        np.copyto(band[:count], levels[:count].reshape(band[:count].shape))
        values.normalise(band[:count], mean, std)
        cells[y : y + count] = band[:count, :, :, None]


def _fixed(
    family: _OneSize, plan: PicturePlan, pixels: np.ndarray, out: np.ndarray, values: _Values
) -> None:
    resized = values.resized(pixels, plan.resized)
    side = family.size_px
    top, left = (resized.shape[0] - side) // 2, (resized.shape[1] - side) // 2
    values.put(out[0], resized[top : top + side, left : left + side])


def _gemma3(
    family: Gemma3, plan: PicturePlan, pixels: np.ndarray, out: np.ndarray, values: _Values
) -> None:
    del family
    values.put(out[0], values.resized(pixels, plan.resized))
    rows, cols = plan.grid
    high, wide = -(-pixels.shape[0] // rows), -(-pixels.shape[1] // cols)
    for i in range(plan.num_units - 1):
        y, x = i // cols * high, i % cols * wide
        crop = np.ascontiguousarray(pixels[y : y + high, x : x + wide])
        values.put(out[1 + i], values.resized(crop, plan.resized))


def _internvl(
    family: InternVL, plan: PicturePlan, pixels: np.ndarray, out: np.ndarray, values: _Values
) -> None:
    whole, side = values.resized(pixels, plan.resized), family.size_px
    rows, cols = plan.grid
    values.put_tiles(out, whole, plan.grid, side)
    if rows * cols > 1:
        values.put(out[rows * cols], values.resized(pixels, (side, side)))


def _anyres(
    family: AnyRes, plan: PicturePlan, pixels: np.ndarray, out: np.ndarray, values: _Values
) -> None:
    side, (rows, cols) = family.size_px, plan.grid
    if not rows:  # one of several pictures
        square = _squared(pixels, family.mean)
        values.put(out[0], values.resized(square, (side, side)))
        return
    values.put(out[0], values.resized(pixels, (side, side)))
    fitted = values.resized(pixels, plan.resized)
    height, width = fitted.shape[:2]
    canvas = np.zeros((rows * side, cols * side, 3), np.uint8)
    top, left = (canvas.shape[0] - height) // 2, (canvas.shape[1] - width) // 2
    canvas[top : top + height, left : left + width] = fitted
    values.put_tiles(out[1:], canvas, plan.grid, side)


def _squared(pixels: np.ndarray, mean: tuple[float, float, float]) -> np.ndarray:
    """Pads a picture to a square with the colour of the mean."""
    height, width = pixels.shape[:2]
    if height == width:
        return pixels
    side = max(height, width)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = [int(part * 255) for part in mean]
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = pixels
    return square


def _idefics3(
    family: Idefics3, plan: PicturePlan, pixels: np.ndarray, out: np.ndarray, values: _Values
) -> None:
    side, (rows, cols) = family.size_px, plan.grid
    # Resized twice, as by the processor, and a third time for the whole picture.
    whole = values.resized(pixels, plan.resized)
    whole = values.resized(whole, (rows * side, cols * side))
    if rows * cols > 1:
        values.put_tiles(out, whole, plan.grid, side)
    values.put(out[plan.num_units - 1], values.resized(whole, (side, side)))


def _pixtral(
    family: Pixtral, plan: PicturePlan, pixels: np.ndarray, out: np.ndarray, values: _Values
) -> None:
    del family
    height, width = plan.resized
    values.put(out[0, :, :height, :width], values.resized(pixels, plan.resized))
    out[0, :, height:] = 0
    out[0, :, :height, width:] = 0


def _square(family: _OneSize | Gemma3 | InternVL, plans: Sequence[PicturePlan]) -> tuple[int, ...]:
    del plans
    return (3, family.size_px, family.size_px)


def _patch(family: Qwen2VL, plans: Sequence[PicturePlan]) -> tuple[int, ...]:
    del plans
    return (3 * family.temporal_patch * family.patch_px**2,)


def _largest(family: Pixtral, plans: Sequence[PicturePlan]) -> tuple[int, ...]:
    del family
    return (3, max(plan.resized[0] for plan in plans), max(plan.resized[1] for plan in plans))


_Shape = Callable[[Any, Sequence[PicturePlan]], tuple[int, ...]]

_KERNELS: Mapping[str, tuple[_Shape, Callable[..., None]]] = {
    Qwen2VL.kind: (_patch, _qwen2_vl),
    FixedSize.kind: (_square, _fixed),
    Gemma3.kind: (_square, _gemma3),
    PaliGemma.kind: (_square, _fixed),
    InternVL.kind: (_square, _internvl),
    AnyRes.kind: (_square, _anyres),
    Idefics3.kind: (_square, _idefics3),
    Pixtral.kind: (_largest, _pixtral),
}
"""By the kind of a family: shape of a row, and what fills the rows of a picture."""
