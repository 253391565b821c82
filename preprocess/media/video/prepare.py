"""VideoPreparer: the frames of a video as they are stored, images of the model's size.

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
from shardspec.sample import Geometry, PreparedImage
from shardspec.tiling import FrameView


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFrames:
    """What is stored of a video."""

    images: tuple[PreparedImage, ...]
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
        where: str = "",
    ) -> StoredFrames:
        """Makes the frames that are stored.

        Args:
          source: A local file, or its bytes.
          clip: Start and end in seconds; None for the whole video.
          geometry: Which augmentations leave the sample's text true.
          where: Named in errors.

        Raises:
          SampleError: As `VideoDecoder`.
          ConfigError: `video_extra`.
        """
        start_s, end_s = clip or (None, None)

        # Resized as they come, so that a single frame is held at its full size.
        def made(pixels: np.ndarray, info: dict[str, Any]) -> PreparedImage:
            return self._images(_square(pixels, info), geometry=geometry, where=where)

        found = self._decoder(source, made, start_s=start_s, end_s=end_s, where=where)
        record = {
            "frame_times_s": [round(time_s, 6) for time_s in found.times_s],
            "frame_numbers": found.numbers,
            **{name: found.info[name] for name in _RECORDED},
            "clip": None if clip is None else list(clip),
        }
        return StoredFrames(images=tuple(found.frames), times_s=found.times_s, record=record)


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
