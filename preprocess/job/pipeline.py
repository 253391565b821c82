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
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from preprocess.job.board import Board, ShardEvent
from preprocess.job.build import (
    BuildContext,
    BuiltShard,
    build_shard,
    find_receipts,
    publish_shard,
)
from preprocess.job.commit import (
    Committed,
    check_bad_samples,
    commit,
    committed,
    withdraw_split,
)
from preprocess.job.conflicts import check_same, find_differences, table
from preprocess.job.engines import local
from preprocess.job.engines.engine import Engine, node_proof
from preprocess.job.events import EventLog
from preprocess.job.generation import generation_of
from preprocess.job.grown import find_growth, require_same_files
from preprocess.job.job import Job, JobSettings, Reporter
from preprocess.job.lease import output_lock, tidy_up
from preprocess.job.parts import forget_parts
from preprocess.job.plan import Part, shard_borders
from preprocess.job.planner import Plan, drop_plan, load_plan, make_plan, plan_url, read_json
from preprocess.job.stamps import Compared
from preprocess.job.verify import check_hashes
from shardspec import storage
from shardspec.errors import ConflictError, ShardError, StorageError
from shardspec.manifest import (
    MANIFEST_NAME,
    Manifest,
    Receipt,
    canonical_json,
    load_manifest,
)

_HASHED_AT_ONCE = 4

_SHARD_EVENTS: Mapping[type, ShardEvent] = {
    local.TaskProgress: "progress",
    local.TaskLost: "lost",
    local.TaskDone: "done",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a job ended."""

    result: Committed
    built_shards: int
    """Shards built in this run."""
    fresh: bool
    """Whether this run committed; False when there was nothing to do."""
    seconds: float
    compared: Compared | None = None
    """How the source's files were compared with those of the finished job; None where not."""


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
    result = None
    if not settings.force:
        check_conflict(job)
        result = committed(job)
    compared = check_sources(job, result, report) if result else None
    if result is not None and job.growth is None:
        tidy_finished(job)
        return Outcome(
            result=result,
            built_shards=0,
            fresh=False,
            seconds=_since(started),
            compared=compared,
        )
    storage.prove_folder(settings.out, machines=False)
    board = make_board(job, report)
    with (
        telling_end(board),
        output_lock(settings.out, state=board.snapshot) as check_held,
    ):
        if settings.force:
            _withdraw(job, board)
        promised = check_conflict(job)  # once more: another job may have ended in between
        result, built = _make(job, board, promised, check_held)
        outcome = Outcome(result=result, built_shards=built, fresh=True, seconds=_since(started))
        write_run(job, outcome)
        tidy(job)
    return outcome


def commit_job(settings: JobSettings, report: Reporter) -> Outcome:
    """Commits a job whose shards are all built; builds nothing.

    Raises:
      ConflictError: The output holds something else.
      StorageError: `commit_unfinished`: shards are missing; `output_busy`: parts are at work.
    """
    started = time.monotonic()
    job = Job(settings)
    check_conflict(job)
    result = committed(job)
    if result is not None and settings.new_rows == "append":
        check_sources(job, result, report)
    if result is not None and job.growth is None:
        return Outcome(result=result, built_shards=0, fresh=False, seconds=_since(started))
    with output_lock(settings.out) as check_held:
        plan = load_plan(job, report)
        if plan is None:
            raise StorageError("commit_unfinished.plan", where=settings.out)
        context = build_context(job, plan)
        receipts = find_receipts(context)
        missing = [shard for shard in range(plan.num_shards) if shard not in receipts]
        if missing:
            raise StorageError(
                "commit_unfinished.shards",
                where=settings.out,
                missing=len(missing),
                of=plan.num_shards,
                first=context.name(missing[0]),
            )
        ordered = [receipts[shard] for shard in range(plan.num_shards)]
        check_bad_samples(job, plan, ordered)
        check_held()
        result = commit(job, plan, ordered)
        outcome = Outcome(result=result, built_shards=0, fresh=True, seconds=_since(started))
        write_run(job, outcome)
        tidy(job)
    return outcome


def _make(
    job: Job, board: Board, promised: str | None, check_held: Callable[[], None]
) -> tuple[Committed, int]:
    """Plans, builds and commits what is missing; returns the result and the shards built."""
    storage.delete(job.scratch)
    with Engine(job.settings) as engine:
        plan = load_plan(job, board) or make_plan(
            job, board, promised=promised, cache_token=cache_token(job), engine=engine
        )
        try:
            receipts, built = build_missing(
                job, plan, board, check_held, engine=engine, on_shard=board.shard
            )
        except StorageError as error:
            if error.reason in ("blob_missing", "blob_corrupt"):
                drop_plan(job)  # so that the same command fetches it again
            raise
    check_bad_samples(job, plan, receipts)
    check_held()
    result = commit(job, plan, receipts)
    board.committed(result.sha256)
    return result, built


def make_board(job: Job, report: Reporter) -> Board:
    """Makes what watches a job, in front of a reporter."""
    settings = job.settings
    events = EventLog(settings.events)
    part = None if settings.part is None else str(settings.part)
    events.write("start", dataset=job.name, split=settings.split, part=part, pid=os.getpid())
    return Board(report, events=events, stall_s=settings.stall_s)


@contextmanager
def telling_end(board: Board) -> Iterator[None]:
    """Tells how the block ends."""
    outcome = "interrupted"
    try:
        yield
        outcome = "done"
    except Exception as error:
        outcome = f"failed: {getattr(error, 'reason', type(error).__name__)}"
        raise
    finally:
        board.end(outcome)


def cache_token(job: Job) -> str:
    """Names a mark in the image cache, by which other machines tell that they see the same."""
    return f"{job.key[:16]}-{uuid.uuid4().hex}"


def tidy_finished(job: Job) -> None:
    """Removes what a run has left that ended between its commit and its end."""
    is_left = storage.exists(job.url("plan", job.settings.split))
    tidy_up(job.settings.out, lambda: tidy(job), is_left=is_left)


def tidy(job: Job) -> None:
    """Removes what only an unfinished job needs; other parts may be about to do the same."""
    storage.delete(job.scratch_of_all)
    if storage.is_local(job.settings.out):
        storage.delete_temporaries(job.settings.out)
    job.blobs.remove_tokens(job.key[:16])
    forget_parts(job.settings.out, job.key)
    drop_plan(job)  # last: while there is a plan, the next run of the same command tidies up


def _since(started: float) -> float:
    return time.monotonic() - started


def check_conflict(job: Job) -> str | None:
    """Refuses an output that holds the result of another job.

    Returns:
      The build key of the split that the output names already, and that is to be repaired, or None.
    """
    manifest = load_manifest(job.settings.out)
    if manifest is None:
        return None
    if job.settings.split not in manifest.splits:
        _check_recipe(job, manifest)
        return None
    found = find_differences(read_json(job.identity_url) or {}, json.loads(_identity(job)))
    if found:
        raise ConflictError("job_conflict.settings", where=job.settings.out, table=table(found))
    build_key = manifest.splits[job.settings.split].build_key
    if job.growth is None:
        return build_key
    if job.growth.before.build_key != build_key:
        raise ConflictError("manifest_conflict.overtaken", where=job.url(MANIFEST_NAME))
    return None


def _identity(job: Job) -> bytes:
    return canonical_json(job.identity)


def _check_recipe(job: Job, manifest: Manifest) -> None:
    """Refuses to put splits of different recipes into one dataset."""
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
    named = job.settings.name is not None
    check_same(manifest, ours, where=job.url(MANIFEST_NAME), named=named)


def check_sources(job: Job, result: Committed, report: Reporter) -> Compared | None:
    """Refuses a finished split whose source has changed since it was planned.

    Where new rows may be appended, and there are some, the job's `growth` says so afterwards.

    Raises:
      ConflictError: `source_changed`.
    """
    s = job.settings
    if s.new_rows == "append" and s.source != "sample":
        return find_growth(job, result.split, report)
    compared = job.compare_files(generation_of(result.split))
    require_same_files(job, compared)
    return compared


def _withdraw(job: Job, report: Reporter) -> None:
    """Takes the split out of the output, so that it is built again.

    The manifest goes first: an interruption leaves a dataset without the split, never one whose
    shards are of two builds. Other splits stay, so the recipe must be theirs.
    """
    manifest = load_manifest(job.settings.out)
    split = job.settings.split
    if manifest is None or split not in manifest.splits:
        return
    identity = read_json(job.identity_url)
    if identity is None or (identity.get("name") or identity.get("dataset")) != job.name:
        return  # a reshard or an import: the comparison refuses it
    if len(manifest.splits) > 1:
        _check_recipe(job, manifest)
    withdraw_split(job)
    drop_plan(job)
    report.note(f"split {split}: the result in the output is replaced")


def build_context(job: Job, plan: Plan) -> BuildContext:
    """Makes what every task of a plan shares."""
    return BuildContext(
        preparer=job.preparer,
        dataset=job.name,
        split=job.settings.split,
        out=job.settings.out,
        num_shards=plan.num_shards,
        generation=plan.generation,
        build_key=plan.build_key,
        blobs=job.blobs.url,
        scratch=job.scratch,
        several_images=job.recipe["several_images"],
        grouped=bool(plan.borders),
    )


def build_missing(
    job: Job,
    plan: Plan,
    report: Reporter,
    check_held: Callable[[], None],
    *,
    engine: Engine,
    part: Part | None = None,
    on_shard: Callable[[int, ShardEvent], None] = lambda shard, what: None,  # noqa: ARG005
) -> tuple[list[Receipt], int]:
    """Builds what is missing.

    Args:
      job: The job.
      plan: What to build.
      report: Gets the progress.
      check_held: Raises where another job may have taken the output.
      engine: Where.
      part: Whose shards are built; None for all.
      on_shard: Called with what happens to each shard.

    Returns:
      The receipts in shard order, and how many are new.
    """
    context = build_context(job, plan)
    wanted = range(plan.num_shards) if part is None else part.shards(plan.num_shards)
    receipts = _intact(context, find_receipts(context, wanted), report)
    missing = [shard for shard in wanted if shard not in receipts]
    if receipts:
        report.note(f"{len(receipts)} of {len(wanted)} shards are finished")
    borders = plan.borders or shard_borders(plan.num_samples, num_shards=plan.num_shards)
    report.stage("build", int(sum(borders[shard + 1] - borders[shard] for shard in missing)))
    proof = None
    if missing and not engine.is_local:
        proof = node_proof(
            job.settings.out,
            plan_url(job),
            dataset=job.settings.dataset,
            cache=job.blobs.url,
            cache_token=plan.cache_token,
        )
    for event in engine.run(missing, work=_build_task, context=context, proof=proof):
        check_held()
        on_shard(event.task, _SHARD_EVENTS[type(event)])
        if isinstance(event, local.TaskLost):
            report.note(f"a worker died (exit code {event.exit_code}); its shard is built again")
        elif isinstance(event, local.TaskDone):
            receipts[event.task] = event.value
        elif isinstance(event.note, int):
            report.sent(event.note)
        else:
            report.step(event.note)
    return [receipts[shard] for shard in wanted], len(missing)


def _intact(
    context: BuildContext, receipts: dict[int, Receipt], report: Reporter
) -> dict[int, Receipt]:
    """Drops the receipts of shards whose bytes are not those that were written.

    Every finished shard is read once: a commit must not name bytes that changed in between.
    """
    if not receipts:
        return receipts

    def damage(receipt: Receipt) -> ShardError | None:
        try:
            check_hashes(context.out, receipt.shard.file)
        except ShardError as error:
            return error
        return None

    report.stage("check finished shards", len(receipts))
    intact = {}
    with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
        found = zip(receipts.items(), pool.map(damage, receipts.values()), strict=True)
        for (shard, receipt), error in found:
            report.step("" if error is None else error.reason)
            if error is None:
                intact[shard] = receipt
            else:
                report.note(f"{error.where}: {error.what}; it is built again")
    return intact


def _build_task(
    context: BuildContext, shard: int, report: Callable[[str | int], None]
) -> local.Deferred:
    """Builds a shard; the rest is to publish it. Reports a text per row, a number per part sent."""
    with _naming_removal():
        built = build_shard(context, shard, report)
    return local.Deferred(finish=partial(_publish_task, context, shard, built, report))


def _publish_task(
    context: BuildContext, shard: int, built: BuiltShard, report: Callable[[str | int], None]
) -> Receipt:
    with _naming_removal():
        return publish_shard(context, shard, built, report)


@contextmanager
def _naming_removal() -> Iterator[None]:
    """Names a file that a task of this job needs and that somebody has removed.

    Images that are missing are errors of their rows, and blobs of the cache: what is left are the
    plan and the scratch files.
    """
    try:
        yield
    except FileNotFoundError as error:
        where = str(error.filename or error)
        raise StorageError("output_removed", where=where) from error


def write_run(job: Job, outcome: Outcome) -> None:
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
