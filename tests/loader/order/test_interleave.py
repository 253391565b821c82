"""The word: exact counts, every prefix within two samples, no dataset tied to a position."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loader.order.interleave import MOST_DATASETS, MOST_SLOTS, spread
from tests.examples import examples


def farthest(word, quotas):
    """The most that any dataset is from its share, over all prefixes, in samples times M.

    Between two of its samples a dataset only falls behind, so it is farthest right behind one, or
    right before one, and the word's end is exact.
    """
    found = 0
    by_dataset = np.argsort(word, kind="stable")
    slots = np.split(by_dataset, np.cumsum(quotas)[:-1])
    for quota, own in zip(quotas.tolist(), slots, strict=True):
        if quota:
            count = np.arange(quota)
            behind = own * quota - count * len(word)
            ahead = (count + 1) * len(word) - (own + 1) * quota
            found = max(found, int(behind.max()), int(ahead.max()))
    return found


WEIGHTS = st.lists(
    st.one_of(st.integers(0, 9), st.floats(1e-6, 1.0), st.sampled_from([1e-9, 0.25, 100])),
    min_size=1,
    max_size=40,
).filter(any)


def share_out(weights, num_slots):
    """Quotas of whole slots; the largest remainders get what rounding leaves."""
    exact = np.array(weights, np.float64) / np.sum(weights) * num_slots
    quotas = np.floor(exact).astype(np.int64)
    quotas[np.argsort(quotas - exact, kind="stable")[: num_slots - quotas.sum()]] += 1
    return quotas


@settings(max_examples=examples(150), deadline=None)
@given(
    weights=WEIGHTS,
    batch=st.sampled_from([1, 2, 7, 10, 48, 256]),
    batches=st.integers(1, 60),
    key=st.integers(0, 2**64 - 1),
)
def test_every_prefix_is_within_two_samples_of_the_shares(weights, batch, batches, key):
    quotas = share_out(weights, max(batch * batches, len(weights)))
    word = spread(quotas, batch=batch, key=key)
    assert np.array_equal(np.bincount(word, minlength=len(quotas)), quotas)
    assert farthest(word, quotas) <= 2 * len(word)


ADVERSARIES = {
    "a quarter, many small, one slot": [0.25, *[0.75 / 1000] * 1000, 1e-9],
    "a quarter, many single slots": [2**16, *[1] * 1000],
    "nearly all": [0.999, *[1e-4] * 10],
    "three of each size": [4.0**-i for i in range(8) for _ in range(3)],
    "halves of halves": [2.0**-i for i in range(30)],
    "all alike": [1] * 999,
    "roots of sizes": [1.3 ** (i / 2) for i in range(40)],
    "one of one": [1],
}


@pytest.mark.parametrize("name", ADVERSARIES)
def test_adversaries_stay_within_two_samples_too(name):
    quotas = share_out(ADVERSARIES[name], 2**18)
    word = spread(quotas, batch=256, key=1)
    assert np.array_equal(np.bincount(word, minlength=len(quotas)), quotas)
    assert farthest(word, quotas) <= 2 * len(word)


@pytest.mark.parametrize(
    ("weights", "batch"),
    [
        ([1, 1], 8),
        ([6, 4], 10),
        ([5, 3, 2], 10),
        ([9, 1], 10),
        ([2, 1, 1], 16),
        ([0.5, 0.25, 0.125, 0.125], 8),
        ([0.6, 0.4], 320),
        ([0.25, *[0.025] * 30], 16),
    ],
)
def test_no_dataset_is_tied_to_positions_of_the_batch(weights, batch):
    """Weights whose beat divides the batch: a strict rhythm gives positions all or nothing."""
    quotas = share_out(weights, 2**18 // batch * batch)
    word = spread(quotas, batch=batch, key=5).reshape(-1, batch)
    for dataset, share in enumerate(np.array(weights) / np.sum(weights)):
        by_position = (word == dataset).mean(axis=0)
        # Four deviations of independent draws, where these are more than a quarter.
        chance = 4 * np.sqrt(share * (1 - share) / len(word))
        assert np.abs(by_position - share).max() < max(0.25 * share, chance)


@pytest.mark.parametrize(("batch", "most"), [(256, 0.29), (512, 0.21), (4096, 0.071)])
def test_counts_per_batch_are_even(batch, most):
    """Standard deviations relative to independent draws: the median of 40 datasets."""
    quotas = share_out(ADVERSARIES["roots of sizes"], max(2**18, 64 * batch))
    word = spread(quotas, batch=batch, key=1).reshape(-1, batch)
    share = quotas / quotas.sum()
    counts = np.stack([np.bincount(row, minlength=40) for row in word])
    assert np.median(counts.std(axis=0) / np.sqrt(batch * share * (1 - share))) < most


@pytest.mark.slow
def test_longest_word_of_the_most_datasets_does_not_overflow():
    for weights in ([1.0] * MOST_DATASETS, [10.0**9, *[1.0] * (MOST_DATASETS - 1)]):
        quotas = share_out(weights, MOST_SLOTS)
        word = spread(quotas, batch=131_072, key=3)
        assert np.array_equal(np.bincount(word, minlength=len(quotas)), quotas)
        assert farthest(word, quotas) <= 2 * len(word)


def test_words_of_other_keys_are_other_words():
    quotas = share_out([3, 2, 1], 6000)
    one, other = (spread(quotas, batch=60, key=key) for key in (1, 2))
    assert 0.3 < (one == other).mean() < 0.9
    assert np.array_equal(one, spread(quotas, batch=60, key=1))


def test_word_is_the_one_of_the_first_release():
    word = spread(np.array([5, 0, 9, 2]), batch=4, key=7)
    assert word.tolist() == [2, 2, 0, 2, 0, 2, 3, 2, 0, 2, 0, 2, 2, 3, 2, 0]
