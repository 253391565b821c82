"""Cursor: where a dataset's next pass begins, and how far this process is in it.

State that a torch DataLoader needs of an iterable dataset and the order does not hold: the epoch
that was chosen (in shared memory, so that persistent workers see a change), the step to begin at
after a resume, and the number of examples that this process has yielded, for loaders that save the
state of their datasets (torchdata's StatefulDataLoader saves each worker's copy).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from loader.order import Passes, epoch_of
from loader.state.fingerprint import view_differences
from loader.topology import find_worker
from shardspec.documents import DocumentError, require_plain
from shardspec.errors import ConfigError, StateError, nearest
from shardspec.manifest import differences

logger = logging.getLogger(__name__)

STATE_VERSION = 2
"""Version of the states of loaders and datasets; any other is refused."""

_MOST_STEPS = 2**62
"""Above all steps and examples of any run; sums of two are still integers of 64 bits."""

Allowed = Literal["view", "order", "appended", "mixture"]
"""What may differ from the state's run where that is asked for."""


class Cursor:
    """The position of one dataset object; that of the run is in the loader's state."""

    def __init__(self) -> None:
        # Epoch, steps of it that are skipped, and the step that was asked for (-1: none): written
        # by the process that owns the dataset, read by its workers when they begin a pass. Then the
        # passes that have ended since these were set, and whether there was a warning: written by
        # worker 0. In shared memory.
        self._position = torch.tensor([0, 0, -1, 0, 0])
        self._position.share_memory_()  # type: ignore[no-untyped-call]
        # Epoch and skipped steps of the pass that was begun last, and examples yielded of it; of
        # this process alone.
        self._pass: tuple[int, int] | None = None
        self._taken = 0
        self._resume: tuple[int, int, int] | None = None

    @property
    def epoch(self) -> int:
        """The epoch of the next pass."""
        return int(self._position[0].item())

    def set_epoch(self, epoch: int) -> None:
        """Lets the next pass begin at the start of an epoch."""
        self._position[:4] = torch.tensor([epoch, 0, -1, 0])

    def set_step(self, order: Passes, step: int) -> None:
        """Lets the next pass begin at a step of the run, and end with that step's epoch."""
        epoch = epoch_of(order, step)
        self._position[:4] = torch.tensor([epoch, step - order.epoch_start(epoch), step, 0])

    def _begin(self, order: Passes) -> tuple[int, int]:
        """Finds the epoch of the next pass and the steps of it that are skipped."""
        epoch, skipped, step = self._position[:3].tolist()
        if step >= 0:
            # The ranks, and with them the steps of an epoch, may be others than at `set_step`.
            epoch = epoch_of(order, step)
            skipped = step - order.epoch_start(epoch)
        return epoch, skipped

    def remaining(self, order: Passes) -> int:
        """Counts the steps of the next pass."""
        epoch, skipped = self._begin(order)
        return order.epoch_start(epoch + 1) - order.epoch_start(epoch) - skipped

    def examples(
        self,
        order: Passes,
        batch: Callable[[int], list[dict[str, Any]]],
        *,
        batch_size: int,
        trains: bool,
    ) -> Iterator[dict[str, Any]]:
        """Yields this worker's share of the pass: worker k of K makes every K-th batch.

        Args:
          order: Where the pass begins and ends.
          batch: Makes this rank's examples of a step.
          batch_size: Examples in one of them.
          trains: Whether a pass that gives an epoch once more is a mistake, to be warned of once.
        """
        epoch, skipped = self._begin(order)
        taken = 0
        # Here, not at the first example: loaders may make an iterator and never use it.
        if self._resume is not None:
            (epoch, skipped, taken), self._resume = self._resume, None
        elif trains:
            self._warn_of_repeat(epoch)
        self._pass, self._taken = (epoch, skipped), taken
        worker, num_workers = find_worker()
        start = order.epoch_start(epoch) + skipped + worker
        steps = range(start, order.epoch_start(epoch + 1), num_workers)
        return self._yield_examples(steps, batch, taken=taken, batch_size=batch_size)

    def _yield_examples(
        self,
        steps: range,
        batch: Callable[[int], list[dict[str, Any]]],
        *,
        taken: int,
        batch_size: int,
    ) -> Iterator[dict[str, Any]]:
        whole, part = divmod(taken, batch_size)
        for step in steps[whole:]:
            for example in batch(step)[part:]:
                # Counted before it is yielded: whoever receives it may save the state.
                self._taken += 1
                yield example
            part = 0
        if find_worker()[0] == 0:
            self._position[3] += 1

    def _warn_of_repeat(self, epoch: int) -> None:
        """Warns of a pass that begins where the one before did."""
        _, _, _, ended, warned = self._position.tolist()
        if ended and not warned and find_worker()[0] == 0:
            self._position[4] = 1
            logger.warning(
                "this pass gives epoch %d once more: call set_epoch(epoch) before each pass, or "
                "use make_dataloader, which continues with the next epoch",
                epoch,
            )

    def state_dict(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Describes this process's position in its pass, in plain JSON types.

        Args:
          own: What the position refers to: `data`, `order`, `view` and so on.
        """
        epoch, skipped = self._pass or self._position[:2].tolist()
        return {
            "version": STATE_VERSION,
            "epoch": epoch,
            "skipped_steps": skipped,
            "taken": self._taken,
            **own,
        }

    def load_state_dict(
        self, state: Mapping[str, Any], own: Mapping[str, Any], *, allow: Sequence[Allowed] = ()
    ) -> None:
        """Resumes the next pass at a saved position; after it, `set_epoch` applies again.

        Raises:
          StateError, ConfigError: As `require_state`.
        """
        require_plain_state(state)
        require_state(state, own, allow=allow)
        for name in ("epoch", "skipped_steps", "taken"):
            value = state.get(name)
            if type(value) is not int or not 0 <= value < _MOST_STEPS:
                raise StateError("state_fields", field=name, got=repr(value))
        self._resume = (state["epoch"], state["skipped_steps"], state["taken"])
        self._pass, self._taken = self._resume[:2], self._resume[2]


def require_plain_state(state: object) -> None:
    """Refuses a state that does not consist of plain values.

    Raises:
      StateError: `state_fields`.
    """
    try:
        require_plain(state)
        if not isinstance(state, Mapping):
            raise DocumentError(f"want a mapping, got {type(state).__name__}")
    except DocumentError as error:
        raise StateError("state_fields", field="state", got=error) from error


_OF_VIEWS = ("view", "pad_mode", "functions")


def require_allowed(allow: Sequence[Allowed]) -> None:
    """Refuses what is not a list of names that `allow` may have.

    Raises:
      ConfigError: `state_allow`.
    """
    listed = isinstance(allow, tuple | list | set | frozenset)
    if not listed or not all(isinstance(name, str) for name in allow):
        raise ConfigError("state_allow.type", got=repr(allow)[:80])
    for name in allow:
        if name not in get_args(Allowed):
            raise ConfigError("state_allow.name", hint=nearest(name, get_args(Allowed)), got=name)


def require_state(
    state: Mapping[str, Any],
    own: Mapping[str, Any],
    *,
    allow: Sequence[Allowed] = (),
    lengths_matter: bool = False,
) -> None:
    """Refuses a state of another version, or one that differs from this run in a field.

    Args:
      state: A saved state.
      own: The fields of this run that must agree. `view`, `pad_mode` and `functions`, if present,
        decide what examples and batches are made of the samples; the others decide which samples
        come.
      allow: With "view", these may differ. The caller handles other values.
      lengths_matter: Which samples come depends on their lengths, and these on the crops of the
        view: `image` and `high_res` must always agree.

    Raises:
      StateError: `state_version`; `state_mismatch`, other samples would come; `state_view`, the
        same samples in another view. Every differing field is named.
      ConfigError: `state_allow`.
    """
    require_allowed(allow)
    if state.get("version") != STATE_VERSION:
        raise StateError("state_version", got=state.get("version"), want=STATE_VERSION)
    required = {name: value for name, value in own.items() if name not in _OF_VIEWS}
    data_differences = differences({name: state.get(name) for name in required}, required, "state")
    view_only: list[str] = []
    for field, text in view_differences(state.get("view"), own.get("view")).items():
        crops = field.startswith(("image.", "high_res"))
        (data_differences if lengths_matter and crops else view_only).append(f"state.{text}")
    if "pad_mode" in own:
        view_only += differences(state.get("pad_mode"), own["pad_mode"], "state.pad_mode")
    functions = (state.get("functions"), own.get("functions"))
    view_only += differences(*functions, "state.functions") if any(functions) else []
    if data_differences:
        raise StateError("state_mismatch", differences="; ".join(data_differences + view_only))
    if view_only and "view" not in allow:
        raise StateError("state_view", differences="; ".join(view_only))
