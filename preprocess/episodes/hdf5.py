"""HDF5 files of episodes: a file of robomimic, or files of ALOHA.

    robomimic   one file: `data/demo_3/actions`, pictures and states in `data/demo_3/obs`, splits in
                `mask`, the task perhaps in the attribute `ep_meta` of a demonstration
    ALOHA       a file per episode, `episode_3.hdf5`: `action`, `observations/qpos`, and pictures in
                `observations/images`, raw or as JPEG files that zeros follow

Nothing outside of the file is read: data that HDF5 finds through links, external storage
or virtual datasets do not exist here.
"""

# N: steps of a field.

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from preprocess.episodes.episode import MAX_STEPS, CameraFrames, Episode, EpisodeTable
from preprocess.episodes.fields import (
    Channels,
    EpisodeFields,
    Layout,
    as_rgb,
    field_text,
    make_table,
    pictures_first,
)
from shardspec.errors import SampleError, SourceError

MAX_BYTES = 1 << 29
"""Most bytes of a field of an episode, or of a picture: a day of 14 joints at 50 Hz has half."""

_MOST_FIELDS, _MOST_DEPTH = 1000, 4
"""Of an episode, whose fields that are not read are named: a file may have any number."""

_SUFFIXES = (".hdf5", ".h5")
_FILES_OPEN = 2

_LINKED = "it is a link, and links are not followed: copy what it names into the file"

Kind = Literal["robomimic", "aloha"]

_ACTIONS: Mapping[Kind, tuple[str, ...]] = {"robomimic": ("actions",), "aloha": ("action",)}
_STATES: Mapping[Kind, tuple[str, ...]] = {"robomimic": (), "aloha": ("observations/qpos",)}
_IMAGES: Mapping[Kind, str] = {"robomimic": "obs", "aloha": "observations/images"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where an episode is, or why it cannot be read."""

    file: Path
    group: str
    length: int = 1
    """Steps; one that cannot be read counts as one, so that its loss is counted."""
    sizes: tuple[int, int] = (0, 0)
    """Dimensions of the action and of the state."""
    cameras: tuple[str, ...] = ()
    not_read: tuple[tuple[str, str], ...] = ()
    """Fields that no sample has, and what each is."""
    error: SampleError | None = None


def open_hdf5(path: Path, fields: EpisodeFields) -> Hdf5Episodes:
    """Opens a file, or a folder of files with an episode each.

    Raises:
      SourceError: `robot_source`, `source_missing`.
      ConfigError: `episode_fields`.
    """
    return Hdf5Episodes(path, fields)


class Hdf5Episodes:
    """The episodes of a file or a folder; an `EpisodeSource`."""

    robot = ""

    def __init__(self, path: Path, fields: EpisodeFields) -> None:
        """Reads the shapes of all episodes; `open_hdf5` is the door."""
        self.where, self.fps = str(path), float(fields.fps)
        self._fields = fields
        self._open_file = lru_cache(_FILES_OPEN)(_opened)
        self._places: dict[int, _Place] = {}
        self.splits: dict[str, frozenset[int]] = {}
        self._layout_kind = self._read_places(path)
        self.kind = f"hdf5 {self._layout_kind}"
        good = [place for place in self._places.values() if place.error is None]
        if not good:
            first = next((p.error for p in self._places.values()), None)
            raise SourceError("robot_source.empty", where=self.where, error=first or "none")
        # An episode of other dimensions than most others is refused when it is read.
        num_actions, num_state = Counter(place.sizes for place in good).most_common(1)[0][0]
        self._layout = Layout(
            actions=fields.actions or _ACTIONS[self._layout_kind],
            state=fields.state or _STATES[self._layout_kind],
            num_actions=num_actions,
            num_state=num_state,
        )
        self.action_names = fields.dimension_names("action", num_actions)
        self.state_names = fields.dimension_names("state", num_state)
        self.cameras = tuple(sorted({name for place in good for name in place.cameras}))
        self.not_read = _not_read(good)
        folder = path if path.is_dir() else path.parent
        self.episodes = tuple(
            Episode(
                number=number,
                length=place.length,
                file=place.file.relative_to(folder).as_posix(),
            )
            for number, place in sorted(self._places.items())
        )

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("files are opened in each process")

    def table(self, episode: Episode) -> EpisodeTable:
        """Reads the steps of an episode; its pictures are read when they are wanted.

        Raises:
          SampleError: `robot_episode`, `robot_values`, `robot_task`.
        """
        place = self._places[episode.number]
        where = f"{place.file}, episode {episode.number}"
        if place.error is not None:
            raise place.error
        with _reading(where):
            file = self._open_file(place.file)
            group = file[place.group]

            def columns(name: str) -> np.ndarray | None:
                found = _own(group, name)
                if found is None:
                    return np.asarray(group.attrs[name]) if name in group.attrs else None
                _check_size(found.shape, found.dtype, f"{where}, {name}")
                return np.asarray(found[()])

            cameras: dict[str, CameraFrames] = {}
            for name in place.cameras:
                at = f"{place.group}/{_IMAGES[self._layout_kind]}/{name}"
                cameras[name] = _Frames(
                    file,
                    at,
                    channels=self._fields.channels,
                    where=f"{where}, camera {name}",
                )
            return make_table(
                columns,
                layout=self._layout,
                fields=self._fields,
                length=episode.length,
                tasks=[self._task(group)] * episode.length,
                cameras=cameras,
                where=where,
            )

    def _task(self, group: Any) -> str:
        """Finds the task of an episode, "" where it states none."""
        name = self._fields.task_field
        if name:
            found = group.attrs.get(name)
            stored = _own(group, name) if found is None else None
            found = stored[()] if stored is not None else found
            found = found.flat[0] if isinstance(found, np.ndarray) and found.size else found
            return found.decode(errors="replace") if isinstance(found, bytes) else str(found or "")
        try:
            told = json.loads(group.attrs.get("ep_meta") or "{}")
        except (ValueError, RecursionError):
            return ""
        return str(told.get("lang") or "") if isinstance(told, dict) else ""

    def _read_places(self, path: Path) -> Kind:
        """Finds the episodes, their numbers and the splits.

        Raises:
          SourceError: `robot_source`, `source_missing`.
        """
        if path.is_dir():
            files = sorted(p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES)
            for file in files:
                self._add(_number(file.stem, file), self._place(file, "/", "aloha"))
            return "aloha"
        if not path.is_file():
            raise SourceError("source_missing.file", where=str(path))
        try:
            with _reading(str(path)):
                file = self._open_file(path)
                if "data" not in file:
                    self._add(0, self._place(path, "/", "aloha"))
                    return "aloha"
                if (data := _own(file, "data")) is None:
                    raise ValueError(_LINKED)
                names = [name for name in data if name.startswith("demo")]
                for name in names:
                    number = _number(name, path)
                    self._add(number, self._place(path, f"/data/{name}", "robomimic"))
                for name in file.get("mask") or ():
                    if (members := _own(file, f"mask/{name}")) is None:
                        raise ValueError(_LINKED)
                    listed = {bytes(each).decode() for each in members[()]}
                    for demo in sorted(listed - {*names}):
                        self._add_missing(demo, path, mask=name)
                    numbers = frozenset(_number(each, path) for each in listed)
                    self.splits[{"valid": "validation"}.get(name, name)] = numbers
        except SampleError as error:
            raise self._refused(path, str(error.facts.get("error", error.what))) from error
        if self.splits and "train" not in self.splits:
            others = [self.splits.get(name, frozenset()) for name in ("validation", "test")]
            self.splits["train"] = frozenset(self._places).difference(*others)
        return "robomimic"

    def _add(self, number: int, place: _Place) -> None:
        if number in self._places:
            raise self._refused(place.file, f"two episodes of the number {number}")
        self._places[number] = place

    def _add_missing(self, name: str, path: Path, *, mask: str) -> None:
        """Adds an episode that only a list of `mask` names, so that its loss is counted."""
        number, group = _number(name, path), f"/data/{name}"
        if number in self._places and self._places[number].group != group:
            raise self._refused(path, f"two episodes of the number {number}")
        error = SampleError("robot_episode.mask", where=str(path), name=name, mask=f"mask/{mask}")
        self._places.setdefault(number, _Place(file=path, group=group, error=error))

    def _place(self, path: Path, group_name: str, kind: Kind) -> _Place:
        """Reads the shapes of an episode."""
        where = f"{path}, {group_name}"
        fields = self._fields
        try:
            with _reading(where):
                group = _own(self._open_file(path), group_name)
                if group is None:
                    raise ValueError(_LINKED)
                sizes = []
                lengths = []
                for names in (fields.actions or _ACTIONS[kind], fields.state or _STATES[kind]):
                    shapes = [_shape_of(group, name, where) for name in names]
                    sizes.append(sum(int(np.prod(shape[1:])) for shape in shapes))
                    lengths += [shape[0] for shape in shapes]
                if lengths[0] > MAX_STEPS:
                    facts = {"got": lengths[0], "most": MAX_STEPS}
                    raise SampleError("robot_episode.long", where=where, facts=facts)
                images = _own(group, _IMAGES[kind])
                cameras = [n for n in images or () if _is_camera(_own(images, n), kind)]
                used = {
                    *(fields.actions or _ACTIONS[kind]),
                    *(fields.state or _STATES[kind]),
                    *(fields.times, fields.success, fields.task_field),
                    *(f"{_IMAGES[kind]}/{name}" for name in cameras),
                }
                others = ((n, told) for n, told in _walk(group) if n not in used)
                not_read = tuple(itertools.islice(others, _MOST_FIELDS))
        except SampleError as error:
            return _Place(file=path, group=group_name, error=error)
        return _Place(
            file=path,
            group=group_name,
            length=lengths[0],
            sizes=(sizes[0], sizes[1]),
            cameras=tuple(sorted(cameras)),
            not_read=not_read,
        )

    def _refused(self, path: Path, problem: str) -> SourceError:
        return SourceError("robot_source.hdf5", where=str(path), error=problem)


class _Frames(Sequence[Any]):
    """The pictures of a camera in an episode; each is read when it is wanted."""

    def __init__(self, file: Any, name: str, *, channels: Channels, where: str) -> None:
        self._file, self._name, self._channels, self._where = file, name, channels, where

    def __len__(self) -> int:
        return int(self._file[self._name].shape[0])

    def __getitem__(self, i: Any) -> Any:
        try:
            stored = self._file[self._name]
            _check_size(stored.shape[1:], stored.dtype, self._where)
            pixels = np.asarray(stored[i])
        except (SampleError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever a damaged file makes of HDF5
            raise SampleError("robot_frame.image", where=self._where, error=error) from error
        encoded = pixels.ndim == 1  # a JPEG file, and the zeros that follow it
        image = pixels.astype(np.uint8).tobytes().rstrip(b"\0") if encoded else pixels
        return as_rgb(image, channels=self._channels, where=self._where)


def _number(name: str, path: Path) -> int:
    found = re.search(r"(\d+)$", name)
    if found is None:
        problem = f"{name!r} does not end in the number of an episode"
        raise SourceError("robot_source.hdf5", where=str(path), error=problem)
    return int(found.group())


def _own(group: Any, name: str) -> Any:
    """Finds a group or dataset whose data are in this file, None where there is none."""
    import h5py

    found = group
    for part in filter(None, name.split("/")):
        if not (isinstance(found, h5py.Group) and part in found):
            return None
        if not isinstance(found.get(part, getlink=True), h5py.HardLink):
            return None
        found = found[part]
    if isinstance(found, h5py.Dataset) and (found.is_virtual or found.external):
        return None
    return found


def _shape_of(group: Any, name: str, where: str) -> tuple[int, ...]:
    """Gives the shape of a field of steps.

    Raises:
      SampleError: `robot_episode`: there is none.
    """
    found = _own(group, name)
    shape = getattr(found, "shape", None)
    if not shape:
        raise SampleError("robot_episode.column", where=where, name=name)
    _check_size(shape, found.dtype, f"{where}, {name}")
    return tuple(map(int, shape))


def _check_size(shape: tuple[int, ...], dtype: Any, where: str) -> None:
    """Refuses what would be too much to read: a file may state any size without having data.

    Raises:
      SampleError: `robot_episode`.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes > MAX_BYTES:
        raise SampleError("robot_episode.size", where=where, num_bytes=num_bytes, most=MAX_BYTES)


def _is_camera(found: Any, kind: Kind) -> bool:
    """Returns True for pictures; those of ALOHA may be files, in rows of bytes."""
    import h5py

    if not isinstance(found, h5py.Dataset):
        return False
    shape: tuple[int, ...] = found.shape or ()
    dtype = found.dtype
    if kind == "aloha" and len(shape) < 3:
        of_bytes = h5py.check_vlen_dtype(dtype) == np.uint8
        return bool(dtype == np.uint8 if len(shape) == 2 else of_bytes)
    return bool(dtype == np.uint8 and len(shape) == 4 and shape[-1] in (3, 4))


def _walk(group: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Gives the datasets below a group, and what each is; none is read."""
    import h5py

    for name in group:
        full = f"{prefix}{name}"
        try:
            found = _own(group, name)
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a damaged file makes of HDF5
            yield full, f"cannot be read: {error}"[:200]
            continue
        if found is None:
            yield full, "data that are not in the file itself"
        elif isinstance(found, h5py.Dataset):
            yield full, field_text(str(found.dtype), (found.shape or ())[1:])
        elif depth < _MOST_DEPTH:
            yield from _walk(found, f"{full}/", depth + 1)


def _not_read(places: Sequence[_Place]) -> dict[str, str]:
    """Joins the fields that are not read, with how many episodes have them so."""
    told: dict[str, list[str]] = {}
    for (name, text), count in Counter(each for p in places for each in p.not_read).items():
        some = "" if count == len(places) else f" (in {count} of {len(places)} episodes)"
        told.setdefault(name, []).append(text + some)
    return pictures_first({name: "; ".join(texts) for name, texts in told.items()})


@contextmanager
def _reading(where: str) -> Iterator[None]:
    """Turns what a damaged file makes of HDF5 into an error that names the episode."""
    try:
        yield
    except (SampleError, SourceError, MemoryError):
        raise
    except Exception as error:
        raise SampleError("robot_episode.damaged", where=where, error=error) from error


def _opened(path: Path) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise SourceError("source_missing.robots_package", error=error) from error
    return h5py.File(path, "r", locking=False)  # a file of a read-only share has no lock
