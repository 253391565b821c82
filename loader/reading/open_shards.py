"""OpenShards: the shards that readers of this process have open, each opened once."""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

import numpy as np

from shardspec.index import sample_places
from shardspec.manifest import FileEntry

_LIMITS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""The system grants no further descriptor or memory."""


class IndexRows(Protocol):
    """The rows of an index: in memory (`LoadedRows`), or read when needed (`RowFile`)."""

    @property
    def dtype(self) -> np.dtype:
        """INDEX_DTYPE, or `raw_index_dtype`."""

    def row(self, number: int) -> np.void:
        """Gives one row."""

    def place(self, number: int) -> tuple[Any, ...]:
        """Gives the values of `SamplePlace` of one row, those that its dataset has."""

    def values(self, names: Sequence[str], numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Gives columns of many rows; numbers int64 [n], in any order."""


class LoadedRows:
    """Rows that are in memory: of an index that was fetched."""

    def __init__(self, table: np.ndarray) -> None:
        self.table = table
        self.dtype = table.dtype
        self._places = sample_places(table)

    def row(self, number: int) -> np.void:
        """Gives one row."""
        found: np.void = self.table[number]
        return found

    def place(self, number: int) -> tuple[Any, ...]:
        """Gives the values of `SamplePlace` of one row."""
        found: tuple[Any, ...] = self._places[number].item()
        return found

    def values(self, names: Sequence[str], numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Gives columns of many rows."""
        return {name: self.table[name][numbers] for name in names}


class Range(NamedTuple):
    """Bytes [start, stop) of a shard, and their checksum."""

    start: int
    stop: int
    crc32: int


class Shard(Protocol):
    """A shard with its index."""

    @property
    def url(self) -> str: ...
    @property
    def rows(self) -> IndexRows: ...
    def sample(self, number: int, place: tuple[Any, ...], *, where: str) -> memoryview:
        """Gives the members of one sample.

        Args:
          number: Its row.
          place: `IndexRows.place` of the row.
          where: For errors.
        """

    def ranges(self, ranges: Sequence[Range], *, where: str) -> list[memoryview]:
        """Gives bytes of the shard, after their checksums were compared.

        Args:
          ranges: All that is needed, none of it twice.
          where: For errors.
        """


class ShardSource(Protocol):
    """Opens shards: those of a local disk, or of a store."""

    def open(self, file: FileEntry) -> Shard:
        """Opens one shard."""

    def max_open(self, num_readers: int) -> int:
        """Returns how many shards are kept open for this many readers."""


class OpenShards(dict[str, Shard]):
    """Shards that are open, by URL, the oldest first; a copy in another process has none.

    Read without the lock: a reader that misses a shard calls `open`, which looks again under it.
    """

    def __init__(self, num_readers: int = 1) -> None:
        super().__init__()
        # Guards every change of the shards and of those that are being opened. Not held while a
        # shard is opened, which may take a request to a store.
        self.lock = threading.Lock()
        _all_open[id(self)] = self
        # What is being opened, by process and URL: a forked child does not wait for its parent's
        # threads.
        self._opening: dict[tuple[int, str], Future[Shard]] = {}
        self.num_readers = num_readers
        """Readers that share it."""

    def __reduce__(self) -> tuple[object, ...]:
        return (OpenShards, (self.num_readers,))

    def open(self, file: FileEntry, source: ShardSource) -> Shard:
        """Gives a shard, opened if need be.

        Threads that wait for one shard do not block others; all that wait for the same shard share
        its opening, and its failure.

        Args:
          file: The shard.
          source: Opens it.
        """
        key = os.getpid(), file.url
        with self.lock:
            if file.url in self:
                return self[file.url]
            is_first = key not in self._opening
            opening = self._opening.setdefault(key, Future())
        if not is_first:
            return opening.result()
        try:
            shard = self._open_within_limits(file, source)
        except BaseException as error:
            with self.lock:
                del self._opening[key]
            opening.set_exception(error)
            raise
        with self.lock:
            if len(self) >= source.max_open(self.num_readers):
                # The oldest; readers that still use it keep its descriptors open.
                del self[next(iter(self))]
            self[file.url] = shard
            del self._opening[key]
        opening.set_result(shard)
        return shard

    def being_opened(self) -> set[str]:
        """Lists the URLs of the shards that are being opened now."""
        # Copied in one go, without the lock: other threads open shards meanwhile.
        return {url for _, url in list(self._opening)}

    def _open_within_limits(self, file: FileEntry, source: ShardSource) -> Shard:
        try:
            return source.open(file)
        except OSError as error:
            if error.errno not in _LIMITS:
                raise
        # Other parts of the process have taken more than their half.
        with self.lock:
            self.clear()
        return source.open(file)


_all_open: weakref.WeakValueDictionary[int, OpenShards] = weakref.WeakValueDictionary()
"""All of this process, by id."""


def _renew_locks() -> None:
    for shards in list(_all_open.values()):
        shards.lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_locks)  # another thread may hold one at a fork
