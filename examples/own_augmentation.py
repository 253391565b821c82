"""An augmentation of your own that moves pictures, and the coordinates of their texts along.

    make shards DATASET=pixmo_points SOURCE=sample TOKENIZER=Qwen/Qwen2-7B MOVABLE=1
    python examples/own_augmentation.py shards/pixmo_points

Prints the answers of each sample as they are stored, and as two epochs of training see them.
"""

import argparse

import numpy as np

from loader import StreamingDataset, View, make_dataloader
from preprocess.text import load_tokenizer


class Shift:
    """Moves pictures by up to a share of their size; what becomes empty is grey."""

    def __init__(self, share):
        self.share = share  # the values of a function are part of checkpoints

    def offset(self, rng, width, height):
        return np.rint(rng.uniform(-self.share, self.share, 2) * (width, height)).astype(int)

    def __call__(self, image, rng):
        height, width = image.shape[:2]
        x, y = self.offset(rng, width, height)
        moved = np.full_like(image, 128)
        kept = image[max(-y, 0) : height - max(y, 0), max(-x, 0) : width - max(x, 0)]
        moved[max(y, 0) : height + min(y, 0), max(x, 0) : width + min(x, 0)] = kept
        return moved

    def points(self, points_N2, rng, *, width, height):
        # The generator has the seed of the picture's: the same draws give the same offset. Where
        # a point would leave the picture, both are called again, with another seed.
        return points_N2 + self.offset(rng, width, height)


def answers(url, augment, *, epochs):
    view = View(image=StreamingDataset(url).view.image, augment=augment)
    dataset = StreamingDataset(url, seed=42, view=view)
    decode = load_tokenizer(dataset.manifest.tokenizer.name).decode
    loader = make_dataloader(dataset, global_batch_size=2, sequence_length=512, metadata=True)
    found = {}
    for _ in range(epochs):
        for batch in loader:
            for row, labels in zip(batch["metadata"], batch["labels"], strict=True):
                found.setdefault(row["key"], []).append(decode(labels[labels != -100].tolist()))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("shards")
    shards = parser.parse_args().shards
    moved = answers(shards, Shift(0.1), epochs=2)
    for key, (text,) in answers(shards, Shift(0), epochs=1).items():
        told = [f"epoch {epoch}: {other}" for epoch, other in enumerate(moved[key])]
        print(key, f"stored: {text}", *told, sep="\n  ")
