import random
import threading

import numpy as np
import pytest
from torch.utils.data import DataLoader

from loader.assembly.assemble import assemble
from loader.assembly.augment import Augment
from loader.assembly.unsharded import DeterministicDataset, MolmoPreprocessor
from loader.assembly.view import View
from loader.stream import StreamingDataset, stored_view
from shardspec.errors import SampleError
from shardspec.keyed import dataset_seed
from shardspec.manifest import require_manifest


class Draws:
    """Raw examples that tell their number and what their generator gave first."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def get(self, item, rng):
        return {"item": item, "drawn": rng.random_sample(3).tolist()}


def tell(example, rng):
    drawn = rng.random_sample(3).tolist()
    return {**example, "drawn_again": drawn, "metadata": {"item": example["item"]}}


class Stored:
    """Prepared samples as raw examples, for a `prepare` that has nothing left to do."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def get(self, item, rng):
        return {"sample": self.samples[item], "noise": rng.random_sample()}


@pytest.fixture(scope="module")
def samples(tiny_sample):
    return [tiny_sample(i, num_images=i % 3, num_branches=1 + i % 2) for i in range(7)]


@pytest.fixture(scope="module")
def url(samples, write_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("molmo") / "set"
    return write_dataset(folder, samples, num_shards=2, several=True)


@pytest.fixture
def preprocessor(url):
    manifest = require_manifest(url)
    return MolmoPreprocessor(
        lambda example: example["sample"],
        special_ids=manifest.tokenizer.special_ids,
        view=View(image=stored_view(manifest), augment=Augment.standard()),
    )


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in got.keys() - {"metadata"}:
        assert got[name].dtype == want[name].dtype
        assert np.array_equal(got[name], want[name])


@pytest.mark.parametrize(
    "seed, idx, epoch", [(0, 0, 0), (42, 3, 0), (42, 3, 5), (2**32 - 1, 99, 10**6)]
)
def test_generator_of_an_item_is_seeded_by_the_formula(seed, idx, epoch):
    dataset = DeterministicDataset(Draws(100), tell, seed=seed)
    expected = np.random.RandomState((seed * 195172 + idx + 100 * epoch) % (2**32 - 1))
    example = dataset.get(idx, epoch=epoch)
    assert example["item"] == idx
    assert example["drawn"] == expected.random_sample(3).tolist()


def test_dataset_and_preprocessor_each_get_a_fresh_generator():
    dataset = DeterministicDataset(Draws(10), tell, seed=1)
    example = dataset[4]
    assert example["drawn"] == example["drawn_again"]


def test_epoch_changes_the_draws_and_items_follow_the_set_epoch():
    dataset = DeterministicDataset(Draws(10), tell, seed=1)
    assert dataset[4] == dataset.get(4, epoch=0)
    dataset.set_epoch(3)
    assert dataset[4] == dataset.get(4, epoch=3)
    assert dataset[4] != dataset.get(4, epoch=0)


def test_workers_that_outlive_a_pass_follow_the_set_epoch():
    dataset = DeterministicDataset(Draws(5), tell, seed=7)
    loader = DataLoader(
        dataset, batch_size=None, num_workers=1, persistent_workers=True, collate_fn=None
    )
    for epoch in (0, 2, 1):
        dataset.set_epoch(epoch)
        assert [*loader] == [dataset.get(i, epoch) for i in range(5)]


def test_draws_do_not_depend_on_what_was_read_before():
    dataset = DeterministicDataset(Draws(20), tell, seed=1, n_pad=3)
    forwards = [dataset[i] for i in range(23)]
    numbers = list(range(23)) * 2
    random.Random(0).shuffle(numbers)
    assert all(dataset[i] == forwards[i] for i in numbers)


def test_threads_do_not_share_a_generator():
    dataset = DeterministicDataset(Draws(50), tell, seed=1)
    want = [dataset[i] for i in range(50)]
    gate = threading.Barrier(4)
    wrong = []

    def work():
        gate.wait()
        for _ in range(20):
            wrong.extend(i for i in range(50) if dataset[i] != want[i])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_padding_repeats_item_0_and_says_that_it_is_not_valid():
    cache = {"metadata": {"item": 0}}
    dataset = DeterministicDataset(Draws(3), lambda example, rng: cache, n_pad=2)
    assert len(dataset) == 5
    examples = [dataset[i] for i in (4, 0, 3)]
    assert [example["metadata"]["valid"] for example in examples] == [False, True, False]
    assert cache == {"metadata": {"item": 0}}


def test_padding_is_item_0_of_the_same_epoch():
    dataset = DeterministicDataset(Draws(3), tell, seed=5, n_pad=2)
    dataset.set_epoch(2)
    first, filler = dataset[0], dataset[4]
    assert first.pop("metadata") == {"item": 0, "valid": True}
    assert filler.pop("metadata") == {"item": 0, "valid": False}
    assert first == filler


@pytest.mark.parametrize("idx", [-1, 5, 10**9])
def test_item_beyond_the_ends_is_not_an_item(idx):
    dataset = DeterministicDataset(Draws(3), tell, n_pad=2)
    with pytest.raises(IndexError, match=f"item {idx} of 5"):
        dataset[idx]


def test_dataset_can_be_walked_from_end_to_end():
    dataset = DeterministicDataset(Draws(3), tell, n_pad=1)
    assert [example["item"] for example in dataset] == [0, 1, 2, 0]


def test_preprocessor_assembles_what_was_prepared(samples, preprocessor):
    for seed, sample in enumerate(samples):
        got = preprocessor({"sample": sample}, np.random.RandomState(seed))
        want = assemble(
            sample, np.random.RandomState(seed), view=preprocessor.view, ids=preprocessor.ids
        )
        assert_same(got, want)


def test_preprocessor_shows_one_crop_of_336_px_by_default(samples, url):
    ids = require_manifest(url).tokenizer.special_ids
    preprocessor = MolmoPreprocessor(lambda example: example["sample"], special_ids=ids)
    example = preprocessor({"sample": samples[1]}, np.random.RandomState(0))
    assert example["images"].shape == (1, 3, 336, 336)
    assert (example["input_ids"] == ids["<im_patch>"]).sum() == 144


def test_errors_of_the_offline_half_pass_through(url):
    def refuse(example):
        raise SampleError("refused", what="no", where="some-key")

    ids = require_manifest(url).tokenizer.special_ids
    dataset = DeterministicDataset(Draws(3), MolmoPreprocessor(refuse, special_ids=ids))
    with pytest.raises(SampleError) as caught:
        dataset[1]
    assert caught.value.reason == "refused"


def test_unsharded_examples_equal_those_from_lossless_shards(samples, url, preprocessor):
    stream = StreamingDataset(url, seed=11, view=preprocessor.view)
    dataset = DeterministicDataset(Stored(samples), preprocessor, seed=dataset_seed(11, "tiny"))
    for epoch in range(3):
        for i in range(len(samples)):
            got, want = stream.example(i, epoch=epoch), dataset.get(i, epoch=epoch)
            assert_same(got, want)
            assert {**got["metadata"], "valid": True} == want["metadata"]
