"""Subset: the samples of a split that a condition on index columns and a list of keys keep.

The indexes are read once, a million samples at a time, and the ids of the samples that remain
are held: ascending, 8 bytes each. The order numbers them from 0 to M - 1; everything else, from the
seeds of their draws to the records of bad ones, uses their ids in the whole split.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from loader.reading import ShardReader
from shardspec import storage
from shardspec.errors import ConfigError
from shardspec.expression import (
    as_numbers,
    encoded_keys,
    filter_columns,
    named_columns,
    parse_keys,
    select,
)

logger = logging.getLogger(__name__)

Keys = Iterable[str] | str | os.PathLike[str]
"""Keys of samples; or the path or URL of a file with one key per line."""

_SAMPLES_AT_ONCE = 1 << 20
"""Bounds what opening takes beside the ids: measured, 60 bytes per sample, 280 with keys. A million
samples take 0.1 s, 0.5 s with keys, on one core of a cloud machine from a warm disk."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Subset:
    """Samples chosen from a split."""

    ids: np.ndarray
    """int64 [M], ascending."""
    where: str
    """The condition, each run of blanks as one; "" without one."""
    mean_tokens: float
    """Text tokens per sample, each turn at its longest variant; 0 for raw samples."""

    def before(self, sample_id: int) -> Subset:
        """Gives the part of the subset whose ids are below one."""
        return replace(self, ids=self.ids[: np.searchsorted(self.ids, sample_id)])

    @property
    def ids_sha256(self) -> str:
        """Hashes all ids."""
        return hashlib.sha256(self.ids.astype("<i8").tobytes()).hexdigest()


def choose_subset(
    reader: ShardReader, *, num_samples: int, where: str | None, keys: Keys | None
) -> Subset:
    """Chooses among the first samples of a split; reads all their indexes.

    Args:
      reader: Of the split.
      num_samples: Samples to choose from: the first ones.
      where: A condition; see `shardspec.expression`. None or "": all.
      keys: Keys to keep, of those; None: all.

    Raises:
      ConfigError: `filter_expression`, `keys_file`, `keys_type`; `empty_result`, none is left.
      ShardError: An index cannot be read.
      StorageError: A request to the store failed.
    """
    wanted = None if keys is None else encoded_keys(_read_keys(keys))
    # On no samples: what is wrong with the text is found before all indexes are read.
    known = filter_columns([reader.index_dtype(0)])
    if where:
        select(where, {name: np.zeros(0, np.int64) for name in known})
    names = sorted(named_columns(where)) if where else []
    # In one pass: of a store, opening an index again may mean to fetch it again.
    columns = {*names, *({"key"} if wanted is not None else ()), *({"num_tokens"} & {*known})}
    found, num_known_keys, num_tokens = [], 0, 0
    for start in range(0, num_samples, _SAMPLES_AT_ONCE):
        ids = np.arange(start, min(num_samples, start + _SAMPLES_AT_ONCE), dtype=np.int64)
        values = reader.columns(sorted(columns), ids)
        kept = np.ones(len(ids), np.bool_)
        if wanted is not None:
            kept = np.isin(values["key"], wanted)
            num_known_keys += int(kept.sum())
        if where:
            # With the ids, as a condition may name no column; "" is no name.
            numbers = {"": ids, **{name: as_numbers(values[name]) for name in names}}
            kept &= select(where, numbers)
        if "num_tokens" in columns:
            num_tokens += int(values["num_tokens"][kept].sum(dtype=np.int64))
        found.append(ids[kept])
    chosen = np.concatenate(found)
    if wanted is not None and num_known_keys < len(wanted):
        unknown = len(wanted) - num_known_keys
        logger.warning("%d of %d keys belong to no sample of %s", unknown, len(wanted), reader.url)
    if not len(chosen):
        request = [f"where={where!r}"] if where else []
        request += [] if wanted is None else [f"keys= with {len(wanted)} keys"]
        raise ConfigError(
            "empty_result.subset",
            where=reader.url,
            samples=num_samples,
            request=", ".join(request),
        )
    return Subset(
        ids=chosen,
        where=" ".join((where or "").split()),
        mean_tokens=num_tokens / len(chosen),
    )


def _read_keys(keys: Keys) -> frozenset[str]:
    if isinstance(keys, str | os.PathLike):
        url = os.fspath(keys)
        try:
            payload = storage.read_bytes(url)
        except FileNotFoundError as error:
            raise ConfigError("keys_file", where=url, error=error) from error
        return parse_keys(payload, where=url)
    found = list(keys)
    for key in found:
        if not isinstance(key, str):
            raise ConfigError("keys_type", key=repr(key)[:200], type=type(key).__name__)
    return frozenset(found)
