"""Clips as they are stored: frames are those of the video, whatever it is, wherever it is cut."""

import hashlib
import os
import signal
import threading
from unittest import mock

import numpy as np
import pytest

from shardspec.errors import ConfigError, SampleError, ShardError
from shardspec.video import encode_table, pool, read_frames
from shardspec.video.clip import decode_table, read_clip, store_clip
from shardspec.video.extract import Request
from shardspec.video.reader import MissingFrameError, VideoReader
from tests.shardspec.video.matrix import CUT, MATRIX
from tests.shardspec.video.stamped import stamp, write
from tests.shardspec.video.test_reader import FILES, X264

pytest.importorskip("av")

FITTING = {
    "h264 with B frames in mp4": ("whole", "cut"),
    "h264 with open GOPs in mkv": ("whole", "cut"),
    "variable rate": ("whole", "cut"),
}
"""Files whose packets name their frames; of others the file itself is stored."""


def stored(source, *, start_s=None, end_s=None, mode="uniform", max_bytes=1 << 30):
    request = Request(mode=mode, max_frames=5, start_s=start_s, end_s=end_s, max_bytes=max_bytes)
    facts, table, file = store_clip(source, request, where="a")
    return facts, table, file.tobytes()


def frames_of(table, file, numbers):
    found = {}

    def keep(at, pixels):
        found[numbers[at]] = pixels

    read_frames(encode_table(table), file, numbers, on_frame=keep)
    return found


@pytest.mark.parametrize("name", FILES)
def test_clips_have_the_frames_that_were_written(name):
    codec, container, how = FILES[name]
    file = write(codec, container, **how)
    whole, cut = FITTING.get(name, ("file", "file"))
    facts, table, copy = stored(file)
    assert (facts["stored"], facts["first"], len(facts["times"])) == (whole, 0, 24)
    assert (copy == file) == (whole == "file")
    facts, table, copy = stored(file, start_s=1.3, end_s=1.75)
    assert facts["stored"] == cut
    assert cut == "file" or len(copy) < len(file)
    count = len(facts["times"])
    assert 1 <= count < 12
    assert facts["times"] == sorted(facts["times"])
    assert (copy, table.tobytes()) == (
        (again := stored(file, start_s=1.3, end_s=1.75))[2],
        again[1].tobytes(),
    )
    for numbers in (list(range(count)), [count - 1]):
        got = list(
            read_clip(
                encode_table(table) + copy,
                table_bytes=128 + table.nbytes,
                numbers=numbers,
                where="",
            )
        )
        assert [stamp(pixels) for pixels in got] == [facts["first"] + n for n in numbers]
    with VideoReader(file) as reader:
        if reader.access == "index":
            assert np.array_equal(got[0], next(reader.read([facts["first"] + count - 1])))


def test_damaged_videos_are_stored_as_their_file():
    whole = write("libx264", "matroska", options=X264)
    cut = whole[: int(0.7 * len(whole))]
    facts, table, file = stored(cut)
    assert (facts["stored"], file) == ("file", cut)
    assert facts["info"]["damaged"]
    got = frames_of(table, file, list(range(len(facts["times"]))))
    want = [round(time_s * 12) for time_s in facts["times"]]
    assert [stamp(pixels) for pixels in got.values()] == want


def test_copy_with_other_pixels_is_not_taken():
    """A key frame that does not begin anew: the next earlier one is tried, then the beginning."""
    file = write("libx264", "mp4", options=X264)
    seen = []

    def differs(a, b):
        seen.append(a.shape)
        return len(seen) > 2

    with mock.patch("shardspec.video.clip.np.array_equal", differs):
        facts, _, copy = stored(file, start_s=1.5)
    assert facts["stored"] == "whole"
    with mock.patch("shardspec.video.clip.np.array_equal", return_value=False):
        facts, _, copy = stored(file, start_s=1.5)
    assert (facts["stored"], copy) == ("file", file)


def test_too_long_clips_are_refused_by_name():
    with pytest.raises(SampleError, match="more than a sample may have") as found:
        stored(write("libx264", "mp4", options=X264), max_bytes=1000)
    assert found.value.reason == "video_clip"


@pytest.fixture(scope="module")
def clip():
    return stored(write("libx264", "mp4", options=X264))[1:]


def test_table_of_another_file_is_refused_by_name(clip):
    table, file = clip
    moved = table.copy()
    moved[2:, 0] += 1
    with pytest.raises(SampleError, match="gives other frames"):
        frames_of(moved, file, [3])
    moved = table.copy()
    moved[0, 1] += 1
    with pytest.raises(SampleError, match="gives other frames"):
        frames_of(moved, file, [3])
    with pytest.raises(ShardError, match="header"):
        decode_table(encode_table(table.astype("<i4")[:4]))


def test_damage_to_a_clip_never_gives_another_frame(clip):
    """Frames are right, or the clip is refused by name; H.264 may not notice changed pixels."""
    table, file = clip
    rng = np.random.RandomState(3)
    ends = set()
    for _ in range(12):
        broken = bytearray(file)
        del broken[rng.randint(len(file)) :]
        try:
            got = frames_of(table, bytes(broken), [2, 11, 23])
        except SampleError as error:
            ends.add(error.reason)
        else:
            assert [stamp(pixels) for pixels in got.values()] == [2, 11, 23]
    assert ends <= {"video_open", "video_stream"}
    assert ends


@pytest.fixture
def alone():
    """A pool of one process, for this test alone."""
    own = pool._Pool(pool.ClipLimits(processes=1))
    with mock.patch.dict(pool._pools, {pool.DEFAULT_LIMITS: own}):
        yield own
    for process in own.idle:
        process.close()


def test_process_that_dies_is_replaced_once_and_then_named(alone):
    # Many times what waits in a pipe, so that the process is not at its end when it dies.
    table, file = stored(write("libx264", "mp4", options=X264, count=12, size=(480, 320)))[1:]
    numbers = list(range(12))
    assert stamp(frames_of(table, file, [5])[5]) == 5
    (process,) = alone.idle
    found = []

    def die(at, pixels):
        found.append(stamp(pixels))
        if len(found) == 2:
            os.kill(process.process.pid, signal.SIGKILL)
            process.process.wait()

    read_frames(encode_table(table), file, numbers, on_frame=die)
    assert found[-12:] == numbers
    assert 12 + 2 <= len(found) < 12 + 12
    assert found[:-12] == numbers[: len(found) - 12]
    died = SampleError("video_process.died", status=-9)
    named = pytest.raises(SampleError, match="cannot be decoded: .* died")
    with mock.patch.object(process, "ask", side_effect=died) as asked, named as error:
        read_frames(encode_table(table), file, numbers, on_frame=die)
    assert (error.value.reason, asked.call_count) == ("video_process", 2)
    assert alone.idle == [process]


@pytest.mark.parametrize(
    "given",
    [{"processes": 0}, {"processes": 1.5}, {"time_limit_s": float("inf")}, {"memory_bytes": True}],
)
def test_limits_that_mean_nothing_are_refused_by_name(given):
    with pytest.raises(ConfigError) as found:
        pool.ClipLimits(**given)
    assert (found.value.reason, found.value.facts) == ("clip_limits", given)


def test_limits_beyond_what_a_system_can_count_are_none(clip):
    limits = pool.ClipLimits(processes=1, time_limit_s=10**400, memory_bytes=10**30)
    found = []
    read_frames(
        encode_table(clip[0]),
        clip[1],
        [1],
        on_frame=lambda _, pixels: found.append(stamp(pixels)),
        limits=limits,
    )
    assert found == [1]
    for process in pool._pools.pop(limits).idle:
        process.close()


def test_no_more_decoders_are_open_than_the_bound(clip, alone):
    table, file = clip
    at_once, most = [], []

    def count(at, pixels):
        at_once.append(at)
        most.append(len(at_once))
        at_once.pop()

    def read():
        read_frames(encode_table(table), file, [1, 2], on_frame=count)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8
    assert len(alone.idle) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MATRIX, *(f"cut-{name}" for name in CUT)])
def test_clips_of_all_files_have_the_frames_of_the_video(name, folder):
    """Whole, and cut in two places: every frame equals the video's, bit for bit."""
    path = folder / name
    with VideoReader(path) as reader:
        try:
            whole = [hashlib.md5(p).hexdigest() for p in reader.read(range(len(reader.times_N)))]
        except MissingFrameError:
            reader.rescan()
            whole = [hashlib.md5(p).hexdigest() for p in reader.read(range(len(reader.times_N)))]
        times = reader.times_N
        fits = reader.access == "index" and not reader.info.damaged
    for share in ((0.0, 1.0), (0.3, 0.7), (0.55, 0.6)):
        bounds = [float(times[0] + s * (times[-1] - times[0])) for s in share]
        start_s, end_s = (None, None) if share[0] == 0 else bounds
        if len(times) == 1 or (start_s is not None and start_s < 0):
            start_s = end_s = None
        facts, table, file = stored(path, start_s=start_s, end_s=end_s)
        assert (facts["stored"] == "file") == (not fits)
        numbers = list(range(len(facts["times"])))
        got = read_clip(
            encode_table(table) + file, table_bytes=128 + table.nbytes, numbers=numbers, where=""
        )
        digests = [hashlib.md5(pixels).hexdigest() for pixels in got]
        assert digests == whole[facts["first"] : facts["first"] + len(numbers)]
