"""Sizes in pixels: what a picture is resized to, and how large it is stored.

The picture is resized to `canvas_size`, which fills the frame that crops are cut from, or is
centred on it (fit "pad"); the overview is the whole picture at `overview_size`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from shardspec.errors import ConfigError
from shardspec.tiling.grid import check_size, select_tiling
from shardspec.tiling.view import Fit, ImageView


def canvas_size(width: int, height: int, view: ImageView) -> tuple[int, int]:
    """Computes the size that the source is resized to before crops are cut.

    Args:
      width: Width of the upright source, in pixels, >= 1.
      height: Height of the upright source, in pixels, >= 1.
      view: With fit "pad" the canvas is the picture without its padding, centred on the frame; with
        "center-crop" its shorter side is `size_px`, and the longer one is cut afterwards.

    Returns:
      (width, height) in pixels.

    >>> tiled = ImageView(crop_mode="overlap-and-resize-c2")
    >>> canvas_size(640, 480, ImageView()), canvas_size(640, 480, tiled)
    ((336, 336), (784, 560))
    """
    return fit_into(width, height, frame_size(width, height, view), view.fit)


def overview_size(width: int, height: int, view: ImageView) -> tuple[int, int]:
    """Computes the size that the source is resized to for the overview crop: (width, height).

    It is `canvas_size` of the same view without tiles, and never larger than the canvas.
    """
    check_size(width, height)
    return fit_into(width, height, (view.size_px, view.size_px), view.fit)


def frame_size(width: int, height: int, view: ImageView) -> tuple[int, int]:
    """Computes the size of the frame that crops are cut from: (width, height) in pixels.

    Equal to `canvas_size` for fit "stretch". For "pad" the canvas is centred on the frame with
    (frame - canvas) // 2 pixels of padding left and above; for "center-crop" the frame is on the
    canvas, (canvas - frame) // 2 pixels from its left and upper borders.
    """
    rows, cols = select_tiling(width, height, view)
    if view.crop_mode == "resize":
        return view.size_px, view.size_px
    return cols * view.window_px + view.margin_px, rows * view.window_px + view.margin_px


def stored_size(
    width: int, height: int, views: Sequence[ImageView], *, headroom: float = 1.0
) -> tuple[int, int]:
    """Computes the size to store a picture at, so that it serves every one of the views.

    Each axis is the largest canvas that a view needs, times the head room, and never more than the
    source has. The overview needs no more than the canvas. Fits that keep the aspect keep it
    here too, to a rounding of the head room's size.

    Args:
      width: Width of the upright source, in pixels, >= 1.
      height: Height of the upright source, in pixels, >= 1.
      views: At least one; two crop budgets are two views.
      headroom: Factor >= 1 on both axes, for training that resizes or crops again.

    Returns:
      (width, height) in pixels.

    Raises:
      ConfigError: `stored_size`, for no view or a head room below 1.

    >>> stored_size(4000, 3000, [ImageView(crop_mode="overlap-and-resize-c2")])
    (1008, 784)
    """
    if not views or not 1 <= headroom < math.inf:
        raise ConfigError("stored_size", num_views=len(views), headroom=headroom)
    canvases = [canvas_size(width, height, view) for view in views]
    need_width = math.ceil(headroom * max(w for w, _ in canvases))
    need_height = math.ceil(headroom * max(h for _, h in canvases))
    return min(width, need_width), min(height, need_height)


def fit_into(width: int, height: int, frame: tuple[int, int], fit: Fit) -> tuple[int, int]:
    if fit == "stretch":
        return frame
    if fit == "center-crop":  # the frame is square: views refuse it together with tiles
        side, short = frame[0], min(width, height)
        return side * width // short, side * height // short
    # float32 and truncation as the models were trained with; in float64 some sizes come out one
    # pixel larger. Neither axis can pass the frame: w * (f / w) rounds to at most the float32
    # above f, which truncates to f.
    w, h = np.float32(width), np.float32(height)
    scale = min(np.float32(frame[0]) / w, np.float32(frame[1]) / h)
    return max(1, int(w * scale)), max(1, int(h * scale))
