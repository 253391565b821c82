"""Multiple choices; `preprocess.text.choices` says in which forms they are written."""

from __future__ import annotations

from collections.abc import Mapping

from preprocess.text.choices import write_choices
from preprocess.text.message import Message, require_field, require_text, require_texts
from preprocess.text.styles.base import Draw, Exchange, Style, as_written


def draw_choice(message: Message, draw: Draw) -> Exchange:
    """Draws a multiple choice: `question`, `options` or `unlabelled_options`, `answer_idx`.

    An explicit `prompt` is taken as it is, with the answer of the fixed form.
    """
    labelled = "unlabelled_options" not in message
    options = require_texts(message, "options" if labelled else "unlabelled_options", blank=True)
    prompt = message.get("prompt")
    form = draw.policy.choices
    user, response = write_choices(
        "" if prompt else require_text(message, "question"),
        options,
        require_field(message, "answer_idx"),
        labelled=labelled,
        form="standard" if prompt and form == "varied" else form,
        rng=draw.rng,
    )
    return (as_written(prompt, draw.policy) if prompt else user), response


def _choice(*, rigid: bool = False, trained_as: str = "") -> Style:
    return Style(family="multiple_choice", draw=draw_choice, rigid=rigid, trained_as=trained_as)


STYLES: Mapping[str, Style] = {
    "a_okvqa_mc": _choice(),
    "mantis_instruct_mc": _choice(),
    "multi_image_mc": _choice(),
    "eval_multiple_choice": _choice(trained_as="a_okvqa_mc"),
    "eval_multi_image_mc": _choice(trained_as="multi_image_mc"),
    "video_multiple_choice": _choice(),
    "video_multiple_choice_w_subtitle": _choice(),
    "video_eval_multiple_choice": _choice(trained_as="video_multiple_choice"),
    "science_qa": _choice(rigid=True),
    "ai2_diagram": _choice(rigid=True),
    "ai2_diagram_no_letter": _choice(rigid=True),
}
