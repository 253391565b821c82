"""Batch sizes: how many slots a step has, where that changes during a run.

Slots are counted over the whole run, whatever the sizes. A *segment* is the steps that share a
size.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from loader.order.slots import require_count
from shardspec.errors import ConfigError


class BatchSizes:
    """The global batch sizes of a run; immutable."""

    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Joins (first step, slots per step), the run's start first.

        Raises:
          ConfigError: `order_count`; `order_ramp`, the steps do not increase from 0.
        """
        self.pairs = [(step, size) for step, size in sizes]
        self.steps = [step for step, _ in self.pairs]
        for _, size in self.pairs:
            require_count("global_batch_size", size)
        if self.steps[:1] != [0] or sorted(set(self.steps)) != self.steps:
            raise ConfigError("order_ramp", tail="wrap", steps=self.steps)
        self.slots = [0]
        """Slots before each segment."""
        for (step, size), stop in zip(self.pairs, self.steps[1:], strict=False):
            self.slots.append(self.slots[-1] + (stop - step) * size)

    def segment_at(self, step: int) -> int:
        """Returns the number of the segment that a step is in."""
        return max(0, bisect_right(self.steps, step) - 1)

    def segment_of(self, slot: int) -> int:
        """Returns the number of the segment that a slot is in."""
        return bisect_right(self.slots, slot) - 1

    def slots_before(self, step: int) -> int:
        """Counts the slots before a step.

        >>> BatchSizes([(0, 8), (3, 16)]).slots_before(4)
        40
        """
        i = self.segment_at(step)
        return self.slots[i] + (step - self.steps[i]) * self.pairs[i][1]

    def step_from(self, slot: int) -> int:
        """Returns the first step that begins at a slot or after it.

        >>> [BatchSizes([(0, 8), (3, 16)]).step_from(slot) for slot in (0, 1, 24, 25, 40)]
        [0, 1, 3, 4, 4]
        """
        i = self.segment_of(slot)
        return self.steps[i] - (self.slots[i] - slot) // self.pairs[i][1]
