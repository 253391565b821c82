"""The interleaving pattern of a segment of a mixture, with the counts that make every slot O(1).

The pattern is M slots, a whole number of batches; the run repeats it. Dataset d has M * w_d slots
of it, rounded down, always the same ones. What rounding leaves, less than one slot per dataset, are
*free* slots: they are dealt to the datasets by exact weights, over all repetitions (apportion.py).
So counts follow the weights for ever, and only the free slots differ from one repetition to the
next.

**Bound.** Of the first x slots of a segment, each dataset has w_d * x to within 6, for ever: within
2 for its own slots of the pattern, and for the free ones within 2 as a whole (interleave.py) and 2
more for its part of them (apportion.py). The most that was found is 2.9 (benchmarks/ORDER.md).

Tables of M numbers say of a slot x of the pattern: its dataset, how many slots of the dataset come
before it, its cell, and how many slots of the cell come before it. A *cell* is a dataset in a lane,
or a dataset in all free slots, or a dataset that has no lanes. A dataset's cells count, together,
its slots, so any run of a dataset's slots, such as one of its epochs, is dealt to its cells in
closed form.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

import numpy as np

from loader.order.apportion import Apportionment
from loader.order.config import MIN_LANE_LENGTH
from loader.order.interleave import MOST_DATASETS, MOST_SLOTS, spread
from loader.order.mixture_config import MixtureChange
from loader.order.weights import require
from shardspec.keyed import keyed

_KEY_PATTERN = 16

_MIN_PATTERN_BATCHES = 64

_MIN_PATTERN_SLOTS = 2**18
"""So many that lanes have nearly equal shares of the datasets, and few slots are free; the tables
take 6 MB."""

_KEPT_REPEATS = 4

_KEPT_PATTERNS = 4
"""Patterns that are kept for whoever needs them again, of 1 MB each: laying one out takes 0.1 s,
and each state, change or other world size of a run makes the orders of the same segments anew."""

_MOST_OFF = 2
"""How far the number of a dataset's slots is from its share after whole repetitions."""


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Multiplies weights to integers, exactly.

    >>> whole_weights([0.5, 0.25, 3])
    [2, 1, 12]
    """
    exact = [Fraction(weight) for weight in weights]
    unit = lcm(*(weight.denominator for weight in exact))
    return [int(weight * unit) for weight in exact]


def require_pattern(segment: MixtureChange, *, workers: int) -> None:
    """Refuses what no pattern can hold.

    Raises:
      ConfigError: `mixture_weights`, too many datasets; `mixture_batch`, a global batch of which a
        pattern cannot hold one per canonical worker.
    """
    batch, num = segment.global_batch_size, sum(weight > 0 for weight in segment.weights)
    require(num <= MOST_DATASETS, "mixture_weights.many", datasets=num, most=MOST_DATASETS)
    fits = batch <= MOST_SLOTS and _num_batches(batch, workers=workers) > 0
    require(fits, "mixture_batch", global_batch_size=batch)


def _num_batches(batch: int, *, workers: int) -> int:
    batches = max(_MIN_PATTERN_BATCHES, -(-_MIN_PATTERN_SLOTS // batch))
    batches = min(batches, MOST_SLOTS // batch - workers + 1)
    return -(-batches // workers) * workers


@functools.lru_cache(maxsize=_KEPT_PATTERNS)
def _laid_out(quotas: tuple[int, ...], batch: int, key: int) -> np.ndarray:
    pattern = spread(np.array(quotas, np.int64), batch=batch, key=key)
    pattern.flags.writeable = False
    return pattern


class InterleavePattern:
    """The pattern of a segment; tables are [M], [cells] or [datasets]."""

    def __init__(
        self,
        segment: MixtureChange,
        *,
        sizes: np.ndarray,
        by_name: np.ndarray,
        seed: int,
        workers: int,
    ) -> None:
        """Lays out the pattern.

        Args:
          segment: Weights, batch size and width.
          sizes: int64 [datasets], samples of each.
          by_name: int64 [datasets], their numbers, sorted by name.
          seed: Of the run.
          workers: Canonical workers.
        """
        batch = self.global_batch_size = segment.global_batch_size
        batches = _num_batches(batch, workers=workers)
        self.num_slots = batches * batch
        weights = whole_weights([segment.weights[d] for d in by_name.tolist()])
        total = self._total = sum(weights)
        self._weights = [0] * len(weights)
        rests = [0] * len(weights)
        self.quotas = np.zeros(len(weights), np.int64)
        """int64 [datasets], slots of each in every repetition of the pattern."""
        for d, weight in zip(by_name.tolist(), weights, strict=True):
            self._weights[d] = weight
            self.quotas[d], rests[d] = divmod(weight * self.num_slots, total)
        self.num_free = sum(rests) // total
        """Free slots of the pattern."""
        self._by_name = by_name
        # The tree knows the datasets by the sequence of their names.
        self._free = Apportionment([rests[d] for d in by_name.tolist()]) if self.num_free else None
        self._number = np.empty(len(weights), np.int64)
        self._number[by_name] = np.arange(len(weights))

        key = keyed(seed, _KEY_PATTERN, segment.step)
        wanted = (*self.quotas[by_name].tolist(), self.num_free)
        spread_over = _laid_out(wanted, batch, key)
        free = len(sizes)
        self.dataset = np.append(by_name, free)[spread_over].astype(np.int32)
        """int32 [M], the dataset of each slot; the number of datasets where it is free."""
        self._free_slots = np.flatnonzero(self.dataset == free)
        x = np.arange(self.num_slots)
        worker = (x // batch + segment.step) % workers
        lane = x % batch // (batch // segment.canonical_ranks) * workers + worker
        num_lanes = segment.canonical_ranks * workers
        self.laned: np.ndarray = (sizes >= MIN_LANE_LENGTH * num_lanes) & (self.quotas > 0)
        """bool [datasets], those that have lanes; the others are shuffled as a whole."""
        lane = np.where(np.append(self.laned, False)[self.dataset], lane, 0)

        # Slots by dataset, by lane, by place; sixteen bits are sorted by radix, the fastest way.
        short = self.dataset.astype(np.uint16)
        by_lane = np.argsort(lane.astype(np.min_scalar_type(num_lanes)), kind="stable")
        by_cell = by_lane[np.argsort(short[by_lane], kind="stable")]
        name = (self.dataset * np.int64(num_lanes) + lane)[by_cell]
        start = np.flatnonzero(np.diff(name, prepend=-1))
        slots = np.diff(start, append=self.num_slots)
        cells_of = np.bincount(name[start] // num_lanes, minlength=free + 1)[:free]
        # A laned dataset's last cell is that of its free slots; others have one for all slots.
        own = cells_of + np.array([rest > 0 for rest in rests])
        own = np.where(self.laned, own, np.array([weight > 0 for weight in self._weights]))
        self.first_cell = np.concatenate([np.zeros(1, np.int64), np.cumsum(own)])
        """int64 [datasets + 1]: dataset d has the cells first_cell[d] to first_cell[d + 1] - 1."""
        self.num_cells = int(self.first_cell[-1])
        group = np.arange(len(start))
        owner = name[start] // num_lanes
        shifted = np.append(self.first_cell[:-1] - (np.cumsum(cells_of) - cells_of), 0)
        cell = np.where(owner < free, group + shifted[owner], 0)
        self.cell_quota = np.zeros(self.num_cells, np.int64)
        """int64 [cells], slots of each in every repetition of the pattern."""
        self.cell_quota[cell[owner < free]] = slots[owner < free]
        self.cell, self.cell_rank, self.rank = (np.empty(self.num_slots, np.int32) for _ in "123")
        group = np.repeat(group, slots)
        self.cell[by_cell] = cell[group]
        self.cell_rank[by_cell] = x - start[group]
        self._by_dataset = np.argsort(short, kind="stable").astype(np.int32)
        quotas = np.append(self.quotas, self.num_free)
        self._first = np.cumsum(quotas) - quotas
        self.rank[self._by_dataset] = x - np.repeat(self._first, quotas)
        # The free slots of repetitions, by number, those asked for last; replaced as a whole.
        self._repeats: dict[int, _FreeSlots] = {}

    def find(self, slot: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Finds slots, counted from the segment's start: int64 each.

        Returns:
          (dataset, slots of it before, cell, slots of the cell before).
        """
        repeats, x = np.divmod(slot, self.num_slots)
        dataset, cell = self.dataset[x].astype(np.int64), self.cell[x].astype(np.int64)
        rank, cell_rank = self.rank[x].astype(np.int64), self.cell_rank[x].astype(np.int64)
        if not self.num_free:
            return (
                dataset,
                repeats * self.quotas[dataset] + rank,
                cell,
                repeats * self.cell_quota[cell] + cell_rank,
            )
        more = np.empty_like(dataset)
        free_before = np.searchsorted(self._free_slots, x)
        free = dataset == len(self.quotas)
        numbers = np.unique(repeats).tolist()
        for number in numbers:
            own = slice(None) if len(numbers) == 1 else np.flatnonzero(repeats == number)
            dealt = self._free_of(number)
            before, chosen = free_before[own], free[own]
            # A slice of an array is that array: what is set in it is set in the whole.
            given = np.where(chosen, dealt.datasets[np.minimum(before, self.num_free - 1)], 0)
            dataset[own] = np.where(chosen, given, dataset[own])
            more[own] = dealt.before(dataset[own], before)
            rank[own] = np.where(
                chosen, dealt.ranks[np.minimum(before, self.num_free - 1)], rank[own]
            )
        count = repeats * self.quotas[dataset] + rank + more
        alone = ~self.laned[dataset]
        cell = np.where(free, self.first_cell[dataset + 1] - 1, cell)
        cell = np.where(alone, self.first_cell[dataset], cell)
        in_cell = np.where(free, more, repeats * self.cell_quota[cell] + cell_rank)
        return dataset, count, cell, np.where(alone, count, in_cell)

    def counts(self, slots: int) -> np.ndarray:
        """Counts the datasets' slots among the first `slots`: int64 [datasets]."""
        repeats, rest = divmod(slots, self.num_slots)
        part = np.bincount(self.dataset[:rest], minlength=len(self.quotas) + 1)
        total: np.ndarray = repeats * self.quotas + part[:-1]
        if self._free is not None:
            total[self._by_name] += self._free.counts(repeats * self.num_free + int(part[-1]))
        return total

    def cell_counts(self, dataset: int, count: int) -> np.ndarray:
        """Counts the slots of a dataset's cells among its first `count`: int64 [its cells]."""
        if not self.laned[dataset]:
            return np.array([count], np.int64)
        start, stop = self.first_cell[dataset], self.first_cell[dataset + 1]
        repeats, first, free = self._repeat_of(dataset, count)
        own, more = self._split(dataset, repeats, count - first)
        begin = self._first[dataset]
        cells = self.cell[self._by_dataset[begin : begin + own]] - start
        counts: np.ndarray = repeats * self.cell_quota[start:stop]
        counts += np.bincount(cells, minlength=stop - start)
        if free is not None:
            counts[-1] = free + more
        return counts

    def slot_of(self, dataset: int, count: int) -> int:
        """Finds the slot of a dataset after `count` of its own, from the segment's start."""
        if not self.quotas[dataset]:
            assert self._free is not None, "a dataset of some weight"
            slot = self._free.slot_of(int(self._number[dataset]), count)
            repeats, inside = divmod(slot, self.num_free)
            return repeats * self.num_slots + int(self._free_slots[inside])
        repeats, first, _ = self._repeat_of(dataset, count)
        inside = count - first
        free = self._free_of(repeats).own(dataset) if self.num_free else np.zeros(0, np.int64)
        ranks = self._free_of(repeats).ranks[free] + np.arange(len(free)) if len(free) else free
        found = np.flatnonzero(ranks == inside)
        if len(found):
            place = int(self._free_slots[free[found[0]]])
        else:
            own = inside - int((ranks < inside).sum())
            place = int(self._by_dataset[self._first[dataset] + own])
        return repeats * self.num_slots + place

    def _repeat_of(self, dataset: int, count: int) -> tuple[int, int, int | None]:
        """Finds the repetition in which a dataset has its slot number `count`.

        Returns:
          (repetition, slots of the dataset before it, free ones of these; None: it has none).
        """
        quota = int(self.quotas[dataset])
        if self._free is None or (self._weights[dataset] * self.num_slots) % self._total == 0:
            repeats = count // quota
            return repeats, repeats * quota, None
        per_repeat = self._weights[dataset] * self.num_slots
        repeats = (count + _MOST_OFF) * self._total // per_repeat + 1
        while True:
            free = self._free.count(int(self._number[dataset]), repeats * self.num_free)
            if repeats * quota + free <= count:
                return repeats, repeats * quota + free, free
            repeats -= 1

    def _split(self, dataset: int, repeats: int, inside: int) -> tuple[int, int]:
        """Splits a dataset's first `inside` slots of a repetition: (its own, free ones)."""
        if not self.num_free:
            return inside, 0
        dealt = self._free_of(repeats)
        free = dealt.own(dataset)
        more = int((dealt.ranks[free] + np.arange(len(free)) < inside).sum())
        return inside - more, more

    def _free_of(self, repeats: int) -> _FreeSlots:
        found = self._repeats.get(repeats)
        if found is None:
            assert self._free is not None, "there are free slots"
            start = repeats * self.num_free
            datasets = self._by_name[self._free.datasets(start, start + self.num_free)]
            counts = np.zeros(len(self.quotas), np.int64)
            counts[self._by_name] = self._free.counts(start)
            ranks = np.array(
                [
                    np.searchsorted(self._by_dataset[first : first + quota], place)
                    for first, quota, place in zip(
                        self._first[datasets],
                        self.quotas[datasets],
                        self._free_slots,
                        strict=True,
                    )
                ],
                np.int64,
            )
            found = _FreeSlots.deal(datasets, ranks=ranks, counts=counts)
            kept = list(self._repeats.items())[1 - _KEPT_REPEATS :]
            self._repeats = {**dict(kept), repeats: found}
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _FreeSlots:
    """The free slots of one repetition of the pattern."""

    datasets: np.ndarray
    """int64 [free], the dataset of each."""
    ranks: np.ndarray
    """int64 [free], slots of the pattern that are always the dataset's, before each."""
    counts: np.ndarray
    """int64 [datasets], free slots of each in all repetitions before."""
    keys: np.ndarray
    """int64 [free], sorted: dataset * (free + 1) + number of the free slot."""

    @classmethod
    def deal(cls, datasets: np.ndarray, *, ranks: np.ndarray, counts: np.ndarray) -> _FreeSlots:
        keys = np.sort(datasets * (len(datasets) + 1) + np.arange(len(datasets)))
        return cls(datasets=datasets, ranks=ranks, counts=counts, keys=keys)

    def before(self, dataset: np.ndarray, number: np.ndarray) -> np.ndarray:
        """Counts a dataset's free slots before free slot `number` of this repetition, for ever."""
        key = dataset * (len(self.datasets) + 1)
        inside = np.searchsorted(self.keys, key + number) - np.searchsorted(self.keys, key)
        counts: np.ndarray = self.counts[dataset] + inside
        return counts

    def own(self, dataset: int) -> np.ndarray:
        """Lists the numbers of a dataset's free slots: int64, ascending."""
        return np.flatnonzero(self.datasets == dataset)
