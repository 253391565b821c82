"""StreamLoader: batches of a dataset or a mixture, made ahead by threads or worker processes.

The consumer's thread plans which samples make up the next batches; threads or worker processes make
these. Batches come in the order of the run whatever makes them, and the state counts the batches
that were *delivered*, never those made ahead. A state is valid for any number of ranks, threads
and workers; it is a few hundred bytes, some kB of packs of a mixture.

A batch belongs to the consumer for as long as any part of it is referred to; then its memory is
recycled (`loader.buffers`).
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import count
from time import perf_counter
from typing import Any

from loader.buffers import BufferPool
from loader.dataloader.planning import Lengths, patches_per_crop
from loader.delivery import (
    SAMPLES_OF,
    AheadLimit,
    BatchBuilder,
    BatchMaker,
    MadeBatch,
    Stats,
    TaskPlan,
    WorkerCrew,
    make_in_threads,
)
from loader.mixture_stream import IterableDatasetMixture
from loader.order import (
    BalancedSchedule,
    BucketSchedule,
    MixtureOrder,
    Order,
    PackSchedule,
    Row,
    Schedule,
    SlotSchedule,
    rank_positions,
    require_step,
)
from loader.raw import RawDataset
from loader.reading import MOST_RECORDS, LookaheadWindow, count_reading
from loader.resume import (
    FREE,
    MakePacks,
    RunHere,
    describe_packs,
    describe_streams,
    require_border,
    resume,
)
from loader.state import STATE_VERSION, Allowed
from loader.stream import Stream, StreamingDataset
from loader.topology import Topology
from shardspec.errors import ConfigError, StateError

logger = logging.getLogger(__name__)

_LEFT_OUT = (
    "packs begin anew with other datasets: %d samples of removed datasets that streams had passed"
    " are left out of their epochs (counted in `packing.left_out` of states)"
)

_AHEAD = 2
"""Batches that each thread may be ahead of the consumer."""


class StreamLoader:
    """Gives batches: each `for` over it is one epoch, and the next one continues from there."""

    def __init__(
        self,
        dataset: StreamingDataset | RawDataset | IterableDatasetMixture,
        batches: BatchBuilder,
        *,
        lengths: Lengths | None,
        packs: PackSchedule | None,
        make_packs: MakePacks | None,
        bucket_steps: int,
        share_images: bool,
        decode_threads: int,
        workers: int,
        prefetch_bytes: int,
        watchdog_s: float | None,
    ) -> None:
        """Joins a dataset and what makes batches of its samples; see `make_dataloader`."""
        self.dataset = dataset
        """A copy of the dataset that was given, at the batch size and sequence length in use."""
        self.step = 0
        """The next step to be delivered, counted through all epochs."""
        self.bad_samples: list[dict[str, Any]] = []
        """Samples that were substituted in batches of this rank: step, dataset, sample, shard, key,
        stage, reason. The first thousand; a state keeps them."""
        self._stream: Stream[Any] = dataset._stream
        self._batches = batches
        self._maker = BatchMaker(self._stream.ahead, batches)
        # Of the pass that began last: a process group may have been made since the loader was.
        self._topology = self._stream.topology
        # The order that the run begins with, as the loader was made or changed before its first
        # step, and that in use: with the changes that were made here or in the run of a state.
        self._made = self._order = self._stream.order
        # Whether changes were made here; those of a loaded state give way to another state's.
        self._changed = False
        # What a state says of the data of datasets that were removed from the mixture.
        self._removed: dict[str, Any] = {}
        self._lengths = lengths
        self._packs, self._make_packs = packs, make_packs
        self._packs_judged = False
        self._bucket_steps = bucket_steps
        self._share_images = share_images
        self._schedule: Schedule = self._shared(packs) if packs else self._unpacked()
        self._decode_threads = decode_threads
        self._workers = workers
        self._prefetch_bytes = prefetch_bytes
        self._watchdog_s = watchdog_s
        self._pool = BufferPool(keep_bytes=prefetch_bytes)
        self._stats = Stats(
            workers=max(1, workers or decode_threads),
            worker_kind="worker process" if workers else "thread",
        )
        # What worker processes have read.
        self._counters: Counter[str] = Counter()
        # The hook, how often it is called, and the totals when it was; None: they are to be taken
        # after the batch that it held back.
        self._watcher: tuple[Callable[[int, Stats], None], int, Stats | None] | None = None
        # What the packs need to resume after the last delivered batch (`PackSchedule.places`), and
        # the step that is planned next.
        self._streams: list[list[int]] = []
        self._planned = 0
        # Counts what ends the passes that are under way: an iterator of another turn is stale.
        self._turn = 0
        # What is planned, and who makes it, from pass to pass; no plan where the loader was moved.
        self._ahead_of: TaskPlan | None = None
        self._crew: WorkerCrew | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Lets a loader be sent to another process, where it continues; hooks stay here."""
        return {**self.__dict__, "_watcher": None, "_crew": None, "_ahead_of": None}

    @property
    def epoch(self) -> int:
        """The epoch that the next step belongs to."""
        return self._schedule.epoch_at(self.step)

    @property
    def pass_is_exact(self) -> bool:
        """True if a pass (one `for`) is one epoch: each sample once, as `tail` ends it.

        False if it is a number of steps, and samples continue from one to the next: mixtures, and
        packs of more than four million samples.
        """
        return self._schedule.pass_is_exact

    def __len__(self) -> int:
        """Counts the steps of the current epoch."""
        epoch = self.epoch
        return self._schedule.epoch_start(epoch + 1) - self._schedule.epoch_start(epoch)

    def __iter__(self) -> Iterator[Any]:
        """Gives the rest of the current epoch; equally many batches on every rank.

        Raises:
          StateError: `stale_iterator`, an iterator is used further although another one has begun
            since, or the loader was moved to another step, or in a forked process.
        """
        self._turn += 1
        turn, pid = self._turn, os.getpid()
        self._topology = self._stream.settle()
        # The ranks may be others than when the loader was made.
        rank_positions(0, self._topology.world_size, self._schedule.batch_at(self.step)[0])
        stop = self._schedule.epoch_start(self.epoch + 1)
        left = stop - self.step
        crew = self._workers_at_hand()
        plan = self._plan_from_here(crew)
        begin_s = perf_counter()
        # Threads end with the loop, however it is left; worker processes stay for the next one.
        with closing(self._batches_of(plan, stop, crew)) as batches:
            for made, ready in batches:
                given_s = perf_counter()
                before, num_bad = (self.step, self._streams), len(self.bad_samples)
                totals = replace(self._stats), self._counters.copy()
                self._note_bad(made.bad)
                self.step += 1
                left -= 1
                self._streams = plan.delivered()
                batch = made.batch
                self._stats.timings += made.timings
                self._counters.update(self._counted(made))
                self._stats.wait_s += given_s - begin_s
                self._stats.ready += ready
                del made
                try:
                    self._call_watcher()
                except BaseException:
                    # The batch was not delivered: the next pass begins with it, and it counts then.
                    self._stats, self._counters = totals
                    if self._watcher is not None:
                        self._watcher = (*self._watcher[:2], None)
                    if turn == self._turn:
                        self.step, self._streams = before
                        del self.bad_samples[num_bad:]
                    raise
                yield batch
                # What the consumer does not keep is free for the next batches.
                del batch
                begin_s = perf_counter()
                self._stats.use_s += begin_s - given_s
                if not left:
                    return
                if turn != self._turn or pid != os.getpid():
                    # Its batches would come twice, and count for the state. In a forked child they
                    # would be taken from the pipes of the parent, or no thread would make them.
                    raise StateError("stale_iterator", step=self.step)

    def stats(self) -> Stats:
        """Reports where the time went since this loader was made; see `Stats`."""
        counters = count_reading(self._stream.ahead.readers) + self._counters
        return replace(self._stats, counters=dict(counters))

    def watch(self, hook: Callable[[int, Stats], None], *, every_steps: int) -> None:
        """Reports to a logger where the time goes.

        Args:
          hook: Called in the consumer's thread with the number of steps delivered so far and the
            totals of the last `every_steps` of them; the time it takes counts as the consumer's.
            What it raises ends the pass; the next one continues with the batch that was due, which
            counts then and is not reported again.
          every_steps: >= 1; counted from now on.
        """
        self._watcher = hook, every_steps, self.stats()

    def _call_watcher(self) -> None:
        if self._watcher is None:
            return
        hook, every_steps, before = self._watcher
        if before is None:
            self._watcher = hook, every_steps, self.stats()
        elif self._stats.timings.batches - before.timings.batches >= every_steps:
            now = self.stats()
            self._watcher = hook, every_steps, now
            hook(self.step, now.since(before))

    def close(self) -> None:
        """Ends the worker processes, which otherwise end with the loader; it can be used again."""
        if self._crew is not None:
            self._crew.close()
        self._crew = None

    def _workers_at_hand(self) -> WorkerCrew | None:
        """Gives the worker processes, started anew where there are none; None: threads."""
        crew = self._crew
        if crew is not None and (crew.is_closed or len(crew) != self._workers):
            self.close()
        if self._workers and self._crew is None:
            self._crew = WorkerCrew(
                self._maker, workers=self._workers, keep_bytes=self._prefetch_bytes
            )
        return self._crew

    def _plan_from_here(self, crew: WorkerCrew | None) -> TaskPlan:
        """Gives the plan of the steps from here on: that of the pass before where it got here."""
        plan, pending = self._ahead_of, 0 if crew is None else crew.num_pending
        if plan is not None and plan.continues(self.step, pending, self._topology):
            return plan
        if crew is not None:
            crew.cancel()
        self._stream.ahead.cancel()
        if self._packs is not None and self._planned != self.step:
            self._packs.go_to(self._streams)
        # Each worker process announces its own steps; threads share what is fetched.
        window = LookaheadWindow(self._stream.ahead.ahead_steps, stride=max(1, self._workers))
        self._ahead_of = plan = TaskPlan(self.step, window, self._topology)
        return plan

    def _batches_of(
        self, plan: TaskPlan, stop: int, crew: WorkerCrew | None
    ) -> Generator[tuple[MadeBatch, int], None, None]:
        ahead = self._ahead()
        if crew is not None:
            # Over the end of the epoch: the next pass begins with what is ready.
            tasks = (plan.task(self._plan) for _ in count())
            return crew.make(tasks, ahead=ahead, watchdog_s=self._watchdog_s)
        tasks = (plan.task(self._plan) for _ in range(plan.next_step, stop))
        return make_in_threads(
            tasks,
            self._maker,
            threads=self._decode_threads,
            allocate=self._pool.empty,
            ahead=ahead,
            watchdog_s=self._watchdog_s,
        )

    def _ahead(self) -> AheadLimit:
        num_rows = self._schedule.batch_at(self.step)[0] // self._stream.topology.world_size
        return AheadLimit(
            most=_AHEAD * (self._workers or self._decode_threads) + 1,
            most_bytes=self._prefetch_bytes,
            batch_bytes=self._batches.expected_bytes(num_rows),
        )

    def change(
        self, *, global_batch_size: int | None = None, weights: Sequence[float] | None = None
    ) -> None:
        """Changes the batch size, or the weights of a mixture, from the next step on.

        The change becomes part of the state: a resumed run makes its loader with the settings it
        began with, and the state brings the changes. With another batch size every sample of the
        epoch still comes once. It ends a running `for`, whose batches are already planned: leave
        that first. Before the first step it is as if the loader had been made so, and is to be
        resumed so. What is as it was changes nothing.

        Args:
          global_batch_size: Rows per step over all ranks; None: as it is.
          weights: One for each dataset of the flat mixture; None: as they are.

        Raises:
          ConfigError: `batch_not_divisible`, `order_count`; `change_weights`, there is no mixture,
            or it is packed; `change_tail`; `bucket_group`, the step is inside a group of
            `bucket_steps`; as `Order.changed`, `MixtureOrder.changed`.
        """
        batch = self._schedule.batch_at(self.step)[0]
        if global_batch_size is not None:
            batch = global_batch_size
        rank_positions(0, self._stream.topology.world_size, batch)
        batch = int(batch)
        if weights is None and batch == self._schedule.batch_at(self.step)[0]:
            return
        if weights is not None and (self._packs or not isinstance(self._order, MixtureOrder)):
            raise ConfigError("change_weights")
        require_border(self._order, self.step, bucket_steps=self._bucket_steps)
        if self.step == 0:
            order = self._planned_anew(batch, weights)
            self._packs = self._make_packs(order) if self._make_packs else None
            self._made = self._order = order
            self._schedule = self._shared(self._packs) if self._packs else self._unpacked()
        elif self._packs is not None:
            before = [size for size in self._packs.sizes if size[0] < self.step]
            as_before = before and before[-1][1] == batch
            self._packs.set_sizes([*before, *([] if as_before else [(self.step, batch)])])
        elif isinstance(self._order, MixtureOrder):
            self._order = self._order.changed(
                step=self.step, global_batch_size=batch, weights=weights
            )
            self._schedule = self._unpacked()
        else:
            self._order = self._order.changed(step=self.step, global_batch_size=batch)
            self._schedule = self._unpacked()
        if self._packs is None:
            self._stream.warn_of_pairs(self._order, step=self.step)
        self._turn += 1
        self._ahead_of = None
        self._changed = self.step > 0

    def _planned_anew(self, batch: int, weights: Sequence[float] | None) -> Order | MixtureOrder:
        """Plans the order as if the loader had been made so; without weights, those in use stay."""
        order = self._stream.plan.order(global_batch_size=batch)
        if not isinstance(order, MixtureOrder):
            return order
        assert isinstance(self._order, MixtureOrder), "the order of the same datasets"
        shares = [member.weight for member in self._order.config.members]
        if weights is not None:
            given = order.changed(step=0, global_batch_size=batch, weights=weights).config.members
            total = math.fsum(member.weight for member in given)
            shares = [member.weight / total for member in given]
        return order.changed(step=0, global_batch_size=batch, weights=shares)

    def places(self, step: int) -> list[Row]:
        """Lists which samples are in a step, before or after it ran.

        Args:
          step: Any step of the run, from 0 on; after a change that is over, from its step on.

        Returns:
          The rows of the global batch, over all ranks in order: rank r of W has the r-th of W equal
          parts, before rows are exchanged (`balance`). A row is one `SampleRef` (dataset, epoch,
          sample, real), or those of a pack. The number of a sample is its place in the dataset's
          shards, counted through.

        Raises:
          ConfigError: `order_step`; `order_slot`, a step that the order no longer describes.
        """
        require_step(step)
        return self._schedule.rows(step, Topology())

    def state_dict(self) -> dict[str, Any]:
        """Describes how far the run is.

        It is the same on every rank, so saving rank 0's is enough. (With packs whose passes are not
        exact, `streams` may differ; it saves time on resuming and is not needed.) Where samples
        were substituted, `bad` names those of this rank: a replay substitutes them again, even if
        they can be read by then.
        """
        state = {
            "version": STATE_VERSION,
            "step": self.step,
            "seed": self._stream.seed,
            "data": self._stream.fingerprint(),
            "order": self._order.config.to_dict(),
            "bucket_steps": self._bucket_steps,
            "packing": None,
            **self._stream.describe_view(),
            **self._batches.describe(),
        }
        if self._packs is not None:
            mixed = isinstance(self._order, MixtureOrder)
            state["packing"] = describe_packs(self._packs, mixed=mixed)
            state |= describe_streams(self._packs, self._streams, step=self.step, mixed=mixed)
        if self._removed:
            state["removed"] = self._removed
        if self.bad_samples:
            state["bad"] = [dict(record) for record in self.bad_samples]
        return state

    def load_state_dict(self, state: Mapping[str, Any], *, allow: Sequence[Allowed] = ()) -> None:
        """Restores a saved state, whatever the number of ranks, threads and workers now.

        Changes that the state's run made (`change`) are taken over where this loader has made
        none itself. After a change of the batch size, make the loader with the batch size that the
        run began with, or with the one that it had when the state was saved: the latter on any
        number of ranks that divides it.

        Args:
          state: A `state_dict` of any rank.
          allow: What may differ from the state's run, on purpose.
            "view": what examples and batches are made of the samples: crops, augmentation,
            sequence length, padding. The same samples continue in the view at hand. Which samples
            share a pack or a bucket follows from their lengths: there, crops and the sequence
            length must agree in any case.
            "order": the global batch size and the canonical ranks, with tail "wrap" and without
            packs; this loader's apply from the state's step on, whatever the state's run changed
            on its way. Every dataset finishes its epoch first: what is left of it is laid out
            again, with every sample once.
            "appended": one dataset, no mixture, may have grown since; otherwise as "order". The
            new samples come from the next epoch on.
            "mixture": the datasets of a mixture and their weights: those at hand apply from the
            state's step on. Each dataset that stays continues at its own place, a new one begins
            with its epoch 0. A removed one's place stays in the state: with the same data it
            continues there when it returns, as if its weight had been 0. Packs begin anew; samples
            of datasets that stay that streams had read and not delivered come in turn with the
            new ones. Those of removed datasets are left out, which a warning and
            `packing.left_out` of later states count.

        Raises:
          StateError: `state_version`; `state_fields`, `order_fields`, `order_values`, a field is
            missing or damaged; `state_appended`, the dataset has grown since;
            `state_canonical_ranks`; `state_mixture`, other datasets are mixed; `state_mismatch`,
            other samples would come; `state_view`, they would come in another view (both name every
            differing field).
          ConfigError: `state_allow`; `order_before`, the orders have nothing in common;
            `batch_not_divisible`, the ranks do not divide the batch of the state's step;
            `bucket_group`, another order inside a group of `bucket_steps`.
        """
        own = self.state_dict()
        ours = self._order if self._changed and self._packs is None else self._made
        own["order"] = ours.config.to_dict()
        here = RunHere(
            stream=self._stream,
            order=ours,
            in_use=self._order,
            own={name: own[name] for name in own if name not in FREE},
            changed=self._changed,
            packs=self._packs,
            make_packs=self._make_packs,
            bucket_steps=self._bucket_steps,
        )
        resumed = resume(state, here, allow=allow)
        packs = resumed.packs
        if packs is not None:
            packs.set_sizes(resumed.sizes)
        self._order = resumed.order
        self._changed = False
        self._removed = resumed.removed
        self._turn += 1
        self._ahead_of = None
        if resumed.bad:
            self.close()  # worker processes are to know these samples from the start
        self.step = resumed.step
        self.bad_samples = resumed.bad
        self._stream.restore_bad(self.bad_samples)
        if packs is None:
            self._schedule = self._unpacked()
        else:
            if isinstance(resumed.order, MixtureOrder):
                packs.begin(
                    resumed.order,
                    at=resumed.begins,
                    backlog=resumed.backlog,
                    left_out=resumed.left_out,
                )
            self._packs, self._schedule = packs, self._shared(packs)
            self._streams = resumed.streams
            packs.go_to(self._streams)
            self._planned = self.step
            if resumed.leaves_out and self._stream.topology.rank == 0:
                logger.warning(_LEFT_OUT, resumed.leaves_out)

    def _counted(self, made: MadeBatch) -> Counter[str]:
        """Counts what a batch adds to the statistics: reading, substitutes, samples of datasets."""
        counted = Counter(made.counters)
        if made.bad:
            counted["substituted"] = len(made.bad)
        if len(self._stream.parts) > 1:
            for number, num_samples in made.members.items():
                counted[f"{SAMPLES_OF}{self._stream.parts[number].data.title}"] = num_samples
        return counted

    def _note_bad(self, records: Sequence[Mapping[str, Any]]) -> None:
        room = MOST_RECORDS - len(self.bad_samples)
        self.bad_samples += [{"step": self.step, **record} for record in records[:room]]

    def _unpacked(self) -> Schedule:
        if self._bucket_steps:
            assert self._lengths is not None
            buckets = BucketSchedule(self._order, self._lengths, steps=self._bucket_steps)
            return self._shared(buckets)
        return self._shared(SlotSchedule(self._order))

    def _shared(self, schedule: Schedule) -> Schedule:
        """Shares the pictures of a schedule's steps between ranks, where that is asked for."""
        if self._share_images:
            assert self._lengths is not None
            patches = patches_per_crop(self._stream.parts[0].builder.view)
            schedule = BalancedSchedule(schedule, self._lengths, patches_per_crop=patches)
        return self._stream.by_id(schedule)

    def _plan(self, step: int) -> tuple[list[Row], list[list[int]]]:
        start_s = perf_counter()
        rows = self._schedule.rows(step, self._topology)
        self._stats.plan_s += perf_counter() - start_s
        self._planned = step + 1
        if self._packs is not None and not self._packs_judged:
            self._packs_judged = True
            self._stream.warn_of_packed_pairs(self._packs, rows, step=step)
        return rows, [] if self._packs is None else self._packs.places(step + 1)
