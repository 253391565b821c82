"""What a job is: its settings, its identity, and where it keeps what.

The identity is everything that the result follows from. Two runs with the same identity make the
same bytes; an output that holds another identity is refused, field by field.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import PIL.features

from preprocess.datasets import DatasetBase, OwnDataset, Unmatched, dataset_class, is_own
from preprocess.fetch import LOCAL_CACHE, BlobCache, FetchPolicy
from preprocess.job.build import rows_url, scratch_root
from preprocess.job.generation import Growth, RowMarks
from preprocess.job.plan import OwnDisk, Part, generation_name, is_name, parse_part
from preprocess.job.stamps import Compare, Compared, RowFiles, compare_files
from preprocess.media import MemoryBudget
from preprocess.model import ChatModel, load_model
from preprocess.recipe import Preparer, Recipe
from preprocess.settings import Setting, usable_cores, usable_memory
from preprocess.sizes import parse_bytes
from preprocess.text import EMBEDDED, load_tokenizer, require_style
from shardspec import storage
from shardspec.errors import ConfigError, redacted_url
from shardspec.manifest import fingerprint

SMALL_JOB_FAILURES = 10
"""Failures that a small job may have where the user gives no budget. A given one means just what it
says: 0 allows none."""

DEAD_LINKS_SHARE = 0.4
"""In 2025, 22.5 % of PixMo-Cap's image URLs had died."""
FAILED_ROWS_SHARE = 0.01

NODES_FOLDER = "nodes"
"""Folder, among the ledgers, of those that tasks on other machines write."""

Duplicates = Literal["drop", "keep"]
NewRows = Literal["refuse", "append"]
EngineName = Literal["local", "ray"]

_DIVIDED = ("shards", "reshard", "merge", "split", "filter", "verify", "features")
"""Verbs that many machines may share."""

EngineOption = Annotated[
    EngineName,
    Setting("where the work is done: processes of this machine, or a Ray cluster", group="the job"),
]
RayAddressOption = Annotated[
    str,
    Setting(
        "address of the Ray cluster, for example auto; else one of WORKERS cores is started",
        group="the job",
        metavar="ADDRESS",
    ),
]
PartOption = Annotated[
    Part | None,
    Setting(
        "do one of N equal parts only, numbered from 0; each runs on a machine of its own",
        group="the job",
        metavar="I/N",
        parse=parse_part,
        verbs=_DIVIDED,
    ),
]
OwnDiskOption = Annotated[
    OwnDisk,
    Setting(
        "whether the output of a job in parts may be on a disk that other machines do not see",
        group="the job",
        verbs=_DIVIDED,
    ),
]


class Reporter(Protocol):
    """Receives the job's progress; the command line shows it as bars."""

    def stage(self, name: str, total: int | None) -> None:
        """A stage begins, with this many steps; None if unknown."""

    def step(self, reason: str) -> None:
        """One step is done; `reason` is "" or why it failed."""

    def sent(self, num_bytes: int) -> None:
        """An object store has received this many bytes more."""

    def note(self, text: str) -> None:
        """Something that a person should know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSettings:
    """What to build, from what, where to and with how much."""

    dataset: Annotated[
        str,
        Setting(
            "name of the dataset (the verb `datasets` lists them), a spec.toml, a file, a folder, "
            "or file.py:Class",
            positional=True,
        ),
    ]
    name: Annotated[
        str | None,
        Setting(
            "name of the result, for mixtures of several results of one dataset",
            group="what to build",
            shown="the dataset's",
        ),
    ] = None
    source: Annotated[
        str,
        Setting(
            "hub, sample (generated rows, no download), or a folder of Parquet or Arrow files",
            group="what to build",
        ),
    ] = "hub"
    split: Annotated[str, Setting("split to build", group="what to build")] = "train"
    unmatched: Annotated[
        Unmatched,
        Setting(
            "files of a source folder that are of no known split: stop, build them as part of the "
            "split, or leave them out",
            flag="unmatched-files",
            group="what to build",
        ),
    ] = "refuse"
    mode: Annotated[
        str | None,
        Setting(
            "what a row becomes, for example captions or transcript_and_caption",
            group="what to build",
            shown="the dataset's first mode",
        ),
    ] = None
    limit: Annotated[
        int | None,
        Setting(
            "number of rows to use, from the first on",
            group="what to build",
            shown="all; 256 with source sample",
        ),
    ] = None
    out: Annotated[
        str,
        Setting(
            "output folder or URL",
            group="what to build",
            shown="shards/DATASET",
            unset=lambda: None,
        ),
    ]
    tokenizer: Annotated[
        str, Setting("hub id, folder with tokenizer.json, or embedded", group="text")
    ] = EMBEDDED
    model: Annotated[
        str,
        Setting(
            "the model that is to be trained, a folder or hub id: its own chat template, tokenizer "
            "and sizes of pictures; without it the dataset is for models of the Molmo kind",
            group="what to build",
        ),
    ] = ""
    family: Annotated[
        Literal["own", "processor"],
        Setting(
            "who prepares the pictures of MODEL in training: own, a kernel where its family has "
            "one; processor, its image processor of transformers in any case",
            group="what to build",
        ),
    ] = "own"
    pad_to: Annotated[
        int | None,
        Setting(
            "rows of the model's embedding; the ids of the image symbols start there",
            flag="pad-vocab",
            group="text",
            shown="the tokenizer's length, rounded up to 128",
        ),
    ] = None
    recipe: Recipe = field(default_factory=Recipe)
    shard_bytes: Annotated[
        int,
        Setting(
            "target size of a shard",
            flag="shard-size",
            group="the job",
            metavar="SIZE",
            parse=parse_bytes,
            shown="256MiB",
        ),
    ] = 256 * 2**20
    num_shards: Annotated[
        int | None,
        Setting("exact number of shards", group="the job", shown="from --shard-size"),
    ] = None
    num_workers: Annotated[
        int,
        Setting(
            "number of processes",
            flag="workers",
            group="the job",
            shown="all cores",
            unset=usable_cores,
        ),
    ] = 1
    engine: EngineOption = "local"
    ray_address: RayAddressOption = ""
    part: PartOption = None
    events: Annotated[
        str | None,
        Setting(
            "file of this machine to which events are appended, one JSON object a line",
            group="the job",
            metavar="FILE",
        ),
    ] = None
    stall_s: Annotated[
        float,
        Setting(
            "seconds without any progress after which the job says so; 0 for never",
            flag="stall-after",
            group="the job",
        ),
    ] = 600.0
    part_wait_s: Annotated[
        float,
        Setting(
            "how long a part waits for the downloads of parts that are not alive, in seconds",
            flag="part-wait",
            group="the job",
            verbs=("shards",),
        ),
    ] = 600.0
    own_disk: OwnDiskOption = "refuse"
    cache: Annotated[
        str,
        Setting(
            "folder for downloaded and embedded images and their ledgers; with PART, a folder or "
            "URL that all parts see",
            group="the job",
        ),
    ] = LOCAL_CACHE
    image_memory: Annotated[
        int | None,
        Setting(
            "most memory for decoding images in all processes of this machine together; large "
            "images wait for room",
            group="the job",
            metavar="SIZE",
            parse=parse_bytes,
            shown="half of the memory",
        ),
    ] = None
    fetch: FetchPolicy = field(default_factory=FetchPolicy)
    max_dead_links: Annotated[
        float | None,
        Setting(
            "share of image URLs that may fail before the job stops",
            group="the job",
            shown="0.4; at least 10 URLs",
        ),
    ] = None
    max_lost_rows: Annotated[
        float | None,
        Setting(
            "share of rows without a usable local image or text before the job stops",
            group="the job",
            shown="0.01; at least 10 rows",
        ),
    ] = None
    """Rows that the dataset itself leaves out, duplicates and dead links do not count."""
    max_bad_samples: Annotated[
        float | None,
        Setting(
            "share of planned rows that may fail to build before the job stops",
            group="the job",
            shown="0.01; at least 10 rows",
        ),
    ] = None
    duplicates: Annotated[
        Duplicates,
        Setting(
            "rows with the same image and text: leave the further ones out, or keep them",
            group="what to build",
        ),
    ] = "drop"
    compare: Annotated[
        Compare,
        Setting(
            "how the files of a folder source are compared with those of a finished job",
            group="the job",
        ),
    ] = "time"
    new_rows: Annotated[
        NewRows,
        Setting(
            "rows that the source has got since the split was finished: stop, or append them in "
            "new shards; the old ones stay",
            group="the job",
        ),
    ] = "refuse"
    force: Annotated[
        bool, Setting("build the split again, replacing the one in the output", group="the job")
    ] = False

    def __post_init__(self) -> None:
        checks = {
            "split": is_name(self.split),
            "source": bool(self.source.strip()),
            "cache": bool(self.cache.strip()),
            "name": self.name is None or is_name(self.name),
            "limit": self.limit is None or self.limit >= 1,
            "shard_bytes": self.shard_bytes >= 2**20,
            "num_shards": self.num_shards is None or self.num_shards >= 1,
            "num_workers": self.num_workers >= 1,
            "part_wait_s": self.part_wait_s >= 0,
            "image_memory": self.image_memory is None or self.image_memory >= 1,
            "max_dead_links": _is_share(self.max_dead_links),
            "max_lost_rows": _is_share(self.max_lost_rows),
            "max_bad_samples": _is_share(self.max_bad_samples),
        }
        wrong = [name for name, good in checks.items() if not good]
        if wrong:
            raise ConfigError("job_settings", facts={name: getattr(self, name) for name in wrong})
        if self.source.startswith(("http://", "https://")) and not is_own(self.dataset):
            raise ConfigError("source_url", where=self.source)
        if self.part is not None and self.force:
            raise ConfigError("part_force", part=str(self.part))
        if self.out.startswith("memory://"):
            raise ConfigError("out_memory", where=self.out)


def _for_model(settings: JobSettings) -> Recipe:
    """Makes the recipe of a dataset for a model, whose own files decide markup and pictures.

    Raises:
      ConfigError: `model_settings`, a setting means nothing for such a dataset.
    """
    recipe, usual = settings.recipe, Recipe()
    text, image = recipe.text, recipe.image
    given = {
        "tokenizer": settings.tokenizer != EMBEDDED,
        "message_format": text.message_format != usual.text.message_format,
        "system_prompt": text.system_prompt not in (usual.text.system_prompt, "none"),
        "styles": bool(text.styles.to_dict()),
        "resample": image.resample != usual.image.resample,
        "image_bound": image.headroom != 1.0 or image.max_side_px is not None,
        "image_size, patch_size, crops, image_fit": image.views != usual.image.views,
    }
    wrong = [name for name, is_given in given.items() if is_given]
    if wrong:
        raise ConfigError("model_settings", where=settings.model, names=", ".join(wrong))
    return replace(
        recipe,
        text=replace(text, message_format="none", system_prompt="none"),
        image=replace(image, views=(), max_side_px=1),
    )


def _is_share(value: float | None) -> bool:
    return value is None or 0 <= value <= 1


def allowed_failures(share: float | None, total: int, *, default: float) -> int:
    """Computes a budget.

    >>> allowed_failures(0.0, 500, default=0.01), allowed_failures(0.29, 100, default=0.01)
    (0, 29)
    >>> allowed_failures(None, 500, default=0.01), allowed_failures(None, 5000, default=0.01)
    (10, 50)
    """
    # A share such as 0.29 times 100 is a little below 29.
    number = int((default if share is None else share) * total + 1e-9)
    return max(SMALL_JOB_FAILURES, number) if share is None else number


class Job:
    """One job, opened: the dataset, the tokenizer and the identity of what it will make."""

    def __init__(self, settings: JobSettings) -> None:
        """Loads the tokenizer and names the job; reads no row yet."""
        self.settings = settings
        self.growth: Growth | None = None
        """What the finished split has to get, once that is known; None for a first build."""
        if storage.is_local(settings.out):
            out = Path(settings.out).absolute()
            for folder in (out, *out.parents):
                if folder.is_file():
                    raise ConfigError("out_file", where=str(folder))
        recipe = settings.recipe
        if settings.model:
            recipe = _for_model(settings)
        tokenizer = load_tokenizer(
            settings.model or settings.tokenizer, pad_to=settings.pad_to, policy=recipe.text
        )
        local = storage.is_local(settings.cache)
        self.local_cache = local_cache(settings.cache)
        """Local folder for ledgers, locks and unfinished files."""
        root = self.local_cache if local else settings.cache
        self.blobs = BlobCache(root, pack_bytes=settings.fetch.pack_bytes)
        model: ChatModel | None = None
        if settings.model:
            model = load_model(
                settings.model,
                tokenizer=tokenizer,
                date=recipe.text.chat_date,
                own=settings.family == "own",
                videos=dataset_class(settings.dataset).videos,
            )
            family = model.stored.family
            image = replace(recipe.image, family=family, max_side_px=None, resample=family.filter)
            recipe = replace(recipe, image=image)
        self.preparer = Preparer(
            recipe=recipe, tokenizer=tokenizer, model=model, memory=self._memory_budget()
        )
        self.tokenizer = tokenizer.entry
        kind = dataset_class(settings.dataset)
        self.kind = kind
        self.name = settings.name or kind.name
        """Of the result: in the manifest, in the names of its files, and for seeds."""
        self.preparer.check_styles()
        _ = self.preparer.digits  # refuses what cannot be movable before anything is read
        if issubclass(kind, OwnDataset):
            require_style(kind.spec.style, settings.recipe.text.styles, where=kind.name)
        described = kind.describe()
        taken = sorted(described.keys() & {*settings.recipe.to_dict(), *_OWN})
        if taken:
            raise ConfigError("dataset_code.describe", where=kind.name, name=taken[0])
        self.recipe = {
            **recipe.to_dict(),
            **described,
            "mode": kind.resolve_mode(settings.mode),
            "several_images": kind.several_images,
            "frame": {
                **dataclasses.asdict(self.preparer.frame),
                # Which rows are refused follows from all of the template, as does reasoning.
                **({"template_sha256": tokenizer.template.sha256} if tokenizer.template else {}),
            },
        }
        if self.preparer.action_vocab_size is not None:
            self.recipe["action_vocab_size"] = self.preparer.action_vocab_size
        if kind.videos:
            self.recipe["video"] = settings.recipe.video.to_dict()
        self.libraries = library_versions(kind)
        if model is not None:
            self.recipe["model"] = model.describe()
            for name in ("jinja2", "transformers"):
                self.libraries[name] = importlib.metadata.version(name)

    @cached_property
    def dataset(self) -> DatasetBase:
        """The rows, opened when first needed."""
        s = self.settings
        dataset = self.kind(
            s.split, source=s.source, limit=s.limit, mode=s.mode, unmatched=s.unmatched
        )
        if not hasattr(dataset, "num_rows_read"):
            raise ConfigError("dataset_code.super", where=self.name)
        return dataset

    @property
    def source(self) -> str:
        """The source as the identity names it: local paths are absolute, URLs without secrets."""
        source = self.settings.source
        is_path = source not in ("hub", "sample") and "://" not in source
        return str(Path(source).absolute()) if is_path else redacted_url(source)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the result follows from, in plain JSON types."""
        s = self.settings
        return {
            "dataset": self.kind.name,
            "name": self.name if self.name != self.kind.name else None,
            "source": self.source,
            "split": s.split,
            "limit": s.limit,
            "unmatched": s.unmatched,
            "duplicates": s.duplicates,
            "shard_bytes": s.shard_bytes,
            "num_shards": s.num_shards,
            "recipe": self.recipe,
            "tokenizer": dataclasses.asdict(self.tokenizer),
            "libraries": self.libraries,
            # Only what is not as usual, so that outputs of older releases keep their identity.
            **({"downloads": downloads} if (downloads := s.fetch.describe()) else {}),
        }

    @cached_property
    def key(self) -> str:
        """Hash of the identity."""
        return fingerprint(self.identity)

    def _memory_budget(self) -> MemoryBudget:
        s = self.settings
        largest = s.recipe.image.limits.max_decode_bytes
        return MemoryBudget(
            folder=str(self.local_cache / self._locks_name),  # of the jobs of one machine
            total_bytes=(
                max(largest, usable_memory() // 2) if s.image_memory is None else s.image_memory
            ),
            largest_bytes=largest,
            num_workers=s.num_workers,
        )

    @property
    def _locks_name(self) -> str:
        # Parts share a cache between machines, and each of those has memory of its own.
        return "locks" if self.settings.part is None else f"locks-{platform.node()}"

    def source_files(self) -> Sequence[Path | str]:
        """Lists the files and objects that the rows are read from."""
        s = self.settings
        return self.kind.source_files(s.source, s.split, unmatched=s.unmatched)

    def compare_files(self, generation: int = 0, *, rows: RowFiles = "same") -> Compared | None:
        """Compares the files of the source with those of the plan that the output keeps.

        Args:
          generation: Of the split, whose plan that was.
          rows: What is asked of the files that rows are read from.
        """
        how = self.settings.compare
        if how == "none" or self.settings.source == "sample":
            return None
        return compare_files(self.files_url(generation), self.source_files(), how=how, rows=rows)

    @property
    def generation(self) -> int:
        """Number of the generation that is to be built."""
        return self.growth.generation if self.growth else 0

    @property
    def examples(self) -> range:
        """Numbers of the examples that are to be built."""
        return range(self.growth.stored.num_examples if self.growth else 0, len(self.dataset))

    def row_marks(self) -> RowMarks:
        """Gives marks of the examples before those that are to be built."""
        return self.growth.marks.copy() if self.growth else RowMarks()

    def url(self, *parts: str) -> str:
        """Names an object of the output."""
        return storage.join(self.settings.out, *parts)

    @property
    def scratch(self) -> str:
        """Local folder for unfinished files, emptied when the job (or this part of it) starts."""
        part = self.settings.part
        root = Path(self.scratch_of_all)
        return str(root if part is None else root / f"part-{part.stem}")

    @property
    def scratch_of_all(self) -> str:
        """Local folder with those of all parts that run here."""
        return str(scratch_root(self.settings.out, cache=self.local_cache))

    @property
    def identity_url(self) -> str:
        """Where the output keeps the identity of the job that made the split."""
        return self.url("plan", f"{self.settings.split}.json")

    def files_url(self, generation: int) -> str:
        """Where the output keeps the stamps of the source's files."""
        name = generation_name(f"{self.settings.split}-files", generation)
        return self.url("plan", f"{name}.jsonl.gz")

    def marks_url(self, generation: int) -> str:
        """Where the output keeps the marks of the source's rows."""
        name = generation_name(f"{self.settings.split}-rows", generation)
        return self.url("plan", f"{name}.json.gz")

    def rows_url(self, shard: int) -> str:
        """URL of the planned rows of a shard."""
        return rows_url(self.settings.out, self.settings.split, shard)

    def ledger_path(self) -> Path:
        """Where the results of this dataset's URLs are kept; a part has those of its hosts."""
        part = self.settings.part
        name = self.name if part is None else f"{self.name}.{part.stem}"
        return self.local_cache / "ledgers" / f"{name}.jsonl"

    def other_ledger_paths(self) -> list[Path]:
        """Lists the ledgers of this dataset from runs in another number of parts."""
        folder = self.local_cache / "ledgers"
        of_parts = f"{self.name}.?????-of-?????.jsonl"
        found = [
            folder / f"{self.name}.jsonl",
            *folder.glob(of_parts),
            *(folder / NODES_FOLDER).glob(of_parts),
        ]
        return sorted(path for path in found if path.exists() and path != self.ledger_path())

    def foreign_ledger_paths(self) -> list[Path]:
        """Lists the ledgers of other datasets that this machine sees."""
        folder = self.local_cache / "ledgers"
        own = {self.ledger_path(), *self.other_ledger_paths()}
        found = [*folder.glob("*.jsonl"), *(folder / NODES_FOLDER).glob("*.jsonl")]
        return sorted(path for path in found if path not in own)


def local_cache(cache: str) -> Path:
    """Names the folder for what a machine keeps of an image cache: its own, if that is a folder."""
    return storage.local_path(cache if storage.is_local(cache) else LOCAL_CACHE)


def library_versions(dataset: type[DatasetBase]) -> dict[str, str]:
    """Lists what touches bytes: libraries by version, our own code by the hash of its sources.

    Of the datasets' modules only the one being built counts: a new adapter changes no other output.
    """
    code = _own_code().copy()
    for path in dataset.code_files():
        code.update(path.read_bytes())
    versions = {name: version_of(name) for name in ("numpy", "pillow", "tokenizers")}
    if dataset.videos:
        # Not imported here: the process that decodes has a compiled library of its own version.
        versions["av"] = version_of("av")
    for feature in ("libjpeg_turbo", "zlib", "webp", "littlecms2"):
        versions[feature] = str(PIL.features.version(feature))
    versions["simplejpeg"] = version_of("simplejpeg")
    return {**versions, "code_sha256": code.hexdigest()}


@functools.cache
def _own_code() -> hashlib._Hash:
    """Hashes what counts for all datasets, once: the code that runs is that of the first time."""
    code = hashlib.sha256()
    for path in _own_sources():
        code.update(path.read_bytes())
    return code


@functools.cache
def version_of(package: str) -> str:
    """Gives the version of an installed package, or "absent"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


_OWN = ("mode", "several_images", "frame", "video", "action_vocab_size")
"""What a job adds to the settings of a recipe."""

_ROOT = Path(__file__).parents[2]

_BYTE_SOURCES = (
    "preprocess/datasets/base.py",
    "preprocess/datasets/hooks.py",
    "preprocess/datasets/images.py",
    "preprocess/datasets/rows.py",
    "preprocess/datasets/splits.py",
    "preprocess/documents/*.py",
    "preprocess/formats/*.py",
    "preprocess/hash_table.py",
    "preprocess/job/build.py",
    "preprocess/job/generation.py",
    "preprocess/job/keys.py",
    "preprocess/job/plan.py",
    "preprocess/job/planner.py",
    "preprocess/media/**/*.py",
    "preprocess/model/**/*.py",
    "preprocess/recipe.py",
    "preprocess/sizes.py",
    "preprocess/synthetic/**/*.py",
    "preprocess/text/**/*.py",
    "preprocess/text/**/*.toml",
    "shardspec/actions.py",
    "shardspec/child.py",
    "shardspec/checksum.py",
    "shardspec/coordinates.py",
    "shardspec/families/**/*.py",
    "shardspec/frames.py",
    "shardspec/image_file.py",
    "shardspec/index.py",
    "shardspec/keyed.py",
    "shardspec/media.py",
    "shardspec/sample.py",
    "shardspec/tar.py",
    "shardspec/tiling/**/*.py",
    "shardspec/video/**/*.py",
)
"""Sources whose change may change the bytes of a shard, whatever the dataset. Rooms are given as
patterns, so that a module that is split or added there counts too."""


def byte_sources(dataset: type[DatasetBase]) -> list[Path]:
    """Lists the files of code that may change the bytes of a dataset's shards, in a fixed order."""
    return [*_own_sources(), *dataset.code_files()]


def _own_sources() -> list[Path]:
    return [path for pattern in _BYTE_SOURCES for path in sorted(_ROOT.glob(pattern))]
