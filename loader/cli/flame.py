"""A flame graph of what threads do: samples of their stacks, as one SVG file without script."""

from __future__ import annotations

import os
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from shardspec.messages import counted

Stack = tuple[str, ...]
"""Functions from the outermost to the one that runs, as "file:function"."""

_WIDTH_PX, _ROW_PX, _CHAR_PX = 1200, 18, 6.6
_INTERVAL_S = 0.004
_IDLE = ("threading.py", "queue.py", "selectors.py", "thread.py", "connection.py")
"""Files of the standard library whose functions wait; a thread that is in one does nothing."""


class StackSampler:
    """Counts the stacks of all threads but its own, while it is entered."""

    def __init__(self) -> None:
        self.stacks: Counter[Stack] = Counter()
        # Set by the thread that profiles, read by the one that samples.
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="stack sampler", daemon=True)

    def __enter__(self) -> StackSampler:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        own = threading.get_ident()
        while not self._done.wait(_INTERVAL_S):
            for ident, frame in sys._current_frames().items():
                stack = () if ident == own else stack_of(frame)
                if stack and not stack[-1].startswith(_IDLE):
                    self.stacks[stack] += 1


def stack_of(frame: FrameType | None) -> Stack:
    """Names the functions of a stack, the outermost first."""
    names: list[str] = []
    while frame is not None:
        code = frame.f_code
        names.append(f"{os.path.basename(code.co_filename)}:{code.co_name}")
        frame = frame.f_back
    return tuple(reversed(names))


def draw_flame_graph(stacks: Mapping[Stack, int], *, title: str) -> str:
    """Draws stacks as nested bars: as wide as their share of the samples, callees under callers.

    Args:
      stacks: Samples of each stack.
      title: Above the graph.

    Returns:
      An SVG document. Bars have a tooltip; those too narrow to see are left out.
    """
    total = max(1, sum(stacks.values()))
    bars: list[str] = []
    depth = _draw(stacks, 0, 0.0, _WIDTH_PX / total, total, bars)
    height = (depth + 2) * _ROW_PX
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH_PX} {height}" role="img">\n'
        f"<title>{escape(title)}</title>\n"
        "<style>text{font:11px monospace;fill:#201408}rect{stroke:#fff;stroke-width:.6}</style>\n"
        f'<rect width="{_WIDTH_PX}" height="{height}" fill="#fff"/>\n'
        f'<text x="4" y="13">{escape(title)}: {counted(total, "sample")}</text>\n'
        + "\n".join(bars)
        + "\n</svg>\n"
    )


def _draw(
    stacks: Mapping[Stack, int], depth: int, x: float, scale: float, total: int, bars: list[str]
) -> int:
    """Draws the bars of one depth and what is under them; gives the greatest depth."""
    children: dict[str, dict[Stack, int]] = {}
    for stack, count in sorted(stacks.items()):
        if len(stack) > depth:
            children.setdefault(stack[depth], {})[stack] = count
    deepest = depth
    for name, own in children.items():
        count = sum(own.values())
        width = count * scale
        if width >= 0.5:
            bars.append(_bar(name, depth, x, width, f"{name}, {count / total:.1%}"))
            deepest = max(deepest, _draw(own, depth + 1, x, scale, total, bars))
        x += width
    return deepest


def _bar(name: str, depth: int, x: float, width: float, told: str) -> str:
    hue = zlib.crc32(name.partition(":")[0].encode()) % 50
    shown = name[: max(0, int((width - 6) / _CHAR_PX))]
    y = (depth + 1) * _ROW_PX
    attributes: dict[str, Any] = {
        "x": f"{x:.1f}",
        "y": y,
        "width": f"{width:.1f}",
        "height": _ROW_PX,
        "fill": f"hsl({hue},80%,68%)",
    }
    drawn = " ".join(f"{key}={quoteattr(str(value))}" for key, value in attributes.items())
    label = f'<text x="{x + 3:.1f}" y="{y + 13}">{escape(shown)}</text>' if len(shown) > 2 else ""
    return f"<g><title>{escape(told)}</title><rect {drawn}/>{label}</g>"
