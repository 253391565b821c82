"""The formats by name, and the step that they share: a row becomes an example."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from preprocess.formats.conversations import parse_conversation
from preprocess.formats.detect import guess_format
from preprocess.formats.documents import parse_pages
from preprocess.formats.interleaved import count_pieces, parse_document
from preprocess.formats.spec import Spec
from preprocess.formats.subtitles import with_row_subtitles
from preprocess.formats.tasks import (
    parse_boxes,
    parse_caption,
    parse_points,
    parse_question,
    parse_tracks,
)
from preprocess.formats.video import with_row_videos
from shardspec.errors import SampleError, redacted_url

METADATA = ("id", "question_id", "image_id", "source", "url", "licence", "license")
"""Columns that are kept for people and evaluators."""

_MOST_CHARACTERS = 2048
"""Of a name of an image that is kept for them: a URL, no text that holds an image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One layout of rows."""

    parse: Callable[[Mapping[str, Any], Spec], dict[str, Any]]
    """Makes an example of a row; pure. Raises SampleError."""
    fields: tuple[str, ...]
    """What `[columns]` of a spec may rename."""
    help: str
    """What it is, in one clause."""
    count: Callable[[Mapping[str, Any], Spec], int] | None = None
    """Counts the examples of a row, where it may have several; None where it is one."""


VIDEO_FIELDS = ("video", "start", "end", "subtitles")

_CONVERSATION = Format(
    parse=parse_conversation,
    fields=("messages", "image", *VIDEO_FIELDS, "system", "prompt", "response"),
    help="turns, or a prompt and its response, with images and videos beside or in them",
)


def parse_sample(row: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    """Turns a sample of a WebDataset tar into an example, by what its members hold.

    Raises:
      SampleError: `row_fields`, and as the format that it has.
    """
    found = guess_format([row])
    if not found.format:
        want = f"members of one of the formats ({found.reason})"
        raise SampleError("row_fields", name="text", want=want, fields=sorted(map(str, row)))
    return FORMATS[found.format].parse(row, spec)


FORMATS: Mapping[str, Format] = {
    "llava": _CONVERSATION,
    "messages": _CONVERSATION,
    "sharegpt": _CONVERSATION,
    "captions": Format(
        parse=parse_caption,
        fields=("image", *VIDEO_FIELDS, "caption", "question"),
        help="an image or a video, and one or more texts about it",
    ),
    "vqa": Format(
        parse=parse_question,
        fields=("image", *VIDEO_FIELDS, "question", "answer", "answers", "options"),
        help="a question with an answer, several answers, or options",
    ),
    "points": Format(
        parse=parse_points,
        fields=("image", *VIDEO_FIELDS, "points", "timestamps", "fps", "label", "question"),
        help="points of what a label names, in an image or at times of a video",
    ),
    "tracks": Format(
        parse=parse_tracks,
        fields=(*VIDEO_FIELDS, "frame_trajectories", "sampling_fps", "label", "question"),
        help="where what a label names is in the frames of a video",
    ),
    "boxes": Format(
        parse=parse_boxes,
        fields=("image", "boxes", "label", "question"),
        help="boxes of what labels name",
    ),
    "webdataset": Format(
        parse=parse_sample,
        fields=(),
        help="samples of tars: an image with a text, or with the fields of another format",
    ),
    "interleaved": Format(
        parse=parse_document,
        count=count_pieces,
        fields=(
            *("texts", "images", "text_list", "image_info", "document", "text"),
            *("video", "start", "end"),
        ),
        help="documents: texts, images and videos in their order, all texts learned",
    ),
    "documents": Format(
        parse=parse_pages,
        fields=(
            "document",
            "image",
            "question",
            "answer",
            "answers",
            "questions",
            "evidence_pages",
            "page_numbers",
            "ocr",
            "ocr_text",
            "regions",
            "fields",
            "tables",
            "boxes",
        ),
        help="pages of documents with questions, OCR, forms and tables",
    ),
}
"""The formats by name."""


def parse_messages(example: Mapping[str, Any]) -> dict[str, Any]:
    """Turns an example with `messages` of role and content into one with a `message_list`.

    Args:
      example: Its `image` may be anything that an image of an example may be; other fields stay.

    Raises:
      SampleError: `conversation`, `image_placeholder`.

    >>> told = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    >>> parse_messages({"messages": told})
    {'message_list': [{'style': 'demo', 'messages': ['2 + 2?', '4']}]}
    """
    parsed = parse_conversation(example, _PLAIN)
    rest = {k: v for k, v in example.items() if k not in ("messages", "image", "images")}
    found = {"image": parsed["image"]} if parsed["image"] else {}
    found |= {"chats": parsed["chats"]} if "chats" in parsed else {}
    return {**rest, **found, "message_list": parsed["message_list"]}


_PLAIN = Spec(name="messages", format="messages")


def parse_row(row: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    """Turns a row into an example whose images are still names, URLs or bytes.

    Raises:
      SampleError: The row cannot become one; `reason` says why.
    """
    example = with_row_videos(FORMATS[spec.format].parse(row, spec), row, spec)
    example = with_row_subtitles(example, row, spec)
    named = spec.named()
    metadata = {
        name: row[name] if isinstance(row[name], str) or abs(row[name]) < 2**63 else str(row[name])
        for name in METADATA
        if isinstance(row.get(name), str | int) and name not in named
    }
    images = example["image"]
    if images and all(map(_is_name, images)):
        metadata["image_names"] = [redacted_url(each) if "://" in each else each for each in images]
    if not example["image"]:
        del example["image"]
    return {**example, "metadata": metadata}


def _is_name(image: Any) -> bool:
    fits = isinstance(image, str) and not image.startswith("data:")
    return fits and len(image) <= _MOST_CHARACTERS
