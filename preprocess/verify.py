"""VERIFY: reads a finished dataset and compares every byte with what the manifest promises."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from preprocess.commit import tokenizer_in_place
from preprocess.job import Reporter
from shardspec import storage
from shardspec.errors import ShardError, ShardsError
from shardspec.index import open_index, sample_layout
from shardspec.manifest import TOKENIZER_NAME, ShardEntry, require_manifest
from shardspec.media import decode_stored
from shardspec.sample import SPAN_COLUMNS, SpanKind, decode_array, image_rows
from shardspec.tar import TarMember, walk_tar


def verify(url: str, report: Reporter, *, deep: bool = False) -> list[ShardsError]:
    """Checks every shard of a dataset.

    Args:
      url: The dataset.
      report: Gets a step per shard.
      deep: Decode every image as well.

    Returns:
      What is wrong, at most one finding a shard; [] where all is as promised.

    Raises:
      ManifestError: There is no readable manifest.
    """
    manifest = require_manifest(url)
    codec = str(manifest.recipe["image"]["codec"])
    findings: list[ShardsError] = []
    if not tokenizer_in_place(url, manifest):
        findings.append(
            ShardError(
                "the dataset's copy of its tokenizer is missing or changed",
                reason="tokenizer_file",
                where=storage.join(url, TOKENIZER_NAME),
                fix="run the `make shards` command that made the dataset: it puts it back",
            )
        )
    report.stage("verify", len(manifest.shards))
    for shard in manifest.shards:
        try:
            _verify_shard(url, shard, codec=codec if deep else None)
        except ShardsError as error:
            findings.append(error)
        report.step(findings[-1].reason if findings and findings[-1].where else "")
    return findings


def _verify_shard(url: str, shard: ShardEntry, *, codec: str | None) -> None:
    tar = _fetch(storage.join(url, shard.url), shard.num_bytes, shard.sha256)
    index_url = storage.join(url, shard.index_url)
    index = _fetch(index_url, shard.index_bytes, shard.index_sha256)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "index.npy"
        path.write_bytes(index)
        rows = np.array(
            open_index(str(path), num_samples=shard.nsamples, shard_bytes=shard.num_bytes)
        )
    members = walk_tar(io.BytesIO(tar), where=storage.join(url, shard.url))
    for row in rows:
        _verify_sample(tar, row, members, codec=codec, where=storage.join(url, shard.url))
    extra = next(members, None)
    if extra is not None:
        raise _wrong(storage.join(url, shard.url), "member_extra", {"member": extra.name})


def _verify_sample(
    tar: bytes, row: np.void, members: Iterator[TarMember], *, codec: str | None, where: str
) -> None:
    key, start = row["key"].decode(), int(row["offset"])
    where = f"{where} sample {key}"
    found = [next(members, None) for _ in range(3 + int(row["num_images"]))]
    layout = sample_layout(row)
    want = [start + layout.json, start + layout.spans, start + layout.tokens]
    got = [member.offset for member in found[:3] if member is not None]
    if got != want or any(m is None or not m.name.startswith(f"{key}.") for m in found):
        raise _wrong(where, "member_layout", {"got_offsets": got, "want_offsets": want})
    view = memoryview(tar)
    payloads = [view[m.offset : m.offset + m.num_bytes] for m in found if m is not None]
    spans = decode_array(payloads[1], dtype="<i4", columns=SPAN_COLUMNS, where=where)
    tokens = decode_array(payloads[2], dtype="<i4", where=where)
    texts = spans[spans[:, 0] == SpanKind.TEXT, 3:7]
    sizes = [len(payload) for payload in payloads[3:]]
    if len(texts) and (texts.min() < 0 or texts.max() > len(tokens)):
        raise _wrong(where, "span_range", {"num_tokens": len(tokens), "max": int(texts.max())})
    if image_rows(spans)[:, 6].tolist() != sizes:
        raise _wrong(where, "image_sizes", {"got": sizes})
    if codec is not None:
        for payload in payloads[3:]:
            decode_stored(payload, codec=codec, where=where)  # type: ignore[arg-type]


def _fetch(url: str, num_bytes: int, sha256: str) -> bytes:
    try:
        payload = storage.read_bytes(url)
    except FileNotFoundError as error:
        raise _wrong(url, "shard_missing", {}) from error
    if len(payload) != num_bytes:
        raise _wrong(url, "shard_size", {"got_bytes": len(payload), "want_bytes": num_bytes})
    got = hashlib.sha256(payload).hexdigest()
    if got != sha256:
        raise _wrong(url, "shard_sha256", {"got": got, "want": sha256})
    return payload


def _wrong(where: str, reason: str, facts: dict[str, object]) -> ShardError:
    return ShardError(
        "stored data is not what the manifest promises",
        reason=reason,
        where=where,
        facts=facts,
        fix="remove the shard and its receipt, then run the `make shards` command that made it",
    )
