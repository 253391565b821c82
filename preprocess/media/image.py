"""Images as datasets hold them -> upright sRGB pixels at the size to store.

What is decided here, in this order:

1. The header (`preprocess.media.header`): an empty, oversized or too costly image is refused before
   anything of its size is allocated. A JPEG that takes too much memory is decoded at a fraction of
   its sides, if at least twice the stored size remains.
2. Decoding, whole or at a fraction: strict, after the file's structure shows that it is whole
   (`shardspec.image_file`). A JPEG goes through `shardspec.media` (which raises for damage that
   Pillow passes over), so that its pixels are the loader's pixels; everything else through Pillow.
   Of an animation the first frame is taken.
3. Orientation: EXIF is applied, so that coordinates in annotations mean what people saw.
4. Colour: grey of 16 bits by `>> 8` (Pillow's own conversion saturates), an embedded profile other
   than sRGB converted (perceptual intent), transparency laid over white, the rest to RGB.
5. Size: one resize by Pillow, with the policy's filter, to the size that training can ask for;
   downscale only. Where views tile, another one of the original gives the overview.

Where steps 3 to 5 change nothing and the file is of the recipe's codec, its compressed data is kept
as it is: no loss, no encoding. Metadata (EXIF with locations and names, thumbnails, comments, text)
is left out of what is kept.

The result is a function of the image and the policy alone; nothing is drawn, nothing is cut.
"""

from __future__ import annotations

import functools
import io
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, NoReturn, get_args

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from preprocess.media.fax import FAX, is_whole_fax
from preprocess.media.header import (
    BAND_PX,
    JPEG_SCAN,
    MAX_SCANS,
    REDUCTIONS,
    ImageLimits,
    coefficient_bytes,
    decode_bytes,
    is_jpeg,
    open_source,
    refuse_file,
)
from preprocess.media.memory import MemoryBudget
from preprocess.settings import Setting
from shardspec.errors import ConfigError, SampleError, ShardError, StorageError, nearest
from shardspec.families import Family, Qwen2VL
from shardspec.image_file import (
    JPEG_EOI,
    JPEG_FRAMES,
    JPEG_MARKER,
    JPEG_SOS,
    check_image_file,
    check_jpeg,
    check_png,
    check_png_rows,
    require_payload,
)
from shardspec.media import (
    PILLOW_DECODE_ERRORS,
    decode_stored,
    encode_stored,
    jpeg_decoder,
    may_lack_rows,
)
from shardspec.sample import Codec, Geometry, PreparedImage
from shardspec.tiling import ImageView, overview_size, stored_size

logger = logging.getLogger(__name__)

Resample = Literal["lanczos", "bicubic", "bilinear", "bilinear-aliased"]
"""Filters of Pillow: antialiased ones, and the plain one that looks at four pixels only."""

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

_SWAPPING = frozenset(
    {
        Image.Transpose.TRANSPOSE,
        Image.Transpose.ROTATE_270,
        Image.Transpose.TRANSVERSE,
        Image.Transpose.ROTATE_90,
    }
)
"""What exchanges width and height."""

_ANTIALIASED: Mapping[Resample, Image.Resampling] = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}

# JPEG markers (ITU-T T.81, table B.1).
_SOF0, _COM = 0xC0, 0xFE
_APP0, _APP14, _APP15 = 0xE0, 0xEE, 0xEF
_SEQUENTIAL_SCAN = b"\x00\x3f\x00"

# TIFF 6.0, and Technical Note 2 for JPEG: tags, and values of the first.
_TIFF_COMPRESSION, _TIFF_JPEG_TABLES = 259, 347
_TIFF_PARTS = ((273, 279), (324, 325))
_TIFF_JPEG = 7
_MAX_TIFF_TABLES_BYTES = 1 << 16
"""Longest JPEG tables of a TIFF, copied for each of its parts; encoders write 600."""
_JPEG_SPACES = {"Gray": ("GRAY", 1), "CMYK": ("CMYK", 4), "YCCK": ("CMYK", 4)}
"""Space to decode to, and its channels, by simplejpeg's name of the stored one; the rest is RGB."""

_PNG_PIXEL_CHUNKS = frozenset({b"IHDR", b"IDAT", b"IEND"})
_PNG_MEANING_CHUNKS = frozenset({b"tRNS", b"acTL"})


Decoding = Literal["full", "reduced"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePolicy:
    """How images are stored."""

    views: tuple[ImageView, ...] = (ImageView(),)
    """What training may ask for; the stored size serves all of them."""
    family: Family | None = None
    """The model whose pictures these are, instead of views."""
    headroom: float = 1.0
    """Factor >= 1 on both sides of the largest canvas, for training that crops or resizes again."""
    max_side_px: int | None = None
    """Longest side, in pixels, instead of the bound that follows from the views."""
    codec: Annotated[
        Codec,
        Setting(
            "format of the stored images; all but jpeg are without loss, and lossless is the "
            "smaller of png and webp for each image",
            group="images",
        ),
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
    resample: Annotated[
        Resample,
        Setting("filter that images are shrunk with for storing", group="images"),
    ] = "lanczos"
    """Molmo 1 resizes with "bilinear", Molmo 2 with "bilinear-aliased"; docs/build.md says what the
    filters differ by."""
    decode: Annotated[
        Decoding,
        Setting(
            "full: decode images whole; reduced: decode large JPEGs at 1/2, 1/4 or 1/8 of their "
            "sides, as long as these are twice what is stored, which is faster",
            group="images",
        ),
    ] = "full"
    """Measured with scenes of 12 megapixels for 336 px: "reduced" takes a fifth of the time to
    decode and resize, and its pixels are 54 dB from those of "full"."""
    overview: Literal["stored", "resized"] = "stored"
    """"stored": where views tile, and share size_px and fit, the overview is stored beside the
    image. For about a fifth more bytes nothing is resized at load, and the overview is made from
    the original. "resized": the loader makes it from the stored image in each epoch."""
    limits: ImageLimits = field(default_factory=ImageLimits)
    """Larger images are refused from their header."""

    def __post_init__(self) -> None:
        if not self.views and self.max_side_px is None and self.family is None:
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
        if self.resample not in get_args(Resample):
            _reject("resample", self.resample, nearest(str(self.resample), get_args(Resample)))
        if self.decode not in get_args(Decoding):
            _reject("decode", self.decode, nearest(str(self.decode), get_args(Decoding)))
        if self.overview not in ("stored", "resized"):
            _reject("overview", self.overview, "'stored' or 'resized'")


class ImagePreprocessor:
    """Turns an image into what is stored of it: one decode, at most one resize, one encode.

    An overview takes a resize and an encode of its own.
    """

    def __init__(self, policy: ImagePolicy, *, memory: MemoryBudget | None = None) -> None:
        """Takes the policy, and the budget that it shares with other processes, if any."""
        self.policy = policy
        self.memory = memory
        self._warned: set[str] = set()

    def __call__(
        self,
        source: bytes | Path | Image.Image | np.ndarray,
        *,
        geometry: Geometry = Geometry.NONE,
        where: str = "",
        frame: int = 0,
        num_frames: int = 0,
        for_storing: bool = False,
    ) -> PreparedImage:
        """Prepares one image.

        Args:
          source: The file's bytes (best: only these can be kept), its path, a Pillow image (its
            current frame), or uint8 [H, W, 3] pixels, upright sRGB.
          geometry: Which augmentations leave the sample's text true.
          where: Row or URL, named in errors; a path names itself.
          frame: Which picture of a file is meant that has several, such as a page of a TIFF.
          num_frames: Of the video that the pixels are a frame of; 0 for no video.
          for_storing: Whether only what is stored is wanted: a JPEG that is kept as its file then
            has no pixels, which saves a third of decoding it.

        Returns:
          The image; its pixels are to be read only, they may be the caller's own array.

        Raises:
          SampleError: `image_missing` (no such file), `image_empty` (no bytes, no pixels),
            `image_bomb` (larger than `ImageLimits`), `image_truncated`, `image_decode` (damaged, or
            not an image), `image_mode` (colours or numbers without one meaning).
          StorageError: `image_read`: a file that exists and cannot be read; `image_memory`: the
            machine refused memory within the limits.
          ConfigError: `load_truncated_images`: the process told Pillow to accept cut-off files.
        """
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            raise ConfigError("load_truncated_images")
        if isinstance(source, np.ndarray):
            pixels = _checked_array(source, where)
            size = (pixels.shape[1], pixels.shape[0])
            self.policy.limits.check_size(*size, where=where)
            return self._sized(_Settled(image=pixels, size=size), geometry, num_frames)
        if isinstance(source, Image.Image):
            self.policy.limits.check_size(source.width, source.height, where=where)
            return self._sized(self._settle(source, where), geometry)
        if isinstance(source, Path):
            where = where or str(source)
            source = _read(source, where)
        image = open_source(source, limits=self.policy.limits, where=where)
        if frame:
            self._seek(image, frame, where)
        try:
            plan = self._plan(image, source, where)
            with self.memory.hold(plan.num_bytes) if self.memory else nullcontext():
                settled = self._from_file(image, source, plan, where, for_storing=for_storing)
                return self._sized(settled, geometry)
        except MemoryError:
            raise StorageError(
                "image_memory", where=where, width_px=image.width, height_px=image.height
            ) from None

    def _seek(self, image: ImageFile.ImageFile, frame: int, where: str) -> None:
        """Goes to a picture of a file that has several; each may have a size of its own."""
        try:
            image.seek(frame)
        except PILLOW_DECODE_ERRORS as error:
            refuse_file(error, where)
        self.policy.limits.check_size(*image.size, where=where)

    def encode(self, image: PreparedImage) -> bytes:
        """Gives the bytes to store: the kept ones, or the pixels in the policy's codec.

        With "lossless", whichever of these are fewer.

        Raises:
          SampleError: `image_size`: a side is longer than the codec can write.
        """
        codec, kept = self.policy.codec, image.kept
        if kept is not None and codec != "lossless":
            return kept
        encoded = encode_stored(image.require_pixels(), codec=codec, quality=self.policy.quality)
        return encoded if kept is None else min(kept, encoded, key=len)

    def encode_overview(self, overview: np.ndarray) -> bytes:
        """Encodes an overview, uint8 [h, w, 3], in the policy's codec."""
        return encode_stored(overview, codec=self.policy.codec, quality=self.policy.quality)

    def _plan(self, image: ImageFile.ImageFile, payload: bytes, where: str) -> _Plan:
        """Chooses the scale at which a file is decoded, by the memory that it takes.

        Raises:
          SampleError: `image_bomb`: no scale fits.
        """
        # That of a PNG is known only after decoding it, and needed only for a JPEG.
        turn = self._turn(image, where) if is_jpeg(image) else None
        size = image.size[::-1] if turn in _SWAPPING else image.size
        stored = self._stored_size(*size)
        resized = None if stored == size else stored
        stored_w, stored_h = stored[::-1] if turn in _SWAPPING else stored
        limits = self.policy.limits
        estimate = functools.partial(decode_bytes, image, payload, resized=resized)
        whole_bytes = estimate()
        reduces = self.policy.decode == "reduced"
        if (reduces or whole_bytes > limits.max_decode_bytes) and is_jpeg(image):
            # The least that memory asks for, or the most that keeps the detail.
            for reduce in reversed(REDUCTIONS) if reduces else REDUCTIONS:
                num_bytes = estimate(reduce=reduce)
                # Half of what is left at least goes in the resize, as in Pillow's own drafts.
                detailed = image.width >= 2 * reduce * stored_w
                detailed = detailed and image.height >= 2 * reduce * stored_h
                if detailed and num_bytes <= limits.max_decode_bytes:
                    return _Plan(reduce=reduce, num_bytes=num_bytes, size=size)
        limits.check_memory(image, whole_bytes, where=where)
        is_final = resized is None and turn is None
        return _Plan(reduce=1, num_bytes=whole_bytes, size=size, is_final=is_final)

    def _from_file(
        self,
        image: ImageFile.ImageFile,
        payload: bytes,
        plan: _Plan,
        where: str,
        *,
        for_storing: bool,
    ) -> _Settled:
        """Decodes a file; gives the bytes to keep as well, where the image is theirs exactly."""
        pixels = None
        bare = None
        scan_ends: Mapping[int, int] = {}
        try:
            if image.format == "PNG":
                chunks = check_png(payload)
                image.load()
                if may_lack_rows(image):
                    check_png_rows(payload, chunks)
            else:
                scan_ends = check_image_file(payload, form=str(image.format))
            if isinstance(image, TiffImageFile):
                _check_tiff(payload, image, where, most_bytes=plan.num_bytes)
            if self.policy.keep == "auto":
                bare = _bare_file(payload, image, self.policy.codec, scan_ends)
        except PILLOW_DECODE_ERRORS as error:
            refuse_file(error, where)
        if plan.reduce != 1:
            pixels = _decode_reduced(payload, image, plan.reduce, where)
            return self._settle(image, where, pixels=pixels, plan=plan)
        if (
            for_storing
            and bare is not None
            and self._is_stored_alone(image, plan, where)
            and _is_sound_jpeg(bare, image.size)
        ):
            return _Settled(image=None, size=image.size, kept=bare)
        if is_jpeg(image):
            # What is kept is also what is decoded: one pass both makes the pixels and proves them.
            pixels = _decode_jpeg(bare or payload, image.mode, where)
            bare = bare if pixels is not None else None
        settled = self._settle(image, where, pixels=pixels)
        unchanged = settled.image is (image if pixels is None else pixels)
        return replace(settled, kept=bare) if unchanged else settled

    def _is_stored_alone(self, image: ImageFile.ImageFile, plan: _Plan, where: str) -> bool:
        """Returns True for a JPEG of which the file is stored, and nothing made of its pixels."""
        final = is_jpeg(image) and plan.is_final and self._overview_size(*image.size) is None
        return final and self._profile(image, where) is None

    def _settle(
        self,
        image: Image.Image,
        where: str,
        *,
        pixels: np.ndarray | None = None,
        plan: _Plan | None = None,
    ) -> _Settled:
        """Brings an image upright and to sRGB.

        Args:
          image: The opened image, with its metadata.
          where: Named in errors.
          pixels: uint8 [H, W, 3], if it has been decoded already.
          plan: How it was decoded at a fraction; None for the whole.

        Returns:
          `pixels` or `image` itself where nothing has to change, else a new RGB image.
        """
        if pixels is None:
            try:
                image.load()
            except PILLOW_DECODE_ERRORS as error:
                refuse_file(error, where)
        turn = self._turn(image, where)
        profile = self._profile(image, where)
        if pixels is not None:
            if turn is None and profile is None and plan is None:
                return _Settled(image=pixels, size=(pixels.shape[1], pixels.shape[0]))
            image = Image.fromarray(pixels)
        try:
            rgb = _to_rgb(image, profile)
        except (*PILLOW_DECODE_ERRORS, ImageCms.PyCMSError) as error:
            raise SampleError(
                "image_mode.colors", where=where, mode=image.mode, cause=str(error)
            ) from None
        if plan is not None:
            return _Settled(image=rgb, size=plan.size, turn=turn, reduce=plan.reduce)
        if turn is not None:
            rgb = rgb.transpose(turn)
        return _Settled(image=rgb, size=rgb.size)

    def _sized(self, settled: _Settled, geometry: Geometry, num_frames: int = 0) -> PreparedImage:
        """Resizes an upright image to what is stored of it."""
        width, height = settled.size
        if settled.image is None:
            return PreparedImage(
                pixels=None,
                source_width=width,
                source_height=height,
                geometry=geometry,
                kept=settled.kept,
            )
        stored = self._stored_size(width, height, num_frames)
        small = self._overview_size(width, height)
        overview, kept = None, settled.kept
        found = settled.image
        if small is not None or stored != settled.size:
            whole = found if isinstance(found, Image.Image) else Image.fromarray(found)
            if small is not None:
                overview = np.asarray(self._resized(whole, small, settled))
            if stored != settled.size:
                kept = None
                found = self._resized(whole, stored, settled)
        return PreparedImage(
            pixels=_pixels(found) if isinstance(found, Image.Image) else found,
            source_width=width,
            source_height=height,
            geometry=geometry,
            kept=kept,
            overview=overview,
        )

    def _resized(self, image: Image.Image, size: tuple[int, int], settled: _Settled) -> Image.Image:
        resample = self.policy.resample
        if settled.reduce == 1:
            return _resize(image, size, resample, box=(0.0, 0.0, *image.size))
        turn = settled.turn
        width, height = settled.size[::-1] if turn in _SWAPPING else settled.size
        # The last blocks of a reduced image extend beyond the original's border.
        box = (0.0, 0.0, width / settled.reduce, height / settled.reduce)
        image = _resize(image, size[::-1] if turn in _SWAPPING else size, resample, box=box)
        return image if turn is None else image.transpose(turn)

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

    def _stored_size(self, width: int, height: int, num_frames: int = 0) -> tuple[int, int]:
        limit_px, longest_px = self.policy.max_side_px, max(width, height)
        if num_frames and isinstance(self.policy.family, Qwen2VL):
            size = (height, width)
            return self.policy.family.stored_frame_size(size, num_frames=num_frames)[::-1]
        if self.policy.family is not None:
            return self.policy.family.stored_size((height, width))[::-1]
        if limit_px is None:
            return stored_size(width, height, self.policy.views, headroom=self.policy.headroom)
        if longest_px <= limit_px:
            return width, height
        # Rounded half up in integers: the same on every machine.
        return (
            max(1, (2 * width * limit_px + longest_px) // (2 * longest_px)),
            max(1, (2 * height * limit_px + longest_px) // (2 * longest_px)),
        )

    def _warn_once(self, what: str, cause: object, where: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            logger.warning("%s (%s), first in %s", what, cause, where or "an unnamed image")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """How a file is decoded."""

    reduce: int
    """1, or the factor by which the sides of a JPEG are divided."""
    num_bytes: int
    """Memory that it takes."""
    size: tuple[int, int]
    """(width, height) of the upright original."""
    is_final: bool = False
    """Whether it is neither turned nor resized."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settled:
    """A decoded image in sRGB."""

    image: Image.Image | np.ndarray | None
    """None where `kept` alone is wanted."""
    size: tuple[int, int]
    """(width, height) of the upright original."""
    turn: Image.Transpose | None = None
    """What brings it upright, to be applied after the resize; None for an upright image."""
    reduce: int = 1
    kept: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Profile:
    """An embedded colour profile that is not sRGB."""

    mode: str
    """Pillow mode of what it describes: RGB, L or CMYK."""
    to_srgb: ImageCms.ImageCmsTransform

    def fits(self, mode: str) -> bool:
        """Returns True if it can describe an image of this mode."""
        if self.mode == "L":
            return mode in ("1", "L", "LA", "F") or mode.startswith("I")
        if self.mode == "CMYK":
            return mode == "CMYK"
        return mode not in ("CMYK", "LAB")


@functools.lru_cache(maxsize=16)  # their bytes are the keys: 64 MiB at most
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
    if image.mode == "RGB" and profile is None and not image.has_transparency_data:
        return image
    _require_range(image)
    width, height = image.size
    if width * height <= BAND_PX:
        return _band_to_rgb(image, profile)
    # Band by band: the steps in between take up to four times the image's own memory.
    rgb = Image.new("RGB", image.size)
    for band, y in _bands(image):
        rgb.paste(_band_to_rgb(band, profile), (0, y))
    return rgb


def _resize(
    image: Image.Image,
    size: tuple[int, int],
    resample: Resample,
    *,
    box: tuple[float, float, float, float],
) -> Image.Image:
    """Resizes a box of an RGB image."""
    if resample == "bilinear-aliased":
        # Within a level of torch's bilinear without antialiasing: Pillow cuts fractions off here.
        return image.transform(size, Image.Transform.EXTENT, box, Image.Resampling.BILINEAR)
    return image.resize(size, _ANTIALIASED[resample], box=box)


def _bands(image: Image.Image) -> Iterator[tuple[Image.Image, int]]:
    """Cuts an image into bands; gives each with its first line."""
    rows = max(1, BAND_PX // image.width)
    for y in range(0, image.height, rows):
        yield image.crop((0, y, image.width, min(y + rows, image.height))), y


def _band_to_rgb(image: Image.Image, profile: _Profile | None) -> Image.Image:
    if _is_grey_of_many_bits(image):
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


def _pixels(image: Image.Image) -> np.ndarray:
    """Copies an RGB image to uint8 [H, W, 3]."""
    if image.width * image.height <= BAND_PX:
        return np.asarray(image)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for band, y in _bands(image):
        pixels[y : y + band.height] = np.asarray(band)
    return pixels


def _as_mode(image: Image.Image, mode: str) -> Image.Image:
    # convert() to the mode an image has already is a copy.
    return image if image.mode == mode else image.convert(mode)


def _is_grey_of_many_bits(image: Image.Image) -> bool:
    return image.mode.startswith("I") or image.mode == "F"


def _require_range(image: Image.Image) -> None:
    """Refuses integers and floats that have no one meaning as greys.

    Raises:
      ValueError: The numbers' range says neither 8 nor 16 bits.
    """
    if not _is_grey_of_many_bits(image):
        return
    ends = [(v.min(), v.max()) for v in (np.asarray(band) for band, _ in _bands(image))]
    # NaN stays NaN, and is refused.
    low, high = np.min([low for low, _ in ends]), np.max([high for _, high in ends])
    if image.mode == "F":
        # Up to 1 it could mean shares of white, or 256 levels of which only black is used.
        if not (low >= 0 and high <= 255 and (high == 0 or high > 1)):
            raise ValueError(f"floats from {low} to {high} have no stated range")
    elif low < 0 or high > 0xFFFF:
        raise ValueError(f"integers from {low} to {high} are not 16 bits")


def _eight_bit_grey(image: Image.Image) -> Image.Image:
    """Brings integer and float greys to 8 bits, instead of saturating them as Pillow does."""
    values = np.asarray(image)
    if image.mode == "F":
        return Image.fromarray(np.rint(values).astype(np.uint8))
    return Image.fromarray((values >> 8).astype(np.uint8))


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
            refuse_file(cause, where)
        return None


def _is_sound_jpeg(payload: bytes, size: tuple[int, int]) -> bool:
    """Returns True if strict decoding of an RGB JPEG of this size would find no damage.

    All coefficients are parsed, as for the picture, and only their averages become pixels: damage
    is what the parser meets. False may also mean that decoding it whole is needed to know.
    """
    if jpeg_decoder() != "simplejpeg":
        return False
    import simplejpeg

    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(payload)
        if (width, height) != size or colors in ("CMYK", "YCCK"):
            return False
        least = {"min_height": -(-height // 8), "min_width": -(-width // 8)}
        simplejpeg.decode_jpeg(payload, colorspace="GRAY", strict=True, **least)
    except (ValueError, KeyError):
        return False
    return True


def _check_tiff(payload: bytes, image: TiffImageFile, where: str, *, most_bytes: int) -> None:
    """Refuses a TIFF whose strips or tiles libtiff would fill up, with a warning at most.

    Raises:
      SampleError: `image_decode`: fax compression, and not all rows are known to be there.
      ValueError: Compressed data ends early or is damaged.
    """
    tags = image.tag_v2
    compression = int(tags.get(_TIFF_COMPRESSION, 1))
    if compression in FAX and not is_whole_fax(payload, tags):
        raise SampleError("image_decode.unchecked", where=where, compression=compression)
    if compression != _TIFF_JPEG:
        return  # of the others libtiff refuses strips that are short
    tables = bytes(tags.get(_TIFF_JPEG_TABLES, b""))
    parts = {
        part
        for offsets, lengths in _TIFF_PARTS
        for part in zip(tags.get(offsets, ()), tags.get(lengths, ()), strict=False)
    }
    # Parts may share bytes only as a whole, or a short file would be decoded any number of times.
    present = sum(len(range(start, min(start + length, len(payload)))) for start, length in parts)
    if len(tables) > _MAX_TIFF_TABLES_BYTES or present > len(payload):
        raise ValueError("TIFF with overlapping parts, or with JPEG tables that are too long")
    for start, length in sorted(parts):
        part = payload[start : start + length]
        # An abbreviated stream: the tables are stored once, between an SOI and an EOI.
        _check_jpeg_blocks(tables[:-2] + part[2:] if tables else part, most_bytes=most_bytes)


def _check_jpeg_blocks(payload: bytes, *, most_bytes: int) -> None:
    """Decodes a JPEG strictly, whatever its colours; without simplejpeg its scans are checked only.

    Raises:
      ValueError: Blocks are missing or damaged, or decoding them would take more than `most_bytes`.
    """
    check_jpeg(payload)
    if jpeg_decoder() == "simplejpeg":
        import simplejpeg

        require_payload(payload)
        height, width, colors, _ = simplejpeg.decode_jpeg_header(payload)
        space, channels = _JPEG_SPACES.get(colors, ("RGB", 3))
        # Its header is not the TIFF's, whose size was judged.
        if width * height * (channels + coefficient_bytes(payload)) > most_bytes:
            raise ValueError(f"TIFF with a JPEG of {width} x {height} pixels")
        if payload.count(JPEG_SCAN) > MAX_SCANS:
            raise ValueError(f"TIFF with a JPEG of more than {MAX_SCANS} scans")
        simplejpeg.decode_jpeg(payload, colorspace=space, strict=True)


def _decode_reduced(
    payload: bytes, image: ImageFile.ImageFile, reduce: int, where: str
) -> np.ndarray | None:
    """Decodes a JPEG at 1/reduce of its sides, rounded up, strictly.

    Returns:
      uint8 [H, W, 3]; None where `image` was told to decode itself so.
    """
    width, height = -(-image.width // reduce), -(-image.height // reduce)
    if jpeg_decoder() == "simplejpeg":
        import simplejpeg

        space = "CMYK" if image.mode == "CMYK" else "RGB"
        try:
            pixels: np.ndarray = simplejpeg.decode_jpeg(
                payload, colorspace=space, strict=True, min_height=height, min_width=width
            )
        except ValueError as error:
            refuse_file(error, where)
        if space == "RGB":
            return pixels
    # Pillow's pixels are the reference for CMYK.
    image.draft(image.mode, (image.width // reduce, image.height // reduce))
    return None


def _bare_file(
    payload: bytes, image: Image.Image, codec: Codec, scan_ends: Mapping[int, int]
) -> bytes | None:
    """Copies a file without its metadata, if its compressed data could be stored as it is.

    Args:
      payload: The file.
      image: Its header.
      codec: That it would be stored in.
      scan_ends: Of a JPEG, what `check_jpeg` returned.

    Raises:
      ValueError: A PNG that `check_png` refuses.
    """
    if codec == "jpeg" and image.format in ("JPEG", "MPO"):
        return _bare_jpeg(payload, scan_ends)
    if codec in ("png", "lossless") and image.format == "PNG":
        return _bare_png(payload)
    if codec in ("webp", "lossless") and image.format == "WEBP" and image.mode == "RGB":
        # The short form of a lossless file: one chunk, no room for metadata.
        size = 8 + int.from_bytes(payload[4:8], "little")
        return payload[:size] if payload[12:16] == b"VP8L" else None
    return None


def _bare_jpeg(payload: bytes, scan_ends: Mapping[int, int]) -> bytes | None:
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
            if body[-3:] != _SEQUENTIAL_SCAN or at not in scan_ends:
                return None
            stop = scan_ends[at]
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


def pixels_file(image: np.ndarray | Image.Image) -> bytes:
    """Gives a picture that has no file one without loss: PNG.

    Raises:
      SampleError: `image_mode`: an array is not uint8 [H, W, 3].
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(_checked_array(image, ""))
    stream = io.BytesIO()
    image.save(stream, "PNG", exif=image.getexif(), compress_level=1)
    return stream.getvalue()


def _checked_array(pixels: np.ndarray, where: str) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise SampleError(
            "image_mode.array",
            where=where,
            got=f"{pixels.dtype} {pixels.shape}",
            want="uint8 [H, W, 3]",
        )
    return np.ascontiguousarray(pixels)


def _reject(name: str, got: object, want: str) -> NoReturn:
    raise ConfigError("image_policy", where=name, name=name, got=got, want=want)
