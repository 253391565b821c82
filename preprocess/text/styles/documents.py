"""Documents: texts with images between them, all of it learned."""

from __future__ import annotations

from collections.abc import Mapping

from preprocess.text.message import Message
from preprocess.text.styles.base import Draw, Exchange, Style, whole_text


def draw_document(message: Message, draw: Draw) -> Exchange:
    """Gives the `text` of a document as a response without a user text."""
    return "", whole_text(message, "text", draw)


STYLES: Mapping[str, Style] = {
    "interleaved": Style(family="interleaved", draw=draw_document, bare=True),
}
