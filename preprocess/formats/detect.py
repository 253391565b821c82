"""Which format the rows of a file have, from their fields."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from preprocess.formats.conversations import PROMPTS, RESPONSES
from preprocess.formats.images import NAMES
from preprocess.formats.tasks import BOXES, CAPTIONS
from preprocess.formats.video import VIDEO_NAMES

_PREFERENCES = ("chosen", "rejected", "rejected_response", "kto_tag")
_ANSWERS = ("answer", "answers", "response", "responses", "completion", "output", "reply")
"""Columns beside which a `text` or a `prompt` is a question, and not a caption."""

SHARE = 0.95
"""Share of the rows that must agree."""


@dataclass(frozen=True, slots=True)
class Guess:
    """What some rows were taken for."""

    format: str
    """"" where no format holds for enough of them."""
    reason: str
    """Why, in one clause."""


def guess_format(rows: Sequence[Mapping[str, Any]]) -> Guess:
    """Tells the format of some rows.

    Args:
      rows: At least one.

    >>> guess_format([{"image": "a.jpg", "caption": "A red ball."}]).format
    'captions'
    """
    guesses = Counter(_guess_row(row) for row in rows)
    best, count = Counter(_guess_row(row)[0] for row in rows).most_common(1)[0]
    if best and count >= SHARE * len(rows):
        return Guess(best, next(why for (name, why), _ in guesses.most_common() if name == best))
    told = "; ".join(f"{n} of {len(rows)} rows: {why}" for (_, why), n in guesses.most_common(3))
    return Guess("", told)


def _guess_row(row: Mapping[str, Any]) -> tuple[str, str]:
    there = {name for name, value in row.items() if value is not None}
    if there & set(_PREFERENCES):
        return "", "preference data (chosen and rejected answers)"
    for name in ("conversations", "conversation", "messages"):
        turns = row.get(name)
        if isinstance(turns, Sequence) and turns and isinstance(turns[0], Mapping):
            if "from" in turns[0] and "value" in turns[0]:
                return "llava", f"{name} of from and value"  # sharegpt is read alike
            if "role" in turns[0]:
                return "messages", f"{name} of role and content"
            if {"human", "assistant"} <= set(turns[0]):
                return "messages", f"{name} of human and assistant"
    if "texts" in there and "images" in there and isinstance(row["texts"], Sequence):
        pairs = [each for each in row["texts"] if isinstance(each, Mapping)]
        if pairs and "user" in pairs[0] and "assistant" in pairs[0]:
            return "messages", "texts of user and assistant"
        images = row["images"] if isinstance(row["images"], Sequence) else ()
        if not pairs and len(row["texts"]) == len(images):
            return "interleaved", "texts and images of one length"
    if "text_list" in there and "image_info" in there:
        return "interleaved", "text_list and image_info"
    names = [row[name] for name in ("document", "pdf", "file") if name in there]
    if any(isinstance(n, str) and n.lower().endswith((".pdf", ".tif", ".tiff")) for n in names):
        return "documents", "files of documents"
    if "frame_trajectories" in there:
        return "tracks", "frame_trajectories"
    if "points" in there and there & {"label", "question"}:
        return "points", "points of a label or question"
    if "question" in there and there & {"answer", "answers", "options"}:
        return "vqa", "a question with answers"
    if "query" in there and "label" in there:
        return "vqa", "a query with its label"
    told = [name for name in (*PROMPTS, *RESPONSES) if name in there]
    if set(told) & set(PROMPTS) and set(told) & set(RESPONSES):
        return "messages", " and ".join(told)
    if {"regions", "qas"} & there and not there & set(NAMES):
        return "", "Visual Genome, whose rows name no image: join image_data.json in a class"
    inner = next(iter(row.values()), None)
    if isinstance(inner, Mapping) and {"imageURL", "questions", "answers"} <= set(inner):
        return "", "OCR-VQA, whose splits are in one file: give the rows of one in a class"
    if "question_id" in there and not there & set(_ANSWERS) and "text" in there:
        return "", "questions without answers"
    caption = next((name for name in CAPTIONS if name in there), None)
    answered = sorted(there & {*_ANSWERS, *(["label"] if caption == "prompt" else [])})
    if caption in ("text", "prompt") and answered:
        return "", f"{caption} beside {answered[0]}, which may be a question with its answer"
    if caption and there & {*NAMES, *VIDEO_NAMES}:
        return "captions", f"an image or a video with {caption}"
    objects = row.get("objects")
    found = objects if isinstance(objects, Mapping) else row
    if any(found.get(name) is not None for name in BOXES):
        return "", "boxes need a spec, whose `box` and `unit` say what the numbers are"
    return "", f"fields {', '.join(sorted(map(str, there))[:12])}"
