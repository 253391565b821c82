"""Trains with FSDP, tensor and context parallelism; the same command again resumes, on any mesh.

    torchrun --nproc_per_node=4 examples/parallel.py shards/pixmo_cap --data 2 --context 2

Ranks of a tensor or context group get the same batch; each of a context group maps its slice.
"""

import argparse
from itertools import chain, repeat
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from model import VisionLanguageModel
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from loader import DevicePrefetcher, StreamingDataset, make_dataloader
from loader.integrations import DistributedState

parser = argparse.ArgumentParser()
parser.add_argument("shards")
for name, value in dict(data=1, context=1, tensor=1, steps=8, out="runs/mesh").items():
    parser.add_argument(f"--{name}", type=type(value), default=value)
options = parser.parse_args()
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
shape = {name: getattr(options, name) for name in ("context", "data", "tensor")}
mesh = init_device_mesh(device.type, (*shape.values(),), mesh_dim_names=(*shape,))
data = mesh["data"]  # the rank that counts is among these groups, not among all processes
dataset = StreamingDataset(options.shards, rank=data.get_local_rank(), world_size=data.size())
rows = {"global_batch_size": 4, "sequence_length": 512, "pad_mode": "to_128"}
loader = DevicePrefetcher(make_dataloader(dataset, **rows, with_metadata=True), device)
torch.manual_seed(0)
size = dataset.manifest.tokenizer.embedding_size
model = VisionLanguageModel(dataset.view.image, vocab_size=size, sequence_length=512).to(device)
plan = {"blocks.*.mlp.0": ColwiseParallel(), "blocks.*.mlp.2": RowwiseParallel()}
fully_shard(parallelize_module(model, mesh["tensor"], plan), mesh=mesh["context", "data"])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
weights, moments = get_state_dict(model, optimizer)
saved = {"model": weights, "optimizer": moments, "loader": DistributedState(loader)}
for last in sorted(Path(options.out).glob("step-*/.metadata"))[-1:]:  # which is written last
    dcp.load(saved, checkpoint_id=last.parent)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
steps = range(loader.state_dict()["step"] + 1, options.steps + 1)
for step, batch in zip(steps, chain.from_iterable(repeat(loader)), strict=False):
    keys = " ".join(row["key"] for row in batch.pop("metadata"))
    num_targets = (batch["labels"] != -100).sum()
    dist.all_reduce(num_targets, group=data.get_group())
    loss = model(**batch, context=mesh["context"].get_group()) / num_targets
    (loss * options.data * options.context).backward()  # FSDP divides gradients by its ranks
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step} rank {dist.get_rank()} {keys} loss {loss:.4f}", flush=True)
    if step % 2 == 0:
        saved["model"], saved["optimizer"] = get_state_dict(model, optimizer)
        dcp.save(saved, checkpoint_id=f"{options.out}/step-{step:06}")
dist.destroy_process_group()
