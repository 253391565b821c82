"""EpisodeDataset: windows of robots' episodes, whatever format they are in.

A sample is a window (`preprocess.episodes.windows`). Its images are the frames of all cameras at
the instants of the history, instant by instant from the oldest on; its prompt is the task, and its
response the actions of the chunk that are there, scaled by q01 and q99 of the training episodes.
Its metadata have the floats themselves, as they are in the source:

    actions, action_mask   [n, d] and [n]; rows whose mask is False are padding
    history_mask           [k]; False where the episode had not begun, and its first step is shown
    state                  [d], of the window's step, where there is one
    episode, step, time_s  the place of the window
    views                  of each image its camera
    success                whether the episode succeeded, where the source says it

With `WindowPolicy.segment` a sample is several windows in a row, and an example one of them. What
their metadata share, such as frames and actions, is stored once, and `windows` says which part of
it each has (`window_record` of the loader's assembly takes it out).

All windows of an episode are in one shard and in one split: `validation_share` is a share of the
episodes of "train", chosen by a hash of their numbers, where the source has no split "validation".
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from preprocess.datasets.images import EpisodeFrame
from preprocess.datasets.kinds import RobotDataset
from preprocess.datasets.rows import Rows
from preprocess.episodes import (
    Episode,
    EpisodeFields,
    EpisodeFrames,
    EpisodeSource,
    EpisodeTable,
    Window,
    WindowPolicy,
    cut_window,
    num_segments,
    open_hdf5,
    open_rlds,
    segment_chunk,
    segment_steps,
)
from preprocess.media import VideoDecoder, VideoPolicy
from shardspec.actions import (
    ValueStatistics,
    named_dimensions,
    normalize,
    value_statistics,
)
from shardspec.errors import ConfigError, SampleError, SourceError
from shardspec.keyed import hash_text

_NAMED = 20
"""Most fields that no sample has which the job names; the manifest names all."""

EPISODES_HELD = 4
"""Episodes whose steps and frames are held: windows are read in order, or at random in few."""


class EpisodeDataset(RobotDataset):
    """Windows of episodes; a subclass opens the source, and may set `window`."""

    window: ClassVar[WindowPolicy] = WindowPolicy()

    @abc.abstractmethod
    def open_episodes(self) -> EpisodeSource:
        """Opens `self.source`, a local folder or file.

        Raises:
          SourceError: It cannot be read.
        """

    def sample_episodes(self) -> EpisodeSource:
        """Opens the generated episodes of SOURCE=sample.

        Raises:
          ConfigError: `no_sample_rows`: there are none.
        """
        raise ConfigError("no_sample_rows", dataset=self.name)

    @property
    def divided(self) -> bool:
        """False: `load` gives the windows of the split's own episodes."""
        return False

    @classmethod
    def describe(cls) -> dict[str, Any]:
        """Gives the policy of windows, for the recipe."""
        return {"window": cls.window.to_dict(), "validation_share": cls.validation_share}

    @classmethod
    def code_files(cls) -> list[Path]:
        """Adds what reads episodes to the files of the class."""
        root = Path(__file__).parents[2]
        readers = (root / "preprocess" / "episodes").glob("*.py")
        return sorted({*super().code_files(), *readers})

    def notes(self) -> list[str]:
        """Says which fields of steps no sample has, and which actions texts cannot write."""
        robot = self.rows.kind.get("robot", {})
        fields = dict(robot.get("not_read", {}))
        lines = [f"not read: {name}, {told}" for name, told in [*fields.items()][:_NAMED]]
        if len(fields) > _NAMED:
            lines.append(f"not read: {len(fields) - _NAMED} more fields, which the manifest names")
        for i in robot.get("kept", ()):
            low, high = (robot["statistics"]["actions"][n][i] for n in ("minimum", "maximum"))
            if low < -1 or high > 1:
                name = robot["action_names"][i]
                lines.append(f"kept: {name} is from {low:g} to {high:g}; texts end at -1 and 1")
        return [*super().notes(), *lines]

    def load(self) -> Rows:
        """Enumerates the windows of the split's episodes, in order."""
        if self.source == "hub" or "://" in self.source:
            raise SourceError("source_missing.robot", where=self.source, dataset=self.name)
        return self._windows(self.open_episodes())

    def to_example(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Turns a window or a segment into an example; frames are decoded when they are read."""
        if not isinstance(row, _WindowRow):
            return super().to_example(row)
        rows, steps, policy = row.rows, row.steps, self.window
        table = rows.table
        if self.window.only_success and table.success is False:
            raise SampleError("robot_failed", where=rows.where)
        windows = [cut_window(table, t, policy=policy, fps=rows.fps) for t in steps]
        shown = windows[0].history_rows
        if policy.segment > 1:
            shown = tuple(sorted({step for window in windows for step in window.history_rows}))
        example: dict[str, Any] = {
            "image": [
                EpisodeFrame(
                    frames=rows.frames,
                    episode=rows.where,
                    camera=camera,
                    row=step,
                    segment=row.number,
                )
                for step in shown
                for camera in rows.cameras
            ],
            "message_list": [
                rows.message(t, window) for t, window in zip(steps, windows, strict=True)
            ],
            "group": f"episode {rows.episode.number}",
        }
        metadata: dict[str, Any] = {
            "episode": rows.episode.number,
            "views": list(rows.cameras) * policy.history,
        }
        if table.success is not None:
            metadata["success"] = table.success
        each = [rows.facts(t, window) for t, window in zip(steps, windows, strict=True)]
        if policy.segment == 1:
            chunk = (windows[0].actions_ND, windows[0].action_mask)
            metadata |= {**each[0], **_chunk_fields(*chunk)}
        else:
            metadata["windows"] = {
                "each": {name: [facts[name] for facts in each] for name in each[0]},
                "first": [t - steps[0] for t in steps],
                "rows": policy.chunk,
                "runs": _chunk_fields(*segment_chunk(table, steps, policy=policy)),
            }
            place = {step: i * len(rows.cameras) for i, step in enumerate(shown)}
            example["windows"] = [
                [place[s] + c for s in window.history_rows for c in range(len(rows.cameras))]
                for window in windows
            ]
        return {**example, "metadata": metadata}

    def _sample_rows(self, limit: int | None) -> Rows:
        del limit  # windows are enumerated as those of a folder are
        return self._windows(self.sample_episodes())

    def _windows(self, source: EpisodeSource) -> Rows:
        """Joins the windows of the split's episodes to rows.

        Raises:
          SourceError: `source_split`: there is no such split; `robot_source`: no episode of the
            training split can be read.
          ConfigError: `window_policy`, `value_names`.
        """
        policy = self.window
        policy.step(source.fps)
        cameras = policy.cameras or tuple(source.cameras)
        unknown = sorted({*cameras} - {*source.cameras})
        left_out = {n: "a camera that `cameras` leaves out" for n in {*source.cameras} - {*cameras}}
        not_read = {**dict(sorted(left_out.items())), **source.not_read}
        if unknown or not cameras:
            others = [f"not {name}: {told}" for name, told in source.not_read.items()]
            known = "; ".join([", ".join(source.cameras) or "none", *others[:_NAMED]])
            raise ConfigError(
                "window_policy.camera", where=source.where, name=", ".join(unknown), known=known
            )
        statistics = _statistics(source, self._episodes(source, "train"))
        kept = named_dimensions(policy.kept, source.action_names)
        decoder = VideoDecoder(VideoPolicy())
        chosen = self._episodes(source, self.split)

        @lru_cache(EPISODES_HELD)
        def opened(episode: Episode) -> _Opened:
            return _open_episode(source, episode, policy=policy, decoder=decoder)

        pieces = [
            EpisodeWindows(
                source,
                episode,
                policy=policy,
                cameras=cameras,
                statistics=statistics["actions"],
                kept=kept,
                opened=opened,
            )
            for episode in chosen
        ]
        described = {
            "fps": source.fps,
            "robot": source.robot,
            "cameras": list(cameras),
            "action_names": list(source.action_names),
            "state_names": list(source.state_names),
            "kept": list(kept),
            "conventions": dict(policy.conventions),
            "episodes": len(chosen),
            **({"not_read": not_read} if not_read else {}),
            "statistics": {name: each.to_dict() for name, each in statistics.items()},
        }
        return Rows(
            [lambda piece=piece: piece for piece in pieces],  # type: ignore[misc]
            lengths=[len(piece) for piece in pieces],
            kind={"kind": source.kind, "robot": described},
            origins=[(episode.file, 0) for episode in chosen],
        )

    def _episodes(self, source: EpisodeSource, split: str) -> list[Episode]:
        """Chooses the episodes of a split.

        Raises:
          SourceError: `source_split`.
        """
        splits = source.splits or {"train": [episode.number for episode in source.episodes]}
        _check_splits_apart(source)
        share = 0.0 if "validation" in splits else self.validation_share
        named = "train" if share and split == "validation" else split
        if named not in splits:
            raise SourceError(
                "source_split.robot", where=source.where, split=split, splits=sorted(splits)
            )
        numbers = splits[named] if isinstance(splits[named], range) else {*splits[named]}
        found = [episode for episode in source.episodes if episode.number in numbers]
        if share and named == "train":
            wanted = split == "validation"
            found = [e for e in found if (self._mark_of(e) / 2**64 < share) == wanted]
        return found

    def _mark_of(self, episode: Episode) -> int:
        return hash_text(f"{self.split_salt}\0episode {episode.number}")


class EpisodeFiles(EpisodeDataset):
    """Windows of HDF5 files (robomimic, ALOHA) or of an RLDS folder; a subclass sets `fields`."""

    fields: ClassVar[EpisodeFields | None] = None
    """What the files leave open, the rate first."""

    def open_episodes(self) -> EpisodeSource:
        """Opens the source: RLDS where there is `features.json`."""
        path, fields = Path(self.source), self.fields
        if not isinstance(fields, EpisodeFields):
            raise ConfigError("episode_fields.none", where=self.name)
        if not path.exists():
            raise SourceError("source_missing.file", where=str(path))
        return (open_rlds if (path / "features.json").is_file() else open_hdf5)(path, fields)

    @classmethod
    def describe(cls) -> dict[str, Any]:
        """Adds what the fields mean."""
        fields = cls.fields.to_dict() if isinstance(cls.fields, EpisodeFields) else None
        return {**super().describe(), "fields": fields}


@dataclass(frozen=True, slots=True)
class _WindowRow(Mapping[str, Any]):
    """A window of an episode, or a segment; a row whose columns are its place."""

    rows: EpisodeWindows
    number: int
    steps: range

    def __getitem__(self, name: str) -> Any:
        return {"episode": self.rows.episode.number, "step": self.steps[0]}[name]

    def __iter__(self) -> Any:
        return iter(("episode", "step"))

    def __len__(self) -> int:
        return 2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    """The steps of an episode and the frames of its cameras, or what it cannot be read for."""

    table: EpisodeTable | SampleError
    frames: EpisodeFrames | None = None


def _open_episode(
    source: EpisodeSource, episode: Episode, *, policy: WindowPolicy, decoder: VideoDecoder
) -> _Opened:
    """Reads the steps of an episode."""
    try:
        table = source.table(episode)
    except SampleError as error:
        return _Opened(table=error)
    where = _where(source, episode)
    frames = EpisodeFrames(table, decoder, policy=policy, fps=source.fps, where=where)
    return _Opened(table=table, frames=frames)


def _where(source: EpisodeSource, episode: Episode) -> str:
    return f"{source.where}, episode {episode.number}"


class EpisodeWindows(Sequence[Mapping[str, Any]]):
    """The samples of an episode, whose steps are read when the first one is wanted."""

    def __init__(
        self,
        source: EpisodeSource,
        episode: Episode,
        *,
        policy: WindowPolicy,
        cameras: Sequence[str],
        statistics: ValueStatistics,
        kept: Sequence[int],
        opened: Callable[[Episode], _Opened],
    ) -> None:
        """Names an episode; reads nothing. `opened` holds those that were read last."""
        self.episode, self.cameras, self.fps = episode, tuple(cameras), source.fps
        self.statistics, self.kept = statistics, tuple(kept)
        self.where = _where(source, episode)
        self._policy, self._opened = policy, opened

    def __len__(self) -> int:
        return num_segments(self.episode.length, self._policy)

    def __getitem__(self, i: Any) -> Any:
        number = range(len(self))[i]
        return _WindowRow(self, number, segment_steps(self.episode.length, number, self._policy))

    def message(self, t: int, window: Window) -> dict[str, Any]:
        """Makes the message of a window."""
        real = window.actions_ND[np.array(window.action_mask)]
        return {
            "style": "robot_action",
            "instruction": self.table.tasks[t],
            "action": normalize(real, self.statistics, kept=self.kept).tolist(),
            # Windows of a robot that waits are samples of their own.
            "episode": self.episode.number,
            "step": t,
        }

    def facts(self, t: int, window: Window) -> dict[str, Any]:
        """Lists what the metadata say of a window alone."""
        state = {} if window.state_D is None else {"state": window.state_D.tolist()}
        return {
            "step": t,
            "time_s": float(self.table.times_L[t]),
            "history_mask": list(window.history_mask),
            **state,
        }

    @property
    def table(self) -> EpisodeTable:
        """The steps.

        Raises:
          SampleError: As `EpisodeSource.table`.
        """
        table = self._opened(self.episode).table
        if isinstance(table, SampleError):
            raise table
        return table

    @property
    def frames(self) -> EpisodeFrames:
        """The frames of its cameras, where the steps can be read."""
        frames = self._opened(self.episode).frames
        assert frames is not None
        return frames


def _chunk_fields(actions_ND: np.ndarray, mask: Sequence[bool]) -> dict[str, Any]:
    return {"actions": actions_ND.tolist(), "action_mask": list(mask)}


def _check_splits_apart(source: EpisodeSource) -> None:
    """Refuses a source that tests on what it trains on; other lists may be parts of these.

    Raises:
      SourceError: `source_split`.
    """
    numbers = [episode.number for episode in source.episodes]
    named = {
        name: {n for n in numbers if n in own}
        for name, own in source.splits.items()
        if name in ("train", "validation", "test")
    }
    for one, other in itertools.combinations(named, 2):
        shared = sorted(named[one] & named[other])
        if shared:
            raise SourceError(
                "source_split.episodes",
                where=source.where,
                splits=[one, other],
                count=len(shared),
                episodes=shared[:10],
            )


def _statistics(source: EpisodeSource, episodes: Sequence[Episode]) -> dict[str, ValueStatistics]:
    """Measures the actions and states of some episodes; those that cannot be read are left out.

    Raises:
      SourceError: `robot_source`: none can be read.
    """
    parts: dict[str, list[np.ndarray]] = {"actions": [], "state": []}
    first: SampleError | None = None
    for episode in episodes:
        try:
            table = source.table(episode)
        except SampleError as error:
            first = first or error
            continue
        parts["actions"].append(table.actions_LD)
        if table.state_LD is not None:
            parts["state"].append(table.state_LD)
    if not parts["actions"]:
        raise SourceError("robot_source.empty", where=source.where, error=str(first or "none"))
    return {name: value_statistics(np.concatenate(part)) for name, part in parts.items() if part}
