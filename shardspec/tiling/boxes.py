"""Where boxes of a picture are on its crops.

A box is (x0, y0, x1, y1), as shares of the upright picture. Crop 0 is the overview, crops 1 ... are
the tiles. A box that reaches over a border is cut there, and one in an overlap is on several tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shardspec.tiling.grid import crop_boxes
from shardspec.tiling.sizes import canvas_size, frame_size, overview_size
from shardspec.tiling.view import ImageView


@dataclass(frozen=True, slots=True, kw_only=True)
class CropBoxes:
    """The parts of boxes on crops, ordered by crop and then by box."""

    box: np.ndarray
    """int64 [M], the number of the box that each is a part of."""
    crop: np.ndarray
    """int64 [M], the crop that it is on."""
    corners: np.ndarray
    """float64 [M, 4], x0, y0, x1, y1 in pixels of the crop, from its upper left corner."""


def boxes_on_crops(boxes: np.ndarray, *, width: int, height: int, view: ImageView) -> CropBoxes:
    """Computes where boxes of a picture are on its crops.

    Args:
      boxes: float [N, 4], shares of the upright picture.
      width: Of the upright source, in pixels.
      height: Of the upright source, in pixels.
      view: What the model sees.

    Returns:
      The parts of boxes that have an area on some crop.

    >>> half = np.array([[0.5, 0.0, 1.0, 0.5]])
    >>> boxes_on_crops(half, width=64, height=64, view=ImageView(size_px=28)).corners.tolist()
    [[14.0, 0.0, 28.0, 14.0]]
    """
    boxes_N4 = np.asarray(boxes, np.float64).reshape(-1, 4)
    side = view.size_px
    small_w, small_h = overview_size(width, height, view)
    # As pictures are placed: floor division of what remains on both sides, also where it is
    # negative because the centre is cut out.
    left, top = _offset(small_w, side), _offset(small_h, side)
    on_crops = [boxes_N4 * (small_w, small_h, small_w, small_h) + (left, top, left, top)]
    if view.crop_mode != "resize":
        canvas_w, canvas_h = canvas_size(width, height, view)
        frame_w, frame_h = frame_size(width, height, view)
        left, top = _offset(canvas_w, frame_w), _offset(canvas_h, frame_h)
        on_frame_N4 = boxes_N4 * (canvas_w, canvas_h, canvas_w, canvas_h) + (left, top, left, top)
        tiles_K4 = crop_boxes(width, height, view)
        on_crops += [on_frame_N4 - (x, y, x, y) for x, y in tiles_K4[:, :2].tolist()]
    parts_CN4 = np.clip(np.stack(on_crops), 0, side)
    seen_CN = (parts_CN4[..., 2:] > parts_CN4[..., :2]).all(axis=-1)
    crop_M, box_M = np.nonzero(seen_CN)
    return CropBoxes(box=box_M, crop=crop_M, corners=parts_CN4[seen_CN])


def _offset(size: int, frame: int) -> int:
    """Where a picture begins on its frame, or, negative, what is cut off in front."""
    return (frame - size) // 2 if size <= frame else -((size - frame) // 2)
