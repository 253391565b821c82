"""Text-only conversations, for instruction tuning beside the images.

Public schema (card of allenai/tulu-3-sft-mixture): id str, messages list[{role, content}] with the
roles system, user and assistant, source str. Molmo 2 trains on a filtered relative of it
(allenai/molmo2-tulu4-classified) whose `messages` are the same; its filters by category and length
are not applied here. A system message is kept apart: it is a turn of a chat template, and goes in
front of the first user turn in Molmo's own formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from preprocess.datasets.base import HfDataset, as_records
from preprocess.synthetic import COLORS, SHAPES, listed, row_rng
from shardspec.errors import SampleError

Turns = list[tuple[str, str]]
"""(user, assistant) pairs."""


class TextSft(HfDataset):
    """Text-only conversations; a row is one conversation."""

    name: ClassVar[str] = "text_sft"
    PATH: ClassVar[str] = "allenai/tulu-3-sft-mixture"
    COLUMNS: ClassVar[tuple[str, ...]] = ("messages",)

    def to_example(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Turns a row into an example."""
        metadata = {name: row[name] for name in ("id", "source") if row.get(name)}
        system, texts = conversation(as_records(row["messages"]))
        message = {"style": "text_sft", "messages": texts, **({"system": system} if system else {})}
        return {"message_list": [message], "metadata": metadata}

    def sample_row(self, seed: int, idx: int) -> dict[str, Any]:
        """Generates a row: one to three small tasks with right answers."""
        rng = row_rng(seed, idx)
        tasks = (_sum, _product, _sorted_words, _capitals, _last_letter)
        messages = []
        if rng.randint(4) == 0:
            messages.append({"role": "system", "content": "You are brief and exact."})
        for i in rng.permutation(len(tasks))[: rng.randint(1, 4)]:
            for user, assistant in tasks[i](rng):
                messages.append({"role": "user", "content": user})
                messages.append({"role": "assistant", "content": assistant})
        return {"id": f"{seed}-{idx}", "messages": messages, "source": "sample"}


def conversation(messages: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """Gives a conversation's system text ("" for none), and the others, user and assistant in turn.

    Raises:
      SampleError: `conversation` (roles that do not alternate, or an empty turn).

    >>> conversation([{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}])
    ('', ['2 + 2?', '4'])
    """
    roles = [message["role"] for message in messages]
    texts = [message["content"] or "" for message in messages]
    system = ""
    if roles[:1] == ["system"]:
        system = texts[0] if texts[0].strip() else ""
        roles, texts = roles[1:], texts[1:]
    if (
        not texts
        or not all(text.strip() for text in texts)
        or roles != ["user", "assistant"] * (len(roles) // 2)
    ):
        raise SampleError(
            "conversation.order",
            roles=" ".join(map(str, roles)),
            empty=sum(not text.strip() for text in texts),
        )
    return system, texts


def _sum(rng: np.random.RandomState) -> Turns:
    a, b, c = (int(number) for number in rng.randint(2, 500, 3))
    return [
        (f"What is {a} + {b}?", f"{a} + {b} = {a + b}."),
        (f"And if you add {c} to that?", f"{a + b} + {c} = {a + b + c}."),
    ]


def _product(rng: np.random.RandomState) -> Turns:
    a, b = (int(number) for number in rng.randint(2, 20, 2))
    question = f"A box holds {a} rows of {b} eggs. How many eggs are in the box?"
    return [(question, f"{a} rows of {b} eggs are {a * b} eggs.")]


def _sorted_words(rng: np.random.RandomState) -> Turns:
    words = _words(rng, int(rng.randint(3, 7)))
    question = f"Put these words in alphabetical order: {', '.join(words)}."
    ordered = sorted(words)
    backwards = "Now the other way round, please."
    return [(question, ", ".join(ordered)), (backwards, ", ".join(reversed(ordered)))]


def _capitals(rng: np.random.RandomState) -> Turns:
    text = f"The box holds {listed(_words(rng, 3))}."
    return [(f"Rewrite this sentence in capital letters: {text}", text.upper())]


def _last_letter(rng: np.random.RandomState) -> Turns:
    word = _words(rng, 1)[0]
    return [(f'What is the last letter of "{word}"?', f'It is "{word[-1]}".')]


def _words(rng: np.random.RandomState, count: int) -> list[str]:
    words = [*COLORS, *SHAPES]
    return [words[i] for i in rng.permutation(len(words))[:count]]


DATASET = TextSft
