"""Threads that make batches ahead of the consumer, and how far ahead they may be."""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, wait
from dataclasses import replace
from functools import partial
from time import monotonic

import torch

from loader.buffers import Allocate
from loader.delivery.batches import BatchMaker, MadeBatch, Task
from loader.delivery.watchdog import wait_watched, watched

_Job = tuple["Future[MadeBatch]", Callable[[], MadeBatch]]

_STOP_S = 5.0
"""Seconds that leaving a pass waits for the samples at hand; threads then end on their own."""

_EXIT_S = 1.0
"""The same, where the process ends."""


class AheadLimit:
    """How many batches may be made or wait: by number, and by the bytes of the largest so far.

    Read and written by the consumer's thread alone.
    """

    def __init__(self, *, most: int, most_bytes: int, batch_bytes: int) -> None:
        """Begins with a guess.

        Args:
          most: Most batches, >= 1.
          most_bytes: Most bytes in all of them; one batch is always made.
          batch_bytes: What a batch may take, until one was made.
        """
        self._most, self._most_bytes = most, most_bytes
        self._batch_bytes = batch_bytes

    def note(self, batch_bytes: int) -> None:
        """Takes note of the size of a batch."""
        self._batch_bytes = max(self._batch_bytes, batch_bytes)

    @property
    def batches(self) -> int:
        """Batches that may be in the making or waiting now, >= 1."""
        return max(1, min(self._most, self._most_bytes // max(1, self._batch_bytes)))


def make_in_threads(
    tasks: Iterator[Task],
    maker: BatchMaker,
    *,
    threads: int,
    allocate: Allocate,
    ahead: AheadLimit,
    watchdog_s: float | None = None,
) -> Generator[tuple[MadeBatch, int], None, None]:
    """Makes batches ahead of the consumer, in their sequence.

    Args:
      tasks: The batches; planned in the consumer's thread, when there is room for more.
      maker: Makes them.
      threads: Number of threads; 0: each batch is made when it is asked for, in this thread.
      allocate: Gives memory.
      ahead: How far to go ahead.
      watchdog_s: See `wait_watched`.

    Yields:
      A batch, and how many after it were ready by then.
    """
    if not threads:
        for task in tasks:
            with watched(watchdog_s):
                made = maker.make(task, allocate=allocate)
            yield made, 0
            del made
        return
    futures: deque[Future[MadeBatch]] = deque()
    unwanted = threading.Event()
    make = partial(maker.make, allocate=allocate, unwanted=unwanted)
    pool = _Threads(threads, unwanted)
    wait_s, pid = _STOP_S, os.getpid()
    try:
        more = True
        while more or futures:
            while more and len(futures) < ahead.batches:
                planned = next(tasks, None)
                more = planned is not None
                if planned is not None:
                    # Announced here: threads that did it themselves would overtake each other, and
                    # the first batch would wait for bytes of the second.
                    maker.announce(planned)
                    futures.append(pool.submit(partial(make, replace(planned, ahead=[]))))
            if futures:
                ready = sum(future.done() for future in futures)
                future = futures.popleft()
                wait_watched(partial(_is_done, future), watchdog_s)
                made = future.result()
                del future
                ahead.note(made.timings.batch_bytes)
                yield made, max(0, ready - 1)
                del made
    except KeyboardInterrupt:
        wait_s = 0.0
        raise
    finally:
        if os.getpid() == pid:  # a forked child has no such threads, and their locks may be held
            for future in futures:
                future.cancel()
            pool.stop(wait_s)


def _is_done(future: Future[MadeBatch], timeout_s: float | None) -> bool:
    return bool(wait((future,), timeout_s).done)


class _Threads:
    """Threads in which torch does not start others: they would fight for the same cores.

    They are daemons: a read that hangs must keep neither the process nor a Ctrl-C. What ends them
    otherwise is `stop`, or the end of the process, before Python takes its modules down.
    """

    def __init__(self, count: int, unwanted: threading.Event) -> None:
        """Starts them all.

        Args:
          count: Number of threads.
          unwanted: Set once they are to stop.
        """
        self._work: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._end = weakref.finalize(self, _end, self._work, self._threads, unwanted)
        ready = threading.Semaphore(0)
        # Torch keeps the number per thread, and the last one set for threads to come; that one is
        # restored, so that nothing changes outside of these threads.
        before = torch.get_num_threads()
        try:
            for number in range(count):
                thread = threading.Thread(
                    target=_serve, args=(self._work, ready), name=f"decode_{number}", daemon=True
                )
                thread.start()
                self._threads.append(thread)
            for _ in range(count):
                ready.acquire()
        except BaseException:  # the system grants no more threads, or Ctrl-C
            self.stop(_STOP_S)
            raise
        finally:
            torch.set_num_threads(before)

    def submit(self, make: Callable[[], MadeBatch]) -> Future[MadeBatch]:
        """Lets the next idle thread make a batch."""
        future: Future[MadeBatch] = Future()
        self._work.put((future, make))
        return future

    def stop(self, wait_s: float) -> None:
        """Ends the threads; waits that long for the samples at hand."""
        self._end(wait_s)


def _end(
    work: queue.SimpleQueue[_Job | None],
    threads: list[threading.Thread],
    unwanted: threading.Event,
    wait_s: float = _EXIT_S,
) -> None:
    unwanted.set()
    for _ in threads:
        work.put(None)
    stop_s = monotonic() + wait_s
    for thread in threads:
        # Garbage is collected in whichever thread allocates next: a pass that nobody holds any more
        # may be ended by one of its own threads, which cannot wait for itself.
        if thread is not threading.current_thread():
            thread.join(max(0.0, stop_s - monotonic()))


def _serve(work: queue.SimpleQueue[_Job | None], ready: threading.Semaphore) -> None:
    # Asked first: a thread takes the number of threads to come when it needs its own at last.
    torch.get_num_threads()
    torch.set_num_threads(1)
    ready.release()
    while (job := work.get()) is not None:
        _make(*job)
        del job  # and with it the batch, once the consumer has let go of it


def _make(future: Future[MadeBatch], make: Callable[[], MadeBatch]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        made = make()
    except BaseException as error:  # noqa: BLE001 - the border of the thread: the consumer raises it
        future.set_exception(error)
    else:
        future.set_result(made)
