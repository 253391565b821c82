"""Seen: crops and tokens that a view makes of pictures, by their sizes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from loader.assembly.layout import TokenIds
from loader.assembly.view import View
from shardspec.tiling import (
    FrameView,
    ImageView,
    first_patch_positions,
    image_token_ids,
    overview_size,
)

_MOST_SIZES = 1 << 14
"""Sizes of pictures that are remembered."""


class SeenSize(NamedTuple):
    """What a view makes of pictures of one size."""

    crops: int
    block: np.ndarray
    """int32 [tokens], the image's token block; read-only."""
    first_patches: np.ndarray
    """int64 [crops], where in the block each crop's first patch token is; read-only."""
    ready: tuple[int, int, int] | None
    """Shape of a stored picture that is its only crop as it is; None where there is none."""
    view: ImageView


class Seen:
    """What a view makes of pictures, by their sizes; safe to share between threads.

    It remembers the sizes that it has met: asking `shardspec.tiling` takes longer than all the rest
    of a plan.
    """

    def __init__(
        self, image: ImageView, view: View, ids: TokenIds, *, frames: FrameView | None = None
    ) -> None:
        self.view, self._ids, self.shapes = image, ids, view.shapes(image)
        self._frames = frames
        self._sizes: dict[tuple[int, int], SeenSize] = {}

    def of(self, size: tuple[int, int]) -> SeenSize:
        """Looks up what becomes of pictures of a source's (width, height), in pixels."""
        found = self._sizes.get(size)
        if found is None:
            firsts = first_patch_positions(*size, self.view, self._ids.image)
            block = image_token_ids(*size, self.view, self._ids.image)
            if self._frames is not None:
                block = block.copy()
                block[0], block[-1] = self._ids.frame_start, self._ids.frame_end
                if self._frames.marks != "frame":
                    block, firsts = block[1:-1], firsts - 1
            if len(self._sizes) >= _MOST_SIZES:
                self._sizes.clear()
            side = self.view.size_px
            alone = len(firsts) == 1 and overview_size(*size, self.view) == (side, side)
            ready = (side, side, 3) if alone else None
            found = self._sizes[size] = SeenSize(len(firsts), block, firsts, ready, self.view)
        return found
