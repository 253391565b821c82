"""The servers that the suite starts: they are real, and they keep to themselves."""

import gc
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from tests.fault_proxy import FaultProxy

ROOT = Path(__file__).parents[1]

CLIENT = """
import sys, fsspec
fs, path = fsspec.core.url_to_fs(sys.argv[1])
fs.pipe_file(path, b"from another process")
print(*fs.ls(fs._parent(path), detail=False))
"""


@pytest.fixture(params=["s3", "gcs"])
def server(request):
    return request.getfixturevalue(f"{request.param}_server")


@pytest.mark.slow
def test_another_process_needs_nothing_but_the_environment(server):
    bucket = server.make_bucket()
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, f"{bucket}/set/a"],
        env={**os.environ, **server.env},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [f"{bucket}/set/a".split("://")[1]]
    assert server.objects(bucket) == {"set/a": 20}
    assert server.read(f"{bucket}/set/a") == b"from another process"


def test_a_server_leaves_nothing_in_the_environment(server):
    before = dict(os.environ)
    with server.entered():
        assert dict(os.environ) == {**before, **server.env}
    assert dict(os.environ) == before


@pytest.mark.slow
def test_what_was_stored_survives_the_death_of_the_server(s3_servers):
    with s3_servers() as server:
        bucket = server.make_bucket()
        server.client().pipe_file(f"{bucket}/a", b"x" * 1000)
        server.kill()
        assert not server.answers()
        server.start()
        assert server.objects(bucket) == {"a": 1000}


def test_open_multipart_uploads_are_seen(s3_server):
    bucket = s3_server.make_bucket()
    client = s3_server.client()
    name = bucket.removeprefix("s3://")
    client.call_s3("create_multipart_upload", Bucket=name, Key="set/a")
    assert s3_server.uploads(bucket) == ["set/a"]
    assert s3_server.uploads(f"{bucket}/other") == []
    assert s3_server.objects(bucket) == {}


SUITE = """
import pathlib, sys, time
from tests import servers
with servers.{}_server(pathlib.Path(sys.argv[1]) / "server") as server:
    print(server.process.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's promise is Linux's")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("kind", ["s3", "gcs"])
def test_a_server_dies_with_the_process_that_started_it(kind, number, tmp_path):
    command = [sys.executable, "-c", SUITE.format(kind), str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as suite:
        pid = int(suite.stdout.readline())
        assert is_running(pid)
        suite.send_signal(number)
        assert suite.wait() == -number
    while is_running(pid):  # pytest-timeout ends a test that waits in vain
        time.sleep(0.01)


def is_running(pid):
    """A process that nobody has waited for yet has ended all the same."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def test_a_proxy_leaves_no_connection_open_whoever_is_still_coming():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(5):
            # Nobody listens behind it: its clients never ask for anything.
            with FaultProxy("http://127.0.0.1:1") as proxy:
                clients = [socket.create_connection(("127.0.0.1", proxy.port)) for _ in range(20)]
            for client in clients:
                client.close()
        del proxy
        gc.collect()
    assert [w.message for w in found if "unclosed" in str(w.message)] == []
