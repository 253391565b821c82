"""RangeReader: bytes [start, stop) of an object in a store, right even where the network is not.

1. On S3 each object has a signed URL (signing.py; the client's own where that cannot), and ranges
   of it are asked for over connections of ours (wire.py), at a third of the processor time. What
   that does not get (a proxy is in the way, the bucket lies in another region, the signature has
   expired) the client is asked for itself, as every other store's is. Its own retries are off:
   those of botocore and s3fs would multiply with ours (5 x 5 x ours), and would throw away what had
   already come.
2. The answer must be for the very range: status, Content-Range and the object's length are checked
   before a byte is used. What arrives is written straight to its place.
3. When the connection is lost, stalls, or the store asks for patience (408, 425, 429, 5xx), the
   range is asked for again *from the first missing byte on*, after an exponential wait with full
   jitter, or after Retry-After where the answer has it. Other refusals are final.
4. A range is given up after `attempts` attempts in a row that brought nothing, or after `wall_s`.
5. The version of an object (ETag, or generation) is pinned when it is first touched: later ranges
   ask for that version, and another one is refused (`object_changed`), so that no sample is ever
   pieced together from two versions.

Safe to share between threads; a forked or spawned child makes clients of its own. What is in
flight can be looked at (`in_flight`), and everything is counted (`counters`).
"""

from __future__ import annotations

import asyncio
import os
import re
import ssl
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from shardspec.errors import ShardError, StorageError
from shardspec.storage import files
from shardspec.storage.connections import Answer as WireAnswer
from shardspec.storage.connections import Connections, shared_connections
from shardspec.storage.failures import refusal_of, transient_error_kind
from shardspec.storage.retries import Attempts, RetryPolicy, retry_after_s
from shardspec.storage.signing import Signer, make_signer

_T = TypeVar("_T")

_CHUNK_BYTES = 256 * 1024
_CONNECTIONS = 64
"""Connections that a client keeps; botocore's default of 10 would queue the rest."""

_SIGNED_S = 3600
"""How long a signed URL is valid; half of it is used, as clocks differ."""
_MOST_SIGNED = 4096
_MOST_REFUSALS = 3
_NEW_S = 60.0

_ASK_CLIENT = frozenset({301, 302, 307, 308, 400, 401, 403})
"""Answers to a signed URL that the client may know a way around, or else explains better."""

_REBUILD = "run `make verify`, then build it again with the `make shards` command that made it"


@dataclass(slots=True, kw_only=True)
class Flight:
    """A range that is being read; changes while it is."""

    url: str
    start: int
    stop: int
    received: int = 0
    """Bytes that have arrived."""
    attempts: int = 0
    causes: Counter[str] = field(default_factory=Counter)
    """What attempts failed of, by kind."""


class RangeReader:
    """Reads ranges of objects. Counts what it does; remembers versions, but no bytes."""

    def __init__(self, policy: RetryPolicy | None = None) -> None:
        """Opens nothing yet.

        Args:
          policy: How long to try; None: the defaults.
        """
        self.policy = policy or RetryPolicy()
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._flights: dict[int, Flight] = {}
        # The clients that they were made after are kept with them: ids are unique while they live.
        self._stores: dict[tuple[int, bool], tuple[Any, _Store]] = {}
        self._pins: dict[str, str] = {}
        self._progress_s = time.monotonic()
        self.counters: Counter[str] = Counter()
        """requests, bytes, retries, and `retry_KIND` by what failed."""

    def __getstate__(self) -> dict[str, Any]:
        return {"policy": self.policy}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.policy = state["policy"]
        self._begin()

    def read(self, url: str, start: int, stop: int, *, total: int | None = None) -> bytearray:
        """Reads bytes [start, stop) of an object.

        Args:
          url: Of the object; no local path.
          start, stop: 0 <= start <= stop.
          total: Length that the object must have, where it is known.

        Raises:
          FileNotFoundError: There is no such object.
          ShardError: `shard_size`, the object's length is not `total`.
          StorageError: `range_failed`, given up; `object_changed`; `permission`; `storage_failed`.
        """
        target = bytearray(stop - start)
        self.read_into(url, start, memoryview(target), total=total)
        return target

    def read_into(
        self, url: str, start: int, target: memoryview, *, total: int | None = None
    ) -> None:
        """Reads as many bytes as `target` has, from `start` on; errors as `read`."""
        if len(target):
            flight = Flight(url=url, start=start, stop=start + len(target))
            self._try(flight, lambda limit_s: self._part(flight, target, total, limit_s))

    def read_all(self, url: str) -> bytes:
        """Reads a whole small object, whose length need not be known; errors as `read`."""
        flight = Flight(url=url, start=0, stop=0)
        found: list[bytes] = []
        self._try(flight, lambda limit_s: found.append(self._whole(flight, limit_s)))
        return found[-1]

    def connect_soon(self, url: str, number: int) -> None:
        """Begins to open connections to an object's store, where they are ours; returns at once.

        Args:
          url: Of an object.
          number: How many there shall be, for all who read from that store in this process.
        """

        def connect() -> None:
            # Whatever fails here, who reads from the store meets it, and can say what it means.
            with suppress(Exception):
                store, _ = self._store(url)
                if isinstance(store, _S3):
                    store.connect_soon(number)

        threading.Thread(target=connect, name="connect", daemon=True).start()

    def count(self, name: str, number: int = 1) -> None:
        """Adds to a counter, from any thread."""
        with self._lock:
            self.counters[name] += number

    def in_flight(self) -> list[Flight]:
        """Lists what is being read now, the longest in flight first."""
        with self._lock:
            return list(self._flights.values())

    @property
    def quiet_s(self) -> float:
        """Seconds since the last byte of any range arrived."""
        return time.monotonic() - self._progress_s

    def _try(self, flight: Flight, attempt: Callable[[float], None]) -> None:
        """Makes attempts, each within so many seconds, until one succeeds or none may follow."""
        if self._pid != os.getpid():
            # A forked child: connections, threads and locks are the parent's.
            self._begin()
        with self._lock:
            self._flights[id(flight)] = flight
        try:
            self._insist(flight, attempt)
        finally:
            with self._lock:
                del self._flights[id(flight)]

    def _insist(self, flight: Flight, attempt: Callable[[float], None]) -> None:
        attempts = Attempts(self.policy, where=flight.url)
        while True:
            before = flight.received
            flight.attempts += 1
            self.count("requests")
            try:
                return attempt(max(attempts.left_s, 0.001))
            except Exception as error:
                kind = str(error) if isinstance(error, _Garbled) else transient_error_kind(error)
                if kind is None:
                    raise _final(error, flight) from error
                flight.causes[kind] += 1
                refusal = refusal_of(error)
                wait_s = attempts.failed(
                    has_progress=flight.received > before,
                    least_s=0.0 if refusal is None else retry_after_s(refusal.headers),
                )
                if wait_s is None:
                    raise _given_up(error, flight, self.policy, attempts.passed_s) from error
                time.sleep(wait_s)
                self.count("retries")
                self.count(f"retry_{kind}")

    def _part(self, flight: Flight, target: memoryview, total: int | None, limit_s: float) -> None:
        store, path = self._store(flight.url)
        if isinstance(store, _Plain):
            store.fetch(path, flight, target, total, self._pins)
            return self._arrived(flight, len(target) - flight.received)
        if isinstance(store, _S3) and (
            self._receive_signed(store, path, flight, target, total, limit_s) is not None
        ):
            return None
        return _run(self._receive(store, path, flight, target, total, limit_s), store)

    def _whole(self, flight: Flight, limit_s: float) -> bytes:
        store, path = self._store(flight.url)
        if isinstance(store, _Plain):
            payload = bytes(store.fs.cat_file(path))
            self._arrived(flight, len(payload))
            return payload
        if isinstance(store, _S3):
            found = self._receive_signed(store, path, flight, None, None, limit_s)
            if found is not None:
                return bytes(found)
        return _run(self._receive_all(store, path, flight, limit_s), store)

    def _receive_signed(
        self,
        store: _S3,
        path: str,
        flight: Flight,
        target: memoryview | None,
        total: int | None,
        limit_s: float,
    ) -> memoryview | None:
        """Reads by a signed URL, into `target` or the whole object into new memory.

        Returns:
          Where it was read to; None where the client has to be asked instead.
        """
        stop_s = time.monotonic() + limit_s

        def wait_s() -> float:
            return max(0.001, min(self.policy.idle_s, stop_s - time.monotonic()))

        url, connections = store.signed(path, limit_s), store.connections
        if url is None or connections is None:
            return None
        headers = {}
        if target is not None:
            headers["Range"] = f"bytes={flight.start + flight.received}-{flight.stop - 1}"
            if flight.url in self._pins:
                headers["If-Match"] = self._pins[flight.url]
        try:
            with connections.get(url, headers, wait_s=wait_s) as answer:
                if answer.status in (200, 206):
                    return self._take(answer, flight, target, total)
                refused = _Refused(answer.status, dict(answer.headers.items()))
        except ssl.SSLCertVerificationError:
            store.connections = None  # the client may trust other certificates
            return None
        except OSError as error:
            if (
                transient_error_kind(error) is None
            ):  # a broken record, no descriptor, no buffer, no route
                raise _Garbled("reset") from error
            raise
        # Behind the block: a short refusal has been read there, and costs no connection.
        if refused.status in _ASK_CLIENT:
            store.refused(path)
            return None
        raise refused

    def _take(
        self, answer: WireAnswer, flight: Flight, target: memoryview | None, total: int | None
    ) -> memoryview | None:
        """Receives a body; without a target the whole object's, if its length is known."""
        found = answer.headers
        head = _Head(found.get("Content-Range"), answer.length, found.get("ETag"))
        if target is None:
            if head.length is None:
                return None
            flight.received, flight.stop = 0, head.length
            target = memoryview(bytearray(head.length))
        else:
            self._check(head, flight, total)
        while flight.received < len(target):
            rest = target[flight.received : flight.received + _CHUNK_BYTES]
            num_bytes = answer.readinto(rest)
            if not num_bytes:
                raise _Garbled("short_body")
            self._arrived(flight, num_bytes)
        return target

    async def _receive_all(
        self, store: _Client, path: str, flight: Flight, limit_s: float
    ) -> bytes:
        flight.received, parts = 0, []
        async with self._asking(store, path, flight, None, limit_s) as (answer, wait_s):
            flight.stop = answer.head.length or 0
            while chunk := await asyncio.wait_for(answer.read(_CHUNK_BYTES), wait_s()):
                parts.append(chunk)
                self._arrived(flight, len(chunk))
            if answer.head.length is not None and flight.received != answer.head.length:
                raise _Garbled("short_body")
        return b"".join(parts)

    async def _receive(
        self,
        store: _Client,
        path: str,
        flight: Flight,
        target: memoryview,
        total: int | None,
        limit_s: float,
    ) -> None:
        async with self._asking(store, path, flight, flight.stop, limit_s) as (answer, wait_s):
            self._check(answer.head, flight, total)
            while flight.received < len(target):
                chunk = await asyncio.wait_for(answer.read(_CHUNK_BYTES), wait_s())
                end = flight.received + len(chunk)
                if not chunk:
                    raise _Garbled("short_body")
                if end > len(target):
                    raise _Garbled("wrong_range")
                target[flight.received : end] = chunk
                self._arrived(flight, len(chunk))

    @asynccontextmanager
    async def _asking(
        self, store: _Client, path: str, flight: Flight, stop: int | None, limit_s: float
    ) -> AsyncIterator[tuple[_Answer, Callable[[], float]]]:
        """Sends a request; gives the answer, and how long to wait for each part of its body."""
        stop_s = time.monotonic() + limit_s

        def wait_s() -> float:
            return max(0.001, min(self.policy.idle_s, stop_s - time.monotonic()))

        # Making a client is work of this machine, half a second where it is busy: no idle store.
        await asyncio.wait_for(self._prepare(store, path), limit_s)
        pin = None if stop is None else self._pins.get(flight.url)
        opening = store.open(path, flight.start + flight.received, stop, pin)
        answer = await asyncio.wait_for(opening.__aenter__(), wait_s())
        try:
            yield answer, wait_s
        finally:
            # What breaks while a broken connection is closed is no news.
            with suppress(OSError, asyncio.TimeoutError):
                await opening.__aexit__(None, None, None)

    async def _prepare(self, store: _Client, path: str) -> None:
        # Else every range that begins before the first client is there makes one more.
        async with store.preparing:
            await store.prepare(path)

    def _arrived(self, flight: Flight, num_bytes: int) -> None:
        with self._lock:
            flight.received += num_bytes
            self.counters["bytes"] += num_bytes
            self._progress_s = time.monotonic()

    def _check(self, head: _Head, flight: Flight, total: int | None) -> None:
        """Refuses an answer that is not for the range, or not of the object that was meant."""
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", head.content_range or "")
        length: int | None
        begin = flight.start + flight.received
        if found is not None:
            first, stop = int(found[1]), int(found[2]) + 1
            length = total if found[3] == "*" else int(found[3])
        else:
            # Without the header only a whole object can be told from a wrong part.
            first, stop, length = 0, head.length or 0, head.length or 0
        if total is not None and length != total:
            raise _wrong_size(flight.url, length, total)
        if (first, stop) != (begin, flight.stop) or head.length not in (None, stop - first):
            raise _Garbled("wrong_range")
        _check_pin(self._pins, flight.url, head.version)

    def _store(self, url: str) -> tuple[_Store, str]:
        shared, path = files.filesystem(url)
        # S3 Express, Outposts and access points of several regions have signatures or addresses of
        # their own, which only the client knows how to choose.
        signs = not re.match(r"arn:|[^/]*--(x|op)-s3(/|$)", path)
        key = id(shared), signs
        with self._lock:
            if key not in self._stores:
                self._stores[key] = shared, _open_store(shared, self.policy, signs=signs)
            return self._stores[key][1], path


def _run(work: Coroutine[Any, Any, _T], store: _Client) -> _T:
    """Waits for a coroutine on the thread that fsspec keeps for its clients."""
    running = asyncio.run_coroutine_threadsafe(work, store.loop)
    try:
        return running.result()
    finally:
        running.cancel()


class _Garbled(Exception):
    """An answer that is not what was asked for; worth another attempt."""


class _Refused(Exception):
    """A status that is no success."""

    def __init__(self, status: int, headers: Mapping[str, str]) -> None:
        super().__init__(f"HTTP status {status}")
        self.status, self.headers = status, headers


class _Changed(Exception):
    """The object is there in another version."""


@dataclass(frozen=True, slots=True)
class _Head:
    """What an answer says of its body."""

    content_range: str | None
    length: int | None
    """Of the body."""
    version: str | None


class _Answer(Protocol):
    """The head of an answer, and its body bit by bit."""

    @property
    def head(self) -> _Head: ...

    async def read(self, most: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class _Body:
    head: _Head
    body: Any

    async def read(self, most: int) -> bytes:
        chunk: bytes = await self.body.read(most)
        return chunk


class _S3:
    """Amazon's protocol, through s3fs's client."""

    def __init__(self, shared: Any, policy: RetryPolicy, *, signs: bool) -> None:
        """Makes a client of the reader's own; `signs` lets URLs be signed as well."""
        config = {
            **({"signature_version": "s3v4"} if signs else {}),
            **shared.storage_options.get("config_kwargs", {}),
            "retries": {"total_max_attempts": 1},
            "connect_timeout": policy.idle_s,
            "read_timeout": policy.idle_s,
            "max_pool_connections": _CONNECTIONS,
        }
        self.fs = _own(shared, config_kwargs=config)
        self.loop = self.fs.loop
        self.preparing = asyncio.Lock()
        self.connections: Connections | None = None
        """For signed URLs; None until their store is known, and where there is no such way."""
        self._signs, self._idle_s = signs, policy.idle_s
        self._options = shared.storage_options
        self._lock = threading.Lock()
        self._signer: Signer | None = None
        self._has_looked = self._is_ready = False
        self._signed: dict[str, tuple[float, str | None]] = {}
        """Until when, in the monotonic clock's seconds, and the URL; None where there is none."""
        self._refusals: Counter[str] = Counter()
        """By bucket, of URLs that were new."""

    async def prepare(self, path: str) -> None:
        await self.fs.set_session()
        client = await self.fs.get_s3(self.fs.split_path(path)[0])
        if not self._is_ready:
            self._is_ready = True
            config, verify = client.meta.config, self.fs.client_kwargs.get("verify")
            if verify is None:
                verify = self.fs.session.get_config_variable("ca_bundle")
            has_way = not (config.proxies or config.client_cert or verify is False)
            if has_way and self._signer is None:
                self.connections = _way(client.meta.endpoint_url, verify)

    def signed(self, path: str, limit_s: float) -> str | None:
        """Gives a URL that an object can be had by; None where only the client can ask for it."""
        if not self._signs or self._refusals[self._bucket(path)] >= _MOST_REFUSALS:
            return None
        now_s = time.monotonic()
        stop_s, url = self._signed.get(path, (0.0, None))
        if stop_s > now_s:
            return url
        # Making a client is work of this machine, and credentials may need the user; later on only
        # a service that gives them is waited for.
        within_s = min(limit_s, self._idle_s) if self._signed else limit_s
        made, signer = None, self._find_signer()
        if signer is None:
            made = _run(asyncio.wait_for(self._sign(path), within_s), self)
        elif self.connections is not None:
            bucket, key, _ = self.fs.split_path(path)
            made = signer.sign(bucket, key, expires_s=_SIGNED_S, limit_s=within_s)
        if len(self._signed) >= _MOST_SIGNED:
            self._signed.clear()
        self._signed[path] = now_s + _SIGNED_S / 2, made
        return made

    def _find_signer(self) -> Signer | None:
        """Gives the signer that needs no client, if the store is one of those that have one."""
        with self._lock:
            if not self._has_looked:
                signer = make_signer(self._options)
                way = None if signer is None else _way(signer.endpoint, signer.ca_bundle)
                if way is not None:
                    self._signer, self.connections = signer, way
                self._has_looked = True
            return self._signer

    def connect_soon(self, number: int) -> None:
        """Begins to open connections, unless the client would first have to say where to."""
        signer = self._find_signer() if self._signs else None
        if signer is not None and self.connections is not None:
            self.connections.open_soon(signer.endpoint, number, wait_s=self._idle_s)

    def refused(self, path: str) -> None:
        """Drops the URL of an object that was refused; a bucket that refuses new ones gets no more.

        Old ones are refused when their credentials have expired.
        """
        stop_s, _ = self._signed.pop(path, (0.0, None))
        if stop_s - _SIGNED_S / 2 > time.monotonic() - _NEW_S:
            self._refusals[self._bucket(path)] += 1

    def _bucket(self, path: str) -> str:
        return path.partition("/")[0]

    async def _sign(self, path: str) -> str | None:
        async with self.preparing:
            await self.prepare(path)
        bucket, key, version = self.fs.split_path(path)
        client = await self.fs.get_s3(bucket)
        wanted = {"Bucket": bucket, "Key": key} | ({"VersionId": version} if version else {})
        if self.connections is None or wanted != self.fs._get_s3_method_kwargs(
            client.get_object, **wanted
        ):
            # Requester pays, keys of the caller's own: they travel in headers of the client's.
            return None
        url: str = await client.generate_presigned_url(
            "get_object", Params=wanted, ExpiresIn=_SIGNED_S
        )
        return url

    @asynccontextmanager
    async def open(
        self, path: str, start: int, stop: int | None, pin: str | None
    ) -> AsyncIterator[_Answer]:
        bucket, key, version = self.fs.split_path(path)
        client = await self.fs.get_s3(bucket)
        wanted = {"Bucket": bucket, "Key": key}
        if stop is not None:
            wanted["Range"] = f"bytes={start}-{stop - 1}"
        if version:
            wanted["VersionId"] = version
        if pin:
            wanted["IfMatch"] = pin
        answer = await client.get_object(
            **self.fs._get_s3_method_kwargs(client.get_object, **wanted)
        )
        body = answer["Body"]
        try:
            head = _Head(
                answer.get("ContentRange"), answer.get("ContentLength"), answer.get("ETag")
            )
            yield _Body(head, body)
        finally:
            body.close()


class _Http:
    """Plain HTTP ranges through an aiohttp session: Google's store and web servers."""

    def __init__(self, shared: Any, policy: RetryPolicy) -> None:
        del policy  # aiohttp retries nothing by itself
        self.fs = _own(shared)
        self.loop = self.fs.loop
        self.preparing = asyncio.Lock()
        self.is_google = hasattr(self.fs, "credentials")

    async def prepare(self, path: str) -> None:
        del path
        await (self.fs._set_session() if self.is_google else self.fs.set_session())

    @asynccontextmanager
    async def open(
        self, path: str, start: int, stop: int | None, pin: str | None
    ) -> AsyncIterator[_Answer]:
        wanted = {"Accept-Encoding": "identity"}
        if stop is not None:
            wanted["Range"] = f"bytes={start}-{stop - 1}"
        if self.is_google:
            request = self.fs.session.get(
                self.fs.url(path, generation=pin),
                headers=self.fs._get_headers(wanted),
                params=self.fs._get_params({}),
            )
        else:
            session = await self.fs.set_session()  # made before
            if pin:
                wanted["If-Match"] = pin
            options = {**self.fs.kwargs}
            options["headers"] = {**options.get("headers", {}), **wanted}
            request = session.get(self.fs.encode_url(path), **options)
        async with request as answer:
            if answer.status == 404 and pin:
                # Google's store forgets an old generation when a new one replaces it.
                raise _Changed
            if answer.status not in (200, 206):
                raise _Refused(answer.status, answer.headers)
            version = answer.headers.get("x-goog-generation") or answer.headers.get("ETag")
            head = _Head(
                answer.headers.get("Content-Range"),
                answer.content_length,
                None if (version or "").startswith("W/") else version,
            )
            yield _Body(head, answer.content)


class _Plain:
    """Any other file system of fsspec: one call for the whole range."""

    def __init__(self, shared: Any) -> None:
        self.fs = shared

    def fetch(
        self,
        path: str,
        flight: Flight,
        target: memoryview,
        total: int | None,
        pins: dict[str, str],
    ) -> None:
        found = self.fs.info(path)
        if total is not None and found["size"] != total:
            raise _wrong_size(flight.url, found["size"], total)
        names = ("ETag", "etag", "generation", "mtime", "created")
        _check_pin(pins, flight.url, str([found[name] for name in names if name in found]))
        chunk = self.fs.cat_file(path, start=flight.start, end=flight.stop)
        if len(chunk) != len(target):
            raise _Garbled("short_body")
        target[:] = chunk


_Client = _S3 | _Http
_Store = _Client | _Plain


def _open_store(shared: Any, policy: RetryPolicy, *, signs: bool) -> _Store:
    protocols = {shared.protocol} if isinstance(shared.protocol, str) else set(shared.protocol)
    if "s3" in protocols:
        return _S3(shared, policy, signs=signs)
    if protocols & {"gs", "http", "https"}:
        return _Http(shared, policy)
    return _Plain(shared)


def _way(endpoint: str, ca_file: object) -> Connections | None:
    """Opens a way of our own to a store; None where a proxy is in the way: the client knows it."""
    server = urlsplit(endpoint)
    proxy = urllib.request.getproxies().get(server.scheme)
    if proxy and not urllib.request.proxy_bypass(server.hostname or ""):
        return None
    return shared_connections(endpoint, ca_file=ca_file if isinstance(ca_file, str) else None)


def _own(shared: Any, **options: Any) -> Any:
    """Makes a client like the shared one that is ours alone, so that its settings may differ."""
    options = {**shared.storage_options, **options, "skip_instance_cache": True}
    return type(shared)(*shared.storage_args, **options)


def _check_pin(pins: dict[str, str], url: str, version: str | None) -> None:
    # Two threads that touch an object first at the same time compare with whoever was first.
    if version is not None and pins.setdefault(url, version) != version:
        raise _Changed


def _final(error: Exception, flight: Flight) -> Exception:
    """Says what a failure means that no further attempt would cure."""
    if isinstance(error, ShardError | StorageError | FileNotFoundError):
        return error
    refusal = refusal_of(error)
    status = None if refusal is None else refusal.status
    if isinstance(error, _Changed) or status == 412:
        return StorageError(
            "object_changed", where=flight.url, range=f"{flight.start}-{flight.stop}"
        )
    if status == 404:
        return FileNotFoundError(flight.url)
    code = "" if refusal is None else refusal.code
    facts = {"status": status, "code": code, "error": error}
    facts = {name: value for name, value in facts.items() if value}
    if status in (401, 403) or isinstance(error, PermissionError):
        return StorageError("permission.answer", where=flight.url, facts=facts)
    if status == 416:
        return ShardError(
            "shard_size.object", where=flight.url, range=f"{flight.start}-{flight.stop}"
        )
    return StorageError("storage_failed", where=flight.url, facts=facts)


def _given_up(
    error: Exception, flight: Flight, policy: RetryPolicy, seconds: float
) -> StorageError:
    causes = ", ".join(f"{kind} x {n}" for kind, n in sorted(flight.causes.items()))
    return StorageError(
        "range_failed",
        where=flight.url,
        attempts=flight.attempts,
        most_attempts=policy.attempts,
        wall_s=policy.wall_s,
        range=f"{flight.start}-{flight.stop}",
        received_bytes=flight.received,
        seconds=f"{seconds:.1f}",
        causes=causes,
        last=repr(error),
    )


def _wrong_size(url: str, got: int | None, want: int) -> ShardError:
    return ShardError("shard_size.file", where=url, got_bytes=got, want_bytes=want)
