"""The budget of memory: never exceeded, and large images wait for each other."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocess.media import ImagePolicy, ImagePreprocessor, MemoryBudget
from preprocess.media.header import decode_bytes, open_source
from preprocess.settings import usable_memory
from shardspec.errors import ConfigError, StorageError
from tests.preprocess.media.odd_images import exif, saved, scene

MIB = 2**20


def budget(tmp_path, *, total=700 * MIB, largest=384 * MIB, workers=4):
    return MemoryBudget(
        folder=str(tmp_path / "locks"),
        total_bytes=total,
        largest_bytes=largest,
        num_workers=workers,
    )


@given(
    total=st.integers(MIB, 1 << 40), largest=st.integers(MIB, 1 << 32), workers=st.integers(1, 512)
)
def test_all_workers_together_stay_within_the_budget(total, largest, workers):
    if total < largest:
        with pytest.raises(ConfigError) as caught:
            MemoryBudget(folder="", total_bytes=total, largest_bytes=largest, num_workers=workers)
        assert caught.value.reason == "memory_budget"
        return
    found = MemoryBudget(folder="", total_bytes=total, largest_bytes=largest, num_workers=workers)
    lanes, share = found.num_lanes, found.share_bytes
    assert 1 <= lanes <= workers
    assert 0 <= share <= largest
    assert lanes * largest + (workers - lanes) * share <= total


def test_memory_of_this_machine_is_known():
    assert 2**28 < usable_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def locked(folder):
    """Names the locks that somebody holds."""
    held = []
    for name in sorted(os.listdir(folder)):
        with open(folder / name) as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held.append(name)
    return held


def test_small_images_never_wait(tmp_path):
    found = budget(tmp_path)
    with found.hold(found.share_bytes):
        assert not (tmp_path / "locks").exists()


def test_large_images_take_turns(tmp_path):
    found = budget(tmp_path)
    assert found.num_lanes == 1
    order = []
    waiting = threading.Event()

    def second():
        waiting.set()
        with found.hold(300 * MIB):
            order.append("second")

    thread = threading.Thread(target=second)
    with found.hold(300 * MIB):
        assert locked(tmp_path / "locks") == ["image-000.lock"]
        thread.start()
        waiting.wait()
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert locked(tmp_path / "locks") == []


def test_free_lane_is_taken_before_one_is_waited_for(tmp_path):
    found = budget(tmp_path, total=1000 * MIB)
    assert found.num_lanes == 2
    with found.hold(300 * MIB), found.hold(300 * MIB):
        assert len(locked(tmp_path / "locks")) == 2


def test_lock_of_a_dead_process_is_free(tmp_path):
    found = budget(tmp_path)
    child = os.fork()
    if not child:
        found.hold(300 * MIB).__enter__()
        os._exit(0)
    os.waitpid(child, 0)
    with found.hold(300 * MIB):
        assert locked(tmp_path / "locks") == ["image-000.lock"]


@pytest.mark.parametrize(
    ("kind", "options", "at_least"),
    [("PNG", {}, 4), ("JPEG", {}, 4), ("JPEG", {"progressive": True}, 10)],
)
def test_preprocessor_holds_what_a_large_image_takes(
    tmp_path, monkeypatch, kind, options, at_least
):
    held = []
    hold = MemoryBudget.hold
    monkeypatch.setattr(MemoryBudget, "hold", lambda self, num: held.append(num) or hold(self, num))
    policy = ImagePolicy()
    payload = saved(scene(400, 500), kind, **options)
    ImagePreprocessor(policy, memory=budget(tmp_path))(payload)
    image = open_source(payload, limits=policy.limits)
    assert held == [decode_bytes(image, payload, resized=(336, 336))]
    assert held[0] > 400 * 500 * at_least


def test_memory_that_the_machine_refuses_names_the_row(monkeypatch):
    def refuse(self, *args):
        raise MemoryError

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", refuse)
    with pytest.raises(StorageError) as caught:
        ImagePreprocessor(ImagePolicy())(saved(scene(), "PNG"), where="row 7")
    assert (caught.value.reason, caught.value.where) == ("image_memory", "row 7")


_CHILD = """
import re, sys
from preprocess.media import ImagePolicy, ImagePreprocessor
from preprocess.media.header import decode_bytes, open_source
from tests.preprocess.media.odd_images import saved, scene
policy = ImagePolicy()
prepare = ImagePreprocessor(policy)
kinds = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
for kind in kinds:
    prepare(saved(scene(), kind))  # loads codecs
payload = sys.stdin.buffer.read()
image = open_source(payload, limits=policy.limits)
want = decode_bytes(image, payload, resized=(336, 336))
def read_kib(name):
    # Not ru_maxrss: that of a child counts what its parent had before the exec.
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again
before = read_kib("VmRSS")
prepare(payload)
print(want >> 10, read_kib("VmHWM") - before)
"""


def _large(kind):
    """An image of 4 megapixels, with what makes it costly."""
    pixels = scene(2000, 2000)
    rgba = pixels[..., [0, 1, 2, 0]]
    if kind == "progressive":
        return saved(pixels, "JPEG", progressive=True, subsampling=0)
    if kind == "turned":
        return saved(pixels, "JPEG", exif=exif(6))
    if kind.endswith("alpha"):
        options = {"lossless": True, "method": 0} if kind.startswith("WEBP") else {}
        return saved(rgba, kind.partition(" ")[0], **options)
    options = {"speed": 10} if kind == "AVIF" else {"method": 0} if kind == "WEBP" else {}
    return saved(pixels, kind, **options)


_KINDS = ("PNG", "PNG alpha", "JPEG", "progressive", "turned", "BMP", "TIFF", "GIF")
_SLOW_KINDS = ("WEBP", "WEBP alpha", "AVIF", "JPEG2000", "JPEG2000 alpha", "PPM", "TIFF alpha")


def check_estimate(kind):
    done = subprocess.run(
        [sys.executable, "-c", _CHILD], input=_large(kind), capture_output=True, check=True
    )
    want_kib, got_kib = map(int, done.stdout.split())
    # Ten MiB for the bands and the allocator.
    assert got_kib <= want_kib + 10 * 1024, (got_kib, want_kib)


@pytest.mark.parametrize("kind", ["PNG alpha", "progressive"])
def test_estimate_bounds_the_memory_of_decoding(kind):
    check_estimate(kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*_KINDS, *_SLOW_KINDS])
def test_estimate_bounds_the_memory_of_decoding_every_format(kind):
    check_estimate(kind)
