"""LookaheadWindow: which steps are announced before which batch is made. Pure.

Prefetching needs the steps to come. They are announced a few at a time, and the first step alone,
so that the first batch waits for nothing else. With K workers that take turns, each announces the
steps that it will make itself.
"""

from __future__ import annotations

_GROWTH = 4
"""Steps by which the window grows with each batch."""


class LookaheadWindow:
    """Lists, for steps in increasing order, the ones to announce now."""

    def __init__(self, ahead_steps: int, *, stride: int = 1) -> None:
        """Begins.

        Args:
          ahead_steps: Own steps that are announced before they are made; 0: none.
          stride: K, workers that take turns.
        """
        self._ahead_steps, self._stride = ahead_steps, stride
        # The first step that each worker has not announced, by its number.
        self._next: dict[int, int] = {}

    def next_steps(self, step: int, *, stop: int) -> range:
        """Lists the steps that the worker of a step announces now.

        Args:
          step: To be made next; steps increase, by at most K.
          stop: End of the pass.

        >>> window = LookaheadWindow(8)
        >>> [list(window.next_steps(step, stop=100)) for step in (0, 1, 2)]
        [[0], [1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
        """
        if not self._ahead_steps:
            return range(0)
        worker = step % self._stride
        begin = max(step, self._next.get(worker, step))
        most = step + (self._ahead_steps + 1) * self._stride
        growth = _GROWTH if worker in self._next else 0
        end = min(stop, most, begin + (1 + growth) * self._stride)
        steps = range(begin, max(begin, end), self._stride)
        self._next[worker] = begin + len(steps) * self._stride
        return steps
