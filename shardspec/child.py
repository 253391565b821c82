"""A process that reads files with a library that may hang or die: both of its ends.

`ChildProcess` is the end of the caller. The process is started at the first file and serves all
that follow. When it dies, takes too long or is refused memory, that file is refused by name, and
the next one gets a new process. `run_child` is the other end: what the process runs.

A request is a line of JSON and, where the line says so, the bytes of a file. Answers are lines of
JSON, and the bytes of an array after a line that says so; errors are answers too. The process ends
with its input. Nothing that a library does reaches further: memory is bounded, and a request that
takes too long ends the process, by an alarm whose default action the kernel takes, even inside of a
library, and without the parent.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from shardspec.errors import ConfigError, SampleError

_GRACE_S = 2.0
"""Seconds after which a process that has not ended itself in time is killed."""

_PIPE_BYTES = 1 << 20

_MAX_POLL_MS = 2**31 - 1

_MAX_TIME_S, _MAX_MEMORY_BYTES = 10.0**8, 2**62
"""Clocks and limits of systems count no further; nothing takes as much."""

_LINE_BYTES = 1 << 12
"""Read at a time where a line is expected: what follows goes straight to where it is wanted."""


class Limits(Protocol):
    """What reading a file may take."""

    @property
    def time_limit_s(self) -> float:
        """Seconds for one request."""

    @property
    def memory_bytes(self) -> int:
        """Memory beside that of the libraries."""


Part = dict[str, Any] | np.ndarray
"""Of an answer: plain JSON types, or an array."""

Work = Callable[[dict[str, Any], Path | bytes, str], Iterator[Part]]
"""Answers a request: what is wanted, the file, and what it is called."""

Room = Callable[[int], "np.ndarray"]
"""Gives uint8 memory of some length."""


def new_room(num_bytes: int) -> np.ndarray:
    """Allocates it."""
    return np.empty(num_bytes, np.uint8)


class ChildProcess:
    """Reads files, one at a time, also for several threads.

    A value: copies in other processes start a process of their own.
    """

    def __init__(self, module: str, *, reason: str, limits: Limits) -> None:
        """Starts nothing yet.

        Args:
          module: Its `main`, which calls `run_child`, is what the process runs.
          reason: Of errors: one of `errors.toml` with `died`, `failed`, `memory` and `time`.
          limits: Of each request.
        """
        self._module, self._reason, self.limits = module, reason, limits
        self.process: subprocess.Popen[bytes] | None = None
        self._buffer = bytearray()
        self._deadline = 0.0
        self._starter = 0
        self._lock = threading.Lock()
        """Held from a request to the end of its answer."""
        self._end: weakref.finalize | None = None
        """Ends the process, also when this object or the program ends."""
        self._answered = False
        _children.add(self)

    def __getstate__(self) -> dict[str, Any]:
        own = {"process": None, "_end": None, "_buffer": bytearray(), "_lock": None}
        return {**self.__dict__, **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
        _children.add(self)

    def renew_lock(self) -> None:
        """Frees it in a fork: the thread that held it is not there."""
        self._lock = threading.Lock()

    def ask(
        self,
        request: Mapping[str, Any],
        source: Path | Sequence[bytes | memoryview],
        *,
        on_facts: Callable[[dict[str, Any]], None],
        on_array: Callable[[np.ndarray], None],
        room: Room = new_room,
        where: str = "",
    ) -> None:
        """Has something done with a file.

        Args:
          request: What is wanted, in plain JSON types.
          source: A local file, or parts of bytes that are sent one after the other.
          on_facts: Gets each dict of the answer.
          on_array: Gets each array of it.
          room: Gives the memory of the next array.
          where: Named in errors.

        Raises:
          SampleError: What the file is refused for; the reason of this object: the process died,
            took too long, was refused memory, or its library raised something.
          ConfigError: What the work raises.
        """
        parts = () if isinstance(source, Path) else source
        limit_s = min(self.limits.time_limit_s, _MAX_TIME_S)
        asked = {
            "path": str(source) if isinstance(source, Path) else None,
            "num_bytes": None if isinstance(source, Path) else sum(map(len, parts)),
            "where": where,
            "time_limit_s": limit_s,
            "request": dict(request),
        }
        with self._lock:
            self._deadline = time.monotonic() + limit_s + _GRACE_S
            self._answered = False
            try:
                self._send([json.dumps(asked).encode() + b"\n", *parts], where)
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

    def __enter__(self) -> ChildProcess:
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
                on_facts(answer["facts"])
                continue
            self._answered = True
            if kind == "end":
                return
            if kind == "memory":
                self.close()
                raise SampleError(
                    f"{self._reason}.memory", where=where, memory_bytes=self.limits.memory_bytes
                )
            if kind == "failed":
                raise SampleError(f"{self._reason}.failed", where=where, error=answer["error"])
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
        return SampleError(f"{self._reason}.time", where=where, limit_s=self.limits.time_limit_s)

    def _started(self) -> subprocess.Popen[bytes]:
        if self.process is not None and self._starter == os.getpid():
            if self.process.poll() is None:
                return self.process
            self.close()
        self._buffer.clear()
        self._starter = os.getpid()
        root = str(Path(__file__).parents[1])
        code = (
            # Instead of the working folder, in which anything may have the name of a library.
            f"import sys; sys.path[0] = {root!r}; from {self._module} import main; main()"
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
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdin.fileno(), False)  # writing to it has a limit
        with suppress(OSError, AttributeError):  # a frame in fewer parts
            fcntl.fcntl(self.process.stdout, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        return self.process

    def _send(self, parts: Sequence[bytes | memoryview], where: str) -> None:
        process = self._started()
        assert process.stdin is not None
        try:
            for part in parts:
                view = memoryview(part)
                while view:
                    self._wait(process.stdin.fileno(), select.POLLOUT, where)
                    view = view[process.stdin.write(view) or 0 :]
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
        self._wait(process.stdout.fileno(), select.POLLIN, where)
        return process.stdout.fileno()

    def _wait(self, stream: int, event: int, where: str) -> None:
        """Waits for a pipe until the deadline; `poll`, as `select` has no numbers above 1,023."""
        poll = select.poll()
        poll.register(stream, event)
        left_s = self._deadline - time.monotonic()
        if left_s <= 0 or not poll.poll(min(left_s * 1000, _MAX_POLL_MS)):
            raise self._too_long(where)

    def _require(self, got: bytes | int, where: str) -> None:
        """Tells how the process ended, where it has."""
        if got:
            return
        assert self.process is not None
        status = self.process.wait()
        if status == -signal.SIGALRM:  # its own limit
            raise self._too_long(where)
        self.close()
        raise SampleError(f"{self._reason}.died", where=where, status=status)


_children: weakref.WeakSet[ChildProcess] = weakref.WeakSet()
"""All of this process, for its forks."""


def _renew_locks() -> None:
    for child in list(_children):
        child.renew_lock()


os.register_at_fork(after_in_child=_renew_locks)


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


# The process itself.


def run_child(work: Work, *, load: Callable[[], object]) -> None:
    """Runs the process; its arguments are the bound on its memory and the parent's id.

    Args:
      work: Answers a request.
      load: Imports the library, which the bound does not count.
    """
    memory_bytes, parent = int(sys.argv[1]), int(sys.argv[2])
    with suppress(ConfigError):  # which is told when a file comes
        load()
    mapped_pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = min(memory_bytes, _MAX_MEMORY_BYTES) + mapped_pages * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:  # a limit of the user's own cannot be raised
        limit = min(limit, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if os.getppid() != parent:
        return
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is not an answer
    _serve(sys.stdin.buffer, answers, work)


def _serve(requests: BinaryIO, answers: BinaryIO, work: Work) -> None:
    """Answers requests until there are no more."""

    def say(**answer: Any) -> None:
        answers.write(json.dumps(answer).encode() + b"\n")

    for line in iter(requests.readline, b""):
        asked = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, asked["time_limit_s"])
        source: Path | bytes = Path(asked["path"]) if asked["path"] else b""
        try:
            if asked["num_bytes"] is not None:
                source = requests.read(asked["num_bytes"])
            for part in work(asked["request"], source, asked["where"]):
                if isinstance(part, np.ndarray):
                    say(kind="array", shape=part.shape, dtype=part.dtype.str, num_bytes=part.nbytes)
                    answers.write(part.data)
                else:
                    say(kind="facts", facts=part)
            say(kind="end")
        except (MemoryError, BlockingIOError):  # the latter: a thread could not be started
            say(kind="memory")
        except (SampleError, ConfigError) as error:
            facts = {name: str(value) for name, value in error.facts.items()}
            say(
                kind="refused" if isinstance(error, SampleError) else "config",
                reason=error.reason,
                what=error.what,
                fix=error.fix,
                facts=facts,
            )
        except Exception as error:  # noqa: BLE001 - whatever a library raises: one file, not all
            say(kind="failed", error=f"{type(error).__name__}: {error}")
        answers.flush()
        signal.setitimer(signal.ITIMER_REAL, 0.0)
