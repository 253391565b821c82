"""Images as rows name them: bytes, the hub's {bytes, path}, URLs, data: URLs, files and objects."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

import numpy as np

from shardspec import storage
from shardspec.errors import SampleError

_WEB = re.compile(r"\s*https?://", re.IGNORECASE)
"""What FETCH takes for a URL."""


@dataclass(frozen=True, slots=True)
class RemoteImage:
    """An image in an object store; it is read when it is wanted."""

    url: str

    def read(self) -> bytes:
        """Reads the object.

        Raises:
          SampleError: `image_missing`.
        """
        try:
            return bytes(storage.read_bytes(self.url))
        except FileNotFoundError as error:
            told = "no such object"
            raise SampleError("image_missing.row", where=self.url, error=told) from error


class FrameReader(Protocol):
    """What gives the frames of an episode."""

    def frame(self, camera: str, row: int, *, segment: int) -> np.ndarray | bytes:
        """Gives the frame of a camera at a step, for the sample that is read."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeFrame:
    """What a robot's camera saw at a step of an episode; it is decoded when it is read."""

    frames: FrameReader = field(compare=False, repr=False)
    episode: str
    """Its source and number."""
    camera: str
    row: int
    segment: int
    """Number of the episode's sample that it is read for: neighbours are decoded together."""

    def read(self) -> bytes | np.ndarray:
        """Gives the frame: uint8 [H, W, 3], or an encoded image.

        Raises:
          SampleError: `robot_frame`, and what a video is refused for.
        """
        return self.frames.frame(self.camera, self.row, segment=self.segment)


def resolve_image(image: Any, *, base: str) -> bytes | str | Path | RemoteImage:
    """Finds the image that a row names.

    Args:
      image: Bytes, the hub's {bytes, path}, a URL, a data: URL or a name.
      base: Folder or URL that names start from.

    Raises:
      SampleError: `row_image`, `row_image_data`, `row_image_scheme`, `row_encoding`.
    """
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if not isinstance(image, str):
        raise SampleError("row_image", fields=[], got=type(image).__name__)
    try:
        image.encode()
    except UnicodeEncodeError as error:
        raise SampleError("row_encoding.surrogate", got=ascii(error.object[error.start])) from error
    if _WEB.match(image):
        return str(image)
    if image.startswith("data:"):
        return _data(image)
    if "://" in image and not image.startswith("file://"):
        if not storage.is_store(image, base=base):
            raise SampleError("row_image_scheme", where=image)
        return RemoteImage(image)
    image = image.removeprefix("file://")
    if "://" in base and not image.startswith("/"):
        url = f"{base.rstrip('/')}/{image}"
        return url if url.startswith(("http://", "https://")) else RemoteImage(url)
    return Path(base, image)


def _data(url: str) -> bytes:
    """Decodes a data: URL, in either alphabet of base64, with or without its padding."""
    head, _, text = url.partition(",")
    if not head.endswith(";base64"):
        raise SampleError("row_image_data", error=f"it begins with {head[:40]!r}")
    text = unquote("".join(text.split())).rstrip("=").translate({ord("-"): "+", ord("_"): "/"})
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise SampleError("row_image_data", error=error) from error
