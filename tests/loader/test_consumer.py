"""What takes the samples of a dataset, in this process and in a DataLoader's workers."""

import importlib

import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from loader import IterableDatasetMixture, StreamingDataset
from shardspec.errors import ConfigError

# See tests/loader/test_dataloader.py and tests/loader/state/test_cursor.py.
pytestmark = pytest.mark.filterwarnings(
    "ignore:'set_vital' is deprecated:UserWarning",
    "ignore:.*use of fork:DeprecationWarning",
    "ignore:Exception ignored in. <function _MultiProcessingDataLoaderIter"
    ":pytest.PytestUnraisableExceptionWarning",
)


@pytest.fixture(scope="module")
def url(tiny_sample, write_dataset, tmp_path_factory):
    samples = [tiny_sample(i) for i in range(24)]
    return write_dataset(tmp_path_factory.mktemp("consumer") / "set", samples, num_shards=2)


def make(url, *, world_size=2, mixture=False, batch_size=4):
    dataset = StreamingDataset(url, seed=1, rank=0, world_size=world_size, batch_size=batch_size)
    if mixture:
        return IterableDatasetMixture([dataset], seed=1, batch_size=batch_size)
    return dataset


def keys(examples):
    return [example["metadata"]["key"] for example in examples]


class DataLoaderDispatcher:
    """Accelerate's, in short: the epoch is set, then a DataLoader's iterator begins."""

    def __init__(self, loader, num_processes):
        self.loader = loader
        self.state = type("State", (), {"num_processes": num_processes})

    def set_epoch(self, epoch):
        self.loader.dataset.set_epoch(epoch)

    def __iter__(self):
        self.set_epoch(0)
        yield from self.loader.__iter__()


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize("library", ["accelerate.data_loader", "transformers.trainer_pt_utils"])
def test_samples_that_a_library_divides_again_are_refused(url, library, mixture, num_workers):
    shard = importlib.import_module(library).IterableDatasetShard
    divided = shard(make(url, mixture=mixture), batch_size=4, num_processes=2, process_index=0)
    loader = DataLoader(divided, batch_size=4, collate_fn=keys, num_workers=num_workers)
    with pytest.raises((ConfigError, RuntimeError), match="between the ranks twice"):
        list(loader)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_that_rank_0_deals_to_all_are_refused(url, num_workers):
    loader = DataLoader(make(url), batch_size=4, collate_fn=keys, num_workers=num_workers)
    with pytest.raises(ConfigError) as caught:
        list(DataLoaderDispatcher(loader, 2))
    assert caught.value.reason == "sharded_twice"
    assert "DataLoaderDispatcher" in str(caught.value)


@pytest.mark.parametrize("num_processes, world_size", [(1, 2), (2, 1), (1, 1)])
def test_one_division_is_enough(url, num_processes, world_size):
    """The library's or the dataset's own."""
    from accelerate.data_loader import IterableDatasetShard

    dataset = make(url, world_size=world_size)
    seen = []
    for rank in range(num_processes):
        shard = IterableDatasetShard(
            dataset, batch_size=4, num_processes=num_processes, process_index=rank
        )
        seen += sum(DataLoader(shard, batch_size=4, collate_fn=keys), [])
    loader = DataLoader(dataset, batch_size=4, collate_fn=keys)
    assert sorted(seen) == sorted(sum(DataLoaderDispatcher(loader, num_processes), []))
    assert len(set(seen)) == 24 // world_size


@pytest.mark.parametrize("loader", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_dataloader_with_batches_of_another_size_is_refused(url, loader, num_workers, batch_size):
    batches = loader(make(url), batch_size=batch_size, collate_fn=keys, num_workers=num_workers)
    with pytest.raises((ConfigError, RuntimeError), match="another size than"):
        list(batches)


@pytest.mark.parametrize("batch_size, of_dataset", [(4, 4), (None, 4), (3, None), (None, None)])
def test_other_batch_sizes_are_taken(url, batch_size, of_dataset):
    dataset = make(url, world_size=1, batch_size=of_dataset)
    collate = None if batch_size is None else keys
    batches = list(DataLoader(dataset, batch_size=batch_size, collate_fn=collate or (lambda x: x)))
    assert len(batches) == 24 // (batch_size or 1)


def test_a_dataset_without_a_dataloader_is_taken_as_it_is(url):
    assert len(set(keys(make(url, world_size=1)))) == 24


def test_ranks_that_are_known_late_count_for_a_step_that_was_asked_for(url, monkeypatch):
    def begin(world_size, *, late):
        dataset = StreamingDataset(url, seed=1, batch_size=2)
        if late:
            dataset.set_step(3)
        with monkeypatch.context() as patch:
            patch.setattr(torch.distributed, "is_initialized", lambda: True)
            patch.setattr(torch.distributed, "get_rank", lambda: 1)
            patch.setattr(torch.distributed, "get_world_size", lambda: world_size)
            if not late:
                dataset.set_step(3)
            return keys(dataset)

    for world_size in (2, 3):
        assert begin(world_size, late=True) == begin(world_size, late=False)
