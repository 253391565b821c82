"""Draws procedural scenes: the rows of `SOURCE=sample`, so that any dataset can be tried offline.

A scene is a picture of simple shapes on a textured background, with texts that are true of it.

1. `plan_scene` draws size, background, light and objects, and words them. No pixels: about 2 ms.
2. `render` paints a plan: material textures, soft shadows, shaded shapes, blur, sensor noise.

Both are pure functions of (seed, idx) and the size cap. Every statement of a text is read off the
final objects, in pixels. In half of the scenes no text says left or right, so that those texts stay
true of a flipped picture. The exact pixels also depend on Pillow's resampling and blur.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from shardspec.errors import ConfigError
from shardspec.keyed import SEED_MODULUS, keyed

RGB = tuple[int, int, int]
Outline = tuple[tuple[float, float], ...]
Sides = Literal["told", "untold"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """How a strip of background looks: a field of noise heights, coloured by a ramp."""

    ramp: tuple[RGB, ...]
    """sRGB from height 0 to height 1, evenly spaced."""
    contrast: float
    """Standard deviation of the heights; their mean is 0.5."""
    rough: float
    """Amplitude of each finer octave relative to the one before: 0.5 is cloudy, 0.95 sandy."""
    stretch: tuple[float, float] = (1, 1)
    """Length of the noise cells in (x, y): (10, 1) is grain that runs across."""
    slope: float = 0.0
    """Height gained from the strip's top to its bottom."""
    pattern: Literal["none", "bricks", "planks", "weave"] = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Background:
    """A place: the words for it, and its strips of material from top to bottom."""

    phrase: str
    spoken: str
    detail: str
    avoid: tuple[str, ...]
    """Colours of objects that would be hard to see here."""
    strips: tuple[tuple[float, Material], ...]
    """(share of the picture's height, material)."""


# fmt: off
COLORS: dict[str, RGB] = {
    "red": (200, 28, 34), "orange": (240, 128, 16), "yellow": (246, 216, 44),
    "green": (34, 146, 62), "blue": (32, 82, 204), "purple": (126, 48, 166),
    "pink": (246, 134, 184), "brown": (112, 66, 34), "black": (30, 30, 34),
    "white": (242, 241, 236),
}
"""The palette, sRGB; apart enough that a shaded, noisy patch stays nearest to its own name."""

TEXTURES = ("plain", "striped", "dotted", "checkered")
SIZES = {"small": (0.07, 0.09), "medium": (0.12, 0.15), "large": (0.19, 0.23)}
"""Range of the radius of the circle around a shape, as a share of the picture's short side."""
LIGHTS = {"left": (1.0, 0.5), "right": (-1.0, 0.5), "above": (0.0, 1.0)}
"""Where the light comes from, and the direction (x, y) in which shadows fall."""
ASPECTS = ((4, 3), (3, 2), (16, 9), (1, 1), (3, 4), (2, 3), (9, 16), (3, 1), (1, 3))
ASPECT_SHARES = (0.26, 0.18, 0.1, 0.12, 0.12, 0.08, 0.06, 0.04, 0.04)
LONG_SIDE_PX = (480, 1600)
MIN_SIDE_PX = 128
"""Least `max_side_px`: below it small shapes are too few pixels to show their colour."""
MAX_OBJECTS = 9


def _radial(count: int, *, start: float = -90.0, inner: float = 1.0) -> Outline:
    """Lists `count` points around the unit circle, every second one at radius `inner`."""
    turns = [math.radians(start + 360 * i / count) for i in range(count)]
    radii = [inner if i % 2 else 1.0 for i in range(count)]
    return tuple((r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, turns, strict=True))


_A, _B = 0.31, math.sqrt(1 - 0.31**2)  # half the width of an arm of the cross, and its reach
SHAPES: dict[str, Outline] = {
    "circle": _radial(72), "square": _radial(4, start=-135), "triangle": _radial(3),
    "diamond": _radial(4), "hexagon": _radial(6, start=0), "star": _radial(10, inner=0.45),
    "cross": (
        (-_A, -_B), (_A, -_B), (_A, -_A), (_B, -_A), (_B, _A), (_A, _A),
        (_A, _B), (-_A, _B), (-_A, _A), (-_B, _A), (-_B, -_A), (-_A, -_A),
    ),
}
"""Outlines in the unit circle, y downwards, around (0, 0)."""

_SKY = Material(
    ramp=((70, 122, 190), (128, 172, 222), (196, 216, 236), (246, 248, 250)),
    contrast=0.15, rough=0.56, stretch=(2.5, 1), slope=0.25,
)
_SEA = Material(
    ramp=((18, 62, 92), (44, 112, 142), (112, 168, 182), (232, 240, 240)),
    contrast=0.15, rough=0.8, stretch=(6, 1),
)
_GRASS = Material(
    ramp=((22, 44, 12), (62, 96, 30), (110, 142, 54), (176, 190, 96)),
    contrast=0.2, rough=0.92, stretch=(1, 2.5), slope=-0.1,
)
_SAND = Material(ramp=((140, 112, 76), (196, 168, 124), (226, 204, 164)), contrast=0.15, rough=0.95)
_WOOD = Material(
    ramp=((62, 38, 20), (122, 80, 46), (166, 118, 72), (206, 164, 112)),
    contrast=0.13, rough=0.86, stretch=(10, 1), pattern="planks",
)
_BRICK = Material(
    ramp=((84, 34, 24), (134, 60, 42), (166, 86, 62), (184, 128, 106), (206, 198, 186)),
    contrast=0.1, rough=0.92, pattern="bricks",
)
_CLOTH = Material(
    ramp=((70, 72, 78), (138, 140, 146), (206, 206, 204)),
    contrast=0.08, rough=0.85, pattern="weave",
)
_CONCRETE = Material(
    ramp=((60, 60, 58), (128, 126, 120), (160, 158, 152), (206, 204, 198)),
    contrast=0.14, rough=0.9,
)
BACKGROUNDS = (
    Background(
        phrase="a grassy field under a cloudy blue sky",
        spoken="some grass with a blue sky and clouds over it",
        detail="The grass is thick and uneven, and thin white clouds drift across the sky.",
        avoid=("green", "white", "blue"), strips=((0.42, _SKY), (0.58, _GRASS)),
    ),
    Background(
        phrase="a sandy beach with the sea behind it",
        spoken="a beach, with the sea and the sky at the back",
        detail="The sand is coarse and pale, and a band of blue water meets the sky behind it.",
        avoid=("yellow", "white", "blue"), strips=((0.28, _SKY), (0.16, _SEA), (0.56, _SAND)),
    ),
    Background(
        phrase="a table made of wooden planks",
        spoken="a wooden table where you can see the planks",
        detail="The planks lie side by side, and their grain runs across the picture.",
        avoid=("brown", "orange"), strips=((1, _WOOD),),
    ),
    Background(
        phrase="a red brick wall",
        spoken="a brick wall, a red one",
        detail="The bricks are set in even rows, with pale mortar between them.",
        avoid=("red", "orange", "brown"), strips=((1, _BRICK),),
    ),
    Background(
        phrase="a gray woven cloth",
        spoken="a piece of gray fabric, kind of woven",
        detail="The threads of the cloth cross each other in a fine regular weave.",
        avoid=("black",), strips=((1, _CLOTH),),
    ),
    Background(
        phrase="a rough concrete floor",
        spoken="a concrete floor, pretty rough",
        detail="The concrete is stained and full of small pits and specks.",
        avoid=("white",), strips=((1, _CONCRETE),),
    ),
    Background(
        phrase="a stretch of dry sand",
        spoken="just sand, dry sand everywhere",
        detail="Small grains and shallow dents cover the sand.",
        avoid=("yellow", "white"), strips=((1, _SAND),),
    ),
)

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPOKEN_SIZES = {"small": "little", "medium": "", "large": "big"}
ROWS = ("near the top", "at half height", "near the bottom")
CELLS = (
    ("in the upper left", "at the top center", "in the upper right"),
    ("on the left side", "in the center", "on the right side"),
    ("in the lower left", "at the bottom center", "in the lower right"),
)
INTROS = (
    "A {frame} picture of {place}, with {total} laid over it.",
    "In this {frame} picture, {total} can be seen against {place}.",
    "The {frame} image shows {total} against {place}.",
)
SINGLES = ("There is {noun} {where}.", "{noun} can be found {where}.", "{where} lies {noun}.")
GROUPS = ("There are {noun} {where}.", "{noun} can be seen {where}.", "{where} lie {noun}.")
LIGHT_TEXTS = {
    "left": "Soft light comes from the left, so the shadows fall toward the right.",
    "right": "Soft light comes from the right, so the shadows fall toward the left.",
    "above": "Soft light comes from above, and the shadows lie just below the shapes.",
    "untold": "The light is gentle, and the shadows around the shapes have soft edges.",
}
OPENERS = (
    "Okay, so this is {place}, and there's {first}",
    "So I'm looking at {place}. I can see {first}",
    "What we have here is {first}, and behind that it's {place}",
    "Let me see. There's {first}, um, and the background is {place}",
    "Here we've got {first}, and all of it is on {place}",
)
LINKS = (". Then there's {}", ", and also {}", ". I can also see {}", ", plus {}")
SPOKEN_LIGHTS = {
    "left": "The light looks like it's coming from the left.",
    "right": "The light looks like it's coming from the right.",
    "above": "The light looks like it's coming from the top.",
    "untold": "The shadows look pretty soft.",
}
# fmt: on


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneObject:
    """One shape of a scene; positions in pixels of its picture."""

    label: str
    """Colour, texture unless plain, and shape: "red striped circle"."""
    color: str
    """A key of COLORS. In a scene, objects of one colour and shape share the label."""
    shape: str
    texture: str
    size: str
    """A key of SIZES."""
    center_px: tuple[int, int]
    """(x, y) of the shape's centre: always visible, always of the named colour."""
    radius_px: float
    """Radius of the circle around the shape."""

    @property
    def outline_px(self) -> np.ndarray:
        """Corners of the shape: float64 [N, 2], (x, y)."""
        return np.array(SHAPES[self.shape]) * self.radius_px + self.center_px

    @property
    def box_px(self) -> tuple[int, int, int, int]:
        """(x0, y0, x1, y1), half open, tight around the whole shape, hidden parts included."""
        (x0, y0), (x1, y1) = self.outline_px.min(axis=0), self.outline_px.max(axis=0)
        return math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenePlan:
    """Everything about a scene but its pixels."""

    width_px: int
    height_px: int
    background: Background
    light: str
    """A key of LIGHTS."""
    objects: tuple[SceneObject, ...]
    """One to nine, in drawing order: a later one lies in front of an earlier one."""
    covers: tuple[tuple[int, int], ...]
    """(front, back) indices of the objects that overlap."""
    render_seed: int
    caption: str = ""
    transcripts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A picture and what is true of it."""

    pixels: np.ndarray
    """uint8 [H, W, 3], sRGB, C-contiguous."""
    caption: str
    """Several sentences, about 40 to 140 words."""
    transcripts: tuple[str, ...]
    """One to three descriptions as one would speak them."""
    objects: tuple[SceneObject, ...]
    """One to nine, in drawing order: a later one lies in front of an earlier one."""


def make_scene(seed: int, idx: int, *, max_side_px: int = 1280) -> Scene:
    """Makes the scene of an index: plans and renders it.

    Args:
      seed: Any integer; names the collection.
      idx: Any integer; names the scene in it.
      max_side_px: Cap of the longer side, >= 128. Longer sides are 480 to 1600 where it allows.

    Raises:
      ConfigError: `scene_size`.
    """
    plan = plan_scene(seed, idx, max_side_px=max_side_px)
    return Scene(
        pixels=render(plan),
        caption=plan.caption,
        transcripts=plan.transcripts,
        objects=plan.objects,
    )


def plan_scene(seed: int, idx: int, *, max_side_px: int = 1280) -> ScenePlan:
    """Plans a scene and words it, without pixels; arguments and errors as in `make_scene`.

    >>> [thing.label for thing in plan_scene(0, 3).objects]
    ['red checkered triangle', 'yellow circle']
    """
    if max_side_px < MIN_SIDE_PX:
        raise ConfigError(
            "scene_size",
            where="max_side_px",
            min_side_px=MIN_SIDE_PX,
            got=max_side_px,
            want=f">= {MIN_SIDE_PX}",
        )
    rng = np.random.RandomState(keyed(seed, idx, 0) % SEED_MODULUS)
    aspect = ASPECTS[rng.choice(len(ASPECTS), p=ASPECT_SHARES)]
    long_px = min(int(rng.randint(LONG_SIDE_PX[0], LONG_SIDE_PX[1] + 1)), max_side_px)
    width_px, height_px = (round(long_px * side / max(aspect)) for side in aspect)
    background = BACKGROUNDS[rng.randint(len(BACKGROUNDS))]
    objects, covers = _place(rng, frame_px=(width_px, height_px), avoid=background.avoid)
    plan = ScenePlan(
        width_px=width_px,
        height_px=height_px,
        background=background,
        light=list(LIGHTS)[rng.randint(len(LIGHTS))],
        objects=objects,
        covers=covers,
        render_seed=keyed(seed, idx, 1) % SEED_MODULUS,
    )
    sides: Sides = "told" if rng.rand() < 0.5 else "untold"
    caption = _caption(plan, rng, sides=sides)
    openers = [OPENERS[i] for i in rng.permutation(len(OPENERS))[: rng.randint(1, 4)]]
    transcripts = tuple(_transcript(plan, rng, sides=sides, opener=opener) for opener in openers)
    return replace(plan, caption=caption, transcripts=transcripts)


def _place(
    rng: np.random.RandomState, *, frame_px: tuple[int, int], avoid: tuple[str, ...]
) -> tuple[tuple[SceneObject, ...], tuple[tuple[int, int], ...]]:
    """Draws the objects and finds room for them, large ones first; some may find none.

    The circles around the shapes stay apart, but for pairs in which one shape covers a part of
    another, never its centre. Returns the objects and the (front, back) indices of the pairs.
    """
    short_px = min(frame_px)
    kinds = [(color, shape) for color in COLORS if color not in avoid for shape in SHAPES]
    drawn: list[SceneObject] = []
    for i in rng.permutation(len(kinds))[: rng.randint(1, 6)]:
        color, shape = kinds[i]
        texture = TEXTURES[rng.choice(len(TEXTURES), p=(0.4, 0.2, 0.2, 0.2))]
        size = list(SIZES)[rng.randint(len(SIZES))]
        thing = SceneObject(
            label=f"{color} {shape}" if texture == "plain" else f"{color} {texture} {shape}",
            color=color,
            shape=shape,
            texture=texture,
            size=size,
            center_px=(0, 0),
            radius_px=float(rng.uniform(*SIZES[size])) * short_px,
        )
        count = 1 if size == "large" else 1 + int(rng.choice(4, p=(0.6, 0.2, 0.13, 0.07)))
        drawn += [thing] * count
    drawn = sorted(drawn[:MAX_OBJECTS], key=lambda thing: -thing.radius_px)
    counts = Counter(thing.label for thing in drawn)

    placed: list[SceneObject] = []
    covers: list[tuple[int, int]] = []
    for thing in drawn:
        taken = {i for pair in covers for i in pair}
        backs = [
            i
            for i, back in enumerate(placed)
            if counts[thing.label] == counts[back.label] == 1 and i not in taken
            if thing.color != back.color and operator.lt(*_reach_px(thing, back))
        ]
        back_idx = backs[0] if backs and rng.rand() < 0.4 else None
        for _ in range(40):
            if back_idx is None:
                x, y = (rng.uniform(0, side_px) for side_px in frame_px)
            else:
                back, turn = placed[back_idx], rng.uniform(0, 2 * math.pi)
                far = rng.uniform(*_reach_px(thing, back))
                x, y = back.center_px + far * np.array([math.cos(turn), math.sin(turn)])
            room_px = min(x, y, frame_px[0] - x, frame_px[1] - y) - 0.02 * short_px
            gaps_px = [
                math.dist((x, y), other.center_px) - other.radius_px - 0.03 * short_px
                for i, other in enumerate(placed)
                if i != back_idx
            ]
            if min([room_px, *gaps_px]) > thing.radius_px:
                covers += [] if back_idx is None else [(len(placed), back_idx)]
                placed.append(replace(thing, center_px=(round(x), round(y))))
                break
    return tuple(placed), tuple(covers)


def _reach_px(front: SceneObject, back: SceneObject) -> tuple[float, float]:
    """Bounds the distance at which `front` surely overlaps `back` but spares its centre.

    The bounds are crossed where the two shapes do not allow that at any distance.
    """
    touching = _inner(front.shape) * front.radius_px + _inner(back.shape) * back.radius_px
    return front.radius_px + 0.15 * back.radius_px, touching - 0.08 * back.radius_px


def _inner(shape: str) -> float:
    """Measures the circle inside an outline: its nearest points are corners or edge middles."""
    corners = np.array(SHAPES[shape])
    middles = (corners + np.roll(corners, 1, axis=0)) / 2
    return float(np.hypot(*np.concatenate([corners, middles]).T).min())


def _caption(plan: ScenePlan, rng: np.random.RandomState, *, sides: Sides) -> str:
    total = len(plan.objects)
    intro = _pick(rng, INTROS).format(
        frame=_frame(plan),
        place=plan.background.phrase,
        total="a single shape" if total == 1 else f"{NUMBERS[total]} shapes",
    )
    sentences = [intro]
    for kind in _kinds(plan):
        template = _pick(rng, SINGLES if len(kind) == 1 else GROUPS)
        noun = _noun(kind, size=kind[0].size.replace("medium", ""))
        sentences.append(template.format(noun=noun, where=_where(plan, kind, sides=sides)))
    sentences += _relations(plan, rng, sides=sides)[: rng.randint(1, 4)]
    sentences += [plan.background.detail, LIGHT_TEXTS[_light(plan, sides=sides)]]
    return " ".join(_capital(sentence) for sentence in sentences)


def _transcript(plan: ScenePlan, rng: np.random.RandomState, *, sides: Sides, opener: str) -> str:
    kinds = _kinds(plan)
    phrases = []
    for i in rng.permutation(len(kinds)):
        phrase = _noun(kinds[i], size=SPOKEN_SIZES[kinds[i][0].size])
        told = rng.rand() < 0.6
        phrases.append(f"{phrase} {_where(plan, kinds[i], sides=sides)}" if told else phrase)
    text = opener.format(place=plan.background.spoken, first=phrases[0])
    text += "".join(_pick(rng, LINKS).format(phrase) for phrase in phrases[1:]) + "."
    total = len(plan.objects)
    endings = [
        "So just one thing here." if total == 1 else f"So {NUMBERS[total]} things in all.",
        SPOKEN_LIGHTS[_light(plan, sides=sides)],
        *_relations(plan, rng, sides=sides)[:1],
    ]
    chosen = rng.permutation(len(endings))[: rng.randint(1, 3)]
    return " ".join([text, *(_capital(endings[i]) for i in chosen)])


def _pick(rng: np.random.RandomState, options: Sequence[str]) -> str:
    return options[rng.randint(len(options))]


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _kinds(plan: ScenePlan) -> list[list[SceneObject]]:
    """Groups the objects that share a label, in drawing order."""
    kinds: dict[str, list[SceneObject]] = {}
    for thing in plan.objects:
        kinds.setdefault(thing.label, []).append(thing)
    return list(kinds.values())


def _noun(kind: list[SceneObject], *, size: str) -> str:
    """Names a kind with its number: "an orange star", "three small red dotted crosses"."""
    noun = f"{size} {kind[0].label}".strip()
    if len(kind) == 1:
        return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
    return f"{NUMBERS[len(kind)]} {noun}{'es' if noun.endswith('s') else 's'}"


def _frame(plan: ScenePlan) -> str:
    ratio = plan.width_px / plan.height_px
    if abs(ratio - 1) < 0.05:
        return "square"
    strong = "very " if max(ratio, 1 / ratio) > 2 else ""
    return strong + ("wide" if ratio > 1 else "tall")


def _where(plan: ScenePlan, kind: list[SceneObject], *, sides: Sides) -> str:
    """Says in which ninth of the picture the centres lie, or in which third of its height."""
    columns = {thing.center_px[0] * 3 // plan.width_px for thing in kind}
    rows = {thing.center_px[1] * 3 // plan.height_px for thing in kind}
    if len(rows) > 1:
        return "in different places"
    row = rows.pop()
    return ROWS[row] if sides == "untold" or len(columns) > 1 else CELLS[row][columns.pop()]


def _relations(plan: ScenePlan, rng: np.random.RandomState, *, sides: Sides) -> list[str]:
    """Lists true relations between kinds of one, overlaps first, the others shuffled."""
    names = {k[0].label: f"the {k[0].color} {k[0].shape}" for k in _kinds(plan) if len(k) == 1}
    ones = [thing for thing in plan.objects if thing.label in names]
    found = []
    for a, b in itertools.permutations(ones, 2):
        first, second = names[a.label], names[b.label]
        if a.box_px[2] <= b.box_px[0] and sides == "told":
            words = f"{first} is to the left of {second}.", f"{second} is to the right of {first}."
            found.append(_pick(rng, words))
        if a.box_px[3] <= b.box_px[1]:
            words = f"{first} is above {second}.", f"{second} is below {first}."
            found.append(_pick(rng, words))
    covers = [
        f"{names[plan.objects[front].label]} is in front of {names[plan.objects[back].label]}"
        " and hides a part of it."
        for front, back in plan.covers
    ]
    return covers + [found[i] for i in rng.permutation(len(found))]


def _light(plan: ScenePlan, *, sides: Sides) -> str:
    return plan.light if sides == "told" or plan.light == "above" else "untold"


def render(plan: ScenePlan) -> np.ndarray:
    """Paints a plan: uint8 [H, W, 3], sRGB, C-contiguous."""
    rng = np.random.RandomState(plan.render_seed)
    size = (plan.width_px, plan.height_px)
    canvas = Image.new("RGB", size)
    strips = plan.background.strips
    borders = [round(edge * size[1]) for edge in (0, *itertools.accumulate(s for s, _ in strips))]
    for (_, material), (top, bottom) in zip(strips, itertools.pairwise(borders), strict=True):
        strip = _paint(rng, material, shape=(bottom - top, size[0]), short_px=min(size))
        canvas.paste(strip, (0, top))
    light = _light_map(plan).resize(size, Image.Resampling.BICUBIC)
    canvas = ImageChops.multiply(canvas, Image.merge("RGB", [light] * 3))
    for thing in plan.objects:
        _draw(canvas, thing, rng, shadow=LIGHTS[plan.light])
    lens = canvas.filter(ImageFilter.BoxBlur(0.4))
    sensor = np.frombuffer(rng.bytes(size[0] * size[1]), np.int8).reshape(size[1], size[0], 1)
    pixels = np.asarray(lens, np.int16) + sensor // 16  # uniform in -8 to 7, the same in R, G, B
    return np.clip(pixels, 0, 255, out=pixels).astype(np.uint8)


def _paint(
    rng: np.random.RandomState, material: Material, *, shape: tuple[int, int], short_px: int
) -> Image.Image:
    """Paints a strip of material, `shape` being (height, width) in pixels: RGB image."""
    heights = _noise(rng, shape=shape, rough=material.rough, stretch=material.stretch)
    heights = heights * np.float32(material.contrast)
    slope = np.linspace(-material.slope / 2, material.slope / 2, shape[0], dtype=np.float32)
    heights += 0.5 + slope[:, None]
    heights += _pattern(rng, material.pattern, shape=shape, short_px=short_px)
    heights *= 255
    image = Image.fromarray(np.clip(heights, 0, 255, out=heights).astype(np.uint8))
    steps = np.linspace(0, 255, len(material.ramp))
    ramp = [np.interp(np.arange(256), steps, tones) for tones in zip(*material.ramp, strict=True)]
    image.putpalette(np.stack(ramp, axis=1).astype(np.uint8).tobytes())
    return image.convert("RGB")


def _noise(
    rng: np.random.RandomState,
    *,
    shape: tuple[int, int],
    rough: float,
    stretch: tuple[float, float] = (1, 1),
) -> np.ndarray:
    """Draws noise of about unit variance: float32 [H, W], eight octaves, cells of 128 px to 1 px.

    Each octave is added to the one before at its own coarse size, so that all but the last are
    nearly free.
    """
    field, amplitude, power = np.zeros((1, 1), np.float32), 1.0, 0.0
    for cell_px in (128, 64, 32, 16, 8, 4, 2, 1):
        rows = max(2, math.ceil(shape[0] / (cell_px * stretch[1])))
        columns = max(2, math.ceil(shape[1] / (cell_px * stretch[0])))
        grid = np.frombuffer(rng.bytes(rows * columns), np.int8).reshape(rows, columns)
        field = _resize(field, (rows, columns)) + grid * np.float32(amplitude / 73.9)  # std of int8
        power += amplitude**2
        amplitude *= rough
    noise: np.ndarray = _resize(field, shape) * np.float32(power**-0.5)
    return noise


def _resize(field: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Resizes float32 [h, w] to `shape` (H, W) bilinearly."""
    if field.shape == shape:
        return field
    image = Image.fromarray(field).resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _pattern(
    rng: np.random.RandomState, name: str, *, shape: tuple[int, int], short_px: int
) -> np.ndarray:
    """Draws what is regular about a material, as heights to add: broadcasts to float32 [H, W]."""
    y, x = np.arange(shape[0])[:, None], np.arange(shape[1])[None]
    heights: np.ndarray = np.zeros((1, 1))
    if name == "bricks":
        tall = max(8, short_px // 9)
        wide, joint = tall * 5 // 2, max(2, tall // 9)
        row = y // tall
        shifted = x + row % 2 * (wide // 2)
        tones = rng.uniform(-0.18, 0.18, (row.max() + 1, shifted.max() // wide + 1))
        mortar = (y % tall < joint) | (shifted % wide < joint)
        heights = np.where(mortar, 0.4, tones[row, shifted // wide])
    elif name == "planks":
        tall = max(8, short_px // 5)
        tones = rng.uniform(-0.14, 0.14, shape[0] // tall + 1)
        heights = np.where(y % tall < max(2, tall // 40), -0.4, tones[y // tall])
    elif name == "weave":
        turn = 2 * math.pi / max(5.0, short_px / 110)
        heights = 0.13 * np.sin(x * turn) * np.sin(y * turn)
    return heights.astype(np.float32)


def _light_map(plan: ScenePlan) -> Image.Image:
    """Draws light and shadows on the background at an eighth of its size: L image."""
    width, height = max(2, plan.width_px // 8), max(2, plan.height_px // 8)
    dx, dy = LIGHTS[plan.light]
    falling = dx * np.linspace(-1, 1, width)[None] + dy * np.linspace(-1, 1, height)[:, None]
    shade = Image.new("L", (width, height))
    pen = ImageDraw.Draw(shade)
    for thing in plan.objects:
        shadow = thing.outline_px + 0.16 * thing.radius_px * np.array([dx, dy])
        pen.polygon((shadow / 8).ravel().tolist(), fill=140)
    shade = shade.filter(ImageFilter.GaussianBlur(min(width, height) / 90))
    lit = (235 - 18 * falling) * (1 - np.asarray(shade, np.float32) / 255)
    return Image.fromarray(np.clip(lit, 0, 255).astype(np.uint8))


def _draw(
    canvas: Image.Image,
    thing: SceneObject,
    rng: np.random.RandomState,
    *,
    shadow: tuple[float, float],
) -> None:
    """Draws one shape in place: its texture, shaded from the light and darker at the rim."""
    x0, y0, x1, y1 = thing.box_px
    mask = Image.new("L", (2 * (x1 - x0), 2 * (y1 - y0)))
    ImageDraw.Draw(mask).polygon(((thing.outline_px - (x0, y0)) * 2).ravel().tolist(), fill=255)
    mask = mask.reduce(2)
    rim = np.asarray(mask.filter(ImageFilter.GaussianBlur(thing.radius_px * 0.06)), np.float32)
    u = ((np.arange(x0, x1) - thing.center_px[0]) / thing.radius_px)[None].astype(np.float32)
    v = ((np.arange(y0, y1) - thing.center_px[1]) / thing.radius_px)[:, None].astype(np.float32)
    base = np.array(COLORS[thing.color], np.float32)
    accent = base * 0.58 if base.mean() > 90 else base * 0.55 + 255 * 0.45
    shade = (1 - 0.14 * (shadow[0] * u + shadow[1] * v)) * (0.55 + 0.45 / 255 * rim)
    shade += 0.05 * _noise(rng, shape=rim.shape, rough=0.9)
    period = max(0.44, 5 / thing.radius_px)  # at least 5 px, or the two tones would blur into one
    accented = _accented(thing.texture, x=u / period, y=v / period)
    tones = np.where(accented[:, :, None], accent, base)
    colors = np.clip(tones * shade[:, :, None], 0, 255).astype(np.uint8)
    canvas.paste(Image.fromarray(colors), (x0, y0), mask)


def _accented(texture: str, *, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Tells where a texture shows its second tone, never at the centre: bool, broadcast [H, W].

    Args:
      texture: One of TEXTURES.
      x: float [1, W], to the right of the centre, in periods of the texture.
      y: float [H, 1], below the centre, in periods of the texture.
    """
    accented: np.ndarray = np.zeros((1, 1), bool)
    if texture == "striped":
        accented = (0.8 * x + 0.6 * y + 0.25) % 1 >= 0.5
    elif texture == "dotted":
        accented = (x % 1 - 0.5) ** 2 + (y % 1 - 0.5) ** 2 < 0.3**2
    elif texture == "checkered":
        accented = (np.floor(x + 0.5) + np.floor(y + 0.5)) % 2 == 1
    return accented
