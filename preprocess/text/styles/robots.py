"""A robot's next motion: a request, and the action (`preprocess.text.actions`)."""

from __future__ import annotations

from collections.abc import Mapping

from preprocess.text.actions import action_text
from preprocess.text.message import Message, field_error, require_field
from preprocess.text.styles.base import Draw, Exchange, Style, user_text, whole_text


def draw_robot(message: Message, draw: Draw) -> Exchange:
    """Draws a request for a robot's next motion: `instruction` (or `question`) and `action`."""
    name = "instruction" if "instruction" in message else "question"
    task = "" if message.get("prompt") else whole_text(message, name, draw)
    user = user_text(message, draw, plain=task, instruction=task)
    try:
        return user, action_text(require_field(message, "action"), draw.policy.actions)
    except ValueError:
        raise field_error(message, "action", "finite numbers, equally many for each step") from None


STYLES: Mapping[str, Style] = {
    "robot_action": Style(
        family="robot", draw=draw_robot, template="robot.robot_action", rigid=True
    ),
}
"""Our own: the Molmo data has no such style."""
