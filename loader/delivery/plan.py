"""TaskPlan: which batch is to be made next, and which steps are announced with it.

What is in a batch is up to the function that it is given; made ahead of the consumer, batches of a
plan may be of the epoch after.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from loader.delivery.batches import Task
from loader.order import Row
from loader.reading import LookaheadWindow
from loader.topology import Topology

_FAR = 1 << 30
"""Steps: what is read ahead does not end with an epoch."""


class TaskPlan:
    """The batches from a step on, without end, and for each what the packs need to resume after it.

    It never refers to the loader, which keeps it: what ends with the loader ends at once. The next
    pass continues with it where nothing has changed since; after any change of the order or the
    step the loader makes another.
    """

    def __init__(self, step: int, window: LookaheadWindow, topology: Topology) -> None:
        """Begins at a step; `window` says how many steps are announced ahead."""
        self._given = self.next_step = step
        self._window, self._topology = window, topology
        # From the next step on; and of the steps between those that were given and that.
        self._planned: deque[tuple[list[Row], list[list[int]]]] = deque()
        self._streams_after: deque[list[list[int]]] = deque()

    def task(self, plan: Callable[[int], tuple[list[Row], list[list[int]]]]) -> Task:
        """Plans the next batch, and those after it that are to be announced with it."""
        step = self.next_step
        soon = self._window.next_steps(step, stop=step + _FAR)
        last = soon[-1] if soon else step
        while step + len(self._planned) <= last:
            self._planned.append(plan(step + len(self._planned)))
        ahead = [(later, self._planned[later - step][0]) for later in soon]
        rows, streams = self._planned.popleft()
        self._streams_after.append(streams)
        self.next_step += 1
        return Task(step=step, rows=rows, ahead=ahead)

    def delivered(self) -> list[list[int]]:
        """Gives where the packs' streams are after the next batch that is delivered."""
        self._given += 1
        return self._streams_after.popleft()

    def continues(self, step: int, num_pending: int, topology: Topology) -> bool:
        """Returns True if a pass at a step continues here, with the batches that are pending."""
        here = (self._given, self.next_step - self._given, self._topology)
        return here == (step, num_pending, topology)
