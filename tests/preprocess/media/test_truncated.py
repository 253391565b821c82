"""No picture that ends early is taken for a whole one: formats by places where they end.

FETCH judges by the structure of the file, BUILD and the reader of stored images by decoding. Where
a file is accepted all the same, it has every pixel of the whole one: what it lacks is a trailer.
"""

import io
import struct
import tracemalloc

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin, TiffTags

from preprocess.fetch.download import image_fault
from preprocess.media import ImageLimits
from preprocess.media.image import ImagePolicy, ImagePreprocessor
from shardspec.errors import SampleError, ShardError
from shardspec.media import decode_stored
from tests import truncated

FILES = truncated.whole_files()
STORED = {
    "jpeg": "jpeg",
    "jpeg, grey": "jpeg",
    "png": "png",
    "png, grey": "png",
    "png, interlaced": "png",
    "webp": "webp",
    "webp, lossless": "webp",
}
TRAILERS = {
    "gif": 2,
    "gif, interlaced": 2,
    "webp": 3,
    "webp, transparent": 3,
    "bmp": 1,
    "tiff, fax 3": 4,
    "tiff, fax 4": 4,
    "bmp, run lengths": 4,
}
"""Most bytes at the end that hold no pixel: a terminator, padding of a row or of a range coder, or
where the next page of a TIFF is."""

EARLY = [name for name, (_, payload) in FILES.items() if truncated.early_ends(name, payload, 2)]

BY_STRUCTURE = ("jpeg, progressive", "png")
"""Beginnings of the names of files whose structure alone shows that they end early."""

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged TIFF files


@pytest.fixture(scope="module")
def prepared():
    preprocess = ImagePreprocessor(ImagePolicy())

    def pixels(payload):
        """Gives what BUILD makes of a file, or None where it refuses it."""
        try:
            return preprocess(payload).pixels
        except SampleError as error:
            if error.reason not in ("image_decode", "image_truncated", "image_empty"):
                raise
            return None

    return pixels


def stored(payload, codec):
    try:
        return decode_stored(payload, codec=codec)
    except ShardError as error:
        if error.reason != "image_decode":
            raise
        return None


def cuts(name, count):
    _, payload = FILES[name]
    positions = {len(payload) * i // count for i in range(count)}
    positions |= {len(payload) - n for n in range(1, 8)}
    return [payload[:position] for position in sorted(positions)]


def check(name, made, prepared):
    _, payload = FILES[name]
    want = prepared(payload)
    assert want is not None
    for each in made:
        pixels = [prepared(each)]
        if name in STORED:
            pixels.append(stored(each, STORED[name]))
        for got in pixels:
            assert got is None or np.array_equal(got, want), len(each)
        if pixels[0] is not None:
            assert len(payload) - len(each) <= TRAILERS.get(name, 0)


@pytest.mark.parametrize("name", FILES)
def test_a_cut_picture_is_refused(name, prepared):
    check(name, cuts(name, 12), prepared)


@pytest.mark.parametrize(
    "name", [n for n, (_, p) in FILES.items() if truncated.early_ends(n, p, 2)]
)
def test_a_picture_that_ends_well_formed_but_early_is_refused(name, prepared):
    made = truncated.early_ends(name, FILES[name][1], 9)
    check(name, made, prepared)
    if name.startswith(BY_STRUCTURE):
        faults = {image_fault(each, limits=ImageLimits()) for each in made}
        assert faults == {"incomplete"}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_picture_that_ends_anywhere_is_refused(name, prepared):
    _, payload = FILES[name]
    check(name, cuts(name, len(payload)), prepared)
    check(name, truncated.early_ends(name, payload, 300), prepared)


@pytest.mark.parametrize("name", FILES)
def test_fetch_takes_whole_files_and_refuses_cut_ones_by_their_structure(name):
    form, payload = FILES[name]
    assert image_fault(payload, limits=ImageLimits()) == ""
    if form in ("JPEG", "PNG", "WEBP"):
        for each in cuts(name, 12):
            assert image_fault(each, limits=ImageLimits()) != ""


def test_a_png_with_one_row_of_64_is_refused_at_load_too(prepared):
    """The case that was found: the rest was black."""
    _, payload = FILES["png"]
    made = truncated.early_png(payload, 1.01 / truncated.SIZE[1])
    assert stored(made, "png") is None
    assert prepared(made) is None


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_png_whose_lowest_row_is_black_is_taken(mode, prepared):
    picture = truncated.scene(mode)
    picture.paste(0, (0, 20, *truncated.SIZE))
    payload = truncated.encoded_image(picture, "PNG")
    assert np.array_equal(stored(payload, "png"), np.asarray(picture.convert("RGB")))
    assert prepared(payload) is not None


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_a_png_whose_stream_has_a_wrong_checksum_is_left_to_the_decoder(chunk_bytes, prepared):
    """Pillow takes one of the two: all rows are there, and the CRCs of the chunks are right."""
    black = truncated.scene()
    black.paste(0, (0, 20, *truncated.SIZE))
    payload = truncated.encoded_image(black, "PNG")
    header, *idats, end = truncated.png_chunks(payload)
    stream = b"".join(body for _, body in idats)[:-4] + bytes(4)
    pieces = [stream[i : i + chunk_bytes] for i in range(0, len(stream), chunk_bytes)]
    made = truncated.png([header, *((b"IDAT", piece) for piece in pieces), end])
    assert image_fault(made, limits=ImageLimits()) == ""
    for got in (prepared(made), stored(made, "png")):
        assert got is None or np.array_equal(got, np.asarray(black))


def fax_of(payload, *, white_is_0=False, reversed_bits=False, left_out=0, end=b""):
    """Copies a fax TIFF of one strip: with other tags, less of the strip, and another end."""
    with Image.open(io.BytesIO(payload)) as image:
        found = image.tag_v2
        (start,), (length,) = found[273], found[279]
    strip = payload[start : start + length - left_out] + end
    if reversed_bits:
        strip = bytes(int(f"{byte:08b}"[::-1], 2) for byte in strip)
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for tag in (256, 257, 258, 259, 277, 278):
        tags[tag] = found.get(tag, 1)
    tags[262], tags[266] = 0 if white_is_0 else 1, 2 if reversed_bits else 1
    tags.tagtype[273] = tags.tagtype[279] = TiffTags.LONG
    tags[273], tags[279] = (0,), (len(strip),)
    return b"II*\0" + struct.pack("<I", 8) + tags.tobytes(8) + strip


FAXES = ["group3", "group4", "tiff_ccitt"]


@pytest.mark.parametrize("strip_size", [200, 1 << 16])
@pytest.mark.parametrize("compression", FAXES)
def test_a_whole_fax_is_read(compression, strip_size, prepared):
    want = np.asarray(truncated.scene("1").convert("RGB"))
    payload = truncated.encoded("TIFF", mode="1", compression=compression, strip_size=strip_size)
    assert np.array_equal(prepared(payload), want)
    if strip_size > 200:
        assert np.array_equal(prepared(fax_of(payload)), want)
        assert np.array_equal(prepared(fax_of(payload, white_is_0=True)), 255 - want)
        assert np.array_equal(prepared(fax_of(payload, reversed_bits=True)), want)


@pytest.mark.parametrize("compression", FAXES)
def test_a_fax_whose_rows_are_not_all_there_is_refused_by_name(compression):
    payload = truncated.encoded("TIFF", mode="1", compression=compression)
    for made in (fax_of(payload, left_out=30), fax_of(payload, end=b"abc"), payload[:-40]):
        with pytest.raises(SampleError) as caught:
            ImagePreprocessor(ImagePolicy())(made)
        assert caught.value.reason == "image_decode"


@pytest.mark.parametrize("end", ["", "001" * 2, "001" * 6])
def test_what_ends_a_strip_of_t4_may_be_there_or_not(end, prepared):
    payload = truncated.encoded("TIFF", mode="1", compression="group3")
    assert prepared(fax_of(payload, end=bytes.fromhex(end))) is not None


def tiff_with_jpeg(part, *, lengths=None, size=(16, 16)):
    """A TIFF of one strip per length, all of which start with the same JPEG."""
    lengths = lengths or [len(part)]
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in (
        (256, size[0]),
        (257, size[1]),
        (258, (8, 8, 8)),
        (259, 7),
        (262, 2),
        (277, 3),
        (278, -(-size[1] // len(lengths))),
    ):
        tags[tag] = value
    tags.tagtype[273] = tags.tagtype[279] = TiffTags.LONG
    tags[273], tags[279] = (0,) * len(lengths), tuple(lengths)
    return b"II*\0" + struct.pack("<I", 8) + tags.tobytes(8) + part  # which shifts the offsets


def test_a_jpeg_in_a_tiff_is_bounded_by_the_size_that_was_judged(prepared):
    part = truncated.encoded("JPEG", subsampling=0)
    assert prepared(tiff_with_jpeg(part, size=truncated.SIZE)) is not None
    assert prepared(tiff_with_jpeg(part[:-30], size=truncated.SIZE)) is None
    frame = part.index(b"\xff\xc0")
    large = part[: frame + 5] + struct.pack(">2H", 9000, 9000) + part[frame + 9 :]
    padded = large[:-2] + bytes(9000 * 9000 // 64 // 8) + large[-2:]  # a bit for each block
    for each in (large, padded):
        tracemalloc.start()
        try:
            assert prepared(tiff_with_jpeg(each)) is None
            assert tracemalloc.get_traced_memory()[1] < 20e6
        finally:
            tracemalloc.stop()


def test_parts_of_a_tiff_do_not_overlap():
    """Else each of any number of parts would be decoded from the same bytes."""
    part = truncated.encoded("JPEG", subsampling=0) + bytes(16)
    made = tiff_with_jpeg(part, lengths=[len(part) - i for i in range(16)])
    with pytest.raises(SampleError) as caught:
        ImagePreprocessor(ImagePolicy())(made)
    assert "overlapping" in str(caught.value.facts["cause"])
