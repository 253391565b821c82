"""Which patches each image token pools, and where the tokens of each crop are in the text.

Groups of patches are pooled into one token each (`token_pooling`); `image_input_idx` is the same
map seen from the crops.
"""

# Shape letters: R x C tokens of a picture, H x W patches of the frame.

from __future__ import annotations

import functools

import numpy as np

from shardspec.tiling.counts import block_tokens, ceil_div
from shardspec.tiling.grid import grid_patches, owners, select_tiling
from shardspec.tiling.tokens import ImageTokenIds, grid_token_ids
from shardspec.tiling.view import ImageView, require_field

EXCLUDED = -100
"""Entry of `image_input_idx` for a pooled token that is at no position of the text."""

NO_PATCH = -1
"""Entry of `token_pooling` beyond the border of the patch grid."""


def token_pooling(width: int, height: int, view: ImageView) -> np.ndarray:
    """Lists the patches that each `im_patch` token of an image pools, in the order of the tokens.

    Returns:
      int64 [num_pooled, pool rows * pool columns], row-major inside a group: indices into the
      flattened (crop, patch) list, -1 (`NO_PATCH`) beyond the border; read-only.
    """
    rows, cols = select_tiling(width, height, view)
    pooling: np.ndarray = _kept_pooling(rows, cols, view)
    return pooling


@functools.lru_cache(maxsize=256)
def _kept_pooling(rows: int, cols: int, view: ImageView) -> np.ndarray:
    pooling = _token_pooling(rows, cols, view)
    pooling.setflags(write=False)
    return pooling


def _token_pooling(rows: int, cols: int, view: ImageView) -> np.ndarray:
    side = view.patches_per_side
    overview = np.arange(side**2).reshape(side, side)
    if view.pooling == "global":
        grids = [overview, grid_patches(rows, cols, view)]
        return np.concatenate([_pool_global(grid, view.pool) for grid in grids])
    # Per crop, padding is at the end alone: token k of a crop starts at patch k * pool.
    padded = np.full(tuple(np.multiply(view.crop_tokens, view.pool)), NO_PATCH, np.int64)
    padded[:side, :side] = overview
    groups = _group(padded, view.pool)
    if rows == 0:
        return groups
    crop_RC, cell_RC = _token_cells(rows, cols, view)
    high_res = groups[cell_RC.ravel()]
    shift = crop_RC.reshape(-1, 1) * view.num_patches
    return np.concatenate([groups, np.where(high_res == NO_PATCH, NO_PATCH, high_res + shift)])


def first_patch_tokens(width: int, height: int, view: ImageView) -> np.ndarray:
    """Finds the first `im_patch` token of an image that pools a patch of each crop.

    Returns:
      int64 [num_crops], numbers of the image's `im_patch` tokens; read-only.

    >>> first_patch_tokens(640, 480, ImageView(crop_mode="overlap-and-resize-c2", max_crops=2))
    array([  0, 144, 154])
    """
    rows, cols = select_tiling(width, height, view)
    return _first_patch_tokens(rows, cols, view)


@functools.lru_cache(maxsize=1024)
def _first_patch_tokens(rows: int, cols: int, view: ImageView) -> np.ndarray:
    pooled = _token_pooling(rows, cols, view)
    crop_of = np.where(pooled == NO_PATCH, -1, pooled // view.num_patches)
    firsts = [np.argmax((crop_of == c).any(axis=1)) for c in range(1 + rows * cols)]
    array = np.array(firsts, np.int64)
    array.setflags(write=False)
    return array


def first_patch_positions(
    width: int, height: int, view: ImageView, ids: ImageTokenIds
) -> np.ndarray:
    """Finds the tokens of `first_patch_tokens` in the block of `image_token_ids`.

    Returns:
      int64 [num_crops], positions in the block; read-only.
    """
    rows, cols = select_tiling(width, height, view)
    return _first_patch_positions(rows, cols, view, ids)


@functools.lru_cache(maxsize=1024)
def _first_patch_positions(rows: int, cols: int, view: ImageView, ids: ImageTokenIds) -> np.ndarray:
    patches = np.flatnonzero(grid_token_ids(rows, cols, view, ids) == ids.im_patch)
    positions: np.ndarray = patches[_first_patch_tokens(rows, cols, view)]
    positions.setflags(write=False)
    return positions


def _pool_global(grid_HW: np.ndarray, pool: tuple[int, int]) -> np.ndarray:
    """Pads a grid of indices to whole groups, the odd line at the end, and groups it."""
    height, width = grid_HW.shape
    full = (ceil_div(height, pool[0]) * pool[0], ceil_div(width, pool[1]) * pool[1])
    top, left = (full[0] - height) // 2, (full[1] - width) // 2
    padded = np.full(full, NO_PATCH, np.int64)
    padded[top : top + height, left : left + width] = grid_HW
    return _group(padded, pool)


def _group(grid_HW: np.ndarray, pool: tuple[int, int]) -> np.ndarray:
    """Cuts a grid into groups of pool rows x pool columns: [groups, pool rows * pool columns]."""
    height, width = grid_HW.shape
    blocks = grid_HW.reshape(height // pool[0], pool[0], width // pool[1], pool[1])
    groups: np.ndarray = blocks.transpose(0, 2, 1, 3).reshape(-1, pool[0] * pool[1])
    return groups


def _token_cells(rows: int, cols: int, view: ImageView) -> tuple[np.ndarray, np.ndarray]:
    """Finds the high-resolution tokens in the crops, for pooling that stays inside crops.

    Pooled by the pool, an axis of patches is an axis of tokens with the same structure: margins and
    windows, each divided by the pool.

    Returns:
      Two int64 [R, C]: the crop of each token, from 1, and its cell of the crop's token grid.
    """
    left, right = view.margin_patches
    (pool_rows, pool_cols), window = view.pool, view.window_patches
    tile_R, y_R = owners(rows, left // pool_rows, ceil_div(window, pool_rows), right // pool_rows)
    tile_C, x_C = owners(cols, left // pool_cols, ceil_div(window, pool_cols), right // pool_cols)
    crop_RC = 1 + tile_R[:, None] * cols + tile_C
    return crop_RC, y_R[:, None] * view.crop_tokens[1] + x_C


def image_input_idx(width: int, height: int, view: ImageView, *, offset: int = 0) -> np.ndarray:
    """Places the pooled tokens of every crop in the text (the layout of the 2024 release).

    Args:
      width: Width of the upright source, in pixels, >= 1.
      height: Height of the upright source, in pixels, >= 1.
      view: Its pooling must stay inside crops: "per-crop", or a pool that divides both margins and
        the window, or no tiles at all.
      offset: Position of the block's first token in the input sequence.

    Returns:
      int32 [num_crops, tokens of a crop]: positions in the input sequence, row 0 for the overview;
      -100 (`EXCLUDED`) for tokens in a neighbour's part of an overlap.

    Raises:
      ConfigError: `image_view`, for pooling across crops.
    """
    rows, cols = select_tiling(width, height, view)
    if rows and view.pooling == "global":
        parts = (*view.margin_patches, view.window_patches)
        inside = all(part % p == 0 for part in parts for p in view.pool)
        want = f'"per-crop" for image_input_idx, or a pool that divides {parts} patches'
        require_field(view, "pooling", inside, want)
    token_rows, token_cols = view.crop_tokens
    idx = np.full((1 + rows * cols, token_rows * token_cols), EXCLUDED, np.int32)
    columns = view.overview_column_tokens
    idx[0] = _positions(token_rows, token_cols, columns, first=offset + 1).ravel()
    if rows:
        first = offset + block_tokens(token_rows, token_cols, columns) + 1
        crop_RC, cell_RC = _token_cells(rows, cols, view)
        num_rows, num_cols = crop_RC.shape
        idx[crop_RC, cell_RC] = _positions(num_rows, num_cols, view.column_tokens, first=first)
    return idx


def _positions(rows: int, cols: int, column_tokens: bool, *, first: int) -> np.ndarray:
    """Numbers the `im_patch` tokens of one block: int64 [rows, cols], skipping column tokens."""
    starts = first + np.arange(rows)[:, None] * (cols + column_tokens)
    positions: np.ndarray = starts + np.arange(cols)
    return positions
