"""Idefics3 and SmolVLM: a picture of one long side, cut into rows and columns of tiles, and itself.

The long side becomes one length, then both sides become multiples of a tile. Each tile has a token
that names its row and its column, each row ends with a line break, and the whole picture, squashed
into one tile, is the last.
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

MOST_SIDE = 4096
"""Longest side of what is cut, in pixels, before it becomes a multiple of a tile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Idefics3:
    """The picture side of Idefics3 and SmolVLM."""

    kind: ClassVar[str] = "idefics3"
    positions: ClassVar[Positions] = "plain"
    type_ids: ClassVar[str] = ""
    packs: ClassVar[bool] = True

    size_px: int = 364
    """Side of a tile."""
    longest_px: int = 4 * 364
    """Long side of what is cut into tiles."""
    splits: bool = True
    """Whether pictures are cut; otherwise each is one tile."""
    tokens_per_tile: int = 169
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_token: str = "<image>"  # noqa: S105 - tokens of text
    around_token: str = "<fake_token_around_image>"  # noqa: S105
    whole_token: str = "<global-img>"  # noqa: S105
    filter: Filter = "lanczos"

    def __post_init__(self) -> None:
        require_numbers(self, size_px=1, longest_px=1, tokens_per_tile=1)

    @property
    def tokens(self) -> PictureTokens:
        most = math.ceil(min(self.longest_px, MOST_SIDE) / self.size_px) if self.splits else 0
        numbers = range(1, most + 1)
        tiles = [_tile(row, col) for row in numbers for col in numbers]
        breaks = ["\n", "\n\n"] if tiles else []
        marks = (self.around_token, self.whole_token, *tiles, *breaks)
        return PictureTokens(soft=self.image_token, marks=marks)

    def stored_size(self, size: Size) -> Size:
        return keep_smaller(size, self._longest(size))

    def unlike(self, stored: Family) -> dict[str, str]:
        free = {"longest_px": True, "splits": False, "mean": False, "std": False}
        wrong = different(self, stored, free=free)
        if isinstance(stored, Idefics3) and self.splits > stored.splits:
            # Its tokens for rows and columns are not those of the dataset.
            wrong["splits"] = "False stored, True asked for"
        return wrong

    def plan(self, size: Size) -> PicturePlan:
        """Plans a picture; see `Family.plan`.

        >>> p = Idefics3().plan((427, 640))
        >>> p.resized, p.grid, p.num_units
        ((972, 1456), (3, 4), 13)
        """
        resized = self._longest(size)
        rows, cols = self._grid(resized) if self.splits else (1, 1)
        whole = (
            (self.around_token, 1),
            (self.whole_token, 1),
            (self.image_token, self.tokens_per_tile),
            (self.around_token, 1),
        )
        if rows * cols == 1:
            return PicturePlan(resized=resized, layout=whole)
        layout: list[tuple[str, int]] = []
        for row in range(1, rows + 1):
            for col in range(1, cols + 1):
                layout.append((self.around_token, 1))
                layout.append((_tile(row, col), 1))
                layout.append((self.image_token, self.tokens_per_tile))
            # The line break in front of the whole picture meets that of the last row.
            layout.append(("\n" if row < rows else "\n\n", 1))
        return PicturePlan(
            resized=resized,
            grid=(rows, cols),
            num_units=rows * cols + 1,
            layout=(*layout, *whole),
        )

    def _longest(self, size: Size) -> Size:
        """Resizes the long side to `longest_px`, and further to `MOST_SIDE`."""
        height, width = size
        ratio = width / height
        if width >= height:
            width = self.longest_px
            height = int(width / ratio)
            height += height % 2
        else:
            height = self.longest_px
            width = int(height * ratio)
            width += width % 2
        height, width = max(height, 1), max(width, 1)
        ratio = width / height
        if width >= height and width > MOST_SIDE:
            width = MOST_SIDE
            height = int(width / ratio)
        elif height > width and height > MOST_SIDE:
            height = MOST_SIDE
            width = int(height * ratio)
        return max(height, 1), max(width, 1)

    def _grid(self, size: Size) -> tuple[int, int]:
        """Counts (rows, columns): the long side is filled first, the other follows its ratio."""
        height, width = size
        ratio, tile = width / height, self.size_px
        if width >= height:
            cols = math.ceil(width / tile)
            return math.ceil(int(cols * tile / ratio) / tile), cols
        rows = math.ceil(height / tile)
        return rows, math.ceil(int(rows * tile * ratio) / tile)


def _tile(row: int, col: int) -> str:
    return f"<row_{row}_col_{col}>"
