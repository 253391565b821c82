"""Gemma 3: every picture squashed to one size, its tokens between marks and line breaks.

Pan and scan, which adds crops, is not done.
"""

from __future__ import annotations

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
    packs: ClassVar[bool] = False
    """The masks that transformers 5.23 makes for the sliding layers of packed rows let some tokens
    see what follows them."""

    size_px: int = 896
    num_tokens: int = 256
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    start_token: str = "<start_of_image>"  # noqa: S105 - tokens of text
    image_token: str = "<image_soft_token>"  # noqa: S105
    end_token: str = "<end_of_image>"  # noqa: S105
    filter: Filter = "bilinear"

    def __post_init__(self) -> None:
        require_numbers(self, size_px=1, num_tokens=1)

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
        del size
        layout = ((self.image_token, self.num_tokens),)
        return PicturePlan(resized=(self.size_px, self.size_px), layout=layout)

    def stored_size(self, size: Size) -> Size:
        return keep_smaller(size, (self.size_px, self.size_px))

    def unlike(self, stored: Family) -> dict[str, str]:
        return different(self, stored, free={"mean": False, "std": False})
