"""Trains a model of transformers in a loop of one's own, with PyTorch's distributed checkpoints.

As recipes of torchtune and torchtitan do. The same command again resumes:

    make shards DATASET=pixmo_cap SOURCE=sample MODEL=Qwen/Qwen2-VL-2B-Instruct OUT=shards/captions
    python examples/plain_loop.py shards/captions Qwen/Qwen2-VL-2B-Instruct --steps 8 --pack
"""

import argparse
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers import AutoConfig, AutoModelForImageTextToText

from loader import DevicePrefetcher, StreamingDataset, make_dataloader
from loader.integrations import DistributedState, check_model

parser = argparse.ArgumentParser()
parser.add_argument("shards")
parser.add_argument("model", help="hub id or folder; the MODEL= of the shards")
parser.add_argument("--random", action="store_true", help="train from random weights")
parser.add_argument("--pack", action="store_true", help="several samples in a row")
parser.add_argument("--steps", type=int, default=8)
parser.add_argument("--out", default="runs/plain")
options = parser.parse_args()

torch.manual_seed(0)
kind = AutoModelForImageTextToText
config = AutoConfig.from_pretrained(options.model)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model = kind.from_config(config) if options.random else kind.from_pretrained(options.model)
model = model.to(device).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
dataset = StreamingDataset(options.shards, seed=0)
rows = {"global_batch_size": 1, "pack": True} if options.pack else {"global_batch_size": 4}
batches = DevicePrefetcher(make_dataloader(dataset, sequence_length=2048, **rows), device)
check_model(model, batches)  # refuses shards whose pictures the model would not see
step, saved = 0, sorted(Path(options.out).glob("step-*/.metadata"))  # which is written last
if saved:
    weights, state = get_state_dict(model, optimizer)
    whole = {"model": weights, "optimizer": state, "loader": DistributedState(batches)}
    dcp.load(whole, checkpoint_id=saved[-1].parent)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    step = int(saved[-1].parent.name.removeprefix("step-"))
while step < options.steps:
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        print(f"step {step} loss {float(loss):.6f}", flush=True)
        if step % 4 == 0 or step == options.steps:
            weights, state = get_state_dict(model, optimizer)
            whole = {"model": weights, "optimizer": state, "loader": DistributedState(batches)}
            dcp.save(whole, checkpoint_id=Path(options.out) / f"step-{step:06}")
        if step == options.steps:
            break
