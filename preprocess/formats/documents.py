"""Rows of documents: pages, questions about them, OCR, and what else is known of them.

A row has `document` (a PDF, a TIFF or a picture) or its pages as images, and any of

    question, answer, answers    one question; or `questions`, a list of such records
    evidence_pages               pages that the answers are on, from 1 on; in a question or the row
    page_numbers                 the pages of the document that are meant, from 1 on; absent for all
    ocr                          a file of OCR, or its object, or one for each page
    ocr_text                     the text alone, without places
    regions                      [{page, box, text}]: parts of pages; `text` may be absent
    fields                       {key: value} of a form
    tables                       [{page, rows: [[...]]}], the first row its header
    boxes (in a question)        [{page, box}]: where the answer is

Boxes are x0, y0, x1, y1 in `box_unit` of `[documents]`: shares of the page, or pixels of its OCR.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from preprocess.formats.images import is_empty, row_images
from preprocess.formats.spec import Spec
from shardspec.errors import ConfigError, SampleError, nearest

OcrMode = Literal["none", "text", "words_with_boxes"]

Grounding = Literal["point", "box"]

TASKS = ("qa", "transcription", "region", "key_value", "table", "grounded")
"""What a document may be asked for."""

PAGES = ("document", "pdf", "file", "pages")
"""Columns that hold a document, beside those of images; the first that is there wins."""

_QUESTION = ("question", "user", "query")
_ANSWER = ("answer", "answers", "assistant")
_KEPT = ("ocr", "ocr_text", "regions", "fields", "tables")


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentPolicy:
    """How documents become examples: the table `[documents]` of a spec."""

    max_pages: int = 8
    """Most pages of a sample, those with evidence first, then in order; 0 for any number."""
    dpi: float = 150.0
    """At which a PDF is drawn: 24 crops of 336 px show 125 to 155 of an A4 page."""
    ocr: OcrMode = "none"
    """What of the OCR is in front of a question: nothing, its text, or its words with boxes."""
    ocr_tokens: int = 1024
    """Most tokens of it; what is beyond is cut off after a word."""
    text_layer: bool = True
    """Whether the text layer of a PDF is taken where a row has no OCR."""
    tasks: tuple[str, ...] = ("qa", "grounded")
    """Of `TASKS`; a row gives the messages of those that it has what is needed for."""
    grounding: Grounding = "point"
    """What a grounded answer is: the middles of its boxes, or the boxes, in the spec's notation."""
    box_unit: str = "page"
    """Of boxes in rows: "page", shares of the page from 0 to 1, or "ocr", the unit of its OCR."""

    def __post_init__(self) -> None:
        wrong = {
            "max_pages": (_is_count(self.max_pages), "0 or more"),
            "dpi": (_is_real(self.dpi) and 10 <= self.dpi <= 1200, "10 to 1200"),
            "ocr": (self.ocr in get_args(OcrMode), ", ".join(get_args(OcrMode))),
            "ocr_tokens": (_is_count(self.ocr_tokens) and self.ocr_tokens > 0, "1 or more"),
            "text_layer": (isinstance(self.text_layer, bool), "true or false"),
            "tasks": (
                bool(self.tasks) and all(task in TASKS for task in self.tasks),
                f"some of {', '.join(TASKS)}",
            ),
            "grounding": (
                self.grounding in get_args(Grounding),
                ", ".join(get_args(Grounding)),
            ),
            "box_unit": (self.box_unit in ("page", "ocr"), "page, ocr"),
        }
        for name, (good, want) in wrong.items():
            if not good:
                got = getattr(self, name)
                raise ConfigError("document_policy.value", name=name, got=got, want=want)

    def to_dict(self) -> dict[str, Any]:
        """Gives the policy in plain JSON types."""
        return {**dataclasses.asdict(self), "tasks": list(self.tasks)}

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> DocumentPolicy:
        """Reads the table of a spec.

        Raises:
          ConfigError: `document_policy`.
        """
        known = [each.name for each in dataclasses.fields(cls)]
        for name in table:
            if name not in known:
                hint = nearest(name, known)
                raise ConfigError("document_policy.unknown", name=name, hint=hint)
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in table.items()
        }
        return cls(**values)


def parse_pages(row: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    """Turns a row into an example whose `document` says what is to be read and asked.

    Raises:
      SampleError: `row_image`, `row_fields`.
    """
    return document_request(row, spec, url=True)


def document_request(row: Mapping[str, Any], spec: Spec, *, url: bool = False) -> dict[str, Any]:
    """Picks of a row what makes up a document.

    Args:
      row: The row.
      spec: Names its columns.
      url: Whether a column `url` holds the page.
    """

    def column(name: str) -> Any:
        value = row.get(spec.column(name))
        return None if isinstance(value, float) and value != value else value

    found = next((column(name) for name in PAGES if not _is_absent(column(name))), None)
    pages = [found] if found is not None and not isinstance(found, list | tuple) else found
    images = [each for each in pages or () if not is_empty(each)] if pages else []
    if not images:
        images = row_images(row, spec, url=url)
    if not images:
        raise SampleError("row_image", fields=sorted(map(str, row)), got="nothing")
    request: dict[str, Any] = {name: column(name) for name in _KEPT if not _is_absent(column(name))}
    if not isinstance(request.get("ocr_text", ""), str):
        raise _missing(row, spec.column("ocr_text"), "a text")
    request["questions"] = _questions(row, spec, column)
    for name in ("page_numbers", "evidence_pages"):
        numbers = _numbers(column(name), name)
        if numbers is not None:
            request[name] = numbers
    request |= {"style": spec.style or "doc_qa", "notation": spec.notation}
    return {"image": images, "document": request, "message_list": []}


def _questions(row: Mapping[str, Any], spec: Spec, column: Any) -> list[dict[str, Any]]:
    found = column("questions")
    if _is_absent(found):
        found = row.get("texts")  # Docmatix: {user, assistant, source}
    if _is_absent(found):
        single = {
            name: row.get(spec.column(name)) for name in (*_QUESTION, *_ANSWER, "boxes", "label")
        }
        found = [{**{k: v for k, v in single.items() if v is not None}, "row": True}]
        if all(single.get(name) is None for name in _QUESTION):
            # A row may be of a form or of a text alone, but an answer without a question is not.
            if any(single.get(name) is not None for name in _ANSWER):
                raise _missing(row, spec.column("question"), "a text")
            return []
    if isinstance(found, Mapping):  # the hub's record of lists
        lists = [value for value in found.values() if isinstance(value, list | tuple)]
        if len(lists) < len(found) or len({len(value) for value in lists}) != 1:
            raise _missing(row, spec.column("questions"), "a list of {question, answer}")
        found = [dict(zip(found, values, strict=True)) for values in zip(*lists, strict=True)]
    if not isinstance(found, list | tuple) or not all(isinstance(q, Mapping) for q in found):
        raise _missing(row, spec.column("questions"), "a list of {question, answer}")
    return [_question(each, row, spec) for each in found]


def _question(asked: Mapping[str, Any], row: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    question = next((asked[name] for name in _QUESTION if asked.get(name)), None)
    if not isinstance(question, str) or not question.strip():
        raise _missing(row, spec.column("question"), "a text")
    answer = asked.get("answers")
    answer = answer if answer is not None else asked.get("answer", asked.get("assistant"))
    answers = answer if isinstance(answer, list | tuple) else [answer]
    texts = [each if isinstance(each, str) else _number(each) for each in answers]
    texts = [text for text in texts if text.strip()]
    boxes = asked.get("boxes")
    unanswered = bool(spec.unanswered) and not texts
    if not texts and not boxes and not unanswered:
        raise _missing(row, spec.column("answer"), "a text, or a list of texts")
    message: dict[str, Any] = {"question": question}
    message |= {"answer": texts[0]} if len(texts) == 1 else {"answers": texts} if texts else {}
    pages = _numbers(asked.get("evidence_pages", asked.get("page")), "evidence_pages")
    index = asked.get("answer_page_idx", row.get("answer_page_idx"))  # MP-DocVQA counts from 0
    if pages is None and isinstance(index, int) and not isinstance(index, bool) and index >= 0:
        pages = [index + 1]
    if pages is not None:
        message["evidence_pages"] = pages
    if boxes:
        message["boxes"] = boxes
    if unanswered:
        message["unanswered"] = True
    return message


def _number(value: Any) -> str:
    plain = isinstance(value, int | float) and not isinstance(value, bool) and value == value
    return str(value) if plain else ""


def _numbers(value: Any, name: str) -> list[int] | None:
    if _is_absent(value):
        return None
    numbers = list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in numbers):
        raise SampleError("row_fields", name=name, want="page numbers from 1 on", fields=[])
    return sorted(set(numbers))


def _missing(row: Mapping[str, Any], name: str, want: str) -> SampleError:
    return SampleError("row_fields", name=name, want=want, fields=sorted(map(str, row)))


def _is_absent(value: Any) -> bool:
    if value is None or isinstance(value, str | bytes | list | tuple | Mapping):
        return not value
    return False


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
