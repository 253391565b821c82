"""The arithmetic of a plan: borders, counts, names, and an order that stays put."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from preprocess.job import plan
from preprocess.job.keys import KeyList
from preprocess.job.plan import (
    MIN_SHARD_BYTES,
    SHARD_MULTIPLE,
    count_shards,
    order_hash,
    plan_groups,
    plan_order,
    shard_borders,
    shard_name,
)
from shardspec.keyed import hash_text
from shardspec.messages import counted

MIB = 2**20

keys = st.lists(st.text("abcdef0123456789", min_size=1, max_size=6), unique=True, max_size=60)
counts = {
    "total_bytes": st.integers(1, 2**44),
    "target_bytes": st.integers(MIB, 2**34),
    "num_samples": st.integers(1, 10**6),
}


@given(num_samples=st.integers(0, 10**9), num_shards=st.integers(1, 5000))
def test_borders_cover_every_sample_once_and_evenly(num_samples, num_shards):
    borders = shard_borders(num_samples, num_shards=num_shards)
    lengths = np.diff(borders)
    assert (borders.dtype, len(borders)) == (np.int64, num_shards + 1)
    assert borders[0] == 0
    assert borders[-1] == num_samples
    assert lengths.min() >= 0
    assert lengths.max() - lengths.min() <= 1


@given(**counts)
def test_no_shard_is_left_empty(total_bytes, target_bytes, num_samples):
    found = count_shards(total_bytes, target_bytes=target_bytes, num_samples=num_samples)
    assert shard_borders(num_samples, num_shards=found.num_shards).min() >= 0
    assert np.diff(shard_borders(num_samples, num_shards=found.num_shards)).min() >= 1


@given(num_samples=st.integers(1, 10**6), num_shards=st.integers(1, 10**6))
def test_asked_for_number_is_given_as_far_as_samples_go(num_samples, num_shards):
    found = count_shards(1, target_bytes=MIB, num_samples=num_samples, num_shards=num_shards)
    assert found.num_shards == min(num_shards, num_samples)
    asked = found.rule == f"{counted(num_shards, 'shard')} requested"
    assert asked == (num_shards <= num_samples)


@given(**counts)
def test_the_rule_that_is_named_is_the_one_that_binds(total_bytes, target_bytes, num_samples):
    found = count_shards(total_bytes, target_bytes=target_bytes, num_samples=num_samples)
    count = found.num_shards
    if found.rule == "one sample per shard":
        assert count == num_samples
        free = count_shards(total_bytes, target_bytes=target_bytes, num_samples=10**12)
        assert free.num_shards > num_samples
    elif found.rule == "smallest shard size of 4 MiB":
        assert count == max(1, total_bytes // MIN_SHARD_BYTES)
    else:
        assert found.rule == "shard size, rounded up to a multiple of 8"
        # Never above the wanted size, nor further below than the rounding takes it.
        assert count % SHARD_MULTIPLE == 0
        assert count * target_bytes >= total_bytes
        assert (count - SHARD_MULTIPLE) * target_bytes < total_bytes
        assert count * MIN_SHARD_BYTES <= total_bytes


@pytest.mark.parametrize(
    "total_mib, num_samples, num_shards, rule",
    [
        (3, 10, 1, "smallest shard size of 4 MiB"),
        (20, 1000, 5, "smallest shard size of 4 MiB"),
        (31, 1000, 7, "smallest shard size of 4 MiB"),
        (32, 1000, 8, "shard size, rounded up to a multiple of 8"),
        (2048, 10**5, 8, "shard size, rounded up to a multiple of 8"),
        (2049, 10**5, 16, "shard size, rounded up to a multiple of 8"),
        (2049, 3, 3, "one sample per shard"),
        (20, 5, 5, "smallest shard size of 4 MiB"),
        (20, 4, 4, "one sample per shard"),
    ],
)
def test_counts_around_the_borders_of_the_rules(total_mib, num_samples, num_shards, rule):
    found = count_shards(total_mib * MIB, target_bytes=256 * MIB, num_samples=num_samples)
    assert (found.num_shards, found.rule) == (num_shards, rule)


@given(keys, st.integers(0, 2**32))
def test_order_holds_every_sample_once(names, seed):
    assert sorted(plan_order(names, seed=seed).tolist()) == list(range(len(names)))


@given(keys, st.randoms(use_true_random=False))
def test_order_does_not_depend_on_the_order_of_the_rows(names, random):
    shuffled = list(names)
    random.shuffle(shuffled)
    assert [names[i] for i in plan_order(names, seed=5)] == [
        shuffled[i] for i in plan_order(shuffled, seed=5)
    ]


@given(keys, st.sets(st.integers(0, 59)))
def test_samples_that_go_leave_the_others_in_order(names, gone):
    left = [name for i, name in enumerate(names) if i not in gone]
    whole = [names[i] for i in plan_order(names, seed=5)]
    assert [left[i] for i in plan_order(left, seed=5)] == [name for name in whole if name in left]


def test_order_is_another_for_another_seed_and_not_that_of_the_keys():
    names = [f"{i:04d}" for i in range(100)]
    orders = [plan_order(names, seed=seed).tolist() for seed in (0, 1)]
    assert orders[0] != orders[1]
    assert list(range(100)) not in orders


def test_order_of_known_keys_stays_as_it_is():
    # Stored datasets depend on it: another order here is another manifest for the same inputs.
    assert order_hash("a", seed=1) == 9895371918849641950
    assert plan_order(["a", "b", "c", "d", "e"], seed=1).tolist() == [3, 1, 2, 0, 4]


def test_samples_of_one_hash_are_in_the_order_of_their_keys(monkeypatch):
    monkeypatch.setattr(plan, "order_hash", lambda key, seed: len(key))
    names = ["bbb", "z", "ccc", "aaa", "yy", "a"]
    order = plan_order(names, seed=0)
    assert [names[i] for i in order] == ["a", "z", "yy", "aaa", "bbb", "ccc"]


@given(st.lists(st.integers(0, 2000)))
def test_a_packed_list_of_keys_is_a_list_without_repeats(numbers):
    keys, want = KeyList(), []
    for number in numbers:
        key = f"{number:024x}"
        assert keys.add(key) == (key not in want)
        want += [key] * (key not in want)
    assert list(keys) == want


def test_places_are_spread_evenly():
    places = [order_hash(f"{i:024x}", seed=0) / 2**64 for i in range(20_000)]
    found = np.histogram(places, bins=20, range=(0, 1))[0]
    # 1,000 a bin, standard deviation 31.
    assert np.all(np.abs(found - 1000) < 4 * 31)


@pytest.mark.parametrize("num_shards", [1, 11, 99_999, 100_000, 100_001, 1_234_567])
def test_shard_names_sort_in_order(num_shards):
    around = {0, *(10**n + k for n in range(7) for k in (-1, 0, 1)), num_shards - 1}
    shards = sorted(shard for shard in around if 0 <= shard < num_shards)
    names = [shard_name("d", "train", shard, num_shards=num_shards) for shard in shards]
    names.append(shard_name("d", "train", 0, num_shards=8, generation=1))
    assert names == sorted(names)
    if num_shards < 100_000:
        assert names[:-1] == [f"d-train-{shard:05d}-of-{num_shards:05d}" for shard in shards]


@given(keys, st.integers(1, 12), st.integers(1, 8), st.integers(0, 2**32))
def test_samples_of_a_group_are_in_one_shard(names, num_groups, num_shards, seed):
    assume(names)
    groups = [("", f"g{hash_text(n) % num_groups}")[hash_text(n) % 5 > 0] for n in names]
    total = len({*groups} - {""}) + groups.count("")
    num_shards = min(num_shards, total)
    order, borders = plan_groups(names, groups, seed=seed, num_shards=num_shards)
    assert sorted(order) == list(range(len(names)))
    assert (borders[0], borders[-1], len(borders)) == (0, len(names), num_shards + 1)
    assert np.diff(borders).min() >= 1
    shards = [{groups[i] or names[i] for i in order[a:b]} for a, b in pairwise(borders)]
    assert sum(map(len, shards)) == total
    for a, b in pairwise(borders):
        inside = [names[i] for i in order[a:b]]
        assert [inside[i] for i in plan_order(inside, seed=seed)] == inside
    if total == len(names):
        assert borders == shard_borders(len(names), num_shards=num_shards).tolist()


def test_a_group_may_be_called_as_a_sample_is():
    order, borders = plan_groups(["k0", "k1", "k2"], ["sample k1", "", ""], seed=0, num_shards=3)
    assert (sorted(order.tolist()), borders) == ([0, 1, 2], [0, 1, 2, 3])
