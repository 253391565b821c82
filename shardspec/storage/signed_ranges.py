"""Ranges of S3 objects by signed URLs, over kept connections: a third of the client's CPU time.

Each object has a signed URL (`shardspec.storage.signing`; the client's own where that cannot), and
its ranges are requested over connections of ours (`shardspec.storage.connections`). What these
cannot get (a proxy is in between, the bucket is in another region, the signature has expired) is
requested through the client instead.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
import urllib.request
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

from shardspec.storage.client_ranges import CHUNK_BYTES, ClientReader, S3Client, run
from shardspec.storage.connections import Connections, Response, shared_connections
from shardspec.storage.failures import transient_error_kind
from shardspec.storage.signing import Signer, make_signer
from shardspec.storage.transfers import (
    BadResponse,
    HttpRefusal,
    ResponseHead,
    Transfer,
    Transfers,
    wait_limit,
)

_SIGNED_S = 3600
"""How long a signed URL is valid; half of it is used, as clocks differ."""
_MOST_SIGNED = 4096
"""URLs that are remembered."""
_MOST_REFUSALS = 3
"""New URLs that a bucket may refuse before it gets no more of them."""
_NEW_S = 60.0
"""A URL that is refused later than this after its signing may have lost its credentials."""

_ASK_CLIENT = frozenset({301, 302, 307, 308, 400, 401, 403})
"""Statuses that the client may know a way around, or else explains better."""


class SignedUrls:
    """Signed URLs of the objects of one store, and the connections to request them over.

    Shared between threads, and mostly without a lock:

    * `_lock` guards the one search for a signer. `connections` is written there, or once by `_sign`
      on the client's event loop; `reject_connections` may set it to None for good.
    * `_signed` and `_refusals` are plain dictionaries of which single operations are atomic. A lost
      entry means that a URL is signed once more, and a lost count one more refused request. An
      entry may be stale, as the credentials behind it may have expired: the store then refuses it,
      and `refused` drops it.
    """

    def __init__(self, client: S3Client, *, idle_s: float) -> None:
        """Signs nothing yet."""
        self.connections: Connections | None = None
        """None until their store is known, and where ours cannot be used."""
        self._client, self._idle_s = client, idle_s
        self._lock = threading.Lock()
        self._signer: Signer | None = None
        self._has_looked = self._is_ready = False
        self._signed: dict[str, tuple[float, str | None]] = {}
        """By path: until when, in the monotonic clock's seconds, and the URL, if there is one."""
        self._refusals: Counter[str] = Counter()
        """By bucket, of URLs that were new."""

    def get(self, path: str, limit_s: float) -> str | None:
        """Returns the URL of an object; None where only the client can request it.

        Args:
          path: Of the object.
          limit_s: How long to wait for credentials, in seconds.
        """
        if self._refusals[_bucket(path)] >= _MOST_REFUSALS:
            return None
        now_s = time.monotonic()
        stop_s, url = self._signed.get(path, (0.0, None))
        if stop_s > now_s:
            return url
        # Making a client is work of this machine, and credentials may need the user. Later on only
        # a service that gives them is waited for.
        within_s = min(limit_s, self._idle_s) if self._signed else limit_s
        made, signer = None, self._find_signer()
        if signer is None:
            made = run(asyncio.wait_for(self._sign(path), within_s), self._client.loop)
        elif self.connections is not None:
            bucket, key, _ = self._client.fs.split_path(path)
            made = signer.sign(bucket, key, expires_s=_SIGNED_S, limit_s=within_s)
        if len(self._signed) >= _MOST_SIGNED:
            self._signed.clear()
        self._signed[path] = now_s + _SIGNED_S / 2, made
        return made

    def connect_soon(self, number: int) -> None:
        """Begins to open connections, unless the client would first have to say where to."""
        signer = self._find_signer()
        if signer is not None and self.connections is not None:
            self.connections.open_soon(signer.endpoint, number, wait_s=self._idle_s)

    def refused(self, path: str) -> None:
        """Drops the URL of an object that was refused; counts it if it was new.

        Old URLs are refused when their credentials have expired, new ones where the bucket takes no
        signed URLs.
        """
        stop_s, _ = self._signed.pop(path, (0.0, None))
        if stop_s - _SIGNED_S / 2 > time.monotonic() - _NEW_S:
            self._refusals[_bucket(path)] += 1

    def reject_connections(self) -> None:
        """Leaves everything to the client from now on."""
        self.connections = None

    def _find_signer(self) -> Signer | None:
        """Returns the signer that needs no client, if the store is one of those that have one."""
        with self._lock:
            if not self._has_looked:
                signer = make_signer(self._client.options)
                found = None if signer is None else _direct(signer.endpoint, signer.ca_bundle)
                if found is not None:
                    self._signer, self.connections = signer, found
                self._has_looked = True
            return self._signer

    async def _sign(self, path: str) -> str | None:
        fs = self._client.fs
        async with self._client.preparing:
            await self._client.prepare(path)
        bucket, key, version = fs.split_path(path)
        client = await fs.get_s3(bucket)
        if not self._is_ready:
            self._is_ready = True
            self.connections = self._client_connections(client)
        wanted = {"Bucket": bucket, "Key": key} | ({"VersionId": version} if version else {})
        if self.connections is None or wanted != fs._get_s3_method_kwargs(
            client.get_object, **wanted
        ):
            # Requester pays, the caller's own keys: they travel in headers of the client's.
            return None
        url: str = await client.generate_presigned_url(
            "get_object", Params=wanted, ExpiresIn=_SIGNED_S
        )
        return url

    def _client_connections(self, client: Any) -> Connections | None:
        """Opens connections to the client's endpoint, unless its settings are more than ours."""
        fs, meta = self._client.fs, client.meta
        verify = fs.client_kwargs.get("verify")
        if verify is None:
            verify = fs.session.get_config_variable("ca_bundle")
        if meta.config.proxies or meta.config.client_cert or verify is False:
            return None
        return _direct(meta.endpoint_url, verify)


class SignedReader:
    """Reads ranges by signed URLs, and through the client where these cannot be used."""

    def __init__(
        self, client: ClientReader, urls: SignedUrls, transfers: Transfers, *, idle_s: float
    ) -> None:
        """Joins them; opens nothing yet."""
        self.urls = urls
        self._client, self._transfers, self._idle_s = client, transfers, idle_s

    def read_into(
        self, path: str, transfer: Transfer, target: memoryview, total: int | None, limit_s: float
    ) -> None:
        """As `ClientReader.read_into`."""
        if self._receive(path, transfer, target, total, limit_s) is None:
            self._client.read_into(path, transfer, target, total, limit_s)

    def read_all(self, path: str, transfer: Transfer, limit_s: float) -> bytes:
        """As `ClientReader.read_all`."""
        found = self._receive(path, transfer, None, None, limit_s)
        return self._client.read_all(path, transfer, limit_s) if found is None else bytes(found)

    def _receive(
        self,
        path: str,
        transfer: Transfer,
        target: memoryview | None,
        total: int | None,
        limit_s: float,
    ) -> memoryview | None:
        """Reads the rest of a range into `target`, or the whole object into new memory.

        Returns:
          Where it was read to; None where the client has to be used instead.
        """
        wait_s = wait_limit(idle_s=self._idle_s, limit_s=limit_s)
        # In this order: `get` is what finds the connections.
        url, connections = self.urls.get(path, limit_s), self.urls.connections
        if url is None or connections is None:
            return None
        headers = {}
        if target is not None:
            headers["Range"] = f"bytes={transfer.position}-{transfer.stop - 1}"
            pin = self._transfers.pin(transfer.url)
            if pin is not None:
                headers["If-Match"] = pin
        try:
            with connections.get(url, headers, wait_s=wait_s) as response:
                if response.status in (200, 206):
                    return self._take(response, transfer, target, total)
                refusal = HttpRefusal(response.status, dict(response.headers.items()))
        except ssl.SSLCertVerificationError:
            self.urls.reject_connections()  # the client may trust other certificates
            return None
        except OSError as error:
            if transient_error_kind(error) is None:
                # A broken TLS record, no descriptor, no buffer, no route.
                raise BadResponse("reset") from error
            raise
        # After the block: a short refusal has been read there, so its connection is kept.
        if refusal.status in _ASK_CLIENT:
            self.urls.refused(path)
            return None
        raise refusal

    def _take(
        self, response: Response, transfer: Transfer, target: memoryview | None, total: int | None
    ) -> memoryview | None:
        """Receives a body; without a target the whole object's, if its length is known."""
        headers = response.headers
        head = ResponseHead(headers.get("Content-Range"), response.length, headers.get("ETag"))
        if target is None:
            if head.length is None:
                return None
            transfer.received, transfer.stop = 0, head.length
            target = memoryview(bytearray(head.length))
        else:
            self._transfers.check_response(head, transfer, total)
        while transfer.received < len(target):
            rest = target[transfer.received : transfer.received + CHUNK_BYTES]
            num_bytes = response.readinto(rest)
            if not num_bytes:
                raise BadResponse("short_body")
            self._transfers.arrived(transfer, num_bytes)
        return target


def _bucket(path: str) -> str:
    return path.partition("/")[0]


def _direct(endpoint: str, ca_file: object) -> Connections | None:
    """Returns connections of ours to a store; None where a proxy is set: the client knows it."""
    server = urlsplit(endpoint)
    proxy = urllib.request.getproxies().get(server.scheme)
    if proxy and not urllib.request.proxy_bypass(server.hostname or ""):
        return None
    return shared_connections(endpoint, ca_file=ca_file if isinstance(ca_file, str) else None)
