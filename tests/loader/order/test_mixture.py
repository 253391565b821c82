"""Mixtures: exact proportions for ever, exactly once per epoch, one answer for every topology."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import loader.order.mixture
import loader.order.pattern
from loader.order.interleave import MOST_DATASETS
from loader.order.mixture import MixtureOrder
from loader.order.mixture_config import MixtureChange, MixtureConfig, MixtureMember, plan_mixture
from loader.order.pattern import whole_weights
from loader.order.slots import rank_positions
from loader.order.weights import MixtureGroup, MixtureSource, mixture_weights
from shardspec.errors import ConfigError, StateError
from tests.examples import examples


def sources(sizes):
    return tuple(MixtureSource(name=f"d{i}", num_samples=n) for i, n in enumerate(sizes))


def mixed(sizes, *, by="root_size", batch=64, ranks=4, seed=1):
    group = MixtureGroup(sources=sources(sizes), by=by)
    return MixtureOrder(
        plan_mixture(group, global_batch_size=batch, seed=seed, canonical_ranks=ranks)
    )


def rows(order, steps, batch):
    """int64 [slots, 3]: dataset, epoch, sample."""
    slots = order.slots(np.asarray(steps)[:, None], np.arange(batch))
    return np.stack([slots.dataset, slots.epoch, slots.sample], axis=-1).reshape(-1, 3)


def require_exact_epochs(own, size):
    """Epoch e of a dataset is its slots e * N to (e + 1) * N - 1, and shows each sample once."""
    assert np.array_equal(own[:, 1], np.arange(len(own)) // size)
    whole = len(own) // size
    shown = np.sort(own[: whole * size, 2].reshape(whole, size), axis=1)
    assert (shown == np.arange(size)).all()
    rest = own[whole * size :, 2]
    assert len(np.unique(rest)) == len(rest)


SIZES = (37, 900, 3001, 20_000, 60_000)


def test_every_dataset_shows_every_sample_once_per_epoch():
    order = mixed(SIZES)
    assert [row["layout"] for row in order.describe()] == ["global"] * 2 + ["lanes"] * 3
    seen = rows(order, np.arange(4000), 64)
    for dataset, size in enumerate(SIZES):
        own = seen[seen[:, 0] == dataset]
        assert len(own) > 2 * size or dataset == 4
        require_exact_epochs(own, size)


@settings(max_examples=examples(15), deadline=None)
@given(
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=5),
    batch=st.sampled_from([2, 8, 24]),
    by=st.sampled_from(["rate", "root_size", "size"]),
)
def test_small_mixtures_repeat_nothing_inside_an_epoch(sizes, batch, by):
    order = mixed(sizes, by=by, batch=batch, ranks=2)
    seen = rows(order, np.arange(600), batch)
    for dataset, size in enumerate(sizes):
        require_exact_epochs(seen[seen[:, 0] == dataset], size)
    assert (seen[:, 2] < np.array(sizes)[seen[:, 0]]).all()
    assert np.array_equal(np.bincount(seen[:, 0], minlength=len(sizes)), order.counts(600))


def test_counts_in_closed_form_equal_counts_by_counting():
    order = mixed(SIZES)
    counts = np.zeros((4201, len(SIZES)), np.int64)
    dataset = rows(order, np.arange(4200), 64)[:, 0].reshape(4200, 64)
    for d in range(len(SIZES)):
        counts[1:, d] = (dataset == d).sum(axis=1).cumsum()
    for step in (0, 1, 63, 64, 4095, 4096, 4097, 4200):  # the pattern has 4096 batches
        assert np.array_equal(order.counts(step), counts[step])


MOST_OFF = 6
"""Samples that a dataset may be from its exact weight times the slots; see pattern.py."""


def farthest(weights, dataset, *, before=None, slots=0):
    """The most that a dataset is from its weight, over the prefixes that end in these slots.

    In whole numbers: a billion steps leave a float no place for a sample's fraction.
    """
    exact = whole_weights(weights)
    total, found = sum(exact), 0
    for d in np.unique(dataset).tolist():
        counted = 0 if before is None else int(before[d])
        for i, place in enumerate(np.flatnonzero(dataset == d).tolist()):
            # Between two of its samples it only falls back: farthest right before and after one.
            for count, x in ((counted + i, slots + place), (counted + i + 1, slots + place + 1)):
                found = max(found, abs(count * total - exact[d] * x))
    return found / total


PROPORTIONS = {
    "roots of sizes": [1.3 ** (i / 2) for i in range(40)],
    "one in a million": [1.0, 1e-6, 0.37, 1e-12],
    "many alike": [300.0, *[16.4] * 1000, 1.0],
    "one of one": [1.0],
    "whole": [0.5, 0.25, 0.25],
}


@pytest.mark.parametrize("name", PROPORTIONS)
@pytest.mark.parametrize("steps", [0, 1003, 10**6, 10**9, 2**50])
def test_counts_follow_the_weights_forever(name, steps):
    weights = PROPORTIONS[name]
    order = weighted(weights, batch=256, ranks=32)
    dataset = rows(order, np.arange(steps, steps + 40), 256)[:, 0]
    found = farthest(weights, dataset, before=order.counts(steps), slots=steps * 256)
    assert found <= (2 if name in ("whole", "one of one") else MOST_OFF)
    assert np.array_equal(
        order.counts(steps + 40) - order.counts(steps),
        np.bincount(dataset, minlength=len(weights)),
    )


def weighted(weights, *, size=5000, batch=64, ranks=4, seed=1):
    group = MixtureGroup(
        sources=tuple(
            MixtureSource(name=f"d{i}", num_samples=size, rate=weight)
            for i, weight in enumerate(weights)
        )
    )
    config = plan_mixture(group, global_batch_size=batch, seed=seed, canonical_ranks=ranks)
    # The weights as they are: those of a group are divided by their sum, and so rounded.
    members = [
        dataclasses.replace(member, weight=weight)
        for member, weight in zip(config.members, weights, strict=True)
    ]
    return MixtureOrder(dataclasses.replace(config, members=tuple(members)))


@settings(max_examples=examples(40), deadline=None)
@given(
    weights=st.lists(
        st.one_of(st.integers(1, 9), st.floats(1e-9, 1.0), st.sampled_from([1e-15, 1e15])),
        min_size=1,
        max_size=30,
    ),
    batch=st.sampled_from([2, 6, 48]),
    step=st.integers(0, 2**50),
)
def test_every_prefix_follows_the_weights_and_every_form_agrees(weights, batch, step):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loader.order.pattern._MIN_PATTERN_SLOTS", 1)  # 64 batches: many borders
        order = weighted(weights, batch=batch, ranks=2)
    pattern = order._segments[0].pattern
    slots = np.arange(step * batch, (step + 100) * batch)
    dataset, count, cell, in_cell = pattern.find(slots)
    before = order.counts(step)
    assert farthest(weights, dataset, before=before, slots=step * batch) <= MOST_OFF
    for d in np.unique(dataset).tolist():
        own = np.flatnonzero(dataset == d)
        assert np.array_equal(count[own], before[d] + np.arange(len(own)))
        cells = cell[own] - pattern.first_cell[d]
        for i in (0, len(own) // 2, len(own) - 1):
            assert pattern.slot_of(d, int(count[own[i]])) == slots[own[i]]
            assert pattern.cell_counts(d, int(count[own[i]]))[cells[i]] == in_cell[own[i]]
        counted = pattern.cell_counts(d, int(before[d]))
        assert counted.sum() == before[d]
        later = pattern.cell_counts(d, int(before[d]) + len(own))
        assert np.array_equal(later - counted, np.bincount(cells, minlength=len(counted)))


def test_the_order_is_that_of_a_set_of_datasets():
    """In which sequence they are listed changes their numbers and nothing else."""
    named = dict(zip("cabed", (300, 900, 900, 5000, 20_000), strict=True))

    def shown(names):
        group = MixtureGroup(
            sources=tuple(MixtureSource(name=n, num_samples=named[n]) for n in names),
            by="root_size",
        )
        order = MixtureOrder(plan_mixture(group, global_batch_size=24, seed=3, canonical_ranks=6))
        seen = rows(order, np.arange(12_000), 24)
        return np.array([ord(name) for name in names])[seen[:, 0]], seen[:, 1:]

    first = shown("abcde")
    for names in ("edcba", "cabed"):
        again = shown(names)
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_global_batches_are_the_same_for_every_number_of_ranks_and_at_every_resume():
    order = mixed(SIZES, batch=48, ranks=24)
    steps = np.arange(0, 5000, 7)
    whole = order.slots(steps[:, None], np.arange(48))
    resumed = MixtureOrder(MixtureConfig.from_dict(json.loads(json.dumps(order.config.to_dict()))))
    for world_size in (1, 2, 3, 4, 6, 8, 12, 24, 48):
        parts = [
            resumed.slots(steps[:, None], rank_positions(rank, world_size, 48))
            for rank in range(world_size)
        ]
        for name in ("dataset", "epoch", "sample"):
            joined = np.concatenate([getattr(part, name) for part in parts], axis=1)
            assert np.array_equal(joined, getattr(whole, name))
    for i in (0, 5, 99, 700):
        assert np.array_equal(resumed.slots(steps[i], np.arange(48)).sample, whole.sample[i])


def test_samples_are_those_of_mixture_version_4():
    slots = mixed(SIZES).slots(np.array([[0], [77], [9000]]), np.array([0, 1, 31, 63]))
    assert slots.dataset.tolist() == [[4, 3, 4, 3], [3, 4, 4, 3], [3, 4, 1, 4]]
    assert slots.epoch.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [8, 4, 40, 4]]
    assert slots.sample.tolist() == [
        [28284, 5615, 32111, 2820],
        [1257, 33657, 5458, 16713],
        [17575, 4442, 221, 48196],
    ]


def test_stop_rules_name_the_step_that_holds_the_last_sample():
    order = mixed((50, 400, 2500), batch=16, ranks=2)
    seen = rows(order, np.arange(order.num_steps("all_exhausted")), 16)
    ends = []
    for dataset, size in enumerate((50, 400, 2500)):
        ends.append(int(np.flatnonzero(seen[:, 0] == dataset)[size - 1]) // 16 + 1)
    assert order.num_steps("first_exhausted") == min(ends)
    assert order.num_steps("all_exhausted") == max(ends) == len(seen) // 16


def test_workers_of_ranks_read_parts_of_a_large_dataset_of_their_own():
    order = mixed((400_000, 100_000), by="size", batch=64, ranks=16)
    runs = 0
    total = 0
    for rank, worker in itertools.product(range(8), range(4)):
        steps = np.arange(worker, 8000, 4)
        slots = order.slots(steps[:, None], rank_positions(rank, 8, 64))
        samples = np.sort(slots.sample[(slots.dataset == 0) & (slots.epoch == 0)])
        runs += 1 + int((np.diff(samples) > 1).sum())
        total += len(samples)
    info = order.describe()[0]
    assert total == 400_000
    assert info["block_size"] >= 12
    borders = 16 * 8 * 8
    assert runs <= total // info["block_size"] + 2 * borders


def test_change_of_weights_and_batch_counts_on():
    base = mixed((300, 5000, 20_000), batch=16, ranks=2).config
    change = MixtureChange(
        step=1000, global_batch_size=32, weights=(1.0, 0.0, 1.0), canonical_ranks=2
    )
    again = MixtureChange(
        step=1500, global_batch_size=16, weights=(1.0, 1.0, 1.0), canonical_ranks=2
    )
    order = MixtureOrder(dataclasses.replace(base, changes=(change, again)))
    unchanged = MixtureOrder(base)
    before = rows(order, np.arange(1000), 16)
    assert np.array_equal(before, rows(unchanged, np.arange(1000), 16))
    middle, after = rows(order, np.arange(1000, 1500), 32), rows(order, np.arange(1500, 3000), 16)
    assert np.array_equal(np.bincount(middle[:, 0], minlength=3), [8000, 0, 8000])
    seen = np.concatenate([before, middle, after])
    # Nothing repeats inside an epoch, and the set that is shuffled whole loses nothing either.
    assert len(np.unique(seen, axis=0)) == len(seen)
    small = seen[seen[:, 0] == 0]
    assert np.array_equal(small[:, 1], np.arange(len(small)) // 300)
    assert np.array_equal(order.counts(3000), np.bincount(seen[:, 0], minlength=3))
    # Those in lanes finish the epoch that they had begun: every sample once per epoch.
    assert [row["layout"] for row in order.describe()] == ["global", "lanes", "lanes"]
    for dataset, size in ((1, 5000), (2, 20_000)):
        own = seen[seen[:, 0] == dataset]
        assert np.array_equal(np.sort(own[own[:, 1] == 0][:, 2]), np.arange(size))
    mixed_call = order.slots(np.array([[999], [1000], [1500]]), np.arange(16))
    assert np.array_equal(mixed_call.sample[1], middle[:16, 2])
    assert np.array_equal(mixed_call.sample[2], after[:16, 2])


@settings(max_examples=examples(60), deadline=None)
@given(
    sizes=st.lists(st.sampled_from([1, 5, 40, 600, 1100, 2500]), min_size=1, max_size=4),
    changes=st.lists(
        st.tuples(
            st.integers(1, 90),
            st.sampled_from([(4, 2), (4, 1), (6, 3), (12, 12), (8, 4)]),
            st.lists(st.sampled_from([0, 1, 1, 2, 5]), min_size=4, max_size=4),
        ),
        min_size=1,
        max_size=3,
    ),
    workers=st.sampled_from([1, 4]),
)
def test_any_change_lets_every_dataset_finish_its_epoch(sizes, changes, workers):
    """Weights, batches and widths; datasets that get lanes, lose them, or pause."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loader.order.pattern._MIN_PATTERN_SLOTS", 1)
        base = MixtureConfig(
            members=tuple(member(f"d{i}", n, 1.0) for i, n in enumerate(sizes)),
            global_batch_size=8,
            seed=1,
            canonical_ranks=8,
            canonical_workers=workers,
            active_blocks=3,
            block_size=4,
        )
        order = MixtureOrder(base)
        step, parts = 0, []
        for length, (batch, ranks), weights in changes:
            parts.append(rows(order, np.arange(step, step + length), order.batch_at(step)[0]))
            step += length
            weights = weights[: len(sizes)] if any(weights[: len(sizes)]) else [1] * len(sizes)
            order = order.changed(
                step=step, global_batch_size=batch, weights=weights, canonical_ranks=ranks
            )
        parts.append(rows(order, np.arange(step, step + 30), batch))
        step += 30
        # At the end all weigh the same, until each has finished its epoch and shown the next.
        order = order.changed(
            step=step, global_batch_size=8, weights=[1] * len(sizes), canonical_ranks=8
        )
        slots = (3 * max(sizes) + 64) * len(sizes) + 64 * 8 * workers
        parts.append(rows(order, np.arange(step, step + slots // 8), 8))
    seen = np.concatenate(parts)
    for dataset, size in enumerate(sizes):
        own = seen[seen[:, 0] == dataset]
        assert len(own) > size
        require_exact_epochs(own, size)


def test_changes_that_are_over_are_dropped(monkeypatch):
    monkeypatch.setattr("loader.order.pattern._MIN_PATTERN_SLOTS", 1)
    sizes, batch = (50, 400, 2500), 16
    order = mixed(sizes, batch=batch, ranks=2)
    texts, seen, step = [], [], 0
    for i in range(50):
        stop = step + 400
        seen.append(rows(order, np.arange(step, stop), order.batch_at(step)[0]))
        step = stop
        order = order.changed(
            step=step, global_batch_size=(16, 24)[i % 2], weights=[1, 2, 3 + i % 2]
        )
        texts.append(json.dumps(order.config.to_dict()))
        order = MixtureOrder(MixtureConfig.from_dict(json.loads(texts[-1])))
    own = np.concatenate(seen)
    for dataset, size in enumerate(sizes):
        require_exact_epochs(own[own[:, 0] == dataset], size)
    assert max(map(len, texts)) < 1500
    with pytest.raises(ConfigError) as caught:
        order.slots(0, np.arange(16))
    assert caught.value.reason == "order_slot"


def state_of(order):
    return json.dumps(order.config.to_dict())


def reloaded(order):
    return MixtureOrder(MixtureConfig.from_dict(json.loads(state_of(order))), stop=order.stop)


def test_changes_while_a_dataset_is_paused_in_its_epoch_are_dropped(monkeypatch):
    monkeypatch.setattr("loader.order.pattern._MIN_PATTERN_SLOTS", 1)
    sizes = (1100, 400, 700)
    order = mixed(sizes, batch=16, ranks=2)
    built = []
    pattern = loader.order.mixture.InterleavePattern
    monkeypatch.setattr(
        "loader.order.mixture.InterleavePattern",
        lambda *a, **k: built.append(1) or pattern(*a, **k),
    )
    texts, counts, seen, step = [], [], [], 0
    for i in range(50):
        stop = step + 90
        seen.append(rows(order, np.arange(step, stop), order.batch_at(step)[0]))
        step = stop
        # The first and the largest dataset stops in the middle of its first epoch, and returns.
        order = order.changed(
            step=step, global_batch_size=(16, 24)[i % 2], weights=[int(i >= 45), 2, 3 + i % 2]
        )
        texts.append(state_of(order))
        order = reloaded(order)
        built.clear()
        order.slots(step, np.arange(16))
        counts.append(len(built))
    own = np.concatenate(seen)
    for dataset, size in enumerate(sizes):
        require_exact_epochs(own[own[:, 0] == dataset], size)
    assert np.bincount(own[:, 0])[0] > 1100 > np.bincount(np.concatenate(seen[:45])[:, 0])[0]
    assert max(map(len, texts[3:])) < 1.3 * len(texts[3])
    assert max(counts) <= 3


@settings(max_examples=examples(40), deadline=None)
@given(
    sizes=st.lists(st.sampled_from([1, 5, 40, 600, 1100, 2500]), min_size=5, max_size=5),
    changes=st.lists(
        st.tuples(
            st.integers(1, 90),
            st.lists(st.sampled_from("abcde"), min_size=1, max_size=5, unique=True),
            st.lists(st.sampled_from([1, 1, 2, 5]), min_size=5, max_size=5),
            st.sampled_from([(4, 2), (8, 8), (12, 4)]),
        ),
        min_size=1,
        max_size=5,
    ),
    workers=st.sampled_from([1, 4]),
)
def test_any_change_of_datasets_keeps_the_place_of_every_other(sizes, changes, workers):
    """Added, removed, returned, listed otherwise: each continues at its own count."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loader.order.pattern._MIN_PATTERN_SLOTS", 1)
        size_of = dict(zip("abcde", sizes, strict=True))
        order, step, shown = None, 0, {name: [] for name in "abcde"}
        everyone = (30, list("abcde"), [1] * 5, (8, 8))
        for length, names, weights, (batch, ranks) in [*changes, everyone, everyone]:
            members = tuple(
                member(name, size_of[name], float(weight))
                for name, weight in zip(names, weights, strict=False)
            )
            if order is None:
                order = MixtureOrder(
                    MixtureConfig(
                        members=members,
                        global_batch_size=batch,
                        seed=1,
                        canonical_ranks=ranks,
                        canonical_workers=workers,
                        active_blocks=3,
                        block_size=4,
                    )
                )
            else:
                order = order.with_members(
                    members, step=step, global_batch_size=batch, canonical_ranks=ranks
                )
            order = reloaded(order)
            if names == list("abcde"):
                length = (3 * max(sizes) * 5 + 64 * 8 * workers) // batch
            found = rows(order, np.arange(step, step + length), batch)
            assert found[:, 0].max() < len(names)
            for number, name in enumerate(names):
                shown[name].append(found[found[:, 0] == number])
            step += length
    for name, size in size_of.items():
        own = np.concatenate(shown[name])
        assert len(own) > size
        require_exact_epochs(own, size)


def test_another_sequence_of_the_datasets_moves_no_sample(monkeypatch):
    monkeypatch.setattr("loader.order.pattern._MIN_PATTERN_SLOTS", 1)
    order = mixed((300, 900, 2500), batch=16, ranks=2).changed(
        step=40, global_batch_size=16, weights=[3, 1, 2]
    )
    wanted = rows(order, np.arange(70, 120), 16)
    listed = [order.config.members[d] for d in (2, 0, 1)]
    other = reloaded(order.with_members(listed, step=70))
    found = rows(other, np.arange(70, 120), 16)
    assert np.array_equal(np.array([2, 0, 1])[found[:, 0]], wanted[:, 0])
    assert np.array_equal(found[:, 1:], wanted[:, 1:])
    assert np.array_equal(other.counts(70)[[1, 2, 0]], order.counts(70))


def test_a_dataset_that_never_had_a_slot_leaves_nothing_in_the_state():
    order = mixed((50, 400), batch=16, ranks=2)
    old = order.config.members
    new = dataclasses.replace(old[0], name="new")
    assert order.with_members(old[:1], step=0).config.removed == ()
    twice = order.with_members((*old, new), step=9).with_members(old, step=9)
    assert twice.config.removed == ()
    (gone,) = order.with_members(old[:1], step=9).config.removed
    assert (gone.name, gone.weight) == ("d1", 0.0)


@pytest.mark.parametrize("stop", [0, -1, True, "all", "", None, 2.0])
def test_a_pass_that_cannot_end_there_is_refused(stop):
    with pytest.raises(ConfigError) as caught:
        MixtureOrder(mixed((10, 20)).config, stop=stop)
    assert caught.value.reason == "mixture_stop"


def test_exhaustion_is_found_across_a_change_of_weights():
    base = mixed((300, 5000), by="rate", batch=16, ranks=2).config
    change = MixtureChange(step=10, global_batch_size=16, weights=(0.0, 1.0), canonical_ranks=2)
    order = MixtureOrder(dataclasses.replace(base, changes=(change,)))
    assert order.num_steps() == 10 + -(-(5000 - 80) // 16)
    with pytest.raises(ConfigError) as caught:
        order.num_steps("all_exhausted")
    assert caught.value.reason == "mixture_never"
    assert caught.value.facts["datasets"] == "d0"


def test_weights_with_which_no_pass_ends_are_refused_when_they_change():
    order = MixtureOrder(
        mixed((30, 500), by="rate", batch=16, ranks=2).config, stop="all_exhausted"
    )
    with pytest.raises(ConfigError) as caught:
        order.changed(step=1, global_batch_size=16, weights=[0, 1])
    assert caught.value.reason == "mixture_never"
    # Seen once by then.
    assert order.changed(step=9, global_batch_size=16, weights=[0, 1]).epoch_start(1) > 9


def test_rare_dataset_has_its_share_and_no_more():
    order = weighted([1.0, 1e-6], size=100, batch=8)
    assert order.counts(10**9)[1] == pytest.approx(8e9 * 1e-6, abs=MOST_OFF)
    assert order.num_steps("all_exhausted") == pytest.approx(100 * 1e6 / 8, rel=0.03)


def test_root_size_groups_follow_the_molmo_recipe():
    """sqrt(size) inside a group, scaled to the group's rate; sizes may be stood in for."""
    demo = MixtureGroup(
        rate=0.15,
        by="root_size",
        sources=(
            MixtureSource(name="ask", num_samples=160_000),
            MixtureSource(name="cap", num_samples=700_000, size=40_000),
        ),
    )
    points = MixtureGroup(
        rate=0.35,
        by="root_size",
        sources=(
            MixtureSource(name="points", num_samples=10_000, rate=2.0),
            MixtureSource(name="count", num_samples=40_000),
        ),
    )
    flat = mixture_weights(MixtureGroup(sources=(demo, points)))
    weights = {source.name: weight for source, weight in flat}
    assert weights == pytest.approx({"ask": 0.2, "cap": 0.1, "points": 0.35, "count": 0.35})


def test_weights_by_tokens_divide_by_the_mean_length():
    group = MixtureGroup(
        sources=(
            MixtureSource(name="short", num_samples=10, mean_tokens=100),
            MixtureSource(name="long", num_samples=10, mean_tokens=300),
        )
    )
    weights = [weight for _, weight in mixture_weights(group, unit="tokens")]
    assert weights == pytest.approx([0.75, 0.25])


def test_group_in_a_group_counts_with_its_members_sizes():
    inner = MixtureGroup(sources=sources((10, 30)), by="size")
    outer = MixtureGroup(sources=(inner, MixtureSource(name="x", num_samples=60)), by="size")
    assert [w for _, w in mixture_weights(outer)] == pytest.approx([0.1, 0.3, 0.6])


def test_datasets_of_equal_size_have_different_orders():
    order = mixed((500, 500), batch=10, ranks=2)
    seen = rows(order, np.arange(150), 10)
    first, second = (seen[(seen[:, 0] == d) & (seen[:, 1] == 0)][:, 2] for d in (0, 1))
    assert (first == second).sum() < 10


def test_mixture_of_one_dataset_is_that_dataset():
    order = mixed((1000,), batch=8, ranks=2)
    seen = rows(order, np.arange(140), 8)
    assert np.array_equal(np.sort(seen[seen[:, 1] == 0][:, 2]), np.arange(1000))


@pytest.mark.parametrize("rates", [(1.0, 1.0), (3.0, 2.0), (5.0, 3.0, 2.0)])
def test_no_dataset_is_tied_to_a_rank_or_a_lane(rates):
    """One position per canonical rank, and a beat that divides the batch."""
    group = MixtureGroup(
        sources=tuple(
            MixtureSource(name=f"d{i}", num_samples=10**6, rate=rate)
            for i, rate in enumerate(rates)
        )
    )
    order = MixtureOrder(plan_mixture(group, global_batch_size=10, seed=1, canonical_ranks=10))
    steps = 26_216  # the whole pattern
    dataset = rows(order, np.arange(steps), 10)[:, 0].reshape(-1, 8, 10)
    for d, row in enumerate(order.describe()):
        by_lane = (dataset == d).mean(axis=0) / row["weight"]
        assert np.abs(by_lane.mean(axis=0) - 1).max() < 0.15
        assert np.abs(by_lane - 1).max() < 0.25


@pytest.mark.parametrize("weights", [(3.0, 2.0), (5.0, 3.0, 2.0), (99.0, 1.0)], ids=str)
def test_a_ranks_own_windows_deviate_no_more_than_independent_draws(weights):
    order = weighted(weights, size=10**6, batch=256, ranks=128)
    found = order.slots(np.arange(1024)[:, None], np.arange(256)).dataset
    for ranks, steps in itertools.product((8, 32, 128), (1, 16, 256)):
        share = 256 // ranks
        windows = found.reshape(-1, steps, ranks, share).transpose(0, 2, 1, 3)
        windows = windows.reshape(-1, steps * share)
        for d, weight in enumerate(np.array(weights) / sum(weights)):
            expected = steps * share * weight
            deviation = (((windows == d).sum(axis=1) - expected) ** 2).mean() ** 0.5
            assert deviation <= 1.1 * (expected * (1 - weight)) ** 0.5


def test_saved_mixture_comes_back_equal_or_is_refused():
    change = MixtureChange(step=9, global_batch_size=64, weights=(1.0, 2.0), canonical_ranks=2)
    config = dataclasses.replace(mixed((10, 20)).config, changes=(change,))
    assert MixtureConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(StateError) as caught:
        MixtureConfig.from_dict({**config.to_dict(), "version": 0})
    assert caught.value.reason == "order_version"


def change(*, step=1, weights=(1.0,), canonical_ranks=2):
    return MixtureChange(
        step=step, global_batch_size=8, weights=weights, canonical_ranks=canonical_ranks
    )


def member(name="a", num_samples=10, weight=1.0):
    return MixtureMember(name=name, num_samples=num_samples, weight=weight)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"members": ()}, "mixture_empty"),
        ({"members": (member(), member())}, "mixture_twice"),
        ({"members": (member(num_samples=0),)}, "mixture_empty"),
        ({"members": (member(weight=-1.0),)}, "mixture_weights"),
        ({"members": (member(weight=0.0),)}, "mixture_weights"),
        ({"members": (member(weight=float("nan")),)}, "mixture_weights"),
        ({"global_batch_size": 0}, "mixture_count"),
        ({"active_blocks": 0}, "mixture_count"),
        ({"canonical_ranks": 3}, "batch_not_divisible"),
        (
            {"changes": (change(step=0),)},
            "mixture_changes",
        ),
        ({"changes": (change(canonical_ranks=3),)}, "batch_not_divisible"),
        (
            {"changes": (change(weights=(1.0, 1.0)),)},
            "mixture_weights",
        ),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(changes, reason):
    good = {"members": (member(),), "global_batch_size": 8, "seed": 0, "canonical_ranks": 2}
    MixtureConfig(**good)
    with pytest.raises(ConfigError) as caught:
        MixtureConfig(**{**good, **changes})
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("group", "unit", "reason"),
    [
        (MixtureGroup(sources=()), "samples", "mixture_empty"),
        (MixtureGroup(sources=(*sources((5,)), *sources((5,)))), "samples", "mixture_twice"),
        (MixtureGroup(sources=sources((5,))), "tokens", "mixture_mean_tokens"),
        (MixtureGroup(sources=sources((5,))), "token", "mixture_unit"),
        (MixtureGroup(sources=sources((5,))), None, "mixture_unit"),
        (MixtureGroup(sources=sources((5,)), by="cube"), "samples", "mixture_weights"),
        (
            MixtureGroup(sources=(MixtureSource(name="a", num_samples=5, rate=0.0),)),
            "samples",
            "mixture_weights",
        ),
    ],
)
def test_groups_that_give_no_weights_are_refused(group, unit, reason):
    with pytest.raises(ConfigError) as caught:
        mixture_weights(group, unit=unit)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "rate", ["1", None, {}, [1.0], True, float("inf"), float("nan"), 1e308, -1, np.ones(2), 1j]
)
def test_a_weight_that_is_not_a_plain_number_is_refused(rate):
    group = MixtureGroup(sources=(MixtureSource(name="a", num_samples=5, rate=rate),))
    with pytest.raises(ConfigError) as caught:
        mixture_weights(group)
    assert caught.value.reason == "mixture_weights"
    with pytest.raises(ConfigError) as caught:
        mixed((10, 20)).changed(step=4, global_batch_size=64, weights=[1.0, rate])
    assert caught.value.reason == "mixture_weights"


def test_more_datasets_than_a_pattern_holds_are_refused():
    with pytest.raises(ConfigError) as caught:
        weighted([1.0] * (MOST_DATASETS + 1)).slots(0, 0)
    assert caught.value.reason == "mixture_weights"


def test_batch_that_no_pattern_holds_is_refused():
    config = plan_mixture(sources((10, 20)), global_batch_size=2**21, seed=0)
    with pytest.raises(ConfigError) as caught:
        MixtureOrder(config)
    assert caught.value.reason == "mixture_batch"


def test_slot_outside_the_run_is_refused():
    order = mixed((10, 20))
    for step, position in ((-1, 0), (0, 64), (0, -1)):
        with pytest.raises(ConfigError) as caught:
            order.slots(step, position)
        assert caught.value.reason == "order_slot"


def test_tables_are_bounded_by_the_pattern_not_by_the_samples():
    order = mixed((10**10, 10**9), batch=64, ranks=64)
    slots = order.slots(10**8, np.arange(64))
    assert slots.sample.max() > 10**9
    pattern = order._segments[0].pattern
    tables = [table for table in vars(pattern).values() if isinstance(table, np.ndarray)]
    assert sum(table.nbytes for table in tables) < 28 * loader.order.pattern._MIN_PATTERN_SLOTS


def test_settings_of_other_types_are_refused():
    source = [MixtureSource(name="a", num_samples=100)]
    for name, wrong, reason in (
        ("locality", "nod", "order_locality"),
        ("locality", None, "order_locality"),
        ("canonical_ranks", 2.0, "order_count"),
        ("canonical_ranks", "8", "order_count"),
        ("canonical_workers", 2.0, "mixture_count"),
        ("canonical_workers", None, "mixture_count"),
    ):
        settings = {"global_batch_size": 8, "seed": 1, name: wrong}
        with pytest.raises(ConfigError) as caught:
            plan_mixture(source, **settings)
        assert caught.value.reason == reason
    order = MixtureOrder(plan_mixture(source, global_batch_size=8, seed=1))
    for step in (-1, "8", None, 2.0, float("nan"), True):
        with pytest.raises(ConfigError) as caught:
            order.changed(step=step, global_batch_size=8)
        assert caught.value.reason == "order_step"
    for weights in (0, 2.0, True):
        with pytest.raises(ConfigError) as caught:
            order.changed(step=3, global_batch_size=8, weights=weights)
        assert caught.value.reason == "mixture_weights"
