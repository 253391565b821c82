"""Results of downloads in an object store: what another machine takes over, and what not."""

import dataclasses
import gzip
import hashlib
import logging
from functools import partial

import pytest

from preprocess.fetch import (
    FetchPolicy,
    FetchResult,
    Ledger,
    UrlSpool,
    encode_result,
    unique_urls,
)
from preprocess.job import fetching
from preprocess.job.fetching import fetch_images
from preprocess.job.job import Job, JobSettings
from preprocess.job.pipeline import run_job
from preprocess.job.shared_results import publish_lines
from preprocess.recipe import Recipe
from preprocess.text import TextPolicy
from shardspec import storage
from shardspec.errors import StorageError
from tests.inline import Quiet
from tests.preprocess.fetch.faulty_http import FaultyServer

pytestmark = pytest.mark.usefixtures("in_this_process")

POLICY = FetchPolicy(
    attempts=1, host_rate=0.0, robots_txt="ignore", allow_hosts=frozenset({"127.0.0.1"})
)
slow = partial(pytest.param, marks=pytest.mark.slow)
LATER_S = 4_000_000_000
"""A time that has not come."""


@pytest.fixture(scope="module")
def server():
    with FaultyServer() as server:
        yield server


@pytest.fixture(params=["memory", slow("s3")])
def store(request, tmp_path):
    if request.param == "memory":
        yield f"memory://{tmp_path.name}"
        storage.delete(f"memory://{tmp_path.name}")
        return
    s3 = request.getfixturevalue("s3_server")
    with s3.entered():
        yield f"{s3.bucket}/{tmp_path.name}"


@pytest.fixture
def web(tmp_path, server, store, write_parquet, monkeypatch):
    return Web(tmp_path, server, store, write_parquet, monkeypatch)


class Web:
    """Machines, each with a home of its own, that use one store and one web server."""

    def __init__(self, folder, server, store, write_parquet, monkeypatch):
        self.folder, self.server, self.store = folder, server, store
        self._monkeypatch = monkeypatch
        self.urls = [server.url(path) for path in ("/ok/a.png", "/ok/b.png", "/status/404")]
        rows = [{"image_url": url, "caption": f"see {url[-5:]}"} for url in self.urls]
        self.source = write_parquet(folder / "source", [{**row, "transcripts": []} for row in rows])

    def settings(self, machine, **more):
        self._monkeypatch.setenv("HOME", str(self.folder / machine))
        self.server.requests.clear()
        given = {
            "dataset": "pixmo_cap",
            "source": str(self.source),
            "out": str(self.folder / f"{machine}-out"),
            "cache": self.store,
            "fetch": POLICY,
            "max_lost_rows": 1.0,
            "num_shards": 1,
            "recipe": Recipe(text=TextPolicy(num_variants=1)),
        }
        return JobSettings(**{**given, **more})

    def fetch(self, machine, **more):
        """Downloads the URLs; returns how each ended, and the paths that were requested."""
        job = Job(self.settings(machine, **more))
        results = fetch_images(job, unique_urls(self.urls), Quiet(), again=True)
        ended = {url.partition("/ok")[2] or url: r.reason or "ok" for url, r in results.items()}
        return [*ended.values()], sorted(self.server.requests)

    def shared(self):
        return [each.name for each in storage.list_objects(storage.join(self.store, "results"))]

    def put(self, *results, dataset="pixmo_cap", unix_s=LATER_S):
        return publish_lines(
            storage.join(self.store, "results"),
            map(encode_result, results),
            name=lambda digest: f"{dataset}.{unix_s}.{digest}.jsonl.gz",
            scratch=str(self.folder),
        )


ENDED = ["ok", "ok", "http_404"]
ALL = ["/ok/a.png", "/ok/b.png", "/status/404"]


@pytest.mark.slow
def test_another_machine_requests_nothing_and_builds_the_same(web):
    one = run_job(web.settings("one"), Quiet()).result.sha256
    assert sorted(web.server.requests) == ALL
    (name,) = web.shared()
    assert run_job(web.settings("two"), Quiet()).result.sha256 == one
    assert (sorted(web.server.requests), web.shared()) == ([], [name])


def test_another_dataset_takes_images_and_requests_what_failed(web):
    assert web.fetch("one") == (ENDED, ALL)
    assert web.fetch("two") == (ENDED, [])
    assert web.fetch("three", name="another") == (ENDED, ["/status/404"])
    assert [name.split(".")[0] for name in web.shared()] == ["another", "pixmo_cap"]
    assert web.fetch("four", name="another") == (ENDED, [])


def test_images_of_hosts_that_another_job_may_not_ask_are_not_taken_over(web):
    web.fetch("one")
    strict = dataclasses.replace(POLICY, allow_hosts=frozenset())
    refused = ["private_addr"] * 3
    assert web.fetch("two", name="another", fetch=strict) == (refused, [])
    assert web.fetch("two", name="another") == (ENDED, ALL)


@pytest.mark.slow
def test_a_large_one_of_another_dataset_is_not_read_for_a_few_urls(web, monkeypatch):
    web.fetch("one")
    monkeypatch.setattr(fetching, "READ_BYTES_PER_URL", 10)
    assert web.fetch("two", name="another") == (ENDED, ALL)
    assert web.fetch("three") == (ENDED, [])


def test_an_image_that_the_store_lost_is_requested(web):
    web.fetch("one")
    storage.delete(storage.join(web.store, "packs"))
    assert web.fetch("two") == (ENDED, ALL[:2])
    assert web.fetch("three") == (ENDED, [])


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda packed: packed[: len(packed) // 2], id="torn"),
        slow(lambda packed: packed[:-9] + bytes([packed[-9] ^ 1]) + packed[-8:], id="a bit"),
        slow(lambda _: b"", id="empty"),
        slow(lambda _: None, id="gone"),
    ],
)
def test_damaged_results_are_passed_over(web, damage, caplog, monkeypatch):
    web.fetch("one")
    url = storage.join(web.store, "results", web.shared()[0])
    packed = damage(storage.read_bytes(url))
    if packed is None:
        listed = storage.list_objects(storage.join(web.store, "results"))
        real = storage.list_objects
        monkeypatch.setattr(
            storage,
            "list_objects",
            lambda u, **k: listed if u.endswith("results") else real(u, **k),
        )
        storage.delete(url)
    else:
        storage.publish_bytes(url, packed)
    with caplog.at_level(logging.WARNING):
        assert web.fetch("two") == (ENDED, ALL)
    assert [url in each for each in caplog.messages] == ([] if packed is None else [True])


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(b"no gzip", id="no gzip"),
        slow(gzip.compress(b"no line\n", mtime=0), id="no line"),
    ],
)
def test_what_is_no_result_under_a_right_name_is_passed_over(web, payload, caplog):
    name = f"pixmo_cap.1.{hashlib.sha256(payload).hexdigest()[:16]}.jsonl.gz"
    storage.publish_bytes(storage.join(web.store, "results", name), payload)
    storage.publish_bytes(storage.join(web.store, "results", "notes.txt"), b"")
    with caplog.at_level(logging.WARNING):
        assert web.fetch("one") == (ENDED, ALL)
    assert [name in each for each in caplog.messages] == [True]


def test_failures_and_pauses_are_those_of_a_ledger(web):
    gone = FetchResult(url=web.urls[0], status="failed", reason="http_404")
    later = dataclasses.replace(gone, url=web.urls[1], finished_unix_s=LATER_S)
    web.put(gone, later, unix_s=0)  # of which the first has expired
    assert web.fetch("one") == (["ok", "http_404", "http_404"], [ALL[0], ALL[2]])
    assert web.fetch("two") == (["ok", "http_404", "http_404"], [])
    # The host wants to be left alone: who has not heard it from itself, has it from others.
    storage.delete(storage.join(web.store, "results"))
    web.put(dataclasses.replace(gone, reason="host_busy", not_before_unix_s=LATER_S))
    assert web.fetch("three") == (["host_busy"] * 3, [])


def test_what_a_killed_run_has_requested_is_shared_by_the_next(web, monkeypatch):
    urls = web.urls
    with monkeypatch.context() as patch:
        patch.setattr(web, "urls", urls[:2])
        patch.setattr(fetching.SharedResults, "publish", lambda self: None)
        web.fetch("one")
    assert web.shared() == []
    assert web.fetch("one") == (ENDED, [ALL[2]])
    assert len(web.shared()) == 1
    assert web.fetch("two") == (ENDED, [])
    for path in (web.folder / "one").rglob("pixmo_cap.jsonl"):
        path.unlink()  # another ledger begins, which nobody knows
    storage.delete(storage.join(web.store, "results"))
    for path in (web.folder / "one").rglob("results/*.jsonl"):
        path.unlink()
    assert web.fetch("one") == (ENDED, ALL)
    assert web.fetch("three") == (ENDED, [])


@pytest.mark.slow
def test_two_stores_of_one_machine_do_not_lend_each_other_images(web):
    web.fetch("one")
    first, web.store = web.store, storage.join(web.store, "second")
    assert web.fetch("one") == (ENDED, ALL[:2])  # a failure is one whatever the store
    assert web.fetch("two") == (ENDED, [])
    web.store = first
    assert web.fetch("one") == (ENDED, [])


def test_two_jobs_of_a_dataset_download_at_once_only_with_a_folder_each(web):
    urls, web.urls = web.urls, web.urls[:1]
    with Ledger(Job(web.settings("one")).ledger_path()):
        for cache in (web.store, storage.join(web.store, "second")):
            with pytest.raises(StorageError) as caught:
                web.fetch("one", cache=cache)
            assert caught.value.reason == "ledger_locked"
            assert "a folder of its own as CACHE=" in str(caught.value)
        assert web.fetch("one", cache=str(web.folder / "own")) == (["ok"], ALL[:1])
    web.urls = urls
    assert web.fetch("one") == (ENDED, ALL)


def test_urls_that_are_known_are_not_looked_up_in_every_object(web, monkeypatch):
    reads = []
    real = UrlSpool.__iter__
    monkeypatch.setattr(UrlSpool, "__iter__", lambda self: reads.append(len(self)) or real(self))
    rest = [web.server.url(f"/ok/{i}.png") for i in range(9)]
    web.urls += rest
    for i, url in enumerate(rest):
        web.put(FetchResult(url=url, status="failed", reason="http_404"), unix_s=LATER_S - i)
        web.put(FetchResult(url=url, status="failed", reason="dns"), dataset="other", unix_s=i)
    web.fetch("one")
    # Listed, looked up in the latest object, listed again; for other datasets; fetched; returned.
    assert reads.count(len(web.urls)) <= 6
