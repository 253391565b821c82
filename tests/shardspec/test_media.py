"""Stored images: round trips, two decoders with one answer, and refusal of everything broken."""

from __future__ import annotations

import contextlib
import hashlib
import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from shardspec.errors import SampleError, ShardError
from shardspec.image_file import check_png, jpeg_frame, require_payload, size_before_opening
from shardspec.media import (
    CODEC_MAX_SIDE_PX,
    MAX_STORED_PIXELS,
    PILLOW_DECODE_ERRORS,
    decode_stored,
    encode_stored,
    jpeg_decoder,
    open_image,
)
from shardspec.sample import codec_of, encode_array
from tests.examples import examples

CODECS = ("jpeg", "png", "webp", "raw")
DECODERS = ("simplejpeg", "pillow")

small_pixels = hnp.arrays(
    np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))
) | hnp.arrays(np.uint8, st.sampled_from([(1, 40, 3), (40, 1, 3), (1, 1, 3)]))


def scene(height=61, width=83):
    """uint8 [H, W, 3]: slopes of colour with some noise, as photographs have."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, (3 * x + 2 * y) % 256], axis=-1)
    noise = np.random.RandomState(7).randint(0, 12, pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def saved(image, fmt, **options):
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def jpeg(pixels, **options):
    return saved(Image.fromarray(pixels), "JPEG", quality=90, **options)


@settings(max_examples=examples(60), deadline=None)
@given(pixels=small_pixels, codec=st.sampled_from(["png", "webp", "raw", "lossless"]))
def test_lossless_codecs_round_trip_exactly(pixels, codec):
    np.testing.assert_array_equal(
        decode_stored(encode_stored(pixels, codec=codec), codec=codec), pixels
    )


@settings(max_examples=examples(40), deadline=None)
@given(pixels=small_pixels, quality=st.integers(1, 100))
def test_both_jpeg_decoders_read_what_was_stored_alike(pixels, quality):
    payload = encode_stored(pixels, codec="jpeg", quality=quality)
    fast, sure = (decode_stored(payload, codec="jpeg", decoder=name) for name in DECODERS)
    assert fast.shape == pixels.shape
    np.testing.assert_array_equal(fast, sure)


@pytest.mark.parametrize(
    "options",
    [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True}],
    ids=["444", "422", "420", "progressive"],
)
@pytest.mark.parametrize("size", [(61, 83), (1, 17), (17, 1), (64, 64)])
def test_both_jpeg_decoders_give_pillows_pixels_for_every_chroma_layout(options, size):
    payload = jpeg(scene(*size), **options)
    want = np.asarray(Image.open(io.BytesIO(payload)))
    for name in DECODERS:
        np.testing.assert_array_equal(decode_stored(payload, codec="jpeg", decoder=name), want)


def test_both_jpeg_decoders_spread_grey_over_three_channels():
    grey = Image.fromarray(scene()).convert("L")
    payload = saved(grey, "JPEG", quality=90)
    want = np.asarray(Image.open(io.BytesIO(payload)).convert("RGB"))
    for name in DECODERS:
        np.testing.assert_array_equal(decode_stored(payload, codec="jpeg", decoder=name), want)


@pytest.mark.parametrize("codec", CODECS)
def test_new_arrays_are_contiguous_uint8(codec):
    pixels = decode_stored(encode_stored(scene(), codec=codec), codec=codec)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (61, 83, 3)
    assert pixels.flags.c_contiguous


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("codec", CODECS)
def test_decoding_into_an_array_fills_it_and_returns_it(codec, decoder):
    payload = memoryview(encode_stored(scene(), codec=codec))
    want = decode_stored(payload, codec=codec)
    batch = np.zeros((2, 61, 83, 3), dtype=np.uint8)
    out = batch[1]
    assert decode_stored(payload, codec=codec, out=out, decoder=decoder) is out
    np.testing.assert_array_equal(batch[1], want)
    assert not batch[0].any()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("codec", CODECS)
def test_decoding_into_a_window_of_a_canvas_leaves_its_borders_alone(codec, decoder):
    payload = encode_stored(scene(), codec=codec)
    canvas = np.full((100, 100, 3), 9, dtype=np.uint8)
    decode_stored(payload, codec=codec, out=canvas[5:66, 7:90], decoder=decoder)
    np.testing.assert_array_equal(canvas[5:66, 7:90], decode_stored(payload, codec=codec))
    canvas[5:66, 7:90] = 9
    assert (canvas == 9).all()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(61, 82, 3), (62, 83, 3), (83, 61, 3), (200, 200, 3)])
def test_out_of_another_size_is_refused(codec, decoder, shape):
    payload = encode_stored(scene(), codec=codec)
    with pytest.raises(ShardError) as caught:
        decode_stored(payload, codec=codec, out=np.zeros(shape, np.uint8), decoder=decoder)
    assert caught.value.reason == "image_decode"
    assert "(61, 83, 3)" in str(caught.value)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("codec", CODECS)
def test_out_that_is_not_writable_uint8_is_a_type_error(codec, decoder):
    payload = encode_stored(scene(), codec=codec)
    frozen = np.zeros((61, 83, 3), np.uint8)
    frozen.flags.writeable = False
    for out in (frozen, np.zeros((61, 83, 3), np.float32)):
        with pytest.raises(TypeError):
            decode_stored(payload, codec=codec, out=out, decoder=decoder)


def test_raw_is_viewed_without_a_copy():
    payload = bytearray(encode_stored(scene(), codec="raw"))
    pixels = decode_stored(memoryview(payload), codec="raw")
    payload[128] ^= 0xFF
    assert pixels[0, 0, 0] == scene()[0, 0, 0] ^ 0xFF
    assert not decode_stored(bytes(payload), codec="raw").flags.writeable


def test_raw_written_by_numpy_itself_is_read():
    buffer = io.BytesIO()
    np.save(buffer, scene())
    np.testing.assert_array_equal(decode_stored(buffer.getvalue(), codec="raw"), scene())


@pytest.mark.parametrize(
    "payload",
    [
        encode_array(scene()[..., :1]),
        encode_array(scene()[0]),
        encode_array(scene().astype(np.int32)),
        encode_array(scene()[:0]),
        encode_stored(scene(), codec="raw") + b"\0",
        encode_stored(scene(), codec="raw").replace(b"False", b"True "),
    ],
    ids=["one channel", "two axes", "int32", "no rows", "too long", "fortran order"],
)
def test_raw_of_another_kind_is_refused(payload):
    with pytest.raises(ShardError, match="cannot be decoded"):
        decode_stored(payload, codec="raw")


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("codec", CODECS)
def test_every_shortened_file_is_refused(codec, decoder):
    payload = encode_stored(scene(23, 31), codec=codec)
    # The last two bytes of a JPEG are its end marker: without them Pillow has every pixel.
    longest = len(payload) - (3 if codec == "jpeg" else 1)
    for length in [*range(0, longest, 37), longest]:
        with pytest.raises(ShardError) as caught:
            decode_stored(payload[:length], codec=codec, where="s.tar:k", decoder=decoder)
        assert caught.value.reason == "image_decode"
        assert caught.value.where == "s.tar:k"


def damaged_scan(payload):
    """Flips one bit of the scan such that Pillow reads on and gives wrong pixels."""
    good = np.asarray(Image.open(io.BytesIO(payload)), dtype=np.int16)
    start = payload.index(b"\xff\xda") + 14
    for at in range(start + 40, len(payload) - 2):
        flipped = payload[:at] + bytes([payload[at] ^ 0x10]) + payload[at + 1 :]
        try:
            bad = np.asarray(Image.open(io.BytesIO(flipped)), dtype=np.int16)
            decode_stored(flipped, codec="jpeg", decoder="simplejpeg")
        except OSError:
            continue
        except ShardError:
            if np.abs(bad - good).mean() > 10:
                return flipped
    raise AssertionError("no such bit in this picture")


def test_flipped_bit_of_a_scan_is_noticed_where_pillow_reads_on():
    flipped = damaged_scan(jpeg(scene(120, 160)))
    assert decode_stored(flipped, codec="jpeg", decoder="pillow").shape == (120, 160, 3)
    with pytest.raises(ShardError, match="Corrupt JPEG data|Premature end"):
        decode_stored(flipped, codec="jpeg", decoder="simplejpeg")


def test_every_flipped_bit_of_a_png_is_noticed():
    payload = encode_stored(scene(12, 12), codec="png")
    for at in range(8, len(payload)):
        flipped = payload[:at] + bytes([payload[at] ^ 0x04]) + payload[at + 1 :]
        with pytest.raises(ShardError):
            decode_stored(flipped, codec="png")


@settings(max_examples=examples(150), deadline=None)
@given(
    codec=st.sampled_from(CODECS),
    decoder=st.sampled_from(DECODERS),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_mutated_files_decode_or_raise_shard_error(codec, decoder, edits):
    payload = bytearray(encode_stored(scene(17, 19), codec=codec))
    for where, value in edits:
        payload[int(where * (len(payload) - 1))] = value
    try:
        pixels = decode_stored(bytes(payload), codec=codec, decoder=decoder)
    except ShardError:
        return
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("codec", CODECS)
def test_bytes_of_another_format_are_refused(codec, decoder):
    files = {name: encode_stored(scene(), codec=name) for name in CODECS if name != codec}
    for payload in (*files.values(), b"", b"<html>", bytes(500)):
        with pytest.raises(ShardError):
            decode_stored(payload, codec=codec, decoder=decoder)


@pytest.mark.parametrize("decoder", DECODERS)
def test_jpeg_in_cmyk_is_not_a_stored_image(decoder):
    payload = saved(Image.fromarray(scene()).convert("CMYK"), "JPEG")
    with pytest.raises(ShardError, match="CMYK"):
        decode_stored(payload, codec="jpeg", decoder=decoder)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1"])
def test_png_of_other_modes_is_not_a_stored_image(mode):
    payload = saved(Image.fromarray(scene()).convert(mode), "PNG")
    with pytest.raises(ShardError, match="mode"):
        decode_stored(payload, codec="png")


@pytest.mark.parametrize("decoder", DECODERS)
def test_jpeg_header_of_four_gigapixels_is_refused_before_decoding(decoder):
    payload = bytearray(jpeg(scene()))
    frame = payload.index(b"\xff\xc0")
    payload[frame + 5 : frame + 9] = b"\xff\xdc\xff\xdc"
    with pytest.raises(ShardError, match="65500 x 65500"):
        decode_stored(bytes(payload), codec="jpeg", decoder=decoder)


@pytest.mark.parametrize("size", [(1, 200_000_000), (200_000_000, 1), (14_000, 14_000)])
@pytest.mark.parametrize("codec", ["png", "webp"])
def test_header_that_announces_too_much_is_refused_before_decoding(codec, size, monkeypatch):
    def fail(self, *args):
        raise AssertionError("decoded")

    for plugin in ("PngImagePlugin.PngImageFile", "WebPImagePlugin.WebPImageFile"):
        monkeypatch.setattr(f"PIL.{plugin}.load", fail)
    if codec == "png":
        payload = bytearray(encode_stored(scene(), codec="png"))
        payload[16:24] = struct.pack(">2I", *size)
        payload[29:33] = struct.pack(">I", zlib.crc32(payload[12:29]))
    else:
        payload = bytearray(encode_stored(scene(), codec="webp"))
        payload[12:16], sides = b"VP8X", (min(side, 1 << 24) - 1 for side in (20_000, 20_000))
        payload[24:30] = b"".join(side.to_bytes(3, "little") for side in sides)
    with pytest.raises(ShardError) as caught:
        decode_stored(bytes(payload), codec=codec)
    assert caught.value.reason == "image_decode"


@pytest.mark.parametrize("decoder", DECODERS)
def test_short_jpeg_of_many_pixels_is_refused_before_decoding(decoder):
    payload = bytearray(jpeg(scene()))
    frame = payload.index(b"\xff\xc0")
    payload[frame + 5 : frame + 9] = struct.pack(">2H", 14_000, 14_000)
    with pytest.raises(ShardError, match="truncated JPEG"):
        decode_stored(bytes(payload), codec="jpeg", decoder=decoder)


@pytest.mark.parametrize("codec", CODECS)
def test_size_is_compared_before_anything_is_decoded(codec, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: 1 / 0)
    payload = encode_stored(scene(), codec=codec)
    out = np.empty((61, 84, 3), np.uint8)
    with pytest.raises(ShardError) as caught:
        decode_stored(payload, codec=codec, out=out, decoder="pillow")
    assert "(61, 84, 3)" in str(caught.value)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}]
)
def test_frame_of_a_jpeg_is_read(options):
    buffer = io.BytesIO()
    Image.fromarray(scene()).save(buffer, "JPEG", **options)
    frame = jpeg_frame(buffer.getvalue())
    assert frame.is_sequential == (not options.get("progressive"))
    whole = options.get("subsampling") == 0
    assert frame.samples_per_pixel == (3 if whole else 1.5)
    assert frame.least_bits == (8 * 11 if whole else 4 * 6)


@given(st.binary(max_size=200))
def test_headers_of_noise_never_raise(noise):
    for head in (b"", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"RIFF1234WEBP"):
        jpeg_frame(head + noise)
        size_before_opening(head + noise)
        with contextlib.suppress(ValueError):
            require_payload(head + noise)


def test_raw_header_of_too_many_pixels_is_refused():
    payload = encode_stored(scene(), codec="raw").replace(b"(61, 83, 3)", b"(61, 83000000, 3)")
    with pytest.raises(ShardError):
        decode_stored(payload[:128], codec="raw")
    assert MAX_STORED_PIXELS == 200_000_000


@pytest.mark.parametrize("codec", CODECS)
def test_encoding_gives_the_same_bytes_in_every_process(codec):
    payload = encode_stored(scene(), codec=codec, quality=92)
    assert encode_stored(scene(), codec=codec, quality=92) == payload
    script = (
        "import sys, hashlib, numpy as np\n"
        "from shardspec.media import encode_stored\n"
        "pixels = np.frombuffer(sys.stdin.buffer.read(), np.uint8).reshape(61, 83, 3)\n"
        f"payload = encode_stored(pixels, codec={codec!r}, quality=92)\n"
        "sys.stdout.write(hashlib.sha256(payload).hexdigest())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=scene().tobytes(), capture_output=True, check=True
    )
    assert done.stdout.decode() == hashlib.sha256(payload).hexdigest()


def test_stored_jpeg_is_baseline_with_full_chroma_and_bare():
    payload = encode_stored(scene(), codec="jpeg", quality=95)
    with Image.open(io.BytesIO(payload)) as image:
        assert image.layer == [(1, 1, 1, 0), (2, 1, 1, 1), (3, 1, 1, 1)]
        assert "progressive" not in image.info
        assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
        assert not image.getexif()
    high = len(encode_stored(scene(), codec="jpeg", quality=95))
    assert len(encode_stored(scene(), codec="jpeg", quality=50)) < high


def test_stored_png_and_webp_are_lossless_and_bare():
    png = encode_stored(scene(), codec="png")
    assert {kind for kind, _, _ in check_png(png)} == {b"IHDR", b"IDAT", b"IEND"}
    assert encode_stored(scene(), codec="webp")[12:16] == b"VP8L"


NOISE = np.random.RandomState(0).randint(0, 256, (8, 8, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    ("pixels", "codec"),
    [(scene(), "webp"), (NOISE, "png"), (np.zeros((1, 16_384, 3), np.uint8), "png")],
    ids=["flat", "noise", "too long for webp"],
)
def test_lossless_is_the_smaller_format_and_names_its_member(pixels, codec):
    payload = encode_stored(pixels, codec="lossless")
    assert payload == encode_stored(pixels, codec=codec)
    assert codec_of(payload, "lossless") == codec
    if pixels is not NOISE:
        return
    with pytest.raises(ShardError):  # a file that is neither
        decode_stored(encode_stored(pixels, codec="jpeg"), codec="lossless")


def test_strided_pixels_encode_like_their_copy():
    mirrored = scene()[:, ::-1]
    for codec in CODECS:
        assert encode_stored(mirrored, codec=codec) == encode_stored(mirrored.copy(), codec=codec)


@pytest.mark.parametrize(
    "pixels",
    [scene()[..., :2], scene()[0], scene().astype(np.float32), scene()[:0]],
    ids=["two channels", "two axes", "float", "empty"],
)
def test_pixels_of_another_shape_cannot_be_stored(pixels):
    with pytest.raises(ValueError, match="uint8"):
        encode_stored(pixels, codec="png")


@pytest.mark.parametrize("codec", ["jpeg", "webp"])
def test_sides_beyond_the_codec_are_refused_by_name(codec):
    limit = CODEC_MAX_SIDE_PX[codec]
    encode_stored(np.zeros((1, limit, 3), np.uint8), codec=codec)
    with pytest.raises(SampleError) as caught:
        encode_stored(np.zeros((1, limit + 1, 3), np.uint8), codec=codec)
    assert caught.value.reason == "image_size"


def test_decoder_in_use_is_named_and_can_be_missing():
    assert jpeg_decoder() == "simplejpeg"
    script = (
        "import sys; sys.modules['simplejpeg'] = None\n"
        "from shardspec.errors import ConfigError\n"
        "from shardspec.media import decode_stored, jpeg_decoder\n"
        "payload = sys.stdin.buffer.read()\n"
        "assert jpeg_decoder() == 'pillow'\n"
        "sys.stdout.buffer.write(decode_stored(payload, codec='jpeg').tobytes())\n"
        "try:\n"
        "    decode_stored(payload, codec='jpeg', decoder='simplejpeg')\n"
        "except ConfigError as error:\n"
        "    sys.stderr.write(error.reason)\n"
    )
    payload = jpeg(scene())
    done = subprocess.run(
        [sys.executable, "-c", script], input=payload, capture_output=True, check=True
    )
    assert done.stderr.decode() == "decoder_missing"
    assert done.stdout == decode_stored(payload, codec="jpeg").tobytes()


@pytest.mark.parametrize("reduce", [2, 4, 8])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_both_decoders_reduce_to_the_same_pixels(reduce, subsampling):
    payload = jpeg(scene(160, 224), subsampling=subsampling)
    small = [
        decode_stored(payload, codec="jpeg", decoder=decoder, reduce=reduce) for decoder in DECODERS
    ]
    assert small[0].shape == (160 // reduce, 224 // reduce, 3)
    assert np.array_equal(*small)
    out = np.empty_like(small[0])
    assert decode_stored(payload, codec="jpeg", out=out, reduce=reduce) is out
    assert np.array_equal(out, small[0])


@pytest.mark.parametrize("decoder", DECODERS)
def test_sides_that_do_not_divide_are_not_reduced(decoder):
    with pytest.raises(ShardError, match="83 x 61 pixels at 1/4"):
        decode_stored(jpeg(scene()), codec="jpeg", decoder=decoder, reduce=4)


def test_other_codecs_are_decoded_whole():
    with pytest.raises(ValueError, match="png cannot be decoded at a reduced size"):
        decode_stored(encode_stored(scene(), codec="png"), codec="png", reduce=2)


# --- opening files of any format


def encoded(kind):
    buffer = io.BytesIO()
    Image.new("RGB", (5, 3)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_a_file_is_opened_by_its_signature_if_its_format_is_allowed(kind):
    opened = open_image(encoded(kind), formats=("PNG", kind))
    assert (opened.format, opened.size) == (kind, (5, 3))
    assert open_image(encoded(kind), formats=("ICO", "nothing")) is None


def test_a_broken_header_raises_one_of_the_decode_errors():
    with pytest.raises(PILLOW_DECODE_ERRORS):
        open_image(encoded("PNG")[:20], formats=("PNG",))


def test_the_limit_on_pixels_of_the_process_does_not_count(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    assert open_image(encoded("PNG"), formats=("PNG",)).size == (5, 3)
