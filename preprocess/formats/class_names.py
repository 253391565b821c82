"""Names of classes, whose numbers are in columns and their names in the schema of the file.

The type ClassLabel of `datasets` stores a number for each value; a reader without the names would
learn `17` for "pizza".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_KEY = b"huggingface"
"""Where `datasets` keeps its types among the metadata of an Arrow schema."""


class ClassName(str):
    """The name of a class: a text, which knows the number that is stored."""

    number: int

    @classmethod
    def of(cls, name: str, number: int) -> ClassName:
        """Joins both."""
        made = cls(name)
        made.number = number
        return made


def class_features(schema: Any) -> dict[str, Any]:
    """Finds the columns of an Arrow schema that hold numbers of classes.

    Returns:
      The type of each, as `datasets` describes it; {} for files of other writers.
    """
    try:
        described = json.loads((schema.metadata or {})[_KEY])["info"]["features"].items()
        return {
            name: feature for name, feature in described if '"ClassLabel"' in json.dumps(feature)
        }
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return {}


def with_class_names(row: dict[str, Any], features: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces the numbers of classes in a row by their names; one without a name by None."""
    if not features:
        return row
    return {**row, **{k: _named(row[k], feature) for k, feature in features.items() if k in row}}


def _named(value: Any, feature: Any) -> Any:
    if isinstance(feature, list):  # [type], as older releases write lists
        feature = {"_type": "List", "feature": feature[0] if feature else None}
    if not isinstance(feature, Mapping):
        return value
    typed = isinstance(feature.get("_type"), str)  # otherwise a record, of its columns
    inner = feature.get("feature", feature) if typed else feature
    if isinstance(value, list):
        return [_named(each, inner) for each in value]
    names = feature.get("names")
    if typed and feature["_type"] == "ClassLabel" and isinstance(names, list):
        fits = isinstance(value, int) and 0 <= value < len(names)
        return ClassName.of(str(names[value]), value) if fits else None
    if isinstance(value, Mapping) and isinstance(inner, Mapping):  # also a record of lists
        return {name: _named(each, inner.get(name)) for name, each in value.items()}
    return value
