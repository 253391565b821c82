"""Local and network disks: what is asked of them, and what takes the place of what they lack.

* Names appear complete: a file is written under a temporary name of its folder, flushed, renamed.
* `compare_and_swap` by a hard link where there is none, else under the kernel's lock of the file
  that is replaced. Without locks (NFS without its lock service, Lustre without `flock`), a look a
  second later tells which of two writers was the last; without links (buckets mounted as folders),
  a lock of this machine has to do, and `prove` refuses the disk to several machines.
* Clients of network disks remember names, listings and attributes for up to a minute. Only `open`
  asks the server, and a change of one's own in the same folder (`ask_server`). So what follows from
  something that is missing is preceded by that.
* A file that another machine has replaced or removed is stale (ESTALE): it is opened again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import stat
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from shardspec.errors import StorageError

logger = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
UNFIT = (errno.ENOSYS, errno.EOPNOTSUPP)
"""An operation that the file system does not have, such as the rename of a mounted bucket."""
_LACKS = (errno.EPERM, *UNFIT)
"""Of links and renames: the kernel says for some file systems that they are not permitted."""
_GONE = (errno.ENOENT, errno.ESTALE)
_LEADS_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
"""Of a name in a listing: it is gone, or a symbolic link to what is not there."""
_NO_FOLDER_SYNC = (errno.EINVAL, errno.EBADF, *UNFIT)

_SETTLE_S = 1.0
"""Without locks: from a replacement to the look at whether another writer has replaced it too."""

_STALE_TRIES = 5
"""Attempts at what another machine of a network disk keeps replacing, or removing."""

_UNFINISHED = re.compile(r"\..+\.tmp-[0-9a-f]{32}", re.DOTALL)

_FOLDER_TRIES = 5
"""Attempts at a folder below one that other processes remove while it is empty."""

_COMPARED_BYTES = 2**20
"""Up to this length the version of a local file is its content: clocks of disks may count seconds,
and numbers of files be used again."""

_OWN_DISKS = ("ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs")
"""File systems that no other machine writes to."""

_T = TypeVar("_T")


def is_own(path: Path) -> bool:
    """Returns True if a path is on a disk that no other machine sees; False if unknown."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return False
    # proc(5): the device is the third field; the type is the first after " - ".
    kinds = {line.partition(" - ")[2].split()[0] for line in lines if line.split()[2] == number}
    return bool(kinds) and kinds <= {*_OWN_DISKS}


def prove(folder: Path, *, machines: bool, rewrites: bool) -> None:
    """Proves that a folder can be what jobs need: see `files.prove_folder`.

    Raises:
      StorageError: `disk_unfit`.
      OSError: The disk is full, read only or broken.
    """
    make_folder(folder)
    again_if_removed(folder, lambda: _prove(folder, machines=machines, rewrites=rewrites))


def _prove(folder: Path, *, machines: bool, rewrites: bool) -> None:
    first, second = (_temporary(folder / "proof") for _ in range(2))
    try:
        with _refusing("disk_unfit.rewrite", folder):
            _write_proof(first, rewrites=rewrites)
        second.write_bytes(b"second")
        with _refusing("disk_unfit.rename", folder):
            os.replace(first, second)
        if second.read_bytes() != b"first" or first.exists():
            raise StorageError("disk_unfit.rename", where=str(folder), error="both names are there")
        if machines:
            with _refusing("disk_unfit.links", folder), suppress(FileExistsError):
                os.link(second, first)
                os.link(second, first)
                raise OSError(errno.EPERM, "a name was given twice")
    finally:
        for path in (first, second):
            path.unlink(missing_ok=True)


def _write_proof(path: Path, *, rewrites: bool) -> None:
    with path.open("xb") as stream:
        stream.write(b"First" if rewrites else b"first")
        if rewrites:
            stream.flush()
            os.pwrite(stream.fileno(), b"f", 0)


@contextmanager
def _refusing(code: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _LACKS:
            raise
        raise StorageError(code, where=str(folder), error=error) from error


def write(path: Path, payload: bytes) -> None:
    """Writes a small file, flushed; an old one is replaced."""

    def attempt() -> None:
        with replacing(path) as temporary:
            write_synced(temporary, payload)

    make_folder(path.parent)
    again_if_removed(path.parent, attempt)


def publish(path: Path, source: Path) -> None:
    """Moves a finished file to its name, flushed."""
    with replacing(path) as temporary:
        try:
            os.rename(source, temporary)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            shutil.copyfile(source, temporary)
            source.unlink()
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())


def version(path: Path) -> str | None:
    """Returns what changes with each write of a file; None where there is none."""
    # Opened, not only looked at: NFS asks its server when a file is opened, and else may answer
    # with what this machine has known for a minute.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        return _version_of(descriptor)
    finally:
        os.close(descriptor)


def _version_of(descriptor: int) -> str:
    found = os.fstat(descriptor)
    if found.st_size <= _COMPARED_BYTES:
        content = os.pread(descriptor, _COMPARED_BYTES + 1, 0)
        return f"{len(content)}-{hashlib.sha256(content).hexdigest()}"
    return f"{found.st_ino}-{found.st_size}-{found.st_mtime_ns}"


def replace(path: Path, payload: bytes, *, old: str) -> bool:
    """Replaces one version of a file; returns False where it was another, or none."""
    return again_if_removed(path.parent, lambda: _replace(path, payload, old))


def _replace(path: Path, payload: bytes, old: str) -> bool:
    try:
        descriptor = _open_to_lock(path)
    except FileNotFoundError:
        return False
    temporary = _temporary(path)
    try:
        write_synced(temporary, payload)
        is_locked = _lock(descriptor, path)
        # Whoever has waited for the lock holds that of a file that has been replaced meanwhile.
        if _version_of(descriptor) != old or version(path) != old:
            return False
        os.replace(temporary, path)
    finally:
        os.close(descriptor)
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    if is_locked:
        return True
    threading.Event().wait(_SETTLE_S)
    return _holds(path, payload)


def _open_to_lock(path: Path) -> int:
    try:
        # For writing: NFS gives exclusive locks of no other files.
        return os.open(path, os.O_RDWR)
    except OSError as error:
        if error.errno not in UNFIT:
            raise
        return os.open(path, os.O_RDONLY)  # of a mounted bucket: its files are never changed


def _lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning("%s: the file system has no locks (%s)", path, error)
        return False
    return True


def create(path: Path, payload: bytes) -> bool:
    """Makes a file where there is none; returns whether the file is that content now."""
    make_folder(path.parent)
    return again_if_removed(path.parent, lambda: _create(path, payload))


def _create(path: Path, payload: bytes) -> bool:
    temporary = _temporary(path)
    try:
        write_synced(temporary, payload)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return _holds(path, payload)
        except OSError as error:
            if error.errno not in _LACKS:
                raise
            if not _create_without_links(path, temporary):
                return _holds(path, payload)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def _create_without_links(path: Path, temporary: Path) -> bool:
    # Not the folder's lock, which whoever holds an output has.
    lock = path.with_name(f".lock.tmp-{0:032x}")
    descriptor = os.open(lock, os.O_RDONLY | os.O_CREAT, 0o666)
    try:
        _lock(descriptor, path.parent)
        if version(path) is not None:
            return False
        os.replace(temporary, path)
        return True
    finally:
        os.close(descriptor)


def _holds(path: Path, payload: bytes) -> bool:
    """Whether a file is that content; it may be gone again."""
    try:
        return path.read_bytes() == payload
    except FileNotFoundError:
        return False


def ask_server(folder: Path) -> None:
    """Makes this machine forget what it remembers of a folder of a network disk.

    A client asks its server anew when it has changed a folder itself: so a file is made and
    removed there. Of a folder that is missing, its parent is asked.
    """
    if is_own(folder):
        return
    for each in (folder, *folder.absolute().parents):
        try:
            mark = _temporary(each / "look")
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            mark.unlink(missing_ok=True)
        except FileNotFoundError:
            continue
        except OSError:  # read only, full: what is remembered has to do
            return
        return


def again_if_stale(action: Callable[[], _T]) -> _T:
    """Does something again where another machine has replaced or removed the file meanwhile."""
    for _ in range(_STALE_TRIES - 1):
        try:
            return action()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
    return action()


def again_if_removed(folder: Path, action: Callable[[], _T]) -> _T:
    """Does something again where another process has removed its unfinished file.

    A job that ends removes those of an output, which killed writers have left. It cannot tell them
    from those of living ones, such as the parts that renew their leases.
    """
    for _ in range(_STALE_TRIES - 1):
        try:
            return action()
        except FileNotFoundError:
            if not folder.is_dir():
                raise
    return action()


def _temporary(path: Path) -> Path:
    """Names an unfinished file, as `is_temporary` knows it."""
    return path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex}")


def is_temporary(name: str) -> bool:
    """Returns True for the name of a file that its writer has not finished, or never will."""
    return _UNFINISHED.fullmatch(name) is not None


def files_below(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Lists the files of a folder at every depth: their names below it, and what they are."""
    for path in paths_below(root):
        try:
            found = path.stat()
        except OSError as error:
            if error.errno not in _LEADS_NOWHERE:
                raise
            continue
        if stat.S_ISREG(found.st_mode):
            yield path.relative_to(root).as_posix(), found


def paths_below(root: Path) -> Iterator[Path]:
    """Lists all but the folders in a folder at every depth; some may be gone again."""

    # Files and folders may be renamed or removed meanwhile. Other errors are not an empty folder.
    def passes(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError | PermissionError):
            raise error

    for folder, _, names in os.walk(root, onerror=passes):
        yield from (Path(folder, name) for name in names)


def make_folder(path: Path) -> None:
    """Makes a local folder and its parents.

    Raises:
      OSError: It cannot be made. Never FileNotFoundError, which means a missing object here.
    """
    for tries_left in range(_FOLDER_TRIES - 1, -1, -1):
        try:
            path.mkdir(parents=True, exist_ok=True)
            return
        except FileNotFoundError as error:
            # Its parent was removed meanwhile, by another process that found it empty.
            if not tries_left:
                raise OSError(errno.EACCES, "folder cannot be made", str(path)) from error


def remove_tree(folder: Path) -> None:
    """Removes a folder with all it holds; other processes may do the same, or end in it."""

    def passes(function: object, name: str, failure: tuple[type, BaseException, object]) -> None:  # noqa: ARG001
        error = failure[1]
        if not isinstance(error, OSError) or error.errno not in (*_GONE, errno.ENOTEMPTY):
            raise error

    for _ in range(_FOLDER_TRIES):
        shutil.rmtree(folder, onerror=passes)
        if not folder.is_dir():
            return
        ask_server(folder)  # a name of its listing may be gone, and another have come
    shutil.rmtree(folder)


def sync_folder(path: Path) -> None:
    """Flushes a local folder to disk: which names it has survives a power cut from here on."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(folder)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name, whose file takes the place of another if the block ends well."""
    make_folder(path.parent)
    temporary = _temporary(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_synced(path: Path, payload: bytes) -> None:
    """Writes a new file, flushed."""
    with path.open("xb") as stream:
        stream.write(payload)
        stream.flush()
        os.fsync(stream.fileno())
