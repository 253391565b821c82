"""Which frames of a video are used: pure functions from timestamps to numbers of frames.

A frame is shown from its presentation timestamp until that of the next one, so the frame of an
instant is the last one that is not later. `choose_frames` picks frames in one of five ways:

- `uniform`: N instants, evenly spaced, without the end.
- `uniform_last`: the same with the last frame. With `max_fps` (Molmo 2): one instant every
  1 / max_fps seconds and the end, if N frames span the video at that rate; otherwise N instants,
  evenly spaced, both ends included.
- `fps` (Molmo 2): at the largest rate of `fps_candidates` at which N frames span the video; the
  first candidate is the least, and what N frames do not reach at it is cut off.
- `random`: the video is divided into N parts of the same length, and an instant is drawn in each.
- `adaptive`: by content. A cut gets the frame on each side of it; the other frames go where most
  has changed since the frame before.

Two instants that show the same frame give it once. `min_spacing_s` drops frames that follow their
predecessor too closely, except across a cut.

`draw_frames` chooses among frames that are stored, by the sample's generator.
"""

# Shape letters: N frames of a video, K chosen ones.

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from shardspec.errors import ConfigError
from shardspec.keyed import draw_below

FrameMode = Literal["uniform", "uniform_last", "fps", "random", "adaptive"]

FPS_CANDIDATES = (0.25, 0.5, 1.0, 2.0, 4.0, 6.0, 8.0, 16.0)
"""Rates that mode "fps" chooses from (Molmo 2)."""

CUT_CHANGE = 0.1
"""Least change, as a share of the full range, that may be a cut."""

CUT_RATIO = 4.0
"""A cut changes this many times more than the frames around it do."""

_CUT_NEIGHBOURS = 4
_SLACK_S = 1e-6
"""Timestamps are multiples of 1/90,000 s or so; seconds as floats are off by less than this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameSampling:
    """How frames are chosen.

    Raises:
      ConfigError: `frame_sampling`.
    """

    mode: FrameMode = "uniform_last"
    max_frames: int = 64
    """Most frames, N, >= 1."""
    max_fps: float | None = 2.0
    """Frames per second of "uniform_last" for videos short enough; None: always N frames."""
    min_spacing_s: float = 0.0
    """Least seconds between two frames, >= 0."""
    fps_candidates: tuple[float, ...] = FPS_CANDIDATES
    """Frames per second that "fps" chooses from, ascending."""

    def __post_init__(self) -> None:
        rates = self.fps_candidates
        checks = {
            "mode": self.mode in get_args(FrameMode),
            "max_frames": isinstance(self.max_frames, int) and self.max_frames >= 1,
            "max_fps": self.max_fps is None or 0 < self.max_fps < math.inf,
            "min_spacing_s": 0 <= self.min_spacing_s < math.inf,
            "fps_candidates": bool(rates) and rates[0] > 0 and list(rates) == sorted(set(rates)),
        }
        wrong = {name: getattr(self, name) for name, good in checks.items() if not good}
        if wrong:
            raise ConfigError("frame_sampling.range", facts=wrong)


def choose_frames(
    times_N: np.ndarray,
    sampling: FrameSampling,
    *,
    end_s: float | None = None,
    rng: np.random.RandomState | None = None,
    change_N: np.ndarray | None = None,
) -> np.ndarray:
    """Chooses frames.

    Args:
      times_N: Presentation timestamps, float64 [N], in seconds, ascending, N >= 1.
      sampling: How.
      end_s: When the last frame ends; None: when it begins.
      rng: For mode "random".
      change_N: For mode "adaptive": how much each frame differs from the one before, 0 to 1.

    Returns:
      Numbers of frames, int64 [K], strictly ascending, 1 <= K <= max_frames.

    Raises:
      ConfigError: `frame_sampling.needs`, without what the mode needs.
    """
    begin_s = float(times_N[0])
    duration_s = max(float(times_N[-1]), begin_s if end_s is None else end_s) - begin_s
    number = sampling.max_frames
    if sampling.mode == "adaptive":
        if change_N is None:
            raise ConfigError("frame_sampling.needs", mode="adaptive", needs="change_N")
        return adaptive_frames(times_N, change_N, number, min_spacing_s=sampling.min_spacing_s)
    if sampling.mode == "uniform":
        instants = uniform_times(duration_s, number)
    elif sampling.mode == "uniform_last":
        instants = uniform_last_times(duration_s, number, max_fps=sampling.max_fps)
    elif sampling.mode == "fps":
        instants = fps_times(duration_s, number, candidates=sampling.fps_candidates)
    else:
        if rng is None:
            raise ConfigError("frame_sampling.needs", mode="random", needs="rng")
        instants = random_times(duration_s, number, rng)
    return spaced(frames_at(times_N, begin_s + instants), times_N, sampling.min_spacing_s)


def uniform_times(duration_s: float, number: int) -> np.ndarray:
    """Gives instants at equal distances, the end left out: float64 [number].

    >>> uniform_times(8.0, 4).tolist()
    [0.0, 2.0, 4.0, 6.0]
    """
    return np.arange(number) * (duration_s / number)


def uniform_last_times(duration_s: float, number: int, *, max_fps: float | None) -> np.ndarray:
    """Gives instants up to the end, which is included: float64 [number or fewer].

    >>> uniform_last_times(2.1, 4, max_fps=1.0).tolist()
    [0.0, 1.0, 2.0, 2.1]
    >>> uniform_last_times(9.0, 4, max_fps=1.0).tolist()
    [0.0, 3.0, 6.0, 9.0]
    """
    if number == 1:
        return np.zeros(1)
    if max_fps is not None and (number - 1) / max_fps >= duration_s:
        whole = math.ceil(duration_s * max_fps - _SLACK_S)
        return np.append(np.arange(whole) / max_fps, duration_s)
    return np.linspace(0.0, duration_s, number)


def fps_times(duration_s: float, number: int, *, candidates: Sequence[float]) -> np.ndarray:
    """Gives instants at the largest of some rates that still spans the video.

    >>> fps_times(3.0, 8, candidates=(1.0, 2.0, 4.0)).tolist()
    [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    >>> fps_times(30.0, 4, candidates=(1.0, 2.0)).tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    rate = candidates[0]
    for candidate in candidates[1:]:
        if number / candidate < duration_s:
            break
        rate = candidate
    instants = np.arange(number) / rate
    reached: np.ndarray = instants[(instants < duration_s - _SLACK_S) | (instants == 0)]
    return reached


def random_times(duration_s: float, number: int, rng: np.random.RandomState) -> np.ndarray:
    """Draws an instant in each of `number` parts of the same length: float64 [number]."""
    return (np.arange(number) + rng.random_sample(number)) * (duration_s / number)


def frames_at(times_N: np.ndarray, instants: np.ndarray) -> np.ndarray:
    """Finds the frames that are shown at some instants, each once.

    Args:
      times_N: Timestamps, float64 [N], in seconds, ascending.
      instants: Float64 [K], in seconds; those before the first frame give the first.

    Returns:
      int64 [K or fewer], ascending.
    """
    found = np.searchsorted(times_N, np.asarray(instants) + _SLACK_S, side="right") - 1
    return np.unique(np.maximum(found, 0))


def spaced(frames: np.ndarray, times_N: np.ndarray, min_spacing_s: float) -> np.ndarray:
    """Drops frames that follow the last one kept by less than `min_spacing_s`."""
    if min_spacing_s <= 0:
        return frames
    kept: list[int] = []
    for frame in frames.tolist():
        if not kept or times_N[frame] - times_N[kept[-1]] >= min_spacing_s - _SLACK_S:
            kept.append(frame)
    return np.array(kept, np.int64)


def clip_frames(
    times_N: np.ndarray, *, start_s: float | None = None, end_s: float | None = None
) -> slice:
    """Finds the frames that are shown from `start_s` on until `end_s`, which is left out.

    The first is the one that is shown at `start_s`. A clip may have no frame.

    >>> clip_frames(np.arange(5.0), start_s=1.5, end_s=4.0)
    slice(1, 4, None)
    """
    first = 0
    if start_s is not None:
        first = max(0, int(np.searchsorted(times_N, start_s + _SLACK_S, side="right")) - 1)
    stop = len(times_N)
    if end_s is not None:
        stop = int(np.searchsorted(times_N, end_s - _SLACK_S, side="left"))
    return slice(first, stop)


def find_cuts(change_N: np.ndarray) -> np.ndarray:
    """Finds the first frames of new scenes: int64 [cuts], the greatest change first.

    A frame begins a scene where it differs from the one before by `CUT_CHANGE`, and by `CUT_RATIO`
    times the median of the frames around it: fast motion changes many frames in a row.
    """
    change_N = np.asarray(change_N, np.float64)
    found = []
    for i in np.flatnonzero(change_N >= CUT_CHANGE).tolist():
        if i == 0:
            continue
        around = np.concatenate(
            [
                change_N[max(1, i - _CUT_NEIGHBOURS) : i],
                change_N[i + 1 : i + 1 + _CUT_NEIGHBOURS],
            ]
        )
        if not len(around) or change_N[i] >= CUT_RATIO * np.median(around):
            found.append(i)
    order = sorted(found, key=lambda i: (-change_N[i], i))
    return np.array(order, np.int64)


def adaptive_frames(
    times_N: np.ndarray, change_N: np.ndarray, number: int, *, min_spacing_s: float = 0.0
) -> np.ndarray:
    """Chooses frames by content; see the module's docstring.

    Where there are more cuts than pairs of frames, those with the greatest change get them.

    Returns:
      int64 [K], strictly ascending, 1 <= K <= number.
    """
    num_frames = len(times_N)
    chosen: set[int] = set()
    for cut in find_cuts(change_N).tolist():
        if len(chosen | {cut - 1, cut}) <= number:
            chosen |= {cut - 1, cut}
    for end in (0, num_frames - 1):
        if len(chosen) < number and _is_apart(end, chosen, times_N, min_spacing_s):
            chosen.add(end)
    # What lies between two frames: the change from the one to the other. Frames that do not change
    # are still spread over time, by a share that is too small to matter otherwise.
    step_N = np.asarray(change_N, np.float64).copy()
    step_N[0] = 0.0
    span_s = max(float(times_N[-1] - times_N[0]), _SLACK_S)
    path_N = np.cumsum(step_N) + 1e-3 * (times_N - times_N[0]) / span_s
    gaps = sorted(chosen)
    open_gaps = {(a, b) for a, b in zip(gaps, gaps[1:], strict=False) if b - a > 1}
    while open_gaps and len(chosen) < number:
        a, b = max(open_gaps, key=lambda gap: (path_N[gap[1]] - path_N[gap[0]], -gap[0]))
        open_gaps.remove((a, b))
        # What changes at `b` itself is seen at `b`: the frames before it share what is between.
        middle = (path_N[a] + path_N[b - 1]) / 2
        frame = min(max(int(np.searchsorted(path_N, middle)), a + 1), b - 1)
        if _is_apart(frame, {a, b}, times_N, min_spacing_s):
            chosen.add(frame)
            open_gaps |= {pair for pair in ((a, frame), (frame, b)) if pair[1] - pair[0] > 1}
    return np.array(sorted(chosen), np.int64)


def _is_apart(frame: int, others: set[int], times_N: np.ndarray, min_spacing_s: float) -> bool:
    if frame in others:
        return False
    apart = [abs(float(times_N[frame] - times_N[other])) for other in others]
    return all(distance >= min_spacing_s - _SLACK_S for distance in apart)


def draw_frames(num_stored: int, number: int, rng: np.random.RandomState) -> np.ndarray:
    """Draws some of the frames that are stored, one from each of as many parts.

    The parts are of equal length up to a frame, and begin at a frame that is drawn; the last one
    reaches over the end to the beginning. So every frame is drawn equally often.

    Args:
      num_stored: Frames, >= 1.
      number: Frames to draw, >= 1; all are taken where there are no more.
      rng: Of the sample.

    Returns:
      int64 [min(number, num_stored)], strictly ascending.
    """
    if number >= num_stored:
        return np.arange(num_stored)
    first = draw_below(rng, num_stored * number)  # in units of a frame / number
    borders = (first + np.arange(number + 1) * num_stored) // number
    drawn = [
        int(start) + draw_below(rng, int(stop - start))
        for start, stop in zip(borders[:-1], borders[1:], strict=True)
    ]
    return np.sort(np.array(drawn, np.int64) % num_stored)


def even_frames(num_stored: int, number: int) -> np.ndarray:
    """Chooses stored frames at equal distances, first and last included; for evaluation.

    >>> even_frames(9, 3).tolist(), even_frames(2, 5).tolist(), even_frames(7, 1).tolist()
    ([0, 4, 8], [0, 1], [0])
    """
    if number >= num_stored:
        return np.arange(num_stored)
    if number == 1:
        return np.zeros(1, np.int64)
    i = np.arange(number, dtype=np.int64)
    # Rounded half up, in integers.
    frames: np.ndarray = (2 * i * (num_stored - 1) + number - 1) // (2 * (number - 1))
    return frames
