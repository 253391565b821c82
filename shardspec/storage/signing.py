"""Signer: signed URLs for objects of an S3 store, without the store's client.

Making the client takes 0.1 to 0.2 s, most of it to read what it might need for any region and
operation. Where the endpoint is named, as it is for every store except Amazon's own, a signed URL
needs none of that: the bucket is in its path, and botocore's credentials and signer do the rest. It
is the very URL that the client would make (tests/shardspec/storage/test_signing.py compares them).
Where that is not certain there is no signer, and the client is used.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from concurrent import futures
from concurrent.futures import Future
from typing import Any
from urllib.parse import quote, urlsplit

_IGNORED = frozenset({"use_listings_cache"})
"""Options of an S3 file system that do not change a URL."""

_TRANSFER = frozenset(
    {
        "max_bandwidth",
        "max_concurrent_requests",
        "max_queue_size",
        "multipart_chunksize",
        "multipart_threshold",
    }
)
"""Settings of a profile's `s3` section that only the AWS command line uses."""

_SPECIAL = ("use_dualstack_endpoint", "use_fips_endpoint", "sigv4a_signing_region_set")


class Signer:
    """Signs for one store. Safe to share between threads.

    `_lock` guards `_coming`, the one request for credentials that is under way: all threads that
    need them wait for it. `_credentials` is written once, by the thread of that request, and read
    without the lock. It may be expired, which botocore's object knows itself (`refresh_needed`).
    """

    def __init__(self, session: Any, *, endpoint: str, region: str) -> None:
        """Takes what `make_signer` has found; fetches no credentials yet."""
        self.endpoint = endpoint
        self.region = region
        self.ca_bundle: str | None = session.get_config_variable("ca_bundle")
        """File of certificates that the store is checked against; None: the system's."""
        self._session = session
        self._credentials: Any = None
        self._lock = threading.Lock()
        self._coming: Future[Any] | None = None

    def sign(self, bucket: str, key: str, *, expires_s: int, limit_s: float) -> str | None:
        """Signs the URL of a GET; None where there are no credentials.

        Args:
          bucket: Its name in the store.
          key: Of the object, unquoted.
          expires_s: How long the URL is valid, in seconds.
          limit_s: How long to wait for credentials, in seconds.

        Raises:
          TimeoutError: They did not arrive in time; the next call waits for the same request.
          botocore.exceptions.BotoCoreError: They are not available.
        """
        from botocore.auth import S3SigV4QueryAuth
        from botocore.awsrequest import AWSRequest

        credentials = self._frozen(limit_s)
        if credentials is None:
            return None
        path = quote(f"{bucket}/{key}", safe="/~")
        request = AWSRequest("GET", f"{self.endpoint}/{path}")
        S3SigV4QueryAuth(credentials, "s3", self.region, expires=expires_s).add_auth(request)
        return str(request.url)

    def _frozen(self, limit_s: float) -> Any:
        """Returns the current credentials; expired ones (of a role) are fetched again."""
        known = self._credentials
        if known is not None and not (hasattr(known, "refresh_needed") and known.refresh_needed()):
            return known.get_frozen_credentials()
        # In a thread, once for all who wait: a service, or the user, may take its time.
        with self._lock:
            coming = self._coming
            if coming is None:
                coming = self._coming = Future()
                args = (coming,)
                threading.Thread(target=self._fetch, args=args, name="sign-in", daemon=True).start()
        try:
            return coming.result(limit_s)
        except futures.TimeoutError as error:
            if coming.done():
                raise  # the service's own timeout
            raise TimeoutError("credentials did not arrive in time") from error

    def _fetch(self, coming: Future[Any]) -> None:
        frozen, failure = None, None
        try:
            if self._credentials is None:
                self._credentials = self._session.get_credentials()
            if self._credentials is not None:
                frozen = self._credentials.get_frozen_credentials()
        except BaseException as error:  # noqa: BLE001 - raised in the threads that wait
            failure = error
        # Before the result: a thread that finds it expired must be able to start another request.
        with self._lock:
            self._coming = None
        if failure is None:
            coming.set_result(frozen)
        else:
            coming.set_exception(failure)


def make_signer(options: Mapping[str, Any]) -> Signer | None:
    """Makes the signer of an S3 file system; None where only its client knows what to request.

    Args:
      options: What the file system was made with (`storage_options` of s3fs).

    Raises:
      botocore.exceptions.BotoCoreError: There is no such profile, or its files cannot be read.
    """
    options = {name: value for name, value in options.items() if name not in _IGNORED}
    profile, endpoint = options.pop("profile", None), options.pop("endpoint_url", None)
    client = dict(options.pop("client_kwargs", None) or {})
    region = client.pop("region_name", None)
    config = dict(options.pop("config_kwargs", None) or {})
    style = dict(config.pop("s3", None) or {})
    addressing = style.pop("addressing_style", None)
    if options or client or config or style:
        return None
    import botocore.session

    session = botocore.session.Session(profile=profile)
    section = dict(session.get_config_variable("s3") or {})
    addressing = section.pop("addressing_style", None) if addressing is None else addressing
    special = any(session.get_config_variable(name) for name in _SPECIAL)
    if special or addressing == "virtual" or section.keys() - _TRANSFER:
        return None
    endpoint = endpoint or _configured_endpoint(session)
    region = region or session.get_config_variable("region") or "us-east-1"
    if not (endpoint and _is_plain(endpoint, region)):
        return None
    return Signer(session, endpoint=endpoint.rstrip("/"), region=region)


def _is_plain(endpoint: str, region: str) -> bool:
    """Returns True if a URL at this endpoint is endpoint, bucket and key, and nothing else."""
    from botocore.exceptions import InvalidRegionError
    from botocore.utils import is_valid_endpoint_url, validate_region_name

    try:
        validate_region_name(region)
        server = urlsplit(endpoint)
        _ = server.port  # raises where it is not a number
    except (InvalidRegionError, ValueError):
        return False
    host = server.hostname or ""
    return (
        is_valid_endpoint_url(endpoint)
        and server.scheme in ("http", "https")
        and not (server.query or server.fragment or "%" in server.path or "@" in server.netloc)
        # Amazon's own have rules by name: acceleration, pseudo-regions.
        and not re.search(r"\.amazonaws\.com(\.|$)", host)
        and "fips" not in region
    )


def _configured_endpoint(session: Any) -> str | None:
    """Finds the endpoint for S3 in environment and profile, as every client of botocore does."""
    from botocore.configprovider import ConfiguredEndpointProvider

    if session.get_config_variable("ignore_configured_endpoint_urls"):
        return None
    provider = ConfiguredEndpointProvider(
        full_config=session.full_config,
        scoped_config=session.get_scoped_config(),
        client_name="s3",
    )
    found: str | None = provider.provide()
    return found
