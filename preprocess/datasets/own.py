"""A user's own data: files with a spec, files whose format can be told, and code.

DATASET=chats.toml            a spec (`preprocess.formats.spec`)
DATASET=/data/llava.json      a file or folder; its rows say which format they have
DATASET=mine.py:MyDataset     a class of a Python file: a subclass of `DatasetBase`, or of
                              `Dataset`, which has `__len__` and `get`
DATASET=package.mine:MyData   the same of an installed package
"""

from __future__ import annotations

import glob
import importlib
import importlib.util
import inspect
import os
import re
import sys
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, ClassVar

from preprocess.datasets.base import DOCUMENT_SETTINGS, Dataset, DatasetBase, class_files
from preprocess.datasets.hooks import check_attributes
from preprocess.datasets.images import RemoteImage, resolve_image
from preprocess.datasets.rows import Rows
from preprocess.datasets.splits import (
    SplitLayout,
    Unmatched,
    json_object,
    matches,
    split_layout,
)
from preprocess.documents import pdfium_version, read_document
from preprocess.formats import (
    BROKEN,
    FORMATS,
    IMAGES,
    NAME,
    PIECE,
    ROWS,
    VIDEO_NAMES,
    DocumentPolicy,
    Records,
    Spec,
    annotation_names,
    check_unit,
    guess_format,
    has_video_part,
    holds_rows,
    is_empty,
    is_folder,
    is_hidden,
    open_records,
    parse_row,
    read_spec,
    row_subtitles,
    visible_names,
)
from shardspec import storage
from shardspec.errors import ConfigError, SampleError, SourceError, nearest, redacted_url
from shardspec.keyed import SampleRng, hash_text, keyed
from shardspec.manifest import MANIFEST_NAME, load_manifest

PROBED_ROWS = 100
"""Rows that a format is told from, half of them from the beginning, half spread over the file."""

PROBED_FILES = 8
"""Files of a folder that its format is told from, spread over them."""

FIRST_ROWS = 100
"""Rows that show whether a source has the columns of its format, and the unit of coordinates."""

PROBED_IMAGES = 50
"""Image names that tell which folder they start from."""

MAX_BASES = 200
"""Folders that are tried."""

_COMPARED_BYTES = 2**20

_BASE = "__base__"
"""Field of a row whose image names start elsewhere than those of most rows."""

_CODE = re.compile(r"(?P<place>[^:]+(\.py)?):(?P<name>[A-Za-z_]\w*)")


def is_own(name: str) -> bool:
    """Tells whether a dataset is given by a file or by code, and not by its name."""
    return bool(
        "/" in name
        or name in (".", "..")
        or name.endswith((".toml", ".py", *ROWS, ".gz", ".zst"))
        or (_CODE.fullmatch(name) and "://" not in name)
    )


def own_dataset(name: str) -> type[DatasetBase]:
    """Makes or finds the class of a dataset that is given by a file or by code.

    Raises:
      ConfigError: A spec or code that cannot be used.
      SourceError: The format of a file cannot be told.
    """
    code = _CODE.fullmatch(name)
    if name.endswith(".py"):
        raise ConfigError("dataset_code.unnamed", where=name)
    if code and "://" not in name:
        return _coded(code["place"], code["name"])
    if name.endswith(".toml"):
        path = Path(name)
        spec = read_spec(path, formats=FORMATS)
        return _specified(spec, folder=path.parent, path=path)
    return _specified(_guessed(name), folder=Path(), path=None)


def _specified(spec: Spec, *, folder: Path, path: Path | None) -> type[DatasetBase]:
    if spec.documents and spec.format != "documents":
        raise ConfigError("document_policy.format", where=str(path))
    DocumentPolicy.from_table(spec.documents)  # refused early
    return type(
        "OwnDataset",
        (OwnDataset,),
        {
            "name": spec.name,
            "spec": spec,
            "folder": folder,
            "validation_share": float(spec.validation),
            "videos": "video" in spec.columns,
            "settings": DOCUMENT_SETTINGS if spec.format == "documents" else {},
            "ocr_files": spec.format == "documents",
            "__doc__": f"Rows of {path or spec.source}.",
        },
    )


class OwnDataset(DatasetBase):
    """Rows of a user's own files, in one of the formats of `preprocess.formats`."""

    spec: ClassVar[Spec]
    folder: ClassVar[Path]
    """What relative names of the spec start from."""
    several_images: ClassVar[bool] = True
    leaves_out: ClassVar[frozenset[str]] = frozenset({"document_no_text", "document_tokens"})
    """What the budget of documents leaves out."""
    _owners: list[array[int]] | None = None
    """Of each part, the row of each example; it travels to other processes, the rows do not."""

    @classmethod
    def source_url(cls) -> str:
        """Names the file, folder or pattern of the rows."""
        source = cls.spec.source
        return source if "://" in source else str(cls.folder / source)

    @classmethod
    def describe(cls) -> dict[str, Any]:
        """Says what the rows mean."""
        pdfium = {"pdfium": pdfium_version()} if cls.spec.format == "documents" else {}
        return {"data": cls.spec.to_dict(), **pdfium}

    @classmethod
    def code_files(cls) -> list[Path]:
        """Lists the code that turns rows into examples."""
        return [Path(__file__)]

    @classmethod
    def source_files(cls, source: str, split: str, *, unmatched: Unmatched) -> Sequence[Path | str]:
        """Lists the files of the split, with the answers to VQA questions.

        Of a folder of images these are all that are in it.
        """
        files = cls._files(source, split, unmatched)[0]
        answers = {name for each in files for name in annotation_names(each)} - {*files}
        found = [
            place
            for each in [*files, *sorted(filter(storage.exists, answers))]
            for place in (
                [storage.join(each, name) for name in visible_names(each)]
                if is_folder(each)
                else [each]
            )
        ]
        return [storage.local_path(each) if storage.is_local(each) else each for each in found]

    def load(self) -> Rows:
        """Opens the files of the split."""
        files, layout = self._files(self.source, self.split, self.unmatched)
        records = [open_records(each, self.spec.encoding) for each in files]
        source = self.source_url() if self.source == "hub" else self.source
        if "://" not in source and (Path(source) / MANIFEST_NAME).is_file():
            # Its keys may have been read by another rule than that of WebDataset.
            imported = imported_tars(source)
            if any(
                imported.get(name, len(each)) != len(each)
                for name, each in zip(files, records, strict=True)
            ):
                raise SourceError("source_imported", where=source)
        parts: list[Sequence[Mapping[str, Any]]]
        parts = [part for each in records for part in each.parts]
        bases = _bases(self.spec, files, self.folder)
        names = _first_names(self.spec, parts) if "://" not in bases[0] else []
        folders = _by_folder(records)
        usual = _likely_base(names, bases)
        base, self.image_names = usual
        if len(folders) > 1 and names:  # the first folder decides: rows of others may come later
            first = _first_names(self.spec, [p for each in folders[0] for p in each.parts])
            found = _likely_base(first, bases)
            base, self.image_names = found if found[1][0] else usual
        self.base = base
        """Folder or URL that image names start from, where a row does not say another."""
        self.other_bases = others = self._other_bases(folders, names, usual[0])
        """By file, where another is meant than `base`."""
        rows = list(islice((part[i] for part in parts for i in range(len(part))), FIRST_ROWS))
        rows = [row for row in rows if BROKEN not in row]
        _require_named(records, self.spec)
        _require_columns(rows, self._spec_of_split(), where=files[0])
        _require_images(rows, self.spec, where=files[0])
        if self.spec.format in ("points", "boxes"):
            check_unit(rows, self.spec, where=files[0])
        parts = [
            _Based(part, others[each]) if each in others else part
            for record in records
            for each, part in zip(record.files, record.parts, strict=True)
        ]
        parts = self._pieces(parts)
        kind = {
            "kind": "own",
            "format": self.spec.format,
            "files": [Path(redacted_url(each) if "://" in each else each).name for each in files],
            "licence": self.spec.licence,
        }
        return Rows(
            [lambda part=part: part for part in parts],  # type: ignore[misc]
            lengths=[len(part) for part in parts],
            kind=kind,
            base=base,
            others={*others.values()},
            layout=layout,
            origins=[(name, 0) for each in records for name in each.files],
        )

    def _other_bases(
        self, folders: Sequence[Sequence[Records]], names: Sequence[str], usual: str
    ) -> dict[str, str]:
        """Finds the files whose image names start elsewhere than at `base`, and where.

        Folders may have files of the same names: those beside a file are the ones that it names;
        then come those of the `usual` place, which has most of all first names.
        """
        if self.spec.images or not (names or "://" in self.base):  # all were looked through
            return {}
        found: dict[str, str] = {}
        for beside in folders:
            files = [name for each in beside for name in each.files]
            own = _bases(self.spec, files, self.folder)
            parts = [part for each in beside for part in each.parts]
            if "://" in own[0]:
                if own[0] != self.base and self._starts_in(own[0], parts[:1]):
                    found |= dict.fromkeys(files, own[0])
                continue
            if len(folders) > 1:  # otherwise these are the same rows
                names = _first_names(self.spec, parts)
            names = [each for each in names if not os.path.isabs(each)]  # these start nowhere
            # Of equally many the first wins, so `base` is the last one.
            base, (number, _) = _likely_base(names, [*own, usual, self.base])
            _require_one_folder(names, base, own, where=files[0])
            if base != self.base and number:
                found |= dict.fromkeys(files, base)
        return found

    def _starts_in(self, folder: str, parts: Sequence[Sequence[Mapping[str, Any]]]) -> bool:
        """Tells whether names of rows start in their folder of a store, and not at `base`.

        A store is asked only where the folder is below `base`, for the first name.
        """
        names = _first_names(self.spec, parts, most=1)
        below = folder.startswith(f"{self.base}/")
        return any(
            not below or _is_stored(name, folder) or not _is_stored(name, self.base)
            for name in names[:1]
            if not os.path.isabs(name)
        )

    def _pieces(
        self, parts: Sequence[Sequence[Mapping[str, Any]]]
    ) -> list[Sequence[Mapping[str, Any]]]:
        """Divides rows of which one may give several examples; reads every row once for that."""
        count = FORMATS[self.spec.format].count
        if count is None or not any(
            (self.spec.max_images, self.spec.max_videos, self.spec.max_chars)
        ):
            return list(parts)
        if self._owners is None:
            self._owners = [_owners(part, lambda row: count(row, self.spec)) for part in parts]
        return [_Pieces(part, rows) for part, rows in zip(parts, self._owners, strict=True)]

    @classmethod
    def _files(
        cls, source: str, split: str, unmatched: Unmatched
    ) -> tuple[list[str], SplitLayout | None]:
        """Lists the files of a split, and says which files make which."""
        source = cls.source_url() if source == "hub" else source
        if cls.spec.splits:
            if split not in cls.spec.splits:
                splits = sorted(cls.spec.splits)
                raise SourceError("source_split.none", where=source, split=split, splits=splits)
            files = {
                name: {each: None for f in found for each in list_files(_below(cls.folder, f))}
                for name, found in cls.spec.splits.items()
            }
            for name, others in files.items():
                shared = sorted(files[split].keys() & others.keys()) if name != split else []
                if shared:
                    raise SourceError("source_split.shared", where=shared[0], splits=[split, name])
            return list(files[split]), None
        found = list_files(source)
        by_name = {Path(each).name if len(found) == 1 else each: each for each in found}
        if len(found) > 1:
            root = os.path.commonpath(found)
            by_name = {os.path.relpath(each, root): each for each in found}
        elif is_folder(found[0]):
            return found, None  # images with side files
        layout = split_layout(by_name, default=None if unmatched == "take" else "train")
        divided = cls.spec.validation and "validation" not in layout.splits
        wanted = "train" if divided and split == "validation" else split
        names = layout.files(wanted, unmatched=unmatched, where=source)
        return [by_name[name] for name in names], layout

    def to_example(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Turns a row into an example."""
        if BROKEN in row:
            raise row[BROKEN]
        base = self.base
        if _BASE in row:
            row = dict(row)
            base = row.pop(_BASE)
        example = parse_row(row, self._spec_of_split())
        images = [resolve_image(each, base=base) for each in example.pop("image", ())]
        if "video" in example:
            videos = _listed(example["video"])
            example["video"] = [resolve_image(each, base=base) for each in videos]
        if "subtitles" in example:
            found, several = example["subtitles"], len(example["video"]) > 1
            read = [_subtitles(each, base) for each in (found if several else [found])]
            example["subtitles"] = read if several else read[0]
        if "document" in example:
            return read_document(
                {**example, "image": images},
                policy=DocumentPolicy.from_table(self.spec.documents),
                find=lambda name: resolve_image(name, base=base),
                read_url=self.read_url,
            )
        return {**example, "image": images} if images else example

    def _spec_of_split(self) -> Spec:
        """Gives the spec by which the rows of the split are read."""
        if self.split in self.spec.unanswered or not self.spec.unanswered:
            return self.spec
        return replace(self.spec, unanswered=())


def _subtitles(value: Any, base: str) -> Any:
    """Reads the subtitles of a video, where they are a file.

    Raises:
      SampleError: `subtitles`.
    """
    if not isinstance(value, Mapping) or "path" not in value:
        return value
    name, place = value["path"], resolve_image(value["path"], base=base)
    if isinstance(place, str | bytes):
        raise SampleError("subtitles.url", where=name)
    try:
        payload = place.read() if isinstance(place, RemoteImage) else place.read_bytes()
        return row_subtitles(payload.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise SampleError("subtitles.encoding", where=name, error=error) from error
    except (OSError, SampleError) as error:
        if isinstance(error, SampleError) and error.reason != "image_missing":
            raise
        if value.get("optional"):
            return None
        raise SampleError("subtitles.missing", where=name, error=error) from error


class _Based(Sequence[Mapping[str, Any]]):
    """Rows with the place in each that their image names start from."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], base: str) -> None:
        self._rows, self._base = rows, base

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: Any) -> Any:
        return {**self._rows[i], _BASE: self._base}


class _Pieces(Sequence[Mapping[str, Any]]):
    """The examples of rows that give several: the rows, with the number of the piece in each."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], owners: array[int]) -> None:
        self._rows, self._owners = rows, owners

    def __len__(self) -> int:
        return len(self._owners)

    def __getitem__(self, i: Any) -> Any:
        row = self.row_number(i)
        first = bisect_left(self._owners, row)
        return {**self._rows[row], PIECE: i - first}

    def row_number(self, i: int) -> int:
        """Gives the number of the row that an example is of."""
        return self._owners[i]


def _owners(
    rows: Sequence[Mapping[str, Any]], count: Callable[[Mapping[str, Any]], int]
) -> array[int]:
    owners = array("q")
    for i in range(len(rows)):
        row = rows[i]
        owners.extend([i] * (1 if BROKEN in row else count(row)))
    return owners


def list_files(source: str) -> list[str]:
    """Lists the files with rows of a file, a folder, a pattern or a URL, sorted.

    A folder of images with side files is one source by itself. Patterns have `*`, `**`, `?`, `[ab]`
    and `{a,b}`; a folder that one matches stands for what is in it.

    Raises:
      SourceError: `source_missing`, `source_empty`.
    """
    if "://" in source:
        return _list_objects(source)
    path = Path(source)
    if path.is_file():
        return [source]
    if (path / MANIFEST_NAME).is_file() and (imported := imported_tars(source)):
        return list(imported)
    if any(c in source for c in "*?[{"):
        found = sorted({name for each in _alternatives(source) for name in _matching(each)})
        if not found:
            raise SourceError("source_missing.file", where=source)
        answers = {name for each in found for name in annotation_names(each)}
        listed = [list_files(each) if Path(each).is_dir() else [each] for each in found]
        return [*dict.fromkeys(name for names in listed for name in names if name not in answers)]
    if not path.is_dir():
        raise SourceError("source_missing.file", where=source)
    return _rows_of(source, [name for name in _visible(source) if (path / name).is_file()])


def _visible(folder: str) -> list[str]:
    try:
        return visible_names(folder)
    except OSError as error:
        raise SourceError("source_unreadable", where=folder, error=error) from error


def _rows_of(folder: str, names: Sequence[str]) -> list[str]:
    """Lists the files of a folder that hold rows; the folder itself where it holds images."""
    there = frozenset(names)
    kept = [name for name in names if not _is_bookkeeping(folder, name, there)]
    rows = [name for name in kept if holds_rows(name)]
    images = [name for name in kept if name.lower().endswith(IMAGES)]
    stems = {_stem(name) for name in rows}
    stems &= {_stem(name) for name in images}  # side files
    answers = {name for each in rows for name in annotation_names(each)}
    rows = [name for name in rows if _stem(name) not in stems and name not in answers]
    if not rows and not images:
        raise SourceError("source_empty.files", where=folder, want=", ".join(ROWS))
    return [storage.join(folder, name) for name in rows] or [folder]


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


_WILD = re.compile(r"[*?\[]")


def _matching(pattern: str) -> Iterator[str]:
    """Finds the local files and folders that a pattern without `{a,b}` names; hidden ones only
    where it names them itself."""
    path = Path(pattern)
    anchor = next(p for p in path.parents if not _WILD.search(str(p)))
    below = str(path.relative_to(anchor))
    if below.count("**") == 1 and path.name == "**":  # all that is in these folders
        below = str(Path(below).parent)
    if "**" in below:  # no library does it without going round links that lead back
        for each in _visible(str(anchor)) if anchor.is_dir() else ():
            if matches(each, below) and (path.name != "**" or holds_rows(each)):
                yield str(anchor / each)
        return
    for each in glob.iglob(below, root_dir=anchor):
        place = anchor / each
        if is_hidden(f"{below}/") or not is_hidden(f"{each}/" if place.is_dir() else each):
            yield str(place)


def _alternatives(pattern: str) -> list[str]:
    """Writes a pattern with `{a,b}` once for each of them."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [each for word in match[1].split(",") for each in _alternatives(head + word + tail)]


def _list_objects(source: str) -> list[str]:
    """Lists the files with rows of a URL: itself, those that a pattern matches, or of a folder."""
    if source.startswith(("http://", "https://")):  # nobody lists those
        return [source]
    if not any(c in source for c in "*?[{"):
        if not is_folder(source):
            return [source]
        folder = source.rstrip("/")
        names = visible_names(folder)
        if MANIFEST_NAME in names and (imported := imported_tars(folder)):
            return list(imported)
        if not names:
            raise SourceError("source_missing.file", where=source)
        return _rows_of(folder, names)
    scheme, _, place = source.partition("://")
    plain = re.split(r"[*?\[{]", place)[0]
    base = plain.rpartition("/")[0]
    patterns = _alternatives(place[len(base) + 1 :])
    found = [
        f"{scheme}://{base}/{each.name}"
        for each in storage.list_objects(f"{scheme}://{base}")
        if any(
            matches(each.name, pattern) and (is_hidden(pattern) or not is_hidden(each.name))
            for pattern in patterns
        )
    ]
    answers = {name for each in found for name in annotation_names(each)}
    if not found:
        raise SourceError("source_missing.file", where=source)
    return [each for each in found if each not in answers]


def imported_tars(folder: str) -> dict[str, int]:
    """Lists the tars of an imported dataset, with their samples; {} for any other folder.

    Raises:
      SourceError: `source_imported`: the dataset is a selection of samples.
    """
    manifest = load_manifest(folder)
    if manifest is None or not manifest.raw:
        return {}
    tars = {storage.resolve(folder, file.url): file.nsamples for file in manifest.files}
    if sum(tars.values()) != sum(split.num_samples for split in manifest.splits.values()):
        raise SourceError("source_imported", where=folder)
    return tars


def _is_bookkeeping(folder: str, name: str, names: frozenset[str]) -> bool:
    """Returns True for the files of `save_to_disk` that hold no rows: lists, and caches."""
    above, _, base = name.rpartition("/")
    if base == "dataset_dict.json":
        return "splits" in json_object(storage.read_bytes(storage.join(folder, name)))
    state = storage.join(above, "state.json")
    if not base.endswith((".json", ".arrow")) or state not in names:
        return False
    listed = json_object(storage.read_bytes(storage.join(folder, state))).get("_data_files")
    if not isinstance(listed, list):
        return False
    own = {each.get("filename") for each in listed if isinstance(each, Mapping)}
    return base in ("state.json", "dataset_info.json") or (
        base.endswith(".arrow") and base not in own
    )


_TABLES = (".parquet", ".arrow", ".csv", ".tsv")
"""Files whose rows all have the same columns."""


def _require_named(records: Sequence[Records], spec: Spec) -> None:
    """Refuses a spec that names a column which no row of the source has.

    Rows of JSON may leave a column out, so rows of the whole of each file are looked at.

    Raises:
      SourceError: `source_columns`.
    """
    missing = {
        name: field for name, field in spec.named().items() if name and not name.startswith(".")
    }
    if not missing:
        return
    there: dict[str, None] = {}
    for each in records:
        table = any(suffix in each.files[0].lower() for suffix in _TABLES)
        for row in islice(_probed(each), 1 if table else None):
            there |= dict.fromkeys(map(str, row))
            missing = {name: missing[name] for name in missing if name not in row}
            if not missing:
                return
    for name, field in missing.items() if there else ():
        hint, known = nearest(name, there), list(there)[:40]
        where = records[0].files[0]
        raise SourceError(
            "source_columns", where=where, name=name, want=field, hint=hint, columns=known
        )


def _require_columns(rows: Sequence[Mapping[str, Any]], spec: Spec, *, where: str) -> None:
    """Refuses a source of whose first rows none has a column that all need.

    Raises:
      SourceError: `source_columns`.
    """
    missing = set()
    for row in rows:
        try:
            parse_row(row, spec)
        except SampleError as error:
            name = str(error.facts.get("name"))
            if error.reason == "row_fields" and row.get(name) is None:
                missing.add((name, str(error.facts["want"])))
                continue
        return
    if len(missing) == 1:
        ((name, want),) = missing
        there = list(dict.fromkeys(str(column) for row in rows for column in row))
        hint = nearest(name, there)
        raise SourceError(
            "source_columns", where=where, name=name, want=want, hint=hint, columns=there[:40]
        )


_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_IMAGE_WORDS = ("image", "img", "imgname", "picture", "photo")


def _require_images(rows: Sequence[Mapping[str, Any]], spec: Spec, *, where: str) -> None:
    """Refuses rows without any image that have a column which is called as if it held some.

    Questions and conversations may be about no image; those whose images were not found would be
    learned without them.

    Raises:
      SourceError: `source_images`.
    """
    if {"image", "images", "video"} & set(spec.columns):
        return
    names: dict[str, None] = {}
    for row in rows:
        try:
            found = parse_row(row, spec)
        except SampleError:
            continue
        if "image" in found or "video" in found:
            return
        names |= {
            name: None
            for name, value in row.items()
            if isinstance(value, str | bytes | list | tuple | Mapping)
            and value
            and not is_empty(value)
            and any(word.lower().rstrip("s") in _IMAGE_WORDS for word in _WORDS.findall(str(name)))
        }
    if names:
        raise SourceError("source_images", where=where, columns=list(names))


def _below(folder: Path, name: str) -> str:
    return name if "://" in name else str(folder / name)


def _bases(spec: Spec, files: Sequence[str], folder: Path) -> list[str]:
    """Lists the places that image names may start from, the likeliest first."""
    if spec.images:
        base = _below(folder, spec.images)
        if "://" not in base and not Path(base).is_dir():
            raise SourceError("source_missing.images", where=base)
        return [base]
    if "://" in files[0]:
        return [files[0] if is_folder(files[0]) else files[0].rpartition("/")[0]]
    paths = [Path(each) for each in files if "://" not in each]
    beside = list(dict.fromkeys(each if each.is_dir() else each.parent for each in paths))
    below = [folder for each in beside for folder in _folders(each)]
    # COCO has its rows in annotations/ and its images in train2017/ beside it.
    above = [folder for each in beside for folder in (each.parent, *_folders(each.parent))]
    return list(dict.fromkeys(map(str, [*beside, *below, *above, "."])))[:MAX_BASES]


def _folders(folder: Path) -> list[Path]:
    """Lists the first folders below one, hidden ones last: `.thumbnails` and `images`."""
    try:
        with os.scandir(folder) as entries:  # it may have a million images
            found = [folder / each.name for each in entries if each.is_dir()]
        return sorted(found, key=lambda each: (is_hidden(f"{each.name}/"), each))[:32]
    except OSError:  # it may be nobody's to list
        return []


def _by_folder(records: Sequence[Records]) -> list[list[Records]]:
    """Groups files of rows by the folder that they are in; a folder of images is one itself."""
    folders: dict[str, list[Records]] = {}
    for each in records:
        place = each.files[0]
        folder = place if is_folder(place) else place.rpartition("/")[0]
        folders.setdefault(folder, []).append(each)
    return list(folders.values())


def _first_names(
    spec: Spec, parts: Sequence[Sequence[Mapping[str, Any]]], *, most: int = PROBED_IMAGES
) -> list[str]:
    """Lists the first names of images and videos of rows, `most` or those of one row more."""
    names: list[str] = []
    for row in (part[i] for part in parts for i in range(min(len(part), PROBED_IMAGES))):
        try:
            found = parse_row(row, spec) if BROKEN not in row else {}
            images = [*found.get("image", ()), *_listed(found.get("video"))]
        except SampleError:
            continue
        names += [each for each in images if isinstance(each, str) and "://" not in each]
        names = [each for each in names if not each.startswith("data:")]
        if len(names) >= most:
            break
    return names


def _likely_base(names: Sequence[str], bases: Sequence[str]) -> tuple[str, tuple[int, int]]:
    """Chooses the place under which most image names exist, the first of equally good ones.

    Returns:
      The place, and of how many names how many exist there; (0, 0) where none was looked at.
    """
    best, most = bases[-1], _num_there(names, bases[-1], least=0)
    least = most  # an earlier one that is as good goes before the last
    for base in bases[:-1]:
        number = _num_there(names, base, least=least)
        if number >= least:
            best, most, least = base, number, number + 1
        if most == len(names) < least:
            break
    return best, (most, len(names))


def _num_there(names: Sequence[str], base: str, *, least: int) -> int:
    """Counts the names that exist below a place, or gives -1 once they must be fewer than that."""
    missing = 0
    for name in names:
        missing += not _exists(Path(base, name))
        if missing > len(names) - least:
            return -1
    return len(names) - missing


def _require_one_folder(
    names: Sequence[str], base: str, bases: Sequence[str], *, where: str
) -> None:
    """Refuses names that mean other files in a folder beside the chosen one: images and masks.

    The folder of the rows goes before those below it, and these before the others.

    Raises:
      SourceError: `source_folders`.
    """
    there = [name for name in names if _exists(Path(base, name))]
    if not there or base == bases[0]:
        return
    for other in bases:
        if other == base or Path(other).parent != Path(base).parent or other == bases[0]:
            continue
        if is_hidden(f"{Path(other).name}/"):
            continue
        if all(_exists(Path(other, name)) for name in there) and any(
            _differ(Path(base, name), Path(other, name)) for name in there
        ):
            raise SourceError("source_folders", where=where, name=there[0], folders=[base, other])


def _differ(path: Path, other: Path) -> bool:
    """Tells two files apart, by their beginnings where they are long."""
    try:
        if path.samefile(other):
            return False
        if path.stat().st_size != other.stat().st_size:
            return True
        with path.open("rb") as one, other.open("rb") as two:
            return one.read(_COMPARED_BYTES) != two.read(_COMPARED_BYTES)
    except OSError:  # it is refused when it is read
        return False


def _is_stored(name: str, base: str) -> bool:
    try:
        place = resolve_image(name, base=base)
    except SampleError:
        return False
    return isinstance(place, RemoteImage) and storage.exists(place.url)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # no name of a file: too long, or with a null character
        return False


def _guessed(source: str) -> Spec:
    """Makes the spec of a file or folder from its rows.

    Raises:
      SourceError: `source_guess`: of its rows, or its files are of several formats.
    """
    files = list_files(source)
    last = len(files) - 1
    looked_at = [
        files[i] for i in sorted({last * k // (PROBED_FILES - 1) for k in range(PROBED_FILES)})
    ]
    rows = {name: list(_probed(open_records(name))) for name in looked_at}
    guesses = {name: guess_format(found) for name, found in rows.items() if found}
    if not guesses:
        broken = [row[BROKEN] for name in looked_at for row in islice(open_records(name), 1)]
        told = {"first": str(broken[0]).splitlines()[0]} if broken else {}
        raise SourceError("source_empty.rows", where=source, facts=told)
    guess = next(iter(guesses.values()))
    if any(FORMATS.get(each.format) is not FORMATS.get(guess.format) for each in guesses.values()):
        told = {os.path.relpath(name, source): g.format or g.reason for name, g in guesses.items()}
        raise SourceError("source_guess.mixed", where=source, facts=told)
    if not guess.format:
        raise SourceError("source_guess.rows", where=files[0], reason=guess.reason)
    probed = [row for each in rows.values() for row in each]
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(source).absolute().name.partition(".")[0])
    columns = {}
    if "video" in FORMATS[guess.format].fields:
        names = [
            name
            for name in VIDEO_NAMES
            if any(not is_empty(each) for row in probed for each in _listed(row.get(name)))
        ]
        columns = {"video": names[0]} if names else {}
        if not names and any(map(has_video_part, probed)):
            columns = {"video": ""}  # in parts of the contents alone
        if columns and any(not is_empty(row.get("subtitles")) for row in probed):
            columns["subtitles"] = "subtitles"
    return Spec(
        name=stem.strip("_-")[:80] or "own", format=guess.format, source=source, columns=columns
    )


def _probed(rows: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Reads rows of the beginning and rows spread over the file, broken ones left out."""
    half = PROBED_ROWS // 2
    spread = range(0, len(rows), max(1, len(rows) // half))
    numbers = sorted({*range(min(half, len(rows))), *spread})
    return (row for row in (rows[i] for i in numbers) if BROKEN not in row)


def _coded(place: str, name: str) -> type[DatasetBase]:
    try:
        module = _run_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's code raises when it is imported
        told = f"{type(error).__name__}: {error}"
        raise ConfigError("dataset_code.import", where=place, error=told) from error
    if not hasattr(module, name):
        names = [each for each in vars(module) if not each.startswith("_")]
        raise ConfigError("dataset_code.name", where=place, name=name, names=names)
    return check_class(getattr(module, name), where=f"{place}:{name}")


def _run_file(path: Path) -> ModuleType:
    """Runs a Python file as a module of its own, whatever other modules are called.

    It is found in `sys.modules`, as dataclasses need it, and may import the files beside it.
    """
    folder = str(path.parent.absolute())
    name = f"vlm_shards_file_{hash_text(str(path.absolute())):016x}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    if folder not in sys.path:
        sys.path.append(folder)
    module = sys.modules[name] = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


class NumberedDataset(DatasetBase):
    """The examples of a class that has `__len__` and `get` and nothing else."""

    kind: ClassVar[type[Dataset]]

    @classmethod
    def code_files(cls) -> list[Path]:
        """Lists the files of the class, and this one."""
        return [*class_files(cls.kind), Path(__file__)]

    def load(self) -> Sequence[Mapping[str, Any]]:
        """Makes the object; its constructor is given the split and the source if it takes them."""
        given = {"split": self.split, "source": self.source}
        takes = _accepted(self.kind, given)
        if "split" not in takes and self.split != "train":
            raise SourceError(
                "source_split.none", where=self.name, split=self.split, splits=["train"]
            )
        return _Numbered(self.kind(**takes), seed=hash_text(self.name))


class _Numbered(Sequence[Mapping[str, Any]]):
    """The examples of a dataset, as rows; each has a generator of its own."""

    def __init__(self, dataset: Dataset, *, seed: int) -> None:
        self._dataset, self._seed, self._rng = dataset, seed, SampleRng()

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, i: Any) -> Any:
        return self._dataset.get(i, self._rng(keyed(self._seed, i) >> 32))

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return (self[i] for i in range(len(self)))


def _accepted(kind: type[Dataset], given: Mapping[str, Any]) -> dict[str, Any]:
    """Picks the arguments that a constructor takes by name."""
    parameters = inspect.signature(kind).parameters.values()
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return dict(given)
    return {each.name: given[each.name] for each in parameters if each.name in given}


def check_class(kind: Any, *, where: str) -> type[DatasetBase]:
    """Refuses what is not a class of datasets; gives one that the job can use.

    Raises:
      ConfigError: `dataset_code`.
    """
    if not isinstance(kind, type) or not issubclass(kind, Dataset):
        raise ConfigError("dataset_code.type", where=where, got=type(kind).__name__)
    missing = sorted(getattr(kind, "__abstractmethods__", ()))
    if missing:
        raise ConfigError("dataset_code.methods", where=where, missing=", ".join(missing))
    if not NAME.fullmatch(kind.name):
        raise ConfigError("dataset_code.label", where=where, got=kind.name)
    if issubclass(kind, DatasetBase):
        check_attributes(kind, where=where)
    try:
        if not issubclass(kind, DatasetBase):
            inspect.signature(kind).bind(**_accepted(kind, {"split": "train", "source": ""}))
            several = bool(getattr(kind, "several_images", False))
            fields = {"name": kind.name, "kind": kind, "several_images": several}
            return type(kind.__name__, (NumberedDataset,), {**fields, "__doc__": kind.__doc__})
        inspect.signature(kind).bind("train", source="", limit=None, mode=None, unmatched="refuse")
    except TypeError as error:
        raise ConfigError("dataset_code.init", where=where, error=error) from error
    return kind
