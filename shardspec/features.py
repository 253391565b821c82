"""Features of a frozen vision backbone that are stored in the place of pictures.

A dataset of the codec "features" is another one, sample by sample, whose pictures were given to a
backbone: the member of each image is an array of what came out, and no picture is left. The part
`features` of its recipe says which backbone that was and what it was shown (`StoredFeatures`).

An image has one *row* for each crop, tile, token or patch that the backbone makes a result of; all
rows of a dataset have one shape, [tokens, dim] or [dim]. The member `<key>.features.npy` (or
`<key>.0.features.npy` ...) is a .npy with the 128-byte header of all arrays:

| type | stored as | error of a value x |
|---|---|---|
| `float32` | `<f4` [rows, *row] | none |
| `float16` | `<f2` [rows, *row] | 2**-11 abs(x), or 2**-25; more than 65,504 is refused |
| `bfloat16` | `<u2` [rows, *row], the upper halves of float32 | 2**-8 abs(x) |
| `int8` | `|i1` [rows, *row + 4] | half a scale, of each vector: its largest abs(x) / 254 |

An `int8` vector ends with its own scale, a float32 in 4 bytes: x is the integer times the scale,
which is the vector's largest magnitude / 127.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import numpy as np

from shardspec.errors import ConfigError, SampleError, ShardError
from shardspec.families import Family, family_from_dict, family_to_dict
from shardspec.sample import ARRAY_HEADER_BYTES, decode_array, encode_array
from shardspec.tiling import ImageView

FeatureType = Literal["float32", "float16", "bfloat16", "int8"]

FEATURES = "features"
"""The codec of datasets whose pictures are features, and the part of their recipes."""

_STORED: Mapping[str, str] = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "int8": "|i1"}
_DELIVERED: Mapping[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int8": np.float32,
}
_SCALE_BYTES = 4
_LARGEST_INT8 = 127


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFeatures:
    """Whose features a dataset has, and of which pixels: the part `features` of its recipe."""

    dtype: FeatureType
    row_shape: tuple[int, ...]
    """[tokens, dim] or [dim]."""
    backbone: str = field(compare=False)
    """Its class, for people."""
    fingerprint: str
    """Of its configuration and weights: sha256."""
    layer: int | None = None
    """Number of its hidden states; None for what it returns."""
    tokens: str = "all"
    """Which tokens of a hidden state: "all", or "patches" without the first one."""
    compute: str = "float32"
    """Type of its weights and pixels while it ran."""
    device: str = field(default="cpu", compare=False)
    """Kind of device that it ran on."""
    batch: int = field(default=1, compare=False)
    """Most pictures that it was shown at a time."""
    image: ImageView | None = None
    """Tiling, of a dataset of the Molmo kind."""
    resample: str | None = None
    normalize: str | None = None
    pixels: str | None = None
    family: Family | None = None
    """Of a dataset that was built for a model."""
    backend: str | None = None
    rows_per_units: tuple[int, int] | None = None
    """How many rows for how many units of a family's picture; None where that depends on it."""

    def __post_init__(self) -> None:
        if self.dtype not in get_args(FeatureType):
            wanted = "one of " + ", ".join(map(repr, get_args(FeatureType)))
            raise ConfigError("argument", name="dtype", got=repr(self.dtype), wanted=wanted)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], *, where: str = "") -> StoredFeatures:
        """Reads what `to_dict` wrote.

        Raises:
          ConfigError: `features_fields`: it is of another release, or damaged; as
            `family_from_dict`.
        """
        values = dict(document)
        try:
            values["row_shape"] = tuple(map(int, values["row_shape"]))
            if values.get("rows_per_units") is not None:
                rows, units = map(int, values["rows_per_units"])
                values["rows_per_units"] = (rows, units)
            if values.get("image") is not None:
                values["image"] = ImageView.from_dict(values["image"])
            if values.get("family") is not None:
                values["family"] = family_from_dict(values["family"], where=where)
            return cls(**values)
        except (TypeError, ValueError, KeyError) as error:
            raise ConfigError("features_fields", where=where, error=error) from error

    def to_dict(self) -> dict[str, Any]:
        """Lists it in plain JSON types."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["row_shape"] = list(self.row_shape)
        values["rows_per_units"] = self.rows_per_units and list(self.rows_per_units)
        values["image"] = self.image and self.image.to_dict()
        values["family"] = self.family and family_to_dict(self.family)
        return values

    @property
    def array_dtype(self) -> np.dtype:
        """Type of delivered arrays; those of bfloat16 have its bits, as NumPy lacks the type."""
        found: np.dtype = np.dtype(_DELIVERED[self.dtype])
        return found

    @property
    def row_bytes(self) -> int:
        """Length of a stored row."""
        return math.prod(self._stored_row) * np.dtype(_STORED[self.dtype]).itemsize

    @property
    def _stored_row(self) -> tuple[int, ...]:
        *outer, dim = self.row_shape
        return (*outer, dim + (_SCALE_BYTES if self.dtype == "int8" else 0))

    def num_rows(self, num_bytes: int) -> int:
        """Counts the rows of a member by its length."""
        return max(0, num_bytes - ARRAY_HEADER_BYTES) // self.row_bytes

    def encode(self, values: np.ndarray, *, where: str = "") -> bytes:
        """Makes the member of an image.

        Args:
          values: float32 [rows, *row_shape].
          where: Key, for errors.

        Raises:
          SampleError: `features_value`: not a number, or too large for the type.
        """
        values = np.ascontiguousarray(values, np.float32)
        # Before rounding, which makes a number of some that are none; a GPU's are among them.
        finite = bool(np.isfinite(values).all())
        with np.errstate(over="ignore", invalid="ignore"):
            stored = _ENCODE[self.dtype](values)
        # What was too large has become infinite; no integer has.
        if not finite or (self.dtype != "int8" and not np.isfinite(self._values(stored)).all()):
            raise SampleError("features_value", where=where, dtype=self.dtype)
        return encode_array(stored)

    def decode(
        self, payload: bytes | memoryview, *, out: np.ndarray | None = None, where: str = ""
    ) -> np.ndarray:
        """Reads the member of an image.

        Args:
          payload: The whole member.
          out: `array_dtype` [rows, *row_shape], to be filled; None makes a new array.
          where: Shard and key, for errors.

        Returns:
          `out`, or the new array.

        Raises:
          ShardError: `array_size`, `array_header`; `features_rows`: another number of rows.
        """
        stored = decode_array(
            payload, dtype=_STORED[self.dtype], columns=self._stored_row, where=where
        )
        if out is None:
            out = np.empty((len(stored), *self.row_shape), self.array_dtype)
        if len(out) != len(stored):
            raise ShardError("features_rows.stored", where=where, got=len(stored), want=len(out))
        if self.dtype == "int8":
            np.multiply(stored[..., :-_SCALE_BYTES], _scales(stored), out=out, dtype=np.float32)
        else:
            out[...] = stored
        return out

    def _values(self, stored: np.ndarray) -> np.ndarray:
        if self.dtype == "bfloat16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return stored


def _scales(stored: np.ndarray) -> np.ndarray:
    """Gives the scale of each vector: float32 [..., 1]."""
    return np.ascontiguousarray(stored[..., -_SCALE_BYTES:]).view("<f4")


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounds to the nearest, and to the even one of two: the bits, uint16."""
    bits = values.view(np.uint32)
    carried = bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)
    return (carried >> 16).astype("<u2")


def _to_int8(values: np.ndarray) -> np.ndarray:
    largest = np.abs(values).max(axis=-1, keepdims=True, initial=0)
    scale = (largest / np.float32(_LARGEST_INT8)).astype("<f4")
    with np.errstate(divide="ignore"):
        whole = np.where(scale > 0, np.rint(values / scale), 0)
    stored = np.empty((*values.shape[:-1], values.shape[-1] + _SCALE_BYTES), np.int8)
    stored[..., :-_SCALE_BYTES] = np.clip(whole, -_LARGEST_INT8, _LARGEST_INT8)
    stored[..., -_SCALE_BYTES:] = scale.view(np.int8)
    return stored


_ENCODE: Mapping[str, Any] = {
    "float32": lambda values: values.astype("<f4", copy=False),
    "float16": lambda values: values.astype("<f2"),
    "bfloat16": _to_bfloat16,
    "int8": _to_int8,
}
