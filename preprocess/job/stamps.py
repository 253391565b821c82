"""What the files of a job's source were when its plan was made, and which have changed since.

A stamp is the size and the modification time of a file that rows are read from, or that a row
names. PLAN reads the content of each named file anyway, so its hash is in the stamp too. Of an
object of a store it is the size and what the store changes with each write: ETag, generation, or
time. The stamps of a split are one file of the output, `plan/SPLIT-files.jsonl.gz`; no other file
depends on it, since times differ from machine to machine.

Cost of a million named files (2 cores, local disk): PLAN holds 25 MB, writes 27 MB and takes at
most 46 s more; a comparison by time reads those and takes 12 s. "content" reads every file again;
"none" costs nothing.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import NoneType, TracebackType
from typing import Any, Literal

from preprocess.hash_table import TextSet
from shardspec import storage
from shardspec.errors import StorageError, redacted_url

Compare = Literal["time", "content", "none"]
"""How files are compared with their stamps: by size and time, by content, or not at all."""

RowFiles = Literal["same", "more", "any"]
"""What is asked of the files that rows are read from, where rows may have been appended: to be the
same ones, to be among those of now, or nothing, as their rows are compared."""

MAX_NAMED = 3
"""Changed files that are named; of the others the number."""

_READS_AT_ONCE = 16
_BATCH = 1024
_DIGEST_CHARS = 32
"""128 bits: enough to notice a change, half of the bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """A file as it was."""

    path: str
    """Absolute path; URL of an object, without what may be secret in it."""
    num_bytes: int | None
    """None where there was none."""
    mtime_ns: int = 0
    digest: str = ""
    """First digits of its sha256, "" where it was not read; the version of an object."""
    holds_rows: bool = False
    """Whether rows are read from it; else a row names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What a comparison has found."""

    num_files: int
    num_changed: int
    changed: dict[str, str]
    """Why, by path; the first `MAX_NAMED`."""
    how: str
    """In words."""


class StampWriter:
    """Writes the stamps of a plan to a local file, each path once. A context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = TextSet()
        self._stream: gzip.GzipFile | None = None

    def __enter__(self) -> StampWriter:
        # Without a time and a name: the same files give the same bytes.
        self._raw = self._path.open("wb")
        self._stream = gzip.GzipFile("", "wb", compresslevel=3, fileobj=self._raw, mtime=0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._stream is not None
        with self._raw:
            self._stream.close()

    def __len__(self) -> int:
        return len(self._seen)

    def __contains__(self, path: str) -> bool:
        return path in self._seen

    def add(self, stamp: Stamp) -> None:
        """Writes a stamp, unless its path has one."""
        assert self._stream is not None
        if not self._seen.add(stamp.path):
            return
        fields = [stamp.path, stamp.num_bytes, stamp.mtime_ns, stamp.digest, stamp.holds_rows]
        self._stream.write(json.dumps(fields).encode() + b"\n")


def stamp_file(path: Path | str, *, sha256: str = "", holds_rows: bool = False) -> Stamp:
    """Makes the stamp of a file; call it before the file is read.

    Args:
      path: The file, or the URL of an object; it may be missing.
      sha256: Of its content, where it is known.
      holds_rows: Whether rows are read from it.

    Raises:
      StorageError: The store refused or failed.
    """
    where = _name(path)
    if isinstance(path, str):
        found = storage.object_version(path)
        return Stamp(
            path=where,
            num_bytes=found.num_bytes if found else None,
            digest=found.version if found else "",
            holds_rows=holds_rows,
        )
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return Stamp(path=where, num_bytes=None, holds_rows=holds_rows)
    return Stamp(
        path=where,
        num_bytes=stat.st_size,
        mtime_ns=stat.st_mtime_ns,
        digest=sha256[:_DIGEST_CHARS],
        holds_rows=holds_rows,
    )


def stamp_rows(paths: Iterable[Path | str], *, content: bool) -> list[Stamp]:
    """Makes the stamps of the files that rows are read from.

    Args:
      paths: The files, or URLs of objects.
      content: Whether local files are hashed, too.
    """

    def stamp(path: Path | str) -> Stamp:
        sha256 = content_sha256(path) if content and isinstance(path, Path) else ""
        return stamp_file(path, sha256=sha256, holds_rows=True)

    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        return list(_bounded_map(pool, stamp, iter(paths)))


def _name(path: Path | str) -> str:
    return str(path.absolute()) if isinstance(path, Path) else redacted_url(path)


def with_content(stamp: Stamp, sha256: str) -> Stamp:
    """Adds the hash of what has been read to a stamp."""
    return replace(stamp, digest=sha256[:_DIGEST_CHARS])


def content_sha256(path: Path) -> str:
    """Hashes a file; "" where it cannot be read."""
    try:
        if not path.is_file():  # reading a named pipe would wait for a writer
            return ""
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while chunk := stream.read(2**20):
                digest.update(chunk)
        return digest.hexdigest()
    except (OSError, ValueError):
        return ""


def compare_files(
    url: str, row_files: Iterable[Path | str], *, how: Compare, rows: RowFiles = "same"
) -> Compared | None:
    """Compares the files of a job with the stamps of its plan.

    Args:
      url: The stamps.
      row_files: Files that rows would be read from now, and URLs of objects.
      how: "content" still goes by size and time where a stamp has no hash, and by the version of an
        object.
      rows: What is asked of the files that rows are read from.

    Returns:
      None where nothing was compared: there are no stamps, or `how` is "none".

    Raises:
      StorageError: `plan_files`, the stamps are damaged; the store refused or failed.
    """
    if how == "none":
        return None
    try:
        payload = storage.read_bytes(url)
    except FileNotFoundError:
        return None
    changed: dict[str, str] = {}
    num_changed, num_files = 0, 0
    places = {_name(path): path for path in row_files}
    left = set(places)
    batches = _batches(_stamps(payload, where=url))

    def found(stamps: list[Stamp]) -> list[tuple[Stamp, str]]:
        return [(stamp, _change(stamp, places.get(stamp.path), how)) for stamp in stamps]

    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        for batch in _bounded_map(pool, found, batches):
            for stamp, why in batch:
                if stamp.holds_rows and rows == "any":
                    continue
                num_files += 1
                if stamp.holds_rows:
                    if stamp.path not in left:
                        why = why or "is not read any more"
                    left.discard(stamp.path)
                if why:
                    num_changed += 1
                    if len(changed) < MAX_NAMED:
                        changed[stamp.path] = why
    for path in sorted(left) if rows == "same" else ():
        num_changed += 1
        if len(changed) < MAX_NAMED:
            changed[path] = "is new"
    by = "content" if how == "content" else "size and time"
    return Compared(num_files=num_files, num_changed=num_changed, changed=changed, how=f"by {by}")


def named_stamps(url: str) -> Iterator[Stamp]:
    """Reads the stamps of the files that rows name; of rows' own files there are none.

    Raises:
      StorageError: `plan_files`, the stamps are damaged.
    """
    try:
        payload = storage.read_bytes(url)
    except FileNotFoundError:
        return
    yield from (stamp for stamp in _stamps(payload, where=url) if not stamp.holds_rows)


def _stamps(payload: bytes, *, where: str) -> Iterator[Stamp]:
    number = 0
    try:
        if not payload:
            raise EOFError("empty")
        with gzip.open(io.BytesIO(payload)) as stream:
            # The checksum is compared at the end: a damaged line may come before it.
            for line in stream:
                yield _stamp(line)
                number += 1
    except (EOFError, OSError, RecursionError, ValueError, zlib.error) as error:
        raise StorageError(
            "plan_files", where=f"{where}:{number + 1}", error=f"{type(error).__name__}: {error}"
        ) from error


def _stamp(line: bytes) -> Stamp:
    """Reads a stamp; not by `read_json`, which takes several times as long for a million.

    Raises:
      ValueError, RecursionError: It is none.
    """
    fields = json.loads(line)
    kinds = (str, int | NoneType, int, str, bool)
    if not (isinstance(fields, list) and len(fields) == len(kinds)):
        raise ValueError(f"want {len(kinds)} fields")
    path, num_bytes, mtime_ns, digest, holds_rows = fields
    numbers_fit = type(num_bytes) is not bool and type(mtime_ns) is not bool
    if not (numbers_fit and all(map(isinstance, fields, kinds))):
        raise ValueError("a field has another type")
    return Stamp(
        path=path, num_bytes=num_bytes, mtime_ns=mtime_ns, digest=digest, holds_rows=holds_rows
    )


def _change(stamp: Stamp, place: Path | str | None, how: Compare) -> str:
    """Says how a file differs from its stamp; "" if it does not.

    Args:
      stamp: The stamp.
      place: Where rows are read from; None for what a row names.
      how: How it is compared.
    """
    if "://" in stamp.path:
        now = stamp_file(str(place or stamp.path))
        if now.num_bytes is None or stamp.num_bytes is None:
            return _presence(now.num_bytes is None, stamp)
        if now.num_bytes != stamp.num_bytes:
            return f"has {now.num_bytes} bytes, had {stamp.num_bytes}"
        return "" if now.digest == stamp.digest else "has another version"
    try:
        stat: os.stat_result | None = os.stat(stamp.path)
    except (OSError, ValueError):
        stat = None
    if stat is None or stamp.num_bytes is None:
        return _presence(stat is None, stamp)
    if stat.st_size != stamp.num_bytes:
        return f"has {stat.st_size} bytes, had {stamp.num_bytes}"
    if how == "content" and stamp.digest:
        same = content_sha256(Path(stamp.path))[:_DIGEST_CHARS] == stamp.digest
        return "" if same else "has another content"
    return "" if stat.st_mtime_ns == stamp.mtime_ns else "has another modification time"


def _presence(is_missing: bool, stamp: Stamp) -> str:
    if is_missing and stamp.num_bytes is None:
        return ""
    return "is missing" if is_missing else "was missing"


def _batches(stamps: Iterator[Stamp]) -> Iterator[list[Stamp]]:
    while batch := list(islice(stamps, _BATCH)):
        yield batch


def _bounded_map(
    pool: ThreadPoolExecutor, work: Callable[[Any], Any], tasks: Iterator[Any]
) -> Iterator[Any]:
    """Maps in order, with a bounded number of tasks in memory."""
    waiting = [pool.submit(work, task) for task in islice(tasks, 2 * _READS_AT_ONCE)]
    while waiting:
        yield waiting.pop(0).result()
        waiting += [pool.submit(work, task) for task in islice(tasks, 1)]
