"""A store that is away for a time, as every request to it meets it: nothing fails, nothing is lost.

The policy itself is tested with a simulated clock (test_retries.py); here a real store is away.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from shardspec import storage
from shardspec.storage import upload
from shardspec.storage.ranges import RangeReader
from tests.fault_proxy import FaultProxy

PAYLOAD = np.random.RandomState(0).bytes(300_000)


@pytest.fixture
def store(s3_server):
    with FaultProxy(s3_server.endpoint, seed=1) as proxy, proxy.entered(s3_server):
        bucket = s3_server.make_bucket()
        for name in ("old", "swapped", "gone", "gone-2"):
            s3_server.client().pipe_file(f"{bucket}/set/{name}", PAYLOAD)
        yield proxy, s3_server, f"{bucket}/set"


def uses(url, folder):
    """Everything that asks a store, as functions that check their own answers."""
    reader = RangeReader()
    large = folder / "large"
    large.write_bytes(PAYLOAD * 60)
    before = storage.version(f"{url}/swapped")

    def read_range():
        assert reader.read(f"{url}/old", 100, 5000) == PAYLOAD[100:5000]

    def read_all():
        assert reader.read_all(f"{url}/old") == PAYLOAD

    def read_bytes():
        assert storage.read_bytes(f"{url}/old") == PAYLOAD

    def fetch_file():
        storage.fetch_file(f"{url}/old", folder / "fetched")
        assert (folder / "fetched").read_bytes() == PAYLOAD

    def look():
        assert storage.exists(f"{url}/old")
        assert storage.size(f"{url}/old") == len(PAYLOAD)
        assert storage.version(f"{url}/old")

    def list_all():
        assert "old" in storage.list_names(url)
        assert "old" in {found.name for found in storage.list_objects(url)}
        storage.list_uploads(url)

    def publish_bytes():
        storage.publish_bytes(f"{url}/small", PAYLOAD)

    def publish_file():
        storage.publish_file(f"{url}/large", large)

    def create():
        assert storage.compare_and_swap(f"{url}/created", b"new", replacing=None)
        assert not storage.compare_and_swap(f"{url}/created", b"other", replacing=None)

    def swap():
        assert storage.compare_and_swap(f"{url}/swapped", b"new", replacing=before)

    def delete():
        storage.delete(f"{url}/gone")
        storage.delete_objects(url, ["gone-2"])

    return [
        read_range,
        read_all,
        read_bytes,
        fetch_file,
        look,
        list_all,
        publish_bytes,
        publish_file,
        create,
        swap,
        delete,
    ]


def survive(store, folder, *, kind, seconds):
    proxy, server, url = store
    every = uses(url, folder)
    began_s = time.monotonic()
    with ThreadPoolExecutor(len(every)) as pool:
        with proxy.away(kind):
            running = {use.__name__: pool.submit(use) for use in every}
            threading.Event().wait(seconds)
            early = [name for name, future in running.items() if future.done()]
        failed = {name: future.exception(timeout=120) for name, future in running.items()}
    assert early == []  # each of them met the outage
    assert not any(failed.values()), failed
    assert time.monotonic() - began_s < seconds + 60
    found = server.objects(url)
    assert {"small", "large", "created", "swapped"} <= {name.split("/")[-1] for name in found}
    assert not any("gone" in name for name in found)
    assert storage.read_bytes(f"{url}/swapped") == b"new"
    assert upload.open_uploads(*storage.filesystem(url)) == []


@pytest.mark.parametrize("kind", ["refused", "status_503"])
def test_a_short_outage_ends_nothing(store, tmp_path, kind):
    survive(store, tmp_path, kind=kind, seconds=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["refused", "status_503"])
def test_an_outage_of_half_a_minute_ends_nothing(store, tmp_path, kind):
    survive(store, tmp_path, kind=kind, seconds=30)


@pytest.mark.slow
def test_an_outage_of_two_minutes_ends_nothing(store, tmp_path):
    survive(store, tmp_path, kind="refused", seconds=120)
