"""RLDS folders, as Open-X has them: TFRecord files of episodes, `dataset_info.json` and
`features.json`.

A record is an episode; each field of its steps is one flat list, which the shape in
`features.json` divides. How many records a file has is stated in `dataset_info.json`: an episode
that is missing from a damaged file is refused by its number, and the others keep theirs. Episodes
are numbered through the splits in their order there.

Opening a folder reads every record once: the number of its steps is known only then.
"""

# T: steps of a record, L: those of the episode.

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from preprocess.episodes.episode import CameraFrames, Episode, EpisodeTable
from preprocess.episodes.fields import (
    Channels,
    EpisodeFields,
    Layout,
    as_rgb,
    field_text,
    make_table,
    pictures_first,
)
from preprocess.episodes.tfrecord import (
    FeatureValues,
    RecordFile,
    parse_example,
    read_record,
    read_records,
)
from shardspec.errors import SampleError, SourceError

_FILES_OPEN = 2

_STEPS = "steps/"
_OBSERVATION = "steps/observation/"
_ACTION = ("action",)
_STATE = ("observation/state",)
_TASKS = ("language_instruction", "observation/natural_language_instruction")

_FIRST = "steps/is_first"
_FLAGS = frozenset({_FIRST, "steps/is_last", "steps/is_terminal"})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Feature:
    """What `features.json` says of a field."""

    kind: Literal["tensor", "image", "text", "other"]
    shape: tuple[int, ...] = ()
    """Of one step; -1 for a side that differs."""
    told: str = ""
    """What it is, for people."""

    @property
    def is_color(self) -> bool:
        """Whether it is a picture, but not a map of depths."""
        return self.kind == "image" and (not self.shape or self.shape[-1] in (3, 4))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where an episode is, or why it cannot be read."""

    file: Path
    offset: int
    error: SampleError | None = None


def open_rlds(folder: Path, fields: EpisodeFields) -> RldsFolder:
    """Opens the folder of a version, which has `features.json`.

    Raises:
      SourceError: `robot_source`: a file of metadata is missing or means nothing.
      ConfigError: `episode_fields`.
    """
    return RldsFolder(folder, fields)


class RldsFolder:
    """A folder; an `EpisodeSource`."""

    kind = "rlds"
    robot = ""

    def __init__(self, folder: Path, fields: EpisodeFields) -> None:
        """Reads the metadata, and all records once; `open_rlds` is the door."""
        self.where, self.fps = str(folder), float(fields.fps)
        self._fields = fields
        self._features = self._read_features(folder / "features.json")
        colors = {n for n, feature in self._features.items() if feature.is_color}
        self.cameras = tuple(
            sorted(n.removeprefix(_OBSERVATION) for n in colors if n.startswith(_OBSERVATION))
        )
        known = {name.removeprefix(_STEPS) for name in self._features}
        state = fields.state or tuple(name for name in _STATE if name in known)
        actions = fields.actions or _ACTION
        self._layout = Layout(
            actions=actions,
            state=state,
            num_actions=self._num_values(actions),
            num_state=self._num_values(state),
        )
        wanted = (fields.task_field,) if fields.task_field else _TASKS
        self._task_fields = tuple(_STEPS + name for name in wanted)
        self.action_names = fields.dimension_names("action", self._layout.num_actions)
        self.state_names = fields.dimension_names("state", self._layout.num_state)
        stated = (*actions, *state, *wanted, fields.times, fields.success)
        used = {*_FLAGS, *(_OBSERVATION + name for name in self.cameras)}
        used |= {each for name in stated for each in (name, _STEPS + name)}
        others = {n: f.told for n, f in self._features.items() if n not in used}
        self.not_read = pictures_first({n.removeprefix(_STEPS): t for n, t in others.items()})
        self._open_file = lru_cache(_FILES_OPEN)(RecordFile)
        self._places: dict[int, _Place] = {}
        self.splits: dict[str, range] = {}
        self.episodes = tuple(self._read_episodes(folder))

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a folder is opened in each process")

    def table(self, episode: Episode) -> EpisodeTable:
        """Reads the steps of an episode.

        Raises:
          SampleError: `robot_episode`, `robot_values`, `robot_task`.
        """
        place = self._places[episode.number]
        where = f"{place.file}, episode {episode.number}"
        if place.error is not None:
            raise place.error
        try:
            file = self._open_file(place.file)
        except OSError as error:
            raise SampleError("robot_episode.damaged", where=where, error=error) from error
        payload = read_record(file, place.offset, where=str(place.file))
        values = parse_example(payload, where=where)
        num_steps = self._num_steps(values)

        def columns(name: str) -> np.ndarray | None:
            for full in (_STEPS + name, name):
                found = values.get(full)
                if isinstance(found, np.ndarray):
                    return self._shaped(full, found, num_steps, where)
            return None

        return make_table(
            columns,
            layout=self._layout,
            fields=self._fields,
            length=episode.length,
            tasks=self._tasks(values, episode.length),
            cameras=self._frames(values, num_steps, where),
            where=where,
        )

    def _frames(
        self, values: Mapping[str, FeatureValues], num_steps: int, where: str
    ) -> dict[str, CameraFrames]:
        found: dict[str, CameraFrames] = {}
        for name in self.cameras:
            frames = values.get(_OBSERVATION + name)
            if isinstance(frames, np.ndarray):  # a tensor, not an encoded picture
                pixels = self._shaped(_OBSERVATION + name, frames, num_steps, where)
                frames = list(pixels.astype(np.uint8))
            if frames is not None:
                told = f"{where}, camera {name}"
                found[name] = _Frames(frames, channels=self._fields.channels, where=told)
        return found

    def _tasks(self, values: Mapping[str, FeatureValues], length: int) -> list[str]:
        for name in self._task_fields:
            found = values.get(name, values.get(name.removeprefix(_STEPS)))
            if isinstance(found, list) and len(found) >= length:
                return [text.decode(errors="replace") for text in found[:length]]
            if isinstance(found, list) and len(found) == 1:  # of the episode
                return [found[0].decode(errors="replace")] * length
        return [""] * length

    def _shaped(self, name: str, values: np.ndarray, num_steps: int, where: str) -> np.ndarray:
        """Divides the flat list of a field into its steps.

        Raises:
          SampleError: `robot_values`: it cannot be divided so.
        """
        if not name.startswith(_STEPS):
            return values
        feature = self._features.get(name)
        sides = feature.shape if feature is not None else (-1,)
        try:
            return values.reshape(num_steps, *sides)
        except ValueError as error:
            raise SampleError(
                "robot_values.dimensions",
                where=where,
                name=name.removeprefix(_STEPS),
                step=0,
                got=f"{len(values)} in all",
                want=f"{num_steps} x {math.prod(sides)}",
            ) from error

    def _num_values(self, names: Sequence[str]) -> int:
        """Counts the dimensions of fields together.

        Raises:
          SourceError: `robot_source`: there is no such field, or its size is not stated.
        """
        total = 0
        for name in names:
            feature = self._features.get(_STEPS + name)
            if feature is None or feature.kind != "tensor" or min(feature.shape, default=1) < 0:
                steps = (n for n, f in self._features.items() if f.kind == "tensor")
                known = ", ".join(n.removeprefix(_STEPS) for n in steps if n.startswith(_STEPS))
                raise SourceError(
                    "robot_source.field", where=self.where, name=name, known=known or "none"
                )
            total += math.prod(feature.shape)
        return total

    def _num_steps(self, values: Mapping[str, FeatureValues]) -> int:
        """Counts the steps of a record, by the flags that every one has."""
        return len(values.get(_FIRST, ()))

    def _read_episodes(self, folder: Path) -> Iterator[Episode]:
        number = 0
        for name, shards in self._read_splits(folder / "dataset_info.json"):
            first = number
            for path, count in shards:
                for place, length in self._places_of(path, count):
                    self._places[number] = place
                    file = place.file.relative_to(folder).as_posix()
                    yield Episode(number=number, length=length, file=file)
                    number += 1
            self.splits[name] = range(first, number)

    def _places_of(self, path: Path, count: int) -> Iterator[tuple[_Place, int]]:
        """Finds the episodes of a file, `count` of them: one that cannot be read has one step.

        So it is counted, as one window that is refused.
        """
        dropped = self._fields.last_step == "drop"
        missing = SampleError("robot_episode.record", where=str(path), count=count)
        found = 0
        for record in read_records(path) if path.is_file() else ():
            if found == count:
                break
            found += 1
            place = _Place(file=path, offset=record.offset)
            try:
                if isinstance(record.payload, SampleError):
                    raise record.payload
                steps = self._num_steps(parse_example(record.payload, where=str(path)))
                if not steps:
                    raise SampleError("robot_episode.column", where=str(path), name=_FIRST)
            except SampleError as error:
                yield _Place(file=path, offset=record.offset, error=error), 1
            else:
                yield place, max(0, steps - dropped)
        for _ in range(found, count):
            yield _Place(file=path, offset=0, error=missing), 1

    def _read_splits(self, path: Path) -> Iterator[tuple[str, list[tuple[Path, int]]]]:
        """Lists the files of each split, and how many episodes each has."""
        info = self._document(path)
        try:
            form = str(info.get("fileFormat") or "tfrecord")
            if form != "tfrecord":
                raise SourceError("robot_source.format", where=str(path), form=form)
            for split in info["splits"]:
                name, lengths = str(split["name"]), [int(n) for n in split["shardLengths"]]
                default = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
                template = str(split.get("filepathTemplate") or default)
                files = []
                for i, length in enumerate(lengths):
                    parts = {
                        "DATASET": str(info["name"]),
                        "SPLIT": name,
                        "FILEFORMAT": form,
                        "SHARD_X_OF_Y": f"{i:05d}-of-{len(lengths):05d}",
                        "SHARD_INDEX": f"{i:05d}",
                        "NUM_SHARDS": f"{len(lengths):05d}",
                    }
                    files.append((path.parent / _inside(template.format(**parts)), length))
                yield {"val": "validation"}.get(name, name), files
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise self._refused(path, repr(error)) from error

    def _read_features(self, path: Path) -> dict[str, _Feature]:
        found: dict[str, _Feature] = {}

        def walk(entry: Any, prefix: str) -> None:
            if "featuresDict" in entry:
                for name, inner in entry["featuresDict"]["features"].items():
                    walk(inner, f"{prefix}/{name}" if prefix else name)
            elif "sequence" in entry and prefix == "steps":
                walk(entry["sequence"]["feature"], prefix)
            elif "image" in entry:
                shape = _shape(entry["image"])
                told = field_text(f"{entry['image'].get('dtype') or 'uint8'} image", shape)
                found[prefix] = _Feature(kind="image", shape=shape, told=told)
            elif "text" in entry:
                found[prefix] = _Feature(kind="text", told="text")
            elif "tensor" in entry:
                tensor = entry["tensor"]
                texts = str(tensor.get("dtype")) in ("string", "object")
                shape = _shape(tensor)
                pixels = tensor.get("dtype") == "uint8" and len(shape) == 3 and shape[-1] in (3, 4)
                kind: Any = "text" if texts else "image" if pixels else "tensor"
                told = field_text(str(tensor.get("dtype")), shape)
                encoding = str(tensor.get("encoding") or "none")
                if encoding != "none":
                    kind, told = "other", f"{told}, with the encoding {encoding}"
                found[prefix] = _Feature(kind=kind, shape=shape, told=told)
            elif prefix not in ("", "steps"):
                kinds = sorted(key for key in entry if key != "pythonClassName") or ["unknown"]
                told = "a sequence in each step, which is not read" if "sequence" in entry else ""
                found[prefix] = _Feature(kind="other", told=told or f"of the kind {kinds[0]}")

        try:
            walk(self._document(path), "")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._refused(path, repr(error)) from error
        except RecursionError as error:
            raise self._refused(path, "it is nested too deep") from error
        return found

    def _document(self, path: Path) -> dict[str, Any]:
        try:
            document = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise self._refused(path, str(error)) from error
        if not isinstance(document, dict):
            raise self._refused(path, "not an object")
        return document

    def _refused(self, path: Path, problem: str) -> SourceError:
        return SourceError("robot_source.file", where=str(path), error=problem)


class _Frames(Sequence[Any]):
    """The pictures of a camera in an episode; channels are turned when one is wanted."""

    def __init__(self, frames: Sequence[Any], *, channels: Channels, where: str) -> None:
        self._frames, self._channels, self._where = frames, channels, where

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, i: Any) -> Any:
        return as_rgb(self._frames[i], channels=self._channels, where=self._where)


def _shape(entry: Mapping[str, Any]) -> tuple[int, ...]:
    """Reads a shape, whose sides are written as texts."""
    return tuple(int(side) for side in (entry.get("shape") or {}).get("dimensions", ()))


def _inside(name: str) -> str:
    """Refuses a name that leads out of the folder."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        raise ValueError(f"path {name!r}")
    return name
