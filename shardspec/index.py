"""The index of a shard, a side-car file: one fixed-width row per sample, memory-mapped by readers.

The file is a plain .npy of a structured array, so `np.load(path, mmap_mode="r")` opens it in
microseconds whatever its length. A row says where the sample's bytes are, how long each member is
and how much of a batch the sample takes; with it the training path parses neither tar nor JSON.
Readers look columns up by name: columns may be added, never renamed or given another meaning.
"""

from __future__ import annotations

import errno
import hashlib
import io
import math
import mmap
import os
import threading
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from shardspec.errors import ShardError
from shardspec.sample import ARRAY_HEADER_BYTES, PreparedSample, image_rows, lead_rows, text_rows
from shardspec.tar import TarRange, payload_offsets
from shardspec.tiling import ImageView, num_crops, num_image_tokens

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

RAW_COLUMNS = ("offset", "num_bytes", "crc32")
"""Columns that the index of a raw dataset shares with `INDEX_DTYPE`; its keys may be longer."""


def raw_index_dtype(key_bytes: int) -> np.dtype:
    """Returns the row type of a foreign tar whose longest key has `key_bytes`.

    `num_members` counts the files of the sample.
    """
    own = [(name, INDEX_DTYPE[name].str) for name in RAW_COLUMNS]
    return np.dtype([*own, ("num_members", "<u4"), ("key", f"S{max(1, key_bytes)}")])


def index_dtype(num_views: int) -> np.dtype:
    """Returns the row type of a dataset whose recipe has `num_views`.

    After INDEX_DTYPE come the columns for planning batches and packs without reading data:
    `view_length` u4 [views] and `view_crops` u2 [views], the longest sequence and the crops of a
    sample in each view, and `loss_length` u4, the most positions under loss; then `num_branches`
    and `num_turns` u4, the conversations and the exchanges of a sample, each a row of an
    evaluation.
    """
    if not num_views:
        return INDEX_DTYPE
    lengths = [
        ("view_length", "<u4", (num_views,)),
        ("view_crops", "<u2", (num_views,)),
        ("loss_length", "<u4"),
        *((name, "<u4") for name in QUESTION_COLUMNS),
    ]
    return np.dtype(INDEX_DTYPE.descr + lengths)


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
    """Where a sample and its array members are: columns of its index row, as plain values."""

    offset: int
    num_bytes: int
    crc32: int
    json_bytes: int
    spans_bytes: int
    tokens_bytes: int
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
    placeholder: int = -1,
    bos: bool = True,
) -> np.ndarray:
    """Makes the row of a sample that has just been written.

    Args:
      sample: The sample.
      place: Its bytes in the tar.
      json_bytes: Length of its record.
      image_sizes: Lengths of its encoded images.
      views: The recipe's views, for the lengths of sequences.
      placeholder: Id of <|image|>, which an image block replaces.
      bos: Whether sequences begin with BOS.

    Returns:
      index_dtype(len(views)) [1].
    """
    row = np.zeros(1, dtype=index_dtype(len(views)))
    pictures = image_rows(sample.spans)
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
    if views:
        text, loss = longest_sequence(sample.tokens, sample.spans, placeholder=placeholder, bos=bos)
        row["loss_length"] = loss
        row["num_branches"], row["num_turns"] = count_questions(sample.spans)
        sizes = [(int(p[2]), int(p[3])) for p in pictures]
        for v, view in enumerate(views):
            image_tokens = sum(num_image_tokens(*size, view) for size in sizes)
            row["view_length"][0, v] = text + image_tokens
            row["view_crops"][0, v] = sum(num_crops(*size, view) for size in sizes)
    return row


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
      in Molmo 2 trees; Molmo 1 trees keep one more EOS per branch after the first.
    """
    positions: dict[tuple[int, int], int] = {}
    loss: dict[tuple[int, int], int] = {}
    for _, branch, turn, prompt_start, prompt_stop, start, stop, _ in text_rows(spans).tolist():
        at = (branch, turn)
        marks = np.count_nonzero(tokens[prompt_start:prompt_stop] == placeholder)
        length = prompt_stop - prompt_start + stop - start - int(marks)
        positions[at] = max(positions.get(at, 0), length)
        loss[at] = max(loss.get(at, 0), stop - start + 1)
    branches = len({branch for branch, _ in positions})
    leads = sum(stop - start for _, _, start, stop, *_ in lead_rows(spans).tolist())
    inner_eos = len(positions) - branches
    return bos + leads + sum(positions.values()) + inner_eos, sum(loss.values())


def count_questions(spans: np.ndarray) -> tuple[int, int]:
    """Counts the conversations of a sample, and the exchanges of all of them.

    Args:
      spans: int32 [S, 8].
    """
    # The variants of an exchange are adjacent, and so are the exchanges of a conversation.
    exchanges = text_rows(spans)[:, 1:3]
    if not len(exchanges):
        return 0, 0
    begins = np.any(exchanges[1:] != exchanges[:-1], axis=1)
    return 1 + int(np.count_nonzero(np.diff(exchanges[:, 0]))), 1 + int(np.count_nonzero(begins))


def longest_text(spans: np.ndarray) -> tuple[int, int]:
    """Counts the text tokens of a sample when every turn draws its longest variant.

    Returns:
      (tokens, response tokens), without BOS, EOS and image tokens.
    """
    rows = text_rows(spans)
    longest: dict[tuple[int, int], tuple[int, int]] = {}
    for _, branch, turn, prompt_start, prompt_stop, start, stop, _ in rows.tolist():
        response = stop - start
        total = prompt_stop - prompt_start + response
        old = longest.get((branch, turn), (0, 0))
        longest[branch, turn] = max(old, (total, response))
    return sum(n for n, _ in longest.values()), sum(n for _, n in longest.values())


def sample_places(rows: np.ndarray) -> np.ndarray:
    """Views the columns of `SamplePlace`, so that a row is one `.item()` (1 µs).

    Args:
      rows: Of an index; for a raw dataset, only the columns that it has are kept.
    """
    # A plain array: rows of a memmap are memmaps again, at 2 µs each.
    columns = [name for name in SamplePlace._fields if name in (rows.dtype.names or ())]
    places: np.ndarray = np.asarray(rows)[columns]
    return places


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
    """Memory-maps an index and checks that it fits its shard.

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
    try:
        with open(path, "rb") as stream:
            payload = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise ShardError("index_missing.stored", where=path) from error
    except (ValueError, OSError) as error:  # an empty file cannot be mapped
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise  # limits of the system: the index may be sound
        raise _broken(path, "index_format", {"error": error}) from error
    return parse_index(
        memoryview(payload),
        where=path,
        num_samples=num_samples,
        shard_bytes=shard_bytes,
        raw=raw,
        sha256=sha256,
    )


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
    known = set(rows.dtype.names or ())
    wrong = [
        name
        for name in (RAW_COLUMNS if raw else INDEX_DTYPE.names or ())
        if name not in known or rows.dtype[name] != INDEX_DTYPE[name]
    ]
    if raw and ("key" not in known or rows.dtype["key"].kind != "S"):
        wrong.append("key")
    if rows.ndim != 1 or wrong:
        raise _broken(where, "index_format", {"ndim": rows.ndim, "wrong_columns": wrong})
    if len(rows) != num_samples:
        raise _broken(where, "index_count", {"got_rows": len(rows), "want_rows": num_samples})
    if len(rows):
        end = int(rows[-1]["offset"]) + int(rows[-1]["num_bytes"])
        if end > shard_bytes:
            raise _broken(where, "index_range", {"last_byte": end, "shard_bytes": shard_bytes})
    return rows


def parse_rows(payload: memoryview) -> np.ndarray:
    """Reads the array of a .npy file from memory; it is a view of the payload.

    Raises:
      ValueError: The header cannot be read, or the array does not end where the file does.
    """
    stream = io.BytesIO(payload[:_MOST_HEADER_BYTES])
    try:
        version = np.lib.format.read_magic(stream)  # type: ignore[no-untyped-call]
        with _one_header.lock:
            if version == (1, 0):
                shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
            else:
                shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
        start = stream.tell()
        # A damaged header length would shift every row, so the rows must end where the file does.
        if dtype.hasobject or len(payload) != start + dtype.itemsize * math.prod(shape):
            raise ValueError(f"{len(payload)} bytes do not hold {shape} of {dtype}")
        if len(payload) == start:  # NumPy makes no array of an empty buffer
            return np.zeros(shape, dtype)
        rows: np.ndarray = np.frombuffer(payload[start:], dtype).reshape(shape)
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
    return rows


def _broken(path: str, reason: str, facts: dict[str, object]) -> ShardError:
    return ShardError(reason, where=path, facts=facts)
