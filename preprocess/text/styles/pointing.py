"""Pointing: points of things with a label, and points inside of an answer.

Points are [n, 2], or such a list per image in styles of several images; `point_scale` says what
they are fractions of (100: percent), otherwise they are pixels of `image_sizes`. With
`clip_points`, points outside of the image move to its border. With `bounds` "strict", points that
are farther outside than rounding explains are refused: they are in another unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from preprocess.text.message import Message, field_error, require_field, require_text
from preprocess.text.points import (
    NO_POINTS,
    Point,
    PointGroup,
    fill_placeholders,
    parse_points,
    placed_tag,
    point_sentence,
)
from preprocess.text.styles.base import Draw, Exchange, Style, user_text, whole_text
from shardspec.errors import SampleError

BORDER_PX = 1.0
"""How far outside of the image rounding may put a coordinate in pixels."""

BORDER = 0.005
"""The same for a share of the image."""

ANNOTATION_SCALE = 100.0
"""Inline points are percentages (PixMo-Point-Explanations)."""


def draw_pointing(message: Message, draw: Draw) -> Exchange:
    """Draws a request to point at things: `points` of `label`."""
    label = point_label(message, grouped=draw.style.grouped)
    # A question is a whole sentence; only a bare label goes into a template.
    plain = message.get("question") or label
    templated = {} if "question" in message else {"label": label}
    user = user_text(message, draw, plain=plain, **templated)
    return user, _answer(message, label, draw)


def draw_inline_points(message: Message, draw: Draw) -> Exchange:
    """Draws an answer with tags at its placeholders, one per entry of `answer_annotations`.

    An annotation has `points` (percent unless `point_scale` says otherwise; kept within the
    image), `inline_text` and `alt_text`.
    """
    question = "" if message.get("prompt") else whole_text(message, "question", draw)
    scale = positive(message.get("point_scale", ANNOTATION_SCALE), message)
    tags = [
        _inline_tag(annotation, scale, draw)
        for annotation in require_field(message, "answer_annotations")
    ]
    user = user_text(message, draw, plain=question, question=question)
    return user, fill_placeholders(whole_text(message, "answer", draw), tags)


def _answer(message: Message, label: str, draw: Draw) -> str:
    mode = draw.style.mode
    if mode == "count" and "points" not in message:
        count = require_field(message, "count")
        if type(count) is not int or count < 0:
            raise field_error(message, "count", "a number of things")
        return str(count) if count else NO_POINTS
    groups = _groups(message, grouped=draw.style.grouped)
    count = sum(len(group.points) for group in groups)
    if not count:
        return NO_POINTS
    if mode == "count":
        return point_sentence("", count=count, mode=mode)
    tag = placed_tag(groups, label=label, point_format=draw.policy.point_format)
    draw.tags.append(tag)
    return point_sentence(tag.text, count=count, mode=mode)


def _inline_tag(annotation: Message, scale: float, draw: Draw) -> str:
    points = parse_points(require_field(annotation, "points"))
    text = require_text(annotation, "inline_text")
    if not points:
        return text  # nothing to point at: the words alone
    group = PointGroup(points=points, scale=(scale, scale)).clipped()
    alt, point_format = annotation.get("alt_text"), draw.policy.point_format
    draw.tags.append(placed_tag([group], label=text, alt=alt, point_format=point_format))
    return draw.tags[-1].text


def point_label(message: Message, *, grouped: bool = False) -> str:
    """Gives the name of what is pointed at: in lower case, unless the row's own case matters."""
    if "label" in message:
        label = require_text(message, "label")
        # Labels of image groups stay as they are (Molmo 2).
        return label if grouped else label.lower()
    return require_text(message, "label_cased" if "label_cased" in message else "question")


def _groups(message: Message, *, grouped: bool) -> list[PointGroup]:
    points = require_field(message, "points")
    if not grouped or not isinstance(points, Sequence):
        points = [points]
    sizes = message.get("image_sizes", ())
    if sizes and len(points) > len(sizes):
        raise SampleError(
            "points_shape.groups", style=message["style"], groups=len(points), images=len(sizes)
        )
    groups = [
        PointGroup(points=parse_points(own), scale=point_scale(message, i), image=i + 1)
        for i, own in enumerate(points)
    ]
    for group in groups:
        check_bounds(group.points, group.scale, message)
    clipped = message.get("clip_points") or message.get("bounds")
    return [group.clipped() for group in groups] if clipped else groups


def check_bounds(points: Sequence[Point], scale: tuple[float, float], message: Message) -> None:
    """Refuses coordinates that cannot be in the unit that the message says, if it wants that.

    Raises:
      SampleError: `coordinates_unit`.
    """
    if message.get("bounds") != "strict":
        return
    rooms = [BORDER_PX if "point_scale" not in message else full * BORDER for full in scale]
    for point in points:
        for value, full, room in zip(point, scale, rooms, strict=True):
            if not -room <= value <= full + room:
                raise SampleError("coordinates_unit.beyond", got=list(point), size=list(scale))
    values = [value for point in points for value in point]
    fractions = any(value != int(value) for value in values)
    if "point_scale" not in message and fractions and max(values) <= 1:
        raise SampleError("coordinates_unit.tiny", got=list(points[0]), size=list(scale))


def point_scale(message: Message, image: int) -> tuple[float, float]:
    """Says what the coordinates of a message about an image are fractions of."""
    if "point_scale" in message:
        scale = positive(message["point_scale"], message)
        return scale, scale
    if not message.get("image_sizes"):
        raise field_error(message, "point_scale", "a scale, or images whose pixels are meant")
    width, height = message["image_sizes"][image]
    return float(width), float(height)


def positive(scale: Any, message: Message) -> float:
    """Reads what coordinates are fractions of.

    Raises:
      SampleError: `message_fields`.
    """
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise field_error(message, "point_scale", "a number above 0")
    return float(scale)


STYLES: Mapping[str, Style] = {
    "pointing": Style(
        family="pointing",
        draw=draw_pointing,
        template="pointing.pointing",
        rigid=True,
        movable=True,
        demo=True,
        length_hint=False,
    ),
    "cosyn_point": Style(
        family="pointing",
        draw=draw_pointing,
        template="pointing.pointing",
        rigid=True,
        demo=True,
        length_hint=False,
    ),
    "multi_image_pointing": Style(
        family="pointing",
        draw=draw_pointing,
        template="pointing.multi_image_pointing",
        grouped=True,
        rigid=True,
        movable=True,
        demo=True,
    ),
    "point_qa": Style(family="inline_points", draw=draw_inline_points, rigid=True, movable=True),
}
