"""SteadyPasses: passes of equally many steps, for trainers that count the steps of an epoch once.

The samples continue from pass to pass as the order says; passes do not end where epochs do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loader.dataloader import StreamLoader
from loader.device import DevicePrefetcher
from shardspec.errors import ConfigError


class SteadyPasses:
    """Gives passes of equally many steps over a loader, whose epochs may differ by a step."""

    def __init__(
        self, loader: StreamLoader | DevicePrefetcher, *, steps: int | None = None
    ) -> None:
        """Wraps a loader; iterate over it from here only.

        Args:
          loader: What gives the batches.
          steps: Of a pass, >= 1; None: as many as the loader's epoch at hand.

        Raises:
          ConfigError: `pass_steps`, there would be none.
        """
        source: Any = loader.loader if isinstance(loader, DevicePrefetcher) else loader
        self.loader = loader
        self.dataset = source.dataset
        """What is streamed; trainers ask for its length."""
        self._steps = len(source) if steps is None else steps
        if self._steps < 1:
            raise ConfigError("pass_steps", steps=self._steps)
        # One iterator for as long as nothing moves the loader: what is made ahead is kept from
        # pass to pass.
        self._batches: Iterator[Any] | None = None

    def __len__(self) -> int:
        """Counts the steps of a pass."""
        return self._steps

    def __iter__(self) -> Iterator[Any]:
        """Gives the next batches of the run, as many as a pass has."""
        for _ in range(self._steps):
            yield self._next()

    def state_dict(self) -> dict[str, Any]:
        """Describes how far the run is; see `StreamLoader.state_dict`."""
        return self.loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a saved state; see `StreamLoader.load_state_dict`."""
        self._batches = None
        self.loader.load_state_dict(state)

    def _next(self) -> Any:
        for batches in (self._batches, None):
            self._batches = iter(self.loader) if batches is None else batches
            for batch in self._batches:
                return batch
        raise ConfigError("pass_steps", steps=0)
