"""Questions with a short answer: about scenes, and about something to be read."""

from __future__ import annotations

from collections.abc import Mapping

from preprocess.text.message import Message, require_text
from preprocess.text.styles.base import (
    Draw,
    Exchange,
    Style,
    one_alternative,
    user_text,
    whole_text,
)


def draw_qa(message: Message, draw: Draw) -> Exchange:
    """Draws a question with a short answer.

    The response is `answer`, one of the most common of `answers`, or `text`; an `explanation`
    precedes the answer.
    """
    message = one_alternative(message, draw)
    question = "" if message.get("prompt") else whole_text(message, "question", draw)
    user = user_text(message, draw, plain=question, question=question)
    name = "answer" if "answer" in message else "text"
    if "explanation" in message or draw.style.explained:
        answer = require_text(message, name)
        return user, f"{require_text(message, 'explanation')} Answer: {answer}"
    return user, whole_text(message, name, draw)


_QA = Style(family="qa", draw=draw_qa)
_COUNTED = Style(family="qa", draw=draw_qa, rigid=True)
_DOCUMENT = Style(family="document", draw=draw_qa, rigid=True)
_EXPLAINED = Style(
    family="document",
    draw=draw_qa,
    template="question.explained",
    since="uber_model_v2",
    explained=True,
    rigid=True,
)
_COSYN = (
    "chart",
    "chemical",
    "circuit",
    "diagram",
    "document",
    "graphic",
    "math",
    "music",
    "nutrition",
    "table",
)

STYLES: Mapping[str, Style] = {
    "vqa2": _QA,
    "okvqa": _QA,
    "gqa": _QA,
    "a_okvqa_da": _QA,
    "mantis_instruct_da": _QA,
    "eval_short_answer": Style(family="qa", draw=draw_qa, trained_as="vqa2"),
    "video_short_answer": _QA,
    "video_eval_short_answer": Style(family="qa", draw=draw_qa, trained_as="video_short_answer"),
    "tally_qa": _COUNTED,
    "text_vqa": _DOCUMENT,
    "ocr_vqa": _DOCUMENT,
    "st_qa": _DOCUMENT,
    "doc_qa": _DOCUMENT,
    "info_qa": _DOCUMENT,
    **{f"doc_{task}": _DOCUMENT for task in ("transcription", "region", "key_value", "table")},
    "chart_qa": _DOCUMENT,
    "plot_qa": _DOCUMENT,
    "figure_qa": _DOCUMENT,
    "dv_qa": _DOCUMENT,
    "tabwmp_da": _DOCUMENT,
    **{f"pixmo_docs_{kind}": _DOCUMENT for kind in ("other", "charts", "diagrams", "tables")},
    **{f"cosyn_{kind}": _DOCUMENT for kind in _COSYN},
    **{f"cosyn_{kind}_exp": _EXPLAINED for kind in _COSYN},
}
