"""PixMo-Points: labels of web images and the points of everything that they fit.

Public schema (card of allenai/pixmo-points): image_url str, image_sha256 str, points list[{x, y}]
float64, count int64, label str, collection_method "pointing" or "counting". The card says that
points are pixels; they are percentages of the width and height, and Molmo reads them so. Rows
repeat an image, one row per label; labels that fit nothing have no points.

Molmo leaves out the images of pixmo-points-eval; that list is not known here.
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
from preprocess.synthetic import percent_points, row_rng, scene_plan, scene_targets

_STYLES = {
    "pointing": ("pointing",),
    "point_count": ("point_count",),
    "both": ("point_count", "pointing"),
}
"""Per mode, what is made of a label. (Molmo 1 had the first two the wrong way round.)"""


class PixMoPoints(HfDataset):
    """PixMo-Points in one of three modes.

    pointing: points at everything that a label fits. point_count: points and the number.
    both: each label once in either way.
    """

    name: ClassVar[str] = "pixmo_points"
    PATH: ClassVar[str] = "allenai/pixmo-points"
    COLUMNS: ClassVar[tuple[str, ...]] = ("image|image_url", "points", "label")
    modes: ClassVar[tuple[str, ...]] = tuple(_STYLES)
    validation_share: ClassVar[float] = 2048 / 428_000
    """Molmo keeps 2,048 of the 428 thousand images that its paper counts (arXiv 2409.17146)."""
    grouped: ClassVar[bool] = True
    sample_rows_per_example: ClassVar[int] = 3

    def to_example(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Turns a row into an example."""
        message = {
            "label": required((row["label"] or "").strip(), reason="no_label"),
            "points": xy_pairs(row["points"]),
            "point_scale": 100,
            "clip_points": True,
        }
        return {
            "image": row_image(row, base=self.rows.base),
            "message_list": [{"style": style, **message} for style in _STYLES[self.mode]],
            "metadata": image_facts(row),
        }

    def sample_row(self, seed: int, idx: int) -> dict[str, Any]:
        """Generates a row: labels for things in a drawn scene, and now and then for what is not."""
        scene_idx, turn = divmod(idx, self.sample_rows_per_example)
        plan = scene_plan(seed, scene_idx)
        present, absent = scene_targets(plan)
        rng = row_rng(seed, scene_idx)
        shown = [present[i] for i in rng.permutation(len(present))][: 2 + rng.randint(2)]
        target = [*shown, *(absent[i] for i in rng.permutation(len(absent)))][turn]
        return {
            "image": SceneImage(seed=seed, idx=scene_idx),
            "image_url": f"scene://{seed}/{scene_idx}",
            "image_sha256": "",
            "points": percent_points(plan, target.objects),
            "count": len(target.objects),
            "label": target.label,
            "collection_method": "counting" if len(target.objects) > 2 else "pointing",
        }


DATASET = PixMoPoints
