"""PixMo-Point-Explanations: answers that point at what they speak of.

Public schema (card of allenai/pixmo-point-explanations): image_url str, image_sha256 str, question
str, response str (with the points written out), parsed_response str (each point replaced by
<|POINT|>; null where parsing failed), and per placeholder alt_text list[str], inline_text list[str]
and points list[list[{x, y}]], in percent of the width and height. Rows repeat an image. Rows
without a parsed response are left out, as Molmo does it; it also splits the questions of an image
into two examples, here they stay together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from preprocess.datasets.base import (
    HfDataset,
    SceneImage,
    image_facts,
    required,
    row_image,
    xy_pairs,
)
from preprocess.synthetic import POINT_MARK, percent_points, pointed_answers, row_rng, scene_plan
from shardspec.errors import SampleError


class PixMoPointExplanations(HfDataset):
    """PixMo-Point-Explanations: a message per question, all of an image together."""

    name: ClassVar[str] = "pixmo_point_explanations"
    PATH: ClassVar[str] = "allenai/pixmo-point-explanations"
    COLUMNS: ClassVar[tuple[str, ...]] = (
        "image|image_url",
        "question",
        "parsed_response",
        "alt_text",
        "inline_text",
        "points",
    )
    validation_share: ClassVar[float] = 1024 / 29_000
    """Molmo keeps 1,024 of the 29 thousand images that its paper counts (arXiv 2409.17146)."""
    grouped: ClassVar[bool] = True
    leaves_out: ClassVar[frozenset[str]] = frozenset({"no_parsed_response"})
    sample_rows_per_example: ClassVar[int] = 2

    def to_example(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Turns a row into an example."""
        answer = required(row["parsed_response"], reason="no_parsed_response")
        lists = [row[name] or () for name in ("points", "inline_text", "alt_text")]
        counts = {len(values) for values in lists}
        if counts != {answer.count(POINT_MARK)}:
            raise SampleError(
                "point_number", placeholders=answer.count(POINT_MARK), got=sorted(counts)
            )
        message = {
            "style": "point_qa",
            "question": required(row["question"], reason="no_question"),
            "answer": answer,
            "answer_annotations": [
                {"points": xy_pairs(points), "inline_text": inline, "alt_text": alt}
                for points, inline, alt in zip(*lists, strict=True)
            ],
            "point_scale": 100,
        }
        return {
            "image": row_image(row, base=self.rows.base),
            "message_list": [message],
            "metadata": image_facts(row),
        }

    def sample_row(self, seed: int, idx: int) -> dict[str, Any]:
        """Generates a row about a drawn scene; one scene in eight has a row without a parse."""
        scene_idx, turn = divmod(idx, self.sample_rows_per_example)
        plan = scene_plan(seed, scene_idx)
        rng = row_rng(seed, scene_idx)
        answers = pointed_answers(plan)
        chosen = answers[rng.permutation(len(answers))[turn]]
        points = [percent_points(plan, phrase.objects) for phrase in chosen.phrases]
        texts = [phrase.label for phrase in chosen.phrases]
        response = chosen.answer
        for group, text in zip(points, texts, strict=True):
            response = response.replace(POINT_MARK, _tag(group, text), 1)
        unparsed = turn == 1 and rng.randint(8) == 0
        return {
            "image": SceneImage(seed=seed, idx=scene_idx),
            "image_url": f"scene://{seed}/{scene_idx}",
            "image_sha256": "",
            "question": chosen.question,
            "response": response,
            "parsed_response": None if unparsed else chosen.answer,
            "alt_text": None if unparsed else texts,
            "inline_text": None if unparsed else texts,
            "points": None if unparsed else points,
        }


def _tag(points: list[dict[str, float]], text: str) -> str:
    """Writes points as the source's `response` does: percent with one decimal."""
    numbers = [""] if len(points) == 1 else [str(i) for i in range(1, len(points) + 1)]
    coordinates = [
        f'x{n}="{point["x"]:.1f}" y{n}="{point["y"]:.1f}"'
        for n, point in zip(numbers, points, strict=True)
    ]
    name = "point" if len(points) == 1 else "points"
    return f'<{name} {" ".join(coordinates)} alt="{text}">{text}</{name}>'


DATASET = PixMoPointExplanations
