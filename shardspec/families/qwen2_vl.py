"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: pictures of any size, cut into patches without tiles.

Both sides become multiples of patch x merge, the area is kept between two bounds, and merge x merge
patches become one token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from shardspec.errors import SampleError
from shardspec.families.plan import (
    Family,
    Filter,
    PicturePlan,
    PictureTokens,
    Positions,
    Size,
    VideoSide,
    different,
    keep_smaller,
    require_numbers,
)

MOST_ASPECT = 200
"""Longer sides divided by shorter ones beyond which the processor raises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen2VL:
    """The picture side of the models that use `Qwen2VLImageProcessor`."""

    kind: ClassVar[str] = "qwen2_vl"
    positions: ClassVar[Positions] = "mrope"
    type_ids: ClassVar[str] = "mm_token_type_ids"
    packs: ClassVar[bool] = True

    patch_px: int = 14
    merge: int = 2
    """Side of the square of patches that becomes one token."""
    temporal_patch: int = 2
    """Frames of a patch; a picture is repeated."""
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    """Smallest and largest area, in pixels."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    image_token: str = "<|image_pad|>"  # noqa: S105 - a token of text
    filter: Filter = "bicubic"
    video: VideoSide | None = None
    """None for a dataset without videos."""

    def __post_init__(self) -> None:
        require_numbers(self, patch_px=1, merge=1, temporal_patch=1, min_pixels=1, max_pixels=1)

    @property
    def tokens(self) -> PictureTokens:
        marks = () if self.video is None else (self.video.token,)
        return PictureTokens(soft=self.image_token, marks=marks)

    def stored_size(self, size: Size) -> Size:
        return keep_smaller(size, self._resized(size))

    def unlike(self, stored: Family) -> dict[str, str]:
        free = {"min_pixels": False, "max_pixels": True, "mean": False, "std": False}
        return different(self, stored, free=free)

    def plan(self, size: Size) -> PicturePlan:
        """Plans a picture; see `Family.plan`.

        >>> p = Qwen2VL().plan((427, 640))
        >>> p.resized, p.grid, p.num_tokens
        ((420, 644), (30, 46), 345)
        """
        resized = self._resized(size)
        rows, cols = resized[0] // self.patch_px, resized[1] // self.patch_px
        return PicturePlan(
            resized=resized,
            grid=(rows, cols),
            num_units=rows * cols,
            layout=((self.image_token, rows * cols // self.merge**2),),
        )

    def plan_video(self, size: Size, *, num_frames: int) -> PicturePlan:
        """Plans a video.

        Args:
          size: (height, width) of its upright frames.
          num_frames: That are shown; the last one is repeated to fill a patch along time.

        Raises:
          SampleError: `picture_shape`; `model_videos`, it has too few frames.

        >>> side = VideoSide(token="<|video_pad|>", min_pixels=3136, max_pixels=28 * 28 * 768)
        >>> p = Qwen2VL(video=side).plan_video((120, 160), num_frames=5)
        >>> p.resized, p.num_times, p.grid, p.num_units, p.num_tokens
        ((112, 168), 3, (8, 12), 288, 72)
        """
        assert self.video is not None
        resized = self._frame_size(size, num_frames)
        rows, cols = resized[0] // self.patch_px, resized[1] // self.patch_px
        times = -(-num_frames // self.temporal_patch)
        blocks = times if self.video.times == "text" else 1
        return PicturePlan(
            resized=resized,
            grid=(rows, cols),
            num_units=times * rows * cols,
            layout=((self.video.token, times // blocks * rows * cols // self.merge**2),),
            num_frames=num_frames,
            num_times=times,
            num_blocks=blocks,
        )

    def stored_frame_size(self, size: Size, *, num_frames: int) -> Size:
        """Computes the size to store the frames of a video at, as `stored_size`.

        Raises:
          SampleError: As `plan_video`.
        """
        return keep_smaller(size, self._frame_size(size, num_frames))

    def _frame_size(self, size: Size, num_frames: int) -> Size:
        video, factor = self.video, self.patch_px * self.merge
        assert video is not None
        bounds = (video.min_pixels, video.max_pixels)
        if video.area == "frame":
            return self._bounded(size, bounds)
        if num_frames < self.temporal_patch:
            raise SampleError("model_videos.frames", frames=num_frames, least=self.temporal_patch)
        if min(size) < factor:
            scale = max(factor / size[0], factor / size[1])
            size = int(size[0] * scale), int(size[1] * scale)
        return self._bounded(size, bounds, num_frames=num_frames)

    def _resized(self, size: Size) -> Size:
        return self._bounded(size, (self.min_pixels, self.max_pixels))

    def _bounded(self, size: Size, bounds: tuple[int, int], *, num_frames: int = 1) -> Size:
        """Rounds both sides; the area of all frames together is bounded."""
        # The order of the operations is that of the processor, whose roundings are floats'.
        (height, width), (least, most) = size, bounds
        if max(size) / min(size) > MOST_ASPECT:
            raise SampleError("picture_shape", height=height, width=width, most=MOST_ASPECT)
        factor, times = self.patch_px * self.merge, 1
        if num_frames > 1:
            times = round(num_frames / self.temporal_patch) * self.temporal_patch
        h, w = (round(side / factor) * factor for side in size)
        if times * h * w > most:
            beta = math.sqrt((num_frames * height * width) / most)
            h, w = (max(factor, math.floor(side / beta / factor) * factor) for side in size)
        elif times * h * w < least:
            beta = math.sqrt(least / (num_frames * height * width))
            h, w = (math.ceil(side * beta / factor) * factor for side in size)
        return h, w
