import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from loader.assembly import pixels as pixels_module
from loader.assembly.augment import Augment, Draw, apply_color, draw, mean_grey, transform_points
from loader.assembly.pixels import MEAN_STD, Encoded, normalize, patchify, render, resize
from preprocess.synthetic.scenes import make_scene
from shardspec.errors import ConfigError, SampleError
from shardspec.media import decode_stored, encode_stored
from shardspec.sample import Geometry
from shardspec.tiling import (
    ImageView,
    canvas_size,
    crop_boxes,
    frame_size,
    image_masks,
    num_crops,
    overview_size,
)
from tests.examples import examples

SMALL = ImageView(size_px=56)
TILED = ImageView(size_px=56, crop_mode="overlap-and-resize-c2", max_crops=6, margin_patches=(1, 1))
PADDED = ImageView(size_px=56, fit="pad")
PADDED_TILED = ImageView(
    size_px=56, fit="pad", crop_mode="overlap-and-resize-c2", max_crops=6, margin_patches=(1, 1)
)
CENTERED = ImageView(size_px=56, fit="center-crop")
VIEWS = [SMALL, TILED, PADDED, PADDED_TILED, CENTERED]
VIEW_NAMES = ["stretch", "tiled", "pad", "pad-tiled", "center"]


def noise(width, height, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


def photo(width, height, seed=0):
    """Smooth shapes with edges and a little sensor noise: what resizing meets in practice."""
    rng = np.random.RandomState(seed)
    coarse = Image.fromarray(rng.randint(0, 256, (12, 16, 3)).astype(np.uint8))
    picture = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    for _ in range(20):
        x, y = rng.randint(width), rng.randint(height)
        picture[y : y + height // 6, x : x + width // 6] = rng.randint(0, 256, 3)
    return np.clip(picture + rng.normal(0, 4, picture.shape), 0, 255).astype(np.uint8)


@pytest.fixture
def no_resizing(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("resized")

    monkeypatch.setattr(torch.nn.functional, "interpolate", refuse)


# -------------------------------------------------------------------------------------- resize


@pytest.mark.parametrize("size", [(336, 336), (224, 100), (671, 503)])
def test_resize_is_within_one_grey_level_of_pillow_bicubic(size):
    picture = photo(1344, 1008)
    want = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
    got = resize(picture, *size)
    assert got.shape == want.shape
    assert np.abs(got.astype(int) - want).max() <= 1


@pytest.mark.parametrize("size", [(336, 336), (224, 100), (671, 503), (1500, 1200)])
@pytest.mark.parametrize("resample, antialias", [("bilinear", True), ("bilinear-aliased", False)])
def test_bilinear_filters_are_within_one_level_of_floats(size, resample, antialias):
    """The floats are what Molmo trains with: antialiased in its first release only."""
    picture = photo(1344, 1008)
    floats = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    want = torch.nn.functional.interpolate(
        floats, size=size[::-1], mode="bilinear", antialias=antialias, align_corners=False
    )
    got = resize(picture, *size, resample=resample)
    assert np.abs(got - want[0].permute(1, 2, 0).numpy()).max() <= 1.01


def test_nearest_filter_takes_the_pixel_in_the_middle():
    picture = noise(90, 60)
    got = resize(picture, 30, 20, resample="nearest")
    assert np.array_equal(got, picture[1::3, 1::3])


@pytest.mark.parametrize("view", VIEWS, ids=VIEW_NAMES)
def test_filter_of_the_draw_replaces_the_views(view):
    picture = photo(500, 300)
    shape = {"source_width": 500, "source_height": 300, "view": view}
    want = render(picture, resample="nearest", **shape)
    got = render(picture, resample="bicubic", draw=Draw(resample="nearest"), **shape)
    assert np.array_equal(got, want)
    assert not np.array_equal(render(picture, resample="bicubic", **shape), want)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (40, 30)])
def test_resize_gives_contiguous_rows_of_rgb_at_any_size(size):
    got = resize(photo(20, 30), *size)
    assert got.shape == (size[1], size[0], 3)
    assert got.dtype == np.uint8
    assert got.flags.c_contiguous


def test_resize_to_the_same_size_gives_the_picture_itself():
    picture = noise(20, 10)
    assert resize(picture, 20, 10) is picture


def test_resize_accepts_read_only_and_cut_pictures():
    picture = photo(200, 100)
    want = resize(picture[10:90, 20:180].copy(), 40, 20)
    picture.setflags(write=False)
    assert np.array_equal(resize(picture[10:90, 20:180], 40, 20), want)


# -------------------------------------------------------------------------------------- render


@pytest.mark.parametrize("view", VIEWS, ids=VIEW_NAMES)
@given(
    source=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    stored=st.tuples(st.integers(1, 120), st.integers(1, 120)),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=examples(25))
def test_render_gives_as_many_crops_as_the_tiling_counts_and_is_deterministic(
    view, source, stored, seed
):
    width, height = source
    change = draw(
        Augment.standard(),
        np.random.RandomState(seed),
        geometry=Geometry.ALL,
        width=width,
        height=height,
    )
    picture = noise(*stored)
    kept = picture.copy()
    kwargs = {"source_width": width, "source_height": height, "view": view, "draw": change}
    crops = render(picture, **kwargs)
    assert crops.shape == (num_crops(width, height, view), 56, 56, 3)
    assert crops.dtype == np.uint8
    assert crops.flags.c_contiguous
    assert np.array_equal(picture, kept)

    batch = np.full((len(crops) + 2, 56, 56, 3), 7, np.uint8)
    out = batch[1:-1]
    assert render(picture, **kwargs, out=out) is out
    assert np.array_equal(out, crops)
    assert np.all(batch[[0, -1]] == 7)


def test_stored_picture_of_the_canvas_size_is_copied_without_resizing(no_resizing):
    picture = noise(56, 56)
    crops = render(picture, source_width=640, source_height=480, view=SMALL)
    assert np.array_equal(crops[0], picture)
    assert not np.shares_memory(crops, picture)


def test_flip_and_color_of_a_stored_canvas_need_no_resizing(no_resizing):
    picture = noise(56, 56)
    change = Draw(flip=True, brightness=0.5)
    crops = render(picture, source_width=640, source_height=480, view=SMALL, draw=change)
    assert np.array_equal(crops[0], apply_color(picture[:, ::-1], change))


def test_whole_pad_and_center_canvases_need_no_resizing(no_resizing):
    width, height = 640, 480
    for view in (PADDED, CENTERED):
        picture = noise(*canvas_size(width, height, view))
        crop = render(picture, source_width=width, source_height=height, view=view)[0]
        if view is PADDED:
            assert picture.shape == (42, 56, 3)
            assert np.array_equal(crop[7:49], picture)
            assert not crop[:7].any()
            assert not crop[49:].any()
        else:
            assert picture.shape == (56, 74, 3)
            assert np.array_equal(crop, picture[:, 9:65])


def test_overview_is_the_whole_picture():
    picture = photo(300, 200)
    crops = render(picture, source_width=300, source_height=200, view=TILED)
    assert np.array_equal(crops[0], resize(picture, 56, 56))


@pytest.mark.parametrize("view", [TILED, PADDED_TILED], ids=["stretch", "pad"])
def test_stored_overview_takes_the_place_of_a_resized_one(view, no_resizing):
    size = {"source_width": 300, "source_height": 200, "view": view}
    picture = noise(*canvas_size(300, 200, view))
    overview = noise(*overview_size(300, 200, view), seed=1)
    top = (56 - len(overview)) // 2
    plain = render(picture, **size, overview=overview)
    assert np.array_equal(plain[0, top : top + len(overview)], overview)

    flipped = render(picture, **size, draw=Draw(flip=True), overview=overview)
    assert np.array_equal(flipped[0, top : top + len(overview)], overview[:, ::-1])

    change = Draw(contrast=0.3, hue=0.05)
    colored = render(picture, **size, draw=change, overview=overview)
    want = apply_color(plain, change, grey_mean=mean_grey(overview))
    shown = plain.any(axis=-1)  # all but the padding
    assert np.array_equal(colored[shown], want[shown])


@pytest.mark.parametrize(
    "change, shape",
    [(Draw(crop=(0, 0, 150, 200)), (56, 56)), (Draw(), (55, 56))],
    ids=["crop", "other size"],
)
def test_overview_is_resized_where_the_stored_one_does_not_serve(change, shape):
    size = {"source_width": 300, "source_height": 200, "view": TILED, "draw": change}
    picture = photo(300, 200)
    crops = render(picture, **size, overview=noise(*shape[::-1]))
    assert np.array_equal(crops, render(picture, **size))


@pytest.mark.parametrize("stored", [(300, 200), None], ids=["resized", "exact"])
def test_tiles_are_cut_from_the_resized_canvas(stored):
    width, height = 300, 200
    canvas = canvas_size(width, height, TILED)
    picture = photo(*(stored or canvas))
    resized = resize(picture, *canvas)
    crops = render(picture, source_width=width, source_height=height, view=TILED)
    boxes = crop_boxes(width, height, TILED)
    assert len(crops) == 1 + len(boxes) == 7
    for crop, (x0, y0, x1, y1) in zip(crops[1:], boxes, strict=True):
        assert np.array_equal(crop, resized[y0:y1, x0:x1])


def test_padded_tiles_are_cut_from_a_centred_canvas():
    width, height = 300, 70
    picture = noise(*canvas_size(width, height, PADDED_TILED))
    frame_width, frame_height = frame_size(width, height, PADDED_TILED)
    framed = np.zeros((frame_height, frame_width, 3), np.uint8)
    top = (frame_height - picture.shape[0]) // 2
    left = (frame_width - picture.shape[1]) // 2
    framed[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    assert top > 0

    crops = render(picture, source_width=width, source_height=height, view=PADDED_TILED)

    for crop, (x0, y0, x1, y1) in zip(
        crops[1:], crop_boxes(width, height, PADDED_TILED), strict=True
    ):
        assert np.array_equal(crop, framed[y0:y1, x0:x1])


@pytest.mark.parametrize("view", [PADDED, PADDED_TILED], ids=["resize", "tiled"])
@given(
    source=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    flip=st.booleans(),
    cropped=st.booleans(),
)
@settings(max_examples=examples(40))
def test_padding_lies_where_the_image_masks_say(view, source, flip, cropped):
    width, height = source
    change = Draw(
        flip=flip,
        crop=(0, 0, -(-width // 2), height) if cropped else None,
        contrast=0.5,
    )
    white = np.full((30, 40, 3), 255, np.uint8)
    crops = render(white, source_width=width, source_height=height, view=view, draw=change)
    assert set(np.unique(crops)) <= {0, 255}
    shares = (patchify(crops, view.patch_px) == 255).mean(axis=2, dtype=np.float64)
    assert np.array_equal(shares.astype(np.float32), image_masks(width, height, view))


def test_long_picture_is_centre_cropped_without_its_huge_canvas():
    picture = np.zeros((2, 20_000, 3), np.uint8)
    picture[:, 9_999:10_001] = 255
    crop = render(picture, source_width=20_000, source_height=2, view=CENTERED)[0]
    assert crop.shape == (56, 56, 3)
    assert crop.all()


def test_crop_box_is_scaled_to_the_stored_picture():
    picture = photo(100, 80)
    change = Draw(crop=(20, 40, 120, 160))
    crops = render(picture, source_width=200, source_height=160, view=SMALL, draw=change)
    assert np.array_equal(crops[0], resize(picture[20:80, 10:60], 56, 56))


def test_crop_takes_the_place_of_the_whole_picture_in_every_tile():
    picture = photo(300, 200)
    change = Draw(crop=(50, 20, 250, 180))
    kwargs = {"source_width": 300, "source_height": 200, "view": TILED}
    got = render(picture, **kwargs, draw=change)
    want = render(picture[20:180, 50:250].copy(), **kwargs)
    assert np.array_equal(got, want)


def test_flip_of_tiles_flips_the_picture_and_not_each_tile():
    picture = noise(*canvas_size(300, 200, TILED))
    kwargs = {"source_width": 300, "source_height": 200, "view": TILED}
    got = render(picture, **kwargs, draw=Draw(flip=True))
    want = render(picture[:, ::-1].copy(), **kwargs)
    assert np.array_equal(got[1:], want[1:])


def test_color_has_one_mean_for_overview_and_tiles():
    picture = photo(300, 200)
    kwargs = {"source_width": 300, "source_height": 200, "view": TILED}
    plain = render(picture, **kwargs)
    change = Draw(contrast=0.3, hue=0.05)
    want = apply_color(plain, change, grey_mean=mean_grey(plain[0]))
    assert np.array_equal(render(picture, **kwargs, draw=change), want)


@given(x=st.integers(0, 27), y=st.integers(0, 27), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=examples(60))
def test_points_stay_on_their_pixels_through_rendering(x, y, seed):
    # Each source pixel is 2 x 2 canvas pixels before the crop, more after it.
    picture = np.zeros((28, 28, 3), np.uint8)
    picture[y, x] = 255
    change = draw(
        Augment(crop_scale=(0.3, 1.0), flip_probability=0.5),
        np.random.RandomState(seed),
        geometry=Geometry.ALL,
        width=28,
        height=28,
    )
    moved, inside = transform_points(np.array([[x + 0.5, y + 0.5]]), change, width=28, height=28)
    crop = render(picture, source_width=28, source_height=28, view=SMALL, draw=change)[0]
    assert bool(crop.any()) == bool(inside[0])
    if inside[0]:
        light = crop[..., 0].astype(float)
        light[light < light.max() / 2] = 0
        rows, columns = np.nonzero(light)
        scale = 56 / 28
        # The middle of the bright spot, except where the border cuts the spot's halo.
        assert abs(columns.mean() + 0.5 - moved[0, 0] * scale) <= 1
        assert abs(rows.mean() + 0.5 - moved[0, 1] * scale) <= 1


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ],
    ids=["grey", "rgba", "float", "empty"],
)
def test_anything_but_rgb_bytes_is_refused(picture):
    with pytest.raises(SampleError) as error:
        render(picture, source_width=4, source_height=4, view=SMALL)
    assert error.value.reason == "image_pixels"


@pytest.mark.parametrize(
    "out",
    [np.empty((2, 56, 56, 3), np.uint8), np.empty((1, 56, 56, 3), np.float32)],
    ids=["shape", "type"],
)
def test_buffer_that_does_not_fit_is_refused(out):
    with pytest.raises(ConfigError) as error:
        render(noise(8, 8), source_width=8, source_height=8, view=SMALL, out=out)
    assert error.value.reason == "render_out"
    assert error.value.facts["want"] == "uint8 [1, 56, 56, 3]"


def test_crop_that_reaches_out_of_the_source_is_refused():
    change = Draw(crop=(0, 0, 9, 8))
    with pytest.raises(ConfigError) as error:
        render(noise(8, 8), source_width=8, source_height=8, view=SMALL, draw=change)
    assert error.value.reason == "draw_box"


# -------------------------------------------------------------------------- patches and values


def test_patches_hold_their_pixels_row_by_row_with_channels_last():
    crops = np.arange(2 * 6 * 6 * 3).reshape(2, 6, 6, 3)
    patches = patchify(crops, 2)
    assert patches.shape == (2, 9, 12)
    for num in range(2):
        for patch in range(9):
            y, x = 2 * (patch // 3), 2 * (patch % 3)
            want = crops[num, y : y + 2, x : x + 2].ravel()
            assert np.array_equal(patches[num, patch], want)


def test_patchify_treats_tensors_as_arrays():
    crops = noise(28, 28)[None]
    assert np.array_equal(patchify(torch.from_numpy(crops), 14).numpy(), patchify(crops, 14))


@pytest.mark.parametrize("kind", sorted(MEAN_STD))
def test_normalize_is_the_formula_to_a_few_units_in_the_last_place(kind):
    ramp = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    mean, std = (np.array(part) for part in MEAN_STD[kind])
    want = (ramp / 255 - mean) / std
    got = normalize(ramp, kind=kind)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_siglip_range_is_minus_one_to_one_exactly():
    ends = np.array([[[0, 255, 0]]], np.uint8)
    assert normalize(ends, kind="siglip").tolist() == [[[-1.0, 1.0, -1.0]]]


def test_normalize_of_a_batch_equals_that_of_its_crops_and_keeps_the_memory_order():
    crops = np.stack([noise(8, 8, seed) for seed in range(6)]).reshape(2, 3, 8, 8, 3)
    batch = torch.from_numpy(crops).permute(0, 1, 4, 2, 3)
    got = normalize(batch, kind="openai")
    assert got.dtype == torch.float32
    assert got.stride() == batch.stride()
    want = normalize(crops, kind="openai")
    np.testing.assert_allclose(got.permute(0, 1, 3, 4, 2).numpy(), want, rtol=0, atol=1e-6)
    assert batch.dtype == torch.uint8


def test_normalize_leaves_float_inputs_as_they_were():
    images = torch.full((3, 2, 2), 255.0)
    normalize(images, kind="siglip")
    assert torch.all(images == 255.0)


def test_unknown_normalization_offers_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean 'imagenet'") as error:
        normalize(noise(2, 2), kind="imagnet")
    assert error.value.reason == "normalization"


def test_scaled_ranges_cover_a_line_without_gaps():
    for to in (1, 3, 7, 20):
        borders = [0, 2, 5, 9, 11]
        parts = [
            pixels_module._scaled(a, b, of=11, to=to)
            for a, b in zip(borders, borders[1:], strict=False)
        ]
        assert parts[0].start == 0
        assert parts[-1].stop == to
        assert all(part.start < part.stop <= to for part in parts)
        if to >= 11:
            assert [p.stop for p in parts[:-1]] == [p.start for p in parts[1:]]


@pytest.mark.parametrize("size, reduced", [((1344, 1008), 2), ((672, 800), 2), ((672, 801), 1)])
def test_reduced_decoding_keeps_40_db_where_the_view_needs_no_more(size, reduced, monkeypatch):
    scene = Image.fromarray(make_scene(1, 3).pixels).resize(size)
    payload = memoryview(encode_stored(np.asarray(scene), codec="jpeg", quality=95))
    asked = []
    decode = pixels_module.decode_stored

    def noted(*args, **options):
        asked.append(options["reduce"])
        return decode(*args, **options)

    monkeypatch.setattr(pixels_module, "decode_stored", noted)
    made = [
        render(
            Encoded(payload, codec="jpeg", width=size[0], height=size[1]),
            source_width=size[0],
            source_height=size[1],
            view=ImageView(),
            reduced=choice,
        )
        for choice in (False, True)
    ]
    assert asked == [1, reduced]
    error = np.mean((made[0].astype(float) - made[1]) ** 2)
    assert error < 255**2 / 10**4


def test_crop_is_cut_out_of_the_whole_picture():
    payload = memoryview(encode_stored(np.zeros((672, 672, 3), np.uint8), codec="jpeg"))
    picture = Encoded(payload, codec="jpeg", width=672, height=672)
    crop = Draw(crop=(0, 0, 336, 336))
    shape = {"source_width": 672, "source_height": 672, "view": ImageView()}
    want = render(decode_stored(payload, codec="jpeg"), draw=crop, **shape)
    assert np.array_equal(render(picture, draw=crop, reduced=True, **shape), want)
