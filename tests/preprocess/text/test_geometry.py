"""Which augmentations leave a text true: the quick look says what the patterns say."""

import re
from itertools import chain

from preprocess.text import geometry

PARTS = re.sub(r"\?|\\w\*", "", geometry._SIDED_WORDS).split("|")
"""The longest spelling of each word."""

TEXTS = [
    "A red ball, far away.",
    "<point x=1>",
    "<|track_1",
    "bbox_2d",
    "POINT_2D",
    "[1, 2]",
    "(.5 , 3 px)",
    "y_min': 3",
    "x2=-.5",
    "the \N{LATIN SMALL LETTER LONG S}ign",
    "a \N{KELVIN SIGN}",
    "l\N{LATIN SMALL LETTER DOTLESS I}ght",
    "cloc\N{KELVIN SIGN}s",
    "dig\N{LATIN SMALL LETTER DOTLESS I}t",
    "a spread of maples",
]


def test_quick_look_for_words_and_coordinates_misses_none():
    words = chain.from_iterable((word, word.upper(), word.title(), f"x{word}") for word in PARTS)
    found = 0
    for text in [*TEXTS, *(f"Here {word} it is" for word in words)]:
        assert geometry._mentions_sides(text) == bool(geometry._SIDED.search(text)), text
        assert geometry._has_coordinates(text) == bool(geometry._PLACED.search(text)), text
        found += geometry._mentions_sides(text)
    assert found >= 3 * len(PARTS)
