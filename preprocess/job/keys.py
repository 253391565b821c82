"""Keys of the samples of a plan, packed: a dataset may have 100 million of them.

Pure. A key is 24 hexadecimal digits (`preprocess.recipe.sample_key`); twelve bytes hold it exactly.
Beside them is a hash table of row numbers, at most two thirds full.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import overload

from preprocess.recipe import KEY_BYTES

_FREE = -1
_SMALLEST = 1024


class KeyList(Sequence[str]):
    """Keys in the order in which they were added; each is there once.

    >>> keys = KeyList()
    >>> keys.add("00" * 12), keys.add("01" * 12), keys.add("00" * 12), list(keys)[1][:4]
    (True, True, False, '0101')
    """

    def __init__(self) -> None:
        """Makes an empty list."""
        self._packed = bytearray()
        self._table = array("i", [_FREE]) * _SMALLEST

    def __len__(self) -> int:
        return len(self._packed) // KEY_BYTES

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self._packed[i * KEY_BYTES : (i + 1) * KEY_BYTES].hex()

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._table[self._slot(bytes.fromhex(key))] != _FREE

    def add(self, key: str) -> bool:
        """Adds a key; returns False if it is there already."""
        packed = bytes.fromhex(key)
        slot = self._slot(packed)
        if self._table[slot] != _FREE:
            return False
        self._table[slot] = len(self)
        self._packed += packed
        if 3 * len(self) > 2 * len(self._table):
            self._grow()
        return True

    def _slot(self, packed: bytes) -> int:
        """Finds where a key is in the table, or where it goes."""
        # Keys are hashes: any eight bytes of one are as good as a hash of it.
        mask = len(self._table) - 1
        slot = int.from_bytes(packed[:8], "little") & mask
        while (i := self._table[slot]) != _FREE:
            if self._packed.startswith(packed, i * KEY_BYTES):
                break
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        self._table = array("i", [_FREE]) * (2 * len(self._table))
        for i in range(len(self)):
            packed = bytes(self._packed[i * KEY_BYTES : (i + 1) * KEY_BYTES])
            self._table[self._slot(packed)] = i
