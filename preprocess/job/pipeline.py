"""The job: FETCH, PLAN, BUILD, COMMIT, each idempotent, so the same command always resumes.

1. The job's identity (dataset, source, recipe, tokenizer, libraries) is compared with what the
   output holds: equal and committed means there is nothing to do; different is refused, field by
   field.
2. FETCH downloads image URLs into the blob cache; the ledger remembers how each ended.
3. PLAN freezes what will be built: rows with keys, assigned to shards. It is written once and
   reused until commit, so links that die or revive in between change nothing.
4. BUILD makes the shards that have no valid receipt, in worker processes; a finished one is
   published while its worker builds the next.
5. COMMIT adds the split to the manifest, last.

Anything that interrupts leaves the old state or the new one.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from preprocess.job.build import BuildContext, build_shard, find_receipts, publish_shard
from preprocess.job.commit import Committed, check_bad_samples, commit, committed
from preprocess.job.engines import local
from preprocess.job.job import Job, JobSettings, Reporter
from preprocess.job.lease import output_lock
from preprocess.job.plan import shard_borders
from preprocess.job.planner import Plan, drop_plan, load_plan, make_plan, read_json
from shardspec import storage
from shardspec.errors import ConflictError, StorageError
from shardspec.manifest import (
    MANIFEST_NAME,
    Receipt,
    canonical_json,
    check_same,
    differences,
    load_manifest,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a job ended."""

    result: Committed
    built_shards: int
    """Shards built in this run."""
    fresh: bool
    """Whether this run committed; False when there was nothing to do."""
    seconds: float


def run_job(settings: JobSettings, report: Reporter) -> Outcome:
    """Builds a split of a dataset, or resumes an interrupted run.

    Raises:
      ConfigError, SourceError: The request cannot be honoured.
      ConflictError: The output holds something else.
      BudgetError: Too many failures; nothing was committed.
      StorageError: The output cannot be written.
    """
    started = time.monotonic()
    job = Job(settings)
    promised = _check_conflict(job)
    result = committed(job)
    if result is not None:
        if storage.exists(job.url("plan", settings.split)):  # a run ended between commit and here
            with output_lock(settings.out):
                _tidy(job)
        return Outcome(result=result, built_shards=0, fresh=False, seconds=_since(started))
    with output_lock(settings.out) as check_held:
        promised = _check_conflict(job)  # once more: another job may have ended in between
        result, built = _make(job, report, promised, check_held)
    outcome = Outcome(result=result, built_shards=built, fresh=True, seconds=_since(started))
    _write_run(job, outcome)
    return outcome


def _make(
    job: Job, report: Reporter, promised: str | None, check_held: Callable[[], None]
) -> tuple[Committed, int]:
    """Plans, builds and commits what is missing; returns the result and the shards built."""
    storage.delete(job.scratch)
    plan = load_plan(job) or make_plan(job, report, promised=promised)
    try:
        receipts, built = _build(job, plan, report, check_held)
    except StorageError as error:
        if error.reason in ("blob_missing", "blob_corrupt"):
            drop_plan(job)  # so that the same command fetches it again
        raise
    check_bad_samples(job, plan, receipts)
    check_held()
    result = commit(job, plan, receipts)
    _tidy(job)
    return result, built


def _tidy(job: Job) -> None:
    """Removes what only an unfinished job needs."""
    storage.delete(job.scratch)
    if storage.is_local(job.settings.out):
        storage.delete_temporaries(job.settings.out)
    drop_plan(job)  # last: while there is a plan, the next run of the same command tidies up


def _since(started: float) -> float:
    return time.monotonic() - started


def _check_conflict(job: Job) -> str | None:
    """Refuses an output that holds the result of another job.

    Returns:
      The build key of the split that the output names already, or None.
    """
    manifest = load_manifest(job.settings.out)
    if manifest is None:
        return None
    if job.settings.split not in manifest.splits:
        ours = replace(
            manifest,
            dataset=job.name,
            recipe=json.loads(canonical_json(job.recipe)),
            tokenizer=job.tokenizer,
            libraries=job.libraries,
            view=None,
            raw=False,
            columns=None,
        )
        check_same(manifest, ours, where=job.url(MANIFEST_NAME))
        return None
    found = differences(read_json(job.identity_url) or {}, job.identity, "job")
    if found:
        raise ConflictError(
            "job_conflict.result", where=job.settings.out, differences="; ".join(found)
        )
    return manifest.splits[job.settings.split].build_key


def _build(
    job: Job, plan: Plan, report: Reporter, check_held: Callable[[], None]
) -> tuple[list[Receipt], int]:
    """Builds what is missing; returns every receipt in shard order, and how many are new."""
    context = BuildContext(
        preparer=job.preparer,
        dataset=job.name,
        split=job.settings.split,
        out=job.settings.out,
        num_shards=plan.num_shards,
        build_key=plan.build_key,
        blobs=str(job.blobs.root),
        scratch=job.scratch,
        several_images=job.recipe["several_images"],
    )
    receipts = find_receipts(context)
    missing = [shard for shard in range(plan.num_shards) if shard not in receipts]
    if receipts:
        report.note(f"{len(receipts)} of {plan.num_shards} shards are finished")
    borders = shard_borders(plan.num_samples, num_shards=plan.num_shards)
    report.stage("build", int(sum(borders[shard + 1] - borders[shard] for shard in missing)))
    for event in local.run(
        missing, work=_build_task, context=context, num_workers=job.settings.num_workers
    ):
        check_held()
        if isinstance(event, local.TaskLost):
            report.note(f"a worker died (exit code {event.exit_code}); its shard is built again")
        elif isinstance(event, local.TaskDone):
            receipts[event.task] = event.value
        elif isinstance(event.note, int):
            report.sent(event.note)
        else:
            report.step(event.note)
    return [receipts[shard] for shard in range(plan.num_shards)], len(missing)


def _build_task(
    context: BuildContext, shard: int, report: Callable[[str | int], None]
) -> local.Deferred:
    """Builds a shard; the rest is to publish it. Reports a text per row, a number per part sent."""
    built = build_shard(context, shard, report)
    return local.Deferred(finish=partial(publish_shard, context, shard, built, report))


def _write_run(job: Job, outcome: Outcome) -> None:
    """Notes what differs from run to run: for people, read by nothing."""
    run = {
        "finished_unix_s": round(time.time()),
        "seconds": round(outcome.seconds, 3),
        "built_shards": outcome.built_shards,
        "host": platform.node(),
        "python": platform.python_version(),
        "num_workers": job.settings.num_workers,
        "pid": os.getpid(),
        "manifest_sha256": outcome.result.sha256,
    }
    storage.publish_bytes(job.url("run.json"), canonical_json(run, indent=1))
