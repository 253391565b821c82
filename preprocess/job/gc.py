"""GC: finds what no manifest and no running plan needs in an output, and removes it.

What interrupted jobs leave: shards and receipts of an abandoned build, planned rows
without their plan, unfinished files, and the parts of multipart uploads, which no listing of
objects shows and which an S3 store charges for until they are aborted. Only names that a job itself
gives are considered; any other file is left alone.

Kept are the manifest and all it names, the tokenizer, run.json, the identities of the jobs that
made the splits, receipts and quarantine lists of shards that are named, and all that belongs to a
plan that is not committed yet: the same `make shards` resumes from there. So is what the parts of a
job have told each other, as long as a split has begun and is not committed. An import may name tars
inside its own output: other files in their folders are not ours either, and are kept.

Google Cloud Storage keeps its unfinished uploads to itself and drops them after a week; there is
nothing to abort there.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from preprocess.job.build import SCRATCH
from preprocess.job.lease import LEASE_NAME, PARTS_FOLDER
from preprocess.job.planner import read_json
from shardspec import storage
from shardspec.columns import COLUMNS_SUFFIX
from shardspec.errors import ManifestError
from shardspec.manifest import (
    INDEX_SUFFIX,
    MANIFEST_NAME,
    AddedColumns,
    Manifest,
    ShardEntry,
    load_manifest,
    parse_receipt,
)
from shardspec.storage import OpenUpload, StoredObject

_SHARD = re.compile(
    r"(?P<split>[A-Za-z0-9_-]+)/[A-Za-z0-9_-]+-(?P=split)-(?:g\d{5,}-)?\d{5,}-of-\d{5,}"
    + rf"(?:\.tar|{re.escape(INDEX_SUFFIX)}|{re.escape(COLUMNS_SUFFIX)})"
)
_RECEIPT = re.compile(r"receipts/(?P<name>[A-Za-z0-9_-]+-\d{5,}-of-\d{5,})\.json")
_QUARANTINE = re.compile(r"quarantine/(?P<name>[A-Za-z0-9_-]+-\d{5,}-of-\d{5,})\.jsonl")
_ROWS = re.compile(r"plan/(?P<split>[A-Za-z0-9_-]+)/(?:rows-\d{5,}\.jsonl|plan\.json)")

_READS_AT_ONCE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Strays:
    """What an output holds and nothing needs."""

    objects: tuple[StoredObject, ...]
    uploads: tuple[OpenUpload, ...]

    @property
    def num_bytes(self) -> int:
        """Length of the objects; that of the parts of uploads is not listed anywhere."""
        return sum(each.num_bytes for each in self.objects)


def find_strays(url: str, *, written_before_unix_s: float | None = None) -> Strays:
    """Finds what nothing needs; removes nothing.

    Args:
      url: The output.
      written_before_unix_s: Keep what was written later.

    Raises:
      ManifestError: `manifest_missing`: there is neither a manifest nor a plan, so nothing
        shows what is needed; or as `parse_manifest`.
    """
    manifest = load_manifest(url)
    listed = storage.list_objects(url)
    names = {each.name for each in listed}
    plans = sorted(n.split("/")[1] for n in names if re.fullmatch(r"plan/[^/]+/plan\.json", n))
    begun = [n for n in names if re.fullmatch(r"plan/[^/]+\.json", n)]
    if manifest is None and not begun and not plans:
        raise ManifestError("manifest_missing.nothing", where=storage.join(url, MANIFEST_NAME))
    kept = _kept(url, manifest, _planned(url, plans, names))
    splits = manifest.splits.keys() if manifest else set()
    unfinished = bool(plans) or bool({posixpath.basename(n)[:-5] for n in begun} - splits)
    strays = [
        each
        for each in listed
        if _is_stray(url, each.name, kept=kept, plans=plans)
        or (not unfinished and each.name.startswith(f"{PARTS_FOLDER}/"))
    ]
    uploads = [
        each
        for each in storage.list_uploads(url)
        # No job is under way, so nobody will finish them.
        if _is_ours(each.name)
    ]
    if written_before_unix_s is not None:
        strays = [each for each in strays if each.modified_unix_s < written_before_unix_s]
        uploads = [each for each in uploads if each.began_unix_s < written_before_unix_s]
    return Strays(objects=tuple(strays), uploads=tuple(uploads))


def remove_strays(url: str, strays: Strays) -> None:
    """Removes what `find_strays` has found."""
    for upload in strays.uploads:
        storage.abort_upload(storage.join(url, upload.name), upload.upload_id)
    storage.delete_objects(url, (each.name for each in strays.objects))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """What is needed, among the files with a job's names."""

    files: frozenset[str]
    """Tars, indexes and column files, by their absolute URLs: a view may name any."""
    folders: frozenset[str]
    """Absolute URLs of the folders where others have put the tars of a view."""
    shards: frozenset[str]
    """Names of the shards whose receipts and quarantine lists are needed."""


def _kept(url: str, manifest: Manifest | None, planned: list[ShardEntry]) -> _Kept:
    """Gathers what the manifest names, and the shards that unfinished plans have built."""
    shards = [*planned, *(manifest.shards if manifest else ())]
    # The shards of a view are not files.
    files = [*(shard.file for shard in planned), *(manifest.files if manifest else ())]
    tars = manifest.view.files if manifest and manifest.view else ()
    added = manifest.columns.files if manifest and manifest.columns else ()
    names = [name for file in files for name in (file.url, file.index_url)]
    names += [AddedColumns.file_url(shard_url) for shard_url in added]
    return _Kept(
        files=frozenset(_absolute(url, name) for name in names),
        folders=frozenset(posixpath.dirname(_absolute(url, tar.url)) for tar in tars),
        shards=frozenset(posixpath.basename(shard.url).removesuffix(".tar") for shard in shards),
    )


def _absolute(url: str, name: str) -> str:
    return storage.absolute_url(storage.resolve(url, name))


def _planned(url: str, plans: Iterable[str], names: set[str]) -> list[ShardEntry]:
    """Lists the shards that unfinished plans have built: those with a receipt of theirs."""
    keys = set()
    for split in plans:
        document = read_json(storage.join(url, "plan", split, "plan.json"))
        if document is not None:
            keys.add(document.get("build_key"))
    receipts = sorted(name for name in names if _RECEIPT.fullmatch(name)) if keys else []

    def finished(name: str) -> ShardEntry | None:
        where = storage.join(url, name)
        receipt = parse_receipt(storage.read_bytes(where), where=where)
        if receipt is None or receipt.build_key not in keys:
            return None
        return receipt.shard

    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        return [shard for shard in pool.map(finished, receipts) if shard is not None]


def _is_stray(url: str, name: str, *, kept: _Kept, plans: list[str]) -> bool:
    if name == LEASE_NAME:
        return False
    if storage.is_temporary(posixpath.basename(name)) or name.startswith(f"{SCRATCH}/"):
        return _absolute(url, name) not in kept.files
    if _SHARD.fullmatch(name):
        where = _absolute(url, name)
        return where not in kept.files and posixpath.dirname(where) not in kept.folders
    match = _RECEIPT.fullmatch(name) or _QUARANTINE.fullmatch(name)
    if match:
        return match["name"] not in kept.shards
    match = _ROWS.fullmatch(name)
    return match is not None and match["split"] not in plans


def _is_ours(name: str) -> bool:
    """Returns True if an unfinished upload would have made a file of a job."""
    return any(p.fullmatch(name) for p in (_SHARD, _RECEIPT, _QUARANTINE, _ROWS))
