"""A dataset of your own: a class that lists rows and says what example each of them is.

    python -m preprocess shards examples/own_dataset.py:Clocks --out shards/clocks
    python examples/own_dataset.py shards/clocks
    python examples/train.py shards/clocks

The first command makes shards, the second prints what is in a batch of them.
"""

import argparse
import math

import numpy as np
from PIL import Image, ImageDraw

from preprocess.datasets import DatasetBase

SIZE = 224
HANDS = {"hour": (50, 10), "minute": (90, 5)}  # length and width


class Clocks(DatasetBase):
    """Drawn clocks, and what time they show."""

    def load(self):
        return [(hour, minute) for hour in range(12) for minute in range(0, 60, 5)]

    def to_example(self, row):
        hour, minute = row
        picture = Image.new("RGB", (SIZE, SIZE), "white")
        pen = ImageDraw.Draw(picture)
        pen.ellipse((6, 6, SIZE - 6, SIZE - 6), outline="black", width=4)
        for hand, turn in (("hour", (hour + minute / 60) / 12), ("minute", minute / 60)):
            length, width = HANDS[hand]
            x, y = length * math.sin(math.tau * turn), -length * math.cos(math.tau * turn)
            pen.line((SIZE / 2, SIZE / 2, SIZE / 2 + x, SIZE / 2 + y), fill="black", width=width)
        return {
            "image": np.asarray(picture),
            "messages": [
                {"role": "user", "content": "What time is it?"},
                {"role": "assistant", "content": f"{hour or 12}:{minute:02}"},
            ],
        }


if __name__ == "__main__":
    from loader import StreamingDataset, make_dataloader  # of training, not of the class

    parser = argparse.ArgumentParser()
    parser.add_argument("shards")
    dataset = StreamingDataset(parser.parse_args().shards, seed=42)
    print(f"{dataset.num_samples} samples")
    loader = make_dataloader(dataset, global_batch_size=4, sequence_length=512)
    for name, tensor in next(iter(loader)).items():
        print(f"{name:16} {str(tensor.dtype):12} {list(tensor.shape)}")
