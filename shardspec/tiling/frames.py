"""FrameView: what a model sees of the frames of a video.

A frame is a picture with one crop, without tiles and overlap, and with a pooling of its own. Around
its patches are the symbols for a frame, before it the time at which it is shown:

    marks "frame"   <time> [frame_start] patches [frame_end], for each frame (Molmo 2, as served)
    marks "video"   [frame_start] <time> patches <time> patches ... [frame_end]
    marks "none"    <time> patches <time> patches ...

How many of the stored frames an example has is drawn (`shardspec.frames`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

from shardspec.errors import ConfigError
from shardspec.tiling.view import ImageView

FrameMarks = Literal["frame", "video", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameView:
    """What a model sees of the frames of a video.

    Raises:
      ConfigError: `frame_view`.
    """

    pool: tuple[int, int] = (3, 3)
    """Patches pooled into one token, (rows, columns)."""
    marks: FrameMarks = "frame"
    """Where the symbols <frame_start> and <frame_end> are."""
    timestamps: bool = True
    """Whether the time of a frame, such as "12.5", is before it."""
    max_frames: int | None = None
    """Most frames of a video in an example; None for all that are stored."""
    max_tokens: int | None = None
    """Most tokens of all frames of a video together, marks and times included; None for any. At
    least one frame is taken."""
    sampling: Literal["random", "even"] = "random"
    """In training: "random" draws frames in each epoch, "even" takes the same ones each time.
    Evaluation is always "even"."""

    def __post_init__(self) -> None:
        pair = isinstance(self.pool, tuple) and len(self.pool) == 2
        checks = {
            "pool": pair and all(isinstance(p, int) and p >= 1 for p in self.pool),
            "marks": self.marks in get_args(FrameMarks),
            "max_frames": self.max_frames is None or self.max_frames >= 1,
            "max_tokens": self.max_tokens is None or self.max_tokens >= 1,
            "sampling": self.sampling in ("random", "even"),
        }
        wrong = {name: getattr(self, name) for name, good in checks.items() if not good}
        if wrong:
            raise ConfigError("frame_view", facts=wrong)

    def image_view(self, view: ImageView) -> ImageView:
        """Gives the view of one frame, where images are seen in `view`."""
        return dataclasses.replace(
            view,
            crop_mode="resize",
            pool=self.pool,
            pooling="global",
            overview_column_tokens=False,
        )

    def num_tokens(self, view: ImageView) -> int:
        """Counts the tokens of one frame, marks included and its time left out.

        >>> FrameView().num_tokens(ImageView(size_px=378))
        83
        """
        rows, columns = self.image_view(view).crop_tokens
        return rows * columns + 2
