"""An episode as every reader gives it: steps with actions, and where the frames of cameras are."""

# L: steps of an episode; D: dimensions.

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

MAX_STEPS = 10_000_000
"""Most steps of an episode: a day at 100 Hz. A file may state any number, and each is a window."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CameraVideo:
    """The part of a video file that a camera recorded in an episode."""

    path: Path
    start_s: float
    """Instant of the file at which the episode's clock is 0."""
    end_s: float = math.inf
    """Instant of the file at which another episode begins."""


CameraFrames = CameraVideo | Sequence[bytes | np.ndarray | None]
"""The frames of a camera: in a video, or images, one per step: encoded, or uint8 [H, W, 3]; None
where one is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """An episode of a source, before its steps are read."""

    number: int
    """Its own, in the source."""
    length: int
    """Steps, as the source states them."""
    file: str
    """Where its steps are, below the source's folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeTable:
    """The steps of an episode."""

    times_L: np.ndarray
    """float64 [L], in seconds on the episode's clock."""
    actions_LD: np.ndarray
    """float32 [L, D]."""
    state_LD: np.ndarray | None
    """float32 [L, D]; None where there is none."""
    tasks: Sequence[str]
    """Of each step."""
    cameras: Mapping[str, CameraFrames]
    success: bool | None
    """None where nothing says it."""


class EpisodeSource(Protocol):
    """What a reader of a format makes of a folder or file."""

    @property
    def where(self) -> str:
        """The folder or file."""

    @property
    def kind(self) -> str:
        """Name of the format and its version."""

    @property
    def fps(self) -> float:
        """Steps per second."""

    @property
    def robot(self) -> str:
        """Name of the robot; "" where nothing says it."""

    @property
    def cameras(self) -> Sequence[str]:
        """Names, sorted."""

    @property
    def not_read(self) -> Mapping[str, str]:
        """Fields of steps that no sample has, and what each is; pictures first."""

    @property
    def action_names(self) -> Sequence[str]:
        """Of the dimensions; "" each where nothing says them."""

    @property
    def state_names(self) -> Sequence[str]:
        """Of the dimensions; () where there is no state."""

    @property
    def episodes(self) -> Sequence[Episode]:
        """By their numbers, ascending."""

    @property
    def splits(self) -> Mapping[str, Collection[int]]:
        """Of each split the numbers of its episodes; {} where all are for training."""

    def table(self, episode: Episode) -> EpisodeTable:
        """Reads the steps of an episode.

        Raises:
          SampleError: `robot_episode`, `robot_values`.
        """
        ...
