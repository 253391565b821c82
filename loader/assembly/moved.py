"""Points of a text that move along with their picture: one image's, and the tokens that follow.

A draw is used as a whole or not at all: no point may leave the picture, and no box may lose its
area. Of a function of the user's, further draws are tried (`NUM_TRIES`), each with the seed that
follows from the first one; of our own, a crop that would cut something off is left out.

The tokens of a moved list are those of the text that its moved points have: lists of points are
sorted anew, and a box is the smallest around the moved corners of the one before.
"""

# Shape letters: N points.

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from loader.assembly.augment import NO_CHANGE, Augment, Draw, draw, draw_own, transform_points
from loader.assembly.own_augment import OwnAugment
from shardspec.coordinates import BOXES, ONE, SPELLED, PointList, write_points
from shardspec.keyed import keyed

NUM_TRIES = 8
"""Draws of a function of the user's before a picture is left as it is."""

_ROUNDING_PX = 1e-3
"""How far outside of the picture a point may be by the arithmetic of a move, in float32 too."""

Change = tuple[int, int, np.ndarray]
"""Tokens that are replaced: start, stop, and the ids instead of them."""


@dataclass(frozen=True, slots=True)
class ImagePoints:
    """The points of an image in all texts of its sample."""

    lists: Sequence[PointList]
    width: int
    """Of the picture in whose pixels points are moved."""
    height: int

    @property
    def geometry(self) -> int:
        """What the image allows if they are moved along."""
        return self.lists[0].geometry

    @property
    def corners_N2(self) -> np.ndarray:
        """The points, and the four corners of each box, in pixels: float64 [N, 2]."""
        found = [_corners(each) for each in self.lists]
        return np.concatenate(found) * (self.width / ONE, self.height / ONE)

    def changes(self, change: Draw, digits: Mapping[str, int]) -> list[Change] | None:
        """Moves the points; None where one leaves the picture, or a box loses its area.

        Args:
          change: What happens to the picture.
          digits: The id of each character of a number.
        """
        points = self.corners_N2
        if not len(points):
            return []
        found, _ = transform_points(points, change, width=self.width, height=self.height)
        moved = np.clip(found, 0, (self.width, self.height))
        if not np.all(np.abs(found - moved) <= _ROUNDING_PX):  # nor is what is not a number
            return None
        if np.array_equal(moved, points):
            return []
        made: list[Change] = []
        done = 0
        for each in self.lists:
            own = moved[done : done + _num_corners(each)]
            done += len(own)
            if each.notation in BOXES:
                boxes = own.reshape(-1, 4, 2)
                least, most = boxes.min(axis=1), boxes.max(axis=1)
                if np.any(least >= most):
                    return None
                own = np.stack([least, most], axis=1).reshape(-1, 2)
            made += _written(each, own.tolist(), (self.width, self.height), digits)
        return made


def draw_with_points(
    augment: object,
    pictures: Sequence[Sequence[int]],
    lists: Sequence[PointList],
    tokens: np.ndarray,
    rng: np.random.RandomState,
    *,
    key: str = "",
) -> tuple[list[Draw], list[Change]]:
    """Draws the augmentation of the pictures of a sample whose texts follow.

    As many numbers are taken from the sample's generator as for any other sample.

    Args:
      augment: The view's.
      pictures: IMAGE rows of the sample.
      lists: The points of its texts.
      tokens: int32 [T], the sample's.
      rng: The sample's generator.
      key: The sample's, for errors.

    Returns:
      The draw of each picture, and the tokens that change with them.

    Raises:
      ConfigError: `augment_function`, `user_function`: a function of the user's gives something
        else than points, or raises.
    """
    digits = tokens[lists[0].digits :][: len(SPELLED)].tolist()
    id_of = dict(zip(SPELLED, digits, strict=False))
    draws: list[Draw] = []
    changes: list[Change] = []
    for i, (_, _, width, height, stored_width, stored_height, _, allowed) in enumerate(pictures):
        own = [each for each in lists if each.image == i]
        if isinstance(augment, OwnAugment):
            points = ImagePoints(own, stored_width, stored_height)
            drawn, moved = _draw_own(augment, rng, points, id_of, allowed=allowed, where=key)
        else:
            assert isinstance(augment, Augment)
            drawn, moved = _draw(augment, rng, ImagePoints(own, width, height), id_of)
        draws.append(drawn)
        changes += moved
    return draws, changes


def _draw(
    augment: Augment, rng: np.random.RandomState, points: ImagePoints, digits: Mapping[str, int]
) -> tuple[Draw, list[Change]]:
    width, height = points.width, points.height
    drawn = draw(augment, rng, geometry=points.geometry, width=width, height=height)
    for tried in (drawn, replace(drawn, crop=None)):
        changes = points.changes(tried, digits)
        if changes is not None:
            return tried, changes
    raise AssertionError("a flip moves no point out of the picture")


def _draw_own(
    augment: OwnAugment,
    rng: np.random.RandomState,
    points: ImagePoints,
    digits: Mapping[str, int],
    *,
    allowed: int,
    where: str,
) -> tuple[Draw, list[Change]]:
    first = draw_own(
        augment, rng, geometry=points.geometry if augment.moves_points else allowed, where=where
    )
    if first.own is None or not int(augment.needs) & ~allowed:
        return first, []
    for number in range(NUM_TRIES):
        seed = keyed(first.own.seed, number) >> 32 if number else first.own.seed
        tried = Draw(own=replace(first.own, seed=seed))
        changes = points.changes(tried, digits)
        if changes is not None:
            return tried, changes
    augment.warn_of_points_outside(where)
    return NO_CHANGE, []


def _num_corners(each: PointList) -> int:
    return len(each.points) * (2 if each.notation in BOXES else 1)


def _corners(each: PointList) -> np.ndarray:
    points = np.array([row[4:] for row in each.points], np.float64).reshape(-1, 2)
    if each.notation not in BOXES:
        return points
    x1, y1, x2, y2 = points.reshape(-1, 4).T
    return np.stack([x1, y1, x2, y1, x2, y2, x1, y2], axis=1).reshape(-1, 2)


def _written(
    each: PointList,
    points: Sequence[tuple[float, float]],
    scale: tuple[float, float],
    digits: Mapping[str, int],
) -> Iterator[Change]:
    written = write_points(points, scale, each.notation)
    for row, (x, y, _) in zip(each.points, written, strict=True):
        for start, stop, number in ((row.x_start, row.x_stop, x), (row.y_start, row.y_stop, y)):
            yield start, stop, np.array([digits[c] for c in number], np.int32)
