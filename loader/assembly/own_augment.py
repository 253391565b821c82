"""OwnAugment: an augmentation of the user's, as `View(augment=function)`.

The function is called with a picture, uint8 [H, W, 3] at its stored size, and a generator of its
own; it gives a picture of the same shape and type, which is then tiled and normalised as any other.
What it may rely on, and what is checked:

- *Seeds.* Each picture's generator is seeded from its sample's: the same in every epoch, thread,
  worker and rank, and after a resume. The first call in a process is made twice, and refused if the
  results differ: the function draws from something else.
- *Its picture is a copy.* It may be written to.
- *Texts stay true.* A sample whose text would not survive a flip or a crop, such as one with
  coordinates, is left alone, unless the function says that it needs neither:
  `geometry = Geometry.COLOR` for one that moves nothing. The first one is reported.
- *Points* are moved along by its `points(points_N2, rng, width=, height=)`, if it has one, with an
  equal generator, in pixels of the picture that it is called with: those of texts, where the shards
  say where they are (`loader.assembly.moved`), and those that are kept outside of texts
  (`loader.assembly.augment.transform_points`).
- *Its name* is part of states: the qualified names and the source of the function, and the values
  that it holds; or its `fingerprint`, a text of the user's. What it calls elsewhere is not seen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from loader.user_code import function_name, naming_function
from shardspec.errors import ConfigError
from shardspec.keyed import SampleRng
from shardspec.sample import Geometry

logger = logging.getLogger(__name__)

AugmentFunction = Callable[[np.ndarray, np.random.RandomState], np.ndarray]
"""Makes a picture of a picture: uint8 [H, W, 3], of the same size."""


class OwnAugment:
    """An augmentation function, and what states and samples need to know of it."""

    def __init__(self, function: AugmentFunction) -> None:
        """Names a function.

        Raises:
          ConfigError: `augment_function`: it cannot be called; `user_function`: states cannot name
            it.
        """
        if not callable(function) or isinstance(function, type):
            raise ConfigError("augment_function.call", got=repr(function)[:80])
        geometry = getattr(function, "geometry", Geometry.ALL)
        if not isinstance(geometry, int) or not 0 <= geometry <= Geometry.ALL:
            raise ConfigError("augment_function.geometry", got=repr(geometry)[:80])
        self.function = function
        self.name = function_name(function)
        """What states say of it."""
        self.needs = Geometry(geometry)
        """What a sample must allow to be augmented."""
        self.moves_points = callable(getattr(function, "points", None))
        """Whether it says where points go."""
        self._rng = SampleRng()
        self._checked = self._points_checked = False
        self._warned: set[str] = set()

    def __repr__(self) -> str:
        return f"OwnAugment({self.name})"

    def __deepcopy__(self, memo: object) -> OwnAugment:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_checked": False, "_points_checked": False, "_warned": set()}

    def apply(self, picture: np.ndarray, seed: int, *, where: str) -> np.ndarray:
        """Augments a picture; gives a new one.

        Args:
          picture: uint8 [H, W, 3]; stays as it is.
          seed: Of its generator.
          where: The sample, for errors.

        Raises:
          ConfigError: `augment_function`: it gives something else than such a picture, or another
            one each time; `user_function`: it raises.
        """
        made = self._called(picture, seed, where)
        if not self._checked:
            # Once per process: what draws from a global generator differs already here.
            if not np.array_equal(made, self._called(picture, seed, where)):
                raise ConfigError("augment_function.random", where=where, name=self.name)
            self._checked = True
        return made

    def warn_of_left_alone(self, where: str) -> None:
        """Says, once per process, that a sample does not allow what the function needs."""
        self._warn(
            where,
            "coordinates or sides in its text, which is stored as tokens, would become wrong. If"
            " the function moves nothing in the picture, give it `geometry = Geometry.COLOR`; if it"
            " says where points go, build the shards with MOVABLE=1.",
        )

    def warn_of_points_outside(self, where: str) -> None:
        """Says, once per process, that all draws for a sample moved points out of its picture."""
        self._warn(where, "all of its draws moved points out of the picture.")

    def _warn(self, where: str, why: str) -> None:
        if why not in self._warned:
            self._warned.add(why)
            logger.warning(
                "augment=%s leaves the sample %s as it is, and others like it: %s",
                self.name,
                where,
                why,
            )

    def move(
        self, points_N2: np.ndarray, seed: int, *, width: int, height: int, where: str
    ) -> np.ndarray:
        """Moves points along, float64 [N, 2]; where nothing moves they stay.

        Raises:
          ConfigError: `augment_function`: it does not say where points go, or somewhere else each
            time; `user_function`: it raises.
        """
        points = np.array(points_N2, np.float64).reshape(-1, 2)
        if not self.moves_points:
            if self.needs & ~Geometry.COLOR:
                raise ConfigError("augment_function.points", where=where, name=self.name)
            return points
        moved = self._moved(points, seed, where, width=width, height=height)
        if not self._points_checked:
            again = self._moved(points, seed, where, width=width, height=height)
            if not np.array_equal(moved, again, equal_nan=True):
                raise ConfigError("augment_function.random", where=where, name=self.name)
            self._points_checked = True
        return moved

    def _moved(
        self, points: np.ndarray, seed: int, where: str, *, width: int, height: int
    ) -> np.ndarray:
        mover: Callable[..., Any] = self.function.points  # type: ignore[attr-defined]
        with naming_function(mover, where=where):
            moved = np.asarray(mover(points.copy(), self._rng(seed), width=width, height=height))
        if moved.shape != points.shape or moved.dtype.kind not in "fiu":
            got = f"points {moved.dtype} {list(moved.shape)}"
            want = f"points float64 {list(points.shape)}"
            raise ConfigError(
                "augment_function.output", where=where, name=self.name, got=got, want=want
            )
        return moved.astype(np.float64)

    def _called(self, picture: np.ndarray, seed: int, where: str) -> np.ndarray:
        with naming_function(self.function, where=where):
            made = self.function(np.array(picture, order="C"), self._rng(seed))
        if not isinstance(made, np.ndarray):
            got = f"a {type(made).__name__}"
        elif made.shape != picture.shape or made.dtype != np.uint8:
            got = f"{made.dtype} {list(made.shape)}"
        else:
            return made
        want = f"uint8 {list(picture.shape)}"
        raise ConfigError(
            "augment_function.output", where=where, name=self.name, got=got, want=want
        )
