"""The video of a row, and the part of it that the row is about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preprocess.formats.images import is_empty
from preprocess.formats.spec import Spec
from shardspec.errors import SampleError

VIDEO_NAMES = ("video", "video_path", "video_file")
"""Columns that hold a video, where a format is told from the rows."""

QUESTION = "Describe this video."
"""User text of a caption without one: the templates speak of an image."""


def row_video(row: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    """Finds the video of a row, where the spec names a column of videos: {} for none.

    Returns:
      `video`, a name, bytes or the hub's {bytes, path}; `clip`, [start, end] in seconds, if the row
      has the columns `start` or `end`.

    Raises:
      SampleError: `row_fields`: the value is of another type.
    """
    if "video" not in spec.columns:
        return {}
    video = row.get(spec.columns["video"])
    if is_empty(video):
        return {}
    if not isinstance(video, str | bytes | bytearray | memoryview | Mapping):
        name, want = spec.columns["video"], "a path or bytes"
        raise SampleError("row_fields", name=name, want=want, fields=sorted(map(str, row)))
    clip = [_time(row.get(spec.column(name))) for name in ("start", "end")]
    return {"video": video, **({"clip": clip} if clip != [None, None] else {})}


def _time(value: Any) -> Any:
    """Reads seconds, in CSV files written as a text; what is not a number is left to the job."""
    if isinstance(value, str):
        try:
            value = float(value) if value.strip() else None
        except ValueError:
            return value
    return None if value is None or value != value else value


def with_video(example: dict[str, Any], row: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    """Adds the row's video to an example."""
    found = row_video(row, spec)
    if not found:
        return example
    messages = [
        {"question": QUESTION, **message} if spec.format == "captions" else message
        for message in example["message_list"]
    ]
    return {**example, **found, "message_list": messages}
