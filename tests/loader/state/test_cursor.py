"""Resuming outside our own loader: a plain DataLoader, and torchdata's StatefulDataLoader."""

import json
import logging

import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from loader.assembly.view import View
from loader.mixture_stream import IterableDatasetMixture
from loader.stream import StreamingDataset
from shardspec.errors import StateError

NUM, BATCH = 23, 4
STEPS = (6, 6, 6, 5)

# Python 3.12 warns of forking beside threads; forked workers start in a tenth of the time.
pytestmark = pytest.mark.filterwarnings(
    "ignore:'set_vital' is deprecated:UserWarning",  # torchdata 0.11 calls it
    "ignore:.*use of fork:DeprecationWarning",
    "ignore:This DataLoader will create:UserWarning",
)


@pytest.fixture(scope="module")
def urls(tiny_sample, write_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cursor")
    return [
        write_dataset(
            folder / name,
            [tiny_sample(100 * n + i, num_images=0) for i in range(NUM)],
            num_shards=3,
            name=name,
        )
        for n, name in enumerate(("first", "second"))
    ]


@pytest.fixture(params=["dataset", "mixture"])
def dataset(request, urls, monkeypatch):
    """Makes a new object for the same run each time."""
    monkeypatch.setattr("loader.order.pattern._MIN_PATTERN_SLOTS", 1)

    def make():
        if request.param == "dataset":
            return StreamingDataset(urls[0], seed=1, batch_size=BATCH)
        parts = [StreamingDataset(url) for url in urls]
        return IterableDatasetMixture(parts, [2, 1], seed=1, batch_size=BATCH, stop=6)

    return make


def stateful(dataset, num_workers):
    return StatefulDataLoader(
        dataset,
        batch_size=BATCH,
        num_workers=num_workers,
        collate_fn=keys,
        multiprocessing_context="fork" if num_workers else None,
    )


def keys(examples):
    return [example["metadata"]["key"] for example in examples]


def passes(dataset, count):
    """The batches of some passes, epoch by epoch, as a plain loop over the dataset gives them."""
    found = []
    for epoch in range(count):
        dataset.set_epoch(epoch)
        names = keys(dataset)
        found += [names[i : i + BATCH] for i in range(0, len(names), BATCH)]
    return found


def test_plain_dataloader_continues_at_any_step(dataset):
    want = passes(dataset(), 2)
    for step in range(len(want)):
        resumed = dataset()
        resumed.set_step(step)
        loader = DataLoader(resumed, batch_size=BATCH, collate_fn=keys)
        epoch, inside = divmod(step, 6)
        assert (resumed.epoch, len(loader)) == (epoch, 6 - inside)
        assert list(loader) == want[step : 6 * (epoch + 1)]
        resumed.set_epoch(epoch + 1)
        assert len(loader) == 6


def test_plain_dataloader_continues_with_any_number_of_workers(dataset):
    want = passes(dataset(), 1)
    for num_workers in (1, 2, 3):
        resumed = dataset()
        resumed.set_step(2)
        loader = DataLoader(
            resumed,
            batch_size=BATCH,
            collate_fn=keys,
            num_workers=num_workers,
            multiprocessing_context="fork",
        )
        assert list(loader) == want[2:6]


@pytest.mark.parametrize(("num_workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_second_pass_without_set_epoch_is_warned_of_once(
    num_workers, persistent, dataset, tmp_path, monkeypatch
):
    log = logging.FileHandler(tmp_path / "log")  # forked workers write to it too
    monkeypatch.setattr("loader.state.cursor.logger.handlers", [log])
    source = dataset()
    loader = DataLoader(
        source,
        batch_size=BATCH,
        collate_fn=keys,
        num_workers=num_workers,
        persistent_workers=persistent,
        multiprocessing_context="fork" if num_workers else None,
    )
    for epoch in range(3):
        source.set_epoch(epoch)
        first = list(loader)
    assert (tmp_path / "log").read_text() == ""
    assert [list(loader), list(loader)] == [first, first]
    log.close()
    assert (tmp_path / "log").read_text().count("this pass gives epoch 2 once more") == 1


def test_passes_of_an_evaluation_may_repeat(urls, caplog):
    source = StreamingDataset(urls[0], batch_size=BATCH, tail="pad")
    assert keys(source) == keys(source)
    assert not caplog.text


def test_stateful_dataloader_continues_after_every_batch_and_again(dataset):
    want = passes(dataset(), 1)
    for stop in range(1, 6):
        loader = stateful(dataset(), 0)
        batches = iter(loader)
        assert [next(batches) for _ in range(stop)] == want[:stop]
        state = json.loads(json.dumps(loader.state_dict()))
        second = stateful(dataset(), 0)
        second.load_state_dict(state)
        batches = iter(second)
        assert next(batches) == want[stop]
        third = stateful(dataset(), 0)
        third.load_state_dict(second.state_dict())
        assert list(third) == want[stop + 1 : 6]


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_stateful_dataloader_with_workers_continues_in_the_middle_of_prefetching(
    num_workers, dataset
):
    want = passes(dataset(), 1)
    loader = stateful(dataset(), num_workers)
    batches = iter(loader)
    assert [next(batches) for _ in range(3)] == want[:3]
    state = loader.state_dict()
    del batches
    resumed = stateful(dataset(), num_workers)
    resumed.load_state_dict(state)
    assert list(resumed) == want[3:6]


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_stateful_dataloader_saved_at_the_end_of_an_epoch_begins_the_next(num_workers, dataset):
    want = passes(dataset(), 2)
    loader = stateful(dataset(), num_workers)
    assert list(loader) == want[:6]
    state = loader.state_dict()
    source = dataset()
    resumed = stateful(source, num_workers)
    resumed.load_state_dict(state)
    source.set_epoch(1)
    assert list(resumed) == want[6:12]


def test_epoch_of_a_state_is_the_epoch_of_the_next_pass(dataset):
    want = passes(dataset(), 2)
    source = dataset()
    source.set_epoch(1)
    loader = stateful(source, 0)
    batches = iter(loader)
    assert [next(batches) for _ in range(2)] == want[6:8]
    resumed = stateful(dataset(), 0)
    resumed.load_state_dict(loader.state_dict())
    assert list(resumed) == want[8:12]


def test_state_of_other_data_or_another_version_is_refused(urls):
    first, second = (StreamingDataset(url, seed=1, batch_size=BATCH) for url in urls)
    state = first.state_dict()
    with pytest.raises(StateError) as caught:
        second.load_state_dict(state)
    assert caught.value.reason == "state_mismatch"
    assert "state.data.dataset: first here, second asked" in caught.value.facts["differences"]
    with pytest.raises(StateError) as caught:
        first.load_state_dict({**state, "version": 0})
    assert caught.value.reason == "state_version"


def test_state_of_another_view_order_or_batch_is_refused(urls):
    def make(*, batch_size=BATCH, **options):
        return StreamingDataset(urls[0], seed=1, batch_size=batch_size, **options)

    state = json.loads(json.dumps(make().state_dict()))
    image = make().view.image
    stored = View(image=image, branch_order="stored")
    for other, reason, difference in (
        (make(view=stored), "state_view", "state.view.branch_order: shuffled here, stored asked"),
        (make(batch_size=2), "state_mismatch", "state.batch_size: 4 here, 2 asked"),
        (make(canonical_ranks=2), "state_mismatch", "state.order.canonical_ranks: 4 here, 2 asked"),
    ):
        with pytest.raises(StateError) as caught:
            other.load_state_dict(state)
        assert caught.value.reason == reason
        assert difference in caught.value.facts["differences"]
    make(view=stored).load_state_dict(state, allow=("view",))


def test_state_of_a_mixture_of_other_weights_is_refused(urls, monkeypatch):
    monkeypatch.setattr("loader.order.pattern._MIN_PATTERN_SLOTS", 1)

    def make(weights):
        parts = [StreamingDataset(url) for url in urls]
        return IterableDatasetMixture(parts, weights, seed=1, batch_size=BATCH)

    with pytest.raises(StateError) as caught:
        make([3, 1]).load_state_dict(make([2, 1]).state_dict())
    assert caught.value.reason == "state_mismatch"
    assert "state.order.members" in caught.value.facts["differences"]


def test_shared_place_is_seen_by_persistent_workers(urls):
    source = StreamingDataset(urls[0], seed=1, batch_size=BATCH)
    want = passes(source, 2)
    source.set_epoch(0)
    loader = DataLoader(
        source,
        batch_size=BATCH,
        collate_fn=keys,
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    got = list(loader)
    source.set_epoch(1)
    got += list(loader)
    assert got == want
    assert torch.utils.data.get_worker_info() is None
