"""What a robot does after the pictures of a sample: its actions, step by step, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from preprocess.page import Markup, element, table

_MOST_STEPS = 16
_MOST_VALUES = 16


def action_table(record: Mapping[str, Any], names: Sequence[str]) -> list[Markup]:
    """Shows the actions of a sample, in the units of its source; [] where it has none.

    Args:
      record: Of the sample. Of one with several windows, the first is shown.
      names: Of the values of an action; numbers take the place of missing ones.
    """
    window, num_windows = _first_window(record.get("metadata") or {})
    steps = [step for step in window.get("actions") or () if _numbers(step)]
    if not steps:
        return []
    mask, first = window.get("action_mask") or (), window.get("step", 0)
    width = min(_MOST_VALUES, max(map(len, steps)))
    head = [*names[:width], *(str(i + 1) for i in range(len(names), width))]
    rows = []
    for i, step in enumerate(steps[:_MOST_STEPS]):
        after = i < len(mask) and not mask[i]
        name = f"{first + i}, after the end" if after else str(first + i)
        rows.append((name, *(f"{value:.4g}" for value in step[:width])))
    shown = [table("Actions, as the source has them", ("step", *head), rows)]
    rest = [
        (len(steps) - _MOST_STEPS, "more steps"),
        (max(map(len, steps)) - _MOST_VALUES, "more values of each"),
        (num_windows - 1, "more windows"),
    ]
    told = ", ".join(f"{number} {what}" for number, what in rest if number > 0)
    return [*shown, element("p", f"{told}.", class_="note")] if told else shown


def _first_window(metadata: Mapping[str, Any]) -> tuple[Mapping[str, Any], int]:
    """The fields of the first window of a sample, and how many it has."""
    windows = metadata.get("windows")
    if not isinstance(windows, Mapping):
        return metadata, 1
    start, rows = windows["first"][0], windows["rows"]
    runs = {name: run[start : start + rows] for name, run in windows["runs"].items()}
    each = {name: values[0] for name, values in windows["each"].items()}
    return {**each, **runs}, len(windows["first"])


def _numbers(step: Any) -> bool:
    return isinstance(step, Sequence) and all(isinstance(value, int | float) for value in step)
