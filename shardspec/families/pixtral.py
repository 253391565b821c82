"""Pixtral and Mistral 3: pictures of any size below a bound, with a token at the end of each row.

A picture is only ever made smaller, but for the last pixels that fill a patch. Pictures of a batch
are padded to the largest of them.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Pixtral:
    """The picture side of the models that use `PixtralProcessor`."""

    kind: ClassVar[str] = "pixtral"
    positions: ClassVar[Positions] = "plain"
    type_ids: ClassVar[str] = ""
    packs: ClassVar[bool] = True

    patch_px: int = 16
    merge: int = 1
    """Side of the square of patches that becomes one token."""
    longest_px: int = 1024
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    image_token: str = "[IMG]"  # noqa: S105 - tokens of text
    break_token: str = "[IMG_BREAK]"  # noqa: S105
    end_token: str = "[IMG_END]"  # noqa: S105
    filter: Filter = "bicubic"

    def __post_init__(self) -> None:
        require_numbers(self, patch_px=1, merge=1, longest_px=1)

    @property
    def tokens(self) -> PictureTokens:
        return PictureTokens(soft=self.image_token, marks=(self.break_token, self.end_token))

    def stored_size(self, size: Size) -> Size:
        return keep_smaller(size, self.plan(size).resized)

    def unlike(self, stored: Family) -> dict[str, str]:
        free = {"longest_px": True, "mean": False, "std": False}
        return different(self, stored, free=free)

    def plan(self, size: Size) -> PicturePlan:
        """Plans a picture; see `Family.plan`.

        >>> p = Pixtral().plan((427, 640))
        >>> p.resized, p.num_tokens
        ((432, 640), 1107)
        """
        height, width = size
        ratio = max(height / self.longest_px, width / self.longest_px)
        if ratio > 1:
            height, width = math.floor(height / ratio), math.floor(width / ratio)
        token = self.patch_px * self.merge
        if min(height, width) < 1:  # the processor cannot resize it
            raise SampleError("picture_shape", height=size[0], width=size[1], most=self.longest_px)
        rows, cols = ((side - 1) // token + 1 for side in (height, width))
        ends = [self.break_token] * (rows - 1) + [self.end_token]
        return PicturePlan(
            resized=(rows * token, cols * token),
            grid=(rows, cols),
            layout=tuple(run for end in ends for run in ((self.image_token, cols), (end, 1))),
        )
