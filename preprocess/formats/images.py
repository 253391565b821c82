"""The images of a row, whatever the column is called and however many there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preprocess.formats.spec import Spec

_EMPTY = (None, "", "None", "none", "nan", "null")
"""What files write where a row has no image; a NaN of a float column is one, too."""

NAMES = ("images", "image", "image_path", "image_url", "image_urls", "img", "file_name", "url")
"""Columns that hold images, the first that is there wins."""


def row_images(row: Mapping[str, Any], spec: Spec, *, url: bool = True) -> list[Any]:
    """Lists the images of a row: names, URLs, bytes or the hub's {bytes, path}; [] for none.

    Args:
      row: A row.
      spec: Says which column, where it is not one of `NAMES`.
      url: Whether a column `url` is an image; of a conversation it is the page that it is from.
    """
    names = [name for name in NAMES if url or name != "url"]
    for name in (spec.columns["image"],) if "image" in spec.columns else names:
        found = [each for each in _as_list(row.get(name)) if not is_empty(each)]
        if found:
            return found
    numbered = [row.get(f"image_{i}") for i in range(1, 20)]  # MMMU: image_1 ... image_7
    return [each for each in numbered if not is_empty(each)]


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [each for part in value for each in _as_list(part)]
    if isinstance(value, Mapping) and not {"bytes", "path"} & set(value):
        return list(value.values())  # MiniCPM-V: placeholder -> path
    return [value]


def is_empty(value: Any) -> bool:
    """Tells whether a value says that there is no image."""
    if isinstance(value, Mapping):
        return not any(value.values())
    if isinstance(value, float):
        return value != value
    return value is None or (isinstance(value, str) and value.strip() in _EMPTY)
