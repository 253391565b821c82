"""The side-car index of a shard: one fixed-width row per sample, memory-mapped by readers.

The file is a plain .npy of a structured array, so `np.load(path, mmap_mode="r")` opens it in
microseconds whatever its length. A row says where the sample's bytes are, how long each member is
and how much of a batch the sample will take; with it the training path parses neither tar nor
JSON. Readers look columns up by name: columns may be added, never renamed or given another
meaning.
"""

from __future__ import annotations

import io
import os
import tokenize
from dataclasses import dataclass

import numpy as np

from shardspec.errors import ShardError
from shardspec.sample import ARRAY_HEADER_BYTES, PreparedSample, image_rows, text_rows
from shardspec.tar import TarRange, payload_offsets

INDEX_DTYPE = np.dtype(
    [
        ("offset", "<u8"),  # of the sample's first header in the tar
        ("num_bytes", "<u4"),  # headers, payloads and padding of all members
        ("crc32", "<u4"),  # of those bytes
        ("json_bytes", "<u4"),  # payload lengths, in the order of the members
        ("spans_bytes", "<u4"),
        ("tokens_bytes", "<u4"),
        ("image_bytes", "<u4"),  # of the first image; further ones stand in the spans table
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


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleLayout:
    """Where the payloads of one sample start, counted from its first header."""

    json: int
    spans: int
    tokens: int
    image: int
    """Of the first image; one past the last array member when there is none."""


def index_row(
    sample: PreparedSample, *, place: TarRange, json_bytes: int, image_sizes: list[int]
) -> np.ndarray:
    """Makes the row of a sample that has just been written.

    Returns:
      INDEX_DTYPE [1].
    """
    row = np.zeros(1, dtype=INDEX_DTYPE)
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
    return row


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


def sample_layout(row: np.void) -> SampleLayout:
    """Computes the payload positions of the sample that a row describes."""
    sizes = [int(row["json_bytes"]), int(row["spans_bytes"]), int(row["tokens_bytes"])]
    starts = payload_offsets([*sizes, int(row["image_bytes"])])
    return SampleLayout(json=starts[0], spans=starts[1], tokens=starts[2], image=starts[3])


def encode_index(rows: np.ndarray) -> bytes:
    """Serialises index rows as .npy bytes; the same rows give the same bytes."""
    stream = io.BytesIO()
    np.save(stream, rows.astype(INDEX_DTYPE, copy=False), allow_pickle=False)
    return stream.getvalue()


def open_index(path: str, *, num_samples: int, shard_bytes: int) -> np.ndarray:
    """Memory-maps an index and checks that it fits its shard.

    Args:
      path: Local path of the .npy file.
      num_samples: Rows that the manifest promises.
      shard_bytes: Length of the tar.

    Returns:
      INDEX_DTYPE [num_samples], read-only.

    Raises:
      ShardError: `index_missing`, `index_format`, `index_count`, `index_range`.
    """
    try:
        rows = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError as error:
        raise ShardError(
            "index of a shard is missing",
            reason="index_missing",
            where=path,
            fix="run `make verify`, then build the shard again with `make shards`",
        ) from error
    except (ValueError, TypeError, OSError, SyntaxError, tokenize.TokenError) as error:
        # All of these come out of NumPy's header parser, depending on which byte is wrong.
        raise _broken(path, "index_format", {"error": error}) from error
    known = set(rows.dtype.names or ())
    wrong = [
        name
        for name in INDEX_DTYPE.names or ()
        if name not in known or rows.dtype[name] != INDEX_DTYPE[name]
    ]
    if rows.ndim != 1 or wrong:
        raise _broken(path, "index_format", {"ndim": rows.ndim, "wrong_columns": wrong})
    # A damaged header length would shift every row; the rows must end where the file does.
    got, want = os.path.getsize(path), rows.offset + rows.nbytes
    if got != want:
        raise _broken(path, "index_format", {"got_bytes": got, "want_bytes": want})
    if len(rows) != num_samples:
        raise _broken(path, "index_count", {"got_rows": len(rows), "want_rows": num_samples})
    if len(rows):
        end = int(rows[-1]["offset"]) + int(rows[-1]["num_bytes"])
        if end > shard_bytes:
            raise _broken(path, "index_range", {"last_byte": end, "shard_bytes": shard_bytes})
    checked: np.ndarray = rows
    return checked


def _broken(path: str, reason: str, facts: dict[str, object]) -> ShardError:
    return ShardError(
        "index does not fit its shard",
        reason=reason,
        where=path,
        facts=facts,
        fix="run `make verify`, then build the shard again with `make shards`",
    )
