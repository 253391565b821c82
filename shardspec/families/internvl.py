"""InternVL: a grid of square tiles of the shape nearest to the picture's, and a thumbnail."""

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
class InternVL:
    """The picture side of the models that use `GotOcr2ImageProcessor` with tiles."""

    kind: ClassVar[str] = "internvl"
    positions: ClassVar[Positions] = "plain"
    type_ids: ClassVar[str] = ""
    packs: ClassVar[bool] = True

    size_px: int = 448
    """Side of a tile."""
    min_tiles: int = 1
    max_tiles: int = 12
    """Fewest and most tiles, the thumbnail not counted."""
    tokens_per_tile: int = 256
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    start_token: str = "<img>"  # noqa: S105 - tokens of text
    image_token: str = "<IMG_CONTEXT>"  # noqa: S105
    end_token: str = "</img>"  # noqa: S105
    filter: Filter = "bicubic"

    def __post_init__(self) -> None:
        require_numbers(self, size_px=1, min_tiles=1, max_tiles=1, tokens_per_tile=1)

    @property
    def tokens(self) -> PictureTokens:
        return PictureTokens(soft=self.image_token, marks=(self.start_token, self.end_token))

    def stored_size(self, size: Size) -> Size:
        """Gives the size of the tiles together: the thumbnail is made of what is stored."""
        return keep_smaller(size, self.plan(size).resized)

    def unlike(self, stored: Family) -> dict[str, str]:
        free = {"min_tiles": False, "max_tiles": True, "mean": False, "std": False}
        return different(self, stored, free=free)

    def plan(self, size: Size) -> PicturePlan:
        """Plans a picture; see `Family.plan`.

        >>> p = InternVL().plan((427, 640))
        >>> p.grid, p.num_units, p.num_tokens
        ((2, 3), 7, 1794)
        """
        rows, cols = self._grid(size)
        tiles = rows * cols + (rows * cols > 1)
        return PicturePlan(
            resized=(rows * self.size_px, cols * self.size_px),
            grid=(rows, cols),
            num_units=tiles,
            layout=(
                (self.start_token, 1),
                (self.image_token, tiles * self.tokens_per_tile),
                (self.end_token, 1),
            ),
        )

    def _grid(self, size: Size) -> tuple[int, int]:
        """Chooses (rows, columns): the nearest ratio; of equal ones the larger, if it is filled."""
        height, width = size
        ratio, area = width / height, width * height
        best, best_difference = (1, 1), float("inf")
        for cols, rows in self._grids():
            difference = abs(ratio - cols / rows)
            fills = area > 0.5 * self.size_px * self.size_px * cols * rows
            if difference < best_difference or (difference == best_difference and fills):
                best, best_difference = (rows, cols), difference
        return best

    def _grids(self) -> list[tuple[int, int]]:
        numbers = range(1, self.max_tiles + 1)
        grids = [(c, r) for c in numbers for r in numbers]
        kept = [grid for grid in grids if self.min_tiles <= grid[0] * grid[1] <= self.max_tiles]
        return sorted(kept, key=lambda grid: grid[0] * grid[1])
