"""How a picture becomes crops, patches and image tokens: pure arithmetic, no pixels.

Both halves must agree on it: the planner counts tokens before any pixel is decoded, the loader cuts
crops and lays out tokens. Everything is a function of the *source* picture's width and height and
of an `ImageView`: grid, frame, crops, patches (`grid`), sizes (`sizes`), numbers of crops and
tokens (`counts`), the token block (`tokens`) and the patches of each token (`pooling`). The frames
of a video are pictures with a view of their own (`frames`).

The scheme, called "overlap-and-resize-c2", and its float32 arithmetic are those of the Molmo models
(allenai/molmo and allenai/molmo2). Nothing here touches pixels, draws at random or knows a
tokenizer.
"""

from shardspec.tiling.boxes import CropBoxes, boxes_on_crops
from shardspec.tiling.counts import (
    ImageBounds,
    image_bounds,
    image_lengths,
    num_crops,
    num_image_tokens,
)
from shardspec.tiling.frames import FrameMarks, FrameView
from shardspec.tiling.grid import crop_boxes, patch_grid, select_tiling, select_tilings
from shardspec.tiling.masks import image_masks
from shardspec.tiling.pooling import (
    EXCLUDED,
    NO_PATCH,
    first_patch_positions,
    first_patch_tokens,
    image_input_idx,
    token_pooling,
)
from shardspec.tiling.sizes import canvas_size, frame_size, overview_size, stored_size
from shardspec.tiling.tokens import ImageTokenIds, image_token_ids
from shardspec.tiling.view import CropMode, Fit, ImageView, OverviewStart, Pooling, SmallSides

__all__ = [
    "CropBoxes",
    "CropMode",
    "EXCLUDED",
    "Fit",
    "FrameMarks",
    "FrameView",
    "ImageBounds",
    "ImageTokenIds",
    "ImageView",
    "NO_PATCH",
    "OverviewStart",
    "Pooling",
    "SmallSides",
    "boxes_on_crops",
    "canvas_size",
    "crop_boxes",
    "first_patch_positions",
    "first_patch_tokens",
    "frame_size",
    "image_bounds",
    "image_input_idx",
    "image_lengths",
    "image_masks",
    "image_token_ids",
    "num_crops",
    "num_image_tokens",
    "overview_size",
    "patch_grid",
    "select_tiling",
    "select_tilings",
    "stored_size",
    "token_pooling",
]
