"""FETCH and a server in one event loop whose clock moves only when nothing else happens.

Hours of pauses pass in milliseconds, and what the server's log says of time is exact.
"""

from __future__ import annotations

import asyncio
import gzip
import selectors
import socket
import struct
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from preprocess.fetch import download
from tests.preprocess.fetch.faulty_http import FaultyServer, picture

GRACE_S = 0.002
"""Real seconds in which the kernel brings what has been sent over loopback."""


class _Selector(selectors.DefaultSelector):
    now_s = 0.0

    def select(self, timeout=None):
        if timeout is None:
            return super().select()
        found = super().select(0) or (super().select(GRACE_S) if timeout > 0 else [])
        if not found and timeout > 0:
            self.now_s += max(timeout, 1e-6)
        return found


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time starts where it is told to."""

    def __init__(self, now_s: float) -> None:
        self._clock = _Selector()
        self._clock.now_s = now_s
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now_s


class _Inline(ThreadPoolExecutor):
    """Does at once what is given to threads."""

    def submit(self, call, /, *args, **kwargs):
        done: Future = Future()
        try:
            done.set_result(call(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - it is the caller's
            done.set_exception(error)
        return done


@dataclass
class Request:
    """A line of the server's log."""

    at_s: float
    host: str
    path: str
    user_agent: str
    until_s: float = 0.0


@dataclass
class VirtualServer(FaultyServer):
    """Serves while FETCH runs, on loopback addresses that each play a host."""

    robots: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Status and text of robots.txt by host; the others have none. Status 0 never answers."""
    log: list[Request] = field(default_factory=list)
    down_until_s: dict[str, float] = field(default_factory=dict)
    """By host, until when it answers everything with status 500."""
    now_s: float = 0.0
    """Of all loops."""

    def clock(self) -> float:
        """Gives the time of day."""
        return 1_700_000_000 + self.loop.time() if self.loop else 1_700_000_000 + self.now_s

    def __init__(self, *, hosts: tuple[str, ...]) -> None:
        super().__init__(hosts=hosts)
        self.robots, self.log, self.down_until_s, self.loop = {}, [], {}, None
        self._sockets = {host: socket.create_server((host, 0)) for host in hosts}
        self.ports = {host: each.getsockname()[1] for host, each in self._sockets.items()}

    def close(self) -> None:
        for each in self._sockets.values():
            each.close()

    def run(self, work):
        """What asyncio.run is meanwhile."""
        self.loop = VirtualLoop(self.now_s)
        try:
            return self.loop.run_until_complete(self._run(work))
        finally:
            self.now_s = self.loop.time()
            self.loop.close()
            self.loop = None

    async def _run(self, work):
        app = web.Application()
        app.router.add_get("/{kind}{rest:.*}", self._logged)
        runner = web.AppRunner(
            app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True
        )
        await runner.setup()
        for each in self._sockets.values():
            await web.SockSite(runner, each.dup()).start()
        try:
            return await work
        finally:
            await runner.cleanup()

    async def _logged(self, request: web.Request) -> web.StreamResponse:
        now_s = asyncio.get_running_loop().time
        line = Request(
            at_s=now_s(),
            host=request.host.partition(":")[0],
            path=request.path_qs,
            user_agent=request.headers["User-Agent"],
        )
        self.log.append(line)
        try:
            if line.at_s < self.down_until_s.get(line.host, 0.0):
                return web.Response(status=500)
            if request.path == "/robots.txt":
                status, text = self.robots.get(line.host, (404, ""))
                if not status:
                    await asyncio.sleep(3600)
                return web.Response(status=status, text=text)
            return await self._answer(request)
        finally:
            line.until_s = now_s()

    async def _header(self, request: web.Request) -> web.Response:
        """/header/any?NAME=VALUE: an image with these headers."""
        response = await self._ok(request)
        for name, value in request.query.items():
            response.headers.add(name, value)
        return response

    async def _slowly(self, request: web.Request) -> web.Response:
        await asyncio.sleep(3)
        return await self._ok(request)

    async def _crowded(self, request: web.Request) -> web.StreamResponse:
        """/crowded/NUM/any: an image after 3 s, or 503 while NUM others are under way."""
        host, most = request.host.partition(":")[0], int(request.path.split("/")[2])
        running = [line for line in self.log if line.host == host and not line.until_s]
        if len(running) > most:
            return web.Response(status=503)
        return await self._slowly(request)

    async def _trickle(self, request: web.Request) -> web.StreamResponse:
        """A byte now and then, without end."""
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"x")
            await asyncio.sleep(5)

    async def _chain(self, request: web.Request) -> web.Response:
        """/chain/NUM: redirects to the next number, for ever."""
        following = int(request.path.split("/")[2]) + 1
        return web.Response(status=307, headers={"Location": f"/chain/{following}"})

    async def _cut(self, request: web.Request) -> web.Response:
        """A file that ends early, with the length that it has."""
        body = picture(request.path)[:-20]
        request.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        request.transport.close()
        return web.Response()

    async def _claims(self, request: web.Request) -> web.Response:
        """/claims/SIDE: a small file whose header says that it is a huge picture."""
        body = picture(request.path)
        head = b"IHDR" + struct.pack(">II", *[int(request.path.split("/")[2])] * 2) + body[24:29]
        return web.Response(body=body[:12] + head + struct.pack(">I", zlib.crc32(head)) + body[33:])

    async def _typed(self, request: web.Request) -> web.Response:
        """A picture that is called a page."""
        return web.Response(body=picture(request.path), content_type="text/html")

    async def _zipped(self, request: web.Request) -> web.Response:
        """Compressed, though that was not accepted."""
        body = gzip.compress(picture(request.path))
        return web.Response(body=body, headers={"Content-Encoding": "gzip"})

    async def _inflates(self, request: web.Request) -> web.Response:  # noqa: ARG002
        """Few bytes that become many."""
        body = gzip.compress(bytes(10_000_000))
        return web.Response(body=body, headers={"Content-Encoding": "gzip"})

    async def _overruns(self, request: web.Request) -> web.Response:
        """Sends more than it has announced."""
        head = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 10\r\n\r\n"
        request.transport.write(head + picture(request.path))
        request.transport.close()
        return web.Response()

    async def _heads(self, request: web.Request) -> web.Response:
        """A header without end."""
        response = await self._ok(request)
        response.headers["X-Long"] = "x" * 100_000
        return response

    async def _gone(self, request: web.Request) -> web.Response:
        """The same picture whatever the path."""
        return await self._ok(request.clone(rel_url="/ok/gone"))


@pytest.fixture
def virtual_server(monkeypatch):
    """A function that makes a server for hosts; FETCH runs in the server's loop from then on."""
    made = []

    def make(*hosts):
        server = VirtualServer(hosts=hosts)
        made.append(server)
        monkeypatch.setattr(download, "ThreadPoolExecutor", _Inline)
        monkeypatch.setattr(asyncio, "run", server.run)
        return server

    yield make
    for server in made:
        server.close()
