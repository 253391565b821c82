"""Where the coordinates of a response are among its tokens, so that the loader can move them.

1. A tokenizer must spell numbers character by character: every number of every notation is tried
   (`digit_ids`).
2. The coordinates of a text are the tokens that change when all their digits are exchanged.
3. What the loader will do is tried with the text itself: with the shortest and the longest numbers,
   its tokens must be those of the text that has these numbers (`find_numbers`).

A text that fails is not movable; nothing is assumed of tokenizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from preprocess.text.points import Point, Tag
from shardspec.coordinates import (
    BOXES,
    ONE,
    SPELLED,
    PointList,
    PointRow,
    replace_runs,
    write_number,
)

Encode = Callable[[str], Sequence[int]]

_NEXT = str.maketrans("0123456789", "1234567890")
_SHORTEST = {1: "0.0", 2: "000", 3: "0", 4: "0.00"}
_LONGEST = {1: "100.0", 2: "1000", 3: "1000", 4: "1.00"}

_AROUND = {1: (' x="', '" y'), 2: ("1 1 ", ' 2"'), 3: ("[", ", 1]"), 4: ("[", ", 1]")}
"""What is around a number in a text of each notation."""


def digit_ids(encode: Encode) -> tuple[int, ...]:
    """Finds the ids of `SPELLED`; () for a tokenizer that does not spell numbers by them."""
    ids: dict[str, int] = {}
    for character in SPELLED:
        found, other = (encode(f'x="1{c}1"') for c in (character, "3" if character == "1" else "1"))
        changed = [a for a, b in zip(found, other, strict=False) if a != b]
        if len(found) != len(other) or len(changed) > 1:
            return ()
        ids[character] = changed[0] if changed else -1
    spelled = tuple(ids.values())
    if len(set(spelled)) != len(SPELLED) or -1 in spelled:
        return ()
    for notation, (before, after) in _AROUND.items():
        written = {write_number(share / 1000, 1, notation) for share in range(1001)}
        first, last = encode(f"{before}1{after}"), encode(f"{before}2{after}")
        start = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
        head, tail = list(first[:start]), list(first[start + 1 :])
        for number in written:
            if list(encode(before + number + after)) != [*head, *(ids[c] for c in number), *tail]:
                return ()
    return spelled


def find_numbers(
    text: str, tags: Sequence[Tag], encode: Encode, digits: Sequence[int]
) -> list[tuple[int, int]] | None:
    """Finds the tokens of the coordinates of a text.

    Args:
      text: With the text of each tag, in their order.
      tags: What is written in it.
      encode: Gives the ids of a text in its place.
      digits: The ids of `SPELLED`.

    Returns:
      (start, stop) of each number of each tag, in their order; None where the ids of the text with
      other numbers are not those of the text with its numbers replaced, or where a point is outside
      of its picture.
    """
    if not _inside(tags):
        return None
    places: list[tuple[int, int]] = []
    done = 0
    for tag in tags:
        start = text.find(tag.text, done)
        if start < 0:
            return None
        places += [(start + a, start + b) for a, b in tag.numbers]
        done = start + len(tag.text)
    id_of = dict(zip(SPELLED, digits, strict=True))
    numbers = [text[a:b] for a, b in places]
    ids = np.array(encode(text), np.int32)
    changed = np.array(encode(_with(text, places, [n.translate(_NEXT) for n in numbers])), np.int32)
    if len(changed) != len(ids):
        return None
    differing = iter(np.flatnonzero(ids != changed).tolist())
    found = []
    for number in numbers:
        at = [next(differing, -1) for character in number if character != "."]
        start, stop = at[0], at[-1] + 1
        if start < 0 or ids[start:stop].tolist() != [id_of[c] for c in number]:
            return None
        found.append((start, stop))
    if next(differing, None) is not None:
        return None
    for chosen in (_SHORTEST, _LONGEST):
        filled = [chosen[tag.notation] for tag in tags for _ in tag.numbers]
        changes = [
            (start, stop, np.array([id_of[c] for c in number], np.int32))
            for (start, stop), number in zip(found, filled, strict=True)
        ]
        want = encode(_with(text, places, filled))
        if replace_runs(ids, changes)[0].tolist() != list(want):
            return None
    return found


def list_points(
    tags: Sequence[Tag],
    numbers: Sequence[tuple[int, int]],
    *,
    start: int,
    geometry: Mapping[int, int],
) -> Iterator[PointList]:
    """Lists the points of tags.

    Args:
      tags: Of a text.
      numbers: What was found of them.
      start: Where the tokens of the text begin.
      geometry: What each image allows if its points are moved along.
    """
    left = iter(numbers)
    for tag in tags:
        for image, points in tag.lists:
            rows = []
            for x, y in _stored(points):
                (a, b), (c, d) = next(left), next(left)
                rows.append(PointRow(start + a, start + b, start + c, start + d, x, y))
            yield PointList(image, geometry[image], int(tag.notation), 0, rows)


def _stored(points: Sequence[Point]) -> list[tuple[int, int]]:
    return [(round(x * ONE), round(y * ONE)) for x, y in points]


def _inside(tags: Sequence[Tag]) -> bool:
    """Returns True if all points are in their pictures, and all boxes have an area."""
    for tag in tags:
        for points in (_stored(own) for _, own in tag.lists):
            if not all(0 <= x <= ONE and 0 <= y <= ONE for x, y in points):
                return False
            pairs = zip(points[::2], points[1::2], strict=False)
            if tag.notation in BOXES and not all(a < c and b < d for (a, b), (c, d) in pairs):
                return False
    return True


def _with(text: str, places: Sequence[tuple[int, int]], numbers: Sequence[str]) -> str:
    pieces, done = [], 0
    for (start, stop), number in zip(places, numbers, strict=True):
        pieces += [text[done:start], number]
        done = stop
    return "".join([*pieces, text[done:]])
