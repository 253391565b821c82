"""Pictures as datasets hold them -> upright sRGB pixels at the size to store.

What is decided here, in this order:

1. The header: an empty or oversized picture is refused before anything is decoded.
2. Decoding: whole and strict, after the file's structure shows that it is whole
   (`shardspec.image_file`). A JPEG goes through `shardspec.media` (which raises for damage that
   Pillow passes over), so that its pixels are the loader's pixels; everything else through Pillow.
   Of an animation the first frame is taken.
3. Orientation: EXIF is applied, so that coordinates in annotations mean what people saw.
4. Colour: grey of 16 bits by `>> 8` (Pillow's own conversion saturates), an embedded profile other
   than sRGB converted (perceptual intent), transparency laid over white, the rest to RGB.
5. Size: one Pillow LANCZOS resize to the size that training can ask for; downscale only. Where
   views tile, another one of the original gives the overview.

Where steps 3 to 5 change nothing and the file is of the recipe's codec, its compressed data is kept
as it is: no loss, no encoding. Metadata (EXIF with locations and names, thumbnails, comments, text)
is left out of what is kept.

The result is a function of the picture and the policy alone; nothing is drawn, nothing is cut.
"""

from __future__ import annotations

import functools
import io
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NoReturn, get_args

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from preprocess.settings import Setting
from shardspec.errors import ConfigError, SampleError, ShardError, StorageError, nearest
from shardspec.image_file import (
    JPEG_EOI,
    JPEG_FRAMES,
    JPEG_MARKER,
    JPEG_SOS,
    check_image_file,
    check_jpeg,
    check_png,
    check_png_rows,
)
from shardspec.media import (
    MAX_STORED_PIXELS,
    PILLOW_DECODE_ERRORS,
    decode_stored,
    encode_stored,
    jpeg_decoder,
    may_lack_rows,
    open_image,
)
from shardspec.sample import Codec, Geometry, PreparedImage
from shardspec.tiling import ImageView, overview_size, stored_size

logger = logging.getLogger(__name__)

SOURCE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""Formats that are opened. Pillow knows more, some of which start other programs (EPS)."""

SRGB_TOLERANCE = 2
"""A profile that moves no colour by more levels (of 255) than this is sRGB: the many profiles of
sRGB differ in rounding, while Adobe RGB and Display P3 move saturated colours by tens."""

_PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}

_TRANSPOSE: Mapping[int, Image.Transpose] = {
    # EXIF 2.32, tag 0x0112: what brings the stored rows and columns upright.
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# JPEG markers (ITU-T T.81, table B.1).
_SOF0, _COM = 0xC0, 0xFE
_APP0, _APP14, _APP15 = 0xE0, 0xEE, 0xEF
_SEQUENTIAL_SCAN = b"\x00\x3f\x00"

# TIFF 6.0, and Technical Note 2 for JPEG: tags, and values of the first.
_TIFF_COMPRESSION, _TIFF_JPEG_TABLES = 259, 347
_TIFF_PARTS = ((273, 279), (324, 325))
_TIFF_FAX, _TIFF_JPEG = frozenset({2, 3, 4}), 7

_PNG_PIXEL_CHUNKS = frozenset({b"IHDR", b"IDAT", b"IEND"})
_PNG_MEANING_CHUNKS = frozenset({b"tRNS", b"acTL"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePolicy:
    """How pictures are stored."""

    views: tuple[ImageView, ...] = (ImageView(),)
    """What training may ask for; the stored size serves all of them."""
    headroom: float = 1.0
    """Factor >= 1 on both sides of the largest canvas, for training that crops or resizes again."""
    max_side_px: int | None = None
    """Longest side, in pixels, instead of the bound that follows from the views."""
    codec: Annotated[
        Codec, Setting("format of the stored images; all but jpeg are lossless", group="images")
    ] = "jpeg"
    quality: Annotated[
        int, Setting("JPEG quality, 1 to 100; chroma is always 4:4:4", group="images")
    ] = 95
    keep: Annotated[
        Literal["auto", "never"],
        Setting(
            "auto: keep the original bytes if nothing has to change; never: always encode",
            group="images",
        ),
    ] = "auto"
    """"auto": compressed data that needs no change is stored as it is; "never": always encode."""
    overview: Literal["stored", "resized"] = "stored"
    """"stored": where views tile, and share size_px and fit, the overview is stored beside the
    picture. For about a fifth more bytes nothing is resized at load, and the overview is made from
    the original. "resized": the loader makes it from the stored picture in each epoch."""
    max_megapixels: int = 200
    """Pictures with more are refused from their header, 1 to 200."""

    def __post_init__(self) -> None:
        if not self.views and self.max_side_px is None:
            _reject("views", self.views, "at least one view, or max_side_px")
        if not (math.isfinite(self.headroom) and self.headroom >= 1.0):
            _reject("headroom", self.headroom, "a number >= 1")
        if self.max_side_px is not None and self.max_side_px < 1:
            _reject("max_side_px", self.max_side_px, "pixels >= 1, or None")
        if self.codec not in get_args(Codec):
            _reject("codec", self.codec, nearest(str(self.codec), get_args(Codec)))
        if not 1 <= self.quality <= 100:
            _reject("quality", self.quality, "1 to 100")
        if self.keep not in ("auto", "never"):
            _reject("keep", self.keep, "'auto' or 'never'")
        if self.overview not in ("stored", "resized"):
            _reject("overview", self.overview, "'stored' or 'resized'")
        if not 1 <= self.max_megapixels <= MAX_STORED_PIXELS // 1_000_000:
            _reject("max_megapixels", self.max_megapixels, "1 to 200")


class ImagePreprocessor:
    """Turns a picture into what is stored of it: one decode, at most one resize, one encode.

    An overview takes a resize and an encode of its own.
    """

    def __init__(self, policy: ImagePolicy) -> None:
        self.policy = policy
        self._warned: set[str] = set()

    def __call__(
        self,
        source: bytes | Path | Image.Image | np.ndarray,
        *,
        geometry: Geometry = Geometry.NONE,
        where: str = "",
    ) -> PreparedImage:
        """Prepares one picture.

        Args:
          source: The file's bytes (best: only these can be kept), its path, a Pillow image (its
            current frame), or uint8 [H, W, 3] pixels, upright sRGB.
          geometry: Which augmentations leave the sample's text true.
          where: Row or URL, named in errors; a path names itself.

        Returns:
          The image; its pixels are to be read only, they may be the caller's own array.

        Raises:
          SampleError: `image_missing` (no such file), `image_empty` (no bytes, no pixels),
            `image_bomb` (more pixels than allowed), `image_truncated`, `image_decode` (damaged, or
            no picture), `image_mode` (colours or numbers with no one meaning).
          StorageError: `image_read`: a file that exists and cannot be read.
          ConfigError: `load_truncated_images`: the process told Pillow to accept cut-off files.
        """
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            raise ConfigError("load_truncated_images")
        kept = None
        picture: Image.Image | np.ndarray
        if isinstance(source, np.ndarray):
            picture = _checked_array(source, where)
            self._check_size(picture.shape[1], picture.shape[0], where)
        elif isinstance(source, Image.Image):
            self._check_size(source.width, source.height, where)
            picture = self._settle(source, where)
        else:
            if isinstance(source, Path):
                where = where or str(source)
                source = _read(source, where)
            picture, kept = self._from_file(source, where)
        width, height = _size(picture)
        stored, small = self._stored_size(width, height), self._overview_size(width, height)
        overview = None
        if small is not None or stored != (width, height):
            image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
            if small is not None:
                overview = np.asarray(image.resize(small, Image.Resampling.LANCZOS))
            if stored != (width, height):
                kept = None
                picture = image.resize(stored, Image.Resampling.LANCZOS)
        return PreparedImage(
            pixels=np.asarray(picture),
            source_width=width,
            source_height=height,
            geometry=geometry,
            kept=kept,
            overview=overview,
        )

    def encode(self, image: PreparedImage) -> bytes:
        """Gives the bytes to store: the kept ones, or the pixels in the policy's codec.

        Raises:
          SampleError: `image_size`: a side is longer than the codec can write.
        """
        if image.kept is not None:
            return image.kept
        return encode_stored(image.pixels, codec=self.policy.codec, quality=self.policy.quality)

    def encode_overview(self, overview: np.ndarray) -> bytes:
        """Encodes an overview, uint8 [h, w, 3], in the policy's codec."""
        return encode_stored(overview, codec=self.policy.codec, quality=self.policy.quality)

    def _from_file(
        self, payload: bytes, where: str
    ) -> tuple[Image.Image | np.ndarray, bytes | None]:
        """Decodes a file; gives the bytes to keep as well, where the picture is theirs exactly."""
        image = _open(payload, where)
        self._check_size(image.width, image.height, where)
        pixels = None
        bare = None
        try:
            if image.format == "PNG":
                chunks = check_png(payload)
                image.load()
                if may_lack_rows(image):
                    check_png_rows(payload, chunks)
            else:
                check_image_file(payload, form=str(image.format))
            if isinstance(image, TiffImageFile):
                _check_tiff(payload, image, where)
            if self.policy.keep == "auto":
                bare = _bare_file(payload, image, self.policy.codec)
        except PILLOW_DECODE_ERRORS as error:
            _refuse_file(error, where)
        if image.format in ("JPEG", "MPO"):
            # What is kept is also what is decoded: one pass both makes the pixels and proves them.
            pixels = _decode_jpeg(bare or payload, image.mode, where)
            bare = bare if pixels is not None else None
        picture = self._settle(image, where, pixels=pixels)
        unchanged = picture is (image if pixels is None else pixels)
        return picture, bare if unchanged else None

    def _settle(
        self, image: Image.Image, where: str, *, pixels: np.ndarray | None = None
    ) -> Image.Image | np.ndarray:
        """Brings a picture upright and to sRGB.

        Args:
          image: The opened picture, with its metadata.
          where: Named in errors.
          pixels: uint8 [H, W, 3], if it has been decoded already.

        Returns:
          `pixels` or `image` itself where nothing has to change, else a new RGB image.
        """
        if pixels is None:
            try:
                image.load()
            except PILLOW_DECODE_ERRORS as error:
                _refuse_file(error, where)
        turn = self._turn(image, where)
        profile = self._profile(image, where)
        if pixels is not None:
            if turn is None and profile is None:
                return pixels
            image = Image.fromarray(pixels)
        try:
            rgb = _to_rgb(image, profile)
        except (*PILLOW_DECODE_ERRORS, ImageCms.PyCMSError) as error:
            raise SampleError(
                "image_mode.colors", where=where, mode=image.mode, cause=str(error)
            ) from None
        return rgb if turn is None else rgb.transpose(turn)

    def _turn(self, image: Image.Image, where: str) -> Image.Transpose | None:
        try:
            # After load(): Pillow turns TIFF itself and then forgets the tag.
            orientation = image.getexif().get(ExifTags.Base.Orientation)
        except PILLOW_DECODE_ERRORS as error:
            self._warn_once("an unreadable EXIF block was ignored", error, where)
            return None
        return _TRANSPOSE.get(orientation) if isinstance(orientation, int) else None

    def _profile(self, image: Image.Image, where: str) -> _Profile | None:
        embedded = image.info.get("icc_profile")
        if not embedded:
            return None
        try:
            profile = _parse_profile(bytes(embedded))
        except (*PILLOW_DECODE_ERRORS, ImageCms.PyCMSError) as error:
            self._warn_once("a broken colour profile was ignored", error, where)
            return None
        if profile is not None and not profile.fits(image.mode):
            self._warn_once("a colour profile of another mode was ignored", image.mode, where)
            return None
        return profile

    def _overview_size(self, width: int, height: int) -> tuple[int, int] | None:
        views = self.policy.views
        tiled = any(view.crop_mode != "resize" for view in views)
        alike = len({(view.size_px, view.fit) for view in views}) == 1
        if self.policy.overview == "resized" or not tiled or not alike:
            return None
        return overview_size(width, height, views[0])

    def _stored_size(self, width: int, height: int) -> tuple[int, int]:
        limit_px, longest_px = self.policy.max_side_px, max(width, height)
        if limit_px is None:
            return stored_size(width, height, self.policy.views, headroom=self.policy.headroom)
        if longest_px <= limit_px:
            return width, height
        # Rounded half up in integers: the same on every machine.
        return (
            max(1, (2 * width * limit_px + longest_px) // (2 * longest_px)),
            max(1, (2 * height * limit_px + longest_px) // (2 * longest_px)),
        )

    def _check_size(self, width: int, height: int, where: str) -> None:
        facts = {"width_px": width, "height_px": height}
        if width < 1 or height < 1:
            raise SampleError("image_empty.picture", where=where, facts=facts)
        if width * height > self.policy.max_megapixels * 1_000_000:
            raise SampleError(
                "image_bomb.pixels",
                where=where,
                most_megapixels=self.policy.max_megapixels,
                facts=facts,
            )

    def _warn_once(self, what: str, cause: object, where: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            logger.warning("%s (%s), first in %s", what, cause, where or "an unnamed picture")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Profile:
    """An embedded colour profile that is not sRGB."""

    mode: str
    """Pillow mode of what it describes: RGB, L or CMYK."""
    to_srgb: ImageCms.ImageCmsTransform

    def fits(self, mode: str) -> bool:
        """Returns True if it can describe a picture of this mode."""
        if self.mode == "L":
            return mode in ("1", "L", "LA", "F") or mode.startswith("I")
        if self.mode == "CMYK":
            return mode == "CMYK"
        return mode not in ("CMYK", "LAB")


@functools.lru_cache(maxsize=64)
def _parse_profile(embedded: bytes) -> _Profile | None:
    """Parses a profile; None for one that is sRGB. Raises PyCMSError or a decode error."""
    profile = ImageCms.getOpenProfile(io.BytesIO(embedded))
    mode = _PROFILE_MODES[profile.profile.xcolor_space.strip()]
    to_srgb = ImageCms.buildTransform(
        profile,
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        renderingIntent=ImageCms.Intent.PERCEPTUAL,
    )
    if mode != "CMYK":
        probe = _probe_image(mode)
        want = np.asarray(probe.convert("RGB"), dtype=np.int16)
        got = np.asarray(_transformed(probe, to_srgb), dtype=np.int16)
        if np.abs(got - want).max() <= SRGB_TOLERANCE:
            return None
    return _Profile(mode=mode, to_srgb=to_srgb)


def _probe_image(mode: str) -> Image.Image:
    # Every 15th level: 18 greys, or 18^3 colours.
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    if mode == "L":
        return Image.fromarray(levels[None])
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1)
    return Image.fromarray(np.ascontiguousarray(grid.reshape(1, -1, 3)))


def _transformed(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    result = ImageCms.applyTransform(image, transform)
    assert result is not None  # None only for in-place use
    return result


def _to_rgb(image: Image.Image, profile: _Profile | None) -> Image.Image:
    """Converts any mode to RGB in sRGB, transparency over white; RGB passes as it is."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bit_grey(image)
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    if profile is not None:
        image = _transformed(_as_mode(image, profile.mode), profile.to_srgb)
    image = _as_mode(image, "RGB")
    if alpha is None:
        return image
    return Image.composite(image, Image.new("RGB", image.size, (255, 255, 255)), alpha)


def _as_mode(image: Image.Image, mode: str) -> Image.Image:
    # convert() to the mode an image has already is a copy.
    return image if image.mode == mode else image.convert(mode)


def _eight_bit_grey(image: Image.Image) -> Image.Image:
    """Brings integer and float greys to 8 bits, instead of saturating them as Pillow does."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        # Up to 1 it could mean shares of white, or 256 levels of which only black is used.
        if not (low >= 0 and high <= 255 and (high == 0 or high > 1)):
            raise ValueError(f"floats from {low} to {high} have no stated range")
        return Image.fromarray(np.rint(values).astype(np.uint8))
    if low < 0 or high > 0xFFFF:
        raise ValueError(f"integers from {low} to {high} are not 16 bits")
    return Image.fromarray((values >> 8).astype(np.uint8))


def _open(payload: bytes, where: str) -> ImageFile.ImageFile:
    """Reads a picture's header."""
    if not payload:
        raise SampleError("image_empty.file", where=where)
    try:
        image = open_image(payload, formats=SOURCE_FORMATS)
    except PILLOW_DECODE_ERRORS as error:
        _refuse_file(error, where)
    if image is not None:
        return image
    raise SampleError(
        "image_decode.unknown",
        where=where,
        first_bytes=payload[:16],
        known=", ".join(SOURCE_FORMATS),
    )


def _decode_jpeg(payload: bytes, mode: str, where: str) -> np.ndarray | None:
    """Decodes an RGB or grey JPEG strictly; None where only Pillow can read a sound file."""
    try:
        if mode == "CMYK":
            # Pillow's pixels are the reference for CMYK; this pass is for the damage only.
            if jpeg_decoder() == "simplejpeg":
                import simplejpeg

                simplejpeg.decode_jpeg(payload, colorspace="CMYK", strict=True)
            return None
        return decode_stored(payload, codec="jpeg", where=where)
    except (ShardError, ValueError) as error:
        cause = str(error.facts["cause"]) if isinstance(error, ShardError) else str(error)
        # libjpeg says this of lost data. Its other warnings are about headers ("Invalid SOS
        # parameters", unusual chroma), with which Pillow copes or refuses on its own.
        if "Corrupt JPEG data" in cause or "Premature end" in cause or "truncated" in cause:
            _refuse_file(cause, where)
        return None


def _check_tiff(payload: bytes, image: TiffImageFile, where: str) -> None:
    """Refuses a TIFF whose strips or tiles libtiff would fill up, with a warning at most.

    Raises:
      SampleError: `image_decode`: fax compression, of whose strips the rows cannot be counted.
      ValueError: Compressed data ends early or is damaged.
    """
    tags = image.tag_v2
    compression = int(tags.get(_TIFF_COMPRESSION, 1))
    if compression in _TIFF_FAX:
        raise SampleError("image_decode.unchecked", where=where, compression=compression)
    if compression != _TIFF_JPEG:
        return  # of the others libtiff refuses strips that are short
    tables = bytes(tags.get(_TIFF_JPEG_TABLES, b""))
    for offsets, lengths in _TIFF_PARTS:
        for start, length in zip(tags.get(offsets, ()), tags.get(lengths, ()), strict=False):
            part = payload[start : start + length]
            # An abbreviated stream: the tables are stored once, between an SOI and an EOI.
            _check_jpeg_blocks(tables[:-2] + part[2:] if tables else part)


def _check_jpeg_blocks(payload: bytes) -> None:
    """Decodes a JPEG strictly, whatever its colours; without simplejpeg its scans are checked only.

    Raises:
      ValueError: Blocks are missing or damaged.
    """
    check_jpeg(payload)
    if jpeg_decoder() == "simplejpeg":
        import simplejpeg

        *_, colors, _ = simplejpeg.decode_jpeg_header(payload)
        space = "CMYK" if colors in ("CMYK", "YCCK") else "RGB"
        simplejpeg.decode_jpeg(payload, colorspace=space, strict=True)


def _bare_file(payload: bytes, image: Image.Image, codec: Codec) -> bytes | None:
    """Copies a file without its metadata, if its compressed data could be stored as it is.

    Raises:
      ValueError: A PNG that `check_png` refuses.
    """
    if codec == "jpeg" and image.format in ("JPEG", "MPO"):
        return _bare_jpeg(payload)
    if codec == "png" and image.format == "PNG":
        return _bare_png(payload)
    if codec == "webp" and image.format == "WEBP" and image.mode == "RGB":
        # The short form of a lossless file: one chunk, no room for metadata.
        size = 8 + int.from_bytes(payload[4:8], "little")
        return payload[:size] if payload[12:16] == b"VP8L" else None
    return None


def _bare_jpeg(payload: bytes) -> bytes | None:
    """Copies a baseline three-component JPEG: tables, frame, scan, JFIF and Adobe markers.

    None for anything else: progressive files cost three times as much to decode at each load, and
    a walk that fails is left to the decoder to explain.
    """
    parts = [b"\xff\xd8"]
    at = 2
    scans = 0
    while match := JPEG_MARKER.match(payload, at):
        marker, at = payload[match.end() - 1], match.end()
        if marker == JPEG_EOI:
            return b"".join([*parts, b"\xff\xd9"]) if scans == 1 else None
        stop = at + int.from_bytes(payload[at : at + 2], "big")
        body = payload[at + 2 : stop]
        if marker in JPEG_FRAMES and (
            marker != _SOF0 or body[:1] != b"\x08" or body[5:6] != b"\x03"
        ):
            return None
        if marker == JPEG_SOS:
            scans += 1
            following = JPEG_MARKER.search(payload, stop)
            if body[-3:] != _SEQUENTIAL_SCAN or following is None:
                return None
            stop = following.start()
        if _keeps_meaning(marker, body):
            parts.append(bytes((0xFF, marker)) + payload[at:stop])
        at = stop
    return None


def _keeps_meaning(marker: int, body: bytes) -> bool:
    # JFIF and Adobe segments say which colours the numbers are; the rest is for people.
    if marker == _APP0:
        return body.startswith(b"JFIF\0")
    return marker == _APP14 or not (_APP0 <= marker <= _APP15 or marker == _COM)


def _bare_png(payload: bytes) -> bytes | None:
    """Copies the header and the pixels of an 8-bit RGB PNG; None for any other kind."""
    chunks = check_png(payload)
    bits, color_type, interlace = payload[24], payload[25], payload[28]
    if (bits, color_type, interlace) != (8, 2, 0) or any(
        kind in _PNG_MEANING_CHUNKS for kind, _, _ in chunks
    ):
        return None
    pixels = [payload[start:stop] for kind, start, stop in chunks if kind in _PNG_PIXEL_CHUNKS]
    return payload[:8] + b"".join(pixels)


def _read(path: Path, where: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise SampleError("image_missing.picture", where=where) from None
    except OSError as error:
        raise StorageError("image_read", where=where, error=str(error)) from error


def _checked_array(pixels: np.ndarray, where: str) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise SampleError(
            "image_mode.array",
            where=where,
            got=f"{pixels.dtype} {pixels.shape}",
            want="uint8 [H, W, 3]",
        )
    return np.ascontiguousarray(pixels)


def _size(picture: Image.Image | np.ndarray) -> tuple[int, int]:
    if isinstance(picture, Image.Image):
        return picture.size
    return picture.shape[1], picture.shape[0]


def _refuse_file(cause: Exception | str, where: str) -> NoReturn:
    text = str(cause).lower()
    if isinstance(cause, Image.DecompressionBombError):  # Pillow's own bound, for WebP
        code = "image_bomb.webp"
    elif "truncated" in text or "premature end of jpeg file" in text:
        code = "image_truncated"
    else:
        code = "image_decode.damaged"
    raise SampleError(code, where=where, cause=str(cause)) from None


def _reject(name: str, got: object, want: str) -> NoReturn:
    raise ConfigError("image_policy", where=name, name=name, got=got, want=want)
