"""Questions: the exchanges of a sample one by one, as an evaluation asks them.

An exchange is a prompt and a response of a conversation. One of weight 0 is context, and is not
asked. The others are numbered from 0 in stored order: those of the first conversation, then those
of the second. Of each the first stored variant is asked. A row of an evaluation has everything that
comes before the response in the sequence of its conversation alone: images, the exchanges before it
with their responses, and its prompt.

Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from loader.assembly.layout import BranchTurns, Turn
from shardspec.errors import ConfigError

Questions = Literal["all", "first"]
"""Which exchanges are asked: all, each after those before it in its conversation; or only the first
one of each conversation, in whose input no response is but those of weight 0 before it."""

_NOTHING = np.zeros(0, np.int32)


def question_of(branches: Sequence[BranchTurns], number: int, which: Questions) -> tuple[int, int]:
    """Finds the conversation of a question, and its place there.

    Raises:
      ConfigError: `question_number`: the sample has fewer.
    """
    asked = [[i for i, each in enumerate(one.turns) if each.weight != 0] for one in branches]
    return question_at(asked, number, which)


def question_at(asked: Sequence[Sequence[int]], number: int, which: Questions) -> tuple[int, int]:
    """Finds the same by the numbers of the exchanges that are asked, conversation by conversation.

    Raises:
      ConfigError: `question_number`: there are fewer.
    """
    most = None if which == "all" else 1
    found = [(b, turn) for b, turns in enumerate(asked) for turn in turns[:most]]
    if not 0 <= number < len(found):
        raise ConfigError("question_number.none", number=number, questions=len(found))
    return found[number]


def prompt_of(branch: BranchTurns, turn: int) -> BranchTurns:
    """Cuts a conversation in front of a response."""
    asked = Turn(branch.turns[turn].prompt, _NOTHING)
    return BranchTurns([*branch.turns[:turn], asked], branch.weight)


def question_record(record: Mapping[str, Any], *, branch: int, turn: int) -> dict[str, Any]:
    """Picks what a sample's record says of one question.

    Args:
      record: With `message_list` and `metadata`, as the job wrote it.
      branch, turn: The question's place.

    Returns:
      The fields of its message (question, answers, options, points, question_id ...) and, under
      names that the message has not, those of the sample's metadata.

    >>> message = {"style": "demo", "messages": ["q", "a", "r", "b"]}
    >>> record = {"metadata": {"id": 7}, "message_list": [message]}
    >>> question_record(record, branch=0, turn=1)
    {'id': 7, 'style': 'demo', 'question': 'r', 'answer': 'b'}
    """
    messages = record.get("message_list") or ()
    message = messages[branch] if branch < len(messages) else {}
    fields = {k: v for k, v in message.items() if k not in ("messages", "multi_turn_messages")}
    if "messages" in message:
        question, answer = message["messages"][2 * turn : 2 * turn + 2]
        fields |= {"question": question, "answer": answer}
        if fields.get("unanswered") and 2 * turn + 2 == len(message["messages"]):
            del fields["answer"]
        else:
            fields.pop("unanswered", None)
        fields.pop("turn_weights", None)  # a number per answer, which only training wants
        if isinstance(fields.get("reasoning"), list):
            fields["reasoning"] = fields["reasoning"][turn]
    elif "multi_turn_messages" in message:
        style = {"style": message["style"]} if "style" in message else {}
        fields = {**style, **message["multi_turn_messages"][turn]}
    return {**(record.get("metadata") or {}), **fields}


def window_record(record: Mapping[str, Any], window: int) -> dict[str, Any]:
    """Picks what the record of a sample with windows says of one of them.

    Args:
      record: As the job wrote it. `metadata["windows"]` has `each`, a list of a value per window by
        name, and `runs`, lists by name of which a window has the `rows` values from its number in
        `first` on.
      window: The window's number.

    Returns:
      The record that the window would have as a sample of its own.

    >>> windows = {"each": {"t": [4, 6]}, "runs": {"x": [7, 8, 9, 9]}, "first": [0, 2], "rows": 2}
    >>> record = {"message_list": ["a", "b"], "metadata": {"id": 5, "windows": windows}}
    >>> window_record(record, 1)
    {'message_list': ['b'], 'metadata': {'id': 5, 't': 6, 'x': [9, 9]}}
    """
    metadata = dict(record["metadata"])
    windows = metadata.pop("windows", {})
    metadata |= {name: values[window] for name, values in windows.get("each", {}).items()}
    if "runs" in windows:
        first = windows["first"][window]
        stop = first + windows["rows"]
        metadata |= {name: values[first:stop] for name, values in windows["runs"].items()}
    return {**record, "message_list": [record["message_list"][window]], "metadata": metadata}


def sample_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Gives what a record says of its whole sample: its metadata, and its `message_list`."""
    metadata = record.get("metadata") or {}
    return {**metadata, "message_list": record.get("message_list") or []}
