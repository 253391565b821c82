"""Datasets added to a mixture, removed from it, listed otherwise: every other keeps its place."""

import itertools
import json
from collections import defaultdict

import pytest

from loader.dataloader import make_dataloader
from loader.mixture_stream import IterableDatasetMixture
from loader.stream import StreamingDataset
from shardspec.errors import StateError

SIZES = {"ant": 60, "bee": 150, "cat": 20, "dog": 90}
BATCH = 12


@pytest.fixture(autouse=True, scope="module")
def short_pattern():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loader.order.pattern._MIN_PATTERN_SLOTS", 1)
        yield


@pytest.fixture(scope="module")
def urls(tiny_sample, write_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("members")
    return {
        name: write_dataset(
            folder / name,
            [tiny_sample(1000 * n + i, num_images=0) for i in range(size)],
            num_shards=2,
            name=name,
        )
        for n, (name, size) in enumerate(SIZES.items())
    }


def make(urls, names, *, rank=0, world_size=1, batch=BATCH, nested=False, stop=1000, **options):
    parts = [StreamingDataset(urls[name], rank=rank, world_size=world_size) for name in names]
    if nested and len(parts) > 1:
        parts = [parts[0], IterableDatasetMixture(parts[1:], by="size", seed=0)]
    whole = IterableDatasetMixture(parts, by="root_size", seed=3, stop=stop, canonical_ranks=12)
    return make_dataloader(
        whole,
        global_batch_size=batch,
        sequence_length=64,
        with_metadata=True,
        decode_threads=0,
        **options,
    )


def rows(batch):
    """The samples of each row of a batch: (dataset, key)."""
    found = []
    for entry in batch["metadata"]:
        found.append([(one["dataset"], one["key"]) for one in entry.get("examples", [entry])])
    return found


def run(urls, names, *, count, world_size=1, state=None, allow=(), **options):
    """Gives the global batches of a run, and its state as it is saved."""
    parts, states = [], []
    for rank in range(world_size):
        loader = make(urls, names, rank=rank, world_size=world_size, **options)
        if state is not None:
            loader.load_state_dict(state, allow=allow)
        parts.append([rows(batch) for batch in itertools.islice(loader, count)])
        states.append(json.loads(json.dumps(loader.state_dict())))
    assert all(one == states[0] for one in states)
    return [[row for part in step for row in part] for step in zip(*parts, strict=True)], states[0]


CHANGES = {
    "add": (("ant", "bee"), ("ant", "bee", "dog")),
    "remove": (("ant", "bee", "cat"), ("ant", "cat")),
    "list otherwise": (("ant", "bee", "dog"), ("dog", "ant", "bee")),
    "all three": (("ant", "bee", "cat"), ("dog", "cat", "ant")),
}
KINDS = {"plain": {}, "nested": {"nested": True}, "packed": {"pack": True}}
EVERYDAY = {("packed", "all three"), *(("plain", change) for change in CHANGES)}
"""Packs take most of the time: every day one change adds, removes and lists otherwise."""


def shown(batches):
    keys = defaultdict(list)
    for dataset, key in itertools.chain.from_iterable(itertools.chain.from_iterable(batches)):
        keys[dataset].append(key)
    return keys


@pytest.mark.parametrize(
    "kind, change",
    [
        pytest.param(*case, marks=() if case in EVERYDAY else pytest.mark.slow)
        for case in itertools.product(KINDS, CHANGES)
    ],
)
def test_each_dataset_continues_at_its_own_place(change, kind, urls):
    """In the middle of epochs, on other ranks, and with a return to all datasets."""
    options, (before, after) = KINDS[kind], CHANGES[change]
    first, state = run(urls, before, count=7, **options)
    if kind == "plain" and change == "list otherwise":
        undisturbed, _ = run(urls, before, count=11, **options)
    with pytest.raises(StateError) as caught:
        run(urls, after, count=0, state=state, **options)
    assert caught.value.reason == "state_mixture"
    assert 'allow=("mixture",)' in caught.value.fix
    assert set(caught.value.facts.get("added", [])) == set(after) - set(before)
    assert set(caught.value.facts.get("removed", [])) == set(before) - set(after)

    second, later = run(urls, after, count=4, state=state, allow=("mixture",), **options)
    for world_size in (3,) if kind == "packed" else (2, 3):
        again = run(
            urls, after, count=4, state=state, allow=("mixture",), world_size=world_size, **options
        )
        if kind == "packed":  # packs are exchanged between ranks
            assert [sorted(step) for step in again[0]] == [sorted(step) for step in second]
        else:
            assert again == (second, later)
    if kind == "plain" and change == "list otherwise":
        assert second == undisturbed[7:]
    # From here on nothing needs to be allowed.
    third, later = run(urls, after, count=3, state=later, world_size=3, **options)
    everyone = tuple(dict.fromkeys((*before, *after)))
    allow = () if everyone == after else ("mixture",)
    count = 2 if kind == "packed" else 40
    last, _ = run(urls, everyone, count=count, state=later, allow=allow, **options)

    keys = shown([*first, *second, *third, *last])
    assert set(shown(second)) == set(after)
    for name in everyone:
        if kind == "packed":
            continue  # a window mixes the epochs of such small datasets
        size = SIZES[name]
        assert len(keys[name]) > size, name
        for start in range(0, len(keys[name]) - size + 1, size):
            assert len(set(keys[name][start : start + size])) == size


def test_packs_begin_again_with_samples_that_no_pack_has_read(urls, caplog):
    """No slot of a dataset comes twice; what slower streams had not packed is left out, counted."""
    shown, begins, state, counted = [], [], None, 0
    for names in (("ant", "bee", "cat"), ("dog", "cat", "ant"), ("ant", "bee", "cat", "dog")):
        loader = make(urls, names, pack=True)
        if state is not None:
            caplog.clear()
            loader.load_state_dict(state, allow=("mixture",))
            packing = loader.state_dict()["packing"]
            # Slots of the order before the step that packs begin with.
            left_out = packing["begins"][1] * BATCH - len(shown)
            assert 0 < left_out <= packing["left_out"]
            run = packing["window"] * packing["windows_per_run"]
            assert packing["left_out"] - counted <= left_out - counted + 12 * run
            (text,) = caplog.messages
            assert f"at most {packing['left_out'] - counted} samples" in text
            counted = packing["left_out"]
            make(urls, names, pack=True).load_state_dict(loader.state_dict())
            assert len(caplog.messages) == 1  # nothing more is left out
        for step in range(loader.step, loader.step + 9):
            refs = [ref for row in loader.places(step) for ref in row]
            shown += [(names[ref.dataset], ref.epoch, ref.sample) for ref in refs]
            (batch,) = itertools.islice(loader, 1)
            assert sum(map(len, rows(batch))) == len(refs)
        state = json.loads(json.dumps(loader.state_dict()))
        begins.append(state["packing"]["begins"][0])
    assert begins == [0, 9, 18]
    assert len(set(shown)) == len(shown)
    # Per dataset, epochs of the later parts continue those of the first.
    for name in ("ant", "cat"):
        epochs = [epoch for dataset, epoch, _ in shown if dataset == name]
        assert epochs[-1] > epochs[len(epochs) // 2] > 0


def test_a_removed_dataset_waits_in_the_state_for_its_return(urls):
    _, state = run(urls, ("ant", "bee"), count=5)
    _, alone = run(urls, ("ant",), count=5, state=state, allow=("mixture",))
    assert alone["removed"] == {"bee": state["data"]["bee"]}
    assert set(alone["data"]) == set(alone["view"]) == {"ant"}
    _, again = run(urls, ("bee", "ant"), count=0, state=alone, allow=("mixture",))
    assert "removed" not in again
    assert set(again["data"]) == {"ant", "bee"}


def test_a_removed_dataset_that_returns_with_other_data_is_refused(
    urls, tiny_sample, write_dataset, tmp_path
):
    _, state = run(urls, ("ant", "bee"), count=5)
    _, alone = run(urls, ("ant",), count=2, state=state, allow=("mixture",))
    other = [tiny_sample(9000 + i, num_images=0) for i in range(140)]
    others = {**urls, "bee": write_dataset(tmp_path / "bee", other, name="bee")}
    with pytest.raises(StateError) as caught:
        run(others, ("ant", "bee"), count=1, state=alone, allow=("mixture",))
    assert caught.value.reason == "state_mismatch"
    assert "state.data.bee.keys" in caught.value.facts["differences"]


@pytest.mark.slow
def test_worker_processes_of_a_pass_make_what_a_state_of_other_members_says(urls):
    """What they had made ahead is dropped; they stay, for the new order too."""
    names = ("dog", "cat", "ant")
    _, state = run(urls, ("ant", "bee", "cat"), count=7)
    want, _ = run(urls, names, count=4, state=state, allow=("mixture",))
    loader = make(urls, names, workers=1)
    list(itertools.islice(loader, 2))
    crew = loader._crew
    loader.load_state_dict(state, allow=("mixture",))
    assert [rows(batch) for batch in itertools.islice(loader, 4)] == want
    assert loader._crew is crew is not None
    loader.change(weights=[0, 1, 0])
    assert set(shown([rows(batch) for batch in itertools.islice(loader, 1)])) == {"cat"}
    loader.close()


def test_weights_alone_may_differ_too_and_the_batch_with_them(urls):
    _, state = run(urls, ("ant", "bee"), count=5)
    loader = make(urls, ("ant", "bee", "cat"), batch=24)
    loader.load_state_dict(state, allow=("mixture", "order"))
    (batch,) = (rows(batch) for batch in itertools.islice(loader, 1))
    assert len(batch) == 24
    assert set(shown([batch])) == {"ant", "bee", "cat"}
    with pytest.raises(StateError) as caught:
        make(urls, ("ant", "bee", "cat"), batch=24).load_state_dict(state, allow=("mixture",))
    assert caught.value.reason == "state_mismatch"


def test_records_of_bad_samples_follow_their_datasets(urls):
    _, state = run(urls, ("ant", "bee", "cat"), count=5)
    texts = {"shard": "a.tar", "key": "k", "stage": "layout", "reason": "too_long"}
    state["bad"] = [{**texts, "dataset": n, "sample": 1, "step": 2} for n in (0, 1, 2)]
    loader = make(urls, ("cat", "ant"))
    loader.load_state_dict(state, allow=("mixture",))
    assert [record["dataset"] for record in loader.bad_samples] == [1, 0]


@pytest.mark.slow
def test_changes_that_end_leave_nothing_and_fifty_take_no_more_than_three(urls):
    names = ("ant", "bee", "cat", "dog")
    state, sizes, keys = None, [], defaultdict(list)
    for i in range(50):
        here = [name for n, name in enumerate(names) if n == 0 or (i >> (n - 1)) & 1 == 0]
        batches, state = run(urls, here, count=5, state=state, allow=("mixture",) if i else ())
        sizes.append(len(json.dumps(state)))
        for name, more in shown(batches).items():
            keys[name] += more
    for name, size in SIZES.items():
        for start in range(0, len(keys[name]) - size + 1, size):
            assert len(set(keys[name][start : start + size])) == size, name
    assert max(sizes[25:]) <= 1.2 * max(sizes[:25])


def test_packs_of_ranks_that_plan_their_own_streams_only_need_all_of_them(urls):
    loader = make(urls, ("ant", "bee"), world_size=2, pack=True, balance=False)
    list(itertools.islice(loader, 2))
    with pytest.raises(StateError) as caught:
        make(urls, ("ant",), pack=True).load_state_dict(loader.state_dict(), allow=("mixture",))
    assert caught.value.reason == "state_mixture"
    assert "balance=True" in caught.value.fix


@pytest.mark.parametrize(
    "field, value",
    [
        *(("begins", begins) for begins in (None, 3, [1], ["a", 2], [0, 0, 0])),
        *(("left_out", count) for count in (None, -1, 1.5, "a", 2**60)),
    ],
)
def test_a_damaged_field_is_named(field, value, urls):
    state = make(urls, ("ant", "bee"), pack=True).state_dict()
    state["packing"][field] = value
    with pytest.raises(StateError) as caught:
        make(urls, ("ant", "bee"), pack=True).load_state_dict(state)
    assert caught.value.reason == "state_fields"
