"""Slots: positions of global batches, and what is in them.

A slot is position p of the global batch of optimizer step t. A rank takes consecutive positions; a
pass over the data begins at a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shardspec.errors import ConfigError, StateError


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """What stands in some slots; all arrays have the shape that was asked for."""

    dataset: np.ndarray
    """int64, number of the dataset in the mixture; 0 without a mixture."""
    epoch: np.ndarray
    """int64, epoch of the sample, from 0."""
    sample: np.ndarray
    """int64, sample id in its dataset, 0 to N - 1."""
    real: np.ndarray
    """bool, False in the padding of tail "pad": the slot counts with weight 0."""


class Passes(Protocol):
    """What knows where passes over the data begin."""

    def epoch_start(self, epoch: int) -> int:
        """Returns the step at which a pass begins: 0 for epoch 0, never less for later ones."""


def epoch_of(passes: Passes, step: int) -> int:
    """Finds the pass that a step belongs to: the last one that has begun."""
    above = 1
    while passes.epoch_start(above) <= step:
        above *= 2
    below = above // 2
    while above - below > 1:
        middle = (below + above) // 2
        if passes.epoch_start(middle) <= step:
            below = middle
        else:
            above = middle
    return below


def rank_positions(rank: int, world_size: int, global_batch_size: int) -> np.ndarray:
    """Lists the positions of the global batch that a rank takes: int64 [B / W], consecutive.

    With gradient accumulation, micro-batch i of m samples is the slice [i * m, (i + 1) * m).

    Raises:
      ConfigError: `batch_not_divisible`, naming the nearest valid batch; `rank`; `order_count`.

    >>> rank_positions(1, 4, 8).tolist()
    [2, 3]
    """
    require_count("world_size", world_size)
    require_count("global_batch_size", global_batch_size)
    if not 0 <= rank < world_size:
        raise ConfigError("rank.range", rank=rank, world_size=world_size)
    require_multiple(global_batch_size, world_size, of="ranks")
    share = global_batch_size // world_size
    return np.arange(rank * share, (rank + 1) * share, dtype=np.int64)


def require_slots(
    steps: np.ndarray, positions: np.ndarray, batches: np.ndarray, *, since: int = 0
) -> None:
    """Refuses slots outside the run, or before the step from which an order lays it out.

    Raises:
      ConfigError: `order_slot`.
    """
    if steps.size and (steps.min() < since or positions.min() < 0 or (positions >= batches).any()):
        raise ConfigError(
            "order_slot.outside",
            since=since,
            min_step=int(steps.min()),
            positions=f"{int(positions.min())} to {int(positions.max())}",
            global_batch_size=int(batches.min()),
        )


def is_whole(value: object) -> bool:
    """Returns True for an integer of any kind that Python or NumPy has, but not for a bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def require_step(step: object) -> None:
    """Refuses what is not a step of a run.

    Raises:
      ConfigError: `order_step`.
    """
    if not is_whole(step) or not 0 <= step < 2**62:  # type: ignore[operator]
        raise ConfigError("order_step", where="step", got=repr(step))


def require_count(name: str, value: int) -> None:
    if not is_whole(value) or not 1 <= value < 2**62:
        raise ConfigError("order_count", where=name, name=name, got=repr(value))


def require_multiple(global_batch_size: int, divisor: int, *, of: str) -> None:
    if global_batch_size % divisor:
        below = global_batch_size // divisor * divisor
        near = [str(batch) for batch in (below, below + divisor) if batch]
        raise ConfigError(
            "batch_not_divisible.unit",
            of=of,
            near=" or ".join(near),
            global_batch_size=global_batch_size,
            facts={of: divisor},
        )


_MOST_STORED = {"seed": 2**64 - 1, "global_batch_size": 2**31}
"""Greatest numbers in the orders of states; any other is below 2**60."""


def require_stored(value: object, name: str = "") -> None:
    """Refuses a number in the order of a state that no order has, however deep it is.

    Raises:
      StateError: `order_values`.
    """
    if isinstance(value, Mapping):
        for key, each in value.items():
            require_stored(each, key)
    elif isinstance(value, list | tuple):
        for each in value:
            require_stored(each, name)
    elif isinstance(value, int) and abs(value) > _MOST_STORED.get(name, 2**60):
        raise StateError("order_values", got=f"{name}={value}")
