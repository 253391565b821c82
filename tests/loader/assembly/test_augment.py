import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from loader.assembly import augment as augment_module
from loader.assembly.augment import (
    NUM_DRAWS,
    Augment,
    Draw,
    apply_color,
    draw,
    draw_filter,
    mean_grey,
    transform_points,
)
from shardspec.errors import ConfigError
from shardspec.sample import Geometry
from tests.examples import examples

SIZE = {"width": 640, "height": 480}
STRONG = Augment(
    crop_scale=(0.1, 0.9),
    flip_probability=0.5,
    brightness=1.0,
    contrast=1.0,
    saturation=1.0,
    hue=0.5,
)

seeds = st.integers(0, 2**32 - 1)
sides = st.integers(1, 2000)
factors = st.floats(0, 2)
colors = st.builds(
    Draw, brightness=factors, contrast=factors, saturation=factors, hue=st.floats(-0.5, 0.5)
)


def rng(seed=0):
    return np.random.RandomState(seed)


def noise(height, width, seed=0):
    return rng(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


# ------------------------------------------------------------------------------------- drawing


@given(seed=seeds, width=sides, height=sides)
def test_default_settings_change_nothing(seed, width, height):
    got = draw(Augment(), rng(seed), geometry=Geometry.ALL, width=width, height=height)
    assert got == Draw()
    assert not got.changes_color


@given(
    seed=seeds,
    geometry=st.sampled_from([Geometry(flags) for flags in range(8)]),
    augment=st.sampled_from([Augment(), Augment.standard(), STRONG]),
    width=sides,
    height=sides,
)
def test_every_draw_takes_the_same_count_of_numbers(seed, geometry, augment, width, height):
    generator, other = rng(seed), rng(seed)
    draw(augment, generator, geometry=geometry, width=width, height=height)
    other.random_sample(NUM_DRAWS)
    assert generator.random_sample() == other.random_sample()


@given(seed=seeds)
def test_each_flag_lets_its_own_change_through_and_shifts_no_other(seed):
    whole = draw(STRONG, rng(seed), geometry=Geometry.ALL, **SIZE)
    none = draw(STRONG, rng(seed), geometry=Geometry.NONE, **SIZE)
    crop = draw(STRONG, rng(seed), geometry=Geometry.CROP, **SIZE)
    flip = draw(STRONG, rng(seed), geometry=Geometry.FLIP, **SIZE)
    color = draw(STRONG, rng(seed), geometry=Geometry.COLOR, **SIZE)
    assert none == Draw()
    assert crop == Draw(crop=whole.crop)
    assert flip == Draw(flip=whole.flip)
    assert (color.crop, color.flip) == (None, False)
    for name in ("brightness", "contrast", "saturation", "hue"):
        assert getattr(color, name) == getattr(whole, name)


def test_draw_of_a_seed_is_frozen():
    got = draw(Augment.standard(), rng(42), geometry=Geometry.ALL, **SIZE)
    # RandomState(42) begins 0.3745, 0.9507, 0.7320, 0.5987, 0.1560, 0.1560, 0.0581, 0.8662, 0.6011.
    assert (got.crop, got.flip) == ((32, 18, 629, 468), True)
    assert got.brightness == pytest.approx(0.8 + 0.4 * 0.15599452, abs=1e-8)
    assert got.contrast == pytest.approx(0.8 + 0.4 * 0.05808361, abs=1e-8)
    assert got.saturation == pytest.approx(0.8 + 0.4 * 0.86617615, abs=1e-8)
    assert got.hue == pytest.approx(-0.05 + 0.1 * 0.60111501, abs=1e-8)


@given(seed=seeds, width=sides, height=sides, least=st.floats(0.01, 1), most=st.floats(0.01, 1))
def test_crop_lies_inside_and_keeps_the_drawn_share_of_the_area(seed, width, height, least, most):
    scale = (min(least, most), max(least, most))
    got = draw(
        Augment(crop_scale=scale), rng(seed), geometry=Geometry.ALL, width=width, height=height
    )
    left, top, right, bottom = got.crop or (0, 0, width, height)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    box_width, box_height = right - left, bottom - top
    # Rounding moves each side by half a pixel at most, or up to the one pixel that is the least.
    low = (box_width - 0.5) * (box_height - 0.5)
    high = (box_width + 0.5) * (box_height + 0.5)
    assert low <= scale[1] * width * height * (1 + 1e-9) or 1 in (box_width, box_height)
    assert high >= scale[0] * width * height * (1 - 1e-9)


@given(seed=seeds, share=st.floats(0.01, 0.5))
def test_crop_keeps_the_ratio_where_such_a_box_fits(seed, share):
    augment = Augment(crop_scale=(share, share), crop_ratio=(0.75, 4 / 3))
    left, top, right, bottom = draw(
        augment, rng(seed), geometry=Geometry.CROP, width=1000, height=1000
    ).crop
    assert (right - left - 0.5) / (bottom - top + 0.5) <= 4 / 3
    assert (right - left + 0.5) / (bottom - top - 0.5) >= 0.75


def test_crop_of_a_long_picture_gives_up_the_ratio_and_keeps_the_area():
    augment = Augment(crop_scale=(0.5, 0.5), crop_ratio=(1.0, 1.0))
    got = draw(augment, rng(), geometry=Geometry.CROP, width=1000, height=100).crop
    assert (got[2] - got[0], got[3] - got[1]) == (500, 100)


def test_crops_reach_every_border():
    augment = Augment(crop_scale=(0.5, 0.5), crop_ratio=(1.0, 1.0))
    crops = [
        draw(augment, rng(seed), geometry=Geometry.CROP, width=8, height=8).crop
        for seed in range(200)
    ]
    assert {box[:2] for box in crops} == {(x, y) for x in range(3) for y in range(3)}


@pytest.mark.parametrize(("probability", "want"), [(0.0, 0), (1.0, 100)])
def test_flip_probability_zero_and_one_are_certain(probability, want):
    augment = Augment(flip_probability=probability)
    flips = [draw(augment, rng(seed), geometry=Geometry.ALL, **SIZE).flip for seed in range(100)]
    assert sum(flips) == want


def test_color_factors_fill_their_ranges():
    augment = Augment(brightness=0.2, contrast=0.4, saturation=1.0, hue=0.1)
    draws = [draw(augment, rng(seed), geometry=Geometry.COLOR, **SIZE) for seed in range(400)]
    for name, low, high in (
        ("brightness", 0.8, 1.2),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.0, 2.0),
        ("hue", -0.1, 0.1),
    ):
        values = [getattr(d, name) for d in draws]
        assert low <= min(values) < low + 0.03 * (high - low)
        assert high - 0.03 * (high - low) < max(values) <= high


def test_settings_out_of_range_are_all_named():
    with pytest.raises(ConfigError) as error:
        Augment(crop_scale=(0.0, 1.5), flip_probability=2, brightness=-0.1, hue=0.6)
    assert error.value.reason == "augment_range"
    assert set(error.value.facts) == {"crop_scale", "flip_probability", "brightness", "hue"}


@pytest.mark.parametrize(
    "settings_",
    [
        {"crop_ratio": (2.0, 1.0)},
        {"crop_ratio": (0.0, 1.0)},
        {"hue": float("nan")},
        {"resample": ("bicubic", "lanczos")},
    ],
    ids=["reversed", "zero", "nan", "unknown"],
)
def test_impossible_setting_is_refused(settings_):
    with pytest.raises(ConfigError, match=next(iter(settings_))):
        Augment(**settings_)


def test_filter_is_drawn_evenly_and_only_where_there_is_a_choice():
    choices = ("bicubic", "bilinear", "nearest")
    rng = np.random.RandomState(5)
    counts = Counter(draw_filter(Augment(resample=choices), rng) for _ in range(3000))
    assert set(counts) == set(choices)
    assert all(900 < n < 1100 for n in counts.values())
    before = rng.get_state()[2]
    assert draw_filter(Augment(), rng) is None
    assert draw_filter(Augment(resample=("nearest",)), rng) == "nearest"
    assert rng.get_state()[2] == before


# -------------------------------------------------------------------------------------- colour


def test_identity_draw_gives_an_equal_copy():
    pixels = noise(5, 7)
    got = apply_color(pixels, Draw(flip=True))
    assert np.array_equal(got, pixels)
    assert not np.shares_memory(got, pixels)


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.5, 2.0])
def test_brightness_scales_and_clips_exactly(factor):
    ramp = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    want = np.clip(np.round(ramp * factor), 0, 255)
    assert np.array_equal(apply_color(ramp, Draw(brightness=factor)), want)


def test_zero_contrast_gives_the_mean_grey_everywhere():
    pixels = noise(20, 30)
    got = apply_color(pixels, Draw(contrast=0.0))
    assert np.all(got == round(mean_grey(pixels)))


def test_given_mean_replaces_the_measured_one():
    got = apply_color(noise(4, 4), Draw(contrast=0.0), grey_mean=17.0)
    assert np.all(got == 17)


@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0, 1.3, 2.0])
@pytest.mark.parametrize(
    ("name", "enhancer"),
    [
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ],
)
def test_each_change_agrees_with_pillow(name, enhancer, factor):
    pixels = noise(32, 48)
    want = np.asarray(enhancer(Image.fromarray(pixels)).enhance(factor)).astype(int)
    got = apply_color(pixels, Draw(**{name: factor})).astype(int)
    # Pillow truncates where we round, and rounds the greys that it blends with.
    assert np.abs(got - want).max() <= 1


def test_positive_hue_takes_red_to_green_and_green_to_blue():
    primaries = np.eye(3, dtype=np.uint8)[None] * 200
    got = apply_color(primaries, Draw(hue=1 / 3))
    assert got.argmax(axis=-1).tolist() == [[1, 2, 0]]


def test_hue_keeps_luma():
    pixels = (96 + noise(16, 16) // 4).astype(np.uint8)
    got = apply_color(pixels, Draw(hue=0.3))
    luma = np.array([0.299, 0.587, 0.114])
    assert np.abs(got @ luma - pixels @ luma).max() < 1


@given(saturation=factors, hue=st.floats(-0.5, 0.5))
def test_grey_stays_as_it_is_under_saturation_and_hue(saturation, hue):
    ramp = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    assert np.array_equal(apply_color(ramp, Draw(saturation=saturation, hue=hue)), ramp)


@given(change=colors, seed=seeds)
@settings(max_examples=examples(50))
def test_one_pass_equals_the_four_steps_without_clipping_between(change, seed):
    pixels = noise(9, 11, seed)
    luma = np.array([0.299, 0.587, 0.114])
    steps = pixels.astype(float) * change.brightness
    steps = change.contrast * steps + (1 - change.contrast) * (steps @ luma).mean()
    steps = change.saturation * steps + (1 - change.saturation) * (steps @ luma)[..., None]
    grey = steps @ luma
    u, v = 0.493 * (steps[..., 2] - grey), 0.877 * (steps[..., 0] - grey)
    turned = (u + 1j * v) * np.exp(2j * np.pi * change.hue)
    red, blue = grey + turned.imag / 0.877, grey + turned.real / 0.493
    green = (grey - 0.299 * red - 0.114 * blue) / 0.587
    want = np.clip(np.stack([red, green, blue], axis=-1), 0, 255)
    # Half a level for rounding, 0.19 for the grid of the matrix.
    assert np.abs(apply_color(pixels, change) - want).max() < 0.7


@given(change=colors, seed=seeds)
@settings(max_examples=examples(25))
def test_float_arithmetic_is_exact(change, seed):
    pixels = noise(3, 11000, seed)  # one full pass, and a tail that is no multiple of the group
    matrix, offset = augment_module._color_map(change, mean_grey(pixels))
    scale = 2**11
    whole = (matrix * scale).astype(np.int64), int(offset * scale)
    assert np.array_equal(whole[0] / scale, matrix)
    sums = pixels.astype(np.int64) @ whole[0].T + whole[1]
    assert np.array_equal(
        apply_color(pixels, change), np.clip(np.round(sums / scale), 0, 255).astype(np.uint8)
    )


def test_strongest_change_stays_within_the_bits_of_a_float32():
    largest = 0.0
    for hue in np.linspace(-0.5, 0.5, 101):
        for saturation in (0.0, 1.0, 2.0):
            change = Draw(brightness=2.0, contrast=2.0, saturation=saturation, hue=hue)
            matrix, offset = augment_module._color_map(change, 255.0)
            largest = max(largest, 255 * np.abs(matrix).sum(axis=1).max() + abs(offset))
    assert largest < 2**13


def test_color_accepts_read_only_views_and_leading_axes():
    pixels = noise(8, 6)
    crops = np.stack([pixels, pixels])[:, :, ::2]
    crops.setflags(write=False)
    change = Draw(brightness=1.2, saturation=0.5)
    got = apply_color(crops, change)
    assert np.array_equal(got[1], apply_color(pixels[:, ::2].copy(), change))


def test_mean_grey_is_exact():
    pixels = noise(37, 41)
    sums = pixels.reshape(-1, 3).astype(np.int64).sum(axis=0)
    assert mean_grey(pixels) == int(sums @ [299, 587, 114]) / (1000 * 37 * 41)


# -------------------------------------------------------------------------------------- points


@given(seed=seeds, width=st.integers(2, 60), height=st.integers(2, 60), point=seeds)
def test_points_stay_on_their_pixels(seed, width, height, point):
    change = draw(
        STRONG, rng(seed), geometry=Geometry.CROP | Geometry.FLIP, width=width, height=height
    )
    x, y = point % width, (point // width) % height
    picture = np.zeros((height, width), bool)
    picture[y, x] = True
    left, top, right, bottom = change.crop or (0, 0, width, height)
    seen = picture[top:bottom, left:right]
    if change.flip:
        seen = seen[:, ::-1]

    moved, inside = transform_points(
        np.array([[x + 0.5, y + 0.5]]), change, width=width, height=height
    )

    assert inside.tolist() == [bool(seen.any())]
    if inside[0]:
        column = moved[0, 0] / width * seen.shape[1]
        row = moved[0, 1] / height * seen.shape[0]
        assert seen[int(row), int(column)]
        assert (column, row) == pytest.approx((int(column) + 0.5, int(row) + 0.5))


def test_flip_mirrors_points_exactly():
    points = np.array([[0, 10], [640, 20], [100.5, 30]])
    moved, inside = transform_points(points, Draw(flip=True), **SIZE)
    assert moved.tolist() == [[640, 10], [0, 20], [539.5, 30]]
    assert inside.all()


def test_points_outside_the_crop_are_reported():
    change = Draw(crop=(100, 100, 420, 340))
    moved, inside = transform_points(
        np.array([[100, 100], [420, 340], [99, 200], [200, 341]]), change, **SIZE
    )
    assert inside.tolist() == [True, True, False, False]
    assert moved.tolist()[:3] == [[0, 0], [640, 480], [-2, 200]]


def test_no_points_give_no_points():
    moved, inside = transform_points(np.empty((0, 2)), Draw(flip=True), **SIZE)
    assert moved.shape == (0, 2)
    assert inside.shape == (0,)


def test_message_of_a_wrong_setting_says_what_to_do():
    with pytest.raises(ConfigError, match=re.escape("0 to 0.5 for hue")):
        Augment(hue=1.0)
