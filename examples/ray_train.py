"""Trains with Ray Train; the same command again resumes, on any number of workers.

python examples/ray_train.py shards/pixmo_cap --workers 2
"""

import argparse
import tempfile
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("shards")
for name, value in dict(workers=1, steps=8, out="runs/ray").items():
    parser.add_argument(f"--{name}", type=type(value), default=value)
options = parser.parse_args()

import torch
from model import VisionLanguageModel
from ray import train
from ray.train.torch import TorchConfig, TorchTrainer, prepare_model

from loader import StreamingDataset, make_dataloader


def loop(config: dict) -> None:
    dataset = StreamingDataset(config["shards"], seed=0)  # finds its rank by torch.distributed
    loader = make_dataloader(dataset, global_batch_size=4, sequence_length=512, with_metadata=True)
    torch.manual_seed(0)
    size = dataset.manifest.tokenizer.embedding_size
    model = VisionLanguageModel(dataset.view.image, vocab_size=size, sequence_length=512)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    parts = {"model": model, "optimizer": optimizer, "loader": loader}
    if checkpoint := train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            saved = torch.load(Path(folder) / "run.pt", weights_only=True)
        for name, state in saved.items():
            parts[name].load_state_dict(state)
    replica, rank = prepare_model(model), train.get_context().get_world_rank()
    while loader.step < config["steps"]:
        for batch in loader:
            keys = " ".join(row["key"] for row in batch.pop("metadata"))
            (replica(**batch) / (batch["labels"] != -100).sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {loader.step} rank {rank} {keys}", flush=True)
            saves = rank == 0 and loader.step % 2 == 0
            with tempfile.TemporaryDirectory() as folder:
                if saves:
                    states = {name: part.state_dict() for name, part in parts.items()}
                    torch.save(states, Path(folder) / "run.pt")
                train.report({}, checkpoint=train.Checkpoint(folder) if saves else None)
            if loader.step == config["steps"]:
                break


if __name__ == "__main__":
    config = {"shards": str(Path(options.shards).resolve()), "steps": options.steps}
    run = train.RunConfig(name="run", storage_path=str(Path(options.out).resolve()))
    size = train.ScalingConfig(num_workers=options.workers)
    settings = {"run_config": run, "torch_config": TorchConfig(backend="gloo")}
    TorchTrainer(loop, train_loop_config=config, scaling_config=size, **settings).fit()
