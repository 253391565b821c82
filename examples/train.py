"""Trains a small vision-language model on shards, on any number of processes.

    make shards DATASET=pixmo_cap SOURCE=sample
    python examples/train.py shards/pixmo_cap
    torchrun --standalone --nproc_per_node=2 examples/train.py shards/pixmo_cap

Both runs see the same batches in the same order and print the same losses: what a step trains on
depends on the seed and the step, not on the number of processes. With --checkpoint a run that was
stopped or killed continues from its last checkpoint, again with any number of processes.

The steps of `main`: open the shards, build a model that fits them, stream batches into it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from model import VisionLanguageModel
from torch import nn

from loader import StreamingDataset, StreamLoader, make_dataloader
from shardspec import ShardsError

WARMUP_STEPS = 10


def main() -> None:
    """Runs the training."""
    options = parse_options()
    rank, world_size, device = join_group()
    torch.manual_seed(options.seed)

    # The data. Each rank gets its share of every global batch; the rank is found out by itself.
    dataset = StreamingDataset(options.shards, split="train", seed=options.seed)
    loader = make_dataloader(
        dataset,
        global_batch_size=options.batch_size,
        sequence_length=options.sequence_length,
        extra_keys=("position_ids", "subsegment_ids"),  # branches do not see one another
    )

    # The model. The manifest knows how many rows the embedding needs, the view how images look.
    model = VisionLanguageModel(
        dataset.view.image,
        vocab_size=dataset.manifest.tokenizer.embedding_size,
        sequence_length=options.sequence_length,
    ).to(device)
    replica = nn.parallel.DistributedDataParallel(model) if world_size > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95))
    if options.checkpoint and options.checkpoint.exists():
        resume(options.checkpoint, model, optimizer, loader)
    if rank == 0:
        print(
            f"{dataset.num_samples:,} samples, {world_size} processes on {device.type}, "
            f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"
        )

    done_s = time.perf_counter()
    for step, batch in zip(range(loader.step, options.steps), endless(loader), strict=False):
        wait_s = time.perf_counter() - done_s
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(1.0, (step + 1) / WARMUP_STEPS)
        # The mean over the targets of the global batch: ranks have different numbers of them.
        num_targets = total((batch["labels"] != -100).sum())
        loss = replica(**batch) / num_targets
        (loss * world_size).backward()  # DistributedDataParallel divides the gradients by it
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean_loss = total(loss.detach()).item()
        now_s = time.perf_counter()
        step_s, done_s = now_s - done_s, now_s
        if rank == 0:
            print(
                f"step {step + 1:4d}  loss {mean_loss:.4f}  "
                f"{options.batch_size / step_s:6.1f} samples/s  data wait {wait_s / step_s:4.0%}",
                flush=True,
            )
            last = step + 1 == options.steps
            if options.checkpoint and (last or (step + 1) % options.save_every == 0):
                save(options.checkpoint, model, optimizer, loader)
    if world_size > 1:
        dist.destroy_process_group()


def parse_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Train a small vision-language model on shards.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("shards", help="folder made by `make shards`")
    parser.add_argument("--steps", type=int, default=60, help="steps in all, resumed ones included")
    parser.add_argument("--batch-size", type=int, default=8, help="samples per step, all ranks")
    parser.add_argument("--sequence-length", type=int, default=512, help="longest sequence, tokens")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate after the warm-up")
    parser.add_argument("--seed", type=int, default=0, help="seed of the model and of the order")
    parser.add_argument("--checkpoint", type=Path, help="file to save to, and to resume from")
    parser.add_argument("--save-every", type=int, default=100, help="steps; the last is saved, too")
    return parser.parse_args()


def join_group() -> tuple[int, int, torch.device]:
    """Joins the processes that torchrun started, if it did: (rank, world size, device)."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def endless(loader: StreamLoader) -> Iterator[dict[str, Any]]:
    """Gives batches, epoch after epoch: each `for` over the loader is one."""
    while True:
        yield from loader


def total(number: torch.Tensor) -> torch.Tensor:
    """Sums a number over the ranks."""
    if dist.is_initialized():
        dist.all_reduce(number)
    return number


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
    """Writes a checkpoint. The loader's state is a few numbers, the same on every rank."""
    parts = {"model": model, "optimizer": optimizer, "loader": loader}
    unfinished = path.with_name(path.name + ".part")
    torch.save({name: part.state_dict() for name, part in parts.items()}, unfinished)
    unfinished.replace(path)


def resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
    """Restores a checkpoint; data or settings that do not fit it are refused."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in {"model": model, "optimizer": optimizer, "loader": loader}.items():
        part.load_state_dict(state[name])


if __name__ == "__main__":
    try:
        main()
    except ShardsError as error:
        sys.exit(f"error: {error}")
