"""Video files whose frames carry their number, so that "frame N" needs no other decoder."""

import io
from fractions import Fraction

import numpy as np

BITS = 8
SIZE = (96, 64)
"""(width, height)."""


def stamped(number, size=SIZE):
    """Draws a frame: its number in blocks of black and white, over a moving ramp."""
    width, height = size
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([(2 * x + 5 * number) % 200, (3 * y) % 200, (x + y) % 200], axis=-1)
    pixels = pixels.astype(np.uint8)
    block = width // BITS
    for bit in range(BITS):
        pixels[:16, bit * block : (bit + 1) * block] = 255 * (number >> bit & 1)
    return pixels


def stamp(pixels):
    """Reads the number of a frame."""
    block = pixels.shape[1] // BITS
    cells = pixels[4:12, :, 1].reshape(8, -1)
    return sum(
        int(cells[:, bit * block + 2 : (bit + 1) * block - 2].mean() > 128) << bit
        for bit in range(BITS)
    )


def write(
    codec, container, *, count=24, rate=12, size=SIZE, options=None, pix_fmt="yuv420p", ticks=None
):
    """Encodes stamped frames with PyAV.

    Args:
      codec: Name of the encoder.
      container: Name of the muxer.
      count: Frames.
      rate: Frames per second.
      size: (width, height).
      options: Of the encoder.
      pix_fmt: Of the encoder.
      ticks: When each frame is shown, in units of 1 / rate; None for 0, 1, 2 ...
    """
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        stream.options = options or {}
        stream.codec_context.thread_count = 1
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(stamped(i, size), format="rgb24")
            frame.pts = i if ticks is None else ticks[i]
            frame.time_base = Fraction(1, rate)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()
