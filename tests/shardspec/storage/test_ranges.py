import asyncio
import contextlib
import errno
import multiprocessing
import os
import pickle
import ssl
import threading
import time
from unittest import mock

import aiohttp.web
import numpy as np
import pytest

from shardspec import storage
from shardspec.errors import ConfigError, ShardError, StorageError
from shardspec.storage.client_ranges import ClientReader
from shardspec.storage.connections import Response
from shardspec.storage.ranges import RangeReader
from shardspec.storage.retries import RetryPolicy
from tests import servers
from tests.fault_proxy import FaultProxy

PAYLOAD = np.random.RandomState(0).bytes(1_000_000)
QUICK = RetryPolicy(idle_s=1.0, first_wait_s=0.01, wall_s=20)


class Store:
    """A bucket with one object, seen through a proxy."""

    def __init__(self, server, proxy):
        self.server, self.proxy = server, proxy
        self.bucket = server.make_bucket()
        self.url = f"{self.bucket}/set/object.bin"
        self.put(PAYLOAD)

    def put(self, payload):
        self.server.client().pipe_file(self.url, payload)


@pytest.fixture(params=["s3", pytest.param("gs", marks=pytest.mark.slow)])
def store(request):
    server = request.getfixturevalue("s3_server" if request.param == "s3" else "gcs_server")
    keep_host = request.param == "s3"
    with FaultProxy(server.endpoint, seed=6, keep_host=keep_host) as proxy, proxy.entered(server):
        yield Store(server, proxy)


@contextlib.contextmanager
def entered(env):
    """Clients of this process find their store by this environment."""
    with mock.patch.dict(os.environ, env):
        servers.forget_clients()
        try:
            yield
        finally:
            servers.forget_clients()


def refusal(kind, reader, *args, **options):
    with pytest.raises(kind) as caught:
        reader.read(*args, **options)
    return caught.value


def test_a_connection_that_drips_is_abandoned_for_another(store):
    store.proxy.faults = {"drip": 1.0}
    reader, got = RangeReader(QUICK), []
    reading = threading.Thread(target=lambda: got.append(reader.read(store.url, 0, 1_000_000)))
    reading.start()
    while not store.proxy.counts["drip"]:
        time.sleep(0.01)
    store.proxy.faults = {}  # other connections are sound; this one never ends
    reading.join(60)
    assert got == [PAYLOAD]
    assert reader.counters["retry_slow"] == 1


@pytest.mark.parametrize("start, stop", [(0, 1), (0, 1_000_000), (999_999, 1_000_000), (7, 7)])
def test_a_range_is_read_with_one_request_or_none(store, start, stop):
    reader = RangeReader()
    assert reader.read(store.url, start, stop, total=len(PAYLOAD)) == PAYLOAD[start:stop]
    assert reader.counters["requests"] == store.proxy.counts["gets"] == (stop > start)
    assert reader.counters["bytes"] == stop - start
    assert reader.counters["retries"] == 0
    assert reader.in_flight() == []


@pytest.mark.parametrize(
    "fault, cause",
    [
        ("status_503", "http_503"),
        ("status_429", "http_429"),
        ("reset", "short_body"),
        ("short", "short_body"),
        ("wrong_range", "wrong_range"),
        pytest.param("stall", "timeout", marks=pytest.mark.slow),
    ],
)
def test_every_fault_is_retried_and_counted_by_its_kind(store, fault, cause):
    store.proxy.faults = {fault: 0.5}
    reader = RangeReader(QUICK)
    for i in range(8):
        start = i * 100_000
        assert reader.read(store.url, start, start + 90_000) == PAYLOAD[start : start + 90_000]
    faults = store.proxy.counts[fault]
    assert faults >= 2
    # A machine that is busy enough makes pauses of its own.
    pauses = 0 if cause == "timeout" else reader.counters["retry_timeout"]
    assert reader.counters["retries"] - pauses == faults
    assert reader.counters[f"retry_{cause}"] == faults
    assert reader.counters["requests"] == 8 + faults + pauses


def test_a_connection_that_closes_before_the_answer_is_retried(store):
    store.proxy.faults = {"drop": 0.5}
    reader = RangeReader(QUICK)
    for i in range(8):
        assert reader.read(store.url, i, i + 1000) == PAYLOAD[i : i + 1000]
    assert store.proxy.counts["drop"] >= 2


def test_what_has_arrived_is_not_asked_for_again(store):
    store.proxy.faults = {"short": 0.7}
    reader = RangeReader(QUICK)
    for _ in range(3):
        assert reader.read(store.url, 0, len(PAYLOAD)) == PAYLOAD
    assert store.proxy.counts["short"] >= 3
    starts = [get.start for get in store.proxy.gets]
    assert sum(start > 0 for start in starts) >= 2
    assert reader.counters["bytes"] == 3 * len(PAYLOAD)
    for before, after in zip(store.proxy.gets, store.proxy.gets[1:], strict=False):
        if before.fault == "short":
            assert after.start >= before.start
            assert after.stop == before.stop


def test_a_whole_object_is_read_through_faults_without_knowing_its_length(store):
    store.proxy.whole = True
    store.proxy.faults = {"status_503": 0.2, "short": 0.3, "stall": 0.1}
    reader = RangeReader(QUICK)
    for _ in range(6):
        assert reader.read_all(store.url) == PAYLOAD
    assert reader.counters["retries"] >= 3
    with pytest.raises(FileNotFoundError):
        reader.read_all(store.url + ".not")


def test_retry_after_is_honoured(store):
    store.proxy.faults, store.proxy.retry_after_s = {"status_429": 1.0}, 1
    reader = RangeReader(QUICK)

    def forgive():
        while not store.proxy.counts["status_429"]:
            time.sleep(0.001)
        store.proxy.faults = {}

    threading.Thread(target=forgive).start()
    begin_s = time.monotonic()
    assert reader.read(store.url, 0, 10) == PAYLOAD[:10]
    # One refusal, and the second it asked for; without the header there would be dozens.
    assert time.monotonic() - begin_s >= 1
    assert reader.counters["retries"] == 1


def test_a_dead_store_is_abandoned_in_time_and_the_error_says_what_was_tried(store):
    reader = RangeReader(RetryPolicy(idle_s=0.4, wall_s=2, first_wait_s=0.01))
    reader.read(store.url, 0, 1)
    store.proxy.dead = True
    error = refusal(StorageError, reader, store.url, 5, 50)
    assert error.reason == "range_failed"
    assert error.where == store.url
    assert error.facts["range"] == "5-50"
    assert error.facts["received_bytes"] == 0
    assert 1 <= error.facts["attempts"] <= 6  # each waits 0.4 s of the 2
    assert error.facts["causes"] == f"timeout x {error.facts['attempts']}"


def test_attempts_in_vain_are_limited(store):
    store.proxy.faults = {"status_503": 1.0}
    policy = RetryPolicy(attempts=3, first_wait_s=0.001)
    error = refusal(StorageError, RangeReader(policy), store.url, 5, 50)
    assert error.reason == "range_failed"
    assert error.facts["causes"] == "http_503 x 3"
    assert store.proxy.counts["gets"] == 3  # the client below retries nothing by itself


def test_nobody_listening_is_abandoned_after_the_attempts(s3_server):
    (port,) = servers.free_ports(1)
    env = {**s3_server.env, "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}"}
    with entered(env):
        reader = RangeReader(RetryPolicy(attempts=3, first_wait_s=0.001))
        error = refusal(StorageError, reader, "s3://bucket/object", 0, 9)
    assert error.facts["causes"] == "connect x 3"


def test_refusals_that_no_attempt_cures_are_final(store):
    reader = RangeReader(QUICK)
    with pytest.raises(FileNotFoundError):
        reader.read(store.bucket + "/set/nothing.bin", 0, 9)
    assert refusal(ShardError, reader, store.url, 0, 9, total=12).reason == "shard_size"
    beyond = refusal(ShardError, reader, store.url, 4_000_000, 4_000_009)
    assert beyond.reason == "shard_size"
    assert reader.counters["requests"] == 3


def test_wrong_credentials_are_final(s3_server):
    url = s3_server.make_bucket() + "/a"
    s3_server.client().pipe_file(url, b"0123456789")
    with entered({**s3_server.env, "AWS_SECRET_ACCESS_KEY": "no"}):
        error = refusal(StorageError, RangeReader(QUICK), url, 0, 5)
    assert error.reason == "permission"
    assert error.facts["status"] == 403


def signed_by(reader, url):
    signed, path = reader._reader(url)
    return signed.urls, path, signed.urls.get(path, 10)


def test_a_signature_that_is_refused_leaves_it_to_the_client_and_is_made_again(s3_server):
    url = s3_server.make_bucket() + "/set/a b+c"
    s3_server.client().pipe_file(url, PAYLOAD)
    with FaultProxy(s3_server.endpoint) as proxy, proxy.entered(s3_server):
        reader = RangeReader(QUICK)
        urls, path, good = signed_by(reader, url)
        assert "X-Amz-Algorithm=AWS4-HMAC-SHA256" in good
        for read in (
            lambda: reader.read(url, 5, 50) == PAYLOAD[5:50],
            lambda: reader.read_all(url),
        ):
            urls._signed[path] = (time.monotonic() + 60, good[:-4] + "dead")
            gets = proxy.counts["gets"]
            assert read()
            assert proxy.counts["gets"] == gets + 2
            assert read()
            assert proxy.counts["gets"] == gets + 3
        assert reader.counters["retries"] == 0


def test_a_bucket_that_refuses_signatures_is_left_to_the_client(s3_server):
    url = s3_server.make_bucket() + "/a"
    s3_server.client().pipe_file(url, PAYLOAD)
    with FaultProxy(s3_server.endpoint) as proxy, proxy.entered(s3_server):
        reader = RangeReader(QUICK)
        for _ in range(5):
            urls, path, good = signed_by(reader, url)
            if good is not None:
                until_s, _ = urls._signed[path]
                urls._signed[path] = until_s, good[:-4] + "dead"
            gets = proxy.counts["gets"]
            assert reader.read(url, 5, 50) == PAYLOAD[5:50]
        assert good is None
        assert proxy.counts["gets"] == gets + 1


@pytest.mark.parametrize("bucket", ["set--use1-az4--x-s3", "arn:aws:s3::1:accesspoint/m.mrap"])
def test_buckets_with_signatures_of_their_own_are_left_to_the_client(bucket, s3_server):
    with s3_server.entered():
        reader, _ = RangeReader(QUICK)._reader(f"s3://{bucket}/a")
        assert isinstance(reader, ClientReader)
        assert "signature_version" not in reader.client.fs.config_kwargs


def test_a_broken_record_is_tried_again(s3_server, monkeypatch):
    url = s3_server.make_bucket() + "/a"
    s3_server.client().pipe_file(url, PAYLOAD)
    receive = Response.readinto
    broken = [ssl.SSLError(1, "bad record mac"), OSError(errno.ENOBUFS, "no buffers")]

    def once(self, target):
        if broken:
            raise broken.pop()
        return receive(self, target)

    monkeypatch.setattr(Response, "readinto", once)
    with s3_server.entered():
        reader = RangeReader(QUICK)
        assert reader.read(url, 5, 50) == PAYLOAD[5:50]
        assert reader.counters["retry_reset"] == 2


def test_where_a_proxy_is_in_the_way_the_client_is_left_to_find_it(s3_server):
    with entered({**s3_server.env, "http_proxy": "http://127.0.0.1:1"}):
        assert signed_by(RangeReader(QUICK), "s3://bucket/a")[2] is None
    with entered({**s3_server.env, "http_proxy": "http://127.0.0.1:1", "no_proxy": "127.0.0.1"}):
        assert signed_by(RangeReader(QUICK), "s3://bucket/a")[2] is not None


def test_ranges_of_one_object_share_connections(s3_server):
    url = s3_server.make_bucket() + "/a"
    s3_server.client().pipe_file(url, PAYLOAD)
    with s3_server.entered():
        reader = RangeReader(QUICK)
        assert reader.read(url, 0, 9) == PAYLOAD[:9]
        # The process has one pool for a server: what other tests have left in it is closed.
        pool = reader._reader(url)[0].urls.connections
        for server in [*pool._idle]:
            pool._drop(server)
        for start in range(0, 900_000, 100_000):
            assert reader.read(url, start, start + 9) == PAYLOAD[start : start + 9]
        assert [len(connections) for connections in pool._idle.values()] == [1]


def test_an_object_that_was_replaced_is_refused(store):
    reader = RangeReader(QUICK)
    assert reader.read(store.url, 0, 10) == PAYLOAD[:10]
    store.put(PAYLOAD[::-1])
    error = refusal(StorageError, reader, store.url, 10, 20)
    assert error.reason == "object_changed"
    assert error.where == store.url
    assert RangeReader().read(store.url, 0, 10) == PAYLOAD[::-1][:10]


def test_an_object_in_memory_that_was_replaced_is_refused():
    url = "memory://ranges/object"
    fs, path = storage.filesystem(url)
    fs.pipe_file(path, b"0123456789")
    reader = RangeReader(QUICK)
    assert reader.read(url, 2, 6, total=10) == b"2345"
    assert refusal(ShardError, reader, url, 0, 5, total=9).reason == "shard_size"
    fs.pipe_file(path, b"9876543210")
    assert refusal(StorageError, reader, url, 2, 6).reason == "object_changed"


@pytest.fixture
def web(tmp_path):
    """The address of a web server with one file, and the file."""
    (tmp_path / "web").mkdir()
    path = tmp_path / "web/object.bin"
    path.write_bytes(PAYLOAD)
    started, ports = threading.Event(), []

    async def serve():
        ending = asyncio.Event()
        ports.append((asyncio.get_running_loop(), ending))
        app = aiohttp.web.Application()
        app.router.add_static("/", path.parent)
        runner = aiohttp.web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = aiohttp.web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        ports.append(site._server.sockets[0].getsockname()[1])
        started.set()
        await ending.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert started.wait(60)
    (loop, ending), port = ports
    yield f"http://127.0.0.1:{port}", path
    loop.call_soon_threadsafe(ending.set)
    thread.join(60)


def test_a_web_server_that_knows_ranges_is_a_store_too(web):
    endpoint, path = web
    with FaultProxy(endpoint, faults={"short": 0.3, "status_503": 0.3}, seed=6) as proxy:
        reader = RangeReader(QUICK)
        url = proxy.endpoint + "/object.bin"
        assert reader.read_all(url) == PAYLOAD
        for start in range(0, 900_000, 100_000):
            got = reader.read(url, start, start + 90_000, total=len(PAYLOAD))
            assert got == PAYLOAD[start : start + 90_000]
        assert reader.counters["retries"] >= 3
        with pytest.raises(FileNotFoundError):
            reader.read(url + ".not", 0, 9)
        path.write_bytes(PAYLOAD[::-1])
        assert refusal(StorageError, reader, url, 0, 9).reason == "object_changed"


def test_threads_share_a_reader(store):
    store.proxy.faults = {"reset": 0.1, "status_503": 0.1}
    reader = RangeReader(QUICK)
    wrong = []

    def work(thread):
        rng = np.random.RandomState(thread)
        for _ in range(10):
            start = int(rng.randint(0, 900_000))
            if reader.read(store.url, start, start + 50_000) != PAYLOAD[start : start + 50_000]:
                wrong.append(start)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert reader.counters["bytes"] >= 80 * 50_000


def _read_in_child(reader, url, answers):
    answers.put(bytes(reader.read(url, 100, 200)))


# A forked child of a process with threads is what a plain DataLoader makes on Linux.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_process_makes_clients_of_its_own(store, method):
    reader = RangeReader(QUICK)
    assert reader.read(store.url, 0, 10) == PAYLOAD[:10]
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    child = context.Process(target=_read_in_child, args=(reader, store.url, answers))
    child.start()
    assert answers.get(timeout=60) == PAYLOAD[100:200]
    child.join(60)
    assert child.exitcode == 0
    assert reader.read(store.url, 20, 30) == PAYLOAD[20:30]


def test_a_copy_begins_again():
    reader = pickle.loads(pickle.dumps(RangeReader(QUICK)))
    assert reader.policy == QUICK
    assert reader.counters == {}


@pytest.mark.parametrize("wrong", [{"attempts": 0}, {"wall_s": 0}, {"longest_wait_s": -1}])
def test_policies_without_limits_are_refused(wrong):
    with pytest.raises(ConfigError) as caught:
        RetryPolicy(**wrong)
    assert caught.value.reason == "retry_policy"
