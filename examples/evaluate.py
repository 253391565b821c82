"""Evaluates a model on a dataset: each question once, on any number of processes.

    make shards DATASET=vqa2 SOURCE=sample
    python examples/evaluate.py shards/vqa2
    torchrun --standalone --nproc_per_node=3 examples/evaluate.py shards/vqa2

All runs print the same scores, to the last digit. The model here is random: it shows where yours
goes. With a second argument the predictions are written there as JSON lines, for
`python -m loader score`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from loader import StreamingDataset, View, make_dataloader
from loader.evaluation import gather_results, results_of, score_results, write_table
from preprocess.text.tokens import load_tokenizer


def main(url: str, out: str = "") -> None:
    """Evaluates the split "train", and prints a line per metric."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    view = View(image=StreamingDataset(url).view.image, purpose="evaluation")
    dataset = StreamingDataset(url, view=view, tail="pad", shuffle=False)
    loader = make_dataloader(
        dataset, global_batch_size=6, sequence_length=2048, pad_side="left", metadata=True
    )
    model = RandomModel(dataset.manifest.tokenizer.embedding_size)
    decode = load_tokenizer().decode
    results = []
    for batch in loader:
        results += results_of(batch, model.generate(batch, decode))
    table = gather_results(results, dataset=dataset)
    if not dist.is_initialized() or dist.get_rank() == 0:
        for score in score_results(table):
            print(f"{score.metric}  {score.score:.4f}  of {score.num_questions:,} questions")
        if out:
            write_table(out, table)
    if dist.is_initialized():
        dist.destroy_process_group()


class RandomModel(torch.nn.Module):
    """A random matrix from a bag of tokens and the brightness of the pictures to the next token."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = torch.nn.Embedding(vocab_size, 32, dtype=torch.float64)
        self.head = torch.nn.Linear(32, vocab_size, dtype=torch.float64)

    @torch.no_grad()
    def generate(
        self, batch: dict[str, Any], decode: Callable[[list[int]], str], *, num_tokens: int = 2
    ) -> list[str]:
        """Says a few tokens to each row, the likeliest one each time."""
        seen = (self.tokens(batch["input_ids"]) * batch["attention_mask"][..., None]).sum(1)
        seen = seen + batch["images"].double().flatten(1).sum(1, keepdim=True).sin()
        said = []
        for _ in range(num_tokens):
            said.append(self.head(seen)[:, :1024].argmax(1))  # image symbols have no text
            seen = seen + self.tokens(said[-1])
        return [decode(row) for row in torch.stack(said, 1).tolist()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("shards")
    parser.add_argument("out", nargs="?", default="", help="file for the predictions")
    options = parser.parse_args()
    main(options.shards, options.out)
