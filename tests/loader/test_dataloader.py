import dataclasses
import itertools
import json
import logging
import multiprocessing
import pickle
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

from loader.assembly.augment import Augment
from loader.assembly.collate import MMCollator
from loader.assembly.view import View
from loader.dataloader import make_dataloader
from loader.mixture_stream import IterableDatasetMixture
from loader.stream import StreamingDataset, stored_view
from shardspec.errors import ConfigError, ShardError, StateError
from shardspec.index import open_index
from shardspec.manifest import require_manifest

# A torch worker whose consumer leaves early may abort while its interpreter ends: a daemon thread
# of its queue is unwound through C++. torch reports that from the iterator's __del__, where Python
# ignores it; the batches that were delivered are not concerned.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <function _MultiProcessingDataLoaderIter"
    ":pytest.PytestUnraisableExceptionWarning"
)

NUM = 23
BATCH = 4
STEPS = (6, 6, 6, 5)
"""Steps of the first epochs: 23 samples in batches of 4, no sample dropped or repeated."""


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread():
    """Tiny pictures are not worth torch's threads, which wait for each other on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def samples(tiny_sample):
    return [tiny_sample(i, num_images=i % 3, num_branches=1 + i % 2) for i in range(NUM)]


@pytest.fixture(scope="module")
def url(samples, write_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataloader") / "set"
    return write_dataset(folder, samples, num_shards=3, several=True)


def make(
    url,
    *,
    rank=0,
    world_size=1,
    seed=7,
    tail="wrap",
    check="size",
    canonical_ranks=None,
    **options,
):
    view = View(image=stored_view(require_manifest(url)), augment=Augment.standard())
    dataset = StreamingDataset(
        url,
        seed=seed,
        view=view,
        tail=tail,
        rank=rank,
        world_size=world_size,
        check=check,
        canonical_ranks=canonical_ranks,
    )
    settings = {
        "global_batch_size": BATCH,
        "sequence_length": 64,
        "pad_mode": "max_len",
        "extra_keys": ("position_ids", "loss_weights"),
        "with_metadata": True,
    }
    return make_dataloader(dataset, **{**settings, **options})


def rows(batches):
    """Gives every row of every batch in a form that can be compared; images to their number."""
    found = []
    for batch in batches:
        counts = (batch["image_input_idx"] >= 0).sum(dim=1).tolist()
        for row, count in enumerate(counts):
            tensors = {k: v[row] for k, v in batch.items() if isinstance(v, torch.Tensor)}
            parts = [(k, v[:count] if "image" in k else v) for k, v in sorted(tensors.items())]
            key = batch["metadata"][row]["key"]
            found.append((key, *(v.contiguous().numpy().tobytes() for _, v in parts)))
    return found


def take(loader, count):
    """Takes batches over the epochs' ends, and leaves the last epoch where it stands."""
    batches = []
    while len(batches) < count:
        batches += itertools.islice(loader, count - len(batches))
    return batches


def decode_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


@pytest.fixture(scope="module")
def undisturbed(url):
    """The rows of three epochs, made by one thread without a stop."""
    return rows(take(make(url, decode_threads=1), sum(STEPS[:3])))


@pytest.mark.parametrize("num_threads", [2, 5])
def test_threads_give_the_same_batches_as_one_alone(num_threads, url, undisturbed):
    loader = make(url, decode_threads=num_threads)
    passes = [list(loader) for _ in range(4)]
    assert tuple(map(len, passes)) == STEPS
    assert rows(batch for batches in passes[:3] for batch in batches) == undisturbed


def test_batches_are_the_collated_examples_of_the_order(url):
    loader = make(url, decode_threads=3)
    collate = MMCollator(
        sequence_length=64,
        pad_mode="max_len",
        image_shape=(3, 28, 28),
        num_patches=4,
        extra_keys=("position_ids", "loss_weights"),
        with_metadata=True,
    )
    dataset = loader.dataset
    for step, batch in enumerate(take(loader, 8)):
        slots = dataset._stream.order.slots(step, range(BATCH))
        pairs = zip(slots.sample.tolist(), slots.epoch.tolist(), strict=True)
        want = collate([dataset.example(sample, epoch=epoch) for sample, epoch in pairs])
        assert batch.keys() == want.keys()
        assert rows([batch]) == rows([want])


def test_packed_batches_are_the_joined_examples_that_the_indexes_let_fit(url):
    loader = make(url, pack=True, max_crops=4, decode_threads=3)
    dataset = loader.dataset
    keys = []
    for batch in take(loader, 6):
        assert batch["subsegment_ids"].shape == batch["input_ids"].shape == (BATCH, 64)
        assert (batch["image_input_idx"] >= 0).sum(dim=1).max() <= 4
        for row, entry in enumerate(batch["metadata"]):
            own = [part["key"] for part in entry["examples"]]
            assert entry["key"] == "+".join(own)
            keys += own
            length = int(batch["attention_mask"][row].sum())
            starts = (batch["position_ids"][row, :length] == 0).nonzero().flatten().tolist()
            assert len(starts) == len(own)
            for name, start, stop in zip(own, starts, [*starts[1:], length], strict=True):
                # Which epoch a sample is in is the order's affair; it is one of the first.
                found = batch["input_ids"][row, start:stop].tolist()
                number = int(name[-4:])
                drawn = [dataset.example(number, epoch=e)["input_ids"].tolist() for e in range(6)]
                assert found in drawn
    assert len(keys) > 6 * BATCH * 1.2
    assert set(keys) == {f"sample-{i:04d}" for i in range(NUM)}


def test_packs_and_buckets_are_not_asked_for_together(url):
    with pytest.raises(ConfigError) as caught:
        make(url, pack=True, bucket_steps=4)
    assert caught.value.reason == "packing_and_buckets"


def packed_keys(batches):
    return [
        [part["key"] for entry in batch["metadata"] for part in entry["examples"]]
        for batch in batches
    ]


# With max_crops=1 a sample of two crops exceeds the limit by itself, beside samples without any.
@pytest.mark.parametrize("batch_size, max_crops", [(2, 4), (BATCH, 4), (12, 4), (BATCH, 1)])
def test_packed_passes_show_each_sample_of_their_epoch_once_but_for_the_border_batch(
    url, batch_size, max_crops
):
    loader = make(url, pack=True, max_crops=max_crops, global_batch_size=batch_size)
    assert loader.pass_is_exact
    shown = Counter()
    for number in range(6):
        assert loader.epoch == number or batch_size == 12  # a batch holds a whole epoch and more
        left = len(loader)
        keys = packed_keys(loader)
        assert len(keys) == left
        shown.update(key for batch in keys for key in batch)
        # What is more than the epochs so far is in the last batch.
        assert len(shown) == NUM
        over = Counter({key: count - loader.epoch for key, count in shown.items()})
        assert min(over.values()) >= 0
        assert +over <= Counter(keys[-1])


def test_state_of_packed_passes_is_small_and_the_same_on_every_rank(url):
    states = []
    for rank, balance in ((0, False), (1, False), (1, True)):
        loader = make(url, rank=rank, world_size=2, pack=True, max_crops=4, balance=balance)
        while loader.epoch < 3:
            take(loader, 1)
        states.append(loader.state_dict())
    assert states[0] == states[1] == states[2]
    assert states[0]["streams"][0][0] == 3
    assert len(json.dumps([states[0]["streams"], states[0]["packing"]])) < 200
    later = loader.state_dict()
    later.pop("streams")  # it saves time, no more
    resumed = make(url, rank=1, world_size=2, pack=True, max_crops=4)
    resumed.load_state_dict(later)
    assert packed_keys(take(resumed, 4)) == packed_keys(
        take(make_at(url, states[0], rank=1, world_size=2, pack=True, max_crops=4), 4)
    )


def make_at(url, state, **options):
    loader = make(url, **options)
    loader.load_state_dict(json.loads(json.dumps(state)))
    return loader


def test_batch_of_packs_that_changes_twice_within_an_epoch_loses_no_sample(url):
    options = {"pack": True, "max_crops": 3, "global_batch_size": 1}
    loader = make(url, **options)
    keys = packed_keys(take(loader, 1))
    for batch_size in (2, 1, 3):
        loader.change(global_batch_size=batch_size)
        keys += packed_keys(take(loader, 1))
        loader = make_at(url, loader.state_dict(), **options)
    assert loader.epoch == 0
    keys += packed_keys(loader)
    shown = Counter(key for part in keys for key in part)
    over = Counter({key: count - 1 for key, count in shown.items()})
    assert len(shown) == NUM
    assert +over <= Counter(keys[-1])


@pytest.mark.parametrize("exact", [True, False])
def test_loader_of_packs_says_what_a_pass_is(url, exact, caplog, monkeypatch):
    if not exact:
        monkeypatch.setattr("loader.order.pack_epochs.MOST_PLANNED", NUM - 1)
    with caplog.at_level(logging.INFO, logger="loader.dataloader"):
        assert make(url, pack=True).pass_is_exact == exact
        assert make(url, pack=True, rank=1, world_size=2).pass_is_exact == exact
    (record,) = caplog.records
    assert ("number of steps" in record.getMessage()) == (not exact)
    assert make(url).pass_is_exact


def test_state_of_packs_by_epochs_is_not_taken_for_one_of_endless_packs(url, monkeypatch):
    state = make(url, pack=True).state_dict()
    monkeypatch.setattr("loader.order.pack_epochs.MOST_PLANNED", NUM - 1)
    with pytest.raises(StateError) as caught:
        make(url, pack=True).load_state_dict(state)
    assert caught.value.reason == "state_mismatch"
    assert "state.packing.exact" in str(caught.value)


@pytest.mark.parametrize("kind", ["rows", "packs", "buckets"])
@pytest.mark.parametrize(
    "batch_size", [0, -4, 2.0, "8", True, [8], {}, 1e308, torch.tensor([8, 8])]
)
def test_change_to_a_batch_that_is_not_a_number_of_rows_is_refused(url, kind, batch_size):
    options = {"packs": {"pack": True}, "buckets": {"bucket_steps": 2}}.get(kind, {})
    loader = make(url, **options)
    state = loader.state_dict()
    with pytest.raises(ConfigError) as caught:
        loader.change(global_batch_size=batch_size)
    assert caught.value.reason == "order_count"
    assert loader.state_dict() == state


def bucket_keys(batches):
    return [entry["key"] for batch in batches for entry in batch["metadata"]]


def require_once(keys, *, num_epochs):
    """Every sample that often, and what fills the last batch once more."""
    shown = Counter(keys)
    assert len(shown) == NUM
    assert set(shown.values()) <= {num_epochs, num_epochs + 1}


@pytest.mark.parametrize("allowed", [False, True], ids=["change", "load_state_dict"])
@pytest.mark.parametrize("step", range(7))
def test_another_batch_is_refused_inside_a_group_of_buckets_and_exact_at_its_border(
    url, step, allowed
):
    """Groups of 4 steps in passes of 6: 0 to 3, 4 and 5, and so on."""
    loader = make(url, bucket_steps=4)
    first = take(loader, step)
    border = {0: 0, 4: 4, 5: 6, 6: 6}.get(step, 4)

    def another(loader):
        if not allowed:
            loader.change(global_batch_size=8)
            return loader
        other = make(url, bucket_steps=4, global_batch_size=8)
        other.load_state_dict(loader.state_dict(), allow=("order",))
        return other

    if step != border:
        state = loader.state_dict()
        with pytest.raises(ConfigError) as caught:
            another(loader)
        assert caught.value.reason == "bucket_group"
        assert (caught.value.facts["border"], caught.value.facts["left"]) == (border, border - step)
        assert str(border) in caught.value.fix
        assert loader.state_dict() == state
        first += take(loader, border - step)
    loader = another(loader)
    batches = [*first, *(loader if loader.epoch == 0 else ())]
    if step < 6:
        require_once(bucket_keys(batches), num_epochs=1)
    batches += loader
    require_once(bucket_keys(batches), num_epochs=2)


def test_state_inside_a_group_of_buckets_is_taken_where_the_order_stays(url):
    loader = make(url, bucket_steps=4)
    take(loader, STEPS[0])
    loader.change(global_batch_size=8)
    take(loader, 1)
    state = loader.state_dict()
    want = bucket_keys(take(loader, 3))
    assert bucket_keys(take(make_at(url, state, bucket_steps=4), 3)) == want
    # This loader has the batch that the state's run has by now: nothing changes.
    options = {"bucket_steps": 4, "global_batch_size": 8, "canonical_ranks": BATCH}
    other = make(url, **options)
    other.load_state_dict(state, allow=("order",))
    assert bucket_keys(take(other, 3)) == want
    with pytest.raises(ConfigError) as caught:
        make(url, **{**options, "global_batch_size": 12}).load_state_dict(state, allow=("order",))
    assert caught.value.reason == "bucket_group"


@pytest.mark.parametrize("tail", ["pad", "drop_last"])
def test_a_batch_that_changes_needs_tail_wrap_and_says_so(url, tail):
    dataset = StreamingDataset(url, tail=tail, canonical_ranks=1)
    loader = make_dataloader(dataset, global_batch_size=2, sequence_length=64)
    loader.change(global_batch_size=4)  # before the first step
    loader.step = 1
    with pytest.raises(ConfigError) as caught:
        loader.change(global_batch_size=2)
    assert caught.value.reason == "change_tail"
    assert caught.value.facts["tail"] == tail


@pytest.mark.parametrize("options", [{"pack": True}, {"balance": "images"}])
@pytest.mark.parametrize("world_size", [1, 2])
def test_view_without_lengths_in_the_indexes_is_refused_on_any_number_of_ranks(
    url, options, world_size
):
    image = dataclasses.replace(stored_view(require_manifest(url)), column_tokens=False)
    dataset = StreamingDataset(url, view=View(image=image), rank=0, world_size=world_size)
    loader = make_dataloader(dataset, global_batch_size=2, sequence_length=64, **options)
    with pytest.raises(ConfigError) as caught:
        next(iter(loader))
    assert caught.value.reason == "view_lengths"


def test_substitutes_in_packs_are_recorded_and_fit(broken):
    url, key, _ = broken
    view = View(image=stored_view(require_manifest(url)))
    dataset = StreamingDataset(url, seed=7, view=view, check="crc", on_bad="substitute")
    loader = make_dataloader(
        dataset,
        global_batch_size=BATCH,
        sequence_length=64,
        pad_mode="max_len",
        with_metadata=True,
        pack=True,
    )
    parts = [
        part for batch in take(loader, 6) for row in batch["metadata"] for part in row["examples"]
    ]
    assert key not in {part["key"] for part in parts}
    assert loader.dataset.bad["sample_crc"] >= 1


def test_every_sample_comes_once_per_epoch(undisturbed):
    keys = [row[0] for row in undisturbed]
    for epoch in range(3):
        seen = keys[epoch * NUM : (epoch + 1) * NUM]
        assert sorted(seen) == [f"sample-{i:04d}" for i in range(NUM)]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_give_the_batches_of_one_rank(world_size, url, undisturbed):
    loaders = [make(url, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [len(loader) for loader in loaders] == [STEPS[0]] * world_size
    joined = []
    for parts in zip(*(take(loader, 12) for loader in loaders), strict=True):
        joined += [row for part in parts for row in rows([part])]
    assert joined == undisturbed[: 12 * BATCH]


def test_length_is_the_steps_of_the_epoch_that_comes_next(url):
    loader = make(url)
    for epoch, steps in enumerate(STEPS):
        assert (loader.epoch, len(loader)) == (epoch, steps)
        assert len(list(loader)) == steps


@pytest.mark.parametrize("tail, steps", [("drop_last", 5), ("pad", 6)])
def test_tails_end_each_epoch_alike(tail, steps, url):
    loader = make(url, tail=tail)
    for epoch in range(3):
        assert loader.epoch == epoch
        batches = list(loader)
        assert len(batches) == steps
        real = [bool((row != -100).any()) for batch in batches for row in batch["labels"]]
        assert sum(real) == (NUM if tail == "pad" else 20)


def test_shorter_sequences_are_cut_by_the_loader(url):
    batch = next(iter(make(url, sequence_length=16)))
    assert batch["input_ids"].shape == (BATCH, 16)


def saved_after(loader, count):
    """Takes batches and gives the state as a checkpoint would bring it back."""
    batches = take(loader, count)
    return batches, json.loads(json.dumps(loader.state_dict()))


@pytest.mark.parametrize("stop", range(13))
def test_run_continues_after_any_batch_and_again(stop, url, undisturbed):
    # Batches are made ahead by three threads when the first run stops.
    _, state = saved_after(make(url, decode_threads=3), stop)
    second = make(url, decode_threads=1)
    second.load_state_dict(state)
    batches, state = saved_after(second, 2)
    assert rows(batches) == undisturbed[stop * BATCH : (stop + 2) * BATCH]
    third = make(url, decode_threads=2)
    third.load_state_dict(state)
    assert rows(take(third, 3)) == undisturbed[(stop + 2) * BATCH : (stop + 5) * BATCH]


@pytest.mark.parametrize("stop", [0, 3, 6, 11])
@pytest.mark.parametrize("before, after", [(1, 4), (4, 2), (2, 1)])
def test_run_continues_with_another_number_of_ranks(stop, before, after, url, undisturbed):
    states = []
    for rank in range(before):
        states.append(saved_after(make(url, rank=rank, world_size=before), stop)[1])
    assert all(state == states[0] for state in states)
    loaders = [make(url, rank=rank, world_size=after) for rank in range(after)]
    for loader in loaders:
        loader.load_state_dict(states[0])
    joined = []
    for parts in zip(*(take(loader, 4) for loader in loaders), strict=True):
        joined += [row for part in parts for row in rows([part])]
    assert joined == undisturbed[stop * BATCH : (stop + 4) * BATCH]


def test_state_in_the_loop_counts_the_batch_in_hand_as_done(url, undisturbed):
    loader = make(url, decode_threads=3)
    for step, batch in enumerate(loader):
        inside = loader.state_dict()
        assert inside["step"] == step + 1
        assert rows([batch]) == undisturbed[step * BATCH : (step + 1) * BATCH]
        if step == 2:
            break
    assert loader.state_dict() == inside
    assert rows(take(loader, 1)) == undisturbed[3 * BATCH : 4 * BATCH]


def test_loop_that_was_left_continues_with_the_next_batch(url, undisturbed):
    loader = make(url, decode_threads=4)
    batches = []
    while len(batches) < 6:
        for batch in loader:
            batches.append(batch)
            break
    assert rows(batches) == undisturbed[: 6 * BATCH]


def test_state_at_the_end_of_an_epoch_begins_the_next_one(url, undisturbed):
    loader = make(url)
    for _ in loader:
        state = loader.state_dict()  # in the last turn: the epoch is done
    assert state == loader.state_dict()
    resumed = make(url)
    resumed.load_state_dict(state)
    assert (resumed.epoch, len(resumed)) == (1, STEPS[1])
    batches = list(resumed)
    assert len(batches) == STEPS[1]
    assert rows(batches) == undisturbed[6 * BATCH : 12 * BATCH]


def test_state_is_a_few_hundred_bytes_of_plain_json(url):
    loader = make(url)
    take(loader, 8)
    state = loader.state_dict()
    text = json.dumps(state)
    assert len(text) < 1024
    assert json.loads(text) == state
    assert next(iter(state)) == "version"


def test_state_can_be_loaded_where_it_came_from(url, undisturbed):
    loader = make(url)
    take(loader, 3)
    state = loader.state_dict()
    take(loader, 5)
    loader.load_state_dict(state)
    assert rows(take(loader, 2)) == undisturbed[3 * BATCH : 5 * BATCH]


@pytest.mark.parametrize(
    "options, fields",
    [
        ({"seed": 8}, ["state.seed: 7 here, 8 asked", "state.order.seed"]),
        ({"global_batch_size": 8}, ["state.order.global_batch_size: 4 here, 8 asked"]),
        ({"tail": "pad"}, ["state.order.tail: wrap here, pad asked"]),
    ],
)
def test_state_of_other_settings_is_refused_field_by_field(options, fields, url):
    state = make(url).state_dict()
    loader = make(url, **options)
    own = loader.state_dict()
    with pytest.raises(StateError) as caught:
        loader.load_state_dict(state)
    assert caught.value.reason == "state_mismatch"
    for field in fields:
        assert field in caught.value.facts["differences"]
    assert loader.state_dict() == own


def test_state_of_other_data_is_refused(url, samples, write_dataset, tmp_path):
    fewer = write_dataset(tmp_path / "fewer", samples[:-1], several=True)
    renamed = write_dataset(tmp_path / "renamed", samples, several=True, num_shards=3, name="other")
    for other, field in (
        (fewer, "state.data.num_samples"),
        (renamed, "state.data.dataset: tiny here"),
    ):
        with pytest.raises(StateError) as caught:
            make(other).load_state_dict(make(url).state_dict())
        assert caught.value.reason == "state_mismatch"
        assert field in caught.value.facts["differences"]


@pytest.mark.parametrize("version", [0, 1, 3, None])
def test_state_of_another_version_is_refused(version, url):
    loader = make(url)
    with pytest.raises(StateError) as caught:
        loader.load_state_dict({**loader.state_dict(), "version": version})
    assert caught.value.reason == "state_version"
    assert caught.value.facts == {"got": version, "want": 2}


def test_state_without_a_field_is_refused(url):
    loader = make(url)
    for name in ("seed", "data", "order"):
        state = {k: v for k, v in loader.state_dict().items() if k != name}
        with pytest.raises(StateError) as caught:
            loader.load_state_dict(state)
        assert f"state.{name}" in caught.value.facts["differences"]


def test_leaving_the_loop_early_ends_the_threads(url):
    loader = make(url, decode_threads=4)
    for _ in loader:
        assert decode_threads()
        break
    assert decode_threads() == []


def test_failing_training_step_ends_the_threads_too(url):
    loader = make(url, decode_threads=4)

    def train():
        for _ in loader:
            raise KeyError("the training step failed")

    with pytest.raises(KeyError):
        train()
    assert decode_threads() == []
    list(loader)
    assert decode_threads() == []


def break_sample(url, number):
    """Flips a byte of a sample; gives its key."""
    entry = require_manifest(url).shards[0]
    index = str(Path(url, entry.index_url))
    row = open_index(index, num_samples=entry.nsamples, shard_bytes=entry.num_bytes)[number]
    path = Path(url, entry.url)
    payload = bytearray(path.read_bytes())
    payload[int(row["offset"]) + 700] ^= 1
    path.write_bytes(payload)
    return row["key"].decode()


@pytest.fixture
def broken(samples, write_dataset, tmp_path):
    """A dataset with one broken sample, and the step it stands in."""
    url = write_dataset(tmp_path / "set", samples, several=True)
    keys = [row[0] for row in rows(make(url))]
    key = break_sample(url, 13)
    return url, key, keys.index(key) // BATCH


@pytest.mark.parametrize("num_threads", [1, 4])
def test_broken_sample_stops_the_loop_with_its_own_error(num_threads, broken):
    url, key, step = broken
    loader = make(url, decode_threads=num_threads, check="crc")
    for _ in range(2):  # it is met again: the state stands in front of it
        with pytest.raises(ShardError) as caught:
            list(loader)
        assert caught.value.reason == "sample_crc"
        assert caught.value.where.endswith(key)
        assert loader.state_dict()["step"] == step
        assert decode_threads() == []


@pytest.mark.slow
def test_worker_processes_give_the_same_batches_and_their_own_errors(url, undisturbed, broken):
    _, state = saved_after(make(url), 2)
    loader = make(url, workers=2)
    loader.load_state_dict(state)
    batches = []
    for batch in loader:
        batches.append(batch)
        assert loader.state_dict()["step"] == 2 + len(batches)
    assert rows(batches) == undisturbed[2 * BATCH : 6 * BATCH]
    strides = {batch["images"].stride()[2:] for batch in (*batches, *make(url))}
    assert strides == {(1, 28 * 3, 3)}  # channels last on this side of the queue too
    assert len(multiprocessing.active_children()) == 2
    loader.close()
    assert multiprocessing.active_children() == []

    broken_url, key, step = broken
    loader = make(broken_url, workers=1, check="crc")
    with pytest.raises(ShardError) as caught:
        list(loader)
    assert caught.value.reason == "sample_crc"
    assert caught.value.where.endswith(key)
    assert loader.state_dict()["step"] == step
    assert multiprocessing.active_children() == []


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_can_be_left_and_resumed_at_any_batch(workers, url, undisturbed):
    for stop in (5, 6):
        batches, state = saved_after(make(url, workers=workers), stop)
        assert rows(batches) == undisturbed[: stop * BATCH]
        loader = make(url, workers=3 - workers)
        loader.load_state_dict(state)
        assert rows(take(loader, 3)) == undisturbed[stop * BATCH : (stop + 3) * BATCH]


@pytest.mark.parametrize("batch, near", [(6, "4 or 8"), (3, "4"), (9, "8 or 12")])
def test_batch_that_ranks_cannot_share_is_refused_with_the_nearest_ones(batch, near, url):
    with pytest.raises(ConfigError) as caught:
        make(url, rank=1, world_size=4, global_batch_size=batch)
    assert caught.value.reason == "batch_not_divisible"
    assert caught.value.facts["global_batch_size"] == batch
    assert caught.value.facts["world_size"] == 4
    assert caught.value.facts["near"] == near
    assert near in caught.value.fix


@pytest.mark.parametrize("batch", [0, -4])
def test_batch_below_1_is_refused(batch, url):
    with pytest.raises(ConfigError) as caught:
        make(url, global_batch_size=batch)
    assert caught.value.reason == "order_count"


def test_dataset_that_was_given_stays_as_it_is(url):
    dataset = StreamingDataset(url, batch_size=2)
    before = dataclasses.replace(dataset.view)
    make_dataloader(dataset, global_batch_size=2, sequence_length=32)
    assert (dataset._stream.batch_size, dataset.view) == (2, before)


def test_only_the_iterator_begun_last_continues(url, undisturbed):
    loader = make(url)
    first = iter(loader)
    got = [next(first)]
    second = iter(loader)
    got += [next(second)]
    with pytest.raises(StateError) as caught:
        next(first)
    assert caught.value.reason == "stale_iterator"
    got += second
    assert rows(got) == undisturbed[: STEPS[0] * BATCH]
    assert decode_threads() == []


@pytest.mark.parametrize("go", ["load_state_dict", "change"])
def test_loader_that_goes_elsewhere_ends_the_pass_under_way(go, url):
    loader = make(url)
    state = loader.state_dict()
    batches = iter(loader)
    next(batches)
    if go == "change":
        loader.change(global_batch_size=8)
    else:
        loader.load_state_dict(state)
    with pytest.raises(StateError) as caught:
        next(batches)
    assert caught.value.reason == "stale_iterator"
    assert loader.step == (go == "change")


def test_after_the_last_batch_of_an_epoch_the_loader_may_change_without_leaving_the_loop(url):
    loader = make(url)
    for _ in loader:
        if loader.epoch == 1:
            loader.change(global_batch_size=8)
    assert loader.step == STEPS[0]
    assert len(next(iter(loader))["input_ids"]) == 8


@pytest.mark.parametrize(
    "options", [{}, {"pack": True}, {"bucket_steps": 2}, {"decode_threads": 0}]
)
def test_a_loader_that_is_pickled_within_a_pass_continues_elsewhere(url, options):
    loader = make(url, **options)
    loader.watch(lambda step, stats: None, every_steps=1)  # not picklable, and of this process
    want = rows(take(make(url, **options), 4))
    running = iter(loader)
    begun = rows([next(running)])
    copy = pickle.loads(pickle.dumps(loader))
    assert copy.state_dict() == loader.state_dict()
    assert begun + rows(take(copy, 3)) == want
    rest = rows(running)
    assert rest
    assert (begun + rest)[: len(want)] == want[: len(begun + rest)]


@pytest.mark.parametrize(
    "world_size, options",
    [(1, {}), (2, {}), (4, {}), (1, {"workers": 1}), (2, {"bucket_steps": 3})],
)
def test_rows_that_fill_an_evaluation_are_flagged_and_have_no_key(url, world_size, options):
    keys = []
    for rank in range(world_size):
        for batch in make(url, tail="pad", rank=rank, world_size=world_size, **options):
            real = batch["real"]
            assert real.dtype == torch.bool
            assert real.tolist() == (batch["labels"] != -100).any(dim=1).tolist()
            found = [one["key"] for one in batch["metadata"]]
            assert [key is not None for key in found] == real.tolist()
            keys += [key for key in found if key is not None]
    assert sorted(keys) == [f"sample-{i:04d}" for i in range(NUM)]


@pytest.mark.parametrize("tail", ["wrap", "drop_last"])
def test_batches_without_fill_rows_have_no_flag(url, tail):
    assert "real" not in next(iter(make(url, tail=tail)))


def test_a_share_with_pairs_beyond_chance_is_warned_of_once_with_the_remedy(
    tiny_sample, write_dataset, tmp_path, caplog
):
    samples = [tiny_sample(i, num_images=0) for i in range(400)]
    url = write_dataset(tmp_path / "set", samples, num_shards=40)

    def make_it(batch, *, rank=0, world_size=1, **options):
        caplog.clear()
        dataset = StreamingDataset(
            url, canonical_ranks=1, rank=rank, world_size=world_size, **options
        )
        loader = make_dataloader(dataset, global_batch_size=batch, sequence_length=64)
        return loader, [record.getMessage() for record in caplog.records]

    _, (message,) = make_it(2, active_blocks=3)
    assert "active_blocks=4 (a multiple of 2), block_size=1" in message
    for quiet in ({}, {"active_blocks": 4}, {"active_blocks": 3, "block_size": 1}):
        assert make_it(2, **quiet)[1] == []
    assert make_it(4, active_blocks=6, rank=1, world_size=2)[1] == []
    loader, messages = make_it(3, active_blocks=3)
    assert messages == []
    loader.step = 3
    loader.change(global_batch_size=2)
    assert "times as many pairs" in caplog.text


def test_packs_and_mixtures_that_clump_are_warned_of_once_with_the_remedy(
    tiny_sample, write_dataset, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr("loader.order.pattern._MIN_PATTERN_SLOTS", 1)
    urls = [
        write_dataset(
            tmp_path / name,
            [tiny_sample(i, num_images=0) for i in range(800)],
            num_shards=80,
            name=name,
        )
        for name in ("one", "two")
    ]

    def messages(batch, *, mixed=False, rank=0, **options):
        caplog.clear()
        one = StreamingDataset(urls[0], canonical_ranks=1, rank=rank, world_size=2, **options)
        if mixed:
            parts = [StreamingDataset(url, rank=rank, world_size=2) for url in urls]
            one = IterableDatasetMixture(parts, seed=1, canonical_ranks=1, **options)
        loader = make_dataloader(one, global_batch_size=batch, sequence_length=32, pack=not mixed)
        for _ in itertools.islice(loader, 3):
            pass
        found = [record.getMessage() for record in caplog.records]
        return [text for text in found if "as many pairs" in text]

    (packs,) = messages(2)
    assert "packs are filled from windows of 256 samples" in packs
    assert "active_blocks=" in packs or "block_size=1" in packs
    assert messages(2, rank=1) == messages(2, block_size=1) == []
    (mixture,) = messages(4, mixed=True)
    assert "a lane takes 4 samples at once" in mixture
    assert "make reshard ORDER=shuffle" in mixture
    assert messages(4, mixed=True, rank=1) == []
