"""Histograms: counts of whole numbers in bounded memory, and charts of them as inline SVG.

`Counts` keeps 10,000 bins of one width, a power of ten that only follows from the largest value:
the same values give the same bins in any order. Vega-Lite draws the charts. They take their
colours from the page, so that they follow its light or dark scheme, and the numbers of each are
below it as a table.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from preprocess.page.html import Markup, element, escape, table
from shardspec.messages import counted

_NUM_BINS = 10_000
_MOST_BARS = 20
_TAIL = 0.995
"""Share of the values that bars of equal width cover; what is above them is in the last bar."""

_WIDTH, _HEIGHT = 288, 132
"""Of the area of the bars, in pixels."""
_MOST_BAR = 80
_PADDING = {"left": 38, "right": 18, "top": 24, "bottom": 22}
_MOST_TICKS = 6

_VEGA_LITE = "5.20"
"""Its version, which wheels of several versions have in common."""
_CONFIG = {
    "aria": False,  # The chart is one picture with one name.
    "font": "inherit",
    "axis": {
        **{f"{name}Color": "var(--line)" for name in ("domain", "grid", "tick")},
        **{f"{name}Color": "var(--soft)" for name in ("label", "title")},
        **{f"{name}FontSize": 11 for name in ("label", "title")},
        "labelOverlap": False,
        "title": None,
        "titleFontWeight": "normal",
    },
    "bar": {"color": "var(--bar)"},
    "view": {"stroke": None},
}


@dataclass(frozen=True, slots=True)
class Bar:
    """Values of one bar of a histogram."""

    start: int
    stop: int | None
    """First value after it; None: it is open to the right."""
    count: int

    @property
    def name(self) -> str:
        """The values, as people write them."""
        if self.stop is None:
            return f"{self.start:,} and more"
        return (
            f"{self.start:,}"
            if self.stop - self.start == 1
            else (f"{self.start:,} to {self.stop - 1:,}")
        )


class Counts:
    """How often whole numbers >= 0 occur."""

    def __init__(self) -> None:
        """Has counted nothing yet."""
        self.width = 1
        """Of a bin: values below 10,000 are counted one by one."""
        self.count = 0
        self.total = 0
        self.least = 0
        self.most = 0
        self._bins = np.zeros(_NUM_BINS, np.int64)

    def add(self, values: np.ndarray) -> None:
        """Counts values, integers of any shape."""
        if not values.size:
            return
        values = values.astype(np.int64).ravel()
        least, most = int(values.min()), int(values.max())
        self.least = min(self.least, least) if self.count else least
        self.most = max(self.most, most)
        while self.most >= self.width * _NUM_BINS:
            joined = self._bins.reshape(-1, 10).sum(axis=1)
            self._bins = np.concatenate([joined, np.zeros(_NUM_BINS - len(joined), np.int64)])
            self.width *= 10
        self._bins += np.bincount(values // self.width, minlength=_NUM_BINS)
        self.count += len(values)
        self.total += int(values.sum())

    @property
    def mean(self) -> float:
        """Of all values; 0 of none."""
        return self.total / max(1, self.count)

    def quantile(self, share: float) -> int:
        """Gives the least value with a share of the values up to it, to the width of a bin.

        >>> counts = Counts()
        >>> counts.add(np.arange(101))
        >>> counts.quantile(0.5)
        50
        """
        if not self.count:
            return 0
        wanted = max(1, int(np.ceil(share * self.count)))
        return int(np.searchsorted(np.cumsum(self._bins), wanted)) * self.width

    def bars(self, most: int = _MOST_BARS) -> list[Bar]:
        """Groups the bins into at most this many bars of a round width, and a last open one."""
        if not self.count:
            return []
        low = self.least // self.width
        high = min(self.quantile(_TAIL), self.most) // self.width + 1
        step = _round_up(-(-(high - low) // most))
        start = low // step * step
        stop = start + -(-(high - start) // step) * step
        edges = range(start, stop, step)
        bars = [
            Bar(
                a * self.width,
                (a + step) * self.width,
                int(self._bins[a : a + step].sum()),
            )
            for a in edges
        ]
        rest = int(self._bins[stop:].sum())
        return [*bars, Bar(stop * self.width, None, rest)] if rest else bars


@dataclass(frozen=True, slots=True, kw_only=True)
class BarChart:
    """A chart of bars."""

    title: str
    unit: str
    """What is counted: "samples"."""
    bars: Sequence[tuple[str, int]]
    """Name and count of each."""
    ticks: Mapping[float, str]
    """Texts below the bars: 0 is the left edge of the first one, 1 its right edge."""
    note: str = ""


def histogram_chart(title: str, counts: Counts, *, unit: str, note: str = "") -> Markup:
    """Draws counts as bars, with their mean and quantiles; of a single value, there is a text."""
    if counts.count and counts.least == counts.most:
        told = f"{_counted(counts.count, unit)}, each {counts.least:,}. {note}"
        return _text_only(title, told.strip())
    bars = counts.bars()
    told = (
        f"{counts.count:,} {unit}: {counts.least:,} to {counts.most:,}, mean {counts.mean:,.1f}, "
        f"median {counts.quantile(0.5):,}, 95th percentile {counts.quantile(0.95):,}."
    )
    return bar_chart(
        BarChart(
            title=title,
            unit=unit,
            bars=[(bar.name, bar.count) for bar in bars],
            ticks=_ticks(bars),
            note=f"{told} {note}".strip(),
        )
    )


def bar_chart(chart: BarChart) -> Markup:
    """Draws a chart, with its numbers in a table that opens below it."""
    if not chart.bars:
        return _text_only(chart.title, "None.")
    rows = [(name, f"{count:,}") for name, count in chart.bars]
    numbers = element(
        "details",
        element("summary", f"Numbers: {chart.title.lower()}"),
        table(chart.title, ("values", chart.unit), rows),
    )
    return element(
        "div",
        element("h3", chart.title),
        _svg(chart),
        element("p", chart.note, class_="meta") if chart.note else None,
        numbers,
        class_="chart",
    )


def _text_only(title: str, text: str) -> Markup:
    return element("div", element("h3", title), element("p", text, class_="meta"), class_="chart")


def _ticks(bars: Sequence[Bar]) -> dict[float, str]:
    """Chooses the bars whose first value is written: round ones, and one that is open."""
    if not bars:
        return {}
    size = (bars[0].stop or 0) - bars[0].start
    every = next(n for n in (1, 2, 5, 10) if len(bars) <= n * _MOST_TICKS)
    last = len(bars) - 1
    chosen = [i for i, bar in enumerate(bars) if bar.start // size % every == 0]
    if bars[last].stop is None:
        chosen = [*(i for i in chosen if last - i >= every), last]
    # A value of its own is in the middle of its bar, the first one of several at its edge.
    shift = 0.5 if size == 1 else 0
    return {i + shift: _short(bars[i].start) + "+" * (bars[i].stop is None) for i in chosen}


def _counted(number: int, unit: str) -> str:
    return counted(number, unit.removesuffix("s"))


def _svg(chart: BarChart) -> Markup:
    drawn = _drawn(json.dumps(_vega_lite(chart)))
    name, count = max(chart.bars, key=lambda bar: bar[1])
    told = (
        f"{chart.title}: bar chart of {counted(len(chart.bars), 'bar')}, the highest {name} with "
    )
    told += f"{_counted(count, chart.unit)}. The numbers are in the table below."
    return Markup(drawn.replace("<svg", f'<svg role="img" aria-label="{escape(told)}"', 1))


@functools.lru_cache(maxsize=64)  # splits and views of a dataset have charts in common
def _drawn(vega_lite: str) -> str:
    import vl_convert  # starts a JavaScript engine, in 0.4 s

    svg: str = vl_convert.vegalite_to_svg(vega_lite, vl_version=_VEGA_LITE)
    return svg


def _vega_lite(chart: BarChart) -> dict[str, Any]:
    """Describes a chart; nothing of it depends on the fonts of the machine."""
    most, num = max(count for _, count in chart.bars), len(chart.bars)
    # A bar of few among many stays visible.
    bars = [
        {"start": i, "stop": i + 1, "count": max(count, most / 100)}
        for i, (_, count) in enumerate(chart.bars)
        if count
    ]
    width = min(_WIDTH, num * _MOST_BAR)
    across = {
        "values": list(chart.ticks),
        "labelExpr": f"{json.dumps(chart.ticks)}[datum.value]",
        "grid": False,
    }
    up = {
        "labelExpr": "format(datum.value, datum.value < 1e4 ? ',' : '~s')",
        "tickCount": min(3, most),
        "ticks": False,
        "domain": False,
        "title": chart.unit,
        **{"titleAngle": 0, "titleAlign": "left", "titleX": -38, "titleY": -12},
    }
    return {
        **{"width": width, "height": _HEIGHT, "autosize": "none", "background": None},
        "padding": {**_PADDING, "right": _PADDING["right"] + _WIDTH - width},
        "data": {"values": bars},
        "mark": "bar",
        "encoding": {
            "x": {
                "field": "start",
                "bin": "binned",
                "scale": {"domain": [0, num], "nice": False},
                "axis": across,
            },
            "x2": {"field": "stop"},
            "y": {"field": "count", "type": "quantitative", "axis": up},
        },
        "config": _CONFIG,
    }


def _short(value: int) -> str:
    """Writes a large round number shortly.

    >>> [_short(value) for value in (7_500, 20_000, 1_240_000, 5_000_000, 12_345)]
    ['7,500', '20k', '1,240k', '5M', '12,345']
    """
    for power, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= max(power, 10_000) and value % (power // 10) == 0:
            return f"{value / power:,g}{letter}"
    return f"{value:,}"


def _round_up(step: int) -> int:
    """Rounds up to 1, 2 or 5 times a power of ten.

    >>> [_round_up(n) for n in (1, 2, 3, 7, 11, 400)]
    [1, 2, 5, 10, 20, 500]
    """
    power = 1
    while True:
        for factor in (1, 2, 5):
            if factor * power >= step:
                return factor * power
        power *= 10
