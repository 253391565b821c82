"""What a reshard will do: its settings, the sources as they are found, and the plan.

1. The sources' manifests and indexes are read, and the sizes and versions of their files.
2. Samples are numbered across all of them; a filter keeps some, an order sorts them, borders
   cut them into shards (the arithmetic is assign.py's).

A plan can be printed. Nothing is written here.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np

from preprocess.job import (
    EngineOption,
    OwnDiskOption,
    PartOption,
    RayAddressOption,
    Reporter,
    ShardCount,
    action_quantiles,
    find_differences,
    read_columns,
    require_name,
    shard_borders,
    shard_name,
    table,
)
from preprocess.reshard.assign import (
    Advice,
    ReaderCluster,
    SampleOrder,
    advise,
    count_outputs,
    cut_runs,
    cut_shards,
    number_groups,
    order_numbers,
    parse_shares,
    repeated_key,
    split_numbers,
)
from preprocess.settings import Setting, usable_cores
from preprocess.sizes import parse_bytes
from shardspec import storage
from shardspec.columns import columns_dtype
from shardspec.errors import ConfigError, ConflictError, ManifestError, ShardError
from shardspec.expression import (
    encoded_keys,
    filter_columns,
    filter_values,
    parse_keys,
    scalar_names,
    select,
)
from shardspec.index import (
    GROUP_COLUMN,
    HEAD_COLUMNS,
    QUESTION_COLUMNS,
    parse_index,
    raw_index_dtype,
)
from shardspec.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    Segment,
    fingerprint,
    parse_manifest,
)
from shardspec.storage import ObjectVersion, object_version

_READS_AT_ONCE = 16

Form = Literal["auto", "view", "copy"]
"""The result: a view where that suffices, always a view, or always files."""

Through = Literal["auto", "client", "store"]
"""How bytes are copied: through this process, which checks each sample, or unchecked by the store
or the file system. "auto" lets the store copy between objects, and checks where bytes pass
anyway."""


def read_keys(url: str) -> frozenset[str]:
    """Reads a list of keys, one per line.

    Raises:
      ConfigError: `keys_file` (missing, or not UTF-8).
    """
    try:
        payload = storage.read_bytes(url)
    except FileNotFoundError as error:
        raise ConfigError("keys_file", where=url, error=error) from error
    return parse_keys(payload, where=url)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReshardSettings:
    """What to make of which datasets."""

    sources: tuple[str, ...]
    """Datasets of one recipe; several are joined, in this order."""
    out: str
    split: Annotated[
        str | None, Setting("only this split", group="what to make", shown="all splits")
    ] = None
    name: Annotated[
        str | None,
        Setting(
            "name of the result, if the sources have different names",
            group="what to make",
            verbs=("merge",),
        ),
    ] = None
    into: Annotated[
        Mapping[str, float] | None,
        Setting(
            "shares of the new splits, for example train=0.95,validation=0.05",
            group="what to make",
            verbs=("split",),
            metavar="SHARES",
            parse=parse_shares,
        ),
    ] = None
    """Samples are assigned by a hash of the key."""
    salt: Annotated[
        str,
        Setting(
            "any text; another one assigns the samples differently",
            group="what to make",
            verbs=("split",),
            metavar="TEXT",
        ),
    ] = ""
    where: Annotated[
        str,
        Setting(
            'condition on index columns, for example "num_tokens < 2048 and width >= 336"',
            group="what to make",
            verbs=("filter",),
            metavar="CONDITION",
        ),
    ] = ""
    """See `shardspec.expression`."""
    keys: Annotated[
        frozenset[str] | None,
        Setting(
            "file or URL with the keys to keep, one per line",
            group="what to make",
            verbs=("filter",),
            metavar="FILE",
            parse=read_keys,
        ),
    ] = None
    num_shards: Annotated[
        int | None,
        Setting("exact number of shards of each split", flag="shards", group="what to make"),
    ] = None
    cluster: ReaderCluster | None = None
    shard_bytes: Annotated[
        int,
        Setting(
            "target size of a shard",
            flag="shard-size",
            group="what to make",
            metavar="SIZE",
            parse=parse_bytes,
            shown="256MiB",
        ),
    ] = 256 * 2**20
    order: Annotated[
        SampleOrder,
        Setting(
            "the sources' order, a shuffle by --seed, or short samples first", group="what to make"
        ),
    ] = "keep"
    seed: Annotated[int, Setting("seed of the shuffle", group="what to make")] = 0
    form: Form = "auto"
    through: Annotated[
        Through,
        Setting(
            "client: bytes pass through this machine and every sample is checked; store: the file "
            "system or the object store copies what it can by itself, and no sample is checked; "
            "auto: store between objects, else client",
            group="how",
        ),
    ] = "auto"
    sha256: Annotated[
        bool,
        Setting(
            "also hash each new shard as a whole (slower; samples have checksums anyway)",
            group="how",
        ),
    ] = False
    num_workers: Annotated[
        int,
        Setting(
            "number of processes that copy",
            flag="jobs",
            group="how",
            shown="all cores",
            unset=usable_cores,
        ),
    ] = 1
    engine: EngineOption = "local"
    ray_address: RayAddressOption = ""
    part: PartOption = None
    own_disk: OwnDiskOption = "refuse"

    def __post_init__(self) -> None:
        counts = {"shards": self.num_shards, "jobs": self.num_workers}
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ConfigError("reshard_settings.least", name=name, got=count)
        if self.shard_bytes < 1:
            raise ConfigError("reshard_settings.shard_size", got=self.shard_bytes)
        if self.sha256 and self.through == "store":
            raise ConfigError("reshard_settings.sha256")
        if self.form == "view" and self.part is not None:
            raise ConfigError("reshard_settings.part", part=str(self.part))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReshardSource:
    """A dataset that is read."""

    url: str
    manifest: Manifest
    sha256: str
    """Of its manifest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPlan:
    """Where the samples of a new split come from."""

    split: str
    segments: tuple[Segment, ...]
    """Of the sources, with the full URLs of their files."""
    numbers: np.ndarray
    """int64 [n], samples counted through the segments, in their new order."""
    borders: np.ndarray
    """int64 [shards + 1], where each shard begins in `numbers`."""
    count: ShardCount
    num_bytes: int
    """Of the samples."""
    num_left_out: int
    """Samples that the filter did not keep."""
    quarantined: Mapping[str, int]
    origin: tuple[Mapping[str, str], ...]
    """What the samples were taken from."""
    added: np.ndarray | None
    """[m], the sources' added columns, of all samples that `numbers` counts; None without any."""

    @property
    def starts(self) -> np.ndarray:
        """int64 [segments + 1], number of each segment's first sample."""
        counts = [segment.num_rows for segment in self.segments]
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    @property
    def num_shards(self) -> int:
        """Shards of the split."""
        return len(self.borders) - 1

    def shard_numbers(self, shard: int) -> np.ndarray:
        """Gives the samples of a shard."""
        return self.numbers[self.borders[shard] : self.borders[shard + 1]]

    def runs(self, shard: int) -> np.ndarray:
        """Gives the runs of a shard; see `cut_runs`."""
        return cut_runs(self.shard_numbers(shard), self.starts)

    @property
    def files(self) -> dict[str, FileEntry]:
        """The files that may hold its samples, by the URL of the tar."""
        return {segment.file.url: segment.file for segment in self.segments}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReshardPlan:
    """Everything that will be done; nothing has been."""

    settings: ReshardSettings
    sources: tuple[ReshardSource, ...]
    dataset: str
    splits: tuple[SplitPlan, ...]
    tables: Mapping[str, np.ndarray]
    """Index of each file, by the URL of its tar."""
    stamps: Mapping[str, ObjectVersion]
    """Version of each tar."""
    advice: Advice
    num_runs: int
    num_unknown_keys: int
    """Requested keys that no sample has."""

    @property
    def view(self) -> bool:
        """Whether the result is a view."""
        if self.settings.part is not None:
            return False  # there is nothing to divide
        return self.settings.form == "view" or (self.settings.form == "auto" and self.advice.view)

    def name(self, plan: SplitPlan, shard: int) -> str:
        """Names a shard."""
        return shard_name(self.dataset, plan.split, shard, num_shards=plan.num_shards)

    def shard_bytes(self, plan: SplitPlan, shard: int) -> int:
        """Estimates the length of a shard, as if all samples had the same length."""
        share = len(plan.shard_numbers(shard)) / max(1, len(plan.numbers))
        return round(plan.num_bytes * share)

    @property
    def raw(self) -> bool:
        """Whether the samples are those of foreign tars."""
        return self.sources[0].manifest.raw

    def build_key(self, plan: SplitPlan) -> str:
        """Hashes everything that the bytes of a split follow from."""
        return fingerprint(
            {
                "dataset": self.dataset,
                "split": plan.split,
                "source": self.source_of(plan),
                "num_shards": plan.num_shards,
                "view": self.view,
                "sha256": self.settings.sha256,
                # The request is in `source`; this is its result.
                "samples": hashlib.sha256(plan.numbers.astype("<i8").tobytes()).hexdigest(),
            }
        )

    def source_of(self, plan: SplitPlan) -> dict[str, Any]:
        """Describes where a split comes from, in plain JSON types."""
        settings = self.settings
        found: dict[str, Any] = {"kind": "reshard", "from": [dict(each) for each in plan.origin]}
        found["order"] = settings.order
        if settings.order == "shuffle":
            found["seed"] = settings.seed
        if settings.where:
            found["where"] = settings.where
        if settings.keys is not None:
            found["keys_sha256"] = fingerprint(sorted(settings.keys))
        if settings.into is not None:
            found["into"], found["salt"] = dict(settings.into), settings.salt
        if plan.num_left_out:
            found["left_out"] = plan.num_left_out
        return found


def plan_reshard(settings: ReshardSettings, report: Reporter) -> ReshardPlan:
    """Plans a reshard; reads manifests and indexes, writes nothing.

    Raises:
      ConfigError: The request cannot be honoured.
      ConflictError: The sources were made by different recipes, or share keys.
      ManifestError: A source has no readable manifest.
      ShardError: A file of a source is missing, cut or changed.
    """
    sources = tuple(map(_open_source, settings.sources))
    _check_apart(settings, sources)
    _check_alike(sources)
    splits = _split_names(settings, sources)
    gathered = {split: _segments(sources, split) for split in splits}
    files = {s.file.url: s.file for segments in gathered.values() for s in segments}
    report.stage("read indexes", len(files))
    raw = sources[0].manifest.raw
    tables, stamps = {}, {}
    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        for file, (stamps[file.url], payload) in zip(
            files.values(), pool.map(_look_at, files.values()), strict=True
        ):
            tables[file.url] = _open_table(file, payload, raw=raw)
            report.step("")
    keys = {split: _keys(segments, tables) for split, segments in gathered.items()}
    _check_keys_apart(sources, splits, tables)
    groups = {
        split: _groups(settings, sources, segments, tables) for split, segments in gathered.items()
    }
    _check_groups_apart(groups)
    plans: list[SplitPlan] = []
    for split, segments in gathered.items():
        added = _added(sources, split)
        plans += _plan_split(
            settings, sources, split, segments, tables, keys[split], groups[split], added
        )
    num_runs = sum(len(plan.runs(shard)) for plan in plans for shard in range(plan.num_shards))
    return ReshardPlan(
        settings=settings,
        sources=sources,
        dataset=_name(settings, sources),
        splits=tuple(plans),
        tables=tables,
        stamps=stamps,
        advice=advise(num_runs),
        num_runs=num_runs,
        num_unknown_keys=_count_unknown(settings.keys or frozenset(), keys.values()),
    )


def _open_source(url: str) -> ReshardSource:
    where = storage.join(url, MANIFEST_NAME)
    try:
        payload = storage.read_bytes(where)
    except FileNotFoundError as error:
        raise ManifestError("manifest_missing.import", where=where) from error
    manifest = parse_manifest(payload, where=where)
    return ReshardSource(url=url, manifest=manifest, sha256=hashlib.sha256(payload).hexdigest())


def _check_apart(settings: ReshardSettings, sources: Sequence[ReshardSource]) -> None:
    """Refuses an output inside a source, around one, or around the files that one names."""
    out = storage.absolute_url(settings.out)
    for source in sources:
        folder = storage.absolute_url(source.url)
        if _lies_in(out, folder) or _lies_in(folder, out):
            raise ConfigError("reshard_in_place.folder", where=source.url, out=settings.out)
        # An import or a view names files elsewhere. Those of every split count: none may change.
        for file in source.manifest.files:
            for url in (file.url, file.index_url):
                where = storage.absolute_url(storage.resolve(source.url, url))
                if _lies_in(where, out):
                    raise ConfigError("reshard_in_place.file", where=where, out=settings.out)


def _lies_in(url: str, folder: str) -> bool:
    return url == folder or url.startswith(folder.rstrip("/") + "/")


def _check_alike(sources: Sequence[ReshardSource]) -> None:
    first = sources[0].manifest
    for source in sources[1:]:
        other = source.manifest
        ours, theirs = (_recipe_of(manifest) for manifest in (first, other))
        found = find_differences(ours, theirs)
        if found:
            raise ConflictError(
                "recipe_conflict.sources", where=source.url, table=table(found, heads=_SOURCES)
            )
        found = find_differences(_alike_types(first), _alike_types(other))
        if found:
            raise ConflictError(
                "columns_conflict", where=source.url, table=table(found, heads=_SOURCES)
            )
    scales = [
        (source.url, scale)
        for source in sources
        for entry in source.manifest.splits.values()
        if (scale := action_quantiles(entry.source))
    ]
    for url, scale in scales[1:]:
        if found := find_differences(scales[0][1], scale):
            raise ConflictError(
                "recipe_conflict.merged_scales", where=url, table=table(found, heads=_SOURCES)
            )


_SOURCES = ("in the first source", "in this one")


def _recipe_of(manifest: Manifest) -> dict[str, Any]:
    """What the manifests of sources must have in common."""
    return {
        "raw": manifest.raw,
        "recipe": dict(manifest.recipe),
        "tokenizer": asdict(manifest.tokenizer),
    }


def _alike_types(manifest: Manifest) -> dict[str, str]:
    """Lists the types of added columns; texts of any length are alike."""
    types = manifest.columns.types if manifest.columns else {}
    return {n: "text" if kind.startswith("text") else kind for n, kind in types.items()}


def _added(sources: Sequence[ReshardSource], split: str) -> np.ndarray | None:
    """Joins the added columns of a split over all sources: [m]."""
    if sources[0].manifest.columns is None:
        return None
    parts = [
        read_columns(source.url, source.manifest, shard)
        for source in sources
        if split in source.manifest.splits
        for shard in source.manifest.select(split)
    ]
    types = [source.manifest.columns.types for source in sources if source.manifest.columns]
    rows = np.zeros(sum(map(len, parts)), _widest(types))
    for name in rows.dtype.names or ():
        rows[name] = np.concatenate([part[name] for part in parts]) if parts else rows[name]
    return rows


def _widest(types: Sequence[Mapping[str, str]]) -> np.dtype:
    """Gives the row type that holds the texts of all of some alike types."""
    dtypes = [columns_dtype(each) for each in types]
    kinds = {name: [dtype[name] for dtype in dtypes] for name in dtypes[0].names or ()}
    return np.dtype([(n, max(own, key=lambda kind: kind.itemsize)) for n, own in kinds.items()])


def _name(settings: ReshardSettings, sources: Sequence[ReshardSource]) -> str:
    names = sorted({source.manifest.dataset for source in sources})
    if settings.name is None and len(names) > 1:
        raise ConfigError("dataset_name.sources", names=names)
    name = names[0] if settings.name is None else settings.name
    require_name(name, of="dataset")
    return name


def _split_names(settings: ReshardSettings, sources: Sequence[ReshardSource]) -> list[str]:
    known = sorted({split for source in sources for split in source.manifest.splits})
    if settings.split is not None:
        for source in sources:
            source.manifest.select(settings.split)
        return [settings.split]
    if settings.into is not None and len(known) > 1:
        raise ConfigError("unknown_split.which", splits=known)
    return known


def _segments(sources: Sequence[ReshardSource], split: str) -> tuple[Segment, ...]:
    found = []
    for source in sources:
        if split not in source.manifest.splits:
            continue
        for segment in source.manifest.segments(split):
            file = replace(
                segment.file,
                url=storage.resolve_place(source.url, segment.file.url),
                index_url=storage.resolve_place(source.url, segment.file.index_url),
            )
            found.append(replace(segment, file=file))
    return tuple(found)


def _look_at(file: FileEntry) -> tuple[ObjectVersion, bytes]:
    """Compares a file and its index with what the manifest says.

    Returns:
      The file's version, and its index.
    """
    found = object_version(file.url)
    if found is None or found.num_bytes != file.num_bytes:
        raise _not_as_promised(
            file.url,
            "shard_missing" if found is None else "shard_size",
            {"got_bytes": found and found.num_bytes, "want_bytes": file.num_bytes},
        )
    try:
        payload = storage.read_bytes(file.index_url)
    except FileNotFoundError as error:
        raise _not_as_promised(file.index_url, "index_missing", {}) from error
    got = hashlib.sha256(payload).hexdigest()
    if len(payload) != file.index_bytes or got != file.index_sha256:
        facts = {"got": got, "want": file.index_sha256}
        raise _not_as_promised(file.index_url, "index_sha256", facts)
    return found, payload


def _open_table(file: FileEntry, payload: bytes, *, raw: bool) -> np.ndarray:
    return parse_index(
        memoryview(payload),
        where=file.index_url,
        num_samples=file.nsamples,
        shard_bytes=file.num_bytes,
        raw=raw,
    )


def _not_as_promised(where: str, reason: str, facts: Mapping[str, object]) -> ShardError:
    return ShardError(f"{reason}.source", where=where, facts=facts)


def _column(segments: Sequence[Segment], tables: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """Joins a column over segments: [n, ...]."""
    parts = [tables[s.file.url][name][s.first_row : s.first_row + s.num_rows] for s in segments]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _keys(segments: Sequence[Segment], tables: Mapping[str, np.ndarray]) -> np.ndarray:
    keys = _column(segments, tables, "key")
    return keys if keys.dtype.kind == "S" else keys.astype("S1")


def _groups(
    settings: ReshardSettings,
    sources: Sequence[ReshardSource],
    segments: Sequence[Segment],
    tables: Mapping[str, np.ndarray],
) -> np.ndarray | None:
    """Gives the hash of each sample's group: uint64 [n]; None where no sample has one.

    Raises:
      ConflictError: `index_groups`: some samples have one, and an index does not say which.
    """
    lack = [s.file for s in segments if GROUP_COLUMN not in (tables[s.file.url].dtype.names or ())]
    # Datasets of windows that an earlier release has built. One shard and split divides nothing.
    unknown = sources[0].manifest.recipe.get("window") is not None or len(lack) < len(segments)
    if lack and unknown and (settings.num_shards != 1 or settings.into is not None):
        raise ConflictError("index_groups", where=lack[0].index_url, column=GROUP_COLUMN)
    return None if lack else _column(segments, tables, GROUP_COLUMN)


def _check_groups_apart(groups: Mapping[str, np.ndarray | None]) -> None:
    """Refuses sources of which a group is in several splits, such as an episode's windows.

    Raises:
      ConflictError: `group_splits`.
    """
    split_of: dict[int, str] = {}
    for split, own in groups.items():
        for group in np.unique(own[own != 0]).tolist() if own is not None else ():
            if split_of.setdefault(group, split) != split:
                raise ConflictError("group_splits", split=split, other=split_of[group])


def _check_keys_apart(
    sources: Sequence[ReshardSource], splits: Sequence[str], tables: Mapping[str, np.ndarray]
) -> None:
    """Refuses sources that share a sample, in any splits: it might be trained and tested on."""
    own = []
    for source in sources:
        segments = [segment for split in splits for segment in _segments([source], split)]
        own.append(np.unique(_keys(segments, tables)))
    twice = repeated_key(np.concatenate(own))
    if twice is not None:
        raise ConflictError("key_collision.sources", key=twice.decode())


def _count_unknown(wanted: frozenset[str], keys: Iterable[np.ndarray]) -> int:
    """Counts the wanted keys that no sample has."""
    if not wanted:
        return 0
    return int((~np.isin(encoded_keys(wanted), np.concatenate(list(keys)))).sum())


def _plan_split(
    settings: ReshardSettings,
    sources: Sequence[ReshardSource],
    split: str,
    segments: tuple[Segment, ...],
    tables: Mapping[str, np.ndarray],
    keys: np.ndarray,
    groups: np.ndarray | None,
    added: np.ndarray | None,
) -> Iterator[SplitPlan]:
    chosen = _choose(settings, split, segments, tables, keys, groups, added)
    total, num_chosen = len(keys), sum(map(len, chosen.values()))
    sizes = _column(segments, tables, "num_bytes").astype(np.int64)
    having = [source for source in sources if split in source.manifest.splits]
    quarantined: Counter[str] = Counter()
    for source in having if settings.into is None else ():
        quarantined.update(source.manifest.splits[split].quarantined)
    for name, own in chosen.items():
        if not len(own):
            raise ConfigError("empty_result.split", where=f"split {name}", samples=total)
        shuffled = keys[own].tolist() if settings.order == "shuffle" else []
        ordered = order_numbers(
            own,
            order=settings.order,
            seed=settings.seed,
            keys=[key.decode() for key in shuffled],
            lengths=_lengths(segments, tables)[own] if settings.order == "length" else own,
        )
        num_bytes = int(sizes[own].sum())
        group = None
        if groups is not None:
            group = number_groups(groups[ordered], order=settings.order)
            _check_shards(settings, groups[ordered], most=int(group.max()) + 1, split=name)
        count = count_outputs(
            num_bytes,
            num_samples=len(own) if group is None else int(group.max()) + 1,
            target_bytes=settings.shard_bytes,
            num_shards=settings.num_shards,
            cluster=settings.cluster,
            unit="sample" if group is None else "group",
        )
        if group is None:
            borders = shard_borders(len(own), num_shards=count.num_shards)
        else:
            ordered, borders = cut_shards(ordered, group, num_shards=count.num_shards)
        yield SplitPlan(
            split=name,
            segments=segments,
            numbers=ordered,
            borders=borders,
            count=count,
            num_bytes=num_bytes,
            num_left_out=total - num_chosen,
            quarantined=dict(sorted(quarantined.items())),
            origin=tuple(
                {
                    "manifest_sha256": source.sha256,
                    "split": split,
                    "build_key": source.manifest.splits[split].build_key,
                }
                for source in having
            ),
            added=added,
        )


def _check_shards(settings: ReshardSettings, groups: np.ndarray, *, most: int, split: str) -> None:
    """Refuses a number of shards that only another order allows.

    Raises:
      ConfigError: `group_shards`.
    """
    possible = int(number_groups(groups, order="shuffle").max()) + 1
    if most < min(settings.num_shards or 1, possible):
        raise ConfigError(
            "group_shards",
            where=f"split {split}",
            shards=settings.num_shards,
            most=most,
            possible=possible,
        )


def _choose(
    settings: ReshardSettings,
    split: str,
    segments: tuple[Segment, ...],
    tables: Mapping[str, np.ndarray],
    keys: np.ndarray,
    groups: np.ndarray | None,
    added: np.ndarray | None,
) -> dict[str, np.ndarray]:
    """Filters the samples of a split, and assigns them: new split -> int64 [n], ascending."""
    kept = np.ones(len(keys), dtype=bool)
    if settings.keys is not None:
        kept &= np.isin(keys, encoded_keys(settings.keys))
    if settings.where:
        columns = _numbers_of(segments, tables)
        if added is not None:
            columns |= {name: added[name] for name in scalar_names(added.dtype)}
        kept &= select(settings.where, columns)
    numbers = np.flatnonzero(kept).astype(np.int64)
    if settings.into is None:
        return {split: numbers}
    names = [key.decode() for key in keys[numbers].tolist()]
    if groups is not None:
        hashes = groups[numbers].tolist()
        names = [f"group {own}" if own else name for own, name in zip(hashes, names, strict=True)]
    assigned = split_numbers(names, settings.into, salt=settings.salt)
    return {name: numbers[positions] for name, positions in assigned.items()}


def _numbers_of(
    segments: Sequence[Segment], tables: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Gives the columns that a filter may name."""
    names = filter_columns(tables[segment.file.url].dtype for segment in segments)
    return {name: filter_values(_column(segments, tables, name)) for name in names}


def _lengths(segments: Sequence[Segment], tables: Mapping[str, np.ndarray]) -> np.ndarray:
    """Gives what "length" sorts by: the longest sequence in any view, tokens, or bytes."""
    columns = _numbers_of(segments, tables)
    name = next(n for n in ("view_length", "num_tokens", "num_bytes") if n in columns)
    return columns[name]


def split_keys(plan: ReshardPlan, split: SplitPlan) -> np.ndarray:
    """Gives the keys of a new split in its order: bytes [n]."""
    keys: np.ndarray = _keys(split.segments, plan.tables)[split.numbers]
    return keys


def shard_rows(plan: ReshardPlan, split: SplitPlan, shard: int) -> tuple[np.ndarray, np.ndarray]:
    """Gathers the index rows of a new shard.

    Returns:
      (rows of the sources' indexes, number of each one's file in `plan.tables`).

    Raises:
      ConflictError: `index_columns`: the sources' indexes have different columns.
    """
    numbers, starts = split.shard_numbers(shard), split.starts
    segment = np.searchsorted(starts, numbers, side="right") - 1
    used = np.unique(segment).tolist()
    dtype = _common_dtype([plan.tables[split.segments[i].file.url].dtype for i in used])
    rows = np.zeros(len(numbers), dtype=dtype)
    files = np.zeros(len(numbers), dtype=np.int64)
    file_numbers = {url: i for i, url in enumerate(plan.tables)}
    for i in used:
        own = np.flatnonzero(segment == i)
        source = split.segments[i]
        table = plan.tables[source.file.url]
        picked = table[numbers[own] - starts[i] + source.first_row]
        for name in dtype.names or ():
            if name in (picked.dtype.names or ()):
                rows[name][own] = picked[name]
        files[own] = file_numbers[source.file.url]
    return rows, files


def _common_dtype(dtypes: Sequence[np.dtype]) -> np.dtype:
    if len(set(dtypes)) == 1:
        return dtypes[0]
    if all(dtype.names == raw_index_dtype(1).names for dtype in dtypes):
        return raw_index_dtype(max(dtype["key"].itemsize for dtype in dtypes))
    # Of an earlier release and of this one: what readers can do without is left out.
    kept = {_without(dtype, (*QUESTION_COLUMNS, *HEAD_COLUMNS)) for dtype in dtypes}
    if len(kept) == 1:
        # Of datasets with clips and without: 0 means that a sample has no head to read by itself.
        heads = any(HEAD_COLUMNS[0] in (dtype.names or ()) for dtype in dtypes)
        further = [(name, "<u4") for name in HEAD_COLUMNS if heads]
        questions = all(QUESTION_COLUMNS[0] in (dtype.names or ()) for dtype in dtypes)
        asked = [(name, "<u4") for name in QUESTION_COLUMNS if questions]
        return np.dtype([*kept.pop().descr, *asked, *further])
    raise ConflictError("index_columns", columns=sorted({str(dtype.names) for dtype in dtypes}))


def _without(dtype: np.dtype, left_out: Sequence[str]) -> np.dtype:
    columns = [name for name in dtype.names or () if name not in left_out]
    return np.dtype([(name, dtype[name]) for name in columns])
