"""Counts of crops and tokens, for one image, for many, and at most."""

# Shape letters: N images, K candidate grids.

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardspec.tiling.grid import candidate_grids, select_tiling, select_tilings
from shardspec.tiling.view import ImageView


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageBounds:
    """The most that one image of any size can need."""

    num_crops: int
    """Crops, the overview included."""
    num_tokens: int
    """Tokens of the block, the structure tokens included."""
    num_pooled: int
    """Tokens of pooled patches: rows of `token_pooling`."""


def num_crops(width: int, height: int, view: ImageView) -> int:
    """Counts the crops of an image, the overview included."""
    rows, cols = select_tiling(width, height, view)
    return 1 + rows * cols


@functools.lru_cache(maxsize=1 << 14)
def num_image_tokens(width: int, height: int, view: ImageView) -> int:
    """Counts the tokens of an image's block, start, end and column tokens included.

    >>> num_image_tokens(640, 480, ImageView(crop_mode="overlap-and-resize-c2"))
    728
    """
    _, num_tokens = image_lengths(np.array([width]), np.array([height]), view)
    return int(num_tokens[0])


def image_lengths(
    widths: np.ndarray, heights: np.ndarray, view: ImageView
) -> tuple[np.ndarray, np.ndarray]:
    """Counts the crops and the tokens of many images; equals the functions for one image.

    A million images take well under a second.

    Args:
      widths: Integers [N], in pixels, >= 1.
      heights: Integers [N], in pixels, >= 1.
      view: The view.

    Returns:
      (`num_crops`, `num_image_tokens`), int64 [N] each.

    Raises:
      SampleError: `image_size`, for a size below 1 pixel.
    """
    grids_N2 = select_tilings(widths, heights, view)
    crops_N, tokens_N, _ = _lengths(grids_N2, view)
    return crops_N, tokens_N


def image_bounds(view: ImageView) -> ImageBounds:
    """Computes the most that an image of any size can need, each count by itself.

    >>> image_bounds(ImageView())
    ImageBounds(num_crops=1, num_tokens=146, num_pooled=144)
    """
    tiled = view.crop_mode != "resize"
    grids_K2 = candidate_grids(view.max_crops) if tiled else np.zeros((1, 2), np.int64)
    crops, tokens, pooled = (int(counts.max()) for counts in _lengths(grids_K2, view))
    return ImageBounds(num_crops=crops, num_tokens=tokens, num_pooled=pooled)


def _lengths(grids_N2: np.ndarray, view: ImageView) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts (crops, tokens, pooled tokens) of grids, int64 [N] each."""
    crops_N = 1 + grids_N2[:, 0] * grids_N2[:, 1]
    rows, cols = view.crop_tokens
    pooled_N = np.full(len(grids_N2), rows * cols)
    tokens_N = np.full(len(grids_N2), block_tokens(rows, cols, view.overview_column_tokens))
    if view.crop_mode != "resize":
        rows_N = tokens_along(grids_N2[:, 0], view, view.pool[0])
        cols_N = tokens_along(grids_N2[:, 1], view, view.pool[1])
        pooled_N += rows_N * cols_N
        tokens_N += block_tokens(rows_N, cols_N, view.column_tokens)
    return crops_N, tokens_N, pooled_N


def block_tokens(rows: Any, cols: Any, column_tokens: bool) -> Any:
    """Counts a start token, the rows and an end token; integers or arrays of them."""
    return 1 + rows * (cols + column_tokens) + 1


def tokens_along(num_tiles: Any, view: ImageView, pool: int) -> Any:
    """Counts the pooled tokens along one axis of the frame; an integer or an array of them."""
    window, margins = view.window_patches, sum(view.margin_patches)
    if view.pooling == "global":
        return ceil_div(num_tiles * window + margins, pool)
    # The pool divides each margin, so only the windows are rounded up.
    return num_tiles * ceil_div(window, pool) + margins // pool


def ceil_div(number: Any, divisor: int) -> Any:
    return -(-number // divisor)
