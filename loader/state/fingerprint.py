"""Fingerprints of a dataset split and of a view, and how a saved one differs from this run's.

The fingerprint of a split covers what was prepared, how, and the sequence of its samples. It
depends on the samples and not on the shards: resharding in the same sequence does not change it. It
is made of the keys of at most 16,384 samples, evenly spaced over the split, so of every key of a
small split. An inserted, removed or appended sample changes the number of samples and moves all
keys after it. Exchanging a few samples between two of these keys in a large split is not detected.
Of a subset, the samples that are in it are described in the same way; a hash of all their ids is
added by `loader.stream`.

For a view (what examples are made of the samples) a state holds the fields that differ from their
defaults, so that a difference can be named, and a hash of all fields, since another release may
have others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from loader.assembly import OwnAugment, View
from loader.reading import ShardReader
from shardspec.families import family_to_dict
from shardspec.manifest import Manifest, differences, fingerprint

_MOST_KEYS = 16_384  # 0.1 s from a warm disk, whatever the size of the split
_DIGITS = 16  # 64 bits: states stay short, and no one gains from a collision


def split_fingerprint(
    manifest: Manifest,
    reader: ShardReader,
    *,
    split: str,
    num_samples: int,
    sample_ids: np.ndarray | None = None,
) -> dict[str, Any]:
    """Describes samples of a split, in plain JSON types.

    Args:
      manifest, reader, split: The split.
      num_samples: How many samples.
      sample_ids: int64 [num_samples], which; None: the first ones.

    Raises:
      ShardError: An index cannot be read.
    """
    tokenizer = manifest.tokenizer
    return {
        "dataset": manifest.dataset,
        "split": split,
        "num_samples": num_samples,
        "keys": keys_fingerprint(reader, num_samples, sample_ids=sample_ids),
        "recipe": fingerprint(manifest.recipe)[:_DIGITS],
        "tokenizer": fingerprint([tokenizer.sha256, dict(tokenizer.special_ids)])[:_DIGITS],
    }


def keys_fingerprint(
    reader: ShardReader, num_samples: int, *, sample_ids: np.ndarray | None = None
) -> str:
    """Hashes the keys of the first `num_samples` samples, or of those named, in their order."""
    count = min(num_samples, _MOST_KEYS)
    chosen = np.arange(count, dtype=np.int64) * num_samples // max(1, count)
    keys = reader.column("key", chosen if sample_ids is None else sample_ids[chosen])
    # The width of the key column of a foreign tar depends on the tar.
    payload = b"\n".join(keys.tolist()) if reader.raw else keys.tobytes()
    return hashlib.sha256(payload).hexdigest()[:_DIGITS]


def view_fingerprint(view: View) -> dict[str, Any]:
    """Describes a view in plain JSON types: a hash, and the fields that differ from their defaults.

    Fields of a part are named `augment.hue`.
    """
    fields, defaults = _fields(view), _fields(View())
    changed = {name: v for name, v in fields.items() if name not in defaults or v != defaults[name]}
    return {"hash": fingerprint(fields)[:_DIGITS], **changed}


def view_differences(saved: object, own: Mapping[str, Any] | None) -> dict[str, str]:
    """Compares fingerprints of views, or of the views of several datasets by their names.

    Returns:
      {field: how it differs}, the field without the name of its dataset.
    """
    if own is None:
        return {}  # there is no view: samples are yielded as they are stored
    if not isinstance(saved, Mapping):
        return {"hash": f"view: {saved} here"}
    if "hash" not in own:
        return {
            field: f"{text} ({name})"
            for name in own
            for field, text in view_differences(saved.get(name), own[name]).items()
        }
    defaults = _fields(View())
    views = [{**defaults, **dict(view), "hash": None} for view in (saved, own)]
    names = sorted({*views[0], *views[1]})
    found = {}
    for name in names:
        before, here = ({name: view[name]} if name in view else {} for view in views)
        for text in differences(before, here, "view"):
            found[name] = text
    if not found and saved.get("hash") != own["hash"]:
        found["hash"] = f"view.hash: {saved.get('hash')} here, {own['hash']} asked"
    return found


def _fields(view: View) -> dict[str, Any]:
    """Lists the fields of a view and of its parts by name."""
    fields: dict[str, Any] = {}
    described = asdict(view)
    if isinstance(view.augment, OwnAugment):
        described["augment"] = {"function": view.augment.name}
    for name, value in described.items():
        if name == "questions" and view.purpose != "evaluation":
            continue  # states of training are those of releases without it
        if name == "frames" and value is None:
            continue  # likewise, where there are no videos
        if name == "features":
            continue  # the recipe says which: that of a view follows from it
        part = value if isinstance(value, dict) else {"": value}
        if name == "model":
            if view.model is None:
                continue  # states of such views are older than models
            part = {"backend": view.model.backend, **family_to_dict(view.model.family)}
        for inner, v in part.items():
            plain = list(v) if isinstance(v, tuple) else v
            fields[f"{name}.{inner}" if inner else name] = plain
    return fields
