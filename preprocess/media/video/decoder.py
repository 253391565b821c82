"""VideoDecoder: frames of a video, decoded in a process that may hang or die.

The process is started at the first video and serves all that follow. When it dies, takes too long
or is refused memory, that video is refused by name, and the next one gets a new process.
"""

from __future__ import annotations

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
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from preprocess.media.video.extract import Request
from preprocess.media.video.policy import VideoPolicy
from shardspec.errors import ConfigError, SampleError

Frame = TypeVar("Frame")

_GRACE_S = 2.0
"""Seconds after which a process that has not ended itself in time is killed."""

_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoFrames(Generic[Frame]):
    """The frames that were chosen of a video."""

    frames: list[Frame]
    times_s: list[float]
    """When each is shown, in seconds from the beginning of the clip, ascending."""
    numbers: list[int]
    """Which frames of the video they are, from 0."""
    info: dict[str, Any]
    """`preprocess.media.video.VideoInfo` in plain JSON types."""


class VideoDecoder:
    """Decodes videos, one at a time, also for several threads.

    A value: copies in other processes start a process of their own.
    """

    def __init__(self, policy: VideoPolicy) -> None:
        """Takes the policy; starts nothing yet."""
        self.policy = policy
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = bytearray()
        self._deadline = 0.0
        self._starter = 0
        self._lock = threading.Lock()
        """Held from a request to the end of its answer."""
        self._end: weakref.finalize | None = None
        """Ends the process, also when this object or the program ends."""
        self._answered = False

    def __getstate__(self) -> dict[str, Any]:
        own = {"_process": None, "_end": None, "_buffer": bytearray(), "_lock": None}
        return {**self.__dict__, **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def __call__(
        self,
        source: Path | bytes,
        on_frame: Callable[[np.ndarray, dict[str, Any]], Frame],
        *,
        start_s: float | None = None,
        end_s: float | None = None,
        instants_s: Sequence[float] | None = None,
        where: str = "",
    ) -> VideoFrames[Frame]:
        """Decodes the frames that the policy chooses.

        Args:
          source: A local file, or its bytes.
          on_frame: Makes of each frame, uint8 [H, W, 3], and the video's info what is kept of it.
          start_s: Where the clip begins; None for the beginning.
          end_s: Where it ends, itself left out; None for the end.
          instants_s: Decode the frames nearest to these instants of the video, each once, instead
            of those that the policy chooses; `times_s` are instants of the video then.
          where: Named in errors.

        Raises:
          SampleError: As `extract`, and `video_process`: the process died, took too long, or was
            refused memory.
          ConfigError: `video_extra`: PyAV is missing.
        """
        policy = self.policy
        where = where or (str(source) if isinstance(source, Path) else "")
        request = Request(
            mode=policy.mode,
            max_frames=policy.max_frames,
            max_fps=policy.max_fps,
            min_spacing_s=policy.min_spacing_s,
            start_s=start_s,
            end_s=end_s,
            damaged=policy.damaged,
            max_pixels=policy.max_pixels,
            instants_s=None if instants_s is None else list(instants_s),
        )
        payload = source if isinstance(source, bytes) else None
        asked = {
            "path": None if payload is not None else str(source),
            "num_bytes": None if payload is None else len(payload),
            "where": where,
            "time_limit_s": policy.time_limit_s,
            "request": asdict(request),
        }
        with self._lock:
            self._deadline = time.monotonic() + policy.time_limit_s + _GRACE_S
            self._answered = False
            try:
                self._send(json.dumps(asked).encode() + b"\n", payload)
                return self._answer(on_frame, where)
            finally:
                if not self._answered:  # the rest of this answer would be taken for the next one
                    self.close()

    def close(self) -> None:
        """Ends the process."""
        self._process = None
        self._buffer.clear()
        if self._end is not None:
            self._end()

    def __enter__(self) -> VideoDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(
        self, on_frame: Callable[[np.ndarray, dict[str, Any]], Frame], where: str
    ) -> VideoFrames[Frame]:
        frames: list[Frame] = []
        chosen: dict[str, Any] = {}
        while True:
            answer = json.loads(self._line(where))
            kind = answer.pop("kind")
            if kind == "frame":
                shape = tuple(answer["shape"])
                pixels = np.frombuffer(self._read(int(np.prod(shape)), where), np.uint8)
                frames.append(on_frame(pixels.reshape(shape), chosen["info"]))
                continue
            if kind == "frames":
                chosen, frames = answer, []
                continue
            self._answered = True
            if kind == "end":
                return VideoFrames(
                    frames=frames,
                    times_s=chosen["times"],
                    numbers=chosen["numbers"],
                    info=chosen["info"],
                )
            if kind == "memory":
                self.close()
                raise SampleError(
                    "video_process.memory", where=where, memory_bytes=self.policy.memory_bytes
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
        return SampleError("video_process.time", where=where, limit_s=self.policy.time_limit_s)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._starter == os.getpid():
            if self._process.poll() is None:
                return self._process
            self.close()
        if importlib.util.find_spec("av") is None:
            raise ConfigError("video_extra", error="No module named 'av'")
        self._buffer.clear()
        self._starter = os.getpid()
        root = str(Path(__file__).parents[3])
        code = (
            # Instead of the working folder, in which anything may be called `av`.
            f"import sys; sys.path[0] = {root!r}; "
            "from preprocess.media.video.worker import main; main()"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, str(self.policy.memory_bytes), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            close_fds=True,
        )
        self._end = weakref.finalize(self, _end_process, self._process, self._starter)
        return self._process

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
        process = self._process
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
            raise SampleError("video_process.died", where=where, status=status)
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
