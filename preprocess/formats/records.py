"""Records: the rows of a user's own files, read in pieces, whatever the files are.

    .json             an array of objects; the objects of COCO, VQA v2 (a pair of files) and GQA
    .jsonl, .ndjson   an object per line
    .csv, .tsv        a header, then rows; all values are texts; the header says what separates them
    .parquet, .arrow  as they are
    .tar              WebDataset: one row per sample, its members as columns
    a folder          images with side files of the same stem (.txt, .json, .caption)

No file is in memory. JSON, JSON Lines and tars are read through a table of offsets, 16 bytes a row,
some 50 where rows refer to each other (`preprocess.formats.json_files`); of Parquet a row group is
held. Temporary files are made of packed ones, of text in UTF-16 or UTF-32, of CSV (as Parquet), and
of those of object stores and web servers (`preprocess.formats.copies`).
"""

from __future__ import annotations

import csv
import io
import os
import re
import sys
import tarfile
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from preprocess.formats.class_names import class_features, with_class_names
from preprocess.formats.copies import (
    PACKED,
    local_copy,
    made_of,
    new_file,
    require_encoding,
    utf8_copy,
)
from preprocess.formats.json_files import (
    BROKEN,
    OpenFile,
    Row,
    decoded,
    open_json,
    open_lines,
    parsed_row,
)
from shardspec import storage
from shardspec.errors import SampleError, SourceError, StorageError

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Suffixes of the images of a folder."""

ROWS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".tar")
"""Suffixes of files with rows."""

_TEXTS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
"""Those of them that are text."""

_SIDES = (".txt", ".caption", ".json")

_POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that Git LFS has not downloaded."""


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


def is_folder(url: str) -> bool:
    """Tells a folder of images from a file with rows; of a store by its suffix."""
    if storage.is_local(url):
        return storage.local_path(url).is_dir()
    if url.startswith(("http://", "https://")):  # nobody lists those
        return False
    return not holds_rows(url)


def holds_rows(name: str) -> bool:
    """Tells by its name whether a file holds rows."""
    return name.lower().removesuffix(".gz").removesuffix(".zst").endswith(ROWS)


def open_records(url: str, encoding: str = "") -> Records:
    """Opens a file, or a folder of images with side files.

    Args:
      url: A local path, or any URL that fsspec reads.
      encoding: Of its texts; "" for UTF-8, and where the first bytes tell UTF-16 or UTF-32.

    Raises:
      SourceError: `source_missing`, `source_unreadable`, `source_format`, `source_encoding`,
        `source_pointer`, `source_quotes`.
    """
    if is_folder(url):
        return Records([_Sides(url, encoding)], [url])
    suffixes = [s.lower() for s in PurePosixPath(url.split("?")[0]).suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in PACKED else ""
    suffix = suffixes[-1] if suffixes else ""
    reader = _READERS.get(suffix)
    if reader is None:
        raise SourceError("source_format", where=url, want=", ".join(ROWS))
    try:
        local = local_copy(url, packed)
        with local.open("rb") as stream:
            if stream.read(len(_POINTER)) == _POINTER:
                raise SourceError("source_pointer", where=url)
        if suffix in _TEXTS:
            local = utf8_copy(local, url, encoding)
        rows = _Tar(local, url, encoding) if suffix == ".tar" else reader(local, url)
        return Records([rows], [url])
    except FileNotFoundError as error:
        raise SourceError("source_missing.file", where=url) from error
    except (OSError, ValueError, EOFError, zlib.error, tarfile.TarError) as error:
        # Arrow's errors are ValueErrors and OSErrors.
        text = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise SourceError("source_unreadable", where=url, error=text) from error


_CSV_BLOCKS = (2**20, 2**26, 2**30)
"""Bytes that Arrow parses at once, and the longest row that it takes; tried in turn."""


def _open_csv(path: Path, name: str) -> Sequence[Row]:
    tabs = ".tsv" in [s.lower() for s in PurePosixPath(name).suffixes]
    delimiter = "\t" if tabs else _delimiter(path)

    def make(target: Path) -> None:
        try:
            try:
                _write_table(path, target, name, delimiter=delimiter, quote='"')
            except _TabInside:
                _write_table(path, target, name, delimiter=delimiter, quote=False)
        except ValueError:  # Arrow's errors are of these
            require_encoding(path, name)
            raise

    table = made_of(str(path), f"table {delimiter}", make)
    return _Ragged(_Groups(table, name), np.load(_ragged(table)), name)


class _TabInside(Exception):
    """A value has a tab: the file does not quote, and a quote in it is only a character."""


def _ragged(table: Path) -> Path:
    """Names the list of the rows that are not in a table: number, values, columns."""
    return table.with_name(f"{table.name}.npy")


class _Ragged(Sequence[Row]):
    """The rows of a CSV file, with an error for each that has another number of values."""

    def __init__(self, rows: Sequence[Row], ragged: np.ndarray, name: str) -> None:
        self._rows, self._ragged, self._name = rows, ragged, name

    def __len__(self) -> int:
        return len(self._rows) + len(self._ragged)

    def __getitem__(self, i: Any) -> Any:
        before = int(np.searchsorted(self._ragged[:, 0], i))
        if before < len(self._ragged) and self._ragged[before, 0] == i:
            _, got, want = map(int, self._ragged[before])
            where = f"{self._name} row {i + 1}"
            return {BROKEN: SampleError("row_columns", where=where, got=got, want=want)}
        return self._rows[i - before]


def _delimiter(path: Path) -> str:
    """Says what separates the columns of a CSV file: open_clip's have tabs, others ; or |."""
    with path.open("rb") as stream:
        header = stream.readline(2**16)
    return next((d for d in ",\t;|" if d.encode() in header), ",")


def _write_table(path: Path, target: Path, name: str, *, delimiter: str, quote: str | bool) -> None:
    """Writes a CSV file as Parquet, of which a part at a time is in memory.

    Rows with another number of values than the header are left out, and listed beside it.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv
    import pyarrow.parquet

    ragged = array("q")
    quoted = several_lines = False

    def leave_out(row: Any) -> str:
        nonlocal quoted
        # The header is row 1; a number is there without threads, which cost more than they save.
        ragged.extend((row.number - 2, row.actual_columns, row.expected_columns))
        quoted |= '"' in row.text
        return "skip"

    parse = pa.csv.ParseOptions(
        delimiter=delimiter,
        quote_char=quote,
        newlines_in_values=bool(quote),
        invalid_row_handler=leave_out,
    )
    for block in _CSV_BLOCKS:
        read = pa.csv.ReadOptions(block_size=block, use_threads=False)
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
            schema = pa.schema([(name, pa.string()) for name in names])
            del ragged[:]  # of the first block, read for the header
            num_rows = 0
            with (
                pa.csv.open_csv(
                    path, parse_options=parse, read_options=read, convert_options=convert
                ) as batches,
                pa.parquet.ParquetWriter(target, schema, compression="zstd") as out,
            ):

                def holds(batch: Any, text: str) -> bool:
                    return any(pc.any(pc.match_substring(c, text)).as_py() for c in batch.columns)

                for batch in batches:
                    if delimiter == "\t" and quote and holds(batch, "\t"):
                        raise _TabInside
                    several_lines = several_lines or bool(quote and holds(batch, "\n"))
                    columns = [
                        # "a, b": so are values
                        pc.utf8_ltrim(column, characters=" ") if name[:1] == " " else column
                        for name, column in zip(header.names, batch.columns, strict=True)
                    ]
                    out.write_batch(pa.record_batch(columns, schema))
                    num_rows += batch.num_rows
            if ragged and quoted and delimiter == "\t" and quote:
                raise _TabInside
            if several_lines:
                _require_quotes(path, name, delimiter)
            if ragged and not num_rows:
                raise ValueError(f"row 1 has {ragged[1]} values, the header has {ragged[2]}")
            np.save(_ragged(target), np.array(ragged, np.int64).reshape(-1, 3))
            return
        except pa.ArrowInvalid as error:
            if "block" not in str(error) or block == _CSV_BLOCKS[-1]:
                raise


def _require_quotes(path: Path, name: str, delimiter: str) -> None:
    """Refuses a quote that does not end where its value ends.

    Arrow takes the lines up to the next quote for one value, and loses their rows.

    Raises:
      SourceError: `source_quotes`, with the line that the row begins in.
    """
    limit = csv.field_size_limit(sys.maxsize)
    line = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = csv.reader(stream, delimiter=delimiter, strict=True)
            for _ in rows:
                line = rows.line_num + 1
    except csv.Error as error:
        raise SourceError("source_quotes", where=name, line=line, error=error) from error
    finally:
        csv.field_size_limit(limit)


class _Table(Sequence[Row]):
    """Arrow batches that stay in memory."""

    def __init__(self, tables: Sequence[Any]) -> None:
        self._tables = list(tables)
        self._classes = class_features(self._tables[0].schema) if self._tables else {}
        self._starts = [0]
        for table in self._tables:
            self._starts.append(self._starts[-1] + table.num_rows)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, i: Any) -> Any:
        part = bisect_right(self._starts, i) - 1
        row = self._tables[part].slice(i - self._starts[part], 1).to_pylist()[0]
        return with_class_names(row, self._classes)


class _Groups(Sequence[Row]):
    """The rows of a Parquet file, a row group in memory at a time."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._starts = [0]
        file = self._file()
        metadata, self._classes = file.metadata, class_features(file.schema_arrow)
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
            row = held[1].slice(i - self._starts[group], 1).to_pylist()[0]
            return with_class_names(row, self._classes)
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


_HIDDEN = re.compile(r"(?:^|/)(?:\.(?!\.?/)|__[^/]*/)")


def is_hidden(name: str) -> bool:
    """Tells whether a relative path is of a hidden file, or below a folder that nobody looks into.

    >>> [is_hidden(name) for name in (".a", "a/._b", "__MACOSX/a", "a/__b", "../a")]
    [True, True, True, False, False]
    """
    return _HIDDEN.search(name) is not None


def visible_names(folder: str) -> list[str]:
    """Lists the files below a folder, local or of a store, sorted: paths relative to it.

    Hidden files, and folders that are hidden or that tools keep there, are left out: those of
    `.ipynb_checkpoints`, `__MACOSX` and `._photo.jpg` repeat what is beside them.

    Raises:
      OSError: A folder cannot be read.
    """
    return [name for name, _ in _scan(folder)]


def _scan(folder: str) -> Iterator[tuple[str, frozenset[str]]]:
    """Gives the names of `visible_names`, each with all those that are beside it.

    Of a local folder no more is held than the names of the folders that a file is below.
    """
    if storage.is_local(folder):
        root = storage.local_path(folder)
        yield from _scan_local(root, "", root.resolve(), set())
        return
    found = [each.name for each in storage.list_objects(folder)]
    names = frozenset(name for name in found if not is_hidden(name))
    yield from ((name, names) for name in sorted(names))


def _scan_local(
    folder: Path,
    below: str,
    root: Path,
    followed: set[Path],
    above: frozenset[tuple[int, int]] = frozenset(),
) -> Iterator[tuple[str, frozenset[str]]]:
    # What is below a folder is sorted as the folder's name and "/".
    folders, files = {}, []
    status = folder.stat()
    above |= {(status.st_dev, status.st_ino)}
    with os.scandir(folder) as entries:
        for entry in entries:
            if not _is_folder(entry):
                files.append(below + entry.name)
            elif not entry.name.startswith("__"):
                folders[below + entry.name + "/"] = entry.is_symlink()
    visible = frozenset(name for name in files if not name.startswith(".", len(below)))
    for name in sorted([*visible, *folders]):
        if name in visible:
            yield name, visible
        elif not name.startswith(".", len(below)):
            inside = folder / name[len(below) :]
            if not folders[name]:  # of a link to a folder, one of which another link may lead
                if not (followed and inside.resolve() in followed):
                    yield from _scan_local(inside, name, root, followed, above)
            elif not _leads_back(inside, root, followed, above):
                followed.add(inside.resolve())
                yield from _scan_local(inside, name, root, followed, above)


def _leads_back(
    link: Path, root: Path, followed: Collection[Path], above: frozenset[tuple[int, int]]
) -> bool:
    """Returns True if a link leads to a folder that is found without it, or that it is in.

    A link `latest` to the folder beside it, or to where a link `v1` leads, would give all rows
    twice.
    """
    target, status = link.resolve(), link.stat()
    if root.is_relative_to(target) or (status.st_dev, status.st_ino) in above:
        return True
    places = [each for each in (target, *target.parents) if each == root or each in followed]
    return not all(is_hidden(f"{target.relative_to(each)}/") for each in places)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads nowhere
        return False


class _Sides(Sequence[Row]):
    """The images of a folder, in the order of their names, each with its side files."""

    def __init__(self, folder: str, encoding: str) -> None:
        self._folder, self._encoding = folder, encoding
        # The names are in a file, one after the other: here is where each begins, and one past
        # the last; the lowest bits say which side files it has.
        self._places, at, path = array("q"), 0, new_file()
        with path.open("wb") as stream:
            for name, beside in _scan(folder):
                if _suffix(name) not in IMAGES:
                    continue
                sides = [_side(name, suffix) in beside for suffix in _SIDES]
                self._places.append(at << len(_SIDES) | sum(s << n for n, s in enumerate(sides)))
                at += stream.write(os.fsencode(name))
        self._places.append(at << len(_SIDES))
        self._names = OpenFile(path)

    def __len__(self) -> int:
        return len(self._places) - 1

    def __getitem__(self, i: Any) -> Any:
        i = range(len(self))[i]
        place, after = self._places[i], self._places[i + 1]
        name = os.fsdecode(self._names.read(place >> len(_SIDES), after >> len(_SIDES)))
        row: dict[str, Any] = {}
        for n, suffix in enumerate(_SIDES):
            if not place >> n & 1:
                continue
            side = _side(name, suffix)
            where = storage.join(self._folder, side)
            try:
                payload = storage.read_bytes(where)
                if suffix == ".json":
                    parsed = parsed_row(payload, where=where, encoding=self._encoding)
                    row = {**row, **parsed}
                else:
                    text = decoded(payload, where=where, encoding=self._encoding)
                    text = text.replace("\r\n", "\n").replace("\r", "\n")
                    if row.get("text", text).strip() != text.strip():
                        row[BROKEN] = SampleError("row_members", where=where, name="text")
                    row["text"] = text
            except (OSError, StorageError) as error:
                if isinstance(error, StorageError) and not storage.is_local(where):
                    raise  # an outage is not the row's fault
                row[BROKEN] = SampleError("row_side", where=where, error=str(error)[:80])
            except SampleError as error:
                row[BROKEN] = error
        return {**row, "image": name, "id": name}


def _side(image: str, suffix: str) -> str:
    return str(PurePosixPath(image).with_suffix(suffix))


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


class _Tar(Sequence[Row]):
    """The samples of a WebDataset tar: members that share a stem, up to its first dot.

    Of each sample it holds where it begins and ends: 16 bytes.
    """

    def __init__(self, path: Path, name: str, encoding: str = "") -> None:
        self._file, self._name, self._encoding = OpenFile(path), name, encoding
        self._starts, self._stops = array("q"), array("q")
        last = None
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isfile():
                    key, _ = _stem(member.name)
                    if key != last:
                        self._starts.append(member.offset)
                        self._stops.append(0)
                    last = key
                    self._stops[-1] = member.offset_data + -(-member.size // 512) * 512
                archive.members = []  # type: ignore[attr-defined]  # it would keep them all

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: Any) -> Any:
        key, members = "", {}
        row: dict[str, Any] = {}
        stream = io.BytesIO(self._file.read(self._starts[i], self._stops[i]))
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                if member.isfile():
                    key, suffix = _stem(member.name)
                    start = member.offset_data
                    if suffix in members:  # which of them is meant cannot be known
                        row[BROKEN] = self._twice(key, f".{suffix}")
                    members[suffix] = stream.getbuffer()[start : start + member.size].tobytes()
        images: dict[str, bytes] = {}
        texts: list[str] = []
        for suffix, payload in members.items():
            last = "." + suffix.rpartition(".")[2]
            if last in IMAGES:
                images[suffix] = payload
            elif last == ".json":
                where = f"{self._name}: {key}"
                row = {**parsed_row(payload, where=where, encoding=self._encoding), **row}
            elif last in (".txt", ".caption"):
                where = f"{self._name}: {key}.{suffix}"
                try:
                    texts.append(decoded(payload, where=where, encoding=self._encoding))
                except SampleError as error:
                    row[BROKEN] = error
        if len({text.strip() for text in texts}) > 1:
            row[BROKEN] = self._twice(key, "text")
        if texts:  # a member wins over a field of the same name
            row["text"] = texts[-1]
        if images:  # as members do here
            row = {name: value for name, value in row.items() if name not in ("images", "url")}
            found = [images[suffix] for suffix in _in_order(list(images))]
            row["image"] = found[0] if len(found) == 1 else found
        return {**row, "id": key}

    def _twice(self, key: str, name: str) -> SampleError:
        return SampleError("row_members", where=f"{self._name}: {key}", name=name)


def _stem(name: str) -> tuple[str, str]:
    """Divides the name of a member into the key of its sample and its suffix."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, suffix.lower()


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
    ".json": open_json,
    ".jsonl": open_lines,
    ".ndjson": open_lines,
    ".csv": _open_csv,
    ".tsv": _open_csv,
    ".parquet": _Groups,
    ".arrow": _open_arrow,
    ".tar": _Tar,
}
