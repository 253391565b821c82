"""Signer: URLs that objects of an S3 store can be had by, without the store's client.

To make the client takes 0.1 to 0.2 s, most of it for reading what it might have to know of any
region and operation. Where the endpoint is named, as it is for every store but Amazon's own, a
signed URL needs none of that: the bucket stands in its path, and botocore's credentials and signer
do the rest. It is the very URL that the client would give (tests/shardspec/test_signing.py
compares them); wherever that is not certain there is no signer, and the client is asked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

_T = TypeVar("_T")

_IGNORED = frozenset({"use_listings_cache"})
"""Options of an S3 file system that have no say in a URL."""

_TRANSFER = frozenset(
    {
        "max_bandwidth",
        "max_concurrent_requests",
        "max_queue_size",
        "multipart_chunksize",
        "multipart_threshold",
    }
)
"""Settings of a profile's `s3` section that are for the command line's transfers alone."""

_SPECIAL = ("use_dualstack_endpoint", "use_fips_endpoint", "sigv4a_signing_region_set")


class Signer:
    """Signs for one store. Safe to share between threads."""

    def __init__(self, session: Any, credentials: Any, *, endpoint: str, region: str) -> None:
        """Joins what `make_signer` has found."""
        self.endpoint = endpoint
        self.region = region
        self.ca_bundle: str | None = session.get_config_variable("ca_bundle")
        """File of certificates that the store's own is to be checked with; None: the system's."""
        self._credentials = credentials
        # Those of a role are fetched anew when they run out.
        self._can_wait = hasattr(credentials, "refresh_needed")

    def sign(self, bucket: str, key: str, *, expires_s: int, limit_s: float) -> str:
        """Gives the URL of a GET.

        Args:
          bucket: As it is named in the store.
          key: Of the object, unquoted.
          expires_s: How long the URL is valid, in seconds.
          limit_s: How long to wait for credentials that have run out, in seconds.

        Raises:
          TimeoutError: They did not come.
          botocore.exceptions.BotoCoreError: They are not to be had.
        """
        from botocore.auth import S3SigV4QueryAuth
        from botocore.awsrequest import AWSRequest

        frozen = self._credentials.get_frozen_credentials
        credentials = _within(limit_s, frozen) if self._can_wait else frozen()
        path = quote(f"{bucket}/{key}", safe="/~")
        request = AWSRequest("GET", f"{self.endpoint}/{path}")
        S3SigV4QueryAuth(credentials, "s3", self.region, expires=expires_s).add_auth(request)
        return str(request.url)


def make_signer(options: Mapping[str, Any], *, limit_s: float) -> Signer | None:
    """Makes the signer of an S3 file system; None where only its client knows what to ask for.

    Args:
      options: What the file system was made with (`storage_options` of s3fs).
      limit_s: How long to wait for credentials, in seconds.

    Raises:
      TimeoutError: Credentials did not come in time.
      botocore.exceptions.BotoCoreError: The profile or the credentials are not to be had.
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
    endpoint = endpoint or _configured_endpoint(session)
    special = any(session.get_config_variable(name) for name in _SPECIAL)
    if not endpoint or special or addressing == "virtual" or section.keys() - _TRANSFER:
        return None
    server = urlsplit(endpoint)
    if server.scheme not in ("http", "https") or server.query or server.fragment:
        return None
    credentials = _within(limit_s, session.get_credentials)
    if credentials is None:
        return None
    region = region or session.get_config_variable("region") or "us-east-1"
    return Signer(session, credentials, endpoint=endpoint.rstrip("/"), region=region)


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


def _within(limit_s: float, work: Callable[[], _T]) -> _T:
    """Does some work in a thread, which is left alone if it takes too long."""
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - it belongs to who waits
            future.set_exception(error)

    threading.Thread(target=run, name="credentials", daemon=True).start()
    return future.result(limit_s)
