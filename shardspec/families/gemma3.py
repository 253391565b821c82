"""Gemma 3: every picture squashed to one size, its tokens between marks and line breaks.

Pan and scan adds crops of long pictures, each squashed to the same size, and a sentence that says
so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemma3:
    """The picture side of Gemma 3."""

    kind: ClassVar[str] = "gemma3"
    positions: ClassVar[Positions] = "plain"
    type_ids: ClassVar[str] = "token_type_ids"
    size_px: int = 896
    num_tokens: int = 256
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    start_token: str = "<start_of_image>"  # noqa: S105 - tokens of text
    image_token: str = "<image_soft_token>"  # noqa: S105
    end_token: str = "<end_of_image>"  # noqa: S105
    filter: Filter = "bilinear"
    pan_and_scan: tuple[int, int, float] | None = None
    """Shortest side of a crop in pixels, most crops, and the least ratio of sides of a picture that
    has any; None for none."""
    sliding_window: int | None = None
    """How many tokens the model's sliding layers see, for the masks of packed rows; None where it
    is not known."""

    def __post_init__(self) -> None:
        require_numbers(self, size_px=1, num_tokens=1)

    @property
    def packs(self) -> bool:
        return self.sliding_window is not None

    @property
    def tokens(self) -> PictureTokens:
        # The processor writes all of it where the template has the first mark.
        around = f"\n\n{self.start_token}{self.image_token}{self.end_token}\n\n"
        return PictureTokens(soft=self.image_token, marker=self.start_token, written=around)

    def plan(self, size: Size) -> PicturePlan:
        """Plans every picture alike; see `Family.plan`.

        >>> p = Gemma3().plan((427, 640))
        >>> p.resized, p.num_tokens
        ((896, 896), 256)
        """
        crops = self.grid(size)
        count = 0 if crops == (1, 1) else crops[0] * crops[1]
        return PicturePlan(
            resized=(self.size_px, self.size_px),
            grid=crops,
            num_units=1 + count,
            layout=((self.image_token, self.num_tokens),),
            num_blocks=1 + count,
        )

    def grid(self, size: Size) -> tuple[int, int]:
        """Computes the (rows, columns) of crops that a picture has; (1, 1) for none.

        >>> Gemma3(pan_and_scan=(256, 4, 1.2)).grid((600, 1900))
        (1, 3)
        """
        if self.pan_and_scan is None:
            return 1, 1
        (least_px, most, ratio), (short, long) = self.pan_and_scan, sorted(size)
        if long / short < ratio:
            return 1, 1
        count = min(int(math.floor(long / least_px)), int(math.floor(long / short + 0.5)))
        count = min(most, max(2, count))
        if min(math.ceil(long / count), short) < least_px:
            return 1, 1
        return (1, count) if size[1] >= size[0] else (count, 1)

    def written(self, num_crops: int) -> str:
        """Gives what the processor writes for the marker of a picture."""
        whole = self.tokens.written
        if not num_crops:
            return whole
        crops = " ".join([whole] * num_crops)
        told = "and here are some crops to help you see better"
        return f"Here is the original image {whole} {told} {crops}"

    def stored_size(self, size: Size) -> Size:
        if self.grid(size) != (1, 1):  # crops are made of the original
            return size
        return keep_smaller(size, (self.size_px, self.size_px))

    def unlike(self, stored: Family) -> dict[str, str]:
        return different(self, stored, free={"mean": False, "std": False, "sliding_window": False})
