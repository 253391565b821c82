"""Packed rows: several examples in one sequence, as Molmo's packing lays them out.

Arrays of one value per token are put one after the other; positions restart with each example;
example e adds e * PACKED_STRIDE to its subsegments, which hides the examples in front of it
(attention.py). Indices into the tokens and into the patches move along.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np

from loader.assembly.attention import PACKED_STRIDE
from loader.assembly.draft import Draft
from loader.assembly.families.example import ModelDraft
from shardspec.errors import ConfigError
from shardspec.tiling import NO_PATCH

_Draft = TypeVar("_Draft", Draft, ModelDraft)


class Pack:
    """The packed row of several drafts before its arrays are made; see
    `loader.assembly.collate.LazyExample`."""

    channels_first = False

    def __init__(self, parts: Sequence[Draft]) -> None:
        """Joins drafts of the same view, at least one.

        Raises:
          ConfigError: `example_mismatch`: two resolutions of the view differ in their patches.
        """
        self.parts = tuple(parts)
        self.num_tokens = sum([part.num_tokens for part in parts])
        self.num_crops = sum([part.num_crops for part in parts])
        shapes = {part.shapes for part in parts if part.num_crops} or {parts[0].shapes}
        if len(shapes) > 1:
            raise ConfigError(
                "example_mismatch.pack",
                keys=[part.key for part in parts],
                got=sorted(map(str, shapes)),
            )
        (self.shapes,) = shapes

    def pieces(self, name: str) -> list[np.ndarray]:
        """Lists the arrays that a column consists of; they are only to be read."""
        step = PACKED_STRIDE if name == "subsegment_ids" else 0
        found: list[np.ndarray] = []
        for e, part in enumerate(self.parts):
            own = part.pieces(name)
            found += [piece + e * step for piece in own] if step else own
        return found

    def write_images(self, out: np.ndarray) -> None:
        """Renders the pictures; see `Draft.write_images`."""
        for part, own in self._slices(out):
            part.write_images(own)

    def write_masks(self, out: np.ndarray) -> None:
        """Writes the masks; see `Draft.write_masks`."""
        for part, own in self._slices(out):
            part.write_masks(own)

    def write_input_idx(self, out: np.ndarray) -> None:
        """Writes the positions of the image tokens in the row; see `Draft.write_input_idx`."""
        starts = iter(self._starts())
        for part, own in self._slices(out):
            part.write_input_idx(own)
            own[own >= 0] += next(starts)

    def image_ends(self) -> list[int]:
        """Lists, for each crop, one past the last token of its image."""
        pairs = zip(self.parts, self._starts(), strict=True)
        return [end + start for part, start in pairs for end in part.image_ends()]

    def pooling(self) -> np.ndarray:
        """Makes Molmo 2's map, with patches counted through all crops of the row."""
        found, before = [], 0
        for part in self.parts:
            own = part.pooling()
            found.append(np.where(own == NO_PATCH, NO_PATCH, own + before))
            before += part.num_crops * part.shapes.num_patches
        return np.concatenate(found)

    def metadata(self) -> dict[str, Any]:
        """Describes the row and, as `examples`, its parts."""
        parts = [part.metadata() for part in self.parts]
        return {"key": "+".join([part["key"] for part in parts]), "examples": parts}

    def _starts(self) -> list[int]:
        """Lists where the tokens of each part begin."""
        return list(accumulate([part.num_tokens for part in self.parts[:-1]], initial=0))

    def _slices(self, out: np.ndarray) -> Iterator[tuple[Draft, np.ndarray]]:
        done = 0
        for part in self.parts:
            yield part, out[done : done + part.num_crops]
            done += part.num_crops


def fitting(
    drafts: Sequence[_Draft], *, sequence_length: int, max_crops: int | None
) -> list[_Draft]:
    """Leaves out substitutes that are longer than the samples they replace, until all fit.

    Packs are planned for the longest draws, so only substitutes can be too long: a sample with more
    crops than a pack may have is planned beside samples without any. One draft always stays, and
    so do all that are no substitutes: nobody would notice what is left out of them.
    """
    kept = list(drafts)
    substitutes = [e for e, draft in enumerate(drafts) if draft.substitutes is not None]
    crops = [draft.num_crops for draft in drafts if draft.substitutes is None]
    most_crops = None if max_crops is None else max(max_crops, *crops, 0)
    while len(kept) > 1 and substitutes:
        fits = sum(draft.num_tokens for draft in kept) <= sequence_length
        if fits and (most_crops is None or sum(d.num_crops for d in kept) <= most_crops):
            break
        del kept[substitutes.pop()]
    return kept
