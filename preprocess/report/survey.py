"""The numbers of a split from its indexes, in one pass and bounded memory.

Histograms (`Counts`), the samples at the ends of the scales, and samples whose first images may be
the same. The memory does not grow with the dataset: of more than `_MOST_CLASSES` samples, possible
duplicates are looked for among those whose images' sizes hash below a threshold, which is halved
until they fit. All samples of a class of equal sizes have the same hash, so classes stay whole.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from preprocess.page import Counts
from shardspec.keyed import keyed, mix_array

NUM_WORST = 3

_MOST_CLASSES = 1 << 20
"""Samples among which duplicates are looked for: 16 MB."""

ASPECTS = (
    ("taller than 1:3", 1 / 3),
    ("1:3 to 1:2", 1 / 2),
    ("1:2 to 2:3", 2 / 3),
    ("2:3 to 4:5", 4 / 5),
    ("4:5 to 5:4, about square", 5 / 4),
    ("5:4 to 3:2", 3 / 2),
    ("3:2 to 2:1", 2.0),
    ("2:1 to 3:1", 3.0),
    ("wider than 3:1", np.inf),
)
"""Width to height of pictures: name, and the most of the class (exclusive)."""


@dataclass(slots=True, kw_only=True)
class Survey:
    """What the indexes of a split say."""

    num_samples: int = 0
    histograms: dict[str, Counts] = field(default_factory=dict)
    """By name of the column; `view_length` and `view_crops` with the number of the view."""
    aspects: np.ndarray = field(default_factory=lambda: np.zeros(len(ASPECTS), np.int64))
    extremes: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """By name of the scale: (value, number of the sample), the most extreme first."""
    classes: list[list[int]] = field(default_factory=list)
    """Numbers of samples whose first images have the same sizes in pixels and bytes."""
    classes_share: float = 1.0
    """Share of the samples among which `classes` were looked for."""


def survey(chunks: Iterable[tuple[int, np.ndarray]], *, same_images: bool = True) -> Survey:
    """Goes through the index rows of a split once.

    Args:
      chunks: (number of the first sample, its row and those after it).
      same_images: Whether to look for equal images: the bytes of uncompressed ones say nothing.
    """
    found = Survey()
    alike = _Alike()
    for first, rows in chunks:
        found.num_samples += len(rows)
        columns = _columns(rows)
        for name, values in columns.items():
            found.histograms.setdefault(name, Counts()).add(values)
        numbers = np.arange(first, first + len(rows))
        scales = {"bytes": rows["num_bytes"].astype(np.int64)}
        if "num_tokens" in columns:
            pictured = rows["num_images"] > 0
            width, height = (rows[name].astype(np.int64) for name in ("width", "height"))
            ratio = width[pictured] / np.maximum(1, height[pictured])
            limits = [limit for _, limit in ASPECTS]
            classes = np.searchsorted(limits, ratio, side="right")
            found.aspects += np.bincount(classes, minlength=len(ASPECTS))[: len(ASPECTS)]
            scales["pixels"] = width * height
            lengths = [values for name, values in columns.items() if name.startswith("length")]
            crops = [values for name, values in columns.items() if name.startswith("crops")]
            scales["length"] = np.max(lengths, axis=0) if lengths else columns["num_tokens"]
            if crops:
                scales["crops"] = np.max(crops, axis=0)
            scales["least loss"] = -columns["num_loss_tokens"]
            if same_images:
                alike.add(numbers[pictured], rows[pictured])
        for name, values in scales.items():
            _keep_most(found.extremes.setdefault(name, []), values, numbers)
    found.classes, found.classes_share = alike.classes(), alike.share
    return found


def _columns(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Picks the columns to count, as int64 by the names of their histograms."""
    names = rows.dtype.names or ()
    columns: dict[str, np.ndarray] = {
        name: rows[name].astype(np.int64)
        for name in ("num_bytes", "num_tokens", "num_loss_tokens", "num_images", "num_members")
        + ("num_branches", "num_turns")
        if name in names
    }
    if "width" in names:
        pictured = rows["num_images"] > 0
        for name in ("width", "height", "image_bytes"):
            columns[name] = rows[name][pictured].astype(np.int64)
    for name, short in (("view_length", "length"), ("view_crops", "crops")):
        if name in names:
            for view in range(rows[name].shape[1]):
                columns[f"{short} {view}"] = rows[name][:, view].astype(np.int64)
    return columns


def _keep_most(kept: list[tuple[int, int]], values: np.ndarray, numbers: np.ndarray) -> None:
    """Merges the largest values of a part into the largest so far; of equals, the first sample."""
    top = np.lexsort((numbers, -values))[:NUM_WORST]
    merged = [*kept, *((int(values[i]), int(numbers[i])) for i in top)]
    kept[:] = heapq.nsmallest(NUM_WORST, merged, key=lambda pair: (-pair[0], pair[1]))


class _Alike:
    """Samples by a hash of the sizes of their first image."""

    def __init__(self) -> None:
        self._hashes = np.zeros(0, np.uint64)
        self._numbers = np.zeros(0, np.int64)
        self._bits = 0

    @property
    def share(self) -> float:
        """Of all classes, those that are kept."""
        return 0.5**self._bits

    def add(self, numbers: np.ndarray, rows: np.ndarray) -> None:
        hashes = np.full(len(rows), keyed(0), np.uint64)
        for name in ("width", "height", "image_bytes"):
            hashes = mix_array(hashes ^ mix_array(rows[name].astype(np.uint64)))
        self._hashes = np.concatenate([self._hashes, hashes])
        self._numbers = np.concatenate([self._numbers, numbers])
        self._thin()
        while len(self._hashes) > _MOST_CLASSES and self._bits < 32:
            self._bits += 1
            self._thin()

    def _thin(self) -> None:
        if self._bits:
            kept = self._hashes < np.uint64(1 << (64 - self._bits))
            self._hashes, self._numbers = self._hashes[kept], self._numbers[kept]

    def classes(self) -> list[list[int]]:
        """Lists classes of several samples, the largest first, then by their first sample."""
        order = np.lexsort((self._numbers, self._hashes))
        hashes, numbers = self._hashes[order], self._numbers[order]
        borders = np.flatnonzero(hashes[1:] != hashes[:-1]) + 1
        groups = [part.tolist() for part in np.split(numbers, borders) if len(part) > 1]
        return sorted(groups, key=lambda group: (-len(group), group[0]))


def chosen(num_samples: int, count: int, *, seed: int) -> list[int]:
    """Chooses different samples by hash, in stored order: the same ones for the same dataset.

    >>> chosen(3, 5, seed=0), len(set(chosen(1000, 24, seed=0)))
    ([0, 1, 2], 24)
    """
    if count >= num_samples:
        return list(range(num_samples))
    found: dict[int, None] = {}
    turn = 0
    while len(found) < count:
        found.setdefault(keyed(seed, turn) % num_samples)
        turn += 1
    return sorted(found)
