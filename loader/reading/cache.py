"""BlockCache: blocks of remote shards on the node's own disk, shared by all its processes.

A folder of files, each a block named by content: the object's sha256 and the range. There is no
other state, so the cache serves any run, order and number of processes, and outlives them.

* *Complete or absent.* A block is written to NAME.part and renamed. Readers compare lengths; the
  checksum of every sample is compared at each read (remote.py), since a disk may corrupt later
  what was written correctly.
* *Single flight.* The process that writes a block holds the kernel's lock (flock) on NAME.part. The
  lock ends with the process; what a killed one leaves is overwritten, never read.
* *Bounded.* Room is reserved before a block is written, in a counter with a lock of its own. When
  there is none left, the folder is counted again and blocks are evicted, a sixteenth of the bound
  more than needed, so that this is rare.
* *Planned eviction.* The modification time of a block's file holds the step of its next planned
  use, or that all of it was used in this epoch. Blocks that are used up are evicted first, then
  those whose planned use is long past (the oldest first), then those that are needed last. A block
  is never evicted for one that is needed later: that one is then read without the cache. Indexes
  are not evicted: they have a hundredth of the bytes, and every read needs one.

Only files of these names inside a folder that carries our marker are ever removed; a folder with
anything else in it is refused.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import re
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shardspec.errors import ConfigError

MARKER = "vlm-shards-cache.json"
"""File that marks a folder as a cache, and names its owner."""

CACHE_VERSION = 1

_NAME = re.compile(r"[0-9a-f]{1,32}-(\d+)-(\d+)\.(block|index)")
_PART = ".part"
_SPARE = 16

# Modification times, in whole seconds since 1970, which every file system can store.
_PLANNED = 2**30
_MOST_STEPS = 2**29


@dataclass(slots=True, kw_only=True)
class CacheWriter:
    """The right to write one block, held by a lock; ends with `commit` or `abandon`."""

    cache: BlockCache
    name: str
    num_bytes: int
    descriptor: int

    def commit(self, payload: bytearray, *, step: int) -> None:
        """Puts the block in place, whole.

        Args:
          payload: The block.
          step: Of its next use.

        Raises:
          OSError: The disk is full or fails; no file is left.
        """
        part = self.cache.blocks / (self.name + _PART)
        try:
            os.ftruncate(self.descriptor, 0)
            view = memoryview(payload)
            while view:
                view = view[os.write(self.descriptor, view) :]
            os.utime(self.descriptor, times=(_planned(step), _planned(step)))
            self.cache.put(part, self.name)
        except OSError:
            self.abandon()
            raise
        os.close(self.descriptor)

    def abandon(self) -> None:
        """Releases the right and the reserved room."""
        with suppress(OSError):
            self.cache.remove(self.name + _PART, self.num_bytes)
        os.close(self.descriptor)


class BlockCache:
    """A folder of blocks. Safe to use from threads and processes; holds no state of its own."""

    def __init__(self, path: str, *, max_bytes: int) -> None:
        """Opens a cache, or makes it in an empty or missing folder.

        Args:
          path: Local folder.
          max_bytes: Bound of all blocks together.

        Raises:
          ConfigError: `cache_foreign`, the folder holds other files or belongs to another user.
          OSError: The folder cannot be made.
        """
        self.folder = Path(path).expanduser().absolute()
        self.max_bytes = max_bytes
        self.blocks = self.folder / "blocks"
        self._usage = self.folder / "usage"
        self._claim()

    def find(self, name: str, num_bytes: int) -> memoryview | None:
        """Maps a block into memory; None if there is none, or the disk cannot read it.

        A block of another length is removed: it comes from a full disk or a power cut.
        """
        try:
            descriptor = os.open(self.blocks / name, os.O_RDONLY)
        except OSError:
            return None
        try:
            if os.fstat(descriptor).st_size != num_bytes:
                self.discard(name)
                return None
            return memoryview(mmap.mmap(descriptor, num_bytes, access=mmap.ACCESS_READ))
        except OSError:
            return None
        finally:
            os.close(descriptor)

    def begin(
        self, name: str, num_bytes: int, *, step: int, now: int
    ) -> CacheWriter | Literal["ready", "busy", "full"]:
        """Requests the right to write a block; never waits.

        Args:
          name, num_bytes: The block.
          step: Of its next use.
          now: The step that the run has reached.

        Returns:
          The right, or "ready": it is cached; "busy": another process or thread writes it; "full":
          all room is taken by blocks that are needed sooner.

        Raises:
          OSError: The disk is full or fails.
        """
        part = self.blocks / (name + _PART)
        while True:
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return "busy"
            except OSError:
                os.close(descriptor)
                raise
            # Between opening and locking it may have become the block, or have been removed.
            if _same_file(descriptor, part):
                break
            os.close(descriptor)
            if (self.blocks / name).exists():
                return "ready"
        try:
            if (self.blocks / name).exists():
                found: Literal["ready", "full"] = "ready"
            elif self._reserve(num_bytes, step=step, now=now):
                return CacheWriter(
                    cache=self, name=name, num_bytes=num_bytes, descriptor=descriptor
                )
            else:
                found = "full"
            os.unlink(part)
        except OSError:
            with suppress(OSError):
                os.unlink(part)
            os.close(descriptor)
            raise
        os.close(descriptor)
        return found

    def plan(self, name: str, *, step: int) -> bool:
        """Notes the next use of a block; returns True if it is cached."""
        return self._mark(name, _planned(step))

    def used_up(self, name: str, *, passes: int) -> None:
        """Notes that all of a block was used; the more passes, the sooner it is evicted."""
        self._mark(name, max(0, _MOST_STEPS // 2 - passes))

    def discard(self, name: str) -> None:
        """Removes a block."""
        found = _NAME.fullmatch(name)
        assert found is not None
        with suppress(OSError):
            self.remove(name, int(found[2]) - int(found[1]))

    # Both hold the counter's lock: a process that counts the folder would otherwise miss a file
    # that is renamed meanwhile, or subtract one that it has not counted.

    def put(self, part: Path, name: str) -> None:
        """Renames a block that was written, and whose room is reserved, to its final name."""
        with self._counter():
            os.rename(part, self.blocks / name)

    def remove(self, name: str, num_bytes: int) -> None:
        """Removes a file whose bytes are counted."""
        with self._counter() as counter:
            os.unlink(self.blocks / name)
            counter.write(max(0, (counter.read() or 0) - num_bytes))

    def _reserve(self, num_bytes: int, *, step: int, now: int) -> bool:
        with self._counter() as counter:
            used = counter.read()
            if used is None or used + num_bytes > self.max_bytes:
                used = self._evict(num_bytes, step=step, now=now)
            fits = used + num_bytes <= self.max_bytes
            counter.write(used + num_bytes if fits else used)
            return fits

    def _evict(self, num_bytes: int, *, step: int, now: int) -> int:
        """Counts the folder and makes room for a block if possible; returns the bytes in use."""
        used, found = 0, []
        with os.scandir(self.blocks) as entries:
            for entry in entries:
                name = entry.name.removesuffix(_PART)
                match = _NAME.fullmatch(name)
                if match is None:
                    continue
                length = int(match[2]) - int(match[1])
                if name != entry.name:
                    # The caller's own one is locked by itself, but not yet reserved.
                    used += 0 if _remove_stale(entry.path) else length
                    continue
                used += length
                if match[3] == "block":
                    with suppress(FileNotFoundError):
                        rank = eviction_rank(int(entry.stat().st_mtime), now=now)
                        found.append((rank, entry.name, length))
        # The requesting block has its .part file in the folder already.
        used -= num_bytes
        if used + num_bytes <= self.max_bytes:
            return used
        goal = self.max_bytes - num_bytes - self.max_bytes // _SPARE
        own = eviction_rank(_planned(step), now=now)
        for rank, name, length in sorted(found):
            if used <= goal or rank >= own:
                break
            with suppress(FileNotFoundError):
                os.unlink(self.blocks / name)
            used -= length
        return used

    def _mark(self, name: str, mark: int) -> bool:
        try:
            os.utime(self.blocks / name, times=(mark, mark))
        except OSError:
            return False
        return True

    @contextmanager
    def _counter(self) -> Iterator[_Counter]:
        descriptor = os.open(self._usage, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # held for as long as a folder takes to list
            yield _Counter(descriptor)
        finally:
            # Closing is not enough: a child that was forked meanwhile has the descriptor too, and
            # would hold the lock, and block all processes of the node, for as long as it lives.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _claim(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        marker = self.folder / MARKER
        if not marker.exists():
            others = [name for name in os.listdir(self.folder) if not name.startswith(MARKER)]
            # Another process may have claimed the folder just now.
            if others and not marker.exists():
                raise self._foreign(others=", ".join(sorted(others)[:3]))
            payload = json.dumps({"version": CACHE_VERSION, "owner": os.getuid()}).encode()
            temporary = self.folder / f"{MARKER}.{os.getpid()}.{threading.get_ident()}"
            temporary.write_bytes(payload)
            with suppress(FileExistsError):
                os.link(temporary, marker)
            temporary.unlink()
        self._require_own(marker)
        self.blocks.mkdir(exist_ok=True)

    def _require_own(self, marker: Path) -> None:
        try:
            found: Any = json.loads(marker.read_bytes())
            version, owner = found["version"], found["owner"]
        except (ValueError, KeyError, TypeError) as error:
            raise self._foreign(marker=error) from error
        if version != CACHE_VERSION or owner != os.getuid():
            raise self._foreign(version=version, owner=owner)

    def _foreign(self, **facts: object) -> ConfigError:
        return ConfigError("cache_foreign", where=str(self.folder), facts=facts)


def eviction_rank(mark: int, *, now: int) -> tuple[int, int]:
    """Orders blocks for eviction by their mark and the step that the run has reached.

    >>> marks = {"used up": 7, "long past": 2**30 - 3, "just past": 2**30 - 9}
    >>> marks |= {"soon": 2**30 - 11, "later": 2**30 - 40}
    >>> sorted(marks, key=lambda name: eviction_rank(marks[name], now=10))
    ['used up', 'long past', 'just past', 'later', 'soon']
    """
    if mark < _MOST_STEPS:
        return 0, mark
    step = _PLANNED - mark
    return (1, step) if step < now else (2, -step)


class _Counter:
    """The bytes in use, as eight bytes of a file; None until they are counted."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read(self) -> int | None:
        payload = os.pread(self._descriptor, 8, 0)
        return int(struct.unpack("<Q", payload)[0]) if len(payload) == 8 else None

    def write(self, value: int) -> None:
        os.pwrite(self._descriptor, struct.pack("<Q", value), 0)


def _planned(step: int) -> int:
    return _PLANNED - min(max(step, 0), _MOST_STEPS - 1)


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _remove_stale(path: str) -> bool:
    """Removes what a killed writer left; returns True if there is nothing any more."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        # It may have become the block meanwhile, and another writer may have begun the next.
        if _same_file(descriptor, Path(path)):
            os.unlink(path)
        return True
    finally:
        os.close(descriptor)
