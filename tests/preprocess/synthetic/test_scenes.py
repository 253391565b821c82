"""The scene generator: same index, same scene; and every text is true of its picture."""

import functools
import hashlib
import io
import itertools
import math
import re
import statistics
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from preprocess.synthetic.scenes import (
    BACKGROUNDS,
    COLORS,
    LIGHTS,
    MIN_SIDE_PX,
    NUMBERS,
    SHAPES,
    SIZES,
    TEXTURES,
    make_scene,
    plan_scene,
    render,
)
from shardspec.errors import ConfigError
from tests.examples import examples

SIDE_WORDS = re.compile(r"\b(left|right)\b")
RELATION = re.compile(
    r"[Tt]he (\w+ \w+) is (to the left of|to the right of|above|below|in front of) the (\w+ \w+)"
)
SIZE_WORDS = {"small": "small", "little": "small", "large": "large", "big": "large"}
THING = re.compile(
    rf"\b(?P<number>an?|{'|'.join(NUMBERS[2:])}) "
    rf"(?:(?P<size>{'|'.join(SIZE_WORDS)}) )?(?P<color>{'|'.join(COLORS)}) "
    rf"(?:(?P<texture>{'|'.join(TEXTURES)}) )?(?P<shape>{'|'.join(SHAPES)})(?:e?s)?\b"
    r"(?: (?:can be (?:found|seen) )?(?P<where>(?:in|on|at|near) [a-z ]+))?",
    re.IGNORECASE,
)


@functools.cache
def plans():
    return [plan_scene(11, idx) for idx in range(300)]


def fingerprint(scene):
    text = "\n".join([scene.caption, *scene.transcripts, repr(scene.objects)])
    return hashlib.sha256(scene.pixels.tobytes() + text.encode()).hexdigest()


def texts(plan):
    return (plan.caption, *plan.transcripts)


def mask(plan, thing):
    """Bool [H, W] of the whole shape, drawn from its outline, hidden parts included."""
    image = Image.new("L", (plan.width_px, plan.height_px))
    ImageDraw.Draw(image).polygon(thing.outline_px.ravel().tolist(), fill=1)
    return np.asarray(image, bool)


def nearest_color(pixels, thing):
    """Names the palette colour nearest to the mean of the 3 by 3 pixels at the centre."""
    x, y = thing.center_px
    patch = pixels[y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3).mean(axis=0)
    return min(COLORS, key=lambda name: math.dist(patch, COLORS[name]))


def test_scene_is_the_same_in_a_fresh_process():
    code = (
        "from preprocess.synthetic.scenes import make_scene; import hashlib\n"
        "for idx in (0, 5):\n"
        "    s = make_scene(3, idx, max_side_px=320)\n"
        "    text = '\\n'.join([s.caption, *s.transcripts, repr(s.objects)])\n"
        "    print(hashlib.sha256(s.pixels.tobytes() + text.encode()).hexdigest())\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    want = [fingerprint(make_scene(3, idx, max_side_px=320)) for idx in (5, 0)]
    assert run.stdout.split() == want[::-1]


def test_planning_draws_no_global_random_numbers():
    before = np.random.get_state()[1].tobytes()
    make_scene(0, 0, max_side_px=200)
    assert np.random.get_state()[1].tobytes() == before


def test_every_index_and_every_seed_gives_another_scene():
    scenes = [make_scene(seed, idx, max_side_px=160) for seed in (0, 1) for idx in range(20)]
    assert len({scene.pixels.tobytes() for scene in scenes}) == 40
    assert len({scene.caption for scene in scenes}) == 40


@settings(max_examples=examples(40), deadline=None)
@given(seed=st.integers(), idx=st.integers(), max_side_px=st.integers(MIN_SIDE_PX, 700))
@example(seed=-1, idx=2**70, max_side_px=MIN_SIDE_PX)
def test_any_index_and_cap_give_a_sound_picture(seed, idx, max_side_px):
    plan = plan_scene(seed, idx, max_side_px=max_side_px)
    pixels = render(plan)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.shape == (plan.height_px, plan.width_px, 3)
    assert max(pixels.shape) <= max_side_px
    assert 1 <= len(plan.objects) <= 9
    assert 1 <= len(plan.transcripts) <= 3
    for thing in plan.objects:
        x0, y0, x1, y1 = thing.box_px
        assert 0 <= x0 < thing.center_px[0] < x1 <= plan.width_px
        assert 0 <= y0 < thing.center_px[1] < y1 <= plan.height_px
        assert nearest_color(pixels, thing) == thing.color


def test_make_scene_is_the_plan_and_its_picture():
    plan, scene = plan_scene(2, 9, max_side_px=300), make_scene(2, 9, max_side_px=300)
    assert np.array_equal(scene.pixels, render(plan))
    assert (scene.caption, scene.transcripts) == (plan.caption, plan.transcripts)
    assert scene.objects == plan.objects


def test_cap_below_the_least_is_refused():
    with pytest.raises(ConfigError) as caught:
        plan_scene(0, 0, max_side_px=MIN_SIDE_PX - 1)
    assert caught.value.reason == "scene_size"
    assert caught.value.facts["got"] == MIN_SIDE_PX - 1


def test_colour_at_every_centre_is_the_named_one_in_full_size_pictures():
    for plan in plans()[:12]:
        pixels = render(plan)
        for thing in plan.objects:
            assert nearest_color(pixels, thing) == thing.color, thing


def test_box_is_tight_around_the_shape():
    for plan in plans()[:60]:
        for thing in plan.objects:
            ys, xs = np.nonzero(mask(plan, thing))
            drawn = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            assert np.abs(np.subtract(drawn, thing.box_px)).max() <= 1


def test_shapes_overlap_only_where_one_is_said_to_cover_the_other_and_hide_little():
    seen = 0
    for plan in plans()[:120]:
        masks = [mask(plan, thing) for thing in plan.objects]
        for back, front in itertools.combinations(range(len(masks)), 2):
            shared = (masks[back] & masks[front]).sum()
            if (front, back) in plan.covers:
                seen += 1
                assert 0 < shared < 0.5 * masks[back].sum()
                x, y = plan.objects[back].center_px
                assert not masks[front][y, x]
            else:
                assert shared == 0
    assert seen >= 20


def test_covering_shape_is_painted_over_the_covered_one():
    seen = 0
    for plan in plans():
        for front, back in plan.covers:
            near, far = plan.objects[front], plan.objects[back]
            if seen == 12 or {near.texture, far.texture} != {"plain"}:
                continue
            seen += 1
            both = mask(plan, near) & mask(plan, far)
            seen_color = np.median(render(plan)[both], axis=0)
            assert math.dist(seen_color, COLORS[near.color]) < math.dist(
                seen_color, COLORS[far.color]
            )
    assert seen >= 5


def test_textures_show_two_tones_and_plain_shapes_one():
    spread = {texture: [] for texture in TEXTURES}
    for plan in plans()[:25]:
        gray = np.asarray(Image.fromarray(render(plan)).convert("L"), np.float32)
        for thing in plan.objects:
            (x, y), reach = thing.center_px, max(3, int(thing.radius_px * 0.3))
            patch = gray[y - reach : y + reach + 1, x - reach : x + reach + 1]
            spread[thing.texture].append(patch.std() / patch.mean())
    for texture in ("striped", "dotted", "checkered"):
        assert statistics.median(spread[texture]) > 2 * statistics.median(spread["plain"]), texture


def test_size_names_the_share_of_the_short_side():
    for plan in plans():
        for thing in plan.objects:
            low, high = SIZES[thing.size]
            assert low <= thing.radius_px / min(plan.width_px, plan.height_px) <= high


def test_colour_and_shape_name_one_kind_per_scene():
    for plan in plans():
        labels = {(thing.color, thing.shape): thing.label for thing in plan.objects}
        assert all(labels[thing.color, thing.shape] == thing.label for thing in plan.objects)


def test_every_text_names_every_kind_once_with_its_true_number_size_and_place():
    for plan in plans():
        for text in texts(plan):
            named = []
            for match in THING.finditer(text):
                label = " ".join(filter(None, match.group("color", "texture", "shape")))
                kind = [thing for thing in plan.objects if thing.label == label]
                number = match["number"].lower()
                assert len(kind) == (1 if number in ("a", "an") else NUMBERS.index(number)), text
                assert {SIZE_WORDS.get(match["size"], "medium")} == {t.size for t in kind}, text
                assert_place(plan, kind, match["where"] or "")
                named.append(label)
            assert sorted(named) == sorted({thing.label for thing in plan.objects}), text


def assert_place(plan, kind, where):
    for thing in kind:
        u, v = thing.center_px[0] / plan.width_px, thing.center_px[1] / plan.height_px
        if re.search(r"\b(upper|top)\b", where):
            assert v < 1 / 3
        if re.search(r"\b(lower|bottom)\b", where):
            assert v >= 2 / 3
        if re.search(r"\b(half height|in the center|side)\b", where):
            assert 1 / 3 <= v < 2 / 3
        if "left" in where:
            assert u < 1 / 3
        if "right" in where:
            assert u >= 2 / 3
        if "center" in where:
            assert 1 / 3 <= u < 2 / 3


def test_places_put_first_in_a_sentence_are_true_too():
    seen = 0
    for plan in plans():
        for match in re.finditer(r"([A-Z][a-z ]+?) lies? (\w+ [a-z ]+)\.", plan.caption):
            thing = THING.match(match[2])
            label = " ".join(filter(None, thing.group("color", "texture", "shape")))
            assert_place(plan, [t for t in plan.objects if t.label == label], match[1].lower())
            seen += 1
    assert seen > 100


def test_totals_are_the_number_of_objects():
    for plan in plans():
        total = len(plan.objects)
        word = "a single shape" if total == 1 else f"{NUMBERS[total]} shapes"
        assert word in plan.caption.split(".")[0]
        for text in plan.transcripts:
            for number in re.findall(r"So (?:just )?(\w+) things?", text):
                assert NUMBERS.index(number) == total


def test_relations_hold_between_the_objects():
    seen = dict.fromkeys(("to the left of", "to the right of", "above", "below", "in front of"), 0)
    for plan in plans():
        for text in texts(plan):
            for first, relation, second in RELATION.findall(text):
                a, b = (
                    [t for t in plan.objects if f"{t.color} {t.shape}" == name]
                    for name in (first, second)
                )
                assert len(a) == len(b) == 1
                (ax, ay), (bx, by) = a[0].center_px, b[0].center_px
                order = plan.objects.index(a[0]), plan.objects.index(b[0])
                assert {
                    "to the left of": ax < bx,
                    "to the right of": ax > bx,
                    "above": ay < by,
                    "below": ay > by,
                    "in front of": order in plan.covers,
                }[relation], text
                seen[relation] += 1
    assert min(seen.values()) > 20, seen


def test_about_half_of_the_scenes_speak_of_sides_and_the_others_never_do():
    told = [bool(SIDE_WORDS.search(" ".join(texts(plan)))) for plan in plans()]
    in_caption = [bool(SIDE_WORDS.search(plan.caption)) for plan in plans()]
    assert 0.4 < statistics.mean(told) < 0.6
    assert 0.35 < statistics.mean(in_caption) < 0.6


def test_told_light_is_the_light_and_shadows_fall_away_from_it():
    for plan in plans():
        for text in texts(plan):
            for word in re.findall(r"comes from (?:the )?(\w+)|coming from the (\w+)", text):
                assert "".join(word).replace("top", "above") == plan.light
    seen = set()
    for plan in plans()[:40]:
        # The cloth is even enough to compare its brightness on both sides of a shape.
        thing = plan.objects[0]
        if plan.background.phrase != "a gray woven cloth" or len(plan.objects) > 1:
            continue
        gray = np.asarray(Image.fromarray(render(plan)).convert("L"), np.float32)
        x0, y0, x1, y1 = thing.box_px
        gap = max(2, int(thing.radius_px * 0.12))
        dx, dy = LIGHTS[plan.light]
        if dx:
            sides = gray[y0:y1, max(0, x0 - gap) : x0].mean(), gray[y0:y1, x1 : x1 + gap].mean()
            assert (sides[0] > sides[1]) == (dx > 0)
        else:
            assert gray[max(0, y0 - gap) : y0, x0:x1].mean() > gray[y1 : y1 + gap, x0:x1].mean()
        seen.add(plan.light)
    assert seen


def test_frame_words_fit_the_shape_of_the_picture():
    frames = set()
    for plan in plans():
        frame = re.search(r"\b((?:very )?(?:wide|tall)|square) (?:picture|image)", plan.caption)[1]
        ratio = plan.width_px / plan.height_px
        assert frame.endswith("square" if ratio == 1 else "wide" if ratio > 1 else "tall")
        assert frame.startswith("very") == (max(ratio, 1 / ratio) > 2)
        frames.add(frame)
    assert frames == {"square", "wide", "tall", "very wide", "very tall"}


def test_captions_are_long_plain_english_and_transcripts_differ():
    for plan in plans():
        assert 40 <= len(plan.caption.split()) <= 140
        assert plan.background.phrase in plan.caption
        assert len(set(plan.transcripts)) == len(plan.transcripts)
        assert len({tuple(text.split()[:4]) for text in texts(plan)}) == len(texts(plan))
        for text in texts(plan):
            assert not re.search(
                r"[{}]|sss|  | \.|\.\.|\ban? [a-z]+s\b(?<!cross)|\ba [aeiou]", text
            ), text
            assert all(s[0].isupper() for s in re.split(r"(?<=\.) ", text)), text
            assert text.endswith(".")


def test_sizes_and_backgrounds_are_varied():
    longest = [max(plan.width_px, plan.height_px) for plan in plans()]
    assert min(longest) < 520
    assert max(longest) == 1280
    assert (
        max(
            max(p.width_px, p.height_px)
            for p in (plan_scene(1, i, max_side_px=2000) for i in range(99))
        )
        > 1500
    )
    assert {plan.background.phrase for plan in plans()} == {b.phrase for b in BACKGROUNDS}
    assert {thing.shape for plan in plans() for thing in plan.objects} == set(SHAPES)
    assert {thing.color for plan in plans() for thing in plan.objects} == set(COLORS)


def test_jpeg_sizes_are_those_of_photographs():
    crops, bits_per_pixel = [], []
    for plan in plans()[:20]:
        image = Image.fromarray(render(plan))
        crops.append(jpeg_bytes(image.resize((336, 336), Image.Resampling.LANCZOS)))
        bits_per_pixel.append(8 * jpeg_bytes(image) / (image.width * image.height))
    assert 30_000 < statistics.median(crops) < 65_000
    assert 2.5 < statistics.median(bits_per_pixel) < 5  # 0.3 to 0.6 MB a megapixel


def jpeg_bytes(image):
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=95, subsampling=0)
    return stream.tell()
