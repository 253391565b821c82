"""Frames of stored clips, decoded in a bounded number of processes.

Each thread that wants frames takes a process for the time of one clip, and waits where all are in
use. So at most `MAX_PROCESSES` decoders are open, each with its bound on memory and time, whatever
the number of threads; the processes are kept, as starting one takes longer than a short clip. After
a fork the child has a pool of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardspec.child import ChildProcess, Limits, Room, new_room
from shardspec.errors import SampleError
from shardspec.video.clip import decode_table
from shardspec.video.parts import RemoteFile, file_parts, needed_parts

MAX_PROCESSES = max(1, min(16, len(os.sched_getaffinity(0))))
"""Decoders that are open at a time in a process: each takes a core while it decodes."""

_ATTEMPTS = 2
"""The process may have died for another reason than the clip, such as want of memory."""


@dataclass(frozen=True, slots=True)
class _ClipLimits:
    """Limits of one clip: far above what decoding takes, so that results never depend on them."""

    time_limit_s: float = 300.0
    memory_bytes: int = 4_000_000_000


def decoder_process(limits: Limits) -> ChildProcess:
    """Makes the caller's end of a process that decodes; errors have the reason `video_process`."""
    return ChildProcess("shardspec.video.worker", reason="video_process", limits=limits)


class _Pool:
    """The processes of this process; `idle` changes under the lock."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.free = threading.BoundedSemaphore(MAX_PROCESSES)
        self.lock = threading.Lock()
        self.idle: list[ChildProcess] = []

    def take(self) -> ChildProcess:
        self.free.acquire()
        with self.lock:
            return self.idle.pop() if self.idle else decoder_process(_ClipLimits())

    def give_back(self, process: ChildProcess) -> None:
        with self.lock:
            self.idle.append(process)
        self.free.release()


_pool = _Pool()


def _renew() -> None:
    """Begins anew in a child: the processes belong to the parent."""
    global _pool  # noqa: PLW0603 - one pool for each process
    _pool = _Pool()


os.register_at_fork(after_in_child=_renew)


def read_frames(
    table: bytes | memoryview,
    file: bytes | memoryview | RemoteFile,
    numbers: Sequence[int],
    *,
    on_frame: Callable[[int, np.ndarray], None],
    room: Room = new_room,
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
      where: Named in errors.

    Raises:
      SampleError: `video_process`: the process hung, died or was refused memory, twice;
        `video_stream`: the clip has other frames than its table says; as `VideoReader`.
      ConfigError: `video_extra`: PyAV is missing.
      ShardError: As `file.read`.
    """
    request = {"work": "read", "table_bytes": len(table), "numbers": list(numbers)}
    if isinstance(file, bytes | memoryview):
        _read(request, (table, file), on_frame=on_frame, room=room, where=where)
        return
    rows = decode_table(table, where=where)
    needed, every = needed_parts(rows, numbers), file_parts(rows)
    for parts in (needed, every):
        own = {**request, "parts": parts if parts != every else None}
        source = table, *file.read(parts)
        if _read(own, source, on_frame=on_frame, room=room, where=where):
            return


def _read(
    request: dict[str, Any],
    source: Sequence[bytes | memoryview],
    *,
    on_frame: Callable[[int, np.ndarray], None],
    room: Room,
    where: str,
) -> bool:
    """Returns False if the frames need parts of the file that are not in `source`."""
    numbers = request["numbers"]
    pool = _pool
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
