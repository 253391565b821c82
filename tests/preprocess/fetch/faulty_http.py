"""A real HTTP server on the loopback interface that misbehaves as its paths say.

It runs in a thread, counts what it is asked, and keeps the largest number of requests at a time.
"""

from __future__ import annotations

import asyncio
import io
import threading
from collections import Counter

from aiohttp import web
from PIL import Image


def picture(name: str, *, size: tuple[int, int] = (8, 6)) -> bytes:
    """Draws a small PNG whose bytes depend on its name."""
    color = tuple(name.encode()[-3:].rjust(3, b"\0"))
    buffer = io.BytesIO()
    image = Image.new("RGB", size, color)
    image.putpixel((0, 0), (len(name), sum(name.encode()) % 256, 0))
    image.save(buffer, "PNG")
    return buffer.getvalue()


class FaultyServer:
    """Serves until the `with` block ends; `server.url("/ok/a.png")` names what it can do."""

    def __init__(self, *, hosts: tuple[str, ...] = ("127.0.0.1",)) -> None:
        self.hosts = hosts
        self.ports: dict[str, int] = {}
        self.requests: Counter[str] = Counter()
        """Requests by path and query."""
        self.headers: list[dict[str, str]] = []
        self.times_s: dict[str, list[float]] = {}
        self.running: Counter[str] = Counter()
        self.most_running: Counter[str] = Counter()
        """Most simultaneous requests, by Host header; "" for all together."""
        self.hanging = threading.Event()
        """Set when a request to /hang has come."""
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> FaultyServer:
        self._thread.start()
        assert self._started.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self._event_loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        assert not self._thread.is_alive()

    def url(self, path: str, *, host: str | None = None) -> str:
        host = host or self.hosts[0]
        port = self.ports.get(host, self.ports[self.hosts[0]])
        return f"http://{host}:{port}{path}"

    async def _serve(self) -> None:
        self._event_loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        app = web.Application()
        app.router.add_get("/{kind}{rest:.*}", self._answer)
        runner = web.AppRunner(
            app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True
        )
        await runner.setup()
        for host in self.hosts:
            site = web.TCPSite(runner, host, 0)
            await site.start()
            self.ports[host] = site._server.sockets[0].getsockname()[1]
        self._started.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests[request.path_qs] += 1
        self.headers.append(dict(request.headers))
        self.times_s.setdefault(request.path_qs, []).append(asyncio.get_running_loop().time())
        for name in ("", request.host):
            self.running[name] += 1
            self.most_running[name] = max(self.most_running[name], self.running[name])
        try:
            if request.path == "/robots.txt":
                return web.Response(status=404)
            kind = request.path.split("/")[1]
            return await getattr(self, f"_{kind}")(request)
        finally:
            for name in ("", request.host):
                self.running[name] -= 1

    async def _ok(self, request: web.Request) -> web.Response:
        return web.Response(body=picture(request.path), content_type="image/png")

    async def _slow(self, request: web.Request) -> web.Response:
        await asyncio.sleep(0.02)
        return await self._ok(request)

    async def _status(self, request: web.Request) -> web.Response:
        return web.Response(status=int(request.path.split("/")[2]))

    async def _flaky(self, request: web.Request) -> web.Response:
        """/flaky/STATUS/NUM/name: fails NUM times."""
        _, _, status, num, _ = request.path.split("/")
        if self.requests[request.path_qs] <= int(num):
            headers = {"Retry-After": request.query["after"]} if "after" in request.query else {}
            return web.Response(status=int(status), headers=headers)
        return await self._ok(request)

    async def _hang(self, request: web.Request) -> web.Response:
        self.hanging.set()
        await asyncio.sleep(60)
        return await self._ok(request)

    async def _drip(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"x")
            await asyncio.sleep(0.02)

    async def _short(self, request: web.Request) -> web.StreamResponse:
        """Ends the connection before the announced length."""
        body = picture(request.path)
        response = web.StreamResponse()
        response.content_length = len(body)
        await response.prepare(request)
        await response.write(body[:-10])
        request.transport.close()
        return response

    async def _close(self, request: web.Request) -> web.Response:
        """Announces no length, and ends the connection before the end."""
        request.transport.write(b"HTTP/1.1 200 OK\r\n\r\n" + picture(request.path)[:-20])
        request.transport.close()
        return web.Response()

    async def _chop(self, request: web.Request) -> web.StreamResponse:
        """Ends the connection in the middle of a chunked body."""
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(picture(request.path))
        request.transport.close()
        return response

    async def _reset(self, request: web.Request) -> web.Response:
        request.transport.abort()
        return web.Response()

    async def _garbage(self, request: web.Request) -> web.Response:
        request.transport.write(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")
        request.transport.close()
        return web.Response()

    async def _html(self, request: web.Request) -> web.Response:
        return web.Response(text="<html>sorry</html>", content_type="image/jpeg")

    async def _pdf(self, request: web.Request) -> web.Response:  # noqa: ARG002
        return web.Response(body=b"%PDF-1.7 and more")

    async def _empty(self, request: web.Request) -> web.Response:
        return web.Response(body=b"", content_type="image/png")

    async def _wide(self, request: web.Request) -> web.Response:
        return web.Response(body=picture(request.path, size=(100, 100)))

    async def _big(self, request: web.Request) -> web.Response:
        return web.Response(body=bytes(100_000))

    async def _endless(self, request: web.Request) -> web.StreamResponse:
        """Announces no length and never stops."""
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(bytes(10_000))

    async def _to(self, request: web.Request) -> web.Response:
        """/to?url=...: redirects there."""
        return web.Response(status=302, headers={"Location": request.query["url"]})

    async def _latin(self, request: web.Request) -> web.Response:
        """Redirects to a path in Latin-1."""
        head = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nConnection: close\r\n"
        request.transport.write(head + b"Location: /ok/\xe4.png\r\n\r\n")
        request.transport.close()
        return web.Response()

    async def _loop(self, request: web.Request) -> web.Response:
        return web.Response(status=301, headers={"Location": request.path})
