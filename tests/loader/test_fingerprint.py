import itertools
import json

import pytest

from loader.assemble import View
from loader.dataloader import make_dataloader
from loader.fingerprint import keys_fingerprint
from loader.stream import StreamingDataset, stored_view
from shardspec.errors import ConfigError, ShardError, StateError
from shardspec.manifest import require_manifest

NUM = 30


@pytest.fixture(scope="module")
def samples(tiny_sample):
    return [tiny_sample(i, num_images=0) for i in range(NUM)]


@pytest.fixture
def write(samples, write_dataset, tmp_path):
    def write(folder, chosen=None, **options):
        return write_dataset(tmp_path / folder, samples if chosen is None else chosen, **options)

    return write


def make(url, *, batch=4, canonical_ranks=None, **options):
    view = View(image=stored_view(require_manifest(url)))
    dataset = StreamingDataset(url, seed=1, view=view, canonical_ranks=canonical_ranks, **options)
    return make_dataloader(dataset, global_batch_size=batch, sequence_length=64, with_metadata=True)


def keys(loader, count):
    batches = []
    while len(batches) < count:
        batches += itertools.islice(loader, count - len(batches))
    return [[entry["key"] for entry in batch["metadata"]] for batch in batches]


def saved(loader, count):
    keys(loader, count)
    return json.loads(json.dumps(loader.state_dict()))


def test_shards_cut_anew_have_the_same_fingerprint_and_order(write):
    one, other = write("one", num_shards=1), write("other", num_shards=7)
    assert make(one).dataset.fingerprint() == make(other).dataset.fingerprint()
    want = keys(make(one), 12)
    resumed = make(other)
    resumed.load_state_dict(saved(make(one), 5))
    assert keys(resumed, 7) == want[5:]


def test_another_sequence_or_other_samples_have_another_fingerprint(write, samples, tiny_sample):
    swapped = [samples[1], samples[0], *samples[2:]]
    replaced = [*samples[:-1], tiny_sample(NUM, num_images=0)]
    prints = [
        make(write(name, chosen)).dataset.fingerprint()
        for name, chosen in (("a", samples), ("b", swapped), ("c", replaced), ("d", samples[1:]))
    ]
    assert len({entry["keys"] for entry in prints}) == 4


def test_large_splits_are_judged_by_keys_spread_over_all_of_them(write, monkeypatch, samples):
    monkeypatch.setattr("loader.fingerprint._MOST_KEYS", 5)
    reader = make(write("a")).dataset.reader
    later = make(write("b", [*samples[:7], *samples[8:], samples[7]])).dataset.reader
    assert keys_fingerprint(reader, NUM) != keys_fingerprint(later, NUM)
    assert keys_fingerprint(reader, 7) == keys_fingerprint(later, 7)


def test_appended_samples_are_named_and_the_run_can_go_on_without_them(write, samples):
    before = write("before", samples[:23], num_shards=2)
    grown = write("grown", num_shards=3)
    want = keys(make(before), 12)
    state = saved(make(before), 4)
    with pytest.raises(StateError) as caught:
        make(grown).load_state_dict(state)
    assert caught.value.reason == "state_appended"
    assert caught.value.facts == {"then": 23, "now": 30}
    assert "max_samples" in caught.value.fix
    resumed = make(grown, max_samples=23)
    resumed.load_state_dict(state)
    assert keys(resumed, 8) == want[4:]


def test_dataset_that_grew_at_its_front_is_another_one(write, samples):
    before, grown = write("before", samples[7:]), write("grown", samples)
    with pytest.raises(StateError) as caught:
        make(grown).load_state_dict(saved(make(before), 1))
    assert caught.value.reason == "state_mismatch"
    assert "state.data.num_samples: 23 here, 30 asked" in caught.value.facts["differences"]


@pytest.mark.parametrize("max_samples", [0, 31])
def test_more_samples_than_there_are_cannot_be_asked_for(max_samples, write):
    with pytest.raises(ConfigError) as caught:
        make(write("set"), max_samples=max_samples)
    assert caught.value.reason == "max_samples"


def test_another_canonical_width_is_refused_with_the_one_to_use(write):
    url = write("set")
    state = saved(make(url, canonical_ranks=2), 3)
    loader = make(url)
    with pytest.raises(StateError) as caught:
        loader.load_state_dict(state)
    assert caught.value.reason == "state_canonical_ranks"
    assert caught.value.facts == {"saved": 2, "here": 4}
    resumed = make(url, canonical_ranks=2)
    resumed.load_state_dict(state)
    assert resumed.step == 3


def test_batch_size_can_grow_and_every_sample_still_comes_once(write):
    url = write("set")
    loader = make(url, canonical_ranks=2)
    shown = keys(loader, 3)
    loader.change(global_batch_size=8)
    shown += keys(loader, 2)
    state = json.loads(json.dumps(loader.state_dict()))
    assert state["order"]["global_batch_size"] == 4
    assert state["order"]["ramp"] == [{"step": 3, "global_batch_size": 8}]
    resumed = make(url, canonical_ranks=2)
    resumed.load_state_dict(state)
    assert (resumed.epoch, resumed.step) == (0, 5)
    shown += keys(resumed, 1)
    flat = [key for batch in shown for key in batch]
    assert [len(batch) for batch in shown] == [4, 4, 4, 8, 8, 8]
    assert len(set(flat[:NUM])) == NUM


def test_batch_size_that_ranks_cannot_share_is_refused_during_the_run(write):
    loader = make(write("set"), canonical_ranks=4)
    with pytest.raises(ConfigError) as caught:
        loader.change(global_batch_size=6)
    assert caught.value.reason == "batch_not_divisible"
    with pytest.raises(ConfigError) as caught:
        loader.change(weights=[1.0])
    assert caught.value.reason == "change_weights"


def test_indexes_without_a_column_are_refused(write):
    with pytest.raises(ShardError) as caught:
        make(write("set")).dataset.reader.column("colour", [0])
    assert caught.value.reason == "index_column"
