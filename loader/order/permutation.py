"""Keyed bijections on [0, n), for arrays of indices at once and with nothing stored.

    permute(i, size=n, key=k)   the place of i in the k-th shuffle of 0 .. n-1

Two methods, by size:

* n <= 4096: **a sorted table of hashes**. Entry i is a 64-bit hash whose lowest 12 bits are
  replaced by i; sorting the entries shuffles the i, and every one of the n! orders is equally
  likely. The entries are distinct by construction, so any sorting routine gives the same table.
* n > 4096: **a Feistel network on mixed radix**. With a = ceil(sqrt(n)) and b = ceil(n / a) an
  index is a pair (left, right) of [0, a) x [0, b). A round adds a hash of one half to the other,
  modulo its radix: always invertible. a * b exceeds n by less than a, so the few results beyond n
  are sent through again ("cycle walking") until they fall inside; on average this takes less than
  1/sqrt(n) extra passes.

Tables for small sizes, because a Feistel network on a handful of values is visibly biased: at
n = 5 the distance between the images of 0 and n-1 has a chi-square per degree of freedom of 55
where 1 is fair, even with eight rounds (benchmarks/order.py prints the table).

Only 64-bit integer arithmetic defined in this project is used: the results are the same on every
machine and in every version of NumPy. Changing them is a breaking change, and tests pin them.
"""

from __future__ import annotations

import numpy as np

from shardspec.keyed import mix_array

TABLE_LIMIT = 4096
"""Largest size that is shuffled by a sorted table; 2**12, the room for an index in an entry."""

SIZE_LIMIT = 2**62
"""Sizes must stay below this, so that both halves fit 32 bits."""

_ROUNDS = 8
_INDEX_BITS = np.uint64(TABLE_LIMIT - 1)
_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's increment, as in shardspec.keyed
_LOW_32 = np.uint64(32)
_PAST_THE_END = np.uint64(2**64 - 1)
_CHUNK = 1 << 18  # table entries hashed and sorted at a time: 2 MB, about one core's L2 cache


def keyed_array(*parts: int | np.ndarray) -> np.ndarray:
    """Hashes integers and integer arrays to 64 bits; equals `shardspec.keyed.keyed` elementwise.

    Args:
      parts: Integers or int64/uint64 arrays that broadcast together.

    Returns:
      uint64 [broadcast shape], at least one axis.

    >>> from shardspec.keyed import keyed
    >>> keyed_array(7, np.array([1, 2])).tolist() == [keyed(7, 1), keyed(7, 2)]
    True
    """
    state = np.zeros(1, np.uint64)
    for part in parts:
        state = mix_array((state + _GAMMA) ^ mix_array(_as_uint64(part) + _GAMMA))
    return state


def permute(
    index: int | np.ndarray, *, size: int | np.ndarray, key: int | np.ndarray
) -> np.ndarray:
    """Maps each index to its place under the keyed bijection of its size.

    Args:
      index: int64, each 0 to its size - 1 (not checked).
      size: Sizes of the domains, 1 to 2**62 - 1.
      key: 64-bit keys; equal (size, key) mean the same bijection. All three broadcast together.

    Returns:
      int64 [broadcast shape], at least one axis.

    >>> sorted(permute(np.arange(5), size=5, key=1).tolist())
    [0, 1, 2, 3, 4]
    """
    indices, sizes, keys = np.broadcast_arrays(
        np.atleast_1d(np.asarray(index, np.int64)), np.asarray(size, np.int64), _as_uint64(key)
    )
    shape = indices.shape
    indices, sizes, keys = indices.ravel(), sizes.ravel(), keys.ravel()
    small = sizes <= TABLE_LIMIT
    if small.all():
        return _by_table(indices, sizes, keys).reshape(shape)
    if not small.any():
        return _by_feistel(indices, sizes, keys).reshape(shape)
    images = np.empty(indices.shape, np.int64)
    images[small] = _by_table(indices[small], sizes[small], keys[small])
    images[~small] = _by_feistel(indices[~small], sizes[~small], keys[~small])
    return images.reshape(shape)


def _by_table(indices: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    if not len(indices):
        return np.zeros(0, np.int64)
    # The size joins the key, so that one number tells which table an index belongs to.
    table_keys = mix_array(keys + _GAMMA * sizes.astype(np.uint64))
    table_keys, first, table = np.unique(table_keys, return_index=True, return_inverse=True)
    widths = sizes[first]
    columns = np.arange(widths.max(), dtype=np.uint64)
    places = np.empty((len(widths), len(columns)), np.uint16)
    step = max(1, _CHUNK // len(columns))
    for start in range(0, len(widths), step):
        chunk = slice(start, start + step)
        entries = mix_array(table_keys[chunk, None] + _GAMMA * (columns + np.uint64(1)))
        entries = (entries & ~_INDEX_BITS) | columns
        entries[columns >= widths[chunk, None].astype(np.uint64)] = _PAST_THE_END
        entries.sort(axis=1)
        places[chunk] = entries & _INDEX_BITS
    images: np.ndarray = places[table, indices].astype(np.int64)
    return images


def _by_feistel(indices: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    # sqrt is correctly rounded everywhere (IEEE 754), and any radix near it would do.
    rows = np.ceil(np.sqrt(sizes.astype(np.float64))).astype(np.uint64)
    limits = sizes.astype(np.uint64)
    columns = (limits + rows - np.uint64(1)) // rows
    images = indices.astype(np.uint64)
    walking = np.arange(len(indices))
    while len(walking):
        passed = _feistel(images[walking], rows[walking], columns[walking], keys[walking])
        images[walking] = passed
        walking = walking[passed >= limits[walking]]
    places: np.ndarray = images.astype(np.int64)
    return places


def _feistel(
    values: np.ndarray, rows: np.ndarray, columns: np.ndarray, keys: np.ndarray
) -> np.ndarray:
    left, right = np.divmod(values, columns)
    for i in range(0, _ROUNDS, 2):
        left = _add(left, right, i, keys, rows)
        right = _add(right, left, i + 1, keys, columns)
    joined: np.ndarray = left * columns + right
    return joined


def _add(
    half: np.ndarray, other: np.ndarray, i: int, keys: np.ndarray, radix: np.ndarray
) -> np.ndarray:
    """One round: half + hash(other), modulo radix."""
    counter = other * np.uint64(_ROUNDS) + np.uint64(i + 1)
    hashed = mix_array(keys + _GAMMA * counter)
    # The upper 32 bits scaled to [0, radix): a multiplication where a remainder would divide.
    total: np.ndarray = half + (((hashed >> _LOW_32) * radix) >> _LOW_32)
    total -= np.where(total >= radix, radix, np.uint64(0))
    return total


def _as_uint64(value: int | np.ndarray) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value.astype(np.uint64)
    return np.array([value & (2**64 - 1)], np.uint64)
