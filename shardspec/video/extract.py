"""From a video file to the frames that are stored of it: choose, then decode.

Pure but for the file: the same file, sampling and versions of the libraries give the same frames.
`worker` runs it in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shardspec.errors import SampleError
from shardspec.frames import FrameSampling, choose_frames, clip_frames
from shardspec.video.reader import MissingFrameError, VideoInfo, VideoReader

THUMBNAIL_PX = 32
"""Side of the pictures that the change from frame to frame is measured on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is wanted of a video, in plain JSON types."""

    mode: str
    max_frames: int
    max_fps: float | None = None
    min_spacing_s: float = 0.0
    start_s: float | None = None
    """Where the clip begins; None for the beginning of the video."""
    end_s: float | None = None
    damaged: str = "keep"
    max_pixels: int = 1 << 26
    max_bytes: int = 0
    """Longest clip that is stored; for `store_clip`."""
    instants_s: list[float] | None = None
    """Instants of the video whose nearest frames are wanted, whatever the sampling and the clip."""

    @property
    def sampling(self) -> FrameSampling:
        """How frames are chosen."""
        return FrameSampling(
            mode=self.mode,  # type: ignore[arg-type]
            max_frames=self.max_frames,
            max_fps=self.max_fps,
            min_spacing_s=self.min_spacing_s,
        )


def extract(
    source: Path | bytes, request: Request, *, where: str
) -> Iterator[dict[str, Any] | np.ndarray]:
    """Decodes the frames that a request chooses.

    Yields:
      A dict with the video's `info` and the `times` of the frames, in seconds from the beginning of
      the clip; then their pixels, uint8 [H, W, 3] each. Where the file turns out to have other
      frames than its index says, another dict follows, and all frames again.

    Raises:
      SampleError: As `VideoReader`, and `video_clip` (no frame in the clip), `video_damaged`.
    """
    with VideoReader(source, where=where, max_pixels=request.max_pixels) as reader:
        while True:
            try:
                yield from _extracted(reader, request, where)
            except MissingFrameError:
                reader.rescan()
            else:
                return


def _extracted(
    reader: VideoReader, request: Request, where: str
) -> Iterator[dict[str, Any] | np.ndarray]:
    info = reader.info
    if request.instants_s is not None:
        require_sound(info, request, where)
        times_N = reader.times_N
        numbers = nearest_frames(times_N, request.instants_s)
        yield {
            "info": asdict(info),
            "times": times_N[numbers].tolist(),
            "numbers": numbers.tolist(),
        }
        yield from reader.read(numbers.tolist())
        return
    chosen = choose(reader, request, where)
    numbers = chosen.numbers + chosen.first
    yield {
        "info": asdict(info),
        "times": chosen.times_s[chosen.numbers].tolist(),
        "numbers": numbers.tolist(),
    }
    yield from reader.read(numbers.tolist())


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The frames of a clip, and those of them that a request chooses."""

    first: int
    """Number of the clip's first frame, among all of the video."""
    times_s: np.ndarray
    """When each frame of the clip is shown, float64, in seconds from its beginning."""
    numbers: np.ndarray
    """Of the frames that are chosen, counted from the first of the clip."""


def choose(reader: VideoReader, request: Request, where: str) -> Chosen:
    """Finds the frames of the clip that a request names, and chooses among them.

    Raises:
      SampleError: `video_clip` (no frame in the clip), `video_damaged`.
      MissingFrameError: As `VideoReader.read`, for mode "adaptive".
    """
    info = reader.info
    require_sound(info, request, where)
    times_N = reader.times_N
    part = clip_frames(times_N, start_s=request.start_s, end_s=request.end_s)
    first, stop = part.start, part.stop if part.stop is not None else len(times_N)
    begins_late = request.start_s is not None and request.start_s >= info.end_s
    if first >= stop or begins_late:
        raise SampleError(
            "video_clip.empty",
            where=where,
            start_s=request.start_s,
            end_s=request.end_s,
            duration_s=round(info.end_s, 3),
        )
    clip_N = times_N[first:stop]
    end_s = info.end_s if stop == len(times_N) else float(times_N[stop])
    end_s = end_s if request.end_s is None else min(end_s, request.end_s)
    change_N = None
    if request.mode == "adaptive":
        change_N = content_change(reader, first, stop)
    numbers = choose_frames(clip_N, request.sampling, end_s=end_s, change_N=change_N)
    times_s = np.maximum(clip_N - (request.start_s or 0.0), 0.0)
    return Chosen(first=first, times_s=times_s, numbers=numbers)


def require_sound(info: VideoInfo, request: Request, where: str) -> None:
    """Refuses a damaged video, where the request does.

    Raises:
      SampleError: `video_damaged`.
    """
    if info.damaged and request.damaged == "refuse":
        raise SampleError("video_damaged", where=where, damaged=info.damaged)


def nearest_frames(times_N: np.ndarray, instants_s: Sequence[float]) -> np.ndarray:
    """Finds the frames whose timestamps are nearest to some instants; of two the earlier.

    Returns:
      Numbers of frames, int64, strictly ascending: one that is nearest to several is there once.

    >>> nearest_frames(np.array([0.0, 0.1, 0.2]), [0.16, 0.05, 9.0]).tolist()
    [0, 2]
    """
    instants = np.asarray(instants_s, np.float64)
    after = np.clip(np.searchsorted(times_N, instants), 1, max(len(times_N) - 1, 1))
    after = np.minimum(after, len(times_N) - 1)
    before = np.maximum(after - 1, 0)
    nearer = times_N[after] - instants < instants - times_N[before]
    return np.unique(np.where(nearer, after, before))


def content_change(reader: VideoReader, first: int, stop: int) -> np.ndarray:
    """Measures how much each frame differs from the one before it.

    Args:
      reader: The video.
      first: Number of the first frame.
      stop: One past the last frame.

    Returns:
      float64 [stop - first]: mean absolute difference of the frames at 32 x 32 pixels, as a share
      of the full range; 0 for the first.
    """
    before: np.ndarray | None = None
    change = []
    for small in reader.thumbnails(first, stop, THUMBNAIL_PX):
        after = small.astype(np.int16)
        change.append(0.0 if before is None else float(np.abs(after - before).mean()) / 255)
        before = after
    return np.array(change)
