"""PixMo-CapQA: questions and answers about web images, written from their captions.

Public schema (card of allenai/pixmo-cap-qa): image_url str, question str, answer str. `question`
holds a whole conversation, its turns marked [USER] and [ASSISTANT], that ends with the user;
`answer` is the last turn. Rows repeat an image. (A later revision adds `messages`; it says the
same, and is not read.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from preprocess.datasets.base import HfDataset, SceneImage, image_facts, row_image
from preprocess.synthetic import row_rng, scene_plan, scene_questions
from shardspec.errors import SampleError

_MARK = re.compile(r"\[(USER|ASSISTANT)\]")


class PixMoCapQa(HfDataset):
    """PixMo-CapQA: a conversation of one or more exchanges per row."""

    name: ClassVar[str] = "pixmo_cap_qa"
    PATH: ClassVar[str] = "allenai/pixmo-cap-qa"
    COLUMNS: ClassVar[tuple[str, ...]] = ("image|image_url", "question", "answer")
    validation_share: ClassVar[float] = 2048 / 165_000
    """Molmo keeps 2,048 of the 165 thousand images that its paper counts (arXiv 2409.17146)."""
    grouped: ClassVar[bool] = True
    sample_rows_per_example: ClassVar[int] = 2

    def to_example(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Turns a row into an example."""
        turns = [*user_turns(row["question"] or ""), row["answer"] or ""]
        if not all(turn.strip() for turn in turns):
            raise SampleError("empty_answer.turn", turns=len(turns))
        return {
            "image": row_image(row, base=self.rows.base),
            "message_list": [{"style": "synthetic_qa", "messages": turns}],
            "metadata": image_facts(row),
        }

    def sample_row(self, seed: int, idx: int) -> dict[str, Any]:
        """Generates a row: one or two questions about a drawn scene."""
        scene_idx, turn = divmod(idx, self.sample_rows_per_example)
        questions = scene_questions(scene_plan(seed, scene_idx))
        rng = row_rng(seed, scene_idx)
        order, length = rng.permutation(len(questions)), int(rng.randint(1, 3))
        own = [questions[i] for i in order[2 * turn : 2 * turn + length]]
        marked = [f"[USER] {asked.question} [ASSISTANT] {asked.sentence} " for asked in own[:-1]]
        return {
            "image": SceneImage(seed=seed, idx=scene_idx),
            "image_url": f"scene://{seed}/{scene_idx}",
            "question": "".join([*marked, f"[USER] {own[-1].question}"]),
            "answer": own[-1].sentence,
        }


def user_turns(question: str) -> list[str]:
    """Splits a marked conversation into its turns, the user's first and last.

    A text without marks is one turn, as it is; the space beside a mark belongs to the mark.

    Raises:
      SampleError: `conversation` (turns that do not alternate from user to user).

    >>> user_turns("[USER] Hi! [ASSISTANT] Hello. [USER] What is this?")
    ['Hi!', 'Hello.', 'What is this?']
    """
    head, *marked = _MARK.split(question)
    speakers, turns = marked[::2], [turn.strip() for turn in marked[1::2]]
    if not marked:
        return [head]
    if speakers[-1] == "ASSISTANT" and not turns[-1]:  # the mark in front of the answer
        speakers, turns = speakers[:-1], turns[:-1]
    rounds = (len(turns) - 1) // 2
    if head.strip() or speakers != ["USER", "ASSISTANT"] * rounds + ["USER"]:
        raise SampleError("conversation.turns", speakers=" ".join(speakers))
    return turns


DATASET = PixMoCapQa
