"""Headers of source images: which formats are opened, and which images are decoded at all.

One rule for FETCH and BUILD, applied before anything of the image's size is allocated:

1. The file is of one of `SOURCE_FORMATS`.
2. Its sides, their ratio and their product are within the job's limits.
3. The file is long enough for what its header announces, where the format sets a minimum: deflate
   expands 1,032 times at most, and each block of a Huffman-coded JPEG takes at least one bit.
4. Decoding it, by an estimate that follows from the header alone (`decode_bytes`), takes no more
   memory than allowed. A JPEG can be decoded at a fraction of its sides; that is decided later.

The rule depends on the file and the limits, never on the machine or on which decoder is installed.

Texts and colour profiles of a PNG are taken out before Pillow reads the file: it refuses a whole
image for a comment of more than 1 MiB. Profiles are handed over up to `MAX_PROFILE_BYTES`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, NoReturn

import numpy as np
from PIL import Image, ImageFile

from preprocess.settings import Setting
from preprocess.sizes import parse_bytes, size_text
from shardspec.errors import ConfigError, SampleError
from shardspec.image_file import jpeg_frame, require_payload, size_before_opening
from shardspec.media import (
    MAX_STORED_PIXELS,
    MAX_STORED_SIDE_PX,
    PILLOW_DECODE_ERRORS,
    open_image,
)

SOURCE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""Formats that are opened. Pillow knows more: some start other programs (EPS), some have no
signature (TGA), and some hold several icons (ICO)."""

MAX_PROFILE_BYTES = 4 * 2**20
"""Longest colour profile that a PNG may inflate to; printers' tables have up to 3 MiB. A longer one
is ignored, with a warning."""

MAX_SCANS = 200
"""Most scans of a JPEG. Encoders write about ten; each costs a pass over all coefficients."""

_MAX_TEXT_BYTES = 2**20
"""Longest text of a PNG that is read for its orientation: what Pillow accepts."""

_MODE_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
"""Bytes per pixel of Pillow's images; all other modes take 4."""

_DECODER_BYTES = {"GIF": 1, "BMP": 4, "PPM": 4, "TIFF": 4, "WEBP": 12, "AVIF": 12, "JPEG2000": 16}
"""Bytes per pixel that a decoder holds beside the image, at most. Measured over modes and bit
depths: the canvases of WebP, the planes of AVIF, 4-byte samples of JPEG 2000."""

REDUCTIONS = (2, 4, 8)
"""Factors by which the sides of a JPEG can be reduced while it is decoded."""

BAND_PX = 1 << 20
"""Pixels that are converted at a time; that takes 16 bytes for each."""

JPEG_SCAN = b"\xff\xda"
_COEFFICIENTS = "coefficient_bytes"
_TILE_TAGS = (322, 323, 277)
"""TileWidth, TileLength, SamplesPerPixel (TIFF 6.0)."""
_TURNED = range(2, 9)
"""Values of EXIF's orientation that are not upright."""

_UNUSABLE = b"too long, or not deflated"
"""Stands for a profile that was not read: parsing it fails, and that is reported."""
_ORIENTING_TEXTS = (b"XML:com.adobe.xmp", b"Raw profile type exif")
_TEXT_CHUNKS = frozenset({b"tEXt", b"zTXt", b"iTXt"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageLimits:
    """The largest source image that is decoded. All of it is read from headers."""

    max_megapixels: Annotated[
        int, Setting("images with more pixels are left out, 1 to 200", group="images")
    ] = 200
    max_source_side_px: Annotated[
        int,
        Setting(
            "images with a longer side are left out, in pixels",
            flag="max-source-side",
            group="images",
        ),
    ] = 65_535
    """The default is what a JPEG can have."""
    max_aspect: Annotated[
        float,
        Setting("images whose longer side is more times the shorter are left out", group="images"),
    ] = 200.0
    """The default is the bound of Qwen2-VL's image processor."""
    max_decode_bytes: Annotated[
        int,
        Setting(
            "most memory for decoding one image; JPEGs above it are decoded at 1/2, 1/4 or 1/8 of "
            "their sides where twice the stored size remains, other images are left out",
            flag="decode-memory",
            group="images",
            metavar="SIZE",
            parse=parse_bytes,
            shown="384MiB",
        ),
    ] = 384 * 2**20
    """By the estimate of `decode_bytes`: a process stays below 512 MiB."""

    def __post_init__(self) -> None:
        most = MAX_STORED_PIXELS // 1_000_000
        checks = {
            "max_megapixels": (1 <= self.max_megapixels <= most, f"1 to {most}"),
            "max_source_side_px": (
                1 <= self.max_source_side_px <= MAX_STORED_SIDE_PX,
                f"1 to {MAX_STORED_SIDE_PX} pixels",
            ),
            "max_aspect": (self.max_aspect >= 1, "a number >= 1"),
            "max_decode_bytes": (self.max_decode_bytes >= 2**20, "1MiB or more"),
        }
        for name, (good, want) in checks.items():
            if not good:
                got = getattr(self, name)
                raise ConfigError("image_policy", where=name, name=name, got=got, want=want)

    def check_size(self, width: int, height: int, *, where: str = "") -> None:
        """Refuses an image by its size.

        Raises:
          SampleError: `image_empty`, `image_bomb`.
        """
        facts = {"width_px": width, "height_px": height}
        if width < 1 or height < 1:
            raise SampleError("image_empty.picture", where=where, facts=facts)
        if width * height > self.max_megapixels * 1_000_000:
            raise SampleError(
                "image_bomb.pixels", where=where, most_megapixels=self.max_megapixels, facts=facts
            )
        if max(width, height) > self.max_source_side_px:
            raise SampleError(
                "image_bomb.side", where=where, most_px=self.max_source_side_px, facts=facts
            )
        if max(width, height) > self.max_aspect * min(width, height):
            raise SampleError(
                "image_bomb.aspect", where=where, most_aspect=self.max_aspect, facts=facts
            )

    def check_memory(self, image: ImageFile.ImageFile, need_bytes: int, *, where: str = "") -> None:
        """Refuses an image whose decoding would take too much memory.

        Raises:
          SampleError: `image_bomb`.
        """
        if need_bytes > self.max_decode_bytes:
            raise SampleError(
                "image_bomb.memory",
                where=where,
                need=size_text(need_bytes),
                most=size_text(self.max_decode_bytes),
                facts={"width_px": image.width, "height_px": image.height, "mode": image.mode},
            )


def open_source(payload: bytes, *, limits: ImageLimits, where: str = "") -> ImageFile.ImageFile:
    """Opens a source image by its header, within the limits.

    Args:
      payload: The file.
      limits: Of the job.
      where: Named in errors.

    Returns:
      The image, not decoded yet. `info["icc_profile"]` is its colour profile, and of a JPEG
      `info["coefficient_bytes"]` what `coefficient_bytes` says of it, which reads the whole file.

    Raises:
      SampleError: `image_empty`, `image_bomb`, `image_truncated`, `image_decode`.
    """
    if not payload:
        raise SampleError("image_empty.file", where=where)
    size = size_before_opening(payload)
    if size is not None:
        limits.check_size(*size, where=where)
    slim, profile = payload, None
    if payload.startswith(b"\x89PNG"):
        slim, profile = _without_texts(payload)
    try:
        image = open_image(slim, formats=SOURCE_FORMATS)
    except PILLOW_DECODE_ERRORS as error:
        refuse_file(error, where)
    if image is None:
        raise SampleError(
            "image_decode.unknown",
            where=where,
            first_bytes=payload[:16],
            known=", ".join(SOURCE_FORMATS),
        )
    if profile is not None:
        image.info["icc_profile"] = profile
    limits.check_size(*image.size, where=where)
    try:
        require_payload(payload)
    except ValueError as error:
        refuse_file(error, where)
    reduce = 1
    if is_jpeg(image):
        scans = _num_scans(payload)
        if scans > MAX_SCANS:
            raise SampleError("image_bomb.scans", where=where, most_scans=MAX_SCANS, scans=scans)
        reduce = max(REDUCTIONS)
        image.info[_COEFFICIENTS] = coefficient_bytes(payload, scans=scans)
    # At least this much: what is stored of it is not known here.
    need_bytes = decode_bytes(image, payload, reduce=reduce, resized=(0, 0))
    limits.check_memory(image, need_bytes, where=where)
    return image


def is_jpeg(image: Image.Image) -> bool:
    """Returns True for a JPEG, also one of several images."""
    return image.format in ("JPEG", "MPO")


def decode_bytes(
    image: ImageFile.ImageFile,
    payload: bytes,
    *,
    reduce: int = 1,
    resized: tuple[int, int] | None = None,
) -> int:
    """Estimates the most memory that decoding, converting and resizing an image takes.

    Args:
      image: As `open_source` gives it.
      payload: Its file.
      reduce: Of a JPEG: it is decoded at 1/reduce of its sides.
      resized: (width, height) to resize to afterwards; None where it stays as it is.

    Returns:
      Bytes, beside the file itself.
    """
    width, height = -(-image.width // reduce), -(-image.height // reduce)
    fixed = 0
    if is_jpeg(image):
        # Coefficients are held at full size, whatever comes of them.
        fixed = round(image.width * image.height * image.info[_COEFFICIENTS])
        decoder = 4 if image.mode == "CMYK" else 3
    else:
        decoder = _DECODER_BYTES.get(image.format or "", 0)
    per_pixel = decoder + (4 if is_jpeg(image) else _MODE_BYTES.get(image.mode, 4))
    grey_jpeg = is_jpeg(image) and image.mode == "L"  # decoded as RGB
    converted = image.mode != "RGB" and not grey_jpeg
    if converted or image.info.get("icc_profile"):
        per_pixel += 4
        fixed += 16 * min(width * height, BAND_PX)
    if _may_be_turned(image, payload):
        per_pixel += 4
    rest = width * height * 3
    if resized is not None:
        rest = (min(resized[0], width) * height + 2 * resized[0] * resized[1]) * 4
    if image.format == "TIFF":
        fixed += _tile_bytes(image)
    return fixed + width * height * per_pixel + rest


def coefficient_bytes(payload: bytes, *, scans: int | None = None) -> float:
    """Bytes per pixel of the coefficients that a decoder keeps: those of files in several scans.

    Args:
      payload: The file of a JPEG.
      scans: How often `JPEG_SCAN` is in it; None to count.
    """
    frame = jpeg_frame(payload)
    if frame is None:
        return 0.0
    if frame.is_sequential and scans is None:
        scans = _num_scans(payload)
    several = not frame.is_sequential or (scans or 0) > 1
    return 2.0 * frame.samples_per_pixel if several else 0.0


def _num_scans(payload: bytes) -> int:
    """Counts `JPEG_SCAN`, in a fifth of the time of `bytes.count`."""
    values = np.frombuffer(payload, np.uint8)
    first, second = JPEG_SCAN
    return int(np.count_nonzero((values[:-1] == first) & (values[1:] == second)))


def refuse_file(cause: Exception | str, where: str) -> NoReturn:
    """Refuses a file that a decoder cannot read.

    Raises:
      SampleError: `image_bomb`, `image_truncated` or `image_decode`.
    """
    text = str(cause).lower()
    if isinstance(cause, Image.DecompressionBombError):  # Pillow's own bound
        code = "image_bomb.webp"
    elif "truncated" in text or "premature end of jpeg file" in text:
        code = "image_truncated"
    else:
        code = "image_decode.damaged"
    raise SampleError(code, where=where, cause=str(cause)) from None


def _may_be_turned(image: ImageFile.ImageFile, payload: bytes) -> bool:
    if image.format == "PNG":
        # Its EXIF block may follow the pixels: Pillow would decode them to find it.
        return any(word in payload for word in (b"eXIf", *_ORIENTING_TEXTS))
    try:
        return image.getexif().get(0x0112) in _TURNED
    except PILLOW_DECODE_ERRORS:
        return False


def _tile_bytes(image: ImageFile.ImageFile) -> int:
    """Bytes of one tile of a TIFF, which its decoder allocates whole, whatever the image's size."""
    tags = getattr(image, "tag_v2", {})
    width, length, samples = (tags.get(tag, 0) for tag in _TILE_TAGS)
    if not (isinstance(width, int) and isinstance(length, int)):
        return 0
    return 2 * width * length * (samples if isinstance(samples, int) and samples else 1)


def _without_texts(payload: bytes) -> tuple[bytes, bytes | None]:
    """Takes texts and the colour profile out of a PNG.

    Two texts stay where they have a usual length, because the orientation may be in them.

    Returns:
      The file that Pillow reads, and the profile; None where there is none.
    """
    parts: list[bytes] = []
    profile: bytes | None = None
    kept, seen = 8, set()
    for kind, start, stop in _chunks(payload):
        body = memoryview(payload)[start + 8 : stop - 4]
        if kind == b"iCCP":
            profile = profile or _inflated(bytes(body), most=MAX_PROFILE_BYTES) or _UNUSABLE
        elif kind in _TEXT_CHUNKS:
            word = bytes(body[:80]).partition(b"\0")[0]
            if word in _ORIENTING_TEXTS and word not in seen and _is_short(kind, bytes(body)):
                seen.add(word)
                continue
        else:
            continue
        parts.append(payload[kept:start])
        kept = stop
    if not parts:
        return payload, None
    return payload[:8] + b"".join(parts) + payload[kept:], profile


def _chunks(payload: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Walks the chunks of a PNG as far as they are whole; checksums are compared elsewhere."""
    start = 8
    while start + 12 <= len(payload):
        stop = start + 12 + int.from_bytes(payload[start : start + 4], "big")
        if stop > len(payload):
            return
        yield payload[start + 4 : start + 8], start, stop
        start = stop


def _is_short(kind: bytes, body: bytes) -> bool:
    if len(body) > _MAX_TEXT_BYTES:
        return False
    if kind == b"tEXt":
        return True
    if kind == b"iTXt":
        flag = body.find(b"\0") + 1
        if body[flag : flag + 1] == b"\0":
            return True
        texts = body[flag + 2 :].split(b"\0", 2)
        return len(texts) == 3 and _inflates(texts[2], most=_MAX_TEXT_BYTES) is not None
    return _inflated(body, most=_MAX_TEXT_BYTES) is not None


def _inflated(body: bytes, *, most: int) -> bytes | None:
    """Inflates what follows a keyword and the byte of the method; None where it is too long."""
    return _inflates(body.partition(b"\0")[2][1:], most=most)


def _inflates(deflated: bytes, *, most: int) -> bytes | None:
    engine = zlib.decompressobj()
    try:
        inflated = engine.decompress(deflated, most + 1)
    except zlib.error:
        return None
    return inflated if len(inflated) <= most else None
