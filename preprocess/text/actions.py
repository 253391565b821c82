"""How a robot's actions are written: as numbers of bins, or as tokens at the end of the vocabulary.

Texts name an action token by its bin, `<|action_17|>`; the tokenizer never sees that: it becomes
the id `shardspec.actions.bin_tokens` gives. The vocabulary is the model's own, without added
tokens, as OpenVLA counts it; its last 256 ids must not be control tokens.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from preprocess.text.policy import ActionForm
from shardspec.actions import NUM_BINS, bin_tokens, openvla_tokens, token_bins, value_bins
from shardspec.errors import ConfigError

_TOKEN = re.compile(r"<\|action_(\d{1,3})\|>")
_NAME = re.compile(r"[^\W\d][\w .-]*")
"""Of a structured step, or of a field of one."""


def action_text(action: Any, form: ActionForm = "bins") -> str:
    """Writes a robot's action.

    "bins" writes integers, one per value, steps separated by semicolons: [-1, 1] is cut into 256
    bins of equal width, numbered from 0; values outside go to the outer bins. "tokens" writes the
    same bins as tokens, one per value, end to end; "openvla" the bins of OpenVLA.

    Structured steps, as robots that navigate have them, are text in any form: names are separated
    by semicolons, records are a list in JSON.

    Args:
      action: Numbers: [values] of one step, or [steps, values]. Or a list of steps that are names,
        such as "turn_left", or records of numbers and texts; or one record.
      form: As the recipe states.

    Raises:
      ValueError: No step, a step without values, steps of different numbers of them, or values
        that are not finite numbers.

    >>> action_text([-1.0, 0.0, 1.0])
    '0 128 255'
    >>> action_text([[0.5, -2.0], [0.25, 0.0]])
    '192 0; 160 128'
    >>> action_text([-1.0, 0.0], "openvla")
    '<|action_0|><|action_127|>'
    >>> action_text(["move_forward", "stop"]), action_text({"turn_deg": -15.0, "forward_m": 0.25})
    ('move_forward; stop', '[{"turn_deg": -15.0, "forward_m": 0.25}]')
    """
    structured = _structured_text([action] if isinstance(action, Mapping) else action)
    if structured:
        return structured
    nested = isinstance(action, list | tuple) and action and isinstance(action[0], list | tuple)
    steps = action if nested else [action]
    if not all(isinstance(step, list | tuple) and step for step in steps):
        raise ValueError("an action is one or more steps of one or more values")
    if len({*map(len, steps)}) > 1:
        raise ValueError("steps of an action have different numbers of values")
    numbers = [_BINS[form](np.array([*map(_value, step)])).tolist() for step in steps]
    if form == "bins":
        return "; ".join(" ".join(map(str, step)) for step in numbers)
    return "".join(f"<|action_{number}|>" for step in numbers for number in step)


def spelled_action(text: str) -> str | None:
    """Finds an action token that is spelled out in a text."""
    found = _TOKEN.search(text)
    return found and found.group()


def encode_actions(
    text: str, encode: Callable[[str], Sequence[int]], *, vocab_size: int
) -> list[int]:
    """Turns a text with action tokens into ids; what is between them is encoded piece by piece.

    >>> encode_actions(" <|action_0|><|action_255|>", lambda text: [len(text)], vocab_size=1000)
    [1, 999, 744]
    """
    ids: list[int] = []
    for i, part in enumerate(_TOKEN.split(text)):
        if i % 2:
            ids.append(int(bin_tokens(np.array(int(part)), vocab_size=vocab_size)))
        elif part:
            ids += encode(part)
    return ids


def check_action_tokens(tokenizer_json: str, special_ids: Mapping[str, int], *, size: int) -> None:
    """Refuses a vocabulary whose last ids are control tokens: actions would be read as markup.

    Args:
      tokenizer_json: The tokenizer.json.
      special_ids: Of the sequence's begin, end and padding.
      size: Ids of the vocabulary.

    Raises:
      ConfigError: `action_tokens`.
    """
    added = json.loads(tokenizer_json)["added_tokens"]
    control = {token["id"]: token["content"] for token in added if token["special"]}
    control |= {i: name for name, i in special_ids.items() if i not in control}
    wrong = sorted(name for i, name in control.items() if size - NUM_BINS <= i < size)
    if wrong or size < NUM_BINS:
        raise ConfigError("action_tokens.control", names=", ".join(wrong) or "none", size=size)


def _structured_text(steps: Any) -> str:
    """Writes steps that are names or records; "" for any other."""
    if not isinstance(steps, list | tuple) or not steps:
        return ""
    if all(isinstance(step, str) and _NAME.fullmatch(step) for step in steps):
        return "; ".join(steps)
    if not all(isinstance(step, Mapping) and step for step in steps):
        return ""
    for step in steps:
        for name, value in step.items():
            if not (isinstance(name, str) and _NAME.fullmatch(name)):
                raise ValueError("a field of an action has a name that begins with a letter")
            if not isinstance(value, str):
                _value(value)
    return json.dumps([dict(step) for step in steps], ensure_ascii=False)


def _value(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("an action value is a finite number")
    return float(value)


def _openvla_bins(values: np.ndarray) -> np.ndarray:
    return token_bins(openvla_tokens(values, vocab_size=NUM_BINS), vocab_size=NUM_BINS)


_BINS: Mapping[ActionForm, Callable[[np.ndarray], np.ndarray]] = {
    "bins": value_bins,
    "tokens": value_bins,
    "openvla": _openvla_bins,
}
