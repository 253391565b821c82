"""Values of robots: statistics against NumPy, and every mapping undone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from preprocess.text.actions import action_text, encode_actions
from shardspec.actions import (
    NUM_BINS,
    ValueStatistics,
    bin_tokens,
    bin_values,
    denormalize,
    named_dimensions,
    normalize,
    openvla_tokens,
    openvla_values,
    token_bins,
    value_bins,
    value_statistics,
)
from shardspec.errors import ConfigError

VALUES = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 40), st.integers(1, 5)),
    elements=st.floats(-1000, 1000, width=32),
)


@given(VALUES)
def test_statistics_are_those_of_numpy(values_ND):
    got = value_statistics(values_ND)
    values = values_ND.astype(np.float64)
    assert got.count == len(values)
    assert np.array_equal(got.minimum, values.min(0))
    assert np.array_equal(got.maximum, values.max(0))
    assert np.array_equal(got.mean, values.mean(0))
    assert np.array_equal(got.std, values.std(0))
    assert np.array_equal(got.q01, np.quantile(values, 0.01, axis=0))
    assert np.array_equal(got.q99, np.quantile(values, 0.99, axis=0))
    assert ValueStatistics.from_dict(got.to_dict()) == got


def test_steps_that_are_not_finite_are_left_out():
    values = np.array([[1.0, 2.0], [np.nan, 3.0], [5.0, np.inf], [3.0, 4.0]])
    assert value_statistics(values) == value_statistics(values[[0, 3]])


@given(VALUES)
def test_normalizing_is_undone_where_nothing_was_clipped(values_ND):
    statistics = value_statistics(values_ND)
    scaled = normalize(values_ND, statistics)
    assert (np.abs(scaled) <= 1).all()
    want = np.clip(values_ND.astype(np.float64), statistics.q01, statistics.q99)
    width = np.subtract(statistics.q99, statistics.q01)
    assert (np.abs(denormalize(scaled, statistics) - want) <= 1e-9 * (1 + np.abs(width))).all()


def test_ends_are_the_quantiles_and_a_constant_dimension_is_zero():
    statistics = value_statistics(np.stack([np.linspace(0, 100, 101), np.full(101, 7.0)], 1))
    assert normalize(np.array([[1.0, 7.0], [99.0, 7.0]]), statistics).tolist() == [[-1, 0], [1, 0]]
    assert denormalize(np.array([0.0, 0.0]), statistics).tolist() == [50, 7]


def test_kept_dimensions_stay_as_they_are():
    statistics = value_statistics(np.array([[0.0, 0.0], [10.0, 0.04]]))
    values = np.array([5.0, 3.0])
    scaled = normalize(values, statistics, kept=(1,))
    assert scaled.tolist() == [0.0, 3.0]
    assert denormalize(scaled, statistics, kept=(1,)).tolist() == values.tolist()


@given(st.lists(st.floats(-1.5, 1.5), min_size=1, max_size=20), st.integers(256, 10**6))
def test_bins_and_tokens_are_undone_and_are_those_of_the_text(values, vocab_size):
    bins = value_bins(np.array(values))
    assert action_text(values) == " ".join(map(str, bins.tolist()))
    assert (np.abs(bin_values(bins) - np.clip(values, -1, 1)) <= 1 / NUM_BINS + 1e-12).all()
    assert np.array_equal(value_bins(bin_values(bins)), bins)
    tokens = bin_tokens(bins, vocab_size=vocab_size)
    assert ((vocab_size - NUM_BINS <= tokens) & (tokens < vocab_size)).all()
    assert np.array_equal(token_bins(tokens, vocab_size=vocab_size), bins)
    written = action_text(values, "tokens")
    assert encode_actions(written, lambda text: 1 / 0, vocab_size=vocab_size) == tokens.tolist()


@given(st.lists(st.floats(-1.5, 1.5), min_size=1, max_size=20), st.integers(256, 10**6))
def test_tokens_of_openvla_are_undone_to_within_half_a_bin(values, vocab_size):
    tokens = openvla_tokens(np.array(values), vocab_size=vocab_size)
    assert ((vocab_size - NUM_BINS <= tokens) & (tokens < vocab_size)).all()
    written = action_text(values, "openvla")
    assert encode_actions(written, lambda text: 1 / 0, vocab_size=vocab_size) == tokens.tolist()
    back = openvla_values(tokens, vocab_size=vocab_size)
    assert (np.abs(back - np.clip(values, -1, 1)) <= 1 / 255 + 1e-12).all()


def test_statistics_that_do_not_fit_are_refused():
    good = value_statistics(np.zeros((2, 3)))
    cases = [
        lambda: value_statistics(np.full((2, 1), np.nan)),
        lambda: normalize(np.zeros(2), good),
        lambda: ValueStatistics.from_dict({**good.to_dict(), "q01": [0.0]}),
        lambda: ValueStatistics.from_dict({"count": 1}),
    ]
    for case in cases:
        with pytest.raises(ConfigError) as caught:
            case()
        assert caught.value.reason == "value_statistics"


@pytest.mark.parametrize("known", [(), ("x", "x"), ("", "")])
def test_dimensions_without_a_name_of_their_own_are_not_guessed(known):
    with pytest.raises(ConfigError) as caught:
        named_dimensions(["x"], known)
    assert caught.value.reason == "value_names"
