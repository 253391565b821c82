"""The index of packs: which contents are where, looked up without holding them in memory.

Rows of all packs are in a few *segments*: files of rows sorted by sha256, each with a sparse table
of every 64th row. Only that table is in memory, 8 bytes per 64 contents; a lookup is a binary
search in it and one read of 3 KiB per segment. New packs make a new segment, into which the
smaller ones are merged: a segment has at least four times the rows of the next, so there are few,
and a row is rewritten some log4(N) times. A merge reads ranges of hashes, so its memory is bounded
too.

All of it is derived from the ledgers of packs, on a local disk: what is damaged or missing is made
again. Processes change it under the kernel's lock of a file; readers have files open that another
process may remove, which changes nothing for them. On a network disk, it may end what another
machine has open, and the lock may be known to one machine only: then all is opened again, and rows
are at worst in the index twice.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import struct
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from preprocess.fetch.locks import close_file, lock_file
from shardspec import storage

_SHA256 = [("prefix", ">u8"), ("rest", "V24")]
"""A sha256; rows are sorted by its first bytes."""
LEDGER_ROW = np.dtype([*_SHA256, ("start", "<u8"), ("num_bytes", "<u8")])
"""A row of a pack's ledger: 48 bytes."""
_ROW = np.dtype([*_SHA256, ("pack", "<u4"), ("start", "<u8"), ("num_bytes", "<u8")])
"""A row of a segment; `pack` is a number of its list of names."""

_PLACE = struct.Struct("<IQQ")
_HEAD = struct.Struct("<8sQQ")
_MAGIC = b"packidx1"
_BLOCK_ROWS = 64
_RANGE_ROWS = 2**18
"""Rows that a merge holds at a time, about: 14 MB, some three times over."""
_GROWTH = 4
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_REMOVED = (errno.ENOENT, errno.ESTALE)
_TRIES = 5
_T = TypeVar("_T")
_SIDES: tuple[Literal["left", "right"], ...] = ("left", "right")


class PackIndex:
    """The segments of a folder. Not safe to share between threads."""

    def __init__(self, folder: Path) -> None:
        """Reads nothing yet."""
        self._folder = folder
        self._segments: list[_Segment] = []
        """The largest first."""
        self._unwritten: list[_NewRows] = []
        """What is in memory alone, because the folder may not be written to."""

    @property
    def packs(self) -> set[str]:
        """Names of the packs whose rows are here."""
        return {name for each in self._all() for name in each.packs}

    def find(self, sha256: bytes) -> Iterator[tuple[str, int, int]]:
        """Gives pack, start and length of each copy of a content."""
        yield from self._retried(
            lambda: [place for each in self._all() for place in each.find(sha256)]
        )

    def _retried(self, action: Callable[[], _T]) -> _T:
        """Does something again where another machine has removed segments under it."""
        for _ in range(_TRIES - 1):
            try:
                return action()
            except OSError as error:
                if error.errno not in _REMOVED:
                    raise
            self.load()
        return action()

    def _all(self) -> list[_Segment | _NewRows]:
        return [*self._segments, *self._unwritten]

    def load(self) -> None:
        """Opens what other processes have made, and drops what is contained in something else."""
        if self._folder.is_dir():
            with self._locked():
                self._load()

    def add(self, ledgers: Mapping[str, np.ndarray]) -> None:
        """Adds the rows of packs.

        Args:
          ledgers: Rows (`LEDGER_ROW`) by the name of their pack; those that are here are skipped.
        """
        with _allow_read_only():
            self._retried(lambda: self._add(ledgers))
            return
        self._unwritten.append(_NewRows(self._unknown(ledgers)))

    def _add(self, ledgers: Mapping[str, np.ndarray]) -> None:
        storage.make_folder(self._folder)
        with self._locked():
            self._load()
            self._merge(self._unknown(ledgers))

    def _unknown(self, ledgers: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        known = self.packs
        return {name: rows for name, rows in ledgers.items() if name not in known}

    def _merge(self, ledgers: Mapping[str, np.ndarray]) -> None:
        if not ledgers:
            return
        new = _NewRows(ledgers)
        kept, num_rows = len(self._segments), new.num_rows
        while kept and self._segments[kept - 1].num_rows < _GROWTH * num_rows:
            kept -= 1
            num_rows += self._segments[kept].num_rows
        old = self._segments[kept:]
        if storage.is_own_disk(str(self._folder)):  # so whoever left these was killed
            for left in self._folder.glob("*.tmp"):
                left.unlink(missing_ok=True)
        path = self._folder / f"{uuid.uuid4().hex}.segment"
        _write_segment(path, [new, *old])
        self._segments[kept:] = [_Segment(path)]
        for segment in old:
            segment.remove()

    def _load(self) -> None:
        known = {segment.path: segment for segment in self._segments}
        found = []
        for path in self._folder.glob("*.segment"):
            try:
                found.append(known.pop(path) if path in known else _Segment(path))
            except ValueError:
                with _allow_read_only():
                    path.unlink(missing_ok=True)
            except OSError as error:
                if error.errno not in _REMOVED:
                    raise
        for gone in known.values():
            gone.close()
        found.sort(key=lambda segment: (-segment.num_rows, segment.path.name))
        covered: set[str] = set()
        self._segments = []
        for segment in found:
            if covered.issuperset(segment.packs):  # its remover was killed
                segment.remove()
                continue
            covered.update(segment.packs)
            self._segments.append(segment)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = -1
        with _allow_read_only():
            lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        if lock < 0:
            yield
            return
        try:
            # Without locks, two may merge the same segments: rows are in the index twice.
            lock_file(lock, wait=True)
            yield
        finally:
            os.close(lock)


class _Segment:
    """A file of sorted rows, open."""

    def __init__(self, path: Path) -> None:
        """Opens a segment.

        Raises:
          ValueError: It is not one, or not whole.
        """
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        self.close = weakref.finalize(self, close_file, self._descriptor)
        try:
            head = os.pread(self._descriptor, _HEAD.size, 0)
            if len(head) < _HEAD.size or head[: len(_MAGIC)] != _MAGIC:
                raise ValueError("not a segment")
            _, self.num_rows, num_bytes = _HEAD.unpack(head)
            self._start = _HEAD.size + num_bytes
            table = self._start + self.num_rows * _ROW.itemsize
            num_blocks = -(-self.num_rows // _BLOCK_ROWS)
            if os.fstat(self._descriptor).st_size != table + num_blocks * 8:
                raise ValueError("torn segment")
            self.packs: list[str] = json.loads(os.pread(self._descriptor, num_bytes, _HEAD.size))
            self._firsts = np.frombuffer(os.pread(self._descriptor, num_blocks * 8, table), "<u8")
        except BaseException:
            self.close()
            raise

    def find(self, sha256: bytes) -> Iterator[tuple[str, int, int]]:
        prefix = np.uint64(int.from_bytes(sha256[:8], "big"))
        # Rows of one prefix may begin in the block before the first that begins with it.
        first = max(int(self._firsts.searchsorted(prefix, "left")) - 1, 0)
        last = int(self._firsts.searchsorted(prefix, "right"))
        return _places(self._read(first, last), sha256, self.packs)

    def between(self, low: int, high: int) -> np.ndarray:
        """Reads the rows whose prefixes are in a range."""
        first = max(int(self._firsts.searchsorted(np.uint64(low), "left")) - 1, 0)
        last = int(self._firsts.searchsorted(np.uint64(high), "right"))
        rows = np.frombuffer(self._read(first, last), _ROW)
        return _between(rows, low, high)

    def _read(self, first: int, last: int) -> bytes:
        num_rows = min(last * _BLOCK_ROWS, self.num_rows) - first * _BLOCK_ROWS
        start = self._start + first * _BLOCK_ROWS * _ROW.itemsize
        return os.pread(self._descriptor, max(num_rows, 0) * _ROW.itemsize, start)

    def remove(self) -> None:
        self.close()
        with _allow_read_only():
            self.path.unlink(missing_ok=True)


class _NewRows:
    """Rows of packs that no segment has yet, sorted."""

    def __init__(self, ledgers: Mapping[str, np.ndarray]) -> None:
        self.packs = list(ledgers)
        self.num_rows = sum(map(len, ledgers.values()))
        rows = np.zeros(self.num_rows, _ROW)
        done = 0
        for number, ledger in enumerate(ledgers.values()):
            part = rows[done : done + len(ledger)]
            for name in LEDGER_ROW.fields or ():
                part[name] = ledger[name]
            part["pack"] = number
            done += len(ledger)
        self._rows = _sorted(rows)
        self._prefixes = self._rows["prefix"].astype(np.uint64)

    def find(self, sha256: bytes) -> Iterator[tuple[str, int, int]]:
        prefix = np.uint64(int.from_bytes(sha256[:8], "big"))
        first, last = (int(self._prefixes.searchsorted(prefix, side)) for side in _SIDES)
        return _places(self._rows[first:last].tobytes(), sha256, self.packs)

    def between(self, low: int, high: int) -> np.ndarray:
        return _between(self._rows, low, high)


def _places(rows: bytes, sha256: bytes, packs: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    at = rows.find(sha256)
    while at >= 0:
        if at % _ROW.itemsize == 0:
            pack, start, num_bytes = _PLACE.unpack_from(rows, at + 32)
            if pack < len(packs):
                yield packs[pack], start, num_bytes
        at = rows.find(sha256, at + 1)


@contextmanager
def _allow_read_only() -> Iterator[None]:
    """Passes over what may not be written: of another user, or a disk that is read only."""
    try:
        yield
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise


def _write_segment(path: Path, sources: Sequence[_Segment | _NewRows]) -> None:
    packs = list(dict.fromkeys(name for source in sources for name in source.packs))
    number = {name: i for i, name in enumerate(packs)}
    numbers = [np.array([number[name] for name in each.packs], "<u4") for each in sources]
    names = json.dumps(packs).encode()
    num_ranges = sum(source.num_rows for source in sources) // _RANGE_ROWS + 1
    bounds = [i * 2**64 // num_ranges for i in range(num_ranges + 1)]
    firsts, num_rows = [np.zeros(0, "<u8")], 0
    temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
    with temporary.open("xb") as stream:
        stream.write(_HEAD.pack(_MAGIC, 0, len(names)) + names)
        for low, high in itertools.pairwise(bounds):
            parts = [source.between(low, high - 1) for source in sources]
            for part, own in zip(parts, numbers, strict=True):
                # A damaged row may name any pack: what it leads to is checked by its sha256.
                part["pack"] = own[np.minimum(part["pack"], len(own) - 1)]
            rows = _sorted(np.concatenate(parts, dtype=_ROW))  # else of native byte order
            firsts.append(rows["prefix"][-num_rows % _BLOCK_ROWS :: _BLOCK_ROWS].astype("<u8"))
            num_rows += len(rows)
            stream.write(rows.tobytes())
        stream.write(np.concatenate(firsts).tobytes())
        stream.seek(0)
        stream.write(_HEAD.pack(_MAGIC, num_rows, len(names)))
    storage.publish_file(str(path), temporary)


def _sorted(rows: np.ndarray) -> np.ndarray:
    order: np.ndarray = np.argsort(rows["prefix"].astype(np.uint64), kind="stable")
    return np.take(rows, order)


def _between(rows: np.ndarray, low: int, high: int) -> np.ndarray:
    """Copies those of sorted rows with low <= prefix <= high."""
    prefixes = rows["prefix"].astype(np.uint64)
    first = int(prefixes.searchsorted(np.uint64(low), "left"))
    last = int(prefixes.searchsorted(np.uint64(high), "right"))
    return np.array(rows[first:last])
