"""The interleaving pattern of a segment of a mixture, with the counts that make every slot O(1).

The pattern is M slots, a whole number of batches, in which dataset d occurs m_d times; the run
repeats it. Tables of M numbers say of a slot x of the pattern: its dataset, how many slots of the
dataset come before it, its cell, and how many slots of the cell come before it. A *cell* is a
dataset in a lane, or a dataset that has no lanes. A dataset's cells count, together, its slots, so
any run of a dataset's slots, such as one of its epochs, is dealt to its cells in closed form.
"""

from __future__ import annotations

import numpy as np

from loader.order.config import MIN_LANE_LENGTH
from loader.order.interleave import MOST_SLOTS, share_out, spread
from loader.order.mixture_config import MixtureChange
from loader.order.weights import require
from shardspec.keyed import keyed

_KEY_PATTERN = 16

_MIN_PATTERN_BATCHES = 64

_MIN_PATTERN_SLOTS = 2**18  # shares are then within 4e-6 of the weights; the tables take 6 MB


class InterleavePattern:
    """The pattern of a segment; tables are [M], [cells] or [datasets]."""

    def __init__(
        self, segment: MixtureChange, *, sizes: np.ndarray, seed: int, workers: int
    ) -> None:
        """Lays out the pattern.

        Args:
          segment: Weights, batch size and width.
          sizes: int64 [datasets], samples of each.
          seed: Of the run.
          workers: Canonical workers.
        """
        batch = self.global_batch_size = segment.global_batch_size
        batches = max(_MIN_PATTERN_BATCHES, -(-_MIN_PATTERN_SLOTS // batch))
        batches = min(batches, MOST_SLOTS // batch - workers + 1)
        require(batches > 0, "mixture_batch", global_batch_size=batch)
        batches = -(-batches // workers) * workers
        self.num_slots = batches * batch
        self.quotas = share_out(segment.weights, self.num_slots)
        """int64 [datasets], m_d."""
        key = keyed(seed, _KEY_PATTERN, segment.step)
        self.dataset = spread(self.quotas, batch=batch, key=key)
        x = np.arange(self.num_slots)
        worker = (x // batch + segment.step) % workers
        lane = x % batch // (batch // segment.canonical_ranks) * workers + worker
        num_lanes = segment.canonical_ranks * workers
        self.laned: np.ndarray = sizes >= MIN_LANE_LENGTH * num_lanes
        """bool [datasets], those that have lanes; the others are shuffled as a whole."""
        lane = np.where(self.laned[self.dataset], lane, 0)

        # Slots by dataset, by lane, by place; sixteen bits are sorted by radix, the fastest way.
        short = self.dataset.astype(np.uint16)
        by_lane = np.argsort(lane.astype(np.min_scalar_type(num_lanes)), kind="stable")
        by_cell = by_lane[np.argsort(short[by_lane], kind="stable")]
        name = (self.dataset * np.int64(num_lanes) + lane)[by_cell]
        start = np.flatnonzero(np.diff(name, prepend=-1))
        self.cell_quota = np.diff(start, append=self.num_slots)
        """int64 [cells], slots of each in the pattern."""
        cells_of = np.bincount(name[start] // num_lanes, minlength=len(sizes))
        self.first_cell = np.concatenate([np.zeros(1, np.int64), np.cumsum(cells_of)])
        """int64 [datasets + 1]: dataset d has the cells first_cell[d] to first_cell[d + 1] - 1."""
        self.cell, self.cell_rank, self.rank = (np.empty(self.num_slots, np.int32) for _ in "123")
        group = np.repeat(np.arange(len(start)), self.cell_quota)
        self.cell[by_cell] = group
        self.cell_rank[by_cell] = x - start[group]
        self._by_dataset = np.argsort(short, kind="stable").astype(np.int32)
        self._first = np.cumsum(self.quotas) - self.quotas
        self.rank[self._by_dataset] = x - np.repeat(self._first, self.quotas)

    def counts(self, slots: int) -> np.ndarray:
        """Counts the datasets' slots among the first `slots`: int64 [datasets]."""
        repeats, rest = divmod(slots, self.num_slots)
        part = np.bincount(self.dataset[:rest], minlength=len(self.quotas))
        total: np.ndarray = repeats * self.quotas + part
        return total

    def cell_counts(self, dataset: int, count: int) -> np.ndarray:
        """Counts the slots of a dataset's cells among its first `count`: int64 [its cells]."""
        repeats, rest = divmod(count, int(self.quotas[dataset]))
        start, stop = self.first_cell[dataset], self.first_cell[dataset + 1]
        first = self._first[dataset]
        cells = self.cell[self._by_dataset[first : first + rest]] - start
        counts: np.ndarray = repeats * self.cell_quota[start:stop]
        return counts + np.bincount(cells, minlength=stop - start)

    def slot_of(self, dataset: int, count: int) -> int:
        """Finds the slot of a dataset after `count` of its own, from the segment's start."""
        repeats, rest = divmod(count, int(self.quotas[dataset]))
        return repeats * self.num_slots + int(self._by_dataset[self._first[dataset] + rest])
