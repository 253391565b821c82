"""ShardReader: a sample of a dataset by its number, from local shards.

Shards and indexes are memory-mapped when first touched, after their lengths have been checked
against the manifest; a shard that is missing, short or too long is refused before a byte of it is
used. The hot path reads three ranges per sample: no tar header is parsed, and no JSON.
"""

from __future__ import annotations

import bisect
import json
import mmap
import threading
import zlib
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from loader.pixels import Encoded
from shardspec import storage
from shardspec.errors import ShardError
from shardspec.index import open_index, sample_layout
from shardspec.manifest import Manifest, ShardEntry
from shardspec.media import decode_stored
from shardspec.sample import (
    SPAN_COLUMNS,
    Codec,
    Geometry,
    PreparedImage,
    PreparedSample,
    SpanKind,
    decode_array,
    image_rows,
)
from shardspec.tar import BLOCK, padded

Check = Literal["size", "crc"]
"""How much of a shard is verified: its length and count, or each sample's checksum as well."""

# Plain integers: comparing with a member of an enum costs as much as all the rest of a row.
_IMAGE, _OVERVIEW = SpanKind.IMAGE.value, SpanKind.OVERVIEW.value

_MAX_OPEN = 256
"""Shards kept open: two descriptors each, half of the 1024 that Linux commonly grants a process.
Opening one again takes 0.2 ms."""


@dataclass(slots=True, kw_only=True)
class StoredSample:
    """One sample as its shard holds it."""

    key: str
    tokens: np.ndarray
    """int32 [T], read-only."""
    spans: np.ndarray
    """int32 [S, 8], read-only; see `shardspec.sample`."""
    rows: list[list[int]]
    """The spans as plain integers."""
    pictures: tuple[memoryview, ...]
    """Each image in the codec of the dataset."""
    overviews: tuple[memoryview | None, ...]
    """The overview of each image, None where none is stored."""
    where: str
    """Shard and key, for errors."""
    num_bytes: int
    """Of its part of the shard."""


class SamplePlace(NamedTuple):
    """Where a sample and its array members are: the columns of its index row, as plain values."""

    offset: int
    num_bytes: int
    crc32: int
    json_bytes: int
    spans_bytes: int
    tokens_bytes: int
    key: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _OpenShard:
    tar: memoryview
    rows: np.ndarray
    places: np.ndarray
    """The columns of `SamplePlace`; one row of it is read at once, which takes 1 µs."""
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
        self.codec: Any = manifest.recipe["image"]["codec"]
        self.check: Check = check
        self.shards = manifest.select(split)
        counts = [shard.nsamples for shard in self.shards]
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        """int64 [shards + 1], number of each shard's first sample."""
        # The same for one sample: NumPy takes 4 µs to look a single number up.
        self._borders: list[int] = self.starts.tolist()
        self._open: dict[int, _OpenShard] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._borders[-1]

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
        shard, i = self._locate(sample_id)
        place = SamplePlace(*shard.places[i].item())
        members = _part(shard.tar, place.offset, place.num_bytes)
        return read_sample(members, place, shard_url=shard.url, check=self.check)

    def record(self, sample_id: int) -> dict[str, Any]:
        """Reads a sample's metadata and text, for people and for tools."""
        shard, i = self._locate(sample_id)
        row = shard.rows[i]
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
            shard = self._open.get(number) or self._open_shard(number)
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
            values[by_id[begin:end]] = column[ordered[begin:end] - self.starts[number]]
        return np.zeros(0, np.int64) if values is None else values

    def _locate(self, sample_id: int) -> tuple[_OpenShard, int]:
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of {len(self)}")
        number = bisect.bisect_right(self._borders, sample_id) - 1
        shard = self._open.get(number) or self._open_shard(number)
        return shard, sample_id - self._borders[number]

    def _open_shard(self, number: int) -> _OpenShard:
        with self._lock:
            if number not in self._open:
                if len(self._open) >= _MAX_OPEN:
                    # The oldest; samples that still view its bytes keep the map alive.
                    del self._open[next(iter(self._open))]
                self._open[number] = _open_local(self.url, self.shards[number])
            return self._open[number]


def read_sample(
    members: memoryview, place: SamplePlace, *, shard_url: str, check: Check
) -> StoredSample:
    """Finds the parts of a sample in its bytes; copies nothing.

    Args:
      members: The sample's part of its shard, from its first header on.
      place: Its row of the index.
      shard_url: For errors.
      check: "crc" compares the bytes with their checksum.

    Raises:
      ShardError: `sample_crc`, or as `decode_array`.
    """
    key = place.key.decode()
    where = f"{shard_url} sample {key}"
    if check == "crc":
        _check_crc(members, place.crc32, where)
    spans_at = 2 * BLOCK + padded(place.json_bytes)
    tokens_at = spans_at + padded(place.spans_bytes) + BLOCK
    position = tokens_at + padded(place.tokens_bytes) + BLOCK
    spans = decode_array(
        _part(members, spans_at, place.spans_bytes), dtype="<i4", columns=SPAN_COLUMNS, where=where
    )
    tokens = decode_array(_part(members, tokens_at, place.tokens_bytes), dtype="<i4", where=where)
    pictures, overviews = [], []
    rows = spans.tolist()
    overview_bytes = {row[1]: row[4] for row in rows if row[0] == _OVERVIEW}
    for _, image, _, _, _, _, length, _ in [row for row in rows if row[0] == _IMAGE]:
        pictures.append(_part(members, position, length))
        position += padded(length) + BLOCK
        # The overview stands directly behind its image.
        small = overview_bytes.get(image)
        overviews.append(None if small is None else _part(members, position, small))
        position += 0 if small is None else padded(small) + BLOCK
    return StoredSample(
        key=key,
        tokens=tokens,
        spans=spans,
        rows=rows,
        pictures=tuple(pictures),
        overviews=tuple(overviews),
        where=where,
        num_bytes=place.num_bytes,
    )


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


def encoded_pictures(stored: StoredSample, *, codec: Codec) -> list[tuple[Encoded, Encoded | None]]:
    """Gives each picture of a stored sample, and its overview, ready to be decoded."""
    pairs = []
    small = {row[1]: row for row in stored.rows if row[0] == _OVERVIEW}
    images = (row for row in stored.rows if row[0] == _IMAGE)
    for payload, own, row in zip(stored.pictures, stored.overviews, images, strict=True):
        picture = Encoded(payload, codec=codec, width=row[4], height=row[5], where=stored.where)
        overview = None
        if own is not None:
            _, _, width, height, *_ = small[row[1]]
            overview = Encoded(own, codec=codec, width=width, height=height, where=stored.where)
        pairs.append((picture, overview))
    return pairs


def _open_local(url: str, entry: ShardEntry) -> _OpenShard:
    where = storage.join(url, entry.url)
    _check_size(where, entry.num_bytes)
    _check_size(storage.join(url, entry.index_url), entry.index_bytes)
    rows = open_index(
        str(storage.local_path(storage.join(url, entry.index_url))),
        num_samples=entry.nsamples,
        shard_bytes=entry.num_bytes,
    )
    with storage.local_path(where).open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    # A plain array: rows of a memmap are memmaps again, at 2 µs each.
    places = np.asarray(rows)[list(SamplePlace._fields)]
    return _OpenShard(tar=memoryview(mapped), rows=rows, places=places, url=where)


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


def _check_crc(members: memoryview, want: int, where: str) -> None:
    got = zlib.crc32(members)
    if got != want:
        raise ShardError(
            "a sample's bytes are not the ones that were written",
            reason="sample_crc",
            where=where,
            facts={"got": got, "want": want},
            fix="run `make verify`, then copy or build the shard again",
        )
