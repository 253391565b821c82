"""Quarantine: the bad samples of a dataset in this process, and when there are too many.

A bad sample is one whose bytes are wrong (stage "read") or that cannot be laid out (stage
"layout"); a store that does not answer makes no sample bad. Once its bytes were wrong, a sample
stays bad for the run, in the run's states too: a replay substitutes what the run has substituted,
even where the data was repaired in between. Whether a layout fits can depend on the epoch's draws,
so that is found out anew each time, the same on every rank.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from shardspec.errors import BudgetError, ShardsError

logger = logging.getLogger(__name__)

MOST_RECORDS = 1000
"""Records kept; beyond it bad samples are only counted."""

_LEAST_SAMPLES = 1000
"""A rate is of at least so many samples: one bad sample among the first ten says little."""


class Quarantine:
    """Bad samples, by number. Threads may share it; copies in processes part ways."""

    def __init__(self, *, max_rate: float | None) -> None:
        """Begins with none.

        Args:
          max_rate: Share of bad samples above which to stop; None: any number.
        """
        self.max_rate = max_rate
        self.counts: Counter[str] = Counter()
        """Substitutions by reason."""
        self.num_samples = 0
        """Samples that were asked for."""
        self._records: dict[int, dict[str, Any]] = {}
        self.renew_lock()

    def renew_lock(self) -> None:
        """Begins with a lock that nobody holds."""
        self._lock = threading.Lock()
        _all.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.renew_lock()

    def record(self, sample: int) -> dict[str, Any] | None:
        """Gives {sample, shard, key, stage, reason} of a sample that stays bad; None for others."""
        return self._records.get(sample)

    def asked(self) -> None:
        """Counts a sample, good or bad."""
        with self._lock:
            self.num_samples += 1

    def add(self, record: Mapping[str, Any], error: ShardsError | None = None) -> None:
        """Notes that a sample was found bad, or found to be known as such.

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
        """Takes over what a state knows to be bad."""
        with self._lock:
            for record in (each for each in records if each["stage"] == "read"):
                self._records.setdefault(int(record["sample"]), dict(record))


_all: weakref.WeakSet[Quarantine] = weakref.WeakSet()
"""Those of this process."""


def _renew_locks() -> None:
    for quarantine in list(_all):
        quarantine.renew_lock()


os.register_at_fork(after_in_child=_renew_locks)  # another thread may hold one at a fork
