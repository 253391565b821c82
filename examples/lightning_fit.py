"""Trains with Lightning, which saves and restores the loader; the same command again resumes.

    python examples/lightning_fit.py shards/pixmo_cap --devices 2

A run resumes on any number of devices that divides the batch.
"""

import argparse
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from model import VisionLanguageModel
from pytorch_lightning.callbacks import ModelCheckpoint

from loader import StreamingDataset, make_dataloader
from loader.integrations import SteadyPasses


class Captioner(pl.LightningModule):
    def __init__(self, dataset: StreamingDataset) -> None:
        super().__init__()
        size = dataset.manifest.tokenizer.embedding_size
        self.model = VisionLanguageModel(dataset.view.image, vocab_size=size, sequence_length=512)

    def training_step(self, batch: dict, _: int) -> torch.Tensor:
        keys = " ".join(row["key"] for row in batch.pop("metadata"))
        loss = self.model(**batch) / (batch["labels"] != -100).sum()
        print(f"step {self.global_step + 1} rank {self.global_rank} {keys}", flush=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("shards")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")

    dataset = StreamingDataset(options.shards, seed=0)
    loader = make_dataloader(dataset, global_batch_size=4, sequence_length=512, with_metadata=True)
    save = ModelCheckpoint(options.out, filename="{step}", every_n_train_steps=2, save_last=True)
    trainer = pl.Trainer(
        devices=options.devices,
        strategy="ddp" if options.devices > 1 else "auto",
        max_steps=options.steps,
        callbacks=[save],
        logger=False,
    )
    last = options.out / "last.ckpt"
    resume = last if last.exists() else None
    trainer.fit(Captioner(dataset), SteadyPasses(loader), ckpt_path=resume)
