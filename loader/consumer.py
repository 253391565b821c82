"""Who takes the samples of a dataset: what a DataLoader around it does, and what divides them.

A dataset inside a torch DataLoader is never told the DataLoader's batch size, nor that a library
around the DataLoader divides the samples between the ranks, which the dataset does itself. Both are
known only to the callers of its iterator, so they are looked up on the stack: once per pass, in the
DataLoader's worker processes too. Where nothing is recognised nothing is concluded.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

_FETCH = "torch.utils.data._utils.fetch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Divider:
    """An object that divides between ranks what it takes of a dataset."""

    name: str
    """Its class."""
    num_processes: int
    """Ranks that it divides between, > 1."""


def find_divider() -> Divider | None:
    """Finds what divides the samples between the ranks again; None where nothing does.

    Recognised are Accelerate's and transformers' IterableDatasetShard, which takes every
    num_processes-th batch of each rank's samples, and Accelerate's DataLoaderDispatcher, which
    deals the batches of rank 0 to all.
    """
    for frame in _callers():
        if frame.f_code.co_name not in ("__iter__", "set_epoch"):
            continue
        owner = frame.f_locals.get("self")
        kind = type(owner)  # Accelerate's loaders give another class as their __class__
        count: Any = None
        if kind.__name__ == "IterableDatasetShard":
            count = getattr(owner, "num_processes", None)
        elif kind.__name__ == "DataLoaderDispatcher":
            count = getattr(getattr(owner, "state", None), "num_processes", None)
        if isinstance(count, int) and count > 1:
            return Divider(name=f"{kind.__module__}.{kind.__name__}", num_processes=count)
    return None


def find_batch_size() -> int | None:
    """Finds the batch size of the torch DataLoader that takes the next sample.

    None where no DataLoader does, or one that makes no batches (`batch_size=None`).
    """
    for frame in _callers():
        if frame.f_code.co_name != "fetch" or frame.f_globals.get("__name__") != _FETCH:
            continue
        numbers = frame.f_locals.get("possibly_batched_index")
        return len(numbers) if isinstance(numbers, list | tuple) else None
    return None


def _callers() -> Iterator[FrameType]:
    frame = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back
