"""Trains a model of transformers in the loop of a torchtune recipe; the same command again resumes.

make shards DATASET=pixmo_cap SOURCE=sample MODEL=Qwen/Qwen2-VL-2B-Instruct OUT=shards/captions
python examples/torchtune_recipe.py shards/captions folder-of-the-model recipe.yaml
"""

import argparse
import contextlib
import runpy
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

parser = argparse.ArgumentParser()
parser.add_argument("shards")
parser.add_argument("model", help="folder; the MODEL= of the shards")
parser.add_argument("recipe", help="YAML file")
options = parser.parse_args()

import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForImageTextToText

from loader import StreamingDataset, make_dataloader
from loader.integrations import SteadyPasses

# torchtune installs recipes as files, to be copied: they cannot be imported.
recipes = Path(find_spec("torchtune").origin).parents[1] / "recipes"
stock = runpy.run_path(str(recipes / "full_finetune_single_device.py"))


class Recipe(stock["FullFinetuneRecipeSingleDevice"]):
    """The stock recipe, whose loop takes labels out of each batch and shifts them."""

    def load_checkpoint(self, _):
        self.path = Path(self._output_dir) / "run.pt"
        self._resume_from_checkpoint = self.path.exists()
        saved = torch.load(self.path) if self._resume_from_checkpoint else {"model": None}
        self.epochs_run = saved.get("epochs_run", 0)
        return saved

    def _setup_model(self, *, model_state_dict, **_):
        self.activations_handling_ctx = contextlib.nullcontext()
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(options.model))
        if model_state_dict is not None:  # weights of a trained model: from_pretrained(folder)
            model.load_state_dict(model_state_dict)
        model.register_forward_hook(lambda _, inputs, output: output.logits)  # noqa: ARG005
        return model.to(self._device, self._dtype)

    def _setup_data(self, *, batch_size, dataloader_state_dict=None, **_):
        dataset = StreamingDataset(options.shards, seed=0)
        loader = make_dataloader(dataset, global_batch_size=batch_size, sequence_length=2048)
        passes = SteadyPasses(loader, steps=self.max_steps_per_epoch)
        passes.sampler = SimpleNamespace(set_epoch=lambda _: None)
        if dataloader_state_dict is not None:
            passes.load_state_dict(dataloader_state_dict)
        return passes

    def save_checkpoint(self, **_):
        state = {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()}
        state |= {"epochs_run": self.epochs_run, "dataloader": self._dataloader.state_dict()}
        torch.save(state, self.path)


config = OmegaConf.load(options.recipe)
recipe = Recipe(config)
recipe.setup(config)
recipe.train()
