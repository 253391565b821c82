"""Samples of which only parts are read: those with a large clip.

Their head, which is all but the files of clips, has a checksum of its own in the index, and is read
first. The table of a clip, in the head, has the checksums of the parts of its file; which of them
are read follows from the frames that the example has. So does whether damage is found: an example
without the damaged part is sound, on every rank and with every cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np

from loader.reading.open_shards import Range, Shard
from shardspec.errors import ShardError
from shardspec.video import FilePart

LEAST_BYTES = 4 * 2**20
"""Samples whose files are shorter are read as a whole, ahead of their use: parts are known only
when an example is made, and cost a request each."""


def parted_head(place: tuple[Any, ...]) -> Range | None:
    """Gives the head of a sample of which only parts are read; None for others.

    Args:
      place: Its row of the index: the values of `SamplePlace` that its dataset has.
    """
    offset, num_bytes, _, _, _, _, *head, _ = place
    if head and head[0] and num_bytes - head[0] >= LEAST_BYTES:
        return Range(offset, offset + head[0], head[1])
    return None


def parted_rows(rows: np.ndarray) -> np.ndarray:
    """Lists the rows of an index of whose samples only parts are read: int64, ascending."""
    if "head_bytes" not in (rows.dtype.names or ()):
        return np.zeros(0, np.int64)
    head_bytes = rows["head_bytes"].astype(np.int64)
    return np.flatnonzero((head_bytes > 0) & (rows["num_bytes"] - head_bytes >= LEAST_BYTES))


class PartedFile:
    """The file of a clip in its shard, of which parts are read; see `shardspec.video`."""

    def __init__(self, shard: Shard, start: int, *, where: str) -> None:
        """Reads nothing yet.

        Args:
          shard: That it is in.
          start: Where it begins there.
          where: Shard and key, for errors.
        """
        self._shard, self._start, self._where = shard, start, where
        self.read_s = 0.0
        """Seconds of reading."""

    def read(self, parts: Sequence[FilePart]) -> list[memoryview]:
        """Reads parts of the file.

        Raises:
          ShardError: `sample_crc`: whether it is met depends on the frames that are wanted; or as
            `Shard.ranges`.
          StorageError: As `Shard.ranges`.
        """
        begin, began_s = self._start, perf_counter()
        ranges = [Range(begin + start, begin + stop, crc32) for start, stop, crc32 in parts]
        try:
            return self._shard.ranges(ranges, where=self._where)
        except ShardError as error:
            if error.reason != "sample_crc":
                raise
            raise ShardError("sample_crc.part", where=self._where, facts=error.facts) from error
        finally:
            self.read_s += perf_counter() - began_s
