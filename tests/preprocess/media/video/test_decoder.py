"""Decoding in a process of its own: what happens there stays there."""

import os
import pickle
import signal
from fractions import Fraction
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from preprocess.media import VideoPolicy
from preprocess.media.image import ImagePolicy
from preprocess.media.video import VideoDecoder, VideoPreparer, encode_video
from shardspec.errors import ConfigError, SampleError
from shardspec.tiling import ImageView
from tests.shardspec.video.stamped import SIZE, stamp, stamped, write

pytest.importorskip("av")


@pytest.fixture(scope="module")
def file():
    return encode_video([stamped(i) for i in range(24)], fps=Fraction(12))


@pytest.fixture(scope="module")
def decoder():
    with VideoDecoder(VideoPolicy(max_frames=5)) as decoder:
        yield decoder


def stamps(decoder, file, **clip):
    found = decoder(file, lambda pixels, info: stamp(pixels), **clip)
    assert found.frames == found.numbers
    return found


def test_frames_come_with_their_times_and_numbers(decoder, file, tmp_path):
    found = stamps(decoder, file)
    assert found.numbers == [0, 6, 12, 18, 23]
    assert found.times_s == pytest.approx([0, 0.5, 1, 1.5, 23 / 12])
    assert (found.info["width"], found.info["height"]) == SIZE
    assert found.info["codec"] == "h264"
    path = tmp_path / "a.mp4"
    path.write_bytes(file)
    assert stamps(decoder, path) == found


@pytest.mark.parametrize(
    "clip, numbers",
    [
        ({"start_s": 1.0}, [12, 18, 23]),
        ({"end_s": 0.5}, [0, 5]),
        ({"start_s": 0.99, "end_s": 1.7}, [11, 17, 20]),
    ],
)
def test_times_of_a_clip_count_from_its_beginning(decoder, file, clip, numbers):
    found = stamps(decoder, file, **clip)
    assert found.numbers == numbers
    start = clip.get("start_s", 0)
    assert found.times_s == pytest.approx([max(0, n / 12 - start) for n in numbers])


@pytest.mark.parametrize("clip", [{"start_s": 2.0}, {"start_s": 0.5, "end_s": 0.4}])
def test_clip_without_a_frame_is_refused(decoder, file, clip):
    with pytest.raises(SampleError, match="clip has no frame"):
        stamps(decoder, file, **clip)


def test_adaptive_frames_are_on_both_sides_of_every_cut():
    scenes = [(30, 30, 30), (220, 40, 40), (40, 90, 200)]
    frames = []
    for i, color in enumerate(scenes):
        for k in range(10):
            pixels = np.full((64, 96, 3), color, np.uint8)
            pixels[8:24, 4 * k : 4 * k + 16] = 128 + 30 * i
            frames.append(pixels)
    with VideoDecoder(VideoPolicy(mode="adaptive", max_frames=8)) as decoder:
        found = decoder(encode_video(frames, fps=Fraction(10)), lambda pixels, info: pixels.mean())
    assert {9, 10, 19, 20} <= set(found.numbers)
    assert len(found.numbers) == 8


def test_errors_are_told_and_the_process_continues_serving(decoder, file):
    process = decoder.decoding.process
    with pytest.raises(SampleError) as found:
        stamps(decoder, b"no video", where="row 3")
    assert (found.value.reason, found.value.where) == ("video_open", "row 3")
    with pytest.raises(SampleError, match="does not exist"):
        stamps(decoder, Path("/absent/a.mp4"))
    assert stamps(decoder, file).numbers == [0, 6, 12, 18, 23]
    assert decoder.decoding.process is process


def test_process_that_dies_costs_one_video(decoder, file):
    def die(pixels, info):
        os.kill(decoder.decoding.process.pid, signal.SIGKILL)
        decoder.decoding.process.wait()
        return stamp(pixels)

    big = encode_video([np.zeros((720, 1280, 3), np.uint8)] * 5, fps=Fraction(1))
    with pytest.raises(SampleError, match="died") as found:
        decoder(big, die)
    assert found.value.reason == "video_process"
    assert stamps(decoder, file).numbers == [0, 6, 12, 18, 23]


def test_video_that_takes_too_long_ends_the_process_by_itself(file):
    with VideoDecoder(VideoPolicy(max_frames=5, time_limit_s=60.0)) as decoder:
        stamps(decoder, file)
        process = decoder.decoding.process
        os.kill(process.pid, signal.SIGSTOP)  # a decoder that hangs
        with (
            mock.patch("shardspec.child._GRACE_S", -59.9),  # leaves 0.1 s
            pytest.raises(SampleError, match="takes too long"),
        ):
            stamps(decoder, file)
        assert process.returncode == -signal.SIGKILL
        assert stamps(decoder, file).numbers == [0, 6, 12, 18, 23]


def test_process_ends_itself_when_the_kernel_says_that_it_is_time(file):
    """The alarm of the process itself, for a parent that is gone."""
    with VideoDecoder(VideoPolicy(max_frames=5, time_limit_s=60.0)) as decoder:
        stamps(decoder, file)
        # The request carries the limit.
        object.__setattr__(decoder.policy, "time_limit_s", 1e-6)
        with pytest.raises(SampleError, match="takes too long"):
            stamps(decoder, write("libx264", "mpegts", count=60))


def test_memory_beyond_the_bound_is_refused_by_name():
    frames = [np.zeros((1440, 2560, 3), np.uint8)]
    file = encode_video(frames, fps=Fraction(1))
    small = encode_video([stamped(0)], fps=Fraction(1))
    with VideoDecoder(VideoPolicy(memory_bytes=60_000_000)) as decoder:
        with pytest.raises(SampleError, match="more memory than it may"):
            decoder(file, lambda pixels, info: None)
        assert stamps(decoder, small).numbers == [0]


def test_failure_of_the_caller_leaves_no_answer_behind(decoder, file):
    with pytest.raises(ZeroDivisionError):
        decoder(file, lambda pixels, info: 1 // 0)
    assert stamps(decoder, file).numbers == [0, 6, 12, 18, 23]


def test_copies_start_their_own_process(decoder, file):
    stamps(decoder, file)
    with pickle.loads(pickle.dumps(decoder)) as copy:
        assert copy.decoding.process is None
        assert stamps(copy, file) == stamps(decoder, file)
        assert copy.decoding.process.pid != decoder.decoding.process.pid


def test_damaged_videos_are_kept_with_a_count_or_refused(tmp_path):
    whole = write("libx264", "matroska", options={"g": "8", "bf": "2"})
    cut = whole[: int(0.6 * len(whole))]
    for damaged, expect in (("keep", None), ("refuse", "video_damaged")):
        with VideoDecoder(VideoPolicy(damaged=damaged)) as decoder:
            if expect is None:
                assert decoder(cut, lambda pixels, info: 0).info["damaged"] >= 1
                assert decoder(whole, lambda pixels, info: 0).info["damaged"] == 0
            else:
                with pytest.raises(SampleError) as found:
                    decoder(cut, lambda pixels, info: 0)
                assert found.value.reason == expect


def test_a_fork_decodes_while_a_thread_of_its_parent_does(file):
    decoder = VideoDecoder(VideoPolicy(max_frames=2))
    with decoder, decoder.decoding._lock:  # as a thread holds it that decodes
        child = os.fork()
        if not child:
            signal.alarm(60)  # whose default action ends one that waits
            os._exit(0 if len(decoder(file, lambda pixels, info: 0).frames) == 2 else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_missing_library_is_named(file, tmp_path, monkeypatch):
    (tmp_path / "av.py").write_text("raise ImportError('there is none')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # of the process that decodes
    decoder = VideoDecoder(VideoPolicy())
    with decoder, pytest.raises(ConfigError, match="PyAV") as found:
        decoder(file, lambda pixels, info: 0)
    assert found.value.reason == "video_extra"


def test_frames_are_stored_at_the_size_of_the_model_with_square_pixels(file):
    image = ImagePolicy(views=(ImageView(size_px=56, fit="pad"),), codec="png")
    prepared = VideoPreparer(VideoPolicy(max_frames=2), image)(file)
    assert [i.pixels.shape for i in prepared.images] == [(37, 56, 3)] * 2
    assert {(i.source_width, i.source_height) for i in prepared.images} == {SIZE}
    assert prepared.record["frame_numbers"] == [0, 23]
    assert all(image.overview is None for image in prepared.images)


@pytest.mark.parametrize(
    "wrong",
    [{"pool": 0}, {"damaged": "x"}, {"time_limit_s": 0}, {"memory_bytes": 1}, {"mode": "x"}],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match="settings of|frame sampling") as found:
        VideoPolicy(**wrong)
    assert found.value.reason == "video_policy"


KINDS = {
    "mp4": ("libx264", "mp4", {"g": "8", "bf": "2"}),
    "webm": ("libvpx-vp9", "webm", {"g": "8", "cpu-used": "8"}),
    "ts": ("libx264", "mpegts", {"g": "8", "bf": "2"}),
    "avi": ("mpeg4", "avi", {"g": "8", "bf": "2"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_damage_anywhere_gives_frames_or_a_named_refusal(kind):
    codec, container, options = KINDS[kind]
    whole = write(codec, container, options=options)
    rng = np.random.RandomState(7)
    ends = []
    with VideoDecoder(VideoPolicy(max_frames=6, time_limit_s=20.0)) as decoder:
        for _ in range(60):
            file = bytearray(whole)
            for at in rng.randint(0, len(file), rng.choice([1, 5, 50])):
                file[at] ^= 1 << rng.randint(8)
            if rng.random_sample() < 0.3:
                del file[rng.randint(len(file)) :]
            try:
                found = decoder(bytes(file), lambda pixels, info: pixels.shape)
            except SampleError as error:
                ends.append(error.reason)
            else:
                ends.append("frames")
                assert found.times_s == sorted(found.times_s)
                assert 1 <= len(found.frames) == len(found.numbers) <= 6
    assert ends.count("frames") > 10
    assert all(end == "frames" or end.startswith("video_") for end in ends)
    assert "video_process" not in ends
