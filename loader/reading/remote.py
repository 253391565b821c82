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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loader.reading.blocks import Block, Span, block_rows
from loader.reading.open_shards import LoadedRows, Range
from loader.reading.parted import parted_rows
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
            parted=parted_rows(rows),
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
    parted: np.ndarray
    """int64, the numbers of samples of which only parts are read, ascending."""

    def sample(self, number: int, place: tuple[Any, ...], *, where: str) -> memoryview:
        """Reads the members of one sample, and compares their checksum.

        Raises:
          ShardError: `shard_missing`, `shard_size`, `sample_crc`.
          StorageError: As `Prefetcher.read`.
        """
        _, _, want, *_ = place
        return self._checked(*self._whole(number), want, where)

    def ranges(self, ranges: Sequence[Range], *, where: str) -> list[memoryview]:
        """Reads parts of a sample, all at once; errors as `sample`."""
        blocks = [self._block(start, stop) for start, stop, _ in ranges]
        if len(blocks) > 1:
            self.prefetcher.fetch_soon(blocks)
        found: list[memoryview] = []
        failure: ShardError | None = None
        taken = 0
        try:
            for block, (start, stop, want) in zip(blocks, ranges, strict=True):
                # All are taken, also after a wrong one: what is fetched is held until it is read.
                try:
                    found.append(self._checked(block, (start, stop), want, where))
                except ShardError as error:
                    failure = failure or error
                taken += 1
        finally:
            if taken < len(blocks):
                self.prefetcher.drop_unread(blocks[taken:])
        if failure is not None:
            raise failure
        return found

    def _checked(self, block: Block, span: Span, want: int, where: str) -> memoryview:
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
        """Finds what is read of a sample in any case: its block, and its bytes in the shard."""
        if row in self.parted:
            start = int(self.offsets[row])
            stop = start + int(self.rows.table[row]["head_bytes"])
            return self._block(start, stop), (start, stop)
        return self._whole(row)

    def _whole(self, row: int) -> tuple[Block, Span]:
        first, stop = block_rows(self.offsets, row, block_bytes=self.block_bytes)
        if len(self.parted):  # these are in no block: most of their bytes may never be read
            after = int(np.searchsorted(self.parted, row))
            if after < len(self.parted):
                is_parted = int(self.parted[after]) == row
                stop = min(stop, int(self.parted[after]) + is_parted)
                first = row if is_parted else first
            first = max(first, int(self.parted[after - 1]) + 1) if after else first
        table = self.rows.table
        last = table[stop - 1]
        end = int(last["offset"]) + int(last["num_bytes"])
        start = int(self.offsets[row])
        return (
            self._block(int(self.offsets[first]), end),
            (start, start + int(table[row]["num_bytes"])),
        )

    def _block(self, start: int, stop: int) -> Block:
        return Block(
            url=self.url,
            start=start,
            stop=stop,
            total=self.file.num_bytes,
            sha256=self.file.content_sha256,
        )


def _read(read: Callable[[Block, Span], memoryview], block: Block, span: Span) -> memoryview:
    try:
        return read(block, span)
    except FileNotFoundError as error:
        raise ShardError("shard_missing.stored", where=block.url, want_bytes=block.total) from error
