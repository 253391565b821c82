"""StreamOptions: the arguments that all datasets share, checked where they are given.

A value of another type would end in an error far from its cause, or mean something else than it
says: "8" samples, a misspelt name, a number as a flag. Each is refused by the name of the argument.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from loader.order import Locality, Tail, is_whole
from loader.reading import Check, Network
from loader.stream.split import OpenSplit, open_split
from loader.stream.stream import Builder, DatasetPlan, Stream, StreamPart
from loader.stream.subset import Keys
from loader.topology import CurrentTopology
from shardspec.errors import ConfigError
from shardspec.keyed import dataset_seed

logger = logging.getLogger(__name__)

CACHE_BYTES = 64 * 2**30
"""Default bound of a cache."""

_MOST = 2**62  # as steps and counts of the order
_SHOWN = 60  # characters of a value that an error repeats


def require_argument(fits: bool, name: str, value: object, wanted: str) -> None:
    """Refuses the value of an argument.

    Raises:
      ConfigError: `argument`.
    """
    if not fits:
        shown = repr(value)
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
        raise ConfigError("argument", name=name, got=shown, wanted=wanted)


def whole_argument(name: str, value: Any, *, least: int = 1, most: int = _MOST) -> int:
    """Returns an argument that must be a whole number, as Python's own.

    Raises:
      ConfigError: `argument`.
    """
    whole = is_whole(value)
    wanted = f"below {most}" if whole and value >= most else f"of at least {least}"
    require_argument(whole and least <= value < most, name, value, f"a whole number {wanted}")
    return int(value)


def seed_argument(value: Any) -> int:
    """Returns a seed as Python's own integer.

    Raises:
      ConfigError: `argument`.
    """
    fits = is_whole(value) and 0 <= value < 2**64
    require_argument(fits, "seed", value, "a whole number from 0 to 2**64 - 1")
    return int(value)


def name_argument(name: str, value: object, known: Any) -> None:
    """Refuses an argument that is not one of the names of a Literal.

    Raises:
      ConfigError: `argument`.
    """
    names = get_args(known)
    wanted = "one of " + ", ".join(map(repr, names))
    require_argument(isinstance(value, str) and value in names, name, value, wanted)


def is_rate(value: object) -> bool:
    """Returns True for a plain number of at least 0."""
    plain = isinstance(value, int | float | np.integer | np.floating)
    return plain and not isinstance(value, bool) and bool(value >= 0)  # type: ignore[operator]


def flag_argument(name: str, value: object) -> None:
    """Refuses an argument that is not True or False.

    Raises:
      ConfigError: `argument`.
    """
    require_argument(isinstance(value, bool | np.bool_), name, value, "True or False")


def require_used(given: Mapping[str, bool], why: str, *, remedy: str) -> None:
    """Refuses arguments that would be ignored.

    Args:
      given: Names of arguments; True for those that were given another value than the default.
      why: After "would have no effect".
      remedy: After "leave them out, or".

    Raises:
      ConfigError: `argument_unused`.
    """
    names = ", ".join(name for name, is_given in given.items() if is_given)
    if names:
        raise ConfigError("argument_unused", names=names, why=why, remedy=remedy)


def is_listed(value: object) -> bool:
    """Returns True for what can be listed: of arrays those with an axis; no text."""
    text = isinstance(value, str | bytes | Mapping)
    return isinstance(value, Iterable) and not text and getattr(value, "ndim", 1) > 0


def _is_path(value: object) -> bool:
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    return isinstance(text, str) and bool(text) and "\0" not in text


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    """Arguments of `StreamingDataset` that any dataset has; see there."""

    url: str | os.PathLike[str]
    split: str
    seed: int
    batch_size: int | None
    shuffle: bool
    tail: Tail
    rank: int | None
    world_size: int | None
    check: Check
    cache: str | None
    cache_bytes: int
    network: Network | None
    canonical_ranks: int | None
    active_blocks: int | None
    block_size: int | None
    locality: Locality
    max_samples: int | None
    where: str | None
    keys: Keys | None

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        require_argument(_is_path(self.url), "url", self.url, "a path or URL")
        put("url", str(self.url))
        require_argument(isinstance(self.split, str), "split", self.split, "the name of a split")
        put("seed", seed_argument(self.seed))
        counts = ("batch_size", "canonical_ranks", "active_blocks", "block_size", "world_size")
        for name in (*counts, "max_samples"):
            if getattr(self, name) is not None:
                put(name, whole_argument(name, getattr(self, name), least=int(name in counts)))
        if self.rank is not None:
            put("rank", whole_argument("rank", self.rank, least=0))
        put("cache_bytes", whole_argument("cache_bytes", self.cache_bytes))
        flag_argument("shuffle", self.shuffle)
        name_argument("tail", self.tail, Tail)
        name_argument("check", self.check, Check)
        name_argument("locality", self.locality, Locality)
        fits = self.cache is None or _is_path(self.cache)
        require_argument(fits, "cache", self.cache, "a folder or None")
        if self.cache is not None:
            put("cache", str(self.cache))
        fits = self.network is None or isinstance(self.network, Network)
        require_argument(fits, "network", self.network, "a Network or None")
        fits = self.where is None or isinstance(self.where, str)
        require_argument(fits, "where", self.where, "a condition as text, or None")
        fits = self.keys is None or is_listed(self.keys) or _is_path(self.keys)
        require_argument(fits, "keys", self.keys, "a list of keys, a file or URL, or None")
        if self.cache is None:
            changed = {"cache_bytes": self.cache_bytes != CACHE_BYTES}
            require_used(changed, "without cache", remedy="name a folder: cache=")
        if not self.shuffle:
            names = ("active_blocks", "block_size")
            changed = {name: getattr(self, name) is not None for name in names}
            changed["locality"] = self.locality != "any"
            require_used(changed, "with shuffle=False", remedy="shuffle")

    def open(self) -> OpenSplit:
        """Reads the manifest, and for a subset the indexes.

        Raises:
          ManifestError, ConfigError, ShardError, StorageError: As `open_split`.
        """
        data = open_split(
            str(self.url),
            split=self.split,
            check=self.check,
            cache=self.cache,
            cache_bytes=self.cache_bytes,
            network=self.network,
            max_samples=self.max_samples,
            where=self.where,
            keys=self.keys,
        )
        unused = [name for name in ("cache", "network") if getattr(self, name) is not None]
        if unused and not data.reader.is_remote:
            logger.warning(
                "%s: no use for %s: all of its files are local, or on a mounted file system",
                self.url,
                ", ".join(f"{name}=" for name in unused),
            )
        return data

    def stream(self, data: OpenSplit, builder: Builder) -> Stream[Builder]:
        """Makes the stream of the dataset, in the order that its arguments say.

        Raises:
          ConfigError: `rank`, `topology`.
        """
        part = StreamPart(
            data=data,
            builder=builder,
            topology=CurrentTopology(rank=self.rank, world_size=self.world_size),
            tail=self.tail,
            shuffle=self.shuffle,
        )
        plan = DatasetPlan(
            num_samples=data.num_samples,
            seed=dataset_seed(self.seed, data.manifest.dataset, data.name),
            tail=self.tail,
            shuffle=self.shuffle,
            canonical_ranks=self.canonical_ranks,
            active_blocks=self.active_blocks,
            block_size=self.block_size,
            locality=self.locality,
        )
        return Stream([part], plan, seed=self.seed, batch_size=self.batch_size, named=False)
