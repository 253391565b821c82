"""COMMIT: from the receipts of a split to the manifest, which is written last.

The manifest replaces the one that was read, or none: two jobs that commit two splits in the same
moment both end in it. It names no shard that the store does not list at its length.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from preprocess.job.build import is_in_place, stored_sizes
from preprocess.job.conflicts import check_same
from preprocess.job.generation import generation_of
from preprocess.job.job import FAILED_ROWS_SHARE, Job, allowed_failures
from preprocess.job.planner import Plan
from shardspec import storage
from shardspec.errors import BudgetError, ConflictError, StorageError
from shardspec.manifest import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    Manifest,
    Receipt,
    ShardEntry,
    SplitEntry,
    canonical_json,
    load_manifest,
)

COMMIT_ATTEMPTS = 10
"""Attempts at a manifest: another job may have written one in between."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """A split that the manifest names."""

    manifest: Manifest
    split: SplitEntry
    sha256: str
    """Of manifest.json."""


def check_bad_samples(job: Job, plan: Plan, receipts: list[Receipt]) -> None:
    """Refuses to commit where more rows failed to build than the job allows.

    Raises:
      BudgetError: `bad_samples`.
    """
    bad: Counter[str] = Counter()
    for receipt in receipts:
        bad.update(receipt.quarantined)
    share = job.settings.max_bad_samples
    allowed = allowed_failures(share, plan.num_rows, default=FAILED_ROWS_SHARE)
    if sum(n for reason, n in bad.items() if reason not in job.kind.leaves_out) > allowed:
        raise BudgetError(
            "bad_samples",
            where=job.url("quarantine"),
            rows=plan.num_rows,
            allowed=allowed,
            facts=bad,
        )


def commit(job: Job, plan: Plan, receipts: list[Receipt]) -> Committed:
    """Adds the split to the manifest.

    Raises:
      ConflictError: The output's other splits were made in another way; `manifest_conflict`: others
        kept writing the manifest.
      StorageError: `shards_missing`: what the receipts say is not what the store lists.
    """
    shards = tuple(receipt.shard for receipt in receipts)
    quarantined = Counter(plan.quarantined)
    for receipt in receipts:
        quarantined.update(receipt.quarantined)
    entry = SplitEntry(
        build_key=plan.build_key,
        source=plan.source,
        num_samples=sum(shard.nsamples for shard in shards),
        num_images=sum(shard.num_images for shard in shards),
        num_tokens=sum(shard.num_tokens for shard in shards),
        num_loss_tokens=sum(shard.num_loss_tokens for shard in shards),
        num_bytes=sum(shard.num_bytes for shard in shards),
        quarantined=dict(sorted(quarantined.items())),
    )
    _check_in_place(job, shards)
    split = job.settings.split
    storage.publish_bytes(job.url(TOKENIZER_NAME), job.preparer.tokenizer.json.encode())
    url = job.url(MANIFEST_NAME)
    for _ in range(COMMIT_ATTEMPTS):
        version = storage.version(url)
        old = load_manifest(job.settings.out)
        if plan.generation and (old is None or split not in old.splits):
            raise ConflictError("manifest_conflict.overtaken", where=url)
        if old is not None and plan.generation:
            before = old.splits[split]
            if before.build_key == plan.build_key:  # by another part of the job
                sha256 = hashlib.sha256(old.encode()).hexdigest()
                return Committed(manifest=old, split=before, sha256=sha256)
            if before.build_key != plan.parent:
                raise ConflictError("manifest_conflict.overtaken", where=url)
            manifest = _with_split(
                job,
                old,
                _appended(before, entry, num_shards=(len(old.select(split)), len(shards))),
                (*old.select(split), *shards),
            )
        else:
            manifest = _with_split(job, old, entry, shards)
        payload = manifest.encode()
        if storage.compare_and_swap(url, payload, replacing=version):
            sha256 = hashlib.sha256(payload).hexdigest()
            return Committed(manifest=manifest, split=manifest.splits[split], sha256=sha256)
    raise ConflictError("manifest_conflict.busy", where=url, attempts=COMMIT_ATTEMPTS)


def withdraw_split(job: Job) -> None:
    """Takes the split out of the manifest, then removes its receipts; the shards stay as strays.

    Raises:
      ConflictError: `manifest_conflict`: others kept writing the manifest.
    """
    url, split = job.url(MANIFEST_NAME), job.settings.split
    for _ in range(COMMIT_ATTEMPTS):
        version = storage.version(url)
        old = load_manifest(job.settings.out)
        if old is None or split not in old.splits:
            return
        names = [posixpath.basename(shard.url).removesuffix(".tar") for shard in old.select(split)]
        splits = {name: entry for name, entry in old.splits.items() if name != split}
        if not splits:
            storage.delete(url)
        else:
            shards = tuple(shard for shard in old.shards if shard.split != split)
            left = replace(old, splits=splits, shards=shards)
            if not storage.compare_and_swap(url, left.encode(), replacing=version):
                continue
        storage.delete_objects(job.settings.out, [f"receipts/{name}.json" for name in names])
        return
    raise ConflictError("manifest_conflict.busy", where=url, attempts=COMMIT_ATTEMPTS)


def _check_in_place(job: Job, shards: tuple[ShardEntry, ...]) -> None:
    sizes = stored_sizes(job.settings.out, job.settings.split)
    missing = [shard.url for shard in shards if not is_in_place(shard, sizes)]
    if missing:
        raise StorageError(
            "shards_missing", where=job.url(missing[0]), shards=len(missing), of=len(shards)
        )


def _appended(before: SplitEntry, new: SplitEntry, *, num_shards: tuple[int, int]) -> SplitEntry:
    """Makes the entry of a split that has got a generation.

    Args:
      before: Its entry until now.
      new: Of the new shards alone, but for what their plan has added up: source and quarantine.
      num_shards: Of both.
    """
    sums = ("num_samples", "num_images", "num_tokens", "num_loss_tokens", "num_bytes")
    listed = before.source.get("generations") or [_generation(before, num_shards[0])]
    return replace(
        new,
        source={**new.source, "generations": [*listed, _generation(new, num_shards[1])]},
        **{name: getattr(before, name) + getattr(new, name) for name in sums},
    )


def _generation(entry: SplitEntry, num_shards: int) -> dict[str, Any]:
    """Describes the generation that an entry is of, before another is added."""
    return {
        "build_key": entry.build_key,
        "rows_sha256": entry.source["rows_sha256"],
        "num_samples": entry.num_samples,
        "num_shards": num_shards,
    }


def _with_split(
    job: Job, old: Manifest | None, entry: SplitEntry, shards: tuple[ShardEntry, ...]
) -> Manifest:
    """Makes the manifest that names what the stored one names, and the split."""
    manifest = Manifest(
        dataset=job.name,
        recipe=json.loads(canonical_json(job.recipe)),
        tokenizer=job.tokenizer,
        libraries=job.libraries,
        splits=dict(old.splits) if old else {},
        shards=old.shards if old else (),
    ).with_split(job.settings.split, entry, shards)
    if old is not None:
        named = job.settings.name is not None
        check_same(old, manifest, where=job.url(MANIFEST_NAME), named=named)
    return manifest


def committed(job: Job) -> Committed | None:
    """Finds the split that this job would make, if it is complete; else None.

    Raises:
      StorageError: `generation_damaged`: shards of a split of several generations are missing.
    """
    manifest = load_manifest(job.settings.out)
    split = job.settings.split
    if manifest is None or split not in manifest.splits:
        return None
    entry = manifest.splits[split]
    if job.growth is not None and entry.build_key == job.growth.before.build_key:
        return None
    sizes = stored_sizes(job.settings.out, split)
    missing = [each.url for each in manifest.select(split) if not is_in_place(each, sizes)]
    if missing and generation_of(entry):
        raise StorageError("generation_damaged", where=job.url(missing[0]), missing=len(missing))
    if missing:
        return None
    if not tokenizer_in_place(job.settings.out, manifest):
        return None
    payload = storage.read_bytes(job.url(MANIFEST_NAME))
    return Committed(
        manifest=manifest,
        split=entry,
        sha256=hashlib.sha256(payload).hexdigest(),
    )


def tokenizer_in_place(url: str, manifest: Manifest) -> bool:
    """Returns True if a dataset's copy of its tokenizer is the one that the manifest names."""
    try:
        payload = storage.read_bytes(storage.join(url, TOKENIZER_NAME))
    except FileNotFoundError:
        return False
    return hashlib.sha256(payload).hexdigest() == manifest.tokenizer.sha256
