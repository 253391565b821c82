"""Streaming from real object stores: the batches of a local disk, whatever the network does."""

import contextlib
import itertools
import logging
import multiprocessing
import os
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from loader import IterableDatasetMixture, StreamingDataset, make_dataloader, view_collator
from loader.reading.network import Network
from preprocess.reshard import ReshardSettings, plan_reshard, reshard
from shardspec import storage
from shardspec.errors import ConfigError, ShardError, StorageError
from shardspec.index import parse_index
from shardspec.storage import RetryPolicy
from tests import servers
from tests.fault_proxy import FaultProxy
from tests.inline import Quiet

QUICK = RetryPolicy(idle_s=1.5, first_wait_s=0.01, wall_s=20)
SMALL = Network(block_bytes=64 * 1024, ahead_steps=16, retry=QUICK)
"""Small blocks: the datasets here have 2 MB."""


@pytest.fixture(scope="module")
def local(tiny_sample, write_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote") / "set"
    return write_dataset(folder, [tiny_sample(i) for i in range(200)], num_shards=3)


def upload(server, folder):
    url = server.make_bucket() + "/set"
    server.client().put(folder, url, recursive=True)
    return url


@pytest.fixture(scope="module")
def s3_url(s3_server, local):
    return upload(s3_server, local)


@pytest.fixture(scope="module")
def gs_url(gcs_server, local):
    return upload(gcs_server, local)


@pytest.fixture(params=["s3", pytest.param("gs", marks=pytest.mark.slow)])
def remote(request):
    """(URL, proxy) of the dataset in a store, with this process's clients behind the proxy."""
    server = request.getfixturevalue("s3_server" if request.param == "s3" else "gcs_server")
    url = request.getfixturevalue(f"{request.param}_url")
    keep_host = request.param == "s3"
    with FaultProxy(server.endpoint, seed=6, keep_host=keep_host) as proxy, proxy.entered(server):
        yield url, proxy


@pytest.fixture
def s3(s3_server, s3_url):
    """The same, for S3 alone."""
    with FaultProxy(s3_server.endpoint, seed=6) as proxy, proxy.entered(s3_server):
        yield s3_url, proxy


def loader_of(url, *, rank=0, world_size=2, workers=0, decode_threads=2, network=SMALL, **options):
    dataset = StreamingDataset(
        url, seed=3, rank=rank, world_size=world_size, network=network, **options
    )
    return make_dataloader(
        dataset,
        global_batch_size=8,
        sequence_length=128,
        pad_mode="max_len",
        workers=workers,
        decode_threads=decode_threads,
        with_metadata=True,
    )


def take(loader, num_steps):
    batches = []
    while len(batches) < num_steps:
        for batch in loader:
            batches.append(dict(batch))
            if len(batches) == num_steps:
                break
    return batches


def batches_of(url, num_steps=60, **options):
    """Takes the batches of one rank; 60 steps are 2.4 epochs."""
    return take(loader_of(url, **options), num_steps)


def assert_same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if isinstance(a[name], torch.Tensor):
                assert torch.equal(a[name], b[name]), name
            else:
                assert a[name] == b[name], name


def assert_fetched_once(proxy, local):
    """Every byte of a sample and of an index was asked for exactly once."""
    spans = {}
    for get in proxy.gets:
        if get.start is not None:
            name = get.path.split("?")[0].split("/")[-1].split("%2F")[-1]
            spans.setdefault(name, []).append((get.start, get.stop))
    assert len(spans) == 6
    for name, asked in spans.items():
        asked.sort()
        assert [start for start, _ in asked] == [0, *(stop for _, stop in asked[:-1])], name
        # Behind the last sample stands the end of the tar, which belongs to no block.
        (path,) = Path(local, "train").glob(name)
        assert path.stat().st_size - asked[-1][1] in (0, 10240 - 10240 % 512, 1024), name


def test_an_index_that_is_being_opened_is_not_fetched_again(s3):
    url, proxy = s3
    reader = StreamingDataset(url, network=SMALL).reader
    opening, opened = threading.Event(), threading.Event()

    def parse(*args, **options):
        opening.set()
        assert opened.wait(60)
        return parse_index(*args, **options)

    with mock.patch("loader.reading.remote.parse_index", parse):
        reader.prefetch(0, [0])
        assert opening.wait(60)
        reader.prefetch(1, [1])  # of the same shard, whose index has come and is not parsed yet
        opened.set()
        for sample in (0, 1):
            reader.stored(sample)
            reader.release(sample)
    assert sum(".index.npy" in get.path for get in proxy.gets) == 1
    assert reader.prefetcher._plan.held_bytes == 0


@pytest.mark.parametrize("cached", [False, True], ids=["no cache", "cache"])
def test_two_ranks_get_the_batches_of_a_local_disk(remote, local, cached, tmp_path):
    url, _ = remote
    cache = str(tmp_path / "cache") if cached else None
    for rank in (0, 1):
        want = batches_of(local, rank=rank)
        assert_same(batches_of(url, rank=rank, cache=cache), want)


def test_with_a_cache_every_byte_is_fetched_once(remote, local, tmp_path):
    url, proxy = remote
    for rank in (0, 1, 0):
        batches_of(url, rank=rank, cache=str(tmp_path / "cache"))
    assert_fetched_once(proxy, local)


def test_a_mixture_streams_from_two_stores(s3_url, gs_url, s3_server, gcs_server, local, tmp_path):
    def mixed(first, second, **options):
        parts = [StreamingDataset(first, **options), StreamingDataset(second, **options)]
        object.__setattr__(parts[1].manifest, "dataset", "other")
        mixture = IterableDatasetMixture(parts, weights=[0.7, 0.3], seed=5)
        return make_dataloader(mixture, global_batch_size=4, sequence_length=128, workers=0)

    want = take(mixed(local, local), 20)
    with mock.patch.dict(os.environ, {**s3_server.env, **gcs_server.env}):
        servers.forget_clients()
        got = take(mixed(s3_url, gs_url, cache=str(tmp_path / "cache"), network=SMALL), 20)
        servers.forget_clients()
    assert_same(got, want)


@pytest.mark.parametrize(
    "cached", [pytest.param(False, marks=pytest.mark.slow), True], ids=["no cache", "cache"]
)
@pytest.mark.slow
def test_worker_processes_get_the_same_batches(s3, local, cached, tmp_path):
    url, _ = s3
    cache = str(tmp_path / "cache") if cached else None
    assert_same(batches_of(url, 12, workers=2, cache=cache), batches_of(local, 12))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_plain_dataloader_that_forks_its_workers_gets_them_too(s3, local, tmp_path):
    url, _ = s3

    def plain(where, num_workers, **options):
        dataset = StreamingDataset(where, seed=3, batch_size=4, **options)
        len(dataset.fingerprint())  # clients and threads of the parent exist
        collate = view_collator(
            dataset.view, sequence_length=128, pad_token_id=0, pad_mode="max_len"
        )
        loader = DataLoader(
            dataset,
            batch_size=4,
            num_workers=num_workers,
            collate_fn=collate,
            multiprocessing_context="fork" if num_workers else None,
        )
        return [dict(batch) for batch in loader]

    want = plain(local, 0)
    assert_same(plain(url, 2, network=SMALL), want)
    assert_same(plain(url, 2, network=SMALL, cache=str(tmp_path / "cache")), want)


def test_a_run_resumes_from_a_store_where_it_left_off(s3, local, tmp_path):
    url, _ = s3
    want = batches_of(local, 40)
    options = {"cache": str(tmp_path / "cache")}
    first = loader_of(url, **options)
    assert_same(take(first, 17), want[:17])
    second = loader_of(url, **options)
    second.load_state_dict(first.state_dict())
    assert_same(take(second, 23), want[17:])
    # A state of a local disk is a state of a store.
    third = loader_of(local)
    third.load_state_dict(first.state_dict())
    assert_same(take(third, 5), want[17:22])


FAULTS = {
    "status_503": 0.01,
    "status_429": 0.005,
    "drop": 0.01,
    "reset": 0.01,
    "short": 0.01,
    "wrong_range": 0.005,
    "corrupt": 0.005,
}
"""One answer in twenty is wrong in some way; ranges only, so that the manifest is read."""


@pytest.mark.parametrize("cached", [False, True], ids=["no cache", "cache"])
def test_two_epochs_are_right_with_one_faulty_answer_in_twenty(s3, local, cached, tmp_path):
    url, proxy = s3
    proxy.faults = {**FAULTS, "stall": 0.005}
    cache = str(tmp_path / "cache") if cached else None
    loader = loader_of(url, cache=cache, network=Network(block_bytes=16 * 1024, retry=QUICK))
    assert_same(take(loader, 50), batches_of(local, 50))
    faults = sum(proxy.counts[kind] for kind in proxy.faults)
    counters = loader.dataset.reader.counters
    assert faults >= 3
    # A corrupt body is no retry of a range, and the client itself may mend a broken connection.
    at_least = faults - sum(proxy.counts[kind] for kind in ("corrupt", "drop", "reset"))
    assert at_least <= counters["retries"]
    # A machine that is busy enough makes pauses of its own.
    assert counters["retries"] - counters["retry_timeout"] <= faults


def outlast(s3, local, *, kind, seconds, **options):
    """Streams while the store is away from the second batch on; the batches are those of a disk."""
    url, proxy = s3
    want = batches_of(str(local), 30)
    loader = loader_of(url, network=Network(block_bytes=64 * 1024, ahead_steps=2), **options)
    got, batches = [], iter(loader)
    got.append(dict(next(batches)))
    rest = threading.Thread(target=lambda: got.extend(dict(batch) for batch in batches))
    with proxy.away(kind):
        rest.start()
        threading.Event().wait(seconds)
    rest.join(60)
    assert not rest.is_alive()
    assert_same(got, want[: len(got)])
    assert len(got) > 20
    assert loader.bad_samples == []


@pytest.mark.parametrize("kind", ["refused", "status_503"])
def test_a_short_outage_of_the_store_changes_no_batch(s3, local, kind):
    outlast(s3, local, kind=kind, seconds=0.5, on_bad="substitute")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["refused", "status_503", "silent"])
def test_an_outage_of_half_a_minute_changes_no_batch(s3, local, kind):
    outlast(s3, local, kind=kind, seconds=30)


@pytest.mark.slow
def test_an_outage_of_two_minutes_changes_no_batch(s3, local):
    outlast(s3, local, kind="status_503", seconds=120)


@pytest.mark.slow
def test_a_dataset_is_opened_through_an_outage_of_half_a_minute(s3):
    url, proxy = s3
    opened = []
    opening = threading.Thread(target=lambda: opened.append(StreamingDataset(url)))
    with proxy.away("refused"):
        opening.start()
        threading.Event().wait(30)
        assert not opened
    opening.join(60)
    assert len(opened) == 1


def test_a_dead_store_ends_the_run_in_time_and_is_not_a_bad_sample(s3):
    url, proxy = s3
    network = Network(retry=RetryPolicy(idle_s=0.5, wall_s=2, first_wait_s=0.01), ahead_steps=2)
    loader = loader_of(url, network=network, on_bad="substitute")
    batches = iter(loader)
    next(batches)
    proxy.dead = True
    with pytest.raises(StorageError) as caught:
        for _ in batches:
            pass
    assert caught.value.reason == "range_failed"
    assert 1 <= caught.value.facts["attempts"] <= 5  # each waits 0.5 s of the 2
    assert "timeout" in caught.value.facts["causes"]
    assert loader.bad_samples == []


def test_a_dead_store_is_abandoned_in_time_when_a_dataset_is_opened(s3):
    url, proxy = s3
    proxy.dead = True
    network = Network(retry=RetryPolicy(idle_s=0.5, wall_s=2, first_wait_s=0.01))
    with pytest.raises(StorageError) as caught:
        StreamingDataset(url, network=network)
    assert 1 <= caught.value.facts["attempts"] <= 5  # each waits 0.5 s of the 2
    assert caught.value.where == url + "/manifest.json"
    assert "timeout" in caught.value.facts["causes"]


@pytest.mark.parametrize("left", [0, 0.5])
def test_a_cache_that_is_cut_in_place_during_a_pass_changes_no_batch(s3, local, tmp_path, left):
    url, _ = s3
    want = batches_of(str(local), 12)
    options = {"cache": str(tmp_path / "cache"), "on_bad": "substitute"}
    loader = loader_of(url, network=Network(block_bytes=64 * 1024, ahead_steps=2), **options)
    batches, got = iter(loader), []
    for step in range(12):
        got.append(dict(next(batches)))
        if step % 4 == 3:
            for path in (tmp_path / "cache" / "blocks").glob("*.block"):
                with contextlib.suppress(FileNotFoundError):  # evicted, or found to be cut
                    size = path.stat().st_size
                    os.truncate(path, int(left * size) if left < 1 else left)
    assert_same(got, want)
    assert loader.bad_samples == []
    assert loader.stats().counters["cache_corrupt"] >= 1


def test_a_cache_that_is_not_a_cache_is_refused_at_once(s3, tmp_path):
    url, _ = s3
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError) as caught:
        StreamingDataset(url, cache=str(tmp_path))
    assert caught.value.reason == "cache_foreign"


def test_nothing_arriving_is_a_stall_that_names_the_object_and_dumps_all_stacks(s3, caplog):
    url, proxy = s3
    loader = loader_of(url, network=Network(stall_s=2, ahead_steps=4))
    batches = iter(loader)
    next(batches)
    proxy.dead = True
    with pytest.raises(StorageError) as caught, caplog.at_level(logging.ERROR):
        for _ in batches:
            pass
    assert caught.value.reason == "stalled"
    assert caught.value.where.startswith(url)
    assert caught.value.facts["received_bytes"] == 0
    assert url in caught.value.facts["in_flight"]
    stacks = "".join(record.getMessage() for record in caplog.records)
    assert "Current thread" in stacks
    assert "prefetch.py" in stacks


def test_a_shard_that_changed_under_the_run_is_refused(s3_server, local):
    url = upload(s3_server, local)
    shard = next(name for name in s3_server.objects(url) if name.endswith(".tar"))
    with s3_server.entered():
        dataset = StreamingDataset(url, network=SMALL)
        dataset.example(0)  # from here on the run knows this version of the shard
        payload = s3_server.read(f"{url}/{shard}")
        s3_server.client().pipe_file(f"{url}/{shard}", payload[:-1] + b"x")
        with pytest.raises(StorageError) as caught:
            dataset.example(60)  # of the same shard, in a block that was not read yet
    assert caught.value.reason == "object_changed"


@pytest.mark.parametrize(
    "change, reason",
    [
        (None, "shard_missing"),
        (lambda payload: payload[:-512], "shard_size"),
        (lambda payload: payload + bytes(512), "shard_size"),
    ],
    ids=["missing", "short", "long"],
)
@pytest.mark.parametrize("suffix", [".tar", pytest.param(".index.npy", marks=pytest.mark.slow)])
def test_objects_that_the_manifest_does_not_describe_are_refused(
    suffix, change, reason, s3_server, local
):
    url = upload(s3_server, local)
    shards = sorted(name for name in s3_server.objects(url) if name.endswith(suffix))
    where = f"{url}/{shards[0]}"
    payload = s3_server.read(where)
    if change is None:
        s3_server.client().rm_file(where)
    else:
        s3_server.client().pipe_file(where, change(payload))
    with s3_server.entered():
        dataset = StreamingDataset(url, network=SMALL)
        for _ in range(2):
            with pytest.raises(ShardError) as caught:
                dataset.example(0)
            assert caught.value.reason == reason
            assert caught.value.where == where
        dataset.example(199)  # the other shards are not touched by it


def test_an_index_that_is_not_the_one_written_is_refused(s3_server, local):
    url = upload(s3_server, local)
    name = sorted(name for name in s3_server.objects(url) if name.endswith(".npy"))[0]
    payload = bytearray(s3_server.read(f"{url}/{name}"))
    payload[-1] ^= 1
    s3_server.client().pipe_file(f"{url}/{name}", bytes(payload))
    with s3_server.entered(), pytest.raises(ShardError) as caught:
        StreamingDataset(url).example(0)
    assert caught.value.reason == "index_sha256"


def spoil(server, url, sample):
    """Flips a byte in the middle of a sample in the store."""
    with server.entered():
        dataset = StreamingDataset(url)
        shard, row = dataset.reader._locate(sample)
        start, stop = shard.place(row)[1]
    payload = bytearray(server.read(shard.url))
    payload[(start + stop) // 2] ^= 1
    server.client().pipe_file(shard.url, bytes(payload))


@pytest.mark.parametrize("cached", [False, True], ids=["no cache", "cache"])
def test_a_sample_that_is_spoilt_in_the_store_is_bad_and_only_it(
    s3_server, local, cached, tmp_path
):
    url = upload(s3_server, local)
    spoil(s3_server, url, 70)
    cache = str(tmp_path / "cache") if cached else None
    with s3_server.entered():
        dataset = StreamingDataset(url, cache=cache, network=SMALL)
        with pytest.raises(ShardError) as caught:
            dataset.example(70)
        assert caught.value.reason == "sample_crc"
        assert "sample-0070" in caught.value.where
        good = StreamingDataset(local)
        for number in (69, 71):
            assert np.array_equal(dataset.example(number)["images"], good.example(number)["images"])


@pytest.mark.parametrize("told_by", ["file", "environment"])
def test_a_named_store_is_read_by_its_name(
    told_by, s3_server, s3_url, local, tmp_path, monkeypatch
):
    with s3_server.entered():
        monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
        if told_by == "file":
            path = tmp_path / "stores.toml"
            path.write_text(f'[weka]\nendpoint_url = "{s3_server.endpoint}"\naddressing = "path"\n')
            monkeypatch.setenv("VLM_SHARDS_STORES", str(path))
        else:
            monkeypatch.setenv("VLM_SHARDS_STORE_WEKA_ENDPOINT_URL", s3_server.endpoint)
        url = s3_url.replace("s3://", "weka://")
        for cache in (None, str(tmp_path / "cache")):
            assert_same(batches_of(url, 30, cache=cache), batches_of(local, 30))


def test_threads_that_need_the_same_index_fetch_it_once(s3, local):
    url, proxy = s3
    loader = loader_of(url)
    assert_same(take(loader, 25), batches_of(local, 25))
    asked = [get.path for get in proxy.gets if ".npy" in get.path]
    assert len(asked) == len({path.split("?")[0] for path in asked}) == 3


def test_memory_urls_stream_too(local):
    fs, path = storage.filesystem("memory://bucket/set")
    fs.put(local, path, recursive=True)
    assert_same(batches_of("memory://bucket/set", 30), batches_of(local, 30))


def memory_copy(folder, place):
    fs, path = storage.filesystem(place)
    if not fs.exists(path):
        fs.put(folder, path, recursive=True)
    return place


def test_every_reader_of_a_shard_finds_what_another_has_cached(local, tmp_path):
    """Another split of ranks, batch, order, subset or view: blocks follow from the shard alone."""
    url = memory_copy(local, "memory://shared-cache/set")
    view = str(tmp_path / "view")
    settings = ReshardSettings(sources=(url,), out=view, num_shards=7, form="view")
    reshard(plan_reshard(settings, Quiet()), Quiet())
    options = {"cache": str(tmp_path / "cache"), "network": Network(retry=QUICK)}
    first = loader_of(url, world_size=1, **options)
    list(first)
    assert first.stats().counters["bytes"] > 0
    for place, change in (
        (url, {"world_size": 4, "rank": 3}),
        (url, {"block_size": 1}),
        (url, {"shuffle": False}),
        (url, {"max_samples": 150}),
        (url, {"where": "num_tokens > 0"}),
        (view, {}),
        (url, {"network": Network(block_bytes=2**15, retry=QUICK)}),
    ):
        later = loader_of(place, **{"world_size": 1, **options, **change})
        for _ in later:
            pass
        counters = later.stats().counters
        assert counters["cache_hits"] > 0
        assert ("cache_misses" in counters) == ("network" in change), change


def test_a_cache_with_blocks_of_another_size_keeps_working(local, tmp_path):
    url = memory_copy(local, "memory://shared-cache/set")
    cache, bound = tmp_path / "cache", 16 * 2**18
    want, held = batches_of(local, 20), []

    def run(**network):
        options = {"cache_bytes": bound, "network": Network(retry=QUICK, **network)}
        assert_same(batches_of(url, 20, cache=str(cache), **options), want)
        held.append({path.name: path.stat().st_size for path in (cache / "blocks").iterdir()})
        assert sum(held[-1].values()) <= bound

    run(block_bytes=2**15)
    # Blocks of other runs, used up long ago, fill the rest.
    for number in range((bound - sum(held[0].values())) // 2**16):
        other = cache / "blocks" / f"{number:032x}-0-{2**16}.block"
        other.write_bytes(bytes(2**16))
        os.utime(other, times=(1, 1))
    (cache / "usage").unlink()  # it is counted again
    run()
    assert not held[1].keys() <= held[0].keys()  # those of this size found room
    run(block_bytes=2**15)
    assert {name for name in held[0] if name.endswith("block")} & held[2].keys()


def test_peek_shows_a_batch_from_a_store(s3_server, tiny_dataset, capsys):
    from loader.__main__ import main

    url = upload(s3_server, str(tiny_dataset))
    with s3_server.entered():
        assert main(["peek", url]) == 0
    remote = capsys.readouterr().out
    assert main(["peek", str(tiny_dataset)]) == 0
    assert capsys.readouterr().out == remote


def _rank(url, cache, rank, answers):
    loader = loader_of(url, rank=rank, cache=cache, workers=4, network=SMALL)
    keys = [[m["key"] for m in batch["metadata"]] for batch in take(loader, 25)]
    answers.put((rank, keys))


@pytest.mark.slow
def test_two_ranks_of_four_workers_fetch_every_byte_once(s3, local, tmp_path):
    url, proxy = s3
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(url, str(tmp_path / "cache"), rank, answers))
        for rank in (0, 1)
    ]
    for rank in ranks:
        rank.start()
    got = dict(answers.get(timeout=240) for _ in ranks)
    for rank in ranks:
        rank.join(60)
    for rank in (0, 1):
        want = [[m["key"] for m in b["metadata"]] for b in batches_of(local, 25, rank=rank)]
        assert got[rank] == want
    assert_fetched_once(proxy, local)


@pytest.mark.slow
def test_stats_hold_what_worker_processes_have_read(s3):
    url, proxy = s3
    loader = loader_of(url, world_size=1, workers=2)
    requests = []
    proxy.faults = {"status_503": 0.2}
    for _ in loader:
        requests.append(loader.stats().counters["requests"])
    counters = loader.stats().counters
    assert requests == sorted(requests)
    assert counters["cache_misses"] >= 200  # each sample once, and the indexes
    assert counters["bytes"] >= loader.stats().timings.read_bytes
    # The next epoch is being read by now: what failed last is counted when it was tried again.
    proxy.faults = {}
    list(loader)
    counters = loader.stats().counters
    assert counters["retries"] >= proxy.counts["status_503"] > 0
    assert counters["cache_misses"] >= 400


def test_passes_that_are_left_hold_nothing_for_the_rest_of_the_run(s3):
    url, _ = s3
    dataset = StreamingDataset(url, seed=3, rank=0, world_size=1, network=SMALL, batch_size=4)
    prefetcher = dataset.reader.prefetcher
    held = []
    for epoch in range(4):
        dataset.set_epoch(epoch)
        list(itertools.islice(dataset, 8))
        deadline_s = time.monotonic() + 60
        states = prefetcher._plan._states
        while any(state.coming or state.wanted for state in list(states.values())):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        held.append((len(prefetcher._plan._steps), prefetcher._plan.held_bytes))
    assert max(steps for steps, _ in held) == held[0][0]
    assert max(size for _, size in held[1:]) <= 2 * held[0][1]
