"""The verbs that look after a dataset: verify, status, report and gc."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from preprocess.cli.options import add_settings, read_settings
from preprocess.cli.unused import VERIFY_NEEDS, require_used
from preprocess.cli.verbs import Console, Verb
from preprocess.job import (
    Engine,
    EngineOption,
    PartOption,
    RayAddressOption,
    State,
    find_strays,
    output_lock,
    read_status,
    remove_strays,
    status_text,
    verify,
)
from preprocess.report import ReportSettings, make_report
from preprocess.settings import Setting, usable_cores
from preprocess.sizes import age_text, parse_age_s, size_text
from shardspec import storage
from shardspec.errors import redacted
from shardspec.messages import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifySettings:
    """What to compare."""

    out: Annotated[str, Setting("folder or URL of the dataset", positional=True)]
    deep: Annotated[bool, Setting("decode every image as well")] = False
    num_workers: Annotated[
        int,
        Setting(
            "number of processes, for datasets that are worth it",
            flag="workers",
            group="the job",
            shown="all cores",
            unset=usable_cores,
        ),
    ] = 1
    engine: EngineOption = "local"
    ray_address: RayAddressOption = ""
    part: PartOption = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GcSettings:
    """What to remove."""

    out: Annotated[str, Setting("folder or URL of the dataset", positional=True)]
    dry_run: Annotated[bool, Setting("only list what would be removed")] = False
    older_than: Annotated[
        float | None,
        Setting(
            "keep what is younger: 90s, 30m, 24h, 7d",
            metavar="AGE",
            parse=parse_age_s,
        ),
    ] = None
    """Seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusSettings:
    """What to look at."""

    out: Annotated[str, Setting("folder or URL of the output", positional=True)]


STATUS_CODES: Mapping[State, int] = {"complete": 0, "working": 5, "stopped": 6}
"""Exit codes of `status`."""


def _status(options: argparse.Namespace, console: Console) -> int:
    settings = read_settings(StatusSettings, options)
    found = read_status(settings.out)
    lines = status_text(found, duration=age_text)
    console.show("\n".join([f"{redacted(settings.out)}: {found.state}", *lines]))
    return STATUS_CODES[found.state]


def _verify(options: argparse.Namespace, console: Console) -> int:
    settings = read_settings(VerifySettings, options)
    require_used(VERIFY_NEEDS, (settings,))
    with Engine(settings) as engine:
        findings = verify(
            settings.out, console, deep=settings.deep, part=settings.part, engine=engine
        )
    for error in findings:
        console.fail(error)
    if findings:
        return findings[0].exit_code
    whose = "" if settings.part is None else f" of part {settings.part}"
    console.show(f"{redacted(settings.out)}: every shard{whose} matches the manifest")
    return 0


def _report(options: argparse.Namespace, console: Console) -> int:
    written = make_report(read_settings(ReportSettings, options), console)
    console.show(redacted(written))
    return 0


def _gc(options: argparse.Namespace, console: Console) -> int:
    settings = read_settings(GcSettings, options)
    out = settings.out
    before = None if settings.older_than is None else time.time() - settings.older_than
    if not storage.exists(out):
        find_strays(out)  # raises; taking the lock would create the output
    with output_lock(out):
        strays = find_strays(out, written_before_unix_s=before)
        listed = [f"{size_text(each.num_bytes):>10}  {each.name}" for each in strays.objects]
        listed += [f"{'upload':>10}  {upload.name}" for upload in strays.uploads]
        if listed:
            console.show("\n".join(listed))
        if not settings.dry_run:
            remove_strays(out, strays)
    removed, aborted = ("would remove", "abort") if settings.dry_run else ("removed", "aborted")
    console.show(
        f"{redacted(out)}: {removed} {counted(len(strays.objects), 'object')} "
        f"({size_text(strays.num_bytes)}), {aborted} "
        f"{counted(len(strays.uploads), 'unfinished upload')}"
    )
    if out.startswith("gs://"):
        console.show("unfinished uploads to Google Cloud Storage expire after a week")
    return 0


VERBS = (
    Verb(
        name="verify",
        help="compare every stored byte with the manifest",
        add=lambda parser: add_settings(parser, VerifySettings, verb="verify", groups=("the job",)),
        run=_verify,
    ),
    Verb(
        name="status",
        help="show how far a job is, part by part, and which parts are to be started",
        add=lambda parser: add_settings(parser, StatusSettings),
        run=_status,
    ),
    Verb(
        name="report",
        help="write report.html: numbers, charts and samples of a dataset, to look at",
        add=lambda parser: add_settings(parser, ReportSettings),
        run=_report,
    ),
    Verb(
        name="gc",
        help="remove files that interrupted jobs have left",
        add=lambda parser: add_settings(parser, GcSettings),
        run=_gc,
    ),
)
