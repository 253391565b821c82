"""Transfers: the ranges that are being read, how far they are, and which versions are meant.

Bookkeeping that all ways of reading share (`client_ranges`, `signed_ranges`): it makes no request.

1. A response must be for the very range: status, Content-Range and the object's length are checked
   before a byte is used (`check_response`).
2. The version of an object (ETag, or generation) is pinned when it is first read. Later ranges
   request that version, and another one is refused, so that no sample is ever pieced together from
   two versions.
3. What an error means for the caller is decided here too (`lasting_error`, `exhausted_error`).
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from shardspec.errors import ShardError, StorageError
from shardspec.storage.failures import refusal_of
from shardspec.storage.retries import RetryPolicy

_LEAST_BYTES_PER_S = 100
"""A connection that is slower for `RetryPolicy.idle_s` is abandoned as a silent one is: some
proxies keep a broken one alive, byte by byte. No link that training could use is that slow."""


@dataclass(slots=True, kw_only=True)
class Transfer:
    """A range that is being read; changes meanwhile."""

    url: str
    start: int
    stop: int
    received: int = 0
    """Bytes that have arrived."""
    attempts: int = 0
    causes: Counter[str] = field(default_factory=Counter)
    """Failed attempts by kind of failure."""
    since_s: float | None = None
    """When the speed of the attempt was last judged, in seconds of the monotonic clock; None before
    its first byte."""
    recent_bytes: int = 0
    """What has arrived since then."""

    @property
    def position(self) -> int:
        """The first missing byte of the object."""
        return self.start + self.received


class BadResponse(Exception):
    """A response that is not what was requested; named by its kind, and worth another attempt."""


class HttpRefusal(Exception):
    """A status that is not a success."""

    def __init__(self, status: int, headers: Mapping[str, str]) -> None:
        super().__init__(f"HTTP status {status}")
        self.status, self.headers = status, headers


class VersionChanged(Exception):
    """The object exists in another version than before."""


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """What a response says of its body."""

    content_range: str | None
    length: int | None
    """Of the body."""
    version: str | None


class Transfers:
    """What the threads of one reader share; safe to use from any of them.

    `_lock` guards `_in_flight`, `counters` and `Transfer.received`. It is held for a few
    instructions, never during I/O.
    """

    def __init__(self, *, idle_s: float) -> None:
        """Begins with nothing in flight.

        Args:
          idle_s: As of the policy.
        """
        self._idle_s = idle_s
        self._lock = threading.Lock()
        # By identity: two threads may read equal ranges. An entry is present while a thread is
        # inside of `tracked`, so ids are unique.
        self._in_flight: dict[int, Transfer] = {}
        # Without the lock: only `setdefault` writes here, which is atomic, and an entry never
        # changes. Threads that read an object first at the same time compare with whichever won.
        self._pins: dict[str, str] = {}
        # Read without the lock: it may be one chunk old, and only ever grows.
        self._progress_s = time.monotonic()
        self.counters: Counter[str] = Counter()
        """requests, bytes, retries, and `retry_KIND` by kind of failure."""

    @contextmanager
    def tracked(self, transfer: Transfer) -> Iterator[None]:
        """Lists a range as in flight for the duration of the block."""
        with self._lock:
            self._in_flight[id(transfer)] = transfer
        try:
            yield
        finally:
            with self._lock:
                del self._in_flight[id(transfer)]

    def in_flight(self) -> list[Transfer]:
        """Lists what is being read now, the longest in flight first."""
        with self._lock:
            return list(self._in_flight.values())

    @property
    def quiet_s(self) -> float:
        """Seconds since the last byte of any range arrived."""
        return time.monotonic() - self._progress_s

    def count(self, name: str, number: int = 1) -> None:
        """Adds to a counter."""
        with self._lock:
            self.counters[name] += number

    def arrived(self, transfer: Transfer, num_bytes: int) -> None:
        """Records bytes that are in their place.

        Raises:
          BadResponse: "slow", hardly any have arrived for `idle_s`.
        """
        now_s = time.monotonic()
        with self._lock:
            transfer.received += num_bytes
            self.counters["bytes"] += num_bytes
            self._progress_s = now_s
        if transfer.since_s is None:
            transfer.since_s = now_s
        transfer.recent_bytes += num_bytes
        passed_s = now_s - transfer.since_s
        if passed_s < self._idle_s:
            return
        is_slow = transfer.recent_bytes < _LEAST_BYTES_PER_S * passed_s
        transfer.since_s, transfer.recent_bytes = now_s, 0
        if is_slow and transfer.position < transfer.stop:
            raise BadResponse("slow")

    def pin(self, url: str) -> str | None:
        """Returns the version of an object that must be read; None where any may be."""
        return self._pins.get(url)

    def check_version(self, url: str, version: str | None) -> None:
        """Pins the version of an object, or compares it with the pinned one.

        Raises:
          VersionChanged: It is another one.
        """
        if version is not None and self._pins.setdefault(url, version) != version:
            raise VersionChanged

    def check_response(self, head: ResponseHead, transfer: Transfer, total: int | None) -> None:
        """Checks that a response is for the missing rest of a range, and of the right object.

        Raises:
          BadResponse: It is for other bytes.
          ShardError: `shard_size`, the object's length is not `total`.
          VersionChanged: It is of another version.
        """
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", head.content_range or "")
        length: int | None
        if found is not None:
            first, stop = int(found[1]), int(found[2]) + 1
            length = total if found[3] == "*" else int(found[3])
        else:
            # Without the header only a whole object can be told from a wrong part.
            first, stop, length = 0, head.length or 0, head.length or 0
        if total is not None and length != total:
            raise wrong_size(transfer.url, length, total)
        requested = (transfer.position, transfer.stop)
        if (first, stop) != requested or head.length not in (None, stop - first):
            raise BadResponse("wrong_range")
        self.check_version(transfer.url, head.version)


def wait_limit(*, idle_s: float, limit_s: float) -> Callable[[], float]:
    """Makes a function that returns how long to wait now for the next bytes, in seconds.

    Args:
      idle_s: Longest wait for any of them.
      limit_s: Longest time for all of them, from now on.
    """
    stop_s = time.monotonic() + limit_s
    return lambda: max(0.001, min(idle_s, stop_s - time.monotonic()))


def lasting_error(error: Exception, transfer: Transfer) -> Exception:
    """Translates a failure that no further attempt would cure."""
    if isinstance(error, ShardError | StorageError | FileNotFoundError):
        return error
    refusal = refusal_of(error)
    status = None if refusal is None else refusal.status
    span = f"{transfer.start}-{transfer.stop}"
    if isinstance(error, VersionChanged) or status == 412:
        return StorageError("object_changed", where=transfer.url, range=span)
    if status == 404:
        return FileNotFoundError(transfer.url)
    code = "" if refusal is None else refusal.code
    facts = {"status": status, "code": code, "error": error}
    facts = {name: value for name, value in facts.items() if value}
    if status in (401, 403) or isinstance(error, PermissionError):
        return StorageError("permission.answer", where=transfer.url, facts=facts)
    if status == 416:
        return ShardError("shard_size.object", where=transfer.url, range=span)
    return StorageError("storage_failed", where=transfer.url, facts=facts)


def exhausted_error(
    error: Exception, transfer: Transfer, policy: RetryPolicy, *, seconds: float
) -> StorageError:
    """Makes the error of a range whose attempts are used up; `error` is that of the last one."""
    causes = ", ".join(f"{kind} x {n}" for kind, n in sorted(transfer.causes.items()))
    return StorageError(
        "range_failed",
        where=transfer.url,
        attempts=transfer.attempts,
        limit_s=policy.limit_s,
        range=f"{transfer.start}-{transfer.stop}",
        received_bytes=transfer.received,
        seconds=f"{seconds:.1f}",
        causes=causes,
        last=repr(error),
    )


def wrong_size(url: str, got: int | None, want: int) -> ShardError:
    """Makes the error of an object that is shorter or longer than its manifest says."""
    return ShardError("shard_size.file", where=url, got_bytes=got, want_bytes=want)
