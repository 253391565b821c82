"""Points that move along with their picture, from the rows of a dataset to batches."""

import re

import numpy as np
import torch

from loader import (
    Augment,
    DeterministicDataset,
    MolmoPreprocessor,
    StreamingDataset,
    View,
    make_dataloader,
)
from preprocess.datasets import get_dataset
from preprocess.media import ImagePolicy
from preprocess.recipe import Preparer, Recipe
from preprocess.text import TextPolicy, load_tokenizer
from shardspec.keyed import dataset_seed


class Turn:
    """Turns pictures around, or mirrors them."""

    def __call__(self, image, rng):
        down, across = rng.choice([-1, 1], 2)
        return image[::down, ::across]

    def points(self, points_N2, rng, *, width, height):
        turned = rng.choice([-1, 1], 2)[::-1] < 0
        return np.where(turned, (width, height) - points_N2, points_N2)


AUGMENTS = [Turn(), Augment(crop_scale=(0.8, 1.0), flip_probability=0.5, hue=0.1)]


def stream(folder, augment, *, purpose="train", **options):
    image = StreamingDataset(str(folder)).view.image
    view = View(image=image, augment=augment, purpose=purpose)
    return StreamingDataset(str(folder), seed=3, view=view, **options)


def test_examples_from_shards_equal_the_unsharded_ones(movable_dataset):
    plain = StreamingDataset(str(movable_dataset))
    tokenizer = load_tokenizer(plain.manifest.tokenizer.name)
    recipe = Recipe(text=TextPolicy(movable=True), image=ImagePolicy(codec="raw"))
    prepare = Preparer(recipe=recipe, tokenizer=tokenizer)
    rows = get_dataset("pixmo_points", source="sample", limit=6)
    prepared = {sample.key: sample for sample in (prepare(rows.get(item)) for item in range(6))}

    class InStoredOrder:
        def __len__(self):
            return 6

        def get(self, item, rng):
            return {"key": plain.reader.read(item).key}

    for augment in AUGMENTS:
        dataset = stream(movable_dataset, augment)
        preprocess = MolmoPreprocessor(
            lambda example: prepared[example["key"]],
            special_ids=tokenizer.special_ids,
            view=dataset.view,
        )
        seed = dataset_seed(3, "pixmo_points")
        unsharded = DeterministicDataset(InStoredOrder(), preprocess, seed=seed)
        texts = set()
        for i, epoch in np.ndindex(6, 2):
            got, want = dataset.example(i, epoch=epoch), unsharded.get(i, epoch)
            for name in want.keys() - {"metadata"}:
                assert got[name].tobytes() == want[name].tobytes(), name
            learned = got["labels"][got["labels"] >= 0].tolist()
            texts.add((i, tuple(re.findall(r"\d{3,4}", tokenizer.decode(learned)))))
        assert len(texts) > 6, "coordinates differ between epochs"


def test_batches_are_the_same_in_threads_on_two_ranks_and_after_a_resume(movable_dataset):
    def batches(threads, *, after=0, rank=0, world=1):
        def loader():
            dataset = stream(movable_dataset, AUGMENTS[0], rank=rank, world_size=world)
            return make_dataloader(
                dataset, global_batch_size=2, sequence_length=512, decode_threads=threads
            )

        first, again = loader(), loader()
        found = iter(first)
        for _ in range(after):
            next(found)
        again.load_state_dict(first.state_dict())
        return list(again)

    want = batches(0)
    for got in (batches(3), batches(1, after=1)):
        for one, other in zip(got, want[len(want) - len(got) :], strict=True):
            assert all(torch.equal(one[name], other[name]) for name in other)
    ranks = [batches(0, rank=rank, world=2) for rank in range(2)]
    for one, other, whole in zip(*ranks, want, strict=True):
        rows = [row[row >= 0].tolist() for part in (one, other) for row in part["labels"]]
        assert rows == [row[row >= 0].tolist() for row in whole["labels"]]


class Away(Turn):
    def points(self, points_N2, rng, *, width, height):
        return points_N2 + width


def test_pictures_that_are_left_alone_are_counted(movable_dataset):
    for augment, view, count in (
        (Away(), {}, 6),
        (Turn(), {}, 0),
        (AUGMENTS[1], {}, 0),
        (Away(), {"purpose": "inference"}, 0),
    ):
        dataset = stream(movable_dataset, augment, **view)
        loader = make_dataloader(
            dataset, global_batch_size=2, sequence_length=512, decode_threads=0
        )
        assert len(list(loader)) == 3
        assert loader.stats().timings.left_alone == count
