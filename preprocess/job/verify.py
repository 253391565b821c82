"""VERIFY: reads a finished dataset and compares every byte with what the manifest promises.

A task reads one file. Shards of object stores are copied to the local disk for it, one at a time;
none is held in memory. Nothing is written, so parts need to know nothing of each other.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import numpy as np

from preprocess.job.columns import read_columns
from preprocess.job.engines.engine import Engine, node_proof
from preprocess.job.engines.local import Event, TaskDone, TaskLost
from preprocess.job.job import Reporter
from preprocess.job.plan import Part
from shardspec import storage
from shardspec.checksum import crc32
from shardspec.errors import ShardError, ShardsError
from shardspec.features import FEATURES, StoredFeatures
from shardspec.index import open_index, sample_layout
from shardspec.manifest import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    FileEntry,
    Manifest,
    require_manifest,
)
from shardspec.media import decode_stored
from shardspec.probe import check_stored_tokenizer
from shardspec.sample import (
    SPAN_COLUMNS,
    SpanKind,
    clip_pairs,
    clip_rows,
    clip_sizes,
    decode_array,
    image_rows,
    num_stored_images,
    overview_rows,
    text_rows,
    window_images,
)
from shardspec.tar import TarMember, walk_tar
from shardspec.video import read_frames

_Decode = Callable[..., np.ndarray]
"""Reads an image as it is stored: (payload, where=)."""

PROCESS_BYTES = 512 * 2**20
"""Smaller datasets are read in this process, before others would have begun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyContext:
    """What every task shares."""

    url: str
    manifest: Manifest
    deep: bool


def verify(
    url: str,
    report: Reporter,
    *,
    deep: bool = False,
    part: Part | None = None,
    engine: Engine | None = None,
) -> list[ShardsError]:
    """Checks every shard of a dataset.

    Args:
      url: The dataset.
      report: Gets a step per shard.
      deep: Decode every image, or read its features, as well.
      part: Which of the files are read, every `count`-th; None for all.
      engine: Where they are read; None for this process.

    Returns:
      What is wrong, at most one finding a file; [] where all is as promised.

    Raises:
      ManifestError: There is no readable manifest.
      StorageError: A worker died again and again.
    """
    manifest = require_manifest(url)
    part = part or Part(index=0, count=1)
    findings: list[ShardsError] = []
    if not manifest.raw and part.index == 0:
        try:
            _verify_tokenizer(manifest, storage.join(url, TOKENIZER_NAME))
        except ShardError as error:
            findings.append(error)
    if manifest.columns is not None:
        for shard in part.shards(len(manifest.shards)):
            try:
                read_columns(url, manifest, manifest.shards[shard])
            except ShardError as error:
                findings.append(error)
    files = part.shards(len(manifest.files))
    report.stage("verify", len(files))
    context = VerifyContext(url=url, manifest=manifest, deep=deep)
    by_file: dict[int, list[ShardsError]] = {}
    for event in _run(context, files, engine):
        if isinstance(event, TaskLost):
            report.note(f"a worker died (exit code {event.exit_code}); its shard is read again")
        elif isinstance(event, TaskDone):
            by_file[event.task] = event.value
            report.step("".join(error.reason for error in event.value))
    return [*findings, *(error for file in files for error in by_file[file])]


def _run(context: VerifyContext, files: Sequence[int], engine: Engine | None) -> Iterator[Event]:
    num_bytes = sum(context.manifest.files[file].num_bytes for file in files)
    if engine is None or (engine.is_local and num_bytes < PROCESS_BYTES):
        return (TaskDone(task=file, value=verify_file(context, file, _ignored)) for file in files)
    proof = None
    if not engine.is_local:
        proof = node_proof(context.url, storage.join(context.url, MANIFEST_NAME))
    return engine.run(files, work=verify_file, context=context, proof=proof)


def verify_file(context: VerifyContext, task: int, report: object) -> list[ShardsError]:  # noqa: ARG001
    """Checks one file; gives what is wrong with it, if anything."""
    manifest = context.manifest
    try:
        decode = _decoder(manifest) if context.deep else None
        _verify_file(context.url, manifest.files[task], manifest, decode=decode)
    except ShardsError as error:
        return [error]
    return []


def _decoder(manifest: Manifest) -> _Decode | None:
    """Gives what reads an image as it is stored; None for foreign tars."""
    if manifest.raw:
        return None
    if FEATURES in manifest.recipe:
        return StoredFeatures.from_dict(manifest.recipe[FEATURES]).decode
    return partial(decode_stored, codec=manifest.recipe["image"]["codec"])


def _verify_tokenizer(manifest: Manifest, where: str) -> None:
    try:
        payload = storage.read_bytes(where)
    except FileNotFoundError as error:
        raise ShardError("tokenizer_file.changed", where=where) from error
    check_stored_tokenizer(manifest.tokenizer, payload, where=where)


def _verify_file(url: str, file: FileEntry, manifest: Manifest, *, decode: _Decode | None) -> None:
    raw, embedding_size = manifest.raw, manifest.tokenizer.embedding_size
    tar_url = storage.resolve_place(url, file.url)
    counts: dict[str, Any] = {"num_samples": file.nsamples, "shard_bytes": file.num_bytes}
    with TemporaryDirectory() as folder:
        tar_path, index_path = _hashed(url, file, Path(folder))
        rows = open_index(str(index_path), raw=raw, **counts)
        with storage.translate_errors(tar_url), tar_path.open("rb") as stream:
            if not raw:  # foreign headers have forms that ours never do
                members = walk_tar(stream, where=tar_url)
                for row in rows:
                    tokens = _verify_sample(stream, row, members, decode=decode, where=tar_url)
                    _verify_tokens(tokens, row, embedding_size=embedding_size, where=tar_url)
                extra = next(members, None)
                if extra is not None:
                    raise _wrong(tar_url, "member_extra", {"member": extra.name})
            for row in rows:
                _verify_crc(stream, row, where=tar_url)


def check_hashes(url: str, file: FileEntry) -> None:
    """Compares the whole bytes of a shard and its index with their hashes.

    Raises:
      ShardError: They differ, or a file is missing.
    """
    with TemporaryDirectory() as folder:
        _hashed(url, file, Path(folder))


def _hashed(url: str, file: FileEntry, folder: Path) -> tuple[Path, Path]:
    tar_url, index_url = (storage.resolve_place(url, n) for n in (file.url, file.index_url))
    tar_path = _at_hand(tar_url, folder / "shard.tar")
    _check_file(tar_path, file.num_bytes, file.sha256, where=tar_url)
    index_path = _at_hand(index_url, folder / "index.npy")
    _check_file(index_path, file.index_bytes, file.index_sha256, where=index_url)
    return tar_path, index_path


def _verify_crc(tar: IO[bytes], row: np.void, *, where: str) -> None:
    got = crc32(_read(tar, int(row["offset"]), int(row["num_bytes"]), where=where))
    if got != int(row["crc32"]):
        facts: dict[str, object] = {"got": got, "want": int(row["crc32"])}
        raise _wrong(f"{where} sample {row['key'].decode()}", "sample_crc", facts)


def _verify_sample(
    tar: IO[bytes],
    row: np.void,
    members: Iterator[TarMember],
    *,
    decode: _Decode | None,
    where: str,
) -> np.ndarray:
    """Compares a sample with its row; returns its tokens."""
    key, start = row["key"].decode(), int(row["offset"])
    where = f"{where} sample {key}"
    layout = sample_layout(row)
    want = [start + layout.json, start + layout.spans, start + layout.tokens]
    found = list(itertools.islice(members, 3))
    got = [member.offset for member in found]
    if got != want:
        raise _wrong(where, "member_layout", {"got_offsets": got, "want_offsets": want})
    payloads = [_read(tar, m.offset, m.num_bytes, where=where) for m in found]
    spans = decode_array(payloads[1], dtype="<i4", columns=SPAN_COLUMNS, where=where)
    tokens = decode_array(payloads[2], dtype="<i4", where=where)
    ranges = spans[spans[:, 0] == SpanKind.TEXT, 3:7]
    numbers = spans[spans[:, 0] == SpanKind.POINT, 2:6]
    bounds = np.concatenate([ranges.ravel(), numbers.ravel()])
    if len(bounds) and (bounds.min() < 0 or bounds.max() > len(tokens)):
        raise _wrong(where, "span_range", {"num_tokens": len(tokens), "max": int(bounds.max())})
    turns = text_rows(spans)[:, 1:3].tolist()
    if turns != sorted(turns) or len(turns) != len(ranges):
        raise _wrong(where, "span_order", {"turns": turns[:20]})
    if not windows_fit(spans):
        raise _wrong(where, "span_windows", {"windows": window_images(spans)[:20]})
    overview_bytes = {row[1]: row[4] for row in overview_rows(spans).tolist()}
    want = []
    for i, picture in enumerate(image_rows(spans)[: num_stored_images(spans)].tolist()):
        want += [picture[6], overview_bytes[i]] if i in overview_bytes else [picture[6]]
    num_pictures = len(want)
    head_bytes = int(row["head_bytes"]) if "head_bytes" in (row.dtype.names or ()) else 0
    order = {"tables_first": head_bytes > 0}
    want += clip_sizes(spans, **order)
    pictures = list(itertools.islice(members, len(want)))
    sizes = [member.num_bytes for member in pictures]
    if sizes != want or len(image_rows(spans)) != int(row["num_images"]):
        raise _wrong(where, "image_sizes", {"got": sizes, "want": want})
    misnamed = [m.name for m in (*found, *pictures) if not m.name.startswith(f"{key}.")]
    if misnamed:
        raise _wrong(where, "member_layout", {"members": misnamed})
    if decode is not None:
        stored = [_read(tar, m.offset, m.num_bytes, where=where) for m in pictures]
        for payload in stored[:num_pictures]:
            decode(payload, where=where)
        pairs = clip_pairs(stored[num_pictures:], **order)
        for clip, (table, file) in zip(clip_rows(spans).tolist(), pairs, strict=True):
            read_frames(table, file, range(clip[3]), on_frame=_ignored, where=where)
    return tokens


def windows_fit(spans: np.ndarray) -> bool:
    """Returns True if each window of a sample has images and texts of its own, of one size each."""
    numbers = spans[spans[:, 0] == SpanKind.WINDOW, 1]
    if not len(numbers):
        return True
    windows, pictures = window_images(spans), image_rows(spans)
    branches = np.unique(text_rows(spans)[:, 1])
    if sorted({*numbers.tolist()}) != [*range(len(windows))] or (np.diff(numbers) < 0).any():
        return False
    if not len(branches) or len(branches) % len(windows):
        return False
    if not all(0 <= image < len(pictures) for each in windows for image in each):
        return False
    sizes = {tuple(map(tuple, pictures[each, 2:4].tolist())) for each in windows}
    return len(sizes) == 1 and sizes != {()}


def _ignored(*_: object) -> None:
    """Takes frames that need only be decoded, and reports that nobody reads."""


def _verify_tokens(tokens: np.ndarray, row: np.void, *, embedding_size: int, where: str) -> None:
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < embedding_size:
        facts: dict[str, object] = {"min": int(tokens.min()), "max": int(tokens.max())}
        facts["embedding_size"] = embedding_size
        raise _wrong(f"{where} sample {row['key'].decode()}", "token_range", facts)


def _read(tar: IO[bytes], start: int, num_bytes: int, *, where: str) -> memoryview:
    """Copies a part of a file: reading a map of one that was truncated would end the process.

    The position of the file, which `walk_tar` uses, stays where it is.
    """
    payload = b""
    while len(payload) < num_bytes:  # once, but for signals and parts beyond 2 GiB
        left = num_bytes - len(payload)
        part = os.pread(tar.fileno(), left, start + len(payload))
        if not part:
            raise _wrong(where, "shard_size", {"got_bytes": start + len(payload)})
        payload = payload + part if payload else part
    return memoryview(payload)


def _at_hand(url: str, copy: Path) -> Path:
    """Gives a local file with an object's bytes: its own, or a copy."""
    if storage.is_local(url):
        return storage.local_path(url)
    try:
        storage.fetch_file(url, copy)
    except FileNotFoundError as error:
        raise _wrong(url, "shard_missing", {}) from error
    return copy


def _check_file(path: Path, num_bytes: int, sha256: str, *, where: str) -> None:
    got_bytes = storage.size(str(path))
    if got_bytes is None:
        raise _wrong(where, "shard_missing", {})
    if got_bytes != num_bytes:
        raise _wrong(where, "shard_size", {"got_bytes": got_bytes, "want_bytes": num_bytes})
    if not sha256:
        return  # not hashed as a whole: its samples have checksums
    digest = hashlib.sha256()
    with storage.translate_errors(where), path.open("rb") as stream:
        for block in iter(lambda: stream.read(2**20), b""):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise _wrong(where, "shard_sha256", {"got": digest.hexdigest(), "want": sha256})


def _wrong(where: str, reason: str, facts: dict[str, object]) -> ShardError:
    return ShardError(f"{reason}.verify", where=where, facts=facts)
