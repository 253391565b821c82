"""Functions of the user's: what they are called, what states say of them, and how they fail."""

from __future__ import annotations

import builtins
import dataclasses
import functools
import hashlib
import inspect
import textwrap
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np

from shardspec.errors import ConfigError, ShardsError

_DIGITS = 16
_PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice),
    *(PurePath, np.dtype, np.generic),
)
"""Types whose values are their `repr`."""

_KNOWN = ("numpy", "torch", "PIL")
"""Packages whose functions and classes are known by their names."""


@contextmanager
def naming_function(function: Any, *, where: str) -> Iterator[None]:
    """Names a function of the user's that raises, the line that does, and the sample.

    Raises:
      ConfigError: `user_function`.
    """
    try:
        yield
    except (ShardsError, MemoryError):
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            "user_function.raised",
            where=where,
            name=qualified_name(function),
            error=f"{type(error).__name__}: {error}",
            line=f"{frame.filename}:{frame.lineno}",
        ) from error


def qualified_name(function: Any) -> str:
    """Names a function, or the class of an object that is called: "package.module.name"."""
    while isinstance(function, functools.partial):
        function = function.func
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def function_name(function: Any) -> str:
    """Names a function of the user's for states: what it is called, and a hash of what it does.

    Raises:
      ConfigError: `user_function`: it holds something that has no value to be seen; it can have a
        `fingerprint`.
    """
    own = getattr(function, "fingerprint", None)
    if isinstance(own, str) and own:
        return f"{qualified_name(function)} ({own})"
    digest = hashlib.sha256()
    seen: dict[int, Any] = {}
    for part in _parts(function, seen):
        digest.update(part.encode() + b"\0")
    return f"{qualified_name(function)} ({digest.hexdigest()[:_DIGITS]})"


def _parts(value: Any, seen: dict[int, Any], name: str = "") -> Iterator[str]:
    """Describes a value by texts: its type, its source, and what it holds.

    Raises:
      ConfigError: `user_function`.
    """
    if isinstance(value, _PLAIN):
        yield f"{type(value).__qualname__} {value!r}"
    elif id(value) in seen:
        yield "again"
    else:
        seen[id(value)] = value  # kept, so that no other value gets its id
        yield from _compound(value, seen, name)


def _compound(value: Any, seen: dict[int, Any], name: str) -> Iterator[str]:
    if isinstance(value, ModuleType | BuiltinFunctionType | np.ufunc):
        yield getattr(value, "__qualname__", value.__name__)
    elif isinstance(value, type):
        yield source_of(value)
    elif isinstance(value, functools.partial):
        yield from _parts((value.func, value.args, value.keywords), seen, name)
    elif isinstance(value, MethodType):
        yield from _parts((value.__func__, value.__self__), seen, name)
    elif isinstance(value, FunctionType):
        yield source_of(value)
        held = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        yield from _parts((held, value.__defaults__, value.__kwdefaults__), seen, name)
    elif isinstance(value, np.ndarray) and value.dtype != object:
        pixels = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        yield f"array {value.dtype} {value.shape} {pixels}"
    elif isinstance(value, list | tuple | set | frozenset):
        yield f"{type(value).__qualname__} {len(value)}"
        ordered = value if isinstance(value, list | tuple) else sorted(value, key=repr)
        for part in ordered:
            yield from _parts(part, seen, name)
    elif isinstance(value, Mapping):
        yield f"{type(value).__qualname__} {len(value)}"
        for key, part in value.items():
            yield from _parts(key, seen, name)
            yield from _parts(part, seen, f"{name}.{key}")
    else:
        yield source_of(type(value))
        slots = [s for kind in type(value).__mro__ for s in getattr(kind, "__slots__", ())]
        fields = {**getattr(value, "__dict__", {})}
        fields |= {s: getattr(value, s) for s in slots if hasattr(value, s) and s[:2] != "__"}
        if not fields and not dataclasses.is_dataclass(value) and not callable(value):
            # It holds something that Python does not show.
            raise ConfigError("user_function.name", name=name or "it", got=type(value).__name__)
        for field, part in sorted(fields.items()):
            yield from _parts(part, seen, f"{name}.{field}".lstrip("."))


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name that is not bound yet, as a function's own inside of itself
        return False


def source_of(value: Any) -> str:
    """Gives the source of a function or a class; of one of a known package its name alone."""
    module = str(value.__module__).partition(".")[0]
    if module in _KNOWN or getattr(builtins, value.__qualname__, None) is value:
        return f"{value.__module__}.{value.__qualname__}"
    try:
        return textwrap.dedent(inspect.getsource(value))
    except (OSError, TypeError):  # typed into an interpreter, for example
        codes = [_code(each) for each in (value, *vars(value).values())]
        return repr([value.__qualname__, *filter(None, codes)])


def _code(value: Any) -> Any:
    """Describes what a function does without its source: by its byte code, of this Python."""
    code = getattr(value, "__code__", value)
    if not isinstance(code, CodeType):
        return None
    constants = [_code(each) or repr(each) for each in code.co_consts]
    return [code.co_code.hex(), code.co_names, code.co_varnames, constants]
