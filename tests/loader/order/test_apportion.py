"""Apportionment: exact weights for ever, and four closed forms of one sequence."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loader.order.apportion import Apportionment
from tests.examples import examples

WEIGHTS = st.lists(
    st.one_of(st.integers(0, 9), st.integers(0, 2**120), st.sampled_from([1, 2**40, 3**60])),
    min_size=1,
    max_size=30,
).filter(any)


def farthest(weights, slots, counts):
    """The most that any dataset is from its exact share."""
    total = sum(weights)
    pairs = zip(weights, counts.tolist(), strict=True)
    return max(abs(Fraction(weight * slots, total) - count) for weight, count in pairs)


@settings(max_examples=examples(60))
@given(weights=WEIGHTS, start=st.one_of(st.integers(0, 300), st.integers(0, 2**60)))
def test_every_prefix_is_within_two_of_the_weights_and_all_forms_agree(weights, start):
    sequence = Apportionment(weights)
    counts = sequence.counts(start)
    assert counts.sum() == start
    for slot, dataset in enumerate(sequence.datasets(start, start + 100).tolist(), start):
        assert farthest(weights, slot, counts) <= 2
        assert sequence.count(dataset, slot) == counts[dataset]
        assert sequence.slot_of(dataset, int(counts[dataset])) == slot
        counts[dataset] += 1
    assert np.array_equal(sequence.counts(start + 100), counts)


@pytest.mark.parametrize(
    "weights",
    [[1] * 1000, [2**i for i in range(60)], [3**i for i in range(30)] * 2, [10**6, *[1] * 500]],
)
def test_adversaries_stay_within_two(weights):
    sequence = Apportionment(weights)
    for slots in (*range(200), *(10**9 + 7 * i for i in range(20)), 2**61):
        assert farthest(weights, slots, sequence.counts(slots)) <= 2


def test_sequence_is_the_one_of_mixture_version_4():
    assert Apportionment([5, 0, 9, 2]).datasets(40, 56).tolist() == [
        *(2, 2, 0, 2, 3, 2, 0, 2),
        *(2, 0, 2, 3, 2, 0, 2, 0),
    ]
