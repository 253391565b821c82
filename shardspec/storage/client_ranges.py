"""Ranges of objects through the clients of fsspec, with their retries off.

* `S3Client` and `HttpClient` open the response to a request for a range; `ClientReader` receives
  its body straight into place, piece by piece. Clients run on fsspec's own event loop; callers are
  plain threads that wait for it.
* `PlainReader` serves every other file system, by one call for the whole range.

Retries of botocore and s3fs would multiply with ours (5 x 5 x ours), and would throw away what had
already arrived. So the clients here are copies of the shared ones with settings of their own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from shardspec.storage.retries import RetryPolicy
from shardspec.storage.transfers import (
    BadResponse,
    HttpRefusal,
    ResponseHead,
    Transfer,
    Transfers,
    VersionChanged,
    wait_limit,
    wrong_size,
)

_T = TypeVar("_T")

CHUNK_BYTES = 256 * 1024
"""Most bytes that are received at once."""

_CONNECTIONS = 64
"""Connections that a client keeps; botocore's default of 10 would queue the rest."""


@dataclass(frozen=True, slots=True)
class ClientResponse:
    """The head of a response, and its body piece by piece."""

    head: ResponseHead
    body: Any

    async def read(self, most: int) -> bytes:
        """Receives at most `most` bytes; none at the end of the body."""
        chunk: bytes = await self.body.read(most)
        return chunk


class S3Client:
    """The S3 protocol, through s3fs's client."""

    def __init__(self, shared: Any, policy: RetryPolicy, *, signs: bool) -> None:
        """Copies a shared file system; `signs` lets its client sign URLs as well."""
        config = {
            **({"signature_version": "s3v4"} if signs else {}),
            **shared.storage_options.get("config_kwargs", {}),
            "retries": {"total_max_attempts": 1},
            "connect_timeout": policy.idle_s,
            "read_timeout": policy.idle_s,
            "max_pool_connections": _CONNECTIONS,
        }
        self.fs = _copy_of(shared, config_kwargs=config)
        self.options = shared.storage_options
        self.loop = self.fs.loop
        self.preparing = asyncio.Lock()

    async def prepare(self, path: str) -> None:
        """Makes the client; hold `preparing`."""
        await self.fs.set_session()
        await self.fs.get_s3(self.fs.split_path(path)[0])

    @asynccontextmanager
    async def open(
        self, path: str, start: int, stop: int | None, pin: str | None
    ) -> AsyncIterator[ClientResponse]:
        """Requests bytes [start, stop) of a version, or the whole object where stop is None."""
        bucket, key, version = self.fs.split_path(path)
        client = await self.fs.get_s3(bucket)
        request = {"Bucket": bucket, "Key": key}
        if stop is not None:
            request["Range"] = f"bytes={start}-{stop - 1}"
        if version:
            request["VersionId"] = version
        if pin:
            request["IfMatch"] = pin
        response = await client.get_object(
            **self.fs._get_s3_method_kwargs(client.get_object, **request)
        )
        body = response["Body"]
        try:
            head = ResponseHead(
                response.get("ContentRange"), response.get("ContentLength"), response.get("ETag")
            )
            yield ClientResponse(head, body)
        finally:
            body.close()


class HttpClient:
    """Plain HTTP ranges through an aiohttp session: Google's store and web servers."""

    def __init__(self, shared: Any) -> None:
        """Copies a shared file system; aiohttp retries nothing by itself."""
        self.fs = _copy_of(shared)
        self.loop = self.fs.loop
        self.preparing = asyncio.Lock()
        self._is_google = hasattr(self.fs, "credentials")

    async def prepare(self, path: str) -> None:
        """Makes the session; hold `preparing`."""
        del path
        await (self.fs._set_session() if self._is_google else self.fs.set_session())

    @asynccontextmanager
    async def open(
        self, path: str, start: int, stop: int | None, pin: str | None
    ) -> AsyncIterator[ClientResponse]:
        """As `S3Client.open`."""
        headers = {"Accept-Encoding": "identity"}
        if stop is not None:
            headers["Range"] = f"bytes={start}-{stop - 1}"
        if self._is_google:
            request = self.fs.session.get(
                self.fs.url(path, generation=pin),
                headers=self.fs._get_headers(headers),
                params=self.fs._get_params({}),
            )
        else:
            session = await self.fs.set_session()  # returns the one that `prepare` made
            if pin:
                headers["If-Match"] = pin
            options = {**self.fs.kwargs}
            options["headers"] = {**options.get("headers", {}), **headers}
            request = session.get(self.fs.encode_url(path), **options)
        async with request as response:
            if response.status == 404 and pin:
                # Google's store forgets an old generation when a new one replaces it.
                raise VersionChanged
            if response.status not in (200, 206):
                raise HttpRefusal(response.status, response.headers)
            version = response.headers.get("x-goog-generation") or response.headers.get("ETag")
            head = ResponseHead(
                response.headers.get("Content-Range"),
                response.content_length,
                None if (version or "").startswith("W/") else version,
            )
            yield ClientResponse(head, response.content)


class ClientReader:
    """Reads ranges through a client."""

    def __init__(
        self, client: S3Client | HttpClient, transfers: Transfers, *, idle_s: float
    ) -> None:
        """Joins them; opens nothing yet."""
        self.client = client
        self._transfers, self._idle_s = transfers, idle_s

    def read_into(
        self, path: str, transfer: Transfer, target: memoryview, total: int | None, limit_s: float
    ) -> None:
        """Makes one attempt at the missing rest of a range.

        Args:
          path: Of the object, as its file system names it.
          transfer: The range; knows how much of `target` is filled.
          target: Memory of the whole range.
          total: Length that the object must have, where it is known.
          limit_s: How long the attempt may take, in seconds.
        """
        run(self._receive(path, transfer, target, total, limit_s), self.client.loop)

    def read_all(self, path: str, transfer: Transfer, limit_s: float) -> bytes:
        """Makes one attempt at a whole object."""
        return run(self._receive_all(path, transfer, limit_s), self.client.loop)

    async def _receive(
        self, path: str, transfer: Transfer, target: memoryview, total: int | None, limit_s: float
    ) -> None:
        async with self._response(path, transfer, transfer.stop, limit_s) as (response, wait_s):
            self._transfers.check_response(response.head, transfer, total)
            while transfer.received < len(target):
                chunk = await asyncio.wait_for(response.read(CHUNK_BYTES), wait_s())
                end = transfer.received + len(chunk)
                if not chunk:
                    raise BadResponse("short_body")
                if end > len(target):
                    raise BadResponse("wrong_range")
                target[transfer.received : end] = chunk
                self._transfers.arrived(transfer, len(chunk))

    async def _receive_all(self, path: str, transfer: Transfer, limit_s: float) -> bytes:
        transfer.received, parts = 0, []
        async with self._response(path, transfer, None, limit_s) as (response, wait_s):
            length = response.head.length
            transfer.stop = length or 0
            while chunk := await asyncio.wait_for(response.read(CHUNK_BYTES), wait_s()):
                parts.append(chunk)
                self._transfers.arrived(transfer, len(chunk))
            if length is not None and transfer.received != length:
                raise BadResponse("short_body")
        return b"".join(parts)

    @asynccontextmanager
    async def _response(
        self, path: str, transfer: Transfer, stop: int | None, limit_s: float
    ) -> AsyncIterator[tuple[ClientResponse, Callable[[], float]]]:
        """Sends a request; gives the response, and how long to wait for each part of its body."""
        client = self.client
        wait_s = wait_limit(idle_s=self._idle_s, limit_s=limit_s)
        # Making a client is work of this machine, half a second where it is busy, and not an idle
        # store: it may take the whole limit.
        await asyncio.wait_for(self._prepare(path), limit_s)
        pin = None if stop is None else self._transfers.pin(transfer.url)
        opening = client.open(path, transfer.position, stop, pin)
        response = await asyncio.wait_for(opening.__aenter__(), wait_s())
        try:
            yield response, wait_s
        finally:
            # A broken connection may fail once more while it is closed; the first error is raised.
            with suppress(OSError, asyncio.TimeoutError):
                await opening.__aexit__(None, None, None)

    async def _prepare(self, path: str) -> None:
        # One at a time: every range that begins before the first client exists would make one.
        async with self.client.preparing:
            await self.client.prepare(path)


class PlainReader:
    """Reads ranges of any other file system of fsspec, by one call each."""

    def __init__(self, shared: Any, transfers: Transfers) -> None:
        """Joins them."""
        self._fs, self._transfers = shared, transfers

    def read_into(
        self, path: str, transfer: Transfer, target: memoryview, total: int | None, limit_s: float
    ) -> None:
        """As `ClientReader.read_into`, without a limit: the file system has its own."""
        del limit_s
        found = self._fs.info(path)
        if total is not None and found["size"] != total:
            raise wrong_size(transfer.url, found["size"], total)
        names = ("ETag", "etag", "generation", "mtime", "created")
        version = str([found[name] for name in names if name in found])
        self._transfers.check_version(transfer.url, version)
        chunk = self._fs.cat_file(path, start=transfer.start, end=transfer.stop)
        if len(chunk) != len(target):
            raise BadResponse("short_body")
        target[:] = chunk
        self._transfers.arrived(transfer, len(target) - transfer.received)

    def read_all(self, path: str, transfer: Transfer, limit_s: float) -> bytes:
        """As `ClientReader.read_all`, without a limit."""
        del limit_s
        payload = bytes(self._fs.cat_file(path))
        self._transfers.arrived(transfer, len(payload))
        return payload


def run(work: Coroutine[Any, Any, _T], loop: Any) -> _T:
    """Waits for a coroutine on the thread that fsspec keeps for its clients."""
    running = asyncio.run_coroutine_threadsafe(work, loop)
    try:
        return running.result()
    finally:
        running.cancel()


def _copy_of(shared: Any, **options: Any) -> Any:
    """Makes a client like the shared one that is ours alone, so that its settings may differ."""
    options = {**shared.storage_options, **options, "skip_instance_cache": True}
    return type(shared)(*shared.storage_args, **options)
