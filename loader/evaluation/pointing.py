"""Scores of pointing: which of the wanted things were hit, and which points hit something.

Predicted points are read in the notations of the Molmo family and become fractions of the image, 0
to 1. They are assigned to the wanted points so that the sum of distances is least, each to one at
most. A point hits where it is in the mask of its thing or, without masks, within a distance of it.
So PixMo-Points is scored in the Molmo report (arXiv 2409.17146): precision, recall and F1.

Pure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

MOST_DISTANCE = 0.05
"""Of a hit without masks, as a share of the image's diagonal: a stated choice, not a standard."""

Point = tuple[int, float, float]
"""Number of the image from 1, x and y as fractions of it."""

_PERCENT = re.compile(r'\bx(\d*)\s*=\s*"\s*(-?[\d.]+)\s*"\s*y\1\s*=\s*"\s*(-?[\d.]+)\s*"')
_COORDS = re.compile(r'\bcoords\s*=\s*"([^"]*)"')
_PLAIN = re.compile(r"Point:\s*<?\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*>?")


class Pointing(NamedTuple):
    """How well points fit what was wanted; all from 0 to 1."""

    precision: float
    """Share of the predicted points that hit."""
    recall: float
    """Share of the wanted things that were hit."""
    f1: float


def parse_predicted(text: str) -> list[Point]:
    """Reads the points of an answer.

    Args:
      text: With `<point x="10.0" y="20.0" ...>` or `<points x1= y1= ...>` in percent (Molmo 1),
        with `coords="image id x y id x y ..."` in thousandths (Molmo 2), or with `Point: <x, y>` in
        percent.

    >>> parse_predicted('<points coords="1 1 900 400 2 911 800">dogs</points>')
    [(1, 0.9, 0.4), (1, 0.911, 0.8)]
    >>> parse_predicted('<point x="10.0" y="20.0" alt="cat">cat</point>')
    [(1, 0.1, 0.2)]
    """
    found: list[Point] = []
    for attribute in _COORDS.findall(text):
        for group in re.split(r"[;\t]", attribute):
            numbers = re.findall(r"-?\d+(?:\.\d+)?", group)
            if len(numbers) % 3 != 1:
                continue  # no image, or a point that is not whole: nothing can be said of it
            image = int(float(numbers[0]))
            for x, y in zip(numbers[2::3], numbers[3::3], strict=True):
                found.append((image, float(x) / 1000, float(y) / 1000))
    for pattern in (_PERCENT, _PLAIN):
        for pair in pattern.findall(text):
            x, y = (_float(part) for part in pair[-2:])
            if x is not None and y is not None:
                found.append((1, x / 100, y / 100))
    return found


def wanted_points(
    points: Sequence[Any], *, sizes: Sequence[tuple[float, float]], scale: float | None
) -> list[Point]:
    """Brings the points of a record to fractions.

    Args:
      points: [n, 2], or such a list for each image.
      sizes: (width, height) of the images in pixels.
      scale: What the points are fractions of (`point_scale`); None: they are pixels.
    """
    nested = any(each and not isinstance(each[0], int | float) for each in points)
    groups = points if nested else [points]
    found: list[Point] = []
    for i, group in enumerate(groups):
        width, height = (scale, scale) if scale else sizes[i]
        found += [(i + 1, x / width, y / height) for x, y in group]
    return found


def score_points(
    predicted: Sequence[Point],
    wanted: Sequence[Point],
    *,
    sizes: Sequence[tuple[float, float]] = (),
    masks: Sequence[Any] | None = None,
    most_distance: float = MOST_DISTANCE,
) -> Pointing:
    """Scores points; where nothing is wanted, no point is right and any is wrong.

    Args:
      predicted, wanted: Points of the same images.
      sizes: (width, height) of the images in pixels, for distances; () for squares.
      masks: For each wanted point, the mask of its thing, [H][W] of truth values; None: hits are
        judged by distance.
      most_distance: Of a hit without masks, as a share of the diagonal.

    >>> score_points([(1, 0.5, 0.5), (1, 0.9, 0.1)], [(1, 0.51, 0.5)])
    Pointing(precision=0.5, recall=1.0, f1=0.6666666666666666)
    """
    if not wanted or not predicted:
        right = float(not wanted and not predicted)
        return Pointing(right, right, right)
    far = 4.0  # than any two points of an image: another image's point is the last choice
    costs = [[_distance(p, w, sizes) if p[0] == w[0] else far for w in wanted] for p in predicted]
    hits = 0
    for i, j in assign(costs):
        if masks is None:
            hits += costs[i][j] <= most_distance
        else:
            hits += predicted[i][0] == wanted[j][0] and _inside(predicted[i], masks[j])
    precision, recall = hits / len(predicted), hits / len(wanted)
    f1 = 2 * hits / (len(predicted) + len(wanted))
    return Pointing(precision, recall, f1)


def assign(costs: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """Pairs rows and columns, as many as there are of the fewer, so that the sum is least.

    Shortest augmenting paths with potentials, O(n^3): scipy's `linear_sum_assignment` without
    scipy, for some dozen points.

    >>> assign([[4.0, 1.0, 3.0], [2.0, 0.0, 5.0]])
    [(0, 1), (1, 0)]
    """
    if len(costs) > len(costs[0]):
        return sorted(
            (i, j) for j, i in assign([list(column) for column in zip(*costs, strict=True)])
        )
    num_rows, num_columns = len(costs), len(costs[0])
    # Rows and columns count from 1; column 0 stands for the row that is being added.
    row_of = [0] * (num_columns + 1)
    of_row, of_column = [0.0] * (num_rows + 1), [0.0] * (num_columns + 1)
    for row in range(1, num_rows + 1):
        row_of[0], column = row, 0
        least = [math.inf] * (num_columns + 1)
        came_from = [0] * (num_columns + 1)
        used = [False] * (num_columns + 1)
        while row_of[column]:
            used[column] = True
            i, nearest, step = row_of[column], 0, math.inf
            for j in range(1, num_columns + 1):
                if used[j]:
                    continue
                reduced = costs[i - 1][j - 1] - of_row[i] - of_column[j]
                if reduced < least[j]:
                    least[j], came_from[j] = reduced, column
                if least[j] < step:
                    nearest, step = j, least[j]
            for j in range(num_columns + 1):
                if used[j]:
                    of_row[row_of[j]] += step
                    of_column[j] -= step
                else:
                    least[j] -= step
            column = nearest
        while column:
            row_of[column] = row_of[came_from[column]]
            column = came_from[column]
    return sorted((row_of[j] - 1, j - 1) for j in range(1, num_columns + 1) if row_of[j])


def _distance(a: Point, b: Point, sizes: Sequence[tuple[float, float]]) -> float:
    width, height = sizes[a[0] - 1] if 0 < a[0] <= len(sizes) else (1.0, 1.0)
    across = math.hypot((a[1] - b[1]) * width, (a[2] - b[2]) * height)
    return across / math.hypot(width, height)


def _inside(point: Point, mask: Any) -> bool:
    height, width = len(mask), len(mask[0])
    x, y = math.floor(point[1] * width), math.floor(point[2] * height)
    # A point at the right or lower border is of the last pixel.
    x, y = (n - (n == size) for n, size in ((x, width), (y, height)))
    return 0 <= x < width and 0 <= y < height and bool(mask[y][x])


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
