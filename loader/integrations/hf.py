"""Hugging Face Trainer and TRL's SFTTrainer: a loader's batches, its state in their checkpoints.

    trainer = Trainer(model=model, args=args)
    hf.attach_to_trainer(trainer, loader)

A Trainer puts a data loader of its own around a dataset, divides it between ranks and skips through
it on resume. So the loader replaces that data loader; `dataset` and `collate` fill the arguments
that a trainer insists on.
"""

from __future__ import annotations

import inspect
from typing import Any, NoReturn

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
    forward = getattr(getattr(model, "module", model), "forward", None)
    view = _view(loader)
    if forward is None or view is None or view.model is not None:
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
      ConfigError: `trainer_model`, the Trainer's model would not see the pictures of the batches;
        `trainer_gpus`, `torch.nn.DataParallel` would cut the pictures of a batch by rows.
    """
    check_model(trainer.model, loader)
    args, view = trainer.args, _view(loader)
    if view is not None and view.model is not None:
        if args.n_gpu > 1:
            raise ConfigError("trainer_gpus", gpus=args.n_gpu)
        checkpointing = args.gradient_checkpointing_kwargs or {}
        if args.ddp_find_unused_parameters is None and not checkpointing.get("use_reentrant"):
            # A batch of text alone leaves a vision tower without gradients: its rank would wait for
            # the others for ever. Reentrant checkpointing does not work with it.
            args.ddp_find_unused_parameters = True
            if trainer.accelerator.ddp_handler is not None:  # made of the settings already
                trainer.accelerator.ddp_handler.find_unused_parameters = True
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
    args.ignore_data_skip = True
    trainer.get_train_dataloader = lambda: batches
    trainer.add_callback(LoaderState())


def dataset() -> Any:
    """Gives a `datasets.Dataset` for trainers that want one, as TRL's: its row is not trained on.

    Use it with `collate` and, for TRL, `dataset_kwargs={"skip_prepare_dataset": True}`.
    """
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": [[]]})


def collate(rows: Any) -> NoReturn:  # noqa: ARG001
    """Stands in as a trainer's `data_collator`, which a loader does not need.

    Raises:
      ConfigError: `trainer_unattached`, always: the trainer reads `dataset()`, not the loader.
    """
    raise ConfigError("trainer_unattached")


def _view(loader: StreamLoader | DevicePrefetcher) -> View | None:
    source: Any = loader.loader if isinstance(loader, DevicePrefetcher) else loader
    view = getattr(source.dataset, "view", None)
    return view if isinstance(view, View) else None
