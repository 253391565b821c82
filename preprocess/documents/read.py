"""From what a row says of a document to an example: pages, messages, words, page numbers.

1. The pages of the document are counted, and those of the budget chosen (`keep_pages`). A question
   of which a page with evidence is not kept is left out: it could only be guessed.
2. The words of the kept pages come from the row's OCR, or else from the text layer of a PDF.
3. Messages follow from the tasks of the policy, as far as the row has what each needs.
4. Where the document has several pages, each is named by its number in the document.

Nothing is drawn: what training redraws is in the messages, as alternatives of their style.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from preprocess.documents.files import (
    PageImage,
    count_pages,
    document_kind,
    pdf_texts,
    read_file,
)
from preprocess.documents.ocr import Size, parse_ocr
from preprocess.documents.pages import keep_pages
from preprocess.documents.words import Box, PageText
from preprocess.formats import DocumentPolicy
from preprocess.media import ImageLimits, open_source
from shardspec.errors import SampleError
from shardspec.media import PILLOW_DECODE_ERRORS

_ONE_PAGE = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
"""Suffixes of files that need not be opened to know that they have one page."""

_WEB_URL = re.compile(r"https?://\S+", re.IGNORECASE)

SQUARE = 1.05
"""A page whose sides differ by no more than this factor may be of either way up."""

_MANY_PAGES = (".pdf", ".tif", ".tiff")
"""Suffixes of URLs whose files are read whole, for their pages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    """A document whose pages can be counted."""

    images: Sequence[Any]
    """Of each page, as examples have images."""
    payload: bytes | None
    """The file, if all pages are of one."""
    kind: str
    where: str


def read_document(
    example: Mapping[str, Any],
    *,
    policy: DocumentPolicy,
    find: Callable[[Any], Any] = lambda source: source,
    read_url: Callable[[str], bytes] | None = None,
) -> dict[str, Any]:
    """Makes the example of a document.

    Args:
      example: As `preprocess.formats.documents` gives it; its images are found already.
      policy: How.
      find: Finds a file of OCR that the row names: bytes or a path.
      read_url: Gives the file of a URL. None: nothing is fetched yet; where the document is the URL
        of a PDF or TIFF, or its OCR is at URLs, this is an example without messages then, whose
        images are all of its URLs.

    Returns:
      An example with `image` (the kept pages), `message_list`, `metadata` (`pages`, the numbers of
      the kept pages; `num_pages`; `ocr`, their words; `questions_left_out`, how many, if any),
      `leads`, the texts in front of them, and `rigid`.

    Raises:
      SampleError: `document_*`, `ocr_*`, `row_fields`, `image_missing`.
    """
    request = example["document"]
    url = _document_url(example["image"])
    ocr_urls = [each for each in _ocr_files(request.get("ocr"), find) if is_web_url(each)]
    if read_url is None and (url or ocr_urls):
        metadata = dict(example.get("metadata", {}))
        urls = [*filter(is_web_url, example["image"]), *ocr_urls]
        images = list(dict.fromkeys(urls))
        return {"image": images, "message_list": [], "metadata": metadata, "rigid": True}
    images = [read_url(url)] if url and read_url is not None else example["image"]
    opened = _open(images, dpi=policy.dpi, name=url)
    num_pages = len(opened.images)
    candidates = request.get("page_numbers") or list(range(1, num_pages + 1))
    if candidates[-1] > num_pages:
        raise SampleError(
            "document_page_number", where=opened.where, page=candidates[-1], pages=num_pages
        )
    evidence = set(request.get("evidence_pages", ()))
    evidence |= {page for each in request["questions"] for page in _evidence(each, request, policy)}
    if max(evidence, default=0) > num_pages:
        raise SampleError(
            "document_page_number", where=opened.where, page=max(evidence), pages=num_pages
        )
    kept = keep_pages(candidates, budget=policy.max_pages, evidence=sorted(evidence))
    texts = _texts(request, opened, kept, candidates, policy=policy, find=find, read_url=read_url)
    plain = request.get("ocr_text")
    pages = _Pages(numbers=kept, candidates=candidates, total=num_pages, texts=texts)
    messages = list(_messages(request, pages, policy=policy, plain=plain, where=opened.where))
    metadata = dict(example.get("metadata", {}))
    left_out = [q for q in request["questions"] if not _evidence(q, request, policy) <= {*kept}]
    if left_out:
        metadata["questions_left_out"] = len(left_out)
    if num_pages > 1:
        metadata |= {"pages": kept, "num_pages": num_pages}
    if texts:
        metadata["ocr"] = [text.to_dict(page=page) for page, text in texts.items()]
    elif plain:
        metadata["ocr"] = plain
    leads = {"leads": [f"Page {page}" for page in kept]} if num_pages > 1 else {}
    images = [opened.images[page - 1] for page in kept]
    found = {"image": images, "message_list": messages, "metadata": metadata, "rigid": True}
    return {**found, **leads}


def _document_url(images: Sequence[Any]) -> str:
    """Gives the URL of a file that may have several pages; "" for anything else."""
    first = images[0]
    if len(images) != 1 or not isinstance(first, str):
        return ""
    return first if first.partition("?")[0].lower().endswith(_MANY_PAGES) else ""


def _open(images: Sequence[Any], *, dpi: float, name: str) -> _Opened:
    images = _read_remote(images) if len(images) == 1 else images
    first = images[0]
    where = str(first) if isinstance(first, str | Path) else name
    one_file = len(images) == 1 and isinstance(first, bytes | Path)
    if one_file and not (isinstance(first, Path) and first.suffix.lower() in _ONE_PAGE):
        payload = read_file(first)
        kind = document_kind(payload)
        if kind == "image":
            return _Opened(images=images, payload=None, kind=kind, where=where)
        numbers = range(1, count_pages(payload, where=where) + 1)
        pages = [PageImage(document=first, page=number, dpi=dpi) for number in numbers]
        return _Opened(images=pages, payload=payload, kind=kind, where=where)
    for each in images:
        if isinstance(each, str) and each.partition("?")[0].lower().endswith(".pdf"):
            raise SampleError("document_url", where=each)
        if isinstance(each, bytes) or (
            isinstance(each, Path) and each.suffix.lower() in _MANY_PAGES and each.exists()
        ):
            payload = read_file(each)
            if document_kind(payload) != "image" and count_pages(payload, where=where) > 1:
                raise SampleError("document_files", where=where, files=len(images))
    return _Opened(images=images, payload=None, kind="image", where=where)


def _read_remote(images: Sequence[Any]) -> list[Any]:
    """Reads objects of stores, whose pages must be counted; scenes and pages stay as they are."""
    return [each.read() if hasattr(each, "url") else each for each in images]


# --- words


def _texts(
    request: Mapping[str, Any],
    opened: _Opened,
    kept: Sequence[int],
    candidates: Sequence[int],
    *,
    policy: DocumentPolicy,
    find: Callable[[Any], Any],
    read_url: Callable[[str], bytes] | None,
) -> dict[int, PageText]:
    """Gives the text of each kept page, {} where none is known."""
    source = request.get("ocr")
    is_pdf = opened.kind == "pdf" and opened.payload is not None
    if is_pdf:
        assert opened.payload is not None
        layer = policy.text_layer and source is None and "ocr_text" not in request
        read = pdf_texts(opened.payload, kept, dpi=policy.dpi, words=layer, where=opened.where)
        found = dict(zip(kept, read, strict=False))
        if any(text.words for text in found.values()):
            return found
    if source is None:
        return {}
    sizes = _page_sizes(opened, read_url)
    pages: list[PageText] = []
    for each in _ocr_files(source, find):
        payload, where = _ocr_source(_read_remote([each])[0], opened.where, read_url)
        pages += parse_ocr(payload, page_sizes=sizes[len(pages) :], where=where)
    num_pages = len(opened.images)
    numbers = range(1, num_pages + 1) if len(pages) == num_pages else candidates
    if len(pages) != len(numbers):
        raise SampleError("ocr_pages", where=opened.where, ocr_pages=len(pages), pages=num_pages)
    by_number = dict(zip(numbers, pages, strict=True))
    for page in kept:
        _require_same_way_up(by_number[page], sizes[page - 1], where=f"{opened.where} page {page}")
    return {page: by_number[page] for page in kept}


def _require_same_way_up(text: PageText, size: Size | None, *, where: str) -> None:
    """Refuses OCR of an upright page for a picture that lies on its side, and the reverse.

    A page that counts in shares, and one that is square within `SQUARE`, say nothing. Of the same
    way up, sides may differ: boxes are shares of them, and a picture may have been stretched.

    Raises:
      SampleError: `ocr_turned`.
    """
    if size is None:
        return
    aspects = text.width / text.height, size[0] / size[1]
    if min(aspects) < 1 / SQUARE and max(aspects) > SQUARE:
        ocr = f"{text.width:g} x {text.height:g}"
        raise SampleError("ocr_turned", where=where, ocr=ocr, picture=f"{size[0]} x {size[1]}")


def _ocr_files(source: Any, find: Callable[[Any], Any]) -> list[Any]:
    """Lists the files of OCR of a document, found, or what the row has instead of files."""
    if source is None:
        return []
    several = isinstance(source, list | tuple) and _are_files(source)
    return [find(each) if _is_name(each) else each for each in (source if several else [source])]


def is_web_url(source: Any) -> bool:
    """Returns True for a URL of the web, which is fetched."""
    return isinstance(source, str) and _WEB_URL.fullmatch(source) is not None


def _are_files(sources: Sequence[Any]) -> bool:
    """Returns True for a list with a source for each page, not a list that is an object of OCR."""
    return all(_is_name(each) or isinstance(each, bytes | Mapping) for each in sources)


def _is_name(source: Any) -> bool:
    """Returns True for the name of a file, as against the text of one."""
    if isinstance(source, str):
        return source.lstrip()[:1] not in ("<", "{", "[")
    return isinstance(source, Mapping) and not {"bytes", "path"}.isdisjoint(source)


def _ocr_source(
    source: Any, where: str, read_url: Callable[[str], bytes] | None
) -> tuple[Any, str]:
    if isinstance(source, Path):
        return read_file(source), str(source)
    if read_url is not None and is_web_url(source):
        return read_url(source), source
    if isinstance(source, str):
        return source.encode(), where
    return source, where


def _page_sizes(opened: _Opened, read_url: Callable[[str], bytes] | None) -> list[Size | None]:
    """Reads the sizes of the pages' pictures from their headers; None where one is not at hand."""
    if opened.kind == "pdf":
        return [None] * len(opened.images)  # the picture is not what an engine for scans has seen
    if opened.payload is None:
        return [_image_size(each, read_url) for each in opened.images]
    try:
        with Image.open(io.BytesIO(opened.payload), formats=["TIFF"]) as tiff:
            return [_frame_size(tiff, number) for number in range(len(opened.images))]
    except PILLOW_DECODE_ERRORS:  # the job counts it when it opens the picture
        return [None] * len(opened.images)


def _frame_size(tiff: Image.Image, number: int) -> Size:
    tiff.seek(number)
    return _upright_size(tiff)


def _image_size(image: Any, read_url: Callable[[str], bytes] | None) -> Size | None:
    if read_url is not None and is_web_url(image):
        try:
            image = read_url(image)
        except SampleError:  # a dead link, which the job counts as one
            return None
    if isinstance(image, Image.Image):
        return _upright_size(image)
    if isinstance(image, bytes | Path):
        try:
            return _upright_size(open_source(read_file(image), limits=ImageLimits()))
        except SampleError:  # as above
            return None
    shape = getattr(image, "shape", None)
    return (int(shape[1]), int(shape[0])) if shape is not None and len(shape) >= 2 else None


def _upright_size(image: Image.Image) -> Size:
    turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    width, height = image.size
    return (height, width) if turned else (width, height)


# --- messages


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pages:
    """The kept pages, and how texts speak of them."""

    numbers: Sequence[int]
    candidates: Sequence[int]
    """The pages that the row means, kept or not."""
    total: int
    texts: Mapping[int, PageText]

    @property
    def several(self) -> bool:
        return self.total > 1

    def named(self, page: int, *, preposition: str = "of") -> str:
        """Names a page inside of a sentence; "" for the page of a document that has one."""
        return f" {preposition} page {page}" if self.several else ""

    def place(self, page: int, box: Any, *, unit: str, where: str) -> Box:
        """Gives a box as shares of its page.

        Raises:
          SampleError: `ocr_boxes`, `document_page_number`.
        """
        width = height = 1.0
        if unit == "ocr":
            if page not in self.texts:
                raise SampleError("ocr_boxes.page", where=where, width=None, height=None)
            width, height = self.texts[page].width, self.texts[page].height
        try:
            x0, y0, x1, y1 = (float(value + 0.0) for value in box)
        except (TypeError, ValueError) as error:
            got = str(box)[:80]
            raise SampleError("ocr_boxes.numbers", where=where, word="", got=got) from error
        shares = (x0 / width, y0 / height, x1 / width, y1 / height)
        if not (0 <= shares[0] < shares[2] <= 1 and 0 <= shares[1] < shares[3] <= 1):
            facts = {"box": [x0, y0, x1, y1], "width": width, "height": height, "unit": unit}
            raise SampleError("ocr_boxes.outside", where=where, word="", facts=facts)
        return shares


def _messages(
    request: Mapping[str, Any],
    pages: _Pages,
    *,
    policy: DocumentPolicy,
    plain: str | None,
    where: str,
) -> Iterator[dict[str, Any]]:
    with_ocr: dict[str, Any] = {}
    if policy.ocr != "none" and (pages.texts or plain):
        with_ocr = {"ocr": policy.ocr, "ocr_tokens": policy.ocr_tokens}
    for asked in request["questions"]:
        if not _evidence(asked, request, policy) <= {*pages.numbers}:
            continue
        said = {name: asked[name] for name in ("answer", "answers", "unanswered") if name in asked}
        if "qa" in policy.tasks and said:
            message = {"style": request["style"], "question": asked["question"], **said}
            yield {**message, **with_ocr}
        if "grounded" in policy.tasks and asked.get("boxes"):
            for message in _grounded(asked, {**request, "where": where}, pages, policy):
                yield {**message, **with_ocr}
    if "transcription" in policy.tasks:
        yield from _transcriptions(pages, plain)
    if "region" in policy.tasks:
        yield from _regions(request.get("regions"), pages, policy, where)
    if "key_value" in policy.tasks:
        yield from _key_values(request.get("fields"), pages, with_ocr)
    if "table" in policy.tasks:
        yield from _tables(request.get("tables"), pages, with_ocr, where)


def _evidence(
    asked: Mapping[str, Any], request: Mapping[str, Any], policy: DocumentPolicy
) -> set[int]:
    """Gives the pages that an answer is on: those stated, for it or for all, and of its boxes."""
    pages = set(asked.get("evidence_pages") or request.get("evidence_pages", ()))
    boxes = _records(asked.get("boxes"), "boxes") if "grounded" in policy.tasks else []
    return pages | {each["page"] for each in boxes if _is_page(each.get("page"))}


def _grounded(
    asked: Mapping[str, Any], request: Mapping[str, Any], pages: _Pages, policy: DocumentPolicy
) -> Iterator[dict[str, Any]]:
    """Requests the places of an answer: as points on all pages, or as boxes on each."""
    boxes: dict[int, list[Box]] = {page: [] for page in pages.numbers}
    where = request["where"]
    evidence = sorted(_evidence(asked, request, policy))
    for each in _records(asked["boxes"], "boxes"):
        page = _page_of(each, pages, "boxes", where=where, among=evidence)
        boxes[page].append(pages.place(page, each.get("box"), unit=policy.box_unit, where=where))
    label = asked.get("answer") or (asked.get("answers") or [asked["question"]])[0]
    shared = {"label": label, "point_scale": 1.0}
    if policy.grounding == "box":
        for page, found in boxes.items():
            named = pages.named(page, preposition="on")
            question = f"{asked['question']} Give the boxes of the answer{named}."
            message = {"style": "boxes", "question": question, "boxes": list(map(list, found))}
            if found:
                yield {**message, **shared, "notation": request["notation"]}
        return
    points = [[_middle(box) for box in found] for found in boxes.values()]
    shared["question"] = f"{asked['question']} Point to the answer."
    if pages.several:
        yield {"style": "multi_image_pointing", "points": points, **shared}
    else:
        yield {"style": "pointing", "points": points[0], **shared}


def _middle(box: Box) -> list[float]:
    x0, y0, x1, y1 = box
    return [(x0 + x1) / 2, (y0 + y1) / 2]


def _transcriptions(pages: _Pages, plain: str | None) -> Iterator[dict[str, Any]]:
    for page, text in pages.texts.items():
        if text.words:
            question = f"Transcribe the text{pages.named(page)}."
            answer = "\n".join(text.lines())
            yield {"style": "doc_transcription", "question": question, "answer": answer}
    if plain and not pages.texts:
        question = "Transcribe the text."
        yield {"style": "doc_transcription", "question": question, "answer": plain}


def _regions(
    regions: Any, pages: _Pages, policy: DocumentPolicy, where: str
) -> Iterator[dict[str, Any]]:
    for each in _records(regions, "regions"):
        page = _page_of(each, pages, "regions", where=where)
        if page not in pages.numbers:
            continue
        box = pages.place(page, each.get("box"), unit=policy.box_unit, where=where)
        text = each.get("text") or "\n".join(_inside(pages.texts.get(page), box))
        if not isinstance(text, str):
            raise SampleError("row_fields", name="regions", want="a text in each", fields=[])
        if not text.strip():
            continue
        corners = ", ".join(str(round(1000 * value)) for value in box)
        question = f"Transcribe the text within [{corners}]{pages.named(page)}."
        yield {"style": "doc_region", "question": question, "answer": text}


def _inside(text: PageText | None, box: Box) -> list[str]:
    """Lists the lines of the words whose middle is within a box, given as shares of the page."""
    if text is None:
        return []
    x0, y0, x1, y1 = box
    words = [
        word
        for word in text.words
        if x0 <= (word.box[0] + word.box[2]) / 2 / text.width <= x1
        and y0 <= (word.box[1] + word.box[3]) / 2 / text.height <= y1
    ]
    return PageText(words=tuple(words), width=1, height=1, unit="").lines()


def _key_values(
    fields: Any, pages: _Pages, with_ocr: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    pairs: dict[str, Any] = {}
    if isinstance(fields, Mapping):
        pairs = {str(key): value for key, value in fields.items() if value not in (None, "")}
        if not all(isinstance(value, str | int) for value in pairs.values()):
            want = "a text or a number for each key"
            raise SampleError("row_fields", name="fields", want=want, fields=sorted(pairs))
    elif fields is not None:
        raise SampleError("row_fields", name="fields", want="{key: value}", fields=[])
    else:
        for text in pages.texts.values():
            for key, value in text.pairs:
                if key in pairs:  # a form may have a key twice
                    value = f"{pairs[key]}, {value}"
                pairs[key] = value
    if pairs:
        question = "Write the keys and values of this document as JSON."
        answer = json.dumps(pairs, ensure_ascii=False)
        yield {"style": "doc_key_value", "question": question, "answer": answer, **with_ocr}


def _tables(
    tables: Any, pages: _Pages, with_ocr: Mapping[str, Any], where: str
) -> Iterator[dict[str, Any]]:
    for each in _records(tables, "tables"):
        page = _page_of(each, pages, "tables", where=where)
        if page not in pages.numbers:
            continue
        question = f"Write the table{pages.named(page, preposition='on')} as Markdown."
        answer = markdown_table(each.get("rows"), where=where)
        yield {"style": "doc_table", "question": question, "answer": answer, **with_ocr}


def markdown_table(rows: Any, *, where: str = "") -> str:
    """Writes a table as Markdown; its first row is the header.

    Raises:
      SampleError: `row_fields`.

    >>> print(markdown_table([["a", "b"], [1, "x|y"]]))
    | a | b |
    | --- | --- |
    | 1 | x\\|y |
    """
    good = (
        isinstance(rows, list | tuple) and rows and all(isinstance(r, list | tuple) for r in rows)
    )
    if not good or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        want = "tables whose rows are lists of the same length"
        raise SampleError("row_fields", where=where, name="tables", want=want, fields=[])
    header, *rest = [[" ".join(str(c).split()).replace("|", "\\|") for c in row] for row in rows]
    lines = [header, ["---"] * len(header), *rest]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _page_of(
    record: Mapping[str, Any],
    pages: _Pages,
    name: str,
    *,
    where: str,
    among: Sequence[int] = (),
) -> int:
    """Gives the number of the page that a record is about.

    Args:
      record: What the row says of a part of a page.
      pages: Of the document.
      name: Of the field, for errors.
      where: Named in errors.
      among: The pages that it can be on, if they are known.

    Raises:
      SampleError: `row_fields`: it names none, and could be on several; `document_page_number`.
    """
    page = record.get("page")
    if page is None:
        possible = among or pages.candidates
        if len(possible) > 1:
            want = "a page in each, as the document has several,"
            raise SampleError("row_fields", where=where, name=name, want=want, fields=[])
        return possible[0]
    if not _is_page(page):
        raise SampleError("row_fields", name=name, want="page numbers from 1 on", fields=[])
    if page > pages.total:
        raise SampleError("document_page_number", where=where, page=page, pages=pages.total)
    return int(page)


def _is_page(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _records(value: Any, name: str) -> list[Mapping[str, Any]]:
    found = [] if value is None else [value] if isinstance(value, Mapping) else value
    if not isinstance(found, list | tuple) or not all(isinstance(e, Mapping) for e in found):
        raise SampleError("row_fields", name=name, want="a list of records", fields=[])
    return list(found)
