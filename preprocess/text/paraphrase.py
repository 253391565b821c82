"""Paraphrases of what a user says: words and short phrases for others of the same meaning.

The table (templates/paraphrase.toml) holds groups of expressions that may replace each other.
Each occurrence of one is replaced by a member of its group, itself included, drawn uniformly.
Only whole words count; the case of the first letter, or of a text in capitals, is kept. Quotations,
tags, backticks and the texts that the caller names stay as they are: a label or
an option must read the same in the question and in the answer. Responses are never passed in here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from shardspec.toml import load_toml

# A straight single quote opens a quotation only without a letter before it: don't, dogs'.
_QUOTED = r"""<[^<>]*>|"[^"]*"|“[^”]*”|‘[^’]*’|`[^`]*`|(?<!\w)'[^'\n]+'(?!\w)"""


def paraphrase(text: str, rng: np.random.RandomState, *, keep: Sequence[str] = ()) -> str:
    """Draws a paraphrase of a user's text.

    Args:
      text: The text; never the response.
      rng: One draw per replaceable occurrence, left to right.
      keep: Texts that stay as they are wherever they occur.

    >>> paraphrase("Is “the image” big?", np.random.RandomState(0))
    'Is “the image” big?'
    """
    groups = _groups()
    fixed = [re.escape(part) for part in sorted(set(keep), key=lambda p: (-len(p), p)) if part]
    # Fixed stretches come first: at one position the leftmost alternative of a pattern wins.
    pattern = "|".join([*fixed, _QUOTED, f"(?P<phrase>{_phrases()})"])

    def replace(found: re.Match[str]) -> str:
        phrase = found["phrase"]
        if phrase is None:
            return found[0]
        group = groups[phrase.lower()]
        return _with_case_of(phrase, group[rng.randint(0, len(group))])

    return re.sub(pattern, replace, text, flags=re.IGNORECASE)


def _with_case_of(original: str, replacement: str) -> str:
    if original.isupper():
        return replacement.upper()
    if original[0].isupper():
        return replacement[0].upper() + replacement[1:]
    return replacement


@cache
def _groups() -> Mapping[str, Sequence[str]]:
    table = load_toml(Path(__file__).parent / "templates" / "paraphrase.toml")["groups"]
    return {phrase: group for group in table for phrase in group}


@cache
def _phrases() -> str:
    # The longest first, or "the image" would hide "in the image".
    longest_first = sorted(_groups(), key=lambda phrase: (-len(phrase), phrase))
    return r"(?<![\w-])(?:" + "|".join(map(re.escape, longest_first)) + r")(?![\w-])"
