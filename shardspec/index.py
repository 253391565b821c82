"""The index of a shard, a side-car file: one fixed-width row per sample.

The file is a plain .npy of a structured array, so a row is read by its number (`RowFile`), and
`np.load(path)` shows it. A row says where the sample's bytes are, how long each member is and how
much of a batch the sample takes; with it the training path parses neither tar nor JSON. Readers
look columns up by name: columns may be added, never renamed or given another meaning.

No file is memory-mapped: reading a map of a file that was truncated in place ends the process.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import itertools
import math
import os
import threading
import tokenize
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from shardspec.coordinates import MOST_CHARACTERS
from shardspec.errors import ShardError
from shardspec.families import StoredModel, plan_pictures, plan_videos
from shardspec.sample import (
    ARRAY_HEADER_BYTES,
    PreparedSample,
    SpanKind,
    clip_rows,
    image_rows,
    lead_rows,
    point_lists,
    subtitle_rows,
    text_rows,
    video_rows,
    window_images,
)
from shardspec.tar import TarRange, payload_offsets
from shardspec.tiling import FrameView, ImageView, num_crops, num_image_tokens

INDEX_DTYPE = np.dtype(
    [
        ("offset", "<u8"),  # of the sample's first header in the tar
        ("num_bytes", "<u4"),  # headers, payloads and padding of all members
        ("crc32", "<u4"),  # of those bytes
        ("json_bytes", "<u4"),  # payload lengths, in the order of the members
        ("spans_bytes", "<u4"),
        ("tokens_bytes", "<u4"),
        ("image_bytes", "<u4"),  # of the first image; further ones are in the spans table
        ("width", "<u4"),  # source size of the first image in pixels, 0 without one
        ("height", "<u4"),
        ("num_images", "<u2"),
        ("geometry", "<u2"),  # shardspec.sample.Geometry of the first image
        ("num_tokens", "<u4"),  # text tokens when each turn draws its longest variant
        ("num_loss_tokens", "<u4"),  # response tokens of the same
        ("key", "S60"),
    ]
)
"""Columns of a row. Little-endian, packed: 112 bytes."""

_MOST_HEADER_BYTES = 64 * 1024  # of a .npy; ours have about 600

QUESTION_COLUMNS = ("num_branches", "num_turns")
"""Columns that indexes of earlier releases lack: readers count in the samples then."""

GROUP_COLUMN = "group_hash"
"""Column of datasets whose samples have groups, such as the windows of an episode: `<u8`, equal
for the samples of a group, 0 for a sample of none. Resharding keeps a group in one shard and split.
"""

HEAD_COLUMNS = ("head_bytes", "head_crc32")
"""Columns of datasets that store clips: the part of a sample before the first file of a clip, and
its CRC-32. Both are 0 where a sample has no clip, or was written before there were such columns."""

_READ_BYTES = 2**20
"""Most bytes of a file that are read at a time."""

_ROWS_AT_ONCE = 32
"""Neighbours of a row that are read with it. The order of samples has blocks of 16."""

_NEAR_BYTES = 8 * 1024
"""Rows that are not farther apart are read together: copying this much takes as long as a call."""

RAW_COLUMNS = ("offset", "num_bytes", "crc32")
"""Columns that the index of a raw dataset shares with `INDEX_DTYPE`; its keys may be longer."""


def raw_index_dtype(key_bytes: int) -> np.dtype:
    """Returns the row type of a foreign tar whose longest key has `key_bytes`.

    `num_members` counts the files of the sample.
    """
    own = [(name, INDEX_DTYPE[name].str) for name in RAW_COLUMNS]
    return np.dtype([*own, ("num_members", "<u4"), ("key", f"S{max(1, key_bytes)}")])


@functools.lru_cache(maxsize=64)
def index_dtype(num_views: int, *, clips: bool = False) -> np.dtype:
    """Returns the row type of a dataset whose recipe has `num_views` and may store clips.

    After INDEX_DTYPE come the columns for planning batches and packs without reading data:
    `view_length` u4 [views] and `view_crops` u2 [views], the longest sequence and the crops of a
    sample in each view, and `loss_length` u4, the most positions under loss; then `num_branches`
    and `num_turns` u4, the conversations and the exchanges of a sample, each a row of an
    evaluation. Datasets that store clips have `HEAD_COLUMNS` u4 at the end.
    """
    further: list[tuple[str, str] | tuple[str, str, tuple[int, ...]]] = []
    if num_views:
        further = [
            ("view_length", "<u4", (num_views,)),
            ("view_crops", "<u2", (num_views,)),
            ("loss_length", "<u4"),
            *((name, "<u4") for name in QUESTION_COLUMNS),
        ]
    further += [(name, "<u4") for name in HEAD_COLUMNS if clips]
    return np.dtype(INDEX_DTYPE.descr + further)


def with_groups(rows: np.ndarray, groups: Sequence[int]) -> np.ndarray:
    """Adds `GROUP_COLUMN` to the rows of an index.

    Args:
      rows: [n].
      groups: n hashes.
    """
    made = np.zeros(len(rows), np.dtype([*rows.dtype.descr, (GROUP_COLUMN, "<u8")]))
    for name in rows.dtype.names or ():
        made[name] = rows[name]
    made[GROUP_COLUMN] = np.array(groups, np.uint64)
    return made


class _OneHeader:
    """Lets one thread at a time parse a header.

    NumPy calls Python's parser, and that of Python 3.11 fails when two threads use it at once
    (https://github.com/python/cpython/issues/106905). The lock is held for one header; a forked
    child gets a new one, as another thread of its parent may have held the old one.
    """

    def __init__(self) -> None:
        self.renew()
        os.register_at_fork(after_in_child=self.renew)

    def renew(self) -> None:
        self.lock = threading.Lock()


_one_header = _OneHeader()


class SamplePlace(NamedTuple):
    """Where a sample and its array members are: columns of its index row, as plain values.

    Most datasets have no `HEAD_COLUMNS`, and rows of theirs have no such values.
    """

    offset: int
    num_bytes: int
    crc32: int
    json_bytes: int
    spans_bytes: int
    tokens_bytes: int
    head_bytes: int
    head_crc32: int
    key: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleLayout:
    """Where the payloads of one sample start, counted from its first header."""

    json: int
    spans: int
    tokens: int
    image: int
    """Of the first image; one past the last array member when there is none."""


def index_row(
    sample: PreparedSample,
    *,
    place: TarRange,
    json_bytes: int,
    image_sizes: list[int],
    views: Sequence[ImageView] = (),
    frames: FrameView | None = None,
    placeholder: int = -1,
    bos: bool = True,
    model: StoredModel | None = None,
    head_bytes: int | None = None,
) -> np.ndarray:
    """Makes the row of a sample that has just been written.

    Args:
      sample: The sample.
      place: Its bytes in the tar.
      json_bytes: Length of its record.
      image_sizes: Lengths of its encoded images.
      views: The recipe's views, for the lengths of sequences.
      frames: How its frames are seen; None where there are none.
      placeholder: Id of <|image|>, which an image block replaces.
      bos: Whether sequences begin with BOS.
      model: The model that the dataset is built for, as its only view; `view_crops` is then the
        number of its pictures' tokens.
      head_bytes: Length of its head, of a dataset that stores clips; None of others.

    Returns:
      index_dtype(len(views)) [1], index_dtype(1) with a model.
    """
    clips = head_bytes is not None
    row = np.zeros(1, dtype=index_dtype(1 if model else len(views), clips=clips))
    if clips:
        row["head_bytes"] = head_bytes
    pictures = image_rows(sample.spans)
    windows = window_images(sample.spans)
    shown = pictures[windows[0]] if windows else pictures  # all windows have the same sizes
    if model:
        shapes = [(int(p[3]), int(p[2])) for p in shown]
        videos = [(int(v[2]), int(v[3])) for v in video_rows(sample.spans)]
        # The frames of videos come after all pictures.
        num_pictures = len(shown) - sum(count for _, count in videos)
        plans = plan_pictures(model.family, shapes[:num_pictures])
        plans += plan_videos(model.family, shapes, videos)
        num_symbols = 0 if model.inline else sum(plan.num_blocks for plan in plans)
        text, loss = longest_conversation(sample.spans, num_images=num_symbols)
        num_tokens, num_loss_tokens = text, loss
    else:
        num_tokens, num_loss_tokens = longest_text(sample.spans)
    first = pictures[0] if len(pictures) else np.zeros(8, dtype="<i4")
    row["offset"], row["num_bytes"], row["crc32"] = place.offset, place.num_bytes, place.crc32
    row["json_bytes"] = json_bytes
    row["spans_bytes"] = ARRAY_HEADER_BYTES + sample.spans.nbytes
    row["tokens_bytes"] = ARRAY_HEADER_BYTES + sample.tokens.nbytes
    row["image_bytes"] = image_sizes[0] if image_sizes else 0
    row["width"], row["height"], row["geometry"] = first[2], first[3], first[7]
    row["num_images"] = len(pictures)
    row["num_tokens"], row["num_loss_tokens"] = num_tokens, num_loss_tokens
    row["key"] = sample.key.encode()
    if model:
        visual = sum(map(model.block_length, plans))
        row["loss_length"], row["view_length"] = loss, text + visual
        num_messages = len(sample.record.get("message_list") or [()])
        row["num_branches"], row["num_turns"] = count_answers(sample.spans, num_messages)
        row["view_crops"] = (
            num_soft_tokens(sample, soft_id=model.soft_id) if model.inline else visual
        )
    elif views:
        text, loss = longest_sequence(sample.tokens, sample.spans, placeholder=placeholder, bos=bos)
        row["loss_length"] = loss
        row["num_branches"], row["num_turns"] = count_questions(sample.spans)
        sizes = [(int(p[2]), int(p[3])) for p in shown]
        num_frames = 0
        for _, _, start, count, table_bytes, _, most, _ in video_rows(sample.spans)[::-1].tolist():
            del sizes[start : start + count]
            num_frames += most if table_bytes else count
        for v, view in enumerate(views):
            image_tokens = sum(num_image_tokens(*size, view) for size in sizes)
            if frames is not None and num_frames:
                image_tokens += num_frames * frames.num_tokens(view)
            row["view_length"][0, v] = text + image_tokens
            row["view_crops"][0, v] = num_frames + sum(num_crops(*size, view) for size in sizes)
    return row


def num_soft_tokens(sample: PreparedSample, *, soft_id: int) -> int:
    """Counts the tokens of pictures in the first conversation of a sample; each has all of them."""
    rows = text_rows(sample.spans)
    first = rows[rows[:, 1] == rows[0, 1]].tolist() if len(rows) else []
    runs = [run for row in first for run in (row[3:5], row[5:7])]
    return sum(int(np.count_nonzero(sample.tokens[a:b] == soft_id)) for a, b in runs)


def longest_conversation(spans: np.ndarray, *, num_images: int) -> tuple[int, int]:
    """Counts the text tokens of the longest conversation of a sample for a model, and its loss.

    Args:
      spans: int32 [S, 8].
      num_images: Pictures, each one token of every conversation, which does not count here.
    """
    totals: dict[int, tuple[int, int]] = {}
    for _, branch, _, prompt_start, prompt_stop, start, stop, _ in text_rows(spans).tolist():
        tokens, loss = totals.get(branch, (0, 0))
        totals[branch] = (tokens + prompt_stop - prompt_start + stop - start, loss + stop - start)
    return (
        max((tokens for tokens, _ in totals.values()), default=0) - num_images,
        max((loss for _, loss in totals.values()), default=0),
    )


def longest_sequence(
    tokens: np.ndarray, spans: np.ndarray, *, placeholder: int = -1, bos: bool = True
) -> tuple[int, int]:
    """Counts the positions of a sample's sequence, image blocks left out, at its longest draw.

    Args:
      tokens: int32 [T].
      spans: int32 [S, 8].
      placeholder: Id of <|image|>: its positions are the image block's.
      bos: Whether sequences begin with BOS.

    Returns:
      (positions: BOS, leads, texts and the EOS between the turns of a branch; positions under
      loss: responses and their EOS), each turn drawing its longest variant. No draw exceeds them
      in Molmo 2 trees, wherever points are moved; Molmo 1 trees keep one more EOS per branch after
      the first. Of windows the longest counts.
    """
    positions: dict[tuple[int, int], int] = {}
    loss: dict[tuple[int, int], int] = {}
    room = _room_of_numbers(spans)
    marked = np.flatnonzero(tokens == placeholder)
    for _, branch, turn, prompt_start, prompt_stop, start, stop, _ in text_rows(spans).tolist():
        at = (branch, turn)
        response = stop - start + room(start, stop)
        length = prompt_stop - prompt_start + response
        if len(marked):
            begin, end = np.searchsorted(marked, (prompt_start, prompt_stop))
            length -= int(end - begin)
        positions[at] = max(positions.get(at, 0), length)
        loss[at] = max(loss.get(at, 0), response + 1)
    lengths = [
        max(stop - start, first_stop - first_start)
        for _, _, start, stop, first_start, first_stop, *_ in lead_rows(spans).tolist()
    ]
    for _, _, first, count, _, _, most, _ in clip_rows(spans)[::-1].tolist():
        if most:
            lengths[first : first + count] = sorted(lengths[first : first + count])[-most:]
    leads = sum(lengths) + int(sum(subtitle_rows(spans)[:, 3] - subtitle_rows(spans)[:, 2]))
    # Each turn of a branch but the last ends in EOS.
    ended = {at: length + 1 for at, length in positions.items()}
    branches = {(branch, 0): 1 for branch, _ in positions}
    text = _in_example(ended, spans) - _in_example(branches, spans)
    return bos + leads + text, _in_example(loss, spans)


def _in_example(lengths: Mapping[tuple[int, int], int], spans: np.ndarray) -> int:
    """Adds up the lengths of the turns, by branch and turn, that an example has at its longest."""
    if not (spans[:, 0] == SpanKind.WINDOW.value).any():
        return sum(lengths.values())
    totals: dict[int, int] = {}
    for (branch, _), length in lengths.items():
        totals[branch] = totals.get(branch, 0) + length
    return max(totals.values(), default=0)


def count_questions(spans: np.ndarray) -> tuple[int, int]:
    """Counts the conversations of a sample, and the exchanges of all of them, that are learned.

    Those of weight 0 are context.

    Args:
      spans: int32 [S, 8].
    """
    # The variants of an exchange are adjacent, and so are the exchanges of a conversation.
    texts = text_rows(spans)
    exchanges = texts[texts[:, 7] != 0, 1:3]
    if not len(exchanges):
        return 0, 0
    begins = np.any(exchanges[1:] != exchanges[:-1], axis=1)
    return 1 + int(np.count_nonzero(np.diff(exchanges[:, 0]))), 1 + int(np.count_nonzero(begins))


def first_conversations(spans: np.ndarray, num_messages: int) -> np.ndarray:
    """Gives the conversations of a sample for a model that its messages are asked in.

    Each message has equally many conversations, its variants, one after the other.

    Args:
      spans: int32 [S, 8].
      num_messages: Of the sample's record, >= 1.
    """
    rows = text_rows(spans)
    count = int(rows[-1, 1]) + 1 if len(rows) else 0
    return np.arange(0, count, max(1, count // num_messages))


def count_answers(spans: np.ndarray, num_messages: int) -> tuple[int, int]:
    """Counts the messages of a sample for a model, and the answers in all of them."""
    first, rows = first_conversations(spans, num_messages), text_rows(spans)
    answers = np.isin(rows[:, 1], first) & (rows[:, 5] < rows[:, 6])
    return len(first), int(np.count_nonzero(answers))


def longest_text(spans: np.ndarray) -> tuple[int, int]:
    """Counts the text tokens of a sample when every turn draws its longest variant.

    Returns:
      (tokens, response tokens), without BOS, EOS and image tokens; of windows those of the longest.
      Numbers that may move count as the longest of their notation.
    """
    rows, room = text_rows(spans), _room_of_numbers(spans)
    longest: dict[tuple[int, int], tuple[int, int]] = {}
    for _, branch, turn, prompt_start, prompt_stop, start, stop, _ in rows.tolist():
        response = stop - start + room(start, stop)
        total = prompt_stop - prompt_start + response
        old = longest.get((branch, turn), (0, 0))
        longest[branch, turn] = max(old, (total, response))
    tokens = {at: total for at, (total, _) in longest.items()}
    responses = {at: response for at, (_, response) in longest.items()}
    return _in_example(tokens, spans), _in_example(responses, spans)


def _room_of_numbers(spans: np.ndarray) -> Callable[[int, int], int]:
    """Gives what the numbers of a run of tokens may grow by when their points are moved."""
    growth = [
        (start, MOST_CHARACTERS[each.notation] - (stop - start))
        for each in point_lists(spans)
        for row in each.points
        for start, stop in (row[:2], row[2:4])
    ]
    if not growth:
        return lambda _start, _stop: 0
    return lambda start, stop: sum(more for at, more in growth if start <= at < stop)


def sample_places(rows: np.ndarray) -> np.ndarray:
    """Views the columns of `SamplePlace`, so that a row is one `.item()` (1 µs).

    Args:
      rows: Of an index; for a raw dataset, only the columns that it has are kept.
    """
    places: np.ndarray = rows[place_columns(rows.dtype)]
    return places


def place_columns(dtype: np.dtype) -> list[str]:
    """Lists the columns of `SamplePlace` that an index has."""
    return [name for name in SamplePlace._fields if name in (dtype.names or ())]


def sample_layout(row: np.void) -> SampleLayout:
    """Computes the payload positions of the sample that a row describes."""
    sizes = [int(row["json_bytes"]), int(row["spans_bytes"]), int(row["tokens_bytes"])]
    starts = payload_offsets([*sizes, int(row["image_bytes"])])
    return SampleLayout(json=starts[0], spans=starts[1], tokens=starts[2], image=starts[3])


def encode_index(rows: np.ndarray) -> bytes:
    """Serialises index rows as .npy bytes; the same rows give the same bytes."""
    stream = io.BytesIO()
    np.save(stream, rows, allow_pickle=False)
    return stream.getvalue()


def open_index(
    path: str, *, num_samples: int, shard_bytes: int, raw: bool = False, sha256: str = ""
) -> np.ndarray:
    """Reads an index into memory and checks that it fits its shard.

    Args:
      path: Local path of the .npy file.
      num_samples: Rows that the manifest promises.
      shard_bytes: Length of the tar.
      raw: Whether the samples are a foreign tar's, with fewer columns.
      sha256: What the file must have, as the manifest names it; "": it was compared before.

    Returns:
      INDEX_DTYPE [num_samples], read-only; `raw_index_dtype` for a raw dataset.

    Raises:
      ShardError: `index_missing`, `index_sha256`, `index_format`, `index_count`, `index_range`.
    """
    with _translate_open_errors(path), open(path, "rb") as stream:
        payload = stream.read()
    return parse_index(
        memoryview(payload),
        where=path,
        num_samples=num_samples,
        shard_bytes=shard_bytes,
        raw=raw,
        sha256=sha256,
    )


def open_index_file(
    path: str,
    *,
    num_samples: int,
    shard_bytes: int,
    raw: bool = False,
    sha256: str = "",
) -> RowFile:
    """Opens an index to read single rows of it; arguments and errors as `open_index`."""
    with _translate_open_errors(path):
        rows = RowFile(path, cut="index_cut")
    if sha256 and (got := rows.sha256()) != sha256:
        raise _broken(path, "index_sha256.stored", {"got": got, "want": sha256})
    try:
        rows.parse()
    except ValueError as error:
        raise _broken(path, "index_format", {"error": error}) from error
    _check_rows(rows.dtype, rows.shape, where=path, num_samples=num_samples, raw=raw)
    if num_samples:
        _check_end(rows.row(num_samples - 1), where=path, shard_bytes=shard_bytes)
    return rows


@contextmanager
def _translate_open_errors(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ShardError("index_missing.stored", where=path) from error
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise  # limits of the system: the index may be sound
        raise _broken(path, "index_format", {"error": error}) from error


def parse_index(
    payload: memoryview,
    *,
    where: str,
    num_samples: int,
    shard_bytes: int,
    raw: bool = False,
    sha256: str = "",
) -> np.ndarray:
    """Reads an index from memory; arguments, result and errors otherwise as `open_index`.

    Args:
      payload: The whole .npy file; the rows are a view of it.
      where: Its URL, for errors.
      num_samples, shard_bytes, raw, sha256: As `open_index`.
    """
    if sha256 and (got := hashlib.sha256(payload).hexdigest()) != sha256:
        raise _broken(where, "index_sha256.stored", {"got": got, "want": sha256})
    try:
        rows = parse_rows(payload)
    except ValueError as error:
        raise _broken(where, "index_format", {"error": error}) from error
    _check_rows(rows.dtype, rows.shape, where=where, num_samples=num_samples, raw=raw)
    if len(rows):
        _check_end(rows[-1], where=where, shard_bytes=shard_bytes)
    return rows


def _check_rows(
    dtype: np.dtype, shape: tuple[int, ...], *, where: str, num_samples: int, raw: bool
) -> None:
    known = set(dtype.names or ())
    wrong = [
        name
        for name in (RAW_COLUMNS if raw else INDEX_DTYPE.names or ())
        if name not in known or dtype[name] != INDEX_DTYPE[name]
    ]
    if raw and ("key" not in known or dtype["key"].kind != "S"):
        wrong.append("key")
    if len(shape) != 1 or wrong:
        raise _broken(where, "index_format", {"ndim": len(shape), "wrong_columns": wrong})
    if shape[0] != num_samples:
        raise _broken(where, "index_count", {"got_rows": shape[0], "want_rows": num_samples})


def _check_end(last: np.void, *, where: str, shard_bytes: int) -> None:
    end = int(last["offset"]) + int(last["num_bytes"])
    if end > shard_bytes:
        raise _broken(where, "index_range", {"last_byte": end, "shard_bytes": shard_bytes})


def parse_rows(payload: memoryview) -> np.ndarray:
    """Reads the array of a .npy file from memory; it is a view of the payload.

    Raises:
      ValueError: The header cannot be read, or the array does not end where the file does.
    """
    start, shape, dtype = parse_header(payload[:_MOST_HEADER_BYTES], num_bytes=len(payload))
    if len(payload) == start:  # NumPy makes no array of an empty buffer
        return np.zeros(shape, dtype)
    rows: np.ndarray = np.frombuffer(payload[start:], dtype).reshape(shape)
    return rows


def parse_header(head: memoryview, *, num_bytes: int) -> tuple[int, tuple[int, ...], np.dtype]:
    """Reads the header of a .npy file.

    Args:
      head: The first bytes of the file, with the header.
      num_bytes: Length of the file.

    Returns:
      (where the rows start, their shape, their type).

    Raises:
      ValueError: As `parse_rows`.
    """
    stream = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(stream)  # type: ignore[no-untyped-call]
        with _one_header.lock:
            if version == (1, 0):
                shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
            else:
                shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
        start = stream.tell()
        # A damaged header length would shift every row, so the rows must end where the file does.
        if dtype.hasobject or num_bytes != start + dtype.itemsize * math.prod(shape):
            raise ValueError(f"{num_bytes} bytes do not hold {shape} of {dtype}")
        # NumPy's header parser raises any of these, depending on which byte is wrong. It warns of a
        # header of Python 2, which is an error where the user wants warnings to be errors.
    except (
        MemoryError,
        RecursionError,
        SyntaxError,
        TypeError,
        UserWarning,
        tokenize.TokenError,
    ) as error:
        raise ValueError(str(error)) from error
    return start, shape, dtype


class RowFile:
    """The rows of a local .npy file, copied out of it when they are needed.

    Takes a descriptor and no memory, however long the file is. A file that became shorter since it
    was opened is an error of what is read then. Safe to use from threads.
    """

    def __init__(self, path: str, *, cut: str) -> None:
        """Opens the file and reads nothing of it yet; `parse` comes first.

        Args:
          path: Local path.
          cut: Reason of the error where bytes are missing.

        Raises:
          OSError: The file cannot be opened.
        """
        self.path, self._cut = path, cut
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        self.num_bytes = os.fstat(self._descriptor).st_size
        self.shape: tuple[int, ...] = (0,)
        self.dtype = np.dtype([])
        self._start = 0
        # The places that were read last, and the number of the first.
        self._near: tuple[int, np.ndarray] = (0, np.zeros(0))

    def sha256(self) -> str:
        """Hashes the whole file."""
        digest = hashlib.sha256()
        for start in range(0, self.num_bytes, _READ_BYTES):
            digest.update(self._read(start, min(start + _READ_BYTES, self.num_bytes)))
        return digest.hexdigest()

    def parse(self) -> None:
        """Reads the header.

        Raises:
          ValueError: As `parse_rows`.
        """
        head = self._read(0, min(_MOST_HEADER_BYTES, self.num_bytes))
        self._start, self.shape, self.dtype = parse_header(
            memoryview(head), num_bytes=self.num_bytes
        )
        self._places = self.dtype[place_columns(self.dtype)] if self.dtype.names else self.dtype

    def row(self, number: int) -> np.void:
        """Reads one row, 0 to len - 1."""
        found: np.void = np.frombuffer(self._rows(number, number + 1), self.dtype)[0]
        return found

    def place(self, number: int) -> tuple[Any, ...]:
        """Reads the values of `SamplePlace` of one row."""
        found: tuple[Any, ...] = np.frombuffer(self._rows(number, number + 1), self._places)[
            0
        ].item()
        return found

    def values(self, names: Sequence[str], numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Reads columns of many rows.

        Args:
          names: Of columns that there are.
          numbers: int64 [n], in any order.

        Returns:
          [n, ...] of the type of each.
        """
        values = {
            name: np.zeros((len(numbers), *self.dtype[name].shape), self.dtype[name].base)
            for name in names
        }
        if not len(numbers):
            return values
        by_number = np.argsort(numbers, kind="stable")
        ordered = numbers[by_number]
        # Rows that are near each other are read together, up to a bound: a dense selection is read
        # in large parts, single rows as such.
        near = max(1, _NEAR_BYTES // max(1, self.dtype.itemsize))
        most = max(1, _READ_BYTES // max(1, self.dtype.itemsize))
        starts = [0, *(np.flatnonzero(np.diff(ordered) > near) + 1).tolist(), len(ordered)]
        for begin, stop in itertools.pairwise(starts):
            while begin < stop:
                first = int(ordered[begin])
                end = min(stop, int(np.searchsorted(ordered, first + most)))
                payload = self._rows(first, int(ordered[end - 1]) + 1)
                rows = np.frombuffer(payload, self.dtype)
                for name in names:
                    values[name][by_number[begin:end]] = rows[name][ordered[begin:end] - first]
                begin = end
        return values

    def _rows(self, first: int, stop: int) -> bytes:
        size = self.dtype.itemsize
        return self._read(self._start + first * size, self._start + stop * size)

    def _read(self, start: int, stop: int) -> bytes:
        payload = b""
        try:
            while len(payload) < stop - start:
                got = len(payload)
                # One call, but for signals.
                part = os.pread(self._descriptor, stop - start - got, start + got)
                if not part:
                    raise ShardError(self._cut, where=self.path, missing_byte=start + got)
                payload = payload + part if payload else part
        except OSError as error:  # of the disk
            raise ShardError(self._cut, where=self.path, error=error) from error
        return payload


def _broken(path: str, reason: str, facts: dict[str, object]) -> ShardError:
    return ShardError(reason, where=path, facts=facts)
