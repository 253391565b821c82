"""PixMo-Count: web images with the number of one kind of object, and in "train" where they are.

Public schema (card of allenai/pixmo-count): image_url str, image_sha256 str, count int32,
points {x: list[float32], y: list[float32]}, label str; splits train, validation and test. Points
are pixels of the image, unlike those of PixMo-Points.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from preprocess.datasets.base import (
    HfDataset,
    SceneImage,
    image_facts,
    required,
    row_image,
    xy_pairs,
)
from preprocess.synthetic import row_rng, scene_plan, scene_targets


class PixMoCount(HfDataset):
    """PixMo-Count in one of three modes.

    point_count: points and the number. pointing: points only. count: the number only;
    the only mode for the splits without points.
    """

    name: ClassVar[str] = "pixmo_count"
    PATH: ClassVar[str] = "allenai/pixmo-count"
    COLUMNS: ClassVar[tuple[str, ...]] = ("image|image_url", "count", "label")
    modes: ClassVar[tuple[str, ...]] = ("point_count", "pointing", "count")

    def to_example(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Turns a row into an example."""
        label = required((row["label"] or "").strip(), reason="no_label")
        message: dict[str, Any] = {"style": self.mode, "label": label}
        if self.mode == "count":
            message["count"] = int(row["count"])
        else:
            points = xy_pairs(row.get("points"))
            message["points"] = required(points, reason="no_points") if row["count"] else []
            message["clip_points"] = True
        return {
            "image": row_image(row, base=self.rows.base),
            "message_list": [message],
            "metadata": {**image_facts(row), "count": int(row["count"])},
        }

    def sample_row(self, seed: int, idx: int) -> dict[str, Any]:
        """Generates a row: something in a drawn scene, the more of it the likelier."""
        plan = scene_plan(seed, idx)
        present, _ = scene_targets(plan)
        weights = np.array([len(target.objects) for target in present])
        target = present[row_rng(seed, idx).choice(len(present), p=weights / weights.sum())]
        centers = [thing.center_px for thing in target.objects]
        return {
            "image": SceneImage(seed=seed, idx=idx),
            "image_url": f"scene://{seed}/{idx}",
            "image_sha256": "",
            "count": len(centers),
            "points": {"x": [float(x) for x, _ in centers], "y": [float(y) for _, y in centers]},
            "label": target.label,
        }


DATASET = PixMoCount
