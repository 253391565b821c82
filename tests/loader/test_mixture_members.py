"""Datasets added to a mixture, removed from it, listed otherwise: every other keeps its place."""

import itertools
import json
import random
from collections import defaultdict

import pytest

from loader.dataloader import make_dataloader
from loader.mixture_stream import IterableDatasetMixture
from loader.stream import StreamingDataset
from shardspec.errors import ConfigError, StateError

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


def make(
    urls,
    names,
    *,
    rank=0,
    world_size=1,
    batch=BATCH,
    nested=False,
    stop=1000,
    weights=None,
    canonical_ranks=12,
    sequence_length=64,
    alone=False,
    by="root_size",
    **options,
):
    parts = [StreamingDataset(urls[name], rank=rank, world_size=world_size) for name in names]
    if nested and len(parts) > 1:
        parts = [parts[0], IterableDatasetMixture(parts[1:], by="size", seed=0)]
    whole = IterableDatasetMixture(
        parts, weights, by=by, seed=3, stop=stop, canonical_ranks=canonical_ranks
    )
    if alone:  # no mixture at all
        (url,), topology = map(urls.get, names), {"rank": rank, "world_size": world_size}
        whole = StreamingDataset(url, seed=3, canonical_ranks=canonical_ranks, **topology)
    return make_dataloader(
        whole,
        global_batch_size=batch,
        sequence_length=sequence_length,
        with_metadata=True,
        decode_threads=0,
        **options,
    )


def rows(batch):
    """The samples of each row of a batch: (dataset, key)."""
    found = []
    for entry in batch["metadata"]:
        found.append([(one.get("dataset"), one["key"]) for one in entry.get("examples", [entry])])
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


def deliver(loader, names, *, count):
    """Takes batches, and lists what is in them: (dataset, epoch, sample)."""
    found = []
    for step in range(loader.step, loader.step + count):
        refs = [ref for row in loader.places(step) for ref in row]
        found += [(names[ref.dataset], ref.epoch, ref.sample) for ref in refs]
    batches = itertools.chain.from_iterable(itertools.repeat(loader))  # pass after pass
    delivered = sum(len(row) for batch in itertools.islice(batches, count) for row in rows(batch))
    assert delivered == len(found)
    return found


def require_each_once(shown, loader, names, kept):
    """Every sample of a kept dataset has been delivered once per epoch, or is still to come."""
    assert len(set(shown)) == len(shown)
    of_kept = [one for one in shown if one[0] in kept]
    last = {name: max(epoch for d, epoch, _ in of_kept if d == name) for name in kept}
    want = {(d, epoch, i) for d in kept for epoch in range(last[d] + 1) for i in range(SIZES[d])}
    missing, step = want - set(of_kept), loader.step
    shown = set(shown)
    while missing:
        assert step < loader.step + 400, sorted(missing)[:9]
        for ref in itertools.chain.from_iterable(loader.places(step)):
            one = (names[ref.dataset], ref.epoch, ref.sample)
            assert one not in shown
            shown.add(one)
            missing.discard(one)
        step += 1


# The slots of four streams, eight each, all of them left.
BACKLOG = {"first": [0] * 4, "spans": [8] * 4, "slots": "eNr7////fwAJ+AP9"}
PACKED = {"pack": True, "batch": 4, "canonical_ranks": 4, "stop": "first_exhausted"}


def change_members(urls, parts, *, between=lambda state: None, **options):
    """Runs packed mixtures one after the other: [(datasets, weights or None, steps)]."""
    shown, state = [], None
    for names, weights, count in parts:
        loader = make(urls, names, weights=weights, **{**PACKED, **options})
        if state is not None:
            loader.load_state_dict(state, allow=("mixture",))
        shown += deliver(loader, names, count=count)
        state = json.loads(json.dumps(loader.state_dict()))
        between(state)
    return shown, loader, names, state


CHANGED = {
    "add": [(("ant", "bee"), None, 9), (("ant", "bee", "dog"), None, 9)],
    "remove": [(("ant", "bee", "cat"), None, 11), (("ant", "cat"), None, 9)],
    "weights": [(("ant", "bee"), None, 9), (("ant", "bee"), (1, 5), 7), (("ant", "bee"), None, 3)],
    "pause": [
        (("ant", "bee", "cat"), None, 9),
        (("ant", "bee", "cat"), (1, 0, 1), 9),
        (("ant", "bee", "cat"), None, 0),
    ],
    "list otherwise": [(("ant", "bee", "dog"), None, 9), (("dog", "ant", "bee"), None, 9)],
    "return": [
        (("ant", "bee", "cat"), None, 7),
        (("dog", "cat", "ant"), None, 1),
        (("ant", "bee", "cat", "dog"), None, 0),
        (("bee", "cat", "ant", "dog"), None, 9),
    ],
}


@pytest.mark.parametrize("change", CHANGED)
def test_packs_deliver_each_sample_of_datasets_that_stay_once_per_epoch(change, urls):
    """What streams had read and not delivered is delivered after the change."""
    parts = CHANGED[change]
    shown, loader, names, state = change_members(urls, parts)
    kept = set.intersection(*(set(part[0]) for part in parts))
    require_each_once(shown, loader, names, kept)
    # The rest of the run is the same from its state, on other ranks and without `allow`.
    options = {**PACKED, "weights": parts[-1][1]}
    again, _ = run(urls, names, count=2, state=state, world_size=2, **options)
    here = [sorted(rows(batch)) for batch in itertools.islice(loader, 2)]
    assert [sorted(step) for step in again] == here


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_packs_of_random_mixtures_lose_nothing_in_random_changes(seed, urls):
    draw = random.Random(seed)
    everyone = tuple(SIZES)
    kept = draw.sample(everyone, draw.randint(1, 3))
    parts = []
    for _ in range(draw.randint(2, 6)):
        others = [name for name in everyone if name not in kept and draw.random() < 0.5]
        names = (*kept, *others)
        names = draw.sample(names, len(names))
        weights = None if draw.random() < 0.5 else [draw.uniform(0.2, 3) for _ in names]
        parts.append((names, weights, draw.choice((0, 1, 2, 9, 25, 60))))
    ranks = draw.choice((1, 2, 4))
    options = {"canonical_ranks": ranks, "batch": ranks * draw.choice((1, 2))}
    require_each_once(*change_members(urls, parts, **options)[:3], kept)


def test_packs_leave_out_of_removed_datasets_what_streams_had_passed(urls, caplog):
    parts = [
        (("ant", "bee", "cat"), None, 9),
        (("ant", "cat"), None, 5),
        (("ant", "bee"), None, 0),
    ]
    counts = []
    shown, loader, names, state = change_members(
        urls, parts, between=lambda state: counts.append(state["packing"]["left_out"])
    )
    assert counts[0] == 0 < counts[1] <= counts[2]
    assert [int(text.split(": ")[1].split()[0]) for text in caplog.messages] == [
        count - before for before, count in itertools.pairwise(counts) if count > before
    ]
    assert len(set(shown)) == len(shown)
    # A weight of 0 first, until nothing of it is left, leaves out nothing.
    parts[1:1] = [(("ant", "bee", "cat"), (1, 0, 1), 120)]
    shown, loader, names, state = change_members(urls, parts[:3])
    assert state["packing"]["left_out"] == 0


# What else may change of a run with packs: settings of the loader, `allow`, and why it is refused.
OTHERWISE = {
    "ranks": ({"world_size": 2}, (), None),
    "ranks without exchange": ({"world_size": 4, "balance": False}, (), None),
    "exchange": ({"balance": "images"}, (), None),
    "padding": ({"pad_mode": "max_len"}, ("view",), None),
    "batch": ({"batch": 8}, (), "state_mismatch"),
    "batch allowed": ({"batch": 8}, ("order",), "state_mismatch"),
    "width": ({"canonical_ranks": 2}, ("order",), "state_canonical_ranks"),
    "batch and members": ({"batch": 8}, ("order", "mixture"), "state_mismatch"),
    "length": ({"sequence_length": 48}, ("view", "order", "mixture"), "state_mismatch"),
    "crops": ({"max_crops": 3}, ("view", "order", "mixture"), "state_mismatch"),
    "no packs": ({"pack": False}, ("view", "order", "mixture"), "state_mismatch"),
    "appended": ({"batch": 8}, ("appended",), "state_mismatch"),
}


ALONE = {"one": True, "mixture": False}


@pytest.mark.parametrize("kind", ALONE)
@pytest.mark.parametrize("change", OTHERWISE)
def test_packs_of_other_settings_lose_nothing_or_are_refused_by_name(change, kind, urls):
    options, allow, reason = OTHERWISE[change]
    names = ("ant",) if ALONE[kind] else ("ant", "bee")
    shown, loader, _, state = change_members(urls, [(names, None, 3)], alone=ALONE[kind])
    other = make(urls, names, alone=ALONE[kind], **{**PACKED, **options})
    if reason is not None:
        with pytest.raises(StateError) as caught:
            other.load_state_dict(state, allow=allow)
        assert caught.value.reason == reason
        return
    other.load_state_dict(state, allow=allow)
    for step in range(loader.step, loader.step + 3):
        assert sorted(other.places(step)) == sorted(loader.places(step))
    if other.dataset._stream.topology.world_size == 1:
        shown += deliver(other, names, count=3)
        require_each_once(shown, other, names, set(names))


@pytest.mark.parametrize("kind", ALONE)
def test_packs_of_another_batch_come_once(kind, urls):
    names = ("ant",) if ALONE[kind] else ("ant", "bee")
    shown, loader, _, _ = change_members(urls, [(names, None, 3)], alone=ALONE[kind])
    for batch in (8, 12, 4):
        loader.change(global_batch_size=batch)
        shown += deliver(loader, names, count=2)
        state = loader.state_dict()
        loader = make(urls, names, alone=ALONE[kind], **{**PACKED, "batch": batch})
        loader.load_state_dict(state)
    require_each_once(shown, loader, names, set(names))
    with pytest.raises(ConfigError) as caught:
        loader.change(weights=[1] * len(names))
    assert caught.value.reason == "change_weights"


BEFORE = [
    ("ant", {}, [{"global_batch_size": 24}]),
    ("ant", {"pack": True}, [{"global_batch_size": 24}]),
    ("ant bee", {}, [{"global_batch_size": 24}]),
    ("ant bee", {"pack": True}, [{"global_batch_size": 24}]),
    ("ant bee", {"weights": (1, 5)}, [{"global_batch_size": 24}, {"weights": (1, 5)}]),
    ("ant bee", {"weights": (1, 5)}, [{"weights": (1, 5)}, {"global_batch_size": 24}]),
    ("ant bee", {"weights": (1, 5)}, [{"weights": (1, 5), "global_batch_size": 24}]),
]


@pytest.mark.parametrize("names, so, changes", BEFORE)
def test_a_change_before_the_first_step_is_as_if_the_loader_had_been_made_so(
    names, so, changes, urls
):
    names = tuple(names.split())
    so = {"canonical_ranks": None, "by": "rate", "alone": len(names) == 1, "stop": 3, **so}
    loader = make(urls, names, **{**so, "weights": None})
    for change in changes:
        loader.change(**change)
    made = make(urls, names, batch=24, **so)
    assert deliver(loader, names, count=3) == deliver(made, names, count=3)
    state = loader.state_dict()
    assert state == made.state_dict()
    want = deliver(made, names, count=3)
    for again in (loader, loader, made):
        again.load_state_dict(state)
        assert deliver(again, names, count=3) == want


def test_packs_continue_where_allow_meets_the_same_datasets(urls):
    names, others = ("ant", "bee", "dog"), ("dog", "ant", "bee")
    whole = make(urls, names, **PACKED)
    deliver(whole, names, count=9)
    state = whole.state_dict()
    want = deliver(whole, names, count=9)
    for listed in (names, others):
        loader = make(urls, listed, **PACKED)
        loader.load_state_dict(state, allow=("mixture",))
        assert deliver(loader, listed, count=9) == want


STOPS = (3, "first_exhausted", "all_exhausted", 1000)


@pytest.mark.parametrize("options", [{"bucket_steps": 2}, PACKED], ids=["buckets", "packs"])
def test_another_stop_moves_no_sample(options, urls):
    """Where passes end is no part of the order: it may differ when a state is loaded."""
    names, states, batches = ("ant", "bee"), [], []
    for stop in STOPS:
        loader = make(urls, names, **{**options, "stop": stop})
        batches.append(deliver(loader, names, count=11))
        states.append(loader.state_dict())
    assert all(one == states[0] for one in states)
    assert all(one == batches[0] for one in batches)


def test_steps_before_packs_began_anew_are_refused(urls):
    _, loader, _, _ = change_members(urls, CHANGED["add"])
    with pytest.raises(ConfigError) as caught:
        loader.places(8)
    assert caught.value.reason == "order_slot"
    assert caught.value.facts["since"] == 9


@pytest.mark.slow
def test_what_packs_have_left_does_not_grow_with_the_changes(urls):
    weights = [None, (1, 2), (3, 1)]
    parts = [(("ant", "bee"), weights[i % 3], 1 + i % 3) for i in range(20)]
    sizes = []
    shown, loader, names, _ = change_members(
        urls, parts, between=lambda state: sizes.append(len(json.dumps(state["packing"])))
    )
    require_each_once(shown, loader, names, set(names))
    assert max(sizes[10:]) < 1.5 * max(sizes[:10]) < 1_500


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
        *(("backlog", part) for part in (3, {}, {"first": [0], "spans": [8], "slots": "AA=="})),
        *(("backlog", {**BACKLOG, "slots": text}) for text in ("", None, "!", "AAAA")),
        *(("backlog", {**BACKLOG, "first": first}) for first in ([0, -1, 0, 0], [2**50, 0, 0, 0])),
        ("backlog", {**BACKLOG, "spans": [2**40] * 4}),
    ],
)
def test_a_damaged_field_is_named(field, value, urls):
    state = make(urls, ("ant", "bee"), **PACKED).state_dict()
    state["packing"][field] = value
    with pytest.raises(StateError) as caught:
        make(urls, ("ant", "bee"), **PACKED).load_state_dict(state)
    assert caught.value.reason == "state_fields"


@pytest.mark.parametrize("value", [None, 3, "", "!", "AAAA"])
def test_damaged_packs_of_a_state_are_named_where_they_matter(value, urls):
    loader = make(urls, ("ant", "bee"), **PACKED)
    deliver(loader, ("ant", "bee"), count=2)
    state = {**loader.state_dict(), "delivered": value}
    make(urls, ("ant", "bee"), **PACKED).load_state_dict(state)
    with pytest.raises(StateError) as caught:
        make(urls, ("ant",), **PACKED).load_state_dict(state, allow=("mixture",))
    assert caught.value.reason == "state_fields"
    assert caught.value.facts["field"] == "delivered"
