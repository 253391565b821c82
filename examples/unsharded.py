"""The whole pipeline without shards: examples are prepared when they are asked for.

    python examples/unsharded.py

Formatting, tokenizing and resizing all happen inside the DataLoader's workers, in every epoch. That
is slow and simple, and it is the reference: shards hold what the same functions return, so a batch
from lossless shards equals, bit for bit, the one that is made here.
"""

from __future__ import annotations

import argparse

import torch
from model import VisionLanguageModel
from torch.utils.data import DataLoader

from loader import Augment, DeterministicDataset, MMCollator, MolmoPreprocessor, View
from preprocess.datasets import get_dataset
from preprocess.media.image import ImagePolicy
from preprocess.recipe import Preparer, Recipe
from preprocess.text.tokens import Tokenizer, load_tokenizer
from shardspec.tiling import ImageView

VIEW = ImageView(size_px=336)
SEQUENCE_LENGTH = 512


def main() -> None:
    """Trains for two epochs on a few generated rows."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    dataset, collator = make_dataset(tokenizer, limit=16), make_collator(tokenizer)
    model = make_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in range(2):
        dataset.set_epoch(epoch)  # other prompts, transcripts, crops and colours
        for batch in DataLoader(dataset, batch_size=4, num_workers=2, collate_fn=collator):
            loss = model(**batch) / (batch["labels"] != -100).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            print(f"epoch {epoch}  loss {loss.item():.4f}")


def make_dataset(tokenizer: Tokenizer, *, limit: int) -> DeterministicDataset:
    """Opens rows of PixMo-Cap and joins the preprocessor to them."""
    # Generated rows in the dataset's schema; source="hub" would be the real ones.
    rows = get_dataset("pixmo_cap", split="train", source="sample", limit=limit)
    # The offline half, as `make shards` runs it, and the online half, as the loader does.
    prepare = Preparer(recipe=Recipe(image=ImagePolicy(views=(VIEW,))), tokenizer=tokenizer)
    preprocessor = MolmoPreprocessor(
        prepare,
        special_ids=tokenizer.special_ids,
        view=View(image=VIEW, augment=Augment.standard(), sequence_length=SEQUENCE_LENGTH),
    )
    return DeterministicDataset(rows, preprocessor, seed=42)


def make_collator(tokenizer: Tokenizer) -> MMCollator:
    """Makes the collator that fits the view."""
    return MMCollator(
        sequence_length=SEQUENCE_LENGTH,
        pad_token_id=tokenizer.special_ids["pad"],
        image_shape=(3, VIEW.size_px, VIEW.size_px),
        num_patches=VIEW.num_patches,
    )


def make_model(tokenizer: Tokenizer) -> VisionLanguageModel:
    """Makes a model whose embedding has a row for every id, image symbols included."""
    vocab_size = tokenizer.entry.embedding_size
    return VisionLanguageModel(VIEW, vocab_size=vocab_size, sequence_length=SEQUENCE_LENGTH)


if __name__ == "__main__":
    argparse.ArgumentParser().parse_args()  # it has none
    main()
