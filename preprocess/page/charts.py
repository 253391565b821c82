"""Histograms: counts of whole numbers in bounded memory, and charts of them as inline SVG.

`Counts` keeps 10,000 bins of one width, a power of ten that only follows from the largest value:
the same values give the same bins in any order. Charts take their colours from the page, so that
they follow its light or dark scheme, and the numbers of each are below it as a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from preprocess.page.html import Markup, element, join, table

_NUM_BINS = 10_000
_MOST_BARS = 20
_TAIL = 0.995
"""Share of the values that bars of equal width cover; what is above them is in the last bar."""

_WIDTH, _HEIGHT = 340, 180
_MOST_BAR = 80
_LEFT, _RIGHT, _TOP, _BOTTOM = 6, 6, 18, 22


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
        """Gives the value below which a share of the values is, to the width of a bin.

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
    ticks: Sequence[str]
    """Below the first, the middle and the last bar; () for none."""
    note: str = ""


def histogram_chart(title: str, counts: Counts, *, unit: str, note: str = "") -> Markup:
    """Draws counts as bars, with their mean and quantiles."""
    bars = counts.bars()
    ticks: list[str] = []
    if bars:
        middle = bars[len(bars) // 2]
        ticks = [f"{bars[0].start:,}", f"{middle.start:,}" if len(bars) > 2 else "", _last(bars)]
        ticks = ticks if len(bars) > 1 else ticks[:1]
    told = (
        f"{counts.count:,} {unit}: {counts.least:,} to {counts.most:,}, mean {counts.mean:,.1f}, "
        f"half below {counts.quantile(0.5):,}, 95 % below {counts.quantile(0.95):,}."
    )
    return bar_chart(
        BarChart(
            title=title,
            unit=unit,
            bars=[(bar.name, bar.count) for bar in bars],
            ticks=ticks,
            note=f"{told} {note}".strip(),
        )
    )


def bar_chart(chart: BarChart) -> Markup:
    """Draws a chart, with its numbers in a table that opens below it."""
    if not chart.bars:
        return element(
            "div", element("h3", chart.title), element("p", "None.", class_="meta"), class_="chart"
        )
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


def _svg(chart: BarChart) -> Markup:
    most = max(count for _, count in chart.bars)
    room, floor = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _BOTTOM
    pitch = min(room / len(chart.bars), _MOST_BAR)
    drawn = []
    for i, (_, count) in enumerate(chart.bars):
        height = (floor - _TOP) * count / max(1, most)
        # A bar of few among many stays visible.
        height = max(height, 1.5) if count else 0.0
        drawn.append(
            element(
                "rect",
                x=_number(_LEFT + i * pitch + 0.5),
                y=_number(floor - height),
                width=_number(max(1.0, pitch - 1)),
                height=_number(height),
            )
            if count
            else None
        )
    lines = [element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y) for y in (_TOP, floor)]
    texts = [element("text", f"{most:,} {chart.unit}", x=_LEFT, y=_TOP - 5)]
    end = _LEFT + pitch * len(chart.bars)
    places = ((_LEFT, "start"), ((_LEFT + end) / 2, "middle"), (end, "end"))
    for tick, (x, anchor) in zip(chart.ticks, places, strict=False):
        if tick:
            texts.append(element("text", tick, x=_number(x), y=_HEIGHT - 6, text_anchor=anchor))
    name, count = max(chart.bars, key=lambda bar: bar[1])
    told = f"{chart.title}: bar chart of {len(chart.bars)} bars, the highest {name} with {count:,}"
    return element(
        "svg",
        join([*lines, *drawn, *texts]),
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=f"{told} {chart.unit}. The numbers are in the table below.",
    )


def _last(bars: Sequence[Bar]) -> str:
    bar = bars[-1]
    return f"{bar.start:,}+" if bar.stop is None else f"{bar.stop - 1:,}"


def _number(value: float) -> str:
    """Writes a coordinate shortly.

    >>> _number(12.0), _number(1.2345)
    ('12', '1.23')
    """
    return f"{value:.2f}".rstrip("0").rstrip(".")


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
