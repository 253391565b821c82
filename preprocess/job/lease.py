"""Holds an output for one job: by the kernel's lock on local disk, by a lease on object stores.

Two jobs on one output would mix their plans: each shard is named by its number, whatever its rows.
So a job on an object store keeps an object `.lease` in its output, which no other job has made:

1. It is created on the condition that there is none. The store decides between two that try.
2. While the job runs, the lease is rewritten every `BEAT_S`.
3. A job that finds a lease checks if its holder is alive. On this machine the kernel knows. A lease
   of another machine is watched: one that changes is held; one that stays the same for `TTL_S`
   belonged to a job that died, and is taken over, on the condition that it is still the same one.
4. A holder that finds another job's lease instead of its own has lost it: `check` raises, and the
   job stops before it writes a manifest. After more than `TTL_S` without a renewal, as in an outage
   of the store, another job may have it: `check` then renews it before it says that it is held.

No clock is compared with another machine's; the own one measures how long ago the last renewal
began. A store that ignores conditions cannot decide between two jobs that start at the same time:
that is detected, and a warning says so.
"""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shardspec import storage
from shardspec.documents import read_object
from shardspec.errors import StorageError, redacted
from shardspec.manifest import canonical_json

logger = logging.getLogger(__name__)

LEASE_NAME = ".lease"

BEAT_S = 15.0
"""Between two renewals."""

TTL_S = 60.0
"""A lease that has not changed for this long is expired."""


@contextmanager
def output_lock(url: str) -> Iterator[Callable[[], None]]:
    """Holds an output for this process.

    Yields:
      A function that raises StorageError `lease_lost` once the output is no longer held, or
      `output_removed` where its folder is gone.

    Raises:
      StorageError: `output_busy`: another job holds it; `output_removed`.
    """
    if storage.is_local(url):
        with storage.exclusive(url):
            check = _folder_check(url)
            try:
                yield check
            except FileNotFoundError as error:
                check()
                if str(error.filename).startswith(str(storage.local_path(url))):
                    raise StorageError("output_removed", where=str(error.filename)) from error
                raise
        return
    lease = _Lease(url)
    lease.take()
    try:
        yield lease.check
    finally:
        lease.give_back()


def _folder_check(url: str) -> Callable[[], None]:
    """Makes a function that raises once a folder is not the one that it is now.

    The lock is of the folder: one that is removed and made again may be another job's. While it is
    held the folder is open, so the kernel gives its number to no other.
    """
    path = storage.local_path(url)
    held = path.stat()

    def check() -> None:
        try:
            found = path.stat()
        except FileNotFoundError as error:
            raise StorageError("output_removed", where=url) from error
        if (found.st_dev, found.st_ino) != (held.st_dev, held.st_ino):
            raise StorageError("output_removed", where=url)

    return check


class _Lease:
    def __init__(self, output: str) -> None:
        self._output = output
        self._url = storage.join(output, LEASE_NAME)
        self._holder = {"job": uuid.uuid4().hex, "host": platform.node(), **_this_process()}
        self._beats = 0
        self._stop = threading.Event()
        self._lost = threading.Event()
        # Held for a renewal, so that the two threads that renew do not take each other for others.
        self._renewing = threading.Lock()
        self._renewed_s = 0.0
        """When the renewal began that was the last to succeed; others count from then at most."""
        self._heart = threading.Thread(target=self._beat_on, name="lease", daemon=True)

    def take(self) -> None:
        while True:
            version = storage.version(self._url)
            if version is not None:
                holder = self._read()
                if holder is not None and not _is_dead(holder):
                    self._watch(version, holder)
            self._renewed_s = _now_s()
            if storage.compare_and_swap(self._url, self._payload(), replacing=version):
                break
        if storage.compare_and_swap(self._url, self._payload(), replacing=None):
            logger.warning(
                "%s: this store ignores conditional writes; see to it yourself that no two jobs "
                "write to one output",
                self._output,
            )
        self._heart.start()

    def check(self) -> None:
        if not self._lost.is_set() and self._is_old():
            self._renew(only_if_old=True)
        if self._lost.is_set() or self._is_old():
            raise StorageError("lease_lost", where=self._output)

    def give_back(self) -> None:
        self._stop.set()
        self._heart.join()
        with suppress(StorageError):  # otherwise it expires
            if not self._lost.is_set() and self._is_ours():
                storage.delete_objects(self._output, [LEASE_NAME])

    def _beat_on(self) -> None:
        while not self._stop.wait(BEAT_S):
            self._renew()
            if self._lost.is_set():
                return

    def _is_ours(self) -> bool:
        holder = self._read()
        return holder is not None and holder.get("job") == self._holder["job"]

    def _is_old(self) -> bool:
        return _now_s() - self._renewed_s >= TTL_S

    def _renew(self, *, only_if_old: bool = False) -> None:
        with self._renewing:
            if self._lost.is_set() or (only_if_old and not self._is_old()):
                return  # the other thread has found out
            began_s = _now_s()
            try:
                if self._replace():
                    self._renewed_s = began_s
                else:
                    self._lost.set()
            except Exception as error:  # noqa: BLE001 - any failure: the lease does not change
                reason = redacted(str(getattr(error, "what", error)))
                logger.warning("%s: the lease could not be renewed: %s", self._output, reason)

    def _replace(self) -> bool:
        version = storage.version(self._url)
        if version is None or not self._is_ours():
            return False
        return storage.compare_and_swap(self._url, self._payload(), replacing=version)

    def _payload(self) -> bytes:
        self._beats += 1  # so that no two writes are equal
        return canonical_json({**self._holder, "beats": self._beats})

    def _read(self) -> dict[str, Any] | None:
        try:
            return read_object(storage.read_bytes(self._url))
        except (FileNotFoundError, ValueError):
            return None

    def _watch(self, version: str, holder: dict[str, Any]) -> None:
        """Waits until a lease has expired; raises as soon as it changes."""
        if not _is_alive(holder):
            logger.warning(
                "%s: held by a job on %s; waiting %.0f s to see if it is alive",
                self._output,
                holder.get("host"),
                TTL_S,
            )
            looks = 20
            for _ in range(looks):
                self._stop.wait(TTL_S / looks)
                if storage.version(self._url) != version:
                    break
            else:
                return
        raise StorageError(
            "output_busy", where=self._output, host=holder.get("host"), pid=holder.get("pid")
        )


def _now_s() -> float:
    """Reads a clock that runs while this machine is suspended, as those of other machines do."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


def _this_process() -> dict[str, Any]:
    """Names this process so that another one on this machine can check if it is alive."""
    pid = os.getpid()
    return {"pid": pid, "born": _born(pid), **_this_machine()}


def _this_machine() -> dict[str, str | None]:
    """Names what process numbers are valid in: this boot of the kernel, and the namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return {"boot": boot, "pids": os.readlink("/proc/self/ns/pid")}
    except OSError:
        return {"boot": None, "pids": None}


def _is_here(holder: dict[str, Any]) -> bool:
    here = _this_machine()
    return here["boot"] is not None and all(holder.get(name) == here[name] for name in here)


def _is_dead(holder: dict[str, Any]) -> bool:
    return _is_here(holder) and _born(holder.get("pid")) != holder.get("born")


def _is_alive(holder: dict[str, Any]) -> bool:
    return _is_here(holder) and _born(holder.get("pid")) == holder.get("born")


def _born(pid: object) -> str | None:
    """Gives the start of a process of this machine in kernel ticks; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]  # fields 3 and 22 of proc(5)
