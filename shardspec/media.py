"""Stored images: bytes <-> uint8 pixels, for both halves.

`encode_stored` writes the image members of a shard, `decode_stored` reads them. Decoding is exact
and strict: the same bytes give the same pixels whichever decoder reads them, and bytes that are
short or damaged raise instead of giving a half-grey picture:

* jpeg: simplejpeg where it is installed (libjpeg-turbo straight into the caller's buffer, without
  the GIL; its strict mode also notices a flipped bit that upsets the entropy coding), else Pillow,
  which notices missing bytes only. Both give the same pixels.
* png: Pillow, after the CRC of every chunk has been checked (Pillow skips those of IDAT). Where the
  lowest row is black, as rows are that a stream ends without, the stream's rows are counted.
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
from types import ModuleType
from typing import Literal, NoReturn

import numpy as np
from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from shardspec.errors import ConfigError, SampleError, ShardError
from shardspec.image_file import (
    check_png,
    check_png_rows,
    check_webp,
    require_payload,
    size_before_opening,
)
from shardspec.sample import ARRAY_HEADER_BYTES, Codec, codec_of, encode_array

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
_LARGE_PIXELS = 4_000_000
"""Smaller stored JPEGs are decoded without a look at their frame: it costs 10 µs in Python."""

_BAND_PIXELS = 1 << 20


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
    codec = codec_of(payload, codec)
    if reduce != 1 and codec != "jpeg":
        raise ValueError(f"{codec} cannot be decoded at a reduced size")
    if codec == "raw":
        return _decode_raw(payload, out, where)
    if codec not in _PILLOW_CLASSES:  # features: a picture was, and is no more
        _refuse(codec, "it is no picture", where)
    if codec == "jpeg" and (decoder or jpeg_decoder()) == "simplejpeg":
        return _decode_simplejpeg(payload, out, where, reduce)
    return _decode_pillow(payload, out, codec, where, reduce)


def encode_stored(pixels: np.ndarray, *, codec: Codec, quality: int = 95) -> bytes:
    """Encodes pixels for storing; the same pixels give the same bytes.

    jpeg is baseline with 4:4:4 chroma and the standard Huffman tables; png and webp are lossless
    (webp has no alpha here, so `exact` would change nothing), lossless is the smaller one of them,
    webp where both are equal; raw is uncompressed .npy. None of them carries metadata.

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
    if codec == "lossless":
        png = encode_stored(pixels, codec="png")
        if max(pixels.shape) > CODEC_MAX_SIDE_PX["webp"]:
            return png
        return min(encode_stored(pixels, codec="webp"), png, key=len)
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


def may_lack_rows(image: Image.Image) -> bool:
    """Returns True if a decoded PNG may lack rows at its end, so that they have to be counted.

    Pillow's pixels are 0 before they are decoded, so a lowest row with another value is there. The
    rows of an interlaced picture come in another order.
    """
    lowest = image.crop((0, image.height - 1, image.width, image.height))
    return bool(image.info.get("interlace")) or not np.asarray(lowest).any()


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
    except KeyError as error:  # 4:4:1, which only Pillow can read
        _refuse("jpeg", f"chroma of layout {error}", where)
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
        chunks = check_png(payload) if codec == "png" else []
        if codec == "webp":
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
            if codec == "png" and may_lack_rows(image):
                check_png_rows(payload, chunks)
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
