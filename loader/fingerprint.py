"""The fingerprint of a split: what was prepared, how, and the sequence of its samples.

It depends on the samples and not on the shards, so that shards which were cut anew in the same
sequence have the same one. Reading it takes the keys of at most 16,384 samples, evenly spaced over
the split: every key of a small split. An inserted, removed or appended sample changes the number
of samples and moves all keys behind it; what a large split does not notice is an exchange of a few
samples between two that were looked at.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from loader.reader import ShardReader
from shardspec.manifest import Manifest, fingerprint

_MOST_KEYS = 16_384  # 0.1 s from a warm disk, whatever the size of the split
_DIGITS = 16  # 64 bits: states stay short, and nobody looks for collisions on purpose


def split_fingerprint(
    manifest: Manifest, reader: ShardReader, *, split: str, num_samples: int
) -> dict[str, Any]:
    """Describes the first `num_samples` samples of a split, in plain JSON types.

    Raises:
      ShardError: An index cannot be read.
    """
    tokenizer = manifest.tokenizer
    return {
        "dataset": manifest.dataset,
        "split": split,
        "num_samples": num_samples,
        "keys": keys_fingerprint(reader, num_samples),
        "recipe": fingerprint(manifest.recipe)[:_DIGITS],
        "tokenizer": fingerprint([tokenizer.sha256, dict(tokenizer.special_ids)])[:_DIGITS],
    }


def keys_fingerprint(reader: ShardReader, num_samples: int) -> str:
    """Hashes the keys of the first `num_samples` samples, in their sequence."""
    count = min(num_samples, _MOST_KEYS)
    chosen = np.arange(count, dtype=np.int64) * num_samples // max(1, count)
    keys = reader.column("key", chosen)
    # How wide the column of a foreign tar's keys is depends on the tar.
    payload = b"\n".join(keys.tolist()) if reader.raw else keys.tobytes()
    return hashlib.sha256(payload).hexdigest()[:_DIGITS]
