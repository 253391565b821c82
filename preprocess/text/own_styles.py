"""A user's own styles: those of the package, and what a style sheet adds to them or replaces."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from preprocess.text.sheet import OwnStyle, StyleSheet
from preprocess.text.styles import STYLES, Family, Style
from preprocess.text.styles.base import prompt_templates
from shardspec.errors import ConfigError, nearest

_FIELDS: Mapping[Family, str | None] = {
    "caption": "",
    "qa": "question",
    "document": "question",
    "instruction": "question",
    "inline_points": "question",
    "pointing": "label",
    "counting": "label",
    "video_points": "label",
    "tracking": "label",
    "robot": "instruction",
    "multiple_choice": None,
}
"""The one field of the prompt templates of a family; "" for none, None where there are none."""


@cache
def styles_of(sheet: StyleSheet) -> Mapping[str, Style]:
    """Lists all styles by name: those of the package, and the user's.

    Raises:
      ConfigError: `styles_value`.
    """
    own = dict(sheet.styles)
    names = {*STYLES, *own}

    def resolve(name: str, before: tuple[str, ...]) -> Style:
        style = own.get(name)
        if style is None:
            return STYLES[name]
        base, where = style.like or name, f"styles.{name}.like"
        if base == name and name not in STYLES:
            problem, hint = "is no built-in style", 'say what it is like: like = "vqa2"'
            raise _refused(sheet, f"styles.{name}", name, problem, hint=hint)
        if base not in names:
            raise _refused(sheet, where, base, "is not a style", hint=nearest(base, names))
        if base in before:
            raise _refused(sheet, where, base, "is like this one", hint="end the circle")
        like = STYLES[name] if base == name else resolve(base, (*before, name))
        return _changed(like, style, name, sheet)

    made = {name: resolve(name, ()) for name in own}
    for name, style in made.items():
        if style.trained_as and style.trained_as not in names:
            where, hint = f"styles.{name}.trained_as", nearest(style.trained_as, names)
            raise _refused(sheet, where, style.trained_as, "is not a style", hint=hint)
    return {**STYLES, **made}


def require_style(name: str, sheet: StyleSheet, *, where: str) -> None:
    """Refuses a style that neither the package nor a style sheet has; "" is none.

    Raises:
      ConfigError: `spec_value`.
    """
    styles = styles_of(sheet)
    if name and name not in styles:
        raise ConfigError(
            "spec_value",
            where=where,
            name="style",
            got=name,
            hint=nearest(name, styles),
            want="a built-in style, or one of the style sheet",
        )


def _changed(like: Style, own: OwnStyle, name: str, sheet: StyleSheet) -> Style:
    changes: dict[str, Any] = dict(own.attributes)
    templates = own.templates or like.templates
    if own.more_templates:
        if not templates and like.template:
            templates = tuple(prompt_templates(like.template))
        templates += own.more_templates
    for key in ("templates", "more_templates"):
        for template in getattr(own, key):
            _check_template(template, like.family, f"styles.{name}.{key}", sheet)
    if own.templates or own.more_templates:
        changes = {"since": "none", **changes}  # they are written down to be used
    return replace(like, **changes, templates=templates, system=own.system or like.system)


def _check_template(template: str, family: Family, where: str, sheet: StyleSheet) -> None:
    """Refuses a template that leaves the row's text out, or wants a field that there is not."""
    wanted = _FIELDS[family]
    if wanted is None:
        hint = "see the setting `choices`"
        raise _refused(sheet, where, template, f"cannot be used by the family {family}", hint=hint)
    fields = set(re.findall(r"\{(\w+)\}", template))
    if fields != ({wanted} if wanted else set()):
        field = f"{{{wanted}}}" if wanted else "no field"
        problem = f"must have {field}, and no other"
        raise _refused(sheet, where, template, problem, hint=f"the style is of the family {family}")


def _refused(sheet: StyleSheet, name: str, got: str, problem: str, *, hint: str) -> ConfigError:
    return ConfigError(
        "styles_value.problem", where=sheet.path, name=name, got=got, problem=problem, hint=hint
    )
