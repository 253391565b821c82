"""The registry of styles: every style under its name in the Molmo data, from one module a family.

Decides what user text and response a message of a style gives. Knows nothing of prefixes, markup,
tokens, or of how often a message is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping

from preprocess.text.styles import (
    boxes,
    captions,
    choices,
    counting,
    documents,
    instructions,
    pointing,
    qa,
    robots,
    videos,
)
from preprocess.text.styles.base import Draw, Exchange, Family, Style

_FAMILIES = (
    captions,
    qa,
    pointing,
    counting,
    choices,
    instructions,
    robots,
    documents,
    boxes,
    videos,
)

STYLES: Mapping[str, Style] = {
    name: style for family in _FAMILIES for name, style in family.STYLES.items()
}
"""Every style by its name."""

assert len(STYLES) == sum(len(family.STYLES) for family in _FAMILIES), "a style has two families"

__all__ = ["STYLES", "Draw", "Exchange", "Family", "Style"]
