"""The manifest of a dataset: what was built, from what, and the list of its shards.

`manifest.json` is written last, atomically: files that it does not list are ignored. It is also a
valid wids index (`shardlist` with `url` and `nsamples`). Every value is a function of the job's
inputs, so the same inputs give the same bytes; times and host names go to run.json.

The manifest has a *digest* of its own bytes, which every reader compares: a manifest names the
checksums of everything else, and nothing else names its own.

A *receipt* describes one shard in the same way, and is written when that shard is complete; commit
collects the receipts of a split and adds the split to the manifest.

A *view* is a manifest whose shards are runs of samples of other datasets' files: nothing was
copied. A *raw* dataset contains the members of foreign tars unchanged, without recipe and
tokenizer. Readers use both through `Manifest.segments`. An *annotated* dataset has columns that
were added later, in a file of its own for each shard (`shardspec.columns`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

from shardspec import storage
from shardspec.columns import COLUMNS_SUFFIX, type_problems
from shardspec.documents import read_json
from shardspec.errors import ConfigError, ManifestError, nearest
from shardspec.storage import RangeReader

FORMAT_VERSION = 1
"""Version of the on-disk contract: a dataset that owns its shards, of prepared samples."""

EXTENDED_VERSION = 2
"""Version of manifests with fields that version 1 lacks: views, raw and annotated datasets."""

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer/tokenizer.json"
"""Where a dataset keeps a copy of its tokenizer, so that its text can be read back anywhere."""

INDEX_SUFFIX = ".index.npy"

_NO_DIGEST = "0" * 64
_DIGEST_LINE = re.compile(rb'(?<=\n "digest": ")[0-9a-f]{64}(?=")')
"""The digest in a canonical manifest. No string of the document contains a newline, so only the
field of the outermost object can match."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A tar and its index, in this dataset or elsewhere."""

    url: str
    """Path of the tar from the manifest's folder, or an absolute URL."""
    index_url: str
    nsamples: int
    num_bytes: int
    """Length of the tar."""
    sha256: str
    """Of the tar; "" where it was never read as a whole."""
    index_bytes: int
    index_sha256: str

    @property
    def content_sha256(self) -> str:
        """Identifies the content of the tar: two files that differ have different ones."""
        # The index has every sample's key, position, length and checksum.
        return self.sha256 or self.index_sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Consecutive samples of one file."""

    file: FileEntry
    first_row: int
    """Row of the file's index where they begin."""
    num_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry:
    """One shard as the manifest names it."""

    url: str
    """Path of the tar, relative to the manifest. The shards of a view have none."""
    split: str
    nsamples: int
    num_bytes: int
    """Length of the tar."""
    sha256: str
    """Of the tar; "" where it was joined from parts of others without being read as a whole."""
    index_bytes: int
    index_sha256: str
    num_images: int
    num_tokens: int
    """Text tokens, each turn at its longest variant."""
    num_loss_tokens: int

    @property
    def index_url(self) -> str:
        """Path of the index, relative to the manifest."""
        return self.url.removesuffix(".tar") + INDEX_SUFFIX

    @property
    def file(self) -> FileEntry:
        """The tar and the index of a shard that its dataset owns."""
        own = {field.name: getattr(self, field.name) for field in fields(FileEntry)}
        return FileEntry(**own)


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a finished build task reports of its shard."""

    build_key: str
    """Hash of everything the shard's bytes depend on."""
    shard: ShardEntry
    quarantined: Mapping[str, int] = field(default_factory=dict)
    """Samples that could not be built, by reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitEntry:
    """One split of the dataset."""

    build_key: str
    source: Mapping[str, Any]
    """Where the rows came from: kind, location or revision, fingerprint, limit."""
    num_samples: int
    num_images: int
    num_tokens: int
    num_loss_tokens: int
    num_bytes: int
    quarantined: Mapping[str, int]
    """Rows that did not become samples, by reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerEntry:
    """The tokenizer as the loader must know it."""

    name: str
    sha256: str
    """Of the canonical tokenizer.json."""
    probe_sha256: str
    """Of the ids that it gives for a fixed set of texts: its behaviour."""
    vocab_size: int
    """Ids of the tokenizer itself are below this."""
    embedding_size: int
    """Rows that a model's embedding must have: every id of the dataset is below this."""
    special_ids: Mapping[str, int]
    """bos (absent where sequences begin without one), eos, pad, and the image symbols such as
    <im_patch>, which have consecutive ids."""
    special_tokens: Mapping[str, str]
    """The tokens of the tokenizer whose ids bos, eos and pad are, such as <|endoftext|>."""


NO_TOKENIZER = TokenizerEntry(
    name="",
    sha256="",
    probe_sha256="",
    vocab_size=0,
    embedding_size=0,
    special_ids={},
    special_tokens={},
)
"""The tokenizer of a raw dataset, which has none; `null` in its manifest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Where the samples of a view's shards are."""

    files: tuple[FileEntry, ...]
    parts: Mapping[str, tuple[tuple[int, int, int], ...]]
    """URL of each shard of the view -> its runs of samples: (number of the file, first row, rows).
    No sample is in a split twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnFile:
    """The added columns of one shard: a row per sample, in the shard's order."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedColumns:
    """Columns that were joined to the samples after these were made."""

    types: Mapping[str, str]
    """Name of each to its type; see `shardspec.columns`."""
    files: Mapping[str, ColumnFile]
    """URL of each shard, of the dataset itself or of a view -> its column file."""

    @staticmethod
    def file_url(shard_url: str) -> str:
        """Names the column file of a shard, relative to the manifest."""
        return shard_url.removesuffix(".tar") + COLUMNS_SUFFIX


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything a reader needs to trust and to use a dataset."""

    dataset: str
    recipe: Mapping[str, Any]
    """The effective recipe: every byte of a sample follows from it."""
    tokenizer: TokenizerEntry
    libraries: Mapping[str, str]
    """Versions of the libraries that touch bytes, and the hash of our own code that does."""
    splits: Mapping[str, SplitEntry]
    shards: tuple[ShardEntry, ...]
    view: View | None = None
    """Where the samples are, if the dataset does not own its shards."""
    raw: bool = False
    """Whether samples are unchanged members of foreign tars."""
    columns: AddedColumns | None = None
    """Columns that were added later."""

    @property
    def format_version(self) -> int:
        """The oldest format version whose readers can read this manifest."""
        extended = self.raw or self.view or self.columns
        return EXTENDED_VERSION if extended else FORMAT_VERSION

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """The files that contain its samples."""
        return self.view.files if self.view else tuple(shard.file for shard in self.shards)

    def select(self, split: str) -> tuple[ShardEntry, ...]:
        """Lists the shards of a split in order.

        Raises:
          ConfigError: `unknown_split`.
        """
        if split not in self.splits:
            raise ConfigError(
                "unknown_split.unknown",
                dataset=self.dataset,
                split=split,
                hint=nearest(split, self.splits),
                splits=sorted(self.splits),
            )
        return tuple(shard for shard in self.shards if shard.split == split)

    def segments(self, split: str) -> tuple[Segment, ...]:
        """Lists where the samples of a split are, in order.

        Raises:
          ConfigError: `unknown_split`.
        """
        shards = self.select(split)
        if self.view is None:
            return tuple(Segment(file=s.file, first_row=0, num_rows=s.nsamples) for s in shards)
        return tuple(
            Segment(file=self.view.files[number], first_row=first, num_rows=rows)
            for shard in shards
            for number, first, rows in self.view.parts[shard.url]
        )

    def with_split(self, split: str, entry: SplitEntry, shards: tuple[ShardEntry, ...]) -> Manifest:
        """Adds or replaces a split; shards stay sorted by URL."""
        others = tuple(shard for shard in self.shards if shard.split != split)
        return replace(
            self,
            splits={**self.splits, split: entry},
            shards=tuple(sorted(others + shards, key=lambda shard: shard.url)),
        )

    def encode(self) -> bytes:
        """Serialises the manifest canonically, with its digest."""
        document: dict[str, Any] = {
            "format_version": self.format_version,
            "dataset": self.dataset,
            "recipe": self.recipe,
            "tokenizer": None if self.raw else asdict(self.tokenizer),
            "libraries": self.libraries,
            "splits": {name: asdict(entry) for name, entry in self.splits.items()},
            "shardlist": [asdict(shard) for shard in self.shards],
        }
        if self.view is None:
            document |= {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": self.dataset}
        if self.format_version == EXTENDED_VERSION:
            document |= {"raw": self.raw, "view": self.view and _encode_view(self.view)}
        if self.columns is not None:
            document["columns"] = asdict(self.columns)
        return sealed(document)


def sealed(document: Mapping[str, Any]) -> bytes:
    """Serialises the document of a manifest canonically, with the digest of these bytes."""
    payload = canonical_json({**document, "digest": _NO_DIGEST}, indent=1)
    digest = hashlib.sha256(payload).hexdigest()
    return _DIGEST_LINE.sub(digest.encode(), payload, count=1)


def _check_digest(payload: bytes, document: Mapping[str, Any], *, where: str) -> None:
    """Compares the digest in a manifest with its bytes, as they are: not with their meaning."""
    if "digest" not in document:
        raise ManifestError("manifest_digest.missing", where=where)
    found = [match.span() for match in _DIGEST_LINE.finditer(payload)]
    if len(found) != 1:
        raise ManifestError(
            "manifest_digest.differs", where=where, got=repr(document["digest"])[:80]
        )
    [(start, stop)] = found
    hashed = hashlib.sha256(payload[:start])
    hashed.update(_NO_DIGEST.encode())
    hashed.update(payload[stop:])
    want = payload[start:stop].decode()
    if hashed.hexdigest() != want:
        raise ManifestError(
            "manifest_digest.differs", where=where, got=hashed.hexdigest(), want=want
        )


def _encode_view(view: View) -> dict[str, Any]:
    # One string per shard and not three lines per run: a view may have many thousands of runs.
    parts = {url: " ".join(f"{f}:{a}+{n}" for f, a, n in runs) for url, runs in view.parts.items()}
    return {"files": [asdict(file) for file in view.files], "parts": parts}


_CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def canonical_json(value: object, *, indent: int | None = None) -> bytes:
    """Serialises plain JSON types canonically: sorted keys, UTF-8, a final newline."""
    if indent is None:
        return _CANONICAL.encode(value).encode() + b"\n"
    return json.dumps(value, sort_keys=True, ensure_ascii=False, indent=indent).encode() + b"\n"


def fingerprint(value: object) -> str:
    """Hashes plain JSON types: sha256 of their canonical form."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def parse_manifest(payload: bytes, *, where: str) -> Manifest:
    """Reads a manifest and checks it completely.

    Raises:
      ManifestError: `manifest_json`, `manifest_version`, `manifest_digest` (the bytes are not those
        that were written), `manifest_fields` (names every problem).
    """
    try:
        document = read_json(payload)
    except ValueError as error:
        raise ManifestError("manifest_json", where=where, error=error) from error
    version = document.get("format_version") if isinstance(document, dict) else None
    if version not in (FORMAT_VERSION, EXTENDED_VERSION):
        raise ManifestError(
            "manifest_version",
            where=where,
            got=version,
            want=f"{FORMAT_VERSION} or {EXTENDED_VERSION}",
        )
    _check_digest(payload, document, where=where)
    problems: list[str] = []
    raw, view, columns = False, None, None
    if version == EXTENDED_VERSION:
        raw = document.get("raw")
        if not isinstance(raw, bool):
            problems.append(f"raw: want true or false, got {raw!r}")
        if document.get("view") is not None:
            view = _parse_view(_mapping(document, "view", problems), problems)
        if document.get("columns") is not None:
            columns = _parse_columns(_mapping(document, "columns", problems), problems)
    tokenizer = NO_TOKENIZER
    if not raw:
        tokenizer = _record(TokenizerEntry, document.get("tokenizer"), "tokenizer", problems)
        if tokenizer is not None:
            problems += _special_contradictions(tokenizer)
    splits = {
        str(name): _record(SplitEntry, entry, f"splits.{name}", problems)
        for name, entry in _mapping(document, "splits", problems).items()
    }
    listed = document.get("shardlist")
    if not isinstance(listed, list):
        problems.append("shardlist: want a list")
        listed = []
    shards = [_record(ShardEntry, e, f"shardlist[{i}]", problems) for i, e in enumerate(listed)]
    recipe = _mapping(document, "recipe", problems)
    libraries = _mapping(document, "libraries", problems)
    dataset = document.get("dataset")
    if not isinstance(dataset, str):
        problems.append(f"dataset: want str, got {dataset!r}")
    if not problems:
        problems = _contradictions(splits, shards)
    if not problems and view is not None:
        problems = _view_contradictions(view, shards)
    if not problems and columns is not None:
        urls = {shard.url for shard in shards}
        problems = [f"columns.files: none of {url}" for url in sorted(urls - set(columns.files))]
    if problems:
        raise ManifestError("manifest_fields", where=where, problems="; ".join(problems))
    return Manifest(
        dataset=str(dataset),
        recipe=recipe,
        tokenizer=tokenizer,
        libraries=libraries,
        splits=splits,
        shards=tuple(shards),
        view=view,
        raw=raw,
        columns=columns,
    )


def load_manifest(url: str) -> Manifest | None:
    """Reads the manifest below a dataset's URL; None where there is none."""
    where = storage.join(url, MANIFEST_NAME)
    try:
        payload = storage.read_bytes(where)
    except FileNotFoundError:
        return None
    return parse_manifest(payload, where=where)


def require_manifest(url: str) -> Manifest:
    """Reads the manifest below a dataset's URL.

    Raises:
      ManifestError: `manifest_missing`, or as `parse_manifest`.
    """
    manifest = load_manifest(url)
    if manifest is None:
        raise _no_manifest(storage.join(url, MANIFEST_NAME))
    return manifest


def fetch_manifest(url: str, ranges: RangeReader) -> Manifest:
    """Reads the manifest of a dataset in an object store, with the retries of `ranges`.

    Raises:
      ManifestError: As `require_manifest`.
      StorageError: As `RangeReader.read_all`.
    """
    where = storage.join(url, MANIFEST_NAME)
    try:
        payload = ranges.read_all(where)
    except FileNotFoundError as error:
        raise _no_manifest(where) from error
    return parse_manifest(payload, where=where)


def _no_manifest(where: str) -> ManifestError:
    return ManifestError("manifest_missing.shards", where=where)


def encode_receipt(receipt: Receipt) -> bytes:
    """Serialises a receipt canonically."""
    return canonical_json(asdict(receipt), indent=1)


def parse_receipt(payload: bytes, *, where: str) -> Receipt | None:
    """Reads a receipt; None when it is not one (the shard is then built again)."""
    problems: list[str] = []
    try:
        document = read_json(payload)
    except ValueError:
        return None
    if not isinstance(document, dict):
        return None
    shard = _record(ShardEntry, document.get("shard"), where, problems)
    build_key = document.get("build_key")
    quarantined: Any = document.get("quarantined")
    if problems or not isinstance(build_key, str) or not _CHECKS["Mapping[str, int]"](quarantined):
        return None
    return Receipt(build_key=build_key, shard=shard, quarantined=quarantined)


def differences(old: object, new: object, name: str) -> list[str]:
    """Lists where two JSON values differ, field by field.

    >>> differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}}, "recipe")
    ['recipe.b.c: 2 here, 3 asked']
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = sorted(set(old) | set(new))
        none = "(nothing)"
        return [
            d for n in names for d in differences(old.get(n, none), new.get(n, none), f"{name}.{n}")
        ]
    if isinstance(old, tuple | list) and isinstance(new, tuple | list):
        old, new = list(old), list(new)
    return [] if old == new else [f"{name}: {old} here, {new} asked"]


def _contradictions(splits: Mapping[str, SplitEntry], shards: Sequence[ShardEntry]) -> list[str]:
    """Lists where the parts of a manifest, each well-formed, contradict one another."""
    problems = []
    names = Counter(shard.url for shard in shards)
    num_samples = Counter({name: 0 for name in splits})
    for shard in shards:
        num_samples[shard.split] += shard.nsamples
        if shard.split not in splits:
            problems.append(f"shardlist: {shard.url} is of split {shard.split!r}, not in splits")
        if names[shard.url] > 1:
            problems.append(f"shardlist: {shard.url} is named {names[shard.url]} times")
        # A reader appends this to the dataset's URL; it must not lead out of it.
        parts = shard.url.split("/")
        if not shard.url.endswith(".tar") or not {"", ".", ".."}.isdisjoint(parts):
            problems.append(f"shardlist: {shard.url!r} is not a path of a .tar below the manifest")
    for name, entry in splits.items():
        if entry.num_samples != num_samples[name]:
            got = f"{entry.num_samples}, its shards have {num_samples[name]}"
            problems.append(f"splits.{name}.num_samples: {got}")
    return problems


def _special_contradictions(entry: TokenizerEntry) -> list[str]:
    """Lists what is wrong with the special ids: each of them changes every batch."""
    ids, tokens = entry.special_ids, entry.special_tokens
    where = "tokenizer.special_ids"
    problems = [f"{where}.{name}: missing" for name in ("eos", "pad") if name not in ids]
    problems += [
        f"{where}.{name}: {i}, the embedding has {entry.embedding_size} rows"
        for name, i in ids.items()
        if i >= entry.embedding_size
    ]
    # Of a tokenizer without BOS or padding, EOS may take their place: these three may be equal.
    named = {"bos", "eos", "pad"}
    symbols = sorted((i, name) for name, i in ids.items() if name not in named)
    if symbols:
        first = symbols[0][0]
        if [i for i, _ in symbols] != list(range(first, first + len(symbols))):
            problems.append(f"{where}: image symbols are not consecutive: {dict(ids)}")
        if first < entry.vocab_size:
            problems.append(f"{where}.{symbols[0][1]}: {first}, an id of a text token")
        shared = {i for i, _ in symbols} & {ids[name] for name in named & set(ids)}
        if shared:
            problems.append(f"{where}: {sorted(shared)} is an image symbol and another token")
    if set(tokens) != named & set(ids):
        want = sorted(named & set(ids))
        problems.append(f"tokenizer.special_tokens: want {want}, got {sorted(tokens)}")
    return problems


def _parse_view(document: dict[str, Any], problems: list[str]) -> View:
    listed = document.get("files")
    if not isinstance(listed, list):
        problems.append("view.files: want a list")
        listed = []
    files = [_record(FileEntry, e, f"view.files[{i}]", problems) for i, e in enumerate(listed)]
    parts: dict[str, tuple[tuple[int, int, int], ...]] = {}
    for url, text in _mapping(document, "parts", problems).items():
        runs = [_RUN.fullmatch(run) for run in text.split()] if isinstance(text, str) else [None]
        if not all(runs):
            problems.append(f"view.parts.{url}: want runs such as 0:16+8, got {text!r:.80}")
            continue
        parts[url] = tuple((int(m[1]), int(m[2]), int(m[3])) for m in runs if m)
    return View(files=tuple(files), parts=parts)


def _parse_columns(document: dict[str, Any], problems: list[str]) -> AddedColumns:
    found: list[str] = []
    types, listed = (_mapping(document, name, found) for name in ("types", "files"))
    problems += [f"columns.{problem}" for problem in found]
    problems += [f"columns.types.{problem}" for problem in type_problems(types)]
    files = {
        url: _record(ColumnFile, entry, f"columns.files.{url}", problems)
        for url, entry in listed.items()
    }
    return AddedColumns(types=types, files=files)


def _view_contradictions(view: View, shards: Sequence[ShardEntry]) -> list[str]:
    """Lists where a view's parts do not fit its files and shards."""
    problems = [f"view.parts: no {shard.url}" for shard in shards if shard.url not in view.parts]
    taken: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for shard in shards:
        runs = view.parts.get(shard.url, ())
        got = sum(rows for *_, rows in runs)
        if got != shard.nsamples:
            problems.append(f"view.parts.{shard.url}: {got} rows, the shard {shard.nsamples}")
        for number, first, rows in runs:
            if number >= len(view.files) or first + rows > view.files[number].nsamples or not rows:
                problems.append(f"view.parts.{shard.url}: no rows {first}+{rows} in file {number}")
            taken.setdefault((shard.split, number), []).append((first, first + rows))
    for (split, number), spans in taken.items():
        spans.sort()
        if any(stop > start for (_, stop), (start, _) in pairwise(spans)):
            problems.append(f"view.parts: split {split} has rows of file {number} twice")
    return problems


_RUN = re.compile(r"([0-9]+):([0-9]+)\+([0-9]+)")
"""A run of a view: number of the file, first row, rows."""


def _mapping(document: dict[str, Any], name: str, problems: list[str]) -> dict[str, Any]:
    value = document.get(name)
    if isinstance(value, dict):
        return value
    problems.append(f"{name}: want an object")
    return {}


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0  # not a bool, which is an int to isinstance


_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "int": _is_count,
    "Mapping[str, Any]": lambda value: isinstance(value, dict),
    "Mapping[str, int]": lambda value: (
        isinstance(value, dict) and all(map(_is_count, value.values()))
    ),
    "Mapping[str, str]": lambda value: (
        isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
    ),
}


def _record(kind: Any, value: object, where: str, problems: list[str]) -> Any:
    """Makes a dataclass from a JSON object, or notes every reason why it cannot."""
    if not isinstance(value, dict):
        problems.append(f"{where}: want an object")
        return None
    known = {f.name: f for f in fields(kind)}
    before = len(problems)
    for name in sorted(set(value) - set(known)):
        problems.append(f"{where}.{name}: unknown field")
    for name, spec in known.items():
        if name not in value:
            problems.append(f"{where}.{name}: missing")
        elif not _CHECKS[str(spec.type)](value[name]):
            problems.append(f"{where}.{name}: want {spec.type}, got {value[name]!r}")
    return kind(**value) if len(problems) == before else None
