"""Foreign tars: the samples of WebDataset files that other programs wrote.

Adjacent files whose names agree up to the first dot of their base name are one sample, as in
webdataset: `a/0001.jpg` and `a/0001.cls.txt` are the fields `jpg` and `cls.txt` of the sample
`a/0001`. Where keys have dots themselves (`22.05.png`), the last dot can be the border instead; an
index has the whole key, so that its readers need not know the rule. Headers may be of any kind that
Python's tarfile reads (PAX, GNU's long names); folders and links are skipped. Nothing is ever
unpacked to a disk, and no pickle is loaded: fields with the suffix of one are left out.
"""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Literal

from shardspec.errors import ShardError
from shardspec.tar import BLOCK, padded

PICKLE_SUFFIXES = frozenset({"pickle", "pkl", "pk", "pyd", "pt", "pth", "joblib", "dill"})
"""Last parts of suffixes that readers of WebDataset files unpickle."""


Dots = Literal["first", "last"]
"""Which dot of a base name ends the key of its sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignFile:
    """A file of a foreign tar that belongs to a sample."""

    key: str
    suffix: str
    """In lower case."""
    header: int
    """Byte position of its first header, extended ones included."""
    offset: int
    """Byte position of the payload."""
    num_bytes: int

    @property
    def end(self) -> int:
        """Byte position after the padded payload."""
        return self.offset + padded(self.num_bytes)


def split_name(name: str, *, dots: Dots = "first") -> tuple[str, str] | None:
    """Splits the name of a file into the key of its sample and its suffix; None where it has none.

    >>> split_name("a.b/0001.cls.TXT"), split_name("README"), split_name("__meta__/0.txt")
    (('a.b/0001', 'cls.txt'), None, None)
    >>> split_name("a.b/22.05.png", dots="last")
    ('a.b/22.05', 'png')
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".") if dots == "first" else base.rpartition(".")
    first = name.partition("/")[0]
    if not dot or (len(first) > 3 and first.startswith("__") and first.endswith("__")):
        return None
    if not stem and (not folder or "." in folder):
        return None  # a hidden file; in a folder without a dot they count, as in webdataset
    return folder + slash + stem, suffix.lower()


def walk_foreign(
    stream: IO[bytes],
    *,
    where: str,
    skipped: Counter[str] | None = None,
    split: Callable[[str], tuple[str, str] | None] = split_name,
) -> Iterator[ForeignFile]:
    """Lists the files of a foreign tar that belong to samples, in order, by the headers alone.

    Args:
      stream: The tar, or the bytes of one sample.
      where: Named in errors.
      skipped: Counts what is skipped, by reason.
      split: Splits a name into key and suffix; None for a file of no sample.

    Raises:
      ShardError: `foreign_tar`: not an uncompressed tar, or truncated or damaged.
    """
    counts: Counter[str] = Counter() if skipped is None else skipped
    size = stream.seek(0, 2)
    stream.seek(0)
    end = 0
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            while (entry := archive.next()) is not None:
                # Otherwise the headers of the whole tar stay in memory.
                archive.members.clear()  # type: ignore[attr-defined]
                # Not from the member's size: a sparse file is shorter in the tar.
                end = archive.offset
                if end > size:
                    raise _no_tar(where, f"it ends inside {entry.name!r}")
                name = None if entry.issparse() else split(entry.name)
                if entry.isdir():
                    continue
                if not entry.isreg() or name is None or not _is_text(entry.name):
                    counts[_why_skipped(entry)] += 1
                    continue
                yield ForeignFile(
                    key=name[0],
                    suffix=name[1],
                    header=entry.offset,
                    offset=entry.offset_data,
                    num_bytes=entry.size,
                )
    except RecursionError as error:  # tarfile reads an extended header inside the one before
        raise _no_tar(where, "a file has too many extended headers") from error
    except (tarfile.TarError, ValueError, LookupError, OverflowError) as error:
        # Sparse maps and other numbers of extended headers are not checked by tarfile.
        raise _no_tar(where, str(error)) from error
    # tarfile treats a damaged header after the first as the end.
    stream.seek(end)
    rest = stream.read(BLOCK)
    if rest and any(rest):
        raise _no_tar(where, f"the header at byte {end} is damaged")


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes that are not UTF-8
        return False
    return True


def _why_skipped(entry: tarfile.TarInfo) -> str:
    if not entry.isreg() or entry.issparse():
        return "no_regular_file"
    return "no_suffix" if _is_text(entry.name) else "name_encoding"


def is_pickle(suffix: str) -> bool:
    """Returns True if readers of WebDataset files would unpickle a field.

    >>> is_pickle("pyd"), is_pickle("x.pkl"), is_pickle("json")
    (True, True, False)
    """
    return suffix.rpartition(".")[2] in PICKLE_SUFFIXES


def sample_fields(
    payload: memoryview, *, where: str, key: str | None = None
) -> dict[str, memoryview]:
    """Finds the fields of a sample in its bytes.

    Args:
      payload: From its first header on; see `index.raw_index_dtype`.
      key: The sample's, from the index: the rest of a name is the field. None: names are split at
        their first dot.
      where: Named in errors.

    Returns:
      Suffix to payload, without copying, in the order of the tar; pickles are left out.

    Raises:
      ShardError: `foreign_tar`.
    """

    def split(name: str) -> tuple[str, str] | None:
        if key is None:
            return split_name(name)
        front, rest = name[: len(key)], name[len(key) :]
        return (key, rest[1:].lower()) if front == key and rest[:1] == "." else None

    files = walk_foreign(io.BytesIO(payload), where=where, split=split)
    return {
        file.suffix: payload[file.offset : file.offset + file.num_bytes]
        for file in files
        if not is_pickle(file.suffix)
    }


def _no_tar(where: str, problem: str) -> ShardError:
    return ShardError("foreign_tar", where=where, problem=problem)
