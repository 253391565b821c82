"""Encodes generated frames as a video file."""

from __future__ import annotations

import io
from collections.abc import Iterable
from fractions import Fraction

import numpy as np

from shardspec.video import import_av


def encode_video(frames: Iterable[np.ndarray], *, fps: Fraction) -> bytes:
    """Encodes frames as H.264 in MP4, as cameras and the web deliver it.

    Args:
      frames: uint8 [H, W, 3] each, all of one size with even sides; at least one.
      fps: Frames per second.

    Returns:
      The file. The same frames and the same build of PyAV give the same bytes.

    Raises:
      ConfigError: `video_extra`.
    """
    av = import_av()
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.pix_fmt = "yuv420p"
        stream.options = {"preset": "veryfast", "crf": "22", "g": "48", "bf": "2"}
        # x264's mbtree reads memory that it has not written: the bytes would vary now and then.
        stream.options["x264-params"] = "mbtree=0"
        stream.codec_context.thread_count = 1  # the bytes depend on it
        for i, pixels in enumerate(frames):
            if not i:
                stream.height, stream.width = pixels.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()
