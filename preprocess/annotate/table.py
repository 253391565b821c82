"""ColumnTable: a file of columns (Parquet, CSV or JSON lines) as NumPy arrays, checked completely.

The column `key` names the sample of each row; every other column becomes one of the dataset. An
empty cell of a CSV file, but in a column of text, and a null are values that are missing.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardspec import storage
from shardspec.columns import MAX_TEXT_BYTES, MAX_VECTOR, name_problem
from shardspec.errors import ConfigError, SourceError

KEY = "key"

_NAMED_AT_MOST = 5

_EXACT_INTEGERS = 2.0**53
"""Up to here a float64 holds every integer."""


@dataclass(frozen=True, kw_only=True)
class ColumnTable:
    """The rows of a file of columns."""

    where: str
    """URL of the file."""
    sha256: str
    """Of the file."""
    keys: np.ndarray
    """bytes [n]: each once."""
    values: Mapping[str, np.ndarray]
    """Name of each column to its values, of a stored type: [n], vectors [n, length]."""
    present: Mapping[str, np.ndarray]
    """Name of each column to bool [n]: False where a value is missing."""


def read_table(url: str) -> ColumnTable:
    """Reads a file of columns.

    Raises:
      SourceError: `columns_file`: there is no such file, or it is not what its name says;
        `source_missing`: pyarrow is not installed.
      ConfigError: `columns_key`, `columns_names`, `columns_type`.
    """
    try:
        payload = storage.read_bytes(url)
    except FileNotFoundError as error:
        raise SourceError("columns_file.missing", where=url) from error
    table = _parsed(url, payload)
    try:
        names = table.column_names
    except UnicodeDecodeError as error:  # a file of another kind, whose first line was read
        raise SourceError("columns_file.unreadable", where=url, error=error) from error
    if names.count(KEY) != 1:
        raise ConfigError("columns_key.none", where=url, columns=names[:20])
    _check_names(names, where=url)
    _check_integers(table, payload, where=url)
    values, present = {}, {}
    for name in names:
        if name != KEY:
            values[name], present[name] = _values(table.column(name), name=name, where=url)
    return ColumnTable(
        where=url,
        sha256=hashlib.sha256(payload).hexdigest(),
        keys=_keys(table.column(KEY), where=url),
        values=values,
        present=present,
    )


def _check_names(names: list[str], *, where: str) -> None:
    others = [name for name in names if name != KEY]
    problems = [f"{name!r} {problem}" for name in others if (problem := name_problem(name))]
    repeated = sorted({name for name in others if others.count(name) > 1})
    problems += [f"{name!r} is there {others.count(name)} times" for name in repeated]
    problems += [] if others else ["there is no column besides `key`"]
    if problems:
        raise ConfigError("columns_names", where=where, problems="; ".join(problems))


def _check_integers(table: Any, payload: bytes, *, where: str) -> None:
    """Refuses integers that Arrow has taken for floats and rounded, in a column of CSV or JSON.

    It does so where a column has one of more than 64 bits, or a fraction.
    """
    ending = _ending(where)
    if ending == "parquet":
        return
    for field in table.schema:
        column = table.column(field.name)
        if str(field.type) != "double" or not _has_large(column):
            continue
        if ending == "csv":
            import pyarrow as pa
            import pyarrow.csv

            options = pyarrow.csv.ConvertOptions(column_types={field.name: pa.string()})
            written = pyarrow.csv.read_csv(io.BytesIO(payload), convert_options=options)
            texts = [text.strip() for text in written.column(field.name).to_pylist() if text]
            whole = [_integer(text) for text in texts if re.fullmatch(r"[+-]?[0-9]+", text)]
        else:
            lines = (line for line in payload.splitlines() if line.strip())
            rows = (json.loads(line, parse_int=_integer) for line in lines)
            found = (row.get(field.name) for row in rows)
            whole = [value for value in found if type(value) is int]
        rounded = [value for value in whole if float(value) != value]
        if rounded:
            raise _bad_type(
                field.name,
                field.type,
                where,
                f"the integer {rounded[0]} would be rounded; write such a column as text",
            )


def _integer(text: str) -> int:
    return int(text[:300])  # beyond the floats, which are rounded in any case


def _has_large(column: Any) -> bool:
    values = np.abs(column.fill_null(0).to_numpy())
    return bool((np.isfinite(values) & (values >= _EXACT_INTEGERS)).any())


def _ending(url: str) -> str:
    return url.partition("?")[0].rpartition(".")[2].lower()


def _parsed(url: str, payload: bytes) -> Any:
    """Reads a file as an Arrow table, by the ending of its name."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise SourceError("source_missing.pyarrow") from error
    ending = _ending(url)
    stream = io.BytesIO(payload)
    try:
        if ending == "parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(stream)
        if ending == "csv":
            return _csv_table(payload)
        if ending in ("jsonl", "ndjson"):
            import pyarrow.json

            return pyarrow.json.read_json(stream)
    except (pa.ArrowException, OSError) as error:
        problem = str(error).splitlines()[0]
        raise SourceError("columns_file.unreadable", where=url, error=problem) from error
    raise SourceError("columns_file.ending", where=url, ending=ending[:20])


def _csv_table(payload: bytes) -> Any:
    """Reads a CSV file: 0012 is not a number but a text, and an empty cell is no value."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv

    def read(texts: list[str]) -> Any:
        options = pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(texts, pa.string()), strings_can_be_null=texts != [KEY]
        )
        return pyarrow.csv.read_csv(io.BytesIO(payload), convert_options=options)

    table = read([KEY])
    kinds = [field.type for field in table.schema]
    numbers = [i for i, kind in enumerate(kinds) if kind in (pa.int64(), pa.float64())]
    written = read([table.column_names[i] for i in numbers]) if numbers else table
    for i, name in enumerate(table.column_names):
        column = table.column(i)
        if i in numbers:
            column = written.column(i)
            if not pc.any(pc.match_substring_regex(column, "^[ \t]*[+-]?0[0-9]")).as_py():
                continue
        elif kinds[i] == pa.string() and name != KEY:
            column = pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)
        table = table.set_column(i, name, column)
    return table


def _keys(column: Any, *, where: str) -> np.ndarray:
    column = _plain(column)
    if not _is_text(column.type):
        raise ConfigError("columns_key.type", where=where, type=str(column.type))
    if column.null_count:
        raise ConfigError("columns_key.null", where=where, rows=column.null_count)
    keys = np.array([key.encode() for key in column.to_pylist()], dtype=np.bytes_)
    keys = keys if len(keys) else np.zeros(0, "S1")
    ordered, counts = np.unique(keys, return_counts=True)
    if len(ordered) != len(keys):
        twice = [key.decode() for key in ordered[counts > 1].tolist()]
        raise ConfigError(
            "columns_key.repeated", where=where, count=len(twice), first=twice[:_NAMED_AT_MOST]
        )
    return keys


def _values(column: Any, *, name: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Gives the values of a column, and where there are any."""
    import pyarrow as pa

    column = _plain(column)
    kind, present = column.type, np.asarray(column.is_valid().to_numpy(zero_copy_only=False), bool)
    try:
        if pa.types.is_boolean(kind):
            values = column.fill_null(False).to_numpy(zero_copy_only=False)  # noqa: FBT003
            return values.astype(np.bool_), present
        if pa.types.is_integer(kind):
            return _flat(column.cast(pa.int64()).fill_null(0), "<i8"), present
        if pa.types.is_floating(kind):
            return _flat(column.cast(pa.float64()).fill_null(0), "<f8"), present
        if _is_text(kind):
            return _texts(column, name=name, where=where), present
        if (
            pa.types.is_list(kind)
            or pa.types.is_large_list(kind)
            or pa.types.is_fixed_size_list(kind)
        ):
            return _vectors(column, present, name=name, where=where), present
    except pa.ArrowInvalid as error:
        problem = str(error).splitlines()[0]
        raise _bad_type(name, kind, where, problem) from error
    raise _bad_type(name, kind, where, "want bool, integers, floats, text or vectors of numbers")


def _texts(column: Any, *, name: str, where: str) -> np.ndarray:
    texts = [text.encode() for text in column.fill_null("").to_pylist()]
    longest = max(map(len, texts), default=0)
    if longest > MAX_TEXT_BYTES:
        problem = f"a text of {longest} bytes; at most {MAX_TEXT_BYTES} are stored"
        raise _bad_type(name, column.type, where, problem)
    if any(b"\0" in text for text in texts):
        raise _bad_type(name, column.type, where, "a text has a NUL")
    return np.array(texts, dtype=f"S{max(1, longest)}")


def _vectors(column: Any, present: np.ndarray, *, name: str, where: str) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.compute as pc

    inner = column.type.value_type
    if pa.types.is_integer(inner):
        stored, arrow = "<i8", pa.int64()
    elif pa.types.is_floating(inner):
        stored, arrow = "<f4", pa.float64()
    else:
        raise _bad_type(name, column.type, where, "vectors are of integers or floats")
    given = column.filter(column.is_valid())
    lengths = sorted(set(pc.list_value_length(given).to_pylist()))
    if len(lengths) != 1 or not 1 <= lengths[0] <= MAX_VECTOR:
        problem = f"vectors of {lengths[:5]} numbers; want one length, 1 to {MAX_VECTOR}"
        raise _bad_type(name, column.type, where, problem)
    flat = pc.list_flatten(given)
    if flat.null_count:
        raise _bad_type(name, column.type, where, "a vector has a number that is missing")
    values = np.zeros((len(present), lengths[0]), stored)
    values[present] = _flat(flat.cast(arrow), stored).reshape(-1, lengths[0])
    return values


def _plain(column: Any) -> Any:
    """Joins the chunks of a column, and resolves a dictionary."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if isinstance(column, pa.ChunkedArray):
        chunks = column.chunks
        column = pa.concat_arrays(chunks) if chunks else pa.array([], column.type)
    return column


def _flat(column: Any, dtype: str) -> np.ndarray:
    values: np.ndarray = column.to_numpy(zero_copy_only=False).astype(dtype)
    return values


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _bad_type(name: str, kind: object, where: str, problem: str) -> ConfigError:
    return ConfigError("columns_type", where=where, column=name, type=str(kind), problem=problem)
