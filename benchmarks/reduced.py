"""Measures what `DECODE=reduced` saves and costs, by how much of a JPEG is left to the resize.

    python benchmarks/reduced.py

A JPEG that is decoded at a half, a quarter or an eighth of its sides is resized from fewer pixels.
`left` is its longer side then, in multiples of the stored one: the setting wants 2 at least. The
distance (PSNR) is that to the picture decoded whole and resized by LANCZOS, of the worst of six
scenes and of pictures that are hard to shrink; "speed" is processor time of decoding and resizing.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.job import draw
from shardspec.tiling import ImageView, stored_size

NUM_SCENES = 6


def main() -> None:
    for side_px, stored_px in ((1280, 336), (1280, 448), (4000, 336)):
        scenes = draw(side_px)[:NUM_SCENES]
        hard = dict(hard_pictures(side_px))
        view = ImageView(size_px=stored_px)
        for reduce in (2, 4, 8):
            left = side_px / reduce / stored_px
            if left < 1:
                continue
            whole_s, reduced_s = (seconds(scenes, view, each) for each in (1, reduce))
            print(
                f"{side_px} to {stored_px}, 1/{reduce}: left {left:.2f}",
                f"speed {whole_s / reduced_s:.1f}",
                f"scenes {min(distance_db(each, view, reduce) for each in scenes):.0f} dB",
                *(f"{name} {distance_db(each, view, reduce):.0f}" for name, each in hard.items()),
                sep=", ",
                flush=True,
            )


def hard_pictures(side_px: int) -> Iterator[tuple[str, bytes]]:
    """Draws a page of text, frequencies of all kinds, noise, and noise like that of photographs."""
    rng = np.random.RandomState(0)
    height, width = side_px * 3 // 4, side_px
    page = Image.new("RGB", (width, height), "white")
    for y in range(0, height, 11):
        words = "The quick brown fox jumps over the lazy dog. " * (side_px // 200)
        ImageDraw.Draw(page).text((3, y), words, fill=(20, 20, 60))
    yield "text", as_jpeg(np.asarray(page))
    y, x = np.mgrid[:height, :width]
    rings = 127.5 + 127.5 * np.cos((x**2 + y**2) * np.pi / side_px / 1.2)
    yield "rings", as_jpeg(np.repeat(rings[..., None], 3, axis=-1))
    yield "noise", as_jpeg(rng.randint(0, 256, (height, width, 3)))
    power = np.fft.rfftfreq(width)[None] ** 2 + np.fft.fftfreq(height)[:, None] ** 2
    power[0, 0] = 1
    spectra = (np.fft.rfft2(rng.randn(height, width)) / power**0.5 for _ in range(3))
    channels = np.stack([np.fft.irfft2(each, s=(height, width)) for each in spectra], axis=-1)
    yield "1/f noise", as_jpeg(128 + channels * 45 / channels.std())


def as_jpeg(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=92)
    return stream.getvalue()


def shrunk(payload: bytes, view: ImageView, reduce: int) -> np.ndarray:
    """Decodes at 1/reduce and resizes to what is stored, as BUILD does."""
    height, width, _, _ = simplejpeg.decode_jpeg_header(payload)
    least = {"min_height": -(-height // reduce), "min_width": -(-width // reduce)}
    pixels = simplejpeg.decode_jpeg(payload, **(least if reduce > 1 else {}))
    box = (0.0, 0.0, width / reduce, height / reduce)
    size = stored_size(width, height, [view])
    resized = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS, box=box)
    return np.asarray(resized, dtype=np.float64)


def distance_db(payload: bytes, view: ImageView, reduce: int) -> float:
    error = np.mean((shrunk(payload, view, reduce) - shrunk(payload, view, 1)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def seconds(payloads: list[bytes], view: ImageView, reduce: int) -> float:
    start = time.process_time()
    for payload in payloads:
        shrunk(payload, view, reduce)
    return time.process_time() - start


if __name__ == "__main__":
    argparse.ArgumentParser().parse_args()  # it has none
    main()
