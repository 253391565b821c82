"""PDF, by PDFium: pages as pictures, and the text layer as words.

Sizes are judged from the page's description before anything of its size is allocated. PDFium must
not be entered by two threads at a time, and a file may hang or end it: this is for a process that
does nothing else (`preprocess.documents.worker`).

Boxes of characters are in the page's own space, which is neither rotated nor moved to the crop box;
PDFium's own mapping to a device brings them onto the upright page. PDFium ignores `/UserUnit`, for
pictures and boxes alike.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

from preprocess.documents.words import MAX_CHARS, Box, PageText, page_text
from shardspec.errors import ConfigError, SampleError

MAX_PAGES = 5_000
"""Most pages of a document. The largest in public sets of documents have some 3,000 (OCR-IDL)."""

MAX_PAGE_PX = 32_000_000
"""Most pixels of a page: A1 at 200 dpi, 4 bytes for each while it is drawn."""

MAX_PAGE_SIDE_PX = 16_384

_PASSWORD = 4
"""FPDF_ERR_PASSWORD."""

_SCALE = 100
"""Steps of a point in which PDFium maps boxes."""

_HYPHENS = {0x02: "-", 0xFFFE: "-", 0xAD: "-"}
"""How PDFium may give the hyphen at the end of a line."""


@functools.cache
def pdfium() -> ModuleType:
    """Imports PDFium.

    Raises:
      ConfigError: `documents_extra`.
    """
    try:
        import pypdfium2
    except ImportError as error:
        raise ConfigError("documents_extra", error=error) from error
    module: ModuleType = pypdfium2
    return module


def pdfium_version() -> str:
    """Names the release of the library that pages are drawn by, without importing it."""
    try:
        return importlib.metadata.version("pypdfium2")
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def is_pdf(payload: bytes) -> bool:
    """Returns True for a PDF: its mark is among the first 1024 bytes."""
    return b"%PDF-" in payload[:1024]


@contextmanager
def open_pdf(payload: bytes, *, where: str = "") -> Iterator[Any]:
    """Opens a PDF.

    Raises:
      SampleError: `document_encrypted`, `document_broken`, `document_pages`.
      ConfigError: `documents_extra`.
    """
    library = pdfium()
    try:
        pdf = library.PdfDocument(payload)
    except library.PdfiumError as error:
        if error.err_code == _PASSWORD:
            raise SampleError("document_encrypted", where=where) from error
        raise SampleError("document_broken.file", where=where, error=error) from error
    try:
        if not 1 <= len(pdf) <= MAX_PAGES:
            raise SampleError("document_pages", where=where, pages=len(pdf), most=MAX_PAGES)
        if pdf.get_formtype():
            pdf.init_forms()  # or fields are drawn without what is in them
        yield pdf
    except library.PdfiumError as error:
        raise SampleError("document_broken.page", where=where, error=error) from error
    finally:
        pdf.close()


def page_pixels(pdf: Any, page: int, *, dpi: float, where: str = "") -> np.ndarray:
    """Draws a page: uint8 [H, W, 3].

    Args:
      pdf: As `open_pdf` gives it.
      page: Its number, from 1 on.
      dpi: Pixels per 72 points; sides are rounded up.
      where: Named in errors.

    Raises:
      SampleError: `document_page_size`, `document_broken`.
    """
    check_page(pdf, page, dpi=dpi, where=where)
    bitmap = pdf[page - 1].render(scale=dpi / 72, rev_byteorder=True)
    try:
        return np.array(bitmap.to_numpy()[..., :3])
    finally:
        bitmap.close()


def check_page(pdf: Any, page: int, *, dpi: float, where: str = "") -> tuple[int, int]:
    """Gives the size in pixels that a page is drawn at, or refuses it.

    Raises:
      SampleError: `document_page_size`.
    """
    width_pt, height_pt = pdf.get_page_size(page - 1)
    scale = dpi / 72
    if not (math.isfinite(width_pt) and math.isfinite(height_pt)):
        raise SampleError("document_broken.page", where=where, error="a page without a size")
    width, height = math.ceil(width_pt * scale), math.ceil(height_pt * scale)
    check_page_size(width, height, page=page, where=where)
    return width, height


def check_page_size(width: int, height: int, *, page: int, where: str = "") -> None:
    """Refuses a page by its size in pixels.

    Raises:
      SampleError: `document_page_size`.
    """
    if not (
        0 < width <= MAX_PAGE_SIDE_PX
        and 0 < height <= MAX_PAGE_SIDE_PX
        and width * height <= MAX_PAGE_PX
    ):
        raise SampleError(
            "document_page_size",
            where=where,
            page=page,
            width_px=width,
            height_px=height,
            most_px=MAX_PAGE_PX,
            most_side_px=MAX_PAGE_SIDE_PX,
        )


def page_words(pdf: Any, page: int, *, where: str = "") -> PageText:
    """Reads the text layer of a page, in points of the upright page.

    Characters up to white space are a word, and its box is around theirs. The order is that of the
    file, which most programs write in reading order. Words beside the page, which nobody sees, are
    left out, and boxes end with the page.

    Raises:
      SampleError: `document_text`: more characters than are looked at; `document_broken`.
    """
    opened = pdf[page - 1]
    width, height = opened.get_size()
    text_page = opened.get_textpage()
    count = text_page.count_chars()
    if count > MAX_CHARS:
        raise SampleError(
            "document_text.page", where=where, page=page, characters=count, most=MAX_CHARS
        )
    words = list(_seen(_words(_characters(opened, text_page, count)), width, height))
    return page_text(words, width=width, height=height, unit="point", where=where)


def _characters(page: Any, text_page: Any, count: int) -> Iterator[tuple[str, Box]]:
    """Gives each character with its box on the upright page, in points."""
    raw = pdfium().raw
    width, height = (round(side * _SCALE) for side in page.get_size())
    left, right, bottom, top = (ctypes.c_double() for _ in range(4))
    x, y = ctypes.c_int(), ctypes.c_int()

    def mapped(page_x: float, page_y: float) -> tuple[float, float]:
        raw.FPDF_PageToDevice(page, 0, 0, width, height, 0, page_x, page_y, x, y)
        return x.value / _SCALE, y.value / _SCALE

    high = 0  # the first half of a pair of UTF-16
    for i in range(count):
        code = raw.FPDFText_GetUnicode(text_page, i)
        if 0xD800 <= code < 0xDC00:
            high = code
            continue
        if 0xDC00 <= code < 0xE000:
            code = 0x10000 + ((high - 0xD800) << 10) + (code - 0xDC00) if high else 0xFFFD
        high = 0
        text = _HYPHENS.get(code) or (chr(code) if code <= 0x10FFFF else "\ufffd")
        if text.isspace() or not code:
            yield text if code else " ", (0.0, 0.0, 0.0, 0.0)
            continue
        if not raw.FPDFText_GetCharBox(text_page, i, left, right, bottom, top):
            continue
        (x0, y0), (x1, y1) = mapped(left.value, bottom.value), mapped(right.value, top.value)
        yield text, (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))


def _words(characters: Iterator[tuple[str, Box]]) -> Iterator[tuple[str, Sequence[float], int]]:
    text, boxes, line = "", list[Box](), 0
    for character, box in characters:
        if not character.isspace():
            text += character
            boxes.append(box)
            continue
        if text:
            yield text, _around(boxes), line
            text, boxes = "", []
        line += character in "\r\n"
    if text:
        yield text, _around(boxes), line


def _seen(
    words: Iterator[tuple[str, Sequence[float], int]], width: float, height: float
) -> Iterator[tuple[str, Sequence[float], int]]:
    """Cuts the boxes of words to the page, and leaves out what is beside it."""
    for text, (x0, y0, x1, y1), line in words:
        if x0 < width and y0 < height and x1 > 0 and y1 > 0:
            yield text, (max(x0, 0.0), max(y0, 0.0), min(x1, width), min(y1, height)), line


def _around(boxes: Sequence[Box]) -> Box:
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0), min(y0), max(x1), max(y1)
