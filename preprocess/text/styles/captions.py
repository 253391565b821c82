"""Captions and transcripts: a text about the whole image."""

from __future__ import annotations

from collections.abc import Mapping

from preprocess.text.message import Message
from preprocess.text.policy import PromptTemplates
from preprocess.text.styles.base import (
    Draw,
    Exchange,
    Style,
    as_written,
    one_alternative,
    user_text,
    whole_text,
)


def draw_caption(message: Message, draw: Draw) -> Exchange:
    """Draws a caption or a transcript: `text`, or any one of `alternatives`."""
    message = one_alternative(message, draw)
    # The row's own question, if any, replaces the template.
    question = as_written(message.get("question", ""), draw.policy)
    return user_text(message, draw, plain=question), whole_text(message, "text", draw)


def _caption(name: str, *, demo: bool = False, since: PromptTemplates = "uber_model") -> Style:
    template = f"caption.{name}"
    return Style(family="caption", draw=draw_caption, template=template, demo=demo, since=since)


STYLES: Mapping[str, Style] = {
    "long_caption": _caption("long_caption", demo=True),
    "short_caption": _caption("short_caption", demo=True),
    "transcript": _caption("transcript"),
    **{
        f"video_{name}_caption": _caption(
            f"{template}_caption/video", demo=True, since="uber_model_v2"
        )
        for name, template in {"short": "short", "merged": "long", "long": "long"}.items()
    },
}
