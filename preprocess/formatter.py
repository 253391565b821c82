"""DataFormatter: from a dataset's message to the texts of a conversation.

What Molmo draws anew in each epoch (prompt template, style prefix, length hint, which transcript)
is drawn here `num_variants` times, from generators keyed by the sample, and stored as
alternatives: the loader chooses one per epoch without a tokenizer. Steps for one message:

1. every response it may have (one caption; or any of several transcripts) is an alternative;
2. per alternative, V user texts are drawn: template or plain prompt, then the system prefix;
3. both sides get the markup of the message format (`ChatFrame`).

Pure: everything follows from the message, the policy and the seed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from preprocess.tokens import ChatFrame
from preprocess.toml import load_toml
from shardspec.errors import ConfigError, SampleError
from shardspec.keyed import SampleRng, hash_text, keyed
from shardspec.sample import WEIGHT_ONE, Geometry

PromptTemplates = Literal["none", "uber_model"]
SystemPrompt = Literal["none", "style", "demo_or_style", "style_and_length"]
MessageFormat = Literal["none", "role", "chatml", "template"]

CAPTION_STYLES = frozenset({"long_caption", "short_caption", "transcript"})

DEMO_STYLES = frozenset({"long_caption", "short_caption", "user_qa", "pointing", "point_count"})
"""Styles that a person would use without naming them: the prefix is the exception (Molmo 1 SFT)."""

STYLE_PREFIX_SHARE = 0.1
"""Share of prompts of a demo style that get the style prefix (Molmo 1, demo_or_style)."""

LENGTH_HINT_SHARE = 0.9
"""Share of prompts with a length hint (Molmo 1, style_and_length)."""

LENGTH_NOISE_CHARS = 25.0
"""Standard deviation of the noise on the length, in characters (Molmo 1)."""

LENGTH_UNIT_CHARS = 15
"""Characters per unit of the hint: a 1,200-character caption reads `long_caption 82:` or so."""

_SIDED = re.compile(
    r"\b(left|right|leftmost|rightmost|left-hand|right-hand|clockwise|counterclockwise|"
    r"anticlockwise|east|west|eastern|western|mirror\w*|facing|"
    r"texts?|words?|letters?|lettering|reads?|reading|says?|written|writing|signs?|signage|"
    r"label\w*|logos?|numbers?|numbered|numeral\w*|digit\w*|clocks?|watch|watches|maps?|"
    r"caption\w*|title\w*|spell\w*|printed|inscri\w*|fonts?)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPolicy:
    """How messages become text."""

    prompt_templates: PromptTemplates = "none"
    """"none": captions are asked for by the prefix alone; "uber_model": by a template."""
    system_prompt: SystemPrompt = "style_and_length"
    message_format: MessageFormat = "role"
    """"role": `User: ... Assistant:`; "chatml"; "template": the tokenizer's own; "none": bare."""
    num_variants: int = 8
    """Baked variants per response, 1 to 1,000."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_variants <= 1000:
            raise ConfigError(
                "number of baked variants is out of range",
                reason="num_variants",
                facts={"got": self.num_variants, "want": "1 to 1000"},
                fix="8 keeps most of the variety of drawing anew",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to train one exchange: the exact texts of both sides, markup included."""

    prompt: str
    response: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """One conversation about the sample's images."""

    turns: tuple[tuple[Variant, ...], ...]
    """Per exchange, its variants; the loader draws one of each."""
    weight: int = WEIGHT_ONE
    """Loss weight in millionths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFormatter:
    """Formats messages by a policy."""

    policy: TextPolicy
    frame: ChatFrame
    seed: int = 0
    """Seed of the baked draws; part of the recipe."""
    rng: SampleRng = field(default_factory=SampleRng, repr=False, compare=False)
    """Gives the generator of each draw."""

    def __call__(self, example: Mapping[str, Any], *, key: str) -> tuple[Branch, ...]:
        """Formats every message of an example, each a conversation of its own.

        Raises:
          SampleError: `message_fields`, `message_style`.
        """
        base = keyed(self.seed, hash_text(key))
        return tuple(
            Branch(
                turns=(self._variants(message, keyed(base, i), key),),
                weight=round(float(message.get("weight", 1.0)) * WEIGHT_ONE),
            )
            for i, message in enumerate(example["message_list"])
        )

    def format_caption(
        self, message: Mapping[str, Any], response: str, rng: np.random.RandomState
    ) -> str:
        """Draws the user text for a caption or a transcript.

        Args:
          message: Has `style`; an explicit `prompt` wins over templates.
          response: The text to be produced: the length hint measures it.
          rng: The draws: template, then prefix coin, then length noise.
        """
        style = message["style"]
        prompt = message.get("prompt", "")
        if not prompt and self.policy.prompt_templates != "none":
            templates = _templates("caption")[style]
            prompt = templates[rng.randint(0, len(templates))]
        prefix = self._system_prefix(style, response, rng)
        return " ".join(part for part in (prefix, prompt) if part)

    def _variants(self, message: Mapping[str, Any], base: int, key: str) -> tuple[Variant, ...]:
        style = message.get("style")
        if style not in CAPTION_STYLES:
            raise SampleError(
                f"no formatter for the style {style!r}",
                reason="message_style",
                where=key,
                facts={"known": sorted(CAPTION_STYLES)},
                fix="correct the dataset adapter",
            )
        responses = _responses(message, key)
        variants = []
        for r, response in enumerate(responses):
            for v in range(self.policy.num_variants):
                rng = self.rng(keyed(base, r, v) >> 32)
                prompt = self.format_caption(message, response, rng)
                variants.append(self._framed(prompt, response))
        return tuple(variants)

    def _framed(self, prompt: str, response: str) -> Variant:
        frame = self.frame
        return Variant(
            prompt=frame.first + prompt + frame.suffix,
            response=frame.response_prefix + response,
        )

    def _system_prefix(self, style: str, response: str, rng: np.random.RandomState) -> str:
        mode = self.policy.system_prompt
        if mode == "none":
            return ""
        if mode == "style":
            return f"{style}:"
        if mode == "demo_or_style":
            named = style not in DEMO_STYLES or rng.random_sample() < STYLE_PREFIX_SHARE
            return f"{style}:" if named else ""
        if rng.random_sample() >= LENGTH_HINT_SHARE:
            return f"{style}:"
        chars = len(response) + int(rng.normal(scale=LENGTH_NOISE_CHARS))
        return f"{style} {max(0, chars // LENGTH_UNIT_CHARS)}:"


def chat_frame(message_format: MessageFormat, template: ChatFrame | None) -> ChatFrame:
    """Gives the markup of a message format.

    Args:
      message_format: See `TextPolicy`.
      template: The frame of the tokenizer's chat template, needed by "template".

    Raises:
      ConfigError: `no_chat_template`.
    """
    if message_format == "none":
        return ChatFrame(first="", later=" ", suffix="", response_prefix=" ")
    if message_format == "role":
        return ChatFrame(
            first=" User: ", later=" User: ", suffix=" Assistant:", response_prefix=" "
        )
    if message_format == "chatml":
        return ChatFrame(
            first="<|im_start|>user\n",
            later="\n<|im_start|>user\n",
            suffix="<|im_end|>\n<|im_start|>assistant\n",
            response_prefix="",
        )
    if template is None:
        raise ConfigError(
            "the tokenizer has no usable chat template",
            reason="no_chat_template",
            fix="use message_format role or chatml, or a tokenizer with a template",
        )
    return template


def safe_geometry(texts: Sequence[str]) -> Geometry:
    """Decides which augmentations leave captions true.

    A flip is allowed only if no text speaks of sides or of things to be read. Free crops and colour
    stay allowed: a caption bears the loss of a margin, a pointing answer does not.

    >>> safe_geometry(["a red ball"]) == Geometry.ALL
    True
    >>> Geometry.FLIP in safe_geometry(["a ball on the left"])
    False
    """
    sided = any(_SIDED.search(text) for text in texts)
    return Geometry.ALL & ~Geometry.FLIP if sided else Geometry.ALL


def message_texts(example: Mapping[str, Any]) -> list[str]:
    """Lists every text that an example brings along: explicit prompts and responses."""
    messages = example["message_list"]
    prompts = [message["prompt"] for message in messages if message.get("prompt")]
    return prompts + [text for message in messages for text in _responses(message, "")]


def _responses(message: Mapping[str, Any], key: str) -> Sequence[str]:
    """The responses a message may have: `text`, or any one of `alternatives`."""
    found = message.get("alternatives", [message.get("text")])
    if not found or not all(isinstance(text, str) and text.strip() for text in found):
        raise SampleError(
            "message has no text",
            reason="message_fields",
            where=key,
            facts={"style": message.get("style"), "fields": sorted(message)},
            fix="correct the row, or let it be skipped",
        )
    return [text.strip() for text in found]


@cache
def _templates(name: str) -> Mapping[str, list[str]]:
    return load_toml(Path(__file__).parent / "templates" / f"{name}.toml")
