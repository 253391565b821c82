"""StoredSample: the parts of one sample, found in its bytes by its row of the index.

The hot path reads three ranges per sample: no tar header is parsed, and no JSON.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from loader.assembly import Clip, Encoded
from loader.reading.open_shards import Shard
from loader.reading.parted import PartedFile
from shardspec.documents import read_object
from shardspec.errors import ShardError
from shardspec.media import decode_stored
from shardspec.sample import (
    SPAN_COLUMNS,
    Codec,
    Geometry,
    PreparedImage,
    PreparedSample,
    SpanKind,
    clip_pairs,
    clip_rows,
    clip_sizes,
    decode_array,
    image_rows,
)
from shardspec.tar import BLOCK, padded

# Plain integers: comparing with a member of an enum costs as much as all the rest of a row.
_IMAGE, _OVERVIEW = SpanKind.IMAGE.value, SpanKind.OVERVIEW.value
_VIDEO = SpanKind.VIDEO.value


@dataclass(slots=True)
class StoredSample:
    """One sample as it is stored in its shard."""

    key: str
    tokens: np.ndarray
    """int32 [T], read-only."""
    spans: np.ndarray
    """int32 [S, 8], read-only; see `shardspec.sample`."""
    pictures: list[Encoded]
    """Each image that has a member of its own; the frames of clips come after them."""
    clips: list[Clip]
    """The clips."""
    overviews: list[Encoded | None]
    """The overview of each image, None if none is stored."""
    where: str
    """Shard and key, for errors."""
    num_bytes: int
    """Length of its part of the shard."""
    record: memoryview
    """Its metadata and text, JSON; see `read_record`."""


def read_sample(
    members: memoryview,
    place: tuple[Any, ...],
    key: str,
    *,
    codec: Codec,
    where: str,
    shard: Shard | None = None,
) -> StoredSample:
    """Finds the parts of a sample in its bytes, without copying.

    Args:
      members: The sample's part of its shard, from its first header on.
      place: Its row of the index: the values of `SamplePlace` that its dataset has.
      key: Of the sample.
      codec: Of its pictures.
      where: Shard and key, for errors.
      shard: Where `members` are its head alone: what the files of its clips are read from.

    Raises:
      ShardError: As `decode_array`.
    """
    offset, num_bytes, _, json_bytes, spans_bytes, tokens_bytes, *head, _ = place
    spans_at = 2 * BLOCK + padded(json_bytes)
    tokens_at = spans_at + padded(spans_bytes) + BLOCK
    spans = decode_array(
        members[spans_at : spans_at + spans_bytes], dtype="<i4", columns=SPAN_COLUMNS, where=where
    )
    tokens = decode_array(members[tokens_at : tokens_at + tokens_bytes], dtype="<i4", where=where)
    kinds = spans[:, 0].tolist()
    num_images, num_overviews = kinds.count(_IMAGE), kinds.count(_OVERVIEW)
    pictures: list[Encoded] = []
    overviews: list[Encoded | None] = []
    clips: list[Clip] = []
    position = tokens_at + padded(tokens_bytes) + BLOCK
    in_clips = clip_rows(spans).tolist() if _VIDEO in kinds else []
    if num_images:
        rows = spans[len(kinds) - num_images - num_overviews :]
        rows = rows[: len(rows) - sum([row[3] for row in in_clips])].tolist()
        small = {row[1]: row for row in rows[:num_overviews]}
        for _, image, _, _, width, height, length, _ in rows[num_overviews:]:
            payload = members[position : position + length]
            pictures.append(Encoded(payload, width, height, codec=codec, where=where))
            position += padded(length) + BLOCK
            # The overview comes directly after its image.
            overview = None
            if image in small:
                _, _, width, height, length, *_ = small[image]
                payload = members[position : position + length]
                overview = Encoded(payload, width, height, codec=codec, where=where)
                position += padded(length) + BLOCK
            overviews.append(overview)
    if in_clips:
        tables_first = bool(head and head[0])
        places: list[slice] = []
        for length in clip_sizes(spans, tables_first=tables_first):
            places.append(slice(position, position + length))
            position += padded(length) + BLOCK
        pairs = clip_pairs(places, tables_first=tables_first)
        for (_, _, first, *_), (table, file) in zip(in_clips, pairs, strict=True):
            clip: memoryview | PartedFile = members[file]
            if shard is not None:
                clip = PartedFile(shard, offset + file.start, where=where)
            width, height = spans[len(kinds) - num_images + first, 4:6].tolist()
            clips.append(Clip(members[table], clip, width, height, first, where))
    record = members[BLOCK : BLOCK + json_bytes]
    return StoredSample(key, tokens, spans, pictures, clips, overviews, where, num_bytes, record)


def read_record(stored: StoredSample) -> dict[str, Any]:
    """Parses the metadata and the text of a stored sample.

    Raises:
      ShardError: `sample_json`.
    """
    try:
        return read_object(stored.record)
    except ValueError as error:
        raise ShardError("sample_json", where=stored.where, error=error) from error


def decode_sample(stored: StoredSample) -> PreparedSample:
    """Decodes the pictures of a stored sample; clips are left out.

    Raises:
      ShardError: `image_decode`.
    """
    images = []
    for picture, overview, row in zip(
        stored.pictures,
        stored.overviews,
        image_rows(stored.spans)[: len(stored.pictures)].tolist(),
        strict=True,
    ):
        images.append(
            PreparedImage(
                pixels=decode_stored(picture.payload, codec=picture.codec, where=picture.where),
                source_width=row[2],
                source_height=row[3],
                geometry=Geometry(row[7]),
                overview=None
                if overview is None
                else decode_stored(overview.payload, codec=overview.codec, where=overview.where),
            )
        )
    return PreparedSample(
        key=stored.key, tokens=stored.tokens, spans=stored.spans, images=tuple(images)
    )
