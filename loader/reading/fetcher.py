"""Fetcher: runs requests in threads of its own, one future each, and notices a stall.

How a range is read, checked and tried again is `shardspec.storage.RangeReader`'s. How many requests
there are at a time is up to who submits them: a thread is started when none is free.
"""

from __future__ import annotations

import faulthandler
import logging
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from loader.reading.blocks import Span
from shardspec.errors import StorageError
from shardspec.storage import RangeReader, RetryPolicy

logger = logging.getLogger(__name__)

_IDLE_S = 10.0
"""A thread without work ends after this long."""

Done = Callable[["Future[None]"], None]


class Fetcher:
    """Threads that end when they are idle, and that keep no process alive."""

    def __init__(self, policy: RetryPolicy) -> None:
        """Starts nothing yet.

        Args:
          policy: How long to try for one range.
        """
        self.ranges = RangeReader(policy)
        """Reads ranges, and counts what is read."""
        # Guards the two below. Whoever holds it takes no other lock, so `submit` may be called
        # under any.
        self._has_work = threading.Condition(threading.Lock())
        self._work: deque[tuple[Future[None], Callable[[], None], Done]] = deque()
        self._num_idle = 0
        """Threads that wait for work, with those that were woken and have not taken theirs."""

    def submit(self, work: Callable[[], None], *, done: Done) -> Future[None]:
        """Runs work in a thread, in the order of submission.

        Args:
          work: What to do.
          done: Called in the same thread when it is done or has failed.
        """
        future: Future[None] = Future()
        with self._has_work:
            self._work.append((future, work, done))
            # Each piece of work that is left over has a thread of its own that is idle, or starts.
            if len(self._work) <= self._num_idle:
                self._has_work.notify()
            else:
                threading.Thread(target=self._serve, name="fetch", daemon=True).start()
        return future

    def require_progress(
        self, url: str, span: Span, *, waited_s: float, stall_s: float, elsewhere: bool
    ) -> None:
        """Raises when nothing has arrived for too long, after logging what all threads do.

        Args:
          url: Of the object that a reader waits for.
          span: The part of it.
          waited_s: How long it has waited.
          stall_s: How long is too long.
          elsewhere: It waits for another process.

        Raises:
          StorageError: `stalled`.
        """
        if min(waited_s, self.ranges.quiet_s) < stall_s:
            return
        flights = self.ranges.in_flight()
        own = [flight for flight in flights if flight.url == url]
        with tempfile.TemporaryFile("w+") as stacks:
            faulthandler.dump_traceback(stacks, all_threads=True)
            stacks.seek(0)
            logger.error("reading has stalled; all threads:\n%s", stacks.read())
        raise StorageError(
            "stalled",
            where=url,
            range=f"{span[0]}-{span[1]}",
            waited_s=f"{waited_s:.0f}",
            received_bytes=sum(flight.received for flight in own),
            in_flight="; ".join(
                f"{f.url} at {f.start + f.received} of {f.start}-{f.stop}" for f in flights[:4]
            ),
            elsewhere=elsewhere,
        )

    def _serve(self) -> None:
        while True:
            with self._has_work:
                stop_s = time.monotonic() + _IDLE_S
                while not self._work:
                    left_s = stop_s - time.monotonic()
                    if left_s <= 0:
                        return
                    self._num_idle += 1
                    self._has_work.wait(left_s)
                    self._num_idle -= 1
                future, work, done = self._work.popleft()
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - a task's border: it is the future's
                future.set_exception(error)
            else:
                future.set_result(None)
            done(future)
            # An idle thread must not keep the bytes of its last request alive.
            del future, work, done
