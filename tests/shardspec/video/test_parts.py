"""Parts of a clip: few are needed for few frames, and the frames are those of the whole file."""

import hashlib
from unittest import mock

import numpy as np
import pytest

from shardspec.checksum import crc32
from shardspec.errors import ShardError
from shardspec.video import (
    encode_table,
    parts,
    pool,
    read_frames,
    select_frames,
    with_parts,
)
from shardspec.video.clip import store_clip
from shardspec.video.extract import Request
from tests.shardspec.video.matrix import CUT, MATRIX
from tests.shardspec.video.stamped import stamp, stamped, write

pytest.importorskip("av")

PART = 2**16
"""FFmpeg reads over gaps of less than 64 KiB instead of seeking, and would want all parts."""


def noisy_clip(count, gop, *, bf=2, form=stamped):
    """Makes a file of stamped frames whose packets are long: below the stamp there is noise."""

    def noisy(number, size):
        pixels = form(number, size)
        noise = np.random.RandomState(number).randint(0, 256, pixels.shape, np.uint8)
        pixels[24:] = noise[24:]
        return pixels

    options = {"preset": "ultrafast", "qp": "8", "bf": str(bf), "g": str(gop)}
    with mock.patch("tests.shardspec.video.stamped.stamped", noisy):
        return write("libx264", "mp4", count=count, options=options)


class Elsewhere:
    """A file of which parts are read; remembers how many bytes, request by request."""

    read_s = 0.0

    def __init__(self, file):
        self.file, self.asked = file, []

    def read(self, wanted):
        self.asked.append(sum(stop - start for start, stop, _ in wanted))
        found = [memoryview(self.file)[start:stop] for start, stop, _ in wanted]
        if [crc32(each) for each in found] != [part.crc32 for part in wanted]:
            raise ShardError("sample_crc.part")
        return found


def stored(source, part_bytes=PART):
    request = Request(mode="uniform", max_frames=5, max_bytes=1 << 30)
    _, table, file = store_clip(source, request, where="")
    file = file.tobytes()
    with mock.patch.object(parts, "PART_BYTES", part_bytes):
        return with_parts(table, file), file


@pytest.fixture(scope="module")
def clip():
    return stored(noisy_clip(200, 12))


def frames_of(table, file, numbers, form=stamp):
    found = {}

    def keep(at, pixels):
        found[at] = form(pixels)

    read_frames(encode_table(table), file, numbers, on_frame=keep)
    return [found[at] for at in range(len(numbers))]


@pytest.mark.parametrize("numbers", [[0], [13, 150], [199], [90, 91, 101]])
def test_few_frames_need_few_parts(clip, numbers):
    table, file = clip
    there = Elsewhere(file)
    assert frames_of(table, there, numbers) == numbers
    assert len(there.asked) == 1
    assert there.asked[0] < 0.5 * len(file)


def test_many_frames_need_the_whole_file(clip):
    table, file = clip
    there = Elsewhere(file)
    assert frames_of(table, there, range(0, 200, 20)) == list(range(0, 200, 20))
    assert there.asked == [len(file)]


@pytest.mark.parametrize("kept", [slice(0, 1), slice(0, -1)])
def test_decoder_that_wants_more_gets_the_whole_file(clip, kept):
    """Nothing is made up for what is not there: opening fails, or decoding does."""
    table, file = clip
    there = Elsewhere(file)
    too_few = parts.file_parts(table)[kept]
    with mock.patch.object(pool, "needed_parts", return_value=too_few):
        assert frames_of(table, there, [3, 150]) == [3, 150]
    assert len(there.asked) == 2
    assert there.asked[1] == len(file)


def test_table_without_parts_is_that_of_the_whole_file(clip):
    table, file = clip
    old = table[: -len(parts.file_parts(table))]
    assert parts.file_parts(old) == []
    assert frames_of(old, file, [150]) == frames_of(table, file, [150]) == [150]


def test_a_clip_may_have_some_of_its_frames_alone(clip):
    table, file = clip
    few = select_frames(table, [7, 90, 199])
    assert frames_of(few, Elsewhere(file), [1, 2]) == [90, 199]
    assert frames_of(few, file, range(3)) == [7, 90, 199]
    scanned = write("mpeg4", "avi", count=8)
    few = select_frames(stored(scanned)[0], [2, 5])
    assert frames_of(few, Elsewhere(scanned), range(2)) == [2, 5]


def test_parted_file_reads_as_files_do():
    payload = bytes(range(100))
    have = [[0, 10], [10, 30], [60, 100]]
    file = parts.PartedFile(b"".join(payload[a:b] for a, b in have), have, 100)
    assert (file.read(20), file.tell(), file.read(20)) == (payload[:20], 20, payload[20:30])
    with pytest.raises(parts.MissingPartError):
        file.read(1)
    assert file.is_incomplete
    assert (file.seek(-5, 2), file.read(), file.read(9)) == (95, payload[95:], b"")
    assert (file.seek(60), file.seek(5, 1), file.read(3)) == (60, 65, payload[65:68])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MATRIX, *(f"cut-{name}" for name in CUT)])
def test_single_frames_of_all_files_are_those_of_the_whole_file(name, folder):
    table, file = stored(folder / name, part_bytes=2048)

    def digest(pixels):
        return hashlib.md5(pixels).hexdigest()

    count = int(np.count_nonzero(table[2:, 3] & 2 & ~(table[2:, 3] & 4)))
    whole = frames_of(table, file, range(count), digest)
    for number in sorted({0, 1, count // 3, count // 2, count - 1} & set(range(count))):
        there = Elsewhere(file)
        assert frames_of(table, there, [number], digest) == [whole[number]]
