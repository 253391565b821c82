"""RetryPolicy: how long something is tried again at a store, and how long to wait in between.

`with_retries` repeats a whole action, beyond what the stores' clients do by themselves (s3fs for
some ten seconds, gcsfs for half a minute). `shardspec.storage.ranges` repeats a read from its first
missing byte on, by the same `Attempts`. Waits are exponential with full jitter.

Time bounds the attempts, not their number: a store that refuses connections or answers 503 fails
within milliseconds, so that any number of attempts is used up long before the store is back. An
outage of up to `RetryPolicy.outage_s` is survived by everything that is requested through here:
the last attempt begins after its end, and has time to succeed.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import TypeVar

from shardspec.errors import ConfigError, StorageError, redacted
from shardspec.keyed import hash_text
from shardspec.storage.failures import transient_error_kind
from shardspec.storage.stores import outage_setting_s

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How long one thing is tried at a store: a range of an object, or an action."""

    attempts: int | None = None
    """Most attempts in a row without a new byte, >= 1; None: as many as `wall_s` has room for."""
    wall_s: float | None = None
    """Longest time over all attempts, in seconds; None: as long as it takes to survive the outage
    that VLM_SHARDS_OUTAGE_S names, 120 s by default."""
    idle_s: float = 20.0
    """A connection without a new byte for this long is abandoned, in seconds."""
    first_wait_s: float = 0.1
    """Upper bound of the wait after an attempt that received something; doubled with each attempt
    in a row that did not. Waits are drawn from 0 to the bound (full jitter)."""
    longest_wait_s: float = 10.0
    """Upper bound of any wait except a Retry-After."""

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        least = {"first_wait_s": 0.0, "longest_wait_s": 0.0}
        wrong = {}
        for name, value in values.items():
            if value is None and name in ("attempts", "wall_s"):
                continue
            kind = int if name == "attempts" else (int, float)
            is_number = isinstance(value, kind) and not isinstance(value, bool)
            if not is_number or not least.get(name, 1e-9) <= value < float("inf"):
                wrong[name] = value
        if wrong:
            raise ConfigError("retry_policy", facts=wrong)

    @property
    def limit_s(self) -> float:
        """Longest time over all attempts, in seconds."""
        if self.wall_s is not None:
            return self.wall_s
        return outage_setting_s() + self.idle_s + self.longest_wait_s

    @property
    def outage_s(self) -> float:
        """Longest outage that is survived, in seconds: an attempt that hangs when the store is back
        and the wait after it leave time for one more.

        >>> RetryPolicy(wall_s=330).outage_s
        300.0
        """
        return max(0.0, self.limit_s - self.idle_s - self.longest_wait_s)


ACTION_POLICY = RetryPolicy(first_wait_s=0.25)
"""For whole actions; each attempt has the client's own within it."""

CLEANUP_POLICY = RetryPolicy(attempts=4, wall_s=20.0, first_wait_s=0.25)
"""For removing what an unfinished action left, while its error is being raised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """What time it is, and how to wait."""

    now_s: Callable[[], float] = time.monotonic
    sleep: Callable[[float], object] = time.sleep


SYSTEM_CLOCK = Clock()


class Attempts:
    """The attempts at one thing so far: how many, since when, and how long to wait for the next.

    Owned by one thread.
    """

    def __init__(self, policy: RetryPolicy, *, where: str, clock: Clock = SYSTEM_CLOCK) -> None:
        """Starts the clock.

        Args:
          policy: The limits.
          where: The URL; waits for different URLs are drawn apart.
          clock: Counts the time.
        """
        self._policy, self._where, self._clock = policy, where, clock
        self._limit_s = policy.limit_s
        self._began_s = clock.now_s()
        self._in_vain = 0
        self.number = 0
        """Attempts that have failed."""

    @property
    def passed_s(self) -> float:
        """Seconds since the first attempt began."""
        return self._clock.now_s() - self._began_s

    @property
    def left_s(self) -> float:
        """Seconds that are left by the policy's limit; below 0 where they are over."""
        return self._limit_s - self.passed_s

    def wait(self, seconds: float) -> None:
        """Waits before the next attempt."""
        self._clock.sleep(seconds)

    def failed(self, *, has_progress: bool = False, least_s: float = 0.0) -> float | None:
        """Counts a failed attempt.

        Args:
          has_progress: Whether it received something, so that the attempts in a row begin again.
          least_s: What the store requested to wait (Retry-After).

        Returns:
          Seconds to wait before the next attempt; None where there shall be none.
        """
        policy = self._policy
        self.number += 1
        self._in_vain = 0 if has_progress else self._in_vain + 1
        bound_s: float = min(
            policy.longest_wait_s, policy.first_wait_s * 2 ** min(self._in_vain, 30)
        )
        wait_s, left_s = max(jitter(self._where, self.number) * bound_s, least_s), self.left_s
        if policy.attempts is not None and self._in_vain >= policy.attempts:
            return None
        if wait_s < left_s:
            return wait_s
        # A long wait near the end of the time must not cost the rest of it.
        shorter_s = max(left_s / 2, least_s)
        return shorter_s if max(least_s, policy.first_wait_s) < left_s else None


def with_retries(
    action: Callable[[], T],
    *,
    where: str,
    policy: RetryPolicy | None = None,
    clock: Clock = SYSTEM_CLOCK,
) -> T:
    """Does something at a store, again while its failures are transient.

    Args:
      action: What to do; must be safe to repeat.
      where: The URL that an error names.
      policy: The limits; None: `ACTION_POLICY`.
      clock: Counts the time.

    Raises:
      StorageError: `store_unavailable`, with what was tried; other errors pass as they are.
    """
    attempts = Attempts(policy or ACTION_POLICY, where=where, clock=clock)
    while True:
        try:
            return action()
        except Exception as error:
            if transient_error_kind(error) is None:
                raise
            wait_s = attempts.failed()
            if wait_s is None:
                raise StorageError(
                    "store_unavailable.answer",
                    where=where,
                    attempts=attempts.number,
                    seconds=round(attempts.passed_s, 1),
                    error=f"{type(error).__name__}: {error}",
                ) from error
            failure = redacted(f"{where}: {error}")
            logger.warning("%s; trying again in %.1f s", failure, wait_s)
            attempts.wait(wait_s)


def retry_after_s(headers: Mapping[str, str], *, now: datetime | None = None) -> float:
    """Reads how long a response asks to wait: Retry-After, seconds or a date (RFC 9110, 10.2.3).

    A date counts from the response's own Date, as the clocks of two machines may differ.

    Args:
      headers: Of the response, in whatever case.
      now: What a date counts from where the response has none.

    Returns:
      Seconds; 0.0 where there is no such header, or it cannot be parsed.

    >>> retry_after_s({"Retry-After": "17"}), retry_after_s({"retry-after": "soon"})
    (17.0, 0.0)
    """
    values = {name.lower(): value.strip() for name, value in headers.items()}
    text = values.get("retry-after", "")
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        return float(text)
    until, since = _parse_date(text), _parse_date(values.get("date", "")) or now
    return 0.0 if until is None or since is None else max(0.0, (until - since).total_seconds())


def _parse_date(text: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(text)
    except (TypeError, ValueError):
        return None
    return date.replace(tzinfo=date.tzinfo or timezone.utc)  # "-0000" gives none


def jitter(where: str, attempt: int) -> float:
    """Draws from [0, 1), another number in every process and at every moment.

    Only the length of waits depends on it.
    """
    return hash_text(f"{where}\0{attempt}\0{os.getpid()}\0{time.monotonic_ns()}") / 2**64
