"""The grid of tiles of a picture, and where its crops and their patches are.

1. `select_tiling` picks rows x columns of tiles, at most `max_crops` of them.
2. The frame spans rows x cols windows and one pair of margins. Crops 1 ... are cut from it in
   row-major order (`crop_boxes`); neighbours overlap by both margins. Crop 0 is the overview.
3. Of every overlap each crop keeps the part that is nearer to its own centre, so that every patch
   of the frame belongs to exactly one crop (`patch_grid`).
"""

# Shape letters: N images, K candidate grids, H x W patches of the frame. The last axis of a size is
# always (width, height), of a grid (rows, columns).

from __future__ import annotations

import functools

import numpy as np

from shardspec.errors import SampleError
from shardspec.tiling.view import ImageView

# Sizes compared with all candidate grids at once. For 1e6 sizes and 24 crops (84 grids), measured
# here: 2048 takes 0.29 s, 65536 takes 0.57 s because the tables fall out of the cache.
_CHUNK = 2048


def select_tiling(width: int, height: int, view: ImageView) -> tuple[int, int]:
    """Chooses the grid of high-resolution tiles, (rows, columns); (0, 0) for "resize".

    The grid that holds the picture with the least enlargement; where none holds it, the grid that
    shrinks it least; of equals, the one with fewer tiles, then fewer rows.

    >>> select_tiling(1920, 1080, ImageView(crop_mode="overlap-and-resize-c2"))
    (3, 4)
    """
    check_size(width, height)
    return (0, 0) if view.crop_mode == "resize" else _select_tiling(width, height, view)


@functools.lru_cache(maxsize=1 << 14)
def _select_tiling(width: int, height: int, view: ImageView) -> tuple[int, int]:
    # Cached: an example needs it eight times for each of its images, 30 µs each.
    rows, cols = select_tilings(np.array([width]), np.array([height]), view)[0].tolist()
    return rows, cols


def select_tilings(widths: np.ndarray, heights: np.ndarray, view: ImageView) -> np.ndarray:
    """Chooses the grids of many images; equals `select_tiling` for each.

    Args:
      widths: Integers [N], in pixels, >= 1.
      heights: Integers [N], in pixels, >= 1.
      view: The view.

    Returns:
      int64 [N, 2], (rows, columns).

    Raises:
      SampleError: `image_size`, for a size below 1 pixel.
    """
    widths, heights = np.asarray(widths, np.int64), np.asarray(heights, np.int64)
    bad = np.flatnonzero((widths < 1) | (heights < 1))
    if len(bad):
        check_size(int(widths[bad[0]]), int(heights[bad[0]]))
    chosen_N2 = np.zeros((len(widths), 2), np.int64)
    if view.crop_mode == "resize":
        return chosen_N2
    grids_K2 = candidate_grids(view.max_crops)
    # float32 as the models were trained with; it calls scales equal that are not, but only for
    # sides of millions of pixels.
    targets_K2 = (grids_K2 * view.window_px).astype(np.float32)
    # Sides inside the margins: at least one pixel, or left negative, so that all scales are, and
    # the one nearest to 0 is a single tile's.
    least = 1 if view.small_sides == "training" else -view.margin_px
    heights_N = np.maximum(heights - view.margin_px, least).astype(np.float32)
    widths_N = np.maximum(widths - view.margin_px, least).astype(np.float32)
    for start in range(0, len(widths), _CHUNK):
        part = slice(start, start + _CHUNK)
        with np.errstate(divide="ignore"):  # a side of just the margins: any grid holds it
            scale_NK = np.minimum(
                targets_K2[:, 0] / heights_N[part, None], targets_K2[:, 1] / widths_N[part, None]
            )
        holds_NK = scale_NK >= 1
        least_enlarged_N = np.where(holds_NK, scale_NK, np.float32(np.inf)).argmin(axis=1)
        least_shrunk_N = scale_NK.argmax(axis=1)
        best_N = np.where(holds_NK.any(axis=1), least_enlarged_N, least_shrunk_N)
        chosen_N2[part] = grids_K2[best_N]
    return chosen_N2


@functools.lru_cache(maxsize=64)
def candidate_grids(max_crops: int) -> np.ndarray:
    """Lists all grids of at most max_crops tiles, the one preferred among equals first."""
    grids = [(i, j) for i in range(1, max_crops + 1) for j in range(1, max_crops // i + 1)]
    grids.sort(key=lambda grid: (grid[0] * grid[1], grid[0]))
    array = np.array(grids, np.int64)
    array.setflags(write=False)
    return array


def crop_boxes(width: int, height: int, view: ImageView) -> np.ndarray:
    """Computes where the high-resolution crops are on the frame, in the order of crops 1, 2 ...

    Returns:
      int32 [num_crops - 1, 4], (x0, y0, x1, y1) in pixels; x1 and y1 are exclusive. No rows for
      crop_mode "resize".
    """
    rows, cols = select_tiling(width, height, view)
    boxes = np.empty((rows, cols, 4), np.int32)
    boxes[..., 0] = np.arange(cols) * view.window_px
    boxes[..., 1] = np.arange(rows)[:, None] * view.window_px
    boxes[..., 2:] = boxes[..., :2] + view.size_px
    return boxes.reshape(-1, 4)


def patch_grid(width: int, height: int, view: ImageView) -> np.ndarray:
    """Maps the patches of the frame to the crops that they belong to.

    Returns:
      int64 [H, W], indices into the flattened (crop, patch row, patch column) list, in which crop 0
      is the overview. [0, 0] for crop_mode "resize".
    """
    rows, cols = select_tiling(width, height, view)
    return grid_patches(rows, cols, view)


def grid_patches(rows: int, cols: int, view: ImageView) -> np.ndarray:
    if rows == 0:
        return np.empty((0, 0), np.int64)
    side, (left, right) = view.patches_per_side, view.margin_patches
    tile_H, y_H = owners(rows, left, view.window_patches, right)
    tile_W, x_W = owners(cols, left, view.window_patches, right)
    row_H = (1 + tile_H * cols) * side**2 + y_H * side
    grid_HW: np.ndarray = row_H[:, None] + (tile_W * side**2 + x_W)
    return grid_HW


def owners(num_tiles: int, left: int, window: int, right: int) -> tuple[np.ndarray, np.ndarray]:
    """Assigns the cells of one axis to tiles: (tile, cell inside the tile), int64 each.

    Tile t spans the cells from t * window on, and owns its window; the first and the last tile own
    the outer margins as well.
    """
    cells = np.arange(left + num_tiles * window + right)
    tiles = np.clip((cells - left) // window, 0, num_tiles - 1)
    return tiles, cells - tiles * window


def check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise SampleError("image_size.empty", width=width, height=height)
