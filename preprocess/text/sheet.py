"""A style sheet: the TOML file of a user's own styles, templates, system prompts and paraphrases.

system = ["You read receipts."]     # of conversations without a system text; one is drawn

[styles.receipt]                    # a new style: all but what is said here is as in `like`
like = "vqa2"
templates = ["{question} Answer with a number.", "On this receipt: {question}"]
system = ["You are a cashier."]     # wins over the one above

[styles.long_caption]               # a style of that name is replaced, or extended
more_templates = ["What does the picture show?"]

[paraphrase]
groups = [["receipt", "bill", "slip"]]
builtin = false                     # without the groups of the package

Decides which keys a sheet has. What they mean for a style is up to `preprocess.text.own_styles`.
The content is part of the recipe, the file is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from preprocess.text.points import PointMode
from shardspec.errors import ConfigError, nearest
from shardspec.toml import load_toml

SWITCHES = ("rigid", "demo", "unnamed", "length_hint", "in_words", "explained", "grouped")
"""Attributes of a style that are true or false."""

_CHOICES: Mapping[str, tuple[str, ...]] = {
    "mode": get_args(PointMode),
    "since": ("none", "uber_model", "uber_model_v2"),
}
_LISTS = ("templates", "more_templates", "system")
_KEYS = ("like", "trained_as", *_LISTS, *_CHOICES, *SWITCHES)


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnStyle:
    """What a sheet says of a style."""

    like: str = ""
    """The style that it takes everything else from; "" for the one of its own name."""
    templates: tuple[str, ...] = ()
    """Prompt templates instead of those of `like`."""
    more_templates: tuple[str, ...] = ()
    """Prompt templates besides those."""
    system: tuple[str, ...] = ()
    """System prompts, of which one is drawn."""
    attributes: tuple[tuple[str, Any], ...] = ()
    """Other attributes of `preprocess.text.styles.Style`, sorted."""

    def to_dict(self) -> dict[str, Any]:
        """Gives what is said, in plain JSON types."""
        lists = {name: list(getattr(self, name)) for name in _LISTS if getattr(self, name)}
        return {**({"like": self.like} if self.like else {}), **lists, **dict(self.attributes)}


@dataclass(frozen=True, slots=True, kw_only=True)
class StyleSheet:
    """A user's own styles. Hashable: what follows from it is kept."""

    styles: tuple[tuple[str, OwnStyle], ...] = ()
    """By name, sorted."""
    system: tuple[str, ...] = ()
    """System prompts of conversations whose rows and styles have none."""
    paraphrase: tuple[tuple[str, ...], ...] = ()
    """Groups of expressions that may replace each other."""
    builtin_paraphrases: bool = True
    """Whether the groups of the package are used as well."""
    path: str = field(default="", compare=False)
    """The file, for errors."""

    def to_dict(self) -> dict[str, Any]:
        """Gives what samples follow from, in plain JSON types; {} for an empty sheet."""
        told = {
            "styles": {name: style.to_dict() for name, style in self.styles},
            "system": list(self.system),
            "paraphrase": [list(group) for group in self.paraphrase],
        }
        found: dict[str, Any] = {name: value for name, value in told.items() if value}
        return found if self.builtin_paraphrases else {**found, "builtin_paraphrases": False}

    def texts(self) -> Iterator[tuple[str, str]]:
        """Lists all texts that a model may see, each with the key that it is under."""
        yield from (("system", text) for text in self.system)
        for name, style in self.styles:
            for key in _LISTS:
                yield from ((f"styles.{name}.{key}", text) for text in getattr(style, key))
        yield from (("paraphrase.groups", text) for group in self.paraphrase for text in group)


def read_styles(path: str) -> StyleSheet:
    """Reads a style sheet.

    Raises:
      ConfigError: `styles_file` (not there, no TOML), `styles_key` (unknown, or of another type).
    """
    try:
        document = load_toml(Path(path))
    except (OSError, ValueError) as error:  # TOML and UTF-8 errors are ValueErrors
        raise ConfigError("styles_file", where=path, error=error) from error
    _check_keys(document, ("styles", "system", "paraphrase"), "", path)
    styles = _table(document.get("styles", {}), "styles", path)
    words = _table(document.get("paraphrase", {}), "paraphrase", path)
    _check_keys(words, ("groups", "builtin"), "paraphrase.", path)
    groups = words.get("groups", [])
    if not isinstance(groups, list):
        raise _wrong("paraphrase.groups", "a list of lists of texts", groups, path)
    return StyleSheet(
        styles=tuple(
            (name, _style(_table(styles[name], f"styles.{name}", path), name, path))
            for name in sorted(styles)
        ),
        system=_texts(document.get("system", []), "system", path),
        paraphrase=tuple(_texts(group, "paraphrase.groups", path) for group in groups),
        builtin_paraphrases=_switch(words.get("builtin", True), "paraphrase.builtin", path),
        path=path,
    )


def _style(table: Mapping[str, Any], name: str, path: str) -> OwnStyle:
    where = f"styles.{name}"
    _check_keys(table, _KEYS, f"{where}.", path)
    attributes: dict[str, Any] = {}
    for key, value in table.items():
        if key in SWITCHES:
            attributes[key] = _switch(value, f"{where}.{key}", path)
        elif key not in _LISTS and not isinstance(value, str):
            raise _wrong(f"{where}.{key}", "a text", value, path)
        elif key in _CHOICES and value not in _CHOICES[key]:
            raise ConfigError(
                "styles_value.name",
                where=path,
                name=f"{where}.{key}",
                got=value,
                hint=nearest(value, _CHOICES[key]),
                want=", ".join(_CHOICES[key]),
            )
        elif key in _CHOICES or key == "trained_as":
            attributes[key] = value
    return OwnStyle(
        like=table.get("like", ""),
        **{key: _texts(table.get(key, []), f"{where}.{key}", path) for key in _LISTS},
        attributes=tuple(sorted(attributes.items())),
    )


def _table(value: Any, name: str, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(name, "a table", value, path)
    return value


def _texts(value: Any, name: str, path: str) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(t, str) and t.strip() for t in found):
        raise _wrong(name, "a text, or a list of texts", value, path)
    return tuple(found)


def _switch(value: Any, name: str, path: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(name, "true or false", value, path)
    return value


def _check_keys(table: Mapping[str, Any], known: tuple[str, ...], prefix: str, path: str) -> None:
    for name in table:
        if name not in known:
            raise ConfigError(
                "styles_key.unknown", where=path, name=f"{prefix}{name}", hint=nearest(name, known)
            )


def _wrong(name: str, want: str, value: Any, path: str) -> ConfigError:
    return ConfigError("styles_key.type", where=path, name=name, want=want, got=repr(value)[:80])
