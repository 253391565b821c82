"""DecoderProcess: a process that decodes videos, and may hang or die.

It is started at the first video and serves all that follow. When it dies, takes too long or is
refused memory, that video is refused by name, and the next one gets a new process.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from shardspec.errors import ConfigError, SampleError

_GRACE_S = 2.0
"""Seconds after which a process that has not ended itself in time is killed."""

_PIPE_BYTES = 1 << 20

_LINE_BYTES = 1 << 12
"""Read at a time where a line is expected: what follows goes straight to where it is wanted."""


class Limits(Protocol):
    """What decoding a video may take."""

    @property
    def time_limit_s(self) -> float:
        """Seconds for one video."""

    @property
    def memory_bytes(self) -> int:
        """Memory beside that of the libraries."""


Room = Callable[[int], "np.ndarray"]
"""Gives uint8 memory of some length."""


def new_room(num_bytes: int) -> np.ndarray:
    """Allocates it."""
    return np.empty(num_bytes, np.uint8)


class DecoderProcess:
    """Decodes videos, one at a time, also for several threads.

    A value: copies in other processes start a process of their own.
    """

    def __init__(self, limits: Limits) -> None:
        """Takes the limits; starts nothing yet."""
        self.limits = limits
        self.process: subprocess.Popen[bytes] | None = None
        self._buffer = bytearray()
        self._deadline = 0.0
        self._starter = 0
        self._lock = threading.Lock()
        """Held from a request to the end of its answer."""
        self._end: weakref.finalize | None = None
        """Ends the process, also when this object or the program ends."""
        self._answered = False

    def __getstate__(self) -> dict[str, Any]:
        own = {"process": None, "_end": None, "_buffer": bytearray(), "_lock": None}
        return {**self.__dict__, **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def ask(
        self,
        work: str,
        request: Mapping[str, Any],
        source: Path | Sequence[bytes | memoryview],
        *,
        on_facts: Callable[[dict[str, Any]], None],
        on_array: Callable[[np.ndarray], None],
        room: Room = new_room,
        where: str = "",
    ) -> None:
        """Has something done with a video.

        Args:
          work: "extract", "store" or "read": `shardspec.video.worker`.
          request: What is wanted, in plain JSON types.
          source: A local file, or parts of bytes that are sent one after the other.
          on_facts: Gets each dict of the answer.
          on_array: Gets each array of it.
          room: Gives the memory of the next array.
          where: Named in errors.

        Raises:
          SampleError: What the video is refused for, and `video_process`: the process died, took
            too long, or was refused memory.
          ConfigError: `video_extra`: PyAV is missing.
        """
        parts = () if isinstance(source, Path) else source
        asked = {
            "work": work,
            "path": str(source) if isinstance(source, Path) else None,
            "num_bytes": None if isinstance(source, Path) else sum(map(len, parts)),
            "where": where,
            "time_limit_s": self.limits.time_limit_s,
            "request": request,
        }
        with self._lock:
            self._deadline = time.monotonic() + self.limits.time_limit_s + _GRACE_S
            self._answered = False
            try:
                self._send([json.dumps(asked).encode() + b"\n", *parts])
                self._answer(on_facts, on_array, room, where)
            finally:
                if not self._answered:  # the rest of this answer would be taken for the next one
                    self.close()

    def close(self) -> None:
        """Ends the process."""
        self.process = None
        self._buffer.clear()
        if self._end is not None:
            self._end()

    def __enter__(self) -> DecoderProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(
        self,
        on_facts: Callable[[dict[str, Any]], None],
        on_array: Callable[[np.ndarray], None],
        room: Room,
        where: str,
    ) -> None:
        while True:
            answer = json.loads(self._line(where))
            kind = answer.pop("kind")
            if kind == "array":
                memory = room(answer["num_bytes"])
                self._read_into(memory, where)
                on_array(memory.view(answer["dtype"]).reshape(answer["shape"]))
                continue
            if kind == "facts":
                on_facts(answer)
                continue
            self._answered = True
            if kind == "end":
                return
            if kind == "memory":
                self.close()
                raise SampleError(
                    "video_process.memory", where=where, memory_bytes=self.limits.memory_bytes
                )
            if kind == "failed":
                raise SampleError("video_process.failed", where=where, error=answer["error"])
            error = SampleError if kind == "refused" else ConfigError
            raise error(
                answer["reason"],
                where=where,
                what=answer["what"],
                fix=answer["fix"],
                facts=answer["facts"],
            )

    def _too_long(self, where: str) -> SampleError:
        self.close()
        return SampleError("video_process.time", where=where, limit_s=self.limits.time_limit_s)

    def _started(self) -> subprocess.Popen[bytes]:
        if self.process is not None and self._starter == os.getpid():
            if self.process.poll() is None:
                return self.process
            self.close()
        if importlib.util.find_spec("av") is None:
            raise ConfigError("video_extra", error="No module named 'av'")
        self._buffer.clear()
        self._starter = os.getpid()
        root = str(Path(__file__).parents[2])
        code = (
            # Instead of the working folder, in which anything may be called `av`.
            f"import sys; sys.path[0] = {root!r}; from shardspec.video.worker import main; main()"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(self.limits.memory_bytes), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            close_fds=True,
        )
        self._end = weakref.finalize(self, _end_process, self.process, self._starter)
        assert self.process.stdout is not None
        with suppress(OSError, AttributeError):  # a frame in fewer parts
            fcntl.fcntl(self.process.stdout, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        return self.process

    def _send(self, parts: Sequence[bytes | memoryview]) -> None:
        process = self._started()
        assert process.stdin is not None
        try:
            for part in parts:
                view = memoryview(part)
                while view:
                    view = view[process.stdin.write(view) :]
        except OSError:  # it has died, as the answer will say
            pass

    def _line(self, where: str) -> bytes:
        while (stop := self._buffer.find(b"\n")) < 0:
            stream = self._ready(where)
            part = os.read(stream, _LINE_BYTES)
            self._require(part, where)
            self._buffer += part
        line = bytes(self._buffer[:stop])
        del self._buffer[: stop + 1]
        return line

    def _read_into(self, memory: np.ndarray, where: str) -> None:
        view = memory.data
        done = min(len(view), len(self._buffer))
        view[:done] = self._buffer[:done]
        del self._buffer[:done]
        while done < len(view):
            stream = self._ready(where)
            got = os.readv(stream, [view[done:]])
            self._require(got, where)
            done += got

    def _ready(self, where: str) -> int:
        """Waits until there is something to read."""
        process = self.process
        assert process is not None
        assert process.stdout is not None
        left_s = self._deadline - time.monotonic()
        if left_s <= 0 or not select.select([process.stdout], [], [], left_s)[0]:
            raise self._too_long(where)
        return process.stdout.fileno()

    def _require(self, got: bytes | int, where: str) -> None:
        """Tells how the process ended, where it has."""
        if got:
            return
        assert self.process is not None
        status = self.process.wait()
        if status == -signal.SIGALRM:  # its own limit
            raise self._too_long(where)
        self.close()
        raise SampleError("video_process.died", where=where, status=status)


def _end_process(process: subprocess.Popen[bytes], starter: int) -> None:
    """Ends a process; in another process than the one that started it, such as a fork, nothing."""
    if os.getpid() != starter:
        return
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(OSError):
                stream.close()
