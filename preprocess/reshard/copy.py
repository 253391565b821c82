"""COPY: one task makes one new shard out of byte ranges of old ones: tar, index, receipt.

Ranges are whole samples, as long as possible; index rows are taken over with new offsets, nothing
is parsed. A task brings its planned rows along, so that it reads no source's index. As with BUILD,
files appear whole under their final names, the receipt last.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from preprocess.job import Part, scratch_folder, scratch_root
from preprocess.job.engines.local import Deferred
from preprocess.reshard.plan import Through
from shardspec import storage
from shardspec.errors import ConfigError
from shardspec.index import encode_index
from shardspec.manifest import INDEX_SUFFIX, Receipt, ShardEntry, encode_receipt
from shardspec.storage import (
    ByteRange,
    ObjectVersion,
    can_multipart_copy,
    check_unchanged,
    concat_local,
    concat_verified,
    multipart_copy,
    whole_file,
)
from shardspec.tar import END_OF_ARCHIVE

_SUMS = ("num_images", "num_tokens", "num_loss_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyTask:
    """One shard to make."""

    split: str
    name: str
    build_key: str
    rows: np.ndarray
    """[n], rows of the sources' indexes."""
    files: np.ndarray
    """int64 [n], the file of each."""


@dataclass(frozen=True, kw_only=True)
class CopyContext:
    """What every task of a copy shares; sent to worker processes."""

    out: str
    urls: tuple[str, ...]
    """Of the sources' tars, by number."""
    stamps: Mapping[str, ObjectVersion]
    part: Part | None
    through: Through
    sha256: bool
    source_sha256: Mapping[str, str]

    def receipt_url(self, task: CopyTask) -> str:
        """URL of a shard's receipt."""
        return storage.join(self.out, "receipts", task.name + ".json")


def copy_shard(context: CopyContext, task: CopyTask, report: Callable[[int], None]) -> Deferred:
    """Copies one shard; what it returns publishes tar, index and receipt, and gives the receipt.

    Disks and stores take their time for that: the next shard is copied meanwhile. Reports a number
    per part of an object that has arrived, in bytes; what that raises ends the upload.

    Raises:
      ShardError: `sample_crc`, `tar_truncated`, `source_changed`.
      StorageError: The output cannot be written.
    """
    rows = task.rows
    pieces = find_pieces(rows, task.files, context.urls)
    name = f"{task.split}/{task.name}"
    url = storage.join(context.out, name + ".tar")
    whole = whole_file(pieces, context.stamps)
    sha256 = "" if whole is None else context.source_sha256[whole]
    # Another job's receipt must not vouch for this one's bytes, wherever it is interrupted.
    storage.delete(context.receipt_url(task))
    path: Path | None = None
    with ExitStack() as stack:
        if not _stays_in_store(context, url, pieces):
            folder = scratch_folder(scratch_of(context.out, context.part))
            path = stack.enter_context(folder) / "shard.tar"
            if context.through == "store":
                concat_local(path, pieces)
            else:
                sha256 = concat_verified(path, pieces, rows, hashed=context.sha256) or sha256
            for source in sorted({piece.url for piece in pieces}):
                check_unchanged(source, context.stamps[source])
        scratch = stack.pop_all()

    def publish() -> Receipt:
        with scratch:
            if path is None:
                multipart_copy(url, pieces, context.stamps, on_part=report)
            else:
                storage.publish_file(url, path, on_part=report)
        return _publish_rows(context, task, sha256=sha256)

    return Deferred(finish=publish)


def _publish_rows(context: CopyContext, task: CopyTask, *, sha256: str) -> Receipt:
    """Publishes index and receipt of a shard whose tar exists."""
    name, rows = f"{task.split}/{task.name}", task.rows.copy()  # Ray's arrays are read-only
    sizes = rows["num_bytes"].astype(np.int64)
    rows["offset"] = np.cumsum(sizes) - sizes
    index = encode_index(rows)
    storage.publish_bytes(storage.join(context.out, name + INDEX_SUFFIX), index)
    entry = shard_entry(rows, url=name + ".tar", split=task.split, sha256=sha256, index=index)
    receipt = Receipt(build_key=task.build_key, shard=entry)
    storage.publish_bytes(context.receipt_url(task), encode_receipt(receipt))
    return receipt


def scratch_of(out: str, part: Part | None = None) -> str:
    """Names the local folder of the unfinished files of an output, or of a part of its job.

    It is emptied at each start.
    """
    # The machine's folder is everybody's: what another user has made there cannot be written to.
    own = f"vlm-shards-{os.getuid()}"
    root = Path(scratch_root(out, cache=Path(tempfile.gettempdir()) / own))
    return str(root if part is None else root / f"part-{part.stem}")


def find_pieces(rows: np.ndarray, files: np.ndarray, urls: Sequence[str]) -> list[ByteRange]:
    """Joins the samples of a shard to byte ranges, as long as possible.

    Args:
      rows: [n], rows of the sources' indexes.
      files: int64 [n], the file of each.
      urls: Of the files.
    """
    if not len(rows):
        return []
    starts = rows["offset"].astype(np.int64)
    stops = starts + rows["num_bytes"].astype(np.int64)
    begins = np.ones(len(rows), dtype=bool)
    begins[1:] = (np.diff(files) != 0) | (starts[1:] != stops[:-1])
    first = np.flatnonzero(begins)
    last = np.append(first[1:], len(rows)) - 1
    return [
        ByteRange(url=urls[file], start=start, stop=stop)
        for file, start, stop in zip(
            files[first].tolist(), starts[first].tolist(), stops[last].tolist(), strict=True
        )
    ]


def _stays_in_store(context: CopyContext, url: str, pieces: Sequence[ByteRange]) -> bool:
    if context.through == "client" or (context.through == "auto" and context.sha256):
        return False
    possible = can_multipart_copy(url, pieces, context.stamps)
    everything_local = storage.is_local(url) and all(storage.is_local(p.url) for p in pieces)
    if context.through == "store" and not possible and not everything_local:
        raise ConfigError("not_in_store", where=url)
    return possible


def shard_entry(rows: np.ndarray, *, url: str, split: str, sha256: str, index: bytes) -> ShardEntry:
    """Describes a shard by its index rows.

    Args:
      rows: With offsets of the new shard, or of the old ones.
      url, split, sha256: As the manifest names them.
      index: The encoded rows; b"" for the shard of a view, which has none.
    """
    names = rows.dtype.names or ()
    return ShardEntry(
        url=url,
        split=split,
        nsamples=len(rows),
        num_bytes=int(rows["num_bytes"].sum(dtype=np.int64)) + len(END_OF_ARCHIVE),
        sha256=sha256,
        index_bytes=len(index),
        index_sha256=hashlib.sha256(index).hexdigest() if index else "",
        **{name: int(rows[name].sum()) if name in names else 0 for name in _SUMS},
    )
