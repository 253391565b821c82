"""EXPORT: the index files of other readers, from our manifest, beside the shards.

* wids: `wids-SPLIT.json`, the shards of one split (the manifest itself is a wids index of all).
* energon: `.nv-meta/` with the shards of every split, a table of samples and their members, and a
  `.tar.idx` beside each tar with the position of each sample.
* DALI: a `.idx` beside each tar with the position, length and name of every member.

Payloads are not read; members are found by the headers of the tars. What is written follows from
the dataset alone, and nothing of ours ever reads it.
"""

from __future__ import annotations

import json
import sqlite3
import uuid
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np

from preprocess.exchange.foreign import load_keys, opened
from preprocess.job import Reporter
from shardspec import storage
from shardspec.errors import ConfigError, ConflictError
from shardspec.foreign import ForeignFile, split_name, walk_foreign
from shardspec.manifest import Manifest, ShardEntry, canonical_json, require_manifest
from shardspec.tar import BLOCK, walk_tar

ExportFormat = Literal["wids", "energon", "dali"]

Samples = list[list[ForeignFile]]
"""The members of each sample of a tar, in order."""


def export_index(url: str, form: ExportFormat, report: Reporter) -> list[str]:
    """Writes the index files of another reader.

    Args:
      url: The dataset.
      form: Whose.
      report: Gets a step per shard.

    Returns:
      URLs of the files that are new, those beside the shards left out.

    Raises:
      ConfigError: `export_view`: the dataset is a view and has no shards; `export_name`: DALI
        cannot name a file.
      ConflictError: `key_collision`: energon wants keys that differ over all splits.
    """
    manifest = require_manifest(url)
    if manifest.view is not None:
        raise ConfigError("export_view", where=url)
    if form == "wids":
        return _wids(url, manifest)
    report.stage("read headers", len(manifest.shards))
    found = ((shard, _samples(url, manifest, shard, report)) for shard in manifest.shards)
    if form == "energon":
        return _energon(url, manifest, found)
    for shard, samples in found:
        _check_words(url, samples)
        name = shard.url.removesuffix(".tar") + ".idx"
        storage.publish_bytes(storage.join(url, name), dali_index(samples))
    return []


def _samples(url: str, manifest: Manifest, shard: ShardEntry, report: Reporter) -> Samples:
    where = storage.join(url, shard.url)
    with opened(where) as stream:
        if manifest.raw:
            split = partial(_split_known, known=set(load_keys(url, shard).tolist()))
            files = list(walk_foreign(stream, where=where, split=split))
        else:
            files = [
                ForeignFile(
                    key=name[0],
                    suffix=name[1],
                    header=member.offset - BLOCK,
                    offset=member.offset,
                    num_bytes=member.num_bytes,
                )
                for member in walk_tar(stream, where=where)
                if (name := split_name(member.name)) is not None
            ]
    report.step("")
    return [list(own) for _, own in groupby(files, key=lambda file: file.key)]


def _split_known(name: str, *, known: set[bytes]) -> tuple[str, str] | None:
    """Splits a name where the index does: a key that ends at the last dot can have dots itself."""
    last = split_name(name, dots="last")
    return last if last is not None and last[0].encode() in known else split_name(name)


def _wids(url: str, manifest: Manifest) -> list[str]:
    written = []
    for split in sorted(manifest.splits):
        document = {
            "__kind__": "wids-shard-index-v1",
            "wids_version": 1,
            "name": f"{manifest.dataset}-{split}",
            "shardlist": [{"url": s.url, "nsamples": s.nsamples} for s in manifest.select(split)],
        }
        written.append(storage.join(url, f"wids-{split}.json"))
        storage.publish_bytes(written[-1], canonical_json(document, indent=1))
    return written


def _check_words(url: str, samples: Samples) -> None:
    for file in (file for files in samples for file in files):
        if len(f"{file.key}.{file.suffix}".split()) != 1:
            raise ConfigError("export_name", where=f"{url} sample {file.key!r}", field=file.suffix)


def dali_index(samples: Samples) -> bytes:
    """Writes what DALI's webdataset reader takes as the index of a tar, version 1.2.

    >>> one = ForeignFile(key="a", suffix="jpg", header=0, offset=512, num_bytes=7)
    >>> dali_index([[one]])
    b'v1.2 1\\njpg 512 7 a.jpg\\n'
    """
    lines = [f"v1.2 {len(samples)}"]
    for files in samples:
        lines.append(
            " ".join(f"{f.suffix} {f.offset} {f.num_bytes} {f.key}.{f.suffix}" for f in files)
        )
    return "\n".join([*lines, ""]).encode()


def _energon(
    url: str, manifest: Manifest, found: Iterator[tuple[ShardEntry, Samples]]
) -> list[str]:
    documents = {
        ".info.json": {"energon_version": None, "shard_counts": _counts(manifest)},
        # Earlier releases read the same as YAML, which JSON is.
        ".info.yaml": {"energon_version": None, "shard_counts": _counts(manifest)},
        "split.yaml": {
            "split_parts": {
                _energon_split(split): [shard.url for shard in manifest.select(split)]
                for split in sorted(manifest.splits)
            },
            "exclude": [],
        },
        # Plain fields by their suffix: what they become is the business of the training's cooker.
        "dataset.yaml": {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"},
    }
    with TemporaryDirectory() as folder:
        path = Path(folder) / "index.sqlite"
        _write_table(path, url, found)
        written = [storage.join(url, ".nv-meta", "index.sqlite")]
        storage.publish_file(written[0], path)
    # Caches of that reader go by it: another manifest, another one.
    name = uuid.uuid5(uuid.NAMESPACE_OID, manifest.encode().hex())
    files = {name: json.dumps(value, indent=1).encode() for name, value in documents.items()}
    for file, payload in {**files, "index.uuid": str(name).encode()}.items():
        written.append(storage.join(url, ".nv-meta", file))
        storage.publish_bytes(written[-1], payload)
    return written


def _counts(manifest: Manifest) -> dict[str, int]:
    return {shard.url: shard.nsamples for shard in manifest.shards}


def _energon_split(split: str) -> str:
    """Names a split as energon requests it."""
    return {"validation": "val"}.get(split, split)


def _write_table(path: Path, url: str, found: Iterator[tuple[ShardEntry, Samples]]) -> None:
    table = sqlite3.connect(path)
    try:
        table.executescript(
            "CREATE TABLE samples (tar_file_id INTEGER NOT NULL, sample_key TEXT NOT NULL UNIQUE,"
            " sample_index INTEGER NOT NULL, byte_offset INTEGER, byte_size INTEGER);"
            "CREATE TABLE sample_parts (tar_file_id INTEGER, sample_index INTEGER, part_name TEXT,"
            " content_byte_offset INTEGER, content_byte_size INTEGER);"
        )
        for number, (shard, samples) in enumerate(found):
            ends = [files[-1].end for files in samples]
            starts = [files[0].header for files in samples]
            table.executemany(
                "INSERT INTO samples VALUES (?, ?, ?, ?, ?)",
                [
                    (number, files[0].key, i, starts[i], ends[i] - starts[i])
                    for i, files in enumerate(samples)
                ],
            )
            table.executemany(
                "INSERT INTO sample_parts VALUES (?, ?, ?, ?, ?)",
                [
                    (number, i, file.suffix, file.offset, file.num_bytes)
                    for i, files in enumerate(samples)
                    for file in files
                ],
            )
            offsets = np.array([*starts, ends[-1] if ends else 0], dtype="<u8")
            storage.publish_bytes(storage.join(url, shard.url + ".idx"), offsets.tobytes())
        table.executescript(
            "CREATE INDEX idx_samples_by_tar_and_idx ON samples(tar_file_id, sample_index);"
            "CREATE INDEX idx_sample_parts_seq"
            " ON sample_parts(tar_file_id, sample_index, content_byte_offset);"
            "CREATE INDEX idx_sample_parts_full ON sample_parts(tar_file_id, sample_index,"
            " part_name, content_byte_offset, content_byte_size);"
        )
        table.commit()
    except sqlite3.IntegrityError as error:
        raise ConflictError("key_collision.export", where=url, error=error) from error
    finally:
        table.close()
