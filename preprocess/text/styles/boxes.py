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
from typing import Any

from preprocess.text.message import Message, field_error, require_field
from preprocess.text.points import NO_POINTS
from preprocess.text.styles.base import Draw, Exchange, Style, user_text
from preprocess.text.styles.pointing import check_bounds, point_scale
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
    return user, NOTATIONS[notation](boxes, labels)


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


def _json(boxes: Sequence[Fractions], labels: Sequence[str]) -> str:
    entries: list[dict[str, Any]] = [
        {"bbox_2d": _thousandths(box), **({"label": label} if label else {})}
        for box, label in zip(boxes, labels, strict=True)
    ]
    return json.dumps(entries, ensure_ascii=False)


def _ref(boxes: Sequence[Fractions], labels: Sequence[str]) -> str:
    groups: dict[str, list[list[int]]] = {}
    for box, label in zip(boxes, labels, strict=True):
        groups.setdefault(label, []).append(_thousandths(box))
    return "".join(
        (f"<ref>{label}</ref>" if label else "") + f"<box>{json.dumps(group)}</box>"
        for label, group in groups.items()
    )


def _brackets(boxes: Sequence[Fractions], labels: Sequence[str]) -> str:
    several = len(set(labels)) > 1
    return "\n".join(
        (f"{label}: " if several else "") + "[" + ", ".join(f"{value:.2f}" for value in box) + "]"
        for box, label in zip(boxes, labels, strict=True)
    )


def _thousandths(box: Fractions) -> list[int]:
    return [round(1000 * value) for value in box]


NOTATIONS: Mapping[str, Callable[[Sequence[Fractions], Sequence[str]], str]] = {
    "json": _json,
    "ref": _ref,
    "brackets": _brackets,
}
"""How boxes are written, by name."""

STYLES: Mapping[str, Style] = {
    "boxes": Style(family="boxes", draw=draw_boxes, rigid=True),
}
