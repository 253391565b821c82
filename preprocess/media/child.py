"""A process that reads files with a library that may hang or die: both of its ends.

`ChildProcess` is the end of the caller. The process is started at the first request and serves all
that follow. When it dies, takes too long or is refused memory, that file is refused by name, and
the next one gets a new process. `run_child` is the other end: a module whose `main` calls it is
what the process runs.

A request is a line of JSON and, where the line says so, the bytes of a file. Answers are lines of
JSON, and the bytes of an array after a line that says so; errors are answers too. The process ends
with its input. Nothing that a library does reaches further: memory is bounded, and a request that
takes too long ends the process, by an alarm whose default action the kernel takes, even inside of
a library, and without the parent.
"""

from __future__ import annotations

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
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from shardspec.errors import ConfigError, SampleError

Part = dict[str, Any] | np.ndarray
"""Plain JSON types, or uint8 of any shape."""

Work = Callable[[dict[str, Any], bytes | None, str], Iterator[Part]]
"""Answers a request: what was requested, the bytes of the file, and what it is called."""

_GRACE_S = 2.0
"""Seconds after which a process that has not ended itself in time is killed."""

_READ_BYTES = 1 << 20


class ChildProcess:
    """Reads files, one at a time, also for several threads.

    A value: copies in other processes start a process of their own.
    """

    def __init__(self, module: str, *, reason: str, memory_bytes: int) -> None:
        """Starts nothing yet.

        Args:
          module: Its `main` is run.
          reason: Of errors: an entry of `errors.toml` with `died`, `failed`, `memory` and `time`.
          memory_bytes: What the process may take beyond its libraries.
        """
        self._module, self._reason, self._memory_bytes = module, reason, memory_bytes
        self.process: subprocess.Popen[bytes] | None = None
        """The running one."""
        self._buffer = bytearray()
        self._deadline = 0.0
        self._limit_s = 0.0
        self._starter = 0
        self._lock = threading.Lock()
        """Held from a request to the end of its answer."""
        self._end: weakref.finalize | None = None
        """Ends the process, also when this object or the program ends."""

    def __getstate__(self) -> dict[str, Any]:
        own = {"process": None, "_end": None, "_buffer": bytearray(), "_lock": None}
        return {**self.__dict__, **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def ask(
        self,
        request: Mapping[str, Any],
        payload: bytes | None = None,
        *,
        time_limit_s: float,
        where: str = "",
    ) -> Generator[Part, None, None]:
        """Sends a request, and gives the parts of its answer.

        Args:
          request: In plain JSON types.
          payload: The bytes of a file.
          time_limit_s: Of the whole answer.
          where: Named in errors.

        Raises:
          SampleError: What the work raises; `reason` of this object: the process died, took too
            long, was refused memory, or its library raised something.
          ConfigError: What the work raises.
        """
        asked = {
            "request": dict(request),
            "num_bytes": None if payload is None else len(payload),
            "where": where,
            "time_limit_s": time_limit_s,
        }
        with self._lock:
            self._limit_s = time_limit_s
            self._deadline = time.monotonic() + time_limit_s + _GRACE_S
            answered = False
            try:
                self._send(json.dumps(asked).encode() + b"\n", payload)
                while True:
                    answer = json.loads(self._line(where))
                    kind = answer["kind"]
                    if kind == "array":
                        shape = tuple(answer["shape"])
                        pixels = np.frombuffer(self._read(int(np.prod(shape)), where), np.uint8)
                        yield pixels.reshape(shape)
                    elif kind == "part":
                        yield answer["part"]
                    else:
                        answered = True
                        if kind == "end":
                            return
                        raise self._error(answer, where)
            finally:
                if not answered:  # the rest of this answer would be taken for the next one
                    self.close()

    def close(self) -> None:
        """Ends the process."""
        self.process = None
        self._buffer.clear()
        if self._end is not None:
            self._end()

    def _error(self, answer: Mapping[str, Any], where: str) -> SampleError | ConfigError:
        kind = answer["kind"]
        if kind == "memory":
            self.close()
            limit = self._memory_bytes
            return SampleError(f"{self._reason}.memory", where=where, memory_bytes=limit)
        if kind == "failed":
            return SampleError(f"{self._reason}.failed", where=where, error=answer["error"])
        error = SampleError if kind == "refused" else ConfigError
        return error(
            answer["reason"],
            where=where,
            what=answer["what"],
            fix=answer["fix"],
            facts=answer["facts"],
        )

    def _too_long(self, where: str) -> SampleError:
        self.close()
        return SampleError(f"{self._reason}.time", where=where, limit_s=self._limit_s)

    def _started(self) -> subprocess.Popen[bytes]:
        if self.process is not None and self._starter == os.getpid():
            if self.process.poll() is None:
                return self.process
            self.close()
        self._buffer.clear()
        self._starter = os.getpid()
        root = str(Path(__file__).parents[2])
        code = (
            # Instead of the working folder, in which anything may have the name of a library.
            f"import sys; sys.path[0] = {root!r}; from {self._module} import main; main()"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(self._memory_bytes), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            close_fds=True,
        )
        self._end = weakref.finalize(self, _end_process, self.process, self._starter)
        return self.process

    def _send(self, line: bytes, payload: bytes | None) -> None:
        process = self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(line)
            if payload is not None:
                view = memoryview(payload)
                while view:
                    view = view[process.stdin.write(view) :]
        except OSError:  # it has died, as the answer will say
            pass

    def _line(self, where: str) -> bytes:
        while (stop := self._buffer.find(b"\n")) < 0:
            self._fill(where)
        line = bytes(self._buffer[:stop])
        del self._buffer[: stop + 1]
        return line

    def _read(self, num_bytes: int, where: str) -> bytes:
        while len(self._buffer) < num_bytes:
            self._fill(where)
        found = bytes(self._buffer[:num_bytes])
        del self._buffer[:num_bytes]
        return found

    def _fill(self, where: str) -> None:
        process = self.process
        assert process is not None
        assert process.stdout is not None
        left_s = self._deadline - time.monotonic()
        if left_s <= 0 or not select.select([process.stdout], [], [], left_s)[0]:
            raise self._too_long(where)
        part = os.read(process.stdout.fileno(), _READ_BYTES)
        if not part:
            status = process.wait()
            if status == -signal.SIGALRM:  # its own limit
                raise self._too_long(where)
            self.close()
            raise SampleError(f"{self._reason}.died", where=where, status=status)
        self._buffer += part


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


# --- the process itself


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
    limit = memory_bytes + mapped_pages * resource.getpagesize()
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
        payload = None if asked["num_bytes"] is None else requests.read(asked["num_bytes"])
        signal.setitimer(signal.ITIMER_REAL, asked["time_limit_s"])
        try:
            for part in work(asked["request"], payload, asked["where"]):
                if isinstance(part, np.ndarray):
                    say(kind="array", shape=part.shape)
                    answers.write(part.data)
                else:
                    say(kind="part", part=part)
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
