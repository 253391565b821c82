"""Copying: one file made of byte ranges of others, by the cheapest means that their stores have.

* `concat_verified`: the bytes pass through this process, and every sample's checksum is compared.
* `concat_local`: local files to a local file, by the file system itself where that is faster.
* `multipart_copy`: within one S3 store, ranges of 5 MiB and more are copied by the store itself
  (UploadPartCopy); shorter ones pass through the client, as parts must have 5 MiB. Within one GCS
  store a whole object is copied by the store; it cannot copy ranges, and composing whole tars would
  leave their ends in the middle.

An `ObjectVersion` names the version of a file that is to be copied; a file that changes meanwhile
is refused.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from shardspec.checksum import crc32
from shardspec.errors import ShardError
from shardspec.storage import files
from shardspec.storage.retries import with_retries
from shardspec.storage.upload import (
    MAX_PARTS,
    OnPart,
    abort_upload,
    check_size,
    kind_of,
    open_uploads,
    put_in_parts_s3,
    send_part_s3,
    version_of_entry,
)
from shardspec.tar import END_OF_ARCHIVE

MIN_PART_BYTES = 5 * 2**20
"""Shortest part of a multipart upload but the last (S3's limit)."""
MAX_PART_BYTES = 5 * 2**30
"""Longest part (S3's limit)."""

_LOCAL_CHUNK_BYTES = 512 * 2**10  # read and written while it is in the core's cache
_REMOTE_CHUNK_BYTES = 8 * 2**20
_KERNEL_CHUNK_BYTES = 16 * 2**20
_FLUSH_BYTES = 16 * 2**20
_OPEN_FILES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectVersion:
    """Identifies the content of a file at one moment."""

    num_bytes: int
    version: str
    """ETag or generation of an object; modification time and inode of a local file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRange:
    """A range of bytes of a file."""

    url: str
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Length of the range."""
        return self.stop - self.start

    def cut(self, start: int, stop: int) -> ByteRange:
        """Returns a part of it, by positions from its own start."""
        return ByteRange(url=self.url, start=self.start + start, stop=self.start + stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyPart:
    """A part of an upload that the store copies."""

    source: ByteRange

    @property
    def num_bytes(self) -> int:
        """Length of the part."""
        return self.source.num_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SentPart:
    """A part of an upload that the client fetches and sends."""

    sources: tuple[ByteRange, ...]
    end: bytes = b""
    """What follows them."""

    @property
    def num_bytes(self) -> int:
        """Length of the part."""
        return sum(source.num_bytes for source in self.sources) + len(self.end)


def object_version(url: str) -> ObjectVersion | None:
    """Returns the version of a file; None where there is none."""
    with files.translate_errors(url):
        if files.is_local(url):
            try:
                found = os.stat(files.local_path(url))
            except FileNotFoundError:
                return None
            return ObjectVersion(
                num_bytes=found.st_size, version=f"{found.st_mtime_ns}-{found.st_ino}"
            )
        fs, path = files.filesystem(url)
        fs.invalidate_cache(fs._parent(path))
        try:
            entry = with_retries(lambda: fs.info(path), where=url)
        except FileNotFoundError:
            return None
        return ObjectVersion(num_bytes=int(entry["size"] or 0), version=version_of_entry(fs, entry))


def check_unchanged(url: str, want: ObjectVersion) -> None:
    """Refuses a file that is not the expected version.

    Raises:
      ShardError: `source_changed`.
    """
    got = object_version(url)
    if got != want:
        raise _changed(url, got=got, want=want)


def _changed(url: str, **facts: object) -> ShardError:
    return ShardError("source_changed.copy", where=url, facts=facts)


def concat_verified(
    path: Path, ranges: Sequence[ByteRange], rows: np.ndarray, *, hashed: bool
) -> str:
    """Writes byte ranges to a local file, with the end of a tar, and verifies every sample.

    Memory holds one chunk, however long the samples are.

    Args:
      path: File to make.
      ranges: Of any files; together they are the samples.
      rows: The samples in order, with columns `num_bytes`, `crc32` and `key`.
      hashed: Whether to compute the file's sha256 too, which takes longer than all the rest.

    Returns:
      The sha256, or "".

    Raises:
      ShardError: `sample_crc`, `tar_truncated`, `source_changed`: a source is not what its index
        says.
      StorageError: A file cannot be read or written.
    """
    digest = hashlib.sha256() if hashed else None
    samples = _Samples(rows)
    with files.translate_errors(str(path)), path.open("wb", buffering=0) as out, _Sources() as read:
        target = _Target(out.fileno())
        for span in ranges:
            position = span.start
            while position < span.stop:
                payload = read(span.url, position, span.stop - position)
                samples.check(payload, url=span.url)
                target.write(payload)
                if digest is not None:
                    digest.update(payload)
                position += len(payload)
        target.write(memoryview(END_OF_ARCHIVE))
    if digest is None:
        return ""
    digest.update(END_OF_ARCHIVE)
    return digest.hexdigest()


def concat_local(path: Path, ranges: Sequence[ByteRange]) -> None:
    """Writes byte ranges of local files to a local file, with the end of a tar; verifies nothing.

    File systems that are not on a disk of this machine copy by themselves (copy_file_range), which
    network file systems do at the server. On a disk the kernel would copy a few pages at a time,
    with less read-ahead: reading and writing long chunks is as cheap there, and faster.

    Raises:
      ShardError: `tar_truncated`, `source_changed`.
      StorageError: A file cannot be read or written.
    """
    with files.translate_errors(str(path)), path.open("wb", buffering=0) as out, _Sources() as read:
        target = _Target(out.fileno())
        apart = hasattr(os, "copy_file_range") and not _is_on_disk(out.fileno())
        for span in ranges:
            position = span.start
            while position < span.stop:
                count, left = 0, span.stop - position
                if apart:
                    try:
                        count = target.copy(read.descriptor(span.url), position, left)
                    except OSError as error:
                        if error.errno not in _NO_COPY_FILE_RANGE:
                            raise
                        apart = False
                if not count:  # not supported, or the source ends early, which `read` reports
                    payload = read(span.url, position, left)
                    target.write(payload)
                    count = len(payload)
                position += count
        target.write(memoryview(END_OF_ARCHIVE))


_NO_COPY_FILE_RANGE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
"""Between file systems, on one without the call, or in a sandbox that does not allow it."""


def _is_on_disk(descriptor: int) -> bool:
    """Returns True if a file is on a block device: other file systems have major number 0."""
    return os.major(os.fstat(descriptor).st_dev) != 0


class _Samples:
    """Compares samples with their checksums as their bytes pass, in chunks of any length."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows = rows
        self._sizes, self._sums = rows["num_bytes"].tolist(), rows["crc32"].tolist()
        self._sample = 0
        self._crc = 0
        self._done = 0
        """Bytes of the current sample so far."""

    def check(self, payload: memoryview, *, url: str) -> None:
        at = 0
        while at < len(payload):
            part = payload[at : at + self._sizes[self._sample] - self._done]
            self._crc = crc32(part, self._crc)
            self._done += len(part)
            at += len(part)
            if self._done == self._sizes[self._sample]:
                if self._crc != self._sums[self._sample]:
                    raise _wrong_sample(url, self._rows[self._sample])
                self._sample, self._crc, self._done = self._sample + 1, 0, 0


class _Target:
    """A file that is written from its start on, and flushed to the disk meanwhile."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._written = 0
        self._flushed = 0

    def write(self, payload: memoryview) -> None:
        left = payload
        while left:
            left = left[os.write(self._descriptor, left) :]
        self._moved(len(payload))

    def copy(self, source: int, position: int, length: int) -> int:
        most = min(length, _KERNEL_CHUNK_BYTES)
        count = os.copy_file_range(source, self._descriptor, most, position)
        self._moved(count)
        return count

    def _moved(self, count: int) -> None:
        """Starts the write-back of what was written, so that the fsync at the end is shorter."""
        self._written += count
        length = self._written - self._flushed
        if length >= _FLUSH_BYTES and hasattr(os, "posix_fadvise"):
            # Linux starts to write dirty pages when told that they are not needed.
            os.posix_fadvise(self._descriptor, self._flushed, length, os.POSIX_FADV_DONTNEED)
            self._flushed = self._written


class _Sources:
    """Reads ranges of files, keeping some of them open."""

    def __init__(self) -> None:
        self._open: dict[str, int] = {}
        self._buffer = memoryview(bytearray(_LOCAL_CHUNK_BYTES))

    def __enter__(self) -> _Sources:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def descriptor(self, url: str) -> int:
        if url not in self._open:
            if len(self._open) >= _OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
            with _naming_source(url):
                self._open[url] = os.open(files.local_path(url), os.O_RDONLY)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._open[url], 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return self._open[url]

    def __call__(self, url: str, start: int, length: int) -> memoryview:
        """Reads the beginning of a range, at most a chunk; it is valid until the next call."""
        with _naming_source(url):
            if files.is_local(url):
                want = min(length, len(self._buffer))
                payload = self._buffer[
                    : os.preadv(self.descriptor(url), [self._buffer[:want]], start)
                ]
                whole = len(payload) > 0
            else:
                want = min(length, _REMOTE_CHUNK_BYTES)
                payload = memoryview(_fetch(url, start, start + want))
                whole = len(payload) == want
        if not whole:
            raise ShardError(
                "tar_truncated.source",
                where=url,
                got_bytes=start + len(payload),
                want_bytes=start + length,
            )
        return payload


def _fetch(url: str, start: int, stop: int) -> bytes:
    fs, path = files.filesystem(url)
    return with_retries(lambda: bytes(fs.cat_file(path, start=start, end=stop)), where=url)


@contextmanager
def _naming_source(url: str) -> Iterator[None]:
    try:
        with files.translate_errors(url):
            yield
    except FileNotFoundError as error:
        raise _changed(url, got=None) from error


def _wrong_sample(url: str, row: np.void) -> ShardError:
    return ShardError(
        "sample_crc.source",
        where=f"{url} sample {row['key'].decode()}",
        want_crc32=int(row["crc32"]),
    )


def plan_parts(ranges: Sequence[ByteRange], *, end: bytes) -> list[CopyPart | SentPart]:
    """Plans the parts of an upload so that the store copies as much as possible.

    Args:
      ranges: What the object consists of.
      end: Bytes after them.

    Returns:
      Parts within the limits above; at most `MIN_PART_BYTES` of each are sent.
    """
    total = sum(span.num_bytes for span in ranges)
    smallest = max(MIN_PART_BYTES, -(-total // (MAX_PARTS - 1)))
    parts: list[CopyPart | SentPart] = []
    held: list[ByteRange] = []
    missing = smallest
    for span in ranges:
        position = 0
        if held:
            position = min(span.num_bytes, missing)
            held.append(span.cut(0, position))
            missing -= position
            if missing:
                continue
            parts.append(SentPart(sources=tuple(held)))
            held, missing = [], smallest
        while (left := span.num_bytes - position) >= smallest:
            count = left
            if left > MAX_PART_BYTES:
                count = min(MAX_PART_BYTES, left - smallest)
            parts.append(CopyPart(source=span.cut(position, position + count)))
            position += count
        if left:
            held, missing = [span.cut(position, position + left)], smallest - left
    if len(held) == 1 and not end:
        parts.append(CopyPart(source=held[0]))  # the last may be short
    elif held or end:
        parts.append(SentPart(sources=tuple(held), end=end))
    return parts


def can_multipart_copy(
    url: str, ranges: Sequence[ByteRange], versions: Mapping[str, ObjectVersion]
) -> bool:
    """Returns True if the target's store can copy the ranges, or most of their bytes, itself."""
    if files.is_local(url) or any(files.is_local(span.url) for span in ranges):
        return False
    fs, _ = files.filesystem(url)
    if any(files.filesystem(u)[0] is not fs for u in {span.url for span in ranges}):
        return False
    if kind_of(fs) == "s3":
        parts = plan_parts(ranges, end=END_OF_ARCHIVE)
        copied = sum(part.source.num_bytes for part in parts if isinstance(part, CopyPart))
        return 2 * copied > sum(span.num_bytes for span in ranges)
    return kind_of(fs) == "gs" and whole_file(ranges, versions) is not None


def whole_file(ranges: Sequence[ByteRange], versions: Mapping[str, ObjectVersion]) -> str | None:
    """Returns the file that is exactly the ranges and the end of a tar; None where none is."""
    if len(ranges) != 1 or ranges[0].start or not _has_own_end(ranges[0], versions):
        return None
    return ranges[0].url


def _has_own_end(span: ByteRange, versions: Mapping[str, ObjectVersion]) -> bool:
    """Returns True if a range is followed by the end of a tar and then the end of its file."""
    stop = span.stop + len(END_OF_ARCHIVE)
    if stop != versions[span.url].num_bytes:
        return False
    # Foreign tars may end in files that belong to no sample, and without an end.
    return _read_whole(ByteRange(url=span.url, start=span.stop, stop=stop)) == END_OF_ARCHIVE


def multipart_copy(
    url: str,
    ranges: Sequence[ByteRange],
    versions: Mapping[str, ObjectVersion],
    *,
    on_part: OnPart | None = None,
) -> None:
    """Makes an object from ranges of others, in their store; it appears whole or not at all.

    Args:
      url: The object; the end of a tar is added.
      ranges: For which `can_multipart_copy` is true.
      versions: Version of each file.
      on_part: Called with the bytes that have arrived; an exception of it aborts the upload, and
        nothing is left of it.

    Raises:
      ShardError: `source_changed`.
      StorageError: The store refused or failed.
    """
    fs, path = files.filesystem(url)
    with files.translate_errors(url):
        if kind_of(fs) == "s3":
            _copy_in_s3(fs, path, ranges, versions, where=url, on_part=on_part or (lambda _: None))
            return
        whole = whole_file(ranges, versions)
        assert whole is not None
        check_unchanged(whole, versions[whole])
        with_retries(lambda: fs.cp_file(files.filesystem(whole)[1], path), where=url)
        check_unchanged(whole, versions[whole])
        check_size(fs, path, versions[whole].num_bytes, where=url)


def _copy_in_s3(
    fs: Any,
    path: str,
    ranges: Sequence[ByteRange],
    versions: Mapping[str, ObjectVersion],
    *,
    where: str,
    on_part: OnPart,
) -> None:
    end = END_OF_ARCHIVE
    num_bytes = sum(span.num_bytes for span in ranges) + len(end)
    last = ranges[-1]
    # S3 copies no ranges of objects that are shorter than a part.
    if versions[last.url].num_bytes > MIN_PART_BYTES and _has_own_end(last, versions):
        # The source's own end follows the last sample, so none has to be sent.
        ranges, end = [*ranges[:-1], last.cut(0, last.num_bytes + len(end))], b""
    parts = plan_parts(ranges, end=end)

    def send(number: int, upload: Mapping[str, Any]) -> str:
        part = parts[number - 1]
        if isinstance(part, CopyPart):
            return _copy_part(fs, part.source, versions, upload)
        payload = b"".join([*map(_read_whole, part.sources), part.end])
        return send_part_s3(fs, payload, upload, where)

    left = with_retries(lambda: open_uploads(fs, path), where=where)
    for _, upload_id, _ in left:  # of a killed process
        abort_upload(fs, path, upload_id, where=where)
    put_in_parts_s3(
        fs,
        path,
        [part.num_bytes for part in parts],
        send,
        num_bytes=num_bytes,
        where=where,
        on_part=on_part,
        # Once more: some stores ignore the condition of a copy.
        before_end=lambda: _require_all(ranges, versions),
    )


def _copy_part(
    fs: Any, span: ByteRange, versions: Mapping[str, ObjectVersion], upload: Mapping[str, Any]
) -> str:
    bucket, key, _ = fs.split_path(files.filesystem(span.url)[1])
    try:
        done = with_retries(
            lambda: fs.call_s3(
                "upload_part_copy",
                CopySource={"Bucket": bucket, "Key": key},
                CopySourceRange=f"bytes={span.start}-{span.stop - 1}",
                CopySourceIfMatch=versions[span.url].version,
                **upload,
            ),
            where=span.url,
        )
    except OSError:
        check_unchanged(span.url, versions[span.url])  # the better error, if that was the cause
        raise
    return str(done["CopyPartResult"]["ETag"])


def _read_whole(span: ByteRange) -> bytes:
    found = bytearray()
    with _Sources() as read:
        while len(found) < span.num_bytes:
            found += read(span.url, span.start + len(found), span.num_bytes - len(found))
    return bytes(found)


def _require_all(ranges: Sequence[ByteRange], versions: Mapping[str, ObjectVersion]) -> None:
    for url in sorted({span.url for span in ranges}):
        check_unchanged(url, versions[url])
