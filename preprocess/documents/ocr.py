"""Files of OCR engines and of data sets: which kind one is, and its words.

    hOCR       words of class ocrx_word, or else lines; boxes in `title`; order of the document
    ALTO 2-4   String; unit of MeasurementUnit; order of the document
    PAGE       Word, or else TextLine; order of ReadingOrder, or else of the document
    FUNSD      `form`; ordered by lines here; `linking` gives keys and values
    Azure      `recognitionResults`, as DocVQA has it; pixels or inches
    Textract   `Blocks`; shares of the page
    plain      `pages`, or one page: width, height, words of {text, box}, or [text, x0, y0, x1, y1]

Pure: a payload, or the object that a row holds, becomes pages.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from preprocess.documents.markup import check_length, parse_html, parse_xml
from preprocess.documents.words import Box, PageText, by_lines, hull, page_text
from shardspec.errors import SampleError

Size = tuple[int, int]
"""Width and height of the picture of a page, in pixels."""

KINDS = "hOCR, ALTO, PAGE XML, FUNSD, Azure (DocVQA), Textract, or {width, height, words}"

_DECLARATION = re.compile(r"\A\s*<\?xml[^>]*\?>")

_BBOX = re.compile(r"\bbbox\s+(-?[\d.]+)\s+(-?[\d.]+)\s+(-?[\d.]+)\s+(-?[\d.]+)")

_HOCR_LINES = frozenset({"ocr_line", "ocr_header", "ocr_caption", "ocr_textfloat", "ocrx_line"})


def parse_ocr(
    source: Any, *, page_sizes: Sequence[Size | None] = (), where: str = ""
) -> list[PageText]:
    """Reads the pages of a file of OCR.

    Args:
      source: Bytes of a file, or an object of JSON that a row holds.
      page_sizes: Of the pictures of its pages, for sources that name no size (FUNSD); None for
        unknown.
      where: Named in errors.

    Raises:
      SampleError: `ocr_format` (no known kind), `ocr_broken`, `ocr_unsafe`, `ocr_boxes`.
    """
    if isinstance(source, bytes):
        check_length(source, where=where)
        source = _in_utf8(source)
        text = source.removeprefix(b"\xef\xbb\xbf").lstrip()
        if text[:1] == b"<":
            return _parse_markup(source, where=where)
        try:
            source = json.loads(text)
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
            if text[:1] in (b"{", b"["):
                raise SampleError("ocr_broken", where=where, error=str(error)[:120]) from error
            raise SampleError("ocr_format", where=where, want=KINDS) from error
    try:
        return list(_parse_object(source, page_sizes, where))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        told = f"{type(error).__name__}: {error}"[:120]
        raise SampleError("ocr_broken", where=where, error=told) from error


def _in_utf8(payload: bytes) -> bytes:
    """Rewrites a file in UTF-16, which some engines write; what cannot be decoded stays."""
    if payload[:2] not in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return payload
    try:
        text = payload.decode("utf-16")
    except UnicodeDecodeError:
        return payload
    return _DECLARATION.sub("", text, count=1).encode(errors="replace")


def _parse_markup(payload: bytes, *, where: str) -> list[PageText]:
    head = payload[:4096].lower()
    if b"<html" in head or b"<!doctype html" in head or b"ocr_page" in head:
        return list(_hocr(parse_html(payload, where=where), where))
    root = parse_xml(payload, where=where)
    readers: Mapping[str, Callable[[Element, str], Iterator[PageText]]] = {
        "alto": _alto,
        "PcGts": _page_xml,
        "html": _hocr,
    }
    if root.tag not in readers:
        raise SampleError("ocr_format", where=where, want=KINDS)
    try:
        return list(readers[root.tag](root, where))
    except (KeyError, ValueError) as error:
        told = f"{type(error).__name__}: {error}"[:120]
        raise SampleError("ocr_broken", where=where, error=told) from error


def _parse_object(source: Any, sizes: Sequence[Size | None], where: str) -> Iterator[PageText]:
    if isinstance(source, Mapping) and isinstance(source.get("pages"), list):
        source = source["pages"]
    if isinstance(source, list):
        for i, each in enumerate(source):
            yield from _parse_object(each, sizes[i : i + 1], where)
    elif not isinstance(source, Mapping):
        raise SampleError("ocr_format", where=where, want=KINDS)
    elif "recognitionResults" in source or "analyzeResult" in source:
        yield from _azure(source.get("analyzeResult") or source, where)
    elif "Blocks" in source:
        yield from _textract(source, where)
    elif "form" in source:
        yield _funsd(source, sizes[0] if sizes else None, where)
    elif "words" in source:
        yield _plain(source, sizes[0] if sizes else None, where)
    else:
        raise SampleError("ocr_format", where=where, want=KINDS)


# --- hOCR


def _hocr(root: Element, where: str) -> Iterator[PageText]:
    pages = [each for each in root.iter() if "ocr_page" in _classes(each)]
    if not pages:
        raise SampleError("ocr_format", where=where, want=KINDS)
    for page in pages:
        found = _title_box(page)
        if found is None:
            raise SampleError("ocr_boxes.page", where=where, width=None, height=None)
        left, top, right, bottom = found
        words: list[tuple[str, Box, int]] = []
        number, last = 0, page
        for word, line in _hocr_words(page, page):
            number, last = number + (line is not last), line
            box = _title_box(word) or _title_box(line if line is not page else word)
            if box is not None:
                x0, y0, x1, y1 = box
                moved = (x0 - left, y0 - top, x1 - left, y1 - top)
                words.append(("".join(word.itertext()), moved, number))
        yield page_text(words, width=right - left, height=bottom - top, unit="pixel", where=where)


def _hocr_words(element: Element, line: Element) -> Iterator[tuple[Element, Element]]:
    """Walks words, each with the innermost line around it; a line without words is its own.

    Words beside lines have the element that was given first.
    """
    for each in element:
        classes = _classes(each)
        if "ocrx_word" in classes:
            yield each, line
        elif classes & _HOCR_LINES:
            inner = list(_hocr_words(each, each))
            yield from inner or [(each, each)]
        else:
            yield from _hocr_words(each, line)


def _classes(element: Element) -> set[str]:
    return set(element.get("class", "").split())


def _title_box(element: Element) -> Box | None:
    match = _BBOX.search(element.get("title", ""))
    if match is None:
        return None
    a, b, c, d = map(float, match.groups())
    return a, b, c, d


# --- ALTO


def _alto(root: Element, where: str) -> Iterator[PageText]:
    unit = next((each.text or "" for each in root.iter("MeasurementUnit")), "pixel").strip()
    for page in root.iter("Page"):
        words: list[tuple[str, Box, int]] = []
        for number, line in enumerate(page.iter("TextLine")):
            for each in line:
                if each.tag == "String":
                    x, y = float(each.attrib["HPOS"]), float(each.attrib["VPOS"])
                    box = (x, y, x + float(each.attrib["WIDTH"]), y + float(each.attrib["HEIGHT"]))
                    words.append((each.get("CONTENT", ""), box, number))
                elif each.tag == "HYP" and words and words[-1][2] == number:
                    text, box, _ = words[-1]
                    words[-1] = (text + each.get("CONTENT", "-"), box, number)
        width, height = float(page.attrib["WIDTH"]), float(page.attrib["HEIGHT"])
        yield page_text(words, width=width, height=height, unit=unit or "pixel", where=where)


# --- PAGE


def _page_xml(root: Element, where: str) -> Iterator[PageText]:
    for page in root.iter("Page"):
        words: list[tuple[str, Box, int]] = []
        for number, line in enumerate(_page_lines(page)):
            for each in line.findall("Word") or [line]:
                text, coords = _page_unicode(each), each.find("Coords")
                if text and coords is not None:
                    words.append((text, _page_box(coords), number))
        yield page_text(
            words,
            width=float(page.attrib["imageWidth"]),
            height=float(page.attrib["imageHeight"]),
            unit="pixel",
            where=where,
        )


def _page_lines(page: Element) -> list[Element]:
    """Lists the lines of a page, by the reading order of their regions where there is one."""
    order = page.find("ReadingOrder")
    refs: list[str] = []
    if order is not None:
        refs = [each.get("regionRef", "") for each in _ordered(order)]
    ranks = {ref: rank for rank, ref in reversed(list(enumerate(refs)))}
    regions = [each for each in page if each.tag != "ReadingOrder"]
    regions.sort(key=lambda region: ranks.get(region.get("id", ""), len(ranks)))
    return [line for region in regions for line in region.iter("TextLine")]


def _ordered(group: Element) -> Iterator[Element]:
    """Walks references to regions; those of an ordered group by their index."""
    inner = list(group)
    if all(each.get("index", "").isdecimal() for each in inner):
        inner.sort(key=lambda each: int(each.attrib["index"]))
    for each in inner:
        if each.get("regionRef"):
            yield each
        yield from _ordered(each)


def _page_unicode(element: Element) -> str:
    found = element.findall("TextEquiv")
    # The lowest index is the best reading; without one there is a single reading.
    found.sort(key=lambda each: int(each.get("index", "0")))
    unicode = found[0].find("Unicode") if found else None
    return (unicode.text or "").strip() if unicode is not None else ""


def _page_box(coords: Element) -> Box:
    text = coords.get("points")
    if text:
        return hull([tuple(map(float, pair.split(","))) for pair in text.split()])
    return hull([(float(p.attrib["x"]), float(p.attrib["y"])) for p in coords.findall("Point")])


# --- JSON


def _azure(document: Mapping[str, Any], where: str) -> Iterator[PageText]:
    results = document.get("recognitionResults") or document.get("readResults") or ()
    for page in results:
        words = [
            (word["text"], hull(_pairs(word["boundingBox"])), number)
            for number, line in enumerate(page["lines"])
            for word in line.get("words") or [line]
        ]
        unit = str(page.get("unit", "pixel"))
        yield page_text(words, width=page["width"], height=page["height"], unit=unit, where=where)


def _pairs(numbers: Sequence[float]) -> list[tuple[float, float]]:
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _textract(document: Mapping[str, Any], where: str) -> Iterator[PageText]:
    blocks = {block.get("Id", str(i)): block for i, block in enumerate(document["Blocks"])}
    pages: dict[int, list[tuple[str, Box, int]]] = {}
    for number, line in enumerate(blocks.values()):
        if line["BlockType"] == "PAGE":
            pages.setdefault(int(line.get("Page", 1)), [])
        if line["BlockType"] != "LINE":
            continue
        children = [
            blocks[name]
            for each in line.get("Relationships") or ()
            if each["Type"] == "CHILD"
            for name in each["Ids"]
            if name in blocks
        ]
        for word in children or [line]:
            box = word["Geometry"]["BoundingBox"]
            x, y = float(box["Left"]), float(box["Top"])
            # Shares of a page lose their last digits where pages are counted in hundredths.
            corners = (x, y, x + float(box["Width"]), y + float(box["Height"]))
            a, b, c, d = (1000 * value for value in corners)
            pages.setdefault(int(line.get("Page", 1)), []).append(
                (word["Text"], (a, b, c, d), number)
            )
    for page in sorted(pages):
        yield page_text(pages[page], width=1000, height=1000, unit="thousandth", where=where)


def _funsd(document: Mapping[str, Any], size: Size | None, where: str) -> PageText:
    if size is None:
        raise SampleError("ocr_boxes.page", where=where, width=None, height=None)
    words = [
        (word["text"], word["box"])
        for entry in document["form"]
        for word in entry.get("words") or [entry]
        if str(word["text"]).strip()
    ]
    entries = {entry["id"]: entry for entry in document["form"] if "id" in entry}
    pairs: dict[tuple[int, int], tuple[str, str]] = {}
    for entry in document["form"]:
        for first, second in entry.get("linking") or ():  # both of its ends name a link
            ends = entries.get(first), entries.get(second)
            if all(ends) and [end["label"] for end in ends if end] == ["question", "answer"]:
                key, value = (str(end["text"]).strip() for end in ends if end)
                pairs[first, second] = (key, value)
    width, height = size
    return page_text(
        by_lines(words),
        width=width,
        height=height,
        unit="pixel",
        pairs=list(pairs.values()),
        where=where,
    )


def _plain(document: Mapping[str, Any], size: Size | None, where: str) -> PageText:
    width = document.get("width") or (size[0] if size else None)
    height = document.get("height") or (size[1] if size else None)
    if width is None or height is None:
        raise SampleError("ocr_boxes.page", where=where, width=width, height=height)
    words: list[tuple[str, Sequence[float], int]] = []
    for i, word in enumerate(document["words"]):
        if isinstance(word, Mapping):
            words.append((word["text"], word["box"], int(word.get("line", i))))
        else:
            text, *box = word
            words.append((text, box[:4], int(box[4]) if len(box) > 4 else i))
    unit = str(document.get("unit", "pixel"))
    return page_text(words, width=width, height=height, unit=unit, where=where)
