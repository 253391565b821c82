"""Trains with Accelerate, which saves and restores the loader; the same command again resumes.

    accelerate launch --num_processes 2 examples/accelerate_loop.py shards/pixmo_cap

A run resumes on any number of processes that divides the batch.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from model import VisionLanguageModel

from loader import DevicePrefetcher, StreamingDataset, make_dataloader

parser = argparse.ArgumentParser()
parser.add_argument("shards")
parser.add_argument("--steps", type=int, default=8)
parser.add_argument("--save-every", type=int, default=2)
parser.add_argument("--out", type=Path, default=Path("runs/accelerate"))
options = parser.parse_args()

accelerator = Accelerator(cpu=not torch.cuda.is_available())
dataset = StreamingDataset(options.shards, seed=0)
loader = make_dataloader(dataset, global_batch_size=4, sequence_length=512, with_metadata=True)
batches = DevicePrefetcher(loader, accelerator.device)

torch.manual_seed(0)
size = dataset.manifest.tokenizer.embedding_size
model = VisionLanguageModel(dataset.view.image, vocab_size=size, sequence_length=512)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
# Only what is trained goes through prepare(): the loader has this rank's share already.
model, optimizer = accelerator.prepare(model, optimizer)
accelerator.register_for_checkpointing(batches)

saved = sorted(options.out.glob("step-*"))
if saved:
    accelerator.load_state(str(saved[-1]))

while loader.step < options.steps:
    for batch in batches:
        step = batches.state_dict()["step"]
        keys = " ".join(row["key"] for row in batch.pop("metadata"))
        loss = model(**batch) / (batch["labels"] != -100).sum()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} rank {accelerator.process_index} {keys}", flush=True)
        if step % options.save_every == 0:
            unfinished = options.out / "unfinished"
            accelerator.save_state(str(unfinished))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                unfinished.rename(options.out / f"step-{step:08d}")
            accelerator.wait_for_everyone()
        if step == options.steps:
            break
