"""ShardReader: a sample of a dataset by its number.

Where a sample is follows from `Manifest.segments`, so a view reads like the dataset that it shows.
Local shards are local.py's, those in an object store remote.py's.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from loader.reading.blocks import Block, Span
from loader.reading.columns import ColumnFiles
from loader.reading.local import Check, LocalShards
from loader.reading.network import Network, blocks_of
from loader.reading.open_shards import OpenShards, Shard, ShardSource
from loader.reading.parted import parted_head
from loader.reading.prefetch import Prefetcher
from loader.reading.remote import RemoteShard, RemoteShards
from loader.reading.stored import StoredSample, decode_sample, read_sample
from shardspec import storage
from shardspec.documents import read_object
from shardspec.errors import ConfigError, ShardError
from shardspec.index import sample_layout
from shardspec.manifest import FileEntry, Manifest, Segment, fetch_manifest, require_manifest
from shardspec.sample import PreparedSample

_TRIED_OF_SHARD = 8
"""Samples by which a shard is judged; one with fewer is not."""

_LEAST_BLOCKS = 16
"""Blocks that a cache has room for at least."""

_OPENED_AHEAD = 64
"""Indexes of remote shards that are fetched at a time."""


class ShardReader:
    """Random access to the samples of one split. Safe to share between threads."""

    def __init__(
        self,
        url: str,
        manifest: Manifest,
        *,
        split: str,
        check: Check = "crc",
        prefetcher: Prefetcher | None = None,
    ) -> None:
        """Lists the shards; opens none yet.

        Args:
          url: The dataset.
          manifest: Its manifest.
          split: Split to read.
          check: "crc" verifies every sample that is read, "size" only remote ones.
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
        self.segments = tuple(_resolved(segment, url) for segment in named)
        counts = [segment.num_rows for segment in self.segments]
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        """int64 [segments + 1], number of each segment's first sample."""
        # The same for single samples: NumPy takes 4 µs to look one number up.
        self._borders: list[int] = self.starts.tolist()
        self._local = LocalShards(check, raw=manifest.raw)
        self._remote: RemoteShards | None = None
        # A view may be on a local disk, and its files in a store.
        if not all(storage.is_local(segment.file.url) for segment in self.segments):
            prefetcher = prefetcher or Prefetcher(Network())
            prefetcher.open()
            self._remote = RemoteShards(prefetcher, raw=manifest.raw)
        self._open = OpenShards()
        # Whether a segment was found damaged. Threads may judge the same one at a time.
        self._damaged: dict[int, bool] = {}
        self.added: ColumnFiles | None = None
        """Columns that were added to the dataset; None without any."""
        if manifest.columns is not None:
            if not storage.is_local(url):
                prefetcher = prefetcher or Prefetcher(Network())
                prefetcher.open()
            self.added = ColumnFiles(
                url, manifest.select(split), manifest.columns, prefetcher=prefetcher
            )

    @property
    def settings(self) -> tuple[object, ...]:
        """How it reads: readers with equal settings may share their open shards."""
        return self.check, self.raw, self.prefetcher and self.prefetcher.settings

    def share(self, other: ShardReader) -> None:
        """Shares the open shards and the prefetcher of another reader of equal settings.

        Descriptors are granted to a process, not to each of its datasets.
        """
        if self._open is not other._open:
            self._open = other._open
            self._open.num_readers += 1
        if self._remote is not None and other.prefetcher is not None:
            self._remote.prefetcher = other.prefetcher
            if self.added is not None:
                self.added.prefetcher = other.prefetcher

    @property
    def prefetcher(self) -> Prefetcher | None:
        """Fetches remote shards; None if all are local."""
        return None if self._remote is None else self._remote.prefetcher

    @property
    def is_remote(self) -> bool:
        """True if anything of the dataset is read over the network."""
        return self._remote is not None or not storage.is_local(self.url)

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

        The files of large clips stay where they are, until frames are wanted of them.

        Args:
          sample_id: 0 to len - 1, counted through the shards.

        Raises:
          ShardError: `shard_missing`, `shard_size`, `sample_crc`, or as `open_index` and
            `decode_array`.
          StorageError: A request to the store failed; see `Prefetcher.read`.
        """
        shard, i = self._locate(sample_id)
        place = shard.rows.place(i)
        key = _key(place[-1], shard.url)
        where = f"{shard.url} sample {key}"
        head = parted_head(place)
        if head is not None:
            (members,) = shard.ranges([head], where=where)
            return read_sample(members, place, key, codec=self.codec, where=where, shard=shard)
        members = shard.sample(i, place, where=where)
        return read_sample(members, place, key, codec=self.codec, where=where)

    def is_shard_damaged(self, sample_id: int) -> bool:
        """Judges the shard of a damaged sample: returns True if others of it are damaged too.

        Eight samples of it are tried, evenly spaced, until one is right. The result depends on the
        data only, so all ranks come to the same.

        Raises:
          ShardError, StorageError: As `stored`, but for `sample_crc`.
        """
        number = bisect.bisect_right(self._borders, sample_id) - 1
        first, stop = self._borders[number : number + 2]
        if stop - first < _TRIED_OF_SHARD:
            return False
        if number not in self._damaged:
            tried = [first + (stop - first) * i // _TRIED_OF_SHARD for i in range(_TRIED_OF_SHARD)]
            self._damaged[number] = all(map(self._is_damaged, tried))
        return self._damaged[number]

    def _is_damaged(self, sample_id: int) -> bool:
        try:
            self.members(sample_id)
        except ShardError as error:
            if error.reason != "sample_crc":
                raise
            return True
        return False

    def members(self, sample_id: int) -> tuple[str, memoryview, str]:
        """Returns the bytes of a sample in its tar, with the headers of its members.

        Returns:
          (key, bytes, where for errors).

        Raises:
          ShardError: `shard_missing`, `shard_size`, `sample_crc`, or as `open_index`.
        """
        shard, number = self._locate(sample_id)
        place = shard.rows.place(number)
        key = _key(place[-1], shard.url)
        where = f"{shard.url} sample {key}"
        return key, shard.sample(number, place, where=where), where

    def record(self, sample_id: int) -> dict[str, Any]:
        """Reads a sample's metadata and text, for people and for tools."""
        shard, i = self._locate(sample_id)
        row = shard.rows.row(i)
        members = shard.sample(i, shard.rows.place(i), where=shard.url)
        start = sample_layout(row).json
        payload = members[start : start + int(row["json_bytes"])]
        try:
            return read_object(payload)
        except ValueError as error:
            raise ShardError("sample_json", where=shard.url, sample=i, error=error) from error

    def name(self, sample_id: int) -> tuple[str, str]:
        """Names a sample for messages: its shard as in the manifest, and its key.

        The key is "" if the index cannot be read.
        """
        number = int(np.searchsorted(self.starts, sample_id, side="right")) - 1
        url = self._names[number]
        try:
            opened, row = self._locate(sample_id)
            key: bytes = opened.rows.place(row)[-1]
        except ShardError:
            return url, ""
        return url, key.decode(errors="backslashreplace")

    @property
    def ahead_steps(self) -> int:
        """Steps to announce before they are read (`prefetch`); 0 for local shards."""
        return 0 if self.prefetcher is None else self.prefetcher.network.ahead_steps

    def prefetch(self, step: int, sample_ids: Iterable[int]) -> None:
        """Announces what a step will read, so that it is fetched ahead; no-op for local shards.

        Returns at once: another thread waits for indexes that have to be fetched first.

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
        """Ends a step: what only it needed is dropped."""
        if self.prefetcher is not None:
            self.prefetcher.release(step)

    def column(self, name: str, sample_ids: np.ndarray) -> np.ndarray:
        """Reads one column of the indexes for many samples at once.

        Args:
          name: Of the column; see `shardspec.index.index_dtype` and `added`.
          sample_ids: int64 [n], each 0 to len - 1, in any order.

        Returns:
          [n, ...] of the column's type.

        Raises:
          ShardError: `index_column`, indexes of an earlier release lack it; or as `open_index`.
        """
        return self.columns([name], sample_ids)[name]

    def columns(self, names: Sequence[str], sample_ids: np.ndarray) -> dict[str, np.ndarray]:
        """Reads several columns as `column` does, and opens each index once for all of them.

        They may be of the indexes, or have been added to the dataset.
        """
        sample_ids = np.asarray(sample_ids, np.int64)
        if self.added is not None:
            added = [name for name in names if name in (self.added.dtype.names or ())]
            if added:
                own = [name for name in names if name not in added]
                found = self.columns(own, sample_ids) if own else {}
                return {**found, **self.added.values(added, sample_ids)}
        by_id = np.argsort(sample_ids, kind="stable")
        ordered = sample_ids[by_id]
        number_of = np.searchsorted(self.starts, ordered, side="right") - 1
        numbers, first = np.unique(number_of, return_index=True)
        waiting = numbers.tolist()
        values: dict[str, np.ndarray] = {}
        for number, begin, end in zip(
            numbers.tolist(), first.tolist(), [*first[1:].tolist(), len(ordered)], strict=True
        ):
            segment = self.segments[number]
            if number in waiting[:1]:
                self._open_soon(waiting[:_OPENED_AHEAD], step=-1)
                del waiting[:_OPENED_AHEAD]
            shard = self._open.get(segment.file.url) or self._open_shard(segment.file)
            rows = ordered[begin:end] - self.starts[number] + segment.first_row
            for name in names:
                if name not in (shard.rows.dtype.names or ()):
                    raise ShardError("index_column", where=shard.url, name=name)
            for name, column in shard.rows.values(names, rows).items():
                if name not in values:
                    values[name] = np.zeros((len(ordered), *column.shape[1:]), column.dtype)
                elif column.dtype.itemsize > values[name].dtype.itemsize:
                    # Keys of foreign tars differ in length.
                    values[name] = values[name].astype(column.dtype)
                values[name][by_id[begin:end]] = column
        return values or {name: np.zeros(0, np.int64) for name in names}

    def index_dtype(self, sample_id: int) -> np.dtype:
        """Gives the row type of the index that describes a sample.

        Raises:
          ShardError: As `open_index`.
        """
        return self._locate(sample_id)[0].rows.dtype

    def _locate(self, sample_id: int) -> tuple[Shard, int]:
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of {len(self)}")
        number = bisect.bisect_right(self._borders, sample_id) - 1
        segment = self.segments[number]
        shard = self._open.get(segment.file.url) or self._open_shard(segment.file)
        return shard, sample_id - self._borders[number] + segment.first_row

    def _open_soon(self, numbers: list[int], *, step: int) -> None:
        if self._remote is not None:
            files = {file.url: file for file in (self.segments[i].file for i in numbers)}
            # The index of a shard that is being opened is fetched by the thread that opens it.
            coming = self._open.being_opened()
            missing = [files[url] for url in files if url not in self._open and url not in coming]
            remote = [file for file in missing if not storage.is_local(file.url)]
            self._remote.open_soon(remote, step=step)

    def _open_shard(self, file: FileEntry) -> Shard:
        source: ShardSource = self._local
        if self._remote is not None and not storage.is_local(file.url):
            source = self._remote
        return self._open.open(file, source)


def count_reading(readers: Iterable[ShardReader]) -> Counter[str]:
    """Adds up what this process has read over the network; a shared prefetcher counts once."""
    counters: Counter[str] = Counter()
    for prefetcher in {id(r.prefetcher): r.prefetcher for r in readers}.values():
        if prefetcher is not None:
            # A copy, made in one go: other threads continue to count.
            counters.update(dict(prefetcher.counters))
    return counters


def _key(stored: bytes, where: str) -> str:
    try:
        return stored.decode()
    except UnicodeDecodeError as error:
        raise ShardError("index_key", where=where, key=repr(stored[:40])) from error


def _resolved(segment: Segment, url: str) -> Segment:
    """Resolves the URLs of a segment's file, so that they do not depend on the dataset's."""
    file = segment.file
    return replace(
        segment,
        file=replace(
            file,
            url=storage.resolve_place(url, file.url),
            index_url=storage.resolve_place(url, file.index_url),
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
      StorageError: A request to the store failed.
    """
    network = network or Network()
    prefetcher = Prefetcher(network, cache=cache, cache_bytes=cache_bytes)
    if storage.is_local(url):
        manifest = require_manifest(url)
    else:
        prefetcher.open()
        # While the manifest is fetched: many requests for its files follow at once.
        prefetcher.ranges.connect_soon(url, network.requests)
        # With the client that reads everything else: making one takes a quarter of a second.
        manifest = fetch_manifest(url, prefetcher.ranges)
    reader = ShardReader(url, manifest, split=split, check=check, prefetcher=prefetcher)
    sizes = [blocks_of(network, segment.file) for segment in reader.segments]
    least = _LEAST_BLOCKS * max(sizes, default=1)
    if cache is not None and cache_bytes < least:
        raise ConfigError(
            "cache_bytes",
            where=cache,
            least=least,
            cache_bytes=cache_bytes,
            block_bytes=max(sizes),
        )
    return manifest, reader
