"""A robot's next motion: a request, and the action as integers, which every tokenizer knows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from preprocess.text.message import Message, field_error, require_field
from preprocess.text.styles.base import Draw, Exchange, Style, user_text, whole_text

ACTION_BINS = 256
"""Bins of a robot's action values on [-1, 1] (the resolution of RT-2, OpenVLA and MolmoAct)."""


def draw_robot(message: Message, draw: Draw) -> Exchange:
    """Draws a request for a robot's next motion: `instruction` (or `question`) and `action`."""
    name = "instruction" if "instruction" in message else "question"
    task = "" if message.get("prompt") else whole_text(message, name, draw)
    user = user_text(message, draw, plain=task, instruction=task)
    try:
        return user, action_text(require_field(message, "action"))
    except ValueError:
        raise field_error(message, "action", "finite numbers, one or more") from None


def action_text(action: Any) -> str:
    """Writes a robot's action as integers: one per value, steps separated by semicolons.

    [-1, 1] is cut into 256 bins of equal width, numbered from 0; values outside go to the outer
    bins. The center of bin b is (b + 0.5) / 128 - 1, at most 1/256 away from the value.

    Args:
      action: Numbers: [values] of one step, or [steps, values].

    Raises:
      ValueError: No step, a step without values, or values that are not finite numbers.

    >>> action_text([-1.0, 0.0, 1.0])
    '0 128 255'
    >>> action_text([[0.5, -2.0], [0.25, 0.0]])
    '192 0; 160 128'
    """
    nested = isinstance(action, list | tuple) and action and isinstance(action[0], list | tuple)
    steps = action if nested else [action]
    if not all(isinstance(step, list | tuple) and step for step in steps):
        raise ValueError("an action is one or more steps of one or more values")
    return "; ".join(" ".join(str(_bin(value)) for value in step) for step in steps)


def _bin(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("an action value is a finite number")
    share = (min(max(value, -1.0), 1.0) + 1.0) / 2.0
    return min(int(share * ACTION_BINS), ACTION_BINS - 1)


STYLES: Mapping[str, Style] = {
    "robot_action": Style(
        family="robot", draw=draw_robot, template="robot.robot_action", rigid=True
    ),
}
"""Our own: the Molmo data has no such style."""
