"""Packs: nothing lost, nothing over the limits, nothing waiting, and full."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loader.order.packing import (
    PackConfig,
    PackStream,
    balance_ranks,
    count_runs,
    plan_run,
    plan_window,
)
from loader.order.permutation import keyed_array, permute
from shardspec.errors import ConfigError
from tests.examples import examples

LENGTHS = st.lists(st.tuples(st.integers(0, 130), st.integers(0, 9)), min_size=0, max_size=120)


def arrays(lengths):
    table = np.array(lengths, np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def captions(num_samples, seed=0):
    """Image captions: lognormal around 650 tokens, and an image's crops by length."""
    rng = np.random.RandomState(seed)
    tokens = np.clip(rng.lognormal(np.log(650), 0.35, num_samples), 300, 1400).astype(np.int64)
    return tokens, np.clip(tokens // 170, 1, 8)


def mixed(num_samples, seed=0):
    """Half text of any length, half pictures of a few sizes with a short answer."""
    rng = np.random.RandomState(seed)
    text = np.clip(rng.lognormal(np.log(150), 0.8, num_samples), 10, 3000)
    picture = rng.choice([300, 729, 1400], num_samples) + rng.randint(20, 300, num_samples)
    is_text = rng.rand(num_samples) < 0.5
    tokens = np.where(is_text, text, picture).astype(np.int64)
    return tokens, np.where(is_text, 0, picture // 170).astype(np.int64)


@settings(max_examples=examples(200), deadline=None)
@given(lengths=LENGTHS, data=st.data())
def test_window_places_every_sample_once_within_the_limits(lengths, data):
    tokens, crops = arrays(lengths)
    config = PackConfig(sequence_length=100, max_crops=8)
    num_carried = data.draw(st.integers(0, len(lengths)))
    last = data.draw(st.booleans())
    plan = plan_window(tokens, crops, config=config, num_carried=num_carried, last=last, key=3)
    placed = np.concatenate([*plan.packs, plan.carried]).astype(np.int64)
    assert np.array_equal(np.sort(placed), np.arange(len(lengths)))
    assert (plan.carried >= num_carried).all()
    assert not (last and len(plan.carried))
    for pack in plan.packs:
        assert np.minimum(tokens, 100)[pack].sum() <= 100
        assert np.minimum(crops, 8)[pack].sum() <= 8


@settings(max_examples=examples(60), deadline=None)
@given(lengths=LENGTHS, window=st.integers(1, 50))
def test_run_places_every_sample_once_and_none_waits_more_than_a_window(lengths, window):
    tokens, crops = arrays(lengths)
    config = PackConfig(sequence_length=100, max_crops=8, window=window)
    packs = plan_run(tokens, crops, config=config)
    placed = np.concatenate([np.zeros(0, np.int64), *packs])
    assert np.array_equal(np.sort(placed), np.arange(len(lengths)))
    latest = -1
    for pack in packs:
        windows = pack // window
        assert windows.max() - windows.min() <= 1
        latest = max(latest, int(windows.max()))
        assert windows.min() >= latest - 1


def straightforward_run(tokens, crops, *, config, key):
    """Packs a run as the rule says it, one sample after the other, looking at every pack."""
    limit = config.sequence_length
    packs, carried = [], []
    for start in range(0, len(tokens), config.window):
        stop = min(start + config.window, len(tokens))
        samples = [*carried, *range(start, stop)]
        crop_limit = config.max_crops or 1 + int(crops.sum())
        need = {
            s: (min(int(tokens[s]), limit), min(int(crops[s]), crop_limit) * bool(config.max_crops))
            for s in samples
        }

        def share(s, need=need, crop_limit=crop_limit):
            return max(need[s][0] / limit, need[s][1] / crop_limit)

        rest = [s for s in samples if s not in carried]
        opened = []  # [tokens left, crops left, samples]
        for s in sorted(carried, key=share, reverse=True) + sorted(rest, key=share, reverse=True):
            fits = [p for p in opened if p[0] >= max(1, need[s][0]) and p[1] >= need[s][1]]
            if not fits:
                opened.append([limit, crop_limit, []])
                fits = opened[-1:]
            best = min(fits, key=lambda p: p[0])
            best[0] -= need[s][0]
            best[1] -= need[s][1]
            best[2].append(s)
        waiting = []
        if stop < len(tokens):
            may = [
                p
                for p in opened
                if p[0] > 0.02 * limit and p[1] > 0.02 * crop_limit and not set(carried) & set(p[2])
            ]
            waiting = sorted(may, key=lambda p: -p[0])[: -(-len(opened) // 8)]
        leaving = [sorted(p[2]) for p in opened if not any(p is w for w in waiting)]
        window_key = int(keyed_array(key, start)[0])
        moved = permute(np.arange(len(leaving)), size=max(1, len(leaving)), key=window_key)
        packs += [leaving[i] for i in moved.tolist()]
        carried = sorted(s for p in waiting for s in p[2])
    return packs


@settings(max_examples=examples(150), deadline=None)
@given(
    lengths=LENGTHS,
    window=st.integers(1, 50),
    max_crops=st.sampled_from([None, 1, 8]),
    key=st.integers(0, 2**64 - 1),
)
def test_packs_are_those_of_the_straightforward_algorithm(lengths, window, max_crops, key):
    tokens, crops = arrays(lengths)
    config = PackConfig(sequence_length=100, max_crops=max_crops, window=window)
    packs = plan_run(tokens, crops, config=config, key=key)
    want = straightforward_run(tokens, crops, config=config, key=key)
    assert [pack.tolist() for pack in packs] == want


@settings(max_examples=examples(100), deadline=None)
@given(
    num_runs=st.integers(1, 7),
    size=st.integers(1, 90),
    window=st.integers(1, 50),
    limits=st.sampled_from([(100, None), (100, 1), (100, 8), (2**24, 2**16)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_packs_of_runs_are_counted_without_being_made(num_runs, size, window, limits, seed):
    rng = np.random.RandomState(seed)
    scale = limits[0] // 100
    tokens = rng.randint(0, rng.randint(2, 131), (num_runs, size)) * scale
    crops = rng.randint(0, rng.randint(1, 10), (num_runs, size))
    config = PackConfig(sequence_length=limits[0], max_crops=limits[1], window=window)
    pairs = zip(tokens, crops, strict=True)
    want = [len(plan_run(*pair, config=config)) for pair in pairs]
    assert count_runs(tokens, crops, config=config).tolist() == want


@pytest.mark.parametrize("lengths", [captions, mixed])
@pytest.mark.parametrize(("sequence_length", "max_crops"), [(4096, 48), (4096, None), (16_384, 20)])
def test_packs_of_realistic_runs_are_counted_exactly(lengths, sequence_length, max_crops):
    config = PackConfig(
        sequence_length=sequence_length, max_crops=max_crops, window=256, windows_per_run=3
    )
    tokens, crops = (column.reshape(-1, config.run) for column in lengths(12 * config.run))
    pairs = zip(tokens, crops, strict=True)
    want = [len(plan_run(*pair, config=config)) for pair in pairs]
    assert count_runs(tokens, crops, config=config).tolist() == want


@pytest.mark.parametrize("lengths", [captions, mixed])
@pytest.mark.parametrize("window", [256, 512, 1024])
@pytest.mark.parametrize(
    ("sequence_length", "max_crops", "least"),
    [(4096, 48, 0.98), (4096, None, 0.98), (16_384, 128, 0.97), (16_384, None, 0.97)],
)
def test_packs_of_realistic_lengths_are_full(lengths, window, sequence_length, max_crops, least):
    config = PackConfig(sequence_length=sequence_length, max_crops=max_crops, window=window)
    tokens, crops = lengths(config.run)
    packs = plan_run(tokens, crops, config=config)
    assert tokens.sum() / (len(packs) * sequence_length) >= least


def test_packs_come_in_no_order_of_length():
    tokens, crops = captions(1024)
    plan = plan_window(tokens, crops, config=PackConfig(sequence_length=4096), last=True, key=1)
    longest = np.array([tokens[pack].max() for pack in plan.packs])
    half = len(longest) // 2
    assert abs(longest[:half].mean() / longest[half:].mean() - 1) < 0.1
    other = plan_window(tokens, crops, config=PackConfig(sequence_length=4096), last=True, key=2)
    as_sets = [{tuple(pack) for pack in made.packs} for made in (plan, other)]
    assert as_sets[0] == as_sets[1]
    assert [tuple(pack) for pack in plan.packs] != [tuple(pack) for pack in other.packs]


def test_sample_over_the_limit_has_a_pack_of_its_own():
    tokens, crops = np.array([50, 300, 40]), np.array([1, 1, 20])
    config = PackConfig(sequence_length=100, max_crops=10)
    packs = plan_run(tokens, crops, config=config)
    assert sorted(pack.tolist() for pack in packs) == [[0], [1], [2]]


def test_packs_are_the_ones_of_the_first_release():
    tokens, crops = mixed(60)
    config = PackConfig(sequence_length=4096, max_crops=9, window=20)
    packs = plan_run(tokens, crops, config=config, key=9)
    assert [pack.tolist() for pack in packs] == [
        [0, 1, 2, 4, 7, 9, 12, 14, 17],
        [16],
        [6],
        [10],
        [3],
        [5, 8, 11, 13, 18, 19],
        [24, 26, 28, 29, 30, 36],
        [15],
        [35],
        [20, 21, 22, 25, 27, 31, 32, 33, 34, 37, 38, 39],
        [52],
        [49, 57, 58],
        [41],
        [40, 42, 43, 45, 46, 50, 51, 53, 54, 56, 59],
        [47],
        [44, 48, 55],
        [23],
    ]


def test_crops_have_no_influence_where_there_is_no_limit_of_them():
    tokens, crops = mixed(60)
    config = PackConfig(sequence_length=4096, window=20)
    packs = [pack.tolist() for pack in plan_run(tokens, crops, config=config, key=9)]
    assert packs == [pack.tolist() for pack in plan_run(tokens, 0 * crops, config=config, key=9)]
    assert packs[:3] == [[6, 13, 16], [0, 4, 8, 14, 15, 17], [3, 10, 11]]


def stream(place=(0, 0), number=0):
    tokens, crops = mixed(40_000, seed=5)

    def lengths(start, stop):
        return tokens[start:stop], crops[start:stop]

    config = PackConfig(sequence_length=4096, window=64, windows_per_run=4)
    return PackStream(lengths, config, stream=number, place=place)


def test_stream_shows_every_sample_once_and_resumes_at_every_pack():
    whole = stream()
    packs, places = [], []
    for n in range(300):
        packs.append(whole.pack(n))
        places.append(whole.place)
    placed = np.concatenate(packs)
    assert len(np.unique(placed)) == len(placed)
    complete = places[-1][0] * 256
    assert np.array_equal(np.sort(placed)[:complete], np.arange(complete))
    for n in range(300):
        assert np.array_equal(stream(place=places[n]).pack(n), packs[n])


def test_lengths_that_cannot_be_read_for_once_move_no_pack():
    whole = stream()
    lengths, fails = whole._lengths, []

    def refused(start, stop):
        if fails:
            raise OSError(fails.pop())
        return lengths(start, stop)

    whole._lengths = refused
    for n in range(300):
        fails.append("too many open files")
        with contextlib.suppress(OSError):
            whole.pack(n)
        fails.clear()
        assert np.array_equal(whole.pack(n), stream().pack(n))


def test_stream_can_be_asked_in_any_order():
    ahead = stream()
    later = ahead.pack(500)
    assert np.array_equal(ahead.pack(3), stream().pack(3))
    assert np.array_equal(ahead.pack(500), later)
    walked = stream()
    for n in range(1500):
        pack = walked.pack(n)
        if n % 97 == 0:
            jumped = stream()
            assert np.array_equal(jumped.pack(n), pack)
            assert jumped.place == walked.place


def test_streams_shuffle_their_packs_differently():
    assert stream().pack(0).tolist() != stream(number=1).pack(0).tolist()


@settings(deadline=None)
@given(
    cost=st.lists(st.integers(0, 1000), min_size=1, max_size=12),
    world_size=st.integers(1, 8),
)
def test_balanced_ranks_hold_every_pack_once_and_no_worse_than_unsorted(cost, world_size):
    costs = np.array(cost * world_size)
    order = balance_ranks(costs, world_size=world_size)
    assert np.array_equal(np.sort(order), np.arange(len(costs)))
    assert costs[order].reshape(world_size, -1).sum(axis=1).max() <= (
        costs.sum() / world_size + costs.max()
    )


@given(
    rows=st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 3)), min_size=1, max_size=12),
    world_size=st.integers(1, 8),
)
def test_every_rank_gets_a_picture_where_there_are_as_many(rows, world_size):
    tokens, crops = arrays(rows * world_size)
    order = balance_ranks(tokens + 576 * crops, world_size=world_size, first=crops > 0)
    assert np.array_equal(np.sort(order), np.arange(len(tokens)))
    with_pictures = (crops > 0)[order].reshape(world_size, -1).any(axis=1).sum()
    assert with_pictures == min(world_size, (crops > 0).sum())


def test_ranks_get_nearly_equal_cost():
    costs = np.random.RandomState(0).lognormal(0, 0.5, 512)
    before = costs.reshape(64, 8).sum(axis=1)
    after = costs[balance_ranks(costs, world_size=64)].reshape(64, 8).sum(axis=1)
    assert before.max() / before.mean() > 1.3
    assert after.max() / after.mean() < 1.05


def test_packs_that_ranks_cannot_share_evenly_are_refused():
    with pytest.raises(ConfigError) as caught:
        balance_ranks(np.ones(10), world_size=4)
    assert caught.value.reason == "batch_not_divisible"
    assert "12" in caught.value.fix


@pytest.mark.parametrize("name", ["sequence_length", "max_crops", "window", "windows_per_run"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "8", True, 1e308, {}])
def test_limits_that_are_not_a_number_of_samples_or_tokens_are_refused(name, value):
    with pytest.raises(ConfigError) as caught:
        PackConfig(**{"sequence_length": 10, name: value})
    assert caught.value.reason == "packing_limit"


@pytest.mark.parametrize("name", ["sequence_length", "window", "windows_per_run"])
def test_limits_that_packs_cannot_do_without_are_refused_as_none(name):
    with pytest.raises(ConfigError) as caught:
        PackConfig(**{"sequence_length": 10, name: None})
    assert caught.value.reason == "packing_limit"


@pytest.mark.parametrize(
    ("name", "most"), [("sequence_length", 2**24), ("max_crops", 2**16), ("window", 2**20)]
)
def test_limits_that_a_pack_cannot_be_counted_up_to_are_refused(name, most):
    PackConfig(**{"sequence_length": 10, name: most})
    with pytest.raises(ConfigError) as caught:
        PackConfig(**{"sequence_length": 10, name: most + 1})
    assert caught.value.reason == "packing_limit"
    assert str(most) in caught.value.fix
