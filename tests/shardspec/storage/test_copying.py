"""Joining byte ranges: planned parts keep the store's limits; bytes and refusals on real files."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardspec.errors import ShardError, StorageError
from shardspec.storage import copying
from shardspec.storage.copying import (
    MAX_PART_BYTES,
    MAX_PARTS,
    MIN_PART_BYTES,
    ByteRange,
    CopyPart,
    check_unchanged,
    concat_local,
    concat_verified,
    object_version,
    plan_parts,
    whole_file,
)
from shardspec.tar import END_OF_ARCHIVE

MIB = 2**20

lengths = st.lists(
    st.one_of(
        st.integers(1, 3000),
        st.integers(1, 12 * MIB),
        st.integers(MIN_PART_BYTES - 2, MIN_PART_BYTES + 2),
        st.integers(1, 3 * MAX_PART_BYTES),
    ),
    max_size=12,
)


def part_bytes(part):
    if isinstance(part, CopyPart):
        return part.source.num_bytes
    return sum(span.num_bytes for span in part.sources) + len(part.end)


def part_ranges(part):
    return [part.source] if isinstance(part, CopyPart) else list(part.sources)


@given(lengths=lengths, end=st.sampled_from([b"", END_OF_ARCHIVE]))
def test_parts_keep_the_limits_of_the_store_and_give_the_bytes_in_order(lengths, end):
    ranges = [ByteRange(url=str(i), start=7 * i, stop=7 * i + n) for i, n in enumerate(lengths)]
    parts = plan_parts(ranges, end=end)
    assert len(parts) <= MAX_PARTS
    for part in parts[:-1]:
        assert MIN_PART_BYTES <= part_bytes(part) <= MAX_PART_BYTES
        assert not getattr(part, "end", b"")
    assert sum(map(part_bytes, parts)) == sum(lengths) + len(end)
    # Put together again, they are the ranges.
    joined = []
    for span in (span for part in parts for span in part_ranges(part)):
        if joined and (joined[-1].url, joined[-1].stop) == (span.url, span.start):
            joined[-1] = ByteRange(url=span.url, start=joined[-1].start, stop=span.stop)
        else:
            joined.append(span)
    assert joined == ranges


@given(lengths=lengths)
def test_what_is_sent_is_at_most_a_part_for_every_range_and_one_for_the_end(lengths):
    ranges = [ByteRange(url=str(i), start=0, stop=n) for i, n in enumerate(lengths)]
    smallest = max(MIN_PART_BYTES, -(-sum(lengths) // (MAX_PARTS - 1)))
    sent = [part for part in plan_parts(ranges, end=b"e") if not isinstance(part, CopyPart)]
    assert all(part_bytes(part) <= smallest + 1 for part in sent)
    long = sum(n >= 2 * smallest for n in lengths)
    assert sum(map(part_bytes, sent)) <= smallest * (len(lengths) - long + 1) + smallest


def test_one_long_range_and_its_own_end_need_nothing_sent():
    parts = plan_parts([ByteRange(url="a", start=5, stop=5 + 300 * MIB)], end=b"")
    assert parts == [CopyPart(source=ByteRange(url="a", start=5, stop=5 + 300 * MIB))]


def test_very_many_small_ranges_stay_below_the_most_parts():
    ranges = [
        ByteRange(url="a", start=i * 2 * 10**7, stop=i * 2 * 10**7 + 10**7) for i in range(9000)
    ]
    parts = plan_parts(ranges, end=b"")
    assert sum(map(part_bytes, parts)) == 9 * 10**10 > MIN_PART_BYTES * MAX_PARTS
    assert len(parts) <= MAX_PARTS


# --- on this machine


def make_sources(folder, sizes, *, seed=0):
    """Writes files of samples of the given sizes; returns ranges, one per file, and rows."""
    rng = np.random.RandomState(seed)
    ranges, rows = [], []
    for number, own in enumerate(sizes):
        payloads = [rng.bytes(size) for size in own]
        path = folder / f"{number}.bin"
        head = rng.bytes(100)
        path.write_bytes(head + b"".join(payloads) + rng.bytes(10))
        ranges.append(ByteRange(url=str(path), start=100, stop=100 + sum(own)))
        for i, payload in enumerate(payloads):
            rows.append((len(payload), zlib.crc32(payload), f"{number}-{i}".encode()))
    dtype = [("num_bytes", "<u4"), ("crc32", "<u4"), ("key", "S20")]
    return ranges, np.array(rows, dtype=dtype)


def joined(ranges):
    payloads = []
    for span in ranges:
        with open(span.url, "rb") as stream:
            stream.seek(span.start)
            payloads.append(stream.read(span.num_bytes))
    return b"".join(payloads) + END_OF_ARCHIVE


SIZES = [
    [[1]],
    [[3, 700_000, 5], [2]],
    [[512 * 1024], [512 * 1024 - 1, 2], [1_300_000]],
    [[1000] * 2000, [7] * 3],
    [],
]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("hashed", [True, False])
def test_bytes_that_pass_here_are_joined_and_hashed(sizes, hashed, tmp_path):
    ranges, rows = make_sources(tmp_path, sizes)
    sha256 = concat_verified(tmp_path / "out", ranges, rows, hashed=hashed)
    want = joined(ranges)
    assert (tmp_path / "out").read_bytes() == want
    assert sha256 == (hashlib.sha256(want).hexdigest() if hashed else "")


@pytest.mark.parametrize("sizes", SIZES)
def test_bytes_that_stay_in_the_kernel_are_the_same(sizes, tmp_path):
    ranges, _ = make_sources(tmp_path, sizes)
    concat_local(tmp_path / "out", ranges)
    assert (tmp_path / "out").read_bytes() == joined(ranges)


@pytest.fixture
def apart():
    """A folder of a file system that has no disk, where copying is left to it."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def test_file_systems_without_a_disk_are_asked_to_copy(apart, monkeypatch):
    ranges, _ = make_sources(apart, SIZES[2])
    copied = []

    def copy(*args):
        copied.append(args[2])
        return real(*args)

    real = os.copy_file_range
    monkeypatch.setattr(copying.os, "copy_file_range", copy)
    concat_local(apart / "out", ranges)
    assert (apart / "out").read_bytes() == joined(ranges)
    assert len(copied) >= len(ranges)


@pytest.mark.parametrize("refusal", [OSError(18, "cross-device"), OSError(38, "no call"), 0])
def test_where_they_cannot_the_bytes_are_read_and_written(refusal, apart, monkeypatch):
    ranges, _ = make_sources(apart, SIZES[2])

    def refuse(*args):
        if refusal:
            raise refusal
        return 0  # as some do for files that they do not know the length of

    monkeypatch.setattr(copying.os, "copy_file_range", refuse)
    concat_local(apart / "out", ranges)
    assert (apart / "out").read_bytes() == joined(ranges)


def test_an_error_of_the_disk_is_not_a_reason_to_try_another_way(apart, monkeypatch):
    ranges, _ = make_sources(apart, SIZES[2])

    def fail(*args):
        raise OSError(5, "input/output error")

    monkeypatch.setattr(copying.os, "copy_file_range", fail)
    with pytest.raises(StorageError) as caught:
        concat_local(apart / "out", ranges)
    assert caught.value.reason == "storage_failed"


@pytest.mark.parametrize("byte", [100, 100 + 3, 100 + 700_007])
def test_a_changed_byte_of_any_sample_is_noticed(byte, tmp_path):
    ranges, rows = make_sources(tmp_path, SIZES[1])
    payload = bytearray((tmp_path / "0.bin").read_bytes())
    payload[byte] ^= 1
    (tmp_path / "0.bin").write_bytes(payload)
    with pytest.raises(ShardError) as caught:
        concat_verified(tmp_path / "out", ranges, rows, hashed=False)
    assert caught.value.reason == "sample_crc"
    assert caught.value.where.startswith(str(tmp_path / "0.bin"))


@pytest.mark.parametrize(
    "join",
    [
        lambda out, ranges, rows: concat_verified(out, ranges, rows, hashed=False),
        lambda out, ranges, rows: concat_local(out, ranges),
    ],
)
def test_a_source_that_ends_early_is_noticed(join, tmp_path):
    ranges, rows = make_sources(tmp_path, SIZES[1])
    os.truncate(tmp_path / "0.bin", 500_000)
    with pytest.raises(ShardError) as caught:
        join(tmp_path / "out", ranges, rows)
    assert caught.value.reason == "tar_truncated"
    (tmp_path / "0.bin").unlink()
    with pytest.raises(ShardError) as caught:
        join(tmp_path / "out", ranges, rows)
    assert caught.value.reason == "source_changed"


def test_more_files_than_may_be_open_are_joined(tmp_path):
    ranges, rows = make_sources(tmp_path, [[100 + i] for i in range(200)])
    before = len(os.listdir("/proc/self/fd"))
    concat_verified(tmp_path / "out", ranges, rows, hashed=False)
    assert (tmp_path / "out").read_bytes() == joined(ranges)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[[50_000] * 1600] * 2, [[150 * MIB]]])
def test_memory_grows_neither_with_what_is_joined_nor_with_its_samples(sizes, tmp_path):
    ranges, rows = make_sources(tmp_path, sizes)
    np.save(tmp_path / "rows.npy", rows)
    code = f"""
import numpy as np
from pathlib import Path
from shardspec.storage.copying import ByteRange, concat_verified
ranges = {[(p.url, p.start, p.stop) for p in ranges]!r}
ranges = [ByteRange(url=u, start=a, stop=b) for u, a, b in ranges]
rows = np.load({str(tmp_path / "rows.npy")!r})
Path("/proc/self/clear_refs").write_text("5")  # the peak of a parent is inherited
def peak_kib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
before = peak_kib()
concat_verified(Path({str(tmp_path / "out")!r}), ranges, rows, hashed=False)
print(peak_kib() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (tmp_path / "out").stat().st_size >= 150 * MIB
    assert int(done.stdout) < 16 * 1024


def test_a_stamp_tells_versions_apart(tmp_path):
    path = tmp_path / "a"
    assert object_version(str(path)) is None
    path.write_bytes(b"one")
    first = object_version(str(path))
    check_unchanged(str(path), first)
    os.utime(path, ns=(1, 1))
    with pytest.raises(ShardError) as caught:
        check_unchanged(str(path), first)
    assert caught.value.reason == "source_changed"


@pytest.mark.parametrize("end", [END_OF_ARCHIVE, b"README".ljust(1024, b"\0")])
def test_only_a_file_that_is_taken_whole_with_its_end_is_whole(end, tmp_path):
    path = str(tmp_path / "a")
    Path(path).write_bytes(bytes(4096) + end)
    stamps = {path: object_version(path)}
    found = whole_file([ByteRange(url=path, start=0, stop=4096)], stamps)
    assert found == (path if end == END_OF_ARCHIVE else None)
    assert whole_file([ByteRange(url=path, start=512, stop=4096)], stamps) is None
    assert whole_file([ByteRange(url=path, start=0, stop=4000)], stamps) is None
    assert whole_file([ByteRange(url=path, start=0, stop=4096)] * 2, stamps) is None
    assert whole_file([], stamps) is None
