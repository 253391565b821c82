"""VideoPolicy: which frames of a video are stored, and what decoding may take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from preprocess.settings import Setting
from preprocess.sizes import parse_bytes
from shardspec.errors import ConfigError
from shardspec.frames import FrameMode, FrameSampling

StoredMode = Literal["uniform", "uniform_last", "fps", "adaptive"]
"""Modes of `shardspec.frames` without draws: those are made at load, among what is stored."""

Damaged = Literal["keep", "refuse"]

Subtitles = Literal["frames", "after", "none"]
Stored = Literal["frames", "clip"]

MAX_CLIP_BYTES = 1 << 29


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoPolicy:
    """How videos are stored: as some of their frames, each an image of the model's size, or as the
    clip itself.

    Raises:
      ConfigError: `video_policy`, `frame_sampling`.
    """

    store: Annotated[
        Stored,
        Setting(
            "what is stored of a video: its frames as images, or the clip, decoded at load",
            flag="video-store",
            group="videos",
        ),
    ] = "frames"
    mode: Annotated[
        StoredMode,
        Setting("how frames are chosen", flag="frames", group="videos"),
    ] = "uniform_last"
    """A mode of `shardspec.frames`; training draws among the frames that are stored. Of a clip all
    are: the mode says how many frames an example has, and which ones in an evaluation."""
    max_frames: Annotated[int, Setting("most frames of a video", group="videos")] = 64
    max_fps: Annotated[
        float,
        Setting("frames per second of --frames uniform_last, as far as they fit", group="videos"),
    ] = 2.0
    min_spacing_s: Annotated[
        float, Setting("least seconds between two frames", flag="frame-spacing", group="videos")
    ] = 0.0
    pool: Annotated[
        int,
        Setting(
            "patches of a frame pooled into a token, along each side",
            flag="frame-pool",
            group="videos",
        ),
    ] = 3
    damaged: Annotated[
        Damaged,
        Setting(
            "keep the sound frames of a damaged video, or refuse it",
            flag="damaged-videos",
            group="videos",
        ),
    ] = "keep"
    subtitles: Annotated[
        Subtitles,
        Setting("where subtitles are: among the frames, after them, or nowhere", group="videos"),
    ] = "frames"
    """"frames": before the first frame that is shown later; "after": all of them behind the last
    frame (Molmo 2)."""
    subtitle_tokens: Annotated[
        int, Setting("most tokens of the subtitles of a video; 0 for any", group="videos")
    ] = 0
    subtitle_window_s: Annotated[
        float,
        Setting(
            "leave out subtitles that are more seconds from every stored frame; 0 for none",
            flag="subtitle-window",
            group="videos",
        ),
    ] = 0.0
    time_limit_s: Annotated[
        float,
        Setting(
            "seconds after which a video that is still being decoded is refused",
            flag="video-time",
            group="videos",
        ),
    ] = 300.0
    memory_bytes: Annotated[
        int,
        Setting(
            "memory that decoding a video may take",
            flag="video-memory",
            group="videos",
            metavar="SIZE",
            parse=parse_bytes,
            shown="4GB",
        ),
    ] = 4_000_000_000
    max_pixels: int = 1 << 26
    """Pixels of the largest picture that is decoded, 8192 x 8192."""
    max_clip_bytes: int = MAX_CLIP_BYTES
    """Length of the longest clip that is stored: its sample is read as a whole."""

    def __post_init__(self) -> None:
        checks = {
            "pool": isinstance(self.pool, int) and self.pool >= 1,
            "damaged": self.damaged in get_args(Damaged),
            "subtitles": self.subtitles in get_args(Subtitles),
            "subtitle_tokens": isinstance(self.subtitle_tokens, int) and self.subtitle_tokens >= 0,
            "subtitle_window_s": 0 <= self.subtitle_window_s < math.inf,
            "time_limit_s": self.time_limit_s >= 1,
            "memory_bytes": self.memory_bytes >= 1 << 20,
            "max_pixels": self.max_pixels >= 1,
            "mode": self.mode in get_args(StoredMode),
            "store": self.store in get_args(Stored),
            "max_clip_bytes": 1 <= self.max_clip_bytes < 1 << 31,
        }
        wrong = {name: getattr(self, name) for name, good in checks.items() if not good}
        if wrong:
            raise ConfigError("video_policy", facts=wrong)
        _ = self.sampling

    @property
    def sampling(self) -> FrameSampling:
        """How frames are chosen."""
        mode: FrameMode = self.mode
        return FrameSampling(
            mode=mode,
            max_frames=self.max_frames,
            max_fps=self.max_fps,
            min_spacing_s=self.min_spacing_s,
        )

    def to_dict(self) -> dict[str, Any]:
        """Gives what samples follow from, in plain JSON types."""
        # What came later is told where it differs: the recipes of older datasets stay as they are.
        later = {"store": "frames", "max_clip_bytes": MAX_CLIP_BYTES}
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {n: value for n, value in values.items() if n not in later or value != later[n]}
