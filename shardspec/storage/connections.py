"""Connections: HTTP GETs over a pool of kept connections, bodies straight into the caller's memory.

What an object store's own client does for a range (build, sign, parse, copy in small chunks) costs
several times the CPU time of the bytes themselves, and most of it holds the interpreter lock that a
training process needs. Here a GET of a URL that is already signed costs a request line, and its
body is received by the system into the memory that the caller gives.

Safe to share between threads. The only request that is repeated is one that met a connection which
the server had closed, or timed out (408), meanwhile. URLs are never logged: they may carry a
signature.
"""

from __future__ import annotations

import http.client
import os
import ssl
import threading
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from typing import NamedTuple
from urllib.parse import urlsplit

_KEPT = 64
"""Most idle connections to one server."""
_IDLE_S = 10.0
"""Connections that were idle for longer are not used again: NAT and firewalls drop some of them
silently, and a request over such a one would wait for its whole limit."""
_SHORT = 64 * 1024
"""The body of a refusal up to this length is read to its end, so that the connection is kept."""


@dataclass(frozen=True, slots=True)
class Response:
    """The head of a response, and its body piece by piece. Owned by one thread."""

    status: int
    headers: Message
    _response: http.client.HTTPResponse
    _connection: http.client.HTTPConnection
    _wait_s: Callable[[], float]

    @property
    def length(self) -> int | None:
        """Bytes of the body that are still to come, where the server says so."""
        return self._response.length

    def readinto(self, target: memoryview) -> int:
        """Receives what comes next into `target`; 0 bytes at the end of the body.

        Raises:
          TimeoutError, OSError, http.client.HTTPException: The connection broke.
        """
        # Not `readinto` of http.client, which continues until the target is full: what had arrived
        # before a reset would be lost, and a server that drips would never meet a limit.
        _limit(self._connection, self._wait_s())
        payload = self._response.read1(len(target))
        target[: len(payload)] = payload
        if self._response.length == 0:
            self._response.read()  # marks the response as closed, so that `_keep` sees it
        return len(payload)


class _Kept(NamedTuple):
    """An idle connection."""

    connection: http.client.HTTPConnection
    since_s: float


class Connections:
    """Idle connections by server.

    `_lock` guards `_idle`, `_opening` and `_context`; it is never held while the network is used.
    A connection is in `_idle` or owned by one request, never both: `_kept` takes it out before it
    is used, `_put` returns it afterwards. An idle connection may be stale, as the server may have
    closed it; `_request` then uses a new one.
    """

    def __init__(self, *, ca_file: str | None = None) -> None:
        """Opens nothing yet.

        Args:
          ca_file: Certificates that servers are checked against; None: the system's.
        """
        self._ca_file = ca_file
        self._context: ssl.SSLContext | None = None
        self._idle: defaultdict[tuple[str, str], list[_Kept]] = defaultdict(list)
        self._opening: Counter[tuple[str, str]] = Counter()  # connections under way
        self._lock = threading.Lock()
        # The dictionary and not self, or the finalizer would keep this object alive.
        weakref.finalize(self, _close_all, self._idle)

    def open_soon(self, url: str, number: int, *, wait_s: float) -> None:
        """Begins to open connections to a server, which wait for their first use; returns at once.

        A failure is not reported: the first request that finds no open connection opens one itself.

        Args:
          url: Any of the server's.
          number: How many there shall be, idle or being opened.
          wait_s: How long to try, in seconds.
        """
        at = urlsplit(url)
        server = at.scheme, at.netloc
        with self._lock:
            number = max(0, number - len(self._idle[server]) - self._opening[server])
            self._opening[server] += number

        def connect() -> None:
            connection = None
            try:
                connection = self._open(server)
                _limit(connection, wait_s)
                connection.connect()
                self._put(server, connection)
            except (OSError, http.client.HTTPException, ValueError):
                # ValueError: an invalid host name.
                if connection is not None:
                    connection.close()
            finally:
                with self._lock:
                    self._opening[server] -= 1

        for _ in range(number):
            threading.Thread(target=connect, name="connect", daemon=True).start()
        if number:
            # Idle connections are closed when the next request finds them old; without a request
            # these would stay open.
            closing = threading.Timer(wait_s + _IDLE_S, self._close_old, args=(server,))
            closing.daemon = True
            closing.start()

    @contextmanager
    def get(
        self, url: str, headers: Mapping[str, str], *, wait_s: Callable[[], float]
    ) -> Iterator[Response]:
        """Requests a URL; its connection is kept if the body has been read when the block ends.

        Args:
          url: http or https.
          headers: Of the request, besides Host.
          wait_s: Returns how long to wait now for the next part of the response, in seconds.

        Raises:
          TimeoutError, OSError, http.client.HTTPException: There was no response.
        """
        at = urlsplit(url)
        server = at.scheme, at.netloc
        target = f"{at.path or '/'}?{at.query}" if at.query else at.path or "/"
        connection, response = self._request(server, target, headers, wait_s)
        try:
            yield Response(response.status, response.headers, response, connection, wait_s)
            if response.status >= 300 and (response.length is None or response.length < _SHORT):
                response.read(_SHORT)
        except BaseException:
            connection.close()
            raise
        self._keep(server, connection, response)

    def _request(
        self,
        server: tuple[str, str],
        target: str,
        headers: Mapping[str, str],
        wait_s: Callable[[], float],
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        while True:
            kept = self._kept(server)
            connection = kept or self._open(server)
            try:
                _limit(connection, wait_s())
                connection.request("GET", target, headers=dict(headers))
                response = connection.getresponse()
                if response.status != 408 or kept is None:
                    return connection, response
                # Some servers send this to a connection that has been idle for too long.
                connection.close()
            except (ConnectionError, http.client.BadStatusLine):
                connection.close()
                # Servers close idle connections silently. Only the failure of a new one is real.
                if kept is None:
                    raise
            except TimeoutError:
                connection.close()
                if kept is not None:
                    self._drop(server)  # the others are probably as dead
                raise
            except BaseException:
                connection.close()
                raise

    def _kept(self, server: tuple[str, str]) -> http.client.HTTPConnection | None:
        """Takes the connection that was used last, unless that is long ago."""
        with self._lock:
            idle = self._idle[server]
            if not idle:
                return None
            last = idle.pop()
        if time.monotonic() - last.since_s < _IDLE_S:
            return last.connection
        last.connection.close()
        self._drop(server)
        return None

    def _close_old(self, server: tuple[str, str]) -> None:
        oldest_s = time.monotonic() - _IDLE_S
        with self._lock:
            idle = self._idle.get(server, [])
            old = [kept for kept in idle if kept.since_s <= oldest_s]
            idle[:] = [kept for kept in idle if kept.since_s > oldest_s]
        for kept in old:
            kept.connection.close()

    def _drop(self, server: tuple[str, str]) -> None:
        with self._lock:
            dropped = self._idle.pop(server, [])
        for kept in dropped:
            kept.connection.close()

    def _open(self, server: tuple[str, str]) -> http.client.HTTPConnection:
        scheme, netloc = server
        if scheme == "http":
            return http.client.HTTPConnection(netloc)
        with self._lock:
            if self._context is None:
                self._context = ssl.create_default_context(cafile=self._ca_file)
            return http.client.HTTPSConnection(netloc, context=self._context)

    def _keep(
        self,
        server: tuple[str, str],
        connection: http.client.HTTPConnection,
        response: http.client.HTTPResponse,
    ) -> None:
        if response.isclosed():
            self._put(server, connection)
        else:
            connection.close()

    def _put(self, server: tuple[str, str], connection: http.client.HTTPConnection) -> None:
        with self._lock:
            if len(self._idle[server]) < _KEPT:
                self._idle[server].append(_Kept(connection, time.monotonic()))
                return
        connection.close()


_shared: weakref.WeakValueDictionary[tuple[object, ...], Connections]
_shared = weakref.WeakValueDictionary()


def shared_connections(url: str, *, ca_file: str | None) -> Connections:
    """Returns the connections of this process to a server, for all readers.

    Args:
      url: Any of the server's.
      ca_file: As of `Connections`.
    """
    at = urlsplit(url)
    # By process: a forked child inherits connections that its parent still uses. Without a lock:
    # two threads that make them at the same time may get one set each, and the connections are
    # shared by fewer.
    return _shared.setdefault(
        (os.getpid(), at.scheme, at.netloc, ca_file), Connections(ca_file=ca_file)
    )


def _close_all(idle: Mapping[tuple[str, str], list[_Kept]]) -> None:
    for connections in idle.values():
        for kept in connections:
            kept.connection.close()


def _limit(connection: http.client.HTTPConnection, seconds: float) -> None:
    connection.timeout = seconds
    if connection.sock is not None:
        connection.sock.settimeout(seconds)
