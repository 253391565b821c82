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
   in front of the first user text.

An exchange in which nothing differs between its draws is stored once.

Pure: everything follows from the message, the sizes of the images, the policy and the seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from preprocess.text.chat import Frame
from preprocess.text.message import (
    ImageSize,
    Message,
    add_image_sizes,
    alternatives,
    fixed_texts,
    optional_text,
    split_turns,
)
from preprocess.text.paraphrase import paraphrase
from preprocess.text.policy import TextPolicy
from preprocess.text.prefix import draw_prefix
from preprocess.text.styles import STYLES, Draw, Exchange
from preprocess.text.styles.base import as_written
from preprocess.text.styles.captions import draw_caption
from preprocess.text.styles.choices import draw_choice
from preprocess.text.styles.instructions import draw_instruction
from preprocess.text.styles.pointing import draw_inline_points, draw_pointing
from preprocess.text.styles.qa import draw_qa
from preprocess.text.styles.robots import draw_robot
from shardspec.errors import SampleError, nearest
from shardspec.keyed import SampleRng, hash_text, keyed
from shardspec.sample import WEIGHT_ONE


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

    `__call__` formats whole examples, whatever their styles. The `format_*` methods draw the user
    text and the response of one message by the rules of one family; the message's style, which is
    required, says which templates it takes.
    """

    policy: TextPolicy
    frame: Frame
    seed: int = 0
    """Seed of the baked draws; part of the recipe."""
    rng: SampleRng = field(default_factory=SampleRng, repr=False, compare=False)
    """Gives the generator of each draw."""

    def __call__(
        self, example: Mapping[str, Any], *, key: str, image_sizes: Sequence[ImageSize] = ()
    ) -> tuple[Branch, ...]:
        """Formats every message of an example, each as a conversation.

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
        """Draws a caption or a transcript; see `preprocess.text.styles.captions`.

        >>> from preprocess.text import chat_frame
        >>> formatter = DataFormatter(policy=TextPolicy(), frame=chat_frame("role", None))
        >>> message = {"style": "long_caption", "text": "A red ball."}
        >>> formatter.format_caption(message, np.random.RandomState(0))
        ('', 'A red ball.')
        """
        return draw_caption(message, self._draw(message, rng))

    def format_qa(self, message: Message, rng: np.random.RandomState) -> Exchange:
        """Draws a question with a short answer; see `preprocess.text.styles.qa`."""
        return draw_qa(message, self._draw(message, rng))

    def format_document(self, message: Message, rng: np.random.RandomState) -> Exchange:
        """Draws a question about something to be read: as `format_qa`, but images stay rigid."""
        return draw_qa(message, self._draw(message, rng))

    def format_instruction(self, message: Message, rng: np.random.RandomState) -> Exchange:
        """Draws an exchange in free form; see `preprocess.text.styles.instructions`."""
        return draw_instruction(message, self._draw(message, rng))

    def format_pointing(self, message: Message, rng: np.random.RandomState) -> Exchange:
        """Draws a request to point at things; see `preprocess.text.styles.pointing`."""
        return draw_pointing(message, self._draw(message, rng))

    def format_counting(self, message: Message, rng: np.random.RandomState) -> Exchange:
        """Draws a request to count; see `preprocess.text.styles.counting`."""
        return draw_pointing(message, self._draw(message, rng))

    def format_inline_points(self, message: Message, rng: np.random.RandomState) -> Exchange:
        """Draws an answer with points in it; see `preprocess.text.styles.pointing`."""
        return draw_inline_points(message, self._draw(message, rng))

    def format_multiple_choice(self, message: Message, rng: np.random.RandomState) -> Exchange:
        """Draws a multiple choice; see `preprocess.text.styles.choices`."""
        return draw_choice(message, self._draw(message, rng))

    def format_robot(self, message: Message, rng: np.random.RandomState) -> Exchange:
        """Draws a request for a robot's next motion; see `preprocess.text.styles.robots`."""
        return draw_robot(message, self._draw(message, rng))

    def system_prefix(self, style: str, response: str, rng: np.random.RandomState) -> str:
        """Draws the text before the first user text; see `preprocess.text.prefix`."""
        mode = self.policy.system_prompt
        return draw_prefix(style, num_chars=len(response), mode=mode, rng=rng)

    def _turns(
        self, message: Message, base: int, image_sizes: Sequence[ImageSize]
    ) -> tuple[tuple[Variant, ...], ...]:
        select = self.policy.select_answer
        messages = split_turns(message)
        system = as_written(optional_text(message, "system"), self.policy)
        for turn in messages:
            _check_style(turn)
        turns = [alternatives(add_image_sizes(turn, image_sizes), select) for turn in messages]
        last = len(turns) - 1
        # The hint measures the conversation's last response; of several, the first one drawn.
        ending = ""
        if last:
            ending = self._exchange(turns[last][0], self.rng(keyed(base, last, 0, 0) >> 32))[1]
        return tuple(
            self._variants(
                own, keyed(base, t), first=t == 0, last=t == last, system=system, ending=ending
            )
            for t, own in enumerate(turns)
        )

    def _variants(
        self,
        messages: Sequence[Message],
        base: int,
        *,
        first: bool,
        last: bool,
        system: str,
        ending: str,
    ) -> tuple[Variant, ...]:
        drawn = []
        for a, message in enumerate(messages):
            for v in range(self.policy.num_variants):
                rng = self.rng(keyed(base, a, v) >> 32)
                user, response = self._exchange(message, rng)
                if first and system and self.frame.folds_system:
                    user = "\n\n".join(filter(None, (system, user)))
                if self.policy.paraphrase and rng.random_sample() < self.policy.paraphrase:
                    user = paraphrase(user, rng, keep=fixed_texts(message))
                if first:
                    prefix = self.system_prefix(message["style"], ending or response, rng)
                    user = " ".join(part for part in (prefix, user) if part)
                prompt, response = self.frame.frame(
                    user, response, first=first, last=last, system=system
                )
                drawn.append(Variant(prompt=prompt, response=response))
        num_variants = self.policy.num_variants
        if all(drawn[i] == drawn[i - i % num_variants] for i in range(len(drawn))):
            drawn = drawn[::num_variants]
        return tuple(drawn)

    def _exchange(self, message: Message, rng: np.random.RandomState) -> Exchange:
        draw = self._draw(message, rng)
        return draw.style.draw(message, draw)

    def _draw(self, message: Message, rng: np.random.RandomState) -> Draw:
        return Draw(style=STYLES[message["style"]], policy=self.policy, rng=rng)


def _check_style(message: Message) -> None:
    style = message.get("style")
    if not isinstance(style, str) or style not in STYLES:
        raise SampleError(
            "message_style", style=style, hint=nearest(str(style), STYLES), fields=sorted(message)
        )
