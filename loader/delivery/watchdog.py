"""A watchdog: says where every thread is when a batch is awaited for too long.

A run that hangs says nothing: a user's function in an endless loop, a lock that is never released,
a disk that does not answer. The stacks say which. The run itself is not touched: it waits on.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


def wait_watched(
    wait: Callable[[float | None], object],
    limit_s: float | None,
    *,
    ask: Callable[[], str] = lambda: "",
) -> None:
    """Waits for a batch; logs a warning with the stacks of all threads once it takes too long.

    Args:
      wait: Waits at most so many seconds, for ever with None; true once the batch is there.
      limit_s: Seconds before the warning; None for no warning.
      ask: Lets worker processes write their stacks too, and says so.
    """
    if limit_s is not None and not wait(limit_s):
        _warn(limit_s, ask())
        wait(None)


@contextmanager
def watched(limit_s: float | None) -> Generator[None, None, None]:
    """Watches a batch that is made in this thread, as `wait_watched` does: by another one."""
    if limit_s is None:
        yield
        return
    timer = threading.Timer(limit_s, _warn, (limit_s,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _warn(limit_s: float, told: str = "") -> None:
    text = "a batch has been awaited for %g s%s; the stacks of all threads:\n%s"
    logger.warning(text, limit_s, told, stacks())


def stacks() -> str:
    """Formats the stack of each thread of this process."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"Thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )
