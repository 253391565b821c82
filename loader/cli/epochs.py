"""Bytes that a node fetches in each epoch, given the size of its cache: the order, replayed. Pure.

The order says which samples each rank of a node uses in each step; the manifest, in which block of
a shard each of them is, as if all samples of a file had the same length. These uses are replayed
against a model of the cache (`loader.reading.cache`): a block is fetched when it is announced and
not there, one that a process has used up goes first, then the one that was due longest ago, and a
block that was evicted before a process had used it up costs that process its single samples.

The result is an estimate: lengths are means, all ranks of a node are taken to advance together, and
of large datasets a smaller one with the same proportions is replayed, or a part of its blocks.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from loader.order import Locality, Order, plan_order
from loader.reading import Network, blocks_of
from shardspec.keyed import dataset_seed
from shardspec.manifest import Manifest

NUM_EPOCHS = 3

_MOST_SLOTS = 3_000_000
"""Evaluated per order: one to two seconds. Datasets of a million samples are replayed as they are:
at a smaller size the order's own blocks would be smaller too."""

_MOST_USES = 150_000
"""Replayed per order: about a second."""

_SPARE = 16
"""Of the cache: what is evicted at a time, beside what is needed; see `loader.reading.cache`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochBytes:
    """What a node fetches."""

    locality: Locality
    num_bytes: tuple[int, ...]
    """In epoch 0, 1, 2."""
    replayed: float
    """Share of the dataset that was replayed: 1.0 where all of it was."""


def fetched_bytes(
    manifest: Manifest,
    *,
    split: str,
    nodes: int,
    ranks: int,
    global_batch_size: int,
    cache_bytes: int,
    locality: Locality,
    canonical_ranks: int | None = None,
    seed: int = 0,
    network: Network | None = None,
) -> EpochBytes:
    """Replays the first epochs of a run on its first node.

    Args:
      manifest: Of the dataset.
      split: Split to plan.
      nodes: Machines, each with a cache.
      ranks: Data-parallel ranks per machine; the batch is a multiple of all of them.
      global_batch_size: Samples per step over all ranks.
      cache_bytes: Bound of the cache of a machine.
      locality: Of the order.
      canonical_ranks: As `plan_order`.
      seed: Of the run.
      network: How remote data is read: size of blocks, steps ahead.

    Raises:
      ConfigError: `unknown_split`, and as `plan_order`.
    """
    network = network or Network()
    num_samples = manifest.splits[split].num_samples
    used = min(num_samples, max(global_batch_size, _MOST_SLOTS * nodes // NUM_EPOCHS))
    part = used / num_samples
    order = Order(
        plan_order(
            used,
            global_batch_size=global_batch_size,
            seed=dataset_seed(seed, manifest.dataset, split),
            canonical_ranks=canonical_ranks,
            locality=locality,
        )
    )
    table = _BlockTable(manifest, split, network=network)
    share = global_batch_size // nodes
    starts = [order.epoch_start(epoch) for epoch in range(NUM_EPOCHS + 1)]
    # Indexes are kept in the cache too, and never evicted.
    room = max(0, cache_bytes - table.index_bytes) * part
    node = _Node(table, max_bytes=round(room), ahead=network.ahead_steps)
    fetched: list[int] = []
    scale = 1.0
    for start, stop in zip(starts[:-1], starts[1:], strict=True):
        steps = np.arange(start, stop)[:, None]
        blocks = table.blocks(order.slots(steps, np.arange(share)).sample)
        rank = np.broadcast_to(np.arange(share) * ranks // share, blocks.shape)
        if not fetched:
            # Some of the blocks in a cache as much smaller: the share that hits is the same.
            scale = min(1.0, _MOST_USES / NUM_EPOCHS / max(1, blocks.size))
            node.max_bytes = round(node.max_bytes * scale)
        uses = _uses(np.broadcast_to(steps, blocks.shape), rank, blocks, scale=scale)
        fetched.append(round(node.replay(uses, start=start, stop=stop) / scale / part))
    return EpochBytes(locality=locality, num_bytes=tuple(fetched), replayed=scale * part)


class _BlockTable:
    """The blocks of a split: which one a sample is in, and how long each is."""

    def __init__(self, manifest: Manifest, split: str, *, network: Network) -> None:
        segments = manifest.segments(split)
        files = {segment.file.url: segment.file for segment in segments}
        numbers = {url: i for i, url in enumerate(files)}
        self.index_bytes = sum(file.index_bytes for file in files.values())
        counts = np.array([max(1, file.nsamples) for file in files.values()], np.int64)
        self._mean = np.array([file.num_bytes for file in files.values()], np.float64) / counts
        sizes = [blocks_of(network, file) for file in files.values()]
        self._block_bytes = np.array(sizes, np.int64)
        per_file = (counts * self._mean).astype(np.int64) // self._block_bytes + 1
        self._first = np.concatenate([[0], np.cumsum(per_file)]).astype(np.int64)
        self._counts = counts
        self._starts = np.cumsum([0, *(segment.num_rows for segment in segments)])
        self._row = np.array([segment.first_row for segment in segments], np.int64)
        self._file = np.array([numbers[segment.file.url] for segment in segments], np.int64)

    def blocks(self, sample: np.ndarray) -> np.ndarray:
        """Numbers the blocks of samples: int64, of their shape."""
        segment = np.searchsorted(self._starts, sample, side="right") - 1
        file = self._file[segment]
        row = sample - self._starts[segment] + self._row[segment]
        block: np.ndarray = self._first[file] + self._at(row, file)
        return block

    def describe(self, block: int) -> tuple[int, float]:
        """Gives the samples of a block, and the mean length of one."""
        file = int(np.searchsorted(self._first, block, side="right")) - 1
        number, count = block - int(self._first[file]), int(self._counts[file])
        mean, block_bytes = float(self._mean[file]), int(self._block_bytes[file])
        first, stop = (
            min(count, int(np.ceil(n * block_bytes / mean))) for n in (number, number + 1)
        )
        return max(1, stop - first), mean

    def _at(self, row: np.ndarray, file: np.ndarray) -> np.ndarray:
        found: np.ndarray = (row * self._mean[file] / self._block_bytes[file]).astype(np.int64)
        return found


_Use = tuple[int, int, int]
"""Rank, block, samples of it."""


def _uses(
    steps: np.ndarray, ranks: np.ndarray, blocks: np.ndarray, *, scale: float
) -> dict[int, list[_Use]]:
    """Lists what each step uses of a part of the blocks, chosen by hash."""
    if not blocks.size:  # the epoch begins and ends inside a step of the one before
        return {}
    kept = np.ones(blocks.shape, np.bool_)
    if scale < 1:
        mixed = blocks.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        kept = (mixed >> np.uint64(32)).astype(np.float64) < scale * 2.0**32
    first_step, num_ranks, num_blocks = (
        int(steps[0, 0]),
        int(ranks.max()) + 1,
        int(blocks.max()) + 1,
    )
    at = (steps[kept] - first_step) * num_ranks + ranks[kept]
    distinct, counts = np.unique(at * num_blocks + blocks[kept], return_counts=True)
    at, block = np.divmod(distinct, num_blocks)
    step, rank = np.divmod(at, num_ranks)
    uses: dict[int, list[_Use]] = defaultdict(list)
    columns = (step + first_step, rank, block, counts)
    for s, r, b, count in zip(*(column.tolist() for column in columns), strict=True):
        uses[s].append((r, b, count))
    return uses


class _Node:
    """The cache of a node, and what its processes know of it."""

    def __init__(self, table: _BlockTable, *, max_bytes: int, ahead: int) -> None:
        self.max_bytes = max_bytes
        self._table, self._ahead = table, ahead
        # (samples, mean length) of each block that was met.
        self._known: dict[int, tuple[int, float]] = {}
        # Blocks in the cache, each with its mark: (0, -passes) if used up, (1, step) if planned.
        self._cached: dict[int, tuple[int, int]] = {}
        self._cached_bytes = 0.0
        # Marks in the order of eviction; those that a block no longer has are skipped.
        self._queue: list[tuple[tuple[int, int], int]] = []
        # The same of planned ones, what is needed last first: (-step, block).
        self._last: list[tuple[int, int]] = []
        # By rank and block: samples used since it was last used up, how often it was, and the
        # steps of its next planned uses.
        self._used: Counter[tuple[int, int]] = Counter()
        self._passes: Counter[tuple[int, int]] = Counter()
        self._planned: defaultdict[tuple[int, int], list[int]] = defaultdict(list)

    def replay(self, uses: dict[int, list[_Use]], *, start: int, stop: int) -> float:
        """Replays a pass; returns the bytes that were fetched."""
        fetched, announced = 0.0, start
        for step in range(start, stop):
            while announced < min(stop, step + 1 + self._ahead):
                for use in uses.get(announced, ()):
                    fetched += self._announce(use, step=announced, now=step)
                announced += 1
            for rank, block, count in uses.get(step, ()):
                self._use(rank, block, count)
        return fetched

    def _announce(self, use: _Use, *, step: int, now: int) -> float:
        """Plans a use; returns the bytes that are fetched for it."""
        rank, block, count = use
        planned = self._planned[rank, block]
        planned.append(step)
        if block in self._cached:
            self._mark(block, (1, planned[0]))
            return 0.0
        samples, mean = self._describe(block)
        # Evicted before this process had used it up: it reads single samples.
        is_evicted = self._used[rank, block] > 0
        if not is_evicted and self._make_room(samples * mean, step=step, now=now):
            self._cached_bytes += samples * mean
            self._mark(block, (1, step))
            return samples * mean
        return count * mean

    def _use(self, rank: int, block: int, count: int) -> None:
        key = rank, block
        planned = self._planned[key]
        planned.pop(0)
        if not planned:
            del self._planned[key]
        if block not in self._cached and not self._used[key]:
            return
        self._used[key] += count
        is_used_up = self._used[key] >= self._describe(block)[0]
        if is_used_up:
            del self._used[key]
            self._passes[key] += 1
        if block in self._cached:
            if planned:
                self._mark(block, (1, planned[0]))
            elif is_used_up:
                self._mark(block, (0, -self._passes[key]))

    def _mark(self, block: int, mark: tuple[int, int]) -> None:
        if self._cached.get(block) != mark:
            self._cached[block] = mark
            heapq.heappush(self._queue, (mark, block))
            if mark[0]:
                heapq.heappush(self._last, (-mark[1], block))

    def _make_room(self, num_bytes: float, *, step: int, now: int) -> bool:
        """Evicts what may go for a block that is needed at a step; returns True if it fits."""
        if self._cached_bytes + num_bytes <= self.max_bytes:
            return True
        goal = self.max_bytes - num_bytes - self.max_bytes / _SPARE
        while self._queue and self._cached_bytes > goal:
            mark, block = self._queue[0]
            if self._cached.get(block) == mark:
                if mark >= (1, now):
                    break
                self._evict(block)
            heapq.heappop(self._queue)
        # All that is left is needed: what is needed last goes first.
        while self._last and self._cached_bytes > goal:
            last, block = -self._last[0][0], self._last[0][1]
            if self._cached.get(block) == (1, last):
                if last <= step:
                    break
                self._evict(block)
            heapq.heappop(self._last)
        return self._cached_bytes + num_bytes <= self.max_bytes

    def _evict(self, block: int) -> None:
        samples, mean = self._describe(block)
        self._cached_bytes -= samples * mean
        del self._cached[block]

    def _describe(self, block: int) -> tuple[int, float]:
        found = self._known.get(block)
        if found is None:
            found = self._known[block] = self._table.describe(block)
        return found
