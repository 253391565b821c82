"""Generations: rows that a source has got since its split was finished, in shards of their own.

The examples of a finished split are a *prefix* of those of its source now, or the source has
changed otherwise. Marks tell which: a running hash of all examples as the adapter gives them, kept
at each `BLOCK` of them, so that a change is found in its block. What a URL or a file contains is
not in a mark: files have stamps (`stamps`), and downloads are frozen in the samples.

The marks of a generation are one file of the output beside the stamps. They are published when it
is planned, and hold from its commit on: the manifest, not a file, says which generation is the
last.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from preprocess.datasets import EpisodeFrame
from shardspec import storage
from shardspec.documents import read_fields, read_object
from shardspec.keyed import hash_text
from shardspec.manifest import SplitEntry, canonical_json

BLOCK = 1024
"""Examples between two marks."""

_MARK_CHARS = 16


class RowMarks:
    """Marks of examples, in their order."""

    def __init__(self) -> None:
        """Begins before the first example."""
        self._hash = hashlib.sha256()
        self._json = json.JSONEncoder(default=self._described)
        self.num_examples = 0
        self.blocks: list[str] = []
        self.groups: set[int] = set()
        """Hashes of the names of groups."""
        self.frames = False
        """Whether an example has pictures of which only the place is known: frames of cameras."""

    def copy(self) -> RowMarks:
        """Gives marks of the same examples, to which others can be added."""
        other = RowMarks()
        other._hash = self._hash.copy()
        other.num_examples, other.frames = self.num_examples, self.frames
        other.blocks, other.groups = [*self.blocks], {*self.groups}
        return other

    def add(self, example: Mapping[str, Any] | None) -> None:
        """Adds an example; None where its row cannot become one."""
        group = example.get("group") if example else None
        if group:
            self.groups.add(hash_text(str(group)))
        try:
            text = self._json.encode(example)
        except (TypeError, ValueError, RecursionError):
            text = "no JSON"  # PLAN refuses the row
        self._hash.update(text.encode() + b"\n")
        self.num_examples += 1
        if self.num_examples % BLOCK == 0:
            self.blocks.append(self.last)

    @property
    def last(self) -> str:
        """Mark of all examples so far."""
        return self._hash.hexdigest()[:_MARK_CHARS]

    def _described(self, value: object) -> Any:
        """Describes what is not JSON; pixels and bytes by their hash."""
        if isinstance(value, bytes):
            return hashlib.sha256(value).hexdigest()
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, np.ndarray):
            return [str(value.dtype), value.shape, hashlib.sha256(value.tobytes()).hexdigest()]
        if isinstance(value, Image.Image):
            return [value.mode, value.size, hashlib.sha256(value.tobytes()).hexdigest()]
        if dataclasses.is_dataclass(value):
            self.frames = self.frames or isinstance(value, EpisodeFrame)
            fields = [each.name for each in dataclasses.fields(value) if each.compare]
            return [type(value).__name__, [getattr(value, name) for name in fields]]
        return type(value).__name__


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredMarks:
    """What an output keeps of the rows of a generation and of those before it."""

    build_key: str
    num_examples: int
    blocks: list[str]
    last: str
    frames: bool
    num_rows_read: int
    left_out: Mapping[str, int]
    """Rows that the dataset could not read on opening, by reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """What a finished split has to get."""

    generation: int
    """Number of the new one; those of the first build are generation 0."""
    before: SplitEntry
    marks: RowMarks
    """Of the old examples."""
    stored: StoredMarks


def generation_of(entry: SplitEntry) -> int:
    """Gives the number of the last generation of a split."""
    return max(0, len(entry.source.get("generations", ())) - 1)


def encode_marks(stored: StoredMarks) -> bytes:
    """Serialises marks."""
    return gzip.compress(canonical_json(dataclasses.asdict(stored)), 3, mtime=0)


def read_marks(url: str, *, build_key: str) -> StoredMarks | None:
    """Reads the marks of the last generation; None where they are missing, damaged or of another.

    Args:
      url: Where they are.
      build_key: Of the generation.
    """
    try:
        document = read_object(gzip.decompress(storage.read_bytes(url)))
        stored = read_fields(StoredMarks, document)
    except (FileNotFoundError, EOFError, OSError, ValueError, zlib.error):
        return None
    return stored if stored.build_key == build_key else None
