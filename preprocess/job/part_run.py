"""One part of a job: its share of FETCH and BUILD, and COMMIT if it is the last.

1. It joins the job (`preprocess.job.parts`).
2. Where there is no plan, it downloads the images of its hosts and hands in the results. Once all
   parts have, one of them plans; the others wait for the plan.
3. It checks that it sees the image cache of the part that has planned, if samples need that.
4. It builds its shards: every `count`-th, from its number on.
5. If the shards of all parts are there, it commits. Two that commit at once write the same bytes.

A plan is frozen, as it is for a job on one machine, so the bytes are the same too. A part never
does the work of another: run the same PART anywhere else, and it resumes there.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from preprocess.fetch import FetchResult, FetchResults, UrlSpool, host_key, unique_urls
from preprocess.job.board import Board
from preprocess.job.build import find_receipts
from preprocess.job.commit import Committed, check_bad_samples, commit, committed
from preprocess.job.engines.engine import Engine
from preprocess.job.fetching import fetch_images
from preprocess.job.generation import RowMarks
from preprocess.job.job import Job, JobSettings, Reporter
from preprocess.job.parts import (
    HeldPart,
    PartOfJob,
    forget_parts,
    join_job,
    require_shared,
)
from preprocess.job.pipeline import (
    Outcome,
    build_context,
    build_missing,
    cache_token,
    check_conflict,
    check_sources,
    make_board,
    telling_end,
    tidy,
    tidy_finished,
    write_run,
)
from preprocess.job.plan import Part
from preprocess.job.planner import (
    Plan,
    image_urls,
    load_plan,
    make_plan,
    plan_url,
)
from shardspec import storage
from shardspec.errors import BudgetError, ConflictError, StorageError
from shardspec.manifest import MANIFEST_NAME, Receipt, canonical_json

POLL_S = 1.0
"""Between two looks at what other parts have done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartOutcome:
    """How a part ended."""

    part: Part
    built_shards: int
    """Shards built in this run."""
    num_shards: int
    """Shards of this part."""
    missing_shards: int
    """Shards of other parts that are not built yet."""
    result: Committed | None
    """The finished dataset; None where shards of other parts are missing."""
    fresh: bool
    """Whether this run committed."""


def run_part(settings: JobSettings, report: Reporter) -> PartOutcome:
    """Builds a part of a split, or resumes it.

    Raises:
      ConfigError, SourceError: The request cannot be honoured.
      ConflictError: The output holds something else, or parts of another job are at work.
      BudgetError: Too many failures; nothing was committed.
      StorageError: `own_disk`: other machines do not see the output; `part_busy`: another process
        has this part; `parts_missing`: the downloads of other parts are; `cache_not_shared`; the
        output cannot be written.
    """
    started = time.monotonic()
    job, part = Job(settings), settings.part
    assert part is not None
    check_conflict(job)
    result = committed(job)
    if result is not None:
        check_sources(job, result, report)
    if result is not None and job.growth is None:
        tidy_finished(job)
        return _finished(part, result)
    require_shared(settings.out, part, settings.own_disk)
    board = make_board(job, report)
    me = PartOfJob(
        part=part,
        job=job.key,
        title=f"{job.name}, split {settings.split}",
        identity=json.loads(canonical_json(job.identity)),
        dataset=job.name,
        split=settings.split,
    )
    try:
        with telling_end(board), join_job(settings.out, me, state=board.snapshot) as held:
            outcome = _work(job, part, held, board)
    except (StorageError, FileNotFoundError) as error:
        # The part that committed has removed what the others hold, or are about to look for; or
        # one that came later is tidying up.
        gone = ("lease_lost", "output_removed", "cache_not_shared", "output_busy")
        is_gone = isinstance(error, FileNotFoundError) or error.reason in gone
        result = committed(job) if is_gone else None
        if result is None:
            raise
        outcome = _finished(part, result)
    if outcome.result is not None:
        forget_parts(settings.out, job.key)  # once more: this one may have joined meanwhile
    if outcome.fresh and outcome.result is not None:
        done = Outcome(
            result=outcome.result,
            built_shards=outcome.built_shards,
            fresh=True,
            seconds=time.monotonic() - started,
        )
        write_run(job, done)
    return outcome


def _finished(part: Part, result: Committed) -> PartOutcome:
    return PartOutcome(
        part=part, built_shards=0, num_shards=0, missing_shards=0, result=result, fresh=False
    )


def _work(job: Job, part: Part, held: HeldPart, board: Board) -> PartOutcome:
    storage.delete(job.scratch)
    with Engine(job.settings) as engine:
        return _work_on(job, part, held, board, engine)


def _work_on(job: Job, part: Part, held: HeldPart, board: Board, engine: Engine) -> PartOutcome:
    plan = _agree_on_plan(job, held, board, engine)
    if plan is None:
        result = committed(job)
        assert result is not None
        return _finished(part, result)
    if plan.cache_token and not job.blobs.has_token(plan.cache_token):
        raise StorageError("cache_not_shared.part", where=job.blobs.url, part=str(part))
    _, built = build_missing(
        job, plan, board, held.check, engine=engine, part=part, on_shard=board.shard
    )
    storage.delete(job.scratch)
    storage.delete_if_empty(job.scratch_of_all)
    mine = len(part.shards(plan.num_shards))
    receipts = _all_receipts(job, plan)
    if isinstance(receipts, int):
        return PartOutcome(
            part=part,
            built_shards=built,
            num_shards=mine,
            missing_shards=receipts,
            result=None,
            fresh=False,
        )
    check_bad_samples(job, plan, receipts)
    result = committed(job)
    fresh = result is None
    if result is None:
        held.check()
        result = commit(job, plan, receipts)
        board.committed(result.sha256)
    tidy(job)
    return PartOutcome(
        part=part,
        built_shards=built,
        num_shards=mine,
        missing_shards=0,
        result=result,
        fresh=fresh,
    )


def _agree_on_plan(job: Job, held: HeldPart, board: Board, engine: Engine) -> Plan | None:
    """Gives the frozen plan, which this part or another has made; None if the job has ended."""
    urls: UrlSpool | None = None
    marks = job.row_marks()
    waited_s: float | None = None
    named: list[int] = []
    for turn in itertools.count():
        held.check()
        plan = load_plan(job, board, shared=True)
        if plan is not None:
            return plan
        if committed(job) is not None:
            return None
        if urls is None:
            urls = image_urls(job, board, marks, folder=job.scratch)
            if urls:
                _fetch_share(job, urls, held, board, engine)
        missing = held.not_fetched() if urls else []
        if not missing:
            if not _try_to_plan(job, urls, marks, held, board):
                _pause(turn)
            continue
        board.waits("wait for downloads")
        texts = ", ".join(f"{index}/{held.me.part.count}" for index in missing)
        if missing != named:
            named = missing
            board.note(f"waiting for the downloads of parts {texts}")
        if any(held.life(index) in ("alive", "unknown") for index in missing):
            waited_s = None
        elif waited_s is None:
            waited_s = time.monotonic()
        elif time.monotonic() - waited_s >= job.settings.part_wait_s:
            raise StorageError(
                "parts_missing",
                where=job.settings.out,
                missing=texts,
                part=str(held.me.part),
            )
        _pause(turn)
    raise AssertionError


def _pause(turn: int) -> None:
    """Waits, longer with each turn: hundreds of parts may wait for one."""
    threading.Event().wait(POLL_S * min(1 + turn / 10, 5))


def _fetch_share(job: Job, urls: UrlSpool, held: HeldPart, board: Board, engine: Engine) -> None:
    """Downloads the images of this part's hosts, and hands in how that ended."""
    part = held.me.part
    mine = unique_urls((url for url in urls if part.has_host(host_key(url))), job.scratch)
    again = check_conflict(job) is None
    token = cache_token(job)
    results = fetch_images(job, mine, board, again=again, engine=engine, cache_token=token)
    held.check()
    held.publish_fetched(results, job.scratch)


def _try_to_plan(job: Job, urls: UrlSpool, marks: RowMarks, held: HeldPart, board: Board) -> bool:
    """Makes the plan; False: another part is about to."""
    try:
        with held.claim_plan() as check_claim:
            for url in (plan_url(job), job.url(MANIFEST_NAME)):
                storage.exists(url, fresh=True)  # what was missing before the claim may be there
            if load_plan(job, board, shared=True) is not None or committed(job) is not None:
                return True

            def check() -> None:
                held.check()
                check_claim()

            try:
                make_plan(
                    job,
                    board,
                    promised=check_conflict(job),
                    fetched=_fetched(job, urls, held) if urls else {},
                    marks=marks,
                    cache_token=cache_token(job),
                    check_held=check,
                )
            except BudgetError:
                held.forget_fetched()  # the next try may download some of it
                raise
    except StorageError as error:
        if error.reason != "part_busy":
            raise
        board.waits("wait for the plan")
        return False
    return True


def _fetched(job: Job, urls: UrlSpool, held: HeldPart) -> Mapping[str, FetchResult]:
    try:
        results = held.read_fetched(job.scratch)
    except FileNotFoundError:  # a part has downloaded again
        held.forget_fetched()
        results = held.read_fetched(job.scratch)
    for url in urls:
        if url not in results:
            held.forget_fetched()
            raise ConflictError("source_changed.urls", where=job.settings.source, url=url)
    return FetchResults(urls, results)


def _all_receipts(job: Job, plan: Plan) -> list[Receipt] | int:
    """Gives the receipts of all shards in order, or how many are missing."""
    context = build_context(job, plan)
    wanted = {f"{context.name(shard)}.json" for shard in range(plan.num_shards)}
    missing = len(wanted - set(storage.list_names(job.url("receipts"), fresh=True)))
    if missing:
        return missing
    receipts = find_receipts(context)
    if len(receipts) < plan.num_shards:
        return plan.num_shards - len(receipts)
    return [receipts[shard] for shard in range(plan.num_shards)]
