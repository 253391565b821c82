"""LoaderOptions: the arguments of `make_dataloader`, checked where they are given.

First each by itself and beside the others; then, as soon as they are known, against the number of
ranks and the kind of samples. Nothing is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from loader.assembly import PadSide, View
from loader.delivery import Collate, MapExample
from loader.order import is_whole, require_count
from loader.stream import (
    flag_argument,
    name_argument,
    require_argument,
    require_used,
    whole_argument,
)
from shardspec.errors import ConfigError
from shardspec.families import Family, Gemma3, PaliGemma

DECODE_THREADS = 2
"""Default number of threads."""

Balance = bool | Literal["images"]
"""Which rows the ranks of a step exchange; see `make_dataloader`."""

_PREPARED_ONLY: Mapping[str, Any] = {
    "sequence_length": None,
    "map": None,
    "pad_mode": "to_128",
    "extra_keys": (),
    "with_metadata": False,
    "columns": (),
    "pack": False,
    "max_crops": None,
    "min_images": 0,
    "max_images": None,
    "balance": True,
    "bucket_steps": 0,
    "pad_side": "right",
    "metadata": False,
    "arrays": (),
}
"""Defaults of `make_dataloader`: arguments that mean nothing for raw samples."""

_LAYOUT = ("pad_mode", "extra_keys", "with_metadata", "columns", "min_images", "pad_side", "arrays")
"""Arguments that mean nothing beside a `collate_fn` of the user's."""

_MOST = 2**31
"""Bound of counts that go into arrays."""

_MOST_S = 10**6
"""Bound of waits, in seconds: all systems can wait that long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderOptions:
    """Arguments of `make_dataloader`; see there."""

    global_batch_size: int
    sequence_length: int | None
    collate_fn: Collate | None
    map: MapExample | None
    pad_mode: str
    decode_threads: int
    workers: int
    extra_keys: tuple[str, ...]
    with_metadata: bool
    columns: tuple[str, ...]
    pack: bool
    max_crops: int | None
    min_images: int
    max_images: int | None
    balance: Balance
    bucket_steps: int
    prefetch_bytes: int
    watchdog_s: float | None
    pad_side: PadSide
    metadata: bool | tuple[str, ...]
    arrays: tuple[str, ...]

    def __post_init__(self) -> None:
        self._check_kinds()
        self._check_amounts()
        if not self.pack:
            changed = {"max_crops": self.max_crops is not None, "balance": not self.balance}
            require_used(changed, "without packs", remedy="pass pack=True")
        if self.workers:
            changed = {"decode_threads": self.decode_threads not in (0, DECODE_THREADS)}
            require_used(changed, "with worker processes", remedy="use workers=0")

    def _put(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_kinds(self) -> None:
        """Refuses values of another type; listings become tuples."""
        for name in ("collate_fn", "map"):
            value = getattr(self, name)
            require_argument(value is None or callable(value), name, value, "a function")
        for name in ("with_metadata", "pack"):
            flag_argument(name, getattr(self, name))
        balance, pad_mode = self.balance, self.pad_mode
        fits = isinstance(balance, bool) or (isinstance(balance, str) and balance == "images")
        require_argument(fits, "balance", balance, 'True, False or "images"')
        require_argument(isinstance(pad_mode, str), "pad_mode", pad_mode, "the name of a mode")
        name_argument("pad_side", self.pad_side, PadSide)
        for name in ("extra_keys", "columns", "metadata", "arrays"):
            listed, wanted = getattr(self, name), "a tuple of names"
            if name == "metadata":
                wanted = f"True, False or {wanted}"
                if isinstance(listed, bool | np.bool_):
                    self._put(name, bool(listed))
                    continue
            fits = isinstance(listed, tuple | list) and all(isinstance(one, str) for one in listed)
            require_argument(fits, name, listed, wanted)
            self._put(name, tuple(listed))
        self._put("metadata", self.metadata or False)
        self._put("with_metadata", self.with_metadata or bool(self.metadata))

    def _check_amounts(self) -> None:
        """Refuses numbers that are none, or out of bounds."""
        optional = {"sequence_length": 1, "max_crops": 1, "max_images": 0}
        for name, least in {**optional, "min_images": 0, "bucket_steps": 0}.items():
            value = getattr(self, name)
            if value is not None or name not in optional:
                self._put(name, whole_argument(name, value, least=least, most=_MOST))
        name = "global_batch_size"
        require_count(name, self.global_batch_size)
        self._put(name, whole_argument(name, self.global_batch_size, most=_MOST))
        amounts = (self.decode_threads, self.workers, self.prefetch_bytes)
        if not all(is_whole(n) and n >= 0 for n in amounts) or self.prefetch_bytes < 1:
            raise ConfigError(
                "loader_range",
                decode_threads=self.decode_threads,
                workers=self.workers,
                prefetch_bytes=self.prefetch_bytes,
            )

        limit = self.watchdog_s
        number = isinstance(limit, int | float) and not isinstance(limit, bool)
        fits = limit is None or (number and 0 < limit <= _MOST_S)
        require_argument(fits, "watchdog_s", limit, f"seconds, 0 to {_MOST_S:,}, or None")

    def require_ranks(self, world_size: int) -> None:
        """Refuses a batch that the ranks cannot divide.

        Raises:
          ConfigError: `batch_not_divisible`.
        """
        batch_size = self.global_batch_size
        if batch_size % world_size:
            below = batch_size // world_size * world_size
            near = [str(batch) for batch in (below, below + world_size) if batch > 0]
            raise ConfigError(
                "batch_not_divisible.ranks",
                near=" or ".join(near),
                global_batch_size=batch_size,
                world_size=world_size,
            )

    def require_raw(self) -> Collate:
        """Refuses what means nothing for raw samples, and returns their `collate_fn`.

        Raises:
          ConfigError: `loader_options`.
        """
        given = self._given(_PREPARED_ONLY)
        if given:
            raise ConfigError("loader_options.raw", names=", ".join(given))
        if self.collate_fn is None:
            raise ConfigError("loader_options.no_collate")
        return self.collate_fn

    def require_prepared(self, view: View) -> int:
        """Refuses what means nothing for prepared samples, and returns the sequence length.

        Raises:
          ConfigError: `loader_options`, `packing_and_buckets`, `argument_unused`.
        """
        if self.collate_fn is not None:
            # Packs are planned to have no more than `max_images`.
            given = self._given(_LAYOUT if self.pack else (*_LAYOUT, "max_images"))
            if given:
                raise ConfigError("loader_options.collate", names=", ".join(given))
        if self.sequence_length is None:
            raise ConfigError("loader_options.sequence_length")
        if self.pack and self.bucket_steps:
            raise ConfigError("packing_and_buckets", bucket_steps=self.bucket_steps)
        if view.model is not None:
            if self.pack:
                _require_packs(view.model.family, sequence_length=self.sequence_length)
            wrong: dict[str, object] = {
                "min_images": self.min_images,
                "max_images": self.max_images or 0,
                # Of packs, positions and pictures are those of the examples as they were planned.
                "pad_side": self.pad_side if self.pack and self.pad_side != "right" else "",
                "map": self.pack and self.map is not None,
                "collate_fn": self.pack and self.collate_fn is not None,
            }
            if any(wrong.values()):
                raise ConfigError("loader_options.model", facts=wrong)
        if self.pack:
            require_used({"arrays": bool(self.arrays)}, "with packs", remedy="use pack=False")
        return self.sequence_length

    def _given(self, names: Iterable[str]) -> list[str]:
        """Lists, in the order of the alphabet, which arguments are not the default."""
        return sorted(name for name in names if getattr(self, name) != _PREPARED_ONLY[name])

    @property
    def fields(self) -> bool | frozenset[str]:
        """Fields of the records that examples are to tell; True: all of them."""
        if self.metadata is True:
            return True
        return frozenset((*(self.metadata or ()), *self.arrays)) or False

    @property
    def crops_per_pack(self) -> int | None:
        """Most crops in a pack; None: any number."""
        limits = [limit for limit in (self.max_crops, self.max_images) if limit is not None]
        return min(limits, default=None)


def _require_packs(family: Family, *, sequence_length: int) -> None:
    """Refuses packed rows of which a model computes something else than of their examples.

    Raises:
      ConfigError: `loader_options`.
    """
    if not family.packs and isinstance(family, Gemma3 | PaliGemma):
        raise ConfigError("loader_options.window", family=family.kind)
    if not family.packs:
        raise ConfigError("loader_options.packs", family=family.kind)
    window = family.sliding_window if isinstance(family, PaliGemma) else 0
    if window and sequence_length > window:
        # Its model takes one mask for all layers.
        raise ConfigError("loader_options.long_rows", window=window, got=sequence_length)
