"""The arithmetic of resharding: which old samples go to which new shard.

Pure. The samples of all sources are numbered through, segment after segment. A new split is a list
of those numbers (chosen, then ordered), cut into shards of equal counts, or between groups where
samples have them; a shard is a list of runs,
each some consecutive samples of one segment. Nothing here knows bytes: runs are turned into byte
ranges by the caller, who holds the indexes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from preprocess.job import (
    ShardCount,
    count_shards,
    cut_groups,
    is_name,
    plan_order,
)
from shardspec.errors import ConfigError
from shardspec.keyed import hash_text

SampleOrder = Literal["keep", "shuffle", "length"]
"""The sources' own order, a seeded shuffle by key, or short samples first."""

MAX_VIEW_RUNS = 100_000
"""Most runs of a view: its manifest has about 12 bytes for each, and every rank parses it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderCluster:
    """Readers that take whole shards: each of these processes wants the same number."""

    nodes: int = 1
    ranks: int = 1
    """Per node."""
    workers: int = 1
    """Per rank."""

    def __post_init__(self) -> None:
        if min(self.nodes, self.ranks, self.workers) < 1:
            raise ConfigError("cluster", nodes=self.nodes, ranks=self.ranks, workers=self.workers)

    @property
    def num_readers(self) -> int:
        """Processes that read."""
        return self.nodes * self.ranks * self.workers


def order_numbers(
    numbers: np.ndarray, *, order: SampleOrder, seed: int, keys: Sequence[str], lengths: np.ndarray
) -> np.ndarray:
    """Puts chosen samples into their new order.

    Args:
      numbers: int64 [n], in the sources' order.
      order: Which one.
      seed: Of a shuffle.
      keys: n keys; a shuffle depends on them and not on where samples were.
      lengths: [n], what "length" sorts by; equal ones keep the sources' order.

    Returns:
      int64 [n], the same numbers.
    """
    if order == "shuffle":
        return numbers[np.asarray(plan_order(keys, seed=seed), dtype=np.int64)]
    if order == "length":
        return numbers[np.argsort(lengths, kind="stable")]
    return numbers


def number_groups(groups: np.ndarray, *, order: SampleOrder) -> np.ndarray:
    """Numbers what must stay in one shard, by first samples.

    That is a group, and a sample of hash 0 by itself. Where the order is kept, groups whose samples
    are mixed are one: no border between shards can divide them.

    Args:
      groups: uint64 [n], the hash of each sample's group, in order.
      order: "keep" for the sources' own.

    Returns:
      int64 [n], from 0 on.

    >>> hashes = np.array([7, 0, 3, 7, 0], np.uint64)
    >>> [number_groups(hashes, order=order).tolist() for order in ("shuffle", "keep")]
    [[0, 1, 2, 0, 3], [0, 0, 0, 0, 1]]
    """
    at = np.arange(len(groups))
    _, firsts, inverse = np.unique(groups, return_index=True, return_inverse=True)
    first = np.where(groups == 0, at, firsts[inverse])
    if order == "keep":
        last = at.copy()
        np.maximum.at(last, first, at)
        ends = np.maximum.accumulate(last[first]) == at
        return np.concatenate([[0], np.cumsum(ends)[:-1]]).astype(np.int64)[: len(groups)]
    return np.unique(first, return_inverse=True)[1].astype(np.int64)


def cut_shards(
    numbers: np.ndarray, group: np.ndarray, *, num_shards: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts ordered samples into shards that divide no group.

    Args:
      numbers: int64 [n], in the new order.
      group: int64 [n], as `number_groups` gives it.
      num_shards: At most the number of groups.

    Returns:
      The numbers in stored order, and int64 [num_shards + 1], where each shard begins. Within a
      shard the order is that of `numbers`.

    >>> group = np.array([0, 1, 0, 1, 1])
    >>> [each.tolist() for each in cut_shards(np.arange(5), group, num_shards=2)]
    [[0, 2, 1, 3, 4], [0, 2, 5]]
    """
    starts = np.concatenate([[0], np.cumsum(np.bincount(group))])
    cuts = np.array(cut_groups(starts, num_shards=num_shards))
    shard = np.searchsorted(cuts, group, side="right")
    return numbers[np.argsort(shard, kind="stable")], starts[cuts].astype(np.int64)


def cut_runs(numbers: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Finds the runs of a list of samples.

    Args:
      numbers: int64 [n], numbers of samples.
      starts: int64 [segments + 1], number of each segment's first sample.

    Returns:
      int64 [runs, 3]: segment, first sample counted in the segment, samples.

    >>> cut_runs(np.array([3, 4, 5, 6, 0]), np.array([0, 5, 8])).tolist()
    [[0, 3, 2], [1, 0, 2], [0, 0, 1]]
    """
    segment = np.searchsorted(starts, numbers, side="right") - 1
    begins = np.ones(len(numbers), dtype=bool)
    begins[1:] = (np.diff(numbers) != 1) | (np.diff(segment) != 0)
    first = np.flatnonzero(begins)
    lengths = np.diff([*first, len(numbers)])
    where = segment[first]
    return np.stack([where, numbers[first] - starts[where], lengths], axis=1).astype(np.int64)


def count_outputs(
    total_bytes: int,
    *,
    num_samples: int,
    target_bytes: int,
    num_shards: int | None = None,
    cluster: ReaderCluster | None = None,
    unit: str = "sample",
) -> ShardCount:
    """Chooses how many shards a split becomes.

    Args:
      total_bytes: Of its samples.
      num_samples: No shard is left empty. Of groups, where samples have them.
      target_bytes: Wanted length of a shard.
      num_shards: Asked for by the user.
      cluster: Readers that each shall have equally many shards.
      unit: What is not divided, for people.

    >>> count_outputs(2**30, num_samples=10**5, target_bytes=2**28, cluster=ReaderCluster(ranks=8))
    ShardCount(num_shards=8, rule='1 for each of 8 readers')
    """
    if cluster is None or num_shards is not None:
        return count_shards(
            total_bytes,
            target_bytes=target_bytes,
            num_samples=num_samples,
            num_shards=num_shards,
            unit=unit,
        )
    readers = cluster.num_readers
    each = max(1, -(-total_bytes // (target_bytes * readers)))
    if each * readers > num_samples:
        return ShardCount(num_shards=max(1, num_samples), rule=f"one {unit} per shard")
    return ShardCount(num_shards=each * readers, rule=f"{each} for each of {readers} readers")


def split_numbers(
    keys: Sequence[str], shares: Mapping[str, float], *, salt: str
) -> dict[str, np.ndarray]:
    """Assigns samples to splits by a hash of their keys.

    A sample stays in its split when others are added or removed; another salt gives another split.

    Args:
      keys: Of all samples.
      shares: Name of each split to its share; they sum to 1.
      salt: Any text.

    Returns:
      Name of each split to the positions of its samples, int64, ascending.
    """
    points = np.fromiter(
        (hash_text(f"{salt}\0{key}") / 2**64 for key in keys), np.float64, count=len(keys)
    )
    borders = np.cumsum(list(shares.values()))[:-1]
    chosen = np.searchsorted(borders, points, side="right")
    return {name: np.flatnonzero(chosen == i) for i, name in enumerate(shares)}


def parse_shares(text: str) -> dict[str, float]:
    """Reads shares such as "train=0.95,validation=0.05".

    Raises:
      ConfigError: `split_shares`.
    """
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, mark, number = part.strip().partition("=")
        try:
            share = float(number)
        except ValueError:
            share = -1.0
        if not (mark and is_name(name) and 0 < share <= 1):
            raise _bad_shares(text)
        shares[name] = share
    if len(shares) != len(text.split(",")) or abs(sum(shares.values()) - 1) > 1e-9:
        raise _bad_shares(text)
    return shares


def _bad_shares(text: str) -> ConfigError:
    return ConfigError("split_shares", got=text)


def repeated_key(keys: np.ndarray) -> bytes | None:
    """Finds a key that several samples have.

    Args:
      keys: bytes [n].
    """
    ordered = np.sort(keys)
    same = np.flatnonzero(ordered[1:] == ordered[:-1])
    return bytes(ordered[same[0]]) if len(same) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """Whether a view suffices, and why."""

    view: bool
    why: str


def advise(num_runs: int) -> Advice:
    """Advises a view or a copy.

    Args:
      num_runs: Runs of all its shards together.
    """
    if num_runs > MAX_VIEW_RUNS:
        why = (
            f"a view would list {num_runs:,} runs of samples; more than {MAX_VIEW_RUNS:,} are slow"
        )
        return Advice(view=False, why=f"{why} to open")
    why = "our loader reads byte ranges of the old shards, so no byte needs to move; --copy makes"
    return Advice(view=True, why=f"{why} files, for other readers or to drop the old ones")
