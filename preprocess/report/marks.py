"""Where a record points: the points and boxes of its messages, as fractions of their image.

Reads what styles of pointing and of boxes have, wherever it is nested: `points` (pairs, or a list
of pairs for each image), `boxes` (four corners) and `answer_annotations`. The unit is
`point_scale`; without one it is the pixels of the image, and of annotations percent. What has
another form is left out: a report shows what it can. The words of a document's pages are boxes too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

_ANNOTATION_SCALE = 100.0


class Mark(NamedTuple):
    """A point, or a box."""

    image: int
    label: str
    at: tuple[float, ...]
    """(x, y) or (x1, y1, x2, y2), as fractions of the image's sides."""


def marks(record: Mapping[str, Any], sizes: Sequence[tuple[int, int]]) -> list[Mark]:
    """Lists the points and boxes of a record.

    Args:
      record: Of a sample.
      sizes: Width and height of each image's original.
    """
    return list(_walk(record.get("message_list"), sizes, unit=None)) if sizes else []


def words(record: Mapping[str, Any], *, num_images: int) -> list[Mark]:
    """Lists the words of a document's pages, of which each is an image.

    Args:
      record: Of a sample; `ocr` of its metadata are the pages.
      num_images: Of the sample.
    """
    pages = (record.get("metadata") or {}).get("ocr")
    found: list[Mark] = []
    for image, page in enumerate(pages[:num_images] if isinstance(pages, list) else ()):
        if not isinstance(page, Mapping):
            continue
        full: list[Any] = [page.get("width"), page.get("height")]
        if not all(_is_number(side) and side > 0 for side in full):
            continue
        for word in page.get("words") or ():
            if _is_list(word) and len(word) > 4 and all(map(_is_number, word[1:5])):
                at = tuple(value / full[k % 2] for k, value in enumerate(word[1:5]))
                found.append(Mark(image, str(word[0]), at))
    return found


def _walk(value: Any, sizes: Sequence[tuple[int, int]], *, unit: float | None) -> Iterator[Mark]:
    if isinstance(value, Mapping):
        own = value.get("point_scale", unit)
        unit = float(own) if _is_number(own) and own > 0 else None
        label = _label(value)
        for image, group in enumerate(_groups(value.get("points"), corners=2)):
            yield from _marks(group, image, label, sizes, unit)
        for image, group in enumerate(_groups(value.get("boxes"), corners=4)):
            yield from _marks(group, image, label, sizes, unit)
        for name, inner in sorted(value.items()):
            if name not in ("points", "boxes"):
                percent = name == "answer_annotations" and unit is None
                yield from _walk(inner, sizes, unit=_ANNOTATION_SCALE if percent else unit)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            yield from _walk(part, sizes, unit=unit)


def _marks(
    group: Sequence[Sequence[float]],
    image: int,
    label: str | Sequence[str],
    sizes: Sequence[tuple[int, int]],
    unit: float | None,
) -> Iterator[Mark]:
    if image >= len(sizes):
        return
    full = (unit, unit) if unit else sizes[image]
    for i, corners in enumerate(group):
        name = label if isinstance(label, str) else label[i] if i < len(label) else ""
        yield Mark(image, str(name), tuple(v / full[k % 2] for k, v in enumerate(corners)))


def _groups(value: Any, *, corners: int) -> list[list[Sequence[float]]]:
    """Sorts coordinates by image; [] for what has another form."""
    if not _is_list(value) or not value:
        return []
    if all(
        _is_list(part) and len(part) == corners and all(map(_is_number, part)) for part in value
    ):
        return [list(value)]
    groups = []
    for part in value:
        inner = _groups(part, corners=corners) if _is_list(part) else []
        if _is_list(part) and not part:
            inner = [[]]
        if len(inner) != 1:
            return []
        groups += inner
    return groups


def _label(message: Mapping[str, Any]) -> str | Sequence[str]:
    for name in ("label", "label_cased", "inline_text", "question"):
        value = message.get(name)
        if isinstance(value, str) or (_is_list(value) and name == "label"):
            return value or ""
    return ""


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_number(value: Any) -> bool:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    return good and math.isfinite(value)
