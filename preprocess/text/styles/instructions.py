"""Conversations in free form, with an image or without."""

from __future__ import annotations

from collections.abc import Mapping

from preprocess.text.message import Message
from preprocess.text.styles.base import Draw, Exchange, Style, prompt_templates
from preprocess.text.styles.counting import asks_for_count
from preprocess.text.styles.qa import draw_qa


def draw_instruction(message: Message, draw: Draw) -> Exchange:
    """Draws an exchange of a conversation in free form.

    Where a count is requested and answered in words, the user says so first, so that
    the model keeps pointing for those who do not.
    """
    user, response = draw_qa(message, draw)
    if draw.style.in_words and not message.get("prompt") and asks_for_count(user):
        prefixes = prompt_templates("question.no_pointing")
        user = f"{prefixes[draw.rng.randint(0, len(prefixes))]} {user}"
    return user, response


def _instruction(
    *, demo: bool = False, unnamed: bool = False, in_words: bool = False, rigid: bool = False
) -> Style:
    return Style(
        family="instruction",
        draw=draw_instruction,
        demo=demo,
        unnamed=unnamed,
        in_words=in_words,
        rigid=rigid,
    )


STYLES: Mapping[str, Style] = {
    "user_qa": _instruction(demo=True, in_words=True),
    "synthetic_qa": _instruction(in_words=True),
    "correction_qa": _instruction(demo=True),
    "text_sft": _instruction(demo=True),
    "demo": _instruction(unnamed=True),
    "android_control": _instruction(unnamed=True, rigid=True),
}
