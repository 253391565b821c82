"""What an error of a store's client means: passing or lasting, a refusal, of a condition or access.

The clients of the stores raise what their libraries raise: botocore's and aiohttp's errors are not
OSErrors, and one refusal has several forms. Here they are told apart by HTTP status and by the
names of their classes, so that no client need be installed, or imported, to do it.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass, field

_TRANSIENT_STATUS = frozenset({408, 425, 429})
_LASTING_STATUS = frozenset({501, 505})
"""Not implemented: the statuses from 500 on that waiting does not cure."""

_TRANSIENT_CODES = frozenset({"RequestTimeout", "SlowDown", "InternalError", "ServiceUnavailable"})
"""Error codes of S3 that are transient, whatever their status."""

_TRANSIENT_NAMES = {
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
    "gaierror": "connect",  # DNS failed
    "EndpointConnectionError": "connect",  # botocore
    "ClientConnectorError": "connect",  # aiohttp
    "TransportError": "connect",  # google
    "ConnectionError": "reset",  # builtin, botocore's and requests'
    "HTTPException": "reset",  # http.client: not an HTTP response
    "SSLEOFError": "reset",
    "HTTPClientError": "reset",  # botocore: connection closed, proxy
    "ResponseParserError": "reset",  # botocore: a proxy's page instead of XML
    "ClientConnectionError": "reset",  # aiohttp
}
"""Kind of failure between here and the store, by the error's class or its nearest base here."""

_TRANSIENT_ERRNO = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN})

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


@dataclass(frozen=True, slots=True)
class Refusal:
    """A response that is not a success."""

    status: int
    code: str = ""
    """S3's error code."""
    headers: Mapping[str, str] = field(default_factory=dict)


def refusal_of(error: BaseException) -> Refusal | None:
    """Finds the response of a store that an error of its client was made from."""
    cause: BaseException | None = error
    while cause is not None:
        found = _own_refusal(cause)
        if found is not None:
            return found
        cause = cause.__cause__
    if isinstance(error, FileExistsError):
        return Refusal(412)  # gcsfs raises it for this status; on a local disk it means the same
    if isinstance(error, OSError) and str(error).startswith("Forbidden"):
        return Refusal(403)  # gcsfs keeps no status
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
    """Finds the HTTP status that an error of a client was made from; None where there is none."""
    refusal = refusal_of(error)
    return None if refusal is None else refusal.status


def transient_error_kind(error: BaseException) -> str | None:
    """Names the kind of a transient failure; None for a lasting one.

    >>> [transient_error_kind(kind()) for kind in (ConnectionResetError, TimeoutError, KeyError)]
    ['reset', 'timeout', None]
    """
    # By class first, before the causes: aiohttp gives a body that ended early a cause with the
    # status 400, which would look like a refusal.
    if _own_refusal(error) is None:
        for kind in type(error).__mro__:
            if kind.__name__ in _TRANSIENT_NAMES:
                return _TRANSIENT_NAMES[kind.__name__]
    refusal = refusal_of(error)
    if refusal is not None:
        status = refusal.status
        transient = status in _TRANSIENT_STATUS or (status >= 500 and status not in _LASTING_STATUS)
        return f"http_{status}" if transient or refusal.code in _TRANSIENT_CODES else None
    unreachable = isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO
    return "connect" if unreachable else None


def is_condition_refused(error: BaseException) -> bool:
    """Returns True if a store refused a write because its condition did not hold.

    S3 answers 412, or 409 where two writers collide.
    """
    return http_status(error) in (409, 412)


def is_access_refused(error: BaseException) -> bool:
    """Returns True if a store denied access: no credentials, or no permission."""
    refused = isinstance(error, PermissionError) or http_status(error) in (401, 403)
    return refused or not _names(error).isdisjoint(_CREDENTIALS_NAMES)


def is_client_error(error: BaseException) -> bool:
    """Returns True if an exception was raised by a store's client, or a library under it."""
    return any(kind.__module__.split(".")[0] in _CLIENTS for kind in type(error).__mro__)


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}
