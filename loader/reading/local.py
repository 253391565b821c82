"""LocalShards: the shards of a dataset on a local disk.

Shards and their indexes are opened when first touched, after their lengths have been compared with
the manifest's; a shard that is missing, short or too long is refused before a byte of it is used.
Samples and rows of the index are copied out of their files when they are needed: a map of a file
that somebody cuts would end the process.

An index is hashed when it is first opened, which takes 1 ms for 10,000 samples: it says where each
sample is and which checksum it has, so what it says is trusted as far as the manifest is. The tar
is not hashed: the checksum of each sample is compared when it is read.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loader.reading.cache import OpenFile
from loader.reading.open_shards import IndexRows, LoadedRows, Range
from shardspec import storage
from shardspec.checksum import crc32
from shardspec.errors import ShardError
from shardspec.index import RowFile, open_index_file, parse_index
from shardspec.manifest import FileEntry

_MOST_OPEN = 16_000
"""Most local shards that are open at a time, where a process may have any number of descriptors."""

Check = Literal["size", "crc"]
"""How much of a tar is verified: its length, or each sample's checksum as well."""


class LocalShards:
    """Opens shards on a local disk."""

    def __init__(self, check: Check, *, raw: bool) -> None:
        self._check, self._raw = check, raw
        # Indexes that were hashed, by URL: what identified the file then. Shards are closed and
        # opened again where there are many. Threads may hash the same index at a time.
        self._hashed: dict[str, tuple[int, ...]] = {}

    def max_open(self, num_readers: int) -> int:
        """Returns how many shards are kept open for this many readers, with two descriptors each.

        256 for each reader, but together no more than half of the descriptors that the system
        grants the process (`ulimit -n`, commonly 1024). Opening a shard again takes 0.2 ms.
        """
        granted, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = min(256 * num_readers, _MOST_OPEN)
        return most if granted < 0 else max(1, min(most, granted // 4))

    def open(self, file: FileEntry) -> LocalShard:
        """Opens a shard and its index.

        Raises:
          ShardError: `shard_missing`, `shard_size`, or as `open_index`.
        """
        _check_size(file.url, file.num_bytes)
        _check_size(file.index_url, file.index_bytes)
        rows: IndexRows
        if storage.is_local(file.index_url):
            rows = self._open_index(file)
        else:  # tars that were imported into a store's dataset
            rows = LoadedRows(
                parse_index(
                    memoryview(storage.read_bytes(file.index_url)),
                    where=file.index_url,
                    raw=self._raw,
                    sha256=file.index_sha256,
                    num_samples=file.nsamples,
                    shard_bytes=file.num_bytes,
                )
            )
        descriptor = os.open(storage.local_path(file.url), os.O_RDONLY | os.O_CLOEXEC)
        return LocalShard(
            tar=OpenFile(descriptor, file.num_bytes),
            rows=rows,
            url=file.url,
            check=self._check,
        )

    def _open_index(self, file: FileEntry) -> RowFile:
        path = storage.local_path(file.index_url)
        try:
            stat = path.stat()
        except FileNotFoundError as error:
            raise ShardError("index_missing.stored", where=file.index_url) from error
        # Taken before the file is read: one that is replaced meanwhile has another stamp later.
        stamp = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        is_hashed = self._hashed.get(file.index_url) == stamp
        rows = open_index_file(
            str(path),
            num_samples=file.nsamples,
            shard_bytes=file.num_bytes,
            raw=self._raw,
            sha256="" if is_hashed else file.index_sha256,
        )
        self._hashed[file.index_url] = stamp
        return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalShard:
    """One shard, open."""

    tar: OpenFile
    rows: IndexRows
    url: str
    check: Check

    def sample(self, number: int, place: tuple[Any, ...], *, where: str) -> memoryview:  # noqa: ARG002 - as for remote shards
        """Gives the members of one sample.

        Raises:
          ShardError: `sample_cut`; `sample_crc`, where checksums are compared.
        """
        offset, num_bytes, crc32, *_ = place  # all that a local file needs
        return self._read(Range(offset, offset + num_bytes, crc32), where)

    def ranges(self, ranges: Sequence[Range], *, where: str) -> list[memoryview]:
        """Gives parts of a sample; errors as `sample`."""
        return [self._read(one, where) for one in ranges]

    def _read(self, one: Range, where: str) -> memoryview:
        payload = self.tar.read(one.start, one.stop)
        if payload is None:
            raise ShardError("sample_cut", where=where)
        if self.check == "crc":
            _check_crc(payload, one.crc32, where)
        return payload


def _check_size(where: str, want: int) -> None:
    got = storage.size(where)
    if got == want:
        return
    code = "shard_missing.stored" if got is None else "shard_size.file"
    raise ShardError(code, where=where, got_bytes=got, want_bytes=want)


def _check_crc(members: memoryview, want: int, where: str) -> None:
    got = crc32(members)
    if got != want:
        raise ShardError("sample_crc.stored", where=where, got=got, want=want)
