"""STATUS: how far a job in an output is, from any machine; writes nothing.

Finished shards are counted by their receipts, so that is right whatever has died. What a part does
at the moment is in its lease (`preprocess.job.board`). Whether a part of another machine is alive
shows when its lease changes, which takes up to `BEAT_S`; one that does not change for `TTL_S` is
dead.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from preprocess.job.lease import (
    LEASE_NAME,
    Life,
    Watch,
    part_name,
    parts_folder,
    read_lease,
)
from preprocess.job.plan import Part, shard_name
from preprocess.job.planner import read_json
from shardspec import storage
from shardspec.errors import ManifestError
from shardspec.manifest import MANIFEST_NAME, load_manifest
from shardspec.messages import counted

STILL_S = 300.0
"""Seconds without progress from which on they are shown; a lease is 15 s old at most."""

LOOK_S = 1.0
"""Between two looks at the leases of other machines."""

State = Literal["complete", "working", "stopped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartStatus:
    """One part of a job."""

    part: Part
    life: Life
    """"absent": never started."""
    ended: str
    """How it has ended; "" where it has not."""
    host: str
    stage: str
    rate: float | None
    """Steps of its stage in a second."""
    left_s: float | None
    """Estimate for its stage."""
    failed: Mapping[str, int]
    shards_done: int
    num_shards: int | None
    """Shards of this part; None before there is a plan."""
    slowest: tuple[tuple[int, float], ...]
    """Shards and the seconds that they took."""
    still_s: float
    """How long nothing has happened."""

    @property
    def needs_start(self) -> bool:
        """Whether nobody does its work: it was never started, or ended or died before its end."""
        done = self.num_shards is not None and self.shards_done >= self.num_shards
        return self.life in ("absent", "dead", "ended") and not done


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """A job of an output that is not committed."""

    title: str
    num_shards: int | None
    """None before there is a plan."""
    shards_done: int
    holder: str
    """Where it runs, if it is one process without parts; "" otherwise."""
    holder_life: Life
    parts: tuple[PartStatus, ...]
    single: PartStatus | None = None
    """What that one process does."""

    @property
    def state(self) -> State:
        """ "working": all that is left is being done."""
        if self.parts:
            stopped = any(each.needs_start for each in self.parts)
            return "stopped" if stopped else "working"
        return "working" if self.holder_life in ("alive", "unknown") else "stopped"

    @property
    def failed(self) -> Counter[str]:
        """Failures of all parts, by reason."""
        total: Counter[str] = Counter()
        for each in self._workers:
            total.update(each.failed)
        return total

    @property
    def slowest(self) -> list[tuple[int, float]]:
        """The slowest shards of all parts, and the seconds that they took."""
        found = [pair for each in self._workers for pair in each.slowest]
        return sorted(found, key=lambda pair: -pair[1])[:3]

    @property
    def _workers(self) -> tuple[PartStatus, ...]:
        return self.parts or (() if self.single is None else (self.single,))


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputStatus:
    """What an output holds."""

    splits: Mapping[str, tuple[int, int]]
    """Committed splits: their samples and shards."""
    jobs: tuple[JobStatus, ...]
    """Jobs that are not committed."""

    @property
    def state(self) -> State:
        """ "complete": there is nothing but committed splits."""
        if not self.jobs:
            return "complete"
        return "working" if all(job.state == "working" for job in self.jobs) else "stopped"


def read_status(out: str) -> OutputStatus:
    """Looks at an output.

    Raises:
      ManifestError: `manifest_missing`: there is neither a dataset nor a job.
    """
    manifest = load_manifest(out)
    splits = {}
    if manifest is not None:
        splits = {
            name: (entry.num_samples, len(manifest.select(name)))
            for name, entry in manifest.splits.items()
        }
    listed = storage.list_names(storage.join(out, "plan"))
    begun = {name.removesuffix(".json") for name in listed if re.fullmatch(r"[\w-]+\.json", name)}
    plans = {name: plan for name in listed if (plan := _plan(out, name)) is not None}
    copied = {name for name, plan in plans.items() if plan.get("kind") == "reshard"}
    record = read_lease(storage.join(out, LEASE_NAME)) or {}
    open_splits = sorted((begun - splits.keys()) | (plans.keys() & begun) | copied)
    in_parts = record.get("split") if "parts" in record else None
    if in_parts and in_parts not in splits and in_parts not in open_splits:
        open_splits.append(str(in_parts))
    jobs = tuple(_job_status(out, split, record) for split in open_splits)
    if manifest is None and not jobs and not record:
        raise ManifestError("manifest_missing.nothing", where=storage.join(out, MANIFEST_NAME))
    if not jobs and record:
        life, _ = Watch().look(storage.join(out, LEASE_NAME))
        if life in ("alive", "unknown") or "parts" in record:
            jobs = (_single(record, life, title="job", num_shards=None, shards_done=0),)
    return OutputStatus(splits=splits, jobs=jobs)


def _plan(out: str, split: str) -> dict[str, Any] | None:
    if not re.fullmatch(r"[\w-]+", split):
        return None
    return read_json(storage.join(out, "plan", split, "plan.json"))


def _job_status(out: str, split: str, record: Mapping[str, Any]) -> JobStatus:
    identity = read_json(storage.join(out, "plan", f"{split}.json")) or {}
    plan = _plan(out, split) or {}
    # The name of the result, which shards and receipts have.
    dataset = str(
        identity.get("name")
        or identity.get("dataset")
        or plan.get("dataset")
        or record.get("dataset", "")
    )
    num_shards = plan.get("num_shards")
    num_shards = num_shards if isinstance(num_shards, int) else None
    generation = plan.get("generation", 0)
    names = plan.get("names")
    if not isinstance(names, list):
        number = generation if isinstance(generation, int) else 0
        names = _shard_names(dataset, split, num_shards, number)
    done = _finished_shards(out, names)
    title = f"{dataset}, split {split}"
    # The parts of a reshard do all of its splits.
    if "parts" not in record or record.get("split") not in (split, ""):
        life = Watch().look(storage.join(out, LEASE_NAME))[0] if record else "absent"
        return _single(record, life, title=title, num_shards=num_shards, shards_done=len(done))
    count, folder = int(record["parts"]), storage.join(out, parts_folder(str(record["job"])))
    looked = _look(folder, count)
    parts = tuple(
        _part_status(Part(index=index, count=count), *looked[index], num_shards, done)
        for index in range(count)
    )
    return JobStatus(
        title=title,
        num_shards=num_shards,
        shards_done=len(done),
        holder="",
        holder_life="absent",
        parts=parts,
    )


def _single(
    record: Mapping[str, Any], life: Life, *, title: str, num_shards: int | None, shards_done: int
) -> JobStatus:
    """Describes a job of one process."""
    single = "parts" not in record and life in ("alive", "unknown")
    return JobStatus(
        title=title,
        num_shards=num_shards,
        shards_done=shards_done,
        holder=f"{record.get('host')}, process {record.get('pid')}" if single else "",
        holder_life=life if single else "absent",
        parts=(),
        single=_part_status(Part(index=0, count=1), life, record, num_shards, set())
        if single
        else None,
    )


def _shard_names(dataset: str, split: str, num_shards: int | None, generation: int) -> list[str]:
    count = num_shards or 0
    return [
        shard_name(dataset, split, shard, num_shards=count, generation=generation)
        for shard in range(count)
    ]


def _finished_shards(out: str, names: Sequence[object]) -> set[int]:
    """Lists the shards with a receipt."""
    found = set(storage.list_names(storage.join(out, "receipts"))) if names else set()
    return {shard for shard, name in enumerate(names) if f"{name}.json" in found}


def _look(folder: str, count: int) -> list[tuple[Life, dict[str, Any]]]:
    """Looks at the leases of all parts, until it is known which of them are alive."""
    watch = Watch()
    present = set(storage.list_names(folder))
    urls = {index: storage.join(folder, part_name(index, count)) for index in range(count)}
    found: list[tuple[Life, dict[str, Any]]] = [("absent", {})] * count
    open_ones = {index for index in urls if part_name(index, count) in present}
    while True:
        for index in sorted(open_ones):
            found[index] = watch.look(urls[index])
        open_ones = {index for index in open_ones if found[index][0] == "unknown"}
        if not open_ones:
            return found
        threading.Event().wait(LOOK_S)


def _part_status(
    part: Part, life: Life, lease: Mapping[str, Any], num_shards: int | None, done: set[int]
) -> PartStatus:
    mine = None if num_shards is None else part.shards(num_shards)
    steps, seconds = _number(lease.get("done")), _number(lease.get("seconds"))
    total = lease.get("total")
    rate = steps / seconds if steps and seconds and life == "alive" else None
    left = (_number(total) - steps) / rate if rate and isinstance(total, int) else None
    failed = lease.get("failed")
    slowest = lease.get("slowest")
    return PartStatus(
        part=part,
        life=life,
        ended=str(lease.get("ended", "")),
        host=str(lease.get("host", "")),
        stage=str(lease.get("stage", "")),
        rate=rate,
        left_s=left,
        failed={str(k): int(_number(v)) for k, v in failed.items()}
        if isinstance(failed, dict)
        else {},
        shards_done=0 if mine is None else sum(shard in done for shard in mine),
        num_shards=None if mine is None else len(mine),
        slowest=tuple(
            (int(_number(pair[0])), _number(pair[1]))
            for pair in (slowest if isinstance(slowest, list) else [])
            if isinstance(pair, list) and len(pair) == 2
        ),
        still_s=_number(lease.get("still")),
    )


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def status_text(found: OutputStatus, *, duration: Callable[[float], str]) -> list[str]:
    """Describes an output for people.

    Args:
      found: What it holds.
      duration: Writes a duration in seconds.
    """
    lines = [
        f"split {split}: complete, {counted(samples, 'sample')} in {counted(shards, 'shard')}"
        for split, (samples, shards) in found.splits.items()
    ]
    for job in found.jobs:
        of = "no plan yet" if job.num_shards is None else counted(job.num_shards, "shard")
        lines.append(f"{job.title}: {job.shards_done} of {of} finished")
        if job.num_shards is None:
            lines[-1] = f"{job.title}: no plan yet"
        if job.holder:
            lines.append(f"at work: {job.holder}")
        elif not job.parts:
            lines.append("nobody is at work: run the same command to resume")
        if job.single is not None and job.single.stage:
            lines.append(_stage_line(job.single, duration))
        rows: list[tuple[str, ...]] = [
            ("part", "state", "host", "shards", "rate", "left", "failed")
        ]
        rows += [_row(each, duration) for each in job.parts]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (rows if job.parts else ())
        ]
        if job.failed:
            reasons = ", ".join(f"{reason} {n:,}" for reason, n in job.failed.most_common(8))
            lines.append(f"failed: {reasons}")
        if job.slowest:
            slow = ", ".join(f"{shard} ({duration(seconds)})" for shard, seconds in job.slowest)
            lines.append(f"slowest shards: {slow}")
        lines += [
            f"part {each.part}: no progress for {duration(each.still_s)}"
            for each in job.parts
            if each.life == "alive" and each.still_s >= STILL_S
        ]
        lost = [str(each.part) for each in job.parts if each.needs_start]
        if lost:
            lines.append("to be started, on any machine: PART=" + ", PART=".join(lost))
    return lines


def _stage_line(each: PartStatus, duration: Callable[[float], str]) -> str:
    facts = [f"stage {each.stage}"]
    if each.rate is not None:
        facts.append(f"{each.rate:.1f}/s")
    if each.left_s is not None:
        facts.append(f"{duration(each.left_s)} left")
    if each.still_s >= STILL_S:
        facts.append(f"no progress for {duration(each.still_s)}")
    return ", ".join(facts)


_WORDS: Mapping[str, str] = {"absent": "not started", "dead": "dead"}


def _row(each: PartStatus, duration: Callable[[float], str]) -> tuple[str, ...]:
    state = _WORDS.get(each.life, each.ended or each.stage)
    shards = "" if each.num_shards is None else f"{each.shards_done}/{each.num_shards}"
    return (
        str(each.part),
        state,
        each.host,
        shards,
        "" if each.rate is None else f"{each.rate:.1f}/s",
        "" if each.left_s is None else duration(each.left_s),
        " ".join(f"{reason}={n}" for reason, n in each.failed.items()),
    )
