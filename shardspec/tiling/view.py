"""ImageView: what a model sees of one image, as the model's configuration says it.

Decides which views are possible; what follows from one for a picture of some size is computed by
the other modules. The two Molmo releases differ in how they pool, see `ImageView.pooling`; a view
with crop_mode "resize" has the overview alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from shardspec.errors import ConfigError, nearest

CropMode = Literal["resize", "overlap-and-resize-c2"]
Fit = Literal["stretch", "pad", "center-crop"]
Pooling = Literal["global", "per-crop"]
OverviewStart = Literal["im_start", "low_res_im_start"]
SmallSides = Literal["training", "serving"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageView:
    """What a model sees of one image.

    Raises:
      ConfigError: `image_view`, for a field that is impossible by itself or with the others.
    """

    size_px: int = 336
    """Side of a crop (base size), a multiple of patch_px."""
    patch_px: int = 14
    """Side of a vision patch."""
    crop_mode: CropMode = "resize"
    """"resize": one crop of the whole image; "overlap-and-resize-c2": an overview and tiles."""
    fit: Fit = "stretch"
    """How the image meets the canvas: stretched, padded (aspect kept), or centre-cropped."""
    max_crops: int = 12
    """Most high-resolution crops; the overview is not counted. Not used by "resize"."""
    margin_patches: tuple[int, int] = (4, 4)
    """Overlap margins (left/top, right/bottom) of a tile, in patches. Not used by "resize"."""
    small_sides: SmallSides = "training"
    """Tiles of an image with a side shorter than both margins. "training": the side counts as one
    pixel, and the other one decides (Molmo 2's training code); "serving": one tile (the processor
    of Molmo 2 in transformers, and Molmo 1). Not used by "resize"."""
    pool: tuple[int, int] = (2, 2)
    """Patches pooled into one image token, (rows, columns)."""
    pooling: Pooling = "global"
    """"global" (2026 release) groups the patches of the whole frame, so that a token may mix two
    crops; "per-crop" (2024 release) groups inside each crop, and needs margins that the pool
    divides. They agree where the pool divides the window of a tile as well."""
    overview_start: OverviewStart = "im_start"
    """Token that opens the overview: the 2026 release uses its own one when it tiles."""
    overview_column_tokens: bool = False
    """End each row of overview tokens with a column token."""
    column_tokens: bool = True
    """End each row of high-resolution tokens with a column token."""

    def __post_init__(self) -> None:
        for name in ("size_px", "patch_px", "max_crops"):
            require_field(self, name, _is_int(getattr(self, name), at_least=1), "an integer >= 1")
        for name, least in (("margin_patches", 0), ("pool", 1)):
            value = getattr(self, name)
            pair = isinstance(value, tuple) and len(value) == 2
            good = pair and all(_is_int(v, at_least=least) for v in value)
            require_field(self, name, good, f"a tuple of two integers >= {least}")
        for name, literal in _CHOICES.items():
            choices = get_args(literal)
            require_field(
                self, name, getattr(self, name) in choices, f"one of {', '.join(choices)}"
            )
        for name in ("overview_column_tokens", "column_tokens"):
            require_field(self, name, isinstance(getattr(self, name), bool), "true or false")

        multiple = self.size_px % self.patch_px == 0
        require_field(self, "size_px", multiple, f"a multiple of patch_px={self.patch_px}")
        if self.crop_mode == "resize":
            return
        room = sum(self.margin_patches) < self.patches_per_side
        require_field(self, "margin_patches", room, f"a sum below {self.patches_per_side} patches")
        require_field(self, "fit", self.fit != "center-crop", 'crop_mode "resize" with center-crop')
        if self.pooling == "per-crop":
            divides = all(margin % p == 0 for margin in self.margin_patches for p in self.pool)
            want = f'multiples of pool={self.pool} with pooling "per-crop"'
            require_field(self, "margin_patches", divides, want)

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a crop."""
        return self.size_px // self.patch_px

    @property
    def num_patches(self) -> int:
        """Patches of one crop."""
        return self.patches_per_side**2

    @property
    def window_patches(self) -> int:
        """Stride from a tile to its neighbour, in patches: a crop less both margins."""
        return self.patches_per_side - sum(self.margin_patches)

    @property
    def window_px(self) -> int:
        """Stride from a tile to its neighbour, in pixels."""
        return self.window_patches * self.patch_px

    @property
    def margin_px(self) -> int:
        """Both margins together, in pixels: the overlap of two neighbours."""
        return sum(self.margin_patches) * self.patch_px

    @property
    def crop_tokens(self) -> tuple[int, int]:
        """Pooled tokens of a whole crop, (rows, columns); those of the overview in particular."""
        side, (pool_rows, pool_cols) = self.patches_per_side, self.pool
        return -(-side // pool_rows), -(-side // pool_cols)

    def to_dict(self) -> dict[str, Any]:
        """Lists every field in plain JSON types, for the manifest."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ImageView:
        """Reads what `to_dict` or a recipe wrote; an absent field has its default.

        Raises:
          ConfigError: `image_view`, for an unknown field or an impossible value.

        >>> ImageView.from_dict({"size_px": 378, "margin_patches": [4, 4]}).patches_per_side
        27
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise ConfigError(
                    "image_view.unknown",
                    where=f"ImageView.{name}",
                    hint=nearest(name, known),
                    got=fields[name],
                )
        values: dict[str, Any] = {}
        for name, value in fields.items():
            values[name] = tuple(value) if isinstance(value, list) else value
        return cls(**values)


_CHOICES: Mapping[str, Any] = {
    "crop_mode": CropMode,
    "fit": Fit,
    "pooling": Pooling,
    "overview_start": OverviewStart,
    "small_sides": SmallSides,
}


def require_field(view: ImageView, name: str, good: bool, want: str) -> None:
    if not good:
        raise ConfigError(
            "image_view.value",
            where=f"ImageView.{name}",
            name=name,
            got=repr(getattr(view, name)),
            want=want,
        )


def _is_int(value: object, *, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least
