"""Numbers of hashes, packed: a dataset may have 100 million keys, URLs or files.

Pure. The bytes of all hashes are in one array, in the order in which they were added; beside them
is a hash table of their numbers, at most two thirds full. So a hash costs its own bytes and 6 to 12
more, where a set of Python's takes 100.
"""

from __future__ import annotations

import hashlib
from array import array

ABSENT = -1
"""In the place of a number."""

TEXT_BYTES = 16
"""Of the hash of a text: nobody finds two texts of one hash, not even who looks for them."""

_SMALLEST = 1024
_LEAST_BYTES = 8


class HashTable:
    """Hashes of one length, each once, numbered from 0 on in the order in which they were added.

    >>> table = HashTable(16)
    >>> [table.add(text_hash(text)) for text in "abca"], table.find(text_hash("c")), len(table)
    ([0, 1, 2, 0], 2, 3)
    """

    def __init__(self, num_bytes: int) -> None:
        """Makes an empty table.

        Args:
          num_bytes: Length of each hash, >= 8.
        """
        assert num_bytes >= _LEAST_BYTES
        self._num_bytes = num_bytes
        self._packed = bytearray()
        self._table = array("i", [ABSENT]) * _SMALLEST
        self._mask = _SMALLEST - 1

    def __len__(self) -> int:
        return len(self._packed) // self._num_bytes

    def __getitem__(self, number: int) -> bytes:
        start = number * self._num_bytes
        if not 0 <= start < len(self._packed):
            raise IndexError(number)
        return bytes(self._packed[start : start + self._num_bytes])

    def __contains__(self, hashed: bytes) -> bool:
        return self._table[self._slot(hashed)] != ABSENT

    def find(self, hashed: bytes) -> int:
        """Gives the number of a hash; ABSENT where it is not here."""
        return self._table[self._slot(hashed)]

    def add(self, hashed: bytes) -> int:
        """Gives the number of a hash; a new one gets the next, which is the length before."""
        slot = self._slot(hashed)
        number = self._table[slot]
        if number == ABSENT:
            number = self._table[slot] = len(self)
            self._packed += hashed
            if 3 * len(self) > 2 * len(self._table):
                self._grow()
        return number

    def _slot(self, hashed: bytes) -> int:
        """Finds where a hash is in the table, or where it goes."""
        # Any eight bytes of a hash are as good as a hash of it.
        slot = int.from_bytes(hashed[:_LEAST_BYTES], "little") & self._mask
        while (number := self._table[slot]) != ABSENT:
            if self._packed.startswith(hashed, number * self._num_bytes):
                break
            slot = (slot + 1) & self._mask
        return slot

    def _grow(self) -> None:
        size = 2 * len(self._table)
        del self._table  # the old one and the new one need not be in memory together
        self._table = array("i", [ABSENT]) * size
        self._mask = size - 1
        for number in range(len(self)):
            self._table[self._slot(self[number])] = number


class TextSet:
    """Texts, each as its hash.

    >>> texts = TextSet()
    >>> texts.add("a"), texts.add("a"), "a" in texts, "b" in texts, len(texts)
    (True, False, True, False, 1)
    """

    def __init__(self) -> None:
        """Makes an empty set."""
        self._table = HashTable(TEXT_BYTES)

    def __len__(self) -> int:
        return len(self._table)

    def __contains__(self, text: object) -> bool:
        return isinstance(text, str) and text_hash(text) in self._table

    def add(self, text: str) -> bool:
        """Adds a text; returns False if it is there already."""
        before = len(self._table)
        return self._table.add(text_hash(text)) == before


def text_hash(text: str) -> bytes:
    """Hashes a text to 128 bits; it may hold lone surrogates."""
    payload = text.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(payload, digest_size=TEXT_BYTES).digest()
