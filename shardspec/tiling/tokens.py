"""The token block of an image: `[start] rows [end]` of the overview, and of the tiles."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from shardspec.tiling.counts import block_tokens, tokens_along
from shardspec.tiling.grid import select_tiling
from shardspec.tiling.view import ImageView


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTokenIds:
    """The vocabulary entries that an image block is made of."""

    im_start: int
    im_end: int
    im_patch: int
    """Stands where a pooled image feature goes."""
    im_col: int
    """Ends a row of `im_patch`."""
    low_res_im_start: int
    """Opens an overview whose view says so."""


def image_token_ids(width: int, height: int, view: ImageView, ids: ImageTokenIds) -> np.ndarray:
    """Lays out the token block of one image.

    `[start] overview rows [im_end]`, and for tiles `[im_start] high-resolution rows [im_end]`;
    where the view says so, each row ends with `im_col`.

    Returns:
      int32 [num_image_tokens]; read-only.
    """
    rows, cols = select_tiling(width, height, view)
    block: np.ndarray = grid_token_ids(rows, cols, view, ids)
    return block


@functools.lru_cache(maxsize=1024)
def grid_token_ids(rows: int, cols: int, view: ImageView, ids: ImageTokenIds) -> np.ndarray:
    start = ids.im_start if view.overview_start == "im_start" else ids.low_res_im_start
    parts = [_block_ids(*view.crop_tokens, start, view.overview_column_tokens, ids)]
    if rows:
        token_rows = tokens_along(rows, view, view.pool[0])
        token_cols = tokens_along(cols, view, view.pool[1])
        parts.append(_block_ids(token_rows, token_cols, ids.im_start, view.column_tokens, ids))
    block: np.ndarray = np.concatenate(parts)
    block.setflags(write=False)
    return block


def _block_ids(
    rows: int, cols: int, start: int, column_tokens: bool, ids: ImageTokenIds
) -> np.ndarray:
    block = np.full(block_tokens(rows, cols, column_tokens), ids.im_patch, np.int32)
    block[0] = start
    block[-1] = ids.im_end
    if column_tokens:
        block[1:-1].reshape(rows, cols + 1)[:, -1] = ids.im_col
    return block
