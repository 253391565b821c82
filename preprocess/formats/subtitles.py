"""Subtitles: lines with the times at which they are said, of SRT and WebVTT files or as values.

A line is (start, end, text), in seconds of the video. Markup in a text is left out, and its lines
are joined by a space.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping
from typing import Any

from preprocess.formats.spec import Spec
from shardspec.errors import SampleError

Subtitle = tuple[float, float, str]
"""Start and end in seconds, and what is said."""

SUBTITLE_FILES = (".srt", ".vtt")

_TIME = r"(?:(\d+):)?(\d{1,2}):(\d{1,2})[.,](\d{1,3})"
_TIMING = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}(?:\s.*)?")
_MARKUP = re.compile(r"</?[A-Za-z][^<>]*>|<\d[\d:.]*>|\{\\[^{}]*\}")
"""Tags (<i>, <v Ann>), times of words (WebVTT) and positions of ASS in SRT files."""


def parse_subtitles(text: str) -> list[Subtitle]:
    """Reads the text of an SRT or WebVTT file.

    Raises:
      SampleError: `subtitles.file`: a line with `-->` that is not a timing, or no timing at all.

    >>> parse_subtitles("1\\n00:00:01,500 --> 00:00:03,000\\n<i>Hello</i>\\nthere\\n")
    [(1.5, 3.0, 'Hello there')]
    """
    found = []
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    blocks = "\n".join(line.rstrip() for line in lines).split("\n\n")
    for block in blocks:
        head, arrow, rest = block.partition("-->")
        if not arrow or head.lstrip().startswith("NOTE"):
            continue  # the head of the file, a style, a comment
        first = head.rpartition("\n")[2]
        timing, *said = (first + arrow + rest).split("\n")
        match = _TIMING.fullmatch(timing)
        if match is None:
            raise SampleError("subtitles.file", got=timing[:80])
        start, end = _seconds(*match.groups()[:4]), _seconds(*match.groups()[4:])
        found.append((start, end, " ".join(said)))
    if not found and text.strip() not in ("", "WEBVTT"):
        raise SampleError("subtitles.file", got=text.strip()[:80])
    return _in_order((s, e, html.unescape(_MARKUP.sub("", said))) for s, e, said in found)


def row_subtitles(value: Any) -> list[Subtitle]:
    """Reads subtitles as values: [start, end, text], records of these, or the text of a file.

    Raises:
      SampleError: `subtitles.line`, `subtitles.file`.
    """
    if value is None:
        return []
    if isinstance(value, str):
        return parse_subtitles(value)
    if isinstance(value, Mapping):  # the hub's record of lists
        lists = [value.get(name) for name in ("start", "end", "text")]
        if not all(isinstance(each, list | tuple) for each in lists):
            raise SampleError("subtitles.line", got=str(value)[:80])
        value = list(zip(*lists, strict=False))
    if not isinstance(value, list | tuple):
        raise SampleError("subtitles.line", got=str(value)[:80])
    return _in_order(map(_line, value))


def with_row_subtitles(
    example: dict[str, Any], row: Mapping[str, Any], spec: Spec
) -> dict[str, Any]:
    """Adds the subtitles of a row to an example with videos, where the spec names their column.

    A value is what `row_subtitles` takes, or the name of a file, which becomes {"path": name};
    several videos have a list with one value, or None, for each. A column `.srt` or `.vtt` is no
    column: the files are called as the videos are, and may be missing.

    Raises:
      SampleError: `subtitles`, `row_fields`: another number of values than of videos.
    """
    name, video = spec.names("subtitles", ("",))[0], example.get("video")
    if not name or video is None:
        return example
    videos = video if isinstance(video, list) else [video]
    found: list[Any]
    if name in SUBTITLE_FILES:
        found = [_beside(each, name) for each in videos]
    else:
        value = row.get(name)
        found = [None] * len(videos) if value is None else [value] if len(videos) == 1 else value
        if not isinstance(found, list | tuple) or len(found) != len(videos):
            want = f"subtitles for each of {len(videos)} videos"
            raise SampleError("row_fields", name=name, want=want, fields=sorted(map(str, row)))
        found = [_file(each) or row_subtitles(each) for each in found]
    return {**example, "subtitles": found if isinstance(video, list) else found[0]}


def _file(value: Any) -> dict[str, Any] | None:
    named = isinstance(value, str) and value.lower().endswith(SUBTITLE_FILES)
    return {"path": value} if named and "\n" not in value else None


def _beside(video: Any, suffix: str) -> dict[str, Any] | None:
    path = video.get("path") if isinstance(video, Mapping) else video
    if not isinstance(path, str):
        return None
    stem = path.rpartition(".")[0] if "." in path.rpartition("/")[2] else path
    return {"path": stem + suffix, "optional": True}


def _line(value: Any) -> Subtitle:
    if isinstance(value, Mapping):
        value = [value.get(name) for name in ("start", "end", "text")]
    if isinstance(value, list | tuple) and len(value) == 3:
        start, end, text = value
        if _is_time(start) and _is_time(end) and isinstance(text, str):
            return float(start), float(end), text
    raise SampleError("subtitles.line", got=str(value)[:80])


def _is_time(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value < math.inf


def _in_order(lines: Any) -> list[Subtitle]:
    """Sorts lines by their times, without empty ones."""
    kept = [(start, end, " ".join(text.split())) for start, end, text in lines]
    return sorted((line for line in kept if line[2]), key=lambda line: line[:2])


def _seconds(hours: str | None, minutes: str, seconds: str, part: str) -> float:
    whole: int = int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds)
    return whole + int(f"{part:0<3}") / 1000
