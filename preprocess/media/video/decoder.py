"""VideoDecoder: what a policy chooses of videos, decoded in a process that may hang or die."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from preprocess.media.video.policy import VideoPolicy
from shardspec.video import Request, decoder_process, with_parts

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
    """`shardspec.video.VideoInfo` in plain JSON types."""


class VideoDecoder:
    """Decodes videos, one at a time, also for several threads.

    A value: copies in other processes start a process of their own.
    """

    def __init__(self, policy: VideoPolicy) -> None:
        """Takes the policy; starts nothing yet."""
        self.policy = policy
        self.decoding = decoder_process(policy)

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
          on_frame: Makes of each frame, uint8 [H, W, 3], and the video's info what is kept of it;
            `num_chosen` of the info says how many frames there are.
          start_s: Where the clip begins; None for the beginning.
          end_s: Where it ends, itself left out; None for the end.
          instants_s: Decode the frames nearest to these instants of the video, each once, instead
            of those that the policy chooses; `times_s` are instants of the video then.
          where: Named in errors.

        Raises:
          SampleError, ConfigError: As `extract` and `ChildProcess.ask`.
        """
        frames: list[Frame] = []
        chosen: dict[str, Any] = {}

        def begin(facts: dict[str, Any]) -> None:
            chosen.update(facts)
            frames.clear()

        self._ask(
            "extract",
            source,
            on_facts=begin,
            on_array=lambda pixels: frames.append(
                on_frame(pixels, {**chosen["info"], "num_chosen": len(chosen["times"])})
            ),
            where=where,
            start_s=start_s,
            end_s=end_s,
            instants_s=None if instants_s is None else list(instants_s),
        )
        return VideoFrames(
            frames=frames, times_s=chosen["times"], numbers=chosen["numbers"], info=chosen["info"]
        )

    def clip(
        self,
        source: Path | bytes,
        *,
        start_s: float | None = None,
        end_s: float | None = None,
        where: str = "",
    ) -> tuple[dict[str, Any], np.ndarray, bytes]:
        """Makes the clip that is stored.

        Args:
          source: A local file, or its bytes.
          start_s: Where the clip begins; None for the beginning.
          end_s: Where it ends, itself left out; None for the end.
          where: Named in errors.

        Returns:
          What `shardspec.video.clip.store_clip` yields: facts, table and file; the table has the
          checksums of the file's parts too.

        Raises:
          SampleError, ConfigError: As `store_clip` and `ChildProcess.ask`.
        """
        found: dict[str, Any] = {}
        arrays: list[np.ndarray] = []
        self._ask(
            "store",
            source,
            on_facts=found.update,
            on_array=arrays.append,
            where=where,
            start_s=start_s,
            end_s=end_s,
        )
        table, file = arrays
        whole = file.tobytes()
        return found, with_parts(table, whole), whole

    def _ask(
        self,
        work: str,
        source: Path | bytes,
        *,
        on_facts: Callable[[dict[str, Any]], None],
        on_array: Callable[[np.ndarray], None],
        where: str,
        **clip: Any,
    ) -> None:
        policy = self.policy
        request = Request(
            mode=policy.mode,
            max_frames=policy.max_frames,
            max_fps=policy.max_fps,
            min_spacing_s=policy.min_spacing_s,
            damaged=policy.damaged,
            max_pixels=policy.max_pixels,
            max_bytes=policy.max_clip_bytes,
            **clip,
        )
        self.decoding.ask(
            {"work": work, **asdict(request)},
            source if isinstance(source, Path) else (source,),
            on_facts=on_facts,
            on_array=on_array,
            where=where or (str(source) if isinstance(source, Path) else ""),
        )

    def close(self) -> None:
        """Ends the process."""
        self.decoding.close()

    def __enter__(self) -> VideoDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
