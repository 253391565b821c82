"""RETRY: requests again what failed for a reason that may have passed, and builds with what came.

Shards follow from all rows of a split, so a row that is added moves others: what was planned or
built is replaced. Where nothing came, it stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from preprocess.fetch import FetchResult, read_ledger
from preprocess.job.commit import committed
from preprocess.job.engines.engine import Engine
from preprocess.job.fetching import fetch_images
from preprocess.job.job import Job, JobSettings, Reporter
from preprocess.job.lease import output_lock
from preprocess.job.pipeline import Outcome, cache_token, check_conflict, run_job
from preprocess.job.planner import drop_plan, image_urls
from shardspec.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Retried:
    """What came of it."""

    failed: int
    """Images that were missing."""
    recovered: int
    """Those that are there now."""
    outcome: Outcome | None
    """How the job ended; None where no image came."""


def retry_job(settings: JobSettings, report: Reporter) -> Retried:
    """Downloads what an earlier run could not, and builds the split again if something came.

    Raises:
      ConfigError: `part_force`: parts build from one plan.
      What `run_job` raises.
    """
    if settings.part is not None:
        raise ConfigError("part_force", part=str(settings.part))
    job = Job(settings)
    check_conflict(job)
    with output_lock(settings.out):
        urls = image_urls(job, report, folder=job.scratch)
        try:
            known: Mapping[str, FetchResult] = read_ledger(job.ledger_path())
        except FileNotFoundError:
            known = {}
        was_there = bytearray(_is_there(known, url) for url in urls)
        del known  # while FETCH runs, its ledger is in memory too
        with Engine(settings) as engine:
            results = fetch_images(
                job, urls, report, again=True, engine=engine, cache_token=cache_token(job)
            )
        failed = was_there.count(0)
        before = zip(was_there, urls, strict=True)
        came = sum(not was and _is_there(results, url) for was, url in before)
        if came:
            drop_plan(job)
    outcome = None
    if came:
        outcome = run_job(replace(settings, force=committed(job) is not None), report)
    return Retried(failed=failed, recovered=came, outcome=outcome)


def _is_there(results: Mapping[str, FetchResult], url: str) -> bool:
    result = results.get(url)
    return result is not None and result.status == "ok"
