"""Values of robots' actions and states: their statistics, and what is done with them and undone.

1. `value_statistics` measures each dimension when a dataset is built; the manifest keeps them.
2. `normalize` maps [q01, q99] of each dimension to [-1, 1] and clips what is outside;
   `denormalize` undoes it.
3. `value_bins` cuts [-1, 1] into bins, `bin_values` gives their centers.
4. `bin_tokens` names bins by the last ids of a vocabulary, in reverse, `token_bins` undoes it;
   `openvla_tokens` does the same with OpenVLA's own bins, `openvla_values` undoes it.

A dimension whose q01 equals its q99 becomes 0, and q01 again. Dimensions that are `kept`, such as a
gripper that is 0 or 1, are neither scaled nor clipped: which these are is stated, never guessed.
All arithmetic is in float64. Pure.
"""

# D: dimensions; N: steps; ...: any axes in front.

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from shardspec.errors import ConfigError

NUM_BINS = 256
"""Bins of [-1, 1], as of RT-2, OpenVLA and MolmoAct."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueStatistics:
    """What each dimension of a vector was over the steps of the training episodes."""

    count: int
    """Steps; those with a value that is not finite are left out."""
    minimum: tuple[float, ...]
    maximum: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Of the population (divided by the count)."""
    q01: tuple[float, ...]
    """The quantile 0.01 of all steps, linear between neighbours."""
    q99: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Gives them in plain JSON types, as manifests keep them."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> ValueStatistics:
        """Reads them back.

        Raises:
          ConfigError: `value_statistics`: a field is missing or of another length.
        """
        try:
            names = [each.name for each in fields(cls) if each.name != "count"]
            columns = {name: tuple(float(v) for v in document[name]) for name in names}
            count = int(document["count"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError("value_statistics", error=repr(error)) from error
        if len({len(column) for column in columns.values()}) != 1:
            raise ConfigError("value_statistics", error="fields of different lengths")
        return cls(count=count, **columns)


def value_statistics(values_ND: np.ndarray) -> ValueStatistics:
    """Measures each dimension.

    Args:
      values_ND: [N, D], N >= 1; steps with a value that is not finite are left out.

    Raises:
      ConfigError: `value_statistics`: no step is left.

    >>> value_statistics(np.array([[0.0], [1.0], [2.0]])).mean
    (1.0,)
    """
    values = np.asarray(values_ND, np.float64)
    values = values[np.isfinite(values).all(axis=1)]
    if not len(values):
        raise ConfigError("value_statistics", error="no step with finite values")
    q01, q99 = np.quantile(values, [0.01, 0.99], axis=0)
    columns = {
        "minimum": values.min(axis=0),
        "maximum": values.max(axis=0),
        "mean": values.mean(axis=0),
        "std": values.std(axis=0),
        "q01": q01,
        "q99": q99,
    }
    return ValueStatistics(
        count=len(values), **{name: tuple(column.tolist()) for name, column in columns.items()}
    )


def normalize(
    values: np.ndarray, statistics: ValueStatistics, *, kept: Collection[int] = ()
) -> np.ndarray:
    """Maps q01 to -1 and q99 to 1, and clips what is outside.

    Args:
      values: [..., D].
      statistics: Of the same dimensions.
      kept: Dimensions that stay as they are.

    Returns:
      float64 [..., D].
    """
    values = np.asarray(values, np.float64)
    low, width, scaled = _ranges(values, statistics, kept)
    shares = (values - low) / np.where(width == 0, 1.0, width)
    made = np.clip(2.0 * shares - 1.0, -1.0, 1.0)
    made = np.where(width == 0, 0.0, made)
    return np.where(scaled, made, values)


def denormalize(
    values: np.ndarray, statistics: ValueStatistics, *, kept: Collection[int] = ()
) -> np.ndarray:
    """Undoes `normalize`: -1 becomes q01, 1 becomes q99; what was clipped does not come back.

    Args:
      values, statistics, kept: As of `normalize`.

    Returns:
      float64 [..., D].
    """
    values = np.asarray(values, np.float64)
    low, width, scaled = _ranges(values, statistics, kept)
    return np.where(scaled, low + (values + 1.0) / 2.0 * width, values)


def value_bins(values: np.ndarray) -> np.ndarray:
    """Cuts [-1, 1] into 256 bins of equal width, numbered from 0; outer bins take what is outside.

    Returns:
      int64, the shape of `values`, which must be finite.

    >>> value_bins(np.array([-1.0, 0.0, 0.5, 1.0])).tolist()
    [0, 128, 192, 255]
    """
    shares = (np.clip(np.asarray(values, np.float64), -1.0, 1.0) + 1.0) / 2.0
    bins: np.ndarray = np.minimum((shares * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    return bins


def bin_values(bins: np.ndarray) -> np.ndarray:
    """Gives the centers of bins: at most 1/256 away from what was cut.

    >>> bin_values(np.array([0, 255])).tolist()
    [-0.99609375, 0.99609375]
    """
    return (np.asarray(bins, np.float64) + 0.5) / (NUM_BINS / 2) - 1.0


def bin_tokens(bins: np.ndarray, *, vocab_size: int) -> np.ndarray:
    """Names bins by the last ids of a vocabulary: bin 0 is the last one.

    Args:
      bins: 0 to 255.
      vocab_size: Ids of the tokenizer itself, without the padding of an embedding.

    >>> bin_tokens(np.array([0, 255]), vocab_size=32_000).tolist()
    [31999, 31744]
    """
    return vocab_size - 1 - np.asarray(bins, np.int64)


def token_bins(tokens: np.ndarray, *, vocab_size: int) -> np.ndarray:
    """Undoes `bin_tokens`; other ids give the nearest bin."""
    return np.clip(vocab_size - 1 - np.asarray(tokens, np.int64), 0, NUM_BINS - 1)


def openvla_tokens(values: np.ndarray, *, vocab_size: int) -> np.ndarray:
    """Names values from -1 to 1 by the last ids of a vocabulary exactly as OpenVLA does.

    Its bins lie between 256 edges, so there are 255, and 1.0 has an id of its own.

    >>> openvla_tokens(np.array([-1.0, 0.0, 1.0]), vocab_size=32_000).tolist()
    [31999, 31872, 31744]
    """
    edges = np.linspace(-1.0, 1.0, NUM_BINS)
    return vocab_size - np.digitize(np.clip(np.asarray(values, np.float64), -1.0, 1.0), edges)


def openvla_values(tokens: np.ndarray, *, vocab_size: int) -> np.ndarray:
    """Undoes `openvla_tokens`: the centers of its bins, at most 1/255 away from the values."""
    edges = np.linspace(-1.0, 1.0, NUM_BINS)
    centers = (edges[:-1] + edges[1:]) / 2.0
    number = np.clip(vocab_size - 1 - np.asarray(tokens, np.int64), 0, NUM_BINS - 2)
    values: np.ndarray = centers[number]
    return values


def named_dimensions(names: Collection[str], known: Sequence[str]) -> tuple[int, ...]:
    """Finds dimensions by their names.

    Raises:
      ConfigError: `value_names`: there is none of that name, or more than one.

    >>> named_dimensions(["gripper"], ["x", "y", "gripper"])
    (2,)
    """
    for name in names:
        if list(known).count(name) != 1:
            raise ConfigError("value_names", name=name, known=", ".join(known) or "none")
    return tuple(sorted(list(known).index(name) for name in names))


def _ranges(
    values: np.ndarray, statistics: ValueStatistics, kept: Collection[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gives q01, the width up to q99, and which dimensions are scaled; [D] each."""
    low, high = np.array(statistics.q01), np.array(statistics.q99)
    if values.shape[-1:] != low.shape:
        error = f"values of shape {values.shape} for {len(low)} dimensions"
        raise ConfigError("value_statistics", error=error)
    scaled = np.ones(len(low), bool)
    scaled[list(kept)] = False
    return low, high - low, scaled
