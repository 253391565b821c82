"""The process that reads PDFs: what `shardspec.child` runs, the only one with PDFium.

count   gives the number of pages
texts   checks pages against the bounds on their size; gives the text layer of each, if wanted
draw    draws a page
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from preprocess.documents.pdf import check_page, open_pdf, page_pixels, page_words, pdfium
from shardspec.child import Part, run_child


def read_pdf(request: dict[str, Any], payload: Path | bytes, where: str) -> Iterator[Part]:
    """Answers a request about a file."""
    assert isinstance(payload, bytes)
    with open_pdf(payload, where=where) as pdf:
        if request["work"] == "count":
            yield {"pages": len(pdf)}
        elif request["work"] == "draw":
            yield page_pixels(pdf, request["page"], dpi=request["dpi"], where=where)
        else:
            for page in request["pages"]:
                width, height = check_page(pdf, page, dpi=request["dpi"], where=where)
                yield {"width_px": width, "height_px": height}
            for page in request["pages"] if request["words"] else ():
                yield asdict(page_words(pdf, page, where=where))


def main() -> None:
    """Runs the process."""
    run_child(read_pdf, load=pdfium)
