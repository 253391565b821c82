"""Trains on a mesh: FSDP over data-parallel groups, whose other ranks share each batch.

    torchrun --standalone --nproc_per_node=4 examples/parallel.py shards/pixmo_cap --shared 2

With `--shared 2` pairs of ranks get the same rows, as tensor, context or pipeline parallelism needs
it. Checkpoints are PyTorch's distributed ones; a run resumes on any mesh whose number of groups
divides the batch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from model import VisionLanguageModel
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from loader import StreamingDataset, make_dataloader
from loader.integrations import DistributedState

parser = argparse.ArgumentParser()
parser.add_argument("shards")
parser.add_argument("--shared", type=int, default=1, help="ranks that share each batch")
parser.add_argument("--steps", type=int, default=8)
parser.add_argument("--checkpoint", type=Path, default=Path("checkpoint"))
options = parser.parse_args()

kind = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group("nccl" if kind == "cuda" else "gloo")
shape = (dist.get_world_size() // options.shared, options.shared)
mesh = init_device_mesh(kind, shape, mesh_dim_names=("data", "shared"))
data = mesh["data"]

# The one line that differs: the rank among data-parallel groups, not among all processes.
rank, world_size = data.get_local_rank(), data.size()
dataset = StreamingDataset(options.shards, seed=0, rank=rank, world_size=world_size)
loader = make_dataloader(dataset, global_batch_size=4, sequence_length=512, with_metadata=True)

torch.manual_seed(0)
vocab_size = dataset.manifest.tokenizer.embedding_size
model = VisionLanguageModel(dataset.view.image, vocab_size=vocab_size, sequence_length=512)
fully_shard(model.to(kind), mesh=data)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

model_state, optimizer_state = get_state_dict(model, optimizer)
saved = {"model": model_state, "optimizer": optimizer_state, "loader": DistributedState(loader)}
if options.checkpoint.exists():
    dcp.load(saved, checkpoint_id=options.checkpoint)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)

while loader.step < options.steps:
    for batch in loader:
        keys = [row["key"] for row in batch.pop("metadata")]
        batch = {name: tensor.to(kind) for name, tensor in batch.items()}
        num_targets = (batch["labels"] != -100).sum()
        dist.all_reduce(num_targets, group=data.get_group())
        loss = model(**batch) / num_targets * world_size  # FSDP divides gradients by the groups
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(
            f"step {loader.step} group {rank} loss {loss.item():.4f} {' '.join(keys)}", flush=True
        )
        if loader.step == options.steps:
            break

saved["model"], saved["optimizer"] = get_state_dict(model, optimizer)
dcp.save(saved, checkpoint_id=options.checkpoint)
dist.destroy_process_group()
