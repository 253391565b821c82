"""The process that decodes: `python -m shardspec.video.worker`, fed through its pipes.

It reads requests from its standard input, one line of JSON each and, where the line says so, the
bytes of the video; and writes answers to its standard output, one line of JSON each and, after a
line that says so, an array such as the pixels of a frame. Errors are answers too. It ends with its
input.

Nothing that a decoder does reaches further than this process: its memory is bounded, and a request
that takes too long ends it (by an alarm whose default action the kernel takes, even inside of a
decoder, and without the parent).
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from shardspec.errors import ConfigError, SampleError
from shardspec.video.clip import read_clip, store_clip
from shardspec.video.extract import Request, extract
from shardspec.video.reader import import_av


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answers requests until there are no more."""

    def say(**answer: Any) -> None:
        answers.write(json.dumps(answer).encode() + b"\n")

    for line in iter(requests.readline, b""):
        asked = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, asked["time_limit_s"])
        source: Path | bytes = Path(asked["path"]) if asked["path"] else b""
        if asked["num_bytes"] is not None:
            source = requests.read(asked["num_bytes"])
        try:
            for part in _work(asked["work"], source, asked["request"], where=asked["where"]):
                if isinstance(part, np.ndarray):
                    say(kind="array", shape=part.shape, dtype=part.dtype.str, num_bytes=part.nbytes)
                    answers.write(part.data)
                else:
                    say(kind="facts", **part)
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
        except Exception as error:  # noqa: BLE001 - whatever a library raises: one video, not all
            say(kind="failed", error=f"{type(error).__name__}: {error}")
        answers.flush()
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def _work(
    work: str, source: Path | bytes, request: dict[str, Any], *, where: str
) -> Iterator[dict[str, Any] | np.ndarray]:
    if work == "extract":
        return extract(source, Request(**request), where=where)
    if work == "store":
        return store_clip(source, Request(**request), where=where)
    assert isinstance(source, bytes)
    return read_clip(source, **request, where=where)


def main() -> None:
    """Runs the process; its arguments are the bound on its memory and the parent's id."""
    memory_bytes, parent = int(sys.argv[1]), int(sys.argv[2])
    with suppress(ConfigError):  # which is told when a video comes
        import_av()
    # The bound is on what decoding takes, not on the libraries.
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
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
