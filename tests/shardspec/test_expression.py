"""Filters: what they keep is what Python says of each row; what is no condition is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardspec.errors import ConfigError
from shardspec.expression import MAX_FILTER_CHARACTERS, select

NAMES = ("num_tokens", "width", "geometry")


def columns(*values):
    return {
        name: np.array(column, np.int64)
        for name, column in zip(NAMES, zip(*values, strict=True), strict=True)
    }


numbers = st.one_of(
    st.sampled_from(NAMES), st.integers(0, 999).map(str), st.floats(0, 99).map(lambda x: f"{x:.3f}")
)
sums = st.recursive(
    numbers,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        inner.map(lambda text: f"(-{text})"),
    ),
    max_leaves=4,
)
comparisons = st.tuples(sums, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), sums).map(
    " ".join
)
chained = st.tuples(sums, sums, sums).map(" < ".join)
conditions = st.recursive(
    comparisons | chained,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(
            lambda t: f"({t[0]}) {t[1]} ({t[2]})"
        ),
        inner.map(lambda text: f"not ({text})"),
    ),
    max_leaves=4,
)
rows = st.lists(st.tuples(*[st.integers(0, 4000)] * 3), min_size=1, max_size=8)


@given(text=conditions, rows=rows)
def test_filter_keeps_the_rows_of_which_python_says_that_it_holds(text, rows):
    want = [bool(eval(text, {}, dict(zip(NAMES, row, strict=True)))) for row in rows]
    assert select(text, columns(*rows)).tolist() == want


def test_flags_are_tested_by_their_bits():
    assert select("geometry & 2 == 2", columns((0, 0, 1), (0, 0, 2), (0, 0, 7))).tolist() == [
        False,
        True,
        True,
    ]


def test_differences_of_counts_may_be_negative():
    assert select("num_tokens - width < 0", columns((1, 2, 0), (2, 1, 0))).tolist() == [True, False]


@pytest.mark.parametrize("text", ["num_tokens / width < 2", "1 // width > 2", "1 % width == 0"])
def test_a_division_by_zero_keeps_nothing(text):
    assert select(text, columns((1, 0, 0), (1, 1, 1))).tolist()[0] is False


def test_divisions_are_pythons():
    rows = columns((7, 2, 0), (8, 4, 0), (9, 5, 0))
    assert select("num_tokens / width == 3.5", rows).tolist() == [True, False, False]
    assert select("-num_tokens // width == -4", rows).tolist() == [True, False, False]
    assert select("-num_tokens % width == 1", rows).tolist() == [True, False, True]


def test_a_condition_on_no_column_holds_for_all_samples_or_none():
    assert select("1 < 2", columns((1, 2, 3), (4, 5, 6))).tolist() == [True, True]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "num_tokens",
        "num_tokens <",
        "num_tokens = 3",
        "5",
        "True",
        "num_tokens and width",
        "num_tokens < 'a'",
        "num_tokens < None",
        "num_tokens in (1, 2)",
        "num_tokens is 3",
        "len(num_tokens) > 1",
        "__import__('os').system('true') == 0",
        "num_tokens.__class__ == 1",
        "num_tokens[0] < 1",
        "(lambda: 1)() == 1",
        "[x for x in (1,)] == 1",
        "num_tokens ** 99 < 1",
        "1 << 99999 > 1",
        "num_tokens < 1 if width else 2",
        "(y := 3) < 4",
        "num_tokens < 1; width",
        "f'{num_tokens}' == 1",
        "num_tokens < 1.5 & width",
        "num_tokens < 99999999999999999999999",
        "num_tokens < 1 and " * 200 + "width < 1",
        "(" * 500 + "1" + ")" * 500,
        "num_tokens < 1\0",
    ],
)
def test_what_is_not_a_condition_is_refused_by_name(text):
    with pytest.raises(ConfigError) as caught:
        select(text, columns((1, 2, 3)))
    assert caught.value.reason == "filter_expression"
    assert caught.value.facts["problem"]


def test_an_unknown_column_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError) as caught:
        select("num_token < 3", columns((1, 2, 3)))
    assert "did you mean 'num_tokens'?" in str(caught.value)


def test_a_longer_text_is_refused_unread():
    with pytest.raises(ConfigError):
        select("1 < 2" + " " * MAX_FILTER_CHARACTERS, columns((1, 2, 3)))


@pytest.mark.parametrize(
    "text",
    [
        "a * 9000000000000000000 > 0",
        "a + 9223372036854775807 > 0",
        "-a - 9223372036854775807 < 0",
        "a * a * a * a > 1",
        "9223372036854775807 + 9223372036854775807 > 0",
    ],
)
def test_numbers_beyond_64_bits_are_refused_and_do_not_wrap(text):
    columns = {"a": np.array([2, 2**31], dtype=np.int64)}
    with pytest.raises(ConfigError) as caught:
        select(text, columns)
    assert "beyond 64 bits" in caught.value.facts["problem"]
    assert select("a * 4000000000 > a + 1 and a * 0.5e300 > 1", columns).tolist() == [True, True]
