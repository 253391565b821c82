"""TextPolicy: every setting of how messages become text. Part of the recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from preprocess.settings import Setting
from preprocess.text.chat_template import is_day
from preprocess.text.choices import ChoiceForm
from preprocess.text.points import PointFormat
from preprocess.text.sheet import StyleSheet, read_styles
from shardspec.errors import ConfigError, nearest

PromptTemplates = Literal["none", "uber_model", "uber_model_v2"]
SystemPrompt = Literal[
    "none",
    "style",
    "demo_or_style",
    "demo_or_style_v2",
    "style_and_length",
    "style_and_length_v2",
    "style_and_length_v3",
]
MessageFormat = Literal["none", "role", "chatml", "template"]
SelectAnswer = Literal["best", "first"]
Whitespace = Literal["keep", "strip"]
Placeholders = Literal["refuse", "keep"]
Reasoning = Literal["refuse", "keep"]
ActionForm = Literal["bins", "tokens", "openvla"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPolicy:
    """How messages become text."""

    prompt_templates: Annotated[
        PromptTemplates, Setting("prompt templates", flag="prompts", group="text")
    ] = "none"
    """"none": the prompt of a message is its question or label, that of a caption the prefix alone;
    "uber_model": captions and points get a template; "uber_model_v2": explained answers too."""
    system_prompt: Annotated[
        SystemPrompt,
        Setting("text before the first user text: the style, with a length or not", group="text"),
    ] = "style_and_length"
    message_format: Annotated[MessageFormat, Setting("markup around turns", group="text")] = "role"
    """"role": `User: ... Assistant:`; "chatml"; "template": the tokenizer's own; "none": bare."""
    chat_date: Annotated[
        str,
        Setting("day that a chat template writes, YYYY-MM-DD", group="text"),
    ] = ""
    """Templates that write the date of today are rendered as on this day, and refused without
    it."""
    num_variants: Annotated[
        int,
        Setting(
            "baked variants per response, 1 to 1000; training draws one per epoch",
            flag="variants",
            group="text",
        ),
    ] = 8
    point_format: Annotated[PointFormat, Setting("how points are written", group="text")] = "coords"
    """How points are written: "xml" (Molmo 1, 0 to 100) or "coords" (Molmo 2, 0 to 1000)."""
    choices: Annotated[ChoiceForm, Setting("layout of multiple-choice questions", group="text")] = (
        "standard"
    )
    """"standard" (Molmo 2's evaluation), "letter" (Molmo 1) or "varied" (Molmo 2's training)."""
    select_answer: SelectAnswer = "best"
    """Of several `answers`: "best" the most common, "first" the first in the alphabet."""
    whitespace: Annotated[
        Whitespace, Setting("white space around questions, answers and captions", group="text")
    ] = "keep"
    """"keep": whole texts (questions, answers, captions, prompts, system texts) stay as the row has
    them; "strip" removes the space around them. What becomes part of a sentence or of a list
    (labels, options, explanations, votes of several `answers`) is stripped in both."""
    placeholders: Annotated[
        Placeholders,
        Setting(
            "rows with other placeholders of media than <|image|>, such as <image>", group="text"
        ),
    ] = "refuse"
    """"refuse": rows whose texts have one are refused (`media_placeholder`); "keep": it is text."""
    styles: Annotated[
        StyleSheet,
        Setting(
            "TOML file of own styles, prompt templates, system prompts and paraphrases",
            group="text",
            metavar="FILE",
            parse=read_styles,
        ),
    ] = StyleSheet()
    reasoning: Annotated[
        Reasoning,
        Setting("answers with reasoning, such as <think>...</think>", group="text"),
    ] = "refuse"
    """"refuse": rows whose answers have thoughts are refused (`reasoning`, or `control_token` for
    markers of the tokenizer); "keep": they are what the chat template makes of them, which may drop
    those of earlier answers, and plain text in Molmo's own formats."""
    actions: Annotated[ActionForm, Setting("how a robot's actions are written", group="text")] = (
        "bins"
    )
    """"bins": numbers as text; "tokens": one of the last 256 ids of the vocabulary for each value;
    "openvla": the same by OpenVLA's own bins. Tokens are for Molmo's own message formats."""
    movable: Annotated[
        bool,
        Setting(
            "also store where coordinates are in texts, so that flips, crops and own augmentation"
            " move them",
            group="text",
        ),
    ] = False
    """Needs a tokenizer that spells numbers digit by digit, and Molmo's image tokens."""
    paraphrase: Annotated[
        float, Setting("share of variants with a paraphrased user text, 0 to 1", group="text")
    ] = 0.0

    def __post_init__(self) -> None:
        for name, known in _NAMES.items():
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(
                    "text_policy",
                    name=name,
                    value=value,
                    hint=nearest(str(value), known),
                    got=value,
                    want=", ".join(known),
                )
        if not 1 <= self.num_variants <= 1000:
            raise ConfigError("num_variants", got=self.num_variants, want="1 to 1000")
        if self.chat_date and not is_day(self.chat_date):
            raise ConfigError("chat_date.form", got=self.chat_date)
        if not 0 <= self.paraphrase <= 1:
            raise ConfigError("paraphrase", got=self.paraphrase, want="0 to 1")


_NAMES: Mapping[str, Sequence[str]] = {
    "prompt_templates": get_args(PromptTemplates),
    "system_prompt": get_args(SystemPrompt),
    "message_format": get_args(MessageFormat),
    "point_format": get_args(PointFormat),
    "choices": get_args(ChoiceForm),
    "select_answer": get_args(SelectAnswer),
    "whitespace": get_args(Whitespace),
    "placeholders": get_args(Placeholders),
    "reasoning": get_args(Reasoning),
    "actions": get_args(ActionForm),
}
"""The settings that are names, and the names they take."""
