"""ANNOTATE, from settings to a manifest: plan (read and join), then write and commit.

1. The source is read as a reshard in its own order reads it: manifest, indexes, versions of files.
2. The table is joined by key, split by split; nothing is written until all of it fits.
3. The output gets a column file per shard, with the source's own added columns first joined to the
   new ones, and last a manifest: a view of the source's files under the source's names of shards.

The source is only read, so its order, its keys and the states of runs stay as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np

from preprocess.annotate.join import Joined, UnknownKeys, join, parse_fills
from preprocess.annotate.table import ColumnTable, read_table
from preprocess.job import (
    Reporter,
    check_unfinished,
    output_lock,
    publish_columns,
    read_columns,
    require_same_result,
)
from preprocess.reshard import (
    ReshardPlan,
    ReshardSettings,
    check_sources,
    plan_reshard,
    portable_url,
    publish_tokenizer,
    split_keys,
)
from preprocess.settings import Setting
from shardspec import storage
from shardspec.errors import ConfigError, ConflictError
from shardspec.manifest import (
    MANIFEST_NAME,
    AddedColumns,
    FileEntry,
    Manifest,
    ShardEntry,
    View,
    fingerprint,
    load_manifest,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotateSettings:
    """Which columns to join to which dataset."""

    src: Annotated[str, Setting("folder or URL of the dataset", positional=True)]
    columns: Annotated[
        str,
        Setting(
            "file or URL with a column `key` and the columns to add: .parquet, .csv or .jsonl",
            metavar="FILE",
        ),
    ]
    dst: Annotated[
        str | None,
        Setting("folder or URL of the new dataset", shown="SRC-annotated"),
    ] = None
    split: Annotated[str | None, Setting("only this split", shown="all splits")] = None
    missing: Annotated[
        Mapping[str, str],
        Setting(
            "values that stand for missing ones, by column, for example score=nan,licence=unknown",
            metavar="FILLS",
            parse=parse_fills,
            shown="missing values are refused",
        ),
    ] = field(default_factory=dict)
    unknown_keys: Annotated[
        UnknownKeys, Setting("rows whose key no sample has: refuse, or ignore and count them")
    ] = "refuse"

    @property
    def out(self) -> str:
        """The output, by default beside the source."""
        return self.dst or self.src.rstrip("/") + "-annotated"


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """Everything that will be written; nothing has been."""

    settings: AnnotateSettings
    plan: ReshardPlan
    """The source, as it is found, in its own order."""
    table: ColumnTable
    joined: Mapping[str, Joined]
    """By split."""

    def source_of(self, split: str) -> dict[str, Any]:
        """Describes where a split comes from, in plain JSON types."""
        (source,) = self.plan.sources
        entry = source.manifest.splits[split]
        origin = {"manifest_sha256": source.sha256, "split": split, "build_key": entry.build_key}
        found: dict[str, Any] = {"kind": "annotate", "from": [origin]}
        found["columns_sha256"] = self.table.sha256
        found["columns"] = sorted(self.table.values)
        filled = self.joined[split].filled
        if filled:
            found["filled"] = {
                name: {"samples": count, "value": self.settings.missing[name]}
                for name, count in filled.items()
            }
        return found

    def build_key(self, split: str) -> str:
        """Hashes everything that a split of the output follows from."""
        return fingerprint({"split": split, "source": self.source_of(split)})


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotateOutcome:
    """How it ended."""

    manifest: Manifest
    sha256: str
    """Of the manifest."""
    fresh: bool
    """Whether this run wrote the manifest; False when there was nothing to do."""


def plan_annotation(settings: AnnotateSettings, report: Reporter) -> Annotation:
    """Reads a dataset and a table, and joins them; writes nothing.

    Raises:
      ConfigError: The columns do not fit the dataset: `columns_key`, `columns_names`,
        `columns_type`, `columns_unknown_keys`, `columns_incomplete`, `columns_fill`; or as
        `plan_reshard`.
      SourceError: The table cannot be read.
      ManifestError: The source has no readable manifest.
      ShardError: A file of the source is missing, cut or changed.
    """
    table = read_table(settings.columns)
    plan = plan_reshard(
        ReshardSettings(
            sources=(settings.src,),
            out=settings.out,
            split=settings.split,
            form="view",
            num_shards=1,  # its own order, also where samples have groups
        ),
        report,
    )
    _check_new(plan.sources[0].manifest, table)
    keys = {split.split: split_keys(plan, split) for split in plan.splits}
    # Of all splits at once: a row may belong to any of them.
    joined = join(
        table,
        np.concatenate(list(keys.values())),
        fills=settings.missing,
        unknown=settings.unknown_keys,
    )
    parts, start = {}, 0
    for split, own in keys.items():
        parts[split] = joined.part(start, start + len(own))
        start += len(own)
    return Annotation(settings=settings, plan=plan, table=table, joined=parts)


def _check_new(manifest: Manifest, table: ColumnTable) -> None:
    have = set(manifest.columns.types) if manifest.columns else set()
    again = sorted(have & set(table.values))
    if again:
        problems = "; ".join(f"{name!r} is a column of the dataset already" for name in again)
        raise ConfigError("columns_names", where=table.where, problems=problems)


def annotate(annotation: Annotation, report: Reporter) -> AnnotateOutcome:
    """Writes column files and a manifest, or finds that they were written before.

    Raises:
      ConflictError: `job_conflict`: the output holds something else.
      ShardError: `source_changed`, `tokenizer_file`: the source is not what it was.
      StorageError: The output cannot be written.
    """
    out = annotation.settings.out
    done = _finished(annotation)
    if done is not None:
        return done
    with output_lock(out) as require_held:
        done = _finished(annotation)  # once more: another job may have ended in between
        if done is not None:
            return done
        check_unfinished(out)
        report.stage("write columns", None)
        columns = publish_columns(out, dict(_shard_rows(annotation)))
        check_sources(annotation.plan)
        publish_tokenizer(annotation.plan, report)
        payload = _manifest(annotation, columns).encode()
        require_held()
        if not storage.compare_and_swap(storage.join(out, MANIFEST_NAME), payload, replacing=None):
            raise ConflictError("manifest_conflict.overtaken", where=out)
    return AnnotateOutcome(
        manifest=_manifest(annotation, columns),
        sha256=hashlib.sha256(payload).hexdigest(),
        fresh=True,
    )


def _shard_rows(annotation: Annotation) -> list[tuple[str, np.ndarray]]:
    """Makes the rows of the column file of each shard."""
    (source,) = annotation.plan.sources
    manifest = source.manifest
    rows = []
    for split, joined in annotation.joined.items():
        start = 0
        for shard in manifest.select(split):
            stop = start + shard.nsamples
            parts = {name: column[start:stop] for name, column in joined.values.items()}
            if manifest.columns is not None:
                old = read_columns(source.url, manifest, shard)
                parts |= {name: old[name] for name in old.dtype.names or ()}
            rows.append((shard.url, _packed(parts, shard.nsamples)))
            start = stop
    return rows


def _packed(parts: Mapping[str, np.ndarray], count: int) -> np.ndarray:
    fields = [(name, parts[name].dtype.str, parts[name].shape[1:]) for name in sorted(parts)]
    rows = np.zeros(count, np.dtype(fields))
    for name, values in parts.items():
        rows[name] = values
    return rows


def _manifest(annotation: Annotation, columns: AddedColumns) -> Manifest:
    (source,) = annotation.plan.sources
    out, old = annotation.settings.out, source.manifest
    shards = [shard for split in annotation.joined for shard in old.select(split)]
    shards.sort(key=lambda shard: shard.url)
    if old.view is None:
        parts: dict[str, tuple[tuple[int, int, int], ...]]
        parts = {shard.url: ((i, 0, shard.nsamples),) for i, shard in enumerate(shards)}
        files = tuple(shard.file for shard in shards)
    else:
        parts = {shard.url: old.view.parts[shard.url] for shard in shards}
        files = old.view.files
    return replace(
        old,
        splits={
            split: replace(
                old.splits[split],
                build_key=annotation.build_key(split),
                source=annotation.source_of(split),
            )
            for split in annotation.joined
        },
        shards=tuple(_only_named(shard) for shard in shards),
        view=View(files=tuple(_seen_from(out, source.url, f) for f in files), parts=parts),
        columns=columns,
    )


def _only_named(shard: ShardEntry) -> ShardEntry:
    """Describes a shard of a view, which is not a file."""
    return replace(shard, sha256="", index_bytes=0, index_sha256="")


def _seen_from(out: str, source: str, file: FileEntry) -> FileEntry:
    return replace(
        file,
        url=portable_url(out, storage.resolve(source, file.url)),
        index_url=portable_url(out, storage.resolve(source, file.index_url)),
    )


def _finished(annotation: Annotation) -> AnnotateOutcome | None:
    """Finds the result of this very annotation; None where the output is still empty.

    Raises:
      ConflictError: `job_conflict`.
    """
    out = annotation.settings.out
    manifest = load_manifest(out)
    if manifest is None:
        return None
    require_same_result(
        manifest,
        where=out,
        build_keys={split: annotation.build_key(split) for split in annotation.joined},
        sources={split: annotation.source_of(split) for split in annotation.joined},
    )
    payload = storage.read_bytes(storage.join(out, MANIFEST_NAME))
    return AnnotateOutcome(
        manifest=manifest, sha256=hashlib.sha256(payload).hexdigest(), fresh=False
    )
