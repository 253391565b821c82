"""Filters: which samples a condition such as "num_tokens < 2048 and width >= 336" keeps.

Pure. The text is parsed by Python's own grammar and then walked: names of columns, numbers,
comparisons, `and`, `or`, `not`, arithmetic and `&` (to test flags). Nothing else is accepted, and
nothing is ever evaluated as code. Integers have 64 bits, so differences of counts may be negative,
and results beyond 64 bits are refused; a division by zero is not a number, and every comparison
with it fails, but `!=`. Columns of truth values are conditions by themselves; those of text compare
with texts in quotes, by `==` and `!=`.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from shardspec.errors import ConfigError, nearest

MAX_FILTER_CHARACTERS = 2000
"""Longer texts could nest deeper than the parser's stack."""


def _divided(divide: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda a, b: np.where(b == 0, np.nan, divide(a, np.where(b == 0, 1, b)))


def _checked(compute: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Refuses results that 64-bit integers do not hold: numpy would wrap them in silence."""

    def checked(a: Any, b: Any) -> Any:
        if np.result_type(a, b).kind != "f":
            about = compute(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64))
            if np.any(np.abs(about) >= 2.0**63):
                raise OverflowError("a result is beyond 64 bits")
        return compute(a, b)

    return checked


_NOT_CONTENT = frozenset({"offset", "crc32", "head_bytes", "head_crc32", "key", "group_hash"})
"""Index columns that say where a sample is, or whose values are not quantities."""

_ARITHMETIC: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: _checked(operator.add),
    ast.Sub: _checked(operator.sub),
    ast.Mult: _checked(operator.mul),
    ast.Div: _divided(np.true_divide),
    ast.FloorDiv: _divided(np.floor_divide),
    ast.Mod: _divided(np.mod),
    ast.BitAnd: operator.and_,
}
_COMPARISONS: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


def select(text: str, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Evaluates a filter: which samples it keeps.

    Args:
      text: The filter.
      columns: Values of the samples by name, each [n], as `filter_values` gives them.

    Returns:
      bool [n].

    Raises:
      ConfigError: `filter_expression`: the text is not a condition on these columns.

    >>> select("2 < a < 9 and not a == b", {"a": np.array([1, 5, 7]), "b": np.array([0, 5, 0])})
    array([False, False,  True])
    >>> select("licence == 'cc0'", {"licence": np.array([b"cc0", b"cc-by"])})
    array([ True, False])
    """
    tree = _parsed(text)
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # of floats: they become inf and nan
            kept = _condition(tree.body, text, columns)
    except (TypeError, OverflowError, RecursionError) as error:
        raise _refused(text, str(error), 0) from error
    length = len(next(iter(columns.values()))) if columns else 0
    return np.array(np.broadcast_to(kept, (length,)))


def named_columns(text: str) -> frozenset[str]:
    """Lists the names in a filter: the columns that have to be read to evaluate it.

    Raises:
      ConfigError: `filter_expression`: the text cannot be parsed.

    >>> sorted(named_columns("2 < a < 9 and not a == b"))
    ['a', 'b']
    """
    return frozenset(node.id for node in ast.walk(_parsed(text)) if isinstance(node, ast.Name))


def filter_columns(indexes: Iterable[np.dtype]) -> list[str]:
    """Lists the columns that a filter may name: those that all indexes have."""
    every = [frozenset(dtype.names or ()) for dtype in indexes]
    return sorted(frozenset.intersection(*every) - _NOT_CONTENT) if every else []


def scalar_names(added: np.dtype) -> list[str]:
    """Lists the added columns that a filter may name: all but vectors.

    Args:
      added: Row type of a column file.
    """
    return [name for name in added.names or () if not added[name].shape]


def filter_values(column: np.ndarray) -> np.ndarray:
    """Gives the values of a column for a filter: of several views the largest one counts.

    Args:
      column: Integers [n] or [n, views]; or truth values, floats or texts, [n].

    Returns:
      int64, bool, float64 or bytes, [n].
    """
    if column.dtype.kind in "bfS":
        return column
    numbers = column.astype(np.int64)
    return numbers.max(axis=1) if numbers.ndim > 1 else numbers


def parse_keys(payload: bytes, *, where: str) -> frozenset[str]:
    """Reads a list of keys, one per line; empty lines are ignored.

    Raises:
      ConfigError: `keys_file`: it is not UTF-8.

    >>> sorted(parse_keys(b"a\\r\\nb\\n", where="keys.txt"))
    ['a', 'b']
    """
    try:
        text = payload.decode()
    except UnicodeDecodeError as error:
        raise ConfigError("keys_file", where=where, error=error) from error
    return frozenset(line.removesuffix("\r") for line in text.split("\n")) - {""}


def encoded_keys(keys: Iterable[str]) -> np.ndarray:
    """Gives keys as index columns hold them: bytes [n], sorted."""
    return np.array(sorted(key.encode() for key in keys), dtype=bytes)


def _parsed(text: str) -> ast.Expression:
    if len(text) > MAX_FILTER_CHARACTERS:
        raise _refused(text, f"longer than {MAX_FILTER_CHARACTERS} characters", 0)
    try:
        return ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _refused(text, str(error), getattr(error, "offset", 0) or 0) from error


def _condition(node: ast.expr, text: str, columns: Mapping[str, np.ndarray]) -> Any:
    """Evaluates a part that says yes or no."""
    if isinstance(node, ast.BoolOp):
        parts = [_condition(value, text, columns) for value in node.values]
        join = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
        return join.reduce(np.broadcast_arrays(*parts))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return np.logical_not(_condition(node.operand, text, columns))
    if isinstance(node, ast.Name) and _kind(node, columns) == "b":
        return columns[node.id]
    if isinstance(node, ast.Compare):
        values = [_operand(each, text, columns) for each in (node.left, *node.comparators)]
        kept: Any = np.True_
        for compare, left, right in zip(node.ops, values[:-1], values[1:], strict=True):
            if type(compare) not in _COMPARISONS:
                raise _refused(text, "only < <= > >= == != compare", node.col_offset)
            texts = [np.asarray(value).dtype.kind == "S" for value in (left, right)]
            if any(texts) and not (all(texts) and type(compare) in (ast.Eq, ast.NotEq)):
                problem = "text compares with text, by == and != only"
                raise _refused(text, problem, node.col_offset)
            kept = kept & _COMPARISONS[type(compare)](left, right)
        return kept
    raise _refused(text, "a comparison is wanted here", node.col_offset)


def _kind(node: ast.Name, columns: Mapping[str, np.ndarray]) -> str:
    return columns[node.id].dtype.kind if node.id in columns else ""


def _operand(node: ast.expr, text: str, columns: Mapping[str, np.ndarray]) -> Any:
    """Evaluates a side of a comparison: text, or as `_number`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return np.bytes_(node.value.encode())
    if isinstance(node, ast.Name) and _kind(node, columns) == "S":
        return columns[node.id]
    return _number(node, text, columns)


def _number(node: ast.expr, text: str, columns: Mapping[str, np.ndarray]) -> Any:
    """Evaluates a part that is a number for each sample, or one for all."""
    if isinstance(node, ast.Constant) and type(node.value) is float:
        return node.value
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return np.int64(node.value)
    if isinstance(node, ast.Name):
        if node.id not in columns:
            raise _refused(text, f"no column {node.id!r}: {nearest(node.id, columns)}", 0)
        if _kind(node, columns) == "S":
            raise _refused(text, f"{node.id} is text: compare it by == or !=", node.col_offset)
        # Truth values count as 0 and 1.
        return columns[node.id] + np.int64(0) if _kind(node, columns) == "b" else columns[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_number(node.operand, text, columns)
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        left, right = (_number(each, text, columns) for each in (node.left, node.right))
        return _ARITHMETIC[type(node.op)](left, right)
    raise _refused(text, "a number or a column is wanted here", node.col_offset)


def _refused(text: str, problem: str, position: int) -> ConfigError:
    return ConfigError(
        "filter_expression", where=f"character {position} of {text[:200]!r}", problem=problem
    )
