"""Hugging Face Trainer: training with a loader, with its state in the Trainer's checkpoints."""

from __future__ import annotations

import inspect
from typing import Any

from loader.assembly import View
from loader.dataloader import StreamLoader
from loader.device import DevicePrefetcher
from loader.integrations.steady import SteadyPasses
from shardspec.errors import ConfigError

_STATE = "vlm_shards"
"""Name of a loader's state among the states of a Trainer's callbacks."""


def check_model(model: Any, loader: StreamLoader | DevicePrefetcher) -> None:
    """Refuses a loader of the Molmo kind for another model, which would run without pictures.

    The models of transformers ignore arguments that they do not know, and shift the labels that
    batches of the Molmo kind have shifted already.

    Args:
      model: Whose `forward` is to be called with batches.
      loader: What gives them.

    Raises:
      ConfigError: `trainer_model`.
    """
    source: Any = loader.loader if isinstance(loader, DevicePrefetcher) else loader
    view = getattr(source.dataset, "view", None)
    forward = getattr(getattr(model, "module", model), "forward", None)
    if forward is None or not isinstance(view, View) or view.model is not None:
        return
    names = inspect.signature(forward).parameters
    if "pixel_values" in names and "images" not in names:
        raise ConfigError("trainer_model", model=type(model).__name__)


def attach_to_trainer(trainer: Any, loader: StreamLoader | DevicePrefetcher) -> None:
    """Lets a Hugging Face Trainer train with a loader, save its state and resume it.

    The loader's batches are this rank's and are used as they are: the Trainer neither divides nor
    skips any. Its checkpoints contain the loader's state in `trainer_state.json`.

    Args:
      trainer: A `transformers.Trainer`; its `train_dataset` is not used. Set
        `per_device_train_batch_size` to the rows of a rank, which is what it reports.
      loader: Made by `make_dataloader`, or a `DevicePrefetcher` over such.

    Raises:
      ConfigError: `trainer_model`, the Trainer's model would not see the pictures of the batches.
    """
    check_model(trainer.model, loader)
    from transformers import TrainerCallback

    batches = SteadyPasses(loader)

    class LoaderState(TrainerCallback):
        """Keeps the loader's state in the Trainer's, and takes it from there."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            saved = state.stateful_callbacks.get(_STATE)
            if saved is not None:
                batches.load_state_dict(saved)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            state.stateful_callbacks[_STATE] = batches.state_dict()

    # What a resumed Trainer would skip is what the state says was seen.
    trainer.args.ignore_data_skip = True
    trainer.get_train_dataloader = lambda: batches
    trainer.add_callback(LoaderState())
