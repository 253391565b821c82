"""Packed epochs: every sample of an epoch in exactly one pack, before the next epoch's first pack.

Epoch e of a dataset is N consecutive slots of the order. Its samples are dealt to *streams* by the
canonical rank of their slots, and each stream packs its samples of the epoch, run after run
(packing.py). The epoch's packs, one stream after the other, are a line of Q(e) places.

Pack slots are counted over the run (batch_sizes.py). Epoch e owns Q(e) consecutive ones, right
after those of epoch e - 1; which step they are in follows from the packs per step alone. The
canonical ranks own as many consecutive places of the line as they have of these slots, in the
closed form of lanes.py. So every pack comes exactly once, for any number of packs per step, and a
canonical rank reads few samples but those of its own slots.

A change of the packs per step begins a new segment: the places that are not read yet (remainder.py)
are dealt anew, then whole epochs follow.

How many packs an epoch makes is known when the lengths of all its samples are packed, about 0.9 s
per million samples; every rank does that when it reaches the epoch. What a state needs to begin in
the middle of a run is two integers: an epoch and its first pack slot. Without them the epochs are
counted from the start of the run, which changes nothing but the time it takes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loader.order.batch_sizes import BatchSizes
from loader.order.config import OrderConfig
from loader.order.lanes import Lanes
from loader.order.mixture import MixtureOrder
from loader.order.order import Order
from loader.order.packing import PackConfig, count_runs, plan_run
from loader.order.permutation import keyed_array
from loader.order.remainder import EpochRemainder
from loader.order.rows import Lengths, Row, SampleRef

MOST_PLANNED = 4_000_000
"""Samples of a dataset up to which epochs are planned ahead: 3.8 s on a core of a cloud machine.
Measured with 1 and 4 million samples in 400 and 1,000 shards: 0.85 to 0.97 s per million, of which
the order takes 0.33 s, the lengths in the indexes 0.35 s and the packs 0.15 to 0.25 s."""

WINDOW, WINDOWS_PER_RUN = 256, 8
"""Runs of 8 windows lose half a pack each, 0.6 % at 16,384 tokens, and let a rank that plans a
hundred of them begin within a second."""

_KEY_EPOCH_PACKS = 33
_LOOKED_UP = 2**17  # samples looked up together: fewer cost more calls per shard, more leave caches
_COUNTED = 2**19  # samples whose packs are counted together, all their runs side by side
_FEW_RUNS = 16  # so few are planned faster than counted
_KEPT_EPOCHS = 3
_KEPT_RUNS = 16  # beside twice those in use


def plans_epochs(order: Order | MixtureOrder) -> bool:
    """Returns True if packs are planned epoch by epoch: of one dataset, and not too large a one."""
    return isinstance(order, Order) and order.config.num_samples <= MOST_PLANNED


def epoch_streams(config: OrderConfig) -> int:
    """Chooses the number of streams: the canonical ranks, or groups of neighbours.

    A stream has at least a run of samples in an epoch, as its last pack is not full.
    """
    ranks, run = config.canonical_ranks, WINDOW * WINDOWS_PER_RUN
    divisors = (n for n in range(1, ranks + 1) if ranks % n == 0)
    return max((n for n in divisors if config.num_samples // n >= run), default=1)


class PackedEpochs:
    """The packs of a dataset, epoch by epoch."""

    pass_is_exact = True

    def __init__(
        self, order: Order, lengths: Lengths, config: PackConfig, *, patches_per_crop: int
    ) -> None:
        """Joins an order of tail "wrap" without changes, lengths and limits."""
        own = order.config
        assert (own.ramp, own.since) == ((), 0), "the packs per step change by set_sizes alone"
        self.num_streams = epoch_streams(own)
        self._num_samples, self._ranks = own.num_samples, own.canonical_ranks
        # The samples' slots: their batch size is the one that the run began with, throughout.
        self._streams = Lanes(
            global_batch_size=own.global_batch_size, ranks=self.num_streams, workers=1
        )
        self._samples = _Samples(order, lengths, share=self._streams.share)
        self._config, self._patches = config, patches_per_crop
        self._sizes = BatchSizes([(0, own.global_batch_size)])
        # The first pack slots of consecutive epochs, the last of which need not be planned yet.
        self._first_epoch, self._starts = 0, [0]
        # Pure functions of the epoch, and of the epoch and the sizes: those needed last. A part
        # comes with its segment, as that of the next segment follows from it.
        self._epochs: dict[int, EpochPacks] = {}
        self._parts: dict[int, tuple[int, _Part]] = {}

    def set_sizes(self, sizes: BatchSizes) -> None:
        """Takes over the packs per step."""
        self._sizes, self._parts = sizes, {}

    def packs(self, step: int, positions: np.ndarray) -> list[tuple[Row, int]]:
        """Gives the packs at positions of a step, ascending, each with its cost."""
        slots = self._sizes.slots_before(step) + positions
        segment = self._sizes.segment_at(step)
        count = np.full(len(positions), step - self._sizes.steps[segment])
        rank, count = self._lanes(segment).find(count, positions)
        found: list[tuple[Row, int]] = []
        while len(found) < len(slots):
            epoch = self._epoch_of(int(slots[len(found)]))
            end = int(np.searchsorted(slots, self._start(epoch + 1)))
            own = slice(len(found), end)
            part = self._part(epoch, segment)
            places = part.samples(rank[own], count[own] - part.before[rank[own]])
            found += self._epoch(epoch).rows(places)
        return found

    def epoch_start(self, epoch: int) -> int:
        """Returns the first step whose packs all belong to an epoch or to later ones."""
        return self._sizes.step_from(self._start(epoch))

    def epoch_at(self, step: int) -> int:
        """Returns the pass that a step belongs to: the epoch of its first pack."""
        slot = self._sizes.slots_before(step)
        self._reach(slot)
        return self._first_epoch + bisect_right(self._starts, slot) - 1

    def places(self, step: int) -> list[list[int]]:
        """Gives what a state at a step needs: [[epoch, its first pack slot]]."""
        epoch = self.epoch_at(step)
        return [[epoch, self._start(epoch)]]

    def go_to(self, places: Sequence[Sequence[int]]) -> None:
        """Begins at what `places` gave; without it, epochs are planned from the start."""
        ((epoch, slot),) = places or [(0, 0)]
        self._first_epoch, self._starts = int(epoch), [int(slot)]

    def _start(self, epoch: int) -> int:
        """Finds the first pack slot of an epoch."""
        if epoch < self._first_epoch:
            self.go_to([])
        while epoch >= self._first_epoch + len(self._starts):
            self._plan_next()
        return self._starts[epoch - self._first_epoch]

    def _reach(self, slot: int) -> None:
        """Plans epochs until one begins at a slot or after it."""
        if slot < self._starts[0]:
            self.go_to([])
        while self._starts[-1] < slot:
            self._plan_next()

    def _plan_next(self) -> None:
        epoch = self._first_epoch + len(self._starts) - 1
        self._starts.append(self._starts[-1] + self._epoch(epoch).length)

    def _epoch_of(self, slot: int) -> int:
        self._reach(slot)
        return self._first_epoch + bisect_right(self._starts, slot) - 1

    def _epoch(self, epoch: int) -> EpochPacks:
        found = self._epochs.get(epoch)
        if found is None:
            first = self._streams.counts(epoch * self._num_samples)
            stop = self._streams.counts((epoch + 1) * self._num_samples)
            found = EpochPacks(
                self._samples,
                self._config,
                epoch=epoch,
                first=first,
                counts=stop - first,
                patches_per_crop=self._patches,
            )
            while len(self._epochs) >= _KEPT_EPOCHS:
                self._epochs.pop(min(self._epochs))
            self._epochs[epoch] = found
        return found

    def _lanes(self, segment: int) -> Lanes:
        return Lanes(global_batch_size=self._sizes.pairs[segment][1], ranks=self._ranks, workers=1)

    def _part(self, epoch: int, segment: int) -> _Part:
        """Deals an epoch, or what is left of it when a segment begins, to the canonical ranks."""
        start, stop = self._start(epoch), self._start(epoch + 1)
        i, found = self._parts.get(epoch, (segment + 1, None))
        if found is None or i > segment:
            i = self._sizes.segment_of(start)
            before = self._lanes(i).counts(start - self._sizes.slots[i])
            counts = self._lanes(i).counts(stop - self._sizes.slots[i])
            found = _Part(before=before, lengths=counts - before)
        while i < segment:
            i += 1
            begin = self._sizes.slots[i]
            read = self._lanes(i - 1).counts(begin - self._sizes.slots[i - 1]) - found.before
            rest = EpochRemainder(found, taken=read)
            # A list, so that hundreds of changes within an epoch cost no more than one.
            line = rest.samples(np.arange(rest.length))
            counts = self._lanes(i).counts(stop - begin)
            found = _Part(before=np.zeros_like(counts), lengths=counts, line=line)
        while len(self._parts) >= _KEPT_EPOCHS:
            self._parts.pop(min(self._parts))
        self._parts[epoch] = segment, found
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """An epoch in a segment, dealt to the canonical ranks: an `EpochPart` of packs."""

    before: np.ndarray
    """int64 [ranks], pack slots of each rank in the segment before the epoch's first."""
    lengths: np.ndarray
    """int64 [ranks], pack slots of each rank in the epoch."""
    line: np.ndarray | None = None
    """int64, the places of the epoch's line that are left; None: all of them."""

    def samples(self, track: np.ndarray, count: np.ndarray) -> np.ndarray:
        place: np.ndarray = (np.cumsum(self.lengths) - self.lengths)[track] + count
        return place if self.line is None else self.line[place]


class _Samples:
    """The samples of the streams: sample n of stream u is slot (n div b, u * b + n mod b)."""

    def __init__(self, order: Order, lengths: Lengths, *, share: int) -> None:
        self._order, self._lengths, self._share = order, lengths, share

    def find(
        self, stream: np.ndarray, number: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Looks up samples by stream and number, int64 [n]: (sample ids, tokens, crops)."""
        parts = []
        for start in range(0, len(number), _LOOKED_UP):
            chosen = slice(start, start + _LOOKED_UP)
            steps, inside = np.divmod(number[chosen], self._share)
            slots = self._order.slots(steps, stream[chosen] * self._share + inside)
            parts.append((slots.sample, *self._lengths(slots.dataset, slots.sample)))
        sample, tokens, crops = (np.concatenate(column) for column in zip(*parts, strict=True))
        return sample, tokens, crops


class EpochPacks:
    """The packs of one epoch, one stream after the other: a line of places."""

    def __init__(
        self,
        samples: _Samples,
        config: PackConfig,
        *,
        epoch: int,
        first: np.ndarray,
        counts: np.ndarray,
        patches_per_crop: int,
    ) -> None:
        """Counts the packs.

        Args:
          samples: Of the streams.
          config: The limits.
          epoch: Number of the epoch.
          first: int64 [streams], number of each stream's first sample of the epoch.
          counts: int64 [streams], samples that each stream has of it.
          patches_per_crop: Cost of a crop, where a token costs 1.
        """
        self._samples, self._config, self._patches = samples, config, patches_per_crop
        self._epoch = epoch
        # A stream is cut into runs of nearly equal size, so that no run is small.
        runs = np.where(counts > 0, np.maximum(1, counts // config.run), 0)
        stream = np.repeat(np.arange(len(counts)), runs)
        number = np.arange(len(stream)) - np.repeat(np.cumsum(runs) - runs, runs)
        begin = counts[stream] * number // runs[stream]
        self._stream, self._start = stream, first[stream] + begin
        self._size = counts[stream] * (number + 1) // runs[stream] - begin
        self._keys = keyed_array(config.seed, _KEY_EPOCH_PACKS, epoch, stream, number).tolist()
        self._kept: dict[int, _Run] = {}
        self._packs = self._count()
        self._ends = np.cumsum(self._packs)
        self.length = int(self._ends[-1])
        """Packs of the epoch."""

    def rows(self, places: np.ndarray) -> list[tuple[Row, int]]:
        """Gives the packs at places of the line, each with its cost."""
        run = np.searchsorted(self._ends, places, side="right")
        inside = (places - (self._ends[run] - self._packs[run])).tolist()
        numbers = list(dict.fromkeys(run.tolist()))
        found = {i: self._kept.pop(i) for i in numbers if i in self._kept}
        found |= self._plan([i for i in numbers if i not in found])
        # Those asked for last come last.
        self._kept |= found
        for i in list(self._kept)[: -2 * len(numbers) - _KEPT_RUNS]:
            del self._kept[i]
        pairs = zip(run.tolist(), inside, strict=True)
        return [found[i].row(place, epoch=self._epoch) for i, place in pairs]

    def _count(self) -> np.ndarray:
        """Counts the packs of each run: int64 [runs]."""
        packs = np.zeros(len(self._size), np.int64)
        for size in np.unique(self._size).tolist():
            own, most = np.flatnonzero(self._size == size), max(1, _COUNTED // size)
            for start in range(0, len(own), most):
                chosen = own[start : start + most]
                if len(chosen) < _FEW_RUNS:
                    planned = self._plan(chosen.tolist())
                    packs[chosen] = [len(planned[i].cost) for i in chosen.tolist()]
                    if len(planned) == len(packs):  # they are all that there are
                        self._kept = planned
                    continue
                _, tokens, crops = self._find(chosen)
                shape = (len(chosen), size)
                packs[chosen] = count_runs(
                    tokens.reshape(shape), crops.reshape(shape), config=self._config
                )
        return packs

    def _plan(self, runs: Sequence[int]) -> dict[int, _Run]:
        if not runs:
            return {}
        sample, tokens, crops = self._find(np.array(runs))
        planned, stop = {}, 0
        for i in runs:
            own = slice(stop, stop := stop + int(self._size[i]))
            planned[i] = _Run.plan(
                sample[own],
                tokens[own],
                crops[own],
                config=self._config,
                key=self._keys[i],
                patches_per_crop=self._patches,
            )
        return planned

    def _find(self, runs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Looks up the samples of runs, one run after the other."""
        size = self._size[runs]
        inside = np.arange(int(size.sum())) - np.repeat(np.cumsum(size) - size, size)
        return self._samples.find(
            np.repeat(self._stream[runs], size), np.repeat(self._start[runs], size) + inside
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """The packs of a run."""

    samples: np.ndarray
    """int64, sample ids, one pack after the other."""
    ends: list[int]
    """Where each pack ends among them, after a 0."""
    cost: list[int]
    """Of each pack: its tokens, and its crops times what they cost."""

    @classmethod
    def plan(
        cls,
        samples: np.ndarray,
        tokens: np.ndarray,
        crops: np.ndarray,
        *,
        config: PackConfig,
        key: int,
        patches_per_crop: int,
    ) -> _Run:
        packs = plan_run(tokens, crops, config=config, key=key)
        members = np.concatenate(packs)
        ends = np.cumsum([0, *map(len, packs)])
        cost = np.minimum(tokens, config.sequence_length) + patches_per_crop * crops
        return cls(
            samples=samples[members],
            ends=ends.tolist(),
            cost=np.add.reduceat(cost[members], ends[:-1]).tolist(),
        )

    def row(self, number: int, *, epoch: int) -> tuple[Row, int]:
        samples = self.samples[self.ends[number] : self.ends[number + 1]].tolist()
        return tuple(SampleRef(0, epoch, sample) for sample in samples), self.cost[number]
