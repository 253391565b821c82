"""Packs: contents in a few large files, in a folder or a store that machines share.

    <root>/packs/<name>.pack       contents, one directly after another
    <root>/packs/<name>.ledger     a row of 48 bytes for each: sha256, where it begins, its length
    <root>/damaged/<name>@<start>  mark of a content that is not what its row says
    <local>/open/<machine>/<name>.*  a pack that is being written
    <local>/index/                 the rows of all packs (`preprocess.fetch.pack_index`); derived

1. Each writer has a pack of its own, so no writer waits for another, on any machine. A content is
   appended first, its row after it: a killed process leaves at worst a content without a row, or
   a torn row.
2. A full pack is published: the pack first, then its ledger, whose presence says that both are
   whole. Only published packs are read by others. On a store, both are uploaded.
3. The writer holds the kernel's lock of its open ledger. Whoever looks for packs finishes those of
   dead writers on this disk: contents are compared with their rows, what is torn or differs is
   dropped and counted, the rest is published. What was dropped is fetched again. Locks of a network
   disk may be known to one machine only: there, a pack of another machine has to be unchanged for
   `DEAD_AFTER_S` too. A writer whose pack was taken nevertheless publishes a copy of it.
4. A row counts where its pack is long enough. A content is used only if its sha256 is right; one
   that is not is marked, and from then on does not exist.

Nothing of a published pack ever changes.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import logging
import os
import platform
import struct
import threading
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from preprocess.fetch.locks import close_file, lock_file
from preprocess.fetch.pack_index import LEDGER_ROW, READ_ONLY, PackIndex
from shardspec import storage
from shardspec.errors import ShardError

logger = logging.getLogger(__name__)

PACK_BYTES = 512 * 2**20
"""Length from which a pack is full."""
LEAST_BYTES = 4096
"""A content counts for at least this much, so that a pack has at most 131,072 of them: their rows
are in memory while it is written."""
DEAD_AFTER_S = 3600
"""How long another machine's open pack is unchanged, on a disk that both see, until its writer
counts as dead."""

_ROW = struct.Struct("<32sQQ")
_ROWS_AT_ONCE = 2**20
_READS_AT_ONCE = 16


class Place(NamedTuple):
    """Where a content is."""

    pack: str
    start: int
    num_bytes: int

    @property
    def mark(self) -> str:
        """Names the mark that says that it is damaged."""
        return f"{self.pack}@{self.start}"


class PackStore:
    """The packs of a folder or store. Safe to share between threads.

    `_lock` guards all that is set in `__init__`. Contents of packs that this process writes are
    read under it too, so that no file is closed in between.
    """

    def __init__(self, url: str, *, local: Path, pack_bytes: int = PACK_BYTES) -> None:
        """Reads nothing yet.

        Args:
          url: The root.
          local: A local folder of this root alone, for open packs and the index; the root itself
            where that is local.
          pack_bytes: Length from which a pack is full.
        """
        self._url, self._local, self._pack_bytes = url, local, pack_bytes
        self._ranges = storage.RangeReader()
        self._lock = threading.RLock()
        self._is_loaded = False
        self._writer: _Writer | None = None
        self._own: dict[str, _Writer] = {}
        """Packs that this process writes or publishes, by name; `_writer` is among them."""
        self._index = PackIndex(local / "index")
        self._sizes: dict[str, int] = {}
        """Lengths of the published packs."""
        self._damaged: set[str] = set()
        """Marks of damaged contents."""

    def find(self, sha256: str) -> list[Place]:
        """Lists where a content is."""
        with self._lock:
            if not self._is_loaded:
                self.refresh()
            own = (writer.rows.get(sha256) for writer in self._own.values())
            found = [place for place in own if place is not None]
            for place in itertools.starmap(Place, self._index.find(bytes.fromhex(sha256))):
                if place.start + place.num_bytes <= self._sizes.get(place.pack, 0):
                    found.append(place)
            return [place for place in found if place.mark not in self._damaged]

    def read(self, place: Place) -> bytes | None:
        """Reads a content, unchecked; None where the pack is gone or too short by now."""
        with self._lock:
            if place.pack in self._own:
                return self._own[place.pack].read(place)
        url, stop = self.pack_url(place.pack), place.start + place.num_bytes
        try:
            if not storage.is_local(url):
                return bytes(self._ranges.read(url, place.start, stop))
            with storage.translate_errors(url), storage.local_path(url).open("rb") as stream:
                stream.seek(place.start)
                payload = stream.read(place.num_bytes)
                return payload if len(payload) == place.num_bytes else None
        except (FileNotFoundError, ShardError):
            return None

    def mark_damaged(self, place: Place) -> None:
        """Makes a content that is not what its row says disappear, for all machines."""
        with self._lock:
            self._damaged.add(place.mark)
        storage.publish_bytes(storage.join(self._url, "damaged", place.mark), b"")

    def append(self, sha256: str, payload: bytes) -> None:
        """Stores a content; it survives the death of the process from here on.

        Raises:
          StorageError: The disk or store refused.
        """
        with self._lock:
            with storage.translate_errors(str(self._local)):
                if self._writer is None:
                    self._writer = self._open()
                writer = self._writer
                writer.append(sha256, payload)
            if not writer.is_full(self._pack_bytes):
                return
            self._writer = None
        self._publish(writer)  # others write to the next one meanwhile

    def flush(self) -> None:
        """Publishes what has been written, so that other processes see it."""
        with self._lock:
            writer, self._writer = self._writer, None
        if writer is not None:
            self._publish(writer)

    def release(self) -> None:
        """Leaves what has been written to whoever looks for packs next."""
        with self._lock:
            for writer in self._own.values():
                writer.close()
            self._writer, self._own, self._is_loaded = None, {}, False

    def refresh(self) -> None:
        """Finds the packs that others have published, and finishes those of dead writers.

        Raises:
          StorageError: The disk or store refused.
        """
        with self._lock, storage.translate_errors(str(self._local)):
            for ledger in sorted((self._local / "open").rglob("*.ledger")):
                if ledger.stem not in self._own:
                    self._finish_dead(ledger)
            listed = storage.list_objects(storage.join(self._url, "packs"), fresh=True)
            sizes = {each.name: each.num_bytes for each in listed}
            self._sizes = {
                name.removesuffix(".pack"): size
                for name, size in sizes.items()
                if name.endswith(".pack")
            }
            self._index.load()
            known = self._index.packs
            ledgers = (name.removesuffix(".ledger") for name in sizes if name.endswith(".ledger"))
            new = [name for name in ledgers if name not in known]
            rows = {name: sizes[f"{name}.ledger"] // _ROW.size for name in new}
            for names in _in_groups(rows, _ROWS_AT_ONCE):
                with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
                    found = zip(names, pool.map(self._read_ledger, names), strict=True)
                    self._index.add(dict(found))
            self._damaged = set(storage.list_names(storage.join(self._url, "damaged")))
            self._is_loaded = True

    def pack_url(self, name: str) -> str:
        """Names a published pack."""
        return storage.join(self._url, "packs", f"{name}.pack")

    def _ledger_url(self, name: str) -> str:
        return storage.join(self._url, "packs", f"{name}.ledger")

    def _read_ledger(self, name: str) -> np.ndarray:
        try:
            payload = storage.read_bytes(self._ledger_url(name))
        except FileNotFoundError:
            payload = b""
        return np.frombuffer(payload[: len(payload) // _ROW.size * _ROW.size], LEDGER_ROW)

    def _open(self) -> _Writer:
        storage.prove_folder(str(self._local), rewrites=True)
        writer = _Writer(self._local / "open" / _this_machine())
        self._own[writer.name] = writer
        return writer

    def _publish(self, writer: _Writer) -> None:
        ledger = np.frombuffer(writer.finish(), LEDGER_ROW)
        try:
            _publish_file(self.pack_url(writer.name), writer.pack)
            _publish_file(self._ledger_url(writer.name), writer.ledger)
        except FileNotFoundError:
            if writer.pack.exists() and writer.ledger.exists():
                raise
            # Removed, or published as it was by another machine.
            self._publish(self._copied(writer))
            return
        with self._lock, storage.translate_errors(str(self._local)):
            if self._own.pop(writer.name, None) is not None:
                writer.close()
            self._sizes[writer.name] = writer.num_bytes
            self._index.add({writer.name: ledger})

    def _copied(self, writer: _Writer) -> _Writer:
        """Writes what is in an open pack to another."""
        with self._lock, storage.translate_errors(str(self._local)):
            copy = self._open()
            for sha256, place in writer.rows.items():
                copy.append(sha256, writer.read(place))
            self._own.pop(writer.name, None)
            writer.close()
            return copy

    def _finish_dead(self, ledger: Path) -> None:
        """Publishes what is whole of an open pack, if its writer is dead."""
        try:
            descriptor = os.open(ledger, os.O_RDWR)
        except OSError as error:
            if error.errno not in (errno.ENOENT, *READ_ONLY):
                raise
            return  # finished by another, or of another user
        try:
            # Without locks nobody knows who is alive: what was written is fetched again.
            if lock_file(descriptor) == "held" and ledger.exists() and _is_of_dead(ledger):
                # Without a common lock, another machine may finish it too.
                with suppress(FileNotFoundError), storage.translate_errors(str(ledger)):
                    self._finish(ledger, descriptor)
        finally:
            os.close(descriptor)

    def _finish(self, ledger: Path, descriptor: int) -> None:
        written, pack = ledger.read_bytes(), ledger.with_suffix(".pack")
        rows = [*_ROW.iter_unpack(written[: len(written) // _ROW.size * _ROW.size])]
        if pack.exists():
            whole = _whole_rows(pack, rows)
        else:  # published by a writer that died then, and had not lost power
            size = storage.size(self.pack_url(ledger.stem)) or 0
            whole = [row for row in rows if row[1] + row[2] <= size]
        if len(whole) * _ROW.size != len(written):
            logger.warning(
                "%s: its writer died: %d of %d contents are whole, the others are fetched again",
                pack,
                len(whole),
                -(-len(written) // _ROW.size),
            )
        if not whole:
            pack.unlink(missing_ok=True)
            ledger.unlink()
            return
        os.pwrite(descriptor, b"".join(_ROW.pack(*row) for row in whole), 0)
        os.ftruncate(descriptor, len(whole) * _ROW.size)
        if pack.exists():
            _publish_file(self.pack_url(ledger.stem), pack)
        _publish_file(self._ledger_url(ledger.stem), ledger)


class _Writer:
    """An open pack and its ledger, which is locked while they are."""

    def __init__(self, folder: Path) -> None:
        self.name = uuid.uuid4().hex
        self.pack, self.ledger = folder / f"{self.name}.pack", folder / f"{self.name}.ledger"
        self.rows: dict[str, Place] = {}
        self.num_bytes = 0
        self._num_rows = 0
        storage.make_folder(folder)
        # A ledger gets its name when it is locked: one that is not has a dead writer.
        unlocked = self.ledger.with_suffix(".new")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        self._ledger = os.open(unlocked, flags, 0o666)
        closing = ExitStack()
        closing.callback(close_file, self._ledger)
        self.close = weakref.finalize(self, closing.close)
        lock_file(self._ledger)
        unlocked.rename(self.ledger)
        self._pack = os.open(self.pack, flags, 0o666)
        closing.callback(close_file, self._pack)

    def is_full(self, pack_bytes: int) -> bool:
        return max(self.num_bytes, len(self.rows) * LEAST_BYTES) >= pack_bytes

    def append(self, sha256: str, payload: bytes) -> None:
        # At places of our own: what a failed attempt has left is overwritten.
        place = Place(self.name, self.num_bytes, len(payload))
        _write(self._pack, payload, self.num_bytes)
        row = _ROW.pack(bytes.fromhex(sha256), place.start, place.num_bytes)
        _write(self._ledger, row, self._num_rows * _ROW.size)
        self.rows[sha256] = place
        self._num_rows += 1
        self.num_bytes += len(payload)

    def read(self, place: Place) -> bytes:
        return os.pread(self._pack, place.num_bytes, place.start)

    def finish(self) -> bytes:
        """Cuts what a failed attempt has left; returns the ledger."""
        num_bytes = self._num_rows * _ROW.size
        if os.fstat(self._ledger).st_size != num_bytes:
            os.ftruncate(self._ledger, num_bytes)
        return os.pread(self._ledger, num_bytes, 0)


def _this_machine() -> str:
    """Names the kernel, whose locks are known to all its processes."""
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        kernel = platform.node()
    return hashlib.sha256(kernel.encode()).hexdigest()[:16]


def _is_of_dead(ledger: Path) -> bool:
    """Whether an open pack that this process could lock has no writer on any machine."""
    folder = ledger.parent
    if folder.name == _this_machine() or storage.is_own_disk(str(folder)):
        return True
    try:
        os.utime(folder)  # to the time of the disk, which machines' clocks differ from
        return folder.stat().st_mtime - ledger.stat().st_mtime > DEAD_AFTER_S
    except OSError:  # removed meanwhile, or not to be told
        return False


def _publish_file(url: str, path: Path) -> None:
    """Publishes an open file, which has one of its two names at any time, also when killed."""
    if not storage.is_local(url):
        storage.publish_file(url, path)
        return
    with storage.translate_errors(url):
        target = storage.local_path(url)
        storage.make_folder(target.parent)
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        path.replace(target)
        storage.sync_folder(target.parent)


def _write(descriptor: int, payload: bytes, start: int) -> None:
    view = memoryview(payload)
    while view:
        written = os.pwrite(descriptor, view, start)
        view, start = view[written:], start + written


def _whole_rows(pack: Path, rows: Iterable[tuple[bytes, int, int]]) -> list[tuple[bytes, int, int]]:
    """Keeps the rows whose contents are in a pack."""
    whole = []
    with pack.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        for sha256, start, num_bytes in rows:
            if start + num_bytes <= size:
                stream.seek(start)
                if hashlib.sha256(stream.read(num_bytes)).digest() == sha256:
                    whole.append((sha256, start, num_bytes))
    return whole


def _in_groups(sizes: Mapping[str, int], most: int) -> Iterator[list[str]]:
    """Groups names whose sizes add up to at most that, or single ones."""
    group: list[str] = []
    total = 0
    for name, size in sizes.items():
        if group and total + size > most:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    if group:
        yield group
