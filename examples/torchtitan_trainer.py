"""Trains a model of transformers with torchtitan's Trainer; the same command again resumes.

torchrun --nproc_per_node=1 examples/torchtitan_trainer.py shards/captions model-folder 8 runs/titan
"""

import argparse
from dataclasses import dataclass

parser = argparse.ArgumentParser()
parser.add_argument("shards")
parser.add_argument("model", help="folder; the MODEL= of the shards")
parser.add_argument("steps", type=int)
parser.add_argument("out")
options = parser.parse_args()

import torch
from torchtitan.components import checkpoint, dataloader, loss, metrics, optimizer
from torchtitan.config import TrainingConfig
from torchtitan.config.configs import DebugConfig
from torchtitan.protocols import BaseModel
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools.logging import init_logger
from torchtitan.trainer import Trainer
from transformers import AutoConfig, AutoModelForImageTextToText

from loader import StreamingDataset, make_dataloader
from loader.integrations import DistributedState


class Loader(dataloader.BaseDataLoader):
    @dataclass(kw_only=True, slots=True)
    class Config(dataloader.BaseDataLoader.Config): ...

    def __init__(self, config, *, dp_rank, dp_world_size, seq_len, local_batch_size, **_):
        dataset = StreamingDataset(
            config.dataset_path, seed=0, rank=dp_rank, world_size=dp_world_size
        )
        size = {"global_batch_size": local_batch_size * dp_world_size, "sequence_length": seq_len}
        self.loader = make_dataloader(dataset, **size)
        state = DistributedState(self.loader)
        self.state_dict, self.load_state_dict = state.state_dict, state.load_state_dict

    def __iter__(self):
        while True:
            for batch in self.loader:  # whose labels the loss does not shift
                labels = torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
                yield {"input": batch.pop("input_ids"), **batch}, labels


class Model(BaseModel):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):
        def get_nparams_and_flops(self, model, _):
            return (count := sum(each.numel() for each in model.parameters())), 6 * count

    def __init__(self, config):
        super().__init__()
        with torch.device("cpu"):  # torchtitan's own are made on "meta", and get weights later
            config = AutoConfig.from_pretrained(options.model)
            self.model = AutoModelForImageTextToText.from_config(config)
        self.to_empty = lambda device: self.to(device)
        self.verify_module_protocol = self.init_weights = lambda **_: None

    def forward(self, tokens, **inputs):
        return self.model(input_ids=tokens, **inputs).logits


init_logger()
trainer = Trainer.Config(
    model_spec=ModelSpec(
        name="model",
        flavor="random",
        model=Model.Config(),
        parallelize_fn=lambda model, **_: model,  # where FSDP and the like would be applied
        **dict.fromkeys(("pipelining_fn", "post_optimizer_build_fn", "state_dict_adapter")),
    ),
    dataloader=Loader.Config(dataset_path=options.shards),
    loss=loss.CrossEntropyLoss.Config(),
    optimizer=optimizer.default_adamw(lr=1e-3),
    training=TrainingConfig(
        local_batch_size=4, seq_len=2048, steps=options.steps, disable_cuda_graphs=True
    ),
    lr_scheduler=optimizer.LRSchedulersContainer.Config(warmup_steps=0, decay_ratio=0),
    checkpoint=checkpoint.CheckpointManager.Config(
        enable=True, interval=3, last_save_model_only=False
    ),
    metrics=metrics.MetricsProcessor.Config(log_freq=1),
    debug=DebugConfig(seed=0),
    hf_assets_path=options.model,
    dump_folder=options.out,
).build()
trainer.train()
trainer.close()
