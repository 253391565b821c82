"""The rest of a run's epoch, as a line that another order can lay out anew.

Where a run gets another width, or a batch that its canonical ranks do not divide, its lanes cannot
go on: they stand at different places of an epoch. But what they have not taken is known in closed
form. With E the last epoch that any lane has begun, lane w still owes what it would take up to the
end of E. These pieces, end to end, are a line of R places, on which place y is the sample that the
lane of its piece would have taken next after those before it. An order that first shows each place
of this line once, and then epochs from E + 1 on, shows every sample once per epoch.

Memory is proportional to the lanes.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Lanes(Protocol):
    """What the order before has to tell; a track is a lane, or all that is counted as one."""

    @property
    def first_epoch(self) -> int:
        """The first epoch that the order lays out itself."""

    def ends(self, epoch: int) -> np.ndarray:
        """Counts what each track has taken when it has finished an epoch: int64 [tracks]."""

    def take(self, track: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Finds (epoch, sample) of what tracks take after `count` others."""


class EpochRemainder:
    """What an order owes."""

    def __init__(self, order: Lanes, *, taken: np.ndarray) -> None:
        """Joins an order and int64 [tracks], what each track has taken of it."""
        self._order = order
        begun = np.flatnonzero(taken)
        last = order.first_epoch - 1
        if len(begun):
            last = int(order.take(begun, taken[begun] - 1)[0].max())
        self.first_epoch = max(last + 1, order.first_epoch)
        """The epoch behind the rest, of which nothing was taken."""
        owed = order.ends(self.first_epoch - 1) - taken
        self._ends = np.cumsum(owed)
        self._offset = taken - (self._ends - owed)
        self.length = int(self._ends[-1])
        """Places of the line."""
        self.num_tracks = len(taken)

    def take(self, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Finds (epoch, sample) of places of the line: int64, 0 to length - 1."""
        track = np.searchsorted(self._ends, place, side="right")
        return self._order.take(track, place + self._offset[track])
