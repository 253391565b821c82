"""Every odd image is right or refused by name, in FETCH as in BUILD, within bounded memory."""

from __future__ import annotations

import pickle
import subprocess
import sys
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from preprocess.fetch.download import image_fault
from preprocess.media import ImageLimits, ImagePolicy, ImagePreprocessor
from preprocess.media import image as media_image
from shardspec.errors import SampleError
from shardspec.tiling import ImageView
from tests.preprocess.media.odd_images import exif, odd_images, saved, scene

ODD = odd_images()
WHOLE = ImagePreprocessor(ImagePolicy(max_side_px=1500))
"""Leaves the size of the images whose pixels are known alone."""
LOW = ImageLimits(max_decode_bytes=5 * 2**20)
MEMORY_MIB = 512


def test_the_matrix_is_large_enough():
    assert len(ODD) > 90
    assert sum(bool(odd.refused) for odd in ODD.values()) > 30


@pytest.mark.parametrize("name", [name for name, odd in ODD.items() if odd.refused])
def test_refused_images_are_named(name):
    odd = ODD[name]
    with pytest.raises(SampleError) as caught:
        WHOLE(odd.payload, where="row 7")
    assert (caught.value.reason, caught.value.where) == (odd.refused, "row 7")


@pytest.mark.parametrize("name", [name for name, odd in ODD.items() if odd.want is not None])
def test_images_that_are_taken_are_upright_srgb(name):
    odd = ODD[name]
    image = WHOLE(odd.payload, where="row 7")
    assert image.pixels.shape == odd.want.shape
    difference = np.abs(image.pixels.astype(int) - odd.want)
    assert difference.mean() <= odd.close, difference.max()
    assert (image.source_width, image.source_height) == odd.size


@pytest.mark.parametrize("name", ODD)
def test_fetch_and_build_follow_one_rule(name):
    odd = ODD[name]
    assert image_fault(odd.payload, limits=ImageLimits()) == odd.fetched


def mutilated(payload: bytes, rng: np.random.RandomState) -> bytes:
    """Changes a few bytes, most of them near the beginning, and sometimes cuts the end off."""
    changed = bytearray(payload)
    for _ in range(rng.randint(1, 6)):
        reach = rng.choice([40, 120, 600, len(changed)])
        changed[rng.randint(min(reach, len(changed)))] = rng.choice([0, 255, rng.randint(256)])
    if rng.randint(5) == 0:
        del changed[rng.randint(1, len(changed)) :]
    at = 8  # checksums of a PNG are made right again: they would hide what is behind them
    while changed.startswith(b"\x89PNG") and at + 12 <= len(changed):
        stop = at + 12 + int.from_bytes(changed[at : at + 4], "big")
        if stop > len(changed):
            break
        changed[stop - 4 : stop] = zlib.crc32(changed[at + 4 : stop - 4]).to_bytes(4, "big")
        at = stop
    return bytes(changed)


@pytest.mark.filterwarnings("ignore")
def test_mutilated_images_are_taken_or_refused_and_nothing_else():
    rng = np.random.RandomState(11)
    seeds = [odd.payload for odd in ODD.values() if 0 < len(odd.payload) < 20_000]
    ends = Counter()
    for i in range(1500):
        payload = mutilated(seeds[i % len(seeds)], rng)
        fetched = image_fault(payload, limits=ImageLimits())
        try:
            WHOLE(payload)
            ends["taken"] += 1
            assert not fetched
        except SampleError as error:
            ends[error.reason] += 1
    assert {"taken", "image_decode", "image_truncated", "image_bomb"} <= set(ends)


_CHILD = """
import pickle, re, sys
from preprocess.fetch.download import image_fault
from preprocess.media import ImageLimits, ImagePolicy, ImagePreprocessor
from shardspec.errors import SampleError
from shardspec.tiling import ImageView
files = pickle.load(sys.stdin.buffer)
prepare = ImagePreprocessor(ImagePolicy(views=(ImageView(crop_mode="overlap-and-resize-c2"),)))
ends = {}
for name, payload in files.items():
    image_fault(payload, limits=ImageLimits())
    try:
        image = prepare(payload)
        ends[name] = (image.source_width, image.source_height)
    except SampleError as error:
        ends[name] = error.reason
# Not ru_maxrss: that of a child counts what its parent had before the exec.
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
pickle.dump((ends, peak), sys.stdout.buffer)
"""


def test_the_matrix_passes_within_512_mib():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _CHILD],
        input=pickle.dumps({name: odd.payload for name, odd in ODD.items()}),
        capture_output=True,
        check=True,
    )
    ends, peak_kib = pickle.loads(done.stdout)
    assert ends == {name: odd.refused or odd.size for name, odd in ODD.items()}
    assert peak_kib < MEMORY_MIB * 1024


def test_reduced_jpeg_is_close_to_the_whole_resized():
    """Every orientation, and sides that the factor does not divide."""
    for orientation in (None, 3, 6, 7):
        options = {} if orientation is None else {"exif": exif(orientation)}
        payload = saved(scene(1001, 1203), "JPEG", quality=95, **options)
        whole, reduced = (
            ImagePreprocessor(ImagePolicy(views=(ImageView(size_px=112),), limits=limits))(payload)
            for limits in (ImageLimits(), LOW)
        )
        assert (reduced.source_width, reduced.source_height) == (
            whole.source_width,
            whole.source_height,
        )
        difference = np.abs(reduced.pixels.astype(int) - whole.pixels)
        assert 0 < difference.mean() < 1
        assert difference.max() < 8


@pytest.mark.parametrize(("size_px", "reduce"), [(56, 8), (112, 4), (238, 2), (252, 1), (504, 1)])
def test_reduced_decoding_leaves_half_to_the_resize_and_45_db(size_px, reduce, monkeypatch):
    payload = saved(scene(1001, 1003), "JPEG", quality=95)
    scales = []
    monkeypatch.setattr(
        media_image,
        "_decode_reduced",
        lambda *args, decode=media_image._decode_reduced: scales.append(args[2]) or decode(*args),
    )
    full, reduced = (
        ImagePreprocessor(ImagePolicy(views=(ImageView(size_px=size_px),), decode=decode))(payload)
        for decode in ("full", "reduced")
    )
    assert scales == [reduce] * (reduce > 1)
    squares = np.square(full.pixels.astype(float) - reduced.pixels)
    assert squares.mean() <= 255**2 / 10**4.5


def test_pictures_other_than_jpeg_are_decoded_whole():
    payload = saved(scene(1001, 1203), "PNG")
    images = [
        ImagePreprocessor(ImagePolicy(views=(ImageView(size_px=112),), decode=decode))(payload)
        for decode in ("full", "reduced")
    ]
    assert np.array_equal(images[0].pixels, images[1].pixels)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_modes_of_jpeg_are_reduced_too(mode):
    payload = saved(Image.fromarray(scene(1001, 1203)).convert(mode), "JPEG", quality=95)
    views = (ImageView(size_px=112),)
    low = ImagePreprocessor(ImagePolicy(views=views, limits=LOW))
    whole = ImagePreprocessor(ImagePolicy(views=views))(payload)
    assert np.abs(low(payload).pixels.astype(int) - whole.pixels).mean() < 1.5
    cut = payload[: len(payload) // 2]
    with pytest.raises(SampleError) as caught:
        low(cut)
    assert caught.value.reason == "image_truncated"


def test_image_that_cannot_be_reduced_enough_is_refused():
    payload = saved(scene(1001, 1203), "JPEG")
    policy = ImagePolicy(max_side_px=900, limits=LOW)
    with pytest.raises(SampleError) as caught:
        ImagePreprocessor(policy)(payload)
    assert caught.value.reason == "image_bomb"
    assert "DECODE_MEMORY" in caught.value.fix


def test_reduced_pixels_are_the_same_without_simplejpeg(monkeypatch):
    payload = saved(scene(1001, 1203), "JPEG", quality=95)
    low = ImagePreprocessor(ImagePolicy(views=(ImageView(size_px=112),), limits=LOW))
    want = low(payload).pixels
    monkeypatch.setattr("preprocess.media.image.jpeg_decoder", lambda: "pillow")
    assert np.array_equal(low(payload).pixels, want)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # formats that Pillow will drop
def test_every_format_that_pillow_opens_is_judged_alike_in_both_stages():
    """FETCH never keeps what BUILD would refuse by its kind."""
    Image.init()
    image = Image.fromarray(scene(64, 64))
    tried = 0
    for fmt in sorted(Image.SAVE):
        for mode in ("RGB", "L", "1", "P", "RGBA"):
            try:
                payload = saved(image.convert(mode), fmt)
            except (OSError, ValueError, KeyError, RuntimeError):
                continue
            tried += 1
            fetched = image_fault(payload, limits=ImageLimits())
            try:
                WHOLE(payload)
                built = ""
            except SampleError as error:
                built = "not_image" if error.reason == "image_decode" else error.reason
            assert fetched == built, (fmt, mode)
    assert tried > 60
