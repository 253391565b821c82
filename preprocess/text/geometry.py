"""Which augmentations leave an example's texts true."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from preprocess.text.message import message_styles, message_texts
from preprocess.text.points import PLACEHOLDER
from preprocess.text.styles import STYLES, Style
from preprocess.text.styles.counting import asks_for_count
from shardspec.sample import Geometry

_SIDED_WORDS = (
    r"left|right|leftmost|rightmost|left-hand|right-hand|clockwise|counterclockwise|"
    r"anticlockwise|east|west|eastern|western|mirror\w*|facing|"
    r"texts?|words?|letters?|lettering|reads?|reading|says?|written|writing|signs?|signage|"
    r"label\w*|logos?|numbers?|numbered|numeral\w*|digit\w*|clocks?|watch|watches|maps?|"
    r"caption\w*|title\w*|spell\w*|printed|inscri\w*|fonts?"
)
_SIDED = re.compile(rf"\b({_SIDED_WORDS})\b", re.IGNORECASE)
_SIDED_STEMS = tuple(re.sub(r"s\?|\\w\*", "", _SIDED_WORDS).split("|"))
"""Of which a text has one where `_SIDED` matches, in lower case."""

_NUMBER = r"\s*-?(?:\d+(?:\.\d*)?|\.\d+)\s*(?:(?:%|px)\s*)?"
_PLACED = re.compile(
    r"<\|?(?:points?\b|tracks?\b|bbox|box|loc_?\d|patch_index)|"
    # Molmo, InternVL, Qwen-VL, PaliGemma, Florence-2, Kosmos-2
    rf"\b(?:bbox|point)_2d\b|[\[(]{_NUMBER}(?:,{_NUMBER})+[\])]|"
    r"\b[xy](?:[12]|_?min|_?max)?[\"']?\s*[=:]\s*[\"']?-?\.?\d",
    re.IGNORECASE,
)
"""Coordinates in the spellings of other code bases; a list of numbers may be some."""
_PLACED_MARKS = ("<", "[", "(", "=", ":", "_2d", "_2D")
"""Of which a text has one where `_PLACED` matches."""


def safe_geometry(
    texts: Sequence[str], *, styles: Sequence[str] = (), known: Mapping[str, Style] = STYLES
) -> Geometry:
    """Decides which augmentations leave an example's texts true.

    Points, motions and pages to be read allow neither flips nor crops, and neither do texts with
    coordinates: a text is stored as tokens, and cannot follow. Otherwise a flip is allowed
    if no text mentions sides or things to be read, and a free crop if none requests a count: a
    caption survives the loss of a margin, a number does not. Colour may always change.

    Args:
      texts: All texts of the example, questions as well as responses.
      styles: The styles of its messages.
      known: All styles by name.

    >>> safe_geometry(["a red ball"]) == Geometry.ALL
    True
    >>> Geometry.FLIP in safe_geometry(["a ball on the left"])
    False
    >>> safe_geometry(["dogs"], styles=["pointing"]) == Geometry.COLOR
    True
    >>> safe_geometry(["Where is it?", "[0.25, 0.1, 0.6, 0.84]"]) == Geometry.COLOR
    True
    """
    if any(known[style].rigid for style in styles if style in known):
        return Geometry.COLOR
    return _allowed(texts, texts)


def movable_geometry(
    example: Mapping[str, Any], *, num_images: int, known: Mapping[str, Style] = STYLES
) -> Geometry:
    """Decides which augmentations leave an example's texts true if its points are moved along.

    Nothing that is pointed at leaves the picture then, so a crop does not change how many there
    are. Everything else is decided as by `safe_geometry`.

    Args:
      example: Has `message_list`.
      num_images: Of the example.
      known: All styles by name.

    Returns:
      COLOR where the points are not all that would become wrong.
    """
    if example.get("rigid"):
        return Geometry.COLOR
    counted: list[str] = []
    for message in example["message_list"]:
        part = {"message_list": [message]}
        styles = [known[style] for style in message_styles(part) if style in known]
        for style in styles:
            # Where there are several images, coordinates must say which one they are of; and a
            # number alone does not show what has left the picture.
            follows = style.movable and style.mode != "count"
            if style.rigid and not (follows and (style.grouped or num_images == 1)):
                return Geometry.COLOR
        if not all(style.rigid for style in styles):
            counted += message_texts(part)
    texts = [text.replace(PLACEHOLDER, "") for text in message_texts(example)]
    return _allowed(texts, counted)


def _allowed(texts: Sequence[str], counted: Sequence[str]) -> Geometry:
    """Decides by texts alone; those that are `counted` may request a count."""
    if any(map(_has_coordinates, texts)):
        return Geometry.COLOR
    safe = Geometry.ALL
    if any(map(_mentions_sides, texts)):
        safe &= ~Geometry.FLIP
    if any(asks_for_count(text) for text in counted):
        safe &= ~Geometry.CROP
    return safe


def _has_coordinates(text: str) -> bool:
    # To look for the marks takes a tenth of the time.
    return any(mark in text for mark in _PLACED_MARKS) and bool(_PLACED.search(text))


def _mentions_sides(text: str) -> bool:
    lowered = text.lower()
    # To look for the stems takes a sixth of the time. Letters that are others' lower case, such as
    # the long s, are for the pattern.
    maybe = not text.isascii() or any(stem in lowered for stem in _SIDED_STEMS)
    return maybe and bool(_SIDED.search(text))
