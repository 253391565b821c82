"""VQA v2: short questions about COCO pictures, ten answers to each, all of a picture together.

Rows are laid out as Molmo's builder lays them out: image (path or embedded), image_id int64,
messages[{question, answers: list[str] (ten), style, question_id}]. Molmo 2's copy on the hub calls
the list `message_list` and gives paths into a folder of COCO pictures; such a folder is used with
SOURCE=. Both names of the list are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from preprocess.datasets.base import HfDataset, SceneImage, as_records, required, row_image
from preprocess.synthetic import row_rng, scene_plan, scene_questions

NUM_ANSWERS = 10
"""People who answered each question (VQA v2)."""


class Vqa2(HfDataset):
    """VQA v2: a message per question; which of tied answers is trained is drawn in each epoch."""

    name: ClassVar[str] = "vqa2"
    PATH: ClassVar[str] = "allenai/molmo2-vqa2-2014"
    COLUMNS: ClassVar[tuple[str, ...]] = ("image", "messages|message_list")

    def to_example(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Turns a row into an example."""
        messages = [
            {
                "style": "vqa2",
                "question": record["question"],
                "answers": list(record["answers"]),
                "question_id": record.get("question_id"),
            }
            for record in as_records(row.get("messages") or row.get("message_list"))
            if record.get("answers")
        ]
        return {
            "image": row_image(row, base=self.rows.base),
            "message_list": required(messages, reason="no_answers.row"),
            "metadata": {"image_id": row.get("image_id")},
        }

    def sample_row(self, seed: int, idx: int) -> dict[str, Any]:
        """Generates a row: five to twelve questions about a drawn scene."""
        rng = row_rng(seed, idx)
        questions = scene_questions(scene_plan(seed, idx))
        messages: list[dict[str, Any]] = []
        for i in rng.permutation(len(questions))[: rng.randint(5, 13)]:
            question = questions[i]
            agreeing = int(rng.randint(NUM_ANSWERS // 2, NUM_ANSWERS + 1))
            others = [question.also[0] if question.also else question.answer]
            answers = [question.answer] * agreeing + others * (NUM_ANSWERS - agreeing)
            messages.append(
                {
                    "question": question.question,
                    "answers": [answers[k] for k in rng.permutation(NUM_ANSWERS)],
                    "style": "vqa2",
                    "question_id": 1000 * idx + len(messages),
                }
            )
        return {"image": SceneImage(seed=seed, idx=idx), "image_id": idx, "messages": messages}


DATASET = Vqa2
