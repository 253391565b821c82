"""The ledger: one line per finished URL, appended; the last line of a URL wins.

It is append-only: a process that is killed can at worst tear the last line, which the next opening
drops, so that the URL is fetched again. A line is written after its blob is in place. Readers still
check the blob, since it may have been deleted after its line was written.

A ledger may be larger than memory: of each URL only the hash and the place of its line are held, 30
to 40 bytes, and a result is read when somebody asks for it.

URLs are written here without credentials (`redact`). What is one request (`request_of`) is one URL:
whoever asks finds the result under the spelling that he asked with.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import re
import time
import weakref
from array import array
from collections.abc import Callable, Iterator, Mapping, ValuesView
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from preprocess.fetch.locks import lock_file
from preprocess.fetch.urls import UrlSpool, read_line, read_lines, redact, request_of
from preprocess.hash_table import ABSENT, TEXT_BYTES, HashTable, text_hash
from shardspec.documents import read_fields, read_json
from shardspec.errors import StorageError

logger = logging.getLogger(__name__)

SYNC_LINES = 1000
SYNC_INTERVAL_S = 5.0
"""The ledger is flushed to disk after this many lines or seconds, which a power cut may cost. A
killed process loses nothing, since every line is passed to the kernel at once."""


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
    """Of the body, also where its content was refused; of that of an earlier run, where settings
    have refused it since; None where no whole body came."""
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
    ignored_opt_outs: str = ""
    """Which of them, by the names of the settings, separated by commas; "" in older ledgers."""
    num_redirects: int = 0
    """Of "ok": how many were followed; 0 in older ledgers."""
    private_hosts: str = ""
    """Of "ok": the hosts with private addresses that were asked, separated by commas; "" in older
    ledgers."""


_LATER = ("ignored_opt_outs", "num_redirects", "private_hosts")
"""Fields that a line lacks where they have their defaults, as it does in older ledgers."""
_TEXT = r'"([^"\\\x00-\x1f\x7f-\xff]*)"'
_NUMBER = "(0|[1-9][0-9]{0,17})"
_FORMS = {
    "url": _TEXT,
    "status": '"(ok|failed)"',
    "reason": _TEXT,
    "http_status": f"(?:null|{_NUMBER})",
    "sha256": f"(?:null|{_TEXT})",
    "num_bytes": _NUMBER,
    "attempts": _NUMBER,
    "content_type": _TEXT,
    "final_url": _TEXT,
    "finished_unix_s": _NUMBER,
    "not_before_unix_s": _NUMBER,
}
_USUAL_LINE = re.compile(
    "{"
    + "".join(f'"{name}": ?{form}, ?' for name, form in _FORMS.items())
    # Ledgers of older releases have no limit.
    + f'(?:"limit": ?{_NUMBER}, ?)?"opt_outs_ignored": ?(true|false)'
    + f'(?:, ?"ignored_opt_outs": ?{_TEXT})?(?:, ?"num_redirects": ?{_NUMBER})?'
    + f'(?:, ?"private_hosts": ?{_TEXT})?}}\n'
)
"""A line as it is written, without escapes: read at a tenth of the cost of JSON with all checks."""


class LedgerReader(Mapping[str, FetchResult]):
    """The last result of each URL of a file, by URL; whoever asks may leave credentials in it."""

    def __init__(self, descriptor: int, where: str) -> None:
        """Reads all lines once.

        Args:
          descriptor: The open file; it is closed with this object.
          where: Its name for messages.

        Raises:
          StorageError: `ledger_corrupt`: a line other than a torn last one cannot be read.
        """
        self._fd, self._where = descriptor, where
        weakref.finalize(self, os.close, descriptor)
        self._names = HashTable(TEXT_BYTES)
        self._places = array("Q")
        """Of each name: where its last line begins."""
        self.good_bytes = 0
        """Length of the whole lines."""
        for number, line in enumerate(read_lines(descriptor), start=1):
            if not line.endswith(b"\n"):
                logger.warning("dropped the torn last line of %s; its URL is fetched again", where)
                break
            try:
                usual = _USUAL_LINE.fullmatch(line.decode("latin-1"))
                url = usual[1] if usual else decode_result(line).url
            except ValueError as error:
                raise StorageError(
                    "ledger_corrupt", where=f"{where}:{number}", error=error
                ) from error
            self.note(url, self.good_bytes)
            self.good_bytes += len(line)

    def note(self, url: str, place: int) -> None:
        """Says where the last line of a URL begins."""
        number = self._names.add(text_hash(request_of(url)))
        if number < len(self._places):
            self._places[number] = place
        else:
            self._places.append(place)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, url: object) -> bool:
        return isinstance(url, str) and text_hash(request_of(url)) in self._names

    def __getitem__(self, url: str) -> FetchResult:
        number = self._names.find(text_hash(request_of(url)))
        if number == ABSENT:
            raise KeyError(url)
        return _renamed(self._read(number), redact(url))

    def __iter__(self) -> Iterator[str]:
        """Iterates redacted URLs, in the order of their first lines."""
        return (self._read(number).url for number in range(len(self)))

    def values(self) -> ValuesView[FetchResult]:
        """Gives the results, each of which is read when it is met."""
        return _Results(self, lambda: map(self._read, range(len(self))))

    def _read(self, number: int) -> FetchResult:
        place = self._places[number]
        try:
            return decode_result(read_line(self._fd, place))
        except ValueError as error:  # another process has written into it
            raise StorageError(
                "ledger_corrupt", where=f"{self._where}, byte {place}", error=error
            ) from error


class FetchResults(Mapping[str, FetchResult]):
    """How the URLs of a job have ended, each read from a ledger when it is asked for."""

    def __init__(self, urls: UrlSpool, known: Mapping[str, FetchResult]) -> None:
        """Names them.

        Args:
          urls: The URLs, each of which has a result.
          known: A ledger; may have results of other URLs too.
        """
        self._urls, self._known = urls, known

    def __len__(self) -> int:
        return len(self._urls)

    def __iter__(self) -> Iterator[str]:
        return iter(self._urls)

    def __getitem__(self, url: str) -> FetchResult:
        return self._known[url]


class _Results(ValuesView[FetchResult]):
    """Values of a mapping that come without their names."""

    def __init__(self, mapping: LedgerReader, read: Callable[[], Iterator[FetchResult]]) -> None:
        super().__init__(mapping)
        self._read = read

    def __iter__(self) -> Iterator[FetchResult]:
        return self._read()


class Ledger:
    """The append-only record of finished URLs, open for one writer.

    Use it as a context manager, or call `close`.
    """

    def __init__(self, path: str | Path) -> None:
        """Reads the ledger and opens it for appending; it is created where there is none.

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
            self.results = read_ledger(self.path)
            """What is known; it stays readable after `close`. A file of its own: a copy of this one
            would keep the lock."""
            os.ftruncate(self._fd, self.results.good_bytes)
        except BaseException:
            os.close(self._fd)
            raise

    def __len__(self) -> int:
        return len(self.results)

    def __iter__(self) -> Iterator[FetchResult]:
        """Iterates the last result of each URL, in the order of their first lines."""
        return iter(self.results.values())

    def get(self, url: str) -> FetchResult | None:
        """Returns the last result of a URL, or None."""
        return self.results.get(url)

    @property
    def num_bytes(self) -> int:
        """Length of the lines so far."""
        return os.fstat(self._fd).st_size

    def is_border(self, place: int) -> bool:
        """Returns True if a line begins at a place, or the last one ends."""
        return place == 0 or (place > 0 and os.pread(self._fd, 1, place - 1) == b"\n")

    def read(self, place: int) -> Iterator[FetchResult]:
        """Reads the results of all lines from a place on, which is a border.

        Raises:
          StorageError: `ledger_corrupt`: another process has written into it.
        """
        try:
            yield from map(decode_result, read_lines(self._fd, place))
        except ValueError as error:
            raise StorageError("ledger_corrupt", where=str(self.path), error=error) from error

    def append(self, result: FetchResult) -> None:
        """Records a result; it survives the death of the process from here on.

        Raises:
          StorageError: `ledger_io`: the disk refused the line.
        """
        line = encode_result(result)
        try:
            if os.write(self._fd, line) != len(line):
                # The next write would say why; it would also join two lines.
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            # Where there are no locks, another process may have written in between.
            place = os.lseek(self._fd, 0, os.SEEK_CUR) - len(line)
            self._unsynced += 1
            if self._unsynced >= SYNC_LINES or self._age_s() >= SYNC_INTERVAL_S:
                self.sync()
        except OSError as error:
            raise _io_error(self.path, error) from error
        self.results.note(result.url, place)

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


def read_ledger(path: str | Path) -> LedgerReader:
    """Reads a ledger without opening it for writing: the last result of each redacted URL.

    Raises:
      FileNotFoundError: There is none.
      StorageError: `ledger_corrupt`: a line other than a torn last one cannot be read.
    """
    return LedgerReader(os.open(path, os.O_RDONLY), str(path))


def encode_result(result: FetchResult) -> bytes:
    """Writes the line of a result."""
    fields = dataclasses.asdict(result)
    for name in _LATER:
        if not fields[name]:
            del fields[name]
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def decode_result(line: bytes) -> FetchResult:
    """Reads a line.

    Raises:
      ValueError: It is none.
    """
    if usual := _USUAL_LINE.fullmatch(line.decode("latin-1")):
        url, status, reason, http_status, sha256, num_bytes, attempts, kind, final, *rest = (
            usual.groups()
        )
        result = FetchResult(
            url=url,
            status="ok" if status == "ok" else "failed",
            reason=reason,
            http_status=None if http_status is None else int(http_status),
            sha256=sha256,
            num_bytes=int(num_bytes),
            attempts=int(attempts),
            content_type=kind,
            final_url=final,
            finished_unix_s=int(rest[0]),
            not_before_unix_s=int(rest[1]),
            limit=int(rest[2] or 0),
            opt_outs_ignored=rest[3] == "true",
            ignored_opt_outs=rest[4] or "",
            num_redirects=int(rest[5] or 0),
            private_hosts=rest[6] or "",
        )
    else:
        result = read_fields(FetchResult, read_json(line, any_text=True))
    return _renamed(result, redact(result.url))  # older releases wrote signatures as they were


def _renamed(result: FetchResult, url: str) -> FetchResult:
    return result if url == result.url else dataclasses.replace(result, url=url)


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
