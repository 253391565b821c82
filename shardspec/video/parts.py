"""Parts of the file of a clip: each has a checksum, and frames need few of them.

The file is cut every `PART_BYTES`. The table of the clip names the parts after its packets: rows of
(start, stop, CRC-32, 4). Which of them some frames need follows from the packets: those from the
key frame before a frame to some after it, which decoders want first, the beginning and the end of
the file. `PartedFile` is such a file for a decoder. It never makes bytes up: whoever reads what is
not there gets an error, so that frames are those of the whole file, or there are none.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from shardspec.checksum import crc32

PART_BYTES = 2**18
"""Length of a part: small beside a group of pictures, and worth a request to a store."""

_PART = 4
_KEY, _SHOWN = 1, 2

_AHEAD = 8
"""Packets that are read when a file is opened, at least: FFmpeg looks at the first seven."""

_GROUPS_AHEAD = 3
"""Frames come after those that they are out of order with, of which decoders hold two groups."""

_LARGEST_SHARE = 0.5
"""Where frames need more of a file than that, all of it is read."""


class FilePart(NamedTuple):
    """Bytes [start, stop) of the file of a clip, and their checksum."""

    start: int
    stop: int
    crc32: int


class RemoteFile(Protocol):
    """The file of a clip, elsewhere."""

    read_s: float
    """Seconds of reading so far."""

    def read(self, parts: Sequence[FilePart]) -> Sequence[bytes | memoryview]:
        """Reads parts and compares their checksums."""


class MissingPartError(Exception):
    """A decoder wants bytes of a file that are not at hand."""


def with_parts(table: np.ndarray, file: bytes) -> np.ndarray:
    """Adds the parts of a clip's file to its table: int64 [rows + parts, 4]."""
    rows = [
        (start, start + len(part), crc32(part), _PART)
        for start in range(0, len(file), PART_BYTES)
        for part in (memoryview(file)[start : start + PART_BYTES],)
    ]
    return np.concatenate([table, np.array(rows, "<i8").reshape(-1, 4)])


def select_frames(table: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
    """Gives the table of a clip that has only some of its frames; all else is as it was.

    Args:
      table: Of the clip.
      numbers: Of the frames, strictly ascending.
    """
    found: np.ndarray = table.copy()
    rows = found[2:]
    shown = np.flatnonzero(rows[:, 3] & _SHOWN)
    shown = shown[np.argsort(rows[shown, 0], kind="stable")]
    left_out = np.delete(shown, numbers)
    if table[0, 2]:  # found by decoding: a row for each
        return np.delete(found, 2 + left_out, axis=0)
    rows[left_out, 3] &= ~_SHOWN
    return found


def file_parts(table: np.ndarray) -> list[FilePart]:
    """Lists all parts of a clip's file; [] of a table without them."""
    return [FilePart(*row[:3]) for row in table[2:].tolist() if row[3] == _PART]


def needed_parts(table: np.ndarray, numbers: Sequence[int]) -> list[FilePart]:
    """Lists the parts of a clip's file that decoding some of its frames needs.

    Args:
      table: Of the clip, with parts.
      numbers: Of the frames, strictly ascending.

    Returns:
      In the file's order; all parts where the frames need more than half of the file, or where it
      is not known where they are.
    """
    parts = file_parts(table)
    scanned, data_start = table[0, 2], int(table[1, 3])
    if scanned or not data_start:
        return parts
    packets = table[2 : len(table) - len(parts)]
    pts, sizes, flags = packets[:, 0], packets[:, 2], packets[:, 3]
    ends = data_start + np.cumsum(sizes)
    starts = ends - sizes
    by_pts = np.argsort(pts, kind="stable")
    wanted = by_pts[flags[by_pts] & _SHOWN > 0][list(numbers)]
    keys = by_pts[flags[by_pts] & _KEY > 0]
    before = np.searchsorted(pts[keys], pts[wanted], side="right") - 1
    first = np.where(before < 0, 0, keys[np.maximum(before, 0)])
    # Groups of packets of which only the first is shown after all that are before it.
    groups = np.flatnonzero(pts >= np.maximum.accumulate(pts))
    ahead = _AHEAD + _GROUPS_AHEAD * int(np.diff([*groups, len(pts)]).max())
    last = np.minimum(wanted + ahead, len(pts) - 1)
    num_bytes = parts[-1].stop
    spans = [(0, ends[min(ahead, len(pts) - 1)]), (ends[-1], num_bytes)]
    spans += zip(starts[first], ends[last], strict=True)
    needed = np.zeros(len(parts), bool)
    borders = [part.start for part in parts]
    for start, stop in spans:
        begin = int(np.searchsorted(borders, start, side="right")) - 1
        needed[begin : int(np.searchsorted(borders, stop))] = True
    found = [part for part, is_needed in zip(parts, needed, strict=True) if is_needed]
    if sum(part.stop - part.start for part in found) > _LARGEST_SHARE * num_bytes:
        return parts
    return found


class PartedFile(io.RawIOBase):
    """A file of which some parts are at hand, to be read and sought in."""

    def __init__(self, payload: bytes, parts: Sequence[Sequence[int]], num_bytes: int) -> None:
        """Takes the bytes.

        Args:
          payload: Of the parts, one after the other.
          parts: (start, stop) of each in the file, ascending.
          num_bytes: Length of the file.
        """
        self._view, self._num_bytes = memoryview(payload), num_bytes
        self._runs: list[list[int]] = []  # (start, stop, where in the payload), joined
        done = 0
        for start, stop, *_ in parts:
            if self._runs and self._runs[-1][1] == start:
                self._runs[-1][1] = stop
            else:
                self._runs.append([start, stop, done])
            done += stop - start
        self._position = 0
        self.is_incomplete = False
        """Bytes were wanted that are not at hand."""

    def read(self, size: int = -1) -> bytes:
        """Reads at most that many bytes, fewer where the next ones are not at hand.

        Raises:
          MissingPartError: The first one is not.
        """
        at = self._position
        if at >= self._num_bytes or not size:
            return b""
        for start, stop, first in self._runs:
            if start <= at < stop:
                end = stop if size < 0 else min(stop, at + size)
                self._position = end
                return bytes(self._view[first + at - start : first + end - start])
        self.is_incomplete = True
        raise MissingPartError

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Goes to a place, as files do."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}
        self._position = max(0, origin[whence] + offset)
        return self._position

    def tell(self) -> int:
        """Says where the next byte is read."""
        return self._position

    def readable(self) -> bool:
        """Files of clips are read only."""
        return True

    def seekable(self) -> bool:
        """They can be sought in."""
        return True

    def close(self) -> None:
        """Stays open: a decoder opens it more than once."""
