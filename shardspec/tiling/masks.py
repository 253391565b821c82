"""The share of every patch that shows the picture and not padding."""

# Shape letters: R x C tiles of a picture, P patches per side of a crop.

from __future__ import annotations

import numpy as np

from shardspec.tiling.grid import select_tiling
from shardspec.tiling.sizes import fit_into, frame_size, overview_size
from shardspec.tiling.view import ImageView


def image_masks(width: int, height: int, view: ImageView) -> np.ndarray:
    """Computes the share of every patch that shows the picture and not padding.

    Returns:
      float32 [num_crops, patches of a crop] in [0, 1], the overview first; all ones unless fit is
      "pad".
    """
    rows, cols = select_tiling(width, height, view)
    masks = np.ones((1 + rows * cols, view.num_patches), np.float32)
    if view.fit != "pad":
        return masks
    size, side = view.size_px, view.patches_per_side
    columns, lines = (_covered(n, size, view) for n in overview_size(width, height, view))
    masks[0] = np.outer(lines, columns).ravel()
    if rows:
        frame = frame_size(width, height, view)
        canvas = fit_into(width, height, frame, view.fit)
        columns, lines = (_covered(n, f, view) for n, f in zip(canvas, frame, strict=True))
        patch_P = np.arange(side)
        lines_RP = lines[np.arange(rows)[:, None] * view.window_patches + patch_P]
        columns_CP = columns[np.arange(cols)[:, None] * view.window_patches + patch_P]
        tiles_RCPP = lines_RP[:, None, :, None] * columns_CP[None, :, None, :]
        masks[1:] = tiles_RCPP.reshape(rows * cols, -1)
    # Whole counts until here: one division gives the float32 nearest to the share.
    masks /= np.float32(view.patch_px**2)
    return masks


def _covered(length: int, frame: int, view: ImageView) -> np.ndarray:
    """Counts the pixels of a picture centred on a frame that fall into each patch, on one axis."""
    borders = np.arange(0, frame + 1, view.patch_px)
    return np.diff(np.clip(borders - (frame - length) // 2, 0, length))
