"""VideoPreprocessor: from the decoded frames of a video to the tensor that a model takes.

For frames that are in memory already. Videos in shards are stored as frames, and go the way of
images (`loader.assembly.assemble`).
"""

from __future__ import annotations

import numpy as np
import torch

from loader.assembly.augment import Resample
from loader.assembly.pixels import Normalization, normalize, render, resize
from shardspec.errors import ConfigError
from shardspec.frames import FrameMode, FrameSampling, choose_frames
from shardspec.tiling import ImageView

_THUMBNAIL_PX = 32


class VideoPreprocessor:
    """Samples frames, resizes and normalises each, and stacks them."""

    def __init__(
        self,
        *,
        view: ImageView | None = None,
        sampling: FrameMode = "uniform_last",
        normalize: Normalization | None = "siglip",
        resample: Resample = "bicubic",
    ) -> None:
        """Takes the settings.

        Args:
          view: Size of a frame and how it is fitted; None for 336 px, stretched. Views with tiles
            are for images: of a frame the overview is taken.
          sampling: A mode of `shardspec.frames`: "uniform", "uniform_last", "fps", "random" or
            "adaptive".
          normalize: "imagenet", "openai" or "siglip" give float32; None leaves uint8.
          resample: Filter of the resize.
        """
        self.view = ImageView() if view is None else view
        self.sampling: FrameMode = sampling
        self.normalize, self.resample = normalize, resample
        FrameSampling(mode=sampling)  # refuses unknown modes

    def __call__(
        self,
        video: np.ndarray,
        max_frames: int = 16,
        *,
        fps: float | None = None,
        max_fps: float | None = None,
        rng: np.random.RandomState | None = None,
    ) -> torch.Tensor:
        """Makes the tensor of a video.

        Args:
          video: uint8 [T, H, W, 3], T >= 1.
          max_frames: Most frames, >= 1.
          fps: Frames per second of `video`; None counts in frames: one per second.
          max_fps: Most frames per second of mode "uniform_last"; None: as many as may be.
          rng: For mode "random".

        Returns:
          float32 [T', 3, S, S], or uint8 without normalisation; T' <= max_frames, in order.

        Raises:
          ConfigError: `video_array`: of another shape or type; `frame_sampling`.
        """
        return self._tensor(
            video[self.choose(video, max_frames, fps=fps, max_fps=max_fps, rng=rng)]
        )

    def choose(
        self,
        video: np.ndarray,
        max_frames: int = 16,
        *,
        fps: float | None = None,
        max_fps: float | None = None,
        rng: np.random.RandomState | None = None,
    ) -> np.ndarray:
        """Gives the numbers of the frames that `__call__` takes: int64 [T'], ascending."""
        fits = isinstance(video, np.ndarray) and video.ndim == 4 and video.shape[-1] == 3
        if not fits or video.dtype != np.uint8 or not video.size or (fps is not None and fps <= 0):
            shape = getattr(video, "shape", None)
            raise ConfigError("video_array", got=type(video).__name__, shape=shape, fps=fps)
        rate = fps or 1.0
        times = np.arange(len(video)) / rate
        change = frame_change(video) if self.sampling == "adaptive" else None
        sampling = FrameSampling(mode=self.sampling, max_frames=max_frames, max_fps=max_fps)
        return choose_frames(times, sampling, end_s=len(video) / rate, rng=rng, change_N=change)

    def _tensor(self, frames: np.ndarray) -> torch.Tensor:
        view = ImageView(size_px=self.view.size_px, patch_px=self.view.patch_px, fit=self.view.fit)
        height, width = frames.shape[1:3]
        out = np.empty((len(frames), view.size_px, view.size_px, 3), np.uint8)
        for frame, crop in zip(frames, out, strict=True):
            render(
                frame,
                source_width=width,
                source_height=height,
                view=view,
                out=crop[None],
                resample=self.resample,
            )
        tensor = torch.from_numpy(out).permute(0, 3, 1, 2).contiguous()
        return tensor if self.normalize is None else normalize(tensor, kind=self.normalize)


def frame_change(video: np.ndarray) -> np.ndarray:
    """Measures how much each frame differs from the one before it, as the offline half does.

    Args:
      video: uint8 [T, H, W, 3].

    Returns:
      float64 [T]: mean absolute difference at 32 x 32 pixels, as a share of the full range; 0 for
      the first.
    """
    small = np.stack(
        [resize(frame, _THUMBNAIL_PX, _THUMBNAIL_PX, resample="bilinear") for frame in video]
    ).astype(np.int16)
    change = np.zeros(len(video))
    change[1:] = np.abs(np.diff(small, axis=0)).mean(axis=(1, 2, 3)) / 255
    return change
