"""Things in a video: points at times, counts, tracks, and where something is first and last seen.

Times are seconds of the video; in texts they count from the beginning of the clip, and what is
outside of it is left out. Coordinates are written as thousandths of the frame, `coords` of Molmo 2,
whatever `point_format` says: XML has no times.

- Points: `timestamps`, and as `points` a list of [x, y] for each. Times go down to the grid of the
  annotation, `fps` (2 by default); each thing is pointed at once, so the points count the things.
- Tracks: `frame_trajectories`, as the published sets have them: `time`, and `points` with `id`,
  `point` ([x, y]) and `occluded`. Only what is annotated at a stored frame is written, and with
  `sampling_fps` only the frames that are shown at multiples of 1 / sampling_fps.

`point_scale` (100: percent) or `point_size` ([width, height]) says what coordinates are fractions
of; otherwise they are pixels of the video.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from preprocess.text.message import Message, VideoFacts, field_error, require_field
from preprocess.text.points import (
    NO_POINTS,
    NO_TRACKS,
    PointFrame,
    parse_points,
    point_sentence,
    thousandths,
    timed_tag,
)
from preprocess.text.styles.base import Draw, Exchange, Style, prompt_templates, user_text
from preprocess.text.styles.pointing import point_label, positive

AT_FRAME_S = 0.01
"""A label belongs to the stored frame that is less than this away (Molmo 2)."""

GRID_FPS = 2.0
"""Annotations of Molmo 2's video points per second."""

RATE_SHARE = 0.5
"""Share of the prompts that say how often a track is wanted (Molmo 2)."""

ANY_START_SHARE = 0.2
"""Share of single-point prompts that begin at any frame, and not at the first (Molmo 2)."""

_SLACK = 1e-3
"""Of a step of the grid: times in files are rounded."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """An object in a frame."""

    name: Any
    """The id of the annotation."""
    x: int
    y: int


_Frames = list[tuple[float, list[_Seen]]]
"""What is seen when, in the order of time."""


def draw_video_points(message: Message, draw: Draw) -> Exchange:
    """Draws a request to point at things in a video, or to count them."""
    label = point_label(message)
    user = _request(message, draw, label)
    if draw.style.mode == "count" and "points" not in message:
        count = require_field(message, "count")
        if type(count) is not int or count < 0:
            raise field_error(message, "count", "a number of things")
        return user, str(count) if count else NO_POINTS
    frames: list[PointFrame] = []
    number = 0
    for time_s, points in _timed_points(message):
        group = []
        for x, y in sorted(points):
            number += 1
            group.append((number, x, y))
        if group:
            frames.append((time_s, group))
    if not number:
        return user, NO_POINTS
    tag = timed_tag("points", frames, label=label)
    return user, point_sentence(tag, count=number, mode=draw.style.mode)


def draw_tracks(message: Message, draw: Draw) -> Exchange:
    """Draws a request to follow things through a video."""
    label = point_label(message)
    user = _request(message, draw, label)
    rate = message.get("sampling_fps")
    if rate is not None and not message.get("prompt") and draw.rng.random_sample() < RATE_SHARE:
        templates = prompt_templates("tracking.rate")
        template = templates[draw.rng.randint(0, len(templates))]
        user = f"{user} {template.replace('{fps}', f'{_number(message, rate):g}')}"
    return user, _tracks(_sampled(_at_frames(message), message), label)


def draw_ends(message: Message, draw: Draw) -> Exchange:
    """Draws a request for the first and the last frame in which things are seen."""
    label = point_label(message)
    seen = _at_frames(message)
    times: dict[Any, list[float]] = {}
    for time_s, objects in seen:
        for each in objects:
            times.setdefault(each.name, []).append(time_s)
    ends = [
        (time_s, [o for o in objects if time_s in (times[o.name][0], times[o.name][-1])])
        for time_s, objects in seen
    ]
    return _request(message, draw, label), _tracks(ends, label)


def draw_single_track(message: Message, draw: Draw) -> Exchange:
    """Draws a request to follow a point from the frame on in which it is given."""
    label = point_label(message)
    seen = [(time_s, objects[:1]) for time_s, objects in _at_frames(message) if objects]
    if not seen:
        return _request(message, draw, label), NO_TRACKS
    start = 0
    if draw.rng.random_sample() < ANY_START_SHARE:
        start = draw.rng.randint(0, len(seen))
    time_s, (first,) = seen[start]
    point = timed_tag("points", [(time_s, [(1, first.x, first.y)])], label=label)
    user = user_text(message, draw, plain=point, label=point)
    return user, _tracks(_sampled(seen[start:], message), label)


def _request(message: Message, draw: Draw, label: str) -> str:
    plain = message.get("question") or label
    return user_text(
        message, draw, plain=plain, **({} if "question" in message else {"label": label})
    )


def _tracks(seen: _Frames, label: str) -> str:
    """Writes tracks; objects are numbered as they appear, by their place within a frame."""
    numbers: dict[Any, int] = {}
    frames: list[PointFrame] = []
    for time_s, objects in seen:
        for each in sorted(objects, key=lambda o: (o.x, o.y)):
            numbers.setdefault(each.name, len(numbers) + 1)
        if objects:
            frames.append((time_s, sorted((numbers[o.name], o.x, o.y) for o in objects)))
    return timed_tag("tracks", frames, label=label) if frames else NO_TRACKS


def _timed_points(message: Message) -> Iterator[tuple[float, list[tuple[int, int]]]]:
    times, points = require_field(message, "timestamps"), require_field(message, "points")
    paired = all(isinstance(each, Sequence) for each in (times, points))
    if not paired or len(times) != len(points):
        raise field_error(message, "timestamps", "a time for each list of points")
    scale = _scale(message)
    fps = _number(message, message.get("fps", GRID_FPS))
    found: dict[float, list[tuple[int, int]]] = {}
    for time, own in zip(times, points, strict=True):
        time_s = _clip_time(message, time)
        if time_s is not None:
            grid = math.floor(time_s * fps + _SLACK) / fps
            found.setdefault(grid, []).extend(thousandths(p, scale) for p in parse_points(own))
    yield from sorted(found.items())


def _at_frames(message: Message) -> _Frames:
    """Lists what is seen in the stored frames; in all annotated ones where these are unknown."""
    annotated = require_field(message, "frame_trajectories")
    if not isinstance(annotated, Sequence) or not all(isinstance(f, Mapping) for f in annotated):
        raise field_error(message, "frame_trajectories", "a list of frames with time and points")
    scale, facts = _scale(message), _facts(message)
    times = [] if facts is None else facts.frame_times_s
    found: dict[float, list[_Seen]] = {}
    for frame in annotated:
        time_s = _clip_time(message, frame.get("time"))
        if time_s is None:
            continue
        near = min(times, key=lambda t: abs(t - time_s), default=time_s)
        if abs(near - time_s) >= AT_FRAME_S:
            continue
        seen = found.setdefault(near, [])
        for each in frame.get("points") or ():
            if not isinstance(each, Mapping) or "point" not in each:
                raise field_error(message, "frame_trajectories", "points with id and point")
            if not each.get("occluded"):
                (point,) = parse_points([each["point"]])
                seen.append(_Seen(each.get("id"), *thousandths(point, scale)))
    return sorted(found.items())


def _sampled(seen: _Frames, message: Message) -> _Frames:
    """Keeps the frames that are shown at multiples of 1 / sampling_fps."""
    rate = message.get("sampling_fps")
    if rate is None or not seen:
        return seen
    step = 1 / _number(message, rate)
    kept: dict[float, list[_Seen]] = {}
    for k in range(round(seen[0][0] / step), int(seen[-1][0] / step + AT_FRAME_S) + 1):
        shown = [frame for frame in seen if frame[0] <= k * step + AT_FRAME_S]
        if shown and shown[-1][0] > (k - 1) * step + AT_FRAME_S:
            kept[shown[-1][0]] = shown[-1][1]
    return list(kept.items())


def _clip_time(message: Message, time: Any) -> float | None:
    """Counts a time from the beginning of the clip; None where it is outside of it."""
    if isinstance(time, bool) or not isinstance(time, int | float) or not math.isfinite(time):
        raise field_error(message, "timestamps", "times in seconds")
    facts = _facts(message)
    if facts is None:
        return float(time)
    start_s, end_s = facts.clip or (None, None)
    time_s = time - (start_s or 0.0)
    inside = time_s >= -AT_FRAME_S and (end_s is None or time < end_s)
    return max(0.0, time_s) if inside else None


def _facts(message: Message) -> VideoFacts | None:
    found: VideoFacts | None = message.get("video_facts")
    return found


def _scale(message: Message) -> tuple[float, float]:
    size, facts = message.get("point_size"), _facts(message)
    if "point_scale" in message:
        scale = positive(message["point_scale"], message)
        return scale, scale
    if size is None and facts is not None:
        size = facts.size
    if not isinstance(size, list | tuple) or len(size) != 2:
        raise field_error(message, "point_scale", "a scale, or a video whose pixels are meant")
    return positive(size[0], message), positive(size[1], message)


def _number(message: Message, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise field_error(message, "sampling_fps", "frames per second, above 0")
    return float(value)


def _points(mode: Any, template: str) -> Style:
    return Style(
        family="video_points",
        draw=draw_video_points,
        template=f"pointing.{template}/video",
        since="uber_model_v2",
        mode=mode,
        rigid=True,
        demo=True,
        length_hint=False,
    )


def _tracking(draw: Any, template: str) -> Style:
    return Style(
        family="tracking",
        draw=draw,
        template=f"tracking.{template}",
        since="uber_model_v2",
        rigid=True,
        demo=True,
        length_hint=False,
    )


STYLES: Mapping[str, Style] = {
    "video_point": _points("point", "pointing"),
    "video_point_count": _points("point_then_count", "point_count"),
    "video_count_point": _points("count_then_point", "count_then_point"),
    "video_count": _points("count", "count"),
    "video_point_track_per_frame": _tracking(draw_tracks, "track"),
    "video_point_ground_start_end": _tracking(draw_ends, "ground"),
    "video_single_point_track_per_frame": _tracking(draw_single_track, "single_point"),
}
