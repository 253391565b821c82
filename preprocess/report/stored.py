"""Reading for reports: index rows one shard after the other, and single samples by number.

Nothing is copied: of remote datasets, an index is fetched as a whole and a sample by its range. At
most one index is in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardspec import storage
from shardspec.checksum import crc32
from shardspec.documents import read_object
from shardspec.errors import ShardError
from shardspec.index import open_index, parse_index, sample_layout
from shardspec.manifest import FileEntry, Manifest, Segment
from shardspec.sample import (
    SPAN_COLUMNS,
    decode_array,
    image_rows,
    num_stored_images,
    overview_rows,
)
from shardspec.storage import RangeReader
from shardspec.tar import payload_offsets


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredImage:
    """An image of a sample, as it is stored."""

    payload: bytes
    source_size: tuple[int, int]
    """Width and height of the upright original, in pixels."""
    stored_size: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A sample with its row of the index."""

    key: str
    split: str
    number: int
    """In the stored order of its split."""
    shard: str
    """URL of its tar, as the manifest has it."""
    row: np.void
    record: Mapping[str, Any]
    spans: np.ndarray
    tokens: np.ndarray
    images: tuple[StoredImage, ...]
    """() where only its text was read."""


class SampleReader:
    """Reads the samples of a dataset by split and number."""

    def __init__(self, url: str, manifest: Manifest) -> None:
        """Opens nothing yet.

        Args:
          url: Of the dataset.
          manifest: Of it.
        """
        self.url, self.manifest = url, manifest
        self._ranges = RangeReader()
        self._open: tuple[str, np.ndarray] | None = None
        self._segments: dict[str, tuple[Segment, ...]] = {}

    def rows(self, split: str) -> Iterator[tuple[int, np.ndarray]]:
        """Gives the index rows of a split, with the number of the first of them.

        Raises:
          ShardError: As `open_index`.
        """
        first = 0
        for segment in self._of(split):
            yield first, self._rows_of(segment)
            first += segment.num_rows

    def sample(self, split: str, number: int, *, with_images: bool = True) -> Sample:
        """Reads one sample.

        Args:
          split: Of the dataset.
          number: 0 to the split's samples - 1.
          with_images: False reads only its record, spans and tokens, without their checksum.

        Raises:
          ShardError: `sample_crc`, `sample_json`, or as `open_index` and `decode_array`.
        """
        segment, row = self._locate(split, number)
        key = row["key"].item().decode(errors="replace")
        tar = storage.resolve_place(self.url, segment.file.url)
        where = f"{tar} sample {key}"
        layout = sample_layout(row)
        num_bytes = int(row["num_bytes"])
        stop = num_bytes if with_images else layout.tokens + int(row["tokens_bytes"])
        members = self._read(tar, int(row["offset"]), stop, total=segment.file.num_bytes)
        if with_images and (got := crc32(members)) != int(row["crc32"]):
            raise ShardError("sample_crc.stored", where=where, got=got, want=int(row["crc32"]))

        def member(start: int, column: str) -> memoryview:
            return memoryview(members)[start : start + int(row[column])]

        try:
            record = read_object(member(layout.json, "json_bytes"))
        except ValueError as error:
            raise ShardError("sample_json", where=tar, sample=number, error=error) from error
        spans = decode_array(
            member(layout.spans, "spans_bytes"), dtype="<i4", columns=SPAN_COLUMNS, where=where
        )
        tokens = decode_array(member(layout.tokens, "tokens_bytes"), dtype="<i4", where=where)
        return Sample(
            key=key,
            split=split,
            number=number,
            shard=segment.file.url,
            row=row,
            record=record,
            spans=spans,
            tokens=tokens,
            images=_images(members, spans, row) if with_images else (),
        )

    def image_sha256(self, split: str, number: int) -> str:
        """Hashes the first image of a sample as it is stored."""
        segment, row = self._locate(split, number)
        tar = storage.resolve_place(self.url, segment.file.url)
        start = int(row["offset"]) + sample_layout(row).image
        payload = self._read(tar, start, int(row["image_bytes"]), total=segment.file.num_bytes)
        return hashlib.sha256(payload).hexdigest()

    @property
    def codec(self) -> Any:
        """A `Codec` of the stored images, or "features"."""
        codec: Any = self.manifest.recipe["image"]["codec"]
        return codec

    def _of(self, split: str) -> tuple[Segment, ...]:
        if split not in self._segments:
            self._segments[split] = self.manifest.segments(split)
        return self._segments[split]

    def _locate(self, split: str, number: int) -> tuple[Segment, np.void]:
        first = 0
        for segment in self._of(split):
            if number < first + segment.num_rows:
                row: np.void = self._rows_of(segment)[number - first]
                return segment, row
            first += segment.num_rows
        raise IndexError(number)

    def _rows_of(self, segment: Segment) -> np.ndarray:
        file = segment.file
        if self._open is None or self._open[0] != file.index_url:
            self._open = file.index_url, self._index(file)
        return self._open[1][segment.first_row : segment.first_row + segment.num_rows]

    def _index(self, file: FileEntry) -> np.ndarray:
        url = storage.resolve_place(self.url, file.index_url)
        shape = {"num_samples": file.nsamples, "shard_bytes": file.num_bytes}
        known: dict[str, Any] = {**shape, "raw": self.manifest.raw, "sha256": file.index_sha256}
        if storage.is_local(url):
            return open_index(str(storage.local_path(url)), **known)
        try:
            payload = storage.read_bytes(url)
        except FileNotFoundError as error:
            raise ShardError("index_missing.stored", where=url) from error
        return parse_index(memoryview(payload), where=url, **known)

    def _read(self, url: str, start: int, num_bytes: int, *, total: int) -> bytes:
        try:
            if not storage.is_local(url):
                return bytes(self._ranges.read(url, start, start + num_bytes, total=total))
            with storage.translate_errors(url), storage.local_path(url).open("rb") as stream:
                stream.seek(start)
                return stream.read(num_bytes)
        except FileNotFoundError as error:
            raise ShardError("shard_missing.stored", where=url) from error


def _images(members: bytes, spans: np.ndarray, row: np.void) -> tuple[StoredImage, ...]:
    overview_bytes = {int(o[1]): int(o[4]) for o in overview_rows(spans)}
    sizes = [int(row["json_bytes"]), int(row["spans_bytes"]), int(row["tokens_bytes"])]
    pictures, at = image_rows(spans)[: num_stored_images(spans)], []
    for image in pictures:
        at.append(len(sizes))
        sizes.append(int(image[6]))
        # The overview comes directly after its image.
        sizes += [overview_bytes[int(image[1])]] if int(image[1]) in overview_bytes else []
    starts = payload_offsets(sizes)
    return tuple(
        StoredImage(
            payload=members[starts[i] : starts[i] + int(image[6])],
            source_size=(int(image[2]), int(image[3])),
            stored_size=(int(image[4]), int(image[5])),
        )
        for i, image in zip(at, pictures, strict=True)
    )
