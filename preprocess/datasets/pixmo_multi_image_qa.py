"""Multi-image questions: two to five web images and questions about all of them.

Schema as Molmo 2 reads it (allenai/Molmo2-MultiImageQA): image_urls list[str], qa_pairs of question
str and answer str. Whether the pairs are stored as a list of records or as a record of lists does
not matter. The style is Molmo 2's, correction_qa.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from preprocess.datasets.base import HfDataset, SceneImage, as_records, required, row_images
from preprocess.synthetic import compared_scenes, row_rng, scene_plan

NUM_IMAGES = (2, 5)
"""Least and most images of an example (Molmo 2)."""


class PixMoMultiImageQa(HfDataset):
    """Multi-image questions: a message per question, over the same images."""

    name: ClassVar[str] = "pixmo_multi_image_qa"
    PATH: ClassVar[str] = "allenai/Molmo2-MultiImageQA"
    COLUMNS: ClassVar[tuple[str, ...]] = ("images|image_urls", "qa_pairs")
    several_images: ClassVar[bool] = True

    def to_example(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Turns a row into an example."""
        messages = [
            {"style": "correction_qa", "question": pair["question"], "answer": pair["answer"]}
            for pair in as_records(row["qa_pairs"])
            if pair["question"] and pair["answer"]
        ]
        return {
            "image": row_images(row, base=self.rows.base),
            "message_list": required(messages, reason="no_answers.row"),
            "metadata": {"image_urls": list(row.get("image_urls") or ())},
        }

    def sample_row(self, seed: int, idx: int) -> dict[str, Any]:
        """Generates a row: questions that compare drawn scenes."""
        rng = row_rng(seed, idx)
        least, most = NUM_IMAGES
        scenes = [most * idx + i for i in range(rng.randint(least, most + 1))]
        pairs = compared_scenes([scene_plan(seed, scene) for scene in scenes])
        chosen = [pairs[i] for i in rng.permutation(len(pairs))[:3]]
        return {
            "images": [SceneImage(seed=seed, idx=scene) for scene in scenes],
            "image_urls": [f"scene://{seed}/{scene}" for scene in scenes],
            "qa_pairs": [{"question": question, "answer": answer} for question, answer in chosen],
        }


DATASET = PixMoMultiImageQa
