"""Which failures of a store pass by themselves, and how long an action is tried again.

The clients of the stores raise what their libraries raise: botocore's and aiohttp's errors are no
OSErrors, and one refusal has several faces. Here they are told apart by HTTP status and by the
names of their classes, so that no client need be installed, or imported, to do it.

Clients try again on their own as well (s3fs some ten seconds, gcsfs half a minute); `persist`
goes on beyond that, with full jitter, until its attempts or its time are spent.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from shardspec.errors import StorageError, redacted
from shardspec.keyed import hash_text

logger = logging.getLogger(__name__)

T = TypeVar("T")

_TRANSIENT_STATUS = frozenset({408, 429, 500, 502, 503, 504})

_TRANSIENT_NAMES = frozenset(
    {
        "ConnectionError",  # builtin, botocore's and requests'
        "TimeoutError",  # builtin, asyncio's, fsspec's
        "HTTPClientError",  # botocore: connection closed, read timeout, proxy
        "IncompleteRead",
        "ResponseParserError",  # botocore: a proxy's page where XML was due
        "ClientConnectionError",  # aiohttp
        "ClientPayloadError",
        "ConnectTimeout",  # requests
        "ReadTimeout",
        "ChecksumError",  # gcsfs: another checksum arrived
    }
)

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
            if not is_transient(error):
                raise
            passed_s = time.monotonic() - began_s
            wait_s = _draw(where, attempt) * patience.wait_s * 2 ** (attempt - 1)
            if attempt >= patience.attempts or passed_s + wait_s > patience.wall_s:
                raise StorageError(
                    "the store does not answer as it should",
                    reason="store_unavailable",
                    where=where,
                    facts={
                        "attempts": attempt,
                        "seconds": round(passed_s, 1),
                        "error": f"{type(error).__name__}: {error}",
                    },
                    fix="see whether it can be reached, then run the same command again",
                ) from error
            told = redacted(f"{where}: {error}")
            logger.warning("%s; trying again in %.1f s", told, wait_s)
            threading.Event().wait(wait_s)


def http_status(error: BaseException) -> int | None:
    """Finds the HTTP status that an error of a client stands for; None where there is none."""
    seen: BaseException | None = error
    while seen is not None:
        response = getattr(seen, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if isinstance(status, int):
                return status
        for name in ("code", "status"):
            code = getattr(seen, name, None)
            if isinstance(code, int | str) and str(code).isdigit():
                return int(code)
        seen = seen.__cause__
    if isinstance(error, FileExistsError):
        return 412  # gcsfs says so; what the local disk means by it is the same
    if isinstance(error, OSError) and str(error).startswith("Forbidden"):
        return 403  # gcsfs keeps no number
    return None


def is_transient(error: BaseException) -> bool:
    """Tells whether a failure may pass by itself."""
    status = http_status(error)
    if status is not None:
        return status in _TRANSIENT_STATUS
    return not _names(error).isdisjoint(_TRANSIENT_NAMES)


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


def _draw(where: str, attempt: int) -> float:
    """Draws from [0, 1), in every process and at every moment another number."""
    return hash_text(f"{where}\0{attempt}\0{os.getpid()}\0{time.monotonic_ns()}") / 2**64
