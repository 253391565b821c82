"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: pictures of any size, cut into patches without tiles.

Both sides become multiples of patch x merge, the area is kept between two bounds, and merge x merge
patches become one token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from shardspec.errors import SampleError
from shardspec.families.plan import (
    Family,
    Filter,
    PicturePlan,
    PictureTokens,
    Positions,
    Size,
    different,
    keep_smaller,
    require_numbers,
)

MOST_ASPECT = 200
"""Longer sides divided by shorter ones beyond which the processor raises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen2VL:
    """The picture side of the models that use `Qwen2VLImageProcessor`."""

    kind: ClassVar[str] = "qwen2_vl"
    positions: ClassVar[Positions] = "mrope"
    type_ids: ClassVar[str] = "mm_token_type_ids"
    packs: ClassVar[bool] = True

    patch_px: int = 14
    merge: int = 2
    """Side of the square of patches that becomes one token."""
    temporal_patch: int = 2
    """Frames of a patch; a picture is repeated."""
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    """Smallest and largest area, in pixels."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    image_token: str = "<|image_pad|>"  # noqa: S105 - a token of text
    filter: Filter = "bicubic"

    def __post_init__(self) -> None:
        require_numbers(self, patch_px=1, merge=1, temporal_patch=1, min_pixels=1, max_pixels=1)

    @property
    def tokens(self) -> PictureTokens:
        return PictureTokens(soft=self.image_token)

    def stored_size(self, size: Size) -> Size:
        return keep_smaller(size, self._resized(size))

    def unlike(self, stored: Family) -> dict[str, str]:
        free = {"min_pixels": False, "max_pixels": True, "mean": False, "std": False}
        return different(self, stored, free=free)

    def plan(self, size: Size) -> PicturePlan:
        """Plans a picture; see `Family.plan`.

        >>> p = Qwen2VL().plan((427, 640))
        >>> p.resized, p.grid, p.num_tokens
        ((420, 644), (30, 46), 345)
        """
        resized = self._resized(size)
        rows, cols = resized[0] // self.patch_px, resized[1] // self.patch_px
        return PicturePlan(
            resized=resized,
            grid=(rows, cols),
            num_units=rows * cols,
            layout=((self.image_token, rows * cols // self.merge**2),),
        )

    def _resized(self, size: Size) -> Size:
        # The order of the operations is that of the processor, whose roundings are floats'.
        height, width = size
        if max(size) / min(size) > MOST_ASPECT:
            raise SampleError("picture_shape", height=height, width=width, most=MOST_ASPECT)
        factor = self.patch_px * self.merge
        h, w = (round(side / factor) * factor for side in size)
        if h * w > self.max_pixels:
            beta = math.sqrt((height * width) / self.max_pixels)
            h, w = (max(factor, math.floor(side / beta / factor) * factor) for side in size)
        elif h * w < self.min_pixels:
            beta = math.sqrt(self.min_pixels / (height * width))
            h, w = (math.ceil(side * beta / factor) * factor for side in size)
        return h, w
