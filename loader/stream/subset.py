"""Subset: the samples of a split that a condition on index columns and a list of keys keep.

The indexes are read once, a million samples at a time, and the ids of the samples that remain
are held: ascending, 8 bytes each. The order numbers them from 0 to M - 1; everything else, from the
seeds of their draws to the records of bad ones, uses their ids in the whole split.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from loader.reading import ShardReader
from shardspec import storage
from shardspec.errors import ConfigError, nearest
from shardspec.expression import (
    encoded_keys,
    filter_columns,
    filter_values,
    named_columns,
    parse_keys,
    scalar_names,
    select,
)
from shardspec.messages import counted

logger = logging.getLogger(__name__)

Keys = Iterable[str] | str | os.PathLike[str]
"""Keys of samples; or the path or URL of a file with one key per line."""

_SAMPLES_AT_ONCE = 1 << 20
"""Bounds what opening takes beside the ids: measured, 60 bytes per sample, 280 with keys. A million
samples take 0.1 s, 0.5 s with keys, on one core of a cloud machine from a warm disk."""

MAX_GROUPS = 256
"""Of a column: each is a dataset of a mixture."""


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
    nothing = {name: np.zeros(0, np.int64) for name in known}
    if reader.added is not None:
        nothing |= {n: np.zeros(0, reader.added.dtype[n]) for n in scalar_names(reader.added.dtype)}
    if where:
        select(where, nothing)
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
            numbers = {"": ids, **{name: filter_values(values[name]) for name in names}}
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
        request += [] if wanted is None else [f"keys= with {counted(len(wanted), 'key')}"]
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


def divide(
    reader: ShardReader,
    column: str,
    *,
    ids: np.ndarray,
    where: str,
    values: Sequence[Any] | None,
) -> dict[Any, Subset]:
    """Divides samples by the values of a column.

    Args:
      reader: Of the split.
      column: Of the indexes or added; of text, integers or truth values.
      ids: int64 [n], the samples, ascending.
      where: What they have in common, "" for nothing.
      values: The values wanted; None: all that there are.

    Returns:
      Each value, in the order of `values` or sorted, to its samples.

    Raises:
      ConfigError: `groups_column`: there is no such column, it is of another type, or has more than
        256 values; `empty_result`, a value that no sample has.
    """
    found = filter_values(_known_column(reader, column, ids))
    if found.dtype.kind not in "biS":
        raise ConfigError("groups_column.type", where=reader.url, column=column, type=found.dtype)
    distinct = [_plain(value) for value in np.unique(found).tolist()]
    chosen = distinct if values is None else [_plain(value) for value in values]
    if len(chosen) > MAX_GROUPS:
        raise ConfigError(
            "groups_column.values",
            where=reader.url,
            column=column,
            got=len(chosen),
            most=MAX_GROUPS,
        )
    lengths = None
    if "num_tokens" in (reader.index_dtype(0).names or ()):
        lengths = reader.column("num_tokens", ids)
    groups: dict[Any, Subset] = {}
    for value in chosen:
        text = f"{column} == {int(value) if isinstance(value, bool) else value!r}"
        kept = np.zeros(len(ids), np.bool_)
        if value in distinct:
            kept = found == (value.encode() if isinstance(value, str) else value)
        if not kept.any():
            raise ConfigError(
                "empty_result.subset", where=reader.url, samples=len(ids), request=text
            )
        groups[value] = Subset(
            ids=ids[kept],
            where=f"({where}) and {text}" if where else text,
            mean_tokens=0.0 if lengths is None else float(lengths[kept].mean()),
        )
    return groups


def _known_column(reader: ShardReader, column: str, ids: np.ndarray) -> np.ndarray:
    known = filter_columns([reader.index_dtype(0)])
    known += [] if reader.added is None else scalar_names(reader.added.dtype)
    if column not in known:
        hint = nearest(column, known)
        raise ConfigError("groups_column.unknown", where=reader.url, column=column, hint=hint)
    return reader.column(column, ids)


def _plain(value: Any) -> Any:
    """Gives a value of a column as Python's own type."""
    value = value.item() if isinstance(value, np.generic) else value
    return value.decode() if isinstance(value, bytes) else value


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
