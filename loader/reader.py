"""ShardReader: a sample of a dataset by its number, from local shards.

Where a sample lies is asked of `Manifest.segments`, so a view reads like the dataset that it shows.
Shards and indexes are memory-mapped when first touched, after their lengths have been checked
against the manifest; a shard that is missing, short or too long is refused before a byte of it is
used. The hot path reads three ranges per sample: no tar header is parsed, and no JSON.
"""

from __future__ import annotations

import json
import mmap
import threading
import zlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from shardspec import storage
from shardspec.errors import ShardError
from shardspec.index import open_index, sample_layout
from shardspec.manifest import FileEntry, Manifest
from shardspec.media import decode_stored
from shardspec.sample import (
    SPAN_COLUMNS,
    Codec,
    Geometry,
    PreparedImage,
    PreparedSample,
    decode_array,
    image_rows,
    overview_rows,
)
from shardspec.tar import BLOCK, padded

Check = Literal["size", "crc"]
"""How much of a shard is verified: its length and count, or each sample's checksum as well."""

_MAX_OPEN = 256
"""Shards kept open: two descriptors each, half of the 1024 that Linux commonly grants a process.
Opening one again takes 0.2 ms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSample:
    """One sample as its shard holds it."""

    key: str
    tokens: np.ndarray
    """int32 [T], read-only."""
    spans: np.ndarray
    """int32 [S, 8], read-only; see `shardspec.sample`."""
    pictures: tuple[memoryview, ...]
    """Each image in the codec of the dataset."""
    overviews: tuple[memoryview | None, ...]
    """The overview of each image, None where none is stored."""
    where: str
    """Shard and key, for errors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _OpenShard:
    tar: memoryview
    rows: np.ndarray
    url: str


class ShardReader:
    """Random access to the samples of one split. Safe to share between threads."""

    def __init__(self, url: str, manifest: Manifest, *, split: str, check: Check = "size") -> None:
        """Names the shards; opens none yet.

        Args:
          url: The dataset.
          manifest: Its manifest.
          split: Split to read.
          check: "crc" verifies every sample that is read.

        Raises:
          ConfigError: `unknown_split`.
        """
        self.url = url
        self.raw = manifest.raw
        self.codec: Any = None if manifest.raw else manifest.recipe["image"]["codec"]
        self.check: Check = check
        self.segments = manifest.segments(split)
        counts = [segment.num_rows for segment in self.segments]
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        """int64 [segments + 1], number of each segment's first sample."""
        self._open: dict[str, _OpenShard] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def read(self, sample_id: int) -> PreparedSample:
        """Reads one sample and decodes its images.

        Args:
          sample_id: 0 to len - 1, counted through the shards.

        Raises:
          ShardError: As `stored`, and `image_decode`.
        """
        return decode_sample(self.stored(sample_id), codec=self.codec)

    def stored(self, sample_id: int) -> StoredSample:
        """Reads one sample as it is stored: its arrays, and its pictures still encoded.

        Args:
          sample_id: 0 to len - 1, counted through the shards.

        Raises:
          ShardError: `shard_missing`, `shard_size`, `sample_crc`, or as `open_index` and
            `decode_array`.
        """
        shard, row = self._locate(sample_id)
        where = f"{shard.url} sample {row['key'].decode()}"
        members = _part(shard.tar, int(row["offset"]), int(row["num_bytes"]))
        if self.check == "crc":
            _check_crc(members, row, where)
        at = sample_layout(row)
        spans = decode_array(
            _part(members, at.spans, int(row["spans_bytes"])),
            dtype="<i4",
            columns=SPAN_COLUMNS,
            where=where,
        )
        tokens = decode_array(
            _part(members, at.tokens, int(row["tokens_bytes"])), dtype="<i4", where=where
        )
        pictures, overviews = [], []
        position = at.image
        overview_bytes = {row[1]: row[4] for row in overview_rows(spans).tolist()}
        for i, picture in enumerate(image_rows(spans).tolist()):
            pictures.append(_part(members, position, picture[6]))
            position += padded(picture[6]) + BLOCK
            # The overview stands directly behind its image.
            length = overview_bytes.get(i)
            overviews.append(None if length is None else _part(members, position, length))
            position += 0 if length is None else padded(length) + BLOCK
        return StoredSample(
            key=row["key"].decode(),
            tokens=tokens,
            spans=spans,
            pictures=tuple(pictures),
            overviews=tuple(overviews),
            where=where,
        )

    def members(self, sample_id: int) -> tuple[str, memoryview, str]:
        """Gives the bytes of a sample in its tar, with the headers of its members.

        Returns:
          (key, bytes, where for errors).

        Raises:
          ShardError: `shard_missing`, `shard_size`, `sample_crc`, or as `open_index`.
        """
        shard, row = self._locate(sample_id)
        key = row["key"].decode()
        where = f"{shard.url} sample {key}"
        members = _part(shard.tar, int(row["offset"]), int(row["num_bytes"]))
        if self.check == "crc":
            _check_crc(members, row, where)
        return key, members, where

    def record(self, sample_id: int) -> dict[str, Any]:
        """Reads a sample's metadata and text, for people and for tools."""
        shard, row = self._locate(sample_id)
        start = int(row["offset"]) + sample_layout(row).json
        document: dict[str, Any] = json.loads(
            bytes(_part(shard.tar, start, int(row["json_bytes"])))
        )
        return document

    def column(self, name: str, sample_ids: np.ndarray) -> np.ndarray:
        """Reads a column of the indexes for many samples at once, and nothing else.

        Args:
          name: Of the column; see `shardspec.index.index_dtype`.
          sample_ids: int64 [n], each 0 to len - 1, in any sequence.

        Returns:
          [n, ...] of the column's type.

        Raises:
          ShardError: `index_column`, indexes of an earlier release lack it; as `open_index`.
        """
        sample_ids = np.asarray(sample_ids, np.int64)
        by_id = np.argsort(sample_ids, kind="stable")
        ordered = sample_ids[by_id]
        number_of = np.searchsorted(self.starts, ordered, side="right") - 1
        numbers, first = np.unique(number_of, return_index=True)
        values: np.ndarray | None = None
        for number, begin, end in zip(
            numbers.tolist(), first.tolist(), [*first[1:].tolist(), len(ordered)], strict=True
        ):
            segment = self.segments[number]
            shard = self._open.get(segment.file.url) or self._open_shard(segment.file)
            if name not in (shard.rows.dtype.names or ()):
                raise ShardError(
                    f"the index has no column {name!r}",
                    reason="index_column",
                    where=shard.url,
                    fix="build the shards again with this release",
                )
            column = shard.rows[name]
            if values is None:
                values = np.zeros((len(ordered), *column.shape[1:]), column.dtype)
            elif column.dtype.itemsize > values.dtype.itemsize:
                values = values.astype(column.dtype)  # keys of foreign tars differ in length
            rows = ordered[begin:end] - self.starts[number] + segment.first_row
            values[by_id[begin:end]] = column[rows]
        return np.zeros(0, np.int64) if values is None else values

    def _locate(self, sample_id: int) -> tuple[_OpenShard, np.void]:
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of {len(self)}")
        number = int(np.searchsorted(self.starts, sample_id, side="right")) - 1
        segment = self.segments[number]
        shard = self._open.get(segment.file.url) or self._open_shard(segment.file)
        return shard, shard.rows[sample_id - int(self.starts[number]) + segment.first_row]

    def _open_shard(self, file: FileEntry) -> _OpenShard:
        with self._lock:
            if file.url not in self._open:
                if len(self._open) >= _MAX_OPEN:
                    # The oldest; samples that still view its bytes keep the map alive.
                    del self._open[next(iter(self._open))]
                self._open[file.url] = _open_local(self.url, file, raw=self.raw)
            return self._open[file.url]


def decode_sample(stored: StoredSample, *, codec: Codec) -> PreparedSample:
    """Decodes the pictures of a stored sample.

    Raises:
      ShardError: `image_decode`.
    """
    images = []
    for picture, overview, row in zip(
        stored.pictures, stored.overviews, image_rows(stored.spans).tolist(), strict=True
    ):
        images.append(
            PreparedImage(
                pixels=decode_stored(picture, codec=codec, where=stored.where),
                source_width=row[2],
                source_height=row[3],
                geometry=Geometry(row[7]),
                overview=None
                if overview is None
                else decode_stored(overview, codec=codec, where=stored.where),
            )
        )
    return PreparedSample(
        key=stored.key, tokens=stored.tokens, spans=stored.spans, images=tuple(images)
    )


def _open_local(url: str, file: FileEntry, *, raw: bool) -> _OpenShard:
    where, index = storage.resolve(url, file.url), storage.resolve(url, file.index_url)
    _check_size(where, file.num_bytes)
    _check_size(index, file.index_bytes)
    rows = open_index(
        str(storage.local_path(index)),
        num_samples=file.nsamples,
        shard_bytes=file.num_bytes,
        raw=raw,
    )
    with storage.local_path(where).open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    return _OpenShard(tar=memoryview(mapped), rows=rows, url=where)


def _check_size(where: str, want: int) -> None:
    got = storage.size(where)
    if got == want:
        return
    missing = got is None
    raise ShardError(
        "a file that the manifest names is missing" if missing else "file has the wrong length",
        reason="shard_missing" if missing else "shard_size",
        where=where,
        facts={"got_bytes": got, "want_bytes": want},
        fix="run `make verify`, then build it again with the `make shards` command that made it",
    )


def _part(tar: memoryview, start: int, length: int) -> memoryview:
    return tar[start : start + length]


def _check_crc(members: memoryview, row: np.void, where: str) -> None:
    got = zlib.crc32(members)
    if got != int(row["crc32"]):
        raise ShardError(
            "a sample's bytes are not the ones that were written",
            reason="sample_crc",
            where=where,
            facts={"got": got, "want": int(row["crc32"])},
            fix="run `make verify`, then copy or build the shard again",
        )
