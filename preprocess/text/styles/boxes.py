"""Boxes: where things are, as corners in one of the notations that models are trained on.

Boxes are [n, 4]: x1, y1, x2, y2, in pixels of the image unless `point_scale` says what they are
fractions of. `label` is the text of all of them, or a list with one for each.

    json       [{"bbox_2d": [253, 231, 733, 787], "label": "cup"}]     thousandths (Qwen3-VL)
    ref        <ref>cup</ref><box>[[253, 231, 733, 787]]</box>         thousandths (InternVL)
    brackets   [0.25, 0.23, 0.73, 0.79]                                fractions of 1 (LLaVA)

Boxes are written in their order; `ref` writes those of a label together. In `brackets` each is a
line, with its label in front where there are several labels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

from preprocess.text.message import Message, field_error, require_field
from preprocess.text.points import NO_POINTS, Number, Point, Tag
from preprocess.text.styles.base import Draw, Exchange, Style, user_text
from preprocess.text.styles.pointing import check_bounds, point_scale
from shardspec.coordinates import Notation, write_number
from shardspec.errors import SampleError

Fractions = tuple[float, float, float, float]


def draw_boxes(message: Message, draw: Draw) -> Exchange:
    """Draws a request for the boxes of `label`."""
    boxes = _boxes(message)
    labels = _labels(message, len(boxes))
    question = message.get("question") or ", ".join(dict.fromkeys(labels))
    if not isinstance(question, str) or not question.strip():
        raise field_error(message, "question", "a text")
    user = user_text(message, draw, plain=question)
    if not boxes:
        return user, NO_POINTS
    notation = message.get("notation", "json")
    if notation not in NOTATIONS:
        raise field_error(message, "notation", " or ".join(NOTATIONS))
    draw.tags.append(NOTATIONS[notation](boxes, labels))
    return user, draw.tags[-1].text


def _boxes(message: Message) -> list[Fractions]:
    """Reads the boxes as fractions of the image, kept within it."""
    found = require_field(message, "boxes")
    try:
        # The sums refuse texts, which float() would read.
        corners = [
            (float(a + 0.0), float(b + 0.0), float(c + 0), float(d + 0)) for a, b, c, d in found
        ]
    except (TypeError, ValueError, OverflowError) as error:
        told = repr(found)[:80]
        raise SampleError("box_shape.numbers", got=told, want="[[x1, y1, x2, y2], ...]") from error
    width, height = point_scale(message, 0)
    boxes = []
    for x1, y1, x2, y2 in corners:
        check_bounds([(x1, y1), (x2, y2)], (width, height), message)
        if not (x1 < x2 and y1 < y2):
            raise SampleError("box_shape.corners", got=[x1, y1, x2, y2])
        # In pixels: a box of less than one is of another unit.
        if "point_scale" not in message and max(x2 - x1, y2 - y1) < 1:
            raise SampleError("coordinates_unit.tiny", got=[x1, y1, x2, y2], size=[width, height])
        a, b, c, d = (
            min(max(value / full, 0.0), 1.0)
            for value, full in zip((x1, y1, x2, y2), (width, height) * 2, strict=True)
        )
        boxes.append((a, b, c, d))
    return boxes


def _labels(message: Message, number: int) -> list[str]:
    label = message.get("label")
    if isinstance(label, str) and label.strip():
        return [label.strip()] * max(1, number)
    if label is None and message.get("question"):
        return [""] * number
    if (
        isinstance(label, Sequence)
        and len(label) == number
        and all(isinstance(each, str) and each.strip() for each in label)
    ):
        return [each.strip() for each in label]
    raise field_error(message, "label", "a text, or one for each box")


def _json(boxes: Sequence[Fractions], labels: Sequence[str]) -> Tag:
    pieces = ["["]
    for k, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        pieces += [", " if k else "", '{"bbox_2d": ', *_numbers(box, Notation.BOX_THOUSANDTHS)]
        pieces.append(f', "label": {json.dumps(label, ensure_ascii=False)}}}' if label else "}")
    return Tag.of([*pieces, "]"], Notation.BOX_THOUSANDTHS, _corners(boxes))


def _ref(boxes: Sequence[Fractions], labels: Sequence[str]) -> Tag:
    groups: dict[str, list[Fractions]] = {}
    for box, label in zip(boxes, labels, strict=True):
        groups.setdefault(label, []).append(box)
    pieces = []
    for label, group in groups.items():
        pieces.append(f"<ref>{label}</ref><box>[" if label else "<box>[")
        for k, box in enumerate(group):
            pieces += [", " if k else "", *_numbers(box, Notation.BOX_THOUSANDTHS)]
        pieces.append("]</box>")
    ordered = [box for group in groups.values() for box in group]
    return Tag.of(pieces, Notation.BOX_THOUSANDTHS, _corners(ordered))


def _brackets(boxes: Sequence[Fractions], labels: Sequence[str]) -> Tag:
    several = len(set(labels)) > 1
    pieces = []
    for k, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        pieces += ["\n" if k else "", f"{label}: " if several else ""]
        pieces += _numbers(box, Notation.BOX_HUNDREDTHS)
    return Tag.of(pieces, Notation.BOX_HUNDREDTHS, _corners(boxes))


def _numbers(box: Fractions, notation: Notation) -> list[str]:
    """Writes "[x1, y1, x2, y2]", in pieces."""
    pieces = [part for each in box for part in (", ", Number(write_number(each, 1, notation)))]
    return ["[", *pieces[1:], "]"]


def _corners(boxes: Sequence[Fractions]) -> list[tuple[int, list[Point]]]:
    return [(0, [corner for a, b, c, d in boxes for corner in ((a, b), (c, d))])]


NOTATIONS: Mapping[str, Callable[[Sequence[Fractions], Sequence[str]], Tag]] = {
    "json": _json,
    "ref": _ref,
    "brackets": _brackets,
}
"""How boxes are written, by name."""

STYLES: Mapping[str, Style] = {
    "boxes": Style(family="boxes", draw=draw_boxes, rigid=True, movable=True),
}
