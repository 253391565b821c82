"""Blocks: which consecutive samples of a shard are cached together, and arithmetic of byte ranges.

A shard is cut at multiples of a block size; a sample belongs to the block that it begins in. So
the blocks follow from the index alone: every process of every run cuts a shard alike, whatever the
order of its samples, and finds in a cache what another process has written.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from loader.order import BLOCK_SIZE

Span = tuple[int, int]
"""Bytes [start, stop) of an object."""

_PER_ORDER_BLOCK = 2
"""Blocks that hold a block of the order. Each node fetches all blocks that hold one of its samples.
Planned for eight nodes (docs/remote.md): blocks as large as the order's cost 3.2 times a node's
share, half as large 2.1 times with 1.3 times the requests, a quarter 1.5 times with 1.9 times."""
_LEAST_BLOCK_BYTES, _MOST_BLOCK_BYTES = 2**18, 2**24
"""Smaller blocks cost more in requests than they save; larger ones too much memory."""
_BLOCK_UNIT = 2**16
"""Rounded to this: shards of one dataset have samples of nearly equal means, and equal blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A part of an object that is read and cached as one."""

    url: str
    """Of the object."""
    start: int
    stop: int
    """Bytes [start, stop) of the object."""
    total: int
    """Length of the object."""
    sha256: str
    """Of the whole object, or a substitute for it: with the range it names the block by content."""
    kind: str = "block"
    """"block" or "index"."""

    @property
    def name(self) -> str:
        """Names the block's bytes, wherever the object is stored."""
        return f"{self.sha256[:32]}-{self.start}-{self.stop}.{self.kind}"

    @property
    def num_bytes(self) -> int:
        """Length of the block."""
        return self.stop - self.start


def fitting_block_bytes(num_bytes: int, num_samples: int) -> int:
    """Chooses the size of a shard's blocks: half of what the order reads together.

    The order reads `BLOCK_SIZE` neighbours on one node and deals these groups to nodes at random. A
    block of several groups would be fetched by several nodes, most of it in vain.

    Args:
      num_bytes: Length of the shard.
      num_samples: Samples in it.

    Returns:
      Bytes: a multiple of 64 KiB, 256 KiB to 16 MiB.

    >>> [fitting_block_bytes(1000 * size, 1000) for size in (5_000, 60_000, 3_000_000)]
    [262144, 458752, 16777216]
    """
    together = BLOCK_SIZE * num_bytes // max(1, num_samples)
    units = (together // _PER_ORDER_BLOCK + _BLOCK_UNIT // 2) // _BLOCK_UNIT
    return min(max(units * _BLOCK_UNIT, _LEAST_BLOCK_BYTES), _MOST_BLOCK_BYTES)


def block_rows(offsets: np.ndarray, row: int, *, block_bytes: int) -> tuple[int, int]:
    """Finds the rows of the block that a sample belongs to.

    Args:
      offsets: uint64 [n], where the samples begin, increasing.
      row: 0 to n - 1.
      block_bytes: Where blocks are cut, >= 1.

    Returns:
      (first row, one past the last).

    >>> block_rows(np.array([0, 40, 90, 130], np.uint64), 1, block_bytes=100)
    (0, 3)
    """
    number = int(offsets[row]) // block_bytes
    borders = np.array([number * block_bytes, (number + 1) * block_bytes], offsets.dtype)
    first, stop = np.searchsorted(offsets, borders).tolist()
    return first, stop


def coalesce(spans: Iterable[Span], *, gap: int, most: int) -> list[Span]:
    """Joins spans that are close together, so that one request fetches them.

    Args:
      spans: In any order; they may overlap.
      gap: Up to this many bytes between two spans are fetched with them, and not used.
      most: Longest joined span; a single one may be longer.

    >>> coalesce([(90, 95), (0, 10), (12, 20), (40, 50)], gap=5, most=100)
    [(0, 20), (40, 50), (90, 95)]
    """
    joined: list[Span] = []
    for start, stop in sorted(spans):
        if joined:
            first, last = joined[-1]
            if start - last <= gap and (max(stop, last) - first <= most or stop <= last):
                joined[-1] = first, max(stop, last)
                continue
        joined.append((start, stop))
    return joined


def missing(start: int, stop: int, have: Iterable[Span]) -> list[Span]:
    """Lists the parts of [start, stop) that none of the spans covers.

    >>> missing(0, 100, [(10, 20), (15, 30), (90, 100)])
    [(0, 10), (30, 90)]
    """
    gaps, covered = [], start
    for first, last in sorted(have):
        if first > covered:
            gaps.append((covered, min(first, stop)))
        covered = max(covered, last)
    if covered < stop:
        gaps.append((covered, stop))
    return gaps
