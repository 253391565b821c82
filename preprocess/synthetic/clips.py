"""Draws clips of moving shapes: the videos of `SOURCE=sample`, with texts that are true of them.

A clip is one to three scenes, each a plain background and one to three shapes of different kinds
that cross the picture in rows of their own, or stay where they are. Between scenes is a cut.
Everything that a text says is read off the plan. Pure functions of (seed, idx).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from preprocess.synthetic.scenes import COLORS, SHAPES
from shardspec.keyed import SEED_MODULUS, keyed

Motion = Literal["right", "left", "still"]

SIZES_PX = ((320, 240), (320, 180), (240, 320), (256, 256))
RATES = (Fraction(10), Fraction(12), Fraction(24), Fraction(30000, 1001))
SCENE_S = (1.2, 3.0)
MAX_SCENES, MAX_SHAPES = 3, 3
BACKGROUNDS = {
    "light grey": (212, 212, 210),
    "dark grey": (58, 60, 66),
    "beige": (222, 206, 172),
    "teal": (20, 92, 96),
}
_HIDDEN = {
    "light grey": ("white", "yellow"),
    "dark grey": ("black", "brown"),
    "beige": ("white", "yellow", "orange"),
    "teal": ("green", "blue", "black"),
}
"""Colours of shapes that would be hard to see on a background."""

_MOVES: dict[Motion, str] = {
    "right": "moves from left to right",
    "left": "moves from right to left",
    "still": "stays where it is",
}
_ORDINALS = ("first", "second", "third")
_DRAWN_LARGER = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class MovingShape:
    """A shape of a scene."""

    shape: str
    color: str
    motion: Motion
    row: int
    """Its row of the picture, from the top."""

    @property
    def label(self) -> str:
        """Names it, such as "red circle"."""
        return f"{self.color} {self.shape}"

    @property
    def named(self) -> str:
        """Names it with its article, such as "an orange star"."""
        return f"{'an' if self.color[0] in 'aeiou' else 'a'} {self.label}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipScene:
    """What is between two cuts."""

    background: str
    shapes: tuple[MovingShape, ...]
    num_frames: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipPlan:
    """A clip without its pixels."""

    width_px: int
    height_px: int
    fps: Fraction
    scenes: tuple[ClipScene, ...]

    @property
    def num_frames(self) -> int:
        """Frames of the clip."""
        return sum(scene.num_frames for scene in self.scenes)

    @property
    def cuts(self) -> list[int]:
        """Numbers of the frames with which the second and later scenes begin."""
        lengths = [scene.num_frames for scene in self.scenes[:-1]]
        return [sum(lengths[: i + 1]) for i in range(len(lengths))]

    @property
    def shapes(self) -> list[MovingShape]:
        """All shapes, in the order in which they appear, from the top."""
        return [shape for scene in self.scenes for shape in scene.shapes]

    @property
    def caption(self) -> str:
        """Describes the clip."""
        texts = []
        for i, scene in enumerate(self.scenes):
            lead = ""
            if i:
                lead = f"After {_seconds(self.cuts[i - 1] / self.fps)} the scene changes. "
            moves = [f"{shape.named} {_MOVES[shape.motion]}" for shape in scene.shapes]
            said = ", ".join(moves[:-1]) + (" and " if moves[1:] else "") + moves[-1]
            texts.append(f"{lead}In front of a {scene.background} background, {said}.")
        return " ".join(texts)

    def questions(self) -> list[tuple[str, str]]:
        """Lists questions about the clip and their answers."""
        found = [("How many shapes appear in the video?", str(len(self.shapes)))]
        number = len(self.scenes)
        found.append(("How many scenes does the video have?", str(number)))
        if number == 2:
            answer = _seconds(self.cuts[0] / self.fps)
            found.append(("After how many seconds does the scene change?", answer))
        for i, scene in enumerate(self.scenes):
            place = f" in the {_ORDINALS[i]} scene" if number > 1 else ""
            found.append((f"What color is the background{place}?", scene.background))
            for shape in scene.shapes:
                question = f"What does the {shape.label} do{place}?"
                found.append((question, f"It {_MOVES[shape.motion]}."))
        return found


def plan_clip(seed: int, idx: int) -> ClipPlan:
    """Draws a clip: what is in it, not its pixels."""
    rng = np.random.RandomState(keyed(seed, idx) % SEED_MODULUS)
    width_px, height_px = SIZES_PX[rng.randint(len(SIZES_PX))]
    fps = RATES[rng.randint(len(RATES))]
    # A shape occurs once in a clip, so that a text can name it.
    names = [(color, shape) for color in COLORS for shape in SHAPES]
    free = [names[i] for i in rng.permutation(len(names))]
    backgrounds = [list(BACKGROUNDS)[i] for i in rng.permutation(len(BACKGROUNDS))]
    scenes = []
    for i in range(rng.randint(1, MAX_SCENES + 1)):
        background = backgrounds[i]
        shapes = []
        rows = rng.permutation(MAX_SHAPES)[: rng.randint(1, MAX_SHAPES + 1)]
        for row in sorted(rows.tolist()):
            chosen = next(name for name in free if name[0] not in _HIDDEN[background])
            free.remove(chosen)
            motion: Motion = ("right", "left", "still")[rng.choice(3, p=(0.4, 0.4, 0.2))]
            shapes.append(MovingShape(shape=chosen[1], color=chosen[0], motion=motion, row=row))
        seconds = rng.uniform(*SCENE_S)
        scenes.append(
            ClipScene(
                background=background, shapes=tuple(shapes), num_frames=round(seconds * float(fps))
            )
        )
    return ClipPlan(width_px=width_px, height_px=height_px, fps=fps, scenes=tuple(scenes))


def render_clip(plan: ClipPlan) -> Iterator[np.ndarray]:
    """Paints the frames of a plan: uint8 [H, W, 3] each."""
    size = plan.width_px * _DRAWN_LARGER, plan.height_px * _DRAWN_LARGER
    row_px = size[1] / MAX_SHAPES
    radius = 0.4 * min(row_px, size[0] / MAX_SHAPES)
    for scene in plan.scenes:
        for k in range(scene.num_frames):
            share = k / max(1, scene.num_frames - 1)
            canvas = Image.new("RGB", size, BACKGROUNDS[scene.background])
            pen = ImageDraw.Draw(canvas)
            for shape in scene.shapes:
                way = {"right": share, "left": 1 - share, "still": 0.5}[shape.motion]
                x = radius + way * (size[0] - 2 * radius)
                y = (shape.row + 0.5) * row_px
                outline = np.array(SHAPES[shape.shape]) * radius + (x, y)
                pen.polygon(outline.ravel().tolist(), fill=COLORS[shape.color])
            yield np.asarray(canvas.reduce(_DRAWN_LARGER))


def _seconds(time_s: Fraction) -> str:
    return f"{float(time_s):.1f} seconds"
