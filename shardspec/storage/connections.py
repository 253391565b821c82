"""Connections: GETs over connections that are kept, their bodies straight into given memory.

What an object store's own client does for a range (build, sign, parse, hand on in small pieces)
costs several times the processor time of the bytes themselves, and most of it holds the
interpreter that a training process needs. Here a GET of a URL that is ready to be asked for costs
a request line, and its body is received by the system into the memory that the caller gives.

Safe to share between threads. Nothing is tried again but a request that met a connection which the
server had closed, or given up (408), meanwhile. URLs are never logged: they may carry a signature.
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
"""Longer idle connections are not used again: what stands in the way of them forgets some silently,
and each would then take its user's whole patience."""
_SHORT = 64 * 1024
"""A refusal with so short a body is read to its end, so that its connection can be used again."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The head of an answer, and its body bit by bit."""

    status: int
    headers: Message
    _answer: http.client.HTTPResponse
    _connection: http.client.HTTPConnection
    _wait_s: Callable[[], float]

    @property
    def length(self) -> int | None:
        """Bytes of the body that are still to come, where the server says so."""
        return self._answer.length

    def readinto(self, target: memoryview) -> int:
        """Receives what comes next into `target`; 0 bytes at the end of the body.

        Raises:
          TimeoutError, OSError, http.client.HTTPException: The connection broke.
        """
        # `readinto` of http.client goes on until the target is full: what had come before a reset
        # would be lost, and a server that drips would never meet a limit.
        _limit(self._connection, self._wait_s())
        payload = self._answer.read1(len(target))
        target[: len(payload)] = payload
        if self._answer.length == 0:
            self._answer.read()  # tells the answer that it has ended
        return len(payload)


class _Kept(NamedTuple):
    """An idle connection."""

    connection: http.client.HTTPConnection
    since_s: float


class Connections:
    """Idle connections by server."""

    def __init__(self, *, ca_file: str | None = None) -> None:
        """Opens nothing yet.

        Args:
          ca_file: Certificates that servers are trusted by; None: the system's.
        """
        self._ca_file = ca_file
        self._context: ssl.SSLContext | None = None
        self._idle: defaultdict[tuple[str, str], list[_Kept]] = defaultdict(list)
        self._opening: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._idle)

    def open_soon(self, url: str, number: int, *, wait_s: float) -> None:
        """Begins to open connections to a server, which wait for their first use; returns at once.

        What comes of it is not told: who asks finds an open connection, or opens one.

        Args:
          url: Any of the server's.
          number: How many shall be open and idle.
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
                # A name that no host can have is a ValueError.
                if connection is not None:
                    connection.close()
            finally:
                with self._lock:
                    self._opening[server] -= 1

        for _ in range(number):
            threading.Thread(target=connect, name="connect", daemon=True).start()
        if number:
            # Those that nobody has used by then would be kept, and never used.
            closing = threading.Timer(wait_s + _IDLE_S, self._close_old, args=(server,))
            closing.daemon = True
            closing.start()

    @contextmanager
    def get(
        self, url: str, headers: Mapping[str, str], *, wait_s: Callable[[], float]
    ) -> Iterator[Answer]:
        """Asks for a URL; its connection is kept if the body has been read when the block ends.

        Args:
          url: http or https.
          headers: Of the request, beside Host.
          wait_s: Tells how long to wait now for the next part of the answer, in seconds.

        Raises:
          TimeoutError, OSError, http.client.HTTPException: No answer came.
        """
        at = urlsplit(url)
        server = at.scheme, at.netloc
        target = f"{at.path or '/'}?{at.query}" if at.query else at.path or "/"
        connection, answer = self._ask(server, target, headers, wait_s)
        try:
            yield Answer(answer.status, answer.headers, answer, connection, wait_s)
            if answer.status >= 300 and (answer.length is None or answer.length < _SHORT):
                answer.read(_SHORT)
        except BaseException:
            connection.close()
            raise
        self._keep(server, connection, answer)

    def _ask(
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
                answer = connection.getresponse()
                if answer.status != 408 or kept is None:
                    return connection, answer
                # What some servers say to a connection that has been idle for long.
                connection.close()
            except (ConnectionError, http.client.BadStatusLine):
                connection.close()
                # A server closes idle connections without a word; a new one tells what is true.
                if kept is None:
                    raise
            except TimeoutError:
                connection.close()
                if kept is not None:
                    self._drop(server)  # the others have been as silent
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
        answer: http.client.HTTPResponse,
    ) -> None:
        if answer.isclosed():
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
    """Gives the connections of this process to a server, for all who read from it.

    Args:
      url: Any of the server's.
      ca_file: As of `Connections`.
    """
    at = urlsplit(url)
    # By process: what a forked child has are its parent's. Two threads that make them at the same
    # time may have one set each.
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
