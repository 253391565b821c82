"""What FETCH stores for PLAN and BUILD: image files by content, and a ledger by URL.

    <root>/packs, damaged         contents by their sha256 (`preprocess.fetch.packs`)
    <root>/blobs/ab/abcdef...     one file per content, of older releases; only read
    <root>/tokens                 marks, by which machines tell that they see the same root
    <ledger>.jsonl                one line per finished URL, appended; the last line of a URL wins

The ledger is append-only: a process that is killed can at worst tear the last line, which the next
opening drops, so that the URL is fetched again. A line is written after its blob is in place.
Readers still check the blob, since it may have been deleted after its line was written.

URLs are written here without credentials (`redact`); what differs in user and password only is one
URL.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from preprocess.fetch.locks import lock_file
from preprocess.fetch.packs import PACK_BYTES, PackStore, Place
from shardspec import storage
from shardspec.documents import read_fields, read_json
from shardspec.errors import ConfigError, StorageError, redacted_url

logger = logging.getLogger(__name__)

SYNC_LINES = 1000
SYNC_INTERVAL_S = 5.0
"""The ledger is flushed to disk after this many lines or seconds, which a power cut may cost. A
killed process loses nothing, since every line is passed to the kernel at once."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_USERINFO = re.compile(r"^(\s*(?:[a-zA-Z][a-zA-Z0-9+.-]*:)?[/\\]*)[^/?#\\]*@")
"""What the library that requests a URL takes for the user, whatever characters it has."""


def redact(url: str) -> str:
    """Replaces the credentials in a URL; a URL without any comes back as it is.

    Signatures and tokens become hashes, so that two URLs that differ in them stay two.

    >>> redact("https://me:secret@example.com/a.jpg?size=@2x")
    'https://***@example.com/a.jpg?size=@2x'
    """
    text = redacted_url(_USERINFO.sub(r"\1***@", url))
    # Of half a character, no line of a ledger could be read again.
    return text.encode(errors="backslashreplace").decode()


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchResult:
    """How one URL ended; a line of the ledger."""

    url: str
    """The requested URL, redacted."""
    status: Literal["ok", "failed"]
    reason: str = ""
    """Class of the failure (`preprocess.fetch.download`); "" for ok, or "sha_mismatch" where only
    warned."""
    http_status: int | None = None
    """Status of the last answer; None where there was none."""
    sha256: str | None = None
    """Of the body, also where its content was refused; None where no whole body came."""
    num_bytes: int = 0
    """Length of that body."""
    attempts: int = 0
    """Times the URL was requested in the run that wrote this, redirects not counted; or the
    robots.txt in front of it, where that gave no answer."""
    content_type: str = ""
    """As the server reports it; nothing depends on it."""
    final_url: str = ""
    """Where the redirects led, redacted; or whose host asked for a pause or is private; else ""."""
    finished_unix_s: int = 0
    """When this was written, for failures that expire; 0 in ledgers of older releases."""
    not_before_unix_s: int = 0
    """When the host may be asked again, if it has asked for a pause that is not over; else 0."""
    limit: int = 0
    """Of "too_big" and "too_many_redirects": what was set."""
    opt_outs_ignored: bool = False
    """Whether robots.txt or X-Robots-Tag were not looked at."""


LOCAL_CACHE = "~/.cache/vlm-shards"
"""Where images are kept by default; and what has to be on a disk, where they are in a store."""


class BlobCache:
    """Contents by their sha256, in a folder or a store that any number of processes share."""

    def __init__(self, root: str | Path, *, pack_bytes: int = PACK_BYTES) -> None:
        """Names the folder or URL; a folder is created by the first `put`.

        Args:
          root: The folder or URL.
          pack_bytes: Length from which the file is full that contents are appended to.
        """
        self.url, self._pack_bytes = str(root), pack_bytes
        local = storage.local_path(self.url if storage.is_local(self.url) else LOCAL_CACHE)
        if not storage.is_local(self.url):
            key = hashlib.sha256(storage.absolute_url(self.url).encode()).hexdigest()[:16]
            local = local / "stores" / key
        self._packs = PackStore(self.url, local=local, pack_bytes=pack_bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        # In another process, only what is published is there.
        return partial(BlobCache, pack_bytes=self._pack_bytes), (self.url,)

    @property
    def root(self) -> Path:
        """The folder, where it is a local one."""
        return storage.local_path(self.url)

    def _file_url(self, sha256: str) -> str:
        """Names the file that older releases had for a content."""
        return storage.join(self.url, "blobs", sha256[:2], sha256)

    @cached_property
    def _has_files(self) -> bool:
        return storage.exists(storage.join(self.url, "blobs"))

    def has(self, sha256: str, *, num_bytes: int | None = None) -> bool:
        """Returns True if a blob exists (with that length); its content is not read.

        Raises:
          ConfigError: `bad_sha256`: not 64 lower-case hexadecimal digits.
        """
        if any(num_bytes in (None, place.num_bytes) for place in self._find(sha256)):
            return True
        got = storage.size(self._file_url(sha256)) if self._has_files else None
        return got is not None and num_bytes in (None, got)

    def put(self, payload: bytes) -> str:
        """Stores a content and returns its sha256; a damaged copy of it is replaced.

        Raises:
          StorageError: The disk refused; nothing appeared.
        """
        sha256 = hashlib.sha256(payload).hexdigest()
        if self._read_packed(sha256, damaged=[]) is None:
            self._packs.append(sha256, payload)
        return sha256

    def get(self, sha256: str) -> bytes:
        """Reads a content and checks it.

        A damaged blob is removed, so that the next FETCH downloads it again.

        Raises:
          StorageError: `blob_missing` or `blob_corrupt`.
        """
        damaged: list[StorageError] = []
        payload = self._read_packed(sha256, damaged=damaged)
        if payload is None:
            payload = self._read_file(sha256)
        if payload is None:
            self._packs.refresh()
            payload = self._read_packed(sha256, damaged=damaged)
        if payload is not None:
            return payload
        where = f"{self.url} (sha256 {sha256})"
        raise damaged[0] if damaged else StorageError("blob_missing", where=where)

    def refresh(self) -> None:
        """Looks for what other processes have put, and what dead ones have left.

        Raises:
          StorageError: The disk or store refused.
        """
        self._packs.refresh()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Shows other processes at the end what was put in the block.

        After an exception, whoever looks for blobs next finds what was put: to publish it could
        take long, or fail for the same reason.

        Raises:
          StorageError: The disk or store refused.
        """
        try:
            yield
        except BaseException:
            self._packs.release()
            raise
        self._packs.flush()

    def _find(self, sha256: str) -> list[Place]:
        if not _SHA256.fullmatch(sha256):
            raise ConfigError("bad_sha256", got=repr(sha256))
        return self._packs.find(sha256)

    def _read_packed(self, sha256: str, *, damaged: list[StorageError]) -> bytes | None:
        """Reads the first copy that is right; the others that it met are marked, and listed."""
        for place in self._find(sha256):
            payload = self._packs.read(place)
            if payload is None:
                continue
            got = hashlib.sha256(payload).hexdigest()
            if got == sha256:
                return payload
            self._packs.mark_damaged(place)
            damaged.append(_corrupt(f"{self._packs.pack_url(place.pack)}:{place.start}", payload))
        return None

    def _read_file(self, sha256: str) -> bytes | None:
        if not self._has_files:
            return None
        url = self._file_url(sha256)
        try:
            payload = storage.read_bytes(url)
        except FileNotFoundError:
            return None
        if hashlib.sha256(payload).hexdigest() != sha256:
            storage.delete(url)
            raise _corrupt(url, payload)
        return payload

    def leave_token(self, name: str) -> None:
        """Leaves a mark by which another machine can tell that it sees the same cache."""
        storage.publish_bytes(storage.join(self.url, "tokens", name), b"")

    def has_token(self, name: str) -> bool:
        """Returns True if somebody has left this mark here."""
        return storage.exists(storage.join(self.url, "tokens", name), fresh=True)

    def remove_tokens(self, prefix: str) -> None:
        """Removes the marks whose names begin like this."""
        folder = storage.join(self.url, "tokens")
        names = [name for name in storage.list_names(folder) if name.startswith(prefix)]
        storage.delete_objects(folder, names)


class Ledger:
    """The append-only record of finished URLs, held in memory and open for one writer.

    Use it as a context manager, or call `close`.
    """

    def __init__(self, path: str | Path) -> None:
        """Loads the ledger and opens it for appending; it is created where there is none.

        Raises:
          StorageError: `ledger_locked`: another process writes it; `ledger_corrupt` (see
            `read_ledger`); `ledger_io`.
        """
        self.path = Path(path)
        self._unsynced = 0
        self._synced_at_s = time.monotonic()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise _io_error(self.path, error) from error
        try:
            _lock(self._fd, self.path)
            self._results, good_bytes = _parse(self.path)
            os.ftruncate(self._fd, good_bytes)
        except BaseException:
            os.close(self._fd)
            raise

    def __len__(self) -> int:
        return len(self._results)

    def __iter__(self) -> Iterator[FetchResult]:
        """Iterates the last result of each URL, in the order of their first lines."""
        return iter(self._results.values())

    def get(self, url: str) -> FetchResult | None:
        """Returns the last result of a URL, or None."""
        return self._results.get(redact(url))

    def append(self, result: FetchResult) -> None:
        """Records a result; it survives the death of the process from here on.

        Raises:
          StorageError: `ledger_io`: the disk refused the line.
        """
        line = json.dumps(dataclasses.asdict(result), separators=(",", ":")).encode() + b"\n"
        try:
            if os.write(self._fd, line) != len(line):
                # The next write would say why; it would also join two lines.
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._unsynced += 1
            if self._unsynced >= SYNC_LINES or self._age_s() >= SYNC_INTERVAL_S:
                self.sync()
        except OSError as error:
            raise _io_error(self.path, error) from error
        self._results[result.url] = result

    def sync(self) -> None:
        """Flushes the lines so far to disk."""
        os.fsync(self._fd)
        self._unsynced = 0
        self._synced_at_s = time.monotonic()

    def close(self) -> None:
        """Flushes and closes; a second call does nothing."""
        if self._fd < 0:
            return
        try:
            self.sync()
        finally:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _age_s(self) -> float:
        return time.monotonic() - self._synced_at_s


def read_ledger(path: str | Path) -> dict[str, FetchResult]:
    """Reads a ledger without opening it for writing: the last result of each redacted URL.

    Raises:
      FileNotFoundError: There is none.
      StorageError: `ledger_corrupt`: a line other than a torn last one cannot be read.
    """
    return _parse(Path(path))[0]


def encode_results(results: Mapping[str, FetchResult]) -> bytes:
    """Writes results by URL as lines, sorted."""
    lines = sorted((redact(url), dataclasses.asdict(result)) for url, result in results.items())
    return b"".join(json.dumps(fields).encode() + b"\n" for _, fields in lines)


def decode_results(payload: bytes) -> dict[str, FetchResult]:
    """Reads what `encode_results` has written; results by redacted URL.

    Raises:
      ValueError: A line is damaged.
    """
    results = [read_fields(FetchResult, read_json(line)) for line in payload.splitlines()]
    return {result.url: result for result in results}


def _parse(path: Path) -> tuple[dict[str, FetchResult], int]:
    """Parses a ledger; returns the results and the length in bytes of its whole lines."""
    results: dict[str, FetchResult] = {}
    good_bytes = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.endswith(b"\n"):
                logger.warning("dropped the torn last line of %s; its URL is fetched again", path)
                break
            try:
                result = read_fields(FetchResult, read_json(line))
            except ValueError as error:
                raise StorageError(
                    "ledger_corrupt", where=f"{path}:{number}", error=error
                ) from error
            # Older releases wrote signatures as they were.
            url = redact(result.url)
            results[url] = dataclasses.replace(result, url=url)
            good_bytes += len(line)
    return results, good_bytes


def _corrupt(where: str, payload: bytes) -> StorageError:
    got = hashlib.sha256(payload).hexdigest()
    return StorageError("blob_corrupt", where=where, got_sha256=got, num_bytes=len(payload))


def _lock(fd: int, path: Path) -> None:
    try:
        lock = lock_file(fd)
    except OSError as error:
        raise _io_error(path, error) from error
    if lock == "busy":
        raise StorageError("ledger_locked", where=str(path))
    if lock == "no_locks":
        logger.warning("this file system has no locks: see that only one job writes %s", path)


def _io_error(path: Path, error: OSError) -> StorageError:
    return StorageError("ledger_io", where=str(path), error=error)
