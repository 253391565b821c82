"""Schedules: which samples make up each row of a rank's batch.

Between the order (which sample is in a slot) and the batch there are three ways to fill rows:

* `SlotSchedule`: a row is the sample of its slot.
* `BucketSchedule`: the same samples, but those of a few consecutive steps are dealt to these steps
  by length, so that a batch pads little. A permutation inside the group of steps.
* `PackSchedule`: a row is a pack of several samples that fill the sequence: epoch by epoch
  (pack_epochs.py), or from endless streams where epochs cannot be planned ahead (pack_streams.py).

All are functions of (order, lengths in the indexes, step): no sample is read, ranks and workers do
not enter, and a step can be requested without those before it.

Balancing exchanges rows between the ranks of a global batch, never between batches: packs by their
cost, and rows of either kind so that every rank has pictures (`BalancedSchedule`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import numpy as np

from loader.order.backlog import ReadUp
from loader.order.batch_sizes import BatchSizes
from loader.order.mixture import MixtureOrder
from loader.order.order import Order
from loader.order.pack_epochs import (
    WINDOW,
    WINDOWS_PER_RUN,
    PackedEpochs,
    epoch_streams,
    plans_epochs,
)
from loader.order.pack_streams import PackedStreams
from loader.order.packing import PackConfig, balance_ranks
from loader.order.permutation import keyed_array, permute
from loader.order.quality import Drawn
from loader.order.rows import Lengths, Row, SampleRef, sample_refs
from loader.order.slots import epoch_of, is_whole, rank_positions, require_multiple
from loader.topology import Topology
from shardspec.errors import ConfigError

_KEY_GROUP = 48
_LEAST_WINDOW = 16
_STEPS_AT_ONCE = 8


class Schedule(Protocol):
    """What the loader needs."""

    @property
    def pass_is_exact(self) -> bool:
        """True if a pass is one epoch of a dataset, False if it is a number of steps."""

    def rows(self, step: int, topology: Topology) -> list[Row]:
        """Lists the rows of a rank in a step."""

    def batch_at(self, step: int) -> tuple[int, int]:
        """Returns the rows of a step over all ranks, and the first step that has had as many."""

    def epoch_start(self, epoch: int) -> int:
        """Returns the step at which a pass over the data begins."""

    def epoch_at(self, step: int) -> int:
        """Returns the pass that a step belongs to."""


class SlotSchedule:
    """One sample per row."""

    def __init__(self, order: Order | MixtureOrder) -> None:
        self._order = order
        self.batch_at = order.batch_at
        self.epoch_start = order.epoch_start
        self.epoch_at = partial(epoch_of, order)
        self.pass_is_exact = isinstance(order, Order)
        # Rows by step, of the rank that asked last.
        self._planned: tuple[Topology | None, dict[int, list[Row]]] = (None, {})

    def rows(self, step: int, topology: Topology) -> list[Row]:
        """Lists the rows of a rank in a step."""
        if topology != self._planned[0] or step not in self._planned[1]:
            self._planned = (topology, self._plan(step, topology))
        return self._planned[1][step]

    def _plan(self, step: int, topology: Topology) -> dict[int, list[Row]]:
        """Plans some steps at once: the order takes as long for one as for a few."""
        batch = self.batch_at(step)
        stop = step + 1
        while stop < step + _STEPS_AT_ONCE and self.batch_at(stop) == batch:
            stop += 1
        steps, positions = np.arange(step, stop), _positions(topology, batch[0])
        found = sample_refs(self._order.slots(steps[:, None], positions))
        size = len(positions)
        return {
            step + i: [(place,) for place in found[i * size : (i + 1) * size]]
            for i in range(stop - step)
        }


class BucketSchedule:
    """One sample per row, dealt by length to the steps of a group."""

    def __init__(self, order: Order | MixtureOrder, lengths: Lengths, *, steps: int) -> None:
        """Joins an order and lengths.

        Args:
          order: Any order; as `bucket_group` says, groups end with the epochs of one dataset.
          lengths: As `Lengths`.
          steps: Steps of a group, >= 2. A sample moves by less than so many steps.
        """
        if not is_whole(steps) or steps < 2:
            raise ConfigError("bucket_steps", steps=steps)
        self._order, self._lengths, self._steps = order, lengths, steps
        self.batch_at = order.batch_at
        self.epoch_start = order.epoch_start
        self.epoch_at = partial(epoch_of, order)
        self.pass_is_exact = isinstance(order, Order)
        self._group: tuple[range, list[SampleRef]] = (range(0), [])

    def rows(self, step: int, topology: Topology) -> list[Row]:
        """Lists the rows of a rank in a step."""
        if step not in self._group[0]:
            self._group = self._plan(step)
        steps, found = self._group
        batch = self.batch_at(step)[0]
        start = (step - steps.start) * batch
        return [(found[start + p],) for p in _positions(topology, batch).tolist()]

    def _plan(self, step: int) -> tuple[range, list[SampleRef]]:
        group, batch = bucket_group(self._order, step, steps=self._steps), self.batch_at(step)[0]
        slots = self._order.slots(np.array(group)[:, None], np.arange(batch))
        found = sample_refs(slots)
        tokens, _ = self._lengths(slots.dataset.ravel(), slots.sample.ravel())
        by_length = np.argsort(tokens, kind="stable").reshape(len(group), batch)
        key = int(keyed_array(_KEY_GROUP, group.start)[0])
        # Which step gets the long ones, and where in the batch a sample is, is by hash.
        step_of = permute(np.arange(len(group)), size=len(group), key=key)
        place_of = permute(np.arange(batch), size=batch, key=key)
        return group, [found[i] for i in by_length[step_of][:, place_of].ravel()]


def bucket_group(order: Order | MixtureOrder, step: int, *, steps: int) -> range:
    """Finds the steps that exchange samples with a step.

    Groups begin anew with each change of the order, and with each epoch of one dataset; not with
    the passes of a mixture, whose ends (`stop`) are no part of the order and may move during a run.
    What a change finds delivered of a group is not what the order says of these steps, so a change
    is possible between groups only.
    """
    batch, since = order.batch_at(step)
    begin, stop = since, step + steps
    if isinstance(order, Order):
        epoch = epoch_of(order, step)
        begin, stop = max(order.epoch_start(epoch), since), order.epoch_start(epoch + 1)
    begin += (step - begin) // steps * steps
    end = begin + 1
    stop = min(begin + steps, stop)
    while end < stop and order.batch_at(end) == (batch, since):
        end += 1
    return range(begin, end)


class BalancedSchedule:
    """The rows of another schedule, exchanged in each step so that all ranks have pictures.

    Every rank looks up the lengths of all rows of the global batch.
    """

    def __init__(self, schedule: Schedule, lengths: Lengths, *, patches_per_crop: int) -> None:
        """Joins a schedule and lengths.

        Args:
          schedule: Whose rows are exchanged; their order is kept for a single rank.
          lengths: As `Lengths`.
          patches_per_crop: Cost of a crop, where a token costs 1.
        """
        self._schedule, self._lengths = schedule, lengths
        self._patches_per_crop = patches_per_crop
        self.batch_at, self.pass_is_exact = schedule.batch_at, schedule.pass_is_exact
        self.epoch_start, self.epoch_at = schedule.epoch_start, schedule.epoch_at

    def rows(self, step: int, topology: Topology) -> list[Row]:
        """Lists the rows of a rank in a step."""
        # For a single rank too: what cannot be balanced is refused on any number of them.
        found = self._schedule.rows(step, Topology())
        row_of = np.repeat(np.arange(len(found)), [len(row) for row in found])
        refs = [(ref.dataset, ref.sample) for row in found for ref in row]
        tokens, crops = self._lengths(*np.array(refs, np.int64).T)
        cost = np.bincount(row_of, tokens + crops * self._patches_per_crop, len(found))
        has_crops = np.bincount(row_of, crops, len(found)) > 0
        dealt = balance_ranks(cost, world_size=topology.world_size, first=has_crops)
        own = _positions(topology, len(found))
        return [found[i] for i in dealt[own].tolist()]


class PackSchedule:
    """Packs of samples per row."""

    def __init__(
        self,
        order: Order | MixtureOrder,
        lengths: Lengths,
        config: PackConfig,
        *,
        patches_per_crop: int,
        balance: bool,
    ) -> None:
        """Joins an order, lengths and limits.

        Args:
          order: An endless order (tail "wrap"), whose global batch is the number of packs.
          lengths: As `Lengths`.
          config: The limits; `plan_packing` chooses it.
          patches_per_crop: Cost of a crop, where a token costs 1.
          balance: Exchange packs between the ranks of a step, so that their costs are equal. Every
            rank then plans the packs of all ranks, otherwise its own only.
        """
        if isinstance(order, Order) and order.config.tail != "wrap":
            raise ConfigError("packing_tail", tail=order.config.tail)
        self.config = config
        self._canonical_ranks = order.config.canonical_ranks
        self._canonical_workers = order.config.canonical_workers
        self._balance = balance
        self._sizes = BatchSizes([(0, order.config.global_batch_size)])
        self._packs: PackedEpochs | PackedStreams
        if isinstance(order, Order) and plans_epochs(order):
            self._packs = PackedEpochs(order, lengths, config, patches_per_crop=patches_per_crop)
        else:
            self._packs = PackedStreams(order, lengths, config, patches_per_crop=patches_per_crop)
        self.epoch_start, self.epoch_at = self._packs.epoch_start, self._packs.epoch_at
        self.places, self.go_to = self._packs.places, self._packs.go_to
        self.num_streams, self.pass_is_exact = self._packs.num_streams, self._packs.pass_is_exact

    def batch_at(self, step: int) -> tuple[int, int]:
        """Returns the packs of a step over all ranks, and the first step with as many."""
        since, batch = self._sizes.pairs[self._sizes.segment_at(step)]
        return batch, since

    def set_sizes(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Sets (first step, packs per step), the run's start first.

        Raises:
          ConfigError: `batch_not_divisible`, as canonical ranks have equal shares; `order_count`,
            `order_ramp`.
        """
        wanted = BatchSizes(sizes)
        for _, batch in wanted.pairs:
            require_multiple(batch, self._canonical_ranks, of="canonical ranks")
        self._sizes = wanted
        self._packs.set_sizes(wanted)

    @property
    def begins(self) -> tuple[int, int]:
        """The first step of packs, and the step of the order that they begin with."""
        return self._packs.begins if isinstance(self._packs, PackedStreams) else (0, 0)

    @property
    def left_out(self) -> int:
        """Samples of removed datasets that were left out where packs began anew."""
        return self._packs.left_out if isinstance(self._packs, PackedStreams) else 0

    @property
    def backlog(self) -> Sequence[np.ndarray]:
        """What each stream of a mixture has left of the slots before `begins`; none: nothing."""
        return self._packs.backlog if isinstance(self._packs, PackedStreams) else ()

    def begin(
        self,
        order: MixtureOrder,
        *,
        at: tuple[int, int],
        backlog: Sequence[np.ndarray],
        left_out: int,
    ) -> None:
        """Begins the packs of a mixture anew over another order; `at` is as `begins`."""
        assert isinstance(self._packs, PackedStreams), "packs of a mixture"
        self._packs.begin(order, at=at, backlog=backlog)
        self._packs.left_out = left_out

    def read_up(self, places: Sequence[Sequence[int]], step: int) -> list[ReadUp] | None:
        """Tells how far each stream of a mixture is; see `PackedStreams.read_up`."""
        assert isinstance(self._packs, PackedStreams), "packs of a mixture"
        return self._packs.read_up(places, step)

    def drawn(self, rows: Sequence[Row], *, world_size: int) -> Drawn:
        """Tells where a rank's rows of a step are drawn from."""
        lanes = self._canonical_ranks // self.num_streams * self._canonical_workers
        groups = max(1.0, self.num_streams / world_size)
        if self._balance and world_size > 1:
            groups = len(rows)
        return Drawn(
            samples=sum(map(len, rows)),
            groups=groups,
            lanes=lanes,
            taken=self.config.window / lanes,
        )

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(First step, packs per step) of the run's segments."""
        return list(self._sizes.pairs)

    def rows(self, step: int, topology: Topology) -> list[Row]:
        """Lists the rows of a rank in a step."""
        batch, _ = self.batch_at(step)
        positions = _positions(topology, batch)
        if not self._balance or topology.world_size == 1:
            return [row for row, _ in self._packs.packs(step, positions)]
        found = self._packs.packs(step, np.arange(batch))
        cost = np.array([cost for _, cost in found])
        dealt = balance_ranks(cost, world_size=topology.world_size)
        return [found[i][0] for i in dealt[positions].tolist()]


def plan_packing(
    order: Order | MixtureOrder, *, sequence_length: int, max_crops: int | None
) -> PackConfig:
    """Chooses the windows: 256 samples, fewer where a stream's share of an epoch is smaller.

    Where streams are endless, a window mixes the epochs that meet in it: small datasets of a
    mixture get small windows. Where the passes of a mixture end (`stop`) is no part of the order.
    """
    streams = order.config.canonical_ranks
    if isinstance(order, Order):
        samples = order.config.num_samples
    else:
        samples = order.num_steps("first_exhausted") * order.config.global_batch_size
    if isinstance(order, Order) and plans_epochs(order):
        streams = epoch_streams(order.config)
    return PackConfig(
        sequence_length=sequence_length,
        max_crops=max_crops,
        window=max(_LEAST_WINDOW, min(WINDOW, samples // streams)),
        windows_per_run=WINDOWS_PER_RUN,
        seed=order.config.seed,
    )


def _positions(topology: Topology, batch: int) -> np.ndarray:
    return rank_positions(topology.rank, topology.world_size, batch)
