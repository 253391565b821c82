"""ColumnFiles: the values of added columns, by the numbers of samples.

The file of a shard is opened when a value of it is first needed. Its sha256 is compared the first
time, in each process. Of a large local file the rows are read that are needed: it is not mapped, as
reading a map of a file that was truncated ends the process. Those of an object store are fetched
whole, as indexes are, and stay in the node's cache.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from loader.reading.blocks import Block
from loader.reading.open_shards import IndexRows, LoadedRows
from loader.reading.prefetch import Prefetcher
from shardspec import storage
from shardspec.columns import columns_dtype, open_column_file, parse_columns
from shardspec.errors import ShardError
from shardspec.manifest import AddedColumns, ShardEntry

_MOST_OPEN = 128
"""Files kept open. Opening one again takes 0.1 ms."""

_MOST_READ_BYTES = 2**20
"""Local files up to this are read into memory; a longer one holds a descriptor of the process."""

_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

_OPENED_AHEAD = 64
"""Remote files that are fetched at a time."""


class ColumnFiles:
    """The added columns of a split. Safe to share between threads; picklable."""

    def __init__(
        self,
        url: str,
        shards: Sequence[ShardEntry],
        columns: AddedColumns,
        *,
        prefetcher: Prefetcher | None,
    ) -> None:
        """Lists the files; opens none yet.

        Args:
          url: The dataset.
          shards: Of the split, in order.
          columns: Of its manifest.
          prefetcher: Fetches remote files; None where they are local.
        """
        self.dtype = columns_dtype(columns.types)
        self.prefetcher = prefetcher
        self._types = dict(columns.types)
        self._blocks = [
            Block(
                url=storage.join(url, columns.file_url(shard.url)),
                start=0,
                stop=columns.files[shard.url].num_bytes,
                total=columns.files[shard.url].num_bytes,
                sha256=columns.files[shard.url].sha256,
                kind="index",
            )
            for shard in shards
        ]
        self._counts = [shard.nsamples for shard in shards]
        self._starts = np.concatenate([[0], np.cumsum(self._counts)]).astype(np.int64)
        # Files whose sha256 was compared. Only added to; two threads may compare one at a time.
        self._checked: set[int] = set()
        self._open = lru_cache(_MOST_OPEN)(self._opened)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open = lru_cache(_MOST_OPEN)(self._opened)

    def values(self, names: Sequence[str], sample_ids: np.ndarray) -> dict[str, np.ndarray]:
        """Reads columns for many samples at once.

        Args:
          names: Of columns that there are.
          sample_ids: int64 [n], in any order.

        Returns:
          [n] of the type of each; vectors [n, length].

        Raises:
          ShardError: `columns_missing`, `columns_sha256`, `columns_format`.
          StorageError: As `Prefetcher.read`.
        """
        values = {name: np.zeros(len(sample_ids), self.dtype[name]) for name in names}
        shard_of = np.searchsorted(self._starts, sample_ids, side="right") - 1
        numbers = np.unique(shard_of).tolist()
        for i, number in enumerate(numbers):
            if self.prefetcher is not None and i % _OPENED_AHEAD == 0 and len(numbers) > 1:
                soon = [self._blocks[n] for n in numbers[i : i + _OPENED_AHEAD]]
                self.prefetcher.fetch_soon([b for b in soon if not storage.is_local(b.url)])
            own = np.flatnonzero(shard_of == number)
            rows, at = self._open(number), sample_ids[own] - self._starts[number]
            for name, column in rows.values(names, at).items():
                values[name][own] = column
        return values

    def _opened(self, number: int) -> IndexRows:
        try:
            try:
                rows = self._open_rows(number)
            except OSError as error:
                if error.errno not in _NO_DESCRIPTORS:
                    raise
                # Other parts of the process have taken them: files that nobody reads are closed.
                self._open.cache_clear()
                rows = self._open_rows(number)
        except FileNotFoundError as error:
            raise ShardError("columns_missing", where=self._blocks[number].url) from error
        self._checked.add(number)
        return rows

    def _open_rows(self, number: int) -> IndexRows:
        block, payload = self._blocks[number], memoryview(b"")
        fixed: dict[str, Any] = {
            "where": block.url,
            "types": self._types,
            "num_samples": self._counts[number],
            "sha256": None if number in self._checked else block.sha256,
        }
        if not storage.is_local(block.url):
            payload = self._fetched(block)
        else:
            path = storage.local_path(block.url)
            if path.stat().st_size > _MOST_READ_BYTES:
                return open_column_file(str(path), **fixed)
            payload = memoryview(path.read_bytes())
        return LoadedRows(parse_columns(payload, **fixed))

    def _fetched(self, block: Block) -> memoryview:
        assert self.prefetcher is not None
        payload = self.prefetcher.read(block, (block.start, block.stop))
        if hashlib.sha256(payload).hexdigest() != block.sha256:
            self.prefetcher.reject(block)
            payload = self.prefetcher.read_anew(block, (block.start, block.stop))
        return payload
