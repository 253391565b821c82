"""Backlog: what packed streams had read, but not delivered, when the datasets of a mixture changed.

A stream of packs (pack_streams.py) reads its slots in sequence and delivers them run by run, in
packs; streams whose packs hold more samples are ahead of the others. Where other datasets are mixed
from a step of the order on, every slot before that step which no delivered pack had is the
*backlog* of its stream.

The stream takes it up in turn with the slots from that step on, until it is used up: one by one, or
more of the backlog for each new one where it is longer. So what was read under the weights before
still comes, each sample once; the datasets and weights at hand show from the first packs on; and
what is left does not grow with the number of changes.

Slot a of stream u is slot (a div b, u * b + a mod b) of the order, where b is a stream's share of a
step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadUp:
    """How far a stream has delivered its samples."""

    run: int
    """Number of the run that it delivers."""
    delivered: np.ndarray
    """bool [samples of a run], True for those of the run that are delivered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSlots:
    """The slots of a stream, in the sequence in which it packs them."""

    backlog: np.ndarray
    """int64, slots before `begin` that come in turn with those after it; ascending."""
    begin: int
    """The first slot of those that are read without a gap."""
    run: int
    """Samples in a run."""

    @property
    def _turn(self) -> int:
        """Samples of the backlog for each new one."""
        return 1 + len(self.backlog) // max(1, self.run // 2)

    @property
    def _stop(self) -> int:
        """Numbers until the backlog is used up."""
        size = len(self.backlog)
        return size + max(0, size - 1) // self._turn

    def find(self, number: np.ndarray) -> np.ndarray:
        """Finds slots by their numbers in the sequence: int64.

        >>> slots = StreamSlots(backlog=np.array([3, 7]), begin=10, run=8)
        >>> slots.find(np.arange(7)).tolist()
        [3, 10, 7, 11, 12, 13, 14]
        """
        turn, mixed = self._turn + 1, number < self._stop
        found = self.begin + np.where(mixed, number // turn, number - len(self.backlog))
        late = number[mixed & (number % turn < self._turn)]
        found[mixed & (number % turn < self._turn)] = self.backlog[late - late // turn]
        return found

    def left(self, read: ReadUp) -> tuple[int, Callable[[int], np.ndarray]]:
        """Finds what is left after some packs.

        Returns:
          (the first slot of which all and all later ones are left, a function that lists those left
          before a slot that is not less than it).
        """
        size, start = len(self.backlog), read.run * self.run
        # Up to here, numbers may be delivered or of the backlog; from here on they are neither.
        stop = max(start + self.run, self._stop)
        slots, gone = self.find(np.arange(start, stop)), np.zeros(stop - start, np.bool_)
        gone[: self.run] = read.delivered
        first = start - size if start >= self._stop else start // (self._turn + 1)
        first = max(self.begin + first, int(slots[gone].max(initial=-1)) + 1)

        def before(end: int) -> np.ndarray:
            rest = np.arange(self.begin + stop - size, end)
            found = np.concatenate([slots[~gone], rest])
            return np.sort(found[found < end])

        return first, before


def backlog_after(
    streams: Sequence[StreamSlots], reads: Sequence[ReadUp], *, share: int
) -> tuple[int, list[np.ndarray]]:
    """Finds where packs of other datasets begin, and what is left before.

    Args:
      streams, reads: One per stream.
      share: Slots of a stream in a step.

    Returns:
      (the first step of the order that no stream has delivered a sample of, the slots before that
      step that each stream has not delivered).
    """
    left = [slots.left(read) for slots, read in zip(streams, reads, strict=True)]
    step = -(-max(first for first, _ in left) // share)
    return step, [before(step * share) for _, before in left]
