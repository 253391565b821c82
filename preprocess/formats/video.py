"""The videos of a row, and the parts of them that the row is about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from preprocess.formats.images import is_empty, part_media
from preprocess.formats.spec import Spec
from shardspec.errors import SampleError

VIDEO_NAMES = ("video", "videos", "video_path", "video_file")
"""Columns that hold a video, where a format is told from the rows."""

QUESTION = "Describe this video."
"""User text of a caption without one: the templates speak of an image."""

_BY_COLUMN = ("captions", "vqa", "points", "tracks")
"""Formats that know videos by their column alone."""

_CLIP = (("start", "video_start"), ("end", "video_end"))
"""Fields of a video in a row or in a part of a content; the second are Qwen-VL's."""


@dataclass(frozen=True, slots=True)
class RowVideo:
    """A video as a row names it."""

    source: Any
    """A name, a URL, bytes or the hub's {bytes, path}."""
    clip: tuple[Any, Any] = (None, None)
    """Start and end in seconds; what is not a number is left to the job."""


def row_videos(row: Mapping[str, Any], spec: Spec) -> list[RowVideo]:
    """Finds the videos of a row, where the spec names a column of videos; [] for none.

    Columns `start` and `end` have a value for the only video, or a list with one for each.

    Raises:
      SampleError: `row_fields`: a value is of another type, or there are not as many clips.
    """
    value = row.get(spec.names("video", ("",))[0])
    values = value if isinstance(value, list | tuple) else [value]
    videos = [_video(each, row, spec) for each in values if not is_empty(each)]
    bounds = [row.get(spec.column(name)) for name, _ in _CLIP]
    if not videos or all(map(is_empty, bounds)):
        return videos
    clips = []
    for (name, _), bound in zip(_CLIP, bounds, strict=True):
        each = bound if isinstance(bound, list | tuple) else [bound]
        if is_empty(bound):
            each = [None] * len(videos)
        if len(each) != len(videos):
            raise _field(row, spec.column(name), f"a time for each of {len(videos)} videos")
        clips.append([_time(time) for time in each])
    return [
        RowVideo(v.source, clip) for v, clip in zip(videos, zip(*clips, strict=True), strict=True)
    ]


def part_video(part: Mapping[str, Any]) -> RowVideo | None:
    """Finds the video that a part of a content brings along; None where it is in a column."""
    found = part_media(part, "video")
    clip = (_bound(part, 0), _bound(part, 1))
    return None if found is None else RowVideo(found, clip)


def with_videos(example: dict[str, Any], videos: list[RowVideo]) -> dict[str, Any]:
    """Adds videos to an example."""
    if not videos:
        return example
    clips = [None if v.clip == (None, None) else list(v.clip) for v in videos]
    found: dict[str, Any] = {"video": [v.source for v in videos]}
    if any(clips):
        found["clip"] = clips
    if len(videos) == 1:
        found = {name: value[0] for name, value in found.items()}
    return {**example, **found}


def with_row_videos(example: dict[str, Any], row: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    """Adds the videos of a row whose format leaves them in the order of their column."""
    videos = row_videos(row, spec) if spec.format in _BY_COLUMN else []
    if not videos:
        return example
    messages = [
        {"question": QUESTION, **message} if spec.format == "captions" else message
        for message in example["message_list"]
    ]
    return with_videos({**example, "message_list": messages}, videos)


def _video(value: Any, row: Mapping[str, Any], spec: Spec) -> RowVideo:
    if isinstance(value, Mapping) and not value.get("bytes"):
        found = part_video(value)
        if found is not None:
            return found
    if not isinstance(value, str | bytes | bytearray | memoryview | Mapping):
        raise _field(row, spec.column("video"), "a path or bytes")
    return RowVideo(value)


def _bound(part: Mapping[str, Any], side: int) -> Any:
    values = [_time(part.get(name)) for name in _CLIP[side]]
    return next((value for value in values if value is not None), None)


def _time(value: Any) -> Any:
    """Reads seconds, in CSV files written as a text; what is not a number is left to the job."""
    if isinstance(value, str):
        try:
            value = float(value) if value.strip() else None
        except ValueError:
            return value
    return None if value is None or value != value else value


def _field(row: Mapping[str, Any], name: str, want: str) -> SampleError:
    return SampleError("row_fields", name=name, want=want, fields=sorted(map(str, row)))
