"""BatchMaker: from planned rows to a batch, in whichever thread or process.

Reading is announced, the batch is built, and what it took is noted. How rows become a batch is a
small interface, `BatchBuilder`, as it differs between prepared and raw samples. Which thread or
process makes which batch has no influence on what is in it.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from loader.buffers import Allocate
from loader.delivery.stats import StageTimings
from loader.order import Row
from loader.reading import ShardReader
from loader.stream import ReadAhead


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A batch to be made."""

    step: int
    rows: list[Row]
    ahead: list[tuple[int, list[Row]]] = field(default_factory=list)
    """Steps that the same thread or process makes later, or now, and that are not announced yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeBatch:
    """A batch and what it took."""

    batch: Any
    bad: list[dict[str, Any]]
    """The samples that were substituted."""
    timings: StageTimings
    counters: Mapping[str, int] = field(default_factory=dict)
    """What a worker process has counted of its reading since its last batch; threads count where
    the consumer can look."""
    members: Mapping[int, int] = field(default_factory=dict)
    """How many samples each dataset of a mixture has in it, by its number."""


class BatchBuilder(Protocol):
    """How rows become a batch; picklable, and safe to share between threads."""

    def build(
        self, rows: list[Row], *, allocate: Allocate, unwanted: threading.Event | None
    ) -> MadeBatch:
        """Makes a batch.

        Args:
          rows: What it is made of.
          allocate: Gives the memory of its tensors, where the builder makes these itself.
          unwanted: Once set, the next row is not begun.

        Raises:
          CancelledError: The batch became unwanted.
        """

    def describe(self) -> dict[str, Any]:
        """Gives the fields of states that say what batches are made of samples."""

    def expected_bytes(self, num_rows: int) -> int:
        """Guesses the bytes of a batch before one was made."""


class BatchMaker:
    """Makes batches of rows; picklable, and safe to share between threads."""

    def __init__(self, ahead: ReadAhead, builder: BatchBuilder) -> None:
        """Joins what reads the samples and what makes batches of them."""
        self._ahead, self._builder = ahead, builder

    @property
    def readers(self) -> Sequence[ShardReader]:
        """What reads the shards."""
        return self._ahead.readers

    def cancel(self) -> None:
        """Drops what was announced: the run continues at another step."""
        self._ahead.cancel()

    def announce(self, task: Task) -> None:
        """Announces to the readers the steps that a task names."""
        for step, rows in task.ahead:
            self._ahead.prefetch(step, rows)

    def make(
        self, task: Task, *, allocate: Allocate, unwanted: threading.Event | None = None
    ) -> MadeBatch:
        """Makes a batch, after announcing the next ones; see `BatchBuilder.build`.

        Raises:
          CancelledError: The batch became unwanted.
          ShardError, SampleError: A sample cannot be read, laid out or decoded, and is not to be
            substituted.
        """
        self.announce(task)
        made = self._builder.build(task.rows, allocate=allocate, unwanted=unwanted)
        self._ahead.release(task.step)
        members = Counter([ref.dataset for row in task.rows for ref in row])
        return replace(made, members=members)
