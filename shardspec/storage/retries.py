"""RetryPolicy: how long something is tried again at a store, and how long to wait in between.

`with_retries` repeats a whole action, beyond what the stores' clients do by themselves (s3fs for
some ten seconds, gcsfs for half a minute). `shardspec.storage.ranges` repeats a read from its first
missing byte on, by the same `Attempts`. Waits are exponential with full jitter.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import TypeVar

from shardspec.errors import ConfigError, StorageError, redacted
from shardspec.keyed import hash_text
from shardspec.storage.failures import transient_error_kind

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How long one thing is tried at a store: a range of an object, or an action."""

    attempts: int = 8
    """Attempts in a row without a new byte, >= 1; for an action: attempts in all."""
    wall_s: float = 120.0
    """Longest time over all attempts, in seconds."""
    idle_s: float = 20.0
    """A connection without a new byte for this long is abandoned, in seconds."""
    first_wait_s: float = 0.1
    """Upper bound of the wait after an attempt that received something; doubled with each attempt
    in a row that did not. Waits are drawn from 0 to the bound (full jitter)."""
    longest_wait_s: float = 10.0
    """Upper bound of any wait except a Retry-After."""

    def __post_init__(self) -> None:
        wrong = [name for name in ("attempts", "wall_s", "idle_s") if getattr(self, name) <= 0]
        wrong += [n for n in ("first_wait_s", "longest_wait_s") if getattr(self, n) < 0]
        if wrong:
            raise ConfigError("retry_policy", facts={name: getattr(self, name) for name in wrong})


ACTION_POLICY = RetryPolicy(attempts=4, wall_s=60.0, first_wait_s=0.25)
"""For whole actions: few attempts, as each has the client's own attempts within it."""


class Attempts:
    """The attempts at one thing so far: how many, since when, and how long to wait for the next.

    Owned by one thread.
    """

    def __init__(self, policy: RetryPolicy, *, where: str) -> None:
        """Starts the clock.

        Args:
          policy: The limits.
          where: The URL; waits for different URLs are drawn apart.
        """
        self._policy, self._where = policy, where
        self._began_s = time.monotonic()
        self._in_vain = 0
        self.number = 0
        """Attempts that have failed."""

    @property
    def passed_s(self) -> float:
        """Seconds since the first attempt began."""
        return time.monotonic() - self._began_s

    @property
    def left_s(self) -> float:
        """Seconds that are left by `wall_s`; below 0 where they are over."""
        return self._policy.wall_s - self.passed_s

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
        bound_s = min(policy.longest_wait_s, policy.first_wait_s * 2 ** min(self._in_vain, 30))
        wait_s = max(jitter(self._where, self.number) * bound_s, least_s)
        return None if self._in_vain >= policy.attempts or wait_s >= self.left_s else wait_s


def with_retries(action: Callable[[], T], *, where: str, policy: RetryPolicy | None = None) -> T:
    """Does something at a store, again while its failures are transient.

    Args:
      action: What to do; must be safe to repeat.
      where: The URL that an error names.
      policy: The limits; None: `ACTION_POLICY`.

    Raises:
      StorageError: `store_unavailable`, with what was tried; other errors pass as they are.
    """
    attempts = Attempts(policy or ACTION_POLICY, where=where)
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
            threading.Event().wait(wait_s)


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
