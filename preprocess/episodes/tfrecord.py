"""TFRecord files and the `tf.train.Example` in them, read without TensorFlow.

A record is its length (uint64, little-endian), a checksum of that, the bytes, and a checksum of
them: CRC-32C, rotated and added to. Without a true length nothing after it can be found, so damage
there costs the rest of the file; damage in the bytes costs the record. TensorFlow may compress a
file as a whole.

An Example is a map from names to lists of bytes, float32 or int64. The parser knows the three
messages that it is made of, and follows the wire format of protocol buffers: fields that it does
not know are passed over, lists may be packed or not.
"""

from __future__ import annotations

import io
import os
import struct
import weakref
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shardspec.errors import SampleError, SourceError

FeatureValues = list[bytes] | np.ndarray
"""Bytes, float32 [n] or int64 [n]."""

_MASK = 0xA282EAD8
_HEAD_BYTES, _CRC_BYTES = 12, 4
_CUT = "the file ends within a record"

MAX_RECORD_BYTES = 2**31 - 1
"""Longest message that protocol buffers allow."""

_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
_INFLATED_BYTES = 2**18
"""Most bytes that are read or inflated at once."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Wire types of protocol buffers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordAt:
    """A record of a file."""

    offset: int
    payload: bytes | SampleError
    """Its bytes, or why there are none."""


class RecordFile:
    """A file of records, as it is or compressed as a whole by gzip or zlib.

    Offsets count what is compressed. There, reading forward is cheap and reading back begins anew,
    so records are best read in order. A fork may go on with it: no position is the system's.
    """

    def __init__(self, path: Path) -> None:
        """Opens a file, and tells from its first bytes whether it is compressed.

        Raises:
          OSError: It cannot be opened.
          SourceError: `source_missing`: google-crc32c is missing.
        """
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        self._size = os.fstat(self._descriptor).st_size
        head = os.pread(self._descriptor, _HEAD_BYTES, 0)
        # A length may begin as a stream of zlib does, but its checksum would not be right then.
        plain = len(head) == _HEAD_BYTES and _told_length(head) is not None
        zlib_head = head[:1] == b"\x78" and int.from_bytes(head[:2], "big") % 31 == 0
        self._compressed = not plain and (head[:2] == b"\x1f\x8b" or zlib_head)
        self._begin()

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Reads bytes; fewer where the file ends before.

        Raises:
          OSError: It cannot be read.
          zlib.error: The compressed stream is damaged.
        """
        if not self._compressed:
            num_bytes = max(0, min(num_bytes, self._size - offset))
            parts = []
            while num_bytes and (part := os.pread(self._descriptor, num_bytes, offset)):
                parts.append(part)
                offset, num_bytes = offset + len(part), num_bytes - len(part)
            return b"".join(parts)
        if offset < self._at:
            self._begin()
        while self._at < offset and self._inflated(min(offset - self._at, _INFLATED_BYTES)):
            pass
        found = io.BytesIO()
        while found.tell() < num_bytes and self._at >= offset:
            part = self._inflated(min(num_bytes - found.tell(), _INFLATED_BYTES))
            if not part:
                break
            found.write(part)
        return found.getvalue()

    def _begin(self) -> None:
        self._at, self._from = 0, 0
        self._stream = zlib.decompressobj(_GZIP_OR_ZLIB)

    def _inflated(self, most: int) -> bytes:
        """Gives the next bytes, at most `most`; none at the end."""
        while True:
            waiting = self._stream.unconsumed_tail
            if self._stream.eof:  # another member of gzip may follow
                waiting = self._stream.unused_data
                self._stream = zlib.decompressobj(_GZIP_OR_ZLIB)
            if not waiting:
                waiting = os.pread(self._descriptor, _INFLATED_BYTES, self._from)
                self._from += len(waiting)
                if not waiting:
                    return b""
            part = self._stream.decompress(waiting, most)
            if part:
                self._at += len(part)
                return part


def read_records(path: Path) -> Iterator[RecordAt]:
    """Reads the records of a file in order; one that is damaged is an error in its place.

    After a damaged length, a cut, or an error of reading, there are no more.

    Raises:
      SourceError: `source_missing`: google-crc32c is missing.
    """
    try:
        file, offset = RecordFile(path), 0
    except OSError as error:
        refused = SampleError("robot_episode.damaged", where=str(path), error=error)
        yield RecordAt(offset=0, payload=refused)
        return
    while True:
        found = _record(file, offset, where=f"{path} at byte {offset}")
        if found is None:
            return
        yield RecordAt(offset=offset, payload=found[0])
        if found[1] is None:
            return
        offset = found[1]


def read_record(file: RecordFile, offset: int, *, where: str) -> bytes:
    """Reads one record.

    Raises:
      SampleError: `robot_episode`: it is damaged.
    """
    found = _record(file, offset, where=f"{where} at byte {offset}")
    payload = found[0] if found is not None else _refused(where, _CUT)
    if isinstance(payload, SampleError):
        raise payload
    return payload


def _record(
    file: RecordFile, offset: int, *, where: str
) -> tuple[bytes | SampleError, int | None] | None:
    """Reads a record, and says where the next one begins, None if nobody knows; None at the end."""
    try:
        head = file.read(offset, _HEAD_BYTES)
        if not head:
            return None
        if len(head) < _HEAD_BYTES:
            return _refused(where, _CUT), None
        num_bytes = _told_length(head)
        if num_bytes is None:
            return _refused(where, "the checksum of a length differs"), None
        if num_bytes > MAX_RECORD_BYTES:
            problem = f"a record of {num_bytes} bytes; at most {MAX_RECORD_BYTES} can be read"
            return _refused(where, problem), None
        found = file.read(offset + _HEAD_BYTES, num_bytes + _CRC_BYTES)
    except (OSError, zlib.error) as error:
        return _refused(where, str(error)), None
    if len(found) < num_bytes + _CRC_BYTES:
        return _refused(where, _CUT), None
    payload, tail = found[:num_bytes], found[num_bytes:]
    end = offset + _HEAD_BYTES + num_bytes + _CRC_BYTES
    if masked_crc(payload) != struct.unpack("<I", tail)[0]:
        return _refused(where, "the checksum of a record differs"), end
    return payload, end


def _told_length(head: bytes) -> int | None:
    """Gives the length that the first bytes of a record state; None where they are damaged."""
    num_bytes, told = struct.unpack("<QI", head)
    return int(num_bytes) if masked_crc(head[:8]) == told else None


def _refused(where: str, problem: str) -> SampleError:
    return SampleError("robot_episode.damaged", where=where, error=problem)


def masked_crc(payload: bytes) -> int:
    """Computes the checksum of a TFRecord.

    >>> hex(masked_crc(b"123456789"))
    '0xc78ab0e5'
    """
    try:
        import google_crc32c
    except ImportError as error:
        raise SourceError("source_missing.robots_package", error=error) from error
    crc = int(google_crc32c.value(payload))
    return ((crc >> 15 | crc << 17) + _MASK) & 0xFFFFFFFF


def parse_example(payload: bytes, *, where: str = "") -> dict[str, FeatureValues]:
    """Parses an Example.

    Raises:
      SampleError: `robot_episode`: it is none.
    """
    found: dict[str, FeatureValues] = {}
    try:
        for features in _messages(memoryview(payload), 1):
            for entry in _messages(features, 1):
                name = b"".join(map(bytes, _messages(entry, 1)))
                for feature in _messages(entry, 2):
                    found[name.decode()] = _feature(feature)
    except (ValueError, IndexError, struct.error) as error:
        raise SampleError("robot_episode.damaged", where=where, error=error) from error
    return found


def _feature(feature: memoryview) -> FeatureValues:
    """Reads the list of a feature: bytes, floats or integers; the last one that is there counts."""
    values: FeatureValues = []
    for number, kind, body in _fields(feature):
        if kind != _BYTES or number not in (1, 2, 3):
            continue
        if number == 1:
            values = [bytes(each) for each in _messages(body, 1)]
        elif number == 2:
            parts = [part for n, k, part in _fields(body) if n == 1 and k in (_BYTES, _FIXED32)]
            values = np.frombuffer(b"".join(parts), "<f4")
        else:
            parts = [part for n, k, part in _fields(body) if n == 1 and k in (_BYTES, _VARINT)]
            values = _varints(np.frombuffer(b"".join(parts), np.uint8))
    return values


def _messages(message: memoryview, number: int) -> Iterator[memoryview]:
    """Gives the fields of a number that have a length: texts, and messages."""
    return (body for n, kind, body in _fields(message) if n == number and kind == _BYTES)


def _fields(message: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """Splits a message into its fields: number, wire type, and the bytes of the value.

    Raises:
      ValueError: It is not a message.
    """
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        start = at
        if kind == _VARINT:
            _, at = _varint(message, at)
        elif kind == _BYTES:
            num_bytes, start = _varint(message, at)
            at = start + num_bytes
        elif kind in (_FIXED32, _FIXED64):
            at += 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind} of protocol buffers")
        if at > len(message):
            raise ValueError("a field that is longer than its message")
        yield number, kind, message[start:at]


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Reads a number of variable length; gives it, and where what follows begins."""
    value = 0
    for i in range(10):
        if at + i >= len(message):
            break
        byte = message[at + i]
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, at + i + 1
    raise ValueError("a number without an end")


def _varints(encoded: np.ndarray) -> np.ndarray:
    """Reads numbers of variable length, end to end: int64 [n].

    >>> _varints(np.array([1, 0x96, 0x01, *[0xFF] * 9, 0x01], np.uint8)).tolist()
    [1, 150, -1]
    """
    ends = np.flatnonzero(encoded < 0x80) + 1
    if (ends[-1] if len(ends) else 0) != len(encoded):
        raise ValueError("a number without an end")
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)[: len(ends)]
    lengths = ends - starts
    if len(lengths) and lengths.max() > 10:
        raise ValueError("a number without an end")
    values = np.zeros(len(ends), np.uint64)
    for i in range(int(lengths.max(initial=0))):
        longer = lengths > i
        bits = (encoded[starts[longer] + i] & 0x7F).astype(np.uint64)
        values[longer] |= bits << np.uint64(7 * i)
    return values.view(np.int64)
