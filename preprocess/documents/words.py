"""The text of a page: its words in reading order, with boxes in the units of the page.

A box is (x0, y0, x1, y1) on the upright page, from its upper left corner, in the unit that the
source counts in: points of a PDF, pixels of a scan. Width and height of the page are in the same
unit, so that a box is at `x / width`, `y / height` of any picture of the page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from shardspec.errors import SampleError

Box = tuple[float, float, float, float]

MAX_CHARS = 200_000
"""Most characters of a page that are looked at; a dense page of a newspaper has 30,000."""

OUTSIDE = 0.02
"""Share of a side by which a box may reach beyond the page, and is cut off; OCR engines do it."""

DECIMALS = 2
"""Of coordinates: a hundredth of a point or of a pixel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """A word, or whatever piece of text the source has a box for."""

    text: str
    """Without space around it."""
    box: Box
    line: int
    """Number of its line on the page, from 0 on; words of a line follow each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageText:
    """The text of one page."""

    words: tuple[Word, ...]
    """In reading order."""
    width: float
    height: float
    unit: str
    """What width, height and boxes count: "point", "pixel", or another name of the source's."""
    pairs: tuple[tuple[str, str], ...] = ()
    """Keys and values of a form, where the source links them."""

    def lines(self) -> list[str]:
        """Joins the words of each line.

        >>> word = Word(text="one", box=(0, 0, 1, 1), line=0)
        >>> PageText(words=(word, word), width=9, height=9, unit="pixel").lines()
        ['one one']
        """
        found: dict[int, list[str]] = {}
        for word in self.words:
            found.setdefault(word.line, []).append(word.text)
        return [" ".join(words) for words in found.values()]

    def to_dict(self, *, page: int) -> dict[str, Any]:
        """Gives it in plain JSON types, as samples keep it: a word is [text, x0, y0, x1, y1, line].

        Args:
          page: Number of the page in its document, from 1 on.
        """
        words = [[word.text, *word.box, word.line] for word in self.words]
        size = {"width": self.width, "height": self.height, "unit": self.unit}
        return {"page": page, **size, "words": words}


def page_text(
    words: Iterable[tuple[str, Sequence[float], int]],
    *,
    width: float,
    height: float,
    unit: str,
    pairs: Sequence[tuple[str, str]] = (),
    where: str = "",
) -> PageText:
    """Makes the text of a page from what a source says, and checks it.

    Args:
      words: (text, box, line) of each; blank ones are left out.
      width: Of the page, in `unit`.
      height: Of the page, in `unit`.
      unit: What all of it is counted in.
      pairs: Keys and values.
      where: Named in errors.

    Raises:
      SampleError: `ocr_boxes`: a box is not of numbers, or not on the page, so that it must be of
        another page or another unit; `document_text`: more characters than are looked at;
        `ocr_broken`: a text is none.
    """
    if not (_is_number(width) and _is_number(height) and width > 0 and height > 0):
        raise SampleError("ocr_boxes.page", where=where, width=width, height=height)
    found, lines, characters = [], dict[int, int](), 0
    for text, box, line in words:
        if not isinstance(text, str | int | float):
            told = f"the text of a word is {text!r:.40}"
            raise SampleError("ocr_broken", where=where, error=told)
        text = " ".join(str(text).split())
        if not text:
            continue
        characters += len(text)
        if characters > MAX_CHARS:
            raise SampleError("document_text.ocr", where=where, most=MAX_CHARS)
        if len(box) != 4 or not all(map(_is_number, box)):
            raise SampleError("ocr_boxes.numbers", where=where, word=text[:40], got=str(box)[:80])
        x0, x1 = sorted((float(box[0]), float(box[2])))
        y0, y1 = sorted((float(box[1]), float(box[3])))
        if min(x0 / width, y0 / height) < -OUTSIDE or max(x1 / width, y1 / height) > 1 + OUTSIDE:
            facts = {"box": [x0, y0, x1, y1], "width": width, "height": height, "unit": unit}
            raise SampleError("ocr_boxes.outside", where=where, word=text[:40], facts=facts)
        corners = (
            round(min(max(value, 0.0), full), DECIMALS)
            for value, full in zip((x0, y0, x1, y1), (width, height) * 2, strict=True)
        )
        a, b, c, d = corners
        found.append(Word(text=text, box=(a, b, c, d), line=lines.setdefault(line, len(lines))))
    return PageText(
        words=tuple(found),
        width=round(float(width), DECIMALS),
        height=round(float(height), DECIMALS),
        unit=unit,
        pairs=tuple(pairs),
    )


def by_lines(
    words: Sequence[tuple[str, Sequence[float]]],
) -> list[tuple[str, Sequence[float], int]]:
    """Orders words whose source has no order: by lines from above, each from the left.

    A word is of the line that is open if the middle of its height is within that line's first word.
    Columns are not told apart.

    >>> words = [("b", (5, 0, 6, 2)), ("c", (0, 9, 1, 10)), ("a", (0, 0, 1, 2))]
    >>> [text for text, _, _ in by_lines(words)]
    ['a', 'b', 'c']
    """
    rest = sorted(words, key=lambda word: (word[1][1] + word[1][3], word[1][0]))
    ordered: list[tuple[str, Sequence[float], int]] = []
    line: list[tuple[str, Sequence[float]]] = []
    number = 0
    for word in rest:
        middle = (word[1][1] + word[1][3]) / 2
        if line and not line[0][1][1] <= middle <= line[0][1][3]:
            ordered += [(*each, number) for each in sorted(line, key=lambda each: each[1][0])]
            line, number = [], number + 1
        line.append(word)
    return ordered + [(*each, number) for each in sorted(line, key=lambda each: each[1][0])]


def hull(points: Iterable[Sequence[float]]) -> Box:
    """Gives the upright box around points.

    >>> hull([(1, 5), (3, 2), (2, 2)])
    (1.0, 2.0, 3.0, 5.0)
    """
    pairs = [(float(x), float(y)) for x, y in points]
    xs, ys = [x for x, _ in pairs], [y for _, y in pairs]
    return min(xs), min(ys), max(xs), max(ys)


def _is_number(value: object) -> bool:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and math.isfinite(value)  # type: ignore[arg-type]
