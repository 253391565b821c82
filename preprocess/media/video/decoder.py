"""VideoDecoder: frames of a video, decoded in a process that may hang or die.

The process and what its end costs: `preprocess.media.child`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from preprocess.media.child import ChildProcess
from preprocess.media.video.extract import Request
from preprocess.media.video.policy import VideoPolicy
from shardspec.errors import ConfigError

Frame = TypeVar("Frame")


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
        self.child = ChildProcess(
            "preprocess.media.video.worker",
            reason="video_process",
            memory_bytes=policy.memory_bytes,
        )

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
        if importlib.util.find_spec("av") is None:
            raise ConfigError("video_extra", error="No module named 'av'")
        asked = asdict(request)
        if isinstance(source, Path):
            asked["path"] = str(source)
        payload = source if isinstance(source, bytes) else None
        frames: list[Frame] = []
        chosen: dict[str, Any] = {}
        parts = self.child.ask(asked, payload, time_limit_s=policy.time_limit_s, where=where)
        with closing(parts):  # at once, not when the garbage is collected
            for part in parts:
                if isinstance(part, dict):
                    chosen, frames = part, []
                else:
                    frames.append(on_frame(part, chosen["info"]))
        return VideoFrames(
            frames=frames,
            times_s=chosen["times"],
            numbers=chosen["numbers"],
            info=chosen["info"],
        )

    def close(self) -> None:
        """Ends the process."""
        self.child.close()

    def __enter__(self) -> VideoDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
