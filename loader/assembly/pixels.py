"""From a stored picture to what a vision encoder takes: crops, patches, normalised values.

`render` turns one stored picture into the uint8 crops of a view:

0. *The user's function*, if there is one, makes another picture of the same size.
1. *Cut.* The draw's crop box, given in source pixels, is scaled to the stored picture and rounded
   to whole stored pixels. What it keeps replaces the whole picture, so that tiling, masks
   and token counts, which follow from the source's shape, stay as they are.
2. *Resize* to the size that `shardspec.tiling` computes; nothing to do for a picture of that size.
3. *Flip*, then *colour*. Padding is added afterwards, so it is always 0.
4. *Place* on the frame: centred with padding (fit "pad"), or only the centre kept ("center-crop").
5. *Tile*: the overview and the tiles are copied out of their frames.

A stored picture shows the whole of its original, at any size and without padding. Everything is
uint8 in [..., H, W, 3] memory, as decoders write it; models that want channels first get a
transposed view of it (`loader.assembly.collate`). No thread counts are set here: the caller
decides.

A picture may come encoded (`Encoded`). Where nothing is left to do to it, it is decoded straight
into its crop; otherwise into scratch memory, from where each crop is written once.
"""

# Shape letters: N crops, S side of a crop, H x W pixels, P patches per side, p side of a patch.

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from time import perf_counter
from typing import Any, Literal, TypeVar, overload

import numpy as np
import torch
import torch.nn.functional

from loader.assembly.augment import NO_CHANGE, Draw, Resample, apply_color, mean_grey
from loader.buffers import Scratch
from shardspec.errors import ConfigError, SampleError, nearest
from shardspec.media import Reduction, decode_stored
from shardspec.sample import Codec
from shardspec.tiling import (
    ImageView,
    canvas_size,
    frame_size,
    overview_size,
    select_tiling,
)

Normalization = Literal["imagenet", "openai", "siglip"]

MEAN_STD: Mapping[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "openai": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and standard deviation of R, G and B on the scale 0..1: those of ImageNet (torchvision,
DINOv2), of the preprocessing in openai/CLIP, and SigLIP's x * 2 - 1."""

_BAND_PX = 128
"""Lines of a frame that tiles are copied from at a time: a band of it stays in the second-level
cache for all the tiles that share it (0.31 instead of 0.38 ms for 7.6 crops of 378 px)."""

_FILTERS: Mapping[Resample, Mapping[str, Any]] = {
    "bicubic": {"mode": "bicubic", "antialias": True, "align_corners": False},
    "bilinear": {"mode": "bilinear", "antialias": True, "align_corners": False},
    "bilinear-aliased": {"mode": "bilinear", "antialias": False, "align_corners": False},
    "nearest": {"mode": "nearest-exact"},
}

_REDUCTIONS: tuple[Reduction, ...] = (8, 4, 2)

_Array = TypeVar("_Array", np.ndarray, torch.Tensor)


class Encoded:
    """A stored picture, not decoded yet."""

    __slots__ = ("codec", "decode_s", "height", "payload", "where", "width")

    def __init__(
        self, payload: memoryview, width: int, height: int, *, codec: Codec, where: str = ""
    ) -> None:
        """Names a picture.

        Args:
          payload: The whole member.
          width: Stored width, in pixels; another one in the payload is an error.
          height: Stored height, in pixels.
          codec: How it is stored.
          where: Shard and key, for errors.
        """
        self.payload, self.codec, self.where = payload, codec, where
        self.width, self.height = width, height
        self.decode_s = 0.0
        """Seconds of decoding it."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, 3)."""
        return self.height, self.width, 3

    def decode(self, out: np.ndarray, *, reduce: Reduction = 1) -> np.ndarray:
        """Decodes into `out`, uint8 [H, W, 3], and returns it.

        Raises:
          ShardError: `image_decode`.
        """
        start_s = perf_counter()
        try:
            return decode_stored(
                self.payload, codec=self.codec, out=out, where=self.where, reduce=reduce
            )
        finally:
            self.decode_s += perf_counter() - start_s

    def pixels(
        self, scratch: Scratch, purpose: str, *, at_least: tuple[int, int] | None = None
    ) -> np.ndarray:
        """Gives its pixels: a view of the payload for raw ones, otherwise in scratch memory.

        Args:
          scratch: The thread's.
          purpose: Of the memory.
          at_least: A JPEG is decoded at 1/2, 1/4 or 1/8 of its sides, where they divide by that and
            this (width, height) is still reached; None: it is decoded whole.

        Raises:
          ShardError: `image_decode`.
        """
        if self.codec == "raw":
            return decode_stored(self.payload, codec=self.codec, where=self.where)
        reduce: Reduction = 1
        if at_least is not None and self.codec == "jpeg":
            reduce = _reduction(self.width, self.height, at_least)
        shape = (self.height // reduce, self.width // reduce, 3)
        return self.decode(scratch(purpose, shape), reduce=reduce)


def _reduction(width: int, height: int, at_least: tuple[int, int]) -> Reduction:
    for reduce in _REDUCTIONS:
        divides = width % reduce == 0 and height % reduce == 0
        if divides and width >= reduce * at_least[0] and height >= reduce * at_least[1]:
            return reduce
    return 1


def render(
    picture: np.ndarray | Encoded,
    *,
    source_width: int,
    source_height: int,
    view: ImageView,
    draw: Draw = NO_CHANGE,
    overview: np.ndarray | Encoded | None = None,
    out: np.ndarray | None = None,
    scratch: Scratch | None = None,
    resample: Resample = "bicubic",
    reduced: bool = False,
) -> np.ndarray:
    """Renders the crops of one picture.

    Args:
      picture: The stored picture, uint8 [H, W, 3], at any size; never written to.
      source_width: Width of the upright original, in pixels: tiling follows its shape.
      source_height: Height of the upright original, in pixels.
      view: What the model sees.
      draw: The augmentation, drawn for the source's size; the default changes nothing.
      overview: The stored overview, uint8 [h, w, 3]; never written to. It replaces a
        resized `picture` where it has the view's `overview_size` and nothing is cut off.
      out: uint8 [N, S, S, 3], a slice of a batch perhaps, or the `patch_cells` of patches; None
        makes a new array of crops.
      scratch: Where encoded pictures are decoded that need more than that; None: a new one.
      resample: Filter of what is resized, unless the draw has one.
      reduced: Decode a JPEG at 1/2, 1/4 or 1/8 of its sides where the view needs no more of it.

    Returns:
      `out`: the overview, then the tiles in row-major order. One crop for crop_mode "resize".

    Raises:
      ShardError: `image_decode`, for encoded pictures.
      SampleError: `image_pixels`, for anything but uint8 [H, W, 3] with pixels in it.
      ConfigError: `render_out`, for an `out` of another shape or type; `draw_box`, for a crop that
        reaches out of the source; as `OwnAugment.apply`.
    """
    if draw.own is not None:
        # Of the whole stored picture: overview and tiles are made of what comes out.
        scratch = scratch or Scratch()
        picture = draw.own.apply(_decoded(picture, scratch, "picture"))
        draw, overview = NO_CHANGE, None
    size = (source_width, source_height)
    rows, cols = select_tiling(*size, view)
    out = _checked_out(out, 1 + rows * cols, view)
    small, crop = overview_size(*size, view), (view.size_px, view.size_px)
    whole = picture
    if overview is not None and draw.crop is None and overview.shape == (*small[::-1], 3):
        whole = overview
    in_place = (
        isinstance(whole, Encoded)
        and (whole is overview or not rows)
        and out.ndim == 4
        and whole.shape == (*crop, 3) == (*small, 3)
        and not (draw.crop or draw.flip or draw.changes_color)
    )
    if in_place:
        assert isinstance(whole, Encoded)
        whole.decode(out[0])
        if not rows:
            return out
    scratch = scratch or Scratch()
    resample = draw.resample or resample
    if rows or whole is picture:
        enough = canvas_size(*size, view) if reduced and draw.crop is None else None
        pixels = _decoded(picture, scratch, "picture", at_least=enough)
        kept = _cut(pixels, draw, source_width=source_width, source_height=source_height)
    # One mean per picture, so that overview and tiles keep the same colours.
    grey_mean = 0.0
    if not in_place:
        shown = kept if whole is picture else _decoded(whole, scratch, "overview")
        shown = _fit(shown, canvas=small, frame=crop, resample=resample)
        grey_mean = mean_grey(shown) if draw.contrast != 1.0 else 0.0
        _put(out[0], _finish(shown, draw, grey_mean, frame=crop))
    if rows:
        frame = frame_size(*size, view)
        canvas = _fit(kept, canvas=canvas_size(*size, view), frame=frame, resample=resample)
        _tile(
            _finish(canvas, draw, grey_mean, frame=frame),
            out[1:].reshape(rows, cols, *out.shape[1:]),
            view=view,
        )
    return out


def resize(
    pixels: np.ndarray, width: int, height: int, *, resample: Resample = "bicubic"
) -> np.ndarray:
    """Resizes a picture on uint8.

    Torch's uint8 kernel reads and writes [H, W, 3] memory as it is (a channels-last view): 1.3 ms
    for 1344 x 1008 to 336 x 336 on one AVX2 core with the antialiased bicubic filter, where Pillow
    takes 7.6 ms, and within one grey level of Pillow's BICUBIC.

    Args:
      pixels: uint8 [H, W, 3].
      width: Wanted width, in pixels, >= 1.
      height: Wanted height, in pixels, >= 1.
      resample: The filter.

    Returns:
      uint8 [height, width, 3]: `pixels` itself where it has that size already, else a new array.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    # Torch warns about read-only memory, and leaves the fast kernel for row gaps: copy those. The
    # axis of one image comes first: added after the permutation it would get a stride by which
    # torch no longer sees channels last, and the result would be transposed twice.
    image_1HWC = torch.from_numpy(np.require(pixels, np.uint8, ["C", "W"]))[None]
    resized = torch.nn.functional.interpolate(
        image_1HWC.permute(0, 3, 1, 2),
        size=(height, width),
        **_FILTERS[resample],
    )
    return np.ascontiguousarray(resized[0].permute(1, 2, 0))


def patchify(crops: _Array, patch_px: int) -> _Array:
    """Cuts crops into flattened patches.

    Args:
      crops: [N, S, S, 3] of any type, numpy or torch.
      patch_px: Side p of a patch, in pixels; divides S.

    Returns:
      [N, (S / p)**2, p * p * 3]: patches in row-major order, their pixels too, channels last.
    """
    num, size = crops.shape[:2]
    side = size // patch_px
    cells = crops.reshape(num, side, patch_px, side, patch_px, 3)
    patches: _Array = cells.swapaxes(2, 3).reshape(num, side * side, patch_px * patch_px * 3)
    return patches


def patch_cells(patches_NLD: np.ndarray, patch_px: int) -> np.ndarray:
    """Views the memory of patches as crops: [N, P, p, P, p, 3], for `render` to write to.

    Args:
      patches_NLD: C-contiguous [N, (S / p)**2, p * p * 3], as `patchify` gives them.
      patch_px: Side p of a patch, in pixels.
    """
    num, cells = patches_NLD.shape[:2]
    side = math.isqrt(cells)
    grid = patches_NLD.reshape(num, side, side, patch_px, patch_px, 3)
    view: np.ndarray = grid.swapaxes(2, 3)
    return view


@overload
def normalize(
    images: np.ndarray, *, kind: Normalization, out: np.ndarray | None = None
) -> np.ndarray: ...
@overload
def normalize(images: torch.Tensor, *, kind: Normalization) -> torch.Tensor: ...
def normalize(
    images: np.ndarray | torch.Tensor, *, kind: Normalization, out: np.ndarray | None = None
) -> object:
    """Maps 0..255 to what a vision encoder was trained with: (x / 255 - mean) / std.

    Args:
      images: Values in 0..255, uint8 as a rule. A torch tensor has channels first, [..., 3, H, W],
        as batches have, in any memory order and on any device; a numpy array has channels last,
        [..., H, W, 3], as crops have.
      kind: A name of `MEAN_STD`.
      out: For numpy arrays, float32 of their shape to fill and return; None makes a new one.

    Returns:
      `out`, or a new float32 tensor or array of the same shape (and memory order). The map is
      folded into one multiplication and one addition per value, which differs from the formula by
      a few units in the last place.

    Raises:
      ConfigError: `normalization`, for an unknown name.
    """
    if kind not in MEAN_STD:
        raise ConfigError("normalization", hint=nearest(kind, MEAN_STD), got=kind)
    if isinstance(images, torch.Tensor):
        scale, offset = _affine(kind, images.device)
        return torch.addcmul(offset, images.to(torch.float32), scale)
    scale_C, offset_C = (part.numpy().ravel() for part in _affine(kind, torch.device("cpu")))
    normalized = np.multiply(images, scale_C, out=out, dtype=np.float32)
    normalized += offset_C
    return normalized


@functools.lru_cache(maxsize=64)
def _affine(kind: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes scale and offset, float32 [3, 1, 1] each; kept, as a copy to a device costs."""
    mean, std = (np.array(part) for part in MEAN_STD[kind])
    parts = (1.0 / (255.0 * std), -mean / std)
    scale, offset = (
        torch.tensor(part, dtype=torch.float32, device=device).view(3, 1, 1) for part in parts
    )
    return scale, offset


def _cut(pixels: np.ndarray, draw: Draw, *, source_width: int, source_height: int) -> np.ndarray:
    """Views what the draw's crop keeps of the stored picture."""
    if draw.crop is None:
        return pixels
    left, top, right, bottom = draw.crop
    if not (0 <= left < right <= source_width and 0 <= top < bottom <= source_height):
        raise ConfigError("draw_box", crop=draw.crop, source=(source_width, source_height))
    height, width = pixels.shape[:2]
    rows = _scaled(top, bottom, of=source_height, to=height)
    columns = _scaled(left, right, of=source_width, to=width)
    return pixels[rows, columns]


def _fit(
    picture: np.ndarray,
    *,
    canvas: tuple[int, int],
    frame: tuple[int, int],
    resample: Resample,
) -> np.ndarray:
    """Resizes a picture to its canvas, without what the frame would cut off.

    The part that stays is cut from the picture before, not after resizing: a long thin picture
    would need a canvas of hundreds of megabytes. Both are the same where nothing is resized.

    Returns:
      uint8 [min(canvas, frame) on each axis, 3]; perhaps a view of `picture`.
    """
    (canvas_width, canvas_height), (frame_width, frame_height) = canvas, frame
    x, y = max(0, canvas_width - frame_width) // 2, max(0, canvas_height - frame_height) // 2
    width, height = min(canvas_width, frame_width), min(canvas_height, frame_height)
    rows = _scaled(y, y + height, of=canvas_height, to=picture.shape[0])
    columns = _scaled(x, x + width, of=canvas_width, to=picture.shape[1])
    return resize(picture[rows, columns], width, height, resample=resample)


def _finish(
    content: np.ndarray, draw: Draw, grey_mean: float, *, frame: tuple[int, int]
) -> np.ndarray:
    """Flips and colours the content of a frame and centres it there: uint8 [H, W, 3]."""
    if draw.flip:
        # 14 x faster than numpy's copy from a reversed view, which moves three bytes at a time.
        whole = torch.from_numpy(np.require(content, np.uint8, ["C", "W"]))
        content = torch.flip(whole, [1]).numpy()
    if draw.changes_color:
        content = apply_color(content, draw, grey_mean=grey_mean)
    frame_width, frame_height = frame
    height, width = content.shape[:2]
    if (width, height) == frame:
        return content
    framed = np.zeros((frame_height, frame_width, 3), np.uint8)
    x, y = (frame_width - width) // 2, (frame_height - height) // 2
    framed[y : y + height, x : x + width] = content
    return framed


def _tile(frame: np.ndarray, tiles: np.ndarray, *, view: ImageView) -> None:
    """Copies the tiles out of their frame.

    Args:
      frame: uint8 [H, W, 3].
      tiles: uint8 [R, C, S, S, 3] or [R, C, P, p, P, p, 3].
      view: Says where neighbours begin.
    """
    rows, cols = tiles.shape[:2]
    side, step_px, patch_px = view.size_px, view.window_px, view.patch_px
    # Whole patches, so that a band of a tile is a band of its cells too.
    band_px = max(1, _BAND_PX // patch_px) * patch_px
    for r in range(rows):
        for y in range(0, side, band_px):
            stop = min(y + band_px, side)
            band = frame[r * step_px + y : r * step_px + stop]
            for c in range(cols):
                lines = band[:, c * step_px : c * step_px + side]
                if tiles.ndim == 5:
                    tiles[r, c, y:stop] = lines
                else:
                    _put(tiles[r, c, y // patch_px : stop // patch_px], lines)


def _put(out: np.ndarray, lines: np.ndarray) -> None:
    """Copies lines [h, S, 3] to crops of the same shape, or to cells [h / p, p, P, p, 3]."""
    out[...] = lines.reshape(out.shape)


def _decoded(
    picture: np.ndarray | Encoded,
    scratch: Scratch,
    purpose: str,
    *,
    at_least: tuple[int, int] | None = None,
) -> np.ndarray:
    if isinstance(picture, Encoded):
        pixels = picture.pixels(scratch, purpose, at_least=at_least)
    else:
        pixels = picture
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise SampleError(
            "image_pixels", got=f"{pixels.dtype} {list(pixels.shape)}", want="uint8 [H, W, 3]"
        )
    return pixels


def _scaled(start: int, stop: int, *, of: int, to: int) -> slice:
    """Scales the range [start, stop) of a line of `of` pixels to one of `to` pixels.

    Both ends go to the nearest pixel border; at least one pixel is left.

    >>> _scaled(1, 4, of=8, to=4), _scaled(7, 8, of=8, to=2)
    (slice(1, 2, None), slice(1, 2, None))
    """
    first, last = ((2 * end * to + of) // (2 * of) for end in (start, stop))
    first = min(first, to - 1)
    return slice(first, max(last, first + 1))


def _checked_out(out: np.ndarray | None, count: int, view: ImageView) -> np.ndarray:
    crops = (count, view.size_px, view.size_px, 3)
    if out is None:
        return np.empty(crops, np.uint8)
    side, patch = view.patches_per_side, view.patch_px
    if out.shape not in (crops, (count, side, patch, side, patch, 3)) or out.dtype != np.uint8:
        raise ConfigError(
            "render_out", got=f"{out.dtype} {list(out.shape)}", want=f"uint8 {list(crops)}"
        )
    return out
