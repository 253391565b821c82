"""RESHARD: new shards out of old ones, without touching a pixel: view or copy, then commit.

A *view* is a manifest that names runs of samples in the old files; no byte moves. A *copy* makes
each new shard of byte ranges (copy.py), one task per shard, so that the same command goes
on after any interruption. The manifest is written last, once all sources are still the versions
that were planned with.

Sources are only read. Samples keep their bytes, keys and order, so checkpoints of a run restore.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from preprocess.job import (
    DividedJob,
    Engine,
    OthersMissing,
    Reporter,
    check_unfinished,
    is_in_place,
    node_proof,
    publish_columns,
    require_same_result,
    require_space,
    stored_sizes,
)
from preprocess.job.engines import local
from preprocess.reshard.copy import (
    CopyContext,
    CopyTask,
    copy_shard,
    scratch_of,
    shard_entry,
)
from preprocess.reshard.plan import ReshardPlan, SplitPlan, shard_rows
from shardspec import storage
from shardspec.errors import ConfigError, ShardError, StorageError, redacted
from shardspec.manifest import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    AddedColumns,
    Manifest,
    Receipt,
    ShardEntry,
    SplitEntry,
    View,
    load_manifest,
)
from shardspec.probe import check_stored_tokenizer
from shardspec.storage import check_unchanged

_LOOKS_AT_ONCE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Resharded:
    """How it ended."""

    manifest: Manifest
    sha256: str
    """Of the manifest."""
    copied_shards: int
    """Copied in this run."""
    fresh: bool
    """Whether this run wrote the manifest; False when there was nothing to do."""


def reshard(plan: ReshardPlan, report: Reporter) -> Resharded:
    """Carries a plan out, or finishes what an interrupted run began.

    Raises:
      ConflictError: `job_conflict`: the output holds something else.
      ShardError: `sample_crc`, `source_changed`, `tar_truncated`, `tokenizer_file`: a source is not
        what it was.
      StorageError: `no_space`; the output cannot be written.
    """
    assert plan.settings.part is None
    outcome = reshard_part(plan, report)
    assert isinstance(outcome, Resharded)
    return outcome


def reshard_part(plan: ReshardPlan, report: Reporter) -> Resharded | OthersMissing:
    """Does the same for the part of the settings; the last part to end completes the dataset.

    Raises:
      What `reshard` raises; StorageError: `own_disk`, `part_busy`.
    """
    job = _divided(plan)
    scratch = scratch_of(job.out)
    done = _finished(plan)
    if done is not None:
        job.tidy_finished(scratch)
        return done
    outcome: Resharded | OthersMissing | None
    try:
        with job.held(report) as (board, require_held):
            # Once more: another job may have ended in between.
            outcome = _finished(plan) or _reshard(plan, job, board, require_held)
    except StorageError as error:
        outcome = _finished(plan) if job.has_ended(error) else None
        if outcome is None:
            raise
    if isinstance(outcome, Resharded):
        job.forget_parts()  # once more: this one may have joined meanwhile
    return outcome


def _divided(plan: ReshardPlan) -> DividedJob:
    s = plan.settings
    return DividedJob(
        out=s.out,
        kind="reshard of",
        dataset=plan.dataset,
        names={
            split.split: [plan.name(split, shard) for shard in range(split.num_shards)]
            for split in plan.splits
        },
        build_keys={split.split: plan.build_key(split) for split in plan.splits},
        sources={split.split: plan.source_of(split) for split in plan.splits},
        part=s.part,
        own_disk=s.own_disk,
    )


def _reshard(
    plan: ReshardPlan, job: DividedJob, report: Reporter, require_held: Callable[[], None]
) -> Resharded | OthersMissing:
    out = job.out
    check_unfinished(out)
    storage.delete(scratch_of(out, job.part))
    if plan.view:
        shards, view, copied = [], _view(plan), 0
        for each in plan.splits:
            shards += [_view_entry(plan, each, shard) for shard in range(each.num_shards)]
    else:
        view = None
        job.publish_notes()
        receipts, copied = _copy(plan, job, report, require_held)
        missing = job.others_missing(receipts)
        if missing is not None:
            return missing
        shards = [receipts[name].shard for name in job.all_names]
    columns = _publish_columns(plan)
    check_sources(plan)
    manifest = _manifest(plan, shards, view, columns)
    publish_tokenizer(plan, report)
    require_held()
    fresh = job.publish_manifest(manifest)
    job.tidy(scratch_of(out))
    return Resharded(
        manifest=manifest,
        sha256=hashlib.sha256(manifest.encode()).hexdigest(),
        copied_shards=copied,
        fresh=fresh,
    )


def _view(plan: ReshardPlan) -> View:
    out = plan.settings.out
    files = {url: file for split in plan.splits for url, file in split.files.items()}
    numbers = {url: i for i, url in enumerate(files)}
    parts: dict[str, tuple[tuple[int, int, int], ...]] = {}
    for split in plan.splits:
        for shard in range(split.num_shards):
            parts[_shard_url(plan, split, shard)] = tuple(
                (
                    numbers[split.segments[segment].file.url],
                    split.segments[segment].first_row + first,
                    rows,
                )
                for segment, first, rows in split.runs(shard).tolist()
            )
    entries = tuple(
        replace(
            file,
            url=portable_url(out, file.url),
            index_url=portable_url(out, file.index_url),
        )
        for file in files.values()
    )
    return View(files=entries, parts=parts)


def _view_entry(plan: ReshardPlan, split: SplitPlan, shard: int) -> ShardEntry:
    rows, _ = shard_rows(plan, split, shard)
    return shard_entry(
        rows, url=_shard_url(plan, split, shard), split=split.split, sha256="", index=b""
    )


def portable_url(out: str, url: str) -> str:
    """Names a file as a view does: relative if both are in the same folder, else in full.

    So a folder with datasets and their views may be moved as a whole.

    Raises:
      ConfigError: `url_secret`: the URL holds a password, which would be written down.

    >>> portable_url("s3://bucket/sets/view", "s3://bucket/sets/old/train/a.tar")
    '../old/train/a.tar'
    >>> portable_url("s3://bucket/view", "s3://other/old/a.tar")
    's3://other/old/a.tar'
    """
    here, there = storage.absolute_url(out), storage.absolute_url(url)
    parent = posixpath.dirname(here)
    beside = there.startswith(parent + "/") and not parent.endswith(":")  # a bucket is the root
    if beside and storage.is_local(out) == storage.is_local(url):
        return posixpath.relpath(there, here)
    if redacted(there) != there:
        raise ConfigError("url_secret", where=there)
    return there


def _shard_url(plan: ReshardPlan, split: SplitPlan, shard: int) -> str:
    return f"{split.split}/{plan.name(split, shard)}.tar"


def _copy(
    plan: ReshardPlan, job: DividedJob, report: Reporter, require_held: Callable[[], None]
) -> tuple[dict[str, Receipt], int]:
    """Copies what has no receipt; returns all receipts that there are, and how many are new."""
    s = plan.settings
    outputs = {
        plan.name(split, shard): (split, shard)
        for split in plan.splits
        for shard in range(split.num_shards)
    }
    own = job.own_names
    receipts = job.receipts()
    missing = [name for name in own if name not in receipts]
    if len(missing) < len(own):
        report.note(f"{len(own) - len(missing)} of {len(own)} shards are finished")
    require_space(job.out, sum(plan.shard_bytes(*outputs[name]) for name in missing))

    def task(number: int) -> CopyTask:
        split, shard = outputs[missing[number]]
        rows, files = shard_rows(plan, split, shard)
        return CopyTask(
            split=split.split,
            name=missing[number],
            build_key=job.build_keys[split.split],
            rows=rows,
            files=files,
        )

    entries = {url: file for split in plan.splits for url, file in split.files.items()}
    context = CopyContext(
        out=job.out,
        urls=tuple(plan.tables),
        stamps=plan.stamps,
        part=job.part,
        through=s.through,
        sha256=s.sha256,
        source_sha256={url: file.sha256 for url, file in entries.items()},
    )
    report.stage("copy", len(missing))
    with Engine(s) as engine:
        proof = None
        if not engine.is_local:
            proof = node_proof(job.out, job.note_url(plan.splits[0].split))
        for event in engine.run(
            range(len(missing)), work=copy_shard, context=context, given=task, proof=proof
        ):
            require_held()
            if isinstance(event, local.TaskLost):
                report.note(
                    f"a worker died (exit code {event.exit_code}); its shard is copied again"
                )
            elif isinstance(event, local.TaskDone):
                receipts[missing[event.task]] = event.value
                report.step("")
            else:
                report.sent(event.note)
    return (receipts if job.part is None else job.receipts()), len(missing)


def _manifest(
    plan: ReshardPlan,
    shards: Sequence[ShardEntry],
    view: View | None,
    columns: AddedColumns | None,
) -> Manifest:
    first = plan.sources[0].manifest
    versions: dict[str, set[str]] = {}
    for source in plan.sources:
        for name, version in source.manifest.libraries.items():
            versions.setdefault(name, set()).update(version.split(" | "))
    splits = {}
    for split in plan.splits:
        own = [shard for shard in shards if shard.split == split.split]
        splits[split.split] = SplitEntry(
            build_key=plan.build_key(split),
            source=plan.source_of(split),
            num_samples=sum(shard.nsamples for shard in own),
            num_images=sum(shard.num_images for shard in own),
            num_tokens=sum(shard.num_tokens for shard in own),
            num_loss_tokens=sum(shard.num_loss_tokens for shard in own),
            num_bytes=sum(shard.num_bytes for shard in own),
            quarantined=split.quarantined,
        )
    return Manifest(
        dataset=plan.dataset,
        recipe=first.recipe,
        tokenizer=first.tokenizer,
        libraries={name: " | ".join(sorted(found)) for name, found in versions.items()},
        splits=splits,
        shards=tuple(sorted(shards, key=lambda shard: shard.url)),
        view=view,
        raw=plan.raw,
        columns=columns,
    )


def check_sources(plan: ReshardPlan) -> None:
    """Refuses sources whose files are not the versions that were planned with.

    Raises:
      ShardError: `source_changed`.
    """
    with ThreadPoolExecutor(_LOOKS_AT_ONCE) as pool:
        list(pool.map(check_unchanged, *zip(*plan.stamps.items(), strict=True)))


def _publish_columns(plan: ReshardPlan) -> AddedColumns | None:
    """Writes the column files of the new shards; None where the sources have no added columns."""
    if plan.sources[0].manifest.columns is None:
        return None
    return publish_columns(
        plan.settings.out,
        {
            _shard_url(plan, split, shard): split.added[split.shard_numbers(shard)]
            for split in plan.splits
            if split.added is not None
            for shard in range(split.num_shards)
        },
    )


def publish_tokenizer(plan: ReshardPlan, report: Reporter) -> None:
    """Copies the tokenizer of the sources.

    Raises:
      ShardError: `tokenizer_file`.
    """
    if plan.raw:
        return
    try:
        payload = storage.read_bytes(storage.join(plan.sources[0].url, TOKENIZER_NAME))
    except FileNotFoundError:
        report.note("the source has no copy of its tokenizer: its texts cannot be read back")
        return
    entry, got = plan.sources[0].manifest.tokenizer, hashlib.sha256(payload).hexdigest()
    where = storage.join(plan.sources[0].url, TOKENIZER_NAME)
    if got != entry.sha256:
        raise ShardError("tokenizer_file.source", where=where, got=got, want=entry.sha256)
    check_stored_tokenizer(entry, payload, where=where)
    storage.publish_bytes(storage.join(plan.settings.out, TOKENIZER_NAME), payload)


def _finished(plan: ReshardPlan) -> Resharded | None:
    """Finds the result of this very plan; None where the output is still empty.

    Raises:
      ConflictError: `job_conflict`.
    """
    out = plan.settings.out
    manifest = load_manifest(out)
    if manifest is None:
        return None
    require_same_result(
        manifest,
        where=out,
        build_keys={split.split: plan.build_key(split) for split in plan.splits},
        sources={split.split: plan.source_of(split) for split in plan.splits},
    )
    if manifest.view is None:
        for split in manifest.splits:
            sizes = stored_sizes(out, split)
            if not all(is_in_place(shard, sizes) for shard in manifest.select(split)):
                return None
    payload = storage.read_bytes(storage.join(out, MANIFEST_NAME))
    return Resharded(
        manifest=manifest,
        sha256=hashlib.sha256(payload).hexdigest(),
        copied_shards=0,
        fresh=False,
    )
