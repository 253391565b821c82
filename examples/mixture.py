"""Streams a mixture of packed datasets; the same command again resumes.

    make shards DATASET=pixmo_cap SOURCE=sample
    make shards DATASET=vqa2 SOURCE=sample
    python examples/mixture.py shards/pixmo_cap=0.7 shards/vqa2=0.3

Under torchrun any number of processes gets the same packs, also after a resume. The datasets and
their weights may be others when it resumes (`allow=("mixture",)`): those that stay continue where
they were.
"""

import argparse
import os
from collections import Counter
from itertools import chain, repeat
from pathlib import Path

import torch
import torch.distributed as dist

from loader import IterableDatasetMixture, StreamingDataset, make_dataloader


def weighted(text):
    url, weight = text.rsplit("=", 1)
    return url, float(weight)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("shards", nargs="+", type=weighted, help="URL=WEIGHT of each dataset")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/mixture.pt"))
    options = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0
    urls, weights = zip(*options.shards, strict=True)
    mixture = IterableDatasetMixture([*map(StreamingDataset, urls)], weights=weights, seed=42)
    settings = {"sequence_length": 2048, "pack": True, "metadata": True}
    loader = make_dataloader(mixture, global_batch_size=4, **settings)
    if options.checkpoint.exists():
        loader.load_state_dict(torch.load(options.checkpoint), allow=("mixture",))
    counts = Counter()
    for batch in chain.from_iterable(repeat(loader)):
        examples = [each for row in batch["metadata"] for each in row["examples"]]
        counts.update(each["dataset"] for each in examples)
        print(f"step {loader.step} rank {rank}", *(each["key"] for each in examples), flush=True)
        if dist.is_initialized():
            dist.barrier()  # as the gradients of a model would wait for each other here
        if rank == 0 and loader.step % 2 == 0:
            options.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            torch.save(loader.state_dict(), unfinished := f"{options.checkpoint}.part")
            os.replace(unfinished, options.checkpoint)
        if loader.step >= options.steps:
            break
    for name, count in sorted(counts.items()):
        print(f"{name}: {count / counts.total():.0%} of the samples of rank {rank}")
    if dist.is_initialized():
        dist.destroy_process_group()
