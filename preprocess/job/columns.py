"""Files of added columns: reading those of a source, and writing those of an output."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from shardspec import storage
from shardspec.columns import column_type, encode_columns, parse_columns
from shardspec.errors import ShardError
from shardspec.manifest import AddedColumns, ColumnFile, Manifest, ShardEntry


def read_columns(url: str, manifest: Manifest, shard: ShardEntry) -> np.ndarray:
    """Reads the added columns of a shard.

    Args:
      url: The dataset.
      manifest: Its manifest, with added columns.
      shard: One of its shards.

    Raises:
      ShardError: `columns_missing`, `columns_sha256`, `columns_format`.
    """
    assert manifest.columns is not None
    where = storage.join(url, AddedColumns.file_url(shard.url))
    try:
        payload = storage.read_bytes(where)
    except FileNotFoundError as error:
        raise ShardError("columns_missing", where=where) from error
    return parse_columns(
        memoryview(payload),
        where=where,
        types=manifest.columns.types,
        num_samples=shard.nsamples,
        sha256=manifest.columns.files[shard.url].sha256,
    )


def publish_columns(out: str, shards: Mapping[str, np.ndarray]) -> AddedColumns:
    """Writes the column files of an output; the manifest that names them is written later.

    Args:
      out: The output.
      shards: URL of each shard, relative to the output -> its rows; all of one type.
    """
    files = {}
    types: dict[str, str] = {}
    for url, rows in shards.items():
        payload = encode_columns(rows)
        storage.publish_bytes(storage.join(out, AddedColumns.file_url(url)), payload)
        sha256 = hashlib.sha256(payload).hexdigest()
        files[url] = ColumnFile(num_bytes=len(payload), sha256=sha256)
        types = {name: column_type(rows.dtype[name]) for name in rows.dtype.names or ()}
    return AddedColumns(types=types, files=files)
