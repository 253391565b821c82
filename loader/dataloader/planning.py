"""Lengths and packs: what the rows of steps are planned from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from loader.assembly import View
from loader.order import MixtureOrder, Order, PackSchedule, plan_packing
from loader.stream import PreparedBuilder

Lengths = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(dataset [n], sample [n]) to (tokens [n], crops [n]), the most that a sample can take."""


def patches_per_crop(view: View) -> int:
    """Gives the cost of a crop, where a token costs 1."""
    # A crop of a view for a model is a token of a picture.
    return 1 if view.model is not None else view.image.num_patches


def packs_of(
    order: Order | MixtureOrder,
    *,
    lengths: Lengths,
    sequence_length: int,
    max_crops: int | None,
    patches_per_crop: int,
    balance: bool,
) -> PackSchedule:
    """Makes the packs of an order."""
    limits = plan_packing(order, sequence_length=sequence_length, max_crops=max_crops)
    return PackSchedule(order, lengths, limits, patches_per_crop=patches_per_crop, balance=balance)


def sample_lengths(
    builders: Sequence[PreparedBuilder], dataset: np.ndarray, sample: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Looks up how long samples are at most, by their numbers in the order, in the indexes."""
    tokens, crops = np.zeros(len(sample), np.int64), np.zeros(len(sample), np.int64)
    for number in np.unique(dataset).tolist():
        own = np.flatnonzero(dataset == number)
        builder = builders[number]
        tokens[own], crops[own] = builder.lengths(builder.data.sample_ids(sample[own]))
    return tokens, crops
