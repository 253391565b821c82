"""FEATURES: a dataset whose pictures are what a frozen vision backbone makes of them.

The backbone sees each picture once, as a run without augmentation would show it, and its features
stand in the shards in the picture's place (`shardspec.features`): samples, keys, tokens, order and
shards are those of the source, and whatever reads shards reads these.

1. The source is read as a reshard in its own order reads it. The backbone is loaded and shown the
   first picture, which says the shape of a row.
2. Each shard of the source gives one of the same name: tar, index, and last a receipt. A shard with
   a receipt of the same job is done: the same command resumes after any interruption. A part of the
   job makes every `count`-th shard. This process makes one after the other; on a Ray cluster each
   is a task, which loads the backbone on its node.
3. The manifest is written last, once all sources are still the versions that were planned with, by
   the process after whose last shard none is missing.

Bytes follow from the source, the weights, the settings and the machine's arithmetic: not from
interruptions.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch

from loader.assembly import Backend, ModelView, Normalization, View
from loader.buffers import Scratch
from loader.features import Backbone, extract, load_backbone, show_pictures
from loader.reading import ShardReader, StoredSample
from loader.stream import stored_model, stored_view
from preprocess.job import (
    DividedJob,
    Engine,
    EngineOption,
    OthersMissing,
    OwnDiskOption,
    PartOption,
    Reporter,
    check_unfinished,
    find_differences,
    node_proof,
    publish_columns,
    read_columns,
    require_same_result,
    scratch_folder,
    table,
)
from preprocess.job.engines.local import TaskDone, TaskProgress
from preprocess.reshard import (
    ReshardPlan,
    ReshardSettings,
    check_sources,
    plan_reshard,
    publish_tokenizer,
    scratch_of,
)
from preprocess.settings import Setting, usable_cores
from shardspec import storage
from shardspec.errors import ConfigError, ConflictError, SampleError, StorageError
from shardspec.families import Pixtral, Processor
from shardspec.features import FEATURES, FeatureType, StoredFeatures
from shardspec.index import encode_index
from shardspec.manifest import (
    MANIFEST_NAME,
    AddedColumns,
    Manifest,
    Receipt,
    ShardEntry,
    encode_receipt,
    fingerprint,
    load_manifest,
    require_manifest,
)
from shardspec.sample import (
    ARRAY_HEADER_BYTES,
    SpanKind,
    encode_array,
    image_rows,
    image_suffix,
)
from shardspec.tar import TarWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureSettings:
    """Of which dataset, by which backbone, and how they are stored."""

    src: Annotated[str, Setting("folder or URL of the dataset", positional=True)]
    backbone: Annotated[
        str,
        Setting(
            "hub id or folder of a vision model of transformers, or package.module:name or "
            "file.py:name of a module of torch",
            metavar="MODEL",
        ),
    ]
    dst: Annotated[
        str | None, Setting("folder or URL of the new dataset", shown="SRC-features")
    ] = None
    split: Annotated[str | None, Setting("only this split", shown="all splits")] = None
    dtype: Annotated[FeatureType, Setting("type of stored values")] = "float16"
    layer: Annotated[
        int | None,
        Setting(
            "number of the hidden states to take, such as -2",
            shown="that of the model's configuration, else what it returns",
        ),
    ] = None
    tokens: Annotated[
        Literal["all", "patches"] | None,
        Setting(
            "patches leaves the first token of each crop out",
            shown="as the model's configuration says, else all",
        ),
    ] = None
    normalize: Annotated[
        Normalization | None,
        Setting("of pixels, for a dataset without a model", shown="none: uint8"),
    ] = None
    pixels: Annotated[
        Literal["crops", "patches"],
        Setting("form of pixels, for a dataset without a model"),
    ] = "crops"
    backend: Annotated[
        Backend | None,
        Setting("whose resize, for a dataset of a model", shown="torchvision"),
    ] = None
    compute: Annotated[
        Literal["float32", "bfloat16", "float16"],
        Setting("type of weights and pixels while the backbone runs"),
    ] = "float32"
    device: Annotated[str, Setting("where it runs, such as cuda:0", metavar="DEVICE")] = "cpu"
    batch: Annotated[int, Setting("most pictures that it is shown at a time")] = 1
    engine: EngineOption = "local"
    ray_address: Annotated[
        str,
        Setting(
            "address of the Ray cluster, for example auto; else one of this machine is started",
            group="the job",
            metavar="ADDRESS",
        ),
    ] = ""
    part: PartOption = None
    own_disk: OwnDiskOption = "refuse"

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ConfigError("argument", name="batch", got=self.batch, wanted="at least 1")

    @property
    def out(self) -> str:
        """The output, by default beside the source."""
        return self.dst or self.src.rstrip("/") + "-features"

    @property
    def num_workers(self) -> int:
        """Cores of a Ray cluster that is started here."""
        return usable_cores()


@dataclass(frozen=True, kw_only=True)
class FeaturePlan:
    """Everything that will be written; nothing has been."""

    settings: FeatureSettings
    source: ReshardPlan
    """The source, as it is found, in its own order."""
    backbone: Backbone
    view: View
    """What the backbone is shown."""
    features: StoredFeatures

    @property
    def manifest(self) -> Manifest:
        """The source's."""
        return self.source.sources[0].manifest

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(split.split for split in self.source.splits)

    def source_of(self, split: str) -> dict[str, Any]:
        """Describes where a split comes from, in plain JSON types."""
        (source,) = self.source.sources
        entry = source.manifest.splits[split]
        origin = {"manifest_sha256": source.sha256, "split": split, "build_key": entry.build_key}
        made = self.features.to_dict()
        return {"kind": FEATURES, "from": [origin], FEATURES: made, "torch": torch.__version__}

    def build_key(self, split: str) -> str:
        """Hashes everything that a split of the output follows from."""
        return fingerprint({"split": split, "source": self.source_of(split)})


@dataclass(frozen=True, kw_only=True)
class FeatureContext:
    """What the tasks of all shards share; sent to other machines."""

    settings: FeatureSettings
    manifest: Manifest
    """The source's."""
    view: View
    features: StoredFeatures
    build_keys: Mapping[str, str]
    """By split."""
    torch: str
    """Its version, of the process that has planned."""


@dataclass(frozen=True, kw_only=True)
class FeatureTask:
    """One shard."""

    shard: ShardEntry
    """Of the source."""
    first: int
    """Number of its first sample in the split."""
    rows: np.ndarray
    """Of the source's index."""

    @property
    def numbers(self) -> range:
        """Of its samples in the split."""
        return range(self.first, self.first + len(self.rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureOutcome:
    """How it ended."""

    manifest: Manifest
    sha256: str
    """Of the manifest."""
    made_shards: int
    """In this run."""
    fresh: bool
    """Whether this run wrote the manifest; False when there was nothing to do."""


def plan_features(
    settings: FeatureSettings, report: Reporter, *, backbone: Backbone | None = None
) -> FeaturePlan:
    """Reads a dataset and a backbone, and finds what shape features have; writes nothing.

    Args:
      settings: What to make of what.
      report: Gets the stages.
      backbone: One that is loaded already; None: the one that the settings name.

    Raises:
      ConfigError: `features_dataset`, `features_backbone`.
      ManifestError, ShardError: The source cannot be read.
    """
    manifest = require_manifest(settings.src)
    view = _view(settings, manifest)
    backbone = backbone or load_backbone(
        settings.backbone,
        layer=settings.layer,
        tokens=settings.tokens,
        compute=settings.compute,
        device=settings.device,
    )
    own = view.model is not None or settings.normalize is not None
    if not own and hasattr(backbone.module, "config"):
        raise ConfigError("features_backbone.pixels", where=settings.backbone)
    source = plan_reshard(
        ReshardSettings(
            sources=(settings.src,), out=settings.out, split=settings.split, form="view"
        ),
        report,
    )
    units, first = _first_features(settings, source, view, backbone)
    return FeaturePlan(
        settings=settings,
        source=source,
        backbone=backbone,
        view=view,
        features=StoredFeatures(
            dtype=settings.dtype,
            row_shape=first.shape[1:],
            backbone=type(backbone.module).__qualname__,
            fingerprint=backbone.fingerprint,
            layer=backbone.layer,
            tokens=backbone.tokens,
            compute=backbone.compute,
            device=backbone.device.type,
            batch=settings.batch,
            **_made_of(view, units, len(first)),
        ),
    )


def _made_of(view: View, units: int, rows: int) -> dict[str, Any]:
    """Lists what pixels features are made of, and how many rows the units of a picture give."""
    if view.model is None:
        names = ("image", "resample", "normalize", "pixels")
        return {name: getattr(view, name) for name in names}
    family, shared = view.model.family, math.gcd(rows, units)
    # A picture of Pixtral is one unit of any size.
    ratio = None if isinstance(family, Pixtral) else (rows // shared, units // shared)
    return {"family": family, "backend": view.model.backend, "rows_per_units": ratio}


def _view(settings: FeatureSettings, manifest: Manifest) -> View:
    """Gives what the backbone is shown of a dataset.

    Raises:
      ConfigError: `features_dataset`.
    """
    where = settings.src
    if manifest.raw:
        raise ConfigError("features_dataset.raw", where=where)
    if FEATURES in manifest.recipe:
        raise ConfigError("features_dataset.again", where=where)
    if manifest.recipe.get("video") is not None:
        raise ConfigError("features_dataset.video", where=where)
    model = stored_model(manifest, where=where)
    given = {"NORMALIZE": settings.normalize is not None, "PIXELS": settings.pixels != "crops"}
    if model is None:
        given = {"BACKEND": settings.backend is not None}
    if any(given.values()):
        names = ", ".join(name for name, is_given in given.items() if is_given)
        raise ConfigError("features_dataset.settings", where=where, names=names)
    if model is None:
        return View(
            image=stored_view(manifest), normalize=settings.normalize, pixels=settings.pixels
        )
    if isinstance(model.family, Processor):
        raise ConfigError("features_dataset.through", where=where)
    return View(model=ModelView(family=model.family, backend=settings.backend or "torchvision"))


def _first_features(
    settings: FeatureSettings, source: ReshardPlan, view: View, backbone: Backbone
) -> tuple[int, np.ndarray]:
    """Makes the features of the first picture of the dataset, and counts its units.

    Raises:
      ConfigError: `features_dataset`: there is none; `features_backbone`: not a row for each crop.
    """
    manifest = source.sources[0].manifest
    for split in source.splits:
        counts = np.concatenate([_rows(source, split.split)["num_images"], [0]])
        number = int(np.argmax(counts > 0))
        if counts[number]:
            reader = ShardReader(settings.src, manifest, split=split.split)
            shown = show_pictures(reader.stored(number), view, Scratch())
            (first,) = backbone(shown[:1], view)
            return len(shown[0].units), first
    raise ConfigError("features_dataset.empty", where=settings.src)


def _rows(source: ReshardPlan, split: str) -> np.ndarray:
    """Joins the rows of the indexes of a split, in the order of its samples."""
    (plan,) = (each for each in source.splits if each.split == split)
    return np.concatenate(
        [
            source.tables[each.file.url][each.first_row : each.first_row + each.num_rows]
            for each in plan.segments
        ]
    )


def make_features(plan: FeaturePlan, report: Reporter) -> FeatureOutcome | OthersMissing:
    """Writes the dataset or a part of it, or finishes what an interrupted run began.

    Returns:
      How it ended; `OthersMissing`: the shards of the part are made, while others are not.

    Raises:
      ConflictError: `job_conflict`: the output holds something else.
      ConfigError: `features_backbone`: it fails, or gives other rows than of the first picture.
      ShardError: A file of the source is damaged, or is not what it was.
      SampleError: `features_value`.
      StorageError: The output cannot be written; `own_disk`, `part_busy`.
    """
    job = _divided(plan)
    done = _finished(plan)
    if done is not None:
        job.tidy_finished(scratch_of(job.out))
        return done
    try:
        with job.held(report) as (board, require_held):
            # Once more: another job may have ended in between.
            return _finished(plan) or _make(plan, job, board, require_held)
    except StorageError as error:
        done = _finished(plan) if job.has_ended(error) else None
        if done is None:
            raise
        return done


def _divided(plan: FeaturePlan) -> DividedJob:
    return DividedJob(
        out=plan.settings.out,
        kind="features of",
        dataset=plan.manifest.dataset,
        names={
            split: [_name(shard) for shard in plan.manifest.select(split)] for split in plan.splits
        },
        build_keys={split: plan.build_key(split) for split in plan.splits},
        sources={split: plan.source_of(split) for split in plan.splits},
        part=plan.settings.part,
        own_disk=plan.settings.own_disk,
    )


def _make(
    plan: FeaturePlan, job: DividedJob, report: Reporter, require_held: Callable[[], None]
) -> FeatureOutcome | OthersMissing:
    out = job.out
    check_unfinished(out)
    storage.delete(scratch_of(out, job.part))
    job.publish_notes()
    own, found = job.own_names, job.receipts()
    missing = {name for name in own if name not in found}
    if len(missing) < len(own):
        report.note(f"{len(own) - len(missing)} of {len(own)} shards are finished")
    report.stage(
        FEATURES, sum(shard.nsamples for shard in _shards(plan) if _name(shard) in missing)
    )
    for name, receipt in _made_shards(plan, job, missing, report):
        found[name] = receipt
        require_held()
    found = found if job.part is None else job.receipts()
    others = job.others_missing(found)
    if others is not None:
        return others
    entries = tuple(found[name].shard for name in job.all_names)
    columns = _columns(plan)
    check_sources(plan.source)
    publish_tokenizer(plan.source, report)
    manifest = _manifest(plan, entries, columns)
    require_held()
    fresh = job.publish_manifest(manifest)
    job.tidy(scratch_of(out))
    return FeatureOutcome(
        manifest=manifest,
        sha256=hashlib.sha256(manifest.encode()).hexdigest(),
        made_shards=len(missing),
        fresh=fresh,
    )


def _made_shards(
    plan: FeaturePlan, job: DividedJob, missing: set[str], report: Reporter
) -> Iterator[tuple[str, Receipt]]:
    """Makes shards, where the settings say."""
    context = FeatureContext(
        settings=plan.settings,
        manifest=plan.manifest,
        view=plan.view,
        features=plan.features,
        build_keys=job.build_keys,
        torch=torch.__version__,
    )

    def tell(note: str | int) -> None:
        if isinstance(note, int):
            report.sent(note)
        else:
            report.step(note)

    with Engine(plan.settings) as engine:
        if engine.is_local:
            for split in plan.splits:
                reader = ShardReader(plan.settings.src, plan.manifest, split=split)
                for task in _tasks(plan, split, missing):
                    receipt = _make_shard(context, task, plan.backbone, reader, tell)
                    yield _name(task.shard), receipt
            return
        tasks = [task for split in plan.splits for task in _tasks(plan, split, missing)]
        events = engine.run(
            range(len(tasks)),
            work=make_shard,
            context=context,
            given=tasks.__getitem__,
            proof=node_proof(job.out, job.note_url(plan.splits[0])),
            num_gpus=0 if plan.features.device == "cpu" else 1,
        )
        for event in events:
            if isinstance(event, TaskDone):
                yield _name(tasks[event.task].shard), event.value
            elif isinstance(event, TaskProgress):
                tell(event.note)


def _tasks(plan: FeaturePlan, split: str, missing: set[str]) -> Iterator[FeatureTask]:
    rows, first = _rows(plan.source, split), 0
    for shard in plan.manifest.select(split):
        if _name(shard) in missing:
            yield FeatureTask(shard=shard, first=first, rows=rows[first : first + shard.nsamples])
        first += shard.nsamples


def make_shard(
    context: FeatureContext, task: FeatureTask, report: Callable[[str | int], None]
) -> Receipt:
    """Makes a shard on any machine.

    Raises:
      ConflictError: `mixed_cluster`: its features would differ.
    """
    s = context.settings
    backbone = _loaded(s.backbone, s.layer, s.tokens, s.compute, s.device)
    planned = {
        "torch": context.torch,
        "backbone": context.features.fingerprint,
        "device": context.features.device,
    }
    own = {
        "torch": torch.__version__,
        "backbone": backbone.fingerprint,
        "device": backbone.device.type,
    }
    if differences := find_differences(planned, own):
        shown = table(differences, heads=("of the job", "on this node"))
        raise ConflictError("mixed_cluster", where=s.backbone, table=shown)
    reader = ShardReader(s.src, context.manifest, split=task.shard.split)
    return _make_shard(context, task, backbone, reader, report)


@functools.lru_cache(maxsize=1)  # a process of a node makes one shard after the other
def _loaded(source: str, layer: int | None, tokens: Any, compute: Any, device: str) -> Backbone:
    return load_backbone(source, layer=layer, tokens=tokens, compute=compute, device=device)


def _shards(plan: FeaturePlan) -> list[ShardEntry]:
    return [shard for split in plan.splits for shard in plan.manifest.select(split)]


def _name(shard: ShardEntry) -> str:
    return Path(shard.url).stem


def _make_shard(
    context: FeatureContext,
    task: FeatureTask,
    backbone: Backbone,
    reader: ShardReader,
    report: Callable[[str | int], None],
) -> Receipt:
    """Makes a shard from one of the source; its rows of the index become those of the new one."""
    s, shard = context.settings, task.shard
    rows = task.rows.copy()  # what Ray sends is read-only
    out = s.out
    several = bool(context.manifest.recipe.get("several_images", False))
    samples = (reader.stored(number) for number in task.numbers)
    made = extract(samples, context.view, backbone, batch=s.batch)
    receipt_url = storage.join(out, "receipts", f"{_name(shard)}.json")
    with ExitStack() as stack:
        folder = stack.enter_context(scratch_folder(scratch_of(out, s.part)))
        path = folder / "shard.tar"
        with storage.translate_errors(str(path)), path.open("wb") as stream:
            writer = TarWriter(stream)
            for row, (sample, found) in zip(rows, made, strict=True):
                assert row["key"].decode() == sample.key
                _write_sample(writer, sample, found, context.features, row=row, several=several)
                report("")
            sha256 = writer.finish()
        index = encode_index(rows)
        entry = replace(
            shard,
            num_bytes=writer.num_bytes,
            sha256=sha256,
            index_bytes=len(index),
            index_sha256=hashlib.sha256(index).hexdigest(),
        )
        # Another job's receipt must not vouch for this one's bytes, wherever it is interrupted.
        storage.delete(receipt_url)
        storage.publish_file(storage.join(out, entry.url), path, on_part=report)
    storage.publish_bytes(storage.join(out, entry.index_url), index)
    receipt = Receipt(build_key=context.build_keys[shard.split], shard=entry)
    storage.publish_bytes(receipt_url, encode_receipt(receipt))
    return receipt


def _write_sample(
    writer: TarWriter,
    sample: StoredSample,
    found: Sequence[np.ndarray],
    features: StoredFeatures,
    *,
    row: np.void,
    several: bool,
) -> None:
    """Writes a sample with features for pictures, and what has changed into its row of the index.

    Raises:
      ConfigError: `features_backbone`: rows of another shape than those of the first picture.
      SampleError: `features_value`; `sample_length`: it is too long for the index.
    """
    for values in found:
        if values.shape[1:] != features.row_shape:  # no reader would find its rows
            raise ConfigError(
                "features_backbone.rows",
                where=sample.key,
                got=values.shape[1:],
                want=features.row_shape,
            )
    payloads = [features.encode(values, where=sample.key) for values in found]
    # Overviews are made of pictures; features have them among their rows.
    spans = sample.spans[sample.spans[:, 0] != SpanKind.OVERVIEW.value].copy()
    members = [
        (f"{sample.key}.json", bytes(sample.record)),
        (f"{sample.key}.spans.npy", b""),
        (f"{sample.key}.tokens.npy", encode_array(sample.tokens)),
    ]
    for i, payload in enumerate(payloads):
        suffix = image_suffix(FEATURES, image=i, several=several)
        members.append((f"{sample.key}.{suffix}", payload))
    try:
        image_rows(spans)[:, 6] = np.array([len(payload) for payload in payloads], np.int32)
        members[1] = (members[1][0], encode_array(spans))
        place = writer.write_sample(members)
        row["offset"], row["num_bytes"], row["crc32"] = place.offset, place.num_bytes, place.crc32
        row["image_bytes"] = len(payloads[0]) if payloads else 0
    except OverflowError as error:
        raise SampleError(
            "sample_length",
            where=sample.key,
            num_bytes=sum(map(len, payloads)),
            num_images=len(payloads),
            error=error,
        ) from error
    row["spans_bytes"] = ARRAY_HEADER_BYTES + spans.nbytes


def _columns(plan: FeaturePlan) -> AddedColumns | None:
    """Copies the added columns of the source; None without any."""
    if plan.manifest.columns is None:
        return None
    src = plan.settings.src
    rows = {shard.url: read_columns(src, plan.manifest, shard) for shard in _shards(plan)}
    return publish_columns(plan.settings.out, rows)


def _manifest(
    plan: FeaturePlan, shards: Sequence[ShardEntry], columns: AddedColumns | None
) -> Manifest:
    old = plan.manifest
    splits = {}
    for split in plan.splits:
        num_bytes = sum(shard.num_bytes for shard in shards if shard.split == split)
        splits[split] = replace(
            old.splits[split],
            build_key=plan.build_key(split),
            source=plan.source_of(split),
            num_bytes=num_bytes,
        )
    return replace(
        old,
        recipe={
            **old.recipe,
            "image": {**old.recipe["image"], "codec": FEATURES},
            FEATURES: plan.features.to_dict(),
        },
        splits=splits,
        shards=tuple(sorted(shards, key=lambda shard: shard.url)),
        view=None,
        columns=columns,
    )


def _finished(plan: FeaturePlan) -> FeatureOutcome | None:
    """Finds the result of this very plan; None where the output is still empty.

    Raises:
      ConflictError: `job_conflict`.
    """
    out = plan.settings.out
    manifest = load_manifest(out)
    if manifest is None:
        return None
    require_same_result(
        manifest,
        where=out,
        build_keys={split: plan.build_key(split) for split in plan.splits},
        sources={split: plan.source_of(split) for split in plan.splits},
    )
    payload = storage.read_bytes(storage.join(out, MANIFEST_NAME))
    return FeatureOutcome(
        manifest=manifest,
        sha256=hashlib.sha256(payload).hexdigest(),
        made_shards=0,
        fresh=False,
    )
