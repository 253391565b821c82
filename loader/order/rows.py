"""Rows: which samples make up one row of a batch.

What schedules give, and what they know of the samples: their lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import starmap
from typing import NamedTuple

import numpy as np

from loader.order.slots import Slots

Lengths = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(dataset [n], sample [n]) to (tokens [n], crops [n]), the most that a sample can take."""


class SampleRef(NamedTuple):
    """One sample in one epoch, as a part of a batch.

    A tuple: worker processes are sent each, and a dataclass takes far longer to pickle.
    """

    dataset: int
    """Number of the dataset in the mixture; 0 without a mixture."""
    epoch: int
    sample: int
    real: bool = True
    """False for padding, which has nothing to learn."""
    question: int = 0
    """In an evaluation, the number of the sample's question."""


Row = tuple[SampleRef, ...]
"""What is in one row of a batch: one sample, or a pack of them."""


def sample_refs(slots: Slots) -> list[SampleRef]:
    """Lists slots one by one, in plain integers."""
    columns = (slots.dataset, slots.epoch, slots.sample, slots.real)
    return list(starmap(SampleRef, zip(*(c.ravel().tolist() for c in columns), strict=True)))
