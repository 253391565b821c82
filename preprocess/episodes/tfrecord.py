"""TFRecord files and the `tf.train.Example` in them, read without TensorFlow.

A record is its length (uint64, little-endian), a checksum of that, the bytes, and a checksum of
them: CRC-32C, rotated and added to. Without a true length nothing after it can be found, so damage
there costs the rest of the file; damage in the bytes costs the record.

An Example is a map from names to lists of bytes, float32 or int64. The parser knows the three
messages that it is made of, and follows the wire format of protocol buffers: fields that it does
not know are passed over, lists may be packed or not.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shardspec.errors import SampleError, SourceError

FeatureValues = list[bytes] | np.ndarray
"""Bytes, float32 [n] or int64 [n]."""

_MASK = 0xA282EAD8
_HEAD_BYTES, _CRC_BYTES = 12, 4

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Wire types of protocol buffers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordAt:
    """A record of a file."""

    offset: int
    payload: bytes | SampleError
    """Its bytes, or why there are none."""


def read_records(path: Path) -> Iterator[RecordAt]:
    """Reads the records of a file in order; one that is damaged is an error in its place.

    After a damaged length, a cut, or an error of reading, there are no more.

    Raises:
      SourceError: `source_missing`: google-crc32c is missing.
    """
    try:
        with path.open("rb") as file:
            size, offset = path.stat().st_size, 0
            while offset < size:
                found = _record(file, offset, size=size, where=f"{path} at byte {offset}")
                yield RecordAt(offset=offset, payload=found[0])
                offset = found[1]
    except OSError as error:
        refused = SampleError("robot_episode.damaged", where=str(path), error=error)
        yield RecordAt(offset=0, payload=refused)


def read_record(path: Path, offset: int) -> bytes:
    """Reads one record.

    Raises:
      SampleError: `robot_episode`: it is damaged.
    """
    where = f"{path} at byte {offset}"
    try:
        with path.open("rb") as file:
            payload, _ = _record(file, offset, size=path.stat().st_size, where=where)
    except OSError as error:
        raise SampleError("robot_episode.damaged", where=where, error=error) from error
    if isinstance(payload, SampleError):
        raise payload
    return payload


def _record(file: Any, offset: int, *, size: int, where: str) -> tuple[bytes | SampleError, int]:
    """Reads a record, and says where the next one begins: the end of the file if nobody knows."""

    def refused(problem: str) -> SampleError:
        return SampleError("robot_episode.damaged", where=where, error=problem)

    file.seek(offset)
    head = file.read(_HEAD_BYTES)
    if len(head) < _HEAD_BYTES:
        return refused("the file ends within a record"), size
    num_bytes, told = struct.unpack("<QI", head)
    if masked_crc(head[:8]) != told:
        return refused("the checksum of a length differs"), size
    end = offset + _HEAD_BYTES + num_bytes + _CRC_BYTES
    if end > size:
        return refused("the file ends within a record"), size
    payload = file.read(num_bytes)
    tail = file.read(_CRC_BYTES)
    if len(tail) < _CRC_BYTES:  # it was cut meanwhile
        return refused("the file ends within a record"), size
    if masked_crc(payload) != struct.unpack("<I", tail)[0]:
        return refused("the checksum of a record differs"), end
    return payload, end


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
