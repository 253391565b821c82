"""Stored images: bytes <-> uint8 pixels, for both halves.

`encode_stored` writes the image members of a shard, `decode_stored` reads them. Decoding is exact
and strict: the same bytes give the same pixels whichever decoder reads them, and bytes that are
short or damaged raise instead of giving a half-grey picture:

* jpeg: simplejpeg where it is installed (libjpeg-turbo straight into the caller's buffer, without
  the GIL; its strict mode also notices a flipped bit that upsets the entropy coding), else Pillow,
  which notices missing bytes only. Both give the same pixels.
* png: Pillow, after the CRC of every chunk has been checked (Pillow skips those of IDAT).
* webp: Pillow, after the length in the RIFF header has been checked; the format has no checksum.
* raw: a .npy with a 128-byte header; its length is checked. The shard's sha256 guards the rest.

A stored image is RGB or greyscale, 8 bits, upright. Everything else (orientation, colour profiles,
transparency, CMYK) is converted before, by the offline half. Metadata is neither read nor written.
"""

from __future__ import annotations

import functools
import importlib
import io
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, NoReturn

import numpy as np
from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from shardspec.errors import ConfigError, SampleError, ShardError
from shardspec.sample import ARRAY_HEADER_BYTES, Codec, encode_array

JpegDecoder = Literal["simplejpeg", "pillow"]

Reduction = Literal[1, 2, 4, 8]
"""Factor by which the sides of a JPEG are reduced while it is decoded."""

MAX_STORED_PIXELS = 200_000_000
"""Most pixels of a stored image: 600 MB decoded. A larger header is broken or hostile."""

MAX_STORED_SIDE_PX = 1_000_000
"""Longest side of a stored image: decoders keep tables of 8 bytes per line, so that one column of
200 million pixels would take eight times its own size."""

CODEC_MAX_SIDE_PX = {"jpeg": 65_500, "webp": 16_383}
"""Longest side a codec can write: libjpeg's JPEG_MAX_DIMENSION, libwebp's WEBP_MAX_DIMENSION."""

PNG_COMPRESS_LEVEL = 6
WEBP_EFFORT = 80
WEBP_METHOD = 4
"""Effort (0 to 100) and method (0 to 6) of lossless webp; they change the size, never pixels."""

PILLOW_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow's plugins raise for broken files; they have no common base below Exception."""

# The plug-ins' classes, not Image.open: no sniffing, and no second limit on pixels, which would be
# a setting of the whole process.
_PILLOW_CLASSES: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "jpeg": JpegImagePlugin.JpegImageFile,
    "png": PngImagePlugin.PngImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
}
_RAW_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00v\x00"
    rb"\{'descr': '\|u1', 'fortran_order': False, 'shape': \((\d+), (\d+), 3\), \} *\n"
)
_DEFLATE_RATIO = 1032
"""Most bytes that a byte of deflate expands to: 258 for two bits (RFC 1951)."""
_PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Samples per pixel by colour type."""

# JPEG markers (ITU-T T.81, table B.1).
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL_FRAMES, _HUFFMAN_FRAMES = frozenset({0xC0, 0xC1}), frozenset({0xC0, 0xC1, 0xC2})
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD9)})
_SEGMENT = re.compile(rb"\xff+([^\x00\xff])")
_LARGE_PIXELS = 4_000_000
"""Smaller stored JPEGs are decoded without a look at their frame: it costs 10 µs in Python."""

_BAND_PIXELS = 1 << 20

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def decode_stored(
    payload: bytes | memoryview,
    *,
    codec: Codec,
    out: np.ndarray | None = None,
    where: str = "",
    decoder: JpegDecoder | None = None,
    reduce: Reduction = 1,
) -> np.ndarray:
    """Decodes a stored image.

    Args:
      payload: The whole member.
      codec: How it was stored; bytes of another format are refused.
      out: uint8 [H, W, 3] to fill and return, of exactly the image's (reduced) size; any strides,
        but only a C-contiguous one is filled without a copy. After an error its content is
        undefined.
      where: Shard and key, named in the error.
      decoder: Which JPEG decoder; None takes `jpeg_decoder()`.
      reduce: Decode a JPEG at 1/2, 1/4 or 1/8 of its sides, which must divide by it, straight from
        its coefficients; the same pixels from both decoders. Other codecs must be decoded whole.

    Returns:
      uint8 [H, W, 3], of the reduced size: `out`, or a new array; for raw without `out` a view of
      the payload, read-only where the payload is.

    Raises:
      ShardError: `image_decode`: damaged, short, not the codec's format, neither RGB nor grey, more
        than `MAX_STORED_PIXELS`, or not of the size of `out`.
      TypeError: `out` is not writable uint8.
      ConfigError: `decoder_missing`: simplejpeg is requested but not installed.
    """
    if out is not None and (out.dtype != np.uint8 or not out.flags.writeable):
        raise TypeError(f"out must be writable uint8, not {out.dtype}")
    if reduce != 1 and codec != "jpeg":
        raise ValueError(f"{codec} cannot be decoded at a reduced size")
    if codec == "raw":
        return _decode_raw(payload, out, where)
    if codec == "jpeg" and (decoder or jpeg_decoder()) == "simplejpeg":
        return _decode_simplejpeg(payload, out, where, reduce)
    return _decode_pillow(payload, out, codec, where, reduce)


def encode_stored(pixels: np.ndarray, *, codec: Codec, quality: int = 95) -> bytes:
    """Encodes pixels for storing; the same pixels give the same bytes.

    jpeg is baseline with 4:4:4 chroma and the standard Huffman tables; png and webp are lossless
    (webp has no alpha here, so `exact` would change nothing); raw is uncompressed .npy. None of
    them carries metadata.

    Args:
      pixels: uint8 [H, W, 3], H and W >= 1.
      codec: The format.
      quality: JPEG quality, 1 to 100; the others ignore it.

    Raises:
      SampleError: `image_size`: a side is longer than the codec can write.
      ValueError: Pixels of another shape or type.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise ValueError(f"pixels must be uint8 [H, W, 3], not {pixels.dtype} {pixels.shape}")
    limit_px = CODEC_MAX_SIDE_PX.get(codec)
    if limit_px is not None and max(pixels.shape) > limit_px:
        raise SampleError(
            "image_size.codec",
            codec=codec,
            height_px=pixels.shape[0],
            width_px=pixels.shape[1],
            most_px=limit_px,
        )
    if codec == "raw":
        return encode_array(pixels)
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    if codec == "jpeg":
        image.save(
            buffer, "JPEG", quality=quality, subsampling=0, optimize=False, progressive=False
        )
    elif codec == "png":
        image.save(buffer, "PNG", compress_level=PNG_COMPRESS_LEVEL, optimize=False)
    else:
        image.save(buffer, "WEBP", lossless=True, quality=WEBP_EFFORT, method=WEBP_METHOD)
    return buffer.getvalue()


def jpeg_decoder() -> JpegDecoder:
    """Names the JPEG decoder that `decode_stored` uses in this environment."""
    return "pillow" if _simplejpeg() is None else "simplejpeg"


def open_image(payload: bytes, *, formats: Sequence[str]) -> ImageFile.ImageFile | None:
    """Reads the header of an image file, by the first plug-in of Pillow that knows its signature.

    Not Image.open: its limit on pixels is a setting of the whole process.

    Args:
      payload: The file.
      formats: Pillow's names of the formats to try, in this order.

    Returns:
      The image, not decoded yet; None where the file is of none of the formats, or this Pillow was
      built without their codecs.

    Raises:
      Exception: One of `PILLOW_DECODE_ERRORS`, for a broken header.
    """
    Image.init()  # registers the plug-ins, once per process
    for name in formats:
        factory, accepts = Image.OPEN.get(name, (None, None))
        # A string instead of a bool is a plug-in's reason why this build cannot read the file.
        if factory is not None and (accepts is None or accepts(payload[:16]) is True):
            return factory(io.BytesIO(payload), "")
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class JpegFrame:
    """The frame header of a JPEG."""

    is_sequential: bool
    """Baseline or extended: decoded block by block, if it has one scan."""
    least_bits: int
    """Blocks of its smallest component, each of which takes one bit at least; 0 where a block may
    take less (arithmetic coding, lossless files)."""
    samples_per_pixel: float
    """Of all components together; 3 without subsampling."""


def jpeg_frame(payload: bytes | memoryview) -> JpegFrame | None:
    """Reads the frame header of a JPEG; None where there is none that can be read."""
    at = 2
    while match := _SEGMENT.match(payload, at):
        marker, at = match[1][0], match.end()
        if marker in _STANDALONE:
            continue
        stop = at + int.from_bytes(payload[at : at + 2], "big")
        if marker in _FRAMES:
            return _parse_frame(marker, bytes(payload[at + 2 : stop]))
        if stop <= at:
            return None
        at = stop
    return None


def size_before_opening(payload: bytes | memoryview) -> tuple[int, int] | None:
    """Reads (width, height) of a PNG or WebP from its first bytes; None for other files.

    Pillow allocates the canvas of a WebP when it opens the file.
    """
    head = bytes(payload[:30])
    if head[:8] == _PNG_SIGNATURE and head[12:16] == b"IHDR" and len(head) >= 24:
        width, height = struct.unpack(">2I", head[16:24])
        return width, height
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP" or len(head) < 30:
        return None
    if head[12:16] == b"VP8X":
        sides = (int.from_bytes(head[24:27], "little"), int.from_bytes(head[27:30], "little"))
        return 1 + sides[0], 1 + sides[1]
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if head[12:16] == b"VP8 ":
        width, height = struct.unpack("<2H", head[26:30])
        return width & 0x3FFF, height & 0x3FFF
    return None


def require_payload(payload: bytes | memoryview) -> None:
    """Refuses a PNG or JPEG that is too short for the pixels that its header announces.

    Raises:
      ValueError: "truncated ...", before anything of the image's size is allocated.
    """
    if bytes(payload[:2]) == b"\xff\xd8":
        frame = jpeg_frame(payload)
        if frame is not None and 8 * len(payload) < frame.least_bits:
            raise ValueError(f"truncated JPEG: {len(payload)} bytes for {frame.least_bits} blocks")
    elif bytes(payload[:8]) == _PNG_SIGNATURE and len(payload) > 25:
        size = size_before_opening(payload)
        bits = payload[24] * _PNG_SAMPLES.get(payload[25], 0)
        if size is not None and 8 * _DEFLATE_RATIO * len(payload) < size[0] * size[1] * bits:
            raise ValueError(
                f"truncated PNG: {len(payload)} bytes for {size[0]} x {size[1]} pixels"
            )


def check_png(payload: bytes | memoryview) -> list[tuple[bytes, int, int]]:
    """Checks the chunks of a PNG file and lists them.

    Returns:
      (type, start, stop) of each chunk, length and CRC included, IHDR first and IEND last.

    Raises:
      ValueError: Not a PNG, truncated, or a chunk whose CRC differs.
    """
    if bytes(payload[:8]) != _PNG_SIGNATURE:
        raise ValueError("no PNG signature")
    chunks = []
    view = memoryview(payload)
    start, kind = 8, b""
    while kind != b"IEND":
        if start + 12 > len(view):
            raise ValueError("truncated PNG: no IEND chunk")
        length = int.from_bytes(view[start : start + 4], "big")
        kind = bytes(view[start + 4 : start + 8])
        stop = start + 12 + length
        if stop > len(view):
            raise ValueError(f"truncated PNG chunk {kind!r}")
        crc = int.from_bytes(view[stop - 4 : stop], "big")
        if zlib.crc32(view[start + 4 : stop - 4]) != crc:
            raise ValueError(f"PNG chunk {kind!r} fails its CRC")
        chunks.append((kind, start, stop))
        start = stop
    return chunks


def check_webp(payload: bytes | memoryview) -> None:
    """Checks that a WebP file is as long as its header says (the format has no checksum).

    Raises:
      ValueError: Not a WebP, or truncated.
    """
    if bytes(payload[:4]) != b"RIFF" or bytes(payload[8:12]) != b"WEBP":
        raise ValueError("no WebP signature")
    want = 8 + int.from_bytes(payload[4:8], "little")
    if len(payload) < want:
        raise ValueError(f"truncated WebP: {len(payload)} of {want} bytes")


@functools.cache
def _simplejpeg() -> ModuleType | None:
    # Once per process: a failing import searches the whole path.
    try:
        return importlib.import_module("simplejpeg")
    except ImportError:
        return None


def _decode_simplejpeg(
    payload: bytes | memoryview, out: np.ndarray | None, where: str, reduce: Reduction
) -> np.ndarray:
    library = _simplejpeg()
    if library is None:
        raise ConfigError("decoder_missing", where=where)
    buffer = out if out is not None and out.flags.c_contiguous else None
    try:
        # The header costs 1 µs and is read before anything is allocated.
        height, width, colorspace, _ = library.decode_jpeg_header(payload)
        if colorspace in ("CMYK", "YCCK"):
            raise ValueError(f"stored JPEG in {colorspace}")
        _check_size(width, height)
        _check_reducible(width, height, reduce)
        if width * height > _LARGE_PIXELS:
            require_payload(payload)
        width, height = width // reduce, height // reduce
        _check_out(out, (height, width, 3), "jpeg", where)
        # simplejpeg takes the smallest size that is not below these: exactly the reduced one.
        least = {} if reduce == 1 else {"min_height": height, "min_width": width}
        pixels: np.ndarray = library.decode_jpeg(
            payload, colorspace="RGB", strict=True, buffer=buffer, **least
        )
    except ValueError as error:
        _refuse("jpeg", str(error), where)
    if out is not None and buffer is None:
        np.copyto(out, pixels)
    return pixels if out is None else out


def _decode_pillow(
    payload: bytes | memoryview,
    out: np.ndarray | None,
    codec: Codec,
    where: str,
    reduce: Reduction,
) -> np.ndarray:
    try:
        if codec == "png":
            check_png(payload)
        elif codec == "webp":
            check_webp(payload)
        size = size_before_opening(payload)
        if size is not None:
            _check_size(*size)
        with _PILLOW_CLASSES[codec](io.BytesIO(payload)) as image:
            _check_size(image.width, image.height)
            require_payload(payload)
            if image.mode not in ("RGB", "L"):
                raise ValueError(f"stored image in mode {image.mode}")
            _check_reducible(image.width, image.height, reduce)
            width, height = image.width // reduce, image.height // reduce
            _check_out(out, (height, width, 3), codec, where)
            if reduce != 1:
                image.draft(None, (width, height))
            image.load()
    except PILLOW_DECODE_ERRORS as error:
        _refuse(codec, str(error), where)
    if out is None:
        out = np.empty((height, width, 3), np.uint8)
    # In bands: NumPy's view of a Pillow image is made of two copies of it.
    rows = max(1, _BAND_PIXELS // width)
    for y in range(0, height, rows):
        band = image if rows >= height else image.crop((0, y, width, min(y + rows, height)))
        out[y : y + rows] = np.asarray(band if band.mode == "RGB" else band.convert("RGB"))
    return out


def _decode_raw(payload: bytes | memoryview, out: np.ndarray | None, where: str) -> np.ndarray:
    match = _RAW_HEADER.fullmatch(bytes(payload[:ARRAY_HEADER_BYTES]))
    if match is None:
        _refuse("raw", "no 128-byte .npy header of uint8 [H, W, 3]", where)
    shape = (int(match[1]), int(match[2]), 3)
    got = len(payload) - ARRAY_HEADER_BYTES
    if got != shape[0] * shape[1] * 3 or not 0 < got <= MAX_STORED_PIXELS * 3:
        _refuse("raw", f"{got} bytes of pixels for shape {shape}", where)
    _check_out(out, shape, "raw", where)
    pixels = np.frombuffer(payload, dtype=np.uint8, offset=ARRAY_HEADER_BYTES).reshape(shape)
    if out is None:
        return pixels
    np.copyto(out, pixels)
    return out


def _parse_frame(marker: int, body: bytes) -> JpegFrame | None:
    count = body[5] if len(body) > 5 else 0
    if not count or len(body) < 6 + 3 * count:
        return None
    height, width = struct.unpack(">2H", body[1:5])
    factors = [(body[7 + 3 * i] >> 4, body[7 + 3 * i] & 15) for i in range(count)]
    if not all(h and v for h, v in factors):
        return None
    across, down = max(h for h, _ in factors), max(v for _, v in factors)
    blocks = [-(-width * h // (8 * across)) * -(-height * v // (8 * down)) for h, v in factors]
    return JpegFrame(
        is_sequential=marker in _SEQUENTIAL_FRAMES,
        least_bits=min(blocks) if marker in _HUFFMAN_FRAMES else 0,
        samples_per_pixel=sum(h * v for h, v in factors) / (across * down),
    )


def _check_size(width: int, height: int) -> None:
    if not 0 < width * height <= MAX_STORED_PIXELS or max(width, height) > MAX_STORED_SIDE_PX:
        raise ValueError(f"{width} x {height} pixels")


def _check_reducible(width: int, height: int, reduce: Reduction) -> None:
    # Otherwise the last block extends beyond the image, and its pixels are shifted slightly.
    if width % reduce or height % reduce:
        raise ValueError(f"{width} x {height} pixels at 1/{reduce}")


def _check_out(out: np.ndarray | None, shape: tuple[int, int, int], codec: str, where: str) -> None:
    if out is None:
        return
    if out.shape != shape:
        _refuse(codec, f"image of shape {shape} for out of shape {out.shape}", where)


def _refuse(codec: str, cause: str, where: str) -> NoReturn:
    raise ShardError("image_decode.stored", where=where, codec=codec, cause=cause)
