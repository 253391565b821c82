"""Rows of JSON files: lines, arrays, and the objects of COCO, VQA v2 and GQA.

A row is read when it is asked for, through a table of offsets: 16 bytes a row. Files whose rows
refer to each other have the ids of the parts in that table, too: some 50 bytes a row.
"""

from __future__ import annotations

import json
import os
import re
import weakref
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from preprocess.formats.copies import PACKED, local_copy
from shardspec.errors import SampleError, SourceError
from shardspec.keyed import hash_text

BROKEN = "__broken__"
"""Field of a row that could not be read; it holds the SampleError."""

CHUNK_BYTES = 4 * 2**20
"""Read at once when offsets are looked for."""

_WORD_CHARS = 16
"""More than the longest of true, false, null, NaN and -Infinity."""

_SPACE = " \t\r\n"

Row = Mapping[str, Any]


class OpenFile:
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
        self._file, self._name = OpenFile(path), name
        self._starts, self._stops = starts, stops

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: Any) -> Any:
        payload = self._file.read(self._starts[i], self._stops[i])
        return parsed_row(payload, where=f"{self._name} row {i + 1}")


def decoded(payload: bytes, *, where: str, encoding: str = "") -> str:
    """Decodes a text; "" as its encoding is UTF-8.

    Raises:
      SampleError: `row_encoding`.
    """
    try:
        return payload.decode(encoding or "utf-8-sig").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise SampleError("row_encoding.bytes", where=where, error=str(error)[:80]) from error


def parsed_row(payload: bytes, *, where: str, encoding: str = "") -> Row:
    try:
        row = json.loads(decoded(payload, where=where, encoding=encoding) if encoding else payload)
    except SampleError as error:
        return {BROKEN: error}
    except json.JSONDecodeError as error:
        told = f"{error.msg} at character {error.colno}"
        return {BROKEN: SampleError("row_json", where=where, error=told)}
    except RecursionError:
        return {BROKEN: SampleError("row_json", where=where, error="nested too deeply")}
    except UnicodeDecodeError as error:
        return {BROKEN: SampleError("row_encoding.bytes", where=where, error=str(error)[:80])}
    except ValueError as error:
        return {BROKEN: SampleError("row_json", where=where, error=str(error)[:80])}
    return _object(row, where=where)


def _object(row: Any, *, where: str) -> Row:
    if not isinstance(row, dict):
        told = f"an object is wanted, not {type(row).__name__}"
        return {BROKEN: SampleError("row_json", where=where, error=told)}
    return row


def open_lines(path: Path, name: str) -> Sequence[Row]:
    starts, stops = array("q"), array("q")
    position = 0
    with path.open("rb") as stream:
        for line in stream:
            if line.strip():
                starts.append(position)
                stops.append(position + len(line))
            position += len(line)
    return _Lines(path, name, starts, stops)


def _are_lines(path: Path) -> bool:
    """Returns True if the first line is a value."""
    with path.open("rb") as stream:
        first = next((line for line in stream if line.strip()), b"")
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _open_values(path: Path, name: str) -> Sequence[Row]:
    """Opens objects that follow each other and have several lines each.

    Raises:
      SourceError: `source_json`.
    """
    starts, stops = array("q"), array("q")
    with path.open("rb") as stream:
        scanner = _Scanner(stream, path, name)
        while scanner.following(_SPACE + "\xef\xbb\xbf"):
            start, stop, _ = scanner.value()
            starts.append(start)
            stops.append(stop)
    return _Lines(path, name, starts, stops)


def open_json(path: Path, name: str) -> Sequence[Row]:
    """Opens an array of objects, or an object that holds rows.

    Raises:
      SourceError: `source_json`, `source_format`, `source_lists`, `source_unreadable`,
        `source_missing`.
    """
    found = _scanned(path, name)
    if found is None:
        return open_lines(path, name) if _are_lines(path) else _open_values(path, name)
    try:
        return _joined(found, path, name)
    except (AttributeError, KeyError, TypeError) as error:
        told = f"not the fields of COCO or VQA files: {type(error).__name__}: {error}"[:160]
        raise SourceError("source_unreadable", where=name, error=told) from error


class _Scanner:
    """Finds where the values of a JSON file begin and end, in bytes, with a part of it in memory.

    The text is read as Latin-1, in which a character is a byte. That changes the strings, not
    where they end: UTF-8 writes neither quotes nor backslashes inside of other characters.
    """

    def __init__(self, stream: Any, path: Path, name: str) -> None:
        self._stream, self._path, self._name = stream, path, name
        self._decode = json.JSONDecoder().raw_decode
        self._text, self._at = "", 0
        self._base = 0
        """Where `_text` begins in the file."""
        self._ended = False

    def _more(self) -> bool:
        rest = self._text[self._at :]
        chunk = self._stream.read(max(CHUNK_BYTES, len(rest)))  # doubled for a long object
        self._base += self._at
        self._text, self._at, self._ended = rest + chunk.decode("latin-1"), 0, not chunk
        return bool(chunk)

    def following(self, over: str = _SPACE) -> str:
        """Moves over white space, or other characters; returns what follows, "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in over:
                self._at += 1
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def value(self) -> tuple[int, int, Any]:
        """Reads a value; returns where it begins and ends, and the value, its texts as Latin-1."""
        while True:
            try:
                value, stop = self._decode(self._text, self._at)
                if stop < len(self._text) or self._ended:  # a number could go on
                    break
            except json.JSONDecodeError as error:
                # Only a text that is cut in a string or in a word may still become right.
                cut = error.pos >= len(self._text) - _WORD_CHARS
                if self._ended or (error.msg.startswith("Expecting") and not cut):
                    raise self.bad(error.msg, at=self._base + error.pos) from error
            except RecursionError as error:
                raise self.bad("nested too deeply") from error
            self._more()
        start, self._at = self._base + self._at, stop
        return start, self._base + stop, value

    def elements(self, *, packed: bool = False) -> Iterator[tuple[int, int, Any]]:
        """Reads the elements of the array that follows; `packed`: of arrays in it, too."""
        self._at += 1  # the bracket
        while (following := self.following(_SPACE + ",")) != "]":
            if not following:
                raise self.bad("the array does not end")
            if packed and following == "[":
                yield from self.elements()
            else:
                yield self.value()
        self._at += 1

    def members(self) -> Iterator[tuple[int, str]]:
        """Reads the keys of the object that follows, with where they begin.

        The value of each is the caller's to read.
        """
        self._at += 1  # the brace
        while (following := self.following(_SPACE + ",")) != "}":
            if not following:
                raise self.bad("the object does not end")
            start, _, key = self.value()
            if not isinstance(key, str):
                raise self.bad("Expecting property name enclosed in double quotes", at=start)
            if self.following() != ":":
                raise self.bad("Expecting ':' delimiter")
            self._at += 1
            self.following()
            yield start, key
        self._at += 1

    def bad(self, message: str, *, at: int | None = None) -> SourceError:
        """Makes the error of a file that is not JSON."""
        rest = self._base + self._at if at is None else at
        line, column = 1, 1
        with self._path.open("rb") as stream:
            while chunk := stream.read(min(CHUNK_BYTES, rest)):
                rest -= len(chunk)
                line += chunk.count(b"\n")
                last = chunk.rfind(b"\n")
                column = len(chunk) - last if last >= 0 else column + len(chunk)
        return SourceError("source_json", where=self._name, line=line, column=column, error=message)


_IDS: Mapping[str, tuple[str, ...]] = {
    "questions": ("question_id",),
    "annotations": ("question_id", "image_id"),
    "images": ("id",),
}
"""By what the objects of a list are joined to others: the first of these that they have."""


def _plain_id(found: Any) -> Any:
    """Gives an id as one value, however two lists write it: 7 and 7.0, "é" and its escape.

    >>> _plain_id(7.0), _plain_id("\xc3\xa9") == _plain_id("\xe9")
    (7, True)
    """
    if isinstance(found, float) and found.is_integer():
        return int(found)
    if isinstance(found, str):
        with suppress(UnicodeError):  # what was escaped is not UTF-8
            return found.encode("latin-1").decode()
    return found


@dataclass(slots=True)
class _Table:
    """Where the objects of a list are, and by what they are joined to others."""

    names: tuple[str, ...] = ()
    starts: array[int] = field(default_factory=lambda: array("q"))
    stops: array[int] = field(default_factory=lambda: array("q"))
    ids: array[int] = field(default_factory=lambda: array("q"))
    """Nothing for lists that are not joined."""
    boxes: bytearray = field(default_factory=bytearray)
    """Of each object with an id, whether it has a box."""

    def add(self, start: int, stop: int, value: Any) -> None:
        """Adds an object."""
        self.starts.append(start)
        self.stops.append(stop)
        if not self.names or not isinstance(value, dict):
            return
        found = next((value[name] for name in self.names if value.get(name) is not None), None)
        if found is None:
            return
        found = _plain_id(found)
        whole = isinstance(found, int) and -(2**63) <= found < 2**63
        self.ids.append(found if whole else hash_text(json.dumps(found)) - 2**63)
        self.boxes.append("bbox" in value and "caption" not in value and not value.get("iscrowd"))

    def joined(self) -> np.ndarray:
        """Gives the ids, int64 [N].

        Raises:
          KeyError: An object has none.
        """
        if len(self.ids) < len(self.starts):
            raise KeyError(" or ".join(self.names))
        return np.array(self.ids, np.int64)


@dataclass(slots=True)
class _Document:
    """What is where in a file of one value."""

    lists: dict[str, _Table] = field(default_factory=dict)
    """By their keys; "" for a file that is a list."""
    members: _Table = field(default_factory=_Table)
    """The other keys with their values."""
    gqa: bool = True
    """Whether all of those are questions of GQA."""
    folder: str = ""
    """Of VQA's images."""


def _scanned(path: Path, name: str) -> _Document | None:
    """Finds what is where in a file; None where it is more than one value.

    Raises:
      SourceError: `source_json`, `source_format`.
    """
    with path.open("rb") as stream:
        scanner = _Scanner(stream, path, name)
        first = scanner.following(_SPACE + "\xef\xbb\xbf")
        document = _Document()
        if first == "[":
            table = document.lists[""] = _Table()
            for start, stop, value in scanner.elements(packed=True):  # Qwen's packs
                table.add(start, stop, value)
            if scanner.following():
                raise scanner.bad("text after the end of the array")
            return document
        if first != "{":
            scanner.value()
            raise SourceError("source_format", where=name, want="objects")
        for start, key in scanner.members():
            document.lists.pop(key, None)  # of two values of a key the last one counts
            if scanner.following() == "[":
                table = document.lists[key] = _Table(_IDS.get(key, ()))
                for begin, stop, value in scanner.elements():
                    table.add(begin, stop, value)
                continue
            _, stop, value = scanner.value()
            document.members.add(start, stop, value)
            document.gqa &= isinstance(value, dict) and "imageId" in value
            if key == "data_subtype":
                document.folder = str(value or "")
        return None if scanner.following() else document


_LISTS = ("data", "train", "rows", "validation", "val", "dev", "test")
"""Keys of an object that hold rows; an object may have one of the first three."""


def _joined(document: _Document, path: Path, name: str) -> Sequence[Row]:
    """Makes rows of an object: of COCO's captions, VQA v2's questions, or a single record."""
    found = document.lists
    if "" in found:
        return _Lines(path, name, found[""].starts, found[""].stops)
    if "questions" in found:
        questions = _Lines(path, name, found["questions"].starts, found["questions"].stops)
        if len(questions) and "answer" in questions[0]:  # CLEVR
            return questions
        return _Questions(document, path, name)
    if "annotations" in found and "images" in found:
        return _Pictures(found, path, name)
    if document.gqa and not found and document.members.starts:
        return _Members(path, name, document.members.starts, document.members.stops)
    lists = [each for each in _LISTS if each in found]
    if len(lists) > 1:
        raise SourceError("source_lists", where=name, lists=lists)
    if not lists or lists[0] not in _LISTS[:3]:
        return _Lines(path, name, array("q", [0]), array("q", [path.stat().st_size]))
    rows = found[lists[0]]
    return _Lines(path, name, rows.starts, rows.stops)


class _Members(_Lines):
    """GQA: questions by their numbers."""

    def __getitem__(self, i: Any) -> Any:
        payload = b"{%s}" % self._file.read(self._starts[i], self._stops[i])
        row = parsed_row(payload, where=f"{self._name} row {i + 1}")
        if BROKEN in row:
            return row
        ((number, question),) = row.items()
        return {**question, "question_id": number, "image": f"{question['imageId']}.jpg"}


class _ById:
    """The objects of a list by their ids."""

    def __init__(self, table: _Table, path: Path, name: str) -> None:
        ids = table.joined()
        self._order = np.argsort(ids, kind="stable")
        self._ids = ids[self._order]
        self._rows = _Lines(path, name, table.starts, table.stops)

    def of(self, number: int) -> list[Row]:
        """Reads the objects of an id, in the order of the file."""
        first, last = (np.searchsorted(self._ids, number, side) for side in ("left", "right"))
        return [self._rows[int(i)] for i in self._order[first:last]]


class _Pictures(Sequence[Row]):
    """COCO: captions or boxes, a row per image, in the order of the images."""

    def __init__(self, lists: Mapping[str, _Table], path: Path, name: str) -> None:
        images, annotations = lists["images"], lists["annotations"]
        self._annotations = _ById(annotations, path, name)
        self._images = _Lines(path, name, images.starts, images.stops)
        self._ids = images.joined()
        self._numbers = np.arange(len(self._ids))
        boxes = np.frombuffer(annotations.boxes, np.bool_)
        self._boxed = bool(boxes.any())
        if self._boxed:  # an image without any is of no row
            self._numbers = np.flatnonzero(np.isin(self._ids, annotations.joined()[boxes]))
        names = lists.get("categories") or _Table()
        self._names = {
            each["id"]: each["name"] for each in _Lines(path, name, names.starts, names.stops)
        }

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i: Any) -> Any:
        number = int(self._numbers[i])
        image = self._images[number]
        if BROKEN in image:
            return image
        found = self._annotations.of(int(self._ids[number]))
        row = {"image": image.get("file_name"), "image_id": image["id"]}
        if not self._boxed:
            return {**row, "caption": [each["caption"] for each in found if "caption" in each]}
        boxes = [each for each in found if "bbox" in each and not each.get("iscrowd")]
        return {
            **row,
            "boxes": [_named_box(each["bbox"]) for each in boxes],
            "label": [self._names.get(each.get("category_id")) for each in boxes],
        }


def _named_box(box: Any) -> Any:
    """Names the numbers of a COCO box, so that no spec can take a size for a corner."""
    fits = isinstance(box, list) and len(box) == 4
    return dict(zip("xywh", box, strict=True)) if fits else box


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


class _Questions(Sequence[Row]):
    """VQA v2: questions joined to their annotations; images are named as COCO does it."""

    def __init__(self, document: _Document, path: Path, name: str) -> None:
        questions = document.lists["questions"]
        self._ids, self._folder, self._name = questions.joined(), document.folder, name
        self._rows = _Lines(path, name, questions.starts, questions.stops)
        self._answers = _annotations(document, path, name)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: Any) -> Any:
        question = self._rows[i]
        try:
            number = int(question["image_id"])
        except (KeyError, TypeError, ValueError):
            fields = sorted(set(question) - {BROKEN})
            error = SampleError("row_fields", name="image_id", want="a number", fields=fields)
            return {BROKEN: error, **question}
        answers = self._answers.of(int(self._ids[i]))
        stem = f"COCO_{self._folder}_{number:012d}.jpg"
        image = f"{self._folder}/{stem}" if self._folder else stem
        return {**question, **(answers[-1] if answers else {}), "image": image}


def _annotations(document: _Document, path: Path, name: str) -> _ById:
    """Finds the annotations of VQA's questions: in their file, or in the one beside it."""
    if "annotations" in document.lists:
        return _ById(document.lists["annotations"], path, name)
    packed = PurePosixPath(name).suffix.lower()
    beside = annotation_names(name)
    for each in beside:
        try:
            local = local_copy(each, packed if packed in PACKED else "")
        except FileNotFoundError:
            continue
        found = _scanned(local, each)
        return _ById(found.lists["annotations"] if found else _Table(), local, each)
    if document.folder.startswith("test"):  # the answers to those are not published
        return _ById(_Table(), path, name)
    raise SourceError("source_missing.annotations", where=" or ".join(beside) or name)
