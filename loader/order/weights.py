"""Weights of a mixture: nested groups of datasets to one share of the samples per dataset."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from shardspec.errors import ConfigError

_MOST_WEIGHT = 1e15
"""Larger weights would leave others no place in 64-bit arithmetic."""

Weighting = Literal["rate", "root_size", "size"]
Unit = Literal["samples", "tokens"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureSource:
    """One dataset of a mixture, with its weight among its siblings."""

    name: str
    """Unique name; the dataset's own seed derives from it."""
    num_samples: int
    """Samples in the dataset, >= 1."""
    rate: float = 1.0
    """Factor of its weight, >= 0."""
    size: int | None = None
    """Counts as this many samples in weighting by size; None: as `num_samples`."""
    mean_tokens: float | None = None
    """Mean tokens of a sample; needed where weights are shares of tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureGroup:
    """Sources or groups that share a weight."""

    sources: tuple[MixtureSource | MixtureGroup, ...]
    rate: float = 1.0
    """Factor of the group's weight among its siblings, >= 0."""
    by: Weighting = "rate"
    """How members share: by rate alone, or rate times the size or its square root. A group in a
    group counts with the sum of its members' sizes."""
    unit: Unit = "samples"
    """What members share: the samples of the group, or its tokens, of which a sample has
    `mean_tokens`. Of the root, the argument of `mixture_weights` counts."""


def mixture_weights(
    group: MixtureGroup, *, unit: Unit = "samples"
) -> list[tuple[MixtureSource, float]]:
    """Flattens nested groups to one weight per source.

    Inside a group a member weighs rate, rate * size or rate * sqrt(size); the weights of a group
    sum to its own weight among its siblings. The root's sum is 1.

    Args:
      group: The root.
      unit: What the root's weights are shares of. With "tokens", a member's share of samples is its
        weight divided by its mean tokens: those of a group follow from its members' shares.

    Returns:
      (source, share of the samples), in the order written.

    Raises:
      ConfigError: `mixture_weights`, `mixture_unit`, `mixture_twice` or `mixture_mean_tokens`.

    >>> a = MixtureSource(name="a", num_samples=100)
    >>> b = MixtureSource(name="b", num_samples=900)
    >>> [w for _, w in mixture_weights(MixtureGroup(sources=(a, b), by="root_size"))]
    [0.25, 0.75]
    """
    flat = _flatten(replace(group, unit=unit))
    names = [source.name for source, _ in flat]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, "mixture_twice", names=twice)
    return flat


def _flatten(group: MixtureGroup) -> list[tuple[MixtureSource, float]]:
    """Lists the sources of a group, each with its share of the group's samples."""
    require(bool(group.sources), "mixture_empty.group")
    powers = {"rate": 0.0, "root_size": 0.5, "size": 1.0}
    known = isinstance(group.by, str) and group.by in powers
    require(known, "mixture_weights.by", by=group.by)
    known = isinstance(group.unit, str) and group.unit in get_args(Unit)
    require(known, "mixture_unit", got=repr(group.unit))
    raw, parts = [], []
    for source in group.sources:
        require(is_weight(source.rate), "mixture_weights.rate", rate=repr(source.rate))
        part = _flatten(source) if isinstance(source, MixtureGroup) else [(source, 1.0)]
        share = source.rate * _size(source) ** powers[group.by]
        raw.append(share / _mean_tokens(part) if group.unit == "tokens" else share)
        parts.append(part)
    total = math.fsum(raw)
    require(total > 0, "mixture_weights.zero")
    return [
        (source, share * own / total)
        for share, part in zip(raw, parts, strict=True)
        for source, own in part
    ]


def _mean_tokens(part: list[tuple[MixtureSource, float]]) -> float:
    """Averages the tokens of a sample over sources by their shares of samples."""
    means = []
    for source, share in part:
        if not source.mean_tokens or source.mean_tokens <= 0:
            raise ConfigError(
                "mixture_mean_tokens", where=source.name, mean_tokens=source.mean_tokens
            )
        means.append(share * source.mean_tokens)
    return math.fsum(means)


def is_weight(value: object) -> bool:
    """Returns True for a plain number that may be a weight: 0 to 1e15, no bool, no array."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    return bool(0 <= value <= _MOST_WEIGHT)


def _size(source: MixtureSource | MixtureGroup) -> int:
    if isinstance(source, MixtureGroup):
        return sum(_size(member) for member in source.sources)
    return source.num_samples if source.size is None else source.size


def require(condition: bool, code: str, **facts: object) -> None:
    if not condition:
        raise ConfigError(code, facts=facts)
