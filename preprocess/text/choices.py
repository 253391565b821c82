"""Multiple-choice questions as text: two fixed forms, and a generator of others.

    standard  the question, an instruction, `A. option` lines; the answer is `A. option`. This is
              how Molmo 2 is evaluated; nothing is drawn.
    letter    the question, `A: option` lines; the answer is `A` (Molmo 1); nothing is drawn.
    varied    one draw in ten is the standard form. The others draw the order of the options,
              whether and how they are labelled, the layout, the wording, and the form of the answer
              (the shares are Molmo 2's; the order is drawn here as well, so that a model does not
              learn positions).

Whatever is drawn, the answer names the right option of the row.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

from shardspec.errors import SampleError
from shardspec.toml import load_toml

ChoiceForm = Literal["standard", "letter", "varied"]

STANDARD_INSTRUCTION = "Only return the correct answer option."
"""The instruction of Molmo 2's evaluation form."""

# Shares of the varied form (Molmo 2, its training generator).
STANDARD_SHARE = 0.1
LABELLED_SHARE = 0.8
LABEL_ONLY_SHARE = 0.25
COMMON_MARKER_SHARE = 0.8
INLINE_SHARE = 0.1
BULLET_SHARE = 0.5
INSTRUCTION_SHARE = 0.5

_UPPER = tuple(string.ascii_uppercase)
_NUMBERS = tuple(str(number) for number in range(1, 21))
_ALPHABETS = (
    _UPPER,
    tuple(string.ascii_lowercase),
    _NUMBERS,
    ("i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix", "x"),
)

_REFERS_TO_PLACE = re.compile(
    r"\b(?:all|none|both|neither|any|either|each|two) of (?:the |these )?"
    r"(?:above|below|these|them|former|other|options|answers|choices)|\bthe above\b",
    re.IGNORECASE,
)
"""An option such as "none of the above" is true only in its position."""

_REFERS_TO_LETTER = re.compile(r"\b[A-J]\b(?:\s*(?:,|and|or|&|nor)\s*\b[A-J]\b)+")
"""An option such as "both A and B" is true only under these labels."""


def write_choices(
    question: str,
    options: Sequence[str],
    answer_idx: int,
    *,
    labelled: bool = True,
    form: ChoiceForm = "standard",
    rng: np.random.RandomState,
) -> tuple[str, str]:
    """Writes a multiple-choice question and its answer.

    Args:
      question: Without its options.
      options: In the order of the source; texts, of which some may be empty if labelled.
      answer_idx: Index of the right option.
      labelled: False where the options are names of their own, such as letters in a diagram: they
        then get no labels and the answer is the option's text.
      form: See the module.
      rng: Only the varied form draws from it.

    Returns:
      (user text, response text).

    Raises:
      SampleError: `answer_idx` (no such option), `message_fields` (the right option is empty and
        nothing else could name it).

    >>> rng = np.random.RandomState(0)
    >>> write_choices("Which?", ["cat", "dog"], 1, rng=rng)
    ('Which?\\nOnly return the correct answer option.\\nA. cat\\nB. dog', 'B. dog')
    >>> write_choices("Which?", ["cat", "dog"], 1, form="letter", rng=rng)
    ('Which?\\nA: cat\\nB: dog\\n', 'B')
    """
    # bool is an int, and True would pass for option 1.
    if type(answer_idx) is not int or not 0 <= answer_idx < len(options):
        raise SampleError("answer_idx", got=answer_idx, options=len(options))
    if not labelled and not options[answer_idx].strip():
        raise SampleError("message_fields.option", answer_idx=answer_idx)
    return _FORMS[form](question, options, answer_idx, labelled, rng)


def _standard(
    question: str,
    options: Sequence[str],
    answer_idx: int,
    labelled: bool,
    rng: np.random.RandomState,  # noqa: ARG001
) -> tuple[str, str]:
    lines = _labelled(options, _labels(len(options)), "{}.") if labelled else list(options)
    return "\n".join([question, STANDARD_INSTRUCTION, *lines]), lines[answer_idx].strip()


def _letter(
    question: str,
    options: Sequence[str],
    answer_idx: int,
    labelled: bool,
    rng: np.random.RandomState,  # noqa: ARG001
) -> tuple[str, str]:
    names = _labels(len(options)) if labelled else options
    lines = _labelled(options, names, "{}:") if labelled else options
    return "\n".join([question, *lines, ""]), names[answer_idx].strip()


def _varied(
    question: str,
    options: Sequence[str],
    answer_idx: int,
    labelled: bool,
    rng: np.random.RandomState,
) -> tuple[str, str]:
    if rng.random_sample() < STANDARD_SHARE:
        return _standard(question, options, answer_idx, labelled, rng)
    texts = _templates()
    lettered = any(_REFERS_TO_LETTER.search(option) for option in options)
    if not lettered and not any(_REFERS_TO_PLACE.search(option) for option in options):
        order = rng.permutation(len(options)).tolist()
        options = [options[i] for i in order]
        answer_idx = order.index(answer_idx)
    right = options[answer_idx].strip()
    if labelled and (lettered or not right or rng.random_sample() < LABELLED_SHARE):
        names = _labels(len(options)) if lettered else _drawn_labels(len(options), rng)
        lines = _labelled(options, names, _drawn_marker(texts, rng))
        bare = not right or rng.random_sample() < LABEL_ONLY_SHARE
        answer = names[answer_idx] if bare else lines[answer_idx].strip()
    else:
        bullet = _one(texts["bullets"], rng) if rng.random_sample() < BULLET_SHARE else ""
        lines = [f"{bullet}{option}" for option in options]
        answer = right
    if rng.random_sample() < INLINE_SHARE:
        shown = _one(texts["separators"], rng).join(lines)
    else:
        shown = "\n".join(lines)
    fields = {"question": question, "options": shown}
    if rng.random_sample() < INSTRUCTION_SHARE:
        fields["instruction"] = _one(texts["instructions"], rng)
        return fill(_one(texts["layouts"], rng), fields), answer
    return fill(_one(texts["direct"], rng), fields), answer


_Form = Callable[[str, Sequence[str], int, bool, np.random.RandomState], tuple[str, str]]
_FORMS: Mapping[ChoiceForm, _Form] = {"standard": _standard, "letter": _letter, "varied": _varied}


def fill(template: str, fields: Mapping[str, str]) -> str:
    """Puts fields into a template in one pass, so that a field's own braces stay what they are.

    >>> fill("{question} ({options})", {"question": "What is {options}?", "options": "a, b"})
    'What is {options}? (a, b)'
    """
    return re.sub(r"\{(\w+)\}", lambda found: fields[found[1]], template)


def _labels(count: int) -> Sequence[str]:
    return _UPPER[:count] if count <= len(_UPPER) else [str(i) for i in range(1, count + 1)]


def _drawn_labels(count: int, rng: np.random.RandomState) -> Sequence[str]:
    fitting = [alphabet for alphabet in _ALPHABETS if len(alphabet) >= count]
    return fitting[rng.randint(0, len(fitting))][:count] if fitting else _labels(count)


def _drawn_marker(texts: Mapping[str, list[str]], rng: np.random.RandomState) -> str:
    common = rng.random_sample() < COMMON_MARKER_SHARE
    return _one(texts["common_markers" if common else "odd_markers"], rng)


def _labelled(options: Sequence[str], names: Sequence[str], marker: str) -> list[str]:
    # An empty option leaves its label alone on the line, with no space after it.
    return [
        f"{marker.replace('{}', name)} {option}".rstrip()
        for name, option in zip(names, options, strict=True)
    ]


def _one(texts: Sequence[str], rng: np.random.RandomState) -> str:
    return texts[rng.randint(0, len(texts))]


@cache
def _templates() -> Mapping[str, list[str]]:
    return load_toml(Path(__file__).parent / "templates" / "choices.toml")
