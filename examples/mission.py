"""A whole pipeline in one process, without shards: dataset, preprocessor, collator, DataLoader.

    python examples/mission.py

Numbered as in docs/your-data.md. Everything is prepared when it is asked for, in the DataLoader's
workers: the slow and simple way, to begin with and to debug with. `make shards` with the same
settings does the preparing once; then `loader.StreamingDataset` gives the same examples.
"""

import argparse
import functools

import torch
from model import VisionLanguageModel
from torch import nn
from torch.utils.data import DataLoader

from loader import View
from shardspec.tiling import ImageView
from vlm_shards import DeterministicDataset, PipelineConfig, PixMoCap

# Generated rows in the dataset's schema; without this line they are those of the hub.
PixMoCap = functools.partial(PixMoCap, source="sample", limit=32)

NUM_WORKERS = 2
config = PipelineConfig(view=View(image=ImageView(size_px=112)))


class Outputs:
    """What a model of the Hugging Face kind returns."""

    def __init__(self, loss: torch.Tensor) -> None:
        self.loss = loss


class Model(nn.Module):
    """The model of the other examples, with the mean loss in its outputs."""

    def __init__(self) -> None:
        super().__init__()
        vocab_size = config.text_tokenizer.entry.embedding_size
        self.inner = VisionLanguageModel(
            config.training_view.image, vocab_size=vocab_size, sequence_length=2048
        )

    def forward(self, **batch: torch.Tensor) -> Outputs:
        return Outputs(self.inner(**batch) / (batch["labels"] != -100).sum())


def main() -> None:
    """Trains for one epoch."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    # 1. Define dataset
    dataset = PixMoCap(split="train")

    # 2. Build preprocessor
    preprocessor = config.build_preprocessor(
        for_inference=False,
        is_training=True,
    )

    # 3. Wrap with deterministic iteration
    dataset = DeterministicDataset(
        dataset=dataset,
        preprocessor=preprocessor,
        seed=42,
    )

    # 4. Build collator
    collator = config.build_collator(
        sequence_length=2048,
        pad_mode="to_128",
    )

    # 5. Create DataLoader
    dataloader = DataLoader(
        dataset,
        batch_size=8,
        collate_fn=collator,
        num_workers=NUM_WORKERS,
        pin_memory=torch.cuda.is_available(),
    )

    # 6. Training loop
    for batch in dataloader:
        outputs = model(**batch)
        loss = outputs.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"loss {loss.item():.4f}")


if __name__ == "__main__":
    argparse.ArgumentParser().parse_args()  # it has none
    main()
