"""FETCH and PLAN: freezes what a job will build.

1. Image URLs are downloaded into the blob cache; the ledger remembers how each ended.
2. Each row gets its image's identity and its key, and is written to a spool; rows without an image
   and repeated rows go to the quarantine list. Files and objects are stamped (`stamps`).
3. A few samples are built: their length gives the number of shards, and a recipe that cannot work
   stops here.
4. The rows are distributed to one file per shard, in one pass over the spool; plan.json comes last.

A finished plan is used until its split is committed, so links that die or recover in between
change nothing.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from preprocess.datasets import (
    Clip,
    EpisodeFrame,
    ImageSource,
    PageImage,
    RemoteImage,
    SceneImage,
    SceneVideo,
    VideoSource,
    example_clips,
    example_images,
    example_videos,
)
from preprocess.documents import page_identity
from preprocess.fetch import FetchResult, UrlSpool, redact, survey_results, unique_urls
from preprocess.hash_table import HashTable, TextSet
from preprocess.job.build import quarantine_line, sample_size, scratch_folder
from preprocess.job.conflicts import action_quantiles, find_differences, table
from preprocess.job.engines.engine import Engine
from preprocess.job.fetching import fetch_images
from preprocess.job.generation import RowMarks, StoredMarks, encode_marks
from preprocess.job.job import (
    DEAD_LINKS_SHARE,
    FAILED_ROWS_SHARE,
    Job,
    Reporter,
    allowed_failures,
)
from preprocess.job.keys import KeyList
from preprocess.job.plan import (
    count_shards,
    generation_name,
    plan_groups,
    plan_order,
    shard_borders,
)
from preprocess.job.stamps import (
    StampWriter,
    named_stamps,
    stamp_file,
    stamp_rows,
    with_content,
)
from preprocess.media import pixels_file
from preprocess.recipe import (
    file_sha256,
    image_identity,
    images_identity,
    read_path,
    repeated_key,
    sample_key,
    video_identity,
)
from shardspec import storage
from shardspec.documents import read_fields, read_object, require_plain
from shardspec.errors import (
    BudgetError,
    ConfigError,
    ConflictError,
    SampleError,
    StorageError,
    redacted_url,
)
from shardspec.index import parse_index
from shardspec.keyed import hash_text
from shardspec.manifest import (
    MANIFEST_NAME,
    canonical_json,
    differences,
    fingerprint,
    load_manifest,
)
from shardspec.messages import counted

_URL = re.compile(r"\s*[a-z][a-z0-9+.-]*:[/\\]{2}\S+\s*", re.IGNORECASE)

PROBE_ROWS = 32
"""Samples built before the plan, to estimate bytes and to stop early if nothing works."""

HELD_BYTES = 64 * 2**20
"""Rows held in memory before they are appended to their shards' files."""

_SPOOL_STEP = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What will be built, frozen; its rows are beside it, one file per shard."""

    build_key: str
    """Hash of everything that the shards' bytes depend on."""
    num_shards: int
    num_samples: int
    num_rows: int
    """Rows of the source that these samples are made of."""
    source: Mapping[str, Any]
    """What the manifest says of the source."""
    quarantined: Mapping[str, int]
    """Rows that cannot become samples, by reason."""
    cache_token: str = ""
    """Mark that the planning part has left in the image cache; "" where no sample needs that."""
    borders: Sequence[int] = ()
    """Of the shards in the stored order, where samples have groups; () for equal shares."""
    generation: int = 0
    """Number of the generation; the first build is 0."""
    parent: str = ""
    """Build key of the generation before."""


def load_plan(job: Job, report: Reporter | None = None, *, shared: bool = False) -> Plan | None:
    """Finds the frozen plan of this very job; None if a file of its source has changed since.

    Args:
      job: The job.
      report: Is told of such a change.
      shared: Whether other machines build from the plan: it is not made again.

    Raises:
      ConflictError: `job_conflict`: an unfinished reshard owns this output; `source_changed`: of a
        shared plan.
    """
    document = read_json(plan_url(job))
    if document is not None and document.get("kind") == "reshard":
        raise ConflictError("job_conflict.reshard", where=plan_url(job))
    identity = read_json(job.identity_url)
    if document is None or identity is None or differences(identity, job.identity, "job"):
        return None
    try:
        compared = job.compare_files(job.generation)
    except StorageError as error:
        if error.reason != "plan_files" or shared:
            raise
        return None
    if compared is not None and compared.num_changed:
        if shared:
            raise ConflictError(
                "source_changed.part",
                where=job.settings.source,
                changed=compared.num_changed,
                compared=compared.num_files,
                facts={**compared.changed, "how": compared.how},
            )
        if report is not None:
            first = next(iter(compared.changed.items()))
            report.note(
                f"{counted(compared.num_changed, 'file')} of the source changed since the plan was "
                f"made ({first[0]} {first[1]}): it is made again"
            )
        return None
    try:
        plan = read_fields(Plan, document)
    except ValueError:
        return None  # damaged, as one that is no JSON
    parent = job.growth.before.build_key if job.growth else ""
    return plan if (plan.generation, plan.parent) == (job.generation, parent) else None


def _check_scales(job: Job) -> None:
    """Refuses a split whose actions would be scaled by other values than those of other splits.

    Raises:
      ConflictError: `recipe_conflict`.
    """
    ours = action_quantiles(job.dataset.rows.kind)
    manifest = load_manifest(job.settings.out) if ours else None
    for name, entry in manifest.splits.items() if manifest else ():
        theirs = action_quantiles(entry.source) if name != job.settings.split else {}
        if found := find_differences(theirs, ours) if theirs else []:
            where = job.url(MANIFEST_NAME)
            raise ConflictError("recipe_conflict.scales", where=where, table=table(found))


def make_plan(
    job: Job,
    report: Reporter,
    *,
    promised: str | None = None,
    fetched: Mapping[str, FetchResult] | None = None,
    marks: RowMarks | None = None,
    cache_token: str = "",
    engine: Engine | None = None,
    check_held: Callable[[], None] = lambda: None,
) -> Plan:
    """Fetches the images and freezes a plan.

    Args:
      job: The job.
      report: Gets the progress.
      promised: Build key of the split that the output already names, to be repaired. Links that
        had failed then are not requested again.
      fetched: How the download of each URL has ended, where the parts of the job have made them.
      marks: Of all rows, where they have been read for that.
      cache_token: Mark to leave in the image cache, if samples need that, for the parts that build.
      check_held: Raises where another process may plan; called before anything appears.

    Raises:
      BudgetError: `dead_links`, `nothing_left`, `probe_failed`.
      ConflictError: `source_changed`: the plan differs from the one of that key; `recipe_conflict`:
        actions would be scaled otherwise than in the other splits.
      StorageError: `no_space`, and others of the storage.
    """
    check_held()
    drop_plan(job)
    row_stamps = stamp_rows(job.source_files(), content=job.settings.compare == "content")
    _check_scales(job)
    for line in job.dataset.notes():
        report.note(line)
    storage.publish_bytes(job.identity_url, canonical_json(job.identity, indent=1))
    results = fetched
    if results is None or marks is None:
        urls = image_urls(job, report, marks := job.row_marks(), folder=job.scratch)
        if results is None:
            results = fetch_images(
                job,
                urls,
                report,
                again=promised is None,
                engine=engine,
                cache_token=cache_token,
                mark=job.identity_url,
            )
    results = _judged(job, results, report)
    has_urls = bool(results)
    with scratch_folder(job.scratch) as folder:
        spool = _Spool(folder / "spool.jsonl")
        with StampWriter(folder / "files") as stamps, _LostRows(folder / "lost.jsonl") as lost:
            for stamp in row_stamps:
                stamps.add(stamp)
            for stamp in named_stamps(job.files_url(job.generation - 1)) if job.growth else ():
                stamps.add(stamp)
            rows = _spool_rows(job, results, spool, lost, stamps, report)
        del results, fetched  # the order takes their place in memory
        job.dataset.rows.release()
        if len(stamps):
            storage.publish_file(job.files_url(job.generation), folder / "files")
        else:
            storage.delete(job.files_url(job.generation))
        order = plan_order(rows.keys, seed=job.settings.recipe.seed)
        mean_bytes = _probe(job, spool, sorted(order[:PROBE_ROWS].tolist()), report)
        total_bytes = round(mean_bytes * len(order))
        count = count_shards(
            total_bytes,
            target_bytes=job.settings.shard_bytes,
            num_samples=rows.num_groups,
            num_shards=job.settings.num_shards,
            unit="group" if rows.groups else "sample",
        )
        borders: list[int] = []
        if rows.groups:
            order, borders = plan_groups(
                rows.keys,
                rows.groups,
                seed=job.settings.recipe.seed,
                num_shards=count.num_shards,
            )
        require_space(job.settings.out, total_bytes)
        shards = counted(count.num_shards, "shard")
        report.note(f"{counted(len(order), 'sample')} in {shards} ({count.rule})")
        shares = borders or shard_borders(len(order), num_shards=count.num_shards).tolist()
        firsts = _first_keys(rows) if borders else {}
        rows_sha256 = _write_rows(job, spool, order, shares, firsts, folder, report, check_held)
        listed = generation_name(f"{job.name}-{job.settings.split}", job.generation)
        quarantine_url = job.url("quarantine", f"{listed}-plan.jsonl")
        if rows.num_lost:
            storage.publish_file(quarantine_url, folder / "lost.jsonl")
        else:
            storage.delete(quarantine_url)
    downloads = job.settings.fetch.describe()
    build = {
        "rows": rows_sha256,
        "recipe": job.recipe,
        "tokenizer": dataclasses.asdict(job.tokenizer),
        "libraries": job.libraries,
    }
    before = job.growth.before if job.growth else None
    if before is not None:
        build["parent"] = before.build_key
    build_key = fingerprint(build)
    if not rows.has_blobs:
        cache_token = ""
    if cache_token:
        job.blobs.leave_token(cache_token)
    if promised not in (None, build_key):
        raise ConflictError(
            "source_changed.rebuild",
            where=job.settings.out,
            got_build_key=build_key[:16],
            want_build_key=str(promised)[:16],
        )
    downloaded = has_urls or (before is not None and "downloads" in before.source)
    plan = Plan(
        build_key=build_key,
        num_shards=count.num_shards,
        num_samples=len(order),
        num_rows=rows.num_rows,
        source={
            **job.dataset.rows.kind,
            "num_rows": len(job.dataset),
            "limit": job.settings.limit,
            **({"downloads": downloads} if downloaded and downloads else {}),
            "rows_sha256": rows_sha256,
            "rows_read": job.dataset.num_rows_read,
            "rows_not_taken": {
                why: n for why, n in sorted(job.dataset.rows_not_taken.items()) if n
            },
        },
        quarantined=dict(sorted(rows.reasons.items())),
        cache_token=cache_token,
        borders=borders,
        generation=job.generation,
        parent=before.build_key if before else "",
    )
    check_held()
    if job.settings.source != "sample":
        stored = StoredMarks(
            build_key=build_key,
            num_examples=marks.num_examples,
            blocks=marks.blocks,
            last=marks.last,
            frames=marks.frames,
            num_rows_read=job.dataset.num_rows_read,
            left_out=dict(job.dataset.left_out),
        )
        storage.publish_bytes(job.marks_url(job.generation), encode_marks(stored))
    storage.publish_bytes(plan_url(job), canonical_json(dataclasses.asdict(plan), indent=1))
    return plan


def drop_plan(job: Job) -> None:
    """Removes the rows of a plan; its job's identity stays."""
    # First what makes it a plan: an interruption must not leave one that lacks some of its rows.
    storage.delete(plan_url(job))
    storage.delete(job.url("plan", job.settings.split))


def read_json(url: str) -> dict[str, Any] | None:
    """Reads a JSON object; None where there is none or it is broken."""
    try:
        return read_object(storage.read_bytes(url), any_text=True)
    except (FileNotFoundError, ValueError):
        return None


def plan_url(job: Job) -> str:
    """URL of a job's frozen plan."""
    return job.url("plan", job.settings.split, "plan.json")


class _Spool:
    """Planned rows in one local file, in the source's order."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._starts = array("Q")
        """Of each `_SPOOL_STEP`-th row."""

    def write(self, rows: Iterator[_SpooledRow]) -> None:
        start = 0
        with storage.translate_errors(str(self._path)), self._path.open("wb") as stream:
            for i, row in enumerate(rows):
                if i % _SPOOL_STEP == 0:
                    self._starts.append(start)
                start += stream.write(row.encode())

    def __iter__(self) -> Iterator[_SpooledRow]:
        with self._path.open("rb") as stream:
            yield from map(_SpooledRow.decode, stream)

    def read(self, i: int) -> dict[str, Any]:
        with self._path.open("rb") as stream:
            stream.seek(self._starts[i // _SPOOL_STEP])
            line = next(islice(stream, i % _SPOOL_STEP, None))
        return _SpooledRow.decode(line).read()


class _SpooledRow(NamedTuple):
    """A planned row as pieces of its canonical JSON, to be joined when its position is known.

    So a row is encoded once: joining texts takes a fraction of the time of JSON.
    """

    head: bytes
    """Fields before `group`; all before `origin` where there is no group."""
    group: bytes
    body: bytes
    """Fields from `group` on and before `origin`."""
    origin: bytes
    tail: bytes
    """Fields after `position`."""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> _SpooledRow:
        """Encodes a row; its names are in order: "group" < "origin" < "position"."""
        has_group = "group" in row
        split = "group" if has_group else "origin"
        inside = [name for name in row if split < name < "origin"]
        return cls(
            head=_inner_json(row, [name for name in row if name < split]),
            group=canonical_json(row["group"])[:-1] if has_group else b"",
            body=_inner_json(row, inside),
            origin=canonical_json(row["origin"])[:-1],
            tail=_inner_json(row, [name for name in row if name > "position"]),
        )

    def encode(self) -> bytes:
        """Gives a line; no piece has a NUL, which JSON escapes."""
        return b"\0".join(self) + b"\n"

    @classmethod
    def decode(cls, line: bytes) -> _SpooledRow:
        """Reads what `encode` has written."""
        return cls(*line[:-1].split(b"\0"))

    def read(self) -> dict[str, Any]:
        """Gives the row, without a position."""
        fields = [*self._front(self.group), b'"origin":' + self.origin, self.tail]
        row: dict[str, Any] = json.loads(_join_json(fields))
        return row

    def place(self, position: int, *, group: bytes) -> tuple[bytes, bytes]:
        """Gives the canonical JSON of the row in its shard, without and with its origin.

        Args:
          position: Of the sample in the stored order.
          group: JSON of the group's name in the plan; not used where the row has none.
        """
        front, placed = self._front(group), b'"position":%d' % position
        origin = b'"origin":' + self.origin
        return (
            _join_json([*front, placed, self.tail]),
            _join_json([*front, origin, placed, self.tail]),
        )

    def _front(self, group: bytes) -> list[bytes]:
        return [self.head, *([b'"group":' + group] if self.group else []), self.body]


def _inner_json(row: Mapping[str, Any], names: list[str]) -> bytes:
    return canonical_json({name: row[name] for name in names})[1:-2] if names else b""


def _join_json(fields: list[bytes]) -> bytes:
    return b"{" + b",".join(filter(None, fields)) + b"}\n"


class _LostRows:
    """Quarantine lines of rows that are not planned, in a local file: there may be millions."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.num_rows = 0

    def add(self, line: bytes) -> None:
        with storage.translate_errors(str(self._path)):
            self._stream.write(line)
        self.num_rows += 1

    def __enter__(self) -> _LostRows:
        self._stream = self._path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        with storage.translate_errors(str(self._path)):
            self._stream.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    keys: KeyList
    """Of the rows in the spool, in its order."""
    groups: Sequence[str]
    """Of each its group, "" for none; () where none has one."""
    num_lost: int
    """Rows of the quarantine list."""
    reasons: Counter[str]
    """Rows of the source that are lost, by reason: an example may have several."""
    num_rows: int
    """Rows of the source in the spool."""
    has_blobs: bool
    """Whether images of theirs are in the image cache."""

    @property
    def num_groups(self) -> int:
        """Groups, each of which is in one shard; samples of none are groups of their own."""
        if not self.groups:
            return len(self.keys)
        return len({*self.groups} - {""}) + self.groups.count("")


def _spool_rows(
    job: Job,
    results: Mapping[str, FetchResult],
    spool: _Spool,
    lost: _LostRows,
    stamps: StampWriter,
    report: Reporter,
) -> _Rows:
    keys = KeyList()
    before = _stored_keys(job)
    groups: list[str] = []
    names: dict[str, str] = {}
    stored = job.growth.stored if job.growth else None
    num_read = job.dataset.num_rows_read - (stored.num_rows_read if stored else 0)
    reasons = Counter(job.dataset.left_out)
    reasons.subtract(stored.left_out if stored else {})
    held_out = _held_out_contents(job, results, stamps)
    dead_rows = 0  # for their links, which have a budget of their own
    num_rows = 0
    has_blobs = False
    repeats: Counter[str] = Counter()

    first = ""  # error of the first row that is lost
    warned = 0

    def good_rows() -> Iterator[_SpooledRow]:
        nonlocal dead_rows, num_rows, has_blobs, first, warned
        for row, error in _planned_rows(job, results, stamps):
            if error is None and len(held_out) and _is_among(held_out, row):
                error = SampleError("held_out")
            if error is None:
                error = _repeated(job, row, keys, repeats, before)
            count = row.get("rows", 1)
            warned += row.pop("warning", None) is not None
            report.step(error.reason if error else "")
            if error is not None:
                first = first or (str(error).splitlines() or [""])[0][:200]
                lost.add(canonical_json(quarantine_line(row, stage="plan", error=error)))
                reasons[error.reason] += count
                dead_rows += count if _is_link(error) else 0
                continue
            group = row.get("group", "")
            if group or groups:
                groups.extend([""] * (len(keys) - 1 - len(groups)))  # none of those before has one
                groups.append(names.setdefault(group, group))
            if job.growth is not None:
                _check_group(job, group, job.growth.marks.groups)
            num_rows += count
            has_blobs = has_blobs or _has_blobs(row)
            yield _SpooledRow.of(row)

    for reason, count in sorted(reasons.items()):
        report.note(f"{counted(count, 'row')} of the source left out: {reason}")
    _check_lost(job, reasons, dead_rows=0, rows=num_read)
    num_old = sum(stored.left_out.values()) if stored else 0
    for number, error in islice(job.dataset.left_out_rows(), num_old, None):
        row = {"key": f"row-{number}", "image": None, "example": {}, **_origin(job, [number])}
        lost.add(canonical_json(quarantine_line(row, stage="read", error=error)))
    report.stage("plan", len(job.examples))
    with job.blobs.writing():
        spool.write(good_rows())
    if warned:
        report.note(f"{counted(warned, 'image')} with other bytes than annotated (SHA256=warn)")
    if not keys:
        facts = {**dict(reasons.most_common()), "first": first}
        if job.growth is not None:
            raise BudgetError("nothing_left.new", facts=facts)
        raise BudgetError("nothing_left.source", facts=facts)
    _check_lost(job, reasons, dead_rows=dead_rows, rows=num_read)
    if job.growth is not None:
        reasons.update(job.growth.before.quarantined)
    return _Rows(
        keys=keys,
        groups=groups,
        num_lost=lost.num_rows,
        reasons=+reasons,
        num_rows=num_rows,
        has_blobs=has_blobs,
    )


def _has_blobs(row: Mapping[str, Any]) -> bool:
    return any(place["kind"] == "blob" for place in _places(row))


def _places(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Lists where the files of a row are; a page is where its document is."""
    images = row["image"] if isinstance(row["image"], list) else [row["image"]]
    found = [*images, *row.get("video", ())]
    return [each.get("document", each) for each in found if each is not None]


def _contents(row: Mapping[str, Any]) -> set[str]:
    """Gives the hashes of the files of a row, as far as they are known."""
    return {str(place["sha256"]) for place in _places(row) if place.get("sha256")}


def _is_among(hashes: HashTable, row: Mapping[str, Any]) -> bool:
    return any(bytes.fromhex(sha256) in hashes for sha256 in _contents(row))


def _held_out_contents(
    job: Job, results: Mapping[str, FetchResult], stamps: StampWriter
) -> HashTable:
    """Gives the hashes of the pictures of "validation", for a job that builds "train".

    The split goes by the name of a picture, since its content is known after FETCH only. Under two
    names a picture would be in both: "validation" keeps it.
    """
    found = HashTable(hashlib.sha256().digest_size)
    for each in job.dataset.held_out():
        if isinstance(each, bytes):
            found.add(hashlib.sha256(each).digest())
        elif not isinstance(each, SceneVideo):  # no hash divides generated rows
            for sha256 in _contents({"image": _plan_image(job, each, results, stamps).location}):
                found.add(bytes.fromhex(sha256))
    return found


def _held_out_urls(job: Job) -> Iterator[str]:
    """Gives the URLs of "validation" that a job that builds "train" downloads too."""
    return (each for each in job.dataset.held_out() if isinstance(each, str))


def _repeated(
    job: Job, row: dict[str, Any], keys: KeyList, repeats: Counter[str], before: KeyList
) -> SampleError | None:
    """Adds a row's key; where another has it and such rows are kept, the row gets its own.

    Args:
      job: The job.
      row: The row; its key may be replaced.
      keys: Of the plan.
      repeats: Number of rows that have repeated a key, by key.
      before: Keys of the generations before.
    """
    key = row["key"]
    if key not in before and keys.add(key):
        return None
    if job.settings.duplicates == "drop":
        return SampleError("duplicate")
    while row["key"] in before or not keys.add(row["key"]):
        repeats[key] += 1
        row["key"] = repeated_key(key, repeats[key] + 1)
    return None


def _check_group(job: Job, group: str, old: set[int]) -> None:
    """Refuses a new row of an old group, and one with a group where the others have none.

    Indexes name the groups of all samples of a split, or of none.
    """
    where = job.settings.source
    if group and hash_text(group) in old:
        raise ConflictError("source_changed.group", where=where, group=group)
    if bool(group) != bool(old):
        raise ConflictError("source_changed.groups", where=where, group=group or "none")


def _stored_keys(job: Job) -> KeyList:
    """Reads the keys of the samples that a finished split has; none where it is a first build."""
    keys = KeyList()
    manifest = load_manifest(job.settings.out) if job.growth else None
    for shard in manifest.select(job.settings.split) if manifest else ():
        url = job.url(shard.index_url)
        index = parse_index(
            memoryview(storage.read_bytes(url)),
            where=url,
            num_samples=shard.nsamples,
            shard_bytes=shard.num_bytes,
            sha256=shard.index_sha256,
        )
        for key in index["key"].tolist():
            keys.add(key.decode())
    return keys


def _is_link(error: SampleError) -> bool:
    return "url" in error.facts


def _check_lost(job: Job, reasons: Counter[str], *, dead_rows: int, rows: int) -> None:
    """Refuses a plan that has lost too many rows: to dead links, or for any other failure.

    Duplicates, rows without a message and those that the dataset leaves out are no failures.
    """
    settings = job.settings
    meant = {"duplicate", "held_out", "no_message", *job.dataset.leaves_out}
    lost = Counter({name: n for name, n in reasons.items() if name not in meant})
    failed = sum(lost.values()) - dead_rows
    for number, share, default, setting in (
        (dead_rows, settings.max_dead_links, DEAD_LINKS_SHARE, "MAX_DEAD_LINKS"),
        (failed, settings.max_lost_rows, FAILED_ROWS_SHARE, "MAX_LOST_ROWS"),
    ):
        allowed = allowed_failures(share, rows, default=default)
        if number > allowed:
            raise BudgetError(
                "lost_rows",
                where=settings.source,
                setting=setting,
                rows=rows,
                allowed=allowed,
                facts=dict(lost.most_common()),
            )


def _origin(job: Job, numbers: Sequence[int]) -> dict[str, Any]:
    """Says of which rows an example is: their number, and the file and number of the first."""
    file, row = job.dataset.rows.locate(numbers[0])
    found: dict[str, Any] = {"origin": {"file": file, "row": row}}
    return {**found, "rows": len(numbers)} if len(numbers) > 1 else found


def _planned_rows(
    job: Job, results: Mapping[str, FetchResult], stamps: StampWriter
) -> Iterator[tuple[dict[str, Any], SampleError | None]]:
    """Gives each row of the dataset as the plan keeps it, with its error if it cannot be built."""

    def read_url(url: str) -> bytes:
        result = results[url]
        if result.status != "ok":
            raise _link_error(result, kind="document")
        return job.blobs.get(result.sha256 or "")

    job.dataset.read_url = read_url
    for i in job.examples:
        numbers = job.dataset.row_numbers(i)
        origin = _origin(job, numbers)
        try:
            with job.dataset.naming_row(numbers[0]):
                row, error = _planned_row(job, job.dataset[i], results, stamps)
                require_plain(row, any_text=True)  # an adapter may give what no plan can hold
        except SampleError as refused:
            row, error = {"key": f"row-{numbers[0]}", "image": None, "example": {}}, refused
        yield {**row, **origin}, error
    job.dataset.read_url = None  # it keeps what is known of all URLs in memory


def _planned_row(
    job: Job,
    example: dict[str, Any],
    results: Mapping[str, FetchResult],
    stamps: StampWriter,
) -> tuple[dict[str, Any], SampleError | None]:
    images, videos, clips = example_images(example), example_videos(example), example_clips(example)
    example.pop("image", None)
    example.pop("video", None)
    _check_number(job, images)
    planned = [_plan_image(job, image, results, stamps) for image in images]
    locations = [image.location for image in planned]
    found = [
        _plan_video(job, video, clip, results, stamps)
        for video, clip in zip(videos, clips, strict=True)
    ]
    want = example.get("metadata", {}).get("image_sha256")
    changed = _changed_image(want, planned) if job.settings.fetch.sha256 != "ignore" else None
    planned += found
    key = sample_key(example, image_id=images_identity([image.identity for image in planned]))
    location = locations if job.dataset.several_images else next(iter(locations), None)
    if "metadata" in example:
        example = {**example, "metadata": _without_secrets(example["metadata"])}
    if job.preparer.model is None:
        example.pop("chats", None)
    row = {"key": key, "image": location, "example": example}
    if group := example.pop("group", ""):
        row["group"] = str(group)
    if found:
        row["video"] = [video.location for video in found]
    errors = [
        image.error
        for image in planned
        # A picture that was annotated as it is, is none that stands for others.
        if image.error is not None
        and not (image.error.reason == "placeholder" and image.identity == want)
    ]
    if not example["message_list"]:
        errors.append(SampleError("no_message.mode"))
    if changed is not None and job.settings.fetch.sha256 == "warn":
        row["warning"], changed = changed.reason, None
    return row, errors[0] if errors else changed


def _without_secrets(value: Any) -> Any:
    """Masks passwords and signatures in the URLs of metadata: plans, shards and lists keep it."""
    if isinstance(value, dict):
        return {name: _without_secrets(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_secrets(each) for each in value]
    return redact(value) if isinstance(value, str) and _URL.fullmatch(value) else value


def _link_error(result: FetchResult, *, kind: str) -> SampleError:
    return SampleError(
        result.reason,
        what=f"{kind} could not be fetched",
        url=result.url,
        http_status=result.http_status,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _PlannedImage:
    location: dict[str, Any]
    """Where the build finds it."""
    identity: str
    error: SampleError | None = None


def _plan_image(
    job: Job,
    image: ImageSource,
    results: Mapping[str, FetchResult],
    stamps: StampWriter,
    *,
    kind: str = "image",
) -> _PlannedImage:
    location: dict[str, Any]
    if isinstance(image, SceneImage):
        location = {"kind": "scene", "seed": image.seed, "idx": image.idx}
        return _PlannedImage(location=location, identity=image_identity(image, None))
    if isinstance(image, RemoteImage):
        location = {"kind": "blob", "url": image.url, "sha256": ""}
        # A stamp is a request, so it is made once; compared by its URL, which must not be masked.
        wanted = job.settings.compare != "none" and redacted_url(image.url) == image.url
        if wanted and image.url not in stamps:
            stamps.add(stamp_file(image.url))
        try:
            image = image.read()
        except SampleError as missing:
            return _PlannedImage(location=location, identity="", error=missing)
    if isinstance(image, PageImage):
        planned = _plan_image(job, image.document, results, stamps)
        page, dpi = image.page, image.dpi
        found = {"kind": "page", "document": planned.location, "page": page, "dpi": dpi}
        identity = planned.identity and page_identity(planned.identity, page=page, dpi=dpi)
        return _PlannedImage(location=found, identity=identity, error=planned.error)
    if isinstance(image, EpisodeFrame):
        try:
            image = image.read()
        except SampleError as missing:
            return _PlannedImage(location={"kind": "blob"}, identity="", error=missing)
    if isinstance(image, bytes):
        identity = hashlib.sha256(image).hexdigest()
        if not job.blobs.has(identity, num_bytes=len(image)):
            job.blobs.put(image)
        return _PlannedImage(location={"kind": "blob", "sha256": identity}, identity=identity)
    if isinstance(image, Path):
        location = {"kind": "path", "path": str(image.absolute())}
        stamp = stamp_file(image)  # before it is read: a change in between is noticed later
        try:
            identity = hashlib.sha256(read_path(image)).hexdigest()
        except SampleError as unreadable:
            stamps.add(stamp)
            return _PlannedImage(location=location, identity="", error=unreadable)
        stamps.add(with_content(stamp, identity))
        return _PlannedImage(location={**location, "sha256": identity}, identity=identity)
    if isinstance(image, str):
        result = results[image]
        location = {"kind": "blob", "url": result.url, "sha256": result.sha256}
        error = None if result.status == "ok" else _link_error(result, kind=kind)
        return _PlannedImage(location=location, identity=result.sha256 or "", error=error)
    if isinstance(image, np.ndarray | Image.Image):
        try:
            payload = pixels_file(image)
        except SampleError as unusable:
            return _PlannedImage(location={"kind": "blob"}, identity="", error=unusable)
        digest = hashlib.sha256(payload).hexdigest()
        if not job.blobs.has(digest, num_bytes=len(payload)):
            job.blobs.put(payload)
        # The key is that of the unsharded path, which sees the pixels.
        identity = image_identity(image, image)
        return _PlannedImage(location={"kind": "blob", "sha256": digest}, identity=identity)
    raise SampleError("row_image", fields=[], got=type(image).__name__)


def _plan_video(
    job: Job,
    video: VideoSource,
    clip: Clip | None,
    results: Mapping[str, FetchResult],
    stamps: StampWriter,
) -> _PlannedImage:
    """Finds where a video is, and its identity; its frames are decoded when it is built."""
    if not job.dataset.videos:
        raise ConfigError("video_dataset", dataset=job.dataset.name)
    if isinstance(video, SceneVideo):
        location: dict[str, Any] = {"kind": "scene", "seed": video.seed, "idx": video.idx}
        return _PlannedImage(location=location, identity=video_identity(video, clip))
    if isinstance(video, bytes | str | RemoteImage):  # it goes the way of an image
        planned = _plan_image(job, video, results, stamps, kind="video")
        if planned.error is not None:
            return planned
        location, sha256 = planned.location, planned.identity
    elif isinstance(video, Path):
        location = {"kind": "path", "path": str(video.absolute())}
        stamp = stamp_file(video)
        try:
            sha256 = file_sha256(video)
        except SampleError as unreadable:
            stamps.add(stamp)
            return _PlannedImage(location=location, identity="", error=unreadable)
        stamps.add(with_content(stamp, sha256))
        location["sha256"] = sha256
    else:
        raise ConfigError("video_type", got=type(video).__name__)
    identity = video_identity(video, clip, sha256=sha256)
    return _PlannedImage(location=location, identity=identity)


def _check_number(job: Job, images: Sequence[ImageSource]) -> None:
    if len(images) > 1 and not job.dataset.several_images:
        raise ConfigError("image_number", got=len(images), dataset=job.dataset.name)


def _changed_image(want: str | None, planned: Sequence[_PlannedImage]) -> SampleError | None:
    """Finds a fetched image that is not the one that was annotated."""
    for image in planned:
        if want and "url" in image.location and image.identity != want:
            return SampleError(
                "image_sha256", url=image.location["url"], got=image.identity, want=want
            )
    return None


def _probe(job: Job, spool: _Spool, numbers: list[int], report: Reporter) -> float:
    """Builds a few samples: their mean length in bytes, and proof that the recipe works."""
    sizes, errors = [], []
    report.stage("probe", len(numbers))
    for i in numbers:
        try:
            sizes.append(sample_size(job.preparer, spool.read(i), cache=job.blobs).num_bytes)
        except SampleError as error:
            errors.append(error)
        report.step("")
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


def _write_rows(
    job: Job,
    spool: _Spool,
    order: np.ndarray,
    borders: Sequence[int],
    groups: Mapping[str, str],
    folder: Path,
    report: Reporter,
    check_held: Callable[[], None],
) -> str:
    """Writes the rows to one file per shard, in the source's order.

    The group of a row is named there by the first of its keys: `groups`, by the dataset's name.

    Returns:
      The hash of all rows. Where in the source a row was is not in it: no byte depends on that.
    """
    report.stage("write plan", len(order))
    num_shards = len(borders) - 1
    position = np.empty(len(order), dtype=np.int64)
    position[order] = np.arange(len(order))
    hashes = [hashlib.sha256() for _ in range(num_shards)]
    waiting: dict[int, list[bytes]] = {}
    held_bytes = 0

    def flush() -> None:
        for shard, lines in waiting.items():
            path = folder / str(shard)
            with storage.translate_errors(str(path)), path.open("ab") as stream:
                stream.writelines(lines)
        waiting.clear()

    names = {canonical_json(name)[:-1]: canonical_json(key)[:-1] for name, key in groups.items()}
    for i, row in enumerate(spool):
        at = int(position[i])
        shard = bisect.bisect_right(borders, at) - 1
        hashed, line = row.place(at, group=names.get(row.group, b""))
        hashes[shard].update(hashed)
        report.step("")
        waiting.setdefault(shard, []).append(line)
        held_bytes += len(line)
        if held_bytes >= HELD_BYTES:
            flush()
            held_bytes = 0
    flush()
    for shard in range(num_shards):
        check_held()
        storage.publish_file(job.rows_url(shard), folder / str(shard))
    return fingerprint([digest.hexdigest() for digest in hashes])


def _first_keys(rows: _Rows) -> dict[str, str]:
    """Gives the lowest key of each group: keys follow from contents, unlike a dataset's own names.

    So groups of other sources have other names, wherever those sources are.
    """
    found: dict[str, str] = {}
    for key, group in zip(rows.keys, rows.groups, strict=True):
        if group:
            found[group] = min(key, found.get(group, key))
    return found


def image_urls(
    job: Job, report: Reporter, marks: RowMarks | None = None, *, folder: str | None
) -> UrlSpool:
    """Lists the URLs of images and videos of the examples to build, then those of "validation".

    Args:
      job: The job.
      report: Gets the progress.
      marks: Gets those of the examples.
      folder: Local folder for a long list; None for that of temporary files.
    """

    def each_url() -> Iterator[str]:
        for i in job.examples:
            example = None
            with suppress(SampleError):  # the plan reads the row again and counts the error
                example = job.dataset[i]
                media = [*example_images(example), *example_videos(example)]
                yield from (each for each in media if isinstance(each, str))
            if marks is not None:
                marks.add(example)
            report.step("")
        yield from _held_out_urls(job)

    report.stage("rows", len(job.examples))
    return unique_urls(each_url(), folder)


def _judged(
    job: Job, results: Mapping[str, FetchResult], report: Reporter
) -> Mapping[str, FetchResult]:
    """Fails the URLs that give a placeholder, says what is striking, and holds the budget.

    Raises:
      BudgetError: `dead_links`.
    """
    held_out = TextSet()
    for url in _held_out_urls(job):
        held_out.add(url)
    survey = survey_results(
        results,
        num_urls=job.settings.fetch.placeholder_urls,
        ignored=held_out if len(held_out) else None,
    )
    for sha256, (number, url) in sorted(
        survey.placeholders.items(), key=lambda each: (-each[1][0], each[0])
    ):
        report.note(
            f"{number:,} URLs give one image ({sha256[:16]}, for example {url}): taken for "
            "a placeholder (PLACEHOLDER_URLS=0 keeps it)"
        )
    allowed = allowed_failures(
        job.settings.max_dead_links, survey.num_urls, default=DEAD_LINKS_SHARE
    )
    if survey.failed.total() > allowed:
        raise BudgetError(
            "dead_links",
            links=survey.num_urls,
            allowed=allowed,
            facts=dict(survey.failed.most_common()),
        )
    if survey.num_shared:
        report.note(
            f"{survey.num_shared:,} pictures are under several URLs ({survey.num_sharing:,}): "
            "kept, since rows with other texts are other samples"
        )
    return survey.results
