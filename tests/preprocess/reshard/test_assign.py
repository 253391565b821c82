"""The arithmetic of resharding, on lists of numbers alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocess.reshard.assign import (
    MAX_VIEW_RUNS,
    ReaderCluster,
    advise,
    count_outputs,
    cut_runs,
    cut_shards,
    number_groups,
    order_numbers,
    parse_shares,
    repeated_key,
    split_numbers,
)
from shardspec.errors import ConfigError

segments = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any)


@given(segments=segments, data=st.data())
def test_runs_give_the_samples_back_and_are_as_long_as_they_can_be(segments, data):
    starts = np.concatenate([[0], np.cumsum(segments)])
    numbers = data.draw(st.permutations(range(starts[-1])))
    numbers = np.array(numbers[: data.draw(st.integers(0, len(numbers)))], np.int64)
    runs = cut_runs(numbers, starts).tolist()
    back = [starts[s] + first + i for s, first, rows in runs for i in range(rows)]
    assert back == numbers.tolist()
    for segment, first, rows in runs:
        assert rows > 0
        assert first + rows <= segments[segment]
    for (a, first, rows), (b, second, _) in zip(runs, runs[1:], strict=False):
        assert (a, first + rows) != (b, second)


@given(segments=segments)
def test_kept_order_has_one_run_per_segment_that_is_not_empty(segments):
    starts = np.concatenate([[0], np.cumsum(segments)])
    runs = cut_runs(np.arange(starts[-1]), starts)
    assert runs[:, 2].tolist() == [n for n in segments if n]


@given(count=st.integers(0, 50), seed=st.integers(0, 9), order=st.sampled_from(["keep", "shuffle"]))
def test_an_order_gives_every_sample_once(count, seed, order):
    numbers = np.arange(100, 100 + count)
    keys = [f"k{i}" for i in range(count)]
    found = order_numbers(numbers, order=order, seed=seed, keys=keys, lengths=numbers)
    assert sorted(found.tolist()) == numbers.tolist()


@given(
    groups=st.lists(st.integers(0, 6), min_size=1, max_size=40),
    order=st.sampled_from(["keep", "shuffle", "length"]),
    data=st.data(),
)
def test_shards_divide_no_group_and_keep_the_order_within_them(groups, order, data):
    hashes = np.array(groups, np.uint64)
    group = number_groups(hashes, order=order)
    most = int(group.max()) + 1
    num_shards = data.draw(st.integers(1, most))
    numbers = np.arange(100, 100 + len(groups))
    stored, borders = cut_shards(numbers, group, num_shards=num_shards)
    assert sorted(stored.tolist()) == numbers.tolist()
    assert (borders[0], borders[-1], len(borders)) == (0, len(groups), num_shards + 1)
    assert np.all(np.diff(borders) > 0)
    shard = np.zeros(len(groups), int)
    for i, (a, b) in enumerate(zip(borders, borders[1:], strict=False)):
        assert stored[a:b].tolist() == sorted(stored[a:b].tolist())  # within a shard as before
        shard[stored[a:b] - 100] = i
    for own in {*groups} - {0}:
        assert len({*shard[hashes == own].tolist()}) == 1
    if order == "keep":
        assert stored.tolist() == numbers.tolist()
    elif 0 not in groups:
        assert most == len({*groups})


def test_a_shuffle_depends_on_keys_and_seed_and_not_on_places():
    keys = [f"k{i}" for i in range(40)]

    def shuffled(keys, seed):
        numbers = np.arange(len(keys))
        found = order_numbers(numbers, order="shuffle", seed=seed, keys=keys, lengths=numbers)
        return [keys[i] for i in found.tolist()]

    assert shuffled(keys, 1) == shuffled(keys[::-1], 1)
    assert shuffled(keys, 1) != shuffled(keys, 2)
    assert [k for k in shuffled(keys, 1) if k in keys[:20]] == shuffled(keys[:20], 1)


def test_by_length_is_ascending_and_keeps_the_order_of_equals():
    found = order_numbers(
        np.array([4, 5, 6, 7]), order="length", seed=0, keys=[], lengths=np.array([3, 1, 3, 1])
    )
    assert found.tolist() == [5, 7, 4, 6]


@given(
    total_bytes=st.integers(0, 2**44),
    num_samples=st.integers(1, 10**7),
    nodes=st.integers(1, 64),
    ranks=st.integers(1, 8),
    workers=st.integers(1, 16),
)
def test_a_cluster_gets_equally_many_shards_for_every_reader(
    total_bytes, num_samples, nodes, ranks, workers
):
    cluster = ReaderCluster(nodes=nodes, ranks=ranks, workers=workers)
    count = count_outputs(total_bytes, num_samples=num_samples, target_bytes=2**28, cluster=cluster)
    if count.rule == "one sample per shard":
        assert count.num_shards == num_samples
    else:
        assert count.num_shards % cluster.num_readers == 0
        assert count.num_shards <= num_samples
        # No more than it takes to keep shards at the wanted length.
        fewer = count.num_shards - cluster.num_readers
        assert fewer == 0 or total_bytes > fewer * 2**28


def test_shards_that_are_asked_for_are_made_and_none_is_empty():
    counts = [
        count_outputs(10, num_samples=5, target_bytes=1, num_shards=n).num_shards for n in (1, 5, 9)
    ]
    assert counts == [1, 5, 5]


@pytest.mark.parametrize("values", [(0, 1, 1), (1, -1, 1), (1, 1, 0)])
def test_a_cluster_without_readers_is_refused(values):
    with pytest.raises(ConfigError) as caught:
        ReaderCluster(nodes=values[0], ranks=values[1], workers=values[2])
    assert caught.value.reason == "cluster"


def test_splits_share_all_samples_by_their_keys_alone():
    keys = [f"key-{i}" for i in range(4000)]
    shares = {"train": 0.8, "validation": 0.15, "test": 0.05}
    dealt = split_numbers(keys, shares, salt="a")
    assert sorted(np.concatenate(list(dealt.values())).tolist()) == list(range(4000))
    for name, share in shares.items():
        # Four standard deviations of a binomial draw.
        assert abs(len(dealt[name]) - 4000 * share) < 4 * (4000 * share * (1 - share)) ** 0.5
    fewer = split_numbers(keys[:100], shares, salt="a")
    for name in shares:
        assert fewer[name].tolist() == [i for i in dealt[name].tolist() if i < 100]
    other = split_numbers(keys, shares, salt="b")
    assert other["train"].tolist() != dealt["train"].tolist()


def test_shares_are_read_in_their_order():
    assert parse_shares("train=0.9, val_1=0.1") == {"train": 0.9, "val_1": 0.1}


@pytest.mark.parametrize(
    "text", ["", "train", "train=1.5", "a=0.5,b=0.4", "a=0.5,a=0.5", "../a=1", "=1", "a=x", "a=nan"]
)
def test_shares_that_do_not_add_up_are_refused(text):
    with pytest.raises(ConfigError) as caught:
        parse_shares(text)
    assert caught.value.reason == "split_shares"


def test_a_repeated_key_is_found():
    assert repeated_key(np.array([b"b", b"a", b"c"])) is None
    assert repeated_key(np.array([b"b", b"a", b"b"])) == b"b"
    assert repeated_key(np.zeros(0, "S4")) is None


def test_a_view_is_advised_until_its_runs_are_too_many():
    assert advise(MAX_VIEW_RUNS).view
    refused = advise(MAX_VIEW_RUNS + 1)
    assert not refused.view
    assert f"{MAX_VIEW_RUNS + 1:,} runs" in refused.why
