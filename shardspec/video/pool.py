"""Frames of stored clips, decoded in a bounded number of processes.

Each thread that wants frames takes a process for the time of one clip, and waits where all are in
use. So no more decoders are open than `ClipLimits` allow, each with its bound on memory and time,
whatever the number of threads; the processes are kept, as starting one takes longer than a short
clip. After a fork the child has a pool of its own.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardspec.child import ChildProcess, Limits, Room, new_room
from shardspec.errors import ConfigError, SampleError
from shardspec.video.clip import decode_table
from shardspec.video.parts import RemoteFile, file_parts, needed_parts

_MOST_PROCESSES = 16
"""Decoders that are open at a time in a process by default: each takes a core while it decodes."""

_ATTEMPTS = 2
"""The process may have died for another reason than the clip, such as want of memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipLimits:
    """What decoding clips may take, in each process that makes batches.

    The defaults are far above what decoding takes: results are not to depend on them.
    """

    processes: int | None = None
    """Decoders that are open at a time; None: as many as there are cores, at most 16."""
    time_limit_s: float = 300.0
    """Most seconds for the frames of one clip."""
    memory_bytes: int = 4_000_000_000
    """Most memory of a decoder, beside that of its libraries."""

    def __post_init__(self) -> None:
        given = {"time_limit_s": self.time_limit_s, "memory_bytes": self.memory_bytes}
        if self.processes is not None:
            given["processes"] = self.processes

        def fits(name: str, value: float) -> bool:
            kind = int | float if name == "time_limit_s" else int
            return isinstance(value, kind) and not isinstance(value, bool) and 0 < value < math.inf

        wrong = {name: value for name, value in given.items() if not fits(name, value)}
        if wrong:
            raise ConfigError("clip_limits", facts=wrong)


DEFAULT_LIMITS = ClipLimits()


def decoder_process(limits: Limits) -> ChildProcess:
    """Makes the caller's end of a process that decodes; errors have the reason `video_process`."""
    return ChildProcess("shardspec.video.worker", reason="video_process", limits=limits)


class _Pool:
    """The processes of this process with the same limits; `idle` changes under the lock."""

    def __init__(self, limits: ClipLimits) -> None:
        self.limits = limits
        cores = len(os.sched_getaffinity(0))
        most = limits.processes or max(1, min(_MOST_PROCESSES, cores))
        self.free = threading.BoundedSemaphore(most)
        self.lock = threading.Lock()
        self.idle: list[ChildProcess] = []

    def take(self) -> ChildProcess:
        self.free.acquire()
        with self.lock:
            return self.idle.pop() if self.idle else decoder_process(self.limits)

    def give_back(self, process: ChildProcess) -> None:
        with self.lock:
            self.idle.append(process)
        self.free.release()


_pools: dict[ClipLimits, _Pool] = {}


def _pool_of(limits: ClipLimits) -> _Pool:
    return _pools.get(limits) or _pools.setdefault(limits, _Pool(limits))


def _renew() -> None:
    """Begins anew in a child: the processes belong to the parent."""
    _pools.clear()


os.register_at_fork(after_in_child=_renew)


def read_frames(
    table: bytes | memoryview,
    file: bytes | memoryview | RemoteFile,
    numbers: Sequence[int],
    *,
    on_frame: Callable[[int, np.ndarray], None],
    room: Room = new_room,
    limits: ClipLimits = DEFAULT_LIMITS,
    where: str = "",
) -> None:
    """Decodes frames of a stored clip.

    Args:
      table: The encoded table of the clip.
      file: Its file; of one that is elsewhere, the parts are read that the frames need.
      numbers: Of the frames, counted from the clip's first, strictly ascending.
      on_frame: Gets the position in `numbers` and the pixels of each, uint8 [H, W, 3], in order;
        after a process has died, or where more parts of the file are needed, all of them again.
      room: Gives the memory that a frame is written to; it is asked for each.
      limits: Of the processes; those with equal limits are shared.
      where: Named in errors.

    Raises:
      SampleError: `video_process`: the process hung, died or was refused memory, twice;
        `video_stream`: the clip has other frames than its table says; as `VideoReader`.
      ConfigError: `video_extra`: PyAV is missing.
      ShardError: As `file.read`.
    """
    request = {"work": "read", "table_bytes": len(table), "numbers": list(numbers)}
    pool = _pool_of(limits)
    if isinstance(file, bytes | memoryview):
        _read(pool, request, (table, file), on_frame=on_frame, room=room, where=where)
        return
    rows = decode_table(table, where=where)
    needed, every = needed_parts(rows, numbers), file_parts(rows)
    for parts in (needed, every):
        own = {**request, "parts": parts if parts != every else None}
        source = table, *file.read(parts)
        if _read(pool, own, source, on_frame=on_frame, room=room, where=where):
            return


def _read(
    pool: _Pool,
    request: dict[str, Any],
    source: Sequence[bytes | memoryview],
    *,
    on_frame: Callable[[int, np.ndarray], None],
    room: Room,
    where: str,
) -> bool:
    """Returns False if the frames need parts of the file that are not in `source`."""
    numbers = request["numbers"]
    process = pool.take()
    try:
        for attempt in range(1, 1 + _ATTEMPTS):
            count, found = 0, dict[str, Any]()

            def take(pixels: np.ndarray) -> None:
                nonlocal count
                on_frame(count, pixels)
                count += 1

            try:
                process.ask(
                    request,
                    source,
                    on_facts=found.update,
                    on_array=take,
                    room=room,
                    where=where,
                )
            except SampleError as error:
                if error.reason != "video_process":
                    raise
                if attempt == _ATTEMPTS:
                    raise SampleError(
                        "video_process.load", where=where, problem=error.what
                    ) from error
            else:
                if not found and count != len(numbers):
                    raise SampleError("video_stream.changed", where=where)
                return not found
    finally:
        pool.give_back(process)
    raise AssertionError("each attempt ends in a result or an error")
