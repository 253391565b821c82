"""Quarantine: the bad samples of a dataset in this process, and when there are too many.

A bad sample is one whose bytes are wrong (stage "read"), or that cannot be laid out or lacks a
sound part that its frames need (stage "layout"). A failed request to a store does not make a sample
bad, and neither does a shard or an index that is missing or damaged: substitutes would replace all
of its samples, unnoticed.

A sample whose bytes were wrong once is bad for the whole run, and is listed in the run's states: a
replay substitutes what the run has substituted, even if the data was repaired in between. Whether a
layout fits, and which parts of a clip are needed, can depend on the epoch's draws, so it is
determined each time, with the same result on every rank.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from shardspec.errors import BudgetError, SampleError, ShardsError

logger = logging.getLogger(__name__)

MOST_RECORDS = 1000
"""Records kept; further bad samples are only counted."""

RECORD_FIELDS = ("sample", "shard", "key", "stage", "reason")
"""Of a record, whichever pass met the sample."""

_OF_ONE_SAMPLE = frozenset({"sample_crc", "array_header", "array_size", "image_decode"})
"""Reasons of errors about the bytes of a single sample; all others are about a shard."""

_LEAST_SAMPLES = 1000
"""The rate is of at least this many samples: one bad one among the first ten means little."""


def is_of_one_sample(error: ShardsError) -> bool:
    """Returns True if another sample may take the place of the one that caused this error."""
    return isinstance(error, SampleError) or error.reason in _OF_ONE_SAMPLE


class Quarantine:
    """Bad samples, by number. Threads may share it; copies in other processes are independent."""

    def __init__(self, *, max_rate: float | None) -> None:
        """Begins with no bad sample.

        Args:
          max_rate: Share of bad samples above which to stop; None: no limit.
        """
        self.max_rate = max_rate
        self.counts: Counter[str] = Counter()
        """Substitutions by reason."""
        self.num_samples = 0
        """Samples that were requested."""
        # Counters and records change under the lock; a single record is looked up without it.
        self._records: dict[int, dict[str, Any]] = {}
        self.renew_lock()

    def renew_lock(self) -> None:
        """Replaces the lock by one that no thread holds."""
        self._lock = threading.Lock()
        _all.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.renew_lock()

    def record(self, sample: int) -> dict[str, Any] | None:
        """Returns {sample, shard, key, stage, reason} of a sample that stays bad, or None."""
        return self._records.get(sample)

    def asked(self) -> None:
        """Counts a sample, good or bad."""
        with self._lock:
            self.num_samples += 1

    def add(self, record: Mapping[str, Any], error: ShardsError | None = None) -> None:
        """Notes that a sample was found bad, or was known to be.

        Raises:
          BudgetError: `bad_rate`.
        """
        reason = record["reason"]
        with self._lock:
            first = not self.counts[reason]
            self.counts[reason] += 1
            if record["stage"] == "read" and len(self._records) < MOST_RECORDS:
                self._records.setdefault(record["sample"], dict(record))
            num_bad = sum(self.counts.values())
        if first and error is not None:
            logger.warning("a sample is substituted (logged once per reason): %s", error)
        if self.max_rate is None:
            return
        allowed = self.max_rate * max(self.num_samples, _LEAST_SAMPLES)
        if num_bad > allowed:
            raise BudgetError(
                "bad_rate",
                where=record["shard"],
                bad=num_bad,
                samples=self.num_samples,
                max_bad_rate=self.max_rate,
                reasons=dict(self.counts),
            )

    def restore(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Takes over the bad samples that a state lists, without the step when they were met."""
        with self._lock:
            for record in (each for each in records if each["stage"] == "read"):
                own = {name: record[name] for name in RECORD_FIELDS}
                self._records.setdefault(int(record["sample"]), own)


_all: weakref.WeakSet[Quarantine] = weakref.WeakSet()
"""All of this process."""


def _renew_locks() -> None:
    for quarantine in list(_all):
        quarantine.renew_lock()


os.register_at_fork(after_in_child=_renew_locks)  # another thread may hold one at a fork
