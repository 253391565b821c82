"""The join: the row of each sample in a table of columns, and what stands in for a missing value.

Pure. Nothing is dropped or filled in silence: samples without a row, values that are missing and
rows without a sample are counted, and refused unless the caller has chosen what they become.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from preprocess.annotate.table import ColumnTable
from shardspec.columns import MAX_TEXT_BYTES, column_type
from shardspec.errors import ConfigError, nearest

UnknownKeys = Literal["refuse", "ignore"]
"""What happens to rows whose key no sample has."""

_NAMED_AT_MOST = 5
_TRUTH = {"true": True, "false": False}


@dataclass(frozen=True, kw_only=True)
class Joined:
    """The columns of a table, for the samples of a dataset."""

    values: Mapping[str, np.ndarray]
    """Name of each to [n] values in the samples' order; vectors [n, length]."""
    missing: Mapping[str, np.ndarray]
    """Name of each to bool [n]: where the value is the stated one, for want of another."""
    num_unknown: int
    """Rows whose key no sample has."""

    @property
    def filled(self) -> dict[str, int]:
        """Name of each column with stated values to the number of samples that got one."""
        counts = {name: int(missing.sum()) for name, missing in self.missing.items()}
        return {name: count for name, count in counts.items() if count}

    def part(self, start: int, stop: int) -> Joined:
        """Gives the columns of some consecutive samples."""
        return Joined(
            values={name: column[start:stop] for name, column in self.values.items()},
            missing={name: column[start:stop] for name, column in self.missing.items()},
            num_unknown=self.num_unknown,
        )


def parse_fills(text: str) -> dict[str, str]:
    """Reads what missing values become, such as "score=nan,licence=unknown".

    Raises:
      ConfigError: `columns_fill`.

    >>> parse_fills("score=nan,licence=")
    {'score': 'nan', 'licence': ''}
    """
    fills: dict[str, str] = {}
    for part in text.split(","):
        name, mark, value = part.partition("=")
        if not mark or not name.strip() or name.strip() in fills:
            raise ConfigError("columns_fill.text", got=text)
        fills[name.strip()] = value
    return fills


def join(
    table: ColumnTable, keys: np.ndarray, *, fills: Mapping[str, str], unknown: UnknownKeys
) -> Joined:
    """Joins a table to samples.

    Args:
      table: The columns.
      keys: bytes [n], of the samples; a key may be there several times.
      fills: Value that stands for a missing one, as text, by column.
      unknown: What happens to rows of other keys.

    Raises:
      ConfigError: `columns_unknown_keys`, `columns_incomplete`, `columns_fill`.
    """
    for name in fills:
        if name not in table.values:
            hint = nearest(name, table.values)
            raise ConfigError("columns_fill.unknown", where=table.where, name=name, hint=hint)
    order = np.argsort(table.keys, kind="stable")
    ordered = table.keys[order]
    at = np.minimum(np.searchsorted(ordered, keys), max(0, len(ordered) - 1))
    found = ordered[at] == keys if len(ordered) else np.zeros(len(keys), np.bool_)
    row = order[at] if len(ordered) else np.zeros(len(keys), np.int64)
    strangers = ordered[~np.isin(ordered, keys)]
    if len(strangers) and unknown == "refuse":
        raise ConfigError(
            "columns_unknown_keys",
            where=table.where,
            count=len(strangers),
            of=len(ordered),
            first=_named(strangers),
        )
    if not found.all() and not set(table.values) <= set(fills):
        raise ConfigError(
            "columns_incomplete.keys",
            where=table.where,
            count=int((~found).sum()),
            samples=len(keys),
            first=_named(keys[~found]),
        )
    values, absent = {}, {}
    for name, column in table.values.items():
        missing = ~found
        if len(ordered):
            missing = missing | ~table.present[name][row]
        if missing.any() and name not in fills:
            raise ConfigError(
                "columns_incomplete.values",
                where=table.where,
                column=name,
                count=int(missing.sum()),
                samples=len(keys),
                first=_named(keys[missing]),
            )
        values[name] = _filled(column, row, missing, name=name, text=fills.get(name))
        absent[name] = missing
    return Joined(values=values, missing=absent, num_unknown=len(strangers))


def _filled(
    column: np.ndarray, row: np.ndarray, missing: np.ndarray, *, name: str, text: str | None
) -> np.ndarray:
    value = None if text is None else _fill(column, name=name, text=text)
    if isinstance(value, bytes) and len(value) > column.dtype.itemsize:
        column = column.astype(f"S{len(value)}")
    picked: np.ndarray
    if len(column):
        picked = column[row]
    else:
        picked = np.zeros((len(row), *column.shape[1:]), column.dtype)
    if missing.any():
        picked[missing] = value
    return picked


def _fill(column: np.ndarray, *, name: str, text: str) -> object:
    """Reads the value that stands for a missing one."""
    kind = column.dtype.kind
    try:
        if kind == "b":
            return _TRUTH[text.lower()]
        if kind == "i":
            return np.int64(int(text))
        if kind == "f":
            return float(text)
        value = text.encode()
        if len(value) > MAX_TEXT_BYTES or b"\0" in value:
            raise ValueError(text)
    except (ValueError, KeyError, OverflowError) as error:
        kind_text = column_type(np.dtype((column.dtype, column.shape[1:])))
        raise ConfigError("columns_fill.type", column=name, type=kind_text, got=text) from error
    return value


def _named(keys: np.ndarray) -> Sequence[str]:
    return [key.decode(errors="replace") for key in keys[:_NAMED_AT_MOST].tolist()]
