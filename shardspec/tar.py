"""The tar of a shard: minimal POSIX ustar, with the same bytes for the same members.

Headers have no time, no owner and no PAX records (a float mtime costs 1 KiB per member in other
writers), so a rerun is byte-identical, and GNU tar, webdataset, wids, Hugging Face `datasets` and
DALI all read the file. Members of a sample are adjacent; two zero blocks end the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

from shardspec.checksum import crc32
from shardspec.errors import ShardError

BLOCK = 512
"""Unit of the tar format (POSIX.1-1988 ustar): headers and padded payloads are multiples of it."""

END_OF_ARCHIVE = bytes(2 * BLOCK)
MAX_NAME = 100
"""Bytes in the name field of a ustar header; longer names would need its prefix field."""
MAX_MEMBER_BYTES = 8**11 - 1
"""Largest size that the eleven octal digits of a ustar header can express."""

# What all headers share: mode, uid and gid; the time; what is after the checksum: the type of a
# regular file, no link, the magic. The field of the checksum counts as eight spaces.
_OWNER, _MTIME = b"0000644\0" + 2 * b"0000000\0", b"00000000000\0"
_REST = (b"0" + bytes(100) + b"ustar\x0000").ljust(BLOCK - 156, b"\0")
_REST_SUM = sum(_REST) + sum(b" " * 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class TarMember:
    """One member as found in a tar."""

    name: str
    offset: int
    """Byte position of the payload."""
    num_bytes: int
    """Length of the payload, without padding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TarRange:
    """Where a sample's members are in its shard."""

    offset: int
    """Byte position of the first header."""
    num_bytes: int
    """Headers, payloads and padding together."""
    crc32: int
    """CRC-32 (zlib) of those bytes."""
    head_crc32: int = 0
    """The same of its first members, as many as the writer was told."""


def padded(num_bytes: int) -> int:
    """Rounds a length up to whole blocks.

    >>> padded(0), padded(1), padded(512)
    (0, 512, 512)
    """
    return -(-num_bytes // BLOCK) * BLOCK


def payload_offsets(sizes: Sequence[int]) -> list[int]:
    """Computes where each payload of adjacent members starts, from the first header on.

    >>> payload_offsets([600, 10])
    [512, 2048]
    """
    offsets, position = [], 0
    for size in sizes:
        position += BLOCK
        offsets.append(position)
        position += padded(size)
    return offsets


def member_header(name: str, num_bytes: int) -> bytes:
    """Makes the 512-byte ustar header of a regular file: mode 0644, mtime 0, uid = gid = 0.

    Raises:
      ValueError: The name is empty, longer than 100 bytes or contains a NUL, or the payload is
        longer than 8 GiB.
    """
    encoded = name.encode()
    if not 0 < len(encoded) <= MAX_NAME or b"\0" in encoded:
        raise ValueError(f"tar member name must have 1 to {MAX_NAME} bytes, no NUL: {name!r}")
    if not 0 <= num_bytes <= MAX_MEMBER_BYTES:
        raise ValueError(f"tar member {name!r} is too large: {num_bytes} bytes")
    head = encoded.ljust(MAX_NAME, b"\0") + _OWNER + b"%011o\0" % num_bytes + _MTIME
    checksum = sum(head) + _REST_SUM
    return b"%b%06o\0 %b" % (head, checksum, _REST)


class TarWriter:
    """Writes samples to a binary stream, hashing as it goes. The caller owns the stream."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._sha256 = hashlib.sha256()
        self.num_bytes = 0
        """Bytes written so far."""

    def write_sample(self, members: Sequence[tuple[str, bytes]], *, num_head: int = 0) -> TarRange:
        """Appends the members of one sample, in the given order.

        Args:
          members: Name and payload of each.
          num_head: The first members, which have a checksum of their own.
        """
        offset, crc, head_crc = self.num_bytes, 0, 0
        for number, (name, payload) in enumerate(members):
            if number == num_head:
                head_crc = crc
            padding = bytes(padded(len(payload)) - len(payload))
            for part in (member_header(name, len(payload)), payload, padding):
                self._write(part)
                crc = crc32(part, crc)
        num_bytes = self.num_bytes - offset
        return TarRange(offset=offset, num_bytes=num_bytes, crc32=crc, head_crc32=head_crc)

    def finish(self) -> str:
        """Writes the end-of-archive blocks and returns the sha256 of the whole file."""
        self._write(END_OF_ARCHIVE)
        return self._sha256.hexdigest()

    def _write(self, part: bytes) -> None:
        self._stream.write(part)
        self._sha256.update(part)
        self.num_bytes += len(part)


def walk_tar(stream: IO[bytes], *, where: str = "") -> Iterator[TarMember]:
    """Lists the members of a shard by its headers, without reading the payloads.

    Raises:
      ShardError: `tar_header` (not the header that `member_header` makes, or zero blocks elsewhere
        than at the end), `tar_truncated` (the file ends inside a member, or without its
        end-of-archive blocks).
    """
    position = 0
    size = stream.seek(0, 2)
    while True:
        stream.seek(position)
        blocks = stream.read(len(END_OF_ARCHIVE))
        if blocks == END_OF_ARCHIVE and position + len(blocks) == size:
            return
        header = blocks[:BLOCK]
        if len(blocks) < len(END_OF_ARCHIVE) and (len(header) < BLOCK or not any(header)):
            raise ShardError("tar_truncated.end", where=where, num_bytes=size)
        member = _parse_header(header, position)
        if member is None:
            raise ShardError("tar_header", where=f"{where} byte {position}")
        if member.offset + member.num_bytes > size:
            raise ShardError(
                "tar_truncated.member",
                where=f"{where} member {member.name}",
                got_bytes=size,
                want_bytes=member.offset + member.num_bytes,
            )
        yield member
        position = member.offset + padded(member.num_bytes)


def _parse_header(header: bytes, position: int) -> TarMember | None:
    """Reads a header; None where any byte is not as `member_header` makes it (a link, an owner)."""
    try:
        name = header[:MAX_NAME].rstrip(b"\0").decode()
        num_bytes = int(header[124:135], 8)
        same = header == member_header(name, num_bytes)
    except ValueError:
        return None
    return TarMember(name=name, offset=position + BLOCK, num_bytes=num_bytes) if same else None
