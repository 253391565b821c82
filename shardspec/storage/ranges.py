"""RangeReader: bytes [start, stop) of an object in a store, right even where the network is not.

1. A range of an S3 object is read by a signed URL over kept connections (`signed_ranges`), of any
   other store through its client (`client_ranges`).
2. A response must be for the very range and of the pinned version (`transfers`).
3. When the connection is lost or stalls, or the store asks to wait (408, 425, 429, 5xx), the range
   is requested again *from the first missing byte on*, after an exponential wait with full jitter,
   or after Retry-After where the response has it. Other refusals are final.
4. A range is abandoned after `wall_s`, or after `attempts` attempts in a row without a new byte
   where that is set (`RetryPolicy`): an outage of `RetryPolicy.outage_s` is survived.

Safe to share between threads; a forked or spawned child makes clients of its own. What is in
flight can be looked at (`in_flight`), and everything is counted (`counters`).
"""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from shardspec.storage import files
from shardspec.storage.client_ranges import ClientReader, HttpClient, PlainReader, S3Client
from shardspec.storage.failures import refusal_of, transient_error_kind
from shardspec.storage.retries import (
    SYSTEM_CLOCK,
    Attempts,
    Clock,
    RetryPolicy,
    retry_after_s,
)
from shardspec.storage.signed_ranges import SignedReader, SignedUrls
from shardspec.storage.transfers import (
    BadResponse,
    Transfer,
    Transfers,
    exhausted_error,
    lasting_error,
)

_StoreReader = SignedReader | ClientReader | PlainReader


class RangeReader:
    """Reads ranges of objects. Counts what it does; remembers versions, but no bytes.

    A forked child inherits locks, threads and connections that are its parent's. So every read
    first compares `_pid`, and starts with empty state where it differs.
    """

    def __init__(self, policy: RetryPolicy | None = None, *, clock: Clock = SYSTEM_CLOCK) -> None:
        """Opens nothing yet.

        Args:
          policy: How long to try; None: the defaults.
          clock: Counts the time between attempts; a copy in another process has the system's.
        """
        self.policy, self._clock = policy or RetryPolicy(), clock
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        # Guards `_readers`. The shared clients are kept in it beside the readers that were made
        # for them: their ids are the keys, and are unique while they live.
        self._lock = threading.Lock()
        self._readers: dict[tuple[int, bool], tuple[Any, _StoreReader]] = {}
        self._transfers = Transfers(idle_s=self.policy.idle_s)

    def __getstate__(self) -> dict[str, Any]:
        return {"policy": self.policy}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.policy, self._clock = state["policy"], SYSTEM_CLOCK
        self._begin()

    @property
    def counters(self) -> Counter[str]:
        """requests, bytes, retries, and `retry_KIND` by kind of failure."""
        return self._transfers.counters

    @property
    def quiet_s(self) -> float:
        """Seconds since the last byte of any range arrived."""
        return self._transfers.quiet_s

    def count(self, name: str, number: int = 1) -> None:
        """Adds to a counter, from any thread."""
        self._transfers.count(name, number)

    def in_flight(self) -> list[Transfer]:
        """Lists what is being read now, the longest in flight first."""
        return self._transfers.in_flight()

    def read(self, url: str, start: int, stop: int, *, total: int | None = None) -> bytearray:
        """Reads bytes [start, stop) of an object.

        Args:
          url: Of the object; not a local path.
          start, stop: 0 <= start <= stop.
          total: Length that the object must have, where it is known.

        Raises:
          FileNotFoundError: There is no such object.
          ShardError: `shard_size`, the object's length is not `total`.
          StorageError: `range_failed`, abandoned; `object_changed`; `permission`; `storage_failed`.
        """
        target = bytearray(stop - start)
        self.read_into(url, start, memoryview(target), total=total)
        return target

    def read_into(
        self, url: str, start: int, target: memoryview, *, total: int | None = None
    ) -> None:
        """Reads as many bytes as `target` has, from `start` on; errors as `read`."""
        if len(target):
            transfer = Transfer(url=url, start=start, stop=start + len(target))

            def attempt(limit_s: float) -> None:
                reader, path = self._reader(url)
                reader.read_into(path, transfer, target, total, limit_s)

            self._retry(transfer, attempt)

    def read_all(self, url: str) -> bytes:
        """Reads a whole small object, whose length need not be known; errors as `read`."""
        transfer = Transfer(url=url, start=0, stop=0)
        payload = b""

        def attempt(limit_s: float) -> None:
            nonlocal payload
            reader, path = self._reader(url)
            payload = reader.read_all(path, transfer, limit_s)

        self._retry(transfer, attempt)
        return payload

    def connect_soon(self, url: str, number: int) -> None:
        """Begins to open connections to an object's store, where they are ours; returns at once.

        Args:
          url: Of an object.
          number: How many there shall be, for all who read from that store in this process.
        """

        def connect() -> None:
            # Whatever fails here fails again for the first read, which can say what it means.
            with suppress(Exception):
                reader, _ = self._reader(url)
                if isinstance(reader, SignedReader):
                    reader.urls.connect_soon(number)

        threading.Thread(target=connect, name="connect", daemon=True).start()

    def _retry(self, transfer: Transfer, attempt: Callable[[float], None]) -> None:
        """Makes attempts, each within some seconds, until one succeeds or none may follow."""
        if self._pid != os.getpid():
            self._begin()
        transfers = self._transfers
        attempts = Attempts(self.policy, where=transfer.url, clock=self._clock)
        with transfers.tracked(transfer):
            while True:
                before = transfer.received
                transfer.attempts += 1
                transfer.since_s, transfer.recent_bytes = None, 0
                transfers.count("requests")
                try:
                    return attempt(max(attempts.left_s, 0.001))
                except MemoryError:
                    raise
                except Exception as error:
                    is_bad = isinstance(error, BadResponse)
                    kind = str(error) if is_bad else transient_error_kind(error)
                    if kind is None:
                        raise lasting_error(error, transfer) from error
                    transfer.causes[kind] += 1
                    refusal = refusal_of(error)
                    wait_s = attempts.failed(
                        has_progress=transfer.received > before,
                        least_s=0.0 if refusal is None else retry_after_s(refusal.headers),
                    )
                    if wait_s is None:
                        raise exhausted_error(
                            error, transfer, self.policy, seconds=attempts.passed_s
                        ) from error
                    attempts.wait(wait_s)
                    transfers.count("retries")
                    transfers.count(f"retry_{kind}")

    def _reader(self, url: str) -> tuple[_StoreReader, str]:
        shared, path = files.filesystem(url)
        # S3 Express, Outposts and access points of several regions have signatures or addresses of
        # their own, which only the client knows how to choose.
        signs = not re.match(r"arn:|[^/]*--(x|op)-s3(/|$)", path)
        key = id(shared), signs
        with self._lock:
            if key not in self._readers:
                self._readers[key] = shared, self._open(shared, signs=signs)
            return self._readers[key][1], path

    def _open(self, shared: Any, *, signs: bool) -> _StoreReader:
        protocols = {shared.protocol} if isinstance(shared.protocol, str) else set(shared.protocol)
        transfers, idle_s = self._transfers, self.policy.idle_s
        if "s3" in protocols:
            client = S3Client(shared, self.policy, signs=signs)
            reader = ClientReader(client, transfers, idle_s=idle_s)
            if not signs:
                return reader
            urls = SignedUrls(client, idle_s=idle_s)
            return SignedReader(reader, urls, transfers, idle_s=idle_s)
        if protocols & {"gs", "http", "https"}:
            return ClientReader(HttpClient(shared), transfers, idle_s=idle_s)
        return PlainReader(shared, transfers)
