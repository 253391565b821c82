"""Windows: which steps of an episode a sample is made of, and what makes one unusable; pure.

The window of step t has

    history   k instants, t and k - 1 before it, `history_hz` of them per second, the oldest first
    chunk     n actions: those of steps t, t + 1, ... at the episode's own rate

Before the first step history repeats it, with False in `history_mask`. After the last step the
chunk is filled as `padding` says, with False in `action_mask`. Windows begin at the steps
0, stride, 2 stride, ...

A sample is one window; or a segment, `segment` windows in a row, of which each epoch draws one.
"""

# L: steps of an episode; D: dimensions; K: history; N: chunk.

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from preprocess.episodes.episode import EpisodeTable
from shardspec.errors import ConfigError, SampleError

Padding = Literal["repeat", "zero"]
"""What fills a chunk after the last step: the last action, as absolute targets want it, or zeros,
as differences want it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowPolicy:
    """How episodes are cut into samples.

    Raises:
      ConfigError: `window_policy`.
    """

    history: int = 1
    """Instants whose frames a sample shows, >= 1."""
    history_hz: float | None = None
    """Instants per second; the episode's rate must be a multiple of it. None: every step."""
    chunk: int = 8
    """Actions of a sample, >= 1."""
    stride: int = 1
    """Steps from one window to the next, >= 1."""
    segment: int = 1
    """Most windows of a sample, >= 1; of several, each epoch draws one. The segments of an episode
    differ by one window at most."""
    tolerance_s: float = 1e-4
    """Most seconds between a step and its frame, and between a step and its place on the clock of
    the episode's rate."""
    padding: Padding = "repeat"
    cameras: tuple[str, ...] = ()
    """Cameras, in the order in which a sample shows them; () for all, by name."""
    kept: tuple[str, ...] = ()
    """Names of action dimensions that are not scaled by their quantiles, such as a gripper whose
    values are from -1 to 1 already."""
    conventions: tuple[tuple[str, str], ...] = ()
    """What values mean that no file says, by name: ("gripper", "1 is open"), ("rotation", "Euler
    angles xyz, in radians"). Kept in the manifest."""
    only_success: bool = False
    """Whether episodes that say they failed are left out."""

    def __post_init__(self) -> None:
        wholes = ("history", "chunk", "stride", "segment")
        checks = {
            **{name: _is_count(getattr(self, name)) for name in wholes},
            "history_hz": self.history_hz is None or _is_positive(self.history_hz),
            "tolerance_s": _is_positive(self.tolerance_s),
            "padding": self.padding in get_args(Padding),
            "cameras": len(set(self.cameras)) == len(self.cameras) and _is_names(self.cameras),
            "kept": _is_names(self.kept),
        }
        wrong = {name: getattr(self, name) for name, good in checks.items() if not good}
        if wrong:
            raise ConfigError("window_policy.range", facts=wrong)

    def to_dict(self) -> dict[str, Any]:
        """Gives the policy in plain JSON types, for the recipe."""
        settings = {**asdict(self), "conventions": dict(self.conventions)}
        if self.segment == 1:  # manifests from before there were segments say nothing
            del settings["segment"]
        return settings

    def step(self, fps: float) -> int:
        """Counts the steps from one instant of the history to the next.

        Raises:
          ConfigError: `window_policy`: the rate is not a multiple of `history_hz`.

        >>> WindowPolicy(history=2, history_hz=5.0).step(30.0)
        6
        """
        if self.history_hz is None:
            return 1
        steps = fps / self.history_hz
        if round(steps) < 1 or abs(steps - round(steps)) > 1e-6:
            raise ConfigError("window_policy.rate", hz=self.history_hz, fps=fps)
        return round(steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The steps and the values of one sample."""

    history_rows: tuple[int, ...]
    """Steps whose frames are shown, K of them."""
    history_mask: tuple[bool, ...]
    actions_ND: np.ndarray
    """float32 [N, D]."""
    action_mask: tuple[bool, ...]
    state_D: np.ndarray | None
    """float32 [D], of the window's own step."""


def num_windows(length: int, *, stride: int) -> int:
    """Counts the windows of an episode.

    >>> [num_windows(length, stride=3) for length in (0, 1, 3, 4)]
    [0, 1, 1, 2]
    """
    return -(-length // stride)


def num_segments(length: int, policy: WindowPolicy) -> int:
    """Counts the samples of an episode.

    >>> [num_segments(length, WindowPolicy(segment=4)) for length in (0, 1, 4, 5)]
    [0, 1, 1, 2]
    """
    return -(-num_windows(length, stride=policy.stride) // policy.segment)


def segment_steps(length: int, number: int, policy: WindowPolicy) -> range:
    """Gives the steps at which the windows of a sample begin.

    >>> [[*segment_steps(9, i, WindowPolicy(segment=2, stride=2))] for i in range(3)]
    [[0], [2, 4], [6, 8]]
    """
    windows, segments = num_windows(length, stride=policy.stride), num_segments(length, policy)
    first, stop = (i * windows // segments * policy.stride for i in (number, number + 1))
    return range(first, stop, policy.stride)


def history_rows(t: int, *, history: int, step: int) -> list[int]:
    """Lists the steps of the history of step t, those before the first one included (below 0).

    >>> history_rows(3, history=3, step=2)
    [-1, 1, 3]
    """
    return [t - j * step for j in range(history - 1, -1, -1)]


def cut_window(table: EpisodeTable, t: int, *, policy: WindowPolicy, fps: float) -> Window:
    """Cuts the window of step t.

    Raises:
      SampleError: `robot_values`, a value of the window is not finite; `robot_time`, its steps are
        not at the rate.
    """
    seen = history_rows(t, history=policy.history, step=policy.step(fps))
    shown = [max(row, 0) for row in seen]
    used, mask, actions = _chunk(table, t, policy.chunk, padding=policy.padding)
    steps = np.array(sorted({*shown, *used}))
    _check_clock(table.times_L, steps, t, fps=fps, tolerance_s=policy.tolerance_s)
    state = None if table.state_LD is None else table.state_LD[t]
    for name, values in (("action", table.actions_LD[used]), ("state", state)):
        if values is not None and not np.isfinite(values).all():
            raise SampleError("robot_values.not_finite", name=name, step=t)
    return Window(
        history_rows=tuple(shown),
        history_mask=tuple(row >= 0 for row in seen),
        actions_ND=np.ascontiguousarray(actions, np.float32),
        action_mask=tuple(mask),
        state_D=state,
    )


def segment_chunk(
    table: EpisodeTable, steps: Sequence[int], *, policy: WindowPolicy
) -> tuple[np.ndarray, list[bool]]:
    """Joins the chunks of the windows of a segment: actions [M, D] and their mask [M].

    That of the window of step t begins at row t - steps[0]. Rows that no window has may be zeros.
    """
    rows = steps[-1] - steps[0] + policy.chunk
    _, mask, actions = _chunk(table, steps[0], rows, padding=policy.padding)
    # JSON has no other numbers; those of the windows themselves are finite.
    return np.where(np.isfinite(actions), actions, np.float32(0)), mask


def _chunk(
    table: EpisodeTable, t: int, number: int, *, padding: Padding
) -> tuple[list[int], list[bool], np.ndarray]:
    """Takes the actions from step t on: their steps, their mask, and the values."""
    length = len(table.times_L)
    used = [min(row, length - 1) for row in range(t, t + number)]
    mask = [row < length for row in range(t, t + number)]
    actions = table.actions_LD[used]
    if padding == "zero":
        actions = np.where(np.array(mask)[:, None], actions, np.float32(0))
    return used, mask, actions


def _check_clock(
    times_L: np.ndarray, steps: np.ndarray, t: int, *, fps: float, tolerance_s: float
) -> None:
    """Refuses a window whose steps are not where the rate puts them, seen from its own step."""
    off_s = times_L[steps] - times_L[t] - (steps - t) / fps
    worst = int(np.argmax(np.abs(off_s)))
    if not abs(off_s[worst]) <= tolerance_s:  # also for a time that is not a number
        raise SampleError(
            "robot_time.rate",
            step=int(steps[worst]),
            off_s=f"{off_s[worst]:+.6f}",
            fps=fps,
            tolerance_s=tolerance_s,
        )


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


def _is_names(value: object) -> bool:
    """Returns True for a tuple of names: a text alone would be one of letters."""
    return isinstance(value, tuple | list) and all(isinstance(each, str) for each in value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
