"""Histograms: exact counts in bounded memory, round bars, charts by structure."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocess.page import BarChart, Counts, bar_chart, charts, histogram_chart
from tests.pages import Page

VALUES = st.lists(st.integers(0, 10**12), min_size=1, max_size=60)


def counted(*parts):
    counts = Counts()
    for part in parts:
        counts.add(np.array(part, np.int64))
    return counts


@given(VALUES, st.randoms(use_true_random=False))
def test_bars_cover_every_value_once_and_do_not_depend_on_the_order(values, random):
    counts = counted(values)
    shuffled = random.sample(values, len(values))
    cut = random.randrange(len(values) + 1)
    assert counted(shuffled[:cut], shuffled[cut:]).bars() == counts.bars()
    bars = counts.bars()
    assert sum(bar.count for bar in bars) == len(values) == counts.count
    assert len(bars) <= 22
    for bar in bars:
        inside = [v for v in values if bar.start <= v and (bar.stop is None or v < bar.stop)]
        assert bar.count == len(inside)
    assert (counts.least, counts.most, counts.total) == (min(values), max(values), sum(values))


@given(VALUES, st.floats(0.01, 1))
def test_quantiles_are_exact_to_the_width_of_a_bin(values, share):
    counts = counted(values)
    exact = sorted(values)[max(1, int(np.ceil(share * len(values)))) - 1]
    assert counts.quantile(share) == exact // counts.width * counts.width


def test_small_numbers_have_bars_of_their_own():
    assert [(bar.name, bar.count) for bar in counted([1, 1, 2, 4]).bars()] == [
        ("1", 2), ("2", 1), ("3", 0), ("4", 1),
    ]  # fmt: skip


def test_a_long_tail_is_one_bar():
    counts = counted([5] * 500 + [7] * 500 + [100_000])
    *bars, last = counts.bars()
    assert (last.stop, last.count) == (None, 1)
    assert last.name.endswith(" and more")
    assert sum(bar.count for bar in bars) == 1000


def test_chart_has_a_bar_for_each_count_and_says_its_numbers():
    chart = histogram_chart("Lengths", counted([1, 1, 2, 4]), unit="samples")
    heights = [float(h) for h in re.findall(r'<path d="M[^"]*v([\d.]+)h[^"]*" fill=', chart)]
    assert len(heights) == 3, "nothing is drawn for 3"
    assert heights[0] == 2 * heights[1] == 2 * heights[2]
    page = Page(chart)
    assert page.all("svg")[0]["aria-label"].startswith("Lengths: bar chart of 4 bars")
    assert page.text_of("td") == ["2", "1", "0", "1"]
    assert "4 samples: 1 to 4, mean 2.0" in page.text


def test_charts_take_their_colours_from_the_page():
    chart = histogram_chart("Lengths", counted([1, 1, 2, 4]), unit="samples")
    colours = set(re.findall(r'(?:fill|stroke)="([^"]*)"', chart))
    assert colours == {"none", "var(--bar)", "var(--line)", "var(--soft)"}


@pytest.mark.parametrize(
    "values, told",
    [
        ([1, 2, 4], ["1", "2", "3", "4"]),
        (range(13), ["0", "5", "10"]),
        (range(0, 2_000_000, 10_000), ["0", "500k", "1M", "1.5M"]),
        ([5] * 500 + [7] * 500 + [30_000], ["0", "10+"]),
        ([], []),
    ],
)
def test_round_bars_and_an_open_one_have_their_values_below(values, told):
    assert list(charts._ticks(counted(values).bars()).values()) == told


def test_charts_say_the_same_each_time_and_have_nothing_that_must_be_once_on_a_page():
    counts = counted(range(70))
    drawn = histogram_chart("<Lengths>", counts, unit="samples")
    charts._drawn.cache_clear()
    assert histogram_chart("<Lengths>", counts, unit="samples") == drawn
    picture = drawn.split("</svg>")[0]
    assert not re.search(" (id|style)=|href=|<style|<script|url\\(", picture)


def test_a_single_value_is_said_and_not_drawn():
    chart = histogram_chart("Crops", counted([2] * 256), unit="samples")
    assert chart.count("<svg") == 0
    assert "256 samples, each 2." in chart


def test_empty_chart_says_so():
    assert "None." in bar_chart(BarChart(title="Nothing", unit="x", bars=[], ticks=()))
