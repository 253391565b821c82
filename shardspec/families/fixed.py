"""Models that see every picture at one size: LLaVA 1.5 and others with a CLIP or SigLIP tower.

The picture is squashed to the size, or its short side is resized to it and the centre is cut out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

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

MOST_PIXELS = 1 << 26
"""Largest resized picture, in pixels. The centre of a picture of 1 x 8,000 would be cut out of one
of 900 million."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedSize:
    """The picture side of a model with pictures of one size."""

    kind: ClassVar[str] = "fixed"
    positions: ClassVar[Positions] = "plain"
    type_ids: ClassVar[str] = ""
    packs: ClassVar[bool] = True

    size_px: int = 336
    """Side of the square that the model sees."""
    fit: Literal["squash", "center-crop"] = "center-crop"
    num_tokens: int = 576
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    image_token: str = "<image>"  # noqa: S105 - a token of text
    filter: Filter = "bicubic"

    def __post_init__(self) -> None:
        require_numbers(self, size_px=1, num_tokens=1)

    @property
    def tokens(self) -> PictureTokens:
        return PictureTokens(soft=self.image_token)

    def plan(self, size: Size) -> PicturePlan:
        """Plans a picture; see `Family.plan`.

        >>> p = FixedSize().plan((427, 640))
        >>> p.resized, p.num_tokens
        ((336, 503), 576)
        """
        layout = ((self.image_token, self.num_tokens),)
        return PicturePlan(resized=self._resized(size), layout=layout)

    def stored_size(self, size: Size) -> Size:
        resized = self._resized(size)
        if resized[0] * resized[1] > MOST_PIXELS:
            raise SampleError(
                "picture_shape", height=size[0], width=size[1], most=MOST_PIXELS // self.size_px**2
            )
        return keep_smaller(size, resized)

    def unlike(self, stored: Family) -> dict[str, str]:
        return different(self, stored, free={"mean": False, "std": False, "num_tokens": False})

    def _resized(self, size: Size) -> Size:
        side = self.size_px
        if self.fit == "squash":
            return side, side
        height, width = size
        if width <= height:
            return int(side * height / width), side
        return side, int(side * width / height)
