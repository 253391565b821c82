"""LeRobot folders, v3.0 and v2.x: Parquet files of steps, MP4 files of cameras, and `meta/`.

Where an episode is, v3.0 says in `meta/episodes` alone, for each camera by itself: chunk, file and
the instant at which the episode begins there. In v2.x it follows from the episode's number. Paths
come from the templates of `info.json`. Statistics of the folder are not read: its quantiles are
means of the episodes' quantiles, not those of the data.

Cameras are the features of the types "video" and "image", but for depth maps. Actions are the
feature `action`, states `observation.state`.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from preprocess.episodes.episode import (
    MAX_STEPS,
    CameraFrames,
    CameraVideo,
    Episode,
    EpisodeTable,
)
from preprocess.episodes.fields import field_text, pictures_first
from preprocess.formats import visible_names
from shardspec.errors import SampleError, SourceError

ACTION = "action"
STATE = "observation.state"
SUCCESS = "next.success"

_STEPS = ("timestamp", "frame_index", "episode_index", "task_index")
_OWN = frozenset({*_STEPS, "index", ACTION, STATE, SUCCESS})
"""Features that are read, beside cameras, or that every folder has."""

_FILES_HELD = 2
"""Tables of steps that are held: neighbours in order are in the same file."""


def open_lerobot(folder: Path) -> LeRobotFolder:
    """Opens a folder.

    Raises:
      SourceError: `robot_source`: a file of `meta/` is missing or means nothing; `source_missing`.
    """
    if not folder.is_dir():
        raise SourceError("source_missing.folder", where=str(folder))
    info = _document(folder / "meta" / "info.json")
    version = str(info.get("codebase_version", "")).removeprefix("v")
    if version.partition(".")[0] not in ("2", "3"):
        raise SourceError("robot_source.version", where=str(folder), version=version or "none")
    return LeRobotFolder(folder, info, version=version)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where an episode is."""

    file: str
    videos: Mapping[str, tuple[str, float, float]]
    """Of each camera its file, and the instants there at which the episode begins and ends; cameras
    without a place are left out."""


class LeRobotFolder:
    """A folder; an `EpisodeSource`."""

    def __init__(self, folder: Path, info: Mapping[str, Any], *, version: str) -> None:
        """Reads the metadata; `open_lerobot` is the door."""
        self.where = str(folder)
        self.kind = f"lerobot v{version}"
        self._folder, self._info = folder, info
        self._info_path = str(folder / "meta" / "info.json")
        self.robot = str(info.get("robot_type") or "")
        try:
            self.fps = float(info["fps"])
            self._features = {str(k): dict(v) for k, v in info["features"].items()}
            self._chunks_size = int(info.get("chunks_size", 1000))
            self._data_path = str(info["data_path"])
            self._video_path = str(info.get("video_path") or "")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._refused(repr(error)) from error
        if not 0 < self.fps < 1e6:
            raise self._refused(f"fps={self.fps}")
        if ACTION not in self._features:
            raise self._refused(f"no feature {ACTION!r}")
        kinds = {name: feature.get("dtype") for name, feature in self._features.items()}
        self._videos = tuple(n for n, k in kinds.items() if k == "video" and not self._is_depth(n))
        self._images = tuple(n for n, k in kinds.items() if k == "image" and not self._is_depth(n))
        self.cameras = tuple(sorted((*self._videos, *self._images)))
        others = sorted(self._features.keys() - {*self.cameras, *_OWN})
        self.not_read = pictures_first({name: self._feature_text(name) for name in others})
        self.action_names = self._names(ACTION)
        self.state_names = self._names(STATE) if STATE in self._features else ()
        self.splits = self._splits()
        self._is_v3 = version.startswith("3")
        self._load_file = lru_cache(_FILES_HELD)(self._read_file)
        self._places: dict[int, _Place] = {}
        self.episodes: tuple[Episode, ...] = tuple(self._read_episodes())

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a folder is opened in each process")

    def table(self, episode: Episode) -> EpisodeTable:
        """Reads the steps of an episode.

        Raises:
          SampleError: `robot_episode`: its file is missing, damaged or has other steps;
            `robot_values`: vectors of different lengths; `robot_task`.
        """
        place = self._places[episode.number]
        steps = self._load_file(place.file)
        where = f"{place.file}, episode {episode.number}"
        if isinstance(steps, SampleError):
            raise steps
        rows = np.flatnonzero(steps["episode_index"] == episode.number)
        rows = rows[np.argsort(steps["frame_index"][rows], kind="stable")]
        if not np.array_equal(steps["frame_index"][rows], np.arange(episode.length)):
            raise SampleError(
                "robot_episode.steps", where=where, got=len(rows), want=episode.length
            )
        cameras: dict[str, CameraFrames] = {
            name: CameraVideo(path=self._folder / file, start_s=start_s, end_s=end_s)
            for name, (file, start_s, end_s) in place.videos.items()
        }
        for name in self._images:
            if name in steps:
                cameras[name] = [_image(steps[name][row]) for row in rows]
        success = None
        told = [steps[SUCCESS][row] for row in rows] if SUCCESS in steps else []
        if told := [each for each in told if each is not None]:
            success = any(bool(np.any(each)) for each in told)
        state = None
        if self.state_names:
            state = self._vectors(steps, STATE, rows, where=where)
        return EpisodeTable(
            times_L=steps["timestamp"][rows].astype(np.float64),
            actions_LD=self._vectors(steps, ACTION, rows, where=where),
            state_LD=state,
            tasks=[self._task(number, where) for number in steps["task_index"][rows].tolist()],
            cameras=cameras,
            success=success,
        )

    @cached_property
    def _tasks(self) -> dict[int, str]:
        if self._is_v3:
            rows = self._meta_rows(self._folder / "meta" / "tasks.parquet")
            # pandas keeps the index of the table, the text, under this name or under its own.
            return {
                int(row["task_index"]): str(row.get("task", row.get("__index_level_0__", "")))
                for row in rows
            }
        rows = _lines(self._folder / "meta" / "tasks.jsonl")
        return {int(row["task_index"]): str(row["task"]) for row in rows}

    def _task(self, number: int, where: str) -> str:
        try:
            task = self._tasks.get(number, "")
        except (KeyError, TypeError, ValueError) as error:
            raise self._refused(f"tasks: {error!r}") from error
        if not task.strip():
            raise SampleError("robot_task.number", where=where, number=number)
        return task

    def _read_episodes(self) -> list[Episode]:
        found: list[Episode] = []
        meta = self._folder / "meta"
        try:
            if self._is_v3:
                folder = meta / "episodes"
                names = visible_names(str(folder)) if folder.is_dir() else ()
                files = [folder / name for name in names if name.endswith(".parquet")]
                rows = [row for file in files for row in self._meta_rows(file)]
                places = _with_ends([self._place_v3(row) for row in rows])
            else:
                rows = _lines(meta / "episodes.jsonl")
                places = [self._place_v2(int(row["episode_index"])) for row in rows]
            for row, place in zip(rows, places, strict=True):
                number, length = int(row["episode_index"]), int(row["length"])
                if number in self._places or length < 0:
                    raise ValueError(f"episode {number} twice, or of length {length}")
                self._places[number] = place
                # One that is longer than any is lost as one window, when it is read.
                length = length if length <= MAX_STEPS else 1
                found.append(Episode(number=number, length=length, file=place.file))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise self._refused(f"episodes: {error!r}") from error
        return sorted(found, key=lambda episode: episode.number)

    def _place_v3(self, row: Mapping[str, Any]) -> _Place:
        videos = {}
        for name in self._videos:
            fields = ("chunk_index", "file_index", "from_timestamp")
            chunk, file, start_s = (row.get(f"videos/{name}/{field}") for field in fields)
            if chunk is None or file is None or start_s is None:
                continue  # this camera did not record the episode
            path = self._video_path.format(video_key=name, chunk_index=chunk, file_index=file)
            end_s = row.get(f"videos/{name}/to_timestamp")
            end_s = math.inf if end_s is None else float(end_s)
            videos[name] = (self._inside(path), float(start_s), end_s)
        data = self._data_path.format(
            chunk_index=row["data/chunk_index"], file_index=row["data/file_index"]
        )
        return _Place(file=self._inside(data), videos=videos)

    def _place_v2(self, number: int) -> _Place:
        chunk = number // self._chunks_size
        facts = {
            "episode_chunk": chunk,
            "episode_index": number,
            "total_episodes": int(self._info.get("total_episodes", 0)),
        }
        videos = {
            name: (self._inside(self._video_path.format(video_key=name, **facts)), 0.0, math.inf)
            for name in self._videos
        }
        return _Place(file=self._inside(self._data_path.format(**facts)), videos=videos)

    def _inside(self, path: str) -> str:
        """Refuses a path that a template leads out of the folder."""
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts:
            raise ValueError(f"path {path!r}")
        return path

    def _splits(self) -> dict[str, range]:
        found = {}
        try:
            for name, text in dict(self._info.get("splits") or {}).items():
                first, _, stop = str(text).partition(":")
                found[str(name)] = range(int(first), int(stop))
        except ValueError as error:
            raise self._refused(f"splits: {error}") from error
        return {{"val": "validation"}.get(name, name): part for name, part in found.items()}

    def _names(self, feature: str) -> tuple[str, ...]:
        """Names the dimensions of a vector; "" where the folder does not.

        Names are a list, or a dict of lists such as {"motors": [...]}.
        """
        entry = self._features[feature]
        try:
            (size,) = (int(n) for n in entry.get("shape") or ())
        except (TypeError, ValueError) as error:
            shape = entry.get("shape")
            raise self._refused(f"feature {feature!r} of shape {shape}") from error
        names = entry.get("names")
        if isinstance(names, Mapping):
            names = [each for part in names.values() if isinstance(part, list) for each in part]
        if not isinstance(names, list) or len(names) != size:
            return ("",) * size
        return tuple(map(str, names))

    def _feature_text(self, name: str) -> str:
        """Says what a feature is that is not read."""
        entry = self._features[name]
        if self._is_depth(name):
            return f"{entry.get('dtype')} {entry.get('shape')}, pictures of depth"
        try:
            return field_text(str(entry.get("dtype")), [int(n) for n in entry.get("shape") or ()])
        except (TypeError, ValueError):
            return f"{entry.get('dtype')} {entry.get('shape')}"

    def _is_depth(self, feature: str) -> bool:
        entry = self._features[feature]
        facts = {**(entry.get("info") or {}), **(entry.get("video_info") or {})}
        return any(facts.get(key) for key in ("is_depth_map", "video.is_depth_map"))

    def _vectors(
        self, steps: Mapping[str, Any], name: str, rows: np.ndarray, *, where: str
    ) -> np.ndarray:
        """Reads vectors, float32 [L, D]."""
        if name not in steps:
            raise SampleError("robot_episode.column", where=where, name=name)
        size = len(self._names(name))
        made = np.empty((len(rows), size), np.float32)
        for i, row in enumerate(rows):
            value = steps[name][row]
            try:  # a missing value is not a number
                vector = np.atleast_1d(np.array(value, np.float64))
            except (TypeError, ValueError) as error:
                got = type(value).__name__
                raise SampleError("robot_values.kind", where=where, name=name, got=got) from error
            if vector.shape != (size,) and value is not None:
                raise SampleError(
                    "robot_values.dimensions",
                    where=where,
                    name=name,
                    step=i,
                    got=len(vector),
                    want=size,
                )
            with np.errstate(over="ignore"):  # it becomes infinite, and its windows are refused
                made[i] = vector
        return made

    def _read_file(self, file: str) -> dict[str, Any] | SampleError:
        """Reads the columns of a file of steps; what it cannot be read for is the result then."""
        wanted = {*_STEPS, ACTION, STATE, SUCCESS, *self._images}
        parquet = _parquet()
        try:
            with parquet.ParquetFile(self._folder / file) as opened:
                names = [name for name in opened.schema_arrow.names if name in wanted]
                table = opened.read(columns=names)
            columns: dict[str, Any] = {}
            for name in names:
                if name in _STEPS:
                    columns[name] = table[name].to_numpy()
                else:
                    columns[name] = table[name].to_pylist()
            missing = sorted({*_STEPS} - columns.keys())
            if missing:
                return SampleError("robot_episode.column", where=file, name=missing[0])
        except FileNotFoundError:
            return SampleError("robot_episode.missing", where=file)
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a damaged file makes of pyarrow
            return SampleError("robot_episode.damaged", where=file, error=error)
        return columns

    def _meta_rows(self, path: Path) -> list[dict[str, Any]]:
        parquet = _parquet()
        try:
            with parquet.ParquetFile(path) as opened:
                names = [n for n in opened.schema_arrow.names if not n.startswith("stats/")]
                rows: list[dict[str, Any]] = opened.read(columns=names).to_pylist()
        except MemoryError:
            raise
        except Exception as error:  # whatever a damaged file makes of pyarrow
            raise SourceError("robot_source.file", where=str(path), error=error) from error
        return rows

    def _refused(self, problem: str) -> SourceError:
        return SourceError("robot_source.file", where=self._info_path, error=problem)


def _with_ends(places: Sequence[_Place]) -> list[_Place]:
    """Ends the part of each video where another episode begins, whatever is stated.

    A camera that lacks frames would show those of the next episode.
    """
    starts = sorted({part[:2] for place in places for part in place.videos.values()})
    next_s = {(f, a): b for (f, a), (g, b) in itertools.pairwise(starts) if f == g}
    return [
        replace(
            place,
            videos={
                name: (file, start_s, min(end_s, next_s.get((file, start_s), math.inf)))
                for name, (file, start_s, end_s) in place.videos.items()
            },
        )
        for place in places
    ]


def _image(value: Any) -> bytes | None:
    found = value.get("bytes") if isinstance(value, Mapping) else value
    return bytes(found) if found else None


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SourceError("robot_source.file", where=str(path), error=error) from error
    if not isinstance(document, dict):
        raise SourceError("robot_source.file", where=str(path), error="not an object")
    return document


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows: list[Any] = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise SourceError("robot_source.file", where=str(path), error=error) from error
    if not all(isinstance(row, dict) for row in rows):
        raise SourceError("robot_source.file", where=str(path), error="not an object a line")
    return rows


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise SourceError("source_missing.pyarrow") from error
    return pyarrow.parquet
