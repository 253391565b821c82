"""Added columns: values that were joined to the samples of a dataset after these were made.

Each shard of an annotated dataset has one more file beside it: a .npy of a packed structured array
with a row per sample, in the shard's order, and a column per name, sorted by name. The manifest has
the types and the sha256 of each file, which is compared whenever the file is opened.

| type | stored as | |
|---|---|---|
| `bool` | `|b1` | |
| `int64` | `<i8` | |
| `float64` | `<f8` | |
| `text[N]` | `SN` | UTF-8, padded with NUL, N bytes at most; without NUL |
| `int64[N]`, `float32[N]` | `<i8` [N], `<f4` [N] | a vector of N numbers |
"""

from __future__ import annotations

import hashlib
import keyword
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from shardspec.errors import ShardError
from shardspec.index import (
    GROUP_COLUMN,
    RowFile,
    encode_index,
    index_dtype,
    parse_rows,
    raw_index_dtype,
)

COLUMNS_SUFFIX = ".columns.npy"

MAX_TEXT_BYTES = 256
"""Of a value: licences, hashes and sources, not captions."""

MAX_VECTOR = 4096
"""Numbers of a vector: the features of an image, not the image."""

MAX_NAME_CHARACTERS = 60

_NAME = re.compile(rf"[A-Za-z_][A-Za-z0-9_]{{0,{MAX_NAME_CHARACTERS - 1}}}")
_TYPE = re.compile(r"(bool|int64|float64)|(text|int64|float32)\[([1-9][0-9]{0,4})\]")
_STORED = {"bool": "|b1", "int64": "<i8", "float64": "<f8", "float32": "<f4"}
_OF_INDEXES = frozenset(
    {
        *(index_dtype(1, clips=True).names or ()),
        *(raw_index_dtype(1).names or ()),
        GROUP_COLUMN,
    }
)


def name_problem(name: str) -> str:
    """Says why a name cannot be that of a column; "" if it can.

    >>> name_problem("num_tokens")
    'is a column of the index'
    >>> name_problem("aesthetic_score")
    ''
    """
    if name in _OF_INDEXES:
        return "is a column of the index"
    if not _NAME.fullmatch(name) or keyword.iskeyword(name):
        return (
            f"is not a name of letters, digits and _ ({MAX_NAME_CHARACTERS} at most) that a "
            "condition can have"
        )
    return ""


def column_type(dtype: np.dtype) -> str:
    """Names the type of a column.

    >>> column_type(np.dtype("S12")), column_type(np.dtype(("<f4", (8,))))
    ('text[12]', 'float32[8]')
    """
    base, shape = dtype.base, dtype.shape
    if base.kind == "S":
        return f"text[{base.itemsize}]"
    return f"{base.name}[{shape[0]}]" if shape else base.name


def columns_dtype(types: Mapping[str, str]) -> np.dtype:
    """Gives the row type of a column file.

    >>> columns_dtype({"score": "float64", "licence": "text[8]"}).names
    ('licence', 'score')
    """
    return np.dtype([(name, _stored(types[name])) for name in sorted(types)])


def type_problems(types: Mapping[str, object]) -> list[str]:
    """Lists what is wrong with the names and types of columns, each with its name first."""
    problems = [f"{name}: {p}" for name in types if (p := name_problem(name))]
    for name, text in types.items():
        found = _TYPE.fullmatch(text) if isinstance(text, str) else None
        most = MAX_TEXT_BYTES if found and found[2] == "text" else MAX_VECTOR
        if found is None or (found[3] and int(found[3]) > most):
            problems.append(f"{name}: want a type such as float64 or text[40], got {text!r:.80}")
    return problems


def encode_columns(rows: np.ndarray) -> bytes:
    """Serialises the rows of a shard; the same rows give the same bytes."""
    return encode_index(rows)


def parse_columns(
    payload: memoryview,
    *,
    where: str,
    types: Mapping[str, str],
    num_samples: int,
    sha256: str | None,
) -> np.ndarray:
    """Reads a column file from memory and checks it.

    Args:
      payload: The whole file; the rows are a view of it.
      where: Its URL, for errors.
      types: Of the manifest.
      num_samples: Rows that the manifest promises.
      sha256: Of the manifest; None: it was compared before.

    Returns:
      `columns_dtype(types)` [num_samples], read-only.

    Raises:
      ShardError: `columns_sha256`, `columns_format`.
    """
    if sha256 is not None:
        _check_sha256(hashlib.sha256(payload).hexdigest(), sha256, where=where)
    with _translate_format_errors(where):
        rows = parse_rows(payload)
        _check_rows(rows.dtype, rows.shape, types=types, num_samples=num_samples)
    return rows


def open_column_file(
    path: str, *, where: str, types: Mapping[str, str], num_samples: int, sha256: str | None
) -> RowFile:
    """Opens a local column file to read single rows of it; otherwise as `parse_columns`.

    Raises:
      ShardError: Also `columns_cut`, and when rows are read.
      OSError: The file cannot be opened.
    """
    rows = RowFile(path, cut="columns_cut")
    if sha256 is not None:
        _check_sha256(rows.sha256(), sha256, where=where)
    with _translate_format_errors(where):
        rows.parse()
        _check_rows(rows.dtype, rows.shape, types=types, num_samples=num_samples)
    return rows


def _check_sha256(got: str, want: str, *, where: str) -> None:
    if got != want:
        raise ShardError("columns_sha256", where=where, got=got, want=want)


def _check_rows(
    dtype: np.dtype, shape: tuple[int, ...], *, types: Mapping[str, str], num_samples: int
) -> None:
    want = columns_dtype(types)
    if dtype != want or shape != (num_samples,):
        raise ValueError(f"{shape} of {dtype}, want {num_samples} of {want}")


@contextmanager
def _translate_format_errors(where: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ShardError("columns_format", where=where, error=str(error)[:300]) from error


def _stored(text: str) -> tuple[str, tuple[int, ...]] | str:
    found = _TYPE.fullmatch(text)
    assert found, text
    if found[1]:
        return _STORED[found[1]]
    length = int(found[3])
    return f"S{length}" if found[2] == "text" else (_STORED[found[2]], (length,))
