"""Packed epochs: a pass shows each sample of its epoch once, for all sizes, ranks and stops."""

import json
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loader.order import pack_epochs
from loader.order.config import OrderConfig, plan_order
from loader.order.order import Order
from loader.order.pack_epochs import MOST_PLANNED, epoch_streams, plans_epochs
from loader.order.packing import PackConfig
from loader.order.schedule import PackSchedule, plan_packing
from loader.topology import Topology
from shardspec.errors import ConfigError
from tests.examples import examples

ALONE = Topology()
LIMIT, MAX_CROPS = 1000, 9


@st.composite
def settings_of_runs(draw):
    """What a schedule is made of: small epochs in many streams, and large ones in few."""
    ranks = draw(st.sampled_from([1, 2, 3, 4, 6, 12]))
    return {
        "num_samples": draw(st.integers(1, 500)),
        "ranks": ranks,
        "batch": ranks * draw(st.integers(1, 4)),
        "streams": draw(st.sampled_from([n for n in range(1, ranks + 1) if ranks % n == 0])),
        "window": draw(st.integers(1, 40)),
        "windows": draw(st.integers(1, 3)),
        "mean": draw(st.integers(1, 700)),
        "seed": draw(st.integers(0, 100)),
    }


def make(own, *, balance=False, places=(), sizes=None):
    """Makes a schedule; the number of streams would follow from more samples than tests have."""
    order = Order(
        plan_order(
            own["num_samples"],
            global_batch_size=own["batch"],
            seed=own["seed"],
            canonical_ranks=own["ranks"],
        )
    )
    config = PackConfig(
        sequence_length=LIMIT,
        max_crops=MAX_CROPS,
        window=own["window"],
        windows_per_run=own["windows"],
        seed=own["seed"],
    )
    tokens, crops = lengths_of(own)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_epochs, "epoch_streams", lambda _: own["streams"])
        schedule = PackSchedule(
            order,
            lambda dataset, sample: (tokens[sample] + 0 * dataset, crops[sample]),
            config,
            patches_per_crop=3,
            balance=balance,
        )
    if sizes:
        schedule.set_sizes(sizes)
    schedule.go_to(places)
    return schedule


def lengths_of(own):
    rng = np.random.RandomState(own["seed"])
    tokens = rng.randint(0, 2 * own["mean"] + 1, own["num_samples"])  # some exceed the limit
    return tokens, rng.randint(0, 4, own["num_samples"])


def joined(schedule, step, world_size=1):
    ranks = (Topology(rank=rank, world_size=world_size) for rank in range(world_size))
    return [row for topology in ranks for row in schedule.rows(step, topology)]


def steps_of(schedule, num_epochs):
    """Runs over the first passes: {(epoch, sample): steps in which it is}."""
    found = defaultdict(list)
    for step in range(schedule.epoch_start(num_epochs)):
        rows = schedule.rows(step, ALONE)
        assert len(rows) == schedule.batch_at(step)[0]
        for row in rows:
            assert len({ref.epoch for ref in row}) == 1
            assert all(ref.real and ref.dataset == 0 for ref in row)
            for ref in row:
                found[ref.epoch, ref.sample].append(step)
    return found


def require_exact(schedule, own, *, num_epochs):
    """Every sample is in its epoch's pass, or in the step before where that holds two epochs."""
    found = steps_of(schedule, num_epochs)
    assert {len(steps) for steps in found.values()} <= {1}
    for epoch in range(num_epochs):
        begin, end = schedule.epoch_start(epoch), schedule.epoch_start(epoch + 1)
        for sample in range(own["num_samples"]):
            assert begin - 1 <= found[epoch, sample][0] < end
        assert all(schedule.epoch_at(step) == epoch for step in range(begin, end))


@settings(max_examples=examples(30), deadline=None)
@given(own=settings_of_runs())
def test_passes_show_every_sample_of_their_epoch_once_but_for_the_border_step(own):
    require_exact(make(own), own, num_epochs=6)


@settings(max_examples=examples(30), deadline=None)
@given(own=settings_of_runs())
def test_packs_are_within_the_limits_and_of_one_stream(own):
    schedule = make(own)
    tokens, crops = lengths_of(own)
    tokens = np.minimum(tokens, LIMIT)
    share = own["batch"] // own["streams"]
    order = Order(schedule._packs._samples._order.config)
    slots = np.arange(own["num_samples"])
    steps, positions = np.divmod(slots, own["batch"])
    stream_of = np.empty(own["num_samples"], np.int64)
    stream_of[order.slots(steps, positions).sample] = positions // share
    for step in range(schedule.epoch_start(1)):
        for row in schedule.rows(step, ALONE):
            samples = [ref.sample for ref in row]
            assert tokens[samples].sum() <= LIMIT
            assert crops[samples].sum() <= MAX_CROPS
            if row[0].epoch == 0:
                assert len(set(stream_of[samples])) == 1


@settings(max_examples=examples(12), deadline=None)
@given(own=settings_of_runs(), data=st.data())
def test_global_batches_do_not_depend_on_the_number_of_ranks(own, data):
    worlds = [n for n in range(1, 13) if own["batch"] % n == 0]
    plain, balanced = make(own), make(own, balance=True)
    for step in range(min(9, plain.epoch_start(3))):
        world_size = data.draw(st.sampled_from(worlds))
        want = plain.rows(step, ALONE)
        assert joined(make(own), step, world_size) == want
        assert sorted(joined(balanced, step, world_size)) == sorted(want)


@settings(max_examples=examples(12), deadline=None)
@given(own=settings_of_runs(), data=st.data())
def test_every_step_is_a_place_to_resume_from_and_again(own, data):
    whole = make(own)
    stop = min(25, whole.epoch_start(4))
    want = [whole.rows(step, ALONE) for step in range(stop + 3)]
    states = []
    for rank in (0, own["batch"] - 1):  # whoever saves
        saving = make(own)
        states.append([])
        for step in range(stop + 1):
            states[-1].append(json.loads(json.dumps(saving.places(step))))
            saving.rows(step, Topology(rank=rank, world_size=own["batch"]))
    assert states[0] == states[1]
    for step in data.draw(st.permutations(range(stop + 1))):
        assert len(json.dumps(states[0][step])) < 40
        resumed = make(own, places=states[0][step])
        assert resumed.epoch_at(step) == whole.epoch_at(step)
        assert resumed.rows(step, ALONE) == want[step]
        again = make(own, places=resumed.places(step + 1))
        assert [again.rows(step + i, ALONE) for i in (1, 2)] == want[step + 1 : step + 3]


@st.composite
def changes(draw, own):
    """Packs per step that change at random steps, several times within an epoch too."""
    steps = sorted(draw(st.sets(st.integers(1, 40), max_size=6)))
    share = st.integers(1, 5)
    return [(0, own["batch"]), *((step, own["ranks"] * draw(share)) for step in steps)]


@settings(max_examples=examples(30), deadline=None)
@given(own=settings_of_runs(), data=st.data())
def test_epochs_stay_exact_where_the_packs_per_step_change(own, data):
    sizes = data.draw(changes(own))
    require_exact(make(own, sizes=sizes), own, num_epochs=5)


@settings(max_examples=examples(12), deadline=None)
@given(own=settings_of_runs(), data=st.data())
def test_changes_made_on_the_way_are_those_known_in_advance_and_resume(own, data):
    sizes = data.draw(changes(own))
    known, made = make(own, sizes=sizes), make(own)
    done = sizes[:1]
    for step in range(sizes[-1][0] + 4):
        if step in dict(sizes[1:]):
            done = [*done, (step, dict(sizes)[step])]
            made.set_sizes(done)
        want = known.rows(step, ALONE)
        assert made.rows(step, ALONE) == want
        if step % 3 == 0:
            resumed = make(own, sizes=done, places=made.places(step))
            assert resumed.rows(step, ALONE) == want
            made = resumed


def test_hundreds_of_changes_within_an_epoch_are_not_a_burden():
    own = {"num_samples": 3000, "ranks": 2, "batch": 2, "streams": 1, "seed": 0}
    own |= {"window": 16, "windows": 8, "mean": 700}
    sizes = [(step, 2 if step % 2 else 4) for step in range(600)]
    schedule = make(own, sizes=[(0, 2), *sizes[1:]])
    assert schedule.epoch_start(1) > 600
    require_exact(schedule, own, num_epochs=1)


def test_steps_can_be_requested_in_any_order():
    own = {"num_samples": 400, "ranks": 4, "batch": 8, "streams": 2, "seed": 0}
    own |= {"window": 10, "windows": 2, "mean": 300}
    want = [make(own).rows(step, ALONE) for step in range(60)]
    schedule = make(own)
    for step in np.random.RandomState(0).permutation(60).tolist():
        assert schedule.rows(step, ALONE) == want[step]
    schedule.go_to(schedule.places(50))
    assert schedule.epoch_start(1) == make(own).epoch_start(1)
    assert schedule.rows(3, ALONE) == want[3]


def captions(num_samples):
    """Image captions: lognormal around 650 tokens, and an image's crops by length."""
    rng = np.random.RandomState(0)
    tokens = np.clip(rng.lognormal(np.log(650), 0.35, num_samples), 300, 1400).astype(np.int64)
    return tokens, np.clip(tokens // 170, 1, 8)


def packed(num_samples, *, batch, length=4096, max_crops=48, counted=None):
    order = Order(plan_order(num_samples, global_batch_size=batch, seed=0))
    tokens, crops = captions(num_samples)

    def lengths(dataset, sample):
        if counted is not None:
            counted.append(len(dataset))
        return tokens[sample], crops[sample]

    config = plan_packing(order, sequence_length=length, max_crops=max_crops)
    return PackSchedule(order, lengths, config, patches_per_crop=576, balance=False)


@pytest.mark.parametrize("num_samples, batch", [(500, 8), (3000, 48), (50_000, 256)])
@pytest.mark.parametrize("length, max_crops", [(4096, 48), (16_384, 128)])
def test_packs_of_an_epoch_are_full_however_small_it_is(num_samples, batch, length, max_crops):
    schedule = packed(num_samples, batch=batch, length=length, max_crops=max_crops)
    num_packs = schedule._packs._epoch(0).length
    assert captions(num_samples)[0].sum() / (num_packs * length) >= 0.98


def test_packs_that_are_counted_are_those_that_are_made():
    counted, made = packed(120_000, batch=8), packed(120_000, batch=8)
    packs = counted._packs._epoch(0)
    assert len(packs._packs) > pack_epochs._FEW_RUNS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_epochs, "_FEW_RUNS", 1000)
        assert np.array_equal(packs._packs, made._packs._epoch(0)._packs)


def test_canonical_ranks_read_few_samples_but_their_own():
    schedule = packed(100_000, batch=16)
    assert schedule.num_streams == 16
    order = schedule._packs._samples._order
    steps, positions = np.divmod(np.arange(100_000), 16)
    rank_of = np.empty(100_000, np.int64)
    rank_of[order.slots(steps, positions).sample] = positions
    own = [
        rank_of[ref.sample] == position
        for step in range(schedule.epoch_start(1))
        for position, row in enumerate(schedule.rows(step, ALONE))
        for ref in row
        if ref.epoch == 0
    ]
    assert np.mean(own) > 0.97


def test_resuming_looks_up_an_epoch_and_never_those_before():
    counted = []
    schedule = packed(20_000, batch=16, counted=counted)
    late = schedule.epoch_start(3) + 5
    want, places = schedule.rows(late, ALONE), schedule.places(late)
    assert places[0][0] == 3
    counted.clear()
    resumed = packed(20_000, batch=16, counted=counted)
    resumed.go_to(places)
    assert resumed.rows(late, ALONE) == want
    assert sum(counted) <= 2 * 20_000
    counted.clear()
    for step in range(late + 1, late + 50):
        resumed.rows(step, ALONE)
    assert sum(counted) <= 20_000


def test_lengths_that_cannot_be_read_for_once_move_no_pack():
    fails = []
    own = {"num_samples": 300, "ranks": 2, "batch": 4, "streams": 2, "seed": 0}
    own |= {"window": 10, "windows": 2, "mean": 300}
    schedule = make(own)
    samples = schedule._packs._samples
    lengths = samples._lengths

    def refused(dataset, sample):
        if fails:
            raise OSError(fails.pop())
        return lengths(dataset, sample)

    samples._lengths = refused
    for step in range(30):
        fails.append("too many open files")
        try:
            schedule.rows(step, ALONE)
        except OSError:
            assert not fails
        fails.clear()
        assert schedule.rows(step, ALONE) == make(own).rows(step, ALONE)


@pytest.mark.parametrize(
    ("num_samples", "ranks", "streams"),
    [
        (100, 8, 1),
        (5000, 8, 2),
        (16_384, 8, 8),
        (16_383, 8, 4),
        (10**6, 192, 192),
        (10**5, 192, 48),
    ],
)
def test_streams_have_a_run_of_samples_at_least(num_samples, ranks, streams):
    config = OrderConfig(
        num_samples=num_samples, global_batch_size=ranks, seed=0, canonical_ranks=ranks
    )
    assert epoch_streams(config) == streams


def test_epochs_are_planned_ahead_up_to_a_number_of_samples():
    for num_samples, exact in ((MOST_PLANNED, True), (MOST_PLANNED + 1, False)):
        order = Order(plan_order(num_samples, global_batch_size=64, seed=0))
        config = plan_packing(order, sequence_length=4096, max_crops=None)
        schedule = PackSchedule(
            order, lambda d, s: (s, d), config, patches_per_crop=1, balance=True
        )
        assert plans_epochs(order) == schedule.pass_is_exact == exact


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ([(0, 6)], "batch_not_divisible"),
        ([(0, 0)], "order_count"),
        ([(0, 4.0)], "order_count"),
        ([(1, 4)], "order_ramp"),
        ([(0, 4), (5, 8), (5, 4)], "order_ramp"),
        ([(0, 4), (5, 8), (3, 4)], "order_ramp"),
    ],
)
def test_sizes_that_cannot_be_honoured_are_refused(sizes, reason):
    own = {"num_samples": 300, "ranks": 4, "batch": 4, "streams": 2, "seed": 0}
    own |= {"window": 10, "windows": 2, "mean": 300}
    with pytest.raises(ConfigError) as caught:
        make(own).set_sizes(sizes)
    assert caught.value.reason == reason
