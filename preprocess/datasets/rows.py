"""Rows of a source: Parquet and Arrow files of a folder, or a dataset of the hub, read in pieces.

The folder may be in an object store: of a Parquet file there the row groups are read that are
needed, an Arrow file is copied.

`Rows` is a sequence made of *pieces* (a Parquet row group, an Arrow record batch). Arrow pieces
stay in memory as they are stored, up to `PASSED_BYTES` while they are read in order, and up to
`HELD_BYTES` from the first jump on; of other pieces one. So reading in order costs one pass
whatever the size, and reading at random a piece per jump only where the source is larger than that.
"""

from __future__ import annotations

import io
import os
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from preprocess.datasets.splits import SplitLayout, Unmatched, folder_layout
from preprocess.formats import local_copy
from shardspec import storage
from shardspec.errors import SampleError, ShardsError, SourceError

Piece = Sequence[Mapping[str, Any]]

HELD_BYTES = 2**30
"""Pieces kept: all of PixMo-Points (669 MB), whose rows are read image by image in any order."""

PASSED_BYTES = 2**27
"""Pieces kept where rows are read in order: nothing of them is read again before the next pass."""

ROWS_AT_ONCE = 16
"""Rows of an Arrow piece that become Python objects together; they may hold images of megabytes."""

_HUB_EXTRA = "pip install 'vlm-shards[hub]'"


class Rows(Sequence[Mapping[str, Any]]):
    """A sequence of rows that holds the pieces last read."""

    def __init__(
        self,
        pieces: Sequence[Callable[[], Piece]],
        *,
        lengths: Sequence[int],
        kind: Mapping[str, Any],
        base: str = "",
        others: Collection[str] = (),
        layout: SplitLayout | None = None,
        origins: Sequence[tuple[str, int]] = (),
    ) -> None:
        """Joins pieces.

        Args:
          pieces: Functions that read a piece.
          lengths: Rows of each.
          kind: What the manifest says of the source.
          base: Folder or URL that relative image names start from.
          others: Where the names of some pieces start instead.
          layout: Which files of a folder make which split.
          origins: Of each piece, its file below the folder and the number of its first row there.
        """
        self._pieces = pieces
        self._starts = [0]
        for length in lengths:
            self._starts.append(self._starts[-1] + length)
        self._held: dict[int, Piece] = {}
        self._last, self._jumped = 0, False
        self.kind = dict(kind)
        self.base = base
        self._others = frozenset(map(PurePosixPath, others))
        places = [each.split("/") for each in (base, *others)]
        self._above = "/".join(os.path.commonprefix(places)) if others else ""
        self.layout = layout
        self._origins = origins

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        p = bisect_right(self._starts, i) - 1
        return self._piece(p)[i - self._starts[p]]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for p in range(len(self._pieces)):
            yield from self._piece(p)

    def attempts(self) -> Iterator[Mapping[str, Any] | Exception]:
        """Reads all rows in order; what a row cannot be read for comes in its place.

        A piece that cannot be read ends it, as an error of the source.
        """
        for p in range(len(self._pieces)):
            piece, done = self._piece(p), 0
            try:
                for row in piece:
                    yield row
                    done += 1
            except Exception as error:
                if _ends_job(error):
                    raise
            # An iterator that has raised is at its end: the others are read one by one.
            for i in range(done, len(piece)):
                try:
                    yield piece[i]
                except Exception as error:
                    if _ends_job(error):
                        raise
                    yield error

    def locate(self, i: int) -> tuple[str, int]:
        """Finds the file of a row, "" where there is none, and the row's number in it from 0 on."""
        if not self._origins:
            return "", i
        p = bisect_right(self._starts, i) - 1
        file, first = self._origins[p]
        i -= self._starts[p]
        row_number = getattr(self._piece(p), "row_number", None)  # a row may be several examples
        return file, first + (i if row_number is None else row_number(i))

    def relative_name(self, place: Path | str) -> str:
        """Names a file, or an object by its URL: the same wherever the folder of the source is.

        What a name means from `base` has that name, also where another piece's name leads to it;
        other files of such pieces are named from the folder that all pieces are in.
        """
        name = str(place)
        if isinstance(place, Path):
            if self.base and place.is_relative_to(self.base):
                return str(place.relative_to(self.base))
        elif self.base and name.startswith(start := f"{self.base.rstrip('/')}/"):
            return name.removeprefix(start)
        above = PurePosixPath(name).parents if self._others else ()
        others = [each for each in above if each in self._others]
        for other in others if isinstance(place, Path) else ():
            below = Path(name).relative_to(other)
            if is_same_file(Path(name), Path(self.base, below)):
                return str(below)
        return name.removeprefix(f"{self._above}/") if others and self._above else name

    def release(self) -> None:
        """Frees the pieces that are held; the next row is read again."""
        self._held.clear()

    def _piece(self, p: int) -> Piece:
        following = 0 if self._last == len(self._pieces) - 1 else self._last + 1
        self._jumped = self._jumped or p not in (self._last, following)
        self._last = p
        if p not in self._held:
            most = HELD_BYTES if self._jumped else PASSED_BYTES
            while sum(map(_num_bytes, self._held.values())) >= most:
                del self._held[next(iter(self._held))]  # old pieces go before the new one comes
            self._held[p] = self._pieces[p]()
        return self._held[p]


class ArrowRows(Sequence[Mapping[str, Any]]):
    """The rows of an Arrow table or batch, made into Python objects a few at a time.

    Measured on rows of five points: 6 us per row in order, 37 us per jump; one at a time would be
    18 us for either.
    """

    def __init__(self, table: Any) -> None:
        self._table = table
        self._start = 0
        self._rows: list[dict[str, Any]] = []
        self.num_bytes = int(table.nbytes)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i - self._start < len(self._rows):
            self._start = i - i % ROWS_AT_ONCE
            self._rows = []
            try:
                self._rows = self._table.slice(self._start, ROWS_AT_ONCE).to_pylist()
            except (ValueError, OverflowError, ArithmeticError):
                # A value that Python has no object for, such as text that is not UTF-8: the other
                # rows are good.
                return self._table.slice(i, 1).to_pylist()[0]
        return self._rows[i - self._start]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for start in range(0, len(self), ROWS_AT_ONCE):
            yield from self._table.slice(start, ROWS_AT_ONCE).to_pylist()


def is_same_file(path: Path, other: Path) -> bool:
    """Returns True for two names of one file."""
    try:
        return path.samefile(other)
    except (OSError, ValueError):  # there is none, or no name of a file
        return False


def _ends_job(error: Exception) -> bool:
    """Returns True for what is not the fault of one row."""
    return isinstance(error, ShardsError | MemoryError) and not isinstance(error, SampleError)


def _num_bytes(piece: Piece) -> int:
    return piece.num_bytes if isinstance(piece, ArrowRows) else HELD_BYTES


def local_layout(folder: str, *, unmatched: Unmatched = "refuse") -> SplitLayout:
    """Finds out which Parquet and Arrow files of a folder make which split.

    Raises:
      SourceError: `source_missing`, `source_empty`, `source_split`, `source_unreadable`.
    """
    if storage.is_local(folder) and not Path(folder).is_dir():
        raise SourceError("source_missing.folder", where=folder)
    try:
        layout = folder_layout(folder, unmatched=unmatched)
    except OSError as error:
        raise _unreadable(folder, error) from error
    if not layout.splits and not layout.unmatched:
        names = [each.name for each in storage.list_objects(folder)]
        for name in names:
            if name.rpartition("/")[2] in ("metadata.jsonl", "metadata.csv"):
                raise SourceError("source_empty.metadata", where=storage.join(folder, name))
        missing = not names and not storage.is_local(folder)  # a store has no empty folders
        raise SourceError(
            "source_missing.folder" if missing else "source_empty.folder", where=folder
        )
    return layout


def local_rows(
    folder: str,
    *,
    split: str,
    want: Sequence[str],
    unmatched: Unmatched = "refuse",
    layout: SplitLayout | None = None,
) -> Rows:
    """Opens the Parquet or Arrow files of a folder that are of one split (`splits`).

    Args:
      folder: The source: a local folder, or the URL of one.
      split: One of the source's own.
      want: Columns that each file must have.
      unmatched: What happens to files that are of no split.
      layout: Which files make which split; None finds it out.

    Raises:
      SourceError: `source_missing`, `source_empty`, `source_split`, `source_unreadable`,
        `source_schema`.
    """
    pa = _pyarrow()
    layout = layout or local_layout(folder, unmatched=unmatched)
    pieces: list[Callable[[], Piece]] = []
    lengths: list[int] = []
    origins: list[tuple[str, int]] = []
    for name in layout.files(split, unmatched=unmatched, where=folder):
        path = storage.join(folder, name)
        if storage.is_local(path) and not Path(path).is_file():  # a named pipe waits for a writer
            raise SourceError("source_unreadable", where=path, error="not a regular file")
        try:
            schema, parts = _open_file(path)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, error) from error
        _check_columns(schema, want, where=path)
        first = 0
        for length, read in parts:
            pieces.append(partial(_read_piece, path, read))
            lengths.append(length)
            origins.append((name, first))
            first += length
    kind = {"kind": "folder"}
    return Rows(pieces, lengths=lengths, kind=kind, base=folder, layout=layout, origins=origins)


def hub_rows(path: str, *, revision: str | None, split: str, want: Sequence[str]) -> Rows:
    """Opens a dataset of the hub through the `datasets` library, memory-mapped, images undecoded.

    Raises:
      SourceError: `source_missing`, `source_schema`.
    """
    try:
        import datasets
    except ImportError as error:
        raise SourceError("source_missing.hub_package", where=path) from error
    try:
        table = datasets.load_dataset(path, revision=revision, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise SourceError(
            "source_missing.hub", where=path, error=str(error).strip().splitlines()[0]
        ) from error
    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    _check_columns(table.column_names, want, where=path)
    kind = {"kind": "hub", "path": path, "revision": revision or str(table.version)}
    return Rows([lambda: table], lengths=[len(table)], kind=kind)


class _StoredFile(io.RawIOBase):
    """An object of a store as a file that is read at any place."""

    def __init__(self, url: str) -> None:
        self._url, self._position = url, 0
        self._reader = storage.RangeReader()
        length = storage.size(url)
        if length is None:
            raise FileNotFoundError(url)
        self._length = length

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._length)[whence]
        return self._position

    def readinto(self, target: Any) -> int:
        stop = min(self._position + len(target), self._length)
        payload = self._reader.read(self._url, self._position, stop, total=self._length)
        target[: len(payload)] = payload
        self._position = stop
        return len(payload)


def _open_file(path: str) -> tuple[list[str], list[tuple[int, Callable[[], Piece]]]]:
    """Lists the pieces of a file: column names, then (rows, reader) per piece."""
    if path.lower().endswith(".parquet"):
        import pyarrow.parquet as pq

        stored: Any = path if storage.is_local(path) else _StoredFile(path)
        file = pq.ParquetFile(stored)  # not mapped: a file cut meanwhile would end the process
        return file.schema_arrow.names, [
            (
                file.metadata.row_group(g).num_rows,
                lambda g=g: ArrowRows(file.read_row_group(g)),  # type: ignore[misc]
            )
            for g in range(file.num_row_groups)
        ]
    import pyarrow as pa

    source = pa.memory_map(str(local_copy(path)))
    try:
        reader = pa.ipc.open_stream(source)
        batches = list(reader)
    except pa.ArrowInvalid:
        reader = pa.ipc.open_file(source)
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
    return reader.schema.names, [
        (batch.num_rows, lambda batch=batch: ArrowRows(batch))  # type: ignore[misc]
        for batch in batches
    ]


def _read_piece(path: str, read: Callable[[], Piece]) -> Piece:
    import pyarrow as pa

    try:
        return read()
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def _check_columns(names: Sequence[str], want: Sequence[str], *, where: str) -> None:
    missing = [column for column in want if not set(column.split("|")) & set(names)]
    if missing:
        raise SourceError("source_schema", where=where, missing=missing, got=list(names))


def _unreadable(path: str, error: Exception) -> SourceError:
    return SourceError("source_unreadable", where=path, error=str(error).splitlines()[0])


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise SourceError("source_missing.pyarrow") from error
    return pyarrow
