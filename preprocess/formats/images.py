"""The images of a row, whatever the column is called and however many there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preprocess.formats.spec import Spec
from shardspec.errors import SampleError

_EMPTY = (None, "", "None", "none", "nan", "null")
"""What files write where a row has no image; a NaN of a float column is one, too."""

NAMES = (
    "images",
    "image",
    "image_path",
    "image_url",
    "image_urls",
    "img",
    "imgname",
    "image_filename",
    "file_name",
    "filepath",
    "url",
    "URL",
)
"""Columns that hold images, the first that is there wins."""

_MEDIA = ("video", "videos", "video_path", "video_file", "audio", "audios")
"""Columns that hold what a text is about, and that not every format takes."""


def row_images(row: Mapping[str, Any], spec: Spec, *, url: bool = True) -> list[Any]:
    """Lists the images of a row: names, URLs, bytes or the hub's {bytes, path}; [] for none.

    Args:
      row: A row.
      spec: Says which column, where it is not one of `NAMES`.
      url: Whether a column `url` is an image; of a conversation it is the page that it is from.
    """
    return list(numbered_images(row, spec, url=url).values())


def numbered_images(row: Mapping[str, Any], spec: Spec, *, url: bool = True) -> dict[int, Any]:
    """Gives the images of a row by their numbers in it, from 0; as `row_images`.

    An empty place in a list has a number, as `image_2` has beside `image_1` and `image_3`.
    """
    names = [name for name in NAMES if url or name.lower() != "url"]
    own = spec.names("image", ())
    for columns in (own,) if own else ((name,) for name in names):
        values = [each for name in columns for each in _as_list(row.get(name))]
        found = {i: each for i, each in enumerate(values) if not is_empty(each)}
        if found:
            return found
    numbered = [row.get(f"image_{i}") for i in range(1, 20)]  # MMMU: image_1 ... image_7
    return {i: each for i, each in enumerate(numbered) if not is_empty(each)}


def require_no_media(row: Mapping[str, Any], spec: Spec) -> None:
    """Refuses a row that is about a video or a sound which its format does not take.

    Raises:
      SampleError: `row_media`.
    """
    for name in _MEDIA:
        value = row.get(name)
        nothing = is_empty(value) or (isinstance(value, list | tuple) and not any(value))
        if not nothing and name not in spec.named():
            raise SampleError("row_media", name=name, fields=sorted(map(str, row)))


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


def part_media(part: Mapping[str, Any], kind: str) -> Any:
    """Finds what a part of a content brings along; None where it is in a column.

    Parts are those of Qwen-VL and ms-swift (`image`, `path`, `url`), OpenAI (`image_url`), TRL
    (none) and Anthropic (`source`: base64 with its media type, or a URL).

    Args:
      part: The part.
      kind: "image" or "video".
    """
    source = part.get("source")
    values = [part.get(name) for name in (kind, f"{kind}_url", "path", "url", "value")]
    values.append(_base64(part.get("base64")))
    if isinstance(source, Mapping):
        media_type = source.get("media_type", "image/png")
        values.append(source.get("url") or _base64(source.get("data"), media_type))
    found = next((value for value in values if not is_empty(value)), None)
    return found["url"] if isinstance(found, Mapping) and "url" in found else found


def named_media(part: Mapping[str, Any]) -> list[str]:
    """Lists the fields by which a part without a type brings images or videos along."""
    names = [name for kind in ("image", "video") for name in (kind, f"{kind}_url")]
    return [name for name in names if not is_empty(part.get(name))]


def _base64(data: Any, media_type: str = "image/png") -> str | None:
    return f"data:{media_type};base64,{data}" if isinstance(data, str) else None
