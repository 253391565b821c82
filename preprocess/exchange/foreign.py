"""IMPORT: makes a dataset of WebDataset tars that another tool wrote, without moving them.

Each tar is read once: its samples become rows of an index (byte range, checksum, key), which is
stored in the output; the manifest is a view that refers to the tars in place. From then on they can
be streamed raw, resharded, filtered, merged and verified like any dataset. A receipt per tar lets
the same command resume.
"""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Annotated, Any, get_args

import numpy as np

from preprocess.exchange.census import Census, describe
from preprocess.job import (
    Difference,
    Engine,
    EngineOption,
    RayAddressOption,
    Reporter,
    find_differences,
    node_proof,
    output_lock,
    read_notes,
    require_name,
    shard_name,
    table,
)
from preprocess.job.engines import local
from preprocess.reshard import portable_url, repeated_key
from preprocess.settings import Setting, usable_cores
from shardspec import storage
from shardspec.checksum import crc32
from shardspec.errors import ConfigError, ConflictError, ShardError
from shardspec.foreign import Dots, ForeignFile, is_pickle, split_name, walk_foreign
from shardspec.index import encode_index, raw_index_dtype
from shardspec.manifest import (
    INDEX_SUFFIX,
    MANIFEST_NAME,
    NO_TOKENIZER,
    FileEntry,
    Manifest,
    Receipt,
    ShardEntry,
    SplitEntry,
    View,
    canonical_json,
    encode_receipt,
    fingerprint,
    load_manifest,
    parse_receipt,
)
from shardspec.storage import ObjectVersion, check_unchanged, object_version

CENSUS_FOLDER = "import"
"""Folder of the output with what is notable about each tar, for people."""

_CHUNK_BYTES = 8 * 2**20
_READS_AT_ONCE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportSettings:
    """Which tars, and what they are called together."""

    tars: Annotated[
        tuple[str, ...],
        Setting("tars, or folders of them; URLs too", flag="src", positional=True),
    ]
    out: Annotated[str, Setting("folder or URL for the manifest and the indexes")]
    name: Annotated[str, Setting("name of the dataset")]
    split: Annotated[str, Setting("name of the split")] = "train"
    dots: Annotated[
        Dots,
        Setting("which dot of a file's name ends the key of its sample; webdataset: the first"),
    ] = "first"
    num_workers: Annotated[
        int,
        Setting("number of processes", flag="jobs", shown="all cores", unset=usable_cores),
    ] = 1
    engine: EngineOption = "local"
    ray_address: RayAddressOption = ""

    def __post_init__(self) -> None:
        wrong: dict[str, object] = {}
        if self.num_workers < 1:
            wrong["num_workers"] = self.num_workers
        if self.dots not in get_args(Dots):
            wrong["dots"] = self.dots
        if wrong:
            raise ConfigError("job_settings", facts=wrong)
        if self.out.startswith("memory://"):
            raise ConfigError("out_memory", where=self.out)


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """How it ended."""

    manifest: Manifest
    sha256: str
    """Of the manifest."""
    skipped: dict[str, int]
    """Files that belong to no sample, and fields that readers leave out, by reason."""
    repeated: str | None
    """A key that several samples have; nothing but filters and merges goes by keys."""
    notes: tuple[str, ...] = ()
    """What is notable about the samples: scattered ones, dots in names, fields that some lack."""


@dataclass(frozen=True, kw_only=True)
class ImportContext:
    """What every task shares; sent to worker processes."""

    out: str
    split: str
    tars: tuple[str, ...]
    stamps: tuple[ObjectVersion, ...]
    names: tuple[str, ...]
    dots: Dots = "first"

    def census_url(self, task: int) -> str:
        """URL of what is notable about a tar."""
        return storage.join(self.out, CENSUS_FOLDER, self.names[task] + ".json")

    def receipt_url(self, task: int) -> str:
        """URL of a tar's receipt."""
        return storage.join(self.out, "receipts", self.names[task] + ".json")

    def build_key(self, task: int) -> str:
        """Hashes what the index of a tar follows from."""
        found = self.stamps[task]
        rule = [] if self.dots == "first" else [self.dots]
        url = storage.absolute_url(self.tars[task])
        return fingerprint(["import", url, found.num_bytes, found.version, *rule])


def import_tars(settings: ImportSettings, report: Reporter) -> Imported:
    """Indexes tars in place, or resumes an interrupted run.

    Raises:
      ConfigError: `import_tars`: a tar is missing, or named twice, or all of them are empty;
        `dataset_name`.
      ConflictError: `job_conflict`: the output holds something else.
      ShardError: `foreign_tar`, `foreign_sample`: a tar cannot be used.
    """
    require_name(settings.name, of="dataset")
    require_name(settings.split, of="split")
    tars = _find_tars(settings.tars)
    stamps = tuple(_require_there(url) for url in tars)
    names = tuple(
        shard_name(settings.name, settings.split, i, num_shards=len(tars)) for i in range(len(tars))
    )
    context = ImportContext(
        out=settings.out,
        split=settings.split,
        tars=tars,
        stamps=stamps,
        names=names,
        dots=settings.dots,
    )
    build_key = fingerprint([context.build_key(task) for task in range(len(tars))])
    with output_lock(settings.out) as require_held:
        _check_conflict(context, settings, build_key)
        with Engine(settings) as engine, _mark(context, build_key, engine) as mark:
            receipts = _index_all(context, report, engine, mark)
        if not any(receipt.shard.nsamples for receipt in receipts):
            raise ConfigError("import_tars.empty", where=settings.out)
        manifest = _manifest(context, settings, receipts, build_key)
        payload = manifest.encode()
        require_held()
        storage.publish_bytes(storage.join(settings.out, MANIFEST_NAME), payload)
    keys = [load_keys(settings.out, receipt.shard) for receipt in receipts]
    twice = repeated_key(np.concatenate(keys))
    return Imported(
        manifest=manifest,
        sha256=hashlib.sha256(payload).hexdigest(),
        skipped=dict(manifest.splits[settings.split].quarantined),
        repeated=None if twice is None else twice.decode(),
        notes=tuple(_notes(context)),
    )


def _notes(context: ImportContext) -> list[str]:
    def read(task: int) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads(storage.read_bytes(context.census_url(task)))
        except FileNotFoundError:
            return None  # indexed by an earlier release
        return found

    tasks = range(len(context.tars))
    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        censuses = zip(tasks, pool.map(read, tasks), strict=True)
        found = {context.tars[task]: census for task, census in censuses if census is not None}
    return describe(found, folder=storage.join(context.out, CENSUS_FOLDER))


def _find_tars(urls: Sequence[str]) -> tuple[str, ...]:
    """Lists the tars; a folder means every `.tar` directly in it, sorted by name."""
    found: list[str] = []
    for url in urls:
        if url.endswith(".tar"):
            found.append(url)
        else:
            names = [name for name in storage.list_names(url) if name.endswith(".tar")]
            if not names:
                raise ConfigError("import_tars.folder", where=url)
            found += [storage.join(url, name) for name in names]
    absolute = [storage.absolute_url(url) for url in found]
    twice = [url for url, n in Counter(absolute).items() if n > 1]
    if twice:
        raise ConfigError("import_tars.twice", where=twice[0])
    return tuple(absolute)


def _require_there(url: str) -> ObjectVersion:
    if storage.is_local(url):
        path = storage.local_path(url)
        if path.exists() and not path.is_file():  # reading a named pipe would wait for a writer
            raise ConfigError("import_tars.special", where=url)
    found = object_version(url)
    if found is None:
        raise ConfigError("import_tars.absent", where=url)
    return found


def _check_conflict(context: ImportContext, settings: ImportSettings, build_key: str) -> None:
    manifest = load_manifest(settings.out)
    if manifest is None:
        _check_unfinished(settings.out)
        return
    entry = manifest.splits.get(settings.split)
    if entry is None or entry.build_key != build_key or manifest.dataset != settings.name:
        found = find_differences(_described(manifest), _asked(context, settings)) or [
            Difference(field="tars", old="as they were", new="written since")
        ]
        raise ConflictError("job_conflict.dataset", where=settings.out, table=table(found))


def _described(manifest: Manifest) -> dict[str, Any]:
    """Says what an output holds, as settings of an import."""
    source = next(iter(manifest.splits.values())).source if manifest.splits else {}
    files = manifest.view.files if manifest.view is not None else ()
    return {
        "kind": source.get("kind", "shards"),
        "NAME": manifest.dataset,
        "SPLIT": ", ".join(sorted(manifest.splits)),
        "DOTS": source.get("dots", "first"),
        "tars": sorted(posixpath.basename(file.url) for file in files),
    }


def _asked(context: ImportContext, settings: ImportSettings) -> dict[str, Any]:
    return {
        "kind": "import",
        "NAME": settings.name,
        "SPLIT": settings.split,
        "DOTS": settings.dots,
        "tars": sorted(posixpath.basename(url) for url in context.tars),
    }


def _check_unfinished(out: str) -> None:
    """Refuses an output where a job that makes shards has not ended.

    The import's manifest would bar that job from ending, and both would write the same names.
    """
    noted = sorted(read_notes(out))
    if noted:
        raise ConflictError("job_conflict.unfinished", where=out, noted_in=", ".join(noted))


@contextmanager
def _mark(context: ImportContext, build_key: str, engine: Engine) -> Iterator[str]:
    """Gives the URL of an object by which other machines tell that they see the output."""
    if engine.is_local:
        yield ""
        return
    mark = posixpath.join(CENSUS_FOLDER, "running.json")
    storage.publish_bytes(storage.join(context.out, mark), canonical_json({"import": build_key}))
    try:
        yield storage.join(context.out, mark)
    finally:
        storage.delete_objects(context.out, [mark])


def _index_all(
    context: ImportContext, report: Reporter, engine: Engine, mark: str
) -> list[Receipt]:
    receipts = {task: _find_receipt(context, task) for task in range(len(context.tars))}
    missing = [task for task, receipt in receipts.items() if receipt is None]
    if len(missing) < len(receipts):
        report.note(f"{len(receipts) - len(missing)} of {len(receipts)} tars are indexed already")
    report.stage("index", len(missing))
    proof = None if engine.is_local else node_proof(context.out, mark)
    for event in engine.run(missing, work=index_tar, context=context, proof=proof):
        if isinstance(event, local.TaskLost):
            report.note(f"a worker died (exit code {event.exit_code}); its tar is read again")
        elif isinstance(event, local.TaskDone):
            receipts[event.task] = event.value
            report.step("")
    return [receipt for receipt in receipts.values() if receipt is not None]


def _find_receipt(context: ImportContext, task: int) -> Receipt | None:
    url = context.receipt_url(task)
    try:
        receipt = parse_receipt(storage.read_bytes(url), where=url)
    except FileNotFoundError:
        return None
    if receipt is None or receipt.build_key != context.build_key(task):
        return None
    index = storage.join(context.out, receipt.shard.index_url)
    return receipt if storage.size(index) == receipt.shard.index_bytes else None


def index_tar(context: ImportContext, task: int, report: Callable[[Any], None]) -> Receipt:  # noqa: ARG001
    """Reads one tar and publishes its index and its receipt.

    Raises:
      ShardError: `foreign_tar`, `foreign_sample`, `source_changed`.
    """
    url, name = context.tars[task], f"{context.split}/{context.names[task]}"
    skipped: Counter[str] = Counter()
    census = Census()
    split = partial(split_name, dots=context.dots)
    with opened(url) as stream:
        files = walk_foreign(stream, where=url, skipped=skipped, split=split)
        rows = index_rows(files, where=url, census=census)
        rows["crc32"] = [_crc32(stream, int(row["offset"]), int(row["num_bytes"])) for row in rows]
        sha256 = _sha256(stream)
        skipped += _pickles(stream, url)
    check_unchanged(url, context.stamps[task])
    index = encode_index(rows)
    storage.publish_bytes(storage.join(context.out, name + INDEX_SUFFIX), index)
    described = canonical_json(census.to_dict(dots=context.dots), indent=1)
    storage.publish_bytes(context.census_url(task), described)
    entry = ShardEntry(
        url=name + ".tar",
        split=context.split,
        nsamples=len(rows),
        num_bytes=context.stamps[task].num_bytes,
        sha256=sha256,
        index_bytes=len(index),
        index_sha256=hashlib.sha256(index).hexdigest(),
        num_images=0,
        num_tokens=0,
        num_loss_tokens=0,
    )
    receipt = Receipt(
        build_key=context.build_key(task), shard=entry, quarantined=dict(sorted(skipped.items()))
    )
    storage.publish_bytes(context.receipt_url(task), encode_receipt(receipt))
    return receipt


def index_rows(
    files: Iterable[ForeignFile], *, where: str, census: Census | None = None
) -> np.ndarray:
    """Groups the files of a tar to samples.

    Args:
      files: In the order of the tar.
      where: Named in errors.
      census: Counts the samples.

    Returns:
      `raw_index_dtype` [samples]; `crc32` is still 0.

    Raises:
      ShardError: `foreign_sample`: a sample has a field twice, or is longer than 4 GiB.
    """
    samples: list[tuple[int, int, int, bytes]] = []
    suffixes: set[str] = set()
    key: str | None = None
    for file in files:
        if file.key != key:
            if census is not None and key is not None:
                census.add(key, suffixes)
            samples.append((file.header, file.end, 0, file.key.encode()))
            key, suffixes = file.key, set()
        start, _, members, encoded = samples[-1]
        if file.suffix in suffixes or file.end - start >= 2**32:
            what = "has a field twice" if file.suffix in suffixes else "is longer than 4 GiB"
            raise ShardError(
                "foreign_sample",
                where=f"{where} sample {file.key}",
                problem=what,
                field=file.suffix,
            )
        suffixes.add(file.suffix)
        samples[-1] = (start, file.end, members + 1, encoded)
    if census is not None and key is not None:
        census.add(key, suffixes)
    longest = max((len(encoded) for *_, encoded in samples), default=1)
    rows = np.zeros(len(samples), dtype=raw_index_dtype(longest))
    for i, (start, end, members, encoded) in enumerate(samples):
        rows[i] = (start, end - start, 0, members, encoded)
    return rows


def _pickles(stream: IO[bytes], where: str) -> Counter[str]:
    """Counts the fields that no reader of ours opens."""
    found = sum(is_pickle(file.suffix) for file in walk_foreign(stream, where=where))
    return Counter({"pickle": found}) if found else Counter()


def _crc32(stream: IO[bytes], start: int, length: int) -> int:
    stream.seek(start)
    crc = 0
    while length:
        payload = stream.read(min(length, _CHUNK_BYTES))
        crc = crc32(payload, crc)
        length -= len(payload)
    return crc


def _sha256(stream: IO[bytes]) -> str:
    stream.seek(0)
    digest = hashlib.sha256()
    while payload := stream.read(_CHUNK_BYTES):
        digest.update(payload)
    return digest.hexdigest()


@contextmanager
def opened(url: str) -> Iterator[IO[bytes]]:
    """Opens a tar; one in an object store is fetched to a local disk first."""
    with storage.translate_errors(url):
        if storage.is_local(url):
            with storage.local_path(url).open("rb") as stream:
                yield stream
            return
        with TemporaryDirectory() as folder:
            copy = Path(folder) / "foreign.tar"
            storage.fetch_file(url, copy)
            with copy.open("rb") as stream:
                yield stream


def load_keys(out: str, shard: ShardEntry) -> np.ndarray:
    """Reads the keys of a shard from its index: bytes [samples]."""
    rows = np.lib.format.read_array(
        io.BytesIO(storage.read_bytes(storage.join(out, shard.index_url))), allow_pickle=False
    )
    keys: np.ndarray = rows["key"]
    return keys


def _manifest(
    context: ImportContext, settings: ImportSettings, receipts: Sequence[Receipt], build_key: str
) -> Manifest:
    files, shards, parts = [], [], {}
    skipped: Counter[str] = Counter()
    for i, receipt in enumerate(receipts):
        entry = receipt.shard
        skipped.update(receipt.quarantined)
        files.append(
            FileEntry(
                url=portable_url(context.out, context.tars[i]),
                index_url=entry.index_url,
                nsamples=entry.nsamples,
                num_bytes=entry.num_bytes,
                sha256=entry.sha256,
                index_bytes=entry.index_bytes,
                index_sha256=entry.index_sha256,
            )
        )
        # A shard of a view has no files.
        shards.append(replace(entry, sha256="", index_bytes=0, index_sha256=""))
        parts[entry.url] = ((i, 0, entry.nsamples),) if entry.nsamples else ()
    split = SplitEntry(
        build_key=build_key,
        source={"kind": "import", **({} if settings.dots == "first" else {"dots": settings.dots})},
        num_samples=sum(shard.nsamples for shard in shards),
        num_images=0,
        num_tokens=0,
        num_loss_tokens=0,
        num_bytes=sum(shard.num_bytes for shard in shards),
        quarantined=dict(sorted(skipped.items())),
    )
    return Manifest(
        dataset=settings.name,
        recipe={},
        tokenizer=NO_TOKENIZER,
        libraries={},
        splits={settings.split: split},
        shards=tuple(shards),
        view=View(files=tuple(files), parts=parts),
        raw=True,
    )
