"""Trains with torchdata's StatefulDataLoader; the same command again resumes.

    python examples/stateful_loader.py shards/pixmo_cap

Its states are per rank, and need the same number of ranks and workers; `make_dataloader` does not.
"""

import argparse
from pathlib import Path

import torch
from model import VisionLanguageModel
from torchdata.stateful_dataloader import StatefulDataLoader

from loader import StreamingDataset, view_collator

BATCH = 4

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("shards")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/stateful.pt"))
    options = parser.parse_args()

    dataset = StreamingDataset(options.shards, seed=0, batch_size=BATCH)
    settings = {"sequence_length": 512, "pad_token_id": dataset.ids.pad, "with_metadata": True}
    collate = view_collator(dataset.view, **settings)
    workers = {"num_workers": options.workers, "collate_fn": collate}
    loader = StatefulDataLoader(dataset, batch_size=BATCH, **workers)
    torch.manual_seed(0)
    size = dataset.manifest.tokenizer.embedding_size
    model = VisionLanguageModel(dataset.view.image, vocab_size=size, sequence_length=512)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step, epoch, parts = 0, 0, {"model": model, "optimizer": optimizer, "loader": loader}
    if options.checkpoint.exists():
        saved = torch.load(options.checkpoint, weights_only=False)
        step, epoch = saved.pop("step"), saved.pop("epoch")
        for name, state in saved.items():
            parts[name].load_state_dict(state)

    while step < options.steps:
        dataset.set_epoch(epoch)
        for batch in loader:
            step += 1
            keys = " ".join(row["key"] for row in batch.pop("metadata"))
            (model(**batch) / (batch["labels"] != -100).sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {step} rank 0 {keys}", flush=True)
            if step % 2 == 0:
                states = {name: part.state_dict() for name, part in parts.items()}
                options.checkpoint.parent.mkdir(parents=True, exist_ok=True)
                unfinished = options.checkpoint.with_suffix(".part")
                torch.save(states | {"step": step, "epoch": epoch}, unfinished)
                unfinished.replace(options.checkpoint)
            if step == options.steps:
                break
        epoch += 1
