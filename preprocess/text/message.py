"""A message of a dataset: reading its fields, its turns and its equally likely responses.

A message is a mapping with a `style`; which other fields it needs is up to the style. A field that
is missing or of another type is a SampleError that names the style, the field and what was wanted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from preprocess.text.policy import SelectAnswer
from shardspec.errors import SampleError

Message = Mapping[str, Any]

ImageSize = tuple[int, int]
"""Width and height of an upright original, in pixels."""


def require_field(message: Message, name: str) -> Any:
    """Gives a field of any type.

    Raises:
      SampleError: `message_fields` (missing or null).
    """
    if message.get(name) is None:
        raise field_error(message, name, "a value")
    return message[name]


def require_text(message: Message, name: str) -> str:
    """Gives a text without the space around it.

    Raises:
      SampleError: `message_fields` (missing, not a string, or blank).
    """
    text = message.get(name)
    if not isinstance(text, str) or not text.strip():
        raise field_error(message, name, "a text")
    return text.strip()


def optional_text(message: Message, name: str) -> str:
    """Gives a text as it is, or "" where there is none but space.

    Raises:
      SampleError: `message_fields` (not a string).
    """
    text = message.get(name) or ""
    if not isinstance(text, str):
        raise field_error(message, name, "a text")
    return text if text.strip() else ""


def require_texts(message: Message, name: str, *, blank: bool = False) -> list[str]:
    """Gives a list of at least one text, each without the space around it.

    Args:
      message: The message.
      name: The field.
      blank: Whether a text may be empty.

    Raises:
      SampleError: `message_fields` (missing, empty, or with other values than texts).
    """
    texts = message.get(name)
    if not isinstance(texts, list | tuple) or not texts:
        raise field_error(message, name, "a list of texts")
    if not all(isinstance(text, str) and (blank or text.strip()) for text in texts):
        raise field_error(message, name, "a list of texts")
    return [text.strip() for text in texts]


def field_error(message: Message, name: str, want: str) -> SampleError:
    """Makes the error of a field that does not hold what its style needs."""
    style = message.get("style", "of an annotation")
    return SampleError(
        "message_fields.field",
        style=style,
        name=name,
        field=name,
        want=want,
        fields=sorted(message),
    )


def split_turns(message: Message) -> list[Message]:
    """Splits a message into its exchanges, each a complete message.

    Args:
      message: With `messages` (question, answer, ...) or `multi_turn_messages`, or of one turn.

    Raises:
      SampleError: `message_fields`.
    """
    shared = {
        name: value
        for name, value in message.items()
        if name not in ("messages", "multi_turn_messages", "system", "unanswered", *_PER_TURN)
    }
    turns: list[Message] = [message]
    if "messages" in message:
        texts = message["messages"]
        if not isinstance(texts, Sequence) or not texts or len(texts) % 2:
            raise field_error(message, "messages", "[question, answer, ...]")
        pairs = zip(texts[::2], texts[1::2], strict=True)
        turns = [{**shared, "question": question, "answer": answer} for question, answer in pairs]
        for name, single in _PER_TURN.items():
            values = message.get(name)
            if values is None:
                continue
            if not isinstance(values, Sequence) or isinstance(values, str):
                raise field_error(message, name, "a list with a value for each answer")
            if len(values) != len(turns):
                raise field_error(message, name, "a value for each answer")
            turns = [{**turn, single: v} for turn, v in zip(turns, values, strict=True)]
    elif "multi_turn_messages" in message:
        style = {"style": message["style"]} if "style" in message else {}
        turns = [{**style, **turn} for turn in message["multi_turn_messages"]]
        if not turns:
            raise field_error(message, "multi_turn_messages", "at least one message")
    return turns


_PER_TURN = {"turn_weights": "turn_weight", "reasoning": "reasoning"}
"""Fields of a message with `messages` that have a value per answer, and their name in a turn."""


def turn_shares(turns: Sequence[Message]) -> tuple[float, ...]:
    """Lists the factors on the loss of the exchanges of a conversation; () where all are 1.

    Args:
      turns: The exchanges, as `split_turns` gives them; each may have a `turn_weight`.

    Raises:
      SampleError: `message_fields`; `no_loss` (nothing is left to learn).
    """
    found = [loss_weight(turn, "turn_weight") for turn in turns]
    if not any(found):
        raise SampleError("no_loss.turns", turns=len(found))
    return () if all(value == 1.0 for value in found) else tuple(found)


def loss_weight(message: Message, name: str) -> float:
    """Gives a factor on the loss, 1 where there is none.

    Raises:
      SampleError: `message_fields` (not a number from 0 to 40).
    """
    value = message.get(name, 1.0)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= _MAX_WEIGHT:
        raise field_error(message, name, f"a number from 0 to {_MAX_WEIGHT}")
    return float(value)


_MAX_WEIGHT = 40
"""Of a message and of a turn: their product is stored in millionths, as a 32-bit integer."""


def add_image_sizes(message: Message, image_sizes: Sequence[ImageSize]) -> Message:
    """Adds the sizes of the images to a message with points or boxes, which may be in pixels."""
    if not image_sizes or not ("points" in message or "boxes" in message):
        return message
    return {**message, "image_sizes": image_sizes}


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoFacts:
    """What texts with times need to know of their video."""

    frame_times_s: Sequence[float]
    """When the stored frames are shown, in seconds from the beginning of the clip."""
    clip: tuple[float | None, float | None] | None
    """Start and end of the clip, in seconds of the video."""
    size: tuple[int, int]
    """Width and height of an upright frame, in pixels."""


def has_times(message: Message) -> bool:
    """Returns True if a text of a message, or of one of its turns, names frames of a video."""
    return any(map(_has_times, split_turns(message)))


def _has_times(turn: Message) -> bool:
    return "timestamps" in turn or "frame_trajectories" in turn


def add_video_facts(message: Message, videos: Sequence[VideoFacts]) -> Message:
    """Adds the facts of the first video to a message with times."""
    if not videos or not _has_times(message):
        return message
    return {**message, "video_facts": videos[0]}


UNANSWERED = "?"
"""Formatted in the place of an answer that a question does not have; no token of it is stored."""


def with_answer(message: Message) -> Message:
    """Gives a message with an answer in the place of one that it does not have.

    Raises:
      SampleError: `message_fields`: it has several exchanges, and `messages` is not a list.
    """
    if not message.get("unanswered"):
        return message
    if "messages" in message:
        return {**message, "messages": [*message["messages"][:-1], UNANSWERED]}
    return {**message, **({"answer_idx": 0} if "options" in message else {"answer": UNANSWERED})}


def alternatives(message: Message, select: SelectAnswer) -> list[Message]:
    """Lists the message once for each of its equally likely responses.

    Args:
      message: With `alternatives` (texts), `answers` (votes), or a single response.
      select: Which of several answers may be drawn.

    Raises:
      SampleError: `message_fields`.
    """
    for several, single in (("alternatives", "text"), ("answers", "answer")):
        if several in message:
            texts = require_texts(message, several, blank=several == "answers")
            if several == "alternatives":
                texts = list(message[several])  # whole texts: space is the policy's
            else:
                # One empty vote of ten is no reason to lose the row.
                votes = [text for text in texts if text]
                if not votes:
                    raise field_error(message, several, "a list of texts")
                texts = _SELECT[select](votes)
            rest = {name: value for name, value in message.items() if name != several}
            return [{**rest, single: text} for text in texts]
    return [message]


def fixed_texts(message: Message) -> list[str]:
    """Lists the texts that must read the same in the question and in the answer."""
    named = [message.get("label"), message.get("label_cased")]
    options = [*(message.get("options") or ()), *(message.get("unlabelled_options") or ())]
    # Without a label, the question itself is the text between the tags.
    asked = [message.get("question")] if "points" in message or "boxes" in message else []
    several = message.get("label") if "boxes" in message else ()
    named += several if isinstance(several, list | tuple) else ()
    texts = [*named, *options, *asked]
    return [text.strip() for text in texts if isinstance(text, str) and text.strip()]


def message_texts(example: Mapping[str, Any]) -> list[str]:
    """Lists every text of an example's messages, whatever their fields."""
    return [text for name, text in _strings(example["message_list"]) if name != "style"]


def chat_names(example: Mapping[str, Any]) -> list[str]:
    """Lists what only `chats` has: names and numbers of tool calls and of their results."""
    names = ("id", "name", "tool_call_id")
    return [text for name, text in _strings(example.get("chats")) if name in names]


def answer_flags(example: Mapping[str, Any]) -> list[bool]:
    """Says of each of the `message_texts` whether it is the assistant's."""
    return [name in _ANSWERS for name, _ in _strings(example["message_list"]) if name != "style"]


_ANSWERS = ("answer", "answers", "text", "alternatives", "explanation", "reasoning")


def message_styles(example: Mapping[str, Any]) -> list[str]:
    """Lists the styles of an example's messages and turns."""
    return [text for name, text in _strings(example["message_list"]) if name == "style"]


def _most_common(answers: Sequence[str]) -> list[str]:
    """The answers that most people gave, in the order in which they came up."""
    counts = Counter(answers)
    most = max(counts.values())
    return [answer for answer, count in counts.items() if count == most]


_SELECT: Mapping[SelectAnswer, Callable[[Sequence[str]], list[str]]] = {
    "best": _most_common,
    "first": lambda answers: [min(answers)],
}


def _strings(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Walks nested JSON; gives each text with the name of the field that it is in."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        for inner, part in value.items():
            yield from _strings(part, inner)
    elif isinstance(value, Sequence) and name == "messages":
        for i, part in enumerate(value):
            yield from _strings(part, "answer" if i % 2 else "question")
    elif isinstance(value, Sequence):
        for part in value:
            yield from _strings(part, name)
