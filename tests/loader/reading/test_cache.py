import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader.reading.cache import MARKER, BlockCache, CacheWriter, eviction_rank
from shardspec.errors import ConfigError

ROOT = Path(__file__).parents[3]


def name(i, num_bytes=100):
    return f"{i:032x}-0-{num_bytes}.block"


def payload(i, num_bytes=100):
    return bytearray([i % 256]) * num_bytes


@pytest.fixture
def cache(tmp_path):
    return BlockCache(str(tmp_path / "cache"), max_bytes=1000)


def put(cache, i, *, step=0, now=0, num_bytes=100):
    fill = cache.begin(name(i, num_bytes), num_bytes, step=step, now=now)
    if isinstance(fill, CacheWriter):
        fill.commit(payload(i, num_bytes), step=step)
    return fill


def held(cache):
    return {int(path.name[:32], 16) for path in cache.blocks.iterdir()}


def test_a_block_is_found_as_it_was_put(cache):
    assert cache.find(name(1), 100) is None
    assert isinstance(put(cache, 1), CacheWriter)
    assert cache.find(name(1), 100).read(0, 100) == payload(1)
    assert put(cache, 1) == "ready"
    cache.discard(name(1))
    assert cache.find(name(1), 100) is None


def test_what_is_being_written_is_busy_and_not_found(cache):
    fill = cache.begin(name(1), 100, step=0, now=0)
    assert cache.find(name(1), 100) is None
    assert cache.begin(name(1), 100, step=0, now=0) == "busy"
    fill.abandon()
    assert isinstance(put(cache, 1), CacheWriter)


def test_a_block_of_another_length_is_thrown_away(cache):
    put(cache, 1)
    (cache.blocks / name(1)).write_bytes(b"short")
    assert cache.find(name(1), 100) is None
    assert isinstance(put(cache, 1), CacheWriter)


def test_the_bound_holds_whatever_is_put(cache):
    for i in range(100):
        assert isinstance(put(cache, i, step=i, now=i), CacheWriter)
        assert sum(path.stat().st_size for path in cache.blocks.iterdir()) <= 1000
    assert 99 in held(cache)


def test_used_up_blocks_go_first_then_those_that_are_needed_last(cache):
    for i in range(10):
        put(cache, i, step=20 + i)
    cache.used_up(name(4), passes=1)
    cache.used_up(name(5), passes=2)
    put(cache, 10, step=5)
    assert held(cache) == set(range(11)) - {4, 5}  # a sixteenth more room than it needs
    put(cache, 11, step=5)
    put(cache, 12, step=5)
    assert held(cache) == set(range(13)) - {4, 5, 8, 9}


def test_blocks_whose_use_is_past_go_before_those_that_are_still_planned(cache):
    for i in range(10):
        put(cache, i, step=i)
    put(cache, 10, step=9, now=6)
    assert held(cache) == set(range(11)) - {0, 1}
    cache.plan(name(2), step=8)
    put(cache, 11, step=9, now=6)
    put(cache, 12, step=9, now=6)
    assert held(cache) == set(range(13)) - {0, 1, 3, 4}


def test_no_block_is_evicted_for_one_that_is_needed_later(cache):
    for i in range(10):
        put(cache, i, step=i + 1)
    assert put(cache, 10, step=50) == "full"
    assert held(cache) == set(range(10))
    assert isinstance(put(cache, 11, step=3), CacheWriter)


def test_indexes_are_not_evicted(cache):
    index = "f" * 32 + "-0-100.index"
    cache.begin(index, 100, step=0, now=0).commit(payload(7), step=0)
    for i in range(50):
        put(cache, i, step=i, now=i)
    assert cache.find(index, 100).read(0, 100) == payload(7)
    assert sum(path.stat().st_size for path in cache.blocks.iterdir()) <= 1000


@given(
    uses=st.lists(st.integers(0, 400), min_size=2, max_size=30, unique=True),
    now=st.integers(0, 400),
)
def test_planned_blocks_are_ranked_by_their_next_use(uses, now):
    ranks = {step: eviction_rank(2**30 - step, now=now) for step in uses}
    order = sorted(uses, key=ranks.__getitem__)
    past = sorted(step for step in uses if step < now)
    assert order == past + sorted((step for step in uses if step >= now), reverse=True)


def test_many_threads_and_one_block_make_one_writer(cache):
    gate, found = threading.Barrier(8), []

    def work():
        gate.wait()
        found.append(put(cache, 1))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(isinstance(one, CacheWriter) for one in found) == 1
    assert cache.find(name(1), 100).read(0, 100) == payload(1)


def test_a_lost_counter_is_counted_again(cache):
    for i in range(10):
        put(cache, i, step=i)
    (cache.folder / "usage").unlink()
    put(cache, 10, step=0)
    assert len(held(cache)) == 9


# A file that changes its name while somebody counts would be missed under both.
def test_no_file_comes_or_goes_while_somebody_counts(cache):
    kept = cache.begin(name(1), 100, step=1, now=0)
    dropped = cache.begin(name(2), 100, step=1, now=0)
    work = [partial(kept.commit, payload(1), step=1), dropped.abandon]
    with cache._counter():
        threads = [threading.Thread(target=one, daemon=True) for one in work]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        assert sorted(os.listdir(cache.blocks)) == [f"{name(1)}.part", f"{name(2)}.part"]
    for thread in threads:
        thread.join(60)
    assert os.listdir(cache.blocks) == [name(1)]


def test_a_child_forked_while_the_counter_is_locked_holds_up_nobody(cache):
    with cache._counter():
        child = os.fork()
        if not child:  # a DataLoader's worker, which lives on
            time.sleep(600)
            os._exit(0)
    try:
        counting = threading.Thread(target=cache.discard, args=("0-0-1.block",), daemon=True)
        counting.start()
        counting.join(60)
        assert not counting.is_alive()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError) as caught:
        BlockCache(str(tmp_path), max_bytes=1000)
    assert caught.value.reason == "cache_foreign"
    assert "thesis.tex" in caught.value.facts["others"]
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("marker", [b"{", b"{}", None], ids=["no json", "no fields", "other owner"])
def test_a_cache_of_somebody_else_is_refused(marker, tmp_path):
    cache = BlockCache(str(tmp_path / "cache"), max_bytes=1000)
    if marker is None:
        marker = json.dumps({"version": 1, "owner": os.getuid() + 1}).encode()
    (cache.folder / MARKER).write_bytes(marker)
    with pytest.raises(ConfigError) as caught:
        BlockCache(str(tmp_path / "cache"), max_bytes=1000)
    assert caught.value.reason == "cache_foreign"


def test_many_threads_that_open_a_new_folder_at_once_make_one_cache(tmp_path):
    for i in range(20):
        together, errors = threading.Barrier(8), []

        def claim(folder=tmp_path / str(i), together=together, errors=errors):
            try:
                together.wait(60)
                BlockCache(str(folder), max_bytes=1000)
            except Exception as error:  # noqa: BLE001 - the test's thread shows it
                errors.append(error)

        threads = [threading.Thread(target=claim) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert errors == []
        assert sorted(os.listdir(tmp_path / str(i))) == ["blocks", MARKER]


def test_eviction_touches_no_file_that_is_not_a_block(cache):
    stranger = cache.blocks / "notes.txt"
    stranger.write_text("not ours")
    for i in range(50):
        put(cache, i, step=i, now=i)
    assert stranger.read_text() == "not ours"


def test_a_full_disk_leaves_nothing_behind(cache, monkeypatch):
    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "no space left")

    fill = cache.begin(name(1), 100, step=0, now=0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="no space"):
            fill.commit(payload(1), step=0)
    assert list(cache.blocks.iterdir()) == []
    for i in range(10):
        assert isinstance(put(cache, i), CacheWriter)


# The module alone: its package would import torch, which takes most of a test's time.
WRITER = """
import importlib.util
import sys
spec = importlib.util.spec_from_file_location("cache", "loader/reading/cache.py")
module = sys.modules["cache"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
BlockCache, CacheWriter = module.BlockCache, module.CacheWriter
cache = BlockCache(sys.argv[1], max_bytes=20 * 300_000)
print("ready", flush=True)
i = 0
while True:
    i += 1
    number = i % 40
    name = f"{number:032x}-0-300000.block"
    got = cache.begin(name, 300_000, step=i, now=i)
    if isinstance(got, CacheWriter):
        got.commit(bytearray([number]) * 300_000, step=i)
"""


# What a killed writer leaves must never be taken for a block, nor keep others from writing it.
@pytest.mark.slow
@pytest.mark.parametrize(
    "kills", [5, pytest.param(30, marks=pytest.mark.slow)], ids=["a few", "many"]
)
def test_killed_writers_leave_nothing_that_is_trusted(kills, tmp_path):
    folder = tmp_path / "cache"
    moments = random.Random(3)
    left_parts = 0
    for _ in range(kills):
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, str(folder)], cwd=ROOT, stdout=subprocess.PIPE
            )
            for _ in range(2)
        ]
        for writer in writers:
            assert writer.stdout.readline() == b"ready\n"
        time.sleep(moments.uniform(0.01, 0.1))
        for writer in writers:
            assert writer.poll() is None
            writer.send_signal(signal.SIGKILL)
            writer.wait(60)
            writer.stdout.close()
        cache = BlockCache(str(folder), max_bytes=20 * 300_000)
        left_parts += sum(path.suffix == ".part" for path in cache.blocks.iterdir())
        for number in range(40):
            found = cache.find(f"{number:032x}-0-300000.block", 300_000)
            assert found is None or found.read(0, 300_000) == bytes([number]) * 300_000
        whole = [path for path in cache.blocks.iterdir() if path.suffix == ".block"]
        assert len(whole) <= 20
    # And every block can be written still.
    for number in range(40):
        got = cache.begin(f"{number:032x}-0-300000.block", 300_000, step=10**6, now=10**6)
        assert got != "busy"
        if isinstance(got, CacheWriter):
            got.commit(bytearray([number]) * 300_000, step=10**6)
    assert len(list(cache.blocks.iterdir())) <= 20


def test_a_block_that_is_cut_while_it_is_open_is_noticed(cache):
    put(cache, 1)
    found = cache.find(name(1), 100)
    os.truncate(cache.blocks / name(1), 40)
    assert found.read(0, 40) == payload(1, 40)
    assert found.read(30, 50) is None
    assert cache.find(name(1), 100) is None


def test_a_block_that_the_disk_cannot_read_is_none(cache, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "broken")

    put(cache, 1)
    found = cache.find(name(1), 100)
    monkeypatch.setattr(os, "pread", broken)
    assert found.read(0, 100) is None


def test_descriptors_are_closed_with_their_owners(tmp_path):
    def number():
        return len(os.listdir("/dev/fd"))

    before = number()
    for _ in range(50):
        cache = BlockCache(str(tmp_path / "cache"), max_bytes=1000)
        put(cache, 1)
        assert cache.find(name(1), 100) is not None
    del cache
    assert number() <= before
