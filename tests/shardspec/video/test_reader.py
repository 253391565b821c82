"""The reader gives the frame that is shown at a time, whatever the file is."""

import hashlib
import os
import random
import struct
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest

from preprocess.media.video import encode_video
from shardspec.errors import SampleError
from shardspec.video.reader import MissingFrameError, VideoReader, shown_size
from tests.shardspec.video.matrix import CUT, MATRIX, REFUSED
from tests.shardspec.video.stamped import SIZE, stamp, stamped, write

pytest.importorskip("av")

X264 = {"preset": "veryfast", "bf": "2", "g": "8"}
FILES = {
    "h264 with B frames in mp4": ("libx264", "mp4", {"options": X264}),
    "h264 with open GOPs in mkv": (
        "libx264",
        "matroska",
        {"options": {**X264, "x264-params": "open-gop=1"}},
    ),
    "h264 in ts": ("libx264", "mpegts", {"options": X264}),
    "mpeg4 in avi": ("mpeg4", "avi", {"options": {"bf": "2", "g": "8", "qscale": "3"}}),
    "mjpeg in mov": ("mjpeg", "mov", {"pix_fmt": "yuvj420p"}),
    "gif": ("gif", "gif", {"pix_fmt": "rgb8"}),
    "variable rate": (
        "libx264",
        "mp4",
        {"options": X264, "ticks": [i + 3 * (i // 5) for i in range(24)]},
    ),
}


def read(reader, numbers):
    """Reads frames; where the index is not to be trusted, after a scan."""
    try:
        return list(reader.read(numbers))
    except MissingFrameError:
        reader.rescan()
        return list(reader.read(numbers))


@pytest.mark.parametrize("name", FILES)
def test_frames_are_those_that_were_written(name):
    codec, container, how = FILES[name]
    file = write(codec, container, **how)
    ticks = how.get("ticks") or range(24)
    with VideoReader(file) as reader:
        times = reader.times_N
        shift = times[0]  # AVI counts from the first packet
        clock_s = 0.01 if name == "gif" else 0.001
        assert times - shift == pytest.approx(np.array(ticks) / 12, abs=clock_s)
        assert reader.info.variable_rate == ("variable" in name)
        for numbers in ([0, 1, 7, 8, 9, 22, 23], [23], [5], [16, 17]):
            assert [stamp(frame) for frame in read(reader, numbers)] == numbers
        assert reader.info.num_frames == 24
        assert reader.info.damaged == 0


def test_reader_takes_a_path_as_well_as_bytes(tmp_path):
    file = write("libx264", "mp4", options=X264)
    (tmp_path / "a.mp4").write_bytes(file)
    with VideoReader(file) as one, VideoReader(tmp_path / "a.mp4") as other:
        assert one.info == other.info
        assert np.array_equal(next(one.read([9])), next(other.read([9])))
        assert one.key_frames == [0, 8, 16]


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_reading_decodes_from_the_nearest_key_frame_only(container, monkeypatch):
    decoded = []
    plain = VideoReader._decoded

    def counted(self, **how):
        for frame in plain(self, **how):
            decoded.append(frame.pts)
            yield frame

    file = write("libx264", container, options=X264)
    with VideoReader(file) as reader:
        monkeypatch.setattr(VideoReader, "_decoded", counted)
        for number, most in ((16, 2), (23, 8), (8, 2), (9, 3), (0, 2)):
            decoded.clear()
            assert stamp(next(reader.read([number]))) == number
            assert len(decoded) <= most, number


@pytest.mark.parametrize(
    "matrix, want",
    [
        ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),  # a quarter turn clockwise
        ((0, -1, 1, 0), np.rot90),
        ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
        ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
        ((1, 0, 0, -1), lambda p: p[::-1]),
    ],
)
def test_display_matrix_is_applied(matrix, want):
    file = encode_video([stamped(0)], fps=Fraction(12))
    plain = turned(file, (1, 0, 0, 1))
    assert plain == file
    with VideoReader(file) as reader, VideoReader(turned(file, matrix)) as other:
        (before,), (after,) = reader.read([0]), other.read([0])
        info = other.info
    assert np.array_equal(after, want(before))
    assert (info.width, info.height) == after.shape[1::-1]


ENCODE = """
from preprocess.datasets import get_dataset
import hashlib
(video,) = get_dataset("moving_shapes", source="sample", limit=8).get(6)["video"]
print(hashlib.md5(video.read()).hexdigest())
"""


@pytest.mark.slow
def test_a_generated_video_does_not_depend_on_what_memory_held_before():
    """glibc fills new memory with MALLOC_PERTURB_."""
    found = {
        subprocess.run(
            [sys.executable, "-c", ENCODE],
            env={**os.environ, "MALLOC_PERTURB_": fill},
            check=True,
            capture_output=True,
        ).stdout
        for fill in ("0", "85", "170")
    }
    assert len(found) == 1


def test_other_angles_are_refused():
    file = encode_video([stamped(0)], fps=Fraction(12))
    with pytest.raises(SampleError, match="not a multiple of 90") as found:
        VideoReader(turned(file, (0.5, 0.5, -0.5, 0.5)))
    assert found.value.reason == "video_rotation"


def turned(file, matrix):
    """Writes a display matrix into the track header of an MP4 file."""
    at = file.index(b"tkhd") + 4 + 40
    a, b, c, d = (int(value * 65536) for value in matrix)
    width, height = SIZE
    x = height if c < 0 else width if a < 0 else 0
    y = width if b < 0 else height if d < 0 else 0
    rows = struct.pack(">9i", a, b, 0, c, d, 0, x << 16, y << 16, 1 << 30)
    assert len(file[at : at + 36]) == 36
    if matrix == (1, 0, 0, 1):
        assert file[at : at + 36] == rows
    return file[:at] + rows + file[at + 36 :]


@pytest.mark.parametrize(
    "file, reason",
    [
        (b"", "video_open"),
        (b"hello " * 100, "video_open"),
        (stamped(0).tobytes(), "video_open"),
    ],
)
def test_what_is_not_a_video_is_refused_by_name(file, reason):
    with pytest.raises(SampleError) as found:
        VideoReader(file, where="row 3")
    assert found.value.reason == reason
    assert found.value.where == "row 3"


def test_too_large_pictures_are_refused():
    with pytest.raises(SampleError, match="too large") as found:
        VideoReader(write("libx264", "mp4", count=1), max_pixels=1000)
    assert found.value.reason == "video_size"


def test_pictures_of_several_sizes_are_refused():
    two = [write("libx264", "mpegts", count=6, size=size) for size in (SIZE, (64, 96))]
    with VideoReader(b"".join(two)) as reader:
        assert stamp(next(reader.read([3]))) == 3
        with pytest.raises(SampleError, match="changes its size"):
            list(reader.read(list(range(len(reader.times_N)))))


def test_frames_without_a_time_are_refused():
    with pytest.raises(SampleError, match="when its frames are shown") as found:
        VideoReader(write("libx264", "h264", options=X264))
    assert found.value.reason == "video_time"


def test_sound_alone_is_refused():
    import io

    import av

    file = io.BytesIO()
    with av.open(file, "w", format="wav") as out:
        stream = out.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    with pytest.raises(SampleError, match="has no video") as found:
        VideoReader(file.getvalue())
    assert found.value.facts["streams"] == ["audio"]


@pytest.mark.parametrize("share", [0.45, 0.7, 0.9])
@pytest.mark.parametrize("container", ["matroska", "mpegts"])
def test_file_that_is_cut_off_has_the_frames_before_the_cut(container, share):
    file = write("libx264", container, options=X264)
    with VideoReader(file[: int(share * len(file))]) as reader:
        numbers = list(range(len(reader.times_N)))
        try:
            frames = list(reader.read(numbers))
        except MissingFrameError:
            reader.rescan()
            frames = list(reader.read(list(range(len(reader.times_N)))))
        # Some frames before the last one may be missing: they come later in the file.
        stamps = [stamp(frame) for frame in frames]
        assert stamps == np.round(reader.times_N * 12).astype(int).tolist()
        assert 0 < len(frames) < 24
        assert stamps[-1] - len(stamps) < 3


@pytest.mark.parametrize("size", [(96, 64), (64, 96)])
def test_pictures_with_other_pixels_are_shown_larger_never_smaller(size):
    assert shown_size(size, Fraction(1)) == size
    assert shown_size(size, Fraction(4, 3))[0] == round(size[0] * 4 / 3)
    assert shown_size(size, Fraction(3, 4))[1] == round(size[1] * 4 / 3)
    assert shown_size(size, Fraction(2), turned=True) == (size[1], size[0] * 2)


# The matrix: files made by the program ffmpeg, and its own frames of them.


def frames_of_ffmpeg(ffmpeg, path):
    """Lists (time, MD5 of the RGB pixels) of every frame as the program ffmpeg shows it."""
    command = [ffmpeg, "-v", "quiet", "-i", str(path), "-map", "0:v:0", "-fps_mode", "passthrough"]
    command += ["-enc_time_base", "demux", "-pix_fmt", "rgb24", "-c:v", "rawvideo"]
    command += ["-f", "framemd5", "-"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    found, base = [], Fraction(1)
    for line in done.stdout.splitlines():
        if line.startswith("#tb 0:"):
            base = Fraction(line.split()[-1])
        elif line.strip() and not line.startswith("#"):
            fields = [field.strip() for field in line.split(",")]
            found.append((float(int(fields[2]) * base), fields[5]))
    return found


def assert_equal_frames(path, want, *, at_least):
    """Compares 12 frames, read in one pass and one by one, with those of ffmpeg at their times."""
    by_time = {round(time, 3): digest for time, digest in want}
    with VideoReader(path, where=path.name) as reader:
        for attempt in range(2):
            times = reader.times_N
            assert at_least <= len(times) <= len(want)
            numbers = sorted(random.Random(0).sample(range(len(times)), min(12, len(times))))
            try:
                frames = list(reader.read(numbers))
                single = [next(reader.read([number])) for number in numbers[::-1]][::-1]
            except MissingFrameError:
                assert not attempt
                reader.rescan()
            else:
                break
        for number, frame, alone in zip(numbers, frames, single, strict=True):
            digest = by_time[round(float(times[number]), 3)]
            assert hashlib.md5(frame.tobytes()).hexdigest() == digest, number
            assert np.array_equal(frame, alone), number
        return reader.info


@pytest.mark.slow
@pytest.mark.parametrize("name", MATRIX)
def test_frames_equal_those_of_ffmpeg(name, ffmpeg, folder):
    want = frames_of_ffmpeg(ffmpeg, folder / name)
    info = assert_equal_frames(folder / name, want, at_least=len(want))
    assert info.damaged == 0
    assert info.start_s == pytest.approx(want[0][0], abs=1e-3)
    assert info.interlaced == name.startswith("interlaced")
    assert info.variable_rate == (name == "variable.mp4")


@pytest.mark.slow
@pytest.mark.parametrize("name", CUT)
def test_frames_before_a_cut_equal_those_of_ffmpeg(name, ffmpeg, folder):
    path = folder / f"cut-{name}"
    want = frames_of_ffmpeg(ffmpeg, path)
    assert_equal_frames(path, want, at_least=len(want) - 3)


@pytest.mark.slow
def test_encrypted_files_are_refused_whatever_their_bytes_look_like(ffmpeg, tmp_path):
    """Each run of ffmpeg draws another initialization vector."""
    before, after = REFUSED["encrypted.mp4"][0]
    for i in range(20):
        command = [ffmpeg, "-v", "error", "-y", *before, *after, "-frames:v", "3", f"{i}.mp4"]
        subprocess.run(command, cwd=tmp_path, check=True, stdin=subprocess.DEVNULL)
        with pytest.raises(SampleError, match="encrypted"):
            VideoReader(tmp_path / f"{i}.mp4")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*REFUSED, "no-index.mp4"])
def test_files_that_cannot_be_shown_rightly_are_refused_by_name(name, folder):
    reason = REFUSED[name][1] if name in REFUSED else "video_open"
    with pytest.raises(SampleError) as found:
        VideoReader(folder / name, where=name)
    assert found.value.reason == reason
