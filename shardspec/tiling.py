"""How a picture becomes crops, patches and image tokens: pure arithmetic, no pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CropMode = Literal["resize", "overlap-and-resize-c2"]
Fit = Literal["stretch", "pad", "center-crop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageView:
    """What a model sees of one image."""

    size_px: int = 336
    """Side of a crop (base size), a multiple of patch_px."""
    patch_px: int = 14
    """Side of a vision patch."""
    crop_mode: CropMode = "resize"
    """"resize": one crop of the whole image; "overlap-and-resize-c2": an overview and tiles."""
    fit: Fit = "stretch"
    """How the image meets the canvas: stretched, padded (aspect kept), or centre-cropped."""
    max_crops: int = 12
    """Most high-resolution crops; the overview is not counted. Not used by "resize"."""
    margin_patches: tuple[int, int] = (4, 4)
    """Overlap margins (left/top, right/bottom) of a tile, in patches. Not used by "resize"."""
    pool: tuple[int, int] = (2, 2)
    """Patches pooled into one image token, (rows, columns)."""
    overview_column_tokens: bool = False
    """End each row of overview tokens with a column token."""
    column_tokens: bool = True
    """End each row of high-resolution tokens with a column token."""
