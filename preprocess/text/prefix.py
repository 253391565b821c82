"""The text before the first user text: the style's name, with or without a hint of the length."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from preprocess.text.policy import SystemPrompt
from preprocess.text.styles import STYLES, Style

STYLE_PREFIX_SHARE = 0.1
"""Share of prompts of a demo style that get the style prefix (Molmo 1, demo_or_style)."""

LENGTH_HINT_SHARE = 0.9
"""Share of prompts with a length hint (Molmo 1, style_and_length)."""

LENGTH_NOISE_CHARS = 25.0
"""Standard deviation of the noise on the length, in characters (Molmo 1)."""

LENGTH_UNIT_CHARS = 15
"""Characters per unit of the hint: a 1,200-character caption reads `long_caption 82:` or so."""

LENGTH_NOISE_V3 = 0.05
"""Standard deviation of the factor on the length, kept within 0.5 and 1.5 (Molmo 2, v3)."""

LENGTH_UNIT_CHARS_V3 = 25
"""Characters per unit of the hint (Molmo 2, v3)."""


def draw_prefix(
    name: str,
    *,
    num_chars: int,
    mode: SystemPrompt,
    rng: np.random.RandomState,
    styles: Mapping[str, Style] = STYLES,
) -> str:
    """Draws the prefix of a conversation.

    Args:
      name: The style of its first message.
      num_chars: Length of the response to be produced, which the hint measures.
      mode: The setting `system_prompt`.
      rng: The draws: the coin, then the noise.
      styles: All styles by name.

    >>> draw_prefix("vqa2", num_chars=3, mode="style", rng=np.random.RandomState(0))
    'vqa2:'
    """
    name = styles[name].trained_as or name
    style = styles[name]
    if mode == "none" or (mode.startswith("demo") and style.unnamed):
        return ""
    if mode == "demo_or_style":
        named = not style.demo or rng.random_sample() < STYLE_PREFIX_SHARE
        return f"{name}:" if named else ""
    if mode == "demo_or_style_v2":
        return "" if style.demo or style.family == "multiple_choice" else f"{name}:"
    if mode == "style" or (mode == "style_and_length_v2" and not style.length_hint):
        return f"{name}:"
    if rng.random_sample() >= LENGTH_HINT_SHARE:
        # Molmo 1 has a space before the colon here, and its checkpoints know it so.
        return f"{name} :" if mode == "style_and_length" else f"{name}:"
    hint = _hint_v3 if mode == "style_and_length_v3" else _hint
    return f"{name} {hint(num_chars, rng)}:"


def _hint(num_chars: int, rng: np.random.RandomState) -> int:
    noisy = num_chars + int(rng.normal(scale=LENGTH_NOISE_CHARS))
    return max(0, noisy // LENGTH_UNIT_CHARS)


def _hint_v3(num_chars: int, rng: np.random.RandomState) -> int:
    factor = min(max(rng.normal(1.0, LENGTH_NOISE_V3), 0.5), 1.5)
    return int(num_chars * factor / LENGTH_UNIT_CHARS_V3)
