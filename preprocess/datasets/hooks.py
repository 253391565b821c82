"""Hooks of datasets: methods that a user's class may replace, and what their faults are called.

Each replaced hook is wrapped when its class is made, wherever it is called from. What it raises
names the hook and the line of the user's code (`dataset_code.hook`), and so does a result that
cannot be used (`dataset_code.result`). `load`, `to_example`, `get` and `sample_row` are not
among them: `load` has an error of its own, and the others fail row by row.
"""

from __future__ import annotations

import functools
import inspect
import json
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any

from shardspec import storage
from shardspec.errors import ConfigError, SampleError, ShardsError

HOOKS = (
    "__init__",
    "__len__",
    "code_files",
    "describe",
    "left_out_rows",
    "notes",
    "resolve_mode",
    "row_numbers",
    "source_files",
)

ATTRIBUTES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "modes": (lambda v: _is_texts(v, tuple), "a tuple of texts"),
    "split_salt": (lambda v: isinstance(v, str), "a text"),
    "validation_share": (
        lambda v: isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v < 1,
        "a number from 0, below 1",
    ),
    "several_images": (lambda v: isinstance(v, bool), "True or False"),
    "grouped": (lambda v: isinstance(v, bool), "True or False"),
    "leaves_out": (lambda v: _is_texts(v, (set, frozenset, tuple)), "a set of reasons"),
    "sample_rows_per_example": (
        lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 1,
        "a number of at least 1",
    ),
}
"""Class attributes of a dataset: whether a value will do, and what is wanted."""


def wrap_hooks(kind: type) -> None:
    """Wraps the hooks that a class defines, in place, so that pickles still find it."""
    for name in HOOKS:
        own = vars(kind).get(name)
        if isinstance(own, classmethod | staticmethod):
            setattr(kind, name, type(own)(_wrapped(own.__func__, name)))
        elif isinstance(own, FunctionType):
            setattr(kind, name, _wrapped(own, name))


def check_attributes(kind: type, *, where: str) -> None:
    """Refuses class attributes of another type, and hooks that cannot be called.

    Raises:
      ConfigError: `dataset_code.attribute`.
    """
    wanted = {**ATTRIBUTES, **{name: (callable, "a method") for name in HOOKS}}
    for name, (good, want) in wanted.items():
        value = getattr(kind, name)
        if not good(value):
            raise ConfigError(
                "dataset_code.attribute", where=where, name=name, want=want, got=repr(value)[:80]
            )


@contextmanager
def naming_hook(name: str) -> Iterator[None]:
    """Turns what a hook raises into an error that names it.

    Raises:
      ConfigError: `dataset_code.hook`.
    """
    try:
        yield
    except (ShardsError, MemoryError):
        raise
    except (Exception, SystemExit) as error:  # code of the user's
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            "dataset_code.hook",
            where=f"{frame.filename}:{frame.lineno}",
            hook=name,
            error=f"{type(error).__name__}: {error}",
        ) from error


def _wrapped(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    code = inspect.unwrap(function).__code__

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        with naming_hook(name):
            found = function(*args, **kwargs)
            if name == "left_out_rows":
                return _left_out(found)  # as many as there are bad rows: they are not collected
            try:
                return _RESULTS[name](found)
            except _Unusable as problem:
                raise ConfigError(
                    "dataset_code.result",
                    where=f"{code.co_filename}:{code.co_firstlineno}",
                    hook=name,
                    want=str(problem),
                    got=repr(found)[:80],
                ) from None

    return called


class _Unusable(Exception):
    """What is wanted instead of a result."""


def _checked(good: Callable[[Any], bool], want: str) -> Callable[[Any], Any]:
    def check(found: Any) -> Any:
        if not good(found):
            raise _Unusable(want)
        return found

    return check


def _described(found: Any) -> dict[str, Any]:
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise _Unusable("a mapping whose names are texts")
    try:
        json.dumps(found, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _Unusable(f"plain JSON types ({error})") from None
    return dict(found)


def _files(found: Any) -> list[Path | str]:
    """Gives local files as paths, and the URLs of objects."""
    entries = [] if isinstance(found, str | bytes | Path) else list(found)
    if isinstance(found, str | bytes | Path) or not all(isinstance(e, str | Path) for e in entries):
        raise _Unusable("a list of paths")
    return [Path(each) if storage.is_local(str(each)) else str(each) for each in entries]


def _code_files(found: Any) -> list[Path]:
    paths = [Path(each) for each in _files(found)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise _Unusable(f"files that exist, unlike {str(missing[0])!r}")
    return paths


def _left_out(found: Any) -> Iterator[tuple[int, SampleError]]:
    with naming_hook("left_out_rows"):
        for number, error in found:
            if not isinstance(error, SampleError):
                raise TypeError(f"a pair of a number and a SampleError is wanted, not {error!r}")
            yield int(number), error


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_texts(value: Any, kinds: Any) -> bool:
    return isinstance(value, kinds) and all(isinstance(each, str) for each in value)


_RESULTS: Mapping[str, Callable[[Any], Any]] = {
    "__init__": _checked(lambda v: v is None, "nothing"),
    "__len__": _checked(lambda v: _is_number(v) and v >= 0, "a number of at least 0"),
    "code_files": _code_files,
    "describe": _described,
    "notes": _checked(lambda v: _is_texts(v, (list, tuple)), "a list of texts"),
    "resolve_mode": _checked(lambda v: isinstance(v, str), "a text"),
    "row_numbers": _checked(
        lambda v: isinstance(v, list) and bool(v) and all(map(_is_number, v)),
        "a list of one or more numbers",
    ),
    "source_files": _files,
}
"""What becomes of the results of hooks."""
