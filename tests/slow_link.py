"""A slow link on loopback: it costs time, and hardly any of the processor's.

    python tests/slow_link.py http://127.0.0.1:PORT --latency 0.02 --rate 1e8

What a client sends waits `latency` before it is passed on, and so does a new connection: a request
waits once, as if the store were so far away. What the server sends passes at `rate`, all
connections together. Bodies move from socket to socket inside the kernel (splice) and are never
looked at. It prints its address and runs until its standard input ends. To each line of that it
answers with the bytes that have passed since the line before, and the seconds between the first and
the last of them.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import socket
import sys
import threading
import time
from urllib.parse import urlsplit

_PIECE = 256 * 1024
_GRAIN_S = 0.002
"""Shorter sleeps than the timer's grain would make the link slower than it says."""


class SlowLink:
    def __init__(self, upstream, *, latency_s, bytes_per_s):
        at = urlsplit(upstream)
        self._upstream = at.hostname, at.port
        self._latency_s, self._bytes_per_s = latency_s, bytes_per_s
        self._lock = threading.Lock()
        self._free_s = 0.0
        self._passed, self._first_s, self._last_s = 0, 0.0, 0.0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def serve(self):
        while True:
            client, _ = self._listener.accept()
            threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def account(self):
        """Tells (bytes, seconds) of what has passed since it was asked last."""
        with self._lock:
            passed, self._passed = self._passed, 0
            return passed, self._last_s - self._first_s

    def _connect(self, client):
        time.sleep(self._latency_s)
        with client, socket.create_connection(self._upstream) as server:
            for each in (client, server):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            back = threading.Thread(target=self._answer, args=(server, client), daemon=True)
            back.start()
            with contextlib.suppress(OSError):
                while asked := client.recv(_PIECE):
                    time.sleep(self._latency_s)
                    server.sendall(asked)
            _hang_up(server, client)
            back.join()

    def _answer(self, server, client):
        out, into = os.pipe()
        fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, 4 * _PIECE)
        try:
            while left := os.splice(server.fileno(), into, _PIECE):
                self._pace(left)
                while left:
                    left -= os.splice(out, client.fileno(), left)
        except OSError:
            pass  # one of them has hung up
        finally:
            os.close(out)
            os.close(into)
            _hang_up(server, client)

    def _pace(self, num_bytes):
        with self._lock:
            now = time.monotonic()
            if not self._passed:
                self._first_s = now
            self._passed += num_bytes
            self._free_s = max(self._free_s, now) + num_bytes / self._bytes_per_s
            self._last_s = self._free_s
            wait_s = self._free_s - now
        if wait_s > _GRAIN_S:
            time.sleep(wait_s)


def _hang_up(*sockets):
    for each in sockets:
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("upstream")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds per request")
    parser.add_argument("--rate", type=float, required=True, help="bytes per second of all answers")
    options = parser.parse_args()
    link = SlowLink(options.upstream, latency_s=options.latency, bytes_per_s=options.rate)
    print(link.endpoint, flush=True)
    threading.Thread(target=link.serve, daemon=True).start()
    for _ in sys.stdin:
        print(*link.account(), flush=True)


if __name__ == "__main__":
    main()
