"""Schedules over synthetic lengths: nothing is read."""

import gc
import time
import weakref
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loader.order.config import plan_order
from loader.order.mixture import MixtureOrder
from loader.order.mixture_config import plan_mixture
from loader.order.order import Order
from loader.order.rows import SampleRef
from loader.order.schedule import (
    BalancedSchedule,
    BucketSchedule,
    PackSchedule,
    SlotSchedule,
    bucket_group,
    plan_packing,
)
from loader.order.weights import MixtureSource
from loader.topology import Topology
from shardspec.errors import ConfigError
from tests.examples import examples

ALONE = Topology()
WORLDS = (1, 2, 3, 4, 6, 8, 12, 24, 48)


def captions(num_samples, seed=0):
    """Image captions: lognormal around 650 tokens, and an image's crops by length."""
    rng = np.random.RandomState(seed)
    tokens = np.clip(rng.lognormal(np.log(650), 0.35, num_samples), 300, 1400).astype(np.int64)
    return tokens, np.clip(tokens // 170, 1, 8)


def looked_up(tokens, crops):
    return lambda dataset, sample: (tokens[sample], crops[sample])


def packed(
    num_samples,
    *,
    batch,
    length=4096,
    max_crops=48,
    balance=False,
    ranks=None,
    seed=0,
    endless=False,
):
    order = Order(
        plan_order(num_samples, global_batch_size=batch, seed=seed, canonical_ranks=ranks)
    )
    lengths = looked_up(*captions(num_samples, seed))
    with pytest.MonkeyPatch.context() as patch:
        if endless:
            patch.setattr("loader.order.pack_epochs.MOST_PLANNED", 0)
        config = plan_packing(order, sequence_length=length, max_crops=max_crops)
        return PackSchedule(order, lengths, config, patches_per_crop=576, balance=balance)


def joined(schedule, step, world_size):
    ranks = (Topology(rank=rank, world_size=world_size) for rank in range(world_size))
    return [row for topology in ranks for row in schedule.rows(step, topology)]


@pytest.mark.parametrize("length, max_crops, least", [(4096, 48, 0.98), (16_384, 128, 0.97)])
def test_packs_of_a_run_are_full(length, max_crops, least):
    schedule = packed(200_000, batch=16, length=length, max_crops=max_crops, endless=True)
    tokens, crops = captions(200_000)
    fills = []
    for step in range(12):
        for row in schedule.rows(step, ALONE):
            samples = [place.sample for place in row]
            assert crops[samples].sum() <= max_crops
            assert tokens[samples].sum() <= length
            fills.append(tokens[samples].sum() / length)
    assert np.mean(fills) >= least


@settings(max_examples=examples(25), deadline=None)
@given(
    num_samples=st.integers(1, 400),
    streams=st.sampled_from([1, 2, 3, 4]),
    packs=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_endless_packs_show_every_sample_once_per_epoch_for_any_ranks(
    num_samples, streams, packs, seed
):
    batch = streams * packs
    schedule = packed(num_samples, batch=batch, length=2000, ranks=streams, seed=seed, endless=True)
    shown = Counter()
    epochs = 2
    step = 0
    while sum(n for (epoch, _), n in shown.items() if epoch < epochs) < epochs * num_samples:
        world_size = (1, batch)[step % 2]
        for row in joined(schedule, step, world_size):
            shown.update((place.epoch, place.sample) for place in row)
        step += 1
        assert step < 400 * epochs
    assert set(shown.values()) == {1}
    assert {key for key in shown if key[0] < epochs} == {
        (epoch, sample) for epoch in range(epochs) for sample in range(num_samples)
    }


@settings(max_examples=examples(60), deadline=None)
@given(
    num_samples=st.integers(1, 300),
    batch=st.sampled_from([1, 2, 4, 12]),
    steps=st.integers(2, 5),
    growth=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 5),
)
def test_changes_between_groups_of_buckets_lose_no_sample(num_samples, batch, steps, growth, seed):
    """A change at every step of a run that is the first of its group."""
    tokens, crops = captions(num_samples)
    order = Order(plan_order(num_samples, global_batch_size=batch, seed=seed, canonical_ranks=1))
    last = order.epoch_start(2)
    schedule = BucketSchedule(order, looked_up(tokens, crops), steps=steps)
    before = [schedule.rows(step, ALONE) for step in range(last)]
    for step in range(max(0, last - 3 * steps), last):
        group = bucket_group(order, step, steps=steps)
        assert step in group
        assert len(group) <= steps
        if step != group.start:
            continue
        changed = order.changed(step=step, global_batch_size=growth * batch)
        after = BucketSchedule(changed, looked_up(tokens, crops), steps=steps)
        rows = [row for rows in before[:step] for row in rows]
        rows += [row for s in range(step, changed.epoch_start(3)) for row in after.rows(s, ALONE)]
        shown = Counter(rows)
        assert set(shown.values()) == {1}
        whole = {(SampleRef(0, epoch, n),) for epoch in range(3) for n in range(num_samples)}
        assert whole <= set(shown)


@pytest.mark.parametrize("stop", [7, "first_exhausted", "all_exhausted"])
@pytest.mark.parametrize("step", [0, 3, 5, 9])  # of each of four groups
def test_changes_of_a_mixture_between_groups_of_buckets_lose_no_sample(step, stop):
    sizes, steps = (40, 25), 4
    names = zip("ab", sizes, strict=True)
    sources = [MixtureSource(name=name, num_samples=size) for name, size in names]
    order = MixtureOrder(plan_mixture(sources, global_batch_size=8, seed=1), stop=stop)
    tokens, crops = captions(max(sizes))
    group = bucket_group(order, step, steps=steps)
    step = step if step == group.start else group.stop
    schedule = BucketSchedule(order, looked_up(tokens, crops), steps=steps)
    rows = [row for s in range(step) for row in schedule.rows(s, ALONE)]
    order = order.changed(step=step, global_batch_size=16, weights=(1, 3))
    schedule = BucketSchedule(order, looked_up(tokens, crops), steps=steps)
    last = step
    while last < 30 or bucket_group(order, last, steps=steps).start != last:
        rows += schedule.rows(last, ALONE)
        last += 1
    shown = Counter(rows)
    assert set(shown.values()) == {1}
    for dataset, size in enumerate(sizes):
        whole = sum(ref.dataset == dataset for (ref,) in shown) // size
        assert whole >= 2
        epochs = {(SampleRef(dataset, e, n),) for e in range(whole) for n in range(size)}
        assert epochs <= set(shown)


@settings(max_examples=examples(40), deadline=None)
@given(
    num_samples=st.integers(1, 400),
    batch=st.integers(1, 24),
    group=st.integers(2, 9),
    tail=st.sampled_from(["wrap", "pad"]),
    change=st.integers(1, 12),
)
def test_buckets_deal_the_samples_of_their_group_and_no_others(
    num_samples, batch, group, tail, change
):
    order = Order(
        plan_order(num_samples, global_batch_size=batch, seed=1, tail=tail, canonical_ranks=1)
    )
    if tail == "wrap":
        order = order.changed(step=change, global_batch_size=2 * batch)
    tokens, crops = captions(num_samples)
    slots = SlotSchedule(order)
    buckets = BucketSchedule(order, looked_up(tokens, crops), steps=group)
    steps = range(order.epoch_start(2))
    want = Counter(row for step in steps for row in slots.rows(step, ALONE))
    got = Counter(row for step in steps for row in buckets.rows(step, ALONE))
    assert got == want
    for step in list(steps)[::3]:
        again = BucketSchedule(order, looked_up(tokens, crops), steps=group)
        assert again.rows(step, ALONE) == buckets.rows(step, ALONE)
        assert len(buckets.rows(step, ALONE)) == buckets.batch_at(step)[0]


def test_buckets_pad_little():
    order = Order(plan_order(20_000, global_batch_size=32, seed=1))
    tokens, crops = captions(20_000)

    def padding(schedule):
        lengths = [
            [tokens[row[0].sample] for row in schedule.rows(step, ALONE)] for step in range(64)
        ]
        return 1 - np.mean([np.mean(batch) / max(batch) for batch in lengths])

    assert padding(SlotSchedule(order)) > 0.4
    assert padding(BucketSchedule(order, looked_up(tokens, crops), steps=16)) < 0.12


@pytest.mark.parametrize("kind", ["slots", "buckets", "packs", "endless packs"])
def test_global_batches_are_equal_for_every_number_of_ranks(kind):
    order = Order(plan_order(3000, global_batch_size=48, seed=2, canonical_ranks=24))
    lengths = looked_up(*captions(3000))
    schedule = {
        "slots": SlotSchedule(order),
        "buckets": BucketSchedule(order, lengths, steps=8),
        "packs": packed(3000, batch=48, ranks=24),
        "endless packs": packed(3000, batch=48, ranks=24, endless=True),
    }[kind]
    for step in range(4):
        want = schedule.rows(step, ALONE)
        for world_size in WORLDS:
            assert joined(schedule, step, world_size) == want


def test_balanced_ranks_have_equal_work_and_the_same_packs():
    plain, balanced = packed(50_000, batch=64), packed(50_000, batch=64, balance=True)
    tokens, crops = captions(50_000)

    def work(rows):
        samples = [place.sample for row in rows for place in row]
        return (tokens[samples] + 576 * crops[samples]).sum()

    for step in range(5):
        assert sorted(joined(balanced, step, 8), key=str) == sorted(joined(plain, step, 8), key=str)
        by_rank = [work(balanced.rows(step, Topology(rank=r, world_size=8))) for r in range(8)]
        assert max(by_rank) / np.mean(by_rank) < 1.02


def test_places_of_the_streams_lead_to_any_later_step():
    first = packed(5000, batch=8, endless=True)
    want = [first.rows(step, ALONE) for step in range(40)]
    fresh = packed(5000, batch=8, endless=True)
    for step in range(40):
        assert fresh.rows(step, ALONE) == want[step]
        saved = fresh.places(step + 1)
        assert len(saved) == fresh.num_streams == 8
        resumed = packed(5000, batch=8, endless=True)
        resumed.go_to(saved)
        for later in range(step + 1, min(step + 3, 40)):
            assert resumed.rows(later, ALONE) == want[later]


def test_batch_of_endless_packs_can_grow_without_losing_any():
    grown = packed(2000, batch=8, ranks=4, endless=True)
    grown.set_sizes([(0, 8), (5, 16), (7, 4)])
    plain = packed(2000, batch=8, ranks=4, endless=True)

    def by_stream(schedule, steps):
        found = [[] for _ in range(4)]
        for step in steps:
            rows = schedule.rows(step, ALONE)
            share = len(rows) // 4
            for stream in range(4):
                found[stream] += rows[stream * share : (stream + 1) * share]
        return found

    # 5 steps of 8, 2 of 16 and 2 of 4 are 10 steps of 8.
    assert by_stream(grown, range(9)) == by_stream(plain, range(10))


def test_pass_of_endless_packs_is_about_an_epoch():
    schedule = packed(20_000, batch=16, endless=True)
    assert not schedule.pass_is_exact
    steps = schedule.epoch_start(1)
    assert schedule.epoch_start(3) == 3 * steps
    assert [schedule.epoch_at(step) for step in (0, steps - 1, steps, 3 * steps)] == [0, 0, 1, 3]
    shown = sum(len(row) for step in range(steps) for row in schedule.rows(step, ALONE))
    assert shown == pytest.approx(20_000, rel=0.05)


def test_packs_of_a_mixture_hold_its_proportions():
    sources = [MixtureSource(name="a", num_samples=900), MixtureSource(name="b", num_samples=100)]
    order = MixtureOrder(plan_mixture(sources, global_batch_size=4, seed=1), stop=50)
    tokens, crops = captions(1000)
    schedule = PackSchedule(
        order,
        looked_up(tokens, crops),
        plan_packing(order, sequence_length=4096, max_crops=None),
        patches_per_crop=1,
        balance=False,
    )
    shown = Counter(
        place.dataset for step in range(60) for row in schedule.rows(step, ALONE) for place in row
    )
    assert shown[0] / (shown[0] + shown[1]) == pytest.approx(0.5, abs=0.05)


@pytest.mark.slow
def test_short_samples_come_early_in_packs_of_a_mixture_and_not_for_long():
    """docs/mixtures-and-packing.md; one sample per canonical rank and step, the strongest case."""
    sources = [MixtureSource(name="long", num_samples=50_000, rate=0.7)]
    sources += [MixtureSource(name="short", num_samples=50_000, rate=0.3)]
    batch = {"global_batch_size": 8, "canonical_ranks": 8, "seed": 1}
    order = MixtureOrder(plan_mixture(sources, **batch))
    schedule = PackSchedule(
        order,
        lambda dataset, sample: ((900 + sample % 600) // np.where(dataset == 0, 1, 20), 0 * sample),
        plan_packing(order, sequence_length=2048, max_crops=None),
        patches_per_crop=0,
        balance=False,
    )
    found = np.zeros((1000, 2))
    for step in range(1000):
        rows = schedule.rows(step, ALONE)
        found[step] = np.bincount([place.dataset for row in rows for place in row], minlength=2)
    long, short = found.cumsum(axis=0)[[63, 999]].T
    early, late = short / (long + short)
    assert 0.3 < early < 0.35
    assert late == pytest.approx(0.3, abs=0.006)


def test_resuming_late_in_a_hundred_million_samples_takes_no_longer_than_starting():
    def seconds(step):
        begin = time.process_time()
        order = Order(plan_order(10**8, global_batch_size=4096, seed=1))
        SlotSchedule(order).rows(step, Topology(rank=3, world_size=64))
        return time.process_time() - begin

    late = 10**8 // 4096 * 9 // 10
    times = [(seconds(0), seconds(late)) for _ in range(40)]
    start, resume = (min(column) for column in zip(*times, strict=True))
    assert resume / start < 1.2


@pytest.mark.parametrize("world_size", [1, 2, 8, 16])
def test_state_of_one_balanced_rank_lets_any_rank_continue_where_it_was(world_size):
    saving = packed(40_000, batch=16, balance=True, endless=True)
    saving.rows(900, Topology(rank=0, world_size=2))
    assert len(saving.places(901)) == saving.num_streams == 16
    want = joined(packed(40_000, batch=16, endless=True), 901, 1)

    looked_up_samples = []
    resumed = packed(40_000, batch=16, balance=True, endless=True)
    lengths = resumed._packs._lengths
    resumed._packs._lengths = lambda d, s: (looked_up_samples.append(len(s)), lengths(d, s))[1]
    resumed.go_to(saving.places(901))
    assert sorted(joined(resumed, 901, world_size), key=str) == sorted(want, key=str)
    # The run that each stream is in, or the next one; 900 steps hold about three.
    assert sum(looked_up_samples) <= 2 * 16 * resumed.config.run


def test_continuing_with_packs_costs_less_than_a_second_per_million_samples_of_a_stream():
    """Without saved places, 100,000 samples of the only stream are packed again."""
    times = []
    for _ in range(3):  # the best of them: what others do on the machine costs processor time too
        schedule = packed(1_000_000, batch=1, endless=True)
        schedule.rows(0, ALONE)
        begin = time.process_time()
        schedule.rows(100_000 // 7, ALONE)
        times.append(time.process_time() - begin)
    # A busy machine gets four times the second per million samples here.
    assert min(times) < 0.4


def test_settings_that_cannot_be_honoured_are_refused():
    order = Order(plan_order(100, global_batch_size=4, seed=1, tail="pad"))
    lengths = looked_up(*captions(100))
    config = plan_packing(order, sequence_length=4096, max_crops=None)
    with pytest.raises(ConfigError) as caught:
        PackSchedule(order, lengths, config, patches_per_crop=1, balance=False)
    assert caught.value.reason == "packing_tail"
    for steps in (1, 0, -2, 2.0, "4", True, None):
        with pytest.raises(ConfigError) as caught:
            BucketSchedule(order, lengths, steps=steps)
        assert caught.value.reason == "bucket_steps"
    with pytest.raises(ConfigError) as caught:
        packed(100, batch=4, ranks=4).set_sizes([(0, 6)])
    assert caught.value.reason == "batch_not_divisible"


@pytest.mark.parametrize("most_planned", [0, 100])
def test_schedule_of_packs_lets_go_of_its_dataset_without_the_garbage_collector(
    most_planned, monkeypatch
):
    monkeypatch.setattr("loader.order.pack_epochs.MOST_PLANNED", most_planned)

    class Dataset:  # it holds open files
        def lengths(self, dataset, sample):
            return looked_up(*captions(100))(dataset, sample)

    dataset = Dataset()
    order = Order(plan_order(100, global_batch_size=4, seed=0))
    config = plan_packing(order, sequence_length=4096, max_crops=48)
    schedule = PackSchedule(order, dataset.lengths, config, patches_per_crop=576, balance=False)
    schedule.rows(1, ALONE)
    alive = weakref.ref(dataset)
    gc.disable()
    try:
        del dataset, schedule
        assert alive() is None
    finally:
        gc.enable()


# --- pictures on every rank


def shared(kind, num_samples, *, batch, seed):
    """A schedule of three texts to one picture, and what it would give without an exchange."""
    rng = np.random.RandomState(seed)
    crops = rng.randint(1, 9, num_samples) * (rng.random_sample(num_samples) < 0.3)
    lengths = looked_up(rng.randint(20, 300, num_samples) + 144 * crops, crops)
    order = Order(plan_order(num_samples, global_batch_size=batch, seed=seed))
    plain = {
        "slots": lambda: SlotSchedule(order),
        "buckets": lambda: BucketSchedule(order, lengths, steps=4),
        "packs": lambda: PackSchedule(
            order,
            lengths,
            plan_packing(order, sequence_length=512, max_crops=None),
            patches_per_crop=576,
            balance=False,
        ),
    }[kind]
    return plain(), BalancedSchedule(plain(), lengths, patches_per_crop=576), crops


@pytest.mark.parametrize("kind", ["slots", "buckets", "packs"])
@given(num_samples=st.integers(48, 400), seed=st.integers(0, 99), step=st.integers(0, 9))
@settings(max_examples=15)
def test_pictures_are_shared_inside_a_step_whatever_the_number_of_ranks(
    kind, num_samples, seed, step
):
    plain, balanced, crops = shared(kind, num_samples, batch=24, seed=seed)
    want = plain.rows(step, ALONE)
    assert balanced.rows(step, ALONE) == want
    num_with_pictures = sum(any(crops[ref.sample] for ref in row) for row in want)
    for world in (2, 3, 8, 24):
        ranks = [balanced.rows(step, Topology(rank=r, world_size=world)) for r in range(world)]
        assert {len(rows) for rows in ranks} == {24 // world}
        assert Counter(sum(ranks, [])) == Counter(want)
        with_pictures = [any(crops[ref.sample] for row in rows for ref in row) for rows in ranks]
        assert sum(with_pictures) == min(world, num_with_pictures)


def test_ranks_that_share_pictures_have_nearly_equal_work():
    plain, balanced, crops = shared("slots", 4096, batch=128, seed=1)
    spread = {}
    for name, schedule in {"plain": plain, "balanced": balanced}.items():
        ranks = [schedule.rows(0, Topology(rank=r, world_size=8)) for r in range(8)]
        work = np.array([sum(crops[ref.sample] for (ref,) in rows) for rows in ranks])
        spread[name] = work.max() / work.mean()
    assert spread["plain"] > 1.3
    assert spread["balanced"] < 1.1
