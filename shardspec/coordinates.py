"""Coordinates in texts: how a number is written, and how the tokens of a text follow moved points.

A *list* is the points of one image in one text, in one notation. Points are written sorted by their
numbers, after rounding; boxes, two points each, in their own order. A tokenizer that spells numbers
character by character has one token for each digit and one for the point between them: a number
is replaced by replacing its tokens, and no other token changes.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

SPELLED = "0123456789."
"""The characters of numbers, in the order of their ids in a sample's tokens."""

ONE = 1 << 30
"""A stored coordinate in these units is a share of the image's width or height."""


class Notation(enum.IntEnum):
    """How the coordinates of a list are written."""

    NOTHING = 0
    """There are none."""
    PERCENT = 1
    """0.0 to 100.0 (Molmo 1)."""
    THOUSANDTHS = 2
    """000 to 1000 (Molmo 2)."""
    BOX_THOUSANDTHS = 3
    """0 to 1000, two points a box (Qwen3-VL, InternVL)."""
    BOX_HUNDREDTHS = 4
    """0.00 to 1.00, two points a box (LLaVA)."""


BOXES = frozenset({Notation.BOX_THOUSANDTHS, Notation.BOX_HUNDREDTHS})
"""Notations whose lists have two points for each box: its upper left and its lower right corner."""

MOST_CHARACTERS: Mapping[int, int] = {0: 0, 1: 5, 2: 4, 3: 4, 4: 4}
"""Length of the longest number of each notation."""


class PointRow(NamedTuple):
    """A point of a text."""

    x_start: int
    """Where the tokens of its numbers are, half open."""
    x_stop: int
    y_start: int
    y_stop: int
    x: int
    """Share of the image's width, in units of `ONE`."""
    y: int


class PointList(NamedTuple):
    """The points of an image in one text."""

    image: int
    """Number of the image, from 0."""
    geometry: int
    """What the image allows if its points are moved along (`shardspec.sample.Geometry`)."""
    notation: int
    digits: int
    """Where the ids of `SPELLED` begin in the sample's tokens."""
    points: Sequence[PointRow]
    """In the order in which they are written."""


def write_number(value: float, full: float, notation: int) -> str:
    """Writes a coordinate.

    Args:
      value: The coordinate.
      full: The width or height of which it is a part, in the same unit.
      notation: One of `Notation`.

    >>> [write_number(64.0, 640, notation) for notation in (1, 2, 3, 4)]
    ['10.0', '100', '100', '0.10']
    """
    if notation == Notation.PERCENT:
        # Divided by full / 100, which is exactly 1 for percentages; + 0.0 turns -0.0 into 0.0.
        return f"{round(value / (full / 100), 1) + 0.0:.1f}"
    # Clamped on both axes: Molmo 2 means to, but its check lets a y outside of the image pass.
    share = min(max(value / full, 0.0), 1.0)
    if notation == Notation.BOX_HUNDREDTHS:
        return f"{share:.2f}"
    return f"{round(1000 * share):0{3 if notation == Notation.THOUSANDTHS else 1}d}"


def write_points(
    points: Sequence[tuple[float, float]], scale: tuple[float, float], notation: int
) -> list[tuple[str, str, int]]:
    """Writes the points of a list in the order in which its text has them.

    Args:
      points: (x, y) of each.
      scale: What x and y are parts of.
      notation: One of `Notation`.

    Returns:
      The numbers of each point, and its place in `points`.

    >>> write_points([(50, 1), (2.04, 9), (2.01, 3)], (100, 100), Notation.PERCENT)
    [('2.0', '3.0', 2), ('2.0', '9.0', 1), ('50.0', '1.0', 0)]
    """
    width, height = scale
    written = [
        (write_number(x, width, notation), write_number(y, height, notation), i)
        for i, (x, y) in enumerate(points)
    ]
    if notation not in BOXES:
        # Sorted before rounding, two points that round to the same x could come out in an order
        # that the text does not show.
        written.sort(key=lambda point: (float(point[0]), float(point[1])))
    return written


def replace_runs(
    tokens: np.ndarray, changes: Sequence[tuple[int, int, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Replaces runs of tokens by others, which may be longer or shorter.

    Args:
      tokens: int32 [T].
      changes: (start, stop, ids) of each; they do not overlap.

    Returns:
      int32 [U], and int64 [T + 1]: where each position of `tokens`, outside of the runs, is in it.

    >>> made, places = replace_runs(np.array([5, 6, 7, 8]), [(1, 2, np.array([1, 2]))])
    >>> made.tolist(), places[[0, 2, 4]].tolist()
    ([5, 1, 2, 7, 8], [0, 3, 5])
    """
    pieces, done = [], 0
    places = np.arange(len(tokens) + 1)
    for start, stop, ids in sorted(changes, key=lambda change: change[0]):
        pieces += [tokens[done:start], ids]
        places[stop:] += len(ids) - (stop - start)
        done = stop
    return np.concatenate([*pieces, tokens[done:]], dtype=tokens.dtype), places
