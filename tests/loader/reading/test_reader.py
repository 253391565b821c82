import dataclasses
import errno
import gc
import mmap
import os
import pickle
import resource
import threading
import weakref
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from loader.reading.reader import ShardReader
from shardspec.errors import ConfigError, ShardError
from shardspec.index import open_index, open_index_file
from shardspec.manifest import require_manifest
from shardspec.media import decode_stored, encode_stored
from shardspec.sample import image_rows
from tests.forks import goes_on_in_a_child


def open_reader(url, **options):
    return ShardReader(url, require_manifest(url), split="train", **options)


def index_rows(url, shard=0):
    entry = require_manifest(url).shards[shard]
    path = str(Path(url, entry.index_url))
    return open_index(path, num_samples=entry.nsamples, shard_bytes=entry.num_bytes)


def change_entry(reader, shard, **values):
    """Makes the reader believe something else of a shard."""
    segments = list(reader.segments)
    file = dataclasses.replace(segments[shard].file, **values)
    segments[shard] = dataclasses.replace(segments[shard], file=file)
    reader.segments = tuple(segments)


def assert_same(got, want):
    """Compares samples, but for the byte counts that only stored ones have."""
    spans = got.spans.copy()
    image_rows(spans)[:, 6] = 0
    assert got.key == want.key
    assert got.tokens.tolist() == want.tokens.tolist()
    assert spans.tolist() == want.spans.tolist()
    assert len(got.images) == len(want.images)
    for a, b in zip(got.images, want.images, strict=True):
        assert np.array_equal(a.pixels, b.pixels)
        assert (a.source_width, a.source_height) == (b.source_width, b.source_height)
        assert a.geometry == b.geometry


@pytest.fixture
def samples(tiny_sample):
    return [tiny_sample(i, num_branches=1 + i % 3, size=(20 + i, 28)) for i in range(10)]


@pytest.fixture
def url(samples, write_dataset, tmp_path):
    return write_dataset(tmp_path / "set", samples, num_shards=3)


@pytest.mark.parametrize("codec", ["raw", "png", "webp", "lossless"])
def test_samples_are_read_as_they_were_written(codec, samples, write_dataset, tmp_path):
    reader = open_reader(write_dataset(tmp_path / "set", samples, num_shards=3, codec=codec))
    assert len(reader) == 10
    for i in (0, 9, *range(10)):
        assert_same(reader.read(i), samples[i])


def test_jpeg_samples_are_read_as_their_files_decode(samples, write_dataset, tmp_path):
    reader = open_reader(write_dataset(tmp_path / "set", samples, codec="jpeg"))
    for i, sample in enumerate(samples):
        encoded = encode_stored(sample.images[0].pixels, codec="jpeg")
        want = decode_stored(encoded, codec="jpeg")
        assert np.array_equal(reader.read(i).images[0].pixels, want)


def test_samples_with_several_images_or_none_are_read_whole(tiny_sample, write_dataset, tmp_path):
    samples = [tiny_sample(i, num_images=n) for i, n in enumerate((3, 0, 1, 0, 2, 7))]
    url = write_dataset(tmp_path / "set", samples, num_shards=2, codec="png", several=True)
    reader = open_reader(url, check="crc")
    for i, sample in enumerate(samples):
        assert_same(reader.read(i), sample)


def test_record_gives_the_metadata_and_text_of_a_sample(url, samples):
    reader = open_reader(url)
    for i in (9, 0, 4):
        assert reader.record(i) == samples[i].record


def test_dataset_may_have_empty_shards(samples, write_dataset, tmp_path):
    reader = open_reader(write_dataset(tmp_path / "set", samples[:2], num_shards=5))
    assert [reader.read(i).key for i in range(2)] == ["sample-0000", "sample-0001"]


@pytest.mark.parametrize("sample_id", [-1, 10])
def test_sample_beyond_the_ends_is_not_a_sample(sample_id, url):
    reader = open_reader(url)
    for read in (reader.read, reader.record):
        with pytest.raises(IndexError, match=f"sample {sample_id} of 10"):
            read(sample_id)


def test_unknown_split_is_refused_with_the_known_ones(url):
    with pytest.raises(ConfigError) as caught:
        ShardReader(url, require_manifest(url), split="trian")
    assert caught.value.reason == "unknown_split"
    assert "'train'" in caught.value.fix


def test_opening_reads_no_shard(url):
    for path in Path(url, "train").iterdir():
        path.unlink()
    assert len(open_reader(url)) == 10


@pytest.mark.parametrize("suffix", [".tar", ".index.npy"])
@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda payload: payload[:-1], "shard_size"),
        (lambda payload: payload[:0], "shard_size"),
        (lambda payload: payload + b"\0", "shard_size"),
        (None, "shard_missing"),
    ],
    ids=["one byte short", "empty", "one byte long", "missing"],
)
def test_file_of_another_length_than_promised_is_refused(suffix, change, reason, url):
    (path,) = Path(url, "train").glob(f"*-00001-of-*{suffix}")
    want = path.stat().st_size
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    reader = open_reader(url)
    assert reader.read(0).key == "sample-0000"  # the other shards are not touched by it
    for _ in range(2):
        with pytest.raises(ShardError) as caught:
            reader.read(4)
        assert caught.value.reason == reason
        assert caught.value.where == str(path)
        assert caught.value.facts["want_bytes"] == want


def test_index_with_another_number_of_rows_is_refused(url):
    reader = open_reader(url)
    change_entry(reader, 0, nsamples=reader.segments[0].num_rows - 1)
    with pytest.raises(ShardError) as caught:
        reader.read(0)
    assert caught.value.reason == "index_count"


def test_index_of_another_shard_is_refused(url, samples, write_dataset, tmp_path):
    larger = [dataclasses.replace(s, record={"text": "x" * 4096}) for s in samples]
    other = write_dataset(tmp_path / "other", larger, num_shards=3)
    name = require_manifest(url).shards[0].index_url
    Path(url, name).write_bytes(Path(other, name).read_bytes())
    with pytest.raises(ShardError) as caught:
        open_reader(url).read(0)
    assert caught.value.reason == "index_sha256"


def test_checksum_catches_a_flipped_byte_anywhere_in_a_sample(url, samples):
    row = index_rows(url)[1]
    start, length = int(row["offset"]), int(row["num_bytes"])
    path = Path(url, require_manifest(url).shards[0].url)
    good = path.read_bytes()
    for position in [*range(start, start + length, 97), start + length - 1]:
        broken = bytearray(good)
        broken[position] ^= 1 << position % 8
        path.write_bytes(broken)
        reader = open_reader(url, check="crc")
        with pytest.raises(ShardError) as caught:
            reader.read(1)
        assert caught.value.reason == "sample_crc"
        assert caught.value.where == f"{path} sample sample-0001"
        assert_same(reader.read(0), samples[0])
        assert_same(reader.read(2), samples[2])


def test_broken_picture_names_its_shard_and_sample(samples, write_dataset, tmp_path):
    url = write_dataset(tmp_path / "set", samples, codec="png")
    path = Path(url, require_manifest(url).shards[0].url)
    row = index_rows(url)[3]
    broken = bytearray(path.read_bytes())
    middle = int(row["offset"]) + int(row["num_bytes"]) - 512 - int(row["image_bytes"]) // 2
    broken[middle] ^= 0x10
    path.write_bytes(broken)
    with pytest.raises(ShardError) as caught:
        open_reader(url, check="size").read(3)
    assert caught.value.reason == "image_decode"
    assert caught.value.where == f"{path} sample sample-0003"


def test_threads_share_a_reader(samples, write_dataset, tmp_path):
    url = write_dataset(tmp_path / "set", samples, num_shards=5, codec="jpeg")
    reader = open_reader(url, check="crc")
    alone = open_reader(url)
    want = [alone.read(i) for i in range(10)]
    gate = threading.Barrier(8)
    failures = []

    def work(thread):
        gate.wait()  # all of them open the first shards at once
        for i in np.random.RandomState(thread).permutation(np.tile(np.arange(10), 5)).tolist():
            try:
                assert_same(reader.read(i), dataclasses.replace(want[i], spans=samples[i].spans))
            except (AssertionError, ShardError) as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_reader_that_has_shards_open_can_be_sent_to_another_process(url, samples):
    reader = open_reader(url, check="crc")
    for i in range(10):
        reader.read(i)
    payload = pickle.dumps(reader)
    assert len(payload) < 8192  # names and numbers, no pixels
    copy = pickle.loads(payload)
    assert copy.check == "crc"
    for i in range(10):
        assert_same(copy.read(i), samples[i])
        assert_same(reader.read(i), samples[i])


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts descriptors in /proc")
def test_descriptors_stay_few_however_many_shards_there_are(tiny_sample, write_dataset, tmp_path):
    samples = [tiny_sample(i) for i in range(300)]
    reader = open_reader(write_dataset(tmp_path / "set", samples, num_shards=300))
    before = len(os.listdir("/proc/self/fd"))
    held = [reader.read(0)]
    for _ in range(2):
        for i, sample in enumerate(samples):
            assert_same(reader.read(i), sample)
    assert len(os.listdir("/proc/self/fd")) - before <= 2 * 257
    # What was read from a shard that is closed by now is still there.
    assert_same(held[0], samples[0])


# Python 3.12 warns of forking beside threads.
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_child_forked_while_a_thread_opens_a_shard_reads_anyway(url):
    reader = open_reader(url)
    assert goes_on_in_a_child(lambda: reader.read(0), forked_under=reader._open.lock)
    assert reader.read(0).key == "sample-0000"


def test_readers_are_not_kept_alive_for_the_sake_of_forks(url):
    reader = open_reader(url)
    reader.read(0)
    kept = weakref.ref(reader._open)
    del reader
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("limit", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_shards_are_closed_where_a_limit_of_the_system_is_met(limit, url, samples):
    reader = open_reader(url)

    def open_few(*args, **options):
        if len(reader._open) >= 2:
            raise OSError(limit, os.strerror(limit))
        return open_index_file(*args, **options)

    with mock.patch("loader.reading.local.open_index_file", open_few):
        for i in (0, 9, *range(10)):
            assert_same(reader.read(i), samples[i])
    assert 1 <= len(reader._open) <= 2


def test_open_shards_stay_few_where_descriptors_are_many(url):
    most = open_reader(url)._local.max_open
    for granted in (1 << 20, resource.RLIM_INFINITY):
        with mock.patch("resource.getrlimit", return_value=(granted, granted)):
            assert most(1) == 256
            assert most(10_000) == 16_000


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads /proc")
def test_memory_that_is_left_may_be_little(tiny_sample, write_dataset, tmp_path):
    samples = [tiny_sample(i, size=(2000, 2000)) for i in range(8)]  # of 12 MB each
    reader = open_reader(write_dataset(tmp_path / "set", samples, num_shards=8))
    reader.stored(0)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * mmap.PAGESIZE + 40_000_000, hard))
    try:
        keys = [reader.stored(i).key for i in range(8)]
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert keys == [sample.key for sample in samples]
    assert len(reader._open) == 8  # tars take no address space
