"""Locator: finds where the bytes of announced steps are, in a thread of its own.

Announcing a step takes no time, but finding its bytes may: indexes may have to be fetched first.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
from collections.abc import Callable, Iterable

from loader.reading.blocks import Block, Span

logger = logging.getLogger(__name__)

_POLL_S = 0.01

Locate = Callable[[], Iterable[tuple[Block, Span]]]
"""Finds the blocks and the parts of them that a step needs."""


class Locator:
    """Locates one step after the other, the earliest first. Ends its thread when none is left."""

    def __init__(
        self,
        changed: threading.Condition,
        *,
        may_locate: Callable[[int], bool],
        located: Callable[[int, list[tuple[Block, Span]] | None], None],
    ) -> None:
        """Starts nothing yet.

        Args:
          changed: The condition of the prefetcher, whose lock guards all attributes; it is
            notified when a step was located, or could not be.
          may_locate: Returns False while a step has to wait; called under the lock.
          located: Takes a step and what it needs, None if that was cancelled or could not be
            found; called under the lock, when the step is no longer being located.
        """
        self._changed, self._may_locate, self._located = changed, may_locate, located
        # A heap of steps that are announced and not begun.
        self._announced: list[tuple[int, int, Locate]] = []
        self._numbers = itertools.count()
        self._current: int | None = None
        """The step that is being located."""
        self.is_running = False
        """There is a thread. It ends only under the lock, with nothing announced."""
        # How often all was cancelled: what was begun before the last time is dropped.
        self._generation = 0

    def announce(self, step: int, locate: Locate) -> None:
        """Queues a step; called under the lock."""
        heapq.heappush(self._announced, (step, next(self._numbers), locate))
        if not self.is_running:
            self.is_running = True
            threading.Thread(target=self._run, name="locate", daemon=True).start()

    def cancel(self) -> None:
        """Drops all announced steps; called under the lock."""
        self._announced.clear()
        self._generation += 1

    def is_locating(self, step: int) -> bool:
        """Returns True if a step is being located or is the next to be; called under the lock."""
        return step == self._current or bool(self._announced and self._announced[0][0] == step)

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._announced and not self._may_locate(self._announced[0][0]):
                    self._changed.wait(_POLL_S)
                if not self._announced:
                    self.is_running = False
                    return
                step, _, locate = heapq.heappop(self._announced)
                self._current, generation = step, self._generation
            spans: list[tuple[Block, Span]] | None = None
            try:
                spans = list(locate())
            except Exception as error:  # noqa: BLE001 - a thread's border: its reader raises it
                logger.debug("step %d cannot be read ahead: %s", step, error)
            with self._changed:
                # In one critical section: a reader that no longer finds it being located finds it
                # planned.
                self._current = None
                self._located(step, spans if generation == self._generation else None)
                self._changed.notify_all()
