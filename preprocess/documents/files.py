"""Files of documents: which kind one is, how many pages it has, and one page of it.

A PDF is drawn at a dpi, in a process of its own (`shardspec.child`): a file that ends
PDFium, or takes it too long, costs itself alone. Pages of a TIFF, and files of a single picture,
are what they are. The pages of a TIFF are counted by walking its directories: a file that is cut
has fewer to Pillow, and no error.
"""

from __future__ import annotations

import functools
import hashlib
import os
import struct
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from preprocess.documents.pdf import MAX_PAGES, is_pdf
from preprocess.documents.words import PageText, Word
from preprocess.media import MemoryBudget
from shardspec.child import ChildProcess, Part
from shardspec.errors import SampleError

Kind = Literal["pdf", "tiff", "image"]

MAX_DOCUMENT_BYTES = 1 << 30
"""Longest file of a document: it is held in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PdfLimits:
    """What PDFium may take for one request."""

    time_limit_s: float = 120.0
    """Pages take tenths of a second."""
    memory_bytes: int = 4 << 30
    """For the longest file, the largest page, and the pictures on it."""


_DRAWN_BYTES = 7
"""Bytes of a pixel while it is drawn, and of its copy."""

_TIFF_ORDER = {b"II": "<", b"MM": ">"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PageImage:
    """A page of a file, drawn when it is read."""

    document: bytes | Path = field(repr=False)
    page: int
    """From 1 on."""
    dpi: float
    """Of a PDF; of no meaning for others."""

    def __str__(self) -> str:
        return self.where

    @property
    def where(self) -> str:
        """Names it in errors."""
        name = str(self.document) if isinstance(self.document, Path) else "document"
        return f"{name} page {self.page}"

    def read(self, *, memory: MemoryBudget | None = None) -> np.ndarray | bytes:
        """Draws the page of a PDF, uint8 [H, W, 3]; gives the whole file of any other document.

        Args:
          memory: What drawing may take in all processes together.

        Raises:
          SampleError: As `open_pdf` and `page_pixels`; `image_missing`, `document_process`.
        """
        payload = read_file(self.document)
        if document_kind(payload) != "pdf":
            return payload
        where, request = self.where, {"dpi": self.dpi, "page": self.page}
        checked = {**request, "work": "texts", "pages": [self.page], "words": False}
        (size,) = _ask_pdfium(checked, payload, where)
        assert isinstance(size, dict)
        need_bytes = size["width_px"] * size["height_px"] * _DRAWN_BYTES
        with memory.hold(min(need_bytes, memory.largest_bytes)) if memory else nullcontext():
            (pixels,) = _ask_pdfium({**request, "work": "draw"}, payload, where)
        assert isinstance(pixels, np.ndarray)
        return pixels

    @property
    def frame(self) -> int:
        """Number of the picture in a file that `read` gives whole, from 0 on."""
        return self.page - 1

    def identity(self) -> str:
        """Names what the page is, for keys and splits: its file by content, its number, its dpi."""
        return page_identity(
            hashlib.sha256(read_file(self.document)).hexdigest(), page=self.page, dpi=self.dpi
        )


def page_identity(sha256: str, *, page: int, dpi: float) -> str:
    """Names a page of a file whose hash is known."""
    return f"page:{sha256}:{page}:{dpi:g}"


def read_file(document: bytes | Path) -> bytes:
    """Reads the file of a document.

    Raises:
      SampleError: `image_missing`, `document_bytes`.
    """
    if isinstance(document, bytes):
        return document
    try:
        if document.exists() and not document.is_file():
            raise SampleError("image_missing.special", where=str(document))
        num_bytes = document.stat().st_size
        if num_bytes > MAX_DOCUMENT_BYTES:
            raise SampleError(
                "document_bytes",
                where=str(document),
                got_bytes=num_bytes,
                most_bytes=MAX_DOCUMENT_BYTES,
            )
        return document.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise SampleError("image_missing.row", where=str(document), error=error) from error


def document_kind(payload: bytes) -> Kind:
    """Says how the pages of a file are found.

    >>> document_kind(b"%PDF-1.7"), document_kind(b"II*\\0"), document_kind(b"GIF89a")
    ('pdf', 'tiff', 'image')
    """
    if is_pdf(payload):
        return "pdf"
    return "tiff" if payload[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") else "image"


def count_pages(payload: bytes, *, where: str = "") -> int:
    """Counts the pages of a file.

    Raises:
      SampleError: `document_encrypted`, `document_broken`, `document_pages`.
    """
    kind = document_kind(payload)
    if kind == "pdf":
        (answer,) = _ask_pdfium({"work": "count"}, payload, where)
        assert isinstance(answer, dict)
        return int(answer["pages"])
    return _count_directories(payload, where=where) if kind == "tiff" else 1


def pdf_texts(
    payload: bytes, pages: Sequence[int], *, dpi: float, words: bool, where: str = ""
) -> list[PageText]:
    """Checks pages of a PDF and reads their text layers, in one pass.

    Args:
      payload: The file.
      pages: Numbers, from 1 on.
      dpi: At which they are to be drawn.
      words: Whether their texts are wanted; [] otherwise.
      where: Named in errors.

    Raises:
      SampleError: As `open_pdf`, `check_page` and `page_words`.
    """
    request = {"work": "texts", "pages": list(pages), "dpi": dpi, "words": words}
    found = _ask_pdfium(request, payload, where)[len(pages) :]
    return [_page_text(part) for part in found if isinstance(part, dict)]


def _page_text(told: Mapping[str, Any]) -> PageText:
    """Rebuilds the text of a page as another process has sent it."""
    words = tuple(Word(**{**word, "box": tuple(word["box"])}) for word in told["words"])
    return PageText(words=words, width=told["width"], height=told["height"], unit=told["unit"])


def _ask_pdfium(request: Mapping[str, Any], payload: bytes, where: str) -> list[Part]:
    """Has the process of PDFium answer a request.

    Raises:
      SampleError: `document_process`, and what the request raises.
      ConfigError: `documents_extra`.
    """
    parts: list[Part] = []
    _pdfium_of(os.getpid()).ask(
        request, (payload,), on_facts=parts.append, on_array=parts.append, where=where
    )
    return parts


@functools.lru_cache(1)
def _pdfium_of(pid: int) -> ChildProcess:
    """Gives the process of PDFium that a process has: a fork gets one of its own, lock and all."""
    del pid
    limits = PdfLimits()
    return ChildProcess("preprocess.documents.worker", reason="document_process", limits=limits)


def _count_directories(payload: bytes, *, where: str) -> int:
    """Counts the image file directories of a TIFF, each of which is a page."""
    order = _TIFF_ORDER[payload[:2]]
    big = payload[2:4] in (b"+\0", b"\0+")
    word, size_of_count, entry = ("Q", 8, 20) if big else ("I", 2, 12)
    at, seen = 8 if big else 4, set[int]()
    try:
        (offset,) = struct.unpack_from(order + word, payload, at)
        while offset:
            if offset in seen or len(seen) >= MAX_PAGES:
                pages = "a loop" if offset in seen else f"more than {MAX_PAGES}"
                raise SampleError("document_pages", where=where, pages=pages, most=MAX_PAGES)
            seen.add(offset)
            (count,) = struct.unpack_from(order + ("Q" if big else "H"), payload, offset)
            (offset,) = struct.unpack_from(
                order + word, payload, offset + size_of_count + count * entry
            )
    except (struct.error, OverflowError) as error:
        told = f"the file ends before its page {len(seen)}"
        raise SampleError("document_broken.file", where=where, error=told) from error
    if not seen:
        raise SampleError("document_broken.file", where=where, error="no page")
    return len(seen)
