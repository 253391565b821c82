"""A real HTTP proxy on loopback between a client and a store, that misbehaves on purpose.

It understands just enough HTTP to know where an answer begins and ends. Which GET gets which fault
is drawn by a seeded generator, so that a run can be had again. Everything is counted: requests,
bytes of bodies, faults by kind, and the range of each GET.

    with FaultProxy(server.endpoint, faults={"reset": 0.05}, seed=1) as proxy:
        ... proxy.endpoint ...
        proxy.counts["reset"]

A link that is slow and nothing else, for measurements, is slow_link.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import socket
import threading
from collections import Counter
from dataclasses import dataclass
from unittest import mock
from urllib.parse import urlsplit

from tests import servers

FAULTS = (
    "status_503",
    "status_429",
    "drop",
    "reset",
    "short",
    "wrong_range",
    "corrupt",
    "stall",
    "drip",
)
"""Refused; refused with Retry-After; closed before the answer; reset in the middle of the body;
fewer bytes than Content-Length says; another range than was asked for; one byte of the body
changed; silence in the middle of the body; a byte now and then from the middle of the body on."""

_CHUNK = 256 * 1024
_HEAD_LIMIT = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class Request:
    """A GET as it came."""

    path: str
    start: int | None
    stop: int | None
    fault: str | None


class FaultProxy:
    """Runs in a thread until the `with` block ends."""

    def __init__(
        self,
        upstream,
        *,
        faults=None,
        seed=0,
        latency_s=0.0,
        bytes_per_s=None,
        retry_after_s=0.05,
        keep_host=True,
        only="",
    ):
        """Names what goes wrong.

        Args:
          upstream: "http://host:port" of the store.
          faults: Share of the GETs by kind of fault.
          seed: Of the generator that draws them.
          latency_s: Wait before each request is passed on.
          bytes_per_s: Limit over all bodies together.
          retry_after_s: What a 429 asks for.
          keep_host: Leave the Host header alone: signatures cover it.
          only: Faults strike only GETs whose path contains this.
        """
        self.upstream = urlsplit(upstream)
        self.faults = dict(faults or {})
        assert set(self.faults) <= set(FAULTS)
        self.latency_s, self.bytes_per_s = latency_s, bytes_per_s
        self.retry_after_s, self.keep_host, self.only = retry_after_s, keep_host, only
        self.whole = False
        """Set it, and faults strike GETs without a range too."""
        self.dead = False
        """Set it, and connections are accepted but never answered."""
        self.refusing = False
        """Set it, and every request is answered with 503, whatever its method."""
        self.counts: Counter[str] = Counter()
        self.gets: list[Request] = []
        self.body_bytes = 0
        """Bytes of bodies that were sent to clients."""
        self._rng = random.Random(seed)
        self._free_s = 0.0
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self):
        self._thread.start()
        assert self._started.wait(60)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        assert not self._thread.is_alive()

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.port}"

    def env(self, server):
        """The environment that points clients of a server of servers.py here instead."""
        return {k: v.replace(server.endpoint, self.endpoint) for k, v in server.env.items()}

    @contextlib.contextmanager
    def entered(self, server):
        """Points the clients of this process here; no client outlives the block."""
        with mock.patch.dict(os.environ, self.env(server)):
            servers.forget_clients()
            try:
                yield self
            finally:
                servers.forget_clients()

    async def _serve(self):
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._tasks, self._connections, self._writers = set(), [], []
        self._listener, self.port = None, 0
        self._listen()
        self._started.set()
        await self._stop.wait()
        self._hang_up()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # Nothing may be left open when the loop ends: the ResourceWarning of a connection that the
        # garbage collector finds fails a later test. `close` would wait for peers that do not read.
        for writer in self._writers:
            writer.transport.abort()
        closed = [writer.wait_closed() for writer in self._writers]
        await asyncio.gather(*closed, return_exceptions=True)
        for connection in self._connections:
            connection.close()

    def _listen(self):
        # asyncio's own server leaves connections open that come just before it is closed.
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener, self._accept, self._listener)
        self.port = self._listener.getsockname()[1]

    def _hang_up(self):
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        for writer in self._writers:
            writer.transport.abort()

    @contextlib.contextmanager
    def away(self, kind):
        """For the duration of the block, the store is "refused" (nobody listens, connections are
        reset), answers "status_503" to everything, or is "silent"."""
        if kind == "refused":
            self._on_loop(self._hang_up)
        elif kind == "status_503":
            self.refusing = True
        else:
            self.dead = True
        try:
            yield
        finally:
            if kind == "silent":
                self.dead = False
                self._on_loop(self._hang_up)
                self._on_loop(self._listen)
            elif kind == "refused":
                self._on_loop(self._listen)
            self.refusing = False

    def _on_loop(self, work):
        done = threading.Event()
        self._loop.call_soon_threadsafe(lambda: (work(), done.set()))
        assert done.wait(60)

    def _accept(self, listener):
        with contextlib.suppress(BlockingIOError):
            connection, _ = listener.accept()
            self._connections.append(connection)
            task = self._loop.create_task(self._answer(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connect(self, **where):
        reader, writer = await asyncio.open_connection(limit=2 * _CHUNK, **where)
        self._writers.append(writer)
        return reader, writer

    async def _answer(self, connection):
        reader, writer = await self._connect(sock=connection)
        upstream = _Upstream(self.upstream, self._connect)
        try:
            while True:
                await self._exchange(reader, writer, upstream)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError, _Hangup):
            pass
        finally:
            writer.close()
            upstream.close()

    async def _exchange(self, reader, writer, upstream):
        """Passes on a request and its answer."""
        head = await reader.readuntil(b"\r\n\r\n")
        method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
        self.counts["requests"] += 1
        if self.dead:
            await self._stop.wait()
            raise _Hangup
        fault = None
        if method == "GET":
            fault = self._draw(path, head)
        if self.latency_s:
            await asyncio.sleep(self.latency_s)
        if fault == "drop":
            raise _Hangup
        if self.refusing:
            self.counts["refused"] += 1
            writer.write(
                b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            )
            await writer.drain()
            raise _Hangup
        if fault in ("status_503", "status_429"):
            status = "503 Slow Down" if fault == "status_503" else "429 Too Many Requests"
            after = f"Retry-After: {self.retry_after_s:g}\r\n" if fault == "status_429" else ""
            writer.write(f"HTTP/1.1 {status}\r\n{after}Content-Length: 0\r\n\r\n".encode())
            await writer.drain()
            return
        await upstream.connect()
        if not self.keep_host:
            host = b"\r\nHost: " + self.upstream.netloc.encode()
            head = re.sub(rb"(?i)\r\nHost:[^\r]*", host, head)
        if re.search(rb"(?i)\r\nExpect: 100-continue", head):
            # The client sends its body when it may. Signatures do not cover this header.
            head = re.sub(rb"(?i)\r\nExpect:[^\r]*", b"", head)
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            await writer.drain()
        upstream.writer.write(head)
        await self._pass_body(reader, upstream.writer, head, asked="request")
        answer = await self._answer_head(upstream.reader)
        if b" 100 " in answer.split(b"\r\n", 1)[0]:
            writer.write(answer)
            answer = await self._answer_head(upstream.reader)
        if fault == "wrong_range":
            # A signature covers the request: it is the answer that is about other bytes.
            answer = re.sub(rb"(?i)(\r\nContent-Range: bytes )\d+", rb"\g<1>7", answer)
        writer.write(answer)
        await writer.drain()
        if method != "HEAD" and not re.match(rb"HTTP/1.1 (204|304)", answer):
            await self._pass_body(upstream.reader, writer, answer, asked="answer", fault=fault)
        await writer.drain()
        if re.search(rb"(?i)\r\nConnection: close", answer):
            raise _Hangup

    async def _answer_head(self, reader):
        return await reader.readuntil(b"\r\n\r\n")

    def _draw(self, path, head):
        found = re.search(rb"(?i)\r\nRange: bytes=(\d+)-(\d+)", head)
        start, stop = (int(found[1]), int(found[2]) + 1) if found else (None, None)
        fault, mark = None, self._rng.random()
        for kind, share in self.faults.items():
            if mark < share and self.only in path and (found or self.whole):
                fault = kind
                break
            mark -= share
        self.gets.append(Request(path=path, start=start, stop=stop, fault=fault))
        self.counts["gets"] += 1
        if fault:
            self.counts[fault] += 1
        return fault

    async def _pass_body(self, reader, writer, head, *, asked, fault=None):
        length = re.search(rb"(?i)\r\nContent-Length: (\d+)", head)
        if length:
            await self._pass_bytes(reader, writer, int(length[1]), asked, fault)
        elif re.search(rb"(?i)\r\nTransfer-Encoding: chunked", head):
            while True:
                line = await reader.readuntil(b"\r\n")
                writer.write(line)
                size = int(line.split(b";")[0], 16)
                await self._pass_bytes(reader, writer, size + 2, asked, None)
                if not size:
                    break

    async def _pass_bytes(self, reader, writer, length, asked, fault):
        stop = length
        if fault in ("reset", "short", "stall", "drip"):
            stop = self._rng.randrange(length) if length else 0
        place = 0
        while place < stop:
            chunk = await reader.read(min(_CHUNK, stop - place))
            if not chunk:
                raise _Hangup
            if fault == "corrupt" and place == 0:
                chunk = bytes([chunk[0] ^ 0x55]) + chunk[1:]
            if asked == "answer":
                await self._pace(len(chunk))
                self.body_bytes += len(chunk)
            writer.write(chunk)
            await writer.drain()
            place += len(chunk)
        if stop == length and fault not in ("reset", "short", "stall", "drip"):
            return
        while fault == "drip":
            writer.write(await reader.readexactly(1))
            await writer.drain()
            await asyncio.sleep(0.1)
        if fault == "stall":
            await self._stop.wait()
        if fault == "short":
            # Clients throw away what arrives together with the end; here it arrives before.
            await asyncio.sleep(0.05)
        if fault == "reset":
            # The rest of the body that is buffered is thrown away, and the peer gets a reset.
            writer.transport.abort()
        raise _Hangup

    async def _pace(self, num_bytes):
        """Lets bytes pass at the rate of the link, whoever sends them."""
        if self.bytes_per_s is None:
            return
        now = self._loop.time()
        self._free_s = max(self._free_s, now) + num_bytes / self.bytes_per_s
        # Shorter sleeps than the timer's grain would make the link slower than it says.
        if self._free_s - now > 0.002:
            await asyncio.sleep(self._free_s - now)


class _Upstream:
    """A connection to the store, made when it is needed."""

    def __init__(self, url, connect):
        self._url, self._connect = url, connect
        self.reader = self.writer = None

    async def connect(self):
        if self.writer is None:
            self.reader, self.writer = await self._connect(
                host=self._url.hostname, port=self._url.port
            )

    def close(self):
        if self.writer is not None:
            self.writer.close()


class _Hangup(Exception):
    """The connection ends here."""
