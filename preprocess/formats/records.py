"""Records: the rows of a user's own files, read in pieces, whatever the files are.

    .json             an array of objects; the objects of COCO, VQA v2 (a pair of files) and GQA
    .jsonl, .ndjson   an object per line
    .csv, .tsv        a header, then rows; all values are texts; the header says what separates them
    .parquet, .arrow  as they are
    .tar              WebDataset: one row per sample, its members as columns
    a folder          images with side files of the same stem (.txt, .json, .caption)

JSON, JSON Lines and tars are read through a table of offsets, 8 bytes a row, so that files larger
than memory can be read in any order. `.gz` and `.zst` are unpacked to a temporary file first, text
in UTF-16 or UTF-32 is rewritten to one in UTF-8, and files of object stores and web servers are
copied to one. CSV is held in memory as Arrow columns;
COCO's, VQA's and GQA's files are held whole, since their rows refer to each other.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import tarfile
import tempfile
import weakref
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from shardspec import storage
from shardspec.errors import SampleError, SourceError

BROKEN = "__broken__"
"""Field of a row that could not be read; it holds the SampleError."""

CHUNK_BYTES = 4 * 2**20
"""Read at once when offsets are looked for."""

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Suffixes of the images of a folder."""

ROWS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".tar")
"""Suffixes of files with rows."""

_TEXTS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
"""Those of them that are text."""

_WORD_CHARS = 16
"""More than the longest of true, false, null, NaN and -Infinity."""

_PACKED = (".gz", ".zst")
_SIDES = (".txt", ".caption", ".json")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Records(Sequence[Row]):
    """The rows of some files, end to end."""

    parts: Sequence[Sequence[Row]]
    files: Sequence[str]
    """The file that each part is of, as people know it."""

    def __post_init__(self) -> None:
        starts = [0]
        for part in self.parts:
            starts.append(starts[-1] + len(part))
        object.__setattr__(self, "_starts", starts)

    def __len__(self) -> int:
        return self._starts[-1]  # type: ignore[attr-defined,no-any-return]

    def __getitem__(self, i: Any) -> Any:
        part, row = self.place(i)
        return self.parts[part][row]

    def __iter__(self) -> Iterator[Row]:
        for part in self.parts:
            yield from (part[i] for i in range(len(part)))

    def place(self, i: int) -> tuple[int, int]:
        """Says which part a row is in, and its number there."""
        starts = self._starts  # type: ignore[attr-defined]
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        part = bisect_right(starts, i) - 1
        return part, i - starts[part]


def open_records(url: str) -> Records:
    """Opens a file, or a folder of images with side files.

    Args:
      url: A local path, or any URL that fsspec reads.

    Raises:
      SourceError: `source_missing`, `source_unreadable`, `source_format`.
    """
    path = Path(url.removeprefix("file://"))
    if "://" not in url.removeprefix("file://") and path.is_dir():
        return Records([_Sides(path)], [url])
    suffixes = [s.lower() for s in PurePosixPath(url.split("?")[0]).suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in _PACKED else ""
    suffix = suffixes[-1] if suffixes else ""
    reader = _READERS.get(suffix)
    if reader is None:
        raise SourceError("source_format", where=url, want=", ".join(ROWS))
    try:
        local = local_copy(url, packed)
        if suffix in _TEXTS:
            local = _utf8(local)
        return Records([reader(local, url)], [url])
    except FileNotFoundError as error:
        raise SourceError("source_missing.file", where=url) from error
    except (OSError, ValueError, EOFError, zlib.error, tarfile.TarError) as error:
        # Arrow's errors are ValueErrors and OSErrors.
        text = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise SourceError("source_unreadable", where=url, error=text) from error


def local_copy(url: str, packed: str = "") -> Path:
    """Gives a local file with the bytes of a URL, unpacked; temporary ones go with the process."""
    remote = "://" in url and not url.startswith("file://")
    path = Path(url.removeprefix("file://"))
    if not remote and not packed:
        path.stat()
        return path
    version = (url, storage.version(url))
    if version in _COPIES:
        return _COPIES[version]
    target = Path(_scratch().name) / f"{len(_COPIES)}{path.suffix}"
    if remote:
        storage.fetch_file(url, target)
        path = target
    if packed:
        target = target.with_suffix(".rows")
        with path.open("rb") as stream, target.open("wb") as out:
            shutil.copyfileobj(_unpacked(stream, packed), out, CHUNK_BYTES)
    _COPIES[version] = target
    return target


def _utf8(path: Path) -> Path:
    """Gives a file of the same text in UTF-8; the file itself where it is that already."""
    with path.open("rb") as stream:
        encoding = json.detect_encoding(stream.read(4))
    if encoding.startswith("utf-8"):
        return path
    version = (f"{path} {encoding}", storage.version(str(path)))
    if version not in _COPIES:
        target = Path(_scratch().name) / f"{len(_COPIES)}.utf8"
        with path.open("r", encoding=encoding, newline="") as source, target.open("wb") as out:
            while text := source.read(CHUNK_BYTES):
                out.write(text.encode())
        _COPIES[version] = target
    return _COPIES[version]


_COPIES: dict[tuple[str, str | None], Path] = {}
"""The local copy of each version of a file: a job opens its source several times."""
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def _scratch() -> tempfile.TemporaryDirectory[str]:
    """The folder of this process for temporary files; removed when it ends."""
    if not _FOLDERS:
        _FOLDERS.append(tempfile.TemporaryDirectory(prefix="vlm-shards-rows-"))
    return _FOLDERS[0]


def _unpacked(stream: Any, packed: str) -> Any:
    if packed == ".gz":
        return gzip.GzipFile(fileobj=stream)
    if packed == ".zst":
        import pyarrow as pa

        return pa.CompressedInputStream(pa.PythonFile(stream, "r"), "zstd")
    return stream


class _File:
    """A file that is read at any place, by several threads too; another process opens its own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def read(self, start: int, stop: int) -> bytes:
        """Reads bytes `start` to `stop`."""
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
        return os.pread(self._descriptor, stop - start, start)

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_descriptor": None}


class _Lines(Sequence[Row]):
    """Objects in one file by the table of their offsets."""

    def __init__(self, path: Path, name: str, starts: array[int], stops: array[int]) -> None:
        self._file, self._name = _File(path), name
        self._starts, self._stops = starts, stops

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: Any) -> Any:
        payload = self._file.read(self._starts[i], self._stops[i])
        return _parsed(payload, where=f"{self._name} row {i + 1}")


def _parsed(payload: bytes, *, where: str) -> Row:
    try:
        row = json.loads(payload)
    except json.JSONDecodeError as error:
        told = f"{error.msg} at character {error.colno}"
        return {BROKEN: SampleError("row_json", where=where, error=told)}
    except RecursionError:
        return {BROKEN: SampleError("row_json", where=where, error="nested too deeply")}
    except (UnicodeDecodeError, ValueError) as error:
        return {BROKEN: SampleError("row_json", where=where, error=str(error)[:80])}
    return _object(row, where=where)


def _object(row: Any, *, where: str) -> Row:
    if not isinstance(row, dict):
        told = f"an object is wanted, not {type(row).__name__}"
        return {BROKEN: SampleError("row_json", where=where, error=told)}
    return row


def _open_lines(path: Path, name: str) -> Sequence[Row]:
    starts, stops = array("q"), array("q")
    position = 0
    with path.open("rb") as stream:
        for line in stream:
            if line.strip():
                starts.append(position)
                stops.append(position + len(line))
            position += len(line)
    return _Lines(path, name, starts, stops)


def _open_json(path: Path, name: str) -> Sequence[Row]:
    with path.open("rb") as stream:
        first = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if first == b"[":
        starts, stops = _elements(path, name)
        return _Lines(path, name, starts, stops)
    payload = path.read_bytes()
    try:
        document = json.loads(payload)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON Lines under the name of JSON
            return _open_lines(path, name)
        raise _no_json(name, error) from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise SourceError("source_unreadable", where=name, error=str(error)[:80]) from error
    try:
        return _joined(document, name)
    except (AttributeError, KeyError, TypeError) as error:
        told = f"not the fields of COCO or VQA files: {type(error).__name__}: {error}"[:160]
        raise SourceError("source_unreadable", where=name, error=told) from error


def _no_json(name: str, error: json.JSONDecodeError) -> SourceError:
    return SourceError(
        "source_json", where=name, line=error.lineno, column=error.colno, error=error.msg
    )


def _elements(path: Path, name: str) -> tuple[array[int], array[int]]:
    """Finds where the elements of an array of objects begin and end, in bytes.

    The text is read as Latin-1, in which a character is a byte. That changes the strings, not
    where they end: UTF-8 writes neither quotes nor backslashes inside of other characters.
    """
    decoder = json.JSONDecoder()
    starts, stops = array("q"), array("q")
    with path.open("rb") as stream:
        text, base = "", 0
        at = 0
        ended = False

        def more() -> bool:
            nonlocal text, base, at, ended
            chunk = stream.read(max(CHUNK_BYTES, len(text) - at))  # doubled for a long object
            ended = not chunk
            text, base, at = text[at:] + chunk.decode("latin-1"), base + at, 0
            return bool(chunk)

        def skip(characters: str) -> str:
            """Moves over white space and the given characters; returns what follows."""
            nonlocal at
            while True:
                while at < len(text) and text[at] in characters:
                    at += 1
                if at < len(text) or not more():
                    return text[at : at + 1]

        def bad(message: str, where: int) -> SourceError:
            with path.open("rb") as whole:
                before = whole.read(where)
            line, column = before.count(b"\n") + 1, where - before.rfind(b"\n")
            return SourceError("source_json", where=name, line=line, column=column, error=message)

        skip(" \t\r\n\xef\xbb\xbf")
        at += 1  # the bracket
        while True:
            following = skip(" \t\r\n,")
            if following == "]":
                at += 1
                if skip(" \t\r\n"):
                    raise bad("text after the end of the array", base + at)
                return starts, stops
            if not following:
                raise bad("the array does not end", base + at)
            while True:
                try:
                    _, stop = decoder.raw_decode(text, at)
                    if stop < len(text) or ended:  # a number could go on
                        break
                except json.JSONDecodeError as error:
                    if ended:
                        raise bad(error.msg, base + error.pos) from error
                    # Only a text that is cut in a string or in a word may still become right.
                    if error.msg.startswith("Expecting") and error.pos < len(text) - _WORD_CHARS:
                        raise bad(error.msg, base + error.pos) from error
                except RecursionError as error:
                    raise bad("nested too deeply", base + at) from error
                more()
            starts.append(base + at)
            stops.append(base + stop)
            at = stop


_LISTS = ("data", "train", "rows", "validation", "val", "dev", "test")
"""Keys of an object that hold rows; an object may have one of the first three."""


def _joined(document: Any, name: str) -> Sequence[Row]:
    """Makes rows of an object: of COCO's captions, VQA v2's questions, or a single record."""
    if not isinstance(document, dict):
        raise SourceError("source_format", where=name, want="objects")
    if isinstance(document.get("questions"), list):
        return _vqa_rows(document, name)
    if isinstance(document.get("annotations"), list) and isinstance(document.get("images"), list):
        return _coco_rows(document)
    if document and all(
        isinstance(each, Mapping) and "imageId" in each for each in document.values()
    ):
        return [
            {**each, "question_id": number, "image": f"{each['imageId']}.jpg"}
            for number, each in document.items()
        ]  # GQA
    lists = [each for each in _LISTS if isinstance(document.get(each), list)]
    if len(lists) > 1:
        raise SourceError("source_lists", where=name, lists=lists)
    if not lists or lists[0] not in _LISTS[:3]:
        return [document]
    rows = document[lists[0]]
    return [_object(row, where=f"{name} row {i + 1}") for i, row in enumerate(rows)]


def _coco_rows(document: Mapping[str, Any]) -> list[Row]:
    """Joins captions or boxes to their images: one row per image, in the order of the images."""
    captions: dict[Any, list[str]] = {}
    found: dict[Any, list[tuple[Any, Any]]] = {}
    names = {each["id"]: each["name"] for each in document.get("categories", ())}
    for annotation in document["annotations"]:
        if "caption" in annotation:
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
        elif "bbox" in annotation and not annotation.get("iscrowd"):
            # With their names, so that no spec can take a size for a corner.
            box = annotation["bbox"]
            box = dict(zip("xywh", box, strict=True)) if len(box) == 4 else box
            label = names.get(annotation.get("category_id"))
            found.setdefault(annotation["image_id"], []).append((box, label))
    if found:
        return [
            {
                "image": image.get("file_name"),
                "image_id": image["id"],
                "boxes": [box for box, _ in found[image["id"]]],
                "label": [name for _, name in found[image["id"]]],
            }
            for image in document["images"]
            if image["id"] in found
        ]
    return [
        {
            "image": image.get("file_name"),
            "image_id": image["id"],
            "caption": captions.get(image["id"], []),
        }
        for image in document["images"]
    ]


def annotation_names(url: str) -> list[str]:
    """Names the files that may have the answers to a file of VQA questions, the likeliest first.

    >>> annotation_names("v2_OpenEnded_mscoco_val2014_questions.json")
    ['v2_OpenEnded_mscoco_val2014_annotations.json', 'v2_mscoco_val2014_annotations.json']
    """
    folder, slash, name = url.rpartition("/")
    if "questions" not in name or ".json" not in name.lower():
        return []
    beside = name.replace("questions", "annotations")
    names = dict.fromkeys([beside, re.sub("(OpenEnded|MultipleChoice)_", "", beside)])
    return [folder + slash + each for each in names]


def _vqa_rows(document: Mapping[str, Any], name: str) -> list[Row]:
    """Joins questions to the annotations of the file beside them; names images as COCO does."""
    found = document["annotations"] if "annotations" in document else _annotations(name)
    answers = {each["question_id"]: each for each in found}
    folder = str(document.get("data_subtype") or "")
    rows: list[Row] = []
    for question in document["questions"]:
        answer = answers.get(question["question_id"], {})
        stem = f"COCO_{folder}_{int(question['image_id']):012d}.jpg"
        rows.append({**question, **answer, "image": f"{folder}/{stem}" if folder else stem})
    return rows


def _annotations(name: str) -> Any:
    packed = PurePosixPath(name).suffix.lower()
    beside = annotation_names(name)
    for each in beside:
        try:
            local = local_copy(each, packed if packed in _PACKED else "")
        except FileNotFoundError:
            continue
        return json.loads(local.read_bytes())["annotations"]
    raise SourceError("source_missing.annotations", where=" or ".join(beside) or name)


_CSV_BLOCKS = (2**20, 2**26, 2**30)
"""Bytes that Arrow parses at once, and the longest row that it takes; tried in turn."""


def _open_csv(path: Path, name: str) -> Sequence[Row]:
    import pyarrow.compute as pc

    tabs = ".tsv" in [s.lower() for s in PurePosixPath(name).suffixes]
    delimiter = "\t" if tabs else _delimiter(path)
    table = _csv_table(path, delimiter=delimiter, quote='"')
    if delimiter != "\t":
        return _Table([table])
    if any(pc.any(pc.match_substring(column, "\t")).as_py() for column in table.columns):
        # A value has a tab: the file does not quote, and a quote in it is only a character.
        table = _csv_table(path, delimiter="\t", quote=False)
    return _Table([table])


def _delimiter(path: Path) -> str:
    """Says what separates the columns of a CSV file: open_clip's have tabs, others ; or |."""
    with path.open("rb") as stream:
        header = stream.readline(2**16)
    return next((d for d in ",\t;|" if d.encode() in header), ",")


def _csv_table(path: Path, *, delimiter: str, quote: str | bool) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv

    parse = pa.csv.ParseOptions(
        delimiter=delimiter, quote_char=quote, newlines_in_values=bool(quote)
    )
    for block in _CSV_BLOCKS:
        read = pa.csv.ReadOptions(block_size=block)
        try:
            with path.open("rb") as stream:
                header = pa.csv.open_csv(stream, parse_options=parse, read_options=read).schema
            names = [name.strip() for name in header.names]
            twice = [name for i, name in enumerate(names) if name in names[:i]]
            if twice:
                raise ValueError(f"two columns have the name {twice[0]!r}")
            convert = pa.csv.ConvertOptions(
                column_types=dict.fromkeys(header.names, pa.string()),
                strings_can_be_null=False,
                quoted_strings_can_be_null=False,
            )
            table = pa.csv.read_csv(
                path, parse_options=parse, read_options=read, convert_options=convert
            )
            spaced = [name for name in header.names if name[:1] == " "]  # "a, b": so are values
            for name in spaced:
                place = header.names.index(name)
                column = pc.utf8_ltrim(table[name], characters=" ")
                table = table.set_column(place, name, column)
            return table.rename_columns(names)
        except pa.ArrowInvalid as error:
            if "block" not in str(error) or block == _CSV_BLOCKS[-1]:
                raise
    raise AssertionError("unreachable")


class _Table(Sequence[Row]):
    """Arrow batches that stay in memory."""

    def __init__(self, tables: Sequence[Any]) -> None:
        self._tables = list(tables)
        self._starts = [0]
        for table in self._tables:
            self._starts.append(self._starts[-1] + table.num_rows)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, i: Any) -> Any:
        part = bisect_right(self._starts, i) - 1
        return self._tables[part].slice(i - self._starts[part], 1).to_pylist()[0]


class _Groups(Sequence[Row]):
    """The rows of a Parquet file, a row group in memory at a time."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._starts = [0]
        metadata = self._file().metadata
        for group in range(metadata.num_row_groups):
            self._starts.append(self._starts[-1] + metadata.row_group(group).num_rows)
        self._held: tuple[int, Any] = (-1, None)

    def _file(self) -> Any:
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(self._path)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, i: Any) -> Any:
        group = bisect_right(self._starts, i) - 1
        held = self._held  # another thread may replace it
        if held[0] != group:
            held = self._held = (group, self._read(group))
        try:
            return held[1].slice(i - self._starts[group], 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            where = f"{self._name} row {i + 1}"
            return {BROKEN: SampleError("row_json", where=where, error=str(error)[:80])}

    def _read(self, group: int) -> Any:
        try:
            return self._file().read_row_group(group)
        except (OSError, ValueError) as error:  # Arrow's errors are of these
            told = f"row group {group}: {(str(error).splitlines() or [''])[0]}"[:200]
            raise SourceError("source_unreadable", where=self._name, error=told) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": (-1, None)}


def _open_arrow(path: Path, name: str) -> Sequence[Row]:  # noqa: ARG001
    import pyarrow as pa

    source = pa.memory_map(str(path))
    try:
        return _Table(list(pa.ipc.open_stream(source)))
    except pa.ArrowInvalid:
        reader = pa.ipc.open_file(source)
        return _Table([reader.get_batch(i) for i in range(reader.num_record_batches)])


def visible_files(folder: Path) -> list[Path]:
    """Lists the files below a folder, without hidden ones and folders that tools keep there.

    Those of `.ipynb_checkpoints`, `__MACOSX` and `._photo.jpg` repeat what is beside them.
    """
    return sorted(
        path
        for path in folder.rglob("*")
        if not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
        and path.is_file()
    )


class _Sides(Sequence[Row]):
    """The images of a folder, in the order of their names, each with its side files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._images = sorted(
            path.relative_to(folder).as_posix()
            for path in visible_files(folder)
            if path.suffix.lower() in IMAGES
        )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, i: Any) -> Any:
        name = self._images[i]
        row: dict[str, Any] = {}
        for suffix in _SIDES:
            side = (self._folder / name).with_suffix(suffix)
            if not side.exists():
                continue
            try:
                if suffix == ".json":
                    read = _parsed(side.read_bytes(), where=str(side))
                    row = {**row, **read}
                else:
                    row["text"] = side.read_text("utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                row[BROKEN] = SampleError("row_side", where=str(side), error=str(error)[:80])
        return {**row, "image": name, "id": name}


class _Tar(Sequence[Row]):
    """The samples of a WebDataset tar: members that share a stem, up to its first dot."""

    def __init__(self, path: Path, name: str) -> None:
        self._file, self._name = _File(path), name
        self._samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if not self._samples or self._samples[-1][0] != key:
                    self._samples.append((key, {}))
                self._samples[-1][1][suffix.lower()] = (member.offset_data, member.size)
                archive.members = []  # type: ignore[attr-defined]  # it would keep them all

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, i: Any) -> Any:
        key, members = self._samples[i]
        row: dict[str, Any] = {}
        images: dict[str, bytes] = {}
        for suffix, (start, size) in members.items():
            payload = self._file.read(start, start + size)
            last = "." + suffix.rpartition(".")[2]
            if last in IMAGES:
                images[suffix] = payload
            elif last == ".json":
                row = {**_parsed(payload, where=f"{self._name}: {key}"), **row}
            elif last in (".txt", ".caption"):
                try:
                    row["text"] = payload.decode("utf-8-sig")
                except UnicodeDecodeError as error:
                    where = f"{self._name}: {key}.{suffix}"
                    row[BROKEN] = SampleError("row_side", where=where, error=str(error)[:80])
        if images:  # members win over fields of the same name
            row = {name: value for name, value in row.items() if name not in ("images", "url")}
            found = [images[suffix] for suffix in _in_order(list(images))]
            row["image"] = found[0] if len(found) == 1 else found
        return {**row, "id": key}


def _in_order(suffixes: list[str]) -> list[str]:
    """Orders the members of a sample by their numbers; writers of tars put 10 in front of 2.

    >>> _in_order(["1.jpg", "10.jpg", "2.png"]), _in_order(["b.jpg", "a.jpg"])
    (['1.jpg', '2.png', '10.jpg'], ['b.jpg', 'a.jpg'])
    """
    parts = {suffix: re.split(r"(\d+)", suffix.rpartition(".")[0]) for suffix in suffixes}
    if len({tuple(part[::2]) for part in parts.values()}) > 1:
        return suffixes
    return sorted(suffixes, key=lambda suffix: [int(number) for number in parts[suffix][1::2]])


_READERS: Mapping[str, Callable[[Path, str], Sequence[Row]]] = {
    ".json": _open_json,
    ".jsonl": _open_lines,
    ".ndjson": _open_lines,
    ".csv": _open_csv,
    ".tsv": _open_csv,
    ".parquet": _Groups,
    ".arrow": _open_arrow,
    ".tar": _Tar,
}
