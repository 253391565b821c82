"""Blocks: which consecutive samples of a shard are cached together, and arithmetic of byte ranges.

A shard is cut at multiples of a block size; a sample belongs to the block that it begins in. So
the blocks follow from the index alone: every process of every run cuts a shard alike, whatever the
order of its samples, and finds in a cache what another process has written.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

Span = tuple[int, int]
"""Bytes [start, stop) of an object."""


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
