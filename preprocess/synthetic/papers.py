"""Generated papers: invoices of one to four pages, whose words have known places.

What is asked of them is read off the plan, so that an answer is true by construction, and its box
is the box of the word that was written.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from preprocess.synthetic.questions import row_rng
from preprocess.synthetic.scenes import COLORS, SHAPES

PAGE_PX = (620, 877)
"""Width and height of a page: A4 at 75 dpi."""

_MARGIN_PX, _LINE_PX, _FONT_PX = 48, 34, 17
_COLUMNS_PX = (48, 300, 400, 500)
"""Where the columns of a table begin."""
_MOST_PAGES, _ITEMS = 4, (2, 6)
_NAMES = ("Ada", "Bell", "Curie", "Darwin", "Euler", "Faraday", "Gauss", "Hopper")


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperWord:
    """A word on a page."""

    text: str
    box: tuple[float, float, float, float]
    """x0, y0, x1, y1 in pixels of the page."""
    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Paper:
    """A generated document: what is on its pages, and what is known of it."""

    pages: tuple[tuple[PaperWord, ...], ...]
    questions: tuple[dict[str, Any], ...]
    """With `answer`, `evidence_pages` and `boxes`, shares of the page."""
    fields: dict[str, str]
    tables: tuple[dict[str, Any], ...]
    """`page` and `rows`, the first row the header."""

    def ocr(self) -> list[dict[str, Any]]:
        """Gives the words of each page as a file of OCR has them."""
        width, height = PAGE_PX
        return [
            {
                "width": width,
                "height": height,
                "words": [
                    {"text": word.text, "box": list(word.box), "line": word.line} for word in page
                ],
            }
            for page in self.pages
        ]

    def draw(self) -> bytes:
        """Draws the pages into one TIFF, dark grey on white, without loss."""
        pictures = [_picture(page) for page in self.pages]
        stream = io.BytesIO()
        pictures[0].save(
            stream,
            "TIFF",
            save_all=True,
            append_images=pictures[1:],
            compression="tiff_adobe_deflate",
        )
        return stream.getvalue()


def plan_paper(seed: int, idx: int) -> Paper:
    """Plans a document, without drawing it.

    >>> paper = plan_paper(0, 0)
    >>> [word.text for word in paper.pages[0]][:2]
    ['Invoice', '97678']
    """
    rng = row_rng(seed, idx)
    num_pages = int(rng.randint(1, _MOST_PAGES + 1))
    fields = {
        "Invoice": str(rng.randint(10_000, 100_000)),
        "Customer": f"{_pick(rng, _NAMES)} {_pick(rng, _NAMES)}",
        "Date": f"20{rng.randint(10, 30)}-{rng.randint(1, 13):02d}-{rng.randint(1, 29):02d}",
    }
    names = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    order = iter([names[i] for i in rng.permutation(len(names))])
    writers = [_Writer() for _ in range(num_pages)]
    questions, tables, total = [], [], 0
    for name, value in fields.items():
        box = writers[0].line([(name, _MARGIN_PX), (value, _COLUMNS_PX[1])])[-1]
        if name != "Customer":
            asked = f"What is the {name.lower()} {'number' if name == 'Invoice' else 'printed'}?"
            asked = asked.replace("date printed", "date")
            questions.append(_question(asked, value, 1, box))
    for number, writer in enumerate(writers, start=1):
        rows = [["Article", "Number", "Price", "Sum"]]
        writer.row(rows[0])
        for _ in range(int(rng.randint(*_ITEMS))):
            count, price = int(rng.randint(1, 20)), int(rng.randint(1, 100))
            rows.append([next(order), str(count), str(price), str(count * price)])
            boxes = writer.row(rows[-1])
            total += count * price
        article, count_text = rows[-1][0], rows[-1][1]
        asked = f"How many of the article {article} were sold?"
        questions.append(_question(asked, count_text, number, boxes[1]))
        tables.append({"page": number, "rows": rows})
    box = writers[-1].line([("Total", _MARGIN_PX), (str(total), _COLUMNS_PX[3])])[-1]
    questions.append(_question("What is the total?", str(total), num_pages, box))
    return Paper(
        pages=tuple(tuple(writer.words) for writer in writers),
        questions=tuple(questions),
        fields=fields,
        tables=tuple(tables),
    )


class _Writer:
    """Puts words on a page, line by line."""

    def __init__(self) -> None:
        self.words: list[PaperWord] = []
        self._lines = 0

    def line(self, texts: Sequence[tuple[str, float]]) -> list[tuple[float, float, float, float]]:
        """Writes texts at their places on a line; gives the box of the last word of each."""
        top, boxes = _MARGIN_PX + self._lines * _LINE_PX, []
        for text, left in texts:
            x = float(left)
            for word in text.split():
                x0, y0, x1, y1 = _font().getbbox(word)
                box = (x + x0, top + y0, x + x1, top + y1)
                self.words.append(PaperWord(text=word, box=box, line=self._lines))
                x += x1 + _FONT_PX // 3
            boxes.append(box)
        self._lines += 1
        return boxes

    def row(self, cells: Sequence[str]) -> list[tuple[float, float, float, float]]:
        """Writes a row of a table."""
        return self.line(list(zip(cells, _COLUMNS_PX, strict=True)))


@functools.cache
def _font() -> Any:
    return ImageFont.load_default(_FONT_PX)  # it comes with Pillow


def _picture(page: Sequence[PaperWord]) -> Image.Image:
    image = Image.new("L", PAGE_PX, 255)
    pen = ImageDraw.Draw(image)
    for word in page:
        left, top, _, _ = _font().getbbox(word.text)
        pen.text((word.box[0] - left, word.box[1] - top), word.text, fill=30, font=_font())
    return image


def _question(
    question: str, answer: str, page: int, box: tuple[float, float, float, float]
) -> dict[str, Any]:
    width, height = PAGE_PX
    shares = [value / full for value, full in zip(box, (width, height) * 2, strict=True)]
    boxes = [{"page": page, "box": shares}]
    return {"question": question, "answer": answer, "evidence_pages": [page], "boxes": boxes}


def _pick(rng: np.random.RandomState, options: Sequence[str]) -> str:
    return options[rng.randint(len(options))]
