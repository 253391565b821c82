"""PaliGemma: every picture squashed to one size; a question is seen as a whole, an answer causally.

Its batches say by `token_type_ids` which tokens are of the answer. Pictures come first, then BOS.
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
class PaliGemma:
    """The picture side of PaliGemma and PaliGemma 2."""

    kind: ClassVar[str] = "paligemma"
    positions: ClassVar[Positions] = "from_one"
    type_ids: ClassVar[str] = "token_type_ids"
    size_px: int = 224
    num_tokens: int = 256
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_token: str = "<image>"  # noqa: S105 - a token of text
    filter: Filter = "bicubic"
    sliding_window: int | None = None
    """How many tokens the sliding layers of PaliGemma 2 see; 0 where there are none, None where it
    is not known."""

    def __post_init__(self) -> None:
        require_numbers(self, size_px=1, num_tokens=1)

    @property
    def packs(self) -> bool:
        return self.sliding_window is not None

    @property
    def tokens(self) -> PictureTokens:
        return PictureTokens(soft=self.image_token)

    def plan(self, size: Size) -> PicturePlan:
        """Plans every picture alike; see `Family.plan`.

        >>> p = PaliGemma().plan((427, 640))
        >>> p.resized, p.num_tokens
        ((224, 224), 256)
        """
        del size
        layout = ((self.image_token, self.num_tokens),)
        return PicturePlan(resized=(self.size_px, self.size_px), layout=layout)

    def stored_size(self, size: Size) -> Size:
        return keep_smaller(size, (self.size_px, self.size_px))

    def unlike(self, stored: Family) -> dict[str, str]:
        return different(self, stored, free={"mean": False, "std": False, "sliding_window": False})
