"""Keys of the samples of a plan, packed: a dataset may have 100 million of them.

Pure. A key is 24 hexadecimal digits (`preprocess.recipe.sample_key`); twelve bytes hold it exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from preprocess.hash_table import HashTable
from preprocess.recipe import KEY_BYTES


class KeyList(Sequence[str]):
    """Keys in the order in which they were added; each is there once.

    >>> keys = KeyList()
    >>> keys.add("00" * 12), keys.add("01" * 12), keys.add("00" * 12), list(keys)[1][:4]
    (True, True, False, '0101')
    """

    def __init__(self) -> None:
        """Makes an empty list."""
        self._table = HashTable(KEY_BYTES)

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        return self._table[i].hex()

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and bytes.fromhex(key) in self._table

    def add(self, key: str) -> bool:
        """Adds a key; returns False if it is there already."""
        before = len(self)
        return self._table.add(bytes.fromhex(key)) == before
