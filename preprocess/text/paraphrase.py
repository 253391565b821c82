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

from shardspec.errors import ConfigError
from shardspec.toml import load_toml

# A straight single quote opens a quotation only without a letter before it: don't, dogs'.
_QUOTED = r"""<[^<>]*>|"[^"]*"|“[^”]*”|‘[^’]*’|`[^`]*`|(?<!\w)'[^'\n]+'(?!\w)"""


Groups = tuple[tuple[str, ...], ...]


def paraphrase(
    text: str,
    rng: np.random.RandomState,
    *,
    keep: Sequence[str] = (),
    own: Groups = (),
    builtin: bool = True,
) -> str:
    """Draws a paraphrase of a user's text.

    Args:
      text: The text; never the response.
      rng: One draw per replaceable occurrence, left to right.
      keep: Texts that stay as they are wherever they occur.
      own: Groups of the user's.
      builtin: Whether the groups of the table are used as well.

    >>> paraphrase("Is “the image” big?", np.random.RandomState(0))
    'Is “the image” big?'
    """
    groups = word_groups(own, builtin)
    if not groups:
        return text
    fixed = [re.escape(part) for part in sorted(set(keep), key=lambda p: (-len(p), p)) if part]
    # Fixed stretches come first: at one position the leftmost alternative of a pattern wins.
    pattern = "|".join([*fixed, _QUOTED, f"(?P<phrase>{_phrases(own, builtin)})"])

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
def word_groups(own: Groups, builtin: bool) -> Mapping[str, Sequence[str]]:
    """Gives the group of each expression, in lower case.

    Raises:
      ConfigError: `styles_value` (an expression of two groups, or one that is alone).
    """
    path = Path(__file__).parent / "templates" / "paraphrase.toml"
    table = load_toml(path)["groups"] if builtin else []
    found: dict[str, Sequence[str]] = {phrase: group for group in table for phrase in group}
    for group in own:
        words = [phrase.lower() for phrase in group]
        again = [phrase for phrase in words if phrase in found or words.count(phrase) > 1]
        if again or len(group) < 2:
            raise ConfigError(
                "styles_value.problem",
                name="paraphrase.groups",
                got=(again or words)[0],
                problem="is in two groups" if again else "is alone in its group",
                hint="builtin = false leaves the groups of the package out",
            )
        found |= dict.fromkeys(words, group)
    return found


@cache
def _phrases(own: Groups, builtin: bool) -> str:
    # The longest first, or "the image" would hide "in the image".
    groups = word_groups(own, builtin)
    longest_first = sorted(groups, key=lambda phrase: (-len(phrase), phrase))
    return r"(?<![\w-])(?:" + "|".join(map(re.escape, longest_first)) + r")(?![\w-])"
