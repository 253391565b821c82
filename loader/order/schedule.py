"""Schedules: which samples make up each row of a rank's batch.

Between the order (which sample stands in a slot) and the batch stand three ways to fill rows:

* `SlotSchedule`: a row is the sample of its slot.
* `BucketSchedule`: the same samples, but those of a few consecutive steps are dealt to these steps
  by length, so that a batch pads little. A permutation inside the group of steps.
* `PackSchedule`: a row is a pack of several samples that fill the sequence. Canonical rank u reads
  the slots of its share as one endless stream, cut into packs by packing.py; its packs fill its
  share of the global batch, step after step.

All are functions of (order, lengths in the indexes, step): no sample is read, ranks and workers do
not enter, and a step can be asked for without those before it. Packs need to know how many packs
came before, so a state carries two integers per stream; without them the lengths are packed again
from the start of the run, which changes nothing but the time it takes.

Balancing exchanges rows between the ranks of a global batch, never between batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from loader.order.mixture import MixtureOrder
from loader.order.order import Order
from loader.order.packing import PackConfig, PackStream, balance_ranks, plan_run
from loader.order.permutation import keyed_array, permute
from loader.order.slots import Slots, epoch_of, rank_positions
from loader.topology import Topology
from shardspec.errors import ConfigError

Lengths = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(dataset [n], sample [n]) to (tokens [n], crops [n]), the most that a sample can take."""

_KEY_GROUP = 48
_LEAST_WINDOW = 16
_STEPS_AT_ONCE = 8


class SampleRef(NamedTuple):
    """One sample in one epoch, as a part of a batch.

    A tuple: worker processes are sent each, and a dataclass takes far longer to pickle.
    """

    dataset: int
    """Number of the dataset in the mixture; 0 without a mixture."""
    epoch: int
    sample: int
    real: bool = True
    """False for padding, which has nothing to learn."""


Row = tuple[SampleRef, ...]
"""What stands in one row of a batch: one place, or a pack of them."""


class Schedule(Protocol):
    """What the loader asks for."""

    def rows(self, step: int, topology: Topology) -> list[Row]:
        """Lists the rows of a rank in a step."""

    def batch_at(self, step: int) -> tuple[int, int]:
        """Returns the rows of a step over all ranks, and the first step that has had as many."""

    def epoch_start(self, epoch: int) -> int:
        """Returns the step at which a pass over the data begins."""


class SlotSchedule:
    """One sample per row."""

    def __init__(self, order: Order | MixtureOrder) -> None:
        self._order = order
        self.batch_at = order.batch_at
        self.epoch_start = order.epoch_start
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
        found = places(self._order.slots(steps[:, None], positions))
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
          order: Any order; the groups do not cross the ends of its passes.
          lengths: As `Lengths`.
          steps: Steps of a group, >= 2. A sample moves by less than so many steps.
        """
        if steps < 2:
            raise ConfigError("bucket_steps", steps=steps)
        self._order, self._lengths, self._steps = order, lengths, steps
        self.batch_at = order.batch_at
        self.epoch_start = order.epoch_start
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
        epoch = epoch_of(self._order, step)
        batch, since = self.batch_at(step)
        # Groups begin anew with each pass and each change of the batch size.
        begin = max(self.epoch_start(epoch), since)
        begin += (step - begin) // self._steps * self._steps
        end = begin + 1
        stop = min(begin + self._steps, self.epoch_start(epoch + 1))
        while end < stop and self.batch_at(end) == (batch, since):
            end += 1
        slots = self._order.slots(np.arange(begin, end)[:, None], np.arange(batch))
        found = places(slots)
        tokens, _ = self._lengths(slots.dataset.ravel(), slots.sample.ravel())
        by_length = np.argsort(tokens, kind="stable").reshape(end - begin, batch)
        key = int(keyed_array(_KEY_GROUP, begin)[0])
        # Which step gets the long ones, and where in the batch a sample stands, is by hash.
        step_of = permute(np.arange(end - begin), size=end - begin, key=key)
        place_of = permute(np.arange(batch), size=batch, key=key)
        return range(begin, end), [found[i] for i in by_length[step_of][:, place_of].ravel()]


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
            rank then plans all streams, otherwise its own only.
        """
        if isinstance(order, Order) and order.config.tail != "wrap":
            raise ConfigError("packing_tail", tail=order.config.tail)
        self._order, self._lengths = order, lengths
        self.config = config
        self._patches = patches_per_crop
        self._balance = balance
        self._sizes = [(0, order.config.global_batch_size)]
        """(First step, packs per step)."""
        self._pass_steps: int | None = None
        self._streams: dict[int, _Stream] = {}
        self._saved: dict[int, tuple[int, int]] = {}

    @property
    def num_streams(self) -> int:
        """Streams of the run: the canonical ranks."""
        return self._order.config.canonical_ranks

    def batch_at(self, step: int) -> tuple[int, int]:
        """Returns the packs of a step over all ranks, and the first step with as many."""
        since, batch = [entry for entry in self._sizes if entry[0] <= step][-1]
        return batch, since

    def epoch_start(self, epoch: int) -> int:
        """Returns the step at which a pass begins.

        How many packs an epoch makes is known exactly only when all are planned. A pass is the
        number of steps that holds an epoch's samples if all pack as the first run of stream 0
        does; samples go on from one pass to the next without a gap.
        """
        if self._pass_steps is None:
            run = min(self.config.run, self._samples_per_stream())
            tokens, crops = self._samples(0).lengths(0, run)
            packs = len(plan_run(tokens, crops, config=self.config))
            whole = self._samples_per_stream() * self.num_streams * packs
            self._pass_steps = max(1, -(-whole // (run * self._order.config.global_batch_size)))
        return epoch * self._pass_steps

    def set_sizes(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Sets (first step, packs per step), the run's start first.

        Raises:
          ConfigError: `batch_not_divisible`, as streams have equal shares.
        """
        for _, batch in sizes:
            rank_positions(0, self.num_streams, batch)
        self._sizes = list(sizes)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(First step, packs per step) of the run's segments."""
        return list(self._sizes)

    def rows(self, step: int, topology: Topology) -> list[Row]:
        """Lists the rows of a rank in a step."""
        batch, since = self.batch_at(step)
        positions = _positions(topology, batch)
        if self._balance and topology.world_size > 1:
            found = [self._pack(step, p, batch, since) for p in range(batch)]
            cost = np.array([cost for _, cost in found])
            dealt = balance_ranks(cost, world_size=topology.world_size)
            return [found[i][0] for i in dealt[positions].tolist()]
        return [self._pack(step, p, batch, since)[0] for p in positions.tolist()]

    def places(self) -> list[list[int]]:
        """Gives the known places of the streams, for the state: (stream, run, its first pack)."""
        planned = {number: stream.packs.place for number, stream in self._streams.items()}
        known = {**self._saved, **planned}
        return [[number, *known[number]] for number in sorted(known)]

    def go_to(self, streams: Sequence[Sequence[int]]) -> None:
        """Begins at saved places; streams without one are planned from the start of the run."""
        self._streams = {}
        self._saved = {number: (run, first) for number, run, first in streams}

    def _pack(self, step: int, position: int, batch: int, since: int) -> tuple[Row, int]:
        share = batch // self.num_streams
        number, place = divmod(position, share)
        before = 0
        for (start, size), (end, _) in zip(self._sizes, self._sizes[1:], strict=False):
            if start < since:
                before += (end - start) * (size // self.num_streams)
        stream = self._stream(number)
        return stream.row(before + (step - since) * share + place, patches=self._patches)

    def _stream(self, number: int) -> _Stream:
        if number not in self._streams:
            place = self._saved.get(number, (0, 0))
            self._streams[number] = _Stream(self._samples(number), self.config, place=place)
        return self._streams[number]

    def _samples(self, number: int) -> _Samples:
        share = self._order.config.global_batch_size // self.num_streams
        return _Samples(self._order, self._lengths, number=number, share=share)

    def _samples_per_stream(self) -> int:
        return _pass_samples(self._order) // self.num_streams or 1


class _Samples:
    """The samples of one canonical rank, one after the other; keeps those asked for last."""

    def __init__(
        self, order: Order | MixtureOrder, lengths: Lengths, *, number: int, share: int
    ) -> None:
        self._order, self._lengths = order, lengths
        self.number, self._share = number, share
        self._start = 0
        self._slots: Slots
        self._tokens: np.ndarray
        self._crops: np.ndarray

    def lengths(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Looks up the lengths of the stream's samples, and keeps what they are."""
        steps, inside = np.divmod(np.arange(start, stop), self._share)
        slots = self._order.slots(steps, self.number * self._share + inside)
        self._start, self._slots = start, slots
        self._tokens, self._crops = self._lengths(slots.dataset, slots.sample)
        return self._tokens, self._crops

    def row(self, samples: np.ndarray, *, limit: int, patches: int) -> tuple[Row, int]:
        """Gives the places of some of the samples kept, and their cost as a pack."""
        members = samples - self._start
        tokens = np.minimum(self._tokens[members], limit)
        cost = int(tokens.sum() + patches * self._crops[members].sum())
        slots = self._slots
        row = places(
            Slots(
                dataset=slots.dataset[members],
                epoch=slots.epoch[members],
                sample=slots.sample[members],
                real=slots.real[members],
            )
        )
        return tuple(row), cost


class _Stream:
    """The samples of one canonical rank as packs."""

    # Two objects, as packs ask for lengths and rows for packs: one that asks itself would stay,
    # with all files of its dataset, until Python looks for such circles.

    def __init__(self, samples: _Samples, config: PackConfig, *, place: tuple[int, int]) -> None:
        self._samples, self._limit = samples, config.sequence_length
        self.packs = PackStream(samples.lengths, config, stream=samples.number, place=place)

    def row(self, n: int, *, patches: int) -> tuple[Row, int]:
        """Gives the places of pack n and its cost."""
        # Planning the pack's run leaves its samples in mind.
        samples = self.packs.pack(n)
        return self._samples.row(samples, limit=self._limit, patches=patches)


def plan_packing(
    order: Order | MixtureOrder, *, sequence_length: int, max_crops: int | None
) -> PackConfig:
    """Chooses the windows: 256 samples, fewer where a stream's share of an epoch is smaller.

    A window mixes the epochs that meet in it, so a small dataset gets small windows. Runs of 8
    windows lose half a pack each, 0.6 % at 16,384 tokens, and let a rank that plans a hundred
    streams begin within a second.
    """
    share = _pass_samples(order) // order.config.canonical_ranks
    return PackConfig(
        sequence_length=sequence_length,
        max_crops=max_crops,
        window=max(_LEAST_WINDOW, min(256, share)),
        windows_per_run=8,
        seed=order.config.seed,
    )


def places(slots: Slots) -> list[SampleRef]:
    """Lists slots one by one, in plain integers."""
    columns = (slots.dataset, slots.epoch, slots.sample, slots.real)
    return list(map(SampleRef._make, zip(*(c.ravel().tolist() for c in columns), strict=True)))


def _pass_samples(order: Order | MixtureOrder) -> int:
    if isinstance(order, Order):
        return order.config.num_samples
    return order.epoch_start(1) * order.config.global_batch_size


def _positions(topology: Topology, batch: int) -> np.ndarray:
    return rank_positions(topology.rank, topology.world_size, batch)
