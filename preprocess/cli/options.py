"""Settings dataclasses as flags: argparse options from their fields, and objects from the options.

Each field with a `Setting` (`preprocess/settings.py`) is an option. The type says what is read: a
number, a text, one of the names of a `Literal`, a switch (`bool`), or several values (a tuple). A
field whose type is a settings dataclass itself adds the options of that one. Fields without a
`Setting` have no flag.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from preprocess.settings import Setting

T = TypeVar("T")

_METAVARS: Mapping[Any, str] = {int: "N", float: "X"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Field:
    name: str
    kind: Any
    """Its type, without `None` and `Annotated`."""
    default: Any
    """MISSING where a value is required."""
    setting: Setting | None

    @property
    def dest(self) -> str:
        """Name of the value among the parsed options."""
        assert self.setting is not None
        return (self.setting.flag or self.name).replace("-", "_")


def add_settings(
    parser: argparse.ArgumentParser, *kinds: type, verb: str = "", groups: Sequence[str] = ()
) -> None:
    """Adds an option for each setting of some dataclasses.

    Args:
      parser: The verb's.
      kinds: Settings dataclasses; within a group, options come in their order.
      verb: Settings that name other verbs are left out.
      groups: Headings in the order in which `--help` lists them.
    """
    made: dict[str, Any] = {"": parser}
    made |= {name: parser.add_argument_group(name) for name in groups}
    for kind in kinds:
        for each in _leaves(kind):
            assert each.setting is not None
            if not each.setting.verbs or verb in each.setting.verbs:
                _add(made[each.setting.group], each, each.setting)


def read_settings(
    kind: type[T],
    options: argparse.Namespace,
    given: Mapping[type, Mapping[str, Any]] | None = None,
) -> T:
    """Makes a settings object, nested ones included, from the options.

    Args:
      kind: Its dataclass.
      options: What `add_settings` made the parser read.
      given: By dataclass, values of fields that are not read from an option.

    Raises:
      ConfigError: A value that cannot be read, or that the dataclass refuses.
    """
    given = given or {}
    own = given.get(kind, {})
    values = dict(own)
    for each in _fields(kind):
        if each.name in own:
            continue
        if each.setting is None:
            if isinstance(each.kind, type) and dataclasses.is_dataclass(each.kind):
                values[each.name] = read_settings(each.kind, options, given)
        elif hasattr(options, each.dest):
            value = getattr(options, each.dest)
            if value is None and each.setting.unset is not None:
                value = each.setting.unset()
            elif value is None and each.default is not MISSING:
                value = each.default
            elif each.setting.parse is not None and isinstance(value, str):
                value = each.setting.parse(value)
            values[each.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingValue:
    """A setting of an object, with its value."""

    name: str
    """Of its flag, among the parsed options."""
    value: Any
    given: bool
    """Whether the value is not the default; False where the default depends on the machine."""


def setting_values(settings: Any) -> Iterator[SettingValue]:
    """Lists the settings of a settings object, those of nested dataclasses in place."""
    for each in _fields(type(settings)):
        value = getattr(settings, each.name)
        if each.setting is not None:
            given = each.setting.unset is None and value != each.default
            yield SettingValue(name=each.dest, value=value, given=given)
        elif dataclasses.is_dataclass(value):
            yield from setting_values(value)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)  # compiles their texts


def _fields(kind: Any) -> Iterator[_Field]:
    hints = _hints(kind)
    for each in dataclasses.fields(kind):
        hint, setting = hints[each.name], None
        if get_origin(hint) is Annotated:
            hint, *extras = get_args(hint)
            setting = next((extra for extra in extras if isinstance(extra, Setting)), None)
        if get_origin(hint) in (Union, UnionType):
            hint = next(part for part in get_args(hint) if part is not NoneType)
        default = each.default
        if each.default_factory is not MISSING:
            default = each.default_factory()
        yield _Field(name=each.name, kind=hint, default=default, setting=setting)


def _leaves(kind: Any) -> Iterator[_Field]:
    """Lists the fields with a setting, those of nested dataclasses in place."""
    for each in _fields(kind):
        if each.setting is not None:
            yield each
        elif dataclasses.is_dataclass(each.kind):
            yield from _leaves(each.kind)


def _add(group: Any, each: _Field, setting: Setting) -> None:
    several = get_origin(each.kind) is tuple
    simple = setting.parse is None and setting.unset is None
    required = each.default is MISSING and setting.unset is None
    known: dict[str, Any] = {}
    if get_origin(each.kind) is Literal:
        known["choices"] = get_args(each.kind)
    elif each.kind is bool:
        known["action"] = "store_true"
    elif each.kind in (int, float) and setting.parse is None:
        known["type"] = each.kind
    metavar = setting.metavar or ("" if setting.parse else _METAVARS.get(each.kind, ""))
    if metavar:
        known["metavar"] = metavar
    if several and setting.parse is None:
        known["nargs"] = "+"
    if simple and not required:
        known["default"] = each.default
    shown = setting.shown
    if simple and not shown and isinstance(each.default, str | int | float):
        # Neither an empty text nor a switch that is off is worth a word.
        shown = "" if each.default is False else str(each.default)
    text = f"{setting.help} (default: {shown})" if shown else setting.help
    if setting.positional:
        if not required and not several:
            known["nargs"] = "?"
        group.add_argument(each.dest, help=text, **known)
        return
    if required:
        known["required"] = True
    group.add_argument(f"--{each.dest.replace('_', '-')}", help=text, **known)
