"""FETCH and PLAN: freezes what a job will build.

1. Image URLs are downloaded into the blob cache; the ledger remembers how each ended.
2. Each row gets its image's identity and its key, and is written to a spool; rows without an image
   and repeated rows go to the quarantine list.
3. A few samples are built: their length gives the number of shards, and a recipe that cannot work
   stops here.
4. The rows are distributed to one file per shard, in one pass over the spool; plan.json comes last.

A finished plan is used until its split is committed, so links that die or recover in between
change nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.datasets import ImageSource, SceneImage, example_images
from preprocess.fetch import FetchPolicy, FetchResult, Ledger, fetch_all
from preprocess.job.build import quarantine_line, sample_size, scratch_folder
from preprocess.job.job import SMALL_JOB_FAILURES, Job, Reporter
from preprocess.job.plan import count_shards, plan_order, shard_borders
from preprocess.recipe import image_identity, images_identity, read_path, sample_key
from shardspec import storage
from shardspec.documents import read_fields, read_object
from shardspec.errors import BudgetError, ConfigError, ConflictError, SampleError, StorageError
from shardspec.manifest import canonical_json, differences, fingerprint

PROBE_ROWS = 32
"""Samples built before the plan, to estimate bytes and to stop early if nothing works."""

HELD_BYTES = 64 * 2**20
"""Rows held in memory before they are appended to their shards' files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What will be built, frozen; its rows are beside it, one file per shard."""

    build_key: str
    """Hash of everything that the shards' bytes depend on."""
    num_shards: int
    num_samples: int
    source: Mapping[str, Any]
    """What the manifest says of the source."""
    quarantined: Mapping[str, int]
    """Rows that cannot become samples, by reason."""


def load_plan(job: Job) -> Plan | None:
    """Finds the frozen plan of this very job.

    Raises:
      ConflictError: `job_conflict`: an unfinished reshard owns this output.
    """
    document = read_json(_plan_url(job))
    if document is not None and document.get("kind") == "reshard":
        raise ConflictError("job_conflict.reshard", where=_plan_url(job))
    identity = read_json(job.identity_url)
    if document is None or identity is None or differences(identity, job.identity, "job"):
        return None
    try:
        return read_fields(Plan, document)
    except ValueError:
        return None  # damaged, as one that is no JSON


def make_plan(job: Job, report: Reporter, *, promised: str | None = None) -> Plan:
    """Fetches the images and freezes a plan.

    Args:
      job: The job.
      report: Gets the progress.
      promised: Build key of the split that the output already names, to be repaired. Links that
        had failed then are not requested again.

    Raises:
      BudgetError: `dead_links`, `nothing_left`, `probe_failed`.
      ConflictError: `source_changed`: the plan differs from the one of that key.
      StorageError: `no_space`, and others of the storage.
    """
    drop_plan(job)
    storage.publish_bytes(job.identity_url, canonical_json(job.identity, indent=1))
    policy = job.settings.fetch
    if promised is not None:
        policy = dataclasses.replace(policy, retry="none")
    results = _fetch(job, policy, report)
    with scratch_folder(job.scratch) as folder:
        spool = _Spool(folder / "spool.jsonl")
        rows = _spool_rows(job, results, spool, report)
        order = plan_order(rows.keys, seed=job.settings.recipe.seed)
        mean_bytes = _probe(job, spool, sorted(order[:PROBE_ROWS]), report)
        total_bytes = round(mean_bytes * len(order))
        count = count_shards(
            total_bytes,
            target_bytes=job.settings.shard_bytes,
            num_samples=len(order),
            num_shards=job.settings.num_shards,
        )
        require_space(job.settings.out, total_bytes)
        report.note(f"{len(order)} samples in {count.num_shards} shards ({count.rule})")
        rows_sha256 = _write_rows(job, spool, order, count.num_shards, folder)
    build = {
        "rows": rows_sha256,
        "recipe": job.recipe,
        "tokenizer": dataclasses.asdict(job.tokenizer),
        "libraries": job.libraries,
    }
    build_key = fingerprint(build)
    if promised not in (None, build_key):
        raise ConflictError(
            "source_changed.rebuild",
            where=job.settings.out,
            got_build_key=build_key[:16],
            want_build_key=str(promised)[:16],
        )
    plan = Plan(
        build_key=build_key,
        num_shards=count.num_shards,
        num_samples=len(order),
        source={
            **job.dataset.rows.kind,
            "num_rows": len(job.dataset),
            "limit": job.settings.limit,
            "rows_sha256": rows_sha256,
        },
        quarantined=dict(sorted((Counter(rows.reasons) + job.dataset.left_out).items())),
    )
    name = f"{job.settings.dataset}-{job.settings.split}-plan.jsonl"
    if rows.lost:
        storage.publish_bytes(job.url("quarantine", name), b"".join(rows.lost))
    else:
        storage.delete(job.url("quarantine", name))
    storage.publish_bytes(_plan_url(job), canonical_json(dataclasses.asdict(plan), indent=1))
    return plan


def drop_plan(job: Job) -> None:
    """Removes the rows of a plan; its job's identity stays."""
    # First what makes it a plan: an interruption must not leave one that lacks some of its rows.
    storage.delete(_plan_url(job))
    storage.delete(job.url("plan", job.settings.split))


def read_json(url: str) -> dict[str, Any] | None:
    """Reads a JSON object; None where there is none or it is broken."""
    try:
        return read_object(storage.read_bytes(url), any_text=True)
    except (FileNotFoundError, ValueError):
        return None


def _plan_url(job: Job) -> str:
    return job.url("plan", job.settings.split, "plan.json")


class _Spool:
    """Planned rows in one local file, in the source's order."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._starts = [0]

    def write(self, rows: Iterator[bytes]) -> None:
        with storage.translate_errors(str(self._path)), self._path.open("wb") as stream:
            for line in rows:
                self._starts.append(self._starts[-1] + stream.write(line))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self._path.open("rb") as stream:
            yield from map(json.loads, stream)

    def read(self, i: int) -> dict[str, Any]:
        with self._path.open("rb") as stream:
            stream.seek(self._starts[i])
            row: dict[str, Any] = json.loads(stream.readline())
        return row


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    keys: list[str]
    """Of the rows in the spool, in its order."""
    lost: list[bytes]
    """Quarantine lines of the others."""
    reasons: list[str]


def _spool_rows(
    job: Job, results: Mapping[str, FetchResult], spool: _Spool, report: Reporter
) -> _Rows:
    found = _Rows(keys=[], lost=[], reasons=[])
    keys: set[str] = set()

    def good_rows() -> Iterator[bytes]:
        for row, error in _planned_rows(job, results):
            if error is None and row["key"] in keys:
                error = SampleError("twin")
            report.step(error.reason if error else "")
            if error is not None:
                found.lost.append(canonical_json(quarantine_line(row, stage="plan", error=error)))
                found.reasons.append(error.reason)
                continue
            keys.add(row["key"])
            found.keys.append(row["key"])
            yield canonical_json(row)

    for reason, count in sorted(job.dataset.left_out.items()):
        report.note(f"{count} rows of the source left out: {reason}")
    report.stage("plan", len(job.dataset))
    spool.write(good_rows())
    if not found.keys:
        raise BudgetError("nothing_left", facts=dict(Counter(found.reasons).most_common()))
    _check_lost(job, Counter(found.reasons))
    return found


def _check_lost(job: Job, reasons: Counter[str]) -> None:
    """Refuses a plan that has lost more rows than links may die; links have been counted before.

    Duplicate rows and rows without a message are not losses.
    """
    lost = Counter({name: n for name, n in reasons.items() if name not in ("twin", "no_message")})
    allowed = max(SMALL_JOB_FAILURES, job.settings.max_dead_links * len(job.dataset))
    if sum(lost.values()) > allowed:
        raise BudgetError(
            "lost_rows",
            where=job.settings.source,
            rows=len(job.dataset),
            allowed=int(allowed),
            facts=dict(lost.most_common()),
        )


def _planned_rows(
    job: Job, results: Mapping[str, FetchResult]
) -> Iterator[tuple[dict[str, Any], SampleError | None]]:
    """Gives each row of the dataset as the plan keeps it, with its error if it cannot be built."""
    for i in range(len(job.dataset)):
        try:
            example = job.dataset[i]
        except SampleError as error:
            yield {"key": f"row-{i}", "image": None, "example": {}}, error
            continue
        images = example_images(example)
        example.pop("image", None)
        _check_number(job, images)
        planned = [_plan_image(job, image, results) for image in images]
        key = sample_key(example, image_id=images_identity([image.identity for image in planned]))
        locations = [image.location for image in planned]
        location = locations if job.dataset.several_images else next(iter(locations), None)
        row = {"key": key, "image": location, "example": example}
        errors = [image.error for image in planned if image.error is not None]
        if not example["message_list"]:
            errors.append(SampleError("no_message.mode"))
        yield row, errors[0] if errors else _changed_image(example, planned)


@dataclass(frozen=True, slots=True, kw_only=True)
class _PlannedImage:
    location: dict[str, Any]
    """Where the build finds it."""
    identity: str
    error: SampleError | None = None


def _plan_image(job: Job, image: ImageSource, results: Mapping[str, FetchResult]) -> _PlannedImage:
    if isinstance(image, SceneImage):
        location: dict[str, Any] = {"kind": "scene", "seed": image.seed, "idx": image.idx}
        return _PlannedImage(location=location, identity=image_identity(image, None))
    if isinstance(image, bytes):
        identity = hashlib.sha256(image).hexdigest()
        if not job.blobs.has(identity, num_bytes=len(image)):
            job.blobs.put(image)
        return _PlannedImage(location={"kind": "blob", "sha256": identity}, identity=identity)
    if isinstance(image, Path):
        location = {"kind": "path", "path": str(image.absolute())}
        try:
            identity = hashlib.sha256(read_path(image)).hexdigest()
        except SampleError as unreadable:
            return _PlannedImage(location=location, identity="", error=unreadable)
        return _PlannedImage(location={**location, "sha256": identity}, identity=identity)
    if isinstance(image, str):
        result = results[image]
        location = {"kind": "blob", "url": result.url, "sha256": result.sha256}
        error = None
        if result.status != "ok":
            error = SampleError(
                result.reason,
                what="image could not be fetched",
                url=result.url,
                http_status=result.http_status,
            )
        return _PlannedImage(location=location, identity=result.sha256 or "", error=error)
    raise ConfigError("image_type", got=type(image).__name__)


def _check_number(job: Job, images: Sequence[ImageSource]) -> None:
    if len(images) > 1 and not job.dataset.several_images:
        raise ConfigError("image_number", got=len(images), dataset=job.dataset.name)


def _changed_image(
    example: Mapping[str, Any], planned: Sequence[_PlannedImage]
) -> SampleError | None:
    """Finds a fetched image that is not the one that was annotated."""
    want = example.get("metadata", {}).get("image_sha256")
    for image in planned:
        if want and "url" in image.location and image.identity != want:
            return SampleError(
                "image_sha256", url=image.location["url"], got=image.identity, want=want
            )
    return None


def _probe(job: Job, spool: _Spool, numbers: list[int], report: Reporter) -> float:
    """Builds a few samples: their mean length in bytes, and proof that the recipe works."""
    sizes, errors = [], []
    for i in numbers:
        try:
            sizes.append(sample_size(job.preparer, spool.read(i), cache=job.blobs).num_bytes)
        except SampleError as error:
            errors.append(error)
    if not sizes:
        first = errors[0]
        raise BudgetError(
            "probe_failed",
            where=first.where,
            num_errors=len(errors),
            problem=first.what,
            remedy=first.fix or "correct the source or the recipe, then run the same command again",
            first_reason=first.reason,
            facts=first.facts,
        )
    if errors:
        report.note(f"{len(errors)} of {len(numbers)} probed samples cannot be built")
    return sum(sizes) / len(sizes)


def require_space(out: str, total_bytes: int) -> None:
    """Refuses to begin what will not fit on the disk of a local output.

    Raises:
      StorageError: `no_space`.
    """
    free = storage.free_bytes(out)
    if free is not None and free < total_bytes:
        raise StorageError("no_space.shards", where=out, free_bytes=free, need_bytes=total_bytes)


def _write_rows(job: Job, spool: _Spool, order: list[int], num_shards: int, folder: Path) -> str:
    """Writes the rows to one file per shard, in the source's order; returns the hash of all."""
    borders = shard_borders(len(order), num_shards=num_shards)
    position = np.empty(len(order), dtype=np.int64)
    position[order] = np.arange(len(order))
    shard_of = np.searchsorted(borders, position, side="right") - 1
    hashes = [hashlib.sha256() for _ in range(num_shards)]
    waiting: dict[int, list[bytes]] = {}
    held_bytes = 0

    def flush() -> None:
        for shard, lines in waiting.items():
            path = folder / str(shard)
            with storage.translate_errors(str(path)), path.open("ab") as stream:
                stream.writelines(lines)
        waiting.clear()

    for i, row in enumerate(spool):
        shard = int(shard_of[i])
        line = canonical_json({**row, "position": int(position[i])})
        hashes[shard].update(line)
        waiting.setdefault(shard, []).append(line)
        held_bytes += len(line)
        if held_bytes >= HELD_BYTES:
            flush()
            held_bytes = 0
    flush()
    for shard in range(num_shards):
        storage.publish_file(job.rows_url(shard), folder / str(shard))
    return fingerprint([digest.hexdigest() for digest in hashes])


def image_urls(job: Job, report: Reporter) -> list[str]:
    """Lists the image URLs of the dataset, duplicates included."""
    report.stage("rows", len(job.dataset))
    urls: list[str] = []
    for i in range(len(job.dataset)):
        with suppress(SampleError):  # the plan reads the row again and counts the error
            urls += [image for image in example_images(job.dataset[i]) if isinstance(image, str)]
        report.step("")
    return urls


def _fetch(job: Job, policy: FetchPolicy, report: Reporter) -> dict[str, FetchResult]:
    urls = image_urls(job, report)
    if not urls:
        return {}
    report.stage("fetch", len(set(urls)))
    with Ledger(job.ledger_path()) as ledger:
        results = fetch_all(
            urls,
            cache=job.blobs,
            ledger=ledger,
            policy=policy,
            limits=job.settings.recipe.image.limits,
            on_result=lambda result: report.step(result.reason),
        )
    dead = Counter(result.reason for result in results.values() if result.status != "ok")
    allowed = max(SMALL_JOB_FAILURES, job.settings.max_dead_links * len(results))
    if sum(dead.values()) > allowed:
        raise BudgetError(
            "dead_links", links=len(results), allowed=int(allowed), facts=dict(dead.most_common())
        )
    return results
