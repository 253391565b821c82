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

* *One user's alone.* What another user could have put there is not believed: the folder belongs to
  this user and is closed to others (0700), or it is refused. It is opened once, and every file is
  opened below that very folder, never through a link, and must be a file of this user with one
  name. What is not is removed, by its name, and not read or written.
* *Never mapped.* Bytes are copied out of the file, so that one that is cut while it is read is
  noticed, instead of ending the process with a signal.

Only files of these names inside a folder that carries our marker are ever removed; a folder with
anything else in it is refused.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import stat
import struct
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shardspec.documents import read_object
from shardspec.errors import ConfigError

MARKER = "vlm-shards-cache.json"
"""File that marks a folder as a cache, and names its owner."""

CACHE_VERSION = 1
_MARKER_BYTES = 1000
"""Most bytes that are read of a marker."""

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
        try:
            os.ftruncate(self.descriptor, 0)
            view = memoryview(payload)
            while view:
                view = view[os.write(self.descriptor, view) :]
            os.utime(self.descriptor, times=(_planned(step), _planned(step)))
            self.cache.put(self.name)
        except OSError:
            self.abandon()
            raise
        os.close(self.descriptor)

    def abandon(self) -> None:
        """Releases the right and the reserved room."""
        with suppress(OSError):
            self.cache.remove(self.name + _PART, self.num_bytes)
        os.close(self.descriptor)


class OpenFile:
    """A file that is read by copying, never mapped. Safe to use from threads."""

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        """Owns the descriptor, which is closed with the last reference to this object."""
        self._descriptor = descriptor
        self.num_bytes = num_bytes
        weakref.finalize(self, os.close, descriptor)

    def read(self, start: int, stop: int) -> memoryview | None:
        """Copies bytes [start, stop) of the file; None if they are not there, or cannot be read.

        A copy, since a map of a file that somebody cuts ends the process when it is used. It costs
        a few microseconds for a sample of 100 kB, which takes a millisecond to decode.
        """
        payload = b""
        try:
            while len(payload) < stop - start:
                left = stop - start - len(payload)
                # Not into memory that would have to be cleared first. One call, but for signals.
                part = os.pread(self._descriptor, left, start + len(payload))
                if not part:
                    return None
                payload = payload + part if payload else part
        except OSError:
            return None
        return memoryview(payload)


class BlockCache:
    """A folder of blocks. Safe to use from threads and processes; its state is two descriptors."""

    def __init__(self, path: str, *, max_bytes: int) -> None:
        """Opens a cache, or makes it in an empty or missing folder.

        Args:
          path: Local folder.
          max_bytes: Bound of all blocks together.

        Raises:
          ConfigError: `cache_foreign`, the folder holds other files, or it belongs to another user
            or others may write to it.
          OSError: The folder cannot be made.
        """
        self.folder = Path(path).expanduser().absolute()
        self.max_bytes = max_bytes
        self.blocks = self.folder / "blocks"
        """For messages: files are opened below `_blocks`, whatever has this name by now."""
        self._root = self._open_root()
        weakref.finalize(self, os.close, self._root)
        self._claim()
        _close_to_others(self._root)
        self._blocks = self._open_blocks()
        weakref.finalize(self, os.close, self._blocks)
        _close_to_others(self._blocks)

    def find(self, name: str, num_bytes: int) -> OpenFile | None:
        """Opens a block; None if there is none, or the disk cannot read it.

        A block of another length is removed: it comes from a full disk or a power cut. So is what
        is no file of this user.
        """
        try:
            descriptor = _open_own(name, os.O_RDONLY, folder=self._blocks)
        except FileNotFoundError:
            return None
        except OSError:
            self._drop_foreign(name)
            return None
        if os.fstat(descriptor).st_size != num_bytes:
            os.close(descriptor)
            self.discard(name)
            return None
        return OpenFile(descriptor, num_bytes)

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
        part = name + _PART
        while True:
            descriptor = _create_own(part, folder=self._blocks)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return "busy"
            except OSError:
                os.close(descriptor)
                raise
            # Between opening and locking it may have become the block, or have been removed.
            if self._is_same(descriptor, part):
                break
            os.close(descriptor)
            if self._is_there(name):
                return "ready"
        try:
            if self._is_there(name):
                found: Literal["ready", "full"] = "ready"
            elif self._reserve(num_bytes, step=step, now=now):
                return CacheWriter(
                    cache=self, name=name, num_bytes=num_bytes, descriptor=descriptor
                )
            else:
                found = "full"
            os.unlink(part, dir_fd=self._blocks)
        except OSError:
            with suppress(OSError):
                os.unlink(part, dir_fd=self._blocks)
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

    def put(self, name: str) -> None:
        """Renames a block that was written, and whose room is reserved, to its final name."""
        with self._counter():
            os.rename(name + _PART, name, src_dir_fd=self._blocks, dst_dir_fd=self._blocks)

    def remove(self, name: str, num_bytes: int) -> None:
        """Removes a file whose bytes are counted."""
        with self._counter() as counter:
            os.unlink(name, dir_fd=self._blocks)
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
        # Opened anew: a descriptor that forked processes share has one position for all of them.
        listed = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._blocks)
        with _closing(listed), os.scandir(listed) as entries:
            for entry in entries:
                name = entry.name.removesuffix(_PART)
                match = _NAME.fullmatch(name)
                if match is None:
                    continue
                length = int(match[2]) - int(match[1])
                if name != entry.name:
                    # The caller's own one is locked by itself, but not yet reserved.
                    used += 0 if self._remove_stale(entry.name) else length
                    continue
                used += length
                if match[3] == "block":
                    with suppress(FileNotFoundError):
                        mark = int(entry.stat(follow_symlinks=False).st_mtime)
                        rank = eviction_rank(mark, now=now)
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
                os.unlink(name, dir_fd=self._blocks)
            used -= length
        return used

    def _mark(self, name: str, mark: int) -> bool:
        if not self._is_there(name):
            return False
        try:
            os.utime(name, times=(mark, mark), dir_fd=self._blocks, follow_symlinks=False)
        except OSError:
            return False
        return True

    def _is_there(self, name: str) -> bool:
        """Returns True if a block is there; removes what is no file of this user."""
        try:
            found = os.stat(name, dir_fd=self._blocks, follow_symlinks=False)
        except OSError:
            return False
        if _is_own_file(found):
            return True
        self._drop_foreign(name)
        return False

    def _drop_foreign(self, name: str) -> None:
        # Its bytes are not counted, or are when the folder is counted again.
        with suppress(OSError):
            os.unlink(name, dir_fd=self._blocks)

    def _is_same(self, descriptor: int, name: str) -> bool:
        try:
            found = os.stat(name, dir_fd=self._blocks, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(os.fstat(descriptor), found)

    def _remove_stale(self, name: str) -> bool:
        """Removes what a killed writer left; returns True if there is nothing any more."""
        try:
            descriptor = _open_own(name, os.O_RDWR, folder=self._blocks)
        except FileNotFoundError:
            return True
        except OSError:
            self._drop_foreign(name)
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        else:
            # It may have become the block meanwhile, and another writer may have begun the next.
            if self._is_same(descriptor, name):
                os.unlink(name, dir_fd=self._blocks)
            return True
        finally:
            os.close(descriptor)

    @contextmanager
    def _counter(self) -> Iterator[_Counter]:
        descriptor = _create_own("usage", folder=self._root)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # held for as long as a folder takes to list
            yield _Counter(descriptor)
        finally:
            # Closing is not enough: a child that was forked meanwhile has the descriptor too, and
            # would hold the lock, and block all processes of the node, for as long as it lives.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _open_root(self) -> int:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            self.folder.mkdir(mode=0o700)
        place = self.folder
        named = place.lstat()
        if stat.S_ISLNK(named.st_mode):
            # A name that this user, or root, gave to a folder elsewhere; the folder itself is
            # checked below like any other.
            if named.st_uid not in (0, os.geteuid()):
                raise self._foreign(link_of_user=named.st_uid)
            place = Path(os.path.realpath(place))
        return self._open_folder(place)

    def _open_blocks(self) -> int:
        with suppress(FileExistsError):
            os.mkdir("blocks", 0o700, dir_fd=self._root)
        return self._open_folder("blocks", folder=self._root)

    def _open_folder(self, path: str | Path, *, folder: int | None = None) -> int:
        """Opens a folder of this user that nobody else has been able to write to."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags, dir_fd=folder)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
            raise self._foreign(not_a_folder=path) from error
        try:
            found = os.fstat(descriptor)
            if found.st_uid != os.geteuid():
                raise self._foreign(owner=found.st_uid, user=os.geteuid())
            if found.st_mode & 0o022:
                # Another process may have found it empty, and closed it, just now.
                if os.listdir(descriptor) and os.fstat(descriptor).st_mode & 0o022:
                    mode = f"{found.st_mode & 0o7777:o}"
                    raise self._foreign(writable=f"by other users (mode {mode})")
                _close_to_others(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _claim(self) -> None:
        try:
            self._require_own()
        except FileNotFoundError:
            others = [name for name in os.listdir(self._root) if not name.startswith(MARKER)]
            # Another process may have claimed the folder just now.
            if others:
                try:
                    self._require_own()
                except FileNotFoundError:
                    raise self._foreign(others=", ".join(sorted(others)[:3])) from None
                return
            payload = json.dumps({"version": CACHE_VERSION, "owner": os.getuid()}).encode()
            temporary = f"{MARKER}.{os.getpid()}.{threading.get_ident()}"
            descriptor = _create_own(temporary, folder=self._root)
            with _closing(descriptor):
                os.write(descriptor, payload)
            # All processes of this user write the same.
            os.rename(temporary, MARKER, src_dir_fd=self._root, dst_dir_fd=self._root)
            self._require_own()

    def _require_own(self) -> None:
        """Checks the marker.

        Raises:
          FileNotFoundError: There is none.
          ConfigError: It is not ours.
        """
        try:
            descriptor = _open_own(MARKER, os.O_RDONLY, folder=self._root)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise self._foreign(marker=error) from error
        with _closing(descriptor):
            payload = os.pread(descriptor, _MARKER_BYTES, 0)
        try:
            found = read_object(payload)
            version, owner = found["version"], found["owner"]
        except (ValueError, KeyError) as error:
            raise self._foreign(marker=error) from error
        if version != CACHE_VERSION or owner != os.getuid():
            raise self._foreign(version=version, owner=owner)

    def _foreign(self, **facts: object) -> ConfigError:
        return ConfigError("cache_foreign", where=str(self.folder), facts=facts)


def _close_to_others(folder: int) -> None:
    if os.fstat(folder).st_mode & 0o7777 != 0o700:
        os.fchmod(folder, 0o700)


def _is_own_file(found: os.stat_result) -> bool:
    """Returns True for a regular file of this user that has no second name anywhere."""
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_nlink <= 1


def _open_own(name: str, flags: int, *, folder: int) -> int:
    """Opens a file of this user below a folder.

    Raises:
      FileNotFoundError: There is none.
      OSError: It is a link, another kind of file, another user's, or has a second name (ELOOP).
    """
    # Not to wait for a writer, should it be a pipe.
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(name, flags, 0o600, dir_fd=folder)
    if not _is_own_file(os.fstat(descriptor)):
        os.close(descriptor)
        raise OSError(errno.ELOOP, "not a file of this user alone", name)
    return descriptor


def _create_own(name: str, *, folder: int) -> int:
    """Opens a file of this user for writing, made if need be; what is not one is removed."""
    try:
        return _open_own(name, os.O_RDWR | os.O_CREAT, folder=folder)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EACCES, errno.ENXIO):
            raise
    os.unlink(name, dir_fd=folder)
    return _open_own(name, os.O_RDWR | os.O_CREAT, folder=folder)


@contextmanager
def _closing(descriptor: int) -> Iterator[None]:
    """Closes a descriptor at the end of the block."""
    try:
        yield
    finally:
        os.close(descriptor)


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
