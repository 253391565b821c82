"""DataFormatter: from a dataset's message to the texts of a conversation.

What Molmo draws anew in each epoch (prompt template, style prefix, length hint, which transcript,
which of the tied answers, the layout of a multiple choice) is drawn here `num_variants` times,
from generators keyed by the sample, and stored as alternatives: the loader chooses one per epoch
without a tokenizer. Steps for one message:

1. `messages` and `multi_turn_messages` become turns; any other message is one turn;
2. a turn with several equally likely responses (transcripts, tied answers) becomes as many
   alternatives, each with V draws, so that all are chosen equally often;
3. the style names the family (`STYLES`), and a draw of the family gives user text and response;
4. the first user text gets the system prefix, and both sides the markup of the message format.

An exchange in which nothing differs between its draws is stored once.

Pure: everything follows from the message, the sizes of the images, the policy and the seed.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from preprocess.text.choices import ChoiceForm, fill, write_choices
from preprocess.text.paraphrase import paraphrase
from preprocess.text.points import (
    NO_POINTS,
    PointFormat,
    PointGroup,
    PointMode,
    fill_placeholders,
    parse_points,
    point_sentence,
    point_tag,
)
from preprocess.text.tokens import ChatFrame
from shardspec.errors import ConfigError, SampleError, nearest
from shardspec.keyed import SampleRng, hash_text, keyed
from shardspec.sample import WEIGHT_ONE, Geometry
from shardspec.toml import load_toml

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
]

Message = Mapping[str, Any]
Exchange = tuple[str, str]
"""User text and response text, without prefix and markup."""

ImageSize = tuple[int, int]
"""Width and height of an upright original, in pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """What the formatter knows of a style."""

    family: Family
    template: str = ""
    """File and list of its prompt templates; "" where the question itself is the prompt."""
    since: PromptTemplates = "uber_model"
    """The first setting of `prompt_templates` that uses them."""
    mode: PointMode = "point"
    """Form of the answer of pointing and counting styles."""
    grouped: bool = False
    """Whether `points` has a list per image."""
    explained: bool = False
    """Whether an explanation must stand before the answer."""
    rigid: bool = False
    """Whether a flip or a crop would make the text wrong: coordinates, or pages to be read."""


def _caption(name: str) -> Style:
    return Style(family="caption", template=f"caption.{name}")


def _pointing(mode: PointMode, name: str, *, grouped: bool = False) -> Style:
    return Style(
        family="pointing" if mode == "point" else "counting",
        template=f"pointing.{name}",
        mode=mode,
        grouped=grouped,
        rigid=True,
    )


_QA = Style(family="qa")
_COUNTED = Style(family="qa", rigid=True)
_DOCUMENT = Style(family="document", rigid=True)
_EXPLAINED = Style(
    family="document",
    template="question.explained",
    since="uber_model_v2",
    explained=True,
    rigid=True,
)
_CHOICE = Style(family="multiple_choice")
_DIAGRAM = Style(family="multiple_choice", rigid=True)
_INSTRUCTION = Style(family="instruction")
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
    "long_caption": _caption("long_caption"),
    "short_caption": _caption("short_caption"),
    "transcript": _caption("transcript"),
    "vqa2": _QA,
    "okvqa": _QA,
    "gqa": _QA,
    "a_okvqa_da": _QA,
    "mantis_instruct_da": _QA,
    "eval_short_answer": _QA,
    "tally_qa": _COUNTED,
    "text_vqa": _DOCUMENT,
    "ocr_vqa": _DOCUMENT,
    "st_qa": _DOCUMENT,
    "doc_qa": _DOCUMENT,
    "info_qa": _DOCUMENT,
    "chart_qa": _DOCUMENT,
    "plot_qa": _DOCUMENT,
    "figure_qa": _DOCUMENT,
    "dv_qa": _DOCUMENT,
    "tabwmp_da": _DOCUMENT,
    **{f"pixmo_docs_{kind}": _DOCUMENT for kind in ("other", "charts", "diagrams", "tables")},
    **{f"cosyn_{kind}": _DOCUMENT for kind in _COSYN},
    **{f"cosyn_{kind}_exp": _EXPLAINED for kind in _COSYN},
    "pointing": _pointing("point", "pointing"),
    "cosyn_point": _pointing("point", "pointing"),
    "point_count": _pointing("point_then_count", "point_count"),
    "point_then_count": _pointing("point_then_count", "point_count"),
    "count_then_point": _pointing("count_then_point", "count_then_point"),
    "count": _pointing("count", "count"),
    "multi_image_pointing": _pointing("point", "multi_image_pointing", grouped=True),
    "multi_image_point_then_count": _pointing(
        "point_then_count", "multi_image_point_then_count", grouped=True
    ),
    "multi_image_count_then_point": _pointing(
        "count_then_point", "multi_image_count_then_point", grouped=True
    ),
    "multi_image_counting": _pointing("count", "multi_image_count", grouped=True),
    "point_qa": Style(family="inline_points", rigid=True),
    "a_okvqa_mc": _CHOICE,
    "mantis_instruct_mc": _CHOICE,
    "multi_image_mc": _CHOICE,
    "eval_multiple_choice": _CHOICE,
    "eval_multi_image_mc": _CHOICE,
    "science_qa": _DIAGRAM,
    "ai2_diagram": _DIAGRAM,
    "ai2_diagram_no_letter": _DIAGRAM,
    "user_qa": _INSTRUCTION,
    "synthetic_qa": _INSTRUCTION,
    "correction_qa": _INSTRUCTION,
    "text_sft": _INSTRUCTION,
    "demo": _INSTRUCTION,
    "android_control": Style(family="instruction", rigid=True),
    "robot_action": Style(family="robot", template="robot.robot_action", rigid=True),
}
"""Every style, under its name in the Molmo data; `robot_action` is our own."""

CAPTION_STYLES = frozenset(name for name, style in STYLES.items() if style.family == "caption")

UNNAMED_STYLES = frozenset({"android_control", "demo"})
"""Styles without a prefix in the demo modes: their data brings its own (Molmo 1)."""

DEMO_STYLES = frozenset(
    {
        "long_caption",
        "short_caption",
        "user_qa",
        "pointing",
        "point_count",
        "cosyn_point",
        "correction_qa",
        "text_sft",
        "multi_image_pointing",
        "multi_image_counting",
        "multi_image_point_then_count",
        "multi_image_count_then_point",
    }
)
"""Styles that a person would use without naming them: the prefix is the exception (Molmo 2)."""

PLAIN_HINT_STYLES = frozenset({"pointing", "point_count", "cosyn_point"})
"""Styles without a length hint in style_and_length_v2 (Molmo 2): things in the image decide."""

NO_POINTING_STYLES = frozenset({"user_qa", "synthetic_qa"})
"""Styles whose counting questions are told to be answered in words (both PixMo question sets)."""

TRAINED_AS: Mapping[str, str] = {
    "eval_short_answer": "vqa2",
    "eval_multiple_choice": "a_okvqa_mc",
    "eval_multi_image_mc": "multi_image_mc",
}
"""Evaluation styles and the styles whose prefix they take (Molmo 2)."""

STYLE_PREFIX_SHARE = 0.1
"""Share of prompts of a demo style that get the style prefix (Molmo 1, demo_or_style)."""

LENGTH_HINT_SHARE = 0.9
"""Share of prompts with a length hint (Molmo 1, style_and_length)."""

LENGTH_NOISE_CHARS = 25.0
"""Standard deviation of the noise on the length, in characters (Molmo 1)."""

LENGTH_UNIT_CHARS = 15
"""Characters per unit of the hint: a 1,200-character caption reads `long_caption 82:` or so."""

LENGTH_NOISE_V3 = 0.05
"""Standard deviation of the factor on the length, kept within 0.5 and 1.5 (Molmo 2, v3)."""

LENGTH_UNIT_CHARS_V3 = 25
"""Characters per unit of the hint (Molmo 2, v3)."""

ACTION_BINS = 256
"""Bins of a robot's action values on [-1, 1] (the resolution of RT-2, OpenVLA and MolmoAct)."""

ANNOTATION_SCALE = 100.0
"""Inline points are percentages (PixMo-Point-Explanations)."""

_SIDED = re.compile(
    r"\b(left|right|leftmost|rightmost|left-hand|right-hand|clockwise|counterclockwise|"
    r"anticlockwise|east|west|eastern|western|mirror\w*|facing|"
    r"texts?|words?|letters?|lettering|reads?|reading|says?|written|writing|signs?|signage|"
    r"label\w*|logos?|numbers?|numbered|numeral\w*|digit\w*|clocks?|watch|watches|maps?|"
    r"caption\w*|title\w*|spell\w*|printed|inscri\w*|fonts?)\b",
    re.IGNORECASE,
)

_COUNTING = re.compile(
    r"\bhow many\b|"
    r"^\W*(?:please |can you |could you )?count\b|"
    r"\b(?:number|count) of (?!the\b|this\b|that\b)[^?]*\?|"
    r"\b(?:tell|give) me the (?:total |exact )?(?:number|count) of\b",
    re.IGNORECASE,
)


_POLICY_NAMES: Mapping[str, Sequence[str]] = {
    "prompt_templates": get_args(PromptTemplates),
    "system_prompt": get_args(SystemPrompt),
    "message_format": get_args(MessageFormat),
    "point_format": get_args(PointFormat),
    "choices": get_args(ChoiceForm),
    "select_answer": get_args(SelectAnswer),
}
"""The settings that are names, and the names they take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPolicy:
    """How messages become text."""

    prompt_templates: PromptTemplates = "none"
    """"none": a message is asked for by its question or label, a caption by the prefix alone;
    "uber_model": captions and points by a template; "uber_model_v2": explained answers too."""
    system_prompt: SystemPrompt = "style_and_length"
    message_format: MessageFormat = "role"
    """"role": `User: ... Assistant:`; "chatml"; "template": the tokenizer's own; "none": bare."""
    num_variants: int = 8
    """Baked variants per response, 1 to 1,000."""
    point_format: PointFormat = "coords"
    """How points are written: "xml" (Molmo 1, 0 to 100) or "coords" (Molmo 2, 0 to 1000)."""
    choices: ChoiceForm = "standard"
    """How multiple choices are asked: "standard", "letter" (Molmo 1) or "varied"."""
    select_answer: SelectAnswer = "best"
    """Of several `answers`: "best" the most common, "first" the first in the alphabet."""
    paraphrase: float = 0.0
    """Share of variants whose user text is paraphrased, 0 to 1."""

    def __post_init__(self) -> None:
        for name, known in _POLICY_NAMES.items():
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
        if not 0 <= self.paraphrase <= 1:
            raise ConfigError("paraphrase", got=self.paraphrase, want="0 to 1")


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
    """Formats messages by a policy.

    The `format_*` methods are the families: each draws the user text and the response of one
    message. They may be called alone; `__call__` applies them to whole examples.
    """

    policy: TextPolicy
    frame: ChatFrame
    seed: int = 0
    """Seed of the baked draws; part of the recipe."""
    rng: SampleRng = field(default_factory=SampleRng, repr=False, compare=False)
    """Gives the generator of each draw."""

    def __call__(
        self, example: Mapping[str, Any], *, key: str, image_sizes: Sequence[ImageSize] = ()
    ) -> tuple[Branch, ...]:
        """Formats every message of an example, each a conversation of its own.

        Args:
          example: Has `message_list`.
          key: The sample's key; all draws follow from it.
          image_sizes: Of the example's images, in order; points in pixels need them.

        Raises:
          SampleError: `message_style`, `message_fields`, `points_shape`, `answer_idx`.
          ConfigError: `point_format`.
        """
        base = keyed(self.seed, hash_text(key))
        try:
            return tuple(
                Branch(
                    turns=self._turns(message, keyed(base, i), image_sizes),
                    weight=round(float(message.get("weight", 1.0)) * WEIGHT_ONE),
                )
                for i, message in enumerate(example["message_list"])
            )
        except SampleError as error:
            error.where = error.where or key
            raise

    def format_caption(self, message: Message, rng: np.random.RandomState) -> Exchange:
        """Draws a caption or a transcript: `text`, or any one of `alternatives`.

        >>> formatter = DataFormatter(policy=TextPolicy(), frame=chat_frame("role", None))
        >>> message = {"style": "long_caption", "text": "A red ball."}
        >>> formatter.format_caption(message, np.random.RandomState(0))
        ('', 'A red ball.')
        """
        message = self._one(message, rng)
        # A question of its own, where a row has one, stands for the template.
        return self._ask(message, rng, plain=message.get("question", "")), _text(message, "text")

    def format_qa(self, message: Message, rng: np.random.RandomState) -> Exchange:
        """Draws a question with a short answer.

        The response is `answer`, one of the most common of `answers`, or `text`; an `explanation`
        stands before the answer.
        """
        message = self._one(message, rng)
        question = "" if message.get("prompt") else _text(message, "question")
        user = self._ask(message, rng, plain=question, question=question)
        response = _text(message, "answer" if "answer" in message else "text")
        if "explanation" in message or STYLES[message["style"]].explained:
            response = f"{_text(message, 'explanation')} Answer: {response}"
        return user, response

    def format_document(self, message: Message, rng: np.random.RandomState) -> Exchange:
        """Draws a question about something to be read: as `format_qa`, but images stay rigid."""
        return self.format_qa(message, rng)

    def format_instruction(self, message: Message, rng: np.random.RandomState) -> Exchange:
        """Draws an exchange of a conversation in free form.

        Where a question asks for a count and is answered in words, the user says so first, so that
        the model keeps pointing for those who do not.
        """
        user, response = self.format_qa(message, rng)
        told = message["style"] in NO_POINTING_STYLES and not message.get("prompt")
        if told and asks_for_count(user):
            prefixes = _templates("question.no_pointing")
            user = f"{prefixes[rng.randint(0, len(prefixes))]} {user}"
        return user, response

    def format_pointing(self, message: Message, rng: np.random.RandomState) -> Exchange:
        """Draws a request to point at things: `points` of `label`.

        Points are [n, 2], or such a list per image in styles of several images; `point_scale` says
        what they are fractions of (100: percent), else they are pixels of `image_sizes`. With
        `clip_points`, points outside of the image go to its border.
        """
        style = STYLES[message["style"]]
        label = _label(message, grouped=style.grouped)
        # A question is a whole sentence; only a bare label goes into a template.
        plain = message.get("question") or label
        templated = {} if "question" in message else {"label": label}
        user = self._ask(message, rng, plain=plain, **templated)
        return user, self._points_answer(message, label)

    def format_counting(self, message: Message, rng: np.random.RandomState) -> Exchange:
        """Draws a request to count: as `format_pointing`, with the number before or after.

        Without `points`, the answer-only style takes the number from `count`.
        """
        return self.format_pointing(message, rng)

    def format_inline_points(self, message: Message, rng: np.random.RandomState) -> Exchange:
        """Draws an answer with tags at its placeholders, one per entry of `answer_annotations`.

        An annotation has `points` (percent unless `point_scale` says otherwise; kept within the
        image), `inline_text` and `alt_text`.
        """
        question = "" if message.get("prompt") else _text(message, "question")
        scale = _positive(message.get("point_scale", ANNOTATION_SCALE), message)
        tags = [
            self._inline_tag(annotation, scale)
            for annotation in _field(message, "answer_annotations")
        ]
        user = self._ask(message, rng, plain=question, question=question)
        return user, fill_placeholders(_text(message, "answer"), tags)

    def format_multiple_choice(self, message: Message, rng: np.random.RandomState) -> Exchange:
        """Draws a multiple choice: `question`, `options` or `unlabelled_options`, `answer_idx`.

        An explicit `prompt` is taken as it is, with the answer of the fixed form.
        """
        labelled = "unlabelled_options" not in message
        options = _texts(message, "options" if labelled else "unlabelled_options", blank=True)
        prompt = message.get("prompt")
        form = "standard" if prompt and self.policy.choices == "varied" else self.policy.choices
        user, response = write_choices(
            "" if prompt else _text(message, "question"),
            options,
            _field(message, "answer_idx"),
            labelled=labelled,
            form=form,
            rng=rng,
        )
        return prompt or user, response

    def format_robot(self, message: Message, rng: np.random.RandomState) -> Exchange:
        """Draws a request for a robot's next motion: `instruction` (or `question`) and `action`.

        The action is a list of numbers in [-1, 1], or a list of such lists for several steps. It is
        written as plain integers, which every tokenizer knows: see `action_text`.
        """
        name = "instruction" if "instruction" in message else "question"
        task = "" if message.get("prompt") else _text(message, name)
        user = self._ask(message, rng, plain=task, instruction=task)
        try:
            return user, action_text(_field(message, "action"))
        except ValueError:
            raise _fields_error(message, "action", "finite numbers, one or more") from None

    def system_prefix(self, style: str, response: str, rng: np.random.RandomState) -> str:
        """Draws what stands before the first user text: the style's name, with or without a hint.

        Args:
          style: The conversation's.
          response: The text to be produced; the hint measures it.
          rng: The draws: the coin, then the noise.
        """
        name = TRAINED_AS.get(style, style)
        mode = self.policy.system_prompt
        if mode == "none" or (mode.startswith("demo") and name in UNNAMED_STYLES):
            return ""
        if mode == "demo_or_style":
            named = name not in DEMO_STYLES or rng.random_sample() < STYLE_PREFIX_SHARE
            return f"{name}:" if named else ""
        if mode == "demo_or_style_v2":
            bare = name in DEMO_STYLES or STYLES[name].family == "multiple_choice"
            return "" if bare else f"{name}:"
        plain = mode == "style_and_length_v2" and name in PLAIN_HINT_STYLES
        if mode == "style" or plain:
            return f"{name}:"
        if rng.random_sample() >= LENGTH_HINT_SHARE:
            # Molmo 1 has a space before the colon here, and its checkpoints know it so.
            return f"{name} :" if mode == "style_and_length" else f"{name}:"
        hint = _hint_v3 if mode == "style_and_length_v3" else _hint
        return f"{name} {hint(len(response), rng)}:"

    def _turns(
        self, message: Message, base: int, image_sizes: Sequence[ImageSize]
    ) -> tuple[tuple[Variant, ...], ...]:
        turns = [self._alternatives(turn) for turn in _split_turns(message, image_sizes)]
        last = len(turns) - 1
        # The hint measures the conversation's last response; of several, the first one drawn.
        ending = ""
        if last:
            ending = self._draw(turns[last][0], self.rng(keyed(base, last, 0, 0) >> 32))[1]
        return tuple(
            self._variants(alternatives, keyed(base, t), first=t == 0, ending=ending)
            for t, alternatives in enumerate(turns)
        )

    def _variants(
        self, alternatives: Sequence[Message], base: int, *, first: bool, ending: str
    ) -> tuple[Variant, ...]:
        drawn = []
        for a, message in enumerate(alternatives):
            for v in range(self.policy.num_variants):
                rng = self.rng(keyed(base, a, v) >> 32)
                user, response = self._draw(message, rng)
                if self.policy.paraphrase and rng.random_sample() < self.policy.paraphrase:
                    user = paraphrase(user, rng, keep=_kept(message))
                if first:
                    prefix = self.system_prefix(message["style"], ending or response, rng)
                    user = " ".join(part for part in (prefix, user) if part)
                drawn.append(self._framed(user, response, first=first))
        num_variants = self.policy.num_variants
        if all(drawn[i] == drawn[i - i % num_variants] for i in range(len(drawn))):
            drawn = drawn[::num_variants]
        return tuple(drawn)

    def _draw(self, message: Message, rng: np.random.RandomState) -> Exchange:
        return _DRAWS[STYLES[message["style"]].family](self, message, rng)

    def _framed(self, user: str, response: str, *, first: bool) -> Variant:
        frame = self.frame
        return Variant(
            prompt=(frame.first if first else frame.later) + user + frame.suffix,
            response=frame.response_prefix + response,
        )

    def _alternatives(self, message: Message) -> list[Message]:
        """Lists the message once for each of its equally likely responses."""
        for several, single in (("alternatives", "text"), ("answers", "answer")):
            if several in message:
                texts = _texts(message, several, blank=several == "answers")
                if several == "answers":
                    # One empty vote of ten is no reason to lose the row.
                    votes = [text for text in texts if text]
                    if not votes:
                        raise _fields_error(message, several, "a list of texts")
                    texts = _SELECT[self.policy.select_answer](votes)
                rest = {name: value for name, value in message.items() if name != several}
                return [{**rest, single: text} for text in texts]
        return [message]

    def _one(self, message: Message, rng: np.random.RandomState) -> Message:
        found = self._alternatives(message)
        return found[0] if len(found) == 1 else found[rng.randint(0, len(found))]

    def _ask(
        self, message: Message, rng: np.random.RandomState, *, plain: str = "", **fields: str
    ) -> str:
        """The user text: the explicit prompt, a template with its fields, or the plain text."""
        prompt = message.get("prompt")
        if prompt:
            return str(prompt)
        style = STYLES[message["style"]]
        used = _TEMPLATE_LEVEL[self.policy.prompt_templates] >= _TEMPLATE_LEVEL[style.since]
        if not style.template or not used or (plain and not fields):
            return plain
        templates = _templates(style.template)
        return fill(templates[rng.randint(0, len(templates))], fields)

    def _points_answer(self, message: Message, label: str) -> str:
        mode = STYLES[message["style"]].mode
        if mode == "count" and "points" not in message:
            count = _field(message, "count")
            if type(count) is not int or count < 0:
                raise _fields_error(message, "count", "a number of things")
            return str(count) if count else NO_POINTS
        groups = _point_groups(message)
        count = sum(len(group.points) for group in groups)
        if not count:
            return NO_POINTS
        if mode == "count":
            return point_sentence("", count=count, mode=mode)
        tag = point_tag(groups, label=label, point_format=self.policy.point_format)
        return point_sentence(tag, count=count, mode=mode)

    def _inline_tag(self, annotation: Message, scale: float) -> str:
        points = parse_points(_field(annotation, "points"))
        text = _text(annotation, "inline_text")
        if not points:
            return text  # nothing to point at: the words alone
        group = PointGroup(points=points, scale=(scale, scale)).clipped()
        alt = annotation.get("alt_text")
        return point_tag([group], label=text, alt=alt, point_format=self.policy.point_format)


_DRAWS: Mapping[Family, Callable[[DataFormatter, Message, np.random.RandomState], Exchange]] = {
    "caption": DataFormatter.format_caption,
    "qa": DataFormatter.format_qa,
    "document": DataFormatter.format_document,
    "pointing": DataFormatter.format_pointing,
    "counting": DataFormatter.format_counting,
    "inline_points": DataFormatter.format_inline_points,
    "multiple_choice": DataFormatter.format_multiple_choice,
    "instruction": DataFormatter.format_instruction,
    "robot": DataFormatter.format_robot,
}

_TEMPLATE_LEVEL: Mapping[PromptTemplates, int] = {"none": 0, "uber_model": 1, "uber_model_v2": 2}


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
        raise ConfigError("no_chat_template")
    return template


def safe_geometry(texts: Sequence[str], *, styles: Sequence[str] = ()) -> Geometry:
    """Decides which augmentations leave an example's texts true.

    Points, motions and pages to be read allow neither flips nor crops. Otherwise a flip is allowed
    if no text speaks of sides or of things to be read, and a free crop if none asks for a count: a
    caption bears the loss of a margin, a number does not. Colour may always change.

    Args:
      texts: All texts of the example, questions as well as responses.
      styles: The styles of its messages.

    >>> safe_geometry(["a red ball"]) == Geometry.ALL
    True
    >>> Geometry.FLIP in safe_geometry(["a ball on the left"])
    False
    >>> safe_geometry(["dogs"], styles=["pointing"]) == Geometry.COLOR
    True
    """
    if any(STYLES[style].rigid for style in styles if style in STYLES):
        return Geometry.COLOR
    safe = Geometry.ALL
    if any(_SIDED.search(text) for text in texts):
        safe &= ~Geometry.FLIP
    if any(asks_for_count(text) for text in texts):
        safe &= ~Geometry.CROP
    return safe


def message_texts(example: Mapping[str, Any]) -> list[str]:
    """Lists every text that an example's messages bring along, whatever their fields."""
    return [text for name, text in _strings(example["message_list"]) if name != "style"]


def message_styles(example: Mapping[str, Any]) -> list[str]:
    """Lists the styles of an example's messages and turns."""
    return [text for name, text in _strings(example["message_list"]) if name == "style"]


def image_prefixes(num_images: int) -> list[str]:
    """Names the images of an example for the text before them; one image needs no name.

    >>> image_prefixes(1), image_prefixes(2)
    ([''], ['Image 1', 'Image 2'])
    """
    if num_images < 2:
        return [""] * num_images
    return [f"Image {number}" for number in range(1, num_images + 1)]


def asks_for_count(text: str) -> bool:
    """Says whether a question looks like one for a number of things.

    >>> asks_for_count("How many dogs are there?"), asks_for_count("What is the dog doing?")
    (True, False)
    """
    return bool(_COUNTING.search(text))


def action_text(action: Any) -> str:
    """Writes a robot's action as integers: one per value, steps apart by semicolons.

    [-1, 1] is cut into 256 bins of equal width, numbered from 0; values outside go to the outer
    bins. Bin b stands for its middle, (b + 0.5) / 128 - 1, which is at most 1/256 away.

    Args:
      action: Numbers: [values] of one step, or [steps, values].

    Raises:
      ValueError: No step, a step without values, or values that are no finite numbers.

    >>> action_text([-1.0, 0.0, 1.0])
    '0 128 255'
    >>> action_text([[0.5, -2.0], [0.25, 0.0]])
    '192 0; 160 128'
    """
    nested = isinstance(action, list | tuple) and action and isinstance(action[0], list | tuple)
    steps = action if nested else [action]
    if not all(isinstance(step, list | tuple) and step for step in steps):
        raise ValueError("an action is one or more steps of one or more values")
    return "; ".join(" ".join(str(_bin(value)) for value in step) for step in steps)


def _bin(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("an action value is a finite number")
    share = (min(max(value, -1.0), 1.0) + 1.0) / 2.0
    return min(int(share * ACTION_BINS), ACTION_BINS - 1)


def _hint(num_chars: int, rng: np.random.RandomState) -> int:
    noisy = num_chars + int(rng.normal(scale=LENGTH_NOISE_CHARS))
    return max(0, noisy // LENGTH_UNIT_CHARS)


def _hint_v3(num_chars: int, rng: np.random.RandomState) -> int:
    factor = min(max(rng.normal(1.0, LENGTH_NOISE_V3), 0.5), 1.5)
    return int(num_chars * factor / LENGTH_UNIT_CHARS_V3)


def _split_turns(message: Message, image_sizes: Sequence[ImageSize]) -> list[Message]:
    """Gives a message's exchanges, each a message of its own with all that it needs."""
    shared = {
        name: value
        for name, value in message.items()
        if name not in ("messages", "multi_turn_messages")
    }
    turns: list[Message] = [message]
    if "messages" in message:
        texts = message["messages"]
        if not isinstance(texts, Sequence) or not texts or len(texts) % 2:
            raise _fields_error(message, "messages", "[question, answer, ...]")
        pairs = zip(texts[::2], texts[1::2], strict=True)
        turns = [{**shared, "question": question, "answer": answer} for question, answer in pairs]
    elif "multi_turn_messages" in message:
        style = {"style": message["style"]} if "style" in message else {}
        turns = [{**style, **turn} for turn in message["multi_turn_messages"]]
        if not turns:
            raise _fields_error(message, "multi_turn_messages", "at least one message")
    for turn in turns:
        _check_style(turn)
    sizes = {"image_sizes": image_sizes} if image_sizes else {}
    return [{**turn, **sizes} if "points" in turn else turn for turn in turns]


def _check_style(message: Message) -> None:
    style = message.get("style")
    if not isinstance(style, str) or style not in STYLES:
        raise SampleError(
            "message_style", style=style, hint=nearest(str(style), STYLES), fields=sorted(message)
        )


def _point_groups(message: Message) -> list[PointGroup]:
    points = _field(message, "points")
    if not STYLES[message["style"]].grouped or not isinstance(points, Sequence):
        points = [points]
    sizes = message.get("image_sizes", ())
    if sizes and len(points) > len(sizes):
        raise SampleError(
            "points_shape.groups", style=message["style"], groups=len(points), images=len(sizes)
        )
    groups = [
        PointGroup(points=parse_points(own), scale=_scale(message, i), image=i + 1)
        for i, own in enumerate(points)
    ]
    return [group.clipped() for group in groups] if message.get("clip_points") else groups


def _scale(message: Message, image: int) -> tuple[float, float]:
    if "point_scale" in message:
        scale = _positive(message["point_scale"], message)
        return scale, scale
    if not message.get("image_sizes"):
        raise _fields_error(message, "point_scale", "a scale, or images whose pixels are meant")
    width, height = message["image_sizes"][image]
    return float(width), float(height)


def _positive(scale: Any, message: Message) -> float:
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise _fields_error(message, "point_scale", "a number above 0")
    return float(scale)


def _label(message: Message, *, grouped: bool) -> str:
    """The name of what is pointed at: in lower case, unless the row's own case matters."""
    if "label" in message:
        label = _text(message, "label")
        # Labels of image groups stay as they are (Molmo 2).
        return label if grouped else label.lower()
    return _text(message, "label_cased" if "label_cased" in message else "question")


def _kept(message: Message) -> list[str]:
    """The texts that must read the same in the question and in the answer."""
    named = [message.get("label"), message.get("label_cased")]
    options = [*(message.get("options") or ()), *(message.get("unlabelled_options") or ())]
    # Without a label, the question itself stands between the tags.
    asked = [message.get("question")] if "points" in message else []
    texts = [*named, *options, *asked]
    return [text.strip() for text in texts if isinstance(text, str) and text.strip()]


def _most_common(answers: Sequence[str]) -> list[str]:
    """The answers that most people gave, in the order in which they came up."""
    counts = Counter(answers)
    most = max(counts.values())
    return [answer for answer, count in counts.items() if count == most]


_SELECT: Mapping[SelectAnswer, Callable[[Sequence[str]], list[str]]] = {
    "best": _most_common,
    "first": lambda answers: [min(answers)],
}


def _field(message: Message, name: str) -> Any:
    if message.get(name) is None:
        raise _fields_error(message, name, "a value")
    return message[name]


def _text(message: Message, name: str) -> str:
    text = message.get(name)
    if not isinstance(text, str) or not text.strip():
        raise _fields_error(message, name, "a text")
    return text.strip()


def _texts(message: Message, name: str, *, blank: bool = False) -> list[str]:
    texts = message.get(name)
    if not isinstance(texts, list | tuple) or not texts:
        raise _fields_error(message, name, "a list of texts")
    if not all(isinstance(text, str) and (blank or text.strip()) for text in texts):
        raise _fields_error(message, name, "a list of texts")
    return [text.strip() for text in texts]


def _fields_error(message: Message, name: str, want: str) -> SampleError:
    style = message.get("style", "of an annotation")
    return SampleError(
        "message_fields.field",
        style=style,
        name=name,
        field=name,
        want=want,
        fields=sorted(message),
    )


def _strings(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Walks nested JSON; gives each text with the name of the field that it is in."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        for inner, part in value.items():
            yield from _strings(part, inner)
    elif isinstance(value, Sequence):
        for part in value:
            yield from _strings(part, name)


@cache
def _templates(name: str) -> Sequence[str]:
    """The templates of a list, "file.list"; all of a list have the same fields."""
    file, _, section = name.partition(".")
    templates: Sequence[str] = load_toml(Path(__file__).parent / "templates" / f"{file}.toml")[
        section
    ]
    return templates
