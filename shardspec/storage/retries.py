"""Which failures of a store pass by themselves, and how long an action is tried again.

The clients of the stores raise what their libraries raise: botocore's and aiohttp's errors are no
OSErrors, and one refusal has several faces. Here they are told apart by HTTP status and by the
names of their classes, so that no client need be installed, or imported, to do it.

Clients try again on their own as well (s3fs some ten seconds, gcsfs half a minute); `persist`
goes on beyond that, with full jitter, until its attempts or its time are spent.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from shardspec.errors import StorageError, redacted
from shardspec.keyed import hash_text

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PASSING_STATUS = frozenset({408, 425, 429})
_LASTING_STATUS = frozenset({501, 505})
"""Not implemented: of those from 500 on, the ones that no waiting cures."""

_PASSING_CODES = frozenset({"RequestTimeout", "SlowDown", "InternalError", "ServiceUnavailable"})
"""S3's own words, whatever status they come with."""

_PASSING_NAMES = {
    # By name: their packages are imported only where a URL needs them.
    "TimeoutError": "timeout",  # builtin, asyncio's, fsspec's
    "ReadTimeoutError": "timeout",  # botocore
    "ConnectTimeoutError": "timeout",
    "ConnectTimeout": "timeout",  # requests
    "ReadTimeout": "timeout",
    "ServerTimeoutError": "timeout",  # aiohttp
    "IncompleteRead": "short_body",  # http.client
    "IncompleteReadError": "short_body",  # botocore
    "ClientPayloadError": "short_body",  # aiohttp
    "ChecksumError": "checksum",  # gcsfs: another checksum arrived
    "ConnectionRefusedError": "connect",
    "gaierror": "connect",  # no name service
    "EndpointConnectionError": "connect",  # botocore
    "ClientConnectorError": "connect",  # aiohttp
    "TransportError": "connect",  # google
    "ConnectionError": "reset",  # builtin, botocore's and requests'
    "HTTPException": "reset",  # http.client: what came is no answer
    "SSLEOFError": "reset",
    "HTTPClientError": "reset",  # botocore: connection closed, proxy
    "ResponseParserError": "reset",  # botocore: a proxy's page where XML was due
    "ClientConnectionError": "reset",  # aiohttp
}
"""Failures of the way to the store by the class or the nearest base that stands here."""

_PASSING_ERRNO = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN})

_CREDENTIALS_NAMES = frozenset(
    {
        "NoCredentialsError",
        "PartialCredentialsError",
        "CredentialRetrievalError",
        "ProfileNotFound",
        "TokenRetrievalError",
        "UnauthorizedSSOTokenError",
        "GoogleAuthError",
    }
)

_CLIENTS = frozenset(
    {"aiobotocore", "aiohttp", "asyncio", "botocore", "fsspec", "gcsfs", "google", "requests"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long an action is tried again."""

    attempts: int = 4
    """Tries in all, each with the client's own tries within it."""
    wall_s: float = 60.0
    """No further try begins later than this after the first one."""
    wait_s: float = 0.5
    """The wait after try n is drawn from 0 to wait_s * 2**(n - 1)."""


def persist(action: Callable[[], T], *, where: str, patience: Patience | None = None) -> T:
    """Does something at a store, again while its failures are such as pass by themselves.

    Args:
      action: What to do; must bear being done twice.
      where: The URL that an error names.
      patience: How long.

    Raises:
      StorageError: `store_unavailable`, with what was tried; other errors pass as they are.
    """
    patience = patience or Patience()
    began_s = time.monotonic()
    attempt = 0
    while True:
        attempt += 1
        try:
            return action()
        except Exception as error:
            if transient_error_kind(error) is None:
                raise
            passed_s = time.monotonic() - began_s
            wait_s = jitter(where, attempt) * patience.wait_s * 2 ** (attempt - 1)
            if attempt >= patience.attempts or passed_s + wait_s > patience.wall_s:
                raise StorageError(
                    "store_unavailable.answer",
                    where=where,
                    attempts=attempt,
                    seconds=round(passed_s, 1),
                    error=f"{type(error).__name__}: {error}",
                ) from error
            told = redacted(f"{where}: {error}")
            logger.warning("%s; trying again in %.1f s", told, wait_s)
            threading.Event().wait(wait_s)


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that is no success."""

    status: int
    code: str = ""
    """S3's word for it."""
    headers: Mapping[str, str] = field(default_factory=dict)


def refusal_of(error: BaseException) -> Refusal | None:
    """Finds the answer of a store that an error of its client stands for."""
    seen: BaseException | None = error
    while seen is not None:
        found = _own_refusal(seen)
        if found is not None:
            return found
        seen = seen.__cause__
    if isinstance(error, FileExistsError):
        return Refusal(412)  # gcsfs says so; what the local disk means by it is the same
    if isinstance(error, OSError) and str(error).startswith("Forbidden"):
        return Refusal(403)  # gcsfs keeps no number
    return None


def _own_refusal(error: BaseException) -> Refusal | None:
    response = getattr(error, "response", None)  # botocore's
    if isinstance(response, dict):
        head = response.get("ResponseMetadata", {})
        if isinstance(head.get("HTTPStatusCode"), int):
            code = str(response.get("Error", {}).get("Code", ""))
            return Refusal(head["HTTPStatusCode"], code, head.get("HTTPHeaders", {}))
    for name in ("status", "code"):  # aiohttp's, gcsfs's
        status = getattr(error, name, None)
        if isinstance(status, int | str) and str(status).isdigit() and int(status) >= 300:
            headers = getattr(error, "headers", None)
            return Refusal(int(status), "", {} if headers is None else headers)
    return None


def http_status(error: BaseException) -> int | None:
    """Finds the HTTP status that an error of a client stands for; None where there is none."""
    refusal = refusal_of(error)
    return None if refusal is None else refusal.status


def transient_error_kind(error: BaseException) -> str | None:
    """Names the kind of a failure that may pass by itself; None for one that lasts.

    >>> [transient_error_kind(kind()) for kind in (ConnectionResetError, TimeoutError, KeyError)]
    ['reset', 'timeout', None]
    """
    # What a failure on the way was caused by may call itself a refusal: aiohttp gives a body that
    # ended early the status 400.
    if _own_refusal(error) is None:
        for kind in type(error).__mro__:
            if kind.__name__ in _PASSING_NAMES:
                return _PASSING_NAMES[kind.__name__]
    refusal = refusal_of(error)
    if refusal is not None:
        status = refusal.status
        passing = status in _PASSING_STATUS or (status >= 500 and status not in _LASTING_STATUS)
        return f"http_{status}" if passing or refusal.code in _PASSING_CODES else None
    unreachable = isinstance(error, OSError) and error.errno in _PASSING_ERRNO
    return "connect" if unreachable else None


def is_condition_refused(error: BaseException) -> bool:
    """Tells whether a store refused a write because its condition did not hold.

    S3 says 412, or 409 where two writers met in the same moment.
    """
    return http_status(error) in (409, 412)


def is_access_refused(error: BaseException) -> bool:
    """Tells whether a store knows the asker too little: no credentials, or no right."""
    refused = isinstance(error, PermissionError) or http_status(error) in (401, 403)
    return refused or not _names(error).isdisjoint(_CREDENTIALS_NAMES)


def is_client_error(error: BaseException) -> bool:
    """Tells whether an exception was raised by a store's client, or a library under it."""
    return any(kind.__module__.split(".")[0] in _CLIENTS for kind in type(error).__mro__)


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def jitter(where: str, attempt: int) -> float:
    """Draws from [0, 1), in every process and at every moment another number.

    Nothing depends on it but how long somebody waits.
    """
    return hash_text(f"{where}\0{attempt}\0{os.getpid()}\0{time.monotonic_ns()}") / 2**64
