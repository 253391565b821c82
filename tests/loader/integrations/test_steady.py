"""Passes of equally many steps; tests/e2e/test_launchers.py has the trainers themselves."""

import itertools
import json

import pytest

from loader import DevicePrefetcher, StreamingDataset, make_dataloader
from loader.integrations import SteadyPasses
from shardspec.errors import ConfigError


@pytest.fixture(scope="module")
def url(tiny_sample, write_dataset, tmp_path_factory):
    samples = [tiny_sample(i) for i in range(23)]  # epochs of 6, 6, 6 and 5 batches
    return write_dataset(tmp_path_factory.mktemp("steady") / "set", samples, num_shards=2)


def make(url, wrap=lambda loader: loader, tail="wrap"):
    dataset = StreamingDataset(url, seed=1, rank=0, world_size=1, tail=tail)
    loader = make_dataloader(dataset, global_batch_size=4, sequence_length=64, with_metadata=True)
    return wrap(loader)


def on_cpu(loader):
    return DevicePrefetcher(loader, "cpu")


def keys(batches):
    return [[one["key"] for one in batch["metadata"]] for batch in batches]


@pytest.fixture(scope="module")
def run(url):
    loader = make(url)
    return keys(itertools.chain(*(loader for _ in range(5))))


@pytest.mark.parametrize("wrap", [lambda loader: loader, on_cpu])
@pytest.mark.parametrize("steps", [None, 4, 9])
def test_passes_have_equally_many_steps_and_join_to_the_run(url, run, steps, wrap):
    passes = SteadyPasses(make(url, wrap), steps=steps)
    found = [keys(passes) for _ in range(3)]
    assert [len(one) for one in found] == [len(passes)] * 3 == [steps or 6] * 3
    assert sum(found, []) == run[: 3 * len(passes)]
    assert len(passes.dataset) == 24


def test_a_pass_that_was_left_continues_in_the_next_one_and_in_another_run(url, run):
    passes = SteadyPasses(make(url))
    found = keys(itertools.islice(passes, 4)) + keys(itertools.islice(passes, 4))
    state = json.loads(json.dumps(passes.state_dict()))
    assert keys(itertools.islice(passes, 2)) == run[8:10]
    again = SteadyPasses(make(url))
    for _ in range(2):
        again.load_state_dict(state)
        assert found + keys(again) == run[:14]


@pytest.mark.parametrize("steps", [0, -1])
def test_passes_without_steps_are_refused(url, steps):
    with pytest.raises(ConfigError) as caught:
        SteadyPasses(make(url), steps=steps)
    assert caught.value.reason == "pass_steps"
