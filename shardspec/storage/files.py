"""Files and objects: local paths, every fsspec URL and named stores; whole or not at all.

Local files are written under a temporary name in the same directory, flushed to disk and renamed.
On object stores an object appears only when its upload is complete (`shardspec.storage.upload`). A
scheme that fsspec does not know may be the name of a store (`shardspec.storage.stores`).

Errors of a store's client become a StorageError here, except for a missing object, which is a
FileNotFoundError everywhere.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import posixpath
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from shardspec.errors import ShardsError, StorageError, nearest
from shardspec.storage import disks, upload
from shardspec.storage.failures import is_access_refused, is_client_error
from shardspec.storage.retries import with_retries
from shardspec.storage.stores import STORES_FILE, Store, named_stores

logger = logging.getLogger(__name__)

SCHEMES = ("file", "s3", "gs", "memory")
"""Kinds of URL that the test suite runs against; fsspec knows more."""

_ALIASES = {"s3a": "s3", "gcs": "gs"}
"""Aliases of schemes: the same stores, by the same client of fsspec."""

_DELETES_AT_ONCE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredObject:
    """What a listing says of an object."""

    name: str
    """Relative to the URL that was listed."""
    num_bytes: int
    modified_unix_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenUpload:
    """An unfinished multipart upload."""

    name: str
    """Of the object it would make, relative to the URL that was listed."""
    upload_id: str
    began_unix_s: float


def is_local(url: str) -> bool:
    """Returns True if a URL names a local path (no scheme, or file://)."""
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


def resolve(base: str, url: str) -> str:
    """Resolves a URL that may be relative to a folder.

    >>> resolve("s3://bucket/views/a", "../b/train/x.tar")
    's3://bucket/views/b/train/x.tar'
    >>> resolve("/data/a", "s3://bucket/x.tar"), resolve("/data/a", "train/x.tar")
    ('s3://bucket/x.tar', '/data/a/train/x.tar')
    """
    if "://" in url or url.startswith("/"):
        return url
    if is_local(base):
        return join(base, url)  # ".." is left to the system, because of symbolic links
    scheme, _, path = base.partition("://")
    return f"{scheme}://{posixpath.normpath(posixpath.join(path, url))}"


def absolute_url(url: str) -> str:
    """Normalizes a URL: a local path without links, no trailing slash, no alias of a scheme.

    >>> absolute_url("s3a://bucket/set/"), absolute_url("gcs://bucket")
    ('s3://bucket/set', 'gs://bucket')
    """
    if is_local(url):
        return os.path.realpath(local_path(url))
    scheme, mark, path = url.rstrip("/").partition("://")
    return f"{_ALIASES.get(scheme, scheme)}{mark}{path}"


def exists(url: str, *, fresh: bool = False) -> bool:
    """Returns True if there is an object or a directory.

    Args:
      url: The object.
      fresh: Whether to ask the server of a network disk, whose clients remember for a minute what
        was missing; stores are always asked.
    """
    with translate_errors(url):
        if is_local(url):
            local = local_path(url)
            if fresh and not disks.again_if_stale(local.exists):
                disks.ask_server(local.parent)
            return disks.again_if_stale(local.exists)
        fs, path = filesystem(url)
        return with_retries(lambda: bool(fs.exists(path)), where=url)


def size(url: str) -> int | None:
    """Returns the length of an object in bytes, or None where there is none."""
    with translate_errors(url):
        if is_local(url):
            path = local_path(url)
            return disks.again_if_stale(lambda: path.stat().st_size if path.is_file() else None)
        fs, remote = filesystem(url)
        try:
            info = with_retries(lambda: fs.info(remote), where=url)
        except FileNotFoundError:
            return None
        return int(info["size"]) if info["type"] == "file" else None


def version(url: str) -> str | None:
    """Returns the version of an object, which changes with each write; None where there is none.

    Returns:
      An opaque text: the ETag on S3, the generation on GCS; of a small local file the sha256,
      elsewhere length and time of writing.
    """
    with translate_errors(url):
        if is_local(url):
            return disks.again_if_stale(lambda: disks.version(local_path(url)))
        fs, path = filesystem(url)
        return with_retries(lambda: upload.version_of(fs, path), where=url)


def read_bytes(url: str) -> bytes:
    """Reads a whole object.

    Raises:
      FileNotFoundError: There is none.
      StorageError: The store refused or failed.
    """
    with translate_errors(url):
        if is_local(url):
            return disks.again_if_stale(local_path(url).read_bytes)
        fs, path = filesystem(url)
        return with_retries(lambda: bytes(fs.cat_file(path)), where=url)


def fetch_file(url: str, target: Path) -> None:
    """Copies an object to a local file, which then holds all of it; memory holds a part at most.

    Raises:
      FileNotFoundError: There is none.
      StorageError: The store refused or failed, or the local disk is full.
    """
    with translate_errors(url):
        if is_local(url):
            disks.again_if_stale(lambda: shutil.copyfile(local_path(url), target))
            return
        fs, path = filesystem(url)
        with_retries(lambda: fs.get_file(path, str(target)), where=url)


def list_names(url: str, *, fresh: bool = False) -> list[str]:
    """Lists the names of the objects directly below a URL, sorted; [] where there is nothing.

    Args:
      url: The folder.
      fresh: Whether to ask the server of a network disk, whose clients remember listings for a
        minute; stores are always asked.
    """
    with translate_errors(url):
        if is_local(url):
            directory = local_path(url)
            if fresh:
                disks.ask_server(directory)
            return disks.again_if_stale(
                lambda: sorted(os.listdir(directory)) if directory.is_dir() else []
            )
        fs, path = filesystem(url)
        path = path.rstrip("/")
        try:
            found = with_retries(lambda: fs.ls(path, detail=False), where=url)
        except FileNotFoundError:
            return []
        # A listing may name the folder itself, and stores sort differently.
        names = {name.rstrip("/") for name in found}
        return sorted(_below(name, path) for name in names if _below(name, path))


def list_objects(url: str, *, fresh: bool = False) -> list[StoredObject]:
    """Lists the objects below a URL at every depth, sorted by name; [] where there is nothing.

    Unfinished files of local folders are among them.

    Args:
      url: The folder.
      fresh: As for `list_names`; of the folders below it only those are asked anew that are new.
    """
    with translate_errors(url):
        if is_local(url):
            root = local_path(url)
            if fresh:
                disks.ask_server(root)
            found_files = disks.again_if_stale(lambda: sorted(disks.files_below(root)))
            return [
                StoredObject(name=name, num_bytes=found.st_size, modified_unix_s=found.st_mtime)
                for name, found in found_files
            ]
        fs, root_path = filesystem(url)
        root_path = root_path.rstrip("/")
        try:
            found = with_retries(lambda: fs.find(root_path, detail=True), where=url)
        except FileNotFoundError:
            return []
        objects = [
            StoredObject(
                name=_below(name, root_path),
                num_bytes=int(entry["size"]),
                modified_unix_s=_modified(entry),
            )
            for name, entry in found.items()
            if entry["type"] == "file" and _below(name, root_path)
        ]
        return sorted(objects, key=lambda each: each.name)


def list_uploads(url: str) -> list[OpenUpload]:
    """Lists the unfinished multipart uploads below a URL.

    Only S3 has any to list. GCS does not list its unfinished uploads, charges nothing for them and
    drops them after a week; other file systems have none.
    """
    if is_local(url):
        return []
    with translate_errors(url):
        fs, path = filesystem(url)
        path = path.rstrip("/")
        found = with_retries(lambda: upload.open_uploads(fs, path), where=url)
        return [
            OpenUpload(name=_below(name, path), upload_id=upload_id, began_unix_s=began)
            for name, upload_id, began in found
        ]


def abort_upload(url: str, upload_id: str) -> None:
    """Drops the parts of an unfinished multipart upload; a missing one is not an error."""
    with translate_errors(url):
        fs, path = filesystem(url)
        upload.abort_upload(fs, path, upload_id, where=url)


def delete(url: str) -> None:
    """Removes an object, or a directory with all it holds; nothing happens where there is none."""
    with translate_errors(url):
        if is_local(url):
            path = local_path(url)
            if path.is_dir():
                disks.remove_tree(path)
            path.unlink(missing_ok=True)
            return
        fs, remote = filesystem(url)
        try:
            # Not fs.rm, which reads *, ? and [ in names as patterns.
            found = with_retries(lambda: fs.find(remote), where=url)
        except FileNotFoundError:
            return
        _delete_all(fs, found, where=url)


def delete_if_empty(url: str) -> None:
    """Removes a local folder that holds nothing; stores have no folders."""
    if is_local(url):
        with suppress(OSError):
            local_path(url).rmdir()


def delete_objects(url: str, names: Iterable[str]) -> None:
    """Removes objects by their names below a URL; missing ones are skipped."""
    with translate_errors(url):
        if is_local(url):
            for name in names:
                local_path(join(url, name)).unlink(missing_ok=True)
            return
        fs, root = filesystem(url)
        _delete_all(fs, [posixpath.join(root, name) for name in names], where=url)


def delete_temporaries(url: str) -> None:
    """Removes the unfinished files of killed writers below a local directory.

    Small ones of living writers too: those write again.
    """
    with translate_errors(url):
        for path in disks.paths_below(local_path(url)):
            if disks.is_temporary(path.name):
                path.unlink(missing_ok=True)


def has_temporaries(url: str) -> bool:
    """Returns True if a local directory itself holds an unfinished file; False of a store."""
    if not is_local(url):
        return False
    with translate_errors(url), suppress(FileNotFoundError):
        return any(map(disks.is_temporary, os.listdir(local_path(url))))
    return False


def publish_bytes(url: str, payload: bytes) -> None:
    """Writes a small object atomically; an old one is replaced."""
    with translate_errors(url):
        if is_local(url):
            disks.write(local_path(url), payload)
            return
        fs, path = filesystem(url)
        with _naming_bucket(url):
            upload.put_bytes(fs, path, payload, where=url)


def compare_and_swap(url: str, payload: bytes, *, replacing: str | None) -> bool:
    """Writes a small object in place of one known version, or where there is none.

    Object stores make this atomic for all writers (`shardspec.storage.upload` names those that do
    not). So do local and network disks: a link where there is none, else the kernel's lock of the
    file that is replaced, which NFS passes on to its server. A file system without locks is named
    in a warning; there, of two that replace one version within a second, the later does. Without
    hard links, it is atomic among the processes of this machine (`prove_folder`).

    Args:
      url: The object.
      payload: Its new content.
      replacing: What `version` returned before the old object was read; None for no object.

    Returns:
      Whether the object is now `payload`; False where it was another version.
    """
    with translate_errors(url):
        if not is_local(url):
            fs, path = filesystem(url)
            with _naming_bucket(url):
                return upload.compare_and_swap(fs, path, payload, replacing=replacing, where=url)
        local = local_path(url)
        if replacing is None:
            return disks.again_if_stale(lambda: disks.create(local, payload))
        return disks.again_if_stale(lambda: disks.replace(local, payload, old=replacing))


def publish_file(url: str, source: Path, *, on_part: Callable[[int], None] | None = None) -> None:
    """Publishes a finished local file atomically; `source` is gone afterwards.

    Args:
      url: Where to.
      source: The file.
      on_part: Called with the bytes that have arrived, while a large file is uploaded; an exception
        of it aborts the upload, and nothing is left of it.

    Raises:
      StorageError: `no_space`, `permission`, `store_unavailable`, `upload_size`, `upload_checksum`
        or `storage_failed`; nothing appeared under `url`.
    """
    with translate_errors(url):
        if is_local(url):
            disks.publish(local_path(url), source)
            return
        fs, path = filesystem(url)
        with _naming_bucket(url):
            upload.put_file(fs, path, source, where=url, on_part=on_part)
        source.unlink()


@contextmanager
def exclusive(url: str) -> Iterator[None]:
    """Locks a local folder for this process, making it if needed.

    The lock is the kernel's, so it ends with the process. File systems without locks are not
    locked, nor are object stores (`preprocess.job.lease` does that).

    Raises:
      StorageError: `output_busy`: another process has locked it.
    """
    if not is_local(url):
        yield
        return
    with translate_errors(url):
        disks.make_folder(local_path(url))
        folder = os.open(local_path(url), os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError("output_busy.job", where=url) from error
        except OSError as error:
            logger.warning("%s: the file system has no locks (%s)", url, error)
        yield
    finally:
        os.close(folder)


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Returns the client of a URL's store and the object's path there; local URLs too.

    Listings are never cached: other processes write to the same stores.

    Raises:
      StorageError: `unknown_scheme`.
    """
    try:
        scheme, _, rest = url.partition("://")
        if rest and "::" not in scheme and not _is_known(scheme):
            store = _named_store(url, scheme)
            return fsspec.filesystem("s3", use_listings_cache=False, **store.options()), rest
        fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        if isinstance(error, ShardsError):
            raise
        raise StorageError("unknown_scheme.package", where=url, error=error) from error
    return fs, path


def is_own_disk(url: str) -> bool:
    """Returns True if a local folder is on a disk that no other machine sees; False if unknown."""
    return is_local(url) and disks.is_own(local_path(url))


def prove_folder(url: str, *, machines: bool = False, rewrites: bool = False) -> None:
    """Proves before any work that a folder can be what jobs need; of stores nothing is asked.

    A file must be readable under its name as it was written, and replace another by a rename. Where
    several machines write, one name must be given once: by a hard link. Which locks reach the other
    machines shows nowhere.

    Args:
      url: The folder; it is made where there is none.
      machines: Whether several machines write to it.
      rewrites: Whether files are changed after they were written.

    Raises:
      StorageError: `disk_unfit`; `permission`, `no_space` and others of `translate_errors`.
    """
    if is_local(url):
        with translate_errors(url):
            disks.prove(local_path(url), machines=machines, rewrites=rewrites)


def free_bytes(url: str) -> int | None:
    """Returns the free space of the disk of a local URL; None for object stores."""
    if not is_local(url):
        return None
    path = local_path(url).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _is_known(scheme: str) -> bool:
    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError:
        return False
    return True


def _named_store(url: str, scheme: str) -> Store:
    stores = named_stores()
    if scheme not in stores:
        known = (*SCHEMES, *stores)
        raise StorageError(
            "unknown_scheme.unknown",
            where=url,
            hint=nearest(scheme, known),
            stores_file=STORES_FILE,
            known=", ".join(f"{name}://" for name in known) + " and fsspec's others",
        )
    return stores[scheme]


def _delete_all(fs: Any, paths: list[str], *, where: str) -> None:
    def one(path: str) -> None:
        with suppress(FileNotFoundError):
            with_retries(lambda: fs.rm_file(path), where=where)

    # One by one: a bulk delete of s3fs does not report the objects that it may not delete.
    with ThreadPoolExecutor(_DELETES_AT_ONCE) as pool:
        list(pool.map(one, paths))


def _below(name: str, root: str) -> str:
    return name.removeprefix(f"{root}/") if name.startswith(f"{root}/") else ""


def _modified(entry: dict[str, Any]) -> float:
    for field in ("mtime", "LastModified", "created"):
        if field in entry:
            return float(getattr(entry[field], "timestamp", lambda v=entry[field]: v)())
    return 0.0


@contextmanager
def _naming_bucket(url: str) -> Iterator[None]:
    """Translates FileNotFoundError: what is missing when an object is written is its bucket."""
    try:
        yield
    except FileNotFoundError as error:
        raise StorageError("bucket_missing", where=url, error=error) from error


@contextmanager
def translate_errors(url: str) -> Iterator[None]:
    """Translates the errors of the system and of stores' clients into ours.

    A missing object stays FileNotFoundError.

    Raises:
      StorageError: `no_space`, `permission`, `disk_unfit`, `not_a_folder` or `storage_failed`,
        naming the URL.
    """
    try:
        yield
    except (FileNotFoundError, StorageError):
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not is_client_error(error):
            raise
        number = error.errno if isinstance(error, OSError) else None
        if number in (errno.ENOSPC, errno.EDQUOT):
            code = "no_space.device"
        elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
            code = "permission.file"
        elif number in disks.UNFIT:
            code = "disk_unfit.operation"
        elif is_access_refused(error):
            code = "permission.store"
        elif number == errno.ENOTDIR or (number == errno.EEXIST and os.path.isfile(url)):
            code = "not_a_folder"
        else:
            code = "storage_failed"
        raise StorageError(code, where=url, error=error) from error
