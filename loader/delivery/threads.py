"""Threads that make batches ahead of the consumer, and how far ahead they may be."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch

from loader.buffers import Allocate
from loader.delivery.batches import BatchMaker, MadeBatch, Task


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
) -> Generator[tuple[MadeBatch, int], None, None]:
    """Makes batches ahead of the consumer, in their sequence.

    Args:
      tasks: The batches; planned in the consumer's thread, when there is room for more.
      maker: Makes them.
      threads: Number of threads; 0: each batch is made when it is asked for, in this thread.
      allocate: Gives memory.
      ahead: How far to go ahead.

    Yields:
      A batch, and how many after it were ready by then.
    """
    if not threads:
        for task in tasks:
            yield maker.make(task, allocate=allocate), 0
        return
    futures: deque[Future[MadeBatch]] = deque()
    unwanted = threading.Event()
    make = partial(maker.make, allocate=allocate, unwanted=unwanted)
    pool = _start_threads(threads)
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
                    futures.append(pool.submit(make, replace(planned, ahead=[])))
            if futures:
                ready = sum(future.done() for future in futures)
                made = futures.popleft().result()
                ahead.note(made.timings.batch_bytes)
                yield made, max(0, ready - 1)
                del made
    finally:
        unwanted.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _start_threads(count: int) -> ThreadPoolExecutor:
    """Starts threads in which torch does not start others: they would fight for the same cores.

    Torch keeps the number per thread, and the last one set for threads to come; that one is
    restored, so that nothing changes outside of these threads.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, thread_name_prefix="decode", initializer=_one_torch_thread)
    # An executor starts a thread only if no other one is idle: all wait until all have started.
    all_started = threading.Barrier(count)
    try:
        for future in [pool.submit(all_started.wait) for _ in range(count)]:
            future.result()
    except BaseException:
        # The system grants no more threads, or Ctrl-C: those that wait would wait for ever, and
        # the end of the process for them.
        all_started.abort()
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    finally:
        torch.set_num_threads(before)
    return pool


def _one_torch_thread() -> None:
    # Asked first: a thread takes the number of threads to come when it needs its own at last.
    torch.get_num_threads()
    torch.set_num_threads(1)
