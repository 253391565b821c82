"""The arithmetic of a plan: which sample goes where, in how many shards, under which names.

Pure. A sample's position follows from a keyed hash of its key, so the order is a uniform shuffle
that does not change when other samples are added or removed; shards take equal shares of it, to
within one sample. Samples of a group, such as the windows of an episode, stay in one shard: borders
move to the nearest one between groups, and each shard is shuffled by itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from shardspec.errors import ConfigError
from shardspec.keyed import hash_text, keyed
from shardspec.messages import counted

SHARD_MULTIPLE = 8
"""Shard counts are rounded up to a multiple of this, for readers that deal out whole shards."""

MAX_PARTS = 10_000
"""Most parts of a job: each has a file in the output while the job runs."""

MIN_SHARD_BYTES = 4 * 2**20
"""Shards are not made smaller than this to reach a multiple."""


OwnDisk = Literal["refuse", "allow"]
"""What a job in parts does with an output that other machines do not see."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One of the equal parts that a job is divided into, each of which runs somewhere of its own.

    Shards are dealt in turn: shard `s` belongs to part `s % count`. Hosts are dealt by a hash of
    their names, so that all requests to a host come from one part.
    """

    index: int
    """From 0 on."""
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count <= MAX_PARTS:
            raise ConfigError("part_text", got=str(self), most=MAX_PARTS)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def stem(self) -> str:
        """Its name in those of files.

        >>> Part(index=3, count=64).stem
        '00003-of-00064'
        """
        return f"{self.index:05d}-of-{self.count:05d}"

    def divide(self, count: int) -> list[Part]:
        """Divides a part; each host of it belongs to one of the results.

        >>> [str(each) for each in Part(index=1, count=3).divide(2)]
        ['1/6', '4/6']
        """
        most = max(1, min(count, MAX_PARTS // self.count))
        return [
            Part(index=self.index + self.count * i, count=self.count * most) for i in range(most)
        ]

    def shards(self, num_shards: int) -> range:
        """Gives the shards of this part.

        >>> list(Part(index=1, count=3).shards(8))
        [1, 4, 7]
        """
        return range(self.index, num_shards, self.count)

    def has_host(self, key: int) -> bool:
        """Returns True if the host whose name has this hash belongs to this part."""
        return key % self.count == self.index


def parse_part(text: str) -> Part:
    """Reads a part.

    Raises:
      ConfigError: `part_text`.

    >>> parse_part("3/64")
    Part(index=3, count=64)
    """
    found = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
    if found is None:
        raise ConfigError("part_text", got=text, most=MAX_PARTS)
    return Part(index=int(found[1]), count=int(found[2]))


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardCount:
    """How many shards, and which rule decided."""

    num_shards: int
    rule: str
    """One sentence for people."""


def order_hash(key: str, *, seed: int) -> int:
    """Gives a sample's position in the shuffled order: sort by it, then by key."""
    return keyed(seed, hash_text(key))


def count_shards(
    total_bytes: int,
    *,
    target_bytes: int,
    num_samples: int,
    num_shards: int | None = None,
    unit: str = "sample",
) -> ShardCount:
    """Chooses the number of shards; exactly one rule binds.

    Args:
      total_bytes: Estimated length of all shards together.
      target_bytes: Wanted length of a shard.
      num_samples: No shard is left empty. Of groups, where samples have them.
      num_shards: Requested by the user, or None.
      unit: What is not divided, for people.

    >>> count_shards(10 * 2**30, target_bytes=2**28, num_samples=10**5).num_shards
    40
    >>> count_shards(2**20, target_bytes=2**28, num_samples=64).num_shards
    1
    """
    if num_shards is not None:
        requested = f"{counted(num_shards, 'shard')} requested"
        return _at_most(num_samples, num_shards, rule=requested, unit=unit)
    by_target = -(-total_bytes // target_bytes)
    rounded = -(-by_target // SHARD_MULTIPLE) * SHARD_MULTIPLE
    if total_bytes >= rounded * MIN_SHARD_BYTES:
        count, rule = rounded, f"shard size, rounded up to a multiple of {SHARD_MULTIPLE}"
    else:
        count, rule = total_bytes // MIN_SHARD_BYTES, "smallest shard size of 4 MiB"
    return _at_most(num_samples, count, rule=rule, unit=unit)


def _at_most(num_samples: int, count: int, *, rule: str, unit: str) -> ShardCount:
    """Lowers a count so that no shard is empty; one shard there is always."""
    if max(1, num_samples) < count:
        return ShardCount(num_shards=max(1, num_samples), rule=f"one {unit} per shard")
    return ShardCount(num_shards=max(1, count), rule=rule)


def shard_borders(num_samples: int, *, num_shards: int) -> np.ndarray:
    """Assigns samples to shards: int64 [num_shards + 1], lengths differ by at most one.

    >>> shard_borders(10, num_shards=4).tolist()
    [0, 2, 5, 7, 10]
    """
    return np.arange(num_shards + 1, dtype=np.int64) * num_samples // num_shards


def shard_name(
    dataset: str, split: str, shard: int, *, num_shards: int, generation: int = 0
) -> str:
    """Names a shard, without its suffix; as texts, names sort by generation, then by number.

    Numbers have five digits, or as many as their total has: without zeros, 100,000 would sort
    before 10,001.

    >>> shard_name("pixmo_cap", "train", 17, num_shards=256)
    'pixmo_cap-train-00017-of-00256'
    >>> shard_name("pixmo_cap", "train", 0, num_shards=8, generation=1)
    'pixmo_cap-train-g00001-00000-of-00008'
    >>> shard_name("web", "train", 17, num_shards=250_000)
    'web-train-000017-of-250000'
    """
    of = generation_name(f"{dataset}-{split}", generation)
    digits = max(5, len(str(num_shards)))
    return f"{of}-{shard:0{digits}d}-of-{num_shards:0{digits}d}"


def generation_name(name: str, generation: int) -> str:
    """Names a file of a generation; of the first build it has none.

    >>> generation_name("train-rows", 0), generation_name("train-rows", 2)
    ('train-rows', 'train-rows-g00002')
    """
    return f"{name}-g{generation:05d}" if generation else name


def is_name(text: str) -> bool:
    """Returns True if a dataset or a split may have this name, which its files get too.

    >>> is_name("pixmo_cap"), is_name("../x"), is_name("")
    (True, False, False)
    """
    return re.fullmatch(r"[A-Za-z0-9_-]+", text) is not None


def require_name(name: str, *, of: str) -> None:
    """Refuses a name of a dataset or a split that file names must not contain.

    Args:
      name: The name.
      of: What has it, for the message.

    Raises:
      ConfigError: `dataset_name`.
    """
    if not is_name(name):
        raise ConfigError("dataset_name.letters", of=of, got=name)


def plan_order(keys: Sequence[str], *, seed: int) -> np.ndarray:
    """Orders samples for their shards.

    Returns:
      int64 [N], indices into `keys`, in stored order.

    >>> sorted(plan_order(["a", "b", "c"], seed=1).tolist())
    [0, 1, 2]
    """
    hashes = np.fromiter((order_hash(key, seed=seed) for key in keys), np.uint64, len(keys))
    order = np.argsort(hashes, kind="stable")
    ranked = hashes[order]
    for hashed in np.unique(ranked[1:][ranked[1:] == ranked[:-1]]):
        first, stop = (
            int(np.searchsorted(ranked, hashed, side=side)) for side in ("left", "right")
        )
        order[first:stop] = sorted(order[first:stop].tolist(), key=keys.__getitem__)
    return order


def cut_groups(starts: np.ndarray, *, num_shards: int) -> list[int]:
    """Deals groups to shards: each border is the one between groups that is nearest to its share.

    Args:
      starts: int64 [groups + 1], in samples; groups are in their order.
      num_shards: At most the number of groups; no shard is left empty.

    Returns:
      num_shards + 1 numbers of groups, the first of each shard.

    >>> cut_groups(np.array([0, 5, 6, 10]), num_shards=2)
    [0, 1, 3]
    """
    num_groups, cuts = len(starts) - 1, [0]
    for share in shard_borders(int(starts[-1]), num_shards=num_shards)[1:-1].tolist():
        above = int(np.searchsorted(starts, share))
        nearer_below = above > 0 and share - starts[above - 1] <= starts[above] - share
        nearest = above - nearer_below
        last = num_groups - (num_shards - len(cuts))  # a group is left for each further shard
        cuts.append(int(min(max(nearest, cuts[-1] + 1), last)))
    return [*cuts, num_groups]


def plan_groups(
    keys: Sequence[str], groups: Sequence[str], *, seed: int, num_shards: int
) -> tuple[np.ndarray, list[int]]:
    """Orders samples for their shards, those of a group in the same one.

    Args:
      keys: Of the samples.
      groups: Of each sample the name of its group; "" for one of its own.
      seed: As of `plan_order`.
      num_shards: At most the number of groups.

    Returns:
      int64 [N], indices into `keys`, in stored order, and the borders of the shards in it.

    >>> order, borders = plan_groups("abcd", ["x", "y", "x", "y"], seed=1, num_shards=2)
    >>> [sorted(order[:2].tolist()), borders]
    [[0, 2], [0, 2, 4]]
    """
    members: dict[tuple[str, bool], list[int]] = {}
    for i in plan_order(keys, seed=seed).tolist():
        name = (groups[i], True) if groups[i] else (f"sample {keys[i]}", False)
        members.setdefault(name, []).append(i)
    names = sorted(members, key=lambda name: (order_hash(name[0], seed=seed), name))
    starts = np.cumsum([0, *(len(members[name]) for name in names)])
    cuts = cut_groups(starts, num_shards=num_shards)
    order: list[int] = []
    for first, stop in zip(cuts, cuts[1:], strict=False):
        inside = [i for name in names[first:stop] for i in members[name]]
        order += [inside[j] for j in plan_order([keys[i] for i in inside], seed=seed)]
    return np.array(order, np.int64), starts[cuts].tolist()
