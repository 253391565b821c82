"""Damaged documents for fuzz tests: JSON whose values are exchanged, and bytes that are changed."""

import json
import random

DEEP = "[" * 100_000

VALUES = [
    "null",
    "true",
    "-1",
    "0",
    "1e999",
    "-0.5",
    "NaN",
    "-Infinity",
    str(10**30),
    str(2**63),
    str(2**64 - 1),
    "9" * 5000,
    '""',
    '"\\ud800"',
    '"\\u0000/../\\n"',
    json.dumps("x" * 200_000),
    "[]",
    "[[]]",
    "{}",
    '{"a": {"a": 1}}',
    "[" * 900 + "]" * 900,
    DEEP,
    "[1, 2",
]
"""Texts in the place of a value; the last ones are not JSON."""

_MARK = "\x01mark\x01"


def paths(document, place=()):
    """Yields the places of all values of a document, the inner ones too."""
    yield place
    names = document if isinstance(document, dict) else range(0)
    if isinstance(document, list):
        names = range(min(len(document), 3))
    for name in names:
        yield from paths(document[name], (*place, name))


def _changed(document, place, change):
    copy = json.loads(json.dumps(document))
    if not place:
        return change({"": copy}, "")[""]
    parent = copy
    for name in place[:-1]:
        parent = parent[name]
    change(parent, place[-1])
    return copy


def _put(value):
    def change(parent, name):
        parent[name] = value
        return parent

    return change


def _drop(parent, name):
    del parent[name]
    return parent


def damaged_json(document):
    """Yields documents with one value exchanged, missing, given twice or renamed, as bytes."""
    for place in paths(document):
        text = json.dumps(_changed(document, place, _put(_MARK)))
        before, _, after = text.partition(json.dumps(_MARK))
        for value in VALUES:
            yield (before + value + after).encode()
        if place:
            yield json.dumps(_changed(document, place, _drop)).encode()
            if isinstance(place[-1], str):
                name = json.dumps(place[-1])
                yield (before + f'1, {name}: 2, "unknown": 3' + after).encode()


def damaged_bytes(payload, *, seed, count):
    """Yields payloads that are cut, flipped, filled or nothing like a document."""
    yield from (b"", b"\xff\xfe", b"null", b"[]", b"{}", b'"', DEEP.encode(), b"\0" * 1000)
    yield from (payload + b"x", payload * 2, payload[::-1], b"\xef\xbb\xbf" + payload)
    yield payload.decode("latin-1").encode("utf-16")
    rng = random.Random(seed)
    for _ in range(count):
        changed = bytearray(payload)
        for _ in range(rng.choice((1, 1, 2, 8))):
            if not changed:
                break
            place = rng.randrange(len(changed))
            kind = rng.randrange(4)
            if kind == 0:
                changed[place] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del changed[place:]
            elif kind == 2:
                changed[place : place + rng.randrange(9)] = b""
            else:
                changed[place:place] = bytes(rng.randrange(256) for _ in range(rng.randrange(5)))
        yield bytes(changed)
