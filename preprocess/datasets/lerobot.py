"""LeRobot folders, v3.0 and v2.x; SOURCE=sample is a simulated arm that two cameras see.

A subclass sets what a window is:

    class Pusht(LeRobot):
        window = WindowPolicy(history=2, history_hz=5.0, chunk=16, stride=4)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from preprocess.datasets.base import SAMPLE_ROWS
from preprocess.datasets.episodes import EpisodeDataset
from preprocess.episodes import Episode, EpisodeSource, EpisodeTable, num_segments, open_lerobot
from preprocess.synthetic import (
    ARM_ACTIONS,
    ARM_CAMERAS,
    ARM_FPS,
    ARM_STATE,
    ARM_STEPS,
    ArmEpisode,
    plan_arm_episode,
    render_arm,
)
from shardspec.keyed import hash_text, keyed

_LEAST_EPISODES = 16
"""Generated episodes that statistics are measured on, at least."""


class LeRobot(EpisodeDataset):
    """Windows of a LeRobot folder."""

    name: ClassVar[str] = "lerobot"

    def open_episodes(self) -> EpisodeSource:
        """Opens the folder."""
        return open_lerobot(Path(self.source))

    def sample_episodes(self) -> EpisodeSource:
        """Simulates enough episodes for the limit."""
        wanted = SAMPLE_ROWS if self.limit is None else self.limit
        per_episode = num_segments(ARM_STEPS, self.window)
        count = max(_LEAST_EPISODES, -(-wanted // per_episode))
        seed = keyed(hash_text(self.name), hash_text("train")) % 2**31
        return SimulatedArm(seed, split=self.split, count=count)


class SimulatedArm:
    """Generated episodes; an `EpisodeSource`."""

    where = "sample"
    kind = "sample"
    fps = ARM_FPS
    robot = "simulated arm"
    cameras = ARM_CAMERAS
    not_read: Mapping[str, str] = {}
    action_names = ARM_ACTIONS
    state_names = ARM_STATE

    def __init__(self, seed: int, *, split: str, count: int) -> None:
        """Numbers the episodes of "train", and those of the split; nothing is simulated yet."""
        self._seed = seed
        first = 0 if split == "train" else (1 + hash_text(split) % 2**10) * 2**20
        self.splits = {"train": range(count), split: range(first, first + count)}
        numbers = sorted({*range(count), *range(first, first + count)})
        self.episodes = [Episode(number=i, length=ARM_STEPS, file="") for i in numbers]

    def table(self, episode: Episode) -> EpisodeTable:
        """Simulates an episode."""
        plan = plan_arm_episode(self._seed, episode.number)
        return EpisodeTable(
            times_L=np.arange(ARM_STEPS) / ARM_FPS,
            actions_LD=plan.actions_L3,
            state_LD=plan.state_L3,
            tasks=[plan.task] * ARM_STEPS,
            cameras={camera: _Drawn(plan, camera) for camera in ARM_CAMERAS},
            success=True,
        )


class _Drawn(Sequence[np.ndarray]):
    """The frames of a camera, drawn when they are read."""

    def __init__(self, plan: ArmEpisode, camera: str) -> None:
        self._plan, self._camera = plan, camera

    def __len__(self) -> int:
        return ARM_STEPS

    def __getitem__(self, i: Any) -> Any:
        return render_arm(self._plan, i, camera=self._camera)


DATASET = LeRobot
