"""Augmentation of one picture: what is drawn, how its colours change, where its points go.

The filter of the resize is drawn once for a sample, after all its images (`draw_filter`), and only
where there is a choice. For the rest there are three steps, each a function of its arguments alone:

1. `draw` turns the settings and the sample's generator into a `Draw`. It always takes the same nine
   numbers from the generator, in the same order, whatever the settings and the sample's geometry
   flags say; the flags only decide which of them are used. So a flag of one picture never shifts
   what is drawn after it. A view that augments nothing draws nothing: these are the last draws.
2. `loader.assembly.pixels.render` applies the crop and the flip while it resizes, and calls
   `apply_color`.
3. `transform_points` moves points along with the crop and the flip.

Colour. Brightness, contrast, saturation and hue, in this order, are affine maps of RGB, so they
collapse into one 3 x 3 matrix and one offset per picture:

    brightness b:  v -> b v
    contrast c:    v -> c v + (1 - c) m,  m the mean grey of the brightened picture
    saturation s:  v -> s v + (1 - s) grey(v)
    hue h:         a rotation of the chroma plane (of YUV and YIQ alike) by h turns

Values are clipped once, at the end; libraries that clip between the steps differ where a value
leaves 0..255 on the way. The rotation is linear and keeps luma; a shift of the HSV hue is neither,
and differs from it by more the stronger the colour.

The matrix is rounded to multiples of 2**-11. Then every product and sum is exact in float32 (8 bits
of pixel, at most 24 bits in all), so the result is the same on every machine, with every number of
threads and with or without fused multiply-add.
"""

# Shape letters: N points, H x W pixels.

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from loader.assembly.own_augment import OwnAugment
from shardspec.errors import ConfigError
from shardspec.keyed import draw_below
from shardspec.sample import Geometry

NUM_DRAWS = 9
"""Uniform numbers that `draw` takes from the generator: area, ratio, x, y, flip, brightness,
contrast, saturation, hue. A new augmentation appends; it never inserts."""

Resample = Literal["bicubic", "bilinear", "bilinear-aliased", "nearest"]
"""Filters of a resize at load: the first two with antialiasing, the others without."""

GREY = (0.299, 0.587, 0.114)
"""Luma weights of R, G and B (ITU-R BT.601)."""

_CHROMA = (0.493, 0.877)
"""U = 0.493 (B - Y), V = 0.877 (R - Y) (colour difference signals, ITU-R BT.470)."""

_STEP = 2.0**-11
"""Grid of the colour matrix: with factors up to 2 no partial sum reaches 2**13 (see the test), so
13 + 11 bits fit the 24 bits of a float32. It moves a value by less than 0.19 grey levels."""

_GROUP = 8
"""Pixels per row of the matrix product: a block-diagonal 24 x 24 matrix runs 8 x faster than the
3 x 3 one (80 against 640 us for 32768 pixels, one core with AVX2; 16 pixels take 120 us)."""

_CHUNK_PX = 1 << 15
"""Pixels per pass: 384 KiB of float32, so that the passes meet in the second-level cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Augment:
    """The ranges that augmentation draws from; everything is off by default.

    Raises:
      ConfigError: `augment_range`, naming every field that is out of range.
    """

    crop_scale: tuple[float, float] = (1.0, 1.0)
    """Share of the picture's area that a crop keeps, (least, most), in (0, 1]."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width / height of a crop in source pixels, (least, most), above 0. Where no such box of the
    drawn area fits into the picture, the nearest ratio that does."""
    flip_probability: float = 0.0
    """Probability of a horizontal flip, 0 to 1."""
    brightness: float = 0.0
    """Half width x of the range [1 - x, 1 + x] of the brightness factor, 0 to 1."""
    contrast: float = 0.0
    """The same for contrast."""
    saturation: float = 0.0
    """The same for saturation."""
    hue: float = 0.0
    """The hue shift is uniform in [-hue, hue] turns of the colour circle, 0 to 0.5."""
    resample: tuple[Resample, ...] = ()
    """Filters of which each sample draws one in each epoch, all equally likely; () keeps the
    view's. Where the stored image has its final size, there is nothing to resize."""

    def __post_init__(self) -> None:
        scale, ratio = self.crop_scale, self.crop_ratio
        jitter = ("brightness", "contrast", "saturation")
        good = {
            "crop_scale": len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1,
            "crop_ratio": len(ratio) == 2 and 0 < ratio[0] <= ratio[1] < math.inf,
            "flip_probability": 0 <= self.flip_probability <= 1,
            **{name: 0 <= getattr(self, name) <= 1 for name in jitter},
            "hue": 0 <= self.hue <= 0.5,
            "resample": set(self.resample) <= set(get_args(Resample)),
        }
        bad = {name: getattr(self, name) for name, fine in good.items() if not fine}
        if bad:
            raise ConfigError("augment_range", facts=bad)

    @classmethod
    def standard(cls) -> Augment:
        """Returns a mild setting for natural pictures, in the spirit of ImageNet training."""
        return cls(
            crop_scale=(0.8, 1.0),
            flip_probability=0.5,
            brightness=0.2,
            contrast=0.2,
            saturation=0.2,
            hue=0.05,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnDraw:
    """One call of a function of the user's."""

    augment: OwnAugment
    seed: int
    where: str
    """Key of the sample, for errors."""

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """Augments a picture; see `OwnAugment.apply`."""
        return self.augment.apply(picture, self.seed, where=self.where)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """What happens to one picture in one epoch; the default changes nothing."""

    crop: tuple[int, int, int, int] | None = None
    """(left, top, right, bottom) in whole pixels of the upright source; None keeps the whole."""
    flip: bool = False
    """Mirror left and right, after the crop."""
    brightness: float = 1.0
    """Factor, 0 to 2."""
    contrast: float = 1.0
    """Factor, 0 to 2."""
    saturation: float = 1.0
    """Factor, 0 to 2."""
    hue: float = 0.0
    """Turns of the colour circle, -0.5 to 0.5; positive takes red towards yellow."""
    resample: Resample | None = None
    """The filter of a resize; None for the view's."""
    own: OwnDraw | None = None
    """What a function of the user's does to it, instead of all others."""

    @property
    def changes_color(self) -> bool:
        """Whether any of the four colour values differs from its identity."""
        return (self.brightness, self.contrast, self.saturation, self.hue) != (1.0, 1.0, 1.0, 0.0)


NO_CHANGE = Draw()
"""The draw that changes nothing."""

_OFF = Augment()
_FLIP, _CROP, _COLOR = Geometry.FLIP.value, Geometry.CROP.value, Geometry.COLOR.value


def draw(
    augment: Augment,
    rng: np.random.RandomState,
    *,
    geometry: Geometry | int,
    width: int,
    height: int,
) -> Draw:
    """Draws the augmentation of one picture.

    Args:
      augment: The ranges.
      rng: The sample's generator; gives exactly `NUM_DRAWS` uniform numbers, always.
      geometry: What the sample allows; the rest of the draw is left at its identity.
      width: Width of the upright source, in pixels, >= 1.
      height: Height of the upright source, in pixels, >= 1.

    >>> rng = np.random.RandomState(0)
    >>> draw(Augment(), rng, geometry=Geometry.ALL, width=640, height=480) == NO_CHANGE
    True
    """
    uniform = rng.random_sample(NUM_DRAWS)
    if augment == _OFF:
        return NO_CHANGE
    area, ratio, x, y, flip, brightness, contrast, saturation, hue = uniform.tolist()
    flags = int(geometry)  # members of an enum take 1 µs to combine
    crop = None
    if flags & _CROP:
        crop = _crop_box(augment, area, ratio, x, y, width=width, height=height)
    flipped = bool(flags & _FLIP) and flip < augment.flip_probability
    if not flags & _COLOR:
        return Draw(crop=crop, flip=flipped)
    return Draw(
        crop=crop,
        flip=flipped,
        brightness=1.0 + augment.brightness * (2.0 * brightness - 1.0),
        contrast=1.0 + augment.contrast * (2.0 * contrast - 1.0),
        saturation=1.0 + augment.saturation * (2.0 * saturation - 1.0),
        hue=augment.hue * (2.0 * hue - 1.0),
    )


def draw_own(
    augment: OwnAugment, rng: np.random.RandomState, *, geometry: Geometry | int, where: str = ""
) -> Draw:
    """Draws what a function of the user's does to one picture: the seed of its generator.

    One number is taken from the sample's generator, whatever the sample allows.
    """
    seed = draw_below(rng, 1 << 32)
    if int(augment.needs) & ~int(geometry):
        augment.warn_of_left_alone(where)
        return NO_CHANGE
    return Draw(own=OwnDraw(augment=augment, seed=seed, where=where))


def draw_filter(augment: Augment, rng: np.random.RandomState) -> Resample | None:
    """Draws the filter of a sample; takes a number from the generator only if there are several."""
    choices = augment.resample
    return choices[draw_below(rng, len(choices))] if choices else None


def apply_color(
    pixels: np.ndarray,
    draw: Draw,
    *,
    grey_mean: float | None = None,
) -> np.ndarray:
    """Changes brightness, contrast, saturation and hue in one pass.

    Args:
      pixels: uint8 [..., H, W, 3].
      draw: Only its colour values are used.
      grey_mean: Mean luma of the picture before the change, 0 to 255; None measures `pixels`.

    Returns:
      A new array, uint8 [..., H, W, 3].
    """
    out = np.array(pixels, order="C")
    if not draw.changes_color:
        return out
    if grey_mean is None:
        # Only contrast uses the mean; measuring it costs a tenth of the pass.
        grey_mean = mean_grey(pixels) if draw.contrast != 1.0 else 0.0
    matrix, offset = _color_map(draw, grey_mean)
    one = torch.from_numpy(matrix.T.astype(np.float32))
    group = torch.from_numpy(np.kron(np.eye(_GROUP), matrix.T).astype(np.float32))
    flat = torch.from_numpy(out).view(-1, 3)
    # Fresh memory for every step would fault in its pages again and again.
    values, mapped = torch.empty(2, min(_CHUNK_PX, flat.shape[0]) * 3)
    for start in range(0, flat.shape[0], _CHUNK_PX):
        part = flat[start : start + _CHUNK_PX]
        mapping = one if part.shape[0] % _GROUP else group
        rows = part.view(-1, mapping.shape[0])
        before, after = (memory[: part.numel()].view(rows.shape) for memory in (values, mapped))
        torch.mm(before.copy_(rows), mapping, out=after)
        rows.copy_(after.add_(offset).round_().clamp_(0.0, 255.0))
    return out


def mean_grey(pixels: np.ndarray) -> float:
    """Measures the mean luma of a picture exactly: uint8 [..., H, W, 3] to 0..255.

    >>> mean_grey(np.full((2, 2, 3), 7, np.uint8))
    7.0
    """
    width = pixels.shape[-2]
    # Rows first: one vectorised addition per row, 20 x faster than a sum over pixels.
    rows = pixels.reshape(-1, width * 3).sum(axis=0, dtype=np.uint32)
    red, green, blue = rows.reshape(width, 3).sum(axis=0, dtype=np.uint64).tolist()
    # GREY in thousandths: integers up to the one division, so the mean depends on no order of sums.
    return float((299 * red + 587 * green + 114 * blue) / (1000 * (pixels.size // 3)))


def transform_points(
    points_N2: np.ndarray,
    draw: Draw,
    *,
    width: int,
    height: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Moves points along with the crop and the flip, or as the user's function says.

    Points are continuous: the centre of the pixel in column i is at i + 0.5, and `width` is the
    right border. The cropped picture replaces the whole one, so it is again `width` x
    `height` large, and points given as shares of the picture stay shares of what the model sees.

    Args:
      points_N2: (x, y) in pixels of the upright source, any real type [N, 2].
      draw: Only its crop and flip are used, or its function.
      width: Width of the upright source, in pixels.
      height: Height of the upright source, in pixels.

    Returns:
      The moved points, float64 [N, 2], and bool [N]: whether the point is still in the picture,
      its borders included. Points outside are moved by the same rule and stay outside.

    Raises:
      ConfigError: `augment_function`: a function of the user's does not say where points go.
    """
    if draw.own is not None:
        own = draw.own
        moved = own.augment.move(points_N2, own.seed, width=width, height=height, where=own.where)
        return moved, np.all((moved >= 0) & (moved <= (width, height)), axis=1)
    left, top, right, bottom = draw.crop or (0, 0, width, height)
    size = np.array([width, height], dtype=np.float64)
    moved = np.asarray(points_N2, dtype=np.float64).reshape(-1, 2) - (left, top)
    inside = np.all((moved >= 0) & (moved <= (right - left, bottom - top)), axis=1)
    if draw.crop is not None:
        moved *= size / (right - left, bottom - top)
    if draw.flip:
        moved[:, 0] = width - moved[:, 0]
    return moved, inside


def _crop_box(
    augment: Augment, area: float, ratio: float, x: float, y: float, *, width: int, height: int
) -> tuple[int, int, int, int] | None:
    """Turns four uniform numbers into a box of whole pixels; None if it is the whole picture.

    The area is kept and the ratio gives way. (Rejection sampling, as elsewhere, would take an
    unknown number of draws.)
    """
    least, most = augment.crop_scale
    share = least + area * (most - least)
    # A box of this share fits if share * W/H <= ratio <= W/H / share.
    shape = width / height
    low, high = (min(max(r, share * shape), shape / share) for r in augment.crop_ratio)
    aspect = math.exp(math.log(low) + ratio * (math.log(high) - math.log(low)))
    box_width = min(max(round(math.sqrt(share * width * height * aspect)), 1), width)
    box_height = min(max(round(math.sqrt(share * width * height / aspect)), 1), height)
    if (box_width, box_height) == (width, height):
        return None
    left = int(x * (width - box_width + 1))
    top = int(y * (height - box_height + 1))
    return left, top, left + box_width, top + box_height


def _color_map(draw: Draw, grey_mean: float) -> tuple[np.ndarray, float]:
    """Folds the four changes into `matrix @ rgb + offset`, on the grid `_STEP`.

    Saturation and hue keep grey where it is, so contrast's offset passes them unchanged.

    Returns:
      float64 [3, 3], and the offset that all three channels share.
    """
    grey = np.tile(GREY, (3, 1))
    saturation = draw.saturation * np.eye(3) + (1.0 - draw.saturation) * grey
    yuv = np.eye(3) - grey  # rows: R - Y, G - Y, B - Y
    yuv = np.stack([GREY, _CHROMA[0] * yuv[2], _CHROMA[1] * yuv[0]])
    cos, sin = math.cos(2.0 * math.pi * draw.hue), math.sin(2.0 * math.pi * draw.hue)
    rotation = np.array([[1.0, 0.0, 0.0], [0.0, cos, -sin], [0.0, sin, cos]])
    hue = np.linalg.solve(yuv, rotation @ yuv)
    matrix = draw.brightness * draw.contrast * (hue @ saturation)
    offset = (1.0 - draw.contrast) * draw.brightness * grey_mean
    return np.round(matrix / _STEP) * _STEP, round(offset / _STEP) * _STEP
