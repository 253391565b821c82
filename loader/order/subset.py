"""SubsetSchedule: the rows of an order over subsets, with the sample ids of the whole datasets.

An order numbers the M samples of a subset from 0 to M - 1. All that is done with a sample (reading,
draws, records of bad ones) is by its id in the whole dataset.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loader.order.rows import Row
from loader.order.schedule import Schedule
from loader.topology import Topology


class SubsetSchedule:
    """A schedule whose rows name samples by their ids."""

    def __init__(self, schedule: Schedule, sample_ids: Sequence[np.ndarray | None]) -> None:
        """Joins a schedule and what its numbers mean.

        Args:
          schedule: Any schedule.
          sample_ids: For each dataset, as the order numbers them: int64 [M], ids of the samples in
            use; None: all of them.
        """
        self._schedule, self._sample_ids = schedule, tuple(sample_ids)
        self.batch_at, self.pass_is_exact = schedule.batch_at, schedule.pass_is_exact
        self.epoch_start, self.epoch_at = schedule.epoch_start, schedule.epoch_at

    def rows(self, step: int, topology: Topology) -> list[Row]:
        """Lists the rows of a rank in a step."""
        return [self._named(row) for row in self._schedule.rows(step, topology)]

    def _named(self, row: Row) -> Row:
        return tuple(
            ref if ids is None else ref._replace(sample=int(ids[ref.sample]))
            for ref in row
            for ids in (self._sample_ids[ref.dataset],)
        )
