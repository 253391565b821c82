"""LookaheadWindow: which steps are planned before which step is made. Pure.

Reading ahead needs to know the steps to come; whoever makes batch after batch says them a few at
a time, the first step alone, so that the first batch waits for nothing else. With K makers that
take turns, each says the steps that it will make itself.
"""

from __future__ import annotations

_GROWTH = 4
"""Steps by which the horizon grows with each one that is made."""


class LookaheadWindow:
    """Gives, for steps in increasing order, the ones that are to be said now."""

    def __init__(self, ahead_steps: int, *, stride: int = 1) -> None:
        """Begins.

        Args:
          ahead_steps: Own steps that are said before they are made; 0: none.
          stride: K, makers that take turns.
        """
        self._ahead_steps, self._stride = ahead_steps, stride
        self._said: dict[int, int] = {}

    def next_steps(self, step: int, *, stop: int) -> range:
        """Lists the steps that the maker of a step has to be told now.

        Args:
          step: That is made next, at most K steps ahead of those before it.
          stop: End of the pass.

        >>> horizon = LookaheadWindow(8)
        >>> [list(horizon.next_steps(step, stop=100)) for step in (0, 1, 2)]
        [[0], [1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
        """
        if not self._ahead_steps:
            return range(0)
        maker = step % self._stride
        begin = max(step, self._said.get(maker, step))
        most = step + (self._ahead_steps + 1) * self._stride
        growth = _GROWTH if maker in self._said else 0
        end = min(stop, most, begin + (1 + growth) * self._stride)
        soon = range(begin, max(begin, end), self._stride)
        self._said[maker] = begin + len(soon) * self._stride
        return soon
