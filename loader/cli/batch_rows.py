"""The rows of a batch as they are shown: tokens, targets, samples, and the model's pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardspec.families import (
    Family,
    PicturePlan,
    Qwen2VL,
    StoredModel,
    plan_pictures,
    plan_videos,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a batch."""

    key: str
    parts: Sequence[Mapping[str, Any]]
    """Metadata of each sample in it."""
    ids: np.ndarray
    """int64 [L], with padding; so are the others."""
    learned: np.ndarray
    """bool [L]: the token is a target."""
    num_targets: int
    """With those that are no position's token: the ends of conversations."""
    real: np.ndarray
    """bool [L]: no padding."""
    segments: np.ndarray
    starts: Sequence[int]
    """Where its samples begin."""
    pictures: Sequence[tuple[str, np.ndarray]]
    """Name and pixels of what the model gets: uint8 [H, W, 3]."""

    @property
    def used(self) -> int:
        """Positions that are not padding."""
        return int(self.real.sum())

    @property
    def borders(self) -> list[int]:
        """Where its samples begin, and where the last one ends."""
        (real,) = np.nonzero(self.real)
        return [*self.starts, int(real[-1]) + 1] if len(real) else [0]


def read_rows(batch: Mapping[str, Any], model: StoredModel | None) -> list[Row]:
    """Takes a batch apart.

    Args:
      batch: As `MMCollator` or, with a model, `ModelCollator` makes it, with `metadata` and
        `subsegment_ids`, and `position_ids` without a model.
      model: That the dataset was built for.
    """
    rows = []
    first_units = {"pixel_values": 0, "pixel_values_videos": 0}
    for i, metadata in enumerate(batch["metadata"]):
        parts = metadata.get("examples", [metadata])
        ids, labels = batch["input_ids"][i].numpy(), batch["labels"][i].numpy()
        segments = batch["subsegment_ids"][i].numpy()
        real = segments >= 0
        if model is None:
            # Positions begin with 0 in each sample, and nowhere else.
            begins = real & (batch["position_ids"][i].numpy() == 0)
            # A branch's last target is its EOS, which is not the next token of the row; the BOS of
            # the next sample may be the same token.
            learned = np.zeros(len(ids), bool)
            learned[1:] = (labels[:-1] == ids[1:]) & ~begins[1:]
            crops = batch["images"][i].numpy() if "images" in batch else ()
            pixels = [np.ascontiguousarray(crop.transpose(1, 2, 0)) for crop in crops]
            counts = [image["crops"] for part in parts for image in part["images"]]
        else:
            learned = labels == ids
            begins = real & (np.diff(segments, prepend=-1) != 0)
            plans = [plan for part in parts for plan in _plans(model.family, part["images"])]
            pixels, counts = [], []
            for plan in plans:
                name = "pixel_values_videos" if plan.num_frames else "pixel_values"
                if name not in batch:  # features
                    counts.append(0)
                    continue
                values, first_unit = batch[name], first_units[name]
                # Idefics3 has all rows in one: [1, N, 3, S, S].
                values = values[0] if values.ndim == 5 and len(values) == 1 else values
                units = values[first_unit : first_unit + plan.num_units].numpy()
                first_units[name] += plan.num_units
                pixels += (own := model_pictures(model.family, plan, units))
                counts.append(len(own))
        rows.append(
            Row(
                key=str(metadata["key"]),
                parts=parts,
                ids=ids,
                learned=learned,
                num_targets=int((labels != -100).sum()),
                real=real,
                segments=segments,
                starts=np.flatnonzero(begins).tolist(),
                pictures=list(zip(_names(parts, counts, model), pixels, strict=False)),
            )
        )
    return rows


def _plans(family: Family, images: Sequence[Mapping[str, Any]]) -> list[PicturePlan]:
    """Plans the pictures and videos of a sample by their metadata."""
    sizes = [(image["height"], image["width"]) for image in images]
    pictures = iter(
        plan_pictures(family, [s for s, i in zip(sizes, images, strict=True) if "frames" not in i])
    )
    return [
        plan_videos(family, [size], [(0, image["frames"])])[0]
        if "frames" in image
        else next(pictures)
        for size, image in zip(sizes, images, strict=True)
    ]


def _names(
    parts: Sequence[Mapping[str, Any]], counts: Sequence[int], model: StoredModel | None
) -> list[str]:
    """Names each crop of a row.

    Args:
      parts: Metadata of each sample.
      counts: Crops of each picture, of all samples.
      model: For which there is no overview.
    """
    names, numbers = [], iter(counts)
    for s, part in enumerate(parts):
        for i, _ in enumerate(part["images"]):
            sample = f"sample {s + 1}, " if len(parts) > 1 else ""
            picture = f"picture {i + 1}, " if len(part["images"]) > 1 else ""
            number = next(numbers)
            crops = ["whole"]
            if number > 1:
                crops = [f"crop {crop}" for crop in range(number)]
                crops = ["overview", *crops[1:]] if model is None else crops
            names += [f"{sample}{picture}{crop}" for crop in crops]
    return names


def model_pictures(family: Family, plan: PicturePlan, units: np.ndarray) -> list[np.ndarray]:
    """Makes pictures of the rows of `pixel_values` that one picture has become.

    Args:
      family: Of the model.
      plan: Of the picture.
      units: float32 [plan.num_units, ...]: tiles [3, S, S], or patches.

    Returns:
      uint8 [H, W, 3] each, without the model's normalisation: the tiles, or all patches put
      together again; of a video the first frame of each patch along time.
    """
    if isinstance(family, Qwen2VL):
        (rows, cols), merge, side = plan.grid, family.merge, family.patch_px
        # Patches come by squares that become one token, each with all its frames.
        squares = (rows // merge, cols // merge, merge, merge)
        cells = units.reshape(plan.num_times, *squares, 3, -1, side, side)
        chw = cells[..., 0, :, :].transpose(0, 5, 1, 3, 6, 2, 4, 7)
        units = chw.reshape(plan.num_times, 3, rows * side, cols * side)
    elif units.ndim < 4 or units.shape[-3] != 3:
        return []  # of a form that is not known here
    units = units.reshape(-1, *units.shape[-3:])
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (family.mean, family.std))
    levels = np.rint((units * std + mean) * 255).clip(0, 255).astype(np.uint8)
    return [np.ascontiguousarray(each.transpose(1, 2, 0)) for each in levels]
