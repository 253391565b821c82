"""Holds an output for one job, or for the parts of one job: by leases, which other machines see.

Two jobs on one output would mix their plans: each shard is named by its number, whatever its rows.
So a job keeps an object `.lease` in its output, which no other job has made:

1. It is created on the condition that there is none. The store decides between two that try; on a
   local or network disk it is the file system (`storage.compare_and_swap`).
2. While the job runs, the lease is rewritten every `BEAT_S`.
3. A job that finds a lease checks if its holder is alive. On this machine the kernel knows. A lease
   of another machine is watched: one that changes is held; one that stays the same for `TTL_S`
   belonged to a job that died, and is taken over, on the condition that it is still the same one.
4. A holder that finds another job's lease instead of its own has lost it: `check` raises, and the
   job stops before it writes a manifest. After more than `TTL_S` without a renewal, as in an outage
   of the store, another job may have it: `check` then renews it before it says that it is held,
   and again where the renewal itself lasted for so long.

A job in parts (`preprocess.job.parts`) has a `.lease` that names the job instead of a process, and
a lease of each part below `.parts`. It holds the output as long as one of those is alive.

On a local disk the kernel's lock of the folder is held as well: it answers at once, also between
containers that do not see each other's processes.

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shardspec import storage
from shardspec.documents import read_object
from shardspec.errors import StorageError, redacted
from shardspec.manifest import canonical_json

logger = logging.getLogger(__name__)

LEASE_NAME = ".lease"

PARTS_FOLDER = ".parts"
"""Folder of an output with what the parts of a job tell each other, one folder per job."""

BEAT_S = 15.0
"""Between two renewals."""

TTL_S = 60.0
"""A lease that has not changed for this long is expired."""

_LATE_RENEWALS = 5
"""Renewals in a row that may succeed and yet last for `TTL_S` or longer before a lease is lost."""

_LOOKS = 20
"""Times that a lease is looked at within `TTL_S`."""

Life = Literal["absent", "ended", "alive", "dead", "unknown"]


@contextmanager
def output_lock(
    url: str, *, state: Callable[[], Mapping[str, Any]] = dict
) -> Iterator[Callable[[], None]]:
    """Holds an output for this process.

    Args:
      url: The output.
      state: Called at each renewal: what this process is doing, in a few hundred bytes.

    Yields:
      A function that raises StorageError `lease_lost` once the output is no longer held, or
      `output_removed` where its folder is gone.

    Raises:
      StorageError: `output_busy`: another job holds it; `output_removed`.
    """
    if not storage.is_local(url):
        lease = Lease(url, LEASE_NAME, state=state)
        lease.take()
        try:
            yield lease.check
        finally:
            lease.give_back()
        return
    with storage.exclusive(url):
        check_folder = folder_check(url)
        # On a disk of this machine, the lock says that no other process holds the output alone.
        own = storage.is_own_disk(url)
        found = _take_local(Lease(url, LEASE_NAME, locked=own, state=state))

        def check() -> None:
            check_folder()
            if found is not None:
                found.check()

        try:
            with naming_removal(url, check_folder):
                yield check
        finally:
            if found is not None:
                found.give_back()


def tidy_up(url: str, tidy: Callable[[], None], *, is_left: bool) -> None:
    """Removes what a run has left in a complete output that ended between its commit and its end.

    Args:
      url: The output.
      tidy: Removes it; called while the output is held.
      is_left: Whether there is anything for certain, beside leases and unfinished files.
    """
    # Last a run removes its lease. That of another machine is not waited for: its job may be alive.
    watch = Watch()
    life, holder = watch.look(storage.join(url, LEASE_NAME))
    if "parts" in holder:
        lives = [watch.look(each)[0] for each in _part_leases(url, holder).values()]
        is_left = is_left or not {"alive", "unknown"} & set(lives)
    if life == "absent":
        is_left = is_left or storage.has_temporaries(url)
    if not is_left and life != "dead":
        return
    try:
        with output_lock(url):
            tidy()
    except StorageError as error:
        # A part is about to tidy up itself; or the output, which is complete, can only be read.
        if error.reason not in ("output_busy", "permission"):
            raise


def _take_local(lease: Lease) -> Lease | None:
    """Takes the lease of a local output; None where the lock has to do.

    A folder that cannot be written to can still be looked at, and a full disk can be tidied up.
    """
    try:
        lease.take()
    except StorageError as error:
        if error.reason not in ("permission", "no_space"):
            raise
        return None
    return lease


@contextmanager
def naming_removal(url: str, check: Callable[[], None]) -> Iterator[None]:
    """Names files of a local output that are missing because somebody has removed them."""
    try:
        yield
    except FileNotFoundError as error:
        check()
        if str(error.filename).startswith(str(storage.local_path(url))):
            raise StorageError("output_removed", where=str(error.filename)) from error
        raise


def folder_check(url: str) -> Callable[[], None]:
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


class Lease:
    """A lease of this process; `take` it first, and end with `give_back` or `end`."""

    def __init__(
        self,
        output: str,
        name: str,
        *,
        locked: bool = False,
        busy: str = "output_busy.job",
        facts: Mapping[str, Any] | None = None,
        waits: int = logging.WARNING,
        state: Callable[[], Mapping[str, Any]] = dict,
        guard: Callable[[bool], bool] = lambda late: True,  # noqa: ARG005
    ) -> None:
        """Names a lease; touches nothing yet.

        Args:
          output: The output.
          name: Of the lease's object, below the output.
          locked: Whether a kernel's lock shows that no other process holds it.
          busy: Code of the error where another process holds it.
          facts: Of that error.
          waits: Level at which it is logged that `take` waits.
          state: Called at each renewal; what it gives is written into the lease.
          guard: Called at each renewal, with whether it comes so late that others may have taken
            the lease over; False: it is lost.
        """
        self._output = output
        self._url = storage.join(output, name)
        self._name = name
        self._locked = locked
        self._busy = busy
        self._facts = dict(facts or {})
        self._waits = waits
        self._state = state
        self._guard = guard
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
        """Takes the lease, and renews it from now on in a thread.

        Raises:
          StorageError: Another process holds it.
        """
        while True:
            version = storage.version(self._url)
            if version is not None:
                holder = read_lease(self._url)
                if holder is not None:
                    self.require_free(version, holder)
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
        """Makes sure that the lease is held.

        Raises:
          StorageError: `lease_lost`.
        """
        for renewals_left in range(_LATE_RENEWALS, -1, -1):
            if self._lost.is_set():
                break
            if not self._is_old():
                return
            renewed_s = self._renewed_s
            if renewals_left:
                self._renew(only_if_old=True)
            # One that succeeded but lasted for `TTL_S` does not count: another job may have taken
            # the lease since. The next one finds out.
            if self._renewed_s == renewed_s:
                break
        raise StorageError("lease_lost", where=self._output)

    def give_back(self) -> None:
        """Removes the lease."""
        self._stop_beating()
        with suppress(StorageError, FileNotFoundError):  # otherwise it expires, or is gone
            if not self._lost.is_set() and self._is_ours():
                storage.delete_objects(self._output, [self._name])

    def end(self, outcome: str) -> None:
        """Leaves the lease as a note of how its holder has ended; it holds nothing any more."""
        self._stop_beating()
        self._holder["ended"] = outcome
        with suppress(StorageError, FileNotFoundError):  # of the latter, all parts have ended
            if not self._lost.is_set():
                self._replace()

    def _stop_beating(self) -> None:
        self._stop.set()
        self._heart.join()

    def _beat_on(self) -> None:
        while not self._stop.wait(BEAT_S):
            self._renew()
            if self._lost.is_set():
                return

    def _is_ours(self) -> bool:
        holder = read_lease(self._url)
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
        if version is None or not self._is_ours() or not self._guard(self._is_old()):
            return False
        return storage.compare_and_swap(self._url, self._payload(), replacing=version)

    def _payload(self) -> bytes:
        self._beats += 1  # so that no two writes are equal
        return canonical_json({**self._holder, "beats": self._beats, **self._state()})

    def require_free(self, version: str, holder: Mapping[str, Any]) -> None:
        """Waits until a lease has expired; raises as soon as its holder is found to be alive."""
        if "parts" in holder:
            require_no_parts(self._output, holder)
            return
        if self._locked or holder.get("ended") or _is_dead(holder):
            return
        facts = {**self._facts, "host": holder.get("host"), "pid": holder.get("pid")}
        if not _is_alive(holder):
            logger.log(
                self._waits,
                "%s: held by a job on %s; waiting %.0f s to see if it is alive",
                self._output,
                holder.get("host"),
                TTL_S,
            )
            for _ in range(_LOOKS):
                _pause(TTL_S / _LOOKS)
                if storage.version(self._url) != version:
                    break
            else:
                return
        raise StorageError(self._busy, where=self._output, **facts)


def read_lease(url: str) -> dict[str, Any] | None:
    """Reads a lease; None where there is none, or one that is damaged."""
    try:
        found = read_object(storage.read_bytes(url))
    except (FileNotFoundError, ValueError):
        return None
    if "parts" in found:
        count, texts = found["parts"], (found.get("job"), found.get("split"))
        is_count = isinstance(count, int) and not isinstance(count, bool) and 0 < count < 100_000
        if not is_count or not all(isinstance(text, str) for text in texts):
            return None
    return found


@dataclass
class Watch:
    """Tells whether the holders of leases are alive, by looking at them again and again.

    Only one thread uses it.
    """

    _seen: dict[str, tuple[str, float, bool]] = field(default_factory=dict)
    """Version of each lease, when it was first seen, and whether there was another one before."""

    def look(self, url: str) -> tuple[Life, dict[str, Any]]:
        """Looks at a lease.

        Returns:
          The life of its holder, and the lease. "unknown": of another machine, and the lease has
          been watched for less than `TTL_S` without a change.
        """
        version = storage.version(url)
        holder = None if version is None else read_lease(url)
        if version is None or holder is None:
            return "absent", {}
        if holder.get("ended"):
            return "ended", holder
        if _is_here(holder):
            return ("dead" if _is_dead(holder) else "alive"), holder
        before = self._seen.get(url)
        if before is None or before[0] != version:
            self._seen[url] = version, _now_s(), before is not None
        version, since_s, changed = self._seen[url]
        if _now_s() - since_s >= TTL_S:
            return "dead", holder
        return ("alive" if changed else "unknown"), holder


def parts_folder(job: str) -> str:
    """Names the folder, below an output, of a job in parts."""
    return f"{PARTS_FOLDER}/{job[:16]}"


def part_name(index: int, count: int) -> str:
    """Names the lease of a part, in its job's folder.

    >>> part_name(3, 64)
    '00003-of-00064.json'
    """
    return f"{index:05d}-of-{count:05d}.json"


def require_no_parts(output: str, record: Mapping[str, Any]) -> None:
    """Refuses an output of whose job in parts one is alive; leases of other machines are watched.

    Raises:
      StorageError: `output_busy`.
    """
    leases = _part_leases(output, record)
    watch, warned = Watch(), False
    for _ in range(_LOOKS + 2):
        unknown = []
        for index, url in leases.items():
            life, holder = watch.look(url)
            if life == "alive":
                raise StorageError(
                    "output_busy.parts",
                    where=output,
                    title=record.get("title"),
                    parts=record.get("parts"),
                    part=f"{index}/{record.get('parts')}",
                    host=holder.get("host"),
                    pid=holder.get("pid"),
                )
            if life == "unknown":
                unknown.append(url)
        if not unknown:
            return
        if not warned:
            logger.warning(
                "%s: held by parts of %s; waiting %.0f s to see if they are alive",
                output,
                record.get("title"),
                TTL_S,
            )
            warned = True
        _pause(TTL_S / _LOOKS)


def _part_leases(output: str, record: Mapping[str, Any]) -> dict[int, str]:
    """Lists the leases of the parts of a job: number of the part -> URL."""
    folder = storage.join(output, parts_folder(str(record.get("job"))))
    end = f"-of-{record.get('parts'):05}.json"
    names = [name for name in storage.list_names(folder, fresh=True) if name.endswith(end)]
    return {int(name[:5]): storage.join(folder, name) for name in sorted(names)}


def _pause(seconds: float) -> None:
    threading.Event().wait(seconds)


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


def _is_here(holder: Mapping[str, Any]) -> bool:
    here = _this_machine()
    return here["boot"] is not None and all(holder.get(name) == here[name] for name in here)


def _is_dead(holder: Mapping[str, Any]) -> bool:
    return _is_here(holder) and _born(holder.get("pid")) != holder.get("born")


def _is_alive(holder: Mapping[str, Any]) -> bool:
    return _is_here(holder) and _born(holder.get("pid")) == holder.get("born")


def _born(pid: object) -> str | None:
    """Gives the start of a process of this machine in kernel ticks; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]  # fields 3 and 22 of proc(5)
