"""What a part is doing, in a few hundred bytes: it is written into the part's lease.

Counts of the stage that runs, the reasons of its failures and the slowest shards are bounded, and
times are durations. `preprocess.job.status` reads them.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

from preprocess.job.job import Reporter

MAX_REASONS = 8
"""Reasons of failures that are kept; the others are counted together."""

MAX_SLOWEST = 3


class Board:
    """A reporter that passes everything on, and keeps what a part is doing.

    Two threads use it: the one that works, and the one that renews the lease.
    """

    def __init__(self, report: Reporter) -> None:
        """Puts itself in front of a reporter."""
        self._report = report
        self._lock = threading.Lock()
        self._stage = "start"
        self._total: int | None = None
        self._done = 0
        self._failed: Counter[str] = Counter()
        self._began_s = time.monotonic()
        self._shards_began_s: dict[int, float] = {}
        self._slowest: list[tuple[int, float]] = []

    def stage(self, name: str, total: int | None) -> None:
        """A stage begins."""
        with self._lock:
            self._stage, self._total, self._done = name, total, 0
            self._began_s = time.monotonic()
            if name != "build":
                self._failed.clear()
        self._report.stage(name, total)

    def step(self, reason: str) -> None:
        """One step is done; `reason` is "" or why it failed."""
        with self._lock:
            self._done += 1
            if reason:
                known = reason in self._failed or len(self._failed) < MAX_REASONS
                self._failed[reason if known else "other"] += 1
        self._report.step(reason)

    def sent(self, num_bytes: int) -> None:
        """An object store has received this many bytes more."""
        self._report.sent(num_bytes)

    def note(self, text: str) -> None:
        """Something that a person should know."""
        self._report.note(text)

    def waits(self, what: str) -> None:
        """The part has nothing to do before something else happens."""
        with self._lock:
            if self._stage == what:
                return
        self.stage(what, None)

    def shard(self, shard: int, done: bool) -> None:
        """Something happened to a shard: its work has begun, or is done."""
        with self._lock:
            began_s = self._shards_began_s.setdefault(shard, time.monotonic())
            if done:
                took_s = time.monotonic() - self._shards_began_s.pop(shard, began_s)
                ranked = sorted([*self._slowest, (shard, took_s)], key=lambda each: -each[1])
                self._slowest = ranked[:MAX_SLOWEST]

    def snapshot(self) -> dict[str, Any]:
        """Gives what is written into the lease."""
        with self._lock:
            return {
                "stage": self._stage,
                "done": self._done,
                "total": self._total,
                "seconds": round(time.monotonic() - self._began_s, 1),
                "failed": dict(sorted(self._failed.items())),
                "slowest": [[shard, round(took_s, 1)] for shard, took_s in self._slowest],
            }
