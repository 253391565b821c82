"""Joining: one file made of byte ranges of others, by the cheapest means that their stores have.

* `join_here`: the bytes pass through this process, and every sample's checksum is compared.
* `join_in_kernel`: local files to a local file without reading them (copy_file_range).
* `join_in_store`: within one S3 store, ranges of 5 MiB and more are copied by the store itself
  (UploadPartCopy); what is shorter goes through the client, as parts must have 5 MiB. Within one
  GCS store a whole object is copied by the store; it has no copies of ranges, and composing whole
  tars would leave their ends in the middle.

A `Stamp` says which version of a file was meant; a file that changes while it is copied is refused.
"""

from __future__ import annotations

import errno
import hashlib
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from shardspec import storage
from shardspec.errors import ShardError, StorageError
from shardspec.tar import END_OF_ARCHIVE

MIN_PART_BYTES = 5 * 2**20
"""Shortest part of a multipart upload but the last (S3's limit)."""
MAX_PART_BYTES = 5 * 2**30
"""Longest part (S3's limit)."""
MAX_PARTS = 10_000
"""Most parts of an upload (S3's limit)."""

_LOCAL_CHUNK_BYTES = 512 * 2**10  # read, checked and written while it is in the core's cache
_REMOTE_CHUNK_BYTES = 8 * 2**20
_KERNEL_CHUNK_BYTES = 16 * 2**20
_FLUSH_BYTES = 16 * 2**20
_OPEN_FILES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """Which version of a file this is."""

    num_bytes: int
    version: str
    """ETag or generation of an object; the times and the number of a local file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A range of bytes of a file."""

    url: str
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Length of the range."""
        return self.stop - self.start

    def cut(self, start: int, stop: int) -> Piece:
        """Takes a part of it, counted from its own start."""
        return Piece(url=self.url, start=self.start + start, stop=self.start + stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyPart:
    """A part of an upload that the store copies."""

    piece: Piece


@dataclass(frozen=True, slots=True, kw_only=True)
class SentPart:
    """A part of an upload that the client fetches and sends."""

    pieces: tuple[Piece, ...]
    end: bytes = b""
    """What follows the pieces."""


def stamp(url: str) -> Stamp | None:
    """Tells the version of a file; None where there is none."""
    with storage.naming_errors(url):
        if storage.is_local(url):
            try:
                found = os.stat(storage.local_path(url))
            except FileNotFoundError:
                return None
            return Stamp(num_bytes=found.st_size, version=f"{found.st_mtime_ns}-{found.st_ino}")
        fs, path = storage.filesystem(url)
        fs.invalidate_cache(fs._parent(path))
        try:
            entry = fs.info(path)
        except FileNotFoundError:
            return None
        version = entry.get("ETag") or entry.get("etag") or entry.get("generation") or ""
        return Stamp(num_bytes=int(entry["size"]), version=str(version))


def require_stamp(url: str, want: Stamp) -> None:
    """Refuses a file that is not the version that was meant.

    Raises:
      ShardError: `source_changed`.
    """
    got = stamp(url)
    if got != want:
        raise ShardError(
            "a source has changed while it was copied",
            reason="source_changed",
            where=url,
            facts={"got": got, "want": want},
            fix="verify the source, then run the same command again",
        )


def join_here(path: Path, pieces: Sequence[Piece], rows: np.ndarray, *, hashed: bool) -> str:
    """Writes pieces to a local file, with the end of a tar, and checks every sample on its way.

    Args:
      path: File to make.
      pieces: Of any files; each holds whole samples.
      rows: The samples in order, with columns `num_bytes`, `crc32` and `key`.
      hashed: Whether to compute the file's sha256 too, which takes more time than all the rest.

    Returns:
      The sha256, or "".

    Raises:
      ShardError: `sample_crc`, `tar_truncated`: a source is not what its index says.
      StorageError: A file cannot be read or written.
    """
    digest = hashlib.sha256() if hashed else None
    ends = np.cumsum(rows["num_bytes"].astype(np.int64))
    sizes, sums = rows["num_bytes"].tolist(), rows["crc32"].tolist()
    done, sample, flushed = 0, 0, 0
    with storage.naming_errors(str(path)), path.open("wb", buffering=0) as out, _Sources() as read:
        for piece in pieces:
            chunk = _LOCAL_CHUNK_BYTES if storage.is_local(piece.url) else _REMOTE_CHUNK_BYTES
            position = piece.start
            while position < piece.stop:
                last = int(np.searchsorted(ends, done + chunk, side="right"))
                # At least one sample, however long; never beyond the piece.
                last = max(sample + 1, last)
                last = min(last, int(np.searchsorted(ends, done + piece.stop - position)) + 1)
                length = int(ends[last - 1]) - done
                payload = read(piece.url, position, length)
                at = 0
                for i in range(sample, last):
                    if zlib.crc32(payload[at : at + sizes[i]]) != sums[i]:
                        raise _wrong_sample(piece.url, rows[i])
                    at += sizes[i]
                _write_all(out.fileno(), payload)
                flushed = _begin_flush(out.fileno(), flushed, done + length)
                if digest is not None:
                    digest.update(payload)
                position, done, sample = position + length, done + length, last
        _write_all(out.fileno(), memoryview(END_OF_ARCHIVE))
    if digest is None:
        return ""
    digest.update(END_OF_ARCHIVE)
    return digest.hexdigest()


class _Sources:
    """Reads ranges of files, keeping some of them open."""

    def __init__(self) -> None:
        self._open: dict[str, int] = {}
        self._buffer = bytearray(_LOCAL_CHUNK_BYTES)

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
            self._open[url] = os.open(storage.local_path(url), os.O_RDONLY)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._open[url], 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return self._open[url]

    def __call__(self, url: str, start: int, length: int) -> memoryview:
        """Reads a range; a local one is valid until the next call."""
        with storage.naming_errors(url):
            if storage.is_local(url):
                if length > len(self._buffer):
                    self._buffer = bytearray(length)
                view = memoryview(self._buffer)[:length]
                got = 0
                while got < length:
                    count = os.preadv(self.descriptor(url), [view[got:]], start + got)
                    if not count:
                        break
                    got += count
            else:
                fs, path = storage.filesystem(url)
                view = memoryview(fs.cat_file(path, start=start, end=start + length))
                got = len(view)
        if got != length:
            raise ShardError(
                "a source ends early",
                reason="tar_truncated",
                where=url,
                facts={"got_bytes": start + got, "want_bytes": start + length},
                fix="verify the source, then run the same command again",
            )
        return view


def _begin_flush(descriptor: int, start: int, stop: int) -> int:
    """Lets the disk begin with what was written, so that the fsync at the end waits less.

    Args:
      descriptor: Of the file.
      start: What has been given to the disk before.
      stop: What has been written.

    Returns:
      What has been given to the disk now.
    """
    if stop - start < _FLUSH_BYTES or not hasattr(os, "posix_fadvise"):
        return start
    # Linux starts to write dirty pages out when it is told that nobody needs them.
    os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_DONTNEED)
    return stop


def _write_all(descriptor: int, payload: memoryview) -> None:
    while payload:
        payload = payload[os.write(descriptor, payload) :]


def _wrong_sample(url: str, row: np.void) -> ShardError:
    return ShardError(
        "a sample of a source is not the one that was written",
        reason="sample_crc",
        where=f"{url} sample {row['key'].decode()}",
        facts={"want_crc32": int(row["crc32"])},
        fix="verify the source; copy or build its shard again",
    )


def join_in_kernel(path: Path, pieces: Sequence[Piece]) -> None:
    """Writes pieces of local files to a local file, with the end of a tar, without reading them.

    Network file systems may copy on the server, others may share the blocks.

    Raises:
      ShardError: `tar_truncated`.
      StorageError: A file cannot be read or written.
    """
    with storage.naming_errors(str(path)), path.open("wb", buffering=0) as out, _Sources() as read:
        copy, done, flushed = _copy_file_range, 0, 0
        for piece in pieces:
            source, position = read.descriptor(piece.url), piece.start
            while position < piece.stop:
                most = min(piece.stop - position, _KERNEL_CHUNK_BYTES)
                try:
                    count = copy(source, out.fileno(), most, position)
                except OSError as error:
                    if copy is _sendfile or error.errno not in _NO_COPY_FILE_RANGE:
                        raise
                    copy = _sendfile
                    continue
                if not count:
                    read(piece.url, position, 1)  # says that it ends early
                position, done = position + count, done + count
                flushed = _begin_flush(out.fileno(), flushed, done)
        _write_all(out.fileno(), memoryview(END_OF_ARCHIVE))


_NO_COPY_FILE_RANGE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""Between file systems, or on one without it."""


def _copy_file_range(source: int, target: int, count: int, position: int) -> int:
    if not hasattr(os, "copy_file_range"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return os.copy_file_range(source, target, count, position)


def _sendfile(source: int, target: int, count: int, position: int) -> int:
    return os.sendfile(target, source, position, count)


def plan_parts(pieces: Sequence[Piece], *, end: bytes) -> list[CopyPart | SentPart]:
    """Plans the parts of an upload so that the store copies all it can.

    Args:
      pieces: What the object consists of.
      end: Bytes behind them.

    Returns:
      Parts within the limits above; at most `MIN_PART_BYTES` of each are sent.
    """
    total = sum(piece.num_bytes for piece in pieces)
    smallest = max(MIN_PART_BYTES, -(-total // (MAX_PARTS - 1)))
    parts: list[CopyPart | SentPart] = []
    held: list[Piece] = []
    missing = smallest
    for piece in pieces:
        position = 0
        if held:
            position = min(piece.num_bytes, missing)
            held.append(piece.cut(0, position))
            missing -= position
            if missing:
                continue
            parts.append(SentPart(pieces=tuple(held)))
            held, missing = [], smallest
        while (left := piece.num_bytes - position) >= smallest:
            count = left
            if left > MAX_PART_BYTES:
                count = min(MAX_PART_BYTES, left - smallest)
            parts.append(CopyPart(piece=piece.cut(position, position + count)))
            position += count
        if left:
            held, missing = [piece.cut(position, position + left)], smallest - left
    if len(held) == 1 and not end:
        parts.append(CopyPart(piece=held[0]))  # the last may be short
    elif held or end:
        parts.append(SentPart(pieces=tuple(held), end=end))
    return parts


def joins_in_store(url: str, pieces: Sequence[Piece], stamps: dict[str, Stamp]) -> bool:
    """Tells whether the target's store can join the pieces, or most of their bytes, by itself."""
    if storage.is_local(url) or any(storage.is_local(piece.url) for piece in pieces):
        return False
    fs, _ = storage.filesystem(url)
    if any(storage.filesystem(u)[0] is not fs for u in {piece.url for piece in pieces}):
        return False
    if hasattr(fs, "call_s3"):
        parts = plan_parts(pieces, end=END_OF_ARCHIVE)
        return any(isinstance(part, CopyPart) for part in parts)
    return _protocol(fs) == "gs" and whole_file(pieces, stamps) is not None


def whole_file(pieces: Sequence[Piece], stamps: dict[str, Stamp]) -> str | None:
    """Gives the file that the pieces and the end of a tar are all of; None where there is none."""
    if len(pieces) != 1 or pieces[0].start:
        return None
    url = pieces[0].url
    return url if pieces[0].stop + len(END_OF_ARCHIVE) == stamps[url].num_bytes else None


def join_in_store(url: str, pieces: Sequence[Piece], stamps: dict[str, Stamp]) -> None:
    """Lets a store join pieces to an object, with the end of a tar; it appears whole or not at all.

    Args:
      url: The object.
      pieces: For which `joins_in_store` is true.
      stamps: Version of each file.

    Raises:
      ShardError: `source_changed`.
      StorageError: The store refused or failed.
    """
    want = sum(piece.num_bytes for piece in pieces) + len(END_OF_ARCHIVE)
    fs, path = storage.filesystem(url)
    with storage.naming_errors(url):
        if hasattr(fs, "call_s3"):
            _join_in_s3(fs, path, pieces, stamps)
        else:
            whole = whole_file(pieces, stamps)
            assert whole is not None
            require_stamp(whole, stamps[whole])
            fs.cp_file(storage.filesystem(whole)[1], path)
            _require_all(pieces, stamps)
    got = storage.size(url)
    if got != want:
        storage.delete(url)
        raise StorageError(
            "object has another length than its parts together",
            reason="upload_size",
            where=url,
            facts={"got_bytes": got, "want_bytes": want},
            fix="run the same command again",
        )


def _join_in_s3(fs: Any, path: str, pieces: Sequence[Piece], stamps: dict[str, Stamp]) -> None:
    bucket, key, _ = fs.split_path(path)
    target = {"Bucket": bucket, "Key": key}
    end = END_OF_ARCHIVE
    last = pieces[-1] if pieces else None
    if last is not None and last.stop + len(end) == stamps[last.url].num_bytes:
        # The source's own end follows the last sample: nothing needs to be sent for it.
        whole = Piece(url=last.url, start=last.start, stop=last.stop + len(end))
        pieces, end = [*pieces[:-1], whole], b""
    _abort_uploads(fs, bucket, key)
    upload = {**target, "UploadId": fs.call_s3("create_multipart_upload", **target)["UploadId"]}
    try:
        etags = []
        for number, part in enumerate(plan_parts(pieces, end=end), start=1):
            if isinstance(part, CopyPart):
                etags.append(_copy_part(fs, part.piece, stamps, PartNumber=number, **upload))
            else:
                body = b"".join([*map(_fetch, part.pieces), part.end])
                sent = fs.call_s3("upload_part", Body=body, PartNumber=number, **upload)
                etags.append(sent["ETag"])
        # Stores that ignore the condition of a copy are caught here.
        _require_all(pieces, stamps)
        listed = [{"PartNumber": i, "ETag": etag} for i, etag in enumerate(etags, start=1)]
        fs.call_s3("complete_multipart_upload", MultipartUpload={"Parts": listed}, **upload)
    except BaseException:
        fs.call_s3("abort_multipart_upload", **upload)
        raise
    fs.invalidate_cache(path)


def _copy_part(fs: Any, piece: Piece, stamps: dict[str, Stamp], **part: Any) -> str:
    bucket, key, _ = fs.split_path(storage.filesystem(piece.url)[1])
    try:
        done = fs.call_s3(
            "upload_part_copy",
            CopySource={"Bucket": bucket, "Key": key},
            CopySourceRange=f"bytes={piece.start}-{piece.stop - 1}",
            CopySourceIfMatch=stamps[piece.url].version,
            **part,
        )
    except OSError:
        require_stamp(piece.url, stamps[piece.url])  # says it better, if that was the cause
        raise
    return str(done["CopyPartResult"]["ETag"])


def _fetch(piece: Piece) -> bytes:
    with _Sources() as read:
        return bytes(read(piece.url, piece.start, piece.num_bytes))


def _require_all(pieces: Sequence[Piece], stamps: dict[str, Stamp]) -> None:
    for url in sorted({piece.url for piece in pieces}):
        require_stamp(url, stamps[url])


def _abort_uploads(fs: Any, bucket: str, key: str) -> None:
    """Ends the uploads of the same object that a killed process left open."""
    found = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=key)
    for each in found.get("Uploads", []):
        if each["Key"] == key:
            fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=each["UploadId"])


def _protocol(fs: Any) -> str:
    names = fs.protocol if isinstance(fs.protocol, tuple | list) else (fs.protocol,)
    return "gs" if "gs" in names else str(names[0])
