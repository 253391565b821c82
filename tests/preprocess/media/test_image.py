"""Odd pictures become upright sRGB pixels, or a named refusal; fitting files stay as they are."""

from __future__ import annotations

import dataclasses
import io
import logging
import pickle
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms, ImageFile, ImageOps

from preprocess.media.header import ImageLimits
from preprocess.media.image import ImagePolicy, ImagePreprocessor
from shardspec.errors import ConfigError, SampleError, StorageError
from shardspec.image_file import check_png
from shardspec.media import decode_stored, encode_stored, jpeg_decoder
from shardspec.sample import Geometry
from shardspec.tiling import ImageView, overview_size, stored_size
from tests.examples import examples

LARGE = ImagePreprocessor(ImagePolicy(max_side_px=4000))
"""Leaves the size of every test picture alone."""
TILED = ImageView(crop_mode="overlap-and-resize-c2")


def scene(height=61, width=83):
    """uint8 [H, W, 3]: slopes of colour with some noise; every corner is different."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, (3 * x + 2 * y) % 256], axis=-1)
    noise = np.random.RandomState(7).randint(0, 12, pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def saved(image, fmt, **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def exif(orientation):
    block = Image.Exif()
    block[ExifTags.Base.Orientation] = orientation
    block[ExifTags.Base.Artist] = "somebody with a name"
    return block


def png_file(*chunks):
    """Builds a PNG by hand, for kinds that Pillow does not write."""
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, body in chunks:
        parts.append(struct.pack(">I", len(body)) + kind + body)
        parts.append(struct.pack(">I", zlib.crc32(kind + body)))
    return b"".join(parts)


def icc_profile(space, tags):
    """Builds an ICC version 2 profile from {signature: data} (ICC.1:2001-04, clauses 6 and 7)."""
    names, blobs = sorted(tags), []
    offset = 128 + 4 + 12 * len(names)
    table = struct.pack(">I", len(names))
    for name in names:
        blob = tags[name] + bytes(-len(tags[name]) % 4)
        table += struct.pack(">4sII", name, offset, len(tags[name]))
        offset += len(blob)
        blobs.append(blob)
    header = struct.pack(">I4sI4s4s4s12s4s", offset, b"", 0x02100000, b"mntr", space, b"XYZ ",
                         struct.pack(">6H", 2000, 1, 1, 0, 0, 0), b"acsp")  # fmt: skip
    header = header.ljust(68, b"\0") + struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D)
    return header.ljust(128, b"\0") + table + b"".join(blobs)


def xyz(x, y, z):
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in (x, y, z)))


def gamma(exponent):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(exponent * 256))


D50 = xyz(0.9642, 1.0, 0.8249)
# Primaries of sRGB as seen under D50, from its ICC profile (IEC 61966-2-1 after adaptation).
RED, GREEN, BLUE = (
    (0.4361, 0.2225, 0.0139),
    (0.3851, 0.7169, 0.0971),
    (0.1431, 0.0606, 0.7141),
)


def linear_rgb_profile(red=RED, green=GREEN, blue=BLUE):
    tags = {b"wtpt": D50, b"rXYZ": xyz(*red), b"gXYZ": xyz(*green), b"bXYZ": xyz(*blue)}
    return icc_profile(b"RGB ", {**tags, **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma(1))})


def srgb_profile():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def srgb_curve(levels):
    """Linear light, 0 to 255, to sRGB levels (IEC 61966-2-1)."""
    share = levels.astype(np.float64) / 255
    return 255 * np.where(share <= 0.0031308, 12.92 * share, 1.055 * share ** (1 / 2.4) - 0.055)


def refusal(source, preprocessor=LARGE, **options):
    with pytest.raises(SampleError) as caught:
        preprocessor(source, where="row 7", **options)
    assert caught.value.where == "row 7"
    pickle.loads(pickle.dumps(caught.value))
    return caught.value.reason


def same(got, want):
    assert got.dtype == np.uint8
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, want)


# --- sources -----------------------------------------------------------------------------------


def test_bytes_path_image_and_array_of_one_picture_agree(tmp_path):
    payload = saved(scene(), "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(payload)
    for source in (payload, path, Image.open(path), scene()):
        image = LARGE(source, geometry=Geometry.FLIP)
        same(image.pixels, scene())
        assert (image.source_width, image.source_height) == (83, 61)
        assert image.geometry is Geometry.FLIP


def test_geometry_is_none_unless_given():
    assert LARGE(scene()).geometry is Geometry.NONE


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (2, 3)])
@pytest.mark.parametrize("fmt", ["PNG", "BMP", "PPM", "TIFF", "JPEG"])
def test_thin_pictures_pass_in_every_format(size, fmt):
    payload = saved(scene(*size), fmt)
    same(LARGE(payload).pixels, np.asarray(Image.open(io.BytesIO(payload))))


@pytest.mark.parametrize("fmt", ["AVIF", "JPEG2000", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
def test_other_formats_give_pillows_pixels(fmt):
    payload = saved(scene(), fmt)
    same(LARGE(payload).pixels, np.asarray(Image.open(io.BytesIO(payload)).convert("RGB")))


# --- orientation -------------------------------------------------------------------------------

# What is stored, as corners (top left, top right, bottom right, bottom left), so that after the
# orientation the corners read A B C D: EXIF 2.32, table of tag 0x0112.
STORED_CORNERS = {1: "ABCD", 2: "BADC", 3: "CDAB", 4: "DCBA", 5: "ADCB", 6: "BCDA", 7: "CBAD",
                  8: "DABC"}  # fmt: skip
COLORS = {"A": (200, 0, 0), "B": (0, 200, 0), "C": (0, 0, 200), "D": (200, 200, 0)}


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_upright(orientation, fmt):
    turned = orientation >= 5
    height, width = (48, 32) if turned else (32, 48)  # 32 high, 48 wide once upright
    pixels = np.zeros((height, width, 3), np.uint8)
    h, w = height // 2, width // 2
    for color, rows, columns in zip(
        STORED_CORNERS[orientation],
        (slice(0, h), slice(0, h), slice(h, None), slice(h, None)),
        (slice(0, w), slice(w, None), slice(w, None), slice(0, w)),
        strict=True,
    ):
        pixels[rows, columns] = COLORS[color]
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(fmt, {})
    image = LARGE(saved(pixels, fmt, exif=exif(orientation), **options))
    assert (image.source_width, image.source_height) == (48, 32)
    corners = [image.pixels[i, j] for i, j in ((2, 2), (2, -3), (-3, -3), (-3, 2))]
    for corner, name in zip(corners, "ABCD", strict=True):
        assert np.abs(corner.astype(int) - COLORS[name]).max() <= 3
    assert image.kept is None or orientation == 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_agrees_with_pillows_own_transpose(orientation):
    payload = saved(scene(), "JPEG", quality=90, exif=exif(orientation))
    want = ImageOps.exif_transpose(Image.open(io.BytesIO(payload)))
    same(LARGE(payload).pixels, np.asarray(want))
    same(LARGE(Image.open(io.BytesIO(payload))).pixels, np.asarray(want))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientations_that_do_not_exist_are_ignored(orientation):
    payload = saved(scene(), "PNG", exif=exif(orientation))
    same(LARGE(payload).pixels, scene())


# --- colour ------------------------------------------------------------------------------------


def test_embedded_profile_is_converted_to_srgb():
    """In a profile with red and green exchanged, pure red is green."""
    profile = linear_rgb_profile(red=GREEN, green=RED)
    image = LARGE(saved(scene(), "PNG", icc_profile=profile))
    want = srgb_curve(scene()[..., [1, 0, 2]])
    assert np.abs(image.pixels - want).max() <= 2.5
    assert image.kept is None


def test_profile_of_a_jpeg_is_converted_and_the_file_is_not_kept():
    payload = saved(scene(), "JPEG", quality=95, icc_profile=linear_rgb_profile())
    want = srgb_curve(np.asarray(Image.open(io.BytesIO(payload))))
    image = LARGE(payload)
    assert np.abs(image.pixels - want).max() <= 2.5
    assert image.kept is None


@pytest.mark.parametrize(
    ("kind", "fmt"),
    [("L", "JPEG"), *((kind, fmt) for kind in ("L", "LA", "I;16") for fmt in ("PNG", "TIFF"))],
)
def test_grey_profile_is_converted(kind, fmt):
    """Greys of gamma 1.8, as pictures of old Macintoshes have."""
    profile = icc_profile(b"GRAY", {b"wtpt": D50, b"kTRC": gamma(1.8)})
    levels = np.asarray(Image.fromarray(scene()).convert("L"))
    grey = Image.fromarray(levels)
    if kind == "LA":
        grey = grey.convert("LA")
    elif kind == "I;16":
        grey = Image.fromarray(levels.astype(np.uint16) * 257)
    payload = saved(grey, fmt, icc_profile=profile)
    if fmt == "JPEG":
        levels = np.asarray(Image.open(io.BytesIO(payload)))
    want = srgb_curve(255 * (levels / 255) ** 1.8)[..., None]
    image = LARGE(payload)
    assert np.abs(image.pixels - want).max() <= 2.5
    assert np.abs(image.pixels.astype(int) - levels[..., None]).max() > 10


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
def test_srgb_profile_changes_nothing(fmt):
    options = {"WEBP": {"lossless": True}}.get(fmt, {})
    bare = LARGE(saved(scene(), fmt, **options))
    same(LARGE(saved(scene(), fmt, icc_profile=srgb_profile(), **options)).pixels, bare.pixels)


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        (b"no profile at all", "broken colour profile"),
        (srgb_profile()[:200], "broken colour profile"),
        (ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(), "broken"),
        (icc_profile(b"GRAY", {b"wtpt": D50, b"kTRC": gamma(1)}), "another mode"),
    ],
    ids=["text", "cut off", "lab", "grey"],
)
def test_unusable_profile_is_ignored_with_one_warning(profile, words, caplog):
    preprocessor = ImagePreprocessor(ImagePolicy(max_side_px=4000))
    payload = saved(scene(), "PNG", icc_profile=profile)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            same(preprocessor(payload, where="row 7").pixels, scene())
    assert len(caplog.records) == 1
    assert words in caplog.text
    assert "row 7" in caplog.text


def test_transparency_is_laid_over_white():
    alpha = np.arange(61 * 83).reshape(61, 83, 1) % 256
    payload = saved(np.concatenate([scene(), alpha.astype(np.uint8)], axis=2), "PNG")
    want = (scene() * (alpha / 255)) + 255 * (1 - alpha / 255)
    assert np.abs(LARGE(payload).pixels - want).max() <= 1
    opaque = np.concatenate([scene(), np.full((61, 83, 1), 255, np.uint8)], axis=2)
    same(LARGE(saved(opaque, "PNG")).pixels, scene())


def test_grey_with_transparency_is_laid_over_white():
    pixels = np.zeros((2, 2, 2), np.uint8)
    pixels[0, 0] = (100, 255)
    pixels[0, 1] = (100, 0)
    pixels[1, 1] = (0, 51)
    image = LARGE(
        saved(Image.merge("LA", [Image.fromarray(pixels[..., i].copy()) for i in (0, 1)]), "PNG")
    )
    np.testing.assert_array_equal(image.pixels[..., 0], [[100, 255], [255, 204]])
    assert (image.pixels == image.pixels[..., :1]).all()


def test_palette_with_transparency_is_laid_over_white():
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 0, 200])
    image.putdata([0, 1, 2])
    payload = saved(image, "PNG", transparency=b"\xff\x00\x80")
    assert LARGE(payload).pixels.tolist() == [[[10, 20, 30], [255, 255, 255], [127, 127, 227]]]


def test_colour_key_of_an_rgb_png_is_transparent():
    pixels = np.full((2, 2, 3), 40, np.uint8)
    pixels[0, 1] = (1, 2, 3)
    preprocessor = ImagePreprocessor(ImagePolicy(max_side_px=100, codec="png"))
    image = preprocessor(saved(pixels, "PNG", transparency=(1, 2, 3)))
    assert image.pixels[0, 1].tolist() == [255, 255, 255]
    assert image.pixels[1, 1].tolist() == [40, 40, 40]
    assert image.kept is None


def test_adobe_cmyk_jpeg_gives_pillows_rgb():
    payload = saved(Image.fromarray(scene()).convert("CMYK"), "JPEG", quality=95)
    image = LARGE(payload)
    same(image.pixels, np.asarray(Image.open(io.BytesIO(payload)).convert("RGB")))
    assert np.abs(image.pixels.astype(int) - scene()).mean() < 4  # not a negative
    assert image.kept is None


def test_sixteen_bit_grey_keeps_its_upper_byte():
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    want = np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
    same(LARGE(saved(Image.fromarray(values), "PNG")).pixels, want)
    same(LARGE(saved(Image.fromarray(values), "TIFF")).pixels, want)
    same(LARGE(Image.fromarray(values.astype(np.int32))).pixels, want)
    big_endian = Image.frombytes("I;16B", (64, 64), values.astype(">u2").tobytes())
    same(LARGE(big_endian).pixels, want)


def test_sixteen_bit_rgb_png_keeps_its_upper_bytes():
    wide = (scene().astype(np.uint16) << 8 | 0x80).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in wide)
    header = struct.pack(">2I5B", 83, 61, 16, 2, 0, 0, 0)
    payload = png_file((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    image = ImagePreprocessor(ImagePolicy(max_side_px=100, codec="png"))(payload)
    same(image.pixels, scene())
    assert image.kept is None


def test_floats_are_levels_and_other_ranges_are_refused():
    levels = np.linspace(0, 255, 64, dtype=np.float32).reshape(8, 8)
    image = LARGE(saved(Image.fromarray(levels), "TIFF"))
    same(image.pixels, np.repeat(np.rint(levels).astype(np.uint8)[..., None], 3, axis=2))
    for odd in (levels / 255, levels - 1, levels * 2, levels * np.nan, levels + np.inf):
        assert refusal(saved(Image.fromarray(odd.astype(np.float32)), "TIFF")) == "image_mode"


def test_integers_beyond_sixteen_bits_are_refused():
    for odd in (-1, 65536):
        assert refusal(Image.fromarray(np.full((2, 2), odd, np.int32))) == "image_mode"


@pytest.mark.parametrize("mode", ["1", "L", "P", "YCbCr", "HSV", "RGBX", "PA", "RGBa"])
def test_other_modes_become_what_pillow_makes_of_them(mode):
    source = Image.fromarray(scene())
    source = source.convert("RGBA").convert(mode) if mode == "RGBa" else source.convert(mode)
    same(LARGE(source).pixels, np.asarray(source.convert("RGB")))


def test_lab_becomes_srgb():
    lab_profile, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    lab = ImageCms.profileToProfile(Image.fromarray(scene()), srgb, lab_profile, outputMode="LAB")
    difference = LARGE(lab).pixels.astype(int) - scene()
    assert np.abs(difference).mean() < 3  # 8-bit Lab is coarse


def test_mode_that_pillow_cannot_convert_is_refused():
    assert refusal(Image.new("La", (2, 2))) == "image_mode"


@pytest.mark.parametrize(
    "pixels",
    [scene()[..., 0], scene().astype(np.float32), np.dstack([scene(), scene()[..., :1]])],
    ids=["grey", "float", "four channels"],
)
def test_arrays_of_another_kind_are_refused(pixels):
    assert refusal(pixels) == "image_mode"


@pytest.mark.parametrize("fmt", ["GIF", "WEBP", "PNG"])
def test_animations_give_their_first_frame(fmt):
    first, second = (Image.new("RGB", (20, 10), color) for color in ((255, 0, 0), (0, 0, 255)))
    options = {"WEBP": {"lossless": True}}.get(fmt, {})
    payload = saved(first, fmt, save_all=True, append_images=[second], duration=100, **options)
    assert Image.open(io.BytesIO(payload)).n_frames == 2
    codec = {"GIF": "png", "WEBP": "webp", "PNG": "png"}[fmt]
    image = ImagePreprocessor(ImagePolicy(max_side_px=100, codec=codec))(payload)
    assert (image.pixels == (255, 0, 0)).all()
    assert image.kept is None


# --- size --------------------------------------------------------------------------------------


@settings(max_examples=examples(30), deadline=None)
@given(
    height=st.integers(1, 90), width=st.integers(1, 90), headroom=st.sampled_from([1.0, 1.25, 1.5])
)
def test_pixels_are_pillows_lanczos_at_the_stored_size(height, width, headroom):
    views = (ImageView(size_px=28, patch_px=14),)
    preprocessor = ImagePreprocessor(ImagePolicy(views=views, headroom=headroom))
    image = preprocessor(scene(height, width))
    size = stored_size(width, height, views, headroom=headroom)
    assert size[0] <= width
    assert size[1] <= height
    want = Image.fromarray(scene(height, width)).resize(size, Image.Resampling.LANCZOS)
    same(image.pixels, np.asarray(want))
    assert (image.source_width, image.source_height) == (width, height)


@pytest.mark.parametrize("fit", ["stretch", "pad"])
@pytest.mark.parametrize("source", [(1200, 900), (100, 75)], ids=["larger", "smaller"])
def test_overview_of_tiled_views_is_pillows_lanczos_of_the_original(fit, source):
    views = tuple(dataclasses.replace(TILED, fit=fit, max_crops=n) for n in (4, 8))
    pixels = scene(*source[::-1])
    image = ImagePreprocessor(ImagePolicy(views=views))(pixels)
    size = overview_size(*source, views[0])
    want = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
    same(image.overview, np.asarray(want))


@pytest.mark.parametrize(
    "policy",
    [
        ImagePolicy(),
        ImagePolicy(views=(TILED,), overview="resized"),
        ImagePolicy(views=(TILED, ImageView(size_px=378))),
        ImagePolicy(views=(TILED, ImageView(fit="pad"))),
    ],
    ids=["one crop", "resized", "other size", "other fit"],
)
def test_no_overview_is_made_where_it_could_not_serve_every_view(policy):
    assert ImagePreprocessor(policy)(scene(600, 800)).overview is None


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_mode", ["resize", "overlap-and-resize-c2"])
def test_filter_is_the_recipes(resample, crop_mode):
    view = ImageView(crop_mode=crop_mode)
    pixels = scene(900, 1200)
    image = ImagePreprocessor(ImagePolicy(views=(view,), resample=resample))(pixels)
    kind = Image.Resampling[resample.upper()]
    size = stored_size(1200, 900, [view])
    same(image.pixels, np.asarray(Image.fromarray(pixels).resize(size, kind)))
    if image.overview is not None:
        size = overview_size(1200, 900, view)
        same(image.overview, np.asarray(Image.fromarray(pixels).resize(size, kind)))


@pytest.mark.parametrize("source", [(900, 1200), (337, 336), (2000, 400)])
def test_aliased_filter_interpolates_four_pixels(source):
    """Within one level of bilinear sampling in floats, which is what Molmo 2 trains with."""
    pixels = scene(*source)
    got = ImagePreprocessor(ImagePolicy(resample="bilinear-aliased"))(pixels).pixels
    ends = []
    for size in source:
        at = np.clip((np.arange(336) + 0.5) * size / 336 - 0.5, 0, size - 1)
        first = np.minimum(at.astype(int), size - 2)
        ends.append((first, (at - first)))
    (y, dy), (x, dx) = ends
    dy, dx = dy[:, None, None], dx[None, :, None]
    top = pixels[y][:, x] * (1 - dx) + pixels[y][:, x + 1] * dx
    bottom = pixels[y + 1][:, x] * (1 - dx) + pixels[y + 1][:, x + 1] * dx
    assert np.abs(got - (top * (1 - dy) + bottom * dy)).max() <= 1.01


def test_jpeg_is_resized_from_pillows_pixels():
    payload = saved(scene(600, 800), "JPEG", quality=90)
    image = ImagePreprocessor(ImagePolicy(views=(ImageView(),)))(payload)
    want = Image.open(io.BytesIO(payload)).resize((336, 336), Image.Resampling.LANCZOS)
    same(image.pixels, np.asarray(want))
    assert image.kept is None


def test_turned_pictures_are_sized_by_their_upright_shape():
    payload = saved(scene(300, 600), "JPEG", exif=exif(6))
    image = ImagePreprocessor(ImagePolicy(views=(TILED,)))(payload)
    width, height = stored_size(300, 600, (TILED,))
    assert image.pixels.shape == (height, width, 3)


@settings(max_examples=examples(100), deadline=None)
@given(height=st.integers(1, 60), width=st.integers(1, 60), limit=st.integers(1, 70))
def test_longest_side_is_bounded_and_the_aspect_kept(height, width, limit):
    image = ImagePreprocessor(ImagePolicy(max_side_px=limit))(scene(height, width))
    got_height, got_width = image.pixels.shape[:2]
    scale = min(1.0, limit / max(height, width))
    assert max(got_height, got_width) == min(limit, max(height, width))
    assert abs(got_height - max(1, height * scale)) <= 0.5
    assert abs(got_width - max(1, width * scale)) <= 0.5


def test_longest_side_replaces_the_bound_of_the_views():
    policy = ImagePolicy(views=(ImageView(),), max_side_px=40)
    assert ImagePreprocessor(policy)(scene(400, 800)).pixels.shape == (20, 40, 3)


# --- what is kept ------------------------------------------------------------------------------


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_fitting_jpeg_keeps_its_compressed_data(subsampling):
    payload = saved(scene(), "JPEG", quality=88, subsampling=subsampling)
    image = LARGE(payload)
    assert image.kept == payload
    assert LARGE.encode(image) == payload
    same(image.pixels, np.asarray(Image.open(io.BytesIO(payload))))


def test_kept_jpeg_loses_its_metadata_and_nothing_else():
    bare = saved(scene(), "JPEG", quality=88)
    told = saved(
        scene(),
        "JPEG",
        quality=88,
        exif=exif(1),
        icc_profile=srgb_profile(),
        comment=b"taken at home",
        xmp=b"<x:xmpmeta>home</x:xmpmeta>",
    )
    for payload in (told, told + b"trailing video"):
        image = LARGE(payload)
        assert image.kept == bare
        same(image.pixels, decode_stored(bare, codec="jpeg", decoder="pillow"))


def test_kept_jpeg_keeps_its_adobe_marker_and_restarts():
    rgb_coded = saved(scene(), "JPEG", keep_rgb=True)
    restarts = saved(scene(), "JPEG", restart_marker_blocks=2)
    assert b"Adobe" in rgb_coded
    assert b"\xff\xd3" in restarts
    for payload in (rgb_coded, restarts):
        assert LARGE(payload).kept == payload
        same(LARGE(payload).pixels, np.asarray(Image.open(io.BytesIO(payload))))


def test_first_picture_of_a_multi_picture_jpeg_is_kept_alone():
    payload = saved(
        Image.fromarray(scene()), "MPO", save_all=True, append_images=[Image.new("RGB", (5, 5))]
    )
    image = LARGE(payload)
    assert len(image.kept) < len(payload)
    same(image.pixels, np.asarray(Image.open(io.BytesIO(payload))))
    same(decode_stored(image.kept, codec="jpeg"), image.pixels)


def kept_jpegs():
    """JPEGs that are kept, by how they are written."""
    picture = scene(64, 48)
    for name, options in {
        "444": {"subsampling": 0},
        "420": {"subsampling": 2},
        "restarts": {"subsampling": 1, "restart_marker_blocks": 3},
        "optimized": {"optimize": True, "quality": 97},
    }.items():
        yield name, saved(picture, "JPEG", **options)


def outcome(payload, *, for_storing):
    try:
        image = LARGE(payload, for_storing=for_storing)
    except SampleError as error:
        return error.reason, error.facts
    if image.kept is None:
        return image.pixels.tobytes()
    # Without pixels only where those of the file are the image's.
    assert (image.pixels is None) == for_storing
    return image.kept, (image.source_width, image.source_height)


@pytest.mark.skipif(jpeg_decoder() != "simplejpeg", reason="the library that looks for damage")
@pytest.mark.parametrize(("name", "payload"), [*kept_jpegs()])
def test_file_that_is_kept_for_storing_is_checked_as_if_it_were_decoded(name, payload):
    assert outcome(payload, for_storing=True) == outcome(payload, for_storing=False)
    rng = np.random.RandomState(len(name))
    refused = 0
    for _ in range(120):
        damaged = bytearray(payload)
        at = rng.randint(2, len(payload))
        if rng.randint(4):
            damaged[at] = rng.randint(256)
        else:
            del damaged[at : at + rng.randint(1, 40)]
        want = outcome(bytes(damaged), for_storing=False)
        assert outcome(bytes(damaged), for_storing=True) == want
        refused += isinstance(want, tuple) and isinstance(want[0], str)
    assert refused > 10


@pytest.mark.parametrize(("factors", "size"), [(0x41, (320, 8)), (0x14, (80, 32))])
def test_chroma_of_a_quarter_in_one_direction_is_read_as_by_pillow(factors, size):
    """4:1:1 and 4:4:1: of each 4:2:0 block of 16 x 16 pixels, one of 32 x 8 or 8 x 32 is made."""
    payload = bytearray(saved(scene(16, 160), "JPEG", subsampling=2))
    frame = payload.find(b"\xff\xc0")
    payload[frame + 5 : frame + 9] = struct.pack(">2H", *size[::-1])
    payload[frame + 11] = factors
    for for_storing in (True, False):
        image = LARGE(bytes(payload), for_storing=for_storing)
        want = np.asarray(Image.open(io.BytesIO(payload)))
        same(decode_stored(image.kept, codec="jpeg") if image.kept else image.pixels, want)


def test_image_whose_pixels_are_stored_has_them_for_storing():
    for payload in (saved(scene(), "JPEG", progressive=True), saved(scene(), "PNG")):
        same(LARGE(payload, for_storing=True).pixels, LARGE(payload).pixels)
    tiled = ImagePreprocessor(ImagePolicy(views=(TILED,)))
    payload = saved(scene(378, 378), "JPEG")
    got, want = (tiled(payload, for_storing=each) for each in (True, False))
    assert want.kept is not None
    same(got.pixels, want.pixels)
    same(got.overview, want.overview)


def fitting_png():
    from PIL.PngImagePlugin import PngInfo

    told = PngInfo()
    told.add_text("Author", "somebody with a name")
    return saved(scene(), "PNG", pnginfo=told, icc_profile=srgb_profile(), exif=exif(1))


@pytest.mark.parametrize(
    ("codec", "payload"),
    [("png", fitting_png()), ("webp", saved(scene(), "WEBP", lossless=True))],
    ids=["png", "webp"],
)
def test_fitting_lossless_file_keeps_its_compressed_data(codec, payload):
    preprocessor = ImagePreprocessor(ImagePolicy(max_side_px=100, codec=codec))
    image = preprocessor(payload)
    assert image.kept is not None
    assert b"somebody" not in image.kept
    same(image.pixels, scene())
    same(decode_stored(preprocessor.encode(image), codec=codec), scene())
    if codec == "png":
        assert {kind for kind, _, _ in check_png(image.kept)} == {b"IHDR", b"IDAT", b"IEND"}
    else:
        assert preprocessor(payload + b"junk").kept == payload


GREY = Image.fromarray(scene()).convert("L")


@pytest.mark.parametrize(
    ("codec", "payload"),
    [
        ("jpeg", saved(scene(), "JPEG", progressive=True)),
        ("jpeg", saved(GREY, "JPEG")),
        ("jpeg", saved(scene(), "JPEG", exif=exif(3))),
        ("jpeg", saved(scene(), "PNG")),
        ("png", saved(scene(), "JPEG")),
        ("png", saved(GREY, "PNG")),
        ("png", saved(Image.fromarray(scene()).quantize(16), "PNG")),
        ("png", saved(Image.fromarray(scene()).convert("RGBA"), "PNG")),
        ("webp", saved(scene(), "WEBP", quality=80)),
        ("webp", saved(scene(), "WEBP", lossless=True, exif=exif(1))),
        ("raw", encode_stored(scene(), codec="png")),
    ],
    ids=["progressive", "grey jpeg", "turned", "png as jpeg", "jpeg as png", "grey png", "palette",
         "rgba", "lossy webp", "webp with metadata", "raw"],
)  # fmt: skip
def test_unfitting_file_is_encoded_again(codec, payload):
    preprocessor = ImagePreprocessor(ImagePolicy(max_side_px=100, codec=codec, quality=91))
    image = preprocessor(payload)
    assert image.kept is None
    stored = preprocessor.encode(image)
    assert stored == encode_stored(image.pixels, codec=codec, quality=91)
    if codec != "jpeg":
        same(decode_stored(stored, codec=codec), image.pixels)


@pytest.mark.parametrize("level", [0, 9])
def test_lossless_keeps_a_file_only_where_it_is_smallest(level):
    noise = np.random.RandomState(0).randint(0, 256, (8, 8, 3)).astype(np.uint8)
    payload = saved(noise, "PNG", compress_level=level)
    preprocessor = ImagePreprocessor(ImagePolicy(max_side_px=100, codec="lossless"))
    image = preprocessor(payload)
    smallest = min(payload, encode_stored(noise, codec="lossless"), key=len)
    assert preprocessor.encode(image) == smallest
    assert image.kept == payload


def test_nothing_is_kept_when_resized_or_told_not_to():
    payload = saved(scene(), "JPEG")
    assert ImagePreprocessor(ImagePolicy(max_side_px=82))(payload).kept is None
    assert ImagePreprocessor(ImagePolicy(max_side_px=83))(payload).kept is not None
    never = ImagePreprocessor(ImagePolicy(max_side_px=4000, keep="never"))(payload)
    assert never.kept is None
    same(never.pixels, LARGE(payload).pixels)


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [b"", np.zeros((0, 5, 3), np.uint8), Image.new("RGB", (0, 4))])
def test_empty_sources_are_refused(source):
    assert refusal(source) == "image_empty"


@pytest.mark.parametrize(
    "source",
    [b"<html>404 not found</html>", b"P", b"%!PS-Adobe-3.0 EPSF-3.0\n", bytes(1000)],
    ids=["html", "one byte", "eps", "zeros"],
)
def test_files_that_are_not_pictures_are_refused(source):
    assert refusal(source) == "image_decode"


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_cut_off_jpeg_is_refused(mode, options):
    payload = saved(Image.fromarray(scene()).convert(mode), "JPEG", **options)
    for share in (0.2, 0.5, 0.9):
        assert refusal(payload[: int(len(payload) * share)]) == "image_truncated"
    assert refusal(payload[:-2]) == "image_truncated"


@pytest.mark.parametrize("fmt", ["PNG", "TIFF", "BMP", "PPM"])
def test_other_cut_off_files_are_refused(fmt):
    payload = saved(scene(), fmt)
    assert refusal(payload[: len(payload) // 2]) == "image_truncated"
    with pytest.raises(SampleError):
        LARGE(saved(scene(), "WEBP")[:-20])


def flipped_bits(payload):
    """Files with one flipped bit of the scan that Pillow reads to the end, to wrong pixels."""
    good = np.asarray(Image.open(io.BytesIO(payload)).convert("RGB"), dtype=np.int16)
    start = payload.rindex(b"\xff\xda") + 60
    for at in range(start, len(payload) - 2, 11):
        flipped = payload[:at] + bytes([payload[at] ^ 0x10]) + payload[at + 1 :]
        try:
            bad = np.asarray(Image.open(io.BytesIO(flipped)).convert("RGB"), dtype=np.int16)
        except OSError:
            continue
        if np.abs(bad - good).mean() > 15:
            yield flipped


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_flipped_bits_that_strict_decoding_sees_and_pillow_does_not_are_refused(mode):
    space = "CMYK" if mode == "CMYK" else "RGB"
    num_seen = 0
    for flipped in flipped_bits(saved(Image.fromarray(scene(120, 160)).convert(mode), "JPEG")):
        try:
            simplejpeg.decode_jpeg(flipped, colorspace=space, strict=True)
        except ValueError:
            num_seen += 1
            assert refusal(flipped) in ("image_decode", "image_truncated")
        else:
            # Valid code words all the way: only a checksum of the source could tell.
            assert LARGE(flipped).source_width == 160
    assert num_seen >= 2


def test_flipped_bit_of_a_png_is_refused():
    payload = bytearray(saved(scene(), "PNG"))
    payload[len(payload) // 2] ^= 1
    assert refusal(bytes(payload)) == "image_decode"


def test_harmless_oddities_of_a_jpeg_are_read_but_not_kept():
    """Some cameras write scan parameters that baseline files do not have; the pixels are whole."""
    payload = bytearray(saved(scene(), "JPEG"))
    scan = payload.index(b"\xff\xda")
    payload[scan + 11 : scan + 14] = b"\0\0\0"
    image = LARGE(bytes(payload))
    same(image.pixels, np.asarray(Image.open(io.BytesIO(saved(scene(), "JPEG")))))
    assert image.kept is None


def bomb(fmt):
    payload = bytearray(saved(scene(), fmt))
    if fmt == "JPEG":
        frame = payload.index(b"\xff\xc0")
        payload[frame + 5 : frame + 9] = struct.pack(">2H", 65500, 65500)
    elif fmt == "PNG":
        header = struct.pack(">2I5B", 100_000, 100_000, 8, 2, 0, 0, 0)
        return png_file((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b""))
    else:
        payload[6:10] = struct.pack("<2H", 65535, 65535)
    return bytes(payload)


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "GIF"])
def test_bombs_are_refused_from_their_header(fmt):
    assert refusal(bomb(fmt)) == "image_bomb"


def test_pixel_limit_is_the_policys():
    small = ImagePreprocessor(ImagePolicy(max_side_px=4000, limits=ImageLimits(max_megapixels=1)))
    assert refusal(np.zeros((1001, 1000, 3), np.uint8), small) == "image_bomb"
    assert small(np.zeros((1000, 1000, 3), np.uint8)).source_width == 1000


def test_missing_and_unreadable_files_are_told_apart(tmp_path):
    assert refusal(tmp_path / "none.jpg") == "image_missing"
    with pytest.raises(StorageError) as caught:
        LARGE(tmp_path)
    assert caught.value.reason == "image_read"
    assert caught.value.where == str(tmp_path)


def test_path_names_itself_in_errors(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"no picture")
    with pytest.raises(SampleError) as caught:
        LARGE(path)
    assert caught.value.where == str(path)


def test_process_that_accepts_cut_off_files_is_refused(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ConfigError) as caught:
        LARGE(saved(scene(), "PNG"))
    assert caught.value.reason == "load_truncated_images"


# --- policy and process ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings_"),
    [
        ("views", {"views": ()}),
        ("headroom", {"headroom": 0.99}),
        ("headroom", {"headroom": float("nan")}),
        ("headroom", {"headroom": float("inf")}),
        ("max_side_px", {"max_side_px": 0}),
        ("codec", {"codec": "jpg"}),
        ("quality", {"quality": 0}),
        ("quality", {"quality": 101}),
        ("keep", {"keep": "always"}),
        ("resample", {"resample": "nearest"}),
    ],
)
def test_policy_names_the_field_it_refuses(name, settings_):
    with pytest.raises(ConfigError) as caught:
        ImagePolicy(**{"views": (ImageView(),), **settings_})
    assert caught.value.reason == "image_policy"
    assert caught.value.where == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_megapixels", 0),
        ("max_megapixels", 201),
        ("max_source_side_px", 0),
        ("max_source_side_px", 1_000_001),
        ("max_aspect", 0.5),
        ("max_aspect", float("nan")),
        ("max_decode_bytes", 2**20 - 1),
    ],
)
def test_limits_name_the_field_they_refuse(name, value):
    with pytest.raises(ConfigError) as caught:
        ImageLimits(**{name: value})
    assert (caught.value.reason, caught.value.where) == ("image_policy", name)


@pytest.mark.parametrize(
    "fmt",
    [  # a decoder of its own, and a plug-in of Pillow's; a start of Python each
        *("JPEG", "AVIF"),
        *(pytest.param(fmt, marks=pytest.mark.slow) for fmt in ("GIF", "TIFF")),
    ],
)
def test_preprocessor_travels_to_a_fresh_process(fmt):
    payload = saved(scene(), fmt)
    LARGE(saved(scene(), "PNG", icc_profile=linear_rgb_profile()))  # has parsed a profile
    script = (
        "import pickle, sys\n"
        "prepare, payload = pickle.loads(sys.stdin.buffer.read())\n"
        "sys.stdout.buffer.write(prepare(payload).pixels.tobytes())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=pickle.dumps((LARGE, payload)),
        capture_output=True,
        check=True,
    )
    assert done.stdout == LARGE(payload).pixels.tobytes()


def test_pictures_are_the_same_without_simplejpeg():
    script = (
        "import sys; sys.modules['simplejpeg'] = None\n"
        "from preprocess.media.image import ImagePolicy, ImagePreprocessor\n"
        "from shardspec.errors import SampleError\n"
        "prepare = ImagePreprocessor(ImagePolicy(max_side_px=4000))\n"
        "payload = sys.stdin.buffer.read()\n"
        "image = prepare(payload)\n"
        "assert image.kept == payload\n"
        "try:\n"
        "    prepare(payload[: len(payload) // 2])\n"
        "except SampleError as error:\n"
        "    sys.stderr.write(error.reason)\n"
        "assert 'torch' not in sys.modules\n"
        "sys.stdout.buffer.write(image.pixels.tobytes())\n"
    )
    payload = saved(scene(), "JPEG")
    done = subprocess.run(
        [sys.executable, "-c", script], input=payload, capture_output=True, check=True
    )
    assert done.stderr.decode() == "image_truncated"
    assert done.stdout == LARGE(payload).pixels.tobytes()
