"""Moving shapes: generated clips with captions and questions, to try videos without downloads.

The dataset has no rows but generated ones: SOURCE=sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from preprocess.datasets.base import DatasetBase, SceneVideo
from preprocess.datasets.rows import Rows
from preprocess.synthetic import plan_clip
from shardspec.errors import SourceError


class MovingShapes(DatasetBase):
    """Generated clips. Modes: captions and questions, or one of them."""

    name: ClassVar[str] = "moving_shapes"
    modes: ClassVar[tuple[str, ...]] = ("captions_and_questions", "captions", "questions")
    videos: ClassVar[bool] = True
    several_images: ClassVar[bool] = True

    def load(self) -> Rows:
        """Refuses any source but SOURCE=sample.

        Raises:
          SourceError: `source_missing`.
        """
        raise SourceError("source_missing.generated", where=self.source, dataset=self.name)

    def to_example(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Turns a row into an example."""
        messages: list[dict[str, Any]] = []
        if "captions" in self.mode:
            question = "Describe this video."
            messages.append({"style": "long_caption", "question": question, "text": row["caption"]})
        if "questions" in self.mode:
            messages += [
                {"style": "vqa2", "question": pair["question"], "answer": pair["answer"]}
                for pair in row["qa_pairs"]
            ]
        return {
            "video": row["video"],
            "message_list": messages,
            "metadata": {"cut_times_s": row["cut_times_s"], "num_shapes": row["num_shapes"]},
        }

    def sample_row(self, seed: int, idx: int) -> dict[str, Any]:
        """Generates a row: a drawn clip, its caption, and questions about it."""
        plan = plan_clip(seed, idx)
        return {
            "video": SceneVideo(seed=seed, idx=idx),
            "caption": plan.caption,
            "qa_pairs": [{"question": q, "answer": a} for q, a in plan.questions()],
            "cut_times_s": [round(float(cut / plan.fps), 3) for cut in plan.cuts],
            "num_shapes": len(plan.shapes),
        }


DATASET = MovingShapes
