"""The table of an evaluation: a row per question, in stored order, each once.

A row is a dictionary of plain JSON types: `key` and `question_idx` name the question, `prediction`
is what a model said; `sample` (the number of the sample in stored order), `record` and `images` may
be there. Rows that only filled a batch are left out. The table depends on the predictions alone,
not on which rank made which: scores of it are equal to the last bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shardspec import storage
from shardspec.documents import read_object
from shardspec.errors import ConfigError

Question = tuple[str, int]
"""Key of the sample, number of the question."""

_NAMED = 5
"""Questions that an error names."""


def result_table(
    results: Iterable[Mapping[str, Any]], *, expected: Sequence[Question] | None = None
) -> list[dict[str, Any]]:
    """Makes the table of results in any order; see the module docstring.

    Args:
      results: Rows; without `question_idx` they are of a sample's first question.
      expected: All questions in stored order; None: the rows' `sample` says what the order is, and
        none can be missed.

    Raises:
      ConfigError: `results`: a row lacks a key or a prediction, two rows of a question differ, or
        questions are missing or unknown.

    >>> rows = [{"key": "b", "prediction": "2"}, {"key": None, "real": False, "prediction": "3"}]
    >>> result_table(rows, expected=[("b", 0)])
    [{'key': 'b', 'question_idx': 0, 'prediction': '2'}]
    """
    found: dict[Question, dict[str, Any]] = {}
    for number, row in enumerate(results):
        if row.get("real") is False or ("key" in row and row["key"] is None):
            continue
        if not isinstance(row.get("key"), str) or "prediction" not in row:
            raise ConfigError("results.fields", row=number, fields=sorted(map(str, row)))
        question_idx = row.get("question_idx", 0)
        if not isinstance(question_idx, int) or isinstance(question_idx, bool):
            raise ConfigError("results.fields", row=number, question_idx=repr(question_idx))
        question = (row["key"], question_idx)
        rest = {name: value for name, value in row.items() if name != "real"}
        named = {"key": row["key"], "question_idx": question_idx, **rest}
        if found.setdefault(question, named) != named:
            raise ConfigError("results.differ", key=row["key"], question_idx=question_idx)
    if expected is None:
        return sorted(found.values(), key=_stored_order)
    missing = [question for question in expected if question not in found]
    unknown = sorted(found.keys() - set(expected))
    for code, which in (("results.missing", missing), ("results.unknown", unknown)):
        if which:
            first = ", ".join(f"{key} question {number}" for key, number in which[:_NAMED])
            raise ConfigError(code, count=len(which), expected=len(expected), first=first)
    return [found[question] for question in expected]


def write_table(url: str, table: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows as JSON lines, whole or not at all.

    Raises:
      ConfigError: `results`: a row has values that JSON has not.
      StorageError: The store does not answer.
    """
    storage.publish_bytes(url, encoded_rows(table))


def encoded_rows(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Encodes rows as JSON lines.

    Raises:
      ConfigError: `results`: a row has values that JSON has not.
    """
    try:
        return b"".join(
            json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n" for row in rows
        )
    except (TypeError, ValueError) as error:
        raise ConfigError("results.values", error=error) from error


def read_table(url: str) -> list[dict[str, Any]]:
    """Reads rows that `write_table` wrote, or any JSON lines.

    Raises:
      ConfigError: `results`: there is no such file, or a line is not an object.
      StorageError: The store does not answer.
    """
    try:
        payload = storage.read_bytes(url)
    except FileNotFoundError as error:
        raise ConfigError("results.file", where=url) from error
    return decoded_rows(payload, where=url)


def decoded_rows(payload: bytes, *, where: str) -> list[dict[str, Any]]:
    """Decodes JSON lines.

    Raises:
      ConfigError: `results`: a line is not an object.
    """
    rows = []
    for number, line in enumerate(payload.split(b"\n"), start=1):
        if line.strip():
            try:
                rows.append(read_object(line))
            except ValueError as error:
                where = f"{where} line {number}"
                raise ConfigError("results.line", where=where, error=error) from error
    return rows


def _stored_order(row: Mapping[str, Any]) -> tuple[int, str, int]:
    return row.get("sample", 0), row["key"], row["question_idx"]
