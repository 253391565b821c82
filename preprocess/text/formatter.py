"""DataFormatter: from a dataset's message to the texts of a conversation.

What Molmo redraws in each epoch (prompt template, style prefix, length hint, which transcript,
which of the tied answers, the layout of a multiple choice) is drawn here `num_variants` times,
from generators keyed by the sample, and stored as alternatives: the loader chooses one per epoch
without a tokenizer. Steps for one message:

1. `messages` and `multi_turn_messages` become turns; any other message is one turn;
2. a turn with several equally likely responses (transcripts, tied answers) becomes as many
   alternatives, each with V draws, so that all are chosen equally often;
3. the style (`preprocess.text.styles`) draws user text and response;
4. the first user text gets the prefix, and both sides the markup of the message format. The
   `system` text of a conversation is a turn of a chat template, and in Molmo's own formats it goes
   in front of the first user text. A document (style `interleaved`) has none of these.

An exchange in which nothing differs between its draws is stored once.

Pure: everything follows from the message, the sizes of the images, the policy and the seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from preprocess.text.chat import Frame, chat_frame
from preprocess.text.message import (
    ImageSize,
    Message,
    VideoFacts,
    add_image_sizes,
    add_video_facts,
    alternatives,
    fixed_texts,
    loss_weight,
    optional_text,
    split_turns,
    turn_shares,
    with_answer,
)
from preprocess.text.own_styles import styles_of
from preprocess.text.paraphrase import paraphrase
from preprocess.text.points import Tag
from preprocess.text.policy import TextPolicy
from preprocess.text.prefix import draw_prefix
from preprocess.text.styles import Draw, Exchange, Style
from preprocess.text.styles.base import as_written
from shardspec.errors import SampleError, nearest
from shardspec.keyed import SampleRng, hash_text, keyed
from shardspec.sample import WEIGHT_ONE


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to train one exchange: the exact texts of both sides, markup included."""

    prompt: str
    response: str
    # What the two were made of, for the rendering of a whole conversation by a chat template.
    user: str = field(default="", compare=False)
    answer: str = field(default="", compare=False)
    reasoning: str | None = field(default=None, compare=False)
    """What the assistant thought before the answer, where the row keeps it apart."""
    system: str = field(default="", compare=False)
    """The conversation's; in its first exchange only."""
    tags: tuple[Tag, ...] = field(default=(), compare=False)
    """The coordinates of the response, in its order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """One conversation about the sample's images."""

    turns: tuple[tuple[Variant, ...], ...]
    """Per exchange, its variants; the loader draws one of each."""
    weight: int = WEIGHT_ONE
    """Loss weight in millionths."""
    unanswered: bool = False
    """Whether its last question has no answer: the response is there for the markup alone."""
    shares: tuple[float, ...] = ()
    """Per exchange, the factor on the weight; 0 for an answer without loss. () for 1 each."""

    def turn_weight(self, turn: int) -> int:
        """Gives the loss weight of an exchange in millionths."""
        return round(self.weight * self.shares[turn]) if self.shares else self.weight


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFormatter:
    """Formats messages by a policy.

    `__call__` formats whole examples, whatever their styles. The `format_*` methods make examples,
    as datasets give them, of the plain values of a task.
    """

    policy: TextPolicy = field(default_factory=TextPolicy)
    frame: Frame = field(default_factory=lambda: chat_frame("role", None))
    seed: int = 0
    """Seed of the baked draws; part of the recipe."""
    rng: SampleRng = field(default_factory=SampleRng, repr=False, compare=False)
    """Gives the generator of each draw."""
    styles: Mapping[str, Style] = field(init=False, repr=False, compare=False)
    """All styles by name, with those of the policy's style sheet."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "styles", styles_of(self.policy.styles))

    def __call__(
        self,
        example: Mapping[str, Any],
        *,
        key: str,
        image_sizes: Sequence[ImageSize] = (),
        videos: Sequence[VideoFacts] = (),
    ) -> tuple[Branch, ...]:
        """Formats every message of an example, each as a conversation.

        Args:
          example: Has `message_list`.
          key: The sample's key; all draws follow from it.
          image_sizes: Of the example's images, in order; points in pixels need them.
          videos: Of its videos; tracks follow from the frames that are stored.

        Raises:
          SampleError: `message_style`, `message_fields`, `points_shape`, `answer_idx`.
          ConfigError: `point_format`.
        """
        base = keyed(self.seed, hash_text(key))
        try:
            return tuple(
                self._branch(message, keyed(base, i), image_sizes, videos)
                for i, message in enumerate(example["message_list"])
            )
        except SampleError as error:
            error.where = error.where or key
            raise

    def format_qa(self, question: str, answer: str, image: Any = None) -> dict[str, Any]:
        """Makes the example of a question with its answer.

        Args:
          question: The user text.
          answer: What is to be learned.
          image: Anything that an image of an example may be; None: a text without an image.

        >>> DataFormatter().format_qa("2 + 2?", "4")["messages"][1]
        {'role': 'assistant', 'content': '4'}
        """
        return _conversation(image, question, answer)

    def format_caption(self, image: Any, caption: str) -> dict[str, Any]:
        """Makes the example of a caption; its prompt is always the same.

        >>> DataFormatter().format_caption("ball.jpg", "A red ball.")["messages"][0]["content"]
        'Describe this image.'
        """
        return _conversation(image, "Describe this image.", caption)

    def format_instruction(
        self, instruction: str, response: str, image: Any = None
    ) -> dict[str, Any]:
        """Makes the example of an instruction that is followed."""
        return _conversation(image, instruction, response)

    def format_pointing(
        self,
        label: str,
        points: Sequence[Sequence[float]],
        image: Any,
        *,
        point_scale: float | None = None,
    ) -> dict[str, Any]:
        """Makes the example of a request to point at everything that a label fits.

        Args:
          label: What is pointed at.
          points: [x, y] of each.
          image: Anything that an image of an example may be.
          point_scale: What the points are fractions of, such as 100; None: pixels of the image.
        """
        return _pointed("pointing", label, points, image, point_scale)

    def format_counting(
        self,
        label: str,
        points: Sequence[Sequence[float]],
        image: Any,
        *,
        point_scale: float | None = None,
    ) -> dict[str, Any]:
        """Makes the example of a request to count: the points of all, and their number."""
        return _pointed("point_count", label, points, image, point_scale)

    def draw(self, message: Message, rng: np.random.RandomState) -> Exchange:
        """Draws user text and response of a message of one turn, by the rules of its style.

        >>> message = {"style": "long_caption", "text": "A red ball."}
        >>> DataFormatter().draw(message, np.random.RandomState(0))
        ('', 'A red ball.')
        """
        _check_style(message, self.styles)
        return self._exchange(message, rng)

    def system_prefix(self, style: str, response: str, rng: np.random.RandomState) -> str:
        """Draws the text before the first user text; see `preprocess.text.prefix`."""
        mode, styles = self.policy.system_prompt, self.styles
        return draw_prefix(style, num_chars=len(response), mode=mode, rng=rng, styles=styles)

    def _branch(
        self,
        message: Message,
        base: int,
        image_sizes: Sequence[ImageSize],
        videos: Sequence[VideoFacts],
    ) -> Branch:
        given = with_answer(message)
        messages = [add_video_facts(turn, videos) for turn in split_turns(given)]
        shares = turn_shares(messages)
        return Branch(
            turns=self._turns(message, messages, base, image_sizes),
            weight=round(loss_weight(message, "weight") * WEIGHT_ONE),
            unanswered=given is not message,
            shares=shares,
        )

    def _turns(
        self,
        message: Message,
        messages: Sequence[Message],
        base: int,
        image_sizes: Sequence[ImageSize],
    ) -> tuple[tuple[Variant, ...], ...]:
        select = self.policy.select_answer
        told = system_text(message, self.policy)
        for turn in messages:
            _check_style(turn, self.styles)
        own = self.styles[messages[0]["style"]].system or self.policy.styles.system
        systems = (told,) if told else own
        turns = [alternatives(add_image_sizes(turn, image_sizes), select) for turn in messages]
        last = len(turns) - 1
        # The hint measures the conversation's last response; of several, the first one drawn.
        ending = ""
        if last:
            ending = self._exchange(turns[last][0], self.rng(keyed(base, last, 0, 0) >> 32))[1]
        return tuple(
            self._variants(
                found, keyed(base, t), first=t == 0, last=t == last, systems=systems, ending=ending
            )
            for t, found in enumerate(turns)
        )

    def _variants(
        self,
        messages: Sequence[Message],
        base: int,
        *,
        first: bool,
        last: bool,
        systems: Sequence[str],
        ending: str,
    ) -> tuple[Variant, ...]:
        drawn = []
        for a, message in enumerate(messages):
            state = keyed(base, a)
            for v in range(self.policy.num_variants):
                rng = self.rng(keyed(v, state=state) >> 32)
                draw = self._draw(message, rng)
                user, response = draw.style.draw(message, draw)
                if self.styles[message["style"]].bare:
                    drawn.append(Variant(prompt="", response=response))
                    continue
                system = next(iter(systems), "")
                if first and len(systems) > 1:
                    system = systems[rng.randint(0, len(systems))]
                if first and system and self.frame.folds_system:
                    user = "\n\n".join(filter(None, (system, user)))
                if self.policy.paraphrase and rng.random_sample() < self.policy.paraphrase:
                    sheet = self.policy.styles
                    user = paraphrase(
                        user,
                        rng,
                        keep=fixed_texts(message),
                        own=sheet.paraphrase,
                        builtin=sheet.builtin_paraphrases,
                    )
                if first:
                    prefix = self.system_prefix(message["style"], ending or response, rng)
                    user = " ".join(part for part in (prefix, user) if part)
                reasoning = self._reasoning(message)
                whole = with_reasoning(response, reasoning) if self.frame.folds_system else response
                prompt, framed = self.frame.frame(
                    user, whole, first=first, last=last, system=system
                )
                drawn.append(
                    Variant(
                        prompt=prompt,
                        response=framed,
                        user=user,
                        answer=response,
                        reasoning=reasoning,
                        system=system if first else "",
                        tags=tuple(draw.tags),
                    )
                )
        num_variants = self.policy.num_variants
        # Which texts they are made of is not compared: what is stored is what counts.
        if all(drawn[i] == drawn[i - i % num_variants] for i in range(len(drawn))):
            drawn = drawn[::num_variants]
        return tuple(drawn)

    def _reasoning(self, message: Message) -> str | None:
        """Gives what a row says that the assistant thought, if the policy keeps it.

        Raises:
          SampleError: `reasoning` (the policy refuses it).
        """
        reasoning = message.get("reasoning")
        if self.policy.reasoning == "refuse" and optional_text(message, "reasoning"):
            raise SampleError("reasoning.refused", chars=len(str(reasoning)))
        return None if reasoning is None else as_written(reasoning, self.policy)

    def _exchange(self, message: Message, rng: np.random.RandomState) -> Exchange:
        draw = self._draw(message, rng)
        return draw.style.draw(message, draw)

    def _draw(self, message: Message, rng: np.random.RandomState) -> Draw:
        return Draw(style=self.styles[message["style"]], policy=self.policy, rng=rng)


def chat_as_written(chat: Mapping[str, Any], policy: TextPolicy) -> dict[str, Any]:
    """Gives a conversation with tools whose texts have the space around them that is kept."""
    turns = [
        [{**each, "content": as_written(each["content"], policy)} for each in turn]
        for turn in chat["turns"]
    ]
    return {**chat, "system": as_written(chat["system"], policy), "turns": turns}


def system_text(message: Message, policy: TextPolicy) -> str:
    """Gives the system text of a conversation, or "".

    Raises:
      SampleError: `message_fields` (not a string).
    """
    return as_written(optional_text(message, "system"), policy)


def _conversation(image: Any, question: str, answer: str) -> dict[str, Any]:
    return {
        "image": image,
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ],
    }


def _pointed(
    style: str,
    label: str,
    points: Sequence[Sequence[float]],
    image: Any,
    point_scale: float | None,
) -> dict[str, Any]:
    message: dict[str, Any] = {"style": style, "label": label, "points": [list(p) for p in points]}
    if point_scale is not None:
        message["point_scale"] = point_scale
    return {"image": image, "message_list": [message]}


def with_reasoning(answer: str, reasoning: str | None) -> str:
    """Writes a thought in front of an answer, as the models that have no template for it do."""
    thought = (reasoning or "").strip()
    return f"<think>\n{thought}\n</think>\n\n{answer}" if thought else answer


def _check_style(message: Message, styles: Mapping[str, Style]) -> None:
    style = message.get("style")
    if not isinstance(style, str) or style not in styles:
        raise SampleError(
            "message_style", style=style, hint=nearest(str(style), styles), fields=sorted(message)
        )
