"""Subtitles as text: at their frames, or all of them after the frames, as Molmo 2 has them.

    frames  ... 1.0 <frame> "\\n1.2 - 2.9 Hello there.\\n" 3.0 <frame> ...
    after   ... <frame> "subtitle\\n1.2 - 2.9 Hello there.\\n4.0 - 5.0 Bye.\\n"

Which frames an example has is drawn at load, so a line carries its time: it comes before the first
frame that is shown later than it begins, or after the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from preprocess.formats import Subtitle

SubtitleForm = Literal["frames", "after", "none"]

AFTER_MS = 2**31 - 1
"""Time of what is to be after the last frame."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SubtitleText:
    """A run of text among the frames of a video."""

    text: str
    begin_ms: int
    """It is before the first frame that is shown later than this."""
    end_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedSubtitles:
    """The subtitles of a video as they are stored."""

    lines: list[SubtitleText]
    """In their order."""
    left_out: int
    """Lines of the clip that the window and the budget left out."""


def place_subtitles(
    subtitles: Sequence[Subtitle],
    *,
    form: SubtitleForm,
    clip: tuple[float | None, float | None],
    frame_times_s: Sequence[float],
    count: Callable[[str], int],
    max_tokens: int = 0,
    window_s: float = 0.0,
) -> PlacedSubtitles:
    """Chooses and writes the lines of a video.

    Args:
      subtitles: In the order of their times, in seconds of the video.
      form: Where they are.
      clip: The part of the video that is meant; times are counted from its start.
      frame_times_s: When the stored frames are shown, counted from there.
      count: Counts the tokens of a text.
      max_tokens: Most tokens of all lines; what is beyond is left out. 0: any.
      window_s: Lines farther than this from all frames are left out. 0: none are.
    """
    origin, stop = clip[0] or 0.0, clip[1]
    own = [
        (max(0.0, start - origin), end - origin, text)
        for start, end, text in subtitles
        if form != "none" and end > origin and (stop is None or start < stop)
    ]
    near = own
    if window_s:
        near = [line for line in own if _is_near(line, frame_times_s, window_s)]
    texts = [f"{start:.1f} - {end:.1f} {text}\n" for start, end, text in near]
    texts = [f"\n{text}" for text in texts] if form == "frames" else texts
    head = "subtitle\n" if form == "after" else ""
    kept = len(texts)
    if max_tokens:
        kept, room = 0, max_tokens - count(head)
        for text in texts:
            room -= count(text)
            if room < 0:
                break
            kept += 1
    if form == "after":
        texts = [head, *texts[:kept]] if kept else []
        times = [(AFTER_MS, AFTER_MS)] * len(texts)
    else:
        texts = texts[:kept]
        times = [(round(start * 1000), round(end * 1000)) for start, end, _ in near[:kept]]
    lines = [
        SubtitleText(text=text, begin_ms=begin, end_ms=end)
        for text, (begin, end) in zip(texts, times, strict=True)
    ]
    return PlacedSubtitles(lines=lines, left_out=len(own) - kept)


def _is_near(line: Subtitle, frame_times_s: Sequence[float], window_s: float) -> bool:
    return any(line[0] - window_s <= time <= line[1] + window_s for time in frame_times_s)
