"""PixMo-AskModelAnything: what people asked about web images, with answers that they approved.

Public schema (card of allenai/pixmo-ask-model-anything): image_url str, image_sha256 str,
question str, answer str. Rows repeat an image, one row per question.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from preprocess.datasets.base import HfDataset, SceneImage, image_facts, required, row_image
from preprocess.synthetic import row_rng, scene_plan, scene_questions


class PixMoAskModelAnything(HfDataset):
    """PixMo-AskModelAnything: a message per question, all of an image together."""

    name: ClassVar[str] = "pixmo_ask_model_anything"
    PATH: ClassVar[str] = "allenai/pixmo-ask-model-anything"
    COLUMNS: ClassVar[tuple[str, ...]] = ("image|image_url", "question", "answer")
    validation_share: ClassVar[float] = 2048 / 73_000
    """Molmo keeps 2,048 of the 73 thousand images that its paper counts (arXiv 2409.17146)."""
    grouped: ClassVar[bool] = True
    sample_rows_per_example: ClassVar[int] = 2

    def to_example(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Turns a row into an example."""
        message = {
            "style": "user_qa",
            # Molmo 2 strips the questions of this dataset, and only those.
            "question": required((row["question"] or "").strip(), reason="no_question"),
            "answer": required(row["answer"], reason="no_answer"),
        }
        return {
            "image": row_image(row, base=self.rows.base),
            "message_list": [message],
            "metadata": image_facts(row),
        }

    def sample_row(self, seed: int, idx: int) -> dict[str, Any]:
        """Generates a row: what a drawn scene shows, or a question about its shapes."""
        scene_idx, turn = divmod(idx, self.sample_rows_per_example)
        plan = scene_plan(seed, scene_idx)
        rng = row_rng(seed, scene_idx)
        questions = scene_questions(plan)
        asked = questions[rng.randint(len(questions))]
        described = ("Describe this picture for someone who cannot see it.", plan.caption)
        question, answer = described if turn == 0 else (asked.question, asked.sentence)
        return {
            "image": SceneImage(seed=seed, idx=scene_idx),
            "image_url": f"scene://{seed}/{scene_idx}",
            "image_sha256": "",
            "question": question,
            "answer": answer,
        }


DATASET = PixMoAskModelAnything
