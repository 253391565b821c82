"""Counting: as pointing, with the number before the points, after them, or alone.

Without `points`, the answer-only styles take the number from `count`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from preprocess.text.points import PointMode
from preprocess.text.styles.base import Style
from preprocess.text.styles.pointing import draw_pointing

_COUNTING = re.compile(
    r"\bhow many\b|"
    r"^\W*(?:please |can you |could you )?count\b|"
    r"\b(?:number|count) of (?!the\b|this\b|that\b)[^?]*\?|"
    r"\b(?:tell|give) me the (?:total |exact )?(?:number|count) of\b",
    re.IGNORECASE,
)


def asks_for_count(text: str) -> bool:
    """Returns True if a question looks like one for a number of things.

    >>> asks_for_count("How many dogs are there?"), asks_for_count("What is the dog doing?")
    (True, False)
    """
    lowered = text.lower()
    # Without one of these nothing matches; to look for them takes a tenth of the time.
    asked = "many" in lowered or "count" in lowered or "number" in lowered
    return asked and bool(_COUNTING.search(text))


def _counting(
    mode: PointMode,
    template: str,
    *,
    grouped: bool = False,
    demo: bool = False,
    length_hint: bool = True,
) -> Style:
    return Style(
        family="counting",
        draw=draw_pointing,
        template=f"pointing.{template}",
        mode=mode,
        grouped=grouped,
        rigid=True,
        movable=True,
        demo=demo,
        length_hint=length_hint,
    )


STYLES: Mapping[str, Style] = {
    "point_count": _counting("point_then_count", "point_count", demo=True, length_hint=False),
    "point_then_count": _counting("point_then_count", "point_count"),
    "count_then_point": _counting("count_then_point", "count_then_point"),
    "count": _counting("count", "count"),
    "multi_image_point_then_count": _counting(
        "point_then_count", "multi_image_point_then_count", grouped=True, demo=True
    ),
    "multi_image_count_then_point": _counting(
        "count_then_point", "multi_image_count_then_point", grouped=True, demo=True
    ),
    "multi_image_counting": _counting("count", "multi_image_count", grouped=True, demo=True),
}
