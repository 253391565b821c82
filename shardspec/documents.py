"""Reading JSON documents of ours: any bytes give a plain value, or one short ValueError.

The standard reader accepts what no document of ours has, and what breaks code that comes later:
NaN and infinities, numbers of thousands of digits, a name that occurs twice (the last one wins),
half a character, and nesting that ends in a RecursionError. `read_json` refuses them all, so that
whoever uses a value meets text, numbers below 2**64 in size, lists and objects, and nothing else.
What the fields mean is for the callers to check; `read_fields` compares them with a dataclass.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

MOST_DEPTH = 64
"""Deepest nesting; ours have six levels."""

_MOST_DIGITS = 20
_MOST_INT = 2**64

Kind = TypeVar("Kind")


class DocumentError(ValueError):
    """Bytes or values that are no document of ours; the message is short."""


def read_json(payload: bytes | bytearray | memoryview | str, *, any_text: bool = False) -> Any:
    """Reads a JSON document.

    Args:
      payload: The document.
      any_text: Texts may have halves of characters: rows of sources do.

    >>> read_json(b'{"a": [1, 2.5, null]}')
    {'a': [1, 2.5, None]}
    >>> read_json(b'{"a": 1, "a": 2}')
    Traceback (most recent call last):
    shardspec.documents.DocumentError: name 'a' occurs twice

    Raises:
      DocumentError: It is not one.
    """
    try:
        text = payload if isinstance(payload, str) else bytes(payload).decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_real,
            parse_constant=_constant,
        )
    except UnicodeDecodeError as error:
        raise DocumentError(f"not UTF-8 from byte {error.start} on") from None
    except RecursionError:
        raise DocumentError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise DocumentError(f"{error.msg} at character {error.pos}") from None
    require_plain(value, any_text=any_text)
    return value


def read_object(
    payload: bytes | bytearray | memoryview | str, *, any_text: bool = False
) -> dict[str, Any]:
    """Reads a JSON document that is an object, as `read_json`."""
    value = read_json(payload, any_text=any_text)
    if not isinstance(value, dict):
        raise DocumentError(f"want an object, got {_kind(value)}")
    return value


def require_plain(value: object, *, any_text: bool = False) -> None:
    """Checks that a value consists of what JSON has, within the bounds of `read_json`.

    Tuples and other mappings count as lists and objects: a state that was never a file has them.

    Raises:
      DocumentError: It does not.
    """
    # Without recursion: depth is what this bounds.
    level: list[object] = [value]
    for _ in range(MOST_DEPTH):
        below: list[object] = []
        for each in level:
            kind = type(each)
            if each is None or kind is bool or (kind is str and (any_text or each.isascii())):  # type: ignore[attr-defined]
                continue  # most values, at a third of the cost
            if isinstance(each, Mapping):
                for name in each:
                    if not isinstance(name, str):
                        raise DocumentError(f"want a name, got {_kind(name)}")
                    _require_scalar(name, any_text)
                below.extend(each.values())
            elif isinstance(each, list | tuple):
                below.extend(each)
            else:
                _require_scalar(each, any_text)
        if not below:
            return
        level = below
    raise DocumentError("nested too deeply")


def _require_scalar(value: object, any_text: bool) -> None:
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, str):
        if not (any_text or value.isascii()) and any("\ud800" <= c <= "\udfff" for c in value):
            raise DocumentError("text with half a character")
    elif isinstance(value, int):
        if not -_MOST_INT < value < _MOST_INT:
            raise DocumentError(f"integer of {value.bit_length()} bits, want at most 64")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise DocumentError(f"number that is {value}")
    else:
        raise DocumentError(f"want a plain value, got {_kind(value)}")


def read_fields(kind: type[Kind], document: object) -> Kind:
    """Makes a dataclass from a JSON object whose fields are exactly the class's, of their types.

    Raises:
      DocumentError: It has others, or lacks some; or what `kind` itself raises as a ValueError.
    """
    if not isinstance(document, dict):
        raise DocumentError(f"want an object, got {_kind(document)}")
    specs = {spec.name: spec for spec in fields(kind)}  # type: ignore[arg-type]
    hints = _hints(kind)  # type: ignore[arg-type]
    for name in document:
        if name not in specs:
            raise DocumentError(f"unknown field {name[:40]!r}")
    for name, spec in specs.items():
        if name in document:
            if not _has_type(document[name], hints[name]):
                raise DocumentError(f"field {name}: want {spec.type}, got {_kind(document[name])}")
        elif spec.default is MISSING and spec.default_factory is MISSING:
            raise DocumentError(f"field {name} is missing")
    return kind(**document)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _has_type(value: object, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin is Literal:
        return isinstance(value, str | int | NoneType) and value in get_args(hint)
    if origin in (Union, UnionType):
        return any(_has_type(value, each) for each in get_args(hint))
    if hint is int or hint is float:
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if hint in (str, bool, NoneType):
        return isinstance(value, hint)
    return isinstance(value, list | dict)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", NoneType: "null"}
    return names.get(type(value), type(value).__name__)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise DocumentError(f"name {twice[:40]!r} occurs twice")
    return found


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS + 1:
        raise DocumentError(f"number of {len(text):,} digits")
    return int(text)


def _real(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise DocumentError("number beyond the range of floats")
    return value


def _constant(text: str) -> float:
    raise DocumentError(f"number that is {text}")
