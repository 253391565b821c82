"""Trains with DistributedDataParallel; the same command again resumes.

    torchrun --standalone --nproc_per_node=2 examples/ddp.py shards/pixmo_cap

A run resumes on any number of processes that divides the batch. train.py does more beside it.
"""

import argparse
from itertools import chain, repeat
from pathlib import Path

import torch
import torch.distributed as dist
from model import VisionLanguageModel
from torch.nn.parallel import DistributedDataParallel

from loader import DevicePrefetcher, StreamingDataset, make_dataloader

parser = argparse.ArgumentParser()
parser.add_argument("shards")
parser.add_argument("--steps", type=int, default=8)
parser.add_argument("--out", type=Path, default=Path("runs/ddp.pt"))
options = parser.parse_args()

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
if device.type == "cuda":
    torch.cuda.set_device(rank % torch.cuda.device_count())

dataset = StreamingDataset(options.shards, seed=0)  # finds its rank by torch.distributed
rows = {"global_batch_size": 4, "sequence_length": 512, "with_metadata": True}
loader = DevicePrefetcher(make_dataloader(dataset, **rows), device)
torch.manual_seed(0)
size = dataset.manifest.tokenizer.embedding_size
model = VisionLanguageModel(dataset.view.image, vocab_size=size, sequence_length=512).to(device)
replica = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
parts = {"model": model, "optimizer": optimizer, "loader": loader}
if options.out.exists():  # the loader's state is the same on all ranks
    for name, state in torch.load(options.out, map_location=device, weights_only=True).items():
        parts[name].load_state_dict(state)

steps = range(loader.state_dict()["step"] + 1, options.steps + 1)
for step, batch in zip(steps, chain.from_iterable(repeat(loader)), strict=False):
    keys = " ".join(row["key"] for row in batch.pop("metadata"))
    num_targets = (batch["labels"] != -100).sum()
    dist.all_reduce(num_targets)  # the mean over the targets of the global batch
    (replica(**batch) * world_size / num_targets).backward()  # DDP divides gradients by the ranks
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step} rank {rank} {keys}", flush=True)
    if step % 2 == 0 and rank == 0:
        unfinished = options.out.with_suffix(".part")
        torch.save({name: part.state_dict() for name, part in parts.items()}, unfinished)
        unfinished.replace(options.out)
dist.destroy_process_group()
