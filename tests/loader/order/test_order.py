"""The order: exactly once, the same for every topology, evaluated anywhere at no cost."""

import contextlib
import dataclasses
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loader.order.config import (
    OrderConfig,
    RampStep,
    default_canonical_ranks,
    pick_block_size,
    plan_order,
)
from loader.order.lanes import Lanes
from loader.order.mixture import MixtureOrder
from loader.order.mixture_config import plan_mixture
from loader.order.order import Order
from loader.order.slots import rank_positions
from loader.order.weights import MixtureSource
from shardspec.documents import require_plain
from shardspec.errors import ConfigError, StateError
from tests.examples import examples

WORLD_SIZES = (1, 2, 3, 4, 6, 8, 12, 24, 48)


@st.composite
def configs(draw, tail=None):
    ranks = draw(st.integers(1, 6))
    workers = draw(st.integers(1, 5))
    share = draw(st.integers(1, 4))
    layout = draw(st.sampled_from(["lanes", "lanes", "global", "sequential"]))
    smallest = 1
    tail = tail or draw(st.sampled_from(["wrap", "drop_last", "pad"]))
    if tail == "drop_last":
        smallest = ranks * share
    return OrderConfig(
        num_samples=draw(st.integers(smallest, smallest + 700)),
        global_batch_size=ranks * share,
        seed=draw(st.integers(0, 2**64 - 1)),
        tail=tail,
        layout=layout,
        locality=draw(st.sampled_from(["any", "any", "node"])),
        canonical_ranks=ranks,
        canonical_workers=workers,
        active_blocks=draw(st.integers(1, 9)),
        block_size=draw(st.integers(1, 40)),
    )


def batches(order, steps):
    slots = order.slots(np.asarray(steps)[:, None], np.arange(order.config.global_batch_size))
    return np.stack([slots.epoch, slots.sample, slots.real], axis=-1)


@settings(max_examples=examples(100), deadline=None)
@given(config=configs(tail="wrap"), first=st.sampled_from([0, 1, 9, 89]))
def test_an_epoch_is_n_consecutive_slots_that_show_each_sample_once(config, first):
    size, batch = config.num_samples, config.global_batch_size
    begin = first * size // batch
    rows = batches(Order(config), np.arange(begin, -(-(first + 2) * size // batch))).reshape(-1, 3)
    slot = begin * batch + np.arange(len(rows))
    assert np.array_equal(rows[:, 0], slot // size)
    for epoch in (first, first + 1):
        samples = rows[slot // size == epoch][:, 1]
        assert np.array_equal(np.sort(samples), np.arange(size))
    assert rows[:, 2].all()


@settings(max_examples=examples(100), deadline=None)
@given(
    ranks=st.integers(1, 9),
    workers=st.integers(1, 9),
    share=st.integers(1, 9),
    first=st.integers(0, 10**12),
    slots=st.integers(0, 700),
)
def test_lanes_are_counted_as_by_counting(ranks, workers, share, first, slots):
    lanes = Lanes(global_batch_size=ranks * share, ranks=ranks, workers=workers)
    step, position = np.divmod(first + np.arange(slots), ranks * share)
    lane, before = lanes.find(step, position)
    assert np.array_equal(lane, position // share * workers + step % workers)
    counts = lanes.counts(first)
    assert counts.sum() == first
    for i, one in enumerate(lane.tolist()):
        assert before[i] == counts[one]
        counts[one] += 1
    assert np.array_equal(counts, lanes.counts(first + slots))


@settings(max_examples=examples(100), deadline=None)
@given(config=configs(tail="pad"))
def test_pad_counts_every_sample_once_and_the_rest_with_weight_zero(config):
    order = Order(config)
    for epoch in (0, 1, 7):
        start = order.epoch_start(epoch)
        rows = batches(order, np.arange(start, start + order.num_steps(epoch))).reshape(-1, 3)
        real = rows[rows[:, 2] == 1]
        assert np.array_equal(np.sort(real[:, 1]), np.arange(config.num_samples))
        assert (rows[:, 0] == epoch).all()
        assert (rows[:, 1] < config.num_samples).all()
        assert len(rows) - len(real) == order.describe()["padded_slots"]


@settings(max_examples=examples(100), deadline=None)
@given(config=configs(tail="drop_last"))
def test_drop_last_repeats_nothing_and_drops_what_it_says(config):
    order = Order(config)
    for epoch in (0, 3):
        start = order.epoch_start(epoch)
        rows = batches(order, np.arange(start, start + order.num_steps(epoch))).reshape(-1, 3)
        assert len(np.unique(rows[:, 1])) == len(rows)
        assert config.num_samples - len(rows) == order.describe()["dropped_samples"]
        assert rows[:, 2].all()


def test_drop_last_drops_other_samples_in_other_epochs():
    order = Order(plan_order(1003, global_batch_size=50, seed=1, tail="drop_last"))
    seen = [set(batches(order, np.arange(e * 20, e * 20 + 20))[..., 1].ravel()) for e in (0, 1)]
    assert len(seen[0]) == len(seen[1]) == 1000
    assert seen[0] != seen[1]


@pytest.mark.parametrize("num_samples", [1, 7, 700, 4608 * 3 + 5])
@pytest.mark.parametrize("tail", ["wrap", "pad"])
def test_global_batches_are_the_same_for_every_number_of_ranks(num_samples, tail):
    config = plan_order(num_samples, global_batch_size=48, seed=3, tail=tail)
    order = Order(config)
    steps = np.arange(2 * config.steps_per_epoch)
    whole = batches(order, steps)
    for world_size in WORLD_SIZES:
        parts = [
            order.slots(steps[:, None], rank_positions(rank, world_size, 48))
            for rank in range(world_size)
        ]
        joined = np.concatenate([part.sample for part in parts], axis=1)
        assert np.array_equal(joined, whole[..., 1])
        assert {part.sample.shape for part in parts} == {(len(steps), 48 // world_size)}


def test_resume_at_every_step_of_two_epochs_gives_the_same_batches():
    config = plan_order(3 * 1536 + 5, global_batch_size=48, seed=3, canonical_ranks=6)
    assert config.layout == "lanes"
    steps = np.arange(2 * config.steps_per_epoch + 3)
    whole = batches(Order(config), steps)
    for step in steps:
        resumed = Order(OrderConfig.from_dict(json.loads(json.dumps(config.to_dict()))))
        assert np.array_equal(batches(resumed, [step])[0], whole[step])


def test_workers_that_build_their_own_steps_give_the_same_batches():
    order = Order(plan_order(20_000, global_batch_size=48, seed=3))
    whole = batches(order, np.arange(60))
    for num_workers in (1, 2, 3, 5, 8):
        for worker in range(num_workers):
            own = np.arange(worker, 60, num_workers)
            assert np.array_equal(batches(order, own), whole[own])


@pytest.mark.parametrize(("locality", "least", "most"), [("node", 0.98, 1.0), ("any", 0.1, 0.15)])
def test_a_node_meets_its_own_samples_again_in_later_epochs(locality, least, most):
    size, batch = 200_000, 256
    order = Order(plan_order(size, global_batch_size=batch, seed=5, locality=locality))
    assert order.config.layout == "lanes"
    steps = np.arange(3 * order.config.steps_per_epoch)[:, None]
    whole = order.slots(steps, np.arange(batch))
    require_exact_epochs(whole.epoch[whole.epoch < 3], whole.sample[whole.epoch < 3], size)
    own = order.slots(steps, rank_positions(3, 8, batch))
    first, second, third = (set(own.sample[own.epoch == epoch].tolist()) for epoch in range(3))
    for later in (second, third):
        assert least <= len(first & later) / len(later) <= most


def test_with_locality_another_number_of_nodes_moves_only_what_it_must():
    """From 4 nodes to 3 a node keeps the part of its canonical ranks that stays with it."""
    size, batch = 300_000, 192
    order = Order(plan_order(size, global_batch_size=batch, seed=5, locality="node"))
    steps = np.arange(2 * order.config.steps_per_epoch)[:, None]

    def read(node, nodes, epoch):
        slots = order.slots(steps, rank_positions(node, nodes, batch))
        return set(slots.sample[slots.epoch == epoch].tolist())

    kept = [len(read(i, 4, 0) & read(i, 3, 1)) / (size / 4) for i in range(3)]
    assert kept == pytest.approx([1, 2 / 3, 1 / 3], abs=0.03)


def test_ranks_read_blocks_of_their_own():
    """A rank's ids of an epoch are few consecutive runs; only lanes' borders cut a block in two."""
    config = OrderConfig(
        num_samples=200_000,
        global_batch_size=64,
        seed=5,
        canonical_ranks=16,
        canonical_workers=4,
        active_blocks=4,
        block_size=50,
        tail="pad",
    )
    order = Order(config)
    runs = 0
    for rank in range(8):
        steps = np.arange(config.steps_per_epoch)[:, None]
        slots = order.slots(steps, rank_positions(rank, 8, 64))
        samples = np.sort(slots.sample[slots.real])
        runs += 1 + int((np.diff(samples) > 1).sum())
    borders = config.num_lanes * config.active_blocks
    assert runs <= config.num_samples // config.block_size + 2 * borders


def require_exact_epochs(epoch, sample, num_samples, start=0):
    """Epoch e is the slots e * N to (e + 1) * N - 1, and shows each sample once."""
    assert np.array_equal(epoch, start + np.arange(len(epoch)) // num_samples)
    whole = len(epoch) // num_samples
    shown = np.sort(sample[: whole * num_samples].reshape(whole, num_samples), axis=1)
    assert (shown == np.arange(num_samples)).all()


@settings(max_examples=examples(60), deadline=None)
@given(config=configs(tail="wrap"), data=st.data())
def test_a_batch_ramp_continues_every_epoch_exactly(config, data):
    changes = []
    step = 0
    for _ in range(data.draw(st.integers(1, 3))):
        step += data.draw(st.integers(1, 40))
        size = config.canonical_ranks * data.draw(st.integers(1, 5))
        changes.append(RampStep(step=step, global_batch_size=size))
    order = Order(dataclasses.replace(config, ramp=tuple(changes)))
    enough = step + -(-3 * config.num_samples // changes[-1].global_batch_size)
    sizes = [config.global_batch_size, *(change.global_batch_size for change in changes)]
    bounds = [0, *(change.step for change in changes), enough]
    seen = []
    for size, start, stop in zip(sizes, bounds[:-1], bounds[1:], strict=True):
        slots = order.slots(np.arange(start, stop)[:, None], np.arange(size))
        seen.append(np.stack([slots.epoch.ravel(), slots.sample.ravel()]))
    epoch, sample = np.concatenate(seen, axis=1)
    require_exact_epochs(epoch, sample, config.num_samples)
    taken = np.repeat(sizes, np.diff(bounds)).cumsum()
    for epoch in (0, 1):
        begin = order.epoch_start(epoch)
        if 0 < begin < enough:
            assert taken[begin - 1] >= epoch * config.num_samples
            assert begin == 1 or taken[begin - 2] < epoch * config.num_samples


@given(
    num_samples=st.integers(1, 10_000),
    batch=st.integers(1, 300),
    tail=st.sampled_from(["wrap", "pad"]),
)
def test_passes_over_the_data_follow_each_other_without_a_gap(num_samples, batch, tail):
    order = Order(plan_order(num_samples, global_batch_size=batch, seed=0, tail=tail))
    assert order.epoch_start(0) == 0
    assert [order.epoch_start(e) + order.num_steps(e) for e in range(4)] == [
        order.epoch_start(e + 1) for e in range(4)
    ]
    if tail == "wrap":
        assert order.epoch_start(4) == -(-4 * num_samples // batch)


def test_ten_billion_samples_on_sixteen_thousand_ranks_need_little_memory():
    tracemalloc.start()
    config = plan_order(10**10, global_batch_size=131_072, seed=1, canonical_ranks=16_384)
    order = Order(config)
    slots = order.slots(54_321_987, rank_positions(16_383, 16_384, 131_072))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert slots.sample.shape == (8,)
    assert slots.epoch.tolist() == [712] * 8
    assert slots.sample.min() >= 0
    assert slots.sample.max() < 10**10
    assert peak < 20e6  # a few integers for each of 131,072 lanes
    assert len(json.dumps(config.to_dict())) < 400


def test_samples_are_those_of_order_version_2():
    lanes = Order(plan_order(700_000, global_batch_size=256, seed=42))
    assert dataclasses.asdict(lanes.config) == {
        "num_samples": 700000,
        "global_batch_size": 256,
        "seed": 42,
        "tail": "wrap",
        "layout": "lanes",
        "canonical_ranks": 128,
        "canonical_workers": 8,
        "active_blocks": 8,
        "block_size": 15,
        "locality": "any",
        "ramp": (),
        "since": 0,
        "first_epoch": 0,
        "owed": 0,
        "before": None,
    }
    slots = lanes.slots(np.array([[0], [1], [5000]]), np.array([0, 1, 2, 128, 255]))
    assert slots.sample.tolist() == [
        [669931, 296806, 239138, 615976, 354232],
        [99055, 257844, 230280, 171682, 68133],
        [416480, 51768, 633985, 127933, 579811],
    ]
    assert slots.epoch.tolist() == [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
    small = Order(plan_order(11, global_batch_size=4, seed=42))
    assert small.slots(np.arange(6)[:, None], np.arange(4)).sample.tolist() == [
        [6, 5, 9, 3],
        [0, 4, 1, 7],
        [8, 10, 2, 4],
        [9, 8, 7, 5],
        [2, 6, 1, 3],
        [0, 10, 7, 6],
    ]


def test_short_block_at_the_end_holds_other_samples_each_epoch():
    config = OrderConfig(
        num_samples=100,
        global_batch_size=20,
        seed=0,
        canonical_workers=1,
        active_blocks=1,
        block_size=40,
    )
    last = {frozenset(batches(Order(config), [5 * e + 4])[..., 1].ravel()) for e in range(4)}
    assert len(last) == 4


def test_epochs_and_seeds_have_orders_of_their_own():
    def first_epochs(seed):
        order = Order(plan_order(6400, global_batch_size=64, seed=seed, canonical_ranks=2))
        assert order.config.layout == "lanes"
        return batches(order, np.arange(200))[..., 1].reshape(2, -1)

    orders = np.concatenate([first_epochs(1), first_epochs(2)])
    for i in range(4):
        for j in range(i):
            # Two random orders of 6400 agree in one place on average (Poisson).
            assert (orders[i] == orders[j]).sum() < 10


def test_without_shuffle_samples_come_in_the_order_of_their_ids():
    order = Order(plan_order(10, global_batch_size=4, seed=0, shuffle=False, tail="pad"))
    slots = order.slots(np.arange(3)[:, None], np.arange(4))
    assert slots.sample.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]
    assert slots.real.sum() == 10


def same_shard_pairs(shards, num_samples, samples_per_shard):
    """Pairs of one shard in the rows of `shards`, relative to a global shuffle."""
    pairs = sum(int((n * (n - 1) // 2).sum()) for n in map(np.bincount, shards))
    size = shards.shape[1]
    chance = (samples_per_shard - 1) / (num_samples - 1)
    return pairs / (len(shards) * size * (size - 1) / 2 * chance)


def test_batches_hold_as_few_samples_of_one_shard_as_a_global_shuffle():
    """Relative to a global shuffle within 5 %: more is clumps, less is spread on purpose.

    About 57,000 pairs are expected, a standard error of 0.4 %; rank batches have 13,400, 0.9 %.
    """
    order = Order(plan_order(512_000, global_batch_size=512, seed=8))
    assert order.config.block_size > 4
    shards = batches(order, np.arange(400))[..., 1] // 1000
    assert 0.95 < same_shard_pairs(shards, 512_000, 1000) < 1.05
    by_rank = shards.reshape(-1, 32)  # 16 ranks
    assert 0.8 < same_shard_pairs(by_rank, 512_000, 1000) < 1.1


def test_samples_of_one_batch_meet_again_no_more_often_than_by_chance():
    num_samples, batch = 256_000, 256
    order = Order(plan_order(num_samples, global_batch_size=batch, seed=8))
    rows = batches(order, np.arange(2 * num_samples // batch + 40)).reshape(-1, 3)
    step = np.repeat(np.arange(len(rows) // batch), batch)
    met = np.empty((2, num_samples), np.int64)
    for epoch in (0, 1):
        chosen = rows[:, 0] == epoch
        met[epoch, rows[chosen, 1]] = step[chosen]
    together = np.unique(met[0] * len(rows) + met[1], return_counts=True)[1]
    again = (together * (together - 1) // 2).sum()
    by_chance = num_samples * (num_samples - 1) / 2 * (batch / num_samples) ** 2
    assert abs(again / by_chance - 1) < 0.1


def test_class_sorted_data_does_not_drift_and_batches_are_mixed():
    num_samples, batch, classes = 256_000, 256, 10
    order = Order(plan_order(num_samples, global_batch_size=batch, seed=4))
    labels = batches(order, np.arange(1000))[..., 1] * classes // num_samples
    counts = np.stack([np.bincount(row, minlength=classes) for row in labels])
    chi_square = ((counts - batch / classes) ** 2 / (batch / classes)).sum(axis=1) / (classes - 1)
    assert 0.9 < chi_square.mean() < 1.1
    tenths = counts.reshape(10, 100, classes).sum(axis=1) / (100 * batch / classes)
    assert np.abs(tenths - 1).max() < 0.08  # four standard errors of independent draws


def test_blocks_are_opened_at_an_even_pace():
    config = plan_order(1_024_000, global_batch_size=512, seed=5, canonical_ranks=64)
    order = Order(config)
    # One node of eight: 64 positions. A block is seen first when no id near it was seen before.
    samples = batches(order, np.arange(900))[:, :64, 1]
    _, first = np.unique(samples // config.block_size, return_index=True)
    opened = np.bincount(first // 64, minlength=900)[300:]
    assert np.percentile(opened, 99) < 4 * opened.mean()


@given(
    num_samples=st.integers(1, 10**10),
    lanes=st.integers(1, 5000),
    active=st.integers(1, 16),
    target=st.integers(1, 256),
)
@settings(max_examples=examples(50), deadline=None)
def test_picked_block_size_stays_near_the_target(num_samples, lanes, active, target):
    size = pick_block_size(num_samples, num_lanes=lanes, active_blocks=active, target=target)
    assert 1 <= size <= max(1, target * 3 // 2)
    assert size == 1 or size * active * lanes * 4 <= num_samples * 3 // 2


@pytest.mark.parametrize("batch", [1, 2, 7, 96, 256, 509, 1000, 16_384])
def test_default_canonical_ranks_divide_the_batch(batch):
    assert batch % default_canonical_ranks(batch) == 0


def test_more_ranks_than_samples_each_get_a_share_of_every_batch():
    order = Order(plan_order(3, global_batch_size=64, seed=0, tail="pad"))
    parts = [order.slots(0, rank_positions(rank, 64, 64)) for rank in range(64)]
    assert sum(int(part.real.sum()) for part in parts) == 3
    assert {int(part.sample[0]) for part in parts} == {0, 1, 2}


def test_state_is_small_plain_json_and_comes_back_equal():
    config = dataclasses.replace(
        plan_order(10**6, global_batch_size=96, seed=2**64 - 1),
        ramp=(RampStep(step=10, global_batch_size=192),),
    )
    text = json.dumps(config.to_dict())
    assert len(text) < 500
    assert OrderConfig.from_dict(json.loads(text)) == config
    assert next(iter(config.to_dict())) == "version"


def test_state_of_another_version_or_with_other_fields_is_refused():
    state = plan_order(10, global_batch_size=2, seed=0).to_dict()
    with pytest.raises(StateError) as caught:
        OrderConfig.from_dict({**state, "version": 99})
    assert caught.value.reason == "order_version"
    with pytest.raises(StateError) as caught:
        OrderConfig.from_dict({**state, "colour": 1})
    assert caught.value.reason == "order_fields"
    assert caught.value.facts["unknown"] == ["colour"]


def test_indivisible_batch_is_refused_with_the_nearest_valid_ones():
    with pytest.raises(ConfigError) as caught:
        rank_positions(0, 6, 256)
    assert caught.value.reason == "batch_not_divisible"
    assert "252 or 258" in caught.value.fix


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_samples": 0}, "order_count"),
        ({"num_samples": 2.0}, "order_count"),
        ({"global_batch_size": "8"}, "order_count"),
        ({"global_batch_size": True}, "order_count"),
        ({"global_batch_size": 0}, "order_count"),
        ({"block_size": 0}, "order_count"),
        ({"seed": -1}, "order_seed"),
        ({"tail": "repeat"}, "order_tail"),
        ({"layout": "random"}, "order_layout"),
        ({"locality": "rank"}, "order_locality"),
        ({"canonical_ranks": 3}, "batch_not_divisible"),
        ({"num_samples": 2**60}, "order_size"),
        ({"canonical_workers": 2**31}, "order_size"),
        ({"since": 3, "owed": -1}, "order_before"),
        ({"first_epoch": 1}, "order_before"),
        ({"ramp": (RampStep(step=0, global_batch_size=8),)}, "order_ramp"),
        ({"ramp": (RampStep(step=5, global_batch_size=9),)}, "batch_not_divisible"),
        ({"ramp": (RampStep(step=5, global_batch_size=8),), "tail": "pad"}, "order_ramp"),
        ({"num_samples": 7, "tail": "drop_last"}, "order_empty"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(changes, reason):
    good = {"num_samples": 100, "global_batch_size": 8, "seed": 0, "canonical_ranks": 2}
    OrderConfig(**good)
    with pytest.raises(ConfigError) as caught:
        OrderConfig(**{**good, **changes})
    assert caught.value.reason == reason


@pytest.mark.parametrize("name", ["canonical_ranks", "canonical_workers", "block_size"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "4", True])
def test_counts_that_are_none_are_refused_when_an_order_is_planned(name, value):
    with pytest.raises(ConfigError) as caught:
        plan_order(1000, global_batch_size=8, seed=0, **{name: value})
    assert caught.value.reason == "order_count"
    assert caught.value.where == name


@pytest.mark.parametrize(("rank", "world_size"), [(4, 4), (-1, 4)])
def test_rank_outside_the_world_is_refused(rank, world_size):
    with pytest.raises(ConfigError) as caught:
        rank_positions(rank, world_size, 8)
    assert caught.value.reason == "rank"


@pytest.mark.parametrize(("step", "position"), [(-1, 0), (0, 8), (0, -1)])
def test_slot_outside_the_run_is_refused(step, position):
    with pytest.raises(ConfigError) as caught:
        Order(plan_order(100, global_batch_size=8, seed=0)).slots(step, position)
    assert caught.value.reason == "order_slot"


@st.composite
def continuations(draw):
    """Orders that go on with one another: (configuration, step from which it holds) each."""
    first = draw(configs(tail="wrap"))
    chain = [(first, 0)]
    step = 0
    for _ in range(draw(st.integers(1, 3))):
        step += draw(st.integers(1, 60))
        other = draw(configs(tail="wrap"))
        appended = draw(st.sampled_from([0, 0, 1, 50]))
        layout = "sequential" if first.layout == "sequential" else other.layout
        if first.layout != "sequential" and layout == "sequential":
            layout = "global"
        num_samples = chain[-1][0].num_samples + appended
        config = dataclasses.replace(other, num_samples=num_samples, seed=first.seed, layout=layout)
        chain.append((config, step))
    return chain


def continued(chain):
    order = Order(chain[0][0])
    orders = [order]
    for config, step in chain[1:]:
        order = order.continued(config, step=step)
        orders.append(order)
    return orders


def shown(orders, chain, stop):
    """(epoch, sample) of all slots up to a step of the last order."""
    bounds = [step for _, step in chain] + [stop]
    rows = []
    for each, start, end in zip(orders, bounds[:-1], bounds[1:], strict=True):
        batch = each.batch_at(start)[0]
        slots = each.slots(np.arange(start, end)[:, None], np.arange(batch))
        rows.append(np.stack([slots.epoch.ravel(), slots.sample.ravel()]))
    return np.concatenate(rows, axis=1)


@settings(max_examples=examples(80), deadline=None)
@given(chain=continuations())
def test_another_width_shows_every_sample_once_per_epoch_anyway(chain):
    orders = continued(chain)
    config = orders[-1].config
    slots = config.owed + 2 * config.num_samples
    epoch, sample = shown(orders, chain, config.since + -(-slots // config.global_batch_size))
    begin = 0
    for number in range(epoch[-1]):
        # The samples of an epoch are those of the last order that laid it out.
        own = [each for each in orders if each.config.first_epoch <= number][-1]
        size = own.config.num_samples
        assert (epoch[begin : begin + size] == number).all()
        assert np.array_equal(np.sort(sample[begin : begin + size]), np.arange(size))
        begin += size
    assert (epoch[begin:] == epoch[-1]).all()


def test_fifty_continuations_cost_no_more_than_one():
    sizes, slots, samples = [], [], []
    order = Order(plan_order(3_000, global_batch_size=48, seed=1))
    step = 0
    for i in range(50):
        stop = step + 70  # more than an epoch
        found = order.slots(np.arange(step, stop)[:, None], np.arange(order.batch_at(step)[0]))
        slots.append(found.epoch.ravel())
        samples.append(found.sample.ravel())
        step = stop
        batch = (48, 72)[i % 2 == 0]
        order = order.continued(
            plan_order(3_000, global_batch_size=batch, seed=1, canonical_ranks=(6, 8)[i % 2]),
            step=step,
        )
        sizes.append(len(json.dumps(order.config.to_dict())))
        assert len(order._known) <= 2
    require_exact_epochs(np.concatenate(slots), np.concatenate(samples), 3_000)
    assert max(sizes) < 700


@pytest.mark.parametrize("how", ["ramp", "mixture", "continued"])
def test_more_changes_within_an_epoch_than_a_state_holds_are_refused_by_name(how, monkeypatch):
    for module in ("config", "order", "mixture_config"):
        monkeypatch.setattr(f"loader.order.{module}.MOST_CHANGES", 3)
    monkeypatch.setattr("loader.order.pattern._MIN_PATTERN_SLOTS", 1)
    order = Order(plan_order(9_000, global_batch_size=8, seed=1))
    if how == "mixture":
        sources = [MixtureSource(name=name, num_samples=9_000, rate=1) for name in "ab"]
        order = MixtureOrder(plan_mixture(sources, global_batch_size=8, seed=1))
    for i in range(1, 5):
        with pytest.raises(ConfigError) if i == 4 else contextlib.nullcontext() as caught:
            if how == "continued":
                other = plan_order(9_000, global_batch_size=8 + i % 2, seed=1)
                order = order.continued(other, step=i)
            else:
                order = order.changed(step=i, global_batch_size=8 + 8 * (i % 2))
    assert caught.value.reason == "order_changes"
    assert caught.value.facts == {"changes": 4, "most": 3}


def test_fifty_continuations_inside_one_epoch_stay_exact():
    """What is owed cannot be forgotten then: the state grows by a line each time, and is exact."""
    chain, order = [(plan_order(40_000, global_batch_size=48, seed=1), 0)], None
    orders = [Order(chain[0][0])]
    for i in range(1, 50):
        config = plan_order(40_000, global_batch_size=(48, 72)[i % 2], seed=1)
        order = orders[-1].continued(config, step=10 * i)
        orders.append(order)
        chain.append((order.config, 10 * i))
    epoch, sample = shown(orders, chain, 2_000)
    require_exact_epochs(epoch, sample, 40_000)
    assert len(json.dumps(order.config.to_dict())) < 50 * 130


def test_an_order_that_is_laid_out_alike_continues_itself():
    order = Order(plan_order(5000, global_batch_size=8, seed=1))
    assert order.continued(plan_order(5000, global_batch_size=8, seed=1), step=77) is order
    ramped = order.changed(step=10, global_batch_size=16)
    same = dataclasses.replace(order.config, global_batch_size=16)
    assert ramped.continued(same, step=77) is ramped
    assert ramped.continued(order.config, step=77) is not ramped


@settings(max_examples=examples(100), deadline=None)
@given(chain=continuations())
def test_passes_after_a_change_of_width_begin_where_their_samples_are_counted(chain):
    orders = continued(chain)
    order = orders[-1]
    first = order.config.first_epoch
    known = order._known[0].first_epoch
    starts = [order.epoch_start(epoch) for epoch in range(first + 3)]
    assert starts[0] == 0
    assert starts == sorted(starts)
    steps = np.arange(starts[-1] + 1)
    sizes = np.zeros(len(steps), np.int64)
    for each, (_, step) in zip(orders, chain, strict=True):
        sizes[step:] = each.config.global_batch_size
    counted = np.concatenate([[0], np.cumsum(sizes)])
    wanted = 0
    for epoch, start in enumerate(starts):
        if epoch >= known:  # what is over is no longer known
            assert counted[start] >= wanted
            assert start == 0 or counted[start - 1] < wanted
        own = [each for each in orders if each.config.first_epoch <= epoch][-1]
        wanted += own.config.num_samples


@settings(max_examples=examples(30), deadline=None)
@given(chain=continuations())
def test_state_with_earlier_widths_comes_back_equal(chain):
    config = continued(chain)[-1].config
    assert OrderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_ranks_of_another_width_read_no_smaller_pieces_while_they_finish_the_epoch():
    old = Order(plan_order(200_000, global_batch_size=64, seed=5, canonical_ranks=16))
    new = plan_order(200_000, global_batch_size=72, seed=5, canonical_ranks=24)

    def runs_of_rank(order, stop):
        """Consecutive samples that one of eight ranks reads, and how many samples they are."""
        positions = rank_positions(3, 8, order.config.global_batch_size)
        slots = order.slots(np.arange(1000, stop)[:, None], positions)
        assert (slots.epoch == 0).all()
        samples = np.sort(slots.sample.ravel())
        return (np.diff(samples) > 1).sum() / len(samples)

    order = old.continued(new, step=1000)
    one, other = runs_of_rank(old, 3100), runs_of_rank(order, order.epoch_start(1) - 9)
    assert other < 1.1 * one < 0.2


def test_order_continues_from_its_first_step_on_without_a_trace_of_the_one_before():
    old = Order(plan_order(5000, global_batch_size=8, seed=1))
    new = plan_order(5000, global_batch_size=12, seed=1)
    assert old.continued(new, step=0).config == new
    other = plan_order(5000, global_batch_size=20, seed=1)
    twice = old.continued(other, step=9).continued(new, step=9)
    assert twice.config == old.continued(new, step=9).config


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 2},
        {"num_samples": 99},
        {"tail": "pad"},
        {"layout": "sequential"},
    ],
)
def test_orders_that_cannot_continue_with_each_other_are_refused(changes):
    old = Order(OrderConfig(num_samples=100, global_batch_size=8, seed=0, layout="global"))
    with pytest.raises(ConfigError) as caught:
        old.continued(dataclasses.replace(old.config, **changes), step=5)
    assert caught.value.reason == "order_before"


def test_slot_before_the_change_is_refused():
    old = Order(plan_order(100, global_batch_size=8, seed=0))
    order = old.continued(plan_order(100, global_batch_size=6, seed=0), step=5)
    assert order.slots(5, np.arange(6)).sample.shape == (6,)
    with pytest.raises(ConfigError) as caught:
        order.slots(4, 0)
    assert caught.value.reason == "order_slot"


def test_active_blocks_may_be_as_many_as_the_samples():
    config = plan_order(10**10, global_batch_size=1024, seed=1, active_blocks=10**10)
    assert config.block_size == 1
    assert len(Order(config).slots(3, np.arange(4)).sample) == 4


def test_changes_of_other_types_are_refused():
    order = Order(plan_order(1000, global_batch_size=8, seed=1))
    for batch in (0, -8, "8", None, 2.0, 1e308, True, {}):
        with pytest.raises(ConfigError) as caught:
            order.changed(step=3, global_batch_size=batch)
        assert caught.value.reason == "order_count"
    for step in (-1, "8", None, 2.0, 1e308, True, {}):
        with pytest.raises(ConfigError) as caught:
            order.changed(step=step, global_batch_size=8)
        assert caught.value.reason == "order_step"
    for seed in (2.0, True, "8", None):
        with pytest.raises(ConfigError) as caught:
            plan_order(1000, global_batch_size=8, seed=seed)
        assert caught.value.reason == "order_seed"


@pytest.mark.parametrize("layout", ["lanes", "global", "sequential"])
def test_ramps_that_are_over_are_dropped(layout, monkeypatch):
    """Fifty changes: the state, and the segments that the first step needs, stay as few."""
    num = 700
    config = dataclasses.replace(
        plan_order(num, global_batch_size=8, seed=1, shuffle=layout != "sequential"),
        layout=layout,
        canonical_ranks=2,
        canonical_workers=2,
        active_blocks=4,
        block_size=4 if layout == "lanes" else 1,
    )
    order, whole, step, shown, texts = Order(config), Order(config), 0, [], []
    for i in range(50):
        stop = step + 97 + i % 7
        batch = order.batch_at(step)[0]
        shown.append(order.slots(np.arange(step, stop)[:, None], np.arange(batch)))
        # Those who hand out batches ahead of their consumer ask for a few steps before.
        step = stop
        order = order.changed(step=step, global_batch_size=(12, 6, 8)[i % 3])
        before = order.slots(np.arange(step - 60, step)[:, None], np.arange(batch))
        assert np.array_equal(before.sample, shown[-1].sample[-60:])
        texts.append(json.dumps(order.config.to_dict()))
        order = Order(OrderConfig.from_dict(json.loads(texts[-1])))
        assert order.config.global_batch_size == 8
        assert len(order._segments) <= 3
        # Nothing but the size depends on what was dropped.
        change = RampStep(step=step, global_batch_size=order.batch_at(step)[0])
        whole = Order(dataclasses.replace(config, ramp=(*whole.config.ramp, change)))
        for epoch in range(order.config.first_epoch + 1, order.config.first_epoch + 4):
            assert order.epoch_start(epoch) == whole.epoch_start(epoch)
    flat = np.concatenate([slots.sample.ravel() for slots in shown])
    for epoch in range(len(flat) // num):
        assert len(set(flat[epoch * num : epoch * num + num].tolist())) == num
    assert max(map(len, texts)) < 420


def test_a_ramp_inside_one_epoch_is_kept_whole():
    order = Order(plan_order(10**6, global_batch_size=8, seed=1))
    for step in range(100, 1100, 100):
        order = order.changed(step=step, global_batch_size=8 + 8 * (step // 100 % 2))
    assert len(order.config.ramp) == 10
    assert order.slots(0, 0).epoch.tolist() == [0]


@pytest.mark.parametrize(("how", "each"), [("changed", 45), ("continued", 105)])
def test_fifty_changes_within_one_epoch_take_a_fixed_length_each_and_end_with_it(how, each):
    """What is left of the epoch is known by all of them, so none can be dropped before its end."""
    size, batch, step, seen, lengths = 20_000, 8, 0, [], []
    order = Order(plan_order(size, global_batch_size=batch, seed=1))
    start = len(json.dumps(order.config.to_dict()))
    for i in range(50):
        seen.append(order.slots(np.arange(step, step + 9)[:, None], np.arange(batch)))
        step, batch = step + 9, (16, 8)[i % 2]
        if how == "changed":
            order = order.changed(step=step, global_batch_size=batch)
        else:
            order = order.continued(plan_order(size, global_batch_size=batch, seed=1), step=step)
        lengths.append(len(json.dumps(order.config.to_dict())) - start)
        state = json.loads(json.dumps(order.config.to_dict()))
        require_plain(state)
    assert all(length <= each * (i + 2) for i, length in enumerate(lengths))
    assert OrderConfig.from_dict(state) == order.config
    left = (size - sum(part.sample.size for part in seen)) // batch
    assert left > 1000  # all of it within one epoch
    seen.append(order.slots(np.arange(step, step + left)[:, None], np.arange(batch)))
    assert all(np.all(part.epoch == 0) for part in seen)
    shown = np.concatenate([part.sample.ravel() for part in seen])
    assert len(np.unique(shown)) == len(shown) > size - batch
    later = order.changed(step=step + left + 1000, global_batch_size=24)
    assert len(json.dumps(later.config.to_dict())) - start <= 2 * each


@pytest.mark.parametrize(("size", "batch"), [(40_000, 4_096), (50_000, 256)])
@pytest.mark.parametrize("number", [0, 9, 89])
def test_a_pass_leaves_out_and_repeats_nothing_at_the_sizes_where_version_1_did(
    size, batch, number
):
    """Version 1 never showed 0.9 to 29 % of the samples in one of these passes."""
    order = Order(plan_order(size, global_batch_size=batch, seed=1))
    begin, stop = order.epoch_start(number), order.epoch_start(number + 1)
    sample = order.slots(np.arange(begin, stop)[:, None], np.arange(batch)).sample.ravel()
    left = size - (begin * batch - number * size)  # the batch at the border had the others
    assert size - batch < left <= size
    assert len(np.unique(sample[:left])) == left
    assert len(sample) - left < batch
