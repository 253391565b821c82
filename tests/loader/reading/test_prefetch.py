"""The prefetcher by itself: what it fetches when, on a store in memory."""

import logging
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

from loader.reading.blocks import Block
from loader.reading.network import Network
from loader.reading.open_shards import Range
from loader.reading.prefetch import Prefetcher
from loader.reading.remote import RemoteShard
from shardspec import storage
from shardspec.checksum import crc32
from shardspec.errors import ConfigError
from shardspec.storage.ranges import RangeReader

ROOT = Path(__file__).parents[3]
OBJECT = np.random.RandomState(0).bytes(400_000)
SAMPLE = 1000
BLOCK = 10_000


@pytest.fixture
def url(request):
    url = f"memory://prefetch/{request.node.name}"
    fs, path = storage.filesystem(url)
    fs.pipe_file(path, OBJECT)
    return url


def place(url, sample):
    first = sample * SAMPLE // BLOCK * BLOCK
    block = Block(url=url, start=first, stop=first + BLOCK, total=len(OBJECT), sha256="ab" * 32)
    return block, (sample * SAMPLE, (sample + 1) * SAMPLE)


def located(url, samples):
    return lambda: [place(url, sample) for sample in samples]


def read(prefetcher, url, sample):
    block, span = place(url, sample)
    found = bytes(prefetcher.read(block, span))
    assert found == OBJECT[slice(*span)], sample


def run(prefetcher, url, steps):
    """Reads steps of samples, each announced up to eight steps ahead."""
    for step in range(len(steps)):
        for soon in range(0 if step == 0 else step + 8, min(step + 9, len(steps))):
            prefetcher.prefetch(soon, located(url, steps[soon]))
        for sample in steps[step]:
            read(prefetcher, url, sample)
        prefetcher.release(step)


def shuffled(seed=1, batch=8):
    order = np.random.RandomState(seed).permutation(400)
    return [order[i : i + batch].tolist() for i in range(0, 400, batch)]


@pytest.mark.parametrize("cached", [False, True], ids=["memory", "cache"])
def test_a_shuffled_pass_reads_every_sample_and_fetches_every_byte_once(url, cached, tmp_path):
    cache = str(tmp_path / "cache") if cached else None
    prefetcher = Prefetcher(Network(block_bytes=BLOCK), cache=cache, cache_bytes=10**7)
    with mock.patch("loader.reading.request_queue._GAP_BYTES", 0):
        run(prefetcher, url, shuffled())
    assert prefetcher.counters["bytes"] == len(OBJECT)


def test_announcing_a_step_never_waits_and_its_reader_waits_until_it_is_located(url):
    prefetcher, there = Prefetcher(Network(block_bytes=BLOCK)), threading.Event()

    def locate():
        assert there.wait(60)
        return [place(url, sample) for sample in (3, 4, 5)]

    prefetcher.prefetch(0, locate)  # one that waited would wait for an event in vain
    threading.Timer(0.2, there.set).start()
    for sample in (3, 4, 5):
        read(prefetcher, url, sample)
    prefetcher.release(0)
    # One request for all of them, which a reader that did not wait would have asked for singly.
    assert prefetcher.counters["requests"] == 1


def test_a_step_that_cannot_be_located_is_its_readers_matter(url):
    prefetcher = Prefetcher(Network(block_bytes=BLOCK))

    def locate():
        raise OSError("no index")

    prefetcher.prefetch(0, locate)
    read(prefetcher, url, 3)


class Watched:
    """Ranges as they are asked for; those of the first sample wait until they are let go.

    The others wait for an event of their own, if it is said so. Ranges of other objects
    are let through: those are read ahead by what other tests have left.
    """

    def __init__(self, first, *, url, hold_others=False):
        self.first, self.url = first, url
        self.let_go, self.others_go, self.asked = threading.Event(), threading.Event(), []
        if not hold_others:
            self.others_go.set()
        self.original = RangeReader.read

    def read(self, reader, url, start, stop, **options):
        if url != self.url:
            return self.original(reader, url, start, stop, **options)
        self.asked.append((start // SAMPLE, stop // SAMPLE))
        if start == self.first * SAMPLE:
            assert self.let_go.wait(60)
        else:
            assert self.others_go.wait(60)
        return self.original(reader, url, start, stop, **options)


def test_a_block_that_was_claimed_is_written_though_all_is_forgotten(url, tmp_path):
    cache = str(tmp_path / "cache")
    watched, second = Watched(first=0, url=url), threading.Event()

    def read(reader, url, start, stop, **options):
        if start == 200 * SAMPLE:
            assert second.wait(60)
        return watched.read(reader, url, start, stop, **options)

    with (
        mock.patch("loader.reading.request_queue._GAP_BYTES", 0),
        mock.patch.object(RangeReader, "read", read),
    ):
        prefetcher = Prefetcher(
            Network(block_bytes=BLOCK, requests=1), cache=cache, cache_bytes=10**7
        )
        prefetcher.prefetch(0, located(url, [0, 200]))
        wait_until(lambda: watched.asked)
        prefetcher.prefetch(1, located(url, [5]))
        wait_until(lambda: 1 in prefetcher._plan._steps)
        watched.let_go.set()
        entry = prefetcher._plan._states[place(url, 0)[0].name]
        # The block of samples 0 and 5 is claimed; 5 waits behind 200, and is forgotten.
        wait_until(lambda: entry.writer is not None and entry.wanted and not entry.coming)
        prefetcher.cancel_prefetch()
        second.set()
        wait_until(lambda: entry.writer is None and entry.on_disk)


def test_what_shares_a_block_with_the_first_batch_does_not_pass_for_urgent(url):
    watched = Watched(first=0, url=url, hold_others=True)
    with (
        mock.patch("loader.reading.request_queue._GAP_BYTES", 0),
        mock.patch.object(RangeReader, "read", lambda *a, **o: watched.read(*a, **o)),
    ):
        prefetcher = Prefetcher(Network(block_bytes=BLOCK))
        for step in range(5):
            prefetcher.prefetch(step, located(url, [2 * step]))
        time.sleep(0.2)
        assert len(watched.asked) <= 2
        watched.let_go.set()
        watched.others_go.set()
        for step in range(5):
            read(prefetcher, url, 2 * step)


def wait_until(is_true):
    stop_s = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < stop_s
        time.sleep(0.001)


def test_neighbours_are_joined_up_to_a_piece_and_a_few_steps(url):
    prefetcher = Prefetcher(Network(block_bytes=BLOCK, requests=1, cold_steps=2))
    watched = Watched(first=390, url=url)
    with (
        mock.patch("loader.reading.request_queue._PIECE_BYTES", 4 * SAMPLE),
        mock.patch.object(RangeReader, "read", lambda *a, **o: watched.read(*a, **o)),
    ):
        # Behind the first step, with the only request busy until all is planned.
        prefetcher.prefetch(0, located(url, [389]))
        read(prefetcher, url, 389)
        prefetcher.release(0)
        steps = {1: [390], 3: [5, 6, 7, 8, 9], 4: [0, 1], 5: [3], 9: [2, 4]}
        for step, samples in steps.items():
            prefetcher.prefetch(step, located(url, samples))
        stop_s = time.monotonic() + 60
        while sum(map(len, prefetcher._plan._steps.values())) < 11:
            assert time.monotonic() < stop_s
            time.sleep(0.01)
        watched.let_go.set()
        for step, samples in steps.items():
            for sample in samples:
                read(prefetcher, url, sample)
            if step == 3:  # what is needed at once travels alone: the next is asked for before
                wait_until(lambda: any(start == 0 for start, _ in watched.asked))
            prefetcher.release(step)
    # 5 is due first, with as much behind it as makes a piece; 2 comes with what is around it.
    assert watched.asked == [(389, 390), (390, 391), (5, 9), (9, 10), (0, 4), (4, 5)]


def test_the_first_batch_shares_the_link_with_few_others(url):
    watched = Watched(first=0, url=url)
    with mock.patch.object(RangeReader, "read", lambda *a, **o: watched.read(*a, **o)):
        prefetcher = Prefetcher(Network(block_bytes=BLOCK))
        prefetcher.prefetch(0, located(url, [0]))
        while not watched.asked:
            time.sleep(0.001)
        for step in range(1, 30):
            prefetcher.prefetch(step, located(url, [10 * step]))
        deadline_s = time.monotonic() + 0.5
        others = 1
        while time.monotonic() < deadline_s:
            under_way = prefetcher._plan._queue._under_way[False]
            assert under_way <= others
        watched.let_go.set()
        read(prefetcher, url, 0)
        for step in range(1, 30):
            read(prefetcher, url, 10 * step)


def test_the_first_batch_waits_for_its_own_indexes_only(url):
    index = {step: place(url, 100 + 10 * step)[0] for step in range(9)}
    watched = Watched(first=100, url=url, hold_others=True)

    def locate(step):
        block = index[step]
        prefetcher.read(block, (block.start, block.stop))
        return [place(url, 10 * step)]

    with mock.patch.object(RangeReader, "read", lambda *a, **o: watched.read(*a, **o)):
        prefetcher = Prefetcher(Network(block_bytes=BLOCK))
        for step in range(9):
            prefetcher.prefetch(step, partial(locate, step))
            prefetcher.fetch_soon([index[step]], step=step)
        wait_until(lambda: (100, 110) in watched.asked)
        time.sleep(0.2)
        before = list(watched.asked)
        watched.let_go.set()
        wait_until(lambda: (0, 1) in watched.asked)
        watched.others_go.set()
        for step in range(9):
            read(prefetcher, url, 10 * step)
            prefetcher.release(step)
    # Its index, with one of another step at most; behind it its sample.
    assert len(before) <= 2
    assert (0, 1) in watched.asked[len(before) : len(before) + 2]
    assert len(watched.asked) == 9 + 9


def test_what_a_batch_waits_for_is_not_joined_with_what_later_ones_need(url):
    watched = Watched(first=399, url=url)
    with mock.patch.object(RangeReader, "read", lambda *a, **o: watched.read(*a, **o)):
        prefetcher = Prefetcher(Network(block_bytes=BLOCK, requests=1))
        prefetcher.prefetch(0, located(url, [399]))
        while not watched.asked:
            time.sleep(0.001)
        prefetcher.prefetch(0, located(url, [0]))
        prefetcher.prefetch(1, located(url, [1, 2]))
        while 1 not in prefetcher._plan._steps:
            time.sleep(0.001)
        watched.let_go.set()
        for sample in (399, 0, 1, 2):
            read(prefetcher, url, sample)
    assert watched.asked == [(399, 400), (0, 1), (1, 3)]


def test_a_sequential_pass_joins_neighbours(url):
    prefetcher = Prefetcher(Network(block_bytes=BLOCK))
    run(prefetcher, url, [list(range(i, i + 8)) for i in range(0, 400, 8)])
    assert prefetcher.counters["requests"] < 150
    assert prefetcher.counters["bytes"] == len(OBJECT)


def test_the_second_pass_comes_from_the_cache(url, tmp_path):
    prefetcher = Prefetcher(
        Network(block_bytes=BLOCK), cache=str(tmp_path / "cache"), cache_bytes=10**7
    )
    run(prefetcher, url, shuffled())
    before = prefetcher.counters["bytes"]
    prefetcher.cancel_prefetch()
    run(prefetcher, url, shuffled(2))
    assert prefetcher.counters["bytes"] == before
    assert prefetcher.counters["cache_hits"] >= 400


@pytest.mark.parametrize("blocks_held", [4, 10, 20])
def test_a_cache_that_is_too_small_costs_no_more_than_twice_the_bytes(url, blocks_held, tmp_path):
    prefetcher = Prefetcher(
        Network(block_bytes=BLOCK),
        cache=str(tmp_path / "cache"),
        cache_bytes=blocks_held * BLOCK,
    )
    with mock.patch("loader.reading.request_queue._GAP_BYTES", 0):
        for seed in (1, 2, 3):
            run(prefetcher, url, shuffled(seed))
            prefetcher.cancel_prefetch()
    held = sum(path.stat().st_size for path in (tmp_path / "cache/blocks").iterdir())
    assert held <= blocks_held * BLOCK
    assert prefetcher.counters["bytes"] <= 3 * 2 * len(OBJECT)


def test_memory_for_reading_ahead_is_bounded(url):
    network = Network(block_bytes=BLOCK, ahead_bytes=20 * SAMPLE, cold_steps=1)
    prefetcher = Prefetcher(network)
    most = []
    original = prefetcher.read

    def watched(block, span):
        most.append(prefetcher._plan.held_bytes)
        return original(block, span)

    with mock.patch.object(prefetcher, "read", watched):
        run(prefetcher, url, shuffled())
    # Beside it may be held what is needed now, and what one request fetches with it: 72 samples
    # are planned at a time.
    assert max(most) <= 50 * SAMPLE
    assert prefetcher._plan.held_bytes == 0


def test_what_was_planned_and_not_read_is_dropped(url):
    prefetcher = Prefetcher(Network(block_bytes=BLOCK))
    for step, samples in enumerate(shuffled()[:8]):
        prefetcher.prefetch(step, located(url, samples))
    read(prefetcher, url, shuffled()[0][0])
    prefetcher.cancel_prefetch()
    deadline_s = time.monotonic() + 60
    while prefetcher._plan._states and time.monotonic() < deadline_s:
        threading.Event().wait(0.01)
    assert prefetcher._plan._states == {}
    assert prefetcher._plan.held_bytes == 0


@pytest.mark.parametrize("cached", [False, True], ids=["memory", "cache"])
@pytest.mark.parametrize("failing", [0, 2, 5])
def test_parts_of_a_sample_are_dropped_where_the_store_fails_in_the_middle(
    failing, cached, url, tmp_path
):
    cache = str(tmp_path / "cache") if cached else None
    prefetcher = Prefetcher(Network(block_bytes=BLOCK), cache=cache, cache_bytes=10**7)
    shard = RemoteShard(
        url=url,
        file=SimpleNamespace(num_bytes=len(OBJECT), content_sha256="ab" * 32),
        rows=None,
        offsets=None,
        prefetcher=prefetcher,
        block_bytes=BLOCK,
        parted=np.zeros(0, np.int64),
    )
    spans = [(at, at + 3000) for at in range(1000, 19_000, 3000)]
    parts = [Range(*span, crc32(OBJECT[slice(*span)])) for span in spans]

    def refused(start, stop):
        return start <= spans[failing][0] < stop

    original, into = RangeReader.read, RangeReader.read_into

    def read_some(self, url, start, stop, **options):
        if refused(start, stop):
            raise OSError("the network is away")
        return original(self, url, start, stop, **options)

    def read_into_some(self, url, start, target, **options):
        if refused(start, start + len(target)):
            raise OSError("the network is away")
        return into(self, url, start, target, **options)

    with (
        mock.patch.object(RangeReader, "read", read_some),
        mock.patch.object(RangeReader, "read_into", read_into_some),
        pytest.raises(OSError, match="away"),
    ):
        shard.ranges(parts, where="a clip")
    plan = prefetcher._plan
    wait_until(lambda: all(state.is_open for state in list(plan._states.values())))
    assert plan.held_bytes == 0
    assert list(map(bytes, shard.ranges(parts, where="a clip"))) == [
        OBJECT[slice(*span)] for span in spans
    ]
    assert plan.held_bytes == 0


@pytest.mark.parametrize("cached", [False, True], ids=["memory", "cache"])
def test_many_readers_and_cancels_at_once_get_right_bytes_and_leave_nothing(url, cached, tmp_path):
    cache = str(tmp_path / "cache") if cached else None
    prefetcher = Prefetcher(
        Network(block_bytes=BLOCK, requests=4, streams=2), cache=cache, cache_bytes=10**7
    )
    steps, failures = shuffled(batch=16), []

    def read_all(step):
        try:
            for sample in steps[step]:
                read(prefetcher, url, sample)
        except BaseException as error:  # noqa: BLE001 - the test's thread raises it
            failures.append(error)

    for step in range(len(steps)):
        for soon in range(step, min(step + 4, len(steps))) if step % 5 == 0 else [step + 3]:
            if soon < len(steps):
                prefetcher.prefetch(soon, located(url, steps[soon]))
        # Two readers want each sample, as do those of the next step.
        readers = [
            threading.Thread(target=read_all, args=(min(step + k // 2, len(steps) - 1),))
            for k in range(4)
        ]
        for reader in readers:
            reader.start()
        if step % 5 == 4:
            prefetcher.cancel_prefetch()
        for reader in readers:
            reader.join(60)
            assert not reader.is_alive()
        prefetcher.release(step)
    assert not failures
    prefetcher.cancel_prefetch()
    plan = prefetcher._plan
    wait_until(lambda: all(state.is_open for state in list(plan._states.values())))
    assert plan.held_bytes == 0
    if cached:
        wait_until(lambda: not list(Path(cache, "blocks").glob("*.part")))


def test_a_spoilt_block_in_the_cache_is_fetched_again(url, tmp_path):
    cache = tmp_path / "cache"
    prefetcher = Prefetcher(Network(block_bytes=BLOCK), cache=str(cache), cache_bytes=10**7)
    run(prefetcher, url, shuffled())
    block, _ = place(url, 0)
    prefetcher.reject(block)
    assert not (cache / "blocks" / block.name).exists()
    assert prefetcher.counters["cache_corrupt"] == 1
    read(prefetcher, url, 0)


@pytest.fixture
def tiny_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_costs_one_warning_and_no_sample(url, tiny_disk, caplog):
    prefetcher = Prefetcher(
        Network(block_bytes=BLOCK), cache=str(tiny_disk / "cache"), cache_bytes=10**7
    )
    with caplog.at_level(logging.WARNING):
        run(prefetcher, url, shuffled())
        run(prefetcher, url, shuffled(2))
    warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "No space left" in warnings[0].getMessage()
    assert prefetcher.counters["cache_failed"] == 1
    assert not list((tiny_disk / "cache/blocks").glob("*.part"))


def test_a_cache_that_cannot_be_made_costs_one_warning(url, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    prefetcher = Prefetcher(
        Network(block_bytes=BLOCK), cache=str(tmp_path / "file/cache"), cache_bytes=10**7
    )
    run(prefetcher, url, shuffled())
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1


def test_a_folder_that_is_not_a_cache_is_refused_each_time(url, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    prefetcher = Prefetcher(Network(), cache=str(tmp_path), cache_bytes=10**7)
    for _ in range(2):
        with pytest.raises(ConfigError) as caught:
            prefetcher.open()
        assert caught.value.reason == "cache_foreign"
        with pytest.raises(ConfigError):
            prefetcher.read(*place(url, 3))


def test_a_failure_ahead_of_time_is_forgotten_if_the_reader_fares_better(url):
    prefetcher = Prefetcher(Network(block_bytes=BLOCK))
    failing = threading.Event()
    failing.set()
    original = RangeReader.read

    def sometimes(self, *args, **options):
        if failing.is_set():
            raise OSError("the network is away")
        return original(self, *args, **options)

    with mock.patch.object(RangeReader, "read", sometimes):
        prefetcher.prefetch(0, located(url, [5]))
        deadline_s = time.monotonic() + 60
        while not any(e.failures for e in list(prefetcher._plan._states.values())):
            assert time.monotonic() < deadline_s
        failing.clear()
        read(prefetcher, url, 5)


def test_a_copy_takes_the_settings_and_nothing_else(url, tmp_path):
    prefetcher = Prefetcher(Network(ahead_steps=3), cache=str(tmp_path / "c"), cache_bytes=10**7)
    run(prefetcher, url, shuffled()[:3])
    copy = pickle.loads(pickle.dumps(prefetcher))
    assert copy.settings == prefetcher.settings
    assert copy.counters == {}
    run(copy, url, shuffled())


def test_settings_that_cannot_work_are_refused():
    for wrong in ({"streams": 0}, {"stall_s": 0}, {"block_bytes": -1}):
        with pytest.raises(ConfigError) as caught:
            Network(**wrong)
        assert caught.value.reason == "network"


READER = """
import sys
from tests.loader.reading.test_prefetch import *
url = "memory://prefetch/killed"
fs, path = storage.filesystem(url)
fs.pipe_file(path, OBJECT)
prefetcher = Prefetcher(Network(block_bytes=BLOCK), cache=sys.argv[1], cache_bytes=30 * BLOCK)
print("ready", flush=True)
seed = int(sys.argv[2])
while True:
    seed += 1
    prefetcher.cancel_prefetch()
    run(prefetcher, url, shuffled(seed))
    print(seed, flush=True)
"""


# A run that is killed while it fills its cache must leave nothing that another run believes.
@pytest.mark.slow
def test_readers_killed_at_random_points_leave_nothing_that_is_trusted(url, tmp_path):
    moments = random.Random(7)
    cache = str(tmp_path / "cache")
    for i in range(5):
        readers = [
            subprocess.Popen(
                [sys.executable, "-c", READER, cache, str(100 * i + k)],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
            )
            for k in range(2)
        ]
        for reader in readers:
            assert reader.stdout.readline() == b"ready\n"
        time.sleep(moments.uniform(0, 0.5))
        for reader in readers:
            assert reader.poll() is None
            reader.send_signal(signal.SIGKILL)
            reader.wait(60)
            reader.stdout.close()
        for path in Path(cache, "blocks").glob("*.block"):
            _, start, stop = path.stem.split("-")
            assert path.read_bytes() == OBJECT[int(start) : int(stop)]
    after = Prefetcher(Network(block_bytes=BLOCK), cache=cache, cache_bytes=30 * BLOCK)
    run(after, url, shuffled())
