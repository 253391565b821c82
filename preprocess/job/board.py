"""What a job or a part of one is doing, in a few hundred bytes: it is written into its lease.

Counts of the stage that runs, the reasons of its failures and the slowest shards are bounded, and
times are durations. `preprocess.job.status` reads them. The same goes to the events of the job, and
a stage in which nothing happens any more is told to people.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

from preprocess.job.events import EventLog
from preprocess.job.job import Reporter

MAX_REASONS = 8
"""Reasons of failures that are kept; the others are counted together."""

MAX_SLOWEST = 3

ShardEvent = Literal["progress", "lost", "done"]


class Board:
    """A reporter that passes everything on, and keeps what a part is doing.

    Two threads use it: the one that works, and the one that renews the lease.
    """

    def __init__(
        self,
        report: Reporter,
        *,
        events: EventLog | None = None,
        stall_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Puts itself in front of a reporter.

        Args:
          report: The reporter.
          events: Gets the events too.
          stall_s: Seconds without any progress that are told; 0 for never.
          clock: Gives seconds.
        """
        self._report = report
        self._events = events or EventLog(None)
        self._stall_s = stall_s
        self._clock = clock
        self._lock = threading.Lock()
        self._stage = "start"
        self._total: int | None = None
        self._done = 0
        self._failed: Counter[str] = Counter()
        self._began_s = self._moved_s = clock()
        self._stalled = False
        self._shards_began_s: dict[int, float] = {}
        self._slowest: list[tuple[int, float]] = []

    def stage(self, name: str, total: int | None) -> None:
        """A stage begins."""
        with self._lock:
            failed = dict(self._failed) if self._done else {}
            last, self._stage, self._total, self._done = self._stage, name, total, 0
            self._began_s = self._moved()
            if name != "build":
                self._failed.clear()
        if failed:
            self._events.write("failures", stage=last, reasons=failed)
        self._events.write("stage", stage=name, total=total)
        self._report.stage(name, total)

    def step(self, reason: str) -> None:
        """One step is done; `reason` is "" or why it failed."""
        with self._lock:
            self._done += 1
            self._moved()
            if reason:
                known = reason in self._failed or len(self._failed) < MAX_REASONS
                self._failed[reason if known else "other"] += 1
        self._report.step(reason)

    def sent(self, num_bytes: int) -> None:
        """An object store has received this many bytes more."""
        with self._lock:
            self._moved()
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

    def shard(self, shard: int, what: ShardEvent) -> None:
        """Something happened to a shard."""
        with self._lock:
            now_s = self._moved()
            took_s = now_s - self._shards_began_s.setdefault(shard, now_s)
            if what in ("done", "lost"):
                del self._shards_began_s[shard]
            if what == "done":
                ranked = sorted([*self._slowest, (shard, took_s)], key=lambda each: -each[1])
                self._slowest = ranked[:MAX_SLOWEST]
        if what == "done":
            self._events.write("shard", shard=shard, seconds=round(took_s, 3))
        elif what == "lost":
            self._events.write("retry", shard=shard)

    def committed(self, sha256: str) -> None:
        """The dataset is complete."""
        self._events.write("commit", manifest_sha256=sha256)

    def end(self, outcome: str) -> None:
        """The job has ended: "done", "interrupted", or "failed: REASON"."""
        if self._failed:
            self._events.write("failures", stage=self._stage, reasons=dict(self._failed))
        self._events.write("end", outcome=outcome)

    def _moved(self) -> float:
        """Notes that something has happened; the caller holds the lock."""
        self._moved_s, self._stalled = self._clock(), False
        return self._moved_s

    def check_stall(self) -> None:
        """Tells, once, that nothing has happened for too long; for a stage that does not wait."""
        with self._lock:
            still_s = self._clock() - self._moved_s
            working = self._stage != "start" and not self._stage.startswith("wait")
            if self._stalled or not self._stall_s or not working or still_s < self._stall_s:
                return
            self._stalled = True
            shards = sorted(self._shards_began_s)
        self._events.write("stall", stage=self._stage, seconds=round(still_s), shards=shards)
        at = f", in work: shards {', '.join(map(str, shards[:8]))}" if shards else ""
        self.note(f"no progress in stage {self._stage} for {still_s:.0f} s{at}")

    def snapshot(self) -> dict[str, Any]:
        """Gives what is written into the lease; it is called again and again."""
        self.check_stall()
        with self._lock:
            return {
                "stage": self._stage,
                "done": self._done,
                "total": self._total,
                "seconds": round(self._clock() - self._began_s, 1),
                "still": round(self._clock() - self._moved_s),
                "failed": dict(sorted(self._failed.items())),
                "slowest": [[shard, round(took_s, 1)] for shard, took_s in self._slowest],
            }
