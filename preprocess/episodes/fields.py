"""EpisodeFields: what HDF5 files and RLDS folders leave open, stated by the user; and the table.

Neither format names a rate, a unit or a convention, and their names of fields differ from dataset
to dataset. `make_table` joins the fields of one episode to the table that windows are cut from:
both readers give it the same columns, so the same episode gives the same samples in either.
"""

# L: steps of an episode; D: dimensions.

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from preprocess.episodes.episode import CameraFrames, EpisodeTable
from shardspec.errors import ConfigError, SampleError

Channels = Literal["rgb", "bgr"]
LastStep = Literal["drop", "keep"]

_LEAST_SIDE_PX = 16
"""Smallest side of what looks like a picture and not like a matrix."""

_PNG, _PNG_DEPTH_AT, _PNG_COLOR_AT = b"\x89PNG\r\n\x1a\n", 24, 25

Columns = Callable[[str], "np.ndarray | None"]
"""Gives a field by its name: of all steps [L, ...], or of the episode; None where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeFields:
    """What the fields of a robot's files mean. Names are those of the file, "/" between parts.

    Raises:
      ConfigError: `episode_fields`.
    """

    fps: float
    """Steps per second."""
    actions: tuple[str, ...] = ()
    """Fields that make up the action, in this order; () for the layout's own."""
    state: tuple[str, ...] = ()
    """Fields that make up the state; () for the layout's own, if it has one."""
    action_names: tuple[str, ...] = ()
    """Of the dimensions of the action; () where nobody needs them."""
    state_names: tuple[str, ...] = ()
    task: str = ""
    """The task of episodes that state none."""
    task_field: str = ""
    """Field of the task; "" for the layout's own, if it has one."""
    times: str = ""
    """Field of the steps' instants in seconds; "" where steps are at the rate by definition."""
    success: str = ""
    """Field that is above 0 at some step of an episode that succeeded, such as "reward"; "": the
    files do not say it."""
    channels: Channels = "rgb"
    """Order of the colours in pictures, encoded ones too: some recorders give BGR to an encoder of
    RGB."""
    last_step: LastStep = "drop"
    """What becomes of the last step of an RLDS episode: by definition only its observation is
    valid, and it is dropped; "keep" it where the dataset has an action there."""

    def __post_init__(self) -> None:
        checks = {
            "fps": isinstance(self.fps, int | float) and 0 < self.fps < math.inf,
            "channels": self.channels in get_args(Channels),
            "last_step": self.last_step in get_args(LastStep),
        }
        for name in ("actions", "state", "action_names", "state_names"):
            value = getattr(self, name)  # a text would be taken for its letters
            checks[name] = isinstance(value, tuple) and all(isinstance(v, str) for v in value)
        wrong = {name: getattr(self, name) for name, good in checks.items() if not good}
        if wrong:
            raise ConfigError("episode_fields.value", facts=wrong)

    def to_dict(self) -> dict[str, Any]:
        """Gives them in plain JSON types, for the recipe."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    def dimension_names(self, kind: Literal["action", "state"], size: int) -> tuple[str, ...]:
        """Names the dimensions of a vector; "" each where the user does not.

        Raises:
          ConfigError: `episode_fields`: another number of names.
        """
        names: tuple[str, ...] = getattr(self, f"{kind}_names")
        if names and len(names) != size:
            raise ConfigError("episode_fields.names", name=f"{kind}_names", got=names, want=size)
        return names or ("",) * size


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where the fields of an episode are in files of a kind, and how long its vectors are."""

    actions: tuple[str, ...]
    state: tuple[str, ...]
    num_actions: int
    num_state: int


def field_text(kind: str, shape: Sequence[int]) -> str:
    """Says what a field is that is not read; what looks like pictures gets the remedy.

    Args:
      kind: Its type.
      shape: Of one step, -1 for a side that differs.

    >>> field_text("float32", (7,))
    'float32 [7]'
    """
    sides = ", ".join("?" if side < 0 else str(side) for side in shape)
    told = f"{kind} [{sides}]" if shape else kind
    if _is_picture(shape):
        told += (
            ", which looks like pictures or depth maps: those of cameras are uint8 [H, W, 3], or "
            "[H, W, 4] that are opaque, and where the layout has its cameras"
        )
    return told


def _is_picture(shape: Sequence[int]) -> bool:
    large = sum(side < 0 or side >= _LEAST_SIDE_PX for side in shape)
    return len(shape) == 3 or (len(shape) == 2 and large == 2)


def pictures_first(fields: Mapping[str, str]) -> dict[str, str]:
    """Orders fields that are not read, as `field_text` describes them."""
    return dict(sorted(fields.items(), key=lambda each: ("pictures" not in each[1], each[0])))


def make_table(
    columns: Columns,
    *,
    layout: Layout,
    fields: EpisodeFields,
    length: int,
    tasks: Sequence[str],
    cameras: Mapping[str, CameraFrames],
    where: str,
) -> EpisodeTable:
    """Joins the fields of an episode.

    Args:
      columns: Reads a field. Fields of steps may have one more than the episode, which is left:
        what is observed after the last action.
      layout: Which fields they are.
      fields: The user's statements.
      length: Steps.
      tasks: Of each step, as the episode has it; "" where it has none.
      cameras: Their frames.
      where: Named in errors.

    Raises:
      SampleError: `robot_episode`, `robot_values`, `robot_task`.
    """
    tasks = [task.strip() or fields.task for task in tasks]
    if not all(tasks):
        raise SampleError("robot_task.text", where=where)

    def vectors(names: Sequence[str], size: int, dtype: Any = np.float32) -> np.ndarray:
        parts = [_steps(columns, name, length, where) for name in names]
        with np.errstate(over="ignore"):  # it becomes infinite, and its windows are refused
            joined = np.concatenate(parts, axis=1).astype(dtype)
        if joined.shape[1] != size:
            name, got = ", ".join(names), joined.shape[1]
            raise SampleError(
                "robot_values.dimensions", where=where, name=name, step=0, got=got, want=size
            )
        return joined

    times = np.arange(length) / fields.fps
    if fields.times:
        told_L = vectors((fields.times,), 1, np.float64)[:, 0]
        times = told_L - told_L[:1]
    success = None
    if fields.success:
        told = columns(fields.success)
        if told is None:
            raise SampleError("robot_episode.column", where=where, name=fields.success)
        success = bool(np.any(np.asarray(told, np.float64) > 0))
    return EpisodeTable(
        times_L=times,
        actions_LD=vectors(layout.actions, layout.num_actions),
        state_LD=vectors(layout.state, layout.num_state) if layout.state else None,
        tasks=tasks,
        cameras=cameras,
        success=success,
    )


def _steps(columns: Columns, name: str, length: int, where: str) -> np.ndarray:
    """Reads a field of each step, [L, D].

    Raises:
      SampleError: `robot_episode`: there is none, or of other steps; `robot_values`: no numbers.
    """
    found = columns(name)
    if found is None:
        raise SampleError("robot_episode.column", where=where, name=name)
    if found.dtype.kind not in "fiub":
        raise SampleError("robot_values.kind", where=where, name=name, got=str(found.dtype))
    if found.ndim == 0 or not length <= len(found) <= length + 1:
        got = len(found) if found.ndim else 0
        raise SampleError("robot_episode.short", where=where, name=name, got=got, want=length)
    size = math.prod(found.shape[1:])
    return found[:length].reshape(length, size)


def as_rgb(image: bytes | np.ndarray, *, channels: Channels, where: str) -> bytes | np.ndarray:
    """Gives a picture whose channels are red, green and blue.

    Raises:
      SampleError: `robot_frame`: a picture that is encoded, and not whole; one that is not opaque.
    """
    if isinstance(image, bytes):
        has_alpha = image.startswith(_PNG) and image[_PNG_COLOR_AT : _PNG_COLOR_AT + 1] in b"\4\6"
        if channels == "rgb" and not has_alpha:
            return image
        try:
            with Image.open(io.BytesIO(image), formats=["JPEG", "PNG"]) as opened:
                image = np.asarray(opened.convert("RGBA" if has_alpha else "RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise SampleError("robot_frame.image", where=where, error=error) from error
    if image.shape[-1] == 4:
        if int(image[..., 3].min(initial=255)) < 255:
            raise SampleError("robot_frame.alpha", where=where)
        image = image[..., :3]
    return np.ascontiguousarray(image if channels == "rgb" else image[..., ::-1])


def is_deep(image: bytes | np.ndarray) -> bool:
    """Returns True for a PNG of 16 bits, which cameras of depth write."""
    if not isinstance(image, bytes) or not image.startswith(_PNG):
        return False
    return image[_PNG_DEPTH_AT : _PNG_DEPTH_AT + 1] == b"\x10"
