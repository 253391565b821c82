"""BatchMaker: from planned rows to a batch, and the threads that run it ahead of the consumer.

All rows of a batch are planned first, from tokens and spans alone: then the shapes are known,
memory is taken from a pool, and each picture is decoded into its place. Which thread makes which
batch has no influence on what is in it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import Any, Protocol

import torch

from loader.assembly import Draft, MMCollator, Pack, fitting
from loader.buffers import Allocate
from loader.delivery.stats import StageTimings
from loader.order import PackConfig, Row
from loader.reading import ShardReader
from loader.stream import ExamplePlanner, PlannedExample
from shardspec.errors import SampleError, ShardError


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A batch to be made."""

    step: int
    rows: list[Row]
    ahead: list[tuple[int, list[Row]]] = field(default_factory=list)
    """Steps that its maker will make later, or now, and has not been told of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeBatch:
    """A batch and what it took."""

    batch: dict[str, Any]
    bad: list[dict[str, Any]]
    """The samples that others took the place of."""
    spent: StageTimings
    counters: Mapping[str, int] = field(default_factory=dict)
    """What a worker process has counted of its reading since its batch before; threads count where
    the consumer can look."""


class Source(ExamplePlanner, Protocol):
    """What examples come from: a dataset or a mixture."""

    @property
    def readers(self) -> list[ShardReader]: ...

    def prefetch(self, step: int, rows: Sequence[Row]) -> None:
        """Hears which samples a step will need; steps come in increasing order."""

    def release(self, step: int) -> None:
        """Hears that a step's batch is made."""


class BatchMaker:
    """Makes batches of rows; picklable, and safe to share between threads."""

    def __init__(self, source: Source, collator: MMCollator, *, packing: PackConfig | None) -> None:
        """Joins what examples come from and how they are collated.

        Args:
          source: The dataset or mixture.
          collator: Of the same view.
          packing: The limits of a row of several samples; None where a row is one.
        """
        self.source, self.collator, self.packing = source, collator, packing

    def announce(self, task: Task) -> None:
        """Lets the readers know of the steps that a task names."""
        for step, rows in task.ahead:
            self.source.prefetch(step, rows)

    def make(
        self, task: Task, *, allocate: Allocate, unwanted: threading.Event | None = None
    ) -> MadeBatch:
        """Makes a batch, and lets the readers know of the next ones first.

        Args:
          task: What it is made of.
          allocate: Gives the memory of its tensors.
          unwanted: Once set, the next row is not begun.

        Raises:
          CancelledError: The batch became unwanted.
          ShardError, SampleError: A sample cannot be read, laid out or decoded, and is not to be
            substituted.
        """
        start_s = perf_counter()
        self.announce(task)
        rows = task.rows
        made: list[list[PlannedExample]] = []
        for row in rows:
            if unwanted is not None and unwanted.is_set():
                raise CancelledError
            made.append([self.source.plan_example(place) for place in row])
        while True:
            try:
                batch = self.collator.collate(self._joined(made), allocate=allocate)
                break
            except (SampleError, ShardError):
                if not self._replace_broken(task.rows, made):
                    raise
        self.source.release(task.step)
        spent = _spent(made, batch, perf_counter() - start_s)
        return MadeBatch(batch=batch, bad=_substituted(rows, made), spent=spent)

    def _replace_broken(self, rows: list[Row], made: list[list[PlannedExample]]) -> bool:
        """Substitutes the sample whose pictures could not be rendered; tells if there was one."""
        for row, own in zip(rows, made, strict=True):
            for i, (place, one) in enumerate(zip(row, own, strict=True)):
                if one.draft.error is not None:
                    own[i] = self.source.plan_example(place, after_failed=one)
                    return True
        return False

    def _joined(self, made: list[list[PlannedExample]]) -> Sequence[Draft | Pack]:
        """Gives the examples of the rows."""
        limits = self.packing
        if limits is None:
            return [row[0].draft for row in made]
        return [
            Pack(
                fitting(
                    [one.draft for one in row],
                    sequence_length=limits.sequence_length,
                    max_crops=limits.max_crops,
                )
            )
            for row in made
        ]


class LookAhead:
    """How many batches may be made or wait: by number, and by the bytes of the largest so far."""

    def __init__(self, *, most: int, most_bytes: int, batch_bytes: int) -> None:
        """Begins with a guess.

        Args:
          most: Most batches, >= 1.
          most_bytes: Most bytes in all of them; one batch is always made.
          batch_bytes: What a batch may take, until one has been seen.
        """
        self._most, self._most_bytes = most, most_bytes
        self._batch_bytes = batch_bytes

    def seen(self, batch_bytes: int) -> None:
        """Takes note of a batch."""
        self._batch_bytes = max(self._batch_bytes, batch_bytes)

    @property
    def batches(self) -> int:
        """Batches that may be on their way now, >= 1."""
        return max(1, min(self._most, self._most_bytes // max(1, self._batch_bytes)))


def make_in_threads(
    plans: Iterator[Task],
    maker: BatchMaker,
    *,
    threads: int,
    allocate: Allocate,
    ahead: LookAhead,
) -> Generator[tuple[MadeBatch, int], None, None]:
    """Makes batches ahead of the consumer, in their sequence.

    Args:
      plans: The batches; planned in the consumer's thread, when there is room for more.
      maker: Makes them.
      threads: Number of threads; 0: each batch is made when it is asked for, in this thread.
      allocate: Gives memory.
      ahead: How far to go ahead.

    Yields:
      A batch, and how many behind it were ready by then.
    """
    if not threads:
        for task in plans:
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
                planned = next(plans, None)
                more = planned is not None
                if planned is not None:
                    # Said here: threads that said it themselves would overtake each other, and
                    # the first batch wait for bytes of the second.
                    maker.announce(planned)
                    planned = replace(planned, ahead=[])
                    futures.append(pool.submit(make, planned))
            if futures:
                ready = sum(future.done() for future in futures)
                made = futures.popleft().result()
                ahead.seen(made.spent.batch_bytes)
                yield made, max(0, ready - 1)
                del made
    finally:
        unwanted.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _start_threads(count: int) -> ThreadPoolExecutor:
    """Starts threads in which torch does not start others: they would fight for the same cores.

    Torch keeps the number per thread, and the number set last for threads to come; that one is put
    back, so that nothing changes outside of these threads.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, thread_name_prefix="decode", initializer=_one_torch_thread)
    # An executor starts a thread when no other one is idle: all wait until all are there.
    all_there = threading.Barrier(count)
    try:
        for future in [pool.submit(all_there.wait) for _ in range(count)]:
            future.result()
    except BaseException:
        # The system grants no more threads, or Ctrl-C: those that wait would wait for ever, and
        # the end of the process for them.
        all_there.abort()
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    finally:
        torch.set_num_threads(before)
    return pool


def _one_torch_thread() -> None:
    # Asked first: a thread takes the number of threads to come when it needs its own at last.
    torch.get_num_threads()
    torch.set_num_threads(1)


def _substituted(rows: list[Row], made: list[list[PlannedExample]]) -> list[dict[str, Any]]:
    return [
        {"dataset": place.dataset, **one.draft.substitutes}
        for row, own in zip(rows, made, strict=True)
        for place, one in zip(row, own, strict=True)
        if one.draft.substitutes is not None
    ]


def _spent(made: list[list[PlannedExample]], batch: dict[str, Any], total_s: float) -> StageTimings:
    all_made = [one for row in made for one in row]
    read_s = sum([one.read_s for one in all_made])
    layout_s = sum([one.plan_s for one in all_made])
    render_s = sum([one.draft.render_s for one in all_made])
    decode_s = sum([one.draft.decode_s for one in all_made if one.draft.num_crops])
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    return StageTimings(
        batches=1,
        samples=len(all_made),
        read_bytes=sum([one.num_bytes for one in all_made]),
        batch_bytes=sum(tensor.nbytes for tensor in tensors),
        read_s=read_s,
        layout_s=layout_s,
        decode_s=decode_s,
        # It includes decoding.
        render_s=render_s - decode_s,
        collate_s=total_s - read_s - layout_s - render_s,
    )
