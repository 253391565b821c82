"""VideoPreparer: what is stored of a video: frames, images of the model's size, or a clip.

A frame becomes an image as any other does: resized by the policy of images, for views with a single
crop. Its original has square pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from preprocess.media.image import ImagePolicy, ImagePreprocessor
from preprocess.media.video.decoder import VideoDecoder
from preprocess.media.video.policy import VideoPolicy
from shardspec.sample import Geometry, PreparedClip, PreparedImage
from shardspec.tiling import FrameView
from shardspec.video import select_frames


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredVideo:
    """What is stored of a video."""

    images: tuple[PreparedImage, ...] = ()
    """Its frames, where they are stored."""
    clip: PreparedClip | None = None
    """The video itself, otherwise."""
    times_s: list[float]
    """When each frame is shown, in seconds from the beginning of the clip."""
    record: dict[str, Any]
    """For the sample's JSON: times, numbers, and facts of the video."""


class VideoPreparer:
    """Chooses, decodes and resizes frames. A value: it can be sent to worker processes."""

    def __init__(self, video: VideoPolicy, image: ImagePolicy) -> None:
        """Joins the two policies."""
        pool = FrameView(pool=(video.pool, video.pool))
        views = tuple(dict.fromkeys(pool.image_view(view) for view in image.views))
        self._images = ImagePreprocessor(replace(image, views=views))
        self._decoder = VideoDecoder(video)

    def __call__(
        self,
        source: Path | bytes,
        *,
        clip: tuple[float | None, float | None] | None = None,
        geometry: Geometry = Geometry.NONE,
        draws: bool = True,
        where: str = "",
    ) -> StoredVideo:
        """Makes the frames that are stored.

        Args:
          source: A local file, or its bytes.
          clip: Start and end in seconds; None for the whole video.
          geometry: Which augmentations leave the sample's text true.
          draws: Whether training may draw among all frames of a clip; else it has those that the
            policy chooses.
          where: Named in errors.

        Raises:
          SampleError: As `VideoDecoder`.
          ConfigError: `video_extra`.
        """
        start_s, end_s = clip or (None, None)
        if self._decoder.policy.store == "clip":
            stored = self._clip(source, (start_s, end_s), clip is None, geometry, where)
            return stored if draws else _chosen_alone(stored, stored.clip)

        # Resized as they come, so that a single frame is held at its full size.
        def made(pixels: np.ndarray, info: dict[str, Any]) -> PreparedImage:
            frame, number = _square(pixels, info), info["num_chosen"]
            return self._images(frame, geometry=geometry, where=where, num_frames=number)

        found = self._decoder(source, made, start_s=start_s, end_s=end_s, where=where)
        record = {
            "frame_times_s": [round(time_s, 6) for time_s in found.times_s],
            "frame_numbers": found.numbers,
            **{name: found.info[name] for name in _RECORDED},
            "clip": None if clip is None else list(clip),
        }
        return StoredVideo(images=tuple(found.frames), times_s=found.times_s, record=record)

    def _clip(
        self,
        source: Path | bytes,
        clip: tuple[float | None, float | None],
        whole: bool,
        geometry: Geometry,
        where: str,
    ) -> StoredVideo:
        found, table, file = self._decoder.clip(source, start_s=clip[0], end_s=clip[1], where=where)
        info, times_s, numbers = found["info"], found["times"], found["numbers"]
        width, height = found["size"]
        prepared = PreparedClip(
            table=table,
            file=file,
            suffix="video" if found["stored"] == "file" else "mp4",
            num_frames=len(times_s),
            chosen=tuple(numbers),
            width=width,
            height=height,
            source_width=info["width"],
            source_height=info["height"],
            geometry=geometry,
        )
        record = {
            "frame_times_s": [round(times_s[number], 6) for number in numbers],
            "frame_numbers": [found["first"] + number for number in numbers],
            **{name: info[name] for name in _RECORDED},
            "clip": None if whole else list(clip),
            "stored": found["stored"],
        }
        return StoredVideo(clip=prepared, times_s=times_s, record=record)


def _chosen_alone(stored: StoredVideo, clip: PreparedClip | None) -> StoredVideo:
    """Leaves a clip those frames that were chosen; its file stays as it is."""
    assert clip is not None
    times_s = [stored.times_s[number] for number in clip.chosen]
    clip = replace(
        clip,
        table=select_frames(clip.table, clip.chosen),
        num_frames=len(times_s),
        chosen=tuple(range(len(times_s))),
    )
    return replace(stored, clip=clip, times_s=times_s)


def _square(pixels: np.ndarray, info: dict[str, Any]) -> np.ndarray:
    """Enlarges one side of a frame, so that its pixels are square."""
    size = info["width"], info["height"]
    if pixels.shape[1::-1] == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


_RECORDED = (
    *("fps", "num_frames", "start_s", "end_s", "width", "height", "codec", "container"),
    *("rotation", "interlaced", "variable_rate", "decoder", "access", "damaged"),
)
"""Facts of the video that are kept with the sample."""
