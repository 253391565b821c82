"""What a style is, and what all families of styles share: responses and prompt templates.

A module of this package is a family: it has a function that draws an exchange, and `STYLES`, its
styles by name. To add a style, add a line to the `STYLES` of its family (and a list of templates to
`preprocess/text/templates/`, where it has some). To add a family, add a module, and name it in
`preprocess.text.styles`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

from preprocess.text.choices import fill
from preprocess.text.message import Message, alternatives, require_text
from preprocess.text.points import PointMode, Tag
from preprocess.text.policy import PromptTemplates, TextPolicy
from shardspec.toml import load_toml

Family = Literal[
    "caption",
    "qa",
    "document",
    "pointing",
    "counting",
    "inline_points",
    "multiple_choice",
    "instruction",
    "robot",
    "interleaved",
    "boxes",
    "video_points",
    "tracking",
]

Exchange = tuple[str, str]
"""User text and response text, without prefix and markup."""

TEMPLATES = Path(__file__).parents[1] / "templates"


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One draw of an exchange: by which settings, and from which generator."""

    style: Style
    policy: TextPolicy
    rng: np.random.RandomState
    tags: list[Tag] = field(default_factory=list)
    """The coordinates of the response, in its order: the style adds them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How messages of a style become text."""

    family: Family
    draw: Callable[[Message, Draw], Exchange]
    """Draws user text and response of a message of one turn."""
    template: str = ""
    """File and list of its prompt templates; "" where the question itself is the prompt."""
    templates: tuple[str, ...] = ()
    """Prompt templates that win over that list."""
    system: tuple[str, ...] = ()
    """System prompts of conversations that have none, of which one is drawn."""
    since: PromptTemplates = "uber_model"
    """The first setting of `prompt_templates` that uses them."""
    mode: PointMode = "point"
    """Form of the answer of pointing and counting styles."""
    grouped: bool = False
    """Whether `points` has a list per image."""
    explained: bool = False
    """Whether an explanation must precede the answer."""
    rigid: bool = False
    """Whether a flip or a crop would make the text wrong: coordinates, or pages to be read."""
    movable: bool = False
    """Whether only its coordinates would become wrong: they are the `Draw.tags` of its responses,
    but for a `mode` of "count"."""
    demo: bool = False
    """Whether a person would use the style without naming it: the prefix is the exception in the
    demo modes (Molmo 2)."""
    unnamed: bool = False
    """Whether the demo modes never write a prefix: the data brings its own (Molmo 1)."""
    length_hint: bool = True
    """Whether style_and_length_v2 writes a length; False where things in the image decide it
    (Molmo 2)."""
    in_words: bool = False
    """Whether a request for a count says that the answer is to be in words (both PixMo
    question sets)."""
    bare: bool = False
    """Whether the text is a whole document: no user text, no prefix, no markup of turns."""
    trained_as: str = ""
    """The style whose prefix an evaluation style takes (Molmo 2); "" for its own."""


def one_alternative(message: Message, draw: Draw) -> Message:
    """Draws one of a message's equally likely responses."""
    found = alternatives(message, draw.policy.select_answer)
    return found[0] if len(found) == 1 else found[draw.rng.randint(0, len(found))]


def whole_text(message: Message, name: str, draw: Draw) -> str:
    """Gives a text that is a user text or a response of its own, as the policy wants its space.

    Raises:
      SampleError: `message_fields` (missing, not a string, or blank).
    """
    require_text(message, name)
    return as_written(message[name], draw.policy)


def as_written(text: str, policy: TextPolicy) -> str:
    """Leaves the space around a text, or strips it, by the setting `whitespace`."""
    return text.strip() if policy.whitespace == "strip" else text


def user_text(message: Message, draw: Draw, *, plain: str = "", **fields: str) -> str:
    """Gives the user text: the explicit prompt, a template with its fields, or the plain text.

    Args:
      message: Its `prompt` wins.
      draw: Says whether the style's templates are used, and draws one of them.
      plain: The text where no template is used.
      fields: What the templates name; without fields, a plain text wins over a template.
    """
    prompt = message.get("prompt")
    if prompt:
        return as_written(str(prompt), draw.policy)
    style = draw.style
    used = _LEVEL[draw.policy.prompt_templates] >= _LEVEL[style.since]
    if not (style.template or style.templates) or not used or (plain and not fields):
        return plain
    templates = style.templates or prompt_templates(style.template)
    return fill(templates[draw.rng.randint(0, len(templates))], fields)


@cache
def prompt_templates(name: str) -> Sequence[str]:
    """Reads the templates of a list, "file.list"; all of a list have the same fields.

    "file.list/video" are those of images, about a video (Molmo 2).
    """
    listed, _, kind = name.partition("/")
    file, _, section = listed.partition(".")
    templates: Sequence[str] = load_toml(TEMPLATES / f"{file}.toml")[section]
    return [_PICTURE.sub("video", each) for each in templates] if kind else templates


_PICTURE = re.compile(r"(?:image|picture|photo)(?=s?\b)")


_LEVEL: Mapping[PromptTemplates, int] = {"none": 0, "uber_model": 1, "uber_model_v2": 2}
