"""Connections, against a real web server: when one is used again, and when not."""

import http.server
import socketserver
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest

from shardspec.storage import connections as wire
from shardspec.storage.connections import Connections
from tests.servers import free_ports

BODY = bytes(range(256)) * 1000


class Web(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.connections = 0
        self.hangs_up = False
        self.silent = 0
        """Of the first so many connections nothing is heard any more."""
        self.stalls = threading.Event()
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self):
        super().setup()
        self.server.connections += 1
        self.number = self.server.connections

    def do_GET(self):  # noqa: N802 - the name is the library's
        if self.number <= self.server.silent:
            self.server.stalls.wait(60)
        if self.path == "/busy":
            self.send_response(503)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"4\r\nbusy\r\n0\r\n\r\n")
            return
        missing = self.path.startswith("/missing")
        body = b"there is none" if missing else BODY
        self.send_response(404 if missing else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Asked", self.path + " " + self.headers.get("X-Name", ""))
        self.end_headers()
        if self.path == "/stall":
            self.wfile.write(body[:10])
            self.server.stalls.wait(60)
        else:
            self.wfile.write(body)
        # Without a word to the client, as servers do with connections that were idle for long.
        self.close_connection = self.server.hangs_up

    def log_message(self, *args):
        pass


@pytest.fixture
def web():
    server = Web()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.stalls.set()
    server.shutdown()
    thread.join(60)
    server.server_close()


def get(connections, url, *, most=None, wait_s=10.0, **headers):
    most = most or len(BODY)
    with connections.get(url, headers, wait_s=lambda: wait_s) as answer:
        target = memoryview(bytearray(most))
        place = 0
        while place < most:
            received = answer.readinto(target[place:])
            if not received:
                break
            place += received
        return answer.status, bytes(target[:place]), answer.headers["X-Asked"]


def test_a_connection_is_used_again_when_its_answer_was_read(web):
    connections = Connections()
    for i in range(5):
        got = get(connections, f"{web.endpoint}/a?b=c%20{i}", **{"X-Name": "n"})
        assert got == (200, BODY, f"/a?b=c%20{i} n")
    assert web.connections == 1


@pytest.mark.parametrize(("path", "status"), [("/missing", 404), ("/busy", 503)])
def test_a_short_refusal_costs_no_connection(web, path, status):
    connections = Connections()
    for _ in range(3):
        with connections.get(web.endpoint + path, {}, wait_s=lambda: 10.0) as answer:
            assert answer.status == status
    assert web.connections == 1


def test_connections_that_fell_silent_cost_one_wait(web):
    connections = Connections()
    threads = [
        threading.Thread(target=get, args=(connections, f"{web.endpoint}/a")) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    web.silent = web.connections
    with pytest.raises(TimeoutError):
        get(connections, f"{web.endpoint}/a", wait_s=0.2)
    assert get(connections, f"{web.endpoint}/a", wait_s=10)[1] == BODY


def test_connections_that_were_idle_for_long_are_not_used_again(web, monkeypatch):
    connections = Connections()
    get(connections, f"{web.endpoint}/a")
    monkeypatch.setattr("shardspec.storage.connections._IDLE_S", 0.0)
    get(connections, f"{web.endpoint}/a")
    assert web.connections == 2


def test_what_came_before_a_stall_is_told(web):
    target = memoryview(bytearray(1000))
    with Connections().get(f"{web.endpoint}/stall", {}, wait_s=lambda: 2.0) as answer:
        assert answer.readinto(target) == 10
    assert target[:10] == BODY[:10]


def test_an_answer_that_was_left_unread_ends_its_connection(web):
    connections = Connections()
    for _ in range(3):
        assert get(connections, f"{web.endpoint}/a", most=100)[1] == BODY[:100]
    assert web.connections == 3


def test_connections_that_the_server_has_closed_are_replaced(web):
    connections = Connections()
    web.hangs_up = True
    for _ in range(4):
        assert get(connections, f"{web.endpoint}/a")[1] == BODY
    assert web.connections == 4


def test_nobody_listening_and_silence_are_errors(web):
    connections = Connections()
    with pytest.raises(TimeoutError):
        get(connections, f"{web.endpoint}/stall", wait_s=0.2)
    get(connections, f"{web.endpoint}/a")
    web.stalls.set()
    web.shutdown()
    web.server_close()
    with pytest.raises(ConnectionRefusedError):
        get(Connections(), f"{web.endpoint}/a")


def test_threads_have_connections_of_their_own(web):
    connections, wrong = Connections(), []

    def work():
        for _ in range(10):
            if get(connections, f"{web.endpoint}/a")[1] != BODY:
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert 1 <= web.connections <= 4


def test_connections_that_were_opened_ahead_are_used(web):
    connections = Connections()
    connections.open_soon(web.endpoint, 3, wait_s=5)
    stop_s = time.monotonic() + 60
    while web.connections < 3 or sum(map(len, connections._idle.values())) < 3:
        assert time.monotonic() < stop_s
        time.sleep(0.01)
    with ThreadPoolExecutor(3) as pool:
        bodies = list(pool.map(lambda _: get(connections, web.endpoint + "/a"), range(12)))
    assert [body for _, body, _ in bodies] == [BODY] * 12
    assert web.connections == 3


def test_connections_that_nobody_used_are_closed(web, monkeypatch):
    monkeypatch.setattr(wire, "_IDLE_S", 0.2)
    connections = Connections()
    connections.open_soon(web.endpoint, 3, wait_s=0.1)
    stop_s = time.monotonic() + 60
    while web.connections < 3 or any(connections._idle.values()):
        assert time.monotonic() < stop_s
        time.sleep(0.01)


class Impatient(socketserver.BaseRequestHandler):
    """Says so, as some front ends do, when a new connection is silent for long; then hangs up."""

    def handle(self):
        self.request.settimeout(self.server.patience_s)
        try:
            asked = self.request.recv(65536)
        except TimeoutError:
            self.request.sendall(b"HTTP/1.0 408 Request Time-out\r\nConnection: close\r\n\r\nslow")
            return
        if asked:
            self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody")


def test_a_complaint_about_an_idle_connection_is_not_an_answer():
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Impatient) as server:
        server.daemon_threads, server.patience_s = True, 0.2
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        connections = Connections()
        connections.open_soon(endpoint, 8, wait_s=5)
        time.sleep(0.6)
        assert get(connections, endpoint, most=4)[:2] == (200, b"body")
        server.shutdown()


@pytest.mark.parametrize("fault", ["no certificates", "no port", "no host"])
def test_what_fails_while_opening_ahead_fails_silently(fault, web, tmp_path):
    url = {"no port": "http://127.0.0.1:port", "no host": f"http://{'a' * 70}.example"}
    certificates = str(tmp_path / "nothing.pem") if fault == "no certificates" else None
    connections = Connections(ca_file=certificates)
    with mock.patch.object(threading, "excepthook") as loud:
        connections.open_soon(url.get(fault, "https://127.0.0.1:1"), 2, wait_s=1)
        stop_s = time.monotonic() + 60
        while any(connections._opening.values()):
            assert time.monotonic() < stop_s
            time.sleep(0.01)
    assert not loud.called


def test_connections_that_cannot_be_opened_ahead_are_the_askers_matter():
    nobody = f"http://127.0.0.1:{free_ports(1)[0]}"
    connections = Connections()
    connections.open_soon(nobody, 2, wait_s=5)
    with pytest.raises(ConnectionError):
        get(connections, nobody + "/a")
    assert not any(connections._idle.values())
