"""A-OKVQA: questions about COCO pictures that need some knowledge of the world.

Public schema (HuggingFaceM4/A-OKVQA): image, question_id str, question str, choices list[str],
correct_choice_idx int8, direct_answers str (a Python list of ten strings, written out; other copies
have a real list), difficult_direct_answer bool, rationales list[str]. The split "test" has no
answers.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any, ClassVar

from preprocess.datasets.base import HfDataset, SceneImage, required, row_image
from preprocess.synthetic import choose, row_rng, scene_plan, scene_questions
from shardspec.errors import SampleError

NUM_ANSWERS = 10
"""Direct answers per question (A-OKVQA)."""


class AOkVqa(HfDataset):
    """A-OKVQA in one of two modes.

    mc: choose among four options. da: answer freely; outside of "train", questions marked as too
    difficult for that are left out, as the benchmark does it.
    """

    name: ClassVar[str] = "a_okvqa"
    PATH: ClassVar[str] = "HuggingFaceM4/A-OKVQA"
    COLUMNS: ClassVar[tuple[str, ...]] = ("image", "question", "choices", "direct_answers")
    modes: ClassVar[tuple[str, ...]] = ("mc", "da")
    leaves_out: ClassVar[frozenset[str]] = frozenset({"difficult_direct_answer"})

    def to_example(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Turns a row into an example."""
        message: dict[str, Any] = {
            "style": f"a_okvqa_{self.mode}",
            "question": required(row["question"], reason="no_question"),
        }
        if self.mode == "mc":
            message["options"] = list(row["choices"])
            message["answer_idx"] = _answer_idx(row)
        else:
            if row.get("difficult_direct_answer") and self.split != "train":
                raise SampleError("difficult_direct_answer")
            message["answers"] = required(_direct_answers(row), reason="no_answers.row")
        return {
            "image": row_image(row, base=self.rows.base),
            "message_list": [message],
            "metadata": {"question_id": row.get("question_id")},
        }

    def sample_row(self, seed: int, idx: int) -> dict[str, Any]:
        """Generates a row: a question about a drawn scene that has four options."""
        rng = row_rng(seed, idx)
        fitting = [q for q in scene_questions(scene_plan(seed, idx)) if len(q.wrong) >= 3]
        question = fitting[rng.randint(len(fitting))]
        options, answer_idx = choose(question, rng)
        others = [question.also[0] if question.also else question.answer]
        return {
            "image": SceneImage(seed=seed, idx=idx),
            "question_id": f"{seed}-{idx}",
            "question": question.question,
            "choices": options,
            "correct_choice_idx": answer_idx,
            "direct_answers": str([question.answer] * (NUM_ANSWERS - 3) + others * 3),
            "difficult_direct_answer": False,
            "rationales": [question.sentence],
        }


def _answer_idx(row: Mapping[str, Any]) -> int:
    found = row.get("correct_choice_idx")
    if found is None or not 0 <= found < len(row["choices"]):
        raise SampleError(
            "no_answers.option", correct_choice_idx=found, choices=len(row["choices"])
        )
    return int(found)


def _direct_answers(row: Mapping[str, Any]) -> list[str]:
    answers = row["direct_answers"]
    if isinstance(answers, str):
        try:
            answers = ast.literal_eval(answers)
        except (SyntaxError, ValueError) as error:
            raise SampleError("no_answers.direct", got=answers[:80]) from error
    return [str(answer) for answer in answers or ()]


DATASET = AOkVqa
