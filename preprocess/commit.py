"""COMMIT: from the receipts of a split to the manifest, which is written last."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass

from preprocess.job import SMALL_JOB_FAILURES, Job
from preprocess.planner import Plan
from shardspec import storage
from shardspec.errors import BudgetError
from shardspec.manifest import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    Manifest,
    Receipt,
    SplitEntry,
    canonical_json,
    check_same,
    load_manifest,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """A split that the manifest names."""

    manifest: Manifest
    split: SplitEntry
    sha256: str
    """Of manifest.json."""


def check_bad_samples(job: Job, plan: Plan, receipts: list[Receipt]) -> None:
    """Refuses to commit where more samples failed than the job allows.

    Raises:
      BudgetError: `bad_samples`.
    """
    bad: Counter[str] = Counter()
    for receipt in receipts:
        bad.update(receipt.quarantined)
    allowed = max(SMALL_JOB_FAILURES, job.settings.max_bad_samples * plan.num_samples)
    if sum(bad.values()) > allowed:
        raise BudgetError(
            "too many samples cannot be built; nothing was committed",
            reason="bad_samples",
            where=job.url("quarantine"),
            facts={"samples": plan.num_samples, "allowed": int(allowed), **bad},
            fix="look at the quarantine lists; to accept the loss, raise MAX_BAD_SAMPLES=",
        )


def commit(job: Job, plan: Plan, receipts: list[Receipt]) -> Committed:
    """Adds the split to the manifest.

    Raises:
      ConflictError: The output's other splits were made in another way.
    """
    split = job.settings.split
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
    old = load_manifest(job.settings.out)
    manifest = Manifest(
        dataset=job.settings.dataset,
        recipe=json.loads(canonical_json(job.recipe)),
        tokenizer=job.tokenizer,
        libraries=job.libraries,
        splits=dict(old.splits) if old else {},
        shards=old.shards if old else (),
    ).with_split(split, entry, shards)
    if old is not None:
        check_same(old, manifest, where=job.url(MANIFEST_NAME))
    storage.publish_bytes(job.url(TOKENIZER_NAME), job.preparer.tokenizer.json.encode())
    payload = manifest.encode()
    storage.publish_bytes(job.url(MANIFEST_NAME), payload)
    return Committed(manifest=manifest, split=entry, sha256=hashlib.sha256(payload).hexdigest())


def committed(job: Job) -> Committed | None:
    """Finds the split that this job would make, complete and in place; None where it is not."""
    manifest = load_manifest(job.settings.out)
    if manifest is None or job.settings.split not in manifest.splits:
        return None
    for shard in manifest.select(job.settings.split):
        for url, want in ((shard.url, shard.num_bytes), (shard.index_url, shard.index_bytes)):
            if storage.size(job.url(url)) != want:
                return None
    if not tokenizer_in_place(job.settings.out, manifest):
        return None
    payload = storage.read_bytes(job.url(MANIFEST_NAME))
    return Committed(
        manifest=manifest,
        split=manifest.splits[job.settings.split],
        sha256=hashlib.sha256(payload).hexdigest(),
    )


def tokenizer_in_place(url: str, manifest: Manifest) -> bool:
    """Tells whether a dataset's copy of its tokenizer is the one that the manifest names."""
    try:
        payload = storage.read_bytes(storage.join(url, TOKENIZER_NAME))
    except FileNotFoundError:
        return False
    return hashlib.sha256(payload).hexdigest() == manifest.tokenizer.sha256
