"""ShardReader: a sample of a dataset by its number.

Where a sample lies is asked of `Manifest.segments`, so a view reads like the dataset that it shows.
Local shards and indexes are memory-mapped when first touched, after their lengths have been
checked against the manifest; a shard that is missing, short or too long is refused before a byte
of it is used. Shards in an object store are remote.py's. The hot path reads three ranges per
sample: no tar header is parsed, and no JSON.
"""

from __future__ import annotations

import bisect
import errno
import json
import mmap
import os
import resource
import threading
import weakref
import zlib
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np

from loader.assembly import Encoded
from loader.reading.blocks import Block, Span
from loader.reading.network import Network
from loader.reading.prefetch import Prefetcher
from loader.reading.remote import RemoteShard, RemoteShards
from shardspec import storage
from shardspec.errors import ConfigError, ShardError
from shardspec.index import (
    open_index,
    parse_index,
    sample_layout,
    sample_places,
)
from shardspec.manifest import (
    FileEntry,
    Manifest,
    Segment,
    fetch_manifest,
    require_manifest,
)
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

_OPENED_AHEAD = 64
"""Indexes of remote shards that are fetched at a time."""

_MOST_OPEN = 16_000
"""Local shards that are open at a time: two maps each, of the 65,530 that Linux lets a process have
(`vm.max_map_count`)."""

_LIMITS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""The system grants no further descriptor or map."""

Check = Literal["size", "crc"]
"""How much of a shard is verified: its length and count, or each sample's checksum as well."""

# Plain integers: comparing with a member of an enum costs as much as all the rest of a row.
_IMAGE, _OVERVIEW = SpanKind.IMAGE.value, SpanKind.OVERVIEW.value


@dataclass(slots=True)
class StoredSample:
    """One sample as its shard holds it."""

    key: str
    tokens: np.ndarray
    """int32 [T], read-only."""
    spans: np.ndarray
    """int32 [S, 8], read-only; see `shardspec.sample`."""
    pictures: list[Encoded]
    """Each image."""
    overviews: list[Encoded | None]
    """The overview of each image, None where none is stored."""
    where: str
    """Shard and key, for errors."""
    num_bytes: int
    """Of its part of the shard."""


class _OpenShard(Protocol):
    """A shard whose index is here."""

    @property
    def url(self) -> str: ...
    @property
    def rows(self) -> np.ndarray:
        """INDEX_DTYPE [n], or `raw_index_dtype`."""

    @property
    def places(self) -> np.ndarray:
        """The columns of `SamplePlace` [n], a plain array: rows of a memmap are memmaps again, at
        2 µs each."""

    def sample(self, row: int, *, where: str) -> memoryview:
        """Gives the members of one sample."""


class ShardReader:
    """Random access to the samples of one split. Safe to share between threads."""

    def __init__(
        self,
        url: str,
        manifest: Manifest,
        *,
        split: str,
        check: Check = "size",
        prefetcher: Prefetcher | None = None,
    ) -> None:
        """Names the shards; opens none yet.

        Args:
          url: The dataset.
          manifest: Its manifest.
          split: Split to read.
          check: "crc" verifies every sample that is read; of remote ones that is always done.
          prefetcher: Fetches remote shards; several readers may share one.

        Raises:
          ConfigError: `unknown_split`.
        """
        self.url = url
        self.raw = manifest.raw
        self.codec: Any = None if manifest.raw else manifest.recipe["image"]["codec"]
        self.check: Check = check
        named = manifest.segments(split)
        self._names = [segment.file.url for segment in named]
        self.segments = tuple(_standing_alone(segment, url) for segment in named)
        counts = [segment.num_rows for segment in self.segments]
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        """int64 [segments + 1], number of each segment's first sample."""
        # The same for one sample: NumPy takes 4 µs to look a single number up.
        self._borders: list[int] = self.starts.tolist()
        self._local = _LocalShards(check, raw=manifest.raw)
        self._remote: RemoteShards | None = None
        # A view may lie on a disk, and its files in a store.
        if not all(storage.is_local(segment.file.url) for segment in self.segments):
            prefetcher = prefetcher or Prefetcher(Network())
            prefetcher.open()
            self._remote = RemoteShards(prefetcher, raw=manifest.raw)
        self._open = _OpenShards()

    @property
    def settings(self) -> tuple[object, ...]:
        """How it reads: readers that are alike may share what they have open."""
        return self.check, self.raw, self.prefetcher and self.prefetcher.settings

    def share(self, other: ShardReader) -> None:
        """Shares another, alike reader's open shards, and what fetches remote ones.

        Descriptors are granted to a process, not to each of its datasets.
        """
        if self._open is not other._open:
            self._open = other._open
            self._open.num_readers += 1
        if self._remote is not None and other.prefetcher is not None:
            self._remote.prefetcher = other.prefetcher

    @property
    def prefetcher(self) -> Prefetcher | None:
        """Fetches remote shards; None where all are local."""
        return None if self._remote is None else self._remote.prefetcher

    @property
    def counters(self) -> Counter[str]:
        """What this process has read over the network and how; empty for local shards."""
        return Counter() if self.prefetcher is None else self.prefetcher.counters

    def __len__(self) -> int:
        return self._borders[-1]

    def read(self, sample_id: int) -> PreparedSample:
        """Reads one sample and decodes its images.

        Args:
          sample_id: 0 to len - 1, counted through the shards.

        Raises:
          ShardError: As `stored`, and `image_decode`.
        """
        return decode_sample(self.stored(sample_id))

    def stored(self, sample_id: int) -> StoredSample:
        """Reads one sample as it is stored: its arrays, and its pictures still encoded.

        Args:
          sample_id: 0 to len - 1, counted through the shards.

        Raises:
          ShardError: `shard_missing`, `shard_size`, `sample_crc`, or as `open_index` and
            `decode_array`.
          StorageError: The store does not answer; see `Prefetcher.read`.
        """
        shard, i = self._locate(sample_id)
        place = shard.places[i].item()
        key = place[-1].decode()
        where = f"{shard.url} sample {key}"
        members = shard.sample(i, where=where)
        return read_sample(members, place, key, codec=self.codec, where=where)

    def members(self, sample_id: int) -> tuple[str, memoryview, str]:
        """Gives the bytes of a sample in its tar, with the headers of its members.

        Returns:
          (key, bytes, where for errors).

        Raises:
          ShardError: `shard_missing`, `shard_size`, `sample_crc`, or as `open_index`.
        """
        shard, number = self._locate(sample_id)
        key = shard.rows[number]["key"].decode()
        where = f"{shard.url} sample {key}"
        return key, shard.sample(number, where=where), where

    def record(self, sample_id: int) -> dict[str, Any]:
        """Reads a sample's metadata and text, for people and for tools."""
        shard, i = self._locate(sample_id)
        row = shard.rows[i]
        members = shard.sample(i, where=shard.url)
        payload = _part(members, sample_layout(row).json, int(row["json_bytes"]))
        document: dict[str, Any] = json.loads(bytes(payload))
        return document

    def name(self, sample_id: int) -> tuple[str, str]:
        """Names a sample for people: its shard as the manifest does, and its key.

        The key is "" where the index cannot be read.
        """
        number = int(np.searchsorted(self.starts, sample_id, side="right")) - 1
        url = self._names[number]
        try:
            opened, row = self._locate(sample_id)
        except ShardError:
            return url, ""
        return url, opened.rows[row]["key"].decode()

    @property
    def ahead_steps(self) -> int:
        """Steps that are best said ahead of their reading (`prefetch`); 0 for local shards."""
        return 0 if self.prefetcher is None else self.prefetcher.network.ahead_steps

    def prefetch(self, step: int, sample_ids: Iterable[int]) -> None:
        """Says what a step will read, so that it is fetched ahead; local shards need no help.

        Returns at once: indexes that have to be fetched first are waited for elsewhere.

        Args:
          step: Of the run; steps come in increasing order.
          sample_ids: Each 0 to len - 1.
        """
        if self.prefetcher is None:
            return
        ids = np.fromiter(sample_ids, np.int64)
        numbers = np.searchsorted(self.starts, ids, side="right") - 1
        self.prefetcher.prefetch(step, lambda: self._places(ids.tolist()))
        self._open_soon(sorted(set(numbers.tolist())), step=step)

    def _places(self, sample_ids: list[int]) -> list[tuple[Block, Span]]:
        spans = []
        for sample_id in sample_ids:
            # A shard that is missing or wrong is an error of the samples that are read from it.
            with suppress(ShardError):
                shard, row = self._locate(sample_id)
                if isinstance(shard, RemoteShard):
                    spans.append(shard.place(row))
        return spans

    def release(self, step: int) -> None:
        """Says that a step has read what it needs."""
        if self.prefetcher is not None:
            self.prefetcher.release(step)

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
        waiting = numbers.tolist()
        values: np.ndarray | None = None
        for number, begin, end in zip(
            numbers.tolist(), first.tolist(), [*first[1:].tolist(), len(ordered)], strict=True
        ):
            segment = self.segments[number]
            if number in waiting[:1]:
                self._open_soon(waiting[:_OPENED_AHEAD], step=-1)
                del waiting[:_OPENED_AHEAD]
            shard = self._open.get(segment.file.url) or self._open_shard(segment.file)
            if name not in (shard.rows.dtype.names or ()):
                raise ShardError("index_column", where=shard.url, name=name)
            column = shard.rows[name]
            if values is None:
                values = np.zeros((len(ordered), *column.shape[1:]), column.dtype)
            elif column.dtype.itemsize > values.dtype.itemsize:
                values = values.astype(column.dtype)  # keys of foreign tars differ in length
            rows = ordered[begin:end] - self.starts[number] + segment.first_row
            values[by_id[begin:end]] = column[rows]
        return np.zeros(0, np.int64) if values is None else values

    def _locate(self, sample_id: int) -> tuple[_OpenShard, int]:
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of {len(self)}")
        number = bisect.bisect_right(self._borders, sample_id) - 1
        segment = self.segments[number]
        shard = self._open.get(segment.file.url) or self._open_shard(segment.file)
        return shard, sample_id - self._borders[number] + segment.first_row

    def _open_soon(self, numbers: list[int], *, step: int) -> None:
        if self._remote is not None:
            files = {file.url: file for file in (self.segments[i].file for i in numbers)}
            # One that is being opened has been fetched, or will be, for whoever opens it.
            # Listed in one go: other threads open shards meanwhile.
            coming = {url for _, url in list(self._open.opening)}
            missing = [files[url] for url in files if url not in self._open and url not in coming]
            remote = [file for file in missing if not storage.is_local(file.url)]
            self._remote.open_soon(remote, step=step)

    def _open_shard(self, file: FileEntry) -> _OpenShard:
        shards = self._open
        local = storage.is_local(file.url)
        source = self._local if local or self._remote is None else self._remote
        # Who waits for one index keeps nobody from another one; two who wait for the same share
        # its fetching, and its failure. What a forked child finds is its parent's to finish.
        key = os.getpid(), file.url
        with shards.lock:
            if file.url in shards:
                return shards[file.url]
            is_first = key not in shards.opening
            opening = shards.opening.setdefault(key, Future())
        if is_first:
            try:
                try:
                    opened = source.open(file)
                except OSError as error:
                    if error.errno not in _LIMITS:
                        raise
                    # Others have taken more than their half.
                    with shards.lock:
                        shards.clear()
                    opened = source.open(file)
            except BaseException as error:
                with shards.lock:
                    del shards.opening[key]
                opening.set_exception(error)
                raise
            with shards.lock:
                if len(shards) >= source.max_open(shards.num_readers):
                    # The oldest; samples that still view its bytes keep the map alive.
                    del shards[next(iter(shards))]
                shards[file.url] = opened
                del shards.opening[key]
            opening.set_result(opened)
        return opening.result()


def count_reading(readers: Iterable[ShardReader]) -> Counter[str]:
    """Adds up what this process has read over the network; readers that share count once."""
    counters: Counter[str] = Counter()
    for prefetcher in {id(r.prefetcher): r.prefetcher for r in readers}.values():
        if prefetcher is not None:
            # A copy first, which is made at once: threads go on counting.
            counters.update(dict(prefetcher.counters))
    return counters


class _OpenShards(dict[str, _OpenShard]):
    """Shards that are open, by URL, the oldest first; a copy in another process has none."""

    def __init__(self, num_readers: int = 1) -> None:
        super().__init__()
        self.lock = threading.Lock()
        _all_open[id(self)] = self
        self.opening: dict[tuple[int, str], Future[_OpenShard]] = {}
        """What is being opened, by process and URL."""
        self.num_readers = num_readers
        """Readers that share it."""

    def __reduce__(self) -> tuple[object, ...]:
        return (_OpenShards, (self.num_readers,))


_all_open: weakref.WeakValueDictionary[int, _OpenShards] = weakref.WeakValueDictionary()
"""Those of this process, by id."""


def _renew_locks() -> None:
    for shards in list(_all_open.values()):
        shards.lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_locks)  # another thread may hold one at a fork


def read_sample(
    members: memoryview,
    place: tuple[int, int, int, int, int, int, bytes],
    key: str,
    *,
    codec: Codec,
    where: str,
) -> StoredSample:
    """Finds the parts of a sample in its bytes; copies nothing.

    Args:
      members: The sample's part of its shard, from its first header on.
      place: Its row of the index: the values of `SamplePlace`.
      key: The sample's.
      codec: Of its pictures.
      where: Shard and key, for errors.

    Raises:
      ShardError: As `decode_array`.
    """
    _, num_bytes, _, json_bytes, spans_bytes, tokens_bytes, _ = place
    spans_at = 2 * BLOCK + padded(json_bytes)
    tokens_at = spans_at + padded(spans_bytes) + BLOCK
    spans = decode_array(
        members[spans_at : spans_at + spans_bytes], dtype="<i4", columns=SPAN_COLUMNS, where=where
    )
    tokens = decode_array(members[tokens_at : tokens_at + tokens_bytes], dtype="<i4", where=where)
    kinds = spans[:, 0].tolist()
    num_images, num_overviews = kinds.count(_IMAGE), kinds.count(_OVERVIEW)
    pictures: list[Encoded] = []
    overviews: list[Encoded | None] = []
    if num_images:
        position = tokens_at + padded(tokens_bytes) + BLOCK
        rows = spans[len(kinds) - num_images - num_overviews :].tolist()
        small = {row[1]: row for row in rows[:num_overviews]}
        for _, image, _, _, width, height, length, _ in rows[num_overviews:]:
            payload = members[position : position + length]
            pictures.append(Encoded(payload, width, height, codec=codec, where=where))
            position += padded(length) + BLOCK
            # The overview stands directly behind its image.
            overview = None
            if image in small:
                _, _, width, height, length, *_ = small[image]
                payload = members[position : position + length]
                overview = Encoded(payload, width, height, codec=codec, where=where)
                position += padded(length) + BLOCK
            overviews.append(overview)
    return StoredSample(key, tokens, spans, pictures, overviews, where, num_bytes)


def _standing_alone(segment: Segment, url: str) -> Segment:
    """Names the file of a segment by URLs that do not depend on the dataset's."""
    file = segment.file
    return replace(
        segment,
        file=replace(
            file,
            url=storage.resolve(url, file.url),
            index_url=storage.resolve(url, file.index_url),
        ),
    )


def open_dataset(
    url: str,
    *,
    split: str,
    check: Check,
    cache: str | None,
    cache_bytes: int,
    network: Network | None,
) -> tuple[Manifest, ShardReader]:
    """Reads the manifest of a dataset and makes its reader; see `StreamingDataset`.

    Raises:
      ManifestError: There is no readable manifest.
      ConfigError: `unknown_split`, `cache_bytes`, `cache_foreign`.
      StorageError: The store does not answer.
    """
    network = network or Network()
    least = 16 * network.block_bytes
    if cache is not None and cache_bytes < least:
        raise ConfigError(
            "cache_bytes",
            where=cache,
            least=least,
            cache_bytes=cache_bytes,
            block_bytes=network.block_bytes,
        )
    prefetcher = Prefetcher(network, cache=cache, cache_bytes=cache_bytes)
    if storage.is_local(url):
        manifest = require_manifest(url)
    else:
        prefetcher.open()
        # While the manifest travels: what it names will be asked for all at once.
        prefetcher.ranges.connect_soon(url, network.requests)
        # By the same client as all the rest: making one takes a quarter of a second.
        manifest = fetch_manifest(url, prefetcher.ranges)
    return manifest, ShardReader(url, manifest, split=split, check=check, prefetcher=prefetcher)


def decode_sample(stored: StoredSample) -> PreparedSample:
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
                pixels=decode_stored(picture.payload, codec=picture.codec, where=picture.where),
                source_width=row[2],
                source_height=row[3],
                geometry=Geometry(row[7]),
                overview=None
                if overview is None
                else decode_stored(overview.payload, codec=overview.codec, where=overview.where),
            )
        )
    return PreparedSample(
        key=stored.key, tokens=stored.tokens, spans=stored.spans, images=tuple(images)
    )


class _LocalShards:
    """Opens shards on a local disk."""

    def __init__(self, check: Check, *, raw: bool) -> None:
        self._check, self._raw = check, raw

    def max_open(self, num_readers: int) -> int:
        """Counts the shards kept open for so many readers, with two descriptors each.

        256 for each, but all together no more than half of the descriptors that the system grants
        the process (`ulimit -n`, commonly 1024), and half of the maps. Opening a shard again takes
        0.2 ms.
        """
        granted, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = min(256 * num_readers, _MOST_OPEN)
        return most if granted < 0 else max(1, min(most, granted // 4))

    def open(self, file: FileEntry) -> _LocalShard:
        _check_size(file.url, file.num_bytes)
        _check_size(file.index_url, file.index_bytes)
        counts = {"num_samples": file.nsamples, "shard_bytes": file.num_bytes}
        if storage.is_local(file.index_url):
            rows = open_index(str(storage.local_path(file.index_url)), raw=self._raw, **counts)
        else:  # tars that were imported into a store's dataset
            payload = memoryview(storage.read_bytes(file.index_url))
            rows = parse_index(payload, where=file.index_url, raw=self._raw, **counts)
        with storage.local_path(file.url).open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return _LocalShard(
            tar=memoryview(mapped),
            rows=rows,
            places=sample_places(rows),
            url=file.url,
            check=self._check,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _LocalShard:
    tar: memoryview
    rows: np.ndarray
    places: np.ndarray
    url: str
    check: Check

    def sample(self, row: int, *, where: str) -> memoryview:
        offset, num_bytes, crc32, *_ = self.places[row].item()
        members = _part(self.tar, offset, num_bytes)
        if self.check == "crc":
            _check_crc(members, crc32, where)
        return members


def _check_size(where: str, want: int) -> None:
    got = storage.size(where)
    if got == want:
        return
    code = "shard_missing.stored" if got is None else "shard_size.file"
    raise ShardError(code, where=where, got_bytes=got, want_bytes=want)


def _part(tar: memoryview, start: int, length: int) -> memoryview:
    return tar[start : start + length]


def _check_crc(members: memoryview, want: int, where: str) -> None:
    got = zlib.crc32(members)
    if got != want:
        raise ShardError("sample_crc.stored", where=where, got=got, want=want)
