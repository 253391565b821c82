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
MOVES = tuple(_MOVES.values())
"""What a shape may do."""

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

    @property
    def scene_starts(self) -> list[int]:
        """Numbers of the frames with which the scenes begin."""
        return [0, *self.cuts]

    def center_px(
        self, scene: int, shape: MovingShape, frame: int, *, size: tuple[int, int]
    ) -> tuple[float, float]:
        """Computes where a shape is in a frame of its scene, in a picture of some size: (x, y)."""
        row_px = size[1] / MAX_SHAPES
        radius = _radius_px(size)
        share = frame / max(1, self.scenes[scene].num_frames - 1)
        way = {"right": share, "left": 1 - share, "still": 0.5}[shape.motion]
        return radius + way * (size[0] - 2 * radius), (shape.row + 0.5) * row_px

    def _center(self, scene: int, shape: MovingShape, frame: int) -> tuple[float, float]:
        """The same in percent of the picture."""
        size = self.width_px, self.height_px
        x, y = self.center_px(scene, shape, frame, size=size)
        return 100 * x / size[0], 100 * y / size[1]

    def tracks(self) -> list[tuple[str, list[tuple[float, float, float]]]]:
        """Lists the shapes by their labels with (time in seconds, x, y) in each of their frames."""
        return [
            (
                shape.label,
                [
                    (float((start + k) / self.fps), *self._center(i, shape, k))
                    for k in range(scene.num_frames)
                ],
            )
            for i, (scene, start) in enumerate(zip(self.scenes, self.scene_starts, strict=True))
            for shape in scene.shapes
        ]

    def choices(self) -> list[tuple[str, int]]:
        """Lists questions about what shapes do, each with the number of its answer in `MOVES`."""
        return [
            (f"What does the {shape.label} do?", list(_MOVES).index(shape.motion))
            for shape in self.shapes
        ]

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
    radius = _radius_px(size)
    for i, scene in enumerate(plan.scenes):
        for k in range(scene.num_frames):
            canvas = Image.new("RGB", size, BACKGROUNDS[scene.background])
            pen = ImageDraw.Draw(canvas)
            for shape in scene.shapes:
                x, y = plan.center_px(i, shape, k, size=size)
                outline = np.array(SHAPES[shape.shape]) * radius + (x, y)
                pen.polygon(outline.ravel().tolist(), fill=COLORS[shape.color])
            yield np.asarray(canvas.reduce(_DRAWN_LARGER))


def _radius_px(size: tuple[int, int]) -> float:
    return 0.4 * min(size[1] / MAX_SHAPES, size[0] / MAX_SHAPES)


def _seconds(time_s: Fraction) -> str:
    return f"{float(time_s):.1f} seconds"
