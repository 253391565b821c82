"""The one door to bytes: local paths and every fsspec URL, read, and published whole or not at all.

Local files are written under a temporary name in the same directory, flushed to disk and renamed.
On object stores an object appears only when its upload is complete: large files go through a
multipart upload that is committed after the last byte and aborted on any exception (the plain
`with fs.open(url, "wb")` would publish the partial object when its body raises).
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import posixpath
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec

from shardspec.errors import StorageError

logger = logging.getLogger(__name__)

_SINGLE_PUT_BYTES = 8 * 2**20
"""Up to here one PUT carries the object; S3 multipart parts must have at least 5 MiB."""


def is_local(url: str) -> bool:
    """Tells whether a URL names a local path (no scheme, or file://)."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> Path:
    """Turns a local URL into a path."""
    return Path(url.removeprefix("file://")).expanduser()


def join(url: str, *parts: str) -> str:
    """Appends path components to a URL.

    >>> join("s3://bucket/set/", "train", "a.tar")
    's3://bucket/set/train/a.tar'
    """
    return posixpath.join(url, *parts)


def exists(url: str) -> bool:
    """Tells whether an object or a directory is there."""
    with naming_errors(url):
        if is_local(url):
            return local_path(url).exists()
        fs, path = filesystem(url)
        return bool(fs.exists(path))


def size(url: str) -> int | None:
    """Returns the length of an object in bytes, or None where there is none."""
    with naming_errors(url):
        if is_local(url):
            path = local_path(url)
            return path.stat().st_size if path.is_file() else None
        fs, remote = filesystem(url)
        try:
            return int(fs.info(remote)["size"])
        except FileNotFoundError:
            return None


def read_bytes(url: str) -> bytes:
    """Reads a whole object.

    Raises:
      FileNotFoundError: There is none.
      StorageError: The store refused or failed.
    """
    with naming_errors(url):
        if is_local(url):
            return local_path(url).read_bytes()
        fs, path = filesystem(url)
        return bytes(fs.cat_file(path))


def list_names(url: str) -> list[str]:
    """Lists the names of the objects directly below a URL, sorted; [] where there is nothing."""
    with naming_errors(url):
        if is_local(url):
            directory = local_path(url)
            return sorted(p.name for p in directory.iterdir()) if directory.is_dir() else []
        fs, path = filesystem(url)
        try:
            return sorted(posixpath.basename(p.rstrip("/")) for p in fs.ls(path, detail=False))
        except FileNotFoundError:
            return []


def delete(url: str) -> None:
    """Removes an object, or a directory with all it holds; nothing happens where there is none."""
    with naming_errors(url):
        if is_local(url):
            path = local_path(url)
            while path.is_dir():
                # What a dying process still tidies up vanishes under our hands.
                with suppress(FileNotFoundError):
                    shutil.rmtree(path)
            path.unlink(missing_ok=True)
            return
        fs, remote = filesystem(url)
        if fs.exists(remote):
            fs.rm(remote, recursive=True)


def delete_temporaries(url: str) -> None:
    """Removes the unfinished files of killed writers below a local directory."""
    with naming_errors(url):
        for path in local_path(url).rglob(".*.tmp-" + "[0-9a-f]" * 32):
            path.unlink(missing_ok=True)


def publish_bytes(url: str, payload: bytes) -> None:
    """Puts a small object in place, whole; an old one is replaced in the same moment."""
    with naming_errors(url):
        if is_local(url):
            with _replacing(local_path(url)) as temporary:
                _write_synced(temporary, payload)
            return
        fs, path = filesystem(url)
        fs.pipe_file(path, payload)


def publish_file(url: str, source: Path) -> None:
    """Moves a finished local file to its place, whole; `source` is gone afterwards.

    Raises:
      StorageError: `no_space`, `permission` or `storage_failed`; nothing appeared under `url`.
    """
    with naming_errors(url):
        if is_local(url):
            _publish_local(local_path(url), source)
            return
        fs, path = filesystem(url)
        want = source.stat().st_size
        if want <= _SINGLE_PUT_BYTES:
            fs.pipe_file(path, source.read_bytes())
        else:
            _upload(fs, path, source)
        fs.invalidate_cache()
        got = fs.info(path)["size"]
        if got != want:
            fs.rm(path)
            raise StorageError(
                "object has another length than the file that was uploaded",
                reason="upload_size",
                where=url,
                facts={"got_bytes": got, "want_bytes": want},
                fix="run the same command again",
            )
        source.unlink()


@contextmanager
def exclusive(url: str) -> Iterator[None]:
    """Holds a local folder for this process, which makes it if need be; the kernel lets go of it.

    Object stores and file systems without locks are not held.

    Raises:
      StorageError: `output_busy`: another process holds it.
    """
    if not is_local(url):
        yield
        return
    with naming_errors(url):
        make_folder(local_path(url))
        folder = os.open(local_path(url), os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(
                "another job is writing to this output",
                reason="output_busy",
                where=url,
                fix="wait until it has ended, or use another OUT=",
            ) from error
        except OSError as error:
            logger.warning("%s: the file system has no locks (%s)", url, error)
        yield
    finally:
        os.close(folder)


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Finds the client of a URL's store and the object's path there; local URLs too.

    Listings are never answered from a cache: other processes write to the same stores.

    Raises:
      StorageError: `unknown_scheme`.
    """
    try:
        fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise StorageError(
            "no file system is installed for this kind of URL",
            reason="unknown_scheme",
            where=url,
            facts={"error": error},
            fix="use a local path, s3://, gs:// or another scheme that fsspec knows",
        ) from error
    return fs, path


def free_bytes(url: str) -> int | None:
    """Tells the free space of the disk that a local URL lies on; None for object stores."""
    if not is_local(url):
        return None
    path = local_path(url).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def make_folder(path: Path) -> None:
    """Makes a local folder and its parents.

    Raises:
      OSError: It cannot be made; never FileNotFoundError, which means a missing object here.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:
        raise OSError(errno.EACCES, "folder cannot be made", str(path)) from error


def _publish_local(path: Path, source: Path) -> None:
    with _replacing(path) as temporary:
        try:
            os.rename(source, temporary)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            shutil.copyfile(source, temporary)
            source.unlink()
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())


def _upload(fs: fsspec.AbstractFileSystem, path: str, source: Path) -> None:
    target = fs.open(path, "wb", autocommit=False)
    try:
        with source.open("rb") as stream:
            shutil.copyfileobj(stream, target, length=_SINGLE_PUT_BYTES)
        target.close()
    except BaseException:
        target.discard()
        raise
    target.commit()


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _write_synced(path: Path, payload: bytes) -> None:
    with path.open("xb") as stream:
        stream.write(payload)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def naming_errors(url: str) -> Iterator[None]:
    """Turns the operating system's errors into ours; a missing object stays FileNotFoundError.

    Raises:
      StorageError: `no_space`, `permission` or `storage_failed`, naming the URL.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason, what, fix = "no_space", "no space is left on the device", "free some space"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            reason, what, fix = "permission", "access was refused", "check the owner and the rights"
        else:
            reason, what, fix = "storage_failed", "the storage failed", "see the error"
        raise StorageError(
            what,
            reason=reason,
            where=url,
            facts={"error": error},
            fix=f"{fix}, then run the same command again",
        ) from error
