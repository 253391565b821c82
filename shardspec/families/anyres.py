"""LLaVA-NeXT and LLaVA-OneVision: tiles of the best of a list of resolutions, and an overview.

The picture is fitted into the resolution that keeps most of its pixels, padded with black around
its centre and cut into tiles; the first tile is the whole picture squashed. The model drops the
features of the padding and puts a newline feature after each row. In LLaVA-OneVision each of
several pictures of a sample is one tile, padded to a square.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from shardspec.errors import ConfigError
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

MOST_RATIO = 1.1
"""How far the number of features may exceed its bound, as a ratio of sides, before they are
resized."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnyRes:
    """The picture side of LLaVA-NeXT and LLaVA-OneVision."""

    kind: ClassVar[str] = "anyres"
    positions: ClassVar[Positions] = "plain"
    type_ids: ClassVar[str] = ""
    packs: ClassVar[bool] = True

    size_px: int = 336
    """Side of a tile."""
    resolutions: tuple[Size, ...] = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    """(height, width) of what tiles may cover, in the order of the configuration."""
    patches: int = 24
    """Features per side of a tile."""
    num_tokens: int = 576
    """Of the overview."""
    most_tiles: int = 0
    """Tiles whose features are kept at full resolution; 0 for all. More are resized to these."""
    single_tiles: bool = False
    """Whether each of several pictures of a sample is one tile."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    image_token: str = "<image>"  # noqa: S105 - a token of text
    filter: Filter = "bicubic"

    def __post_init__(self) -> None:
        require_numbers(self, size_px=1, patches=1, num_tokens=1, most_tiles=0)
        multiples = [side % self.size_px == 0 < side for size in self.resolutions for side in size]
        if not multiples or not all(multiples):
            raise ConfigError(
                "family_field",
                where="AnyRes.resolutions",
                name="resolutions",
                got=repr(self.resolutions),
                want=f"(height, width) pairs of multiples of size_px={self.size_px}",
            )

    @property
    def tokens(self) -> PictureTokens:
        return PictureTokens(soft=self.image_token)

    def stored_size(self, size: Size) -> Size:
        return keep_smaller(size, self.plan(size).resized)

    def unlike(self, stored: Family) -> dict[str, str]:
        return different(self, stored, free={"mean": False, "std": False})

    def one_tile(self) -> PicturePlan:
        """Plans each of several pictures of a sample, with `single_tiles`."""
        return PicturePlan(
            resized=(self.size_px, self.size_px),
            grid=(0, 0),
            layout=((self.image_token, self.num_tokens + 1),),
        )

    def plan(self, size: Size) -> PicturePlan:
        """Plans the picture of a sample; see `Family.plan`.

        >>> p = AnyRes().plan((427, 640))
        >>> p.resized, p.grid, p.num_tokens
        ((449, 672), (2, 2), 2144)
        """
        height, width = self._resolution(size)
        rows, cols = height // self.size_px, width // self.size_px
        return PicturePlan(
            resized=_fitted(size, (height, width)),
            grid=(rows, cols),
            num_units=1 + rows * cols,
            layout=((self.image_token, self.num_tokens + self._features(size, rows, cols)),),
        )

    def _resolution(self, size: Size) -> Size:
        """Chooses what keeps most pixels; of equal resolutions the one that wastes least."""
        height, width = size
        best, best_kept, best_wasted = self.resolutions[0], 0, math.inf
        for high, wide in self.resolutions:
            scale = min(wide / width, high / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            wasted = high * wide - kept
            if kept > best_kept or (kept == best_kept and wasted < best_wasted):
                best, best_kept, best_wasted = (high, wide), kept, wasted
        return best

    def _features(self, size: Size, rows: int, cols: int) -> int:
        """Counts the features of the tiles without those of the padding, and the newlines."""
        height, width = size
        high, wide = rows * self.patches, cols * self.patches
        if width / height > wide / high:
            high -= (high - int(round(height * (wide / width), 7))) // 2 * 2
        else:
            wide -= (wide - int(round(width * (high / height), 7))) // 2 * 2
        if self.most_tiles:
            ratio = math.sqrt(high * wide / (self.most_tiles * self.patches**2))
            if ratio > MOST_RATIO:
                high, wide = int(high // ratio), int(wide // ratio)
        return high * wide + high


def _fitted(size: Size, into: Size) -> Size:
    """Fits a picture into a resolution: the side that is limited fills it."""
    (height, width), (high, wide) = size, into
    by_width, by_height = wide / width, high / height
    if by_width < by_height:
        return min(math.ceil(height * by_width), high), wide
    return high, min(math.ceil(width * by_height), wide)
