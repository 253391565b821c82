"""XML and HTML of OCR engines, read without what makes such files dangerous.

XML: a file that declares an entity is refused, so that none can grow when it is read or name
another file; so are files that are too long or nested too deeply. Declarations of a document type
without entities are ignored. HTML goes through the tolerant parser of Python, which knows no
entities but characters.
"""

from __future__ import annotations

from html.parser import HTMLParser
from typing import NoReturn
from xml.etree.ElementTree import Element, TreeBuilder  # data structures; parsing is done here
from xml.parsers import expat

from shardspec.errors import SampleError

MAX_OCR_BYTES = 64 * 2**20
"""Longest file of OCR: some 200,000 words of ALTO."""

MAX_DEPTH = 64
"""Of elements. ALTO and PAGE use 8, hOCR 6 and what surrounds it."""

_PIECE = 64 * 1024
"""Characters of HTML that are parsed at a time."""

_MAX_OPEN = 512 * 1024
"""Most characters of a tag, a comment or a script: Python's parser takes a time that is quadratic
in them."""

_VOID = frozenset(
    ["area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source"]
    + ["track", "wbr"]
)
"""Elements of HTML that have no end."""


def parse_xml(payload: bytes, *, where: str = "") -> Element:
    """Parses XML; the names of elements and attributes lose their namespaces.

    Raises:
      SampleError: `ocr_unsafe` (entities, too long or too deep), `ocr_broken`.
    """
    check_length(payload, where=where)
    builder, depth = TreeBuilder(), 0
    parser = expat.ParserCreate(namespace_separator="}")
    parser.buffer_text = True

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > MAX_DEPTH:
            raise SampleError("ocr_unsafe.depth", where=where, most=MAX_DEPTH)
        builder.start(_local(name), {_local(key): value for key, value in attributes.items()})

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(_local(name))

    def refuse(*_: object) -> NoReturn:
        raise SampleError("ocr_unsafe.entity", where=where)

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = builder.data
    parser.EntityDeclHandler = refuse
    parser.ExternalEntityRefHandler = refuse
    try:
        parser.Parse(payload, True)
    except (expat.ExpatError, ValueError, LookupError) as error:  # LookupError: of the encoding
        raise SampleError("ocr_broken", where=where, error=str(error)[:120]) from error
    return builder.close()


def parse_html(payload: bytes, *, where: str = "") -> Element:
    """Parses HTML, whole or not, into a tree under an element of its own.

    Raises:
      SampleError: `ocr_unsafe` (too long or too deep), `ocr_broken` (not UTF-8).
    """
    check_length(payload, where=where)
    try:
        text = payload.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SampleError("ocr_broken", where=where, error=str(error)[:120]) from error
    tree = _Tree(where)
    for start in range(0, len(text), _PIECE):
        tree.feed(text[start : start + _PIECE])
        if len(tree.rawdata) > _MAX_OPEN:
            told = "a tag or comment that does not end"
            raise SampleError("ocr_broken", where=where, error=told)
    tree.close()
    return tree.root


class _Tree(HTMLParser):
    """Builds a tree; ends without a start are ignored, elements without an end end with theirs."""

    def __init__(self, where: str) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("document")
        self._open = [self.root]
        self._where = where

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self._open[-1].append(element)
        if tag in _VOID:
            return
        self._open.append(element)
        if len(self._open) > MAX_DEPTH:
            raise SampleError("ocr_unsafe.depth", where=self._where, most=MAX_DEPTH)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        names = [element.tag for element in self._open]
        if tag in names[1:]:
            del self._open[len(names) - 1 - names[::-1].index(tag) :]

    def handle_data(self, data: str) -> None:
        element = self._open[-1]
        if len(element):
            element[-1].tail = (element[-1].tail or "") + data
        else:
            element.text = (element.text or "") + data


def check_length(payload: bytes, *, where: str = "") -> None:
    """Refuses a file of OCR that is too long.

    Raises:
      SampleError: `ocr_unsafe`.
    """
    if len(payload) > MAX_OCR_BYTES:
        raise SampleError(
            "ocr_unsafe.length", where=where, got_bytes=len(payload), most_bytes=MAX_OCR_BYTES
        )


def _local(name: str) -> str:
    return name.rpartition("}")[2]
