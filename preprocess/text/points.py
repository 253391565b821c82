"""Points as text: the two notations of the Molmo family, and the sentences around them.

    xml     percent of the image with one decimal (Molmo 1):
            <point x="10.0" y="20.0" alt="cat">cat</point>
            <points x1="10.3" y1="33.3" x2="90.0" y2="20.0" alt="dog">dog</points>
    coords  thousandths of the image in one attribute, "image id x y id x y ..." (Molmo 2):
            <points coords="1 1 900 400 2 911 800">dog</points>

Points are sorted by (x, y) *after* rounding (`shardspec.coordinates`). Ids run on over the images
of a group.

Neither notation escapes its label, as in Molmo; coordinates never hold a quote or a bracket, so
they can be read back whatever the label is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from shardspec.coordinates import Notation, write_number, write_points
from shardspec.errors import ConfigError, SampleError

PointFormat = Literal["xml", "coords"]
PointFrame = tuple[float, list[tuple[int, int, int]]]
"""A time in seconds, and (number, x, y) of what is seen then, in thousandths."""

PointMode = Literal["point", "point_then_count", "count_then_point", "count"]

PLACEHOLDER = "<|POINT|>"
"""Marks where a tag belongs in an answer (PixMo-Point-Explanations)."""

NO_POINTS = "There are none."
"""The answer where nothing is to be pointed at, in every mode (Molmo 1 and 2)."""

NO_TRACKS = "No tracks available."
"""The answer where nothing is to be followed (Molmo 2)."""

GROUP_SEPARATOR = ";"
"""Between the images or times of a coords attribute (Molmo 2's fine-tuning; a tab before it)."""

_SENTENCES: Mapping[PointMode, str] = {
    "point": "{tag}",
    "point_then_count": "Counting the {tag} shows a total of {count}.",
    "count_then_point": "There are {count} {tag}.",
    "count": "{count}",
}

Point = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class PointGroup:
    """The points of one image."""

    points: Sequence[Point]
    """(x, y), in the units of `scale`."""
    scale: tuple[float, float]
    """What x and y are fractions of: (100, 100) for percent, (width, height) for pixels."""
    image: int = 1
    """Number of the image in its example, from 1."""

    def clipped(self) -> PointGroup:
        """Moves points that lie outside of the image to its border, on both axes."""
        width, height = self.scale
        inside = [(min(max(x, 0.0), width), min(max(y, 0.0), height)) for x, y in self.points]
        return PointGroup(points=inside, scale=self.scale, image=self.image)


class Number(str):
    """A coordinate among the pieces of a text."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tag:
    """The text of some points or boxes, and what it says where."""

    text: str
    numbers: tuple[tuple[int, int], ...]
    """Where the coordinates are in the text: x and y of each point, in its order."""
    notation: Notation
    lists: tuple[tuple[int, tuple[Point, ...]], ...]
    """(image from 0, its points as shares of width and height), in the order of the text."""

    @classmethod
    def of(
        cls,
        pieces: Sequence[str],
        notation: Notation,
        lists: Sequence[tuple[int, Sequence[Point]]],
    ) -> Tag:
        """Joins the pieces of a text; its coordinates are pieces of their own."""
        ends = list(accumulate(map(len, pieces)))
        numbers = [
            (end - len(piece), end)
            for piece, end in zip(pieces, ends, strict=True)
            if isinstance(piece, Number)
        ]
        return cls(
            text="".join(pieces),
            numbers=tuple(numbers),
            notation=notation,
            lists=tuple((image, tuple(points)) for image, points in lists),
        )


def parse_points(points: Any) -> list[Point]:
    """Reads a message's points.

    Args:
      points: [n, 2] as nested sequences of numbers.

    Raises:
      SampleError: `points_shape` (not pairs of finite numbers).
    """
    try:
        # The sums refuse texts, which float() would read.
        pairs = [(float(x + 0.0), float(y + 0.0)) for x, y in points]
    except (TypeError, ValueError, OverflowError):
        pairs = [(math.nan, math.nan)]
    if not all(math.isfinite(x) and math.isfinite(y) for x, y in pairs):
        raise SampleError("points_shape.finite", got=repr(points)[:80], want="[[x, y], ...]")
    return pairs


def point_tag(
    groups: Sequence[PointGroup],
    *,
    label: str,
    alt: str | None = None,
    point_format: PointFormat = "coords",
) -> str:
    """Writes the tag of at least one point; see `placed_tag`.

    >>> cat = PointGroup(points=[(64, 48)], scale=(640, 480))
    >>> point_tag([cat], label="cat", point_format="xml")
    '<point x="10.0" y="10.0" alt="cat">cat</point>'
    >>> point_tag([cat], label="cat", point_format="coords")
    '<points coords="1 1 100 100">cat</points>'
    """
    return placed_tag(groups, label=label, alt=alt, point_format=point_format).text


def placed_tag(
    groups: Sequence[PointGroup],
    *,
    label: str,
    alt: str | None = None,
    point_format: PointFormat = "coords",
) -> Tag:
    """Writes the tag of at least one point, and says where its numbers are.

    Args:
      groups: Per image, its points; images without points are left out of the text.
      label: Text between the tags.
      alt: Alternative text. None: the label in xml, no such attribute in coords.
      point_format: The notation.

    Raises:
      ConfigError: `point_format` (xml cannot say which of several images it means).
    """
    return _TAGS[point_format](groups, label, alt)


def timed_tag(
    name: Literal["points", "tracks"], frames: Sequence[PointFrame], *, label: str
) -> str:
    """Writes the tag of points at times of a video.

    >>> timed_tag("tracks", [(0.0, [(1, 635, 22)]), (0.5, [(1, 606, 490), (2, 5, 0)])], label="a")
    '<tracks coords="0.0 1 635 022;0.5 1 606 490 2 005 000">a</tracks>'
    """
    groups = [
        " ".join([f"{time_s:.1f}", *(f"{number} {x:03d} {y:03d}" for number, x, y in points)])
        for time_s, points in frames
    ]
    return f'<{name} coords="{GROUP_SEPARATOR.join(groups)}">{label}</{name}>'


def point_sentence(tag: str, *, count: int, mode: PointMode) -> str:
    """Writes the answer to a pointing or counting question.

    >>> point_sentence("<points ...>cats</points>", count=2, mode="count_then_point")
    'There are 2 <points ...>cats</points>.'
    """
    return _SENTENCES[mode].replace("{count}", str(count)).replace("{tag}", tag, 1)


def fill_placeholders(text: str, tags: Sequence[str]) -> str:
    """Puts one tag at each placeholder, in order.

    Raises:
      SampleError: `message_fields` (another number of tags than of placeholders).

    >>> fill_placeholders("It is <|POINT|>.", ["<point ...>here</point>"])
    'It is <point ...>here</point>.'
    """
    pieces = text.split(PLACEHOLDER)
    if len(pieces) != len(tags) + 1:
        raise SampleError(
            "message_fields.count", placeholders=len(pieces) - 1, answer_annotations=len(tags)
        )
    return "".join(piece + tag for piece, tag in zip(pieces, [*tags, ""], strict=True))


def _xml_tag(groups: Sequence[PointGroup], label: str, alt: str | None) -> Tag:
    if len(groups) > 1:
        raise ConfigError("point_format", images=len(groups))
    (group,) = groups
    alt = label if alt is None else alt
    written = write_points(group.points, group.scale, Notation.PERCENT)
    pieces = ["<point" if len(written) == 1 else "<points"]
    for i, (x, y, _) in enumerate(written, start=1):
        mark = "" if len(written) == 1 else str(i)
        pieces += [f' x{mark}="', Number(x), f'" y{mark}="', Number(y), '"']
    pieces.append(f' alt="{alt}">{label}{"</point>" if len(written) == 1 else "</points>"}')
    return Tag.of(pieces, Notation.PERCENT, [_shares(group, written)])


def _coords_tag(groups: Sequence[PointGroup], label: str, alt: str | None) -> Tag:
    attribute = "" if alt is None else f' alt="{alt}"'
    pieces = [f'<points{attribute} coords="']
    lists: list[tuple[int, list[Point]]] = []
    number = 0
    for group in groups:
        written = write_points(group.points, group.scale, Notation.THOUSANDTHS)
        if not written:
            continue
        pieces.append(f"{GROUP_SEPARATOR if lists else ''}{group.image}")
        lists.append(_shares(group, written))
        for x, y, _ in written:
            number += 1
            pieces += [f" {number} ", Number(x), " ", Number(y)]
    return Tag.of([*pieces, f'">{label}</points>'], Notation.THOUSANDTHS, lists)


_TAGS: Mapping[PointFormat, Callable[[Sequence[PointGroup], str, str | None], Tag]] = {
    "xml": _xml_tag,
    "coords": _coords_tag,
}


def _shares(group: PointGroup, written: Sequence[tuple[str, str, int]]) -> tuple[int, list[Point]]:
    """Gives the points of an image in the order in which they are written."""
    width, height = group.scale
    points = [group.points[i] for _, _, i in written]
    return group.image - 1, [(x / width, y / height) for x, y in points]


def thousandths(point: Point, scale: tuple[float, float]) -> tuple[int, int]:
    """Gives a point in thousandths of the image."""
    x, y = (
        int(write_number(value, full, Notation.THOUSANDTHS))
        for value, full in zip(point, scale, strict=True)
    )
    return x, y
