"""SubsetSchedule: the rows of an order over subsets, with the sample ids of the whole datasets.

An order numbers the M samples of a subset from 0 to M - 1. All that is done with a sample (reading,
draws, records of bad ones) is by its id in the whole dataset. The order of an evaluation numbers
questions, each of which is a sample's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loader.order.rows import Row, SampleRef
from loader.order.schedule import Schedule
from loader.topology import Topology


class SubsetSchedule:
    """A schedule whose rows name samples by their ids."""

    def __init__(
        self,
        schedule: Schedule,
        sample_ids: Sequence[np.ndarray | None],
        questions: Sequence[np.ndarray | None] = (),
    ) -> None:
        """Joins a schedule and what its numbers mean.

        Args:
          schedule: Any schedule.
          sample_ids: For each dataset, as the order numbers them: int64 [M], ids of the samples in
            use; None: all of them.
          questions: For each dataset, int32 [M], the number of the question among those of its
            sample; None, or no entry: 0.
        """
        self._schedule, self._sample_ids = schedule, tuple(sample_ids)
        self._questions = tuple(questions) or (None,) * len(self._sample_ids)
        self.batch_at, self.pass_is_exact = schedule.batch_at, schedule.pass_is_exact
        self.epoch_start, self.epoch_at = schedule.epoch_start, schedule.epoch_at

    def rows(self, step: int, topology: Topology) -> list[Row]:
        """Lists the rows of a rank in a step."""
        return [self._named(row) for row in self._schedule.rows(step, topology)]

    def _named(self, row: Row) -> Row:
        return tuple(map(self._ref, row))

    def _ref(self, ref: SampleRef) -> SampleRef:
        ids, questions = self._sample_ids[ref.dataset], self._questions[ref.dataset]
        if ids is None:
            return ref
        question = 0 if questions is None else int(questions[ref.sample])
        return ref._replace(sample=int(ids[ref.sample]), question=question)
