"""The remainder of an epoch, as a line that another layout can deal out anew.

Where a run gets another width, another batch size or more samples, its lanes cannot continue: each
has read another part of its slice. What they have not read is known in closed form, lane by lane.
These pieces, end to end, are a line of R places; place y is the sample that the lane of its piece
would have read next after those before it. An epoch is consecutive slots, so at any step only one
epoch is unfinished, and the remainder belongs to that one alone.

Memory is proportional to the lanes.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

import numpy as np


class EpochPart(Protocol):
    """An epoch as it is dealt to tracks: lanes, or one track for all where there are none."""

    @property
    def lengths(self) -> np.ndarray:
        """How many samples each track has of it: int64 [tracks]."""

    def samples(self, track: np.ndarray, count: np.ndarray) -> np.ndarray:
        """Finds the samples that tracks read after `count` others of this epoch: int64."""


Part = TypeVar("Part", bound=EpochPart)


class EpochRemainder(Generic[Part]):
    """What is left of an epoch."""

    def __init__(self, part: Part, *, taken: np.ndarray) -> None:
        """Joins an epoch and int64 [tracks], how much of it each track has read."""
        self.part = part
        left = part.lengths - taken
        self._ends = np.cumsum(left)
        self._offset = taken - (self._ends - left)
        self.length = int(self._ends[-1])
        """Places of the line."""
        self.num_tracks = len(taken)

    def samples(self, place: np.ndarray) -> np.ndarray:
        """Finds the samples of places of the line: int64, 0 to length - 1."""
        return self.part.samples(*self.find(place))

    def find(self, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Finds where the epoch's part has places of the line: (tracks, counts), int64 each."""
        track = np.searchsorted(self._ends, place, side="right")
        return track, place + self._offset[track]
