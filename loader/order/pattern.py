"""The interleaving pattern of a segment of a mixture, with the counts that make every slot O(1)."""

from __future__ import annotations

import numpy as np

from loader.order.config import MIN_LANE_LENGTH
from loader.order.interleave import MOST_SLOTS, share_out, spread
from loader.order.mixture_config import MixtureChange
from loader.order.weights import require
from shardspec.keyed import keyed

_KEY_WORD = 16


_MIN_WORD_BATCHES = 64


_MIN_WORD_SLOTS = 2**18  # shares are then within 4e-6 of the weights; the tables take 5 MB


class InterleavePattern:
    """The word of a segment and what a slot x of it needs to know; tables are [M] or [cells].

    A cell is a dataset in a lane, or a dataset that has no lanes.
    """

    def __init__(
        self, segment: MixtureChange, *, sizes: np.ndarray, seed: int, workers: int
    ) -> None:
        batch = self.global_batch_size = segment.global_batch_size
        batches = max(_MIN_WORD_BATCHES, -(-_MIN_WORD_SLOTS // batch))
        batches = min(batches, MOST_SLOTS // batch - workers + 1)
        require(batches > 0, "mixture_batch", global_batch_size=batch)
        batches = -(-batches // workers) * workers
        self.num_slots = batches * batch
        self.quotas = share_out(segment.weights, self.num_slots)
        key = keyed(seed, _KEY_WORD, segment.step)
        self.dataset = spread(self.quotas, batch=batch, key=key)
        x = np.arange(self.num_slots)
        worker = (x // batch + segment.step) % workers
        lane = x % batch // (batch // segment.canonical_ranks) * workers + worker
        num_lanes = segment.canonical_ranks * workers

        # Slots by dataset, by lane, by place; sixteen bits are sorted by radix, the fastest way.
        short = self.dataset.astype(np.uint16)
        by_lane = np.argsort(lane.astype(np.min_scalar_type(num_lanes)), kind="stable")
        by_cell = by_lane[np.argsort(short[by_lane], kind="stable")]
        name = (self.dataset * np.int64(num_lanes) + lane)[by_cell]
        start = np.flatnonzero(np.diff(name, prepend=-1))
        group = np.repeat(np.arange(len(start)), np.diff(start, append=self.num_slots))
        first = np.cumsum(self.quotas) - self.quotas

        self.cell_dataset = name[start] // num_lanes
        self.cell_before = start - first[self.cell_dataset]
        """Slots of the dataset in lanes before: how much of its line these own."""
        self.cell_quota = np.diff(start, append=self.num_slots)
        shortest = np.full(len(sizes), np.iinfo(np.int64).max)
        every_cell = np.arange(len(start))
        np.minimum.at(shortest, self.cell_dataset, self.slices(every_cell, sizes)[1])
        # A lane that visits a rare dataset far less than others do would own no sample of it.
        self.laned: np.ndarray = (sizes >= MIN_LANE_LENGTH * num_lanes) & (shortest >= 1)

        # A dataset without lanes keeps its first cell, for all its slots.
        kept = self.laned[self.cell_dataset] | (self.cell_before == 0)
        self.cell, self.cell_rank = (np.empty(self.num_slots, np.int32) for _ in range(2))
        self.cell[by_cell] = (np.cumsum(kept) - 1)[group]
        self.cell_rank[by_cell] = x - start[group]
        by_dataset = np.argsort(short, kind="stable")
        whole = by_dataset[~self.laned[short[by_dataset]]]
        self.cell_rank[whole] = (x - np.repeat(first, self.quotas))[~self.laned[short[by_dataset]]]
        self.cell_dataset, self.cell_before = self.cell_dataset[kept], self.cell_before[kept]
        self.cell_quota = np.where(
            self.laned[self.cell_dataset], self.cell_quota[kept], self.quotas[self.cell_dataset]
        )

    def slices(self, cell: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Finds (start, length) of what cells own of lines of int64 [datasets] places."""
        dataset = self.cell_dataset[cell]
        size, quota, before = places[dataset], self.quotas[dataset], self.cell_before[cell]
        start: np.ndarray = before * size // quota
        return start, (before + self.cell_quota[cell]) * size // quota - start

    def taken(self, slots: int) -> np.ndarray:
        """Counts what the cells took of the first `slots`: int64 [cells]."""
        words, rest = divmod(slots, self.num_slots)
        part = np.bincount(self.cell[:rest], minlength=len(self.cell_quota))
        taken: np.ndarray = words * self.cell_quota + part
        return taken

    def counts(self, slots: int) -> np.ndarray:
        """Counts the datasets' slots among the first `slots`: int64 [datasets]."""
        words, rest = divmod(slots, self.num_slots)
        part = np.bincount(self.dataset[:rest], minlength=len(self.quotas))
        total: np.ndarray = words * self.quotas + part
        return total
