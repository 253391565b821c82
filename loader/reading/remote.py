"""RemoteShards: the shards of a dataset in an object store.

An index is fetched whole when its shard is first needed, and compared with the manifest's sha256.
It gives the position and the checksum of each sample. The checksum is compared *at every read*,
whether the bytes come from the network, from memory or from a cache that another process has
filled. If it differs, the sample is read again from the store itself: if it is correct there, the
cached block is removed; if the store returns the same wrong bytes twice, the sample is bad
(`sample_crc`).

This module decides what is read; when, and where it is kept, is prefetch.py's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from loader.reading.blocks import Block, Span, block_rows
from loader.reading.open_shards import LoadedRows
from loader.reading.prefetch import Prefetcher
from shardspec import storage
from shardspec.checksum import crc32
from shardspec.errors import ShardError
from shardspec.index import open_index, parse_index
from shardspec.manifest import FileEntry

_FRESH_READS = 3
"""Most times that a sample is read from the store when its checksum differs."""


class RemoteShards:
    """Opens shards; a copy in another process begins with nothing."""

    def __init__(self, prefetcher: Prefetcher, *, raw: bool = False) -> None:
        self.prefetcher = prefetcher
        self.raw = raw

    def max_open(self, num_readers: int) -> int:  # noqa: ARG002 - as for local shards
        """Returns how many indexes are kept, however many readers share them.

        Each takes some 1 MB for 10,000 samples: a map of a file in a cache would take none, but a
        file that is cut would end the process.
        """
        return 384

    def open_soon(self, files: Iterable[FileEntry], *, step: int) -> None:
        """Fetches the indexes of shards that a step will open, as `Prefetcher.fetch_soon`."""
        remote = [file for file in files if not storage.is_local(file.index_url)]
        self.prefetcher.fetch_soon([self._index(file) for file in remote], step=step)

    def open(self, file: FileEntry) -> RemoteShard:
        """Fetches the index of a shard.

        Raises:
          ShardError: `shard_missing`, `shard_size`, `index_sha256`, or as `parse_index`.
          StorageError: As `Prefetcher.read`.
        """
        rows = self._open_local(file) if storage.is_local(file.index_url) else self._fetch(file)
        return RemoteShard(
            url=file.url,
            file=file,
            rows=LoadedRows(rows),
            offsets=np.ascontiguousarray(rows["offset"]),
            prefetcher=self.prefetcher,
            block_bytes=self.prefetcher.blocks_of(file),
        )

    def _open_local(self, file: FileEntry) -> np.ndarray:
        """Opens the index of an imported tar, which is stored apart from it."""
        return open_index(
            str(storage.local_path(file.index_url)),
            num_samples=file.nsamples,
            shard_bytes=file.num_bytes,
            raw=self.raw,
            sha256=file.index_sha256,
        )

    def _fetch(self, file: FileEntry) -> np.ndarray:
        block = self._index(file)
        span = block.start, block.stop
        payload = _read(self.prefetcher.read, block, span)
        if hashlib.sha256(payload).hexdigest() != file.index_sha256:
            self.prefetcher.reject(block)
            payload = _read(self.prefetcher.read_anew, block, span)
        got = hashlib.sha256(payload).hexdigest()
        if got != file.index_sha256:
            raise ShardError(
                "index_sha256.stored", where=block.url, got=got, want=file.index_sha256
            )
        return parse_index(
            payload,
            where=block.url,
            num_samples=file.nsamples,
            shard_bytes=file.num_bytes,
            raw=self.raw,
        )

    def _index(self, file: FileEntry) -> Block:
        return Block(
            url=file.index_url,
            start=0,
            stop=file.index_bytes,
            total=file.index_bytes,
            sha256=file.index_sha256,
            kind="index",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteShard:
    """One shard, with its index."""

    url: str
    file: FileEntry
    rows: LoadedRows
    offsets: np.ndarray
    """uint64 [n], where the samples begin."""
    prefetcher: Prefetcher
    block_bytes: int
    """Where it is cut into blocks."""

    def sample(self, number: int, place: tuple[Any, ...], *, where: str) -> memoryview:
        """Reads the members of one sample, and compares their checksum.

        Raises:
          ShardError: `shard_missing`, `shard_size`, `sample_crc`.
          StorageError: As `Prefetcher.read`.
        """
        block, span = self.place(number)
        _, _, want, *_ = place
        members = _read(self.prefetcher.read, block, span)
        got = crc32(members)
        if got == want:
            return members
        checksums = []
        for _ in range(_FRESH_READS):
            members = _read(self.prefetcher.read_anew, block, span)
            fresh = crc32(members)
            if fresh == want:
                self.prefetcher.reject(block)
                return members
            if fresh in checksums:
                break
            checksums.append(fresh)
        raise ShardError("sample_crc.stored", where=where, got=fresh, want=want)

    def place(self, row: int) -> tuple[Block, Span]:
        """Finds the block of a sample, and the sample's bytes in the shard."""
        first, stop = block_rows(self.offsets, row, block_bytes=self.block_bytes)
        table = self.rows.table
        last = table[stop - 1]
        block = Block(
            url=self.url,
            start=int(self.offsets[first]),
            stop=int(last["offset"]) + int(last["num_bytes"]),
            total=self.file.num_bytes,
            sha256=self.file.content_sha256,
        )
        start = int(self.offsets[row])
        return block, (start, start + int(table[row]["num_bytes"]))


def _read(read: Callable[[Block, Span], memoryview], block: Block, span: Span) -> memoryview:
    try:
        return read(block, span)
    except FileNotFoundError as error:
        raise ShardError("shard_missing.stored", where=block.url, want_bytes=block.total) from error
