"""One sample: its arrays and images in memory, and the members that hold them in a tar.

A sample `<key>` is a run of adjacent tar members, always in this order:

    <key>.json          metadata and text, for people and for tools; the training path skips it
    <key>.spans.npy     int32 [S, 8], the table below
    <key>.tokens.npy    int32 [T], every distinct token run of the sample, end to end
    <key>.jpg           the image; `<key>.0.jpg`, `<key>.1.jpg` ... where a dataset has several
                        (.png, .webp, or .image.npy for uncompressed uint8 [H, W, 3]); the frames of
                        a video are images, one after the other
    <key>.overview.jpg  where the dataset's views tile: the image at the size of a crop, directly
                        after it; `<key>.0.overview.jpg` where a dataset has several
    <key>.0.frames.npy  of a video that is stored as a clip: int64 [R, 4], where its frames are
                        (`shardspec.video.reader.VideoReader.table`) and the checksums of its parts;
                        `<key>.1.frames.npy` ...
    <key>.0.mp4         after all tables: the file of the clip; .video where it is no copy into MP4;
                        `<key>.1.mp4` ...

What is before the first file of a clip is the *head* of a sample: it can be read and verified
without the files, of which then no more is read than an example needs. Samples whose head has no
checksum in the index have each file directly after its table.

A row of `spans` is one of nine kinds (column 0):

    TEXT   (0, branch, turn, prompt_start, prompt_stop, response_start, response_stop, weight)
    LEAD   (2, image, start, stop, first_start, first_stop, time_ms, chosen)
    VIDEO  (4, video, first_image, num_images, table_bytes, file_bytes, most_frames, place)
    SUBTITLE (5, video, start, stop, begin_ms, end_ms, 0, 0)
    WINDOW (6, window, image, image, image, image, image, image)
    POINTS (7, image, geometry, notation, digits_start, 0, 0, 0)
    POINT  (8, list, x_start, x_stop, y_start, y_stop, x, y)
    OVERVIEW (3, image, width, height, num_bytes, 0, 0, 0)
    IMAGE  (1, image, source_width, source_height, stored_width, stored_height, num_bytes, geometry)

TEXT rows that share (branch, turn) are the *baked variants* of one exchange: the loader draws one
of them, each equally likely. Starts and stops index `tokens`; variants share runs, so a caption
that answers eight prompts is stored once. A *branch* is one conversation about the sample's
images. The weight is the loss weight of the response in millionths; one of 0 is context alone. The
response of a question without an answer, which is the last of its branch, has no tokens. LEAD rows
name the tokens before an image, such as "Image 2"; there is one per image, or none. VIDEO rows
say which images are the frames of a video, and as `place` which placeholder of the texts stands for
the video, from 1; the other ones stand for the images that are not frames. It is 0 where texts have
none. The LEAD row of a frame names its time as tokens, as they are after another frame and as they
are before the first, and in milliseconds; columns 4 to 7 are 0 for other images. SUBTITLE rows
are tokens among the frames of a video: before the first frame that is shown later than they begin,
or after the last one.

WINDOW rows say that the branches are alternatives, the *windows* of the sample: an example has one
branch, each equally likely, and of the images those that its window names, in that order, perhaps
repeatedly; -1 is none, and a window of more images has further rows. All windows have equally many
images, of the same source sizes, so there are as many LEAD rows as a window has images.

A clip has all its frames as images, without members of their own and `num_bytes` 0: they are in its
file. `chosen` is 1 for those that the recipe chooses, `most_frames` is their number: an example has
no more. Both are 0 where frames are stored. A video whose frames a text names has `chosen` 2 for
all of them, in either way to store: an example has each of them, and no other.

POINTS and POINT rows, of recipes that want them, say where coordinates are in the texts: a list of
points of an image, and its points (`shardspec.coordinates`). An image of such a sample has a list,
if an empty one, and allows what its `geometry` says as long as the texts follow.

OVERVIEW rows describe the overviews that are stored. Rows are sorted: TEXT (by branch and turn),
LEAD, VIDEO, SUBTITLE (by video and beginning), WINDOW (by window), POINTS, POINT (by list, as
written), OVERVIEW, IMAGE.

The arrays are stored as .npy version 1.0 with a header of exactly 128 bytes, so that a reader finds
the numbers without parsing (`ARRAY_HEADER_BYTES`); every reader of .npy files reads them too.
"""

from __future__ import annotations

import enum
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np

from shardspec.coordinates import PointList, PointRow
from shardspec.errors import ShardError

ARRAY_HEADER_BYTES = 128
"""Length of the .npy header of every array member (format: numpy.lib.format, version 1.0)."""

KEY_PATTERN = re.compile(r"[a-z0-9_-]{1,60}")
"""Valid keys: no dot (readers split names there), no upper case, short enough for ustar."""

SPAN_COLUMNS = 8
_WINDOW_IMAGES = SPAN_COLUMNS - 2
"""Images that a WINDOW row has room for."""
WEIGHT_ONE = 1_000_000
"""The loss weight 1.0 in the units of the spans table."""

Member = TypeVar("Member")

Codec = Literal["jpeg", "png", "webp", "raw", "lossless"]
"""How images are stored. "lossless" is whichever of png and webp is smaller, image by image: the
name of the member, and the first bytes of the file, tell which."""
CODEC_SUFFIX: Mapping[str, str] = {
    "jpeg": "jpg",
    "png": "png",
    "webp": "webp",
    "raw": "image.npy",
    "features": "features.npy",
}
"""Endings of members; "features" are no pictures, but what a backbone made of them
(`shardspec.features`)."""
LOSSLESS_CODECS = frozenset({"png", "webp", "raw", "lossless"})
"""webp is always written lossless here; lossy images are JPEG, which decodes 3.5 x faster."""


_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class SpanKind(enum.IntEnum):
    """What a row of the spans table describes."""

    TEXT = 0
    IMAGE = 1
    LEAD = 2
    OVERVIEW = 3
    VIDEO = 4
    SUBTITLE = 5
    WINDOW = 6
    POINTS = 7
    POINT = 8


ALL_SHOWN = 2
"""What `chosen` is for the frames of a video of which an example has all."""


class Geometry(enum.IntFlag):
    """Augmentations that keep a sample's text true; stored per image by the formatter."""

    NONE = 0
    FLIP = 1
    """A horizontal flip: the sample has no text in the image, pointing or left/right."""
    CROP = 2
    """A free crop: the text does not depend on the borders of the picture."""
    COLOR = 4
    """Brightness, contrast, saturation and hue may change."""
    ALL = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedImage:
    """One image of a prepared sample: upright, sRGB, at its stored size."""

    pixels: np.ndarray | None
    """uint8 [H, W, 3], C-contiguous; None where only the file was wanted, which is the source's."""
    source_width: int
    """Width of the upright original, in pixels: tiling is chosen by the original's shape."""
    source_height: int
    """Height of the upright original, in pixels."""
    geometry: Geometry = Geometry.NONE
    kept: bytes | None = None
    """The original file where it can be stored unchanged; it decodes to `pixels`."""
    overview: np.ndarray | None = None
    """uint8 [h, w, 3], the original at the size of a view's overview; None where none is stored."""

    def require_pixels(self) -> np.ndarray:
        """Gives the pixels of an image that was not prepared for storing alone."""
        assert self.pixels is not None
        return self.pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedClip:
    """A video of a prepared sample that is stored as it is, in part or as a whole."""

    table: np.ndarray
    """int64 [R, 4], where the frames are."""
    file: bytes
    suffix: str
    """Of the member, such as "mp4"."""
    num_frames: int
    chosen: tuple[int, ...]
    """Frames that the recipe chooses, counted from the clip's first, ascending."""
    width: int
    """Of a decoded frame, upright, in pixels."""
    height: int
    source_width: int
    """Of a frame with square pixels."""
    source_height: int
    geometry: Geometry = Geometry.NONE


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedSample:
    """One sample after the offline half: what a shard stores, and what `assemble` takes."""

    key: str
    tokens: np.ndarray
    """int32 [T]."""
    spans: np.ndarray
    """int32 [S, 8], the table of the module docstring (num_bytes is 0 until stored)."""
    images: tuple[PreparedImage, ...] = ()
    """Those that have members of their own: not the frames of clips, which come after them."""
    clips: tuple[PreparedClip, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)
    """Metadata and text in plain JSON types: `key`, `message_list`, `metadata`."""


def text_rows(spans: np.ndarray) -> np.ndarray:
    """Selects the TEXT rows of a spans table, as a view: int32 [N, 8]."""
    return spans[: np.count_nonzero(spans[:, 0] == SpanKind.TEXT.value)]


def lead_rows(spans: np.ndarray) -> np.ndarray:
    """Selects the LEAD rows of a spans table, as a view: int32 [M or 0, 8]."""
    start = len(text_rows(spans))
    return spans[start : start + np.count_nonzero(spans[:, 0] == SpanKind.LEAD.value)]


def video_rows(spans: np.ndarray) -> np.ndarray:
    """Selects the VIDEO rows of a spans table, as a view: int32 [videos, 8]."""
    start = len(text_rows(spans)) + len(lead_rows(spans))
    return spans[start : start + np.count_nonzero(spans[:, 0] == SpanKind.VIDEO.value)]


def video_units(videos: Sequence[Sequence[int]], num_images: int) -> list[Sequence[int]]:
    """Lists the images that are not frames, and the videos, in the order of the sequence.

    Args:
      videos: VIDEO rows, one or more.
      num_images: Of the sample.

    Returns:
      VIDEO rows, and (IMAGE, 0, number, 1) for an image.
    """
    frames = {i for _, _, first, count, *_ in videos for i in range(first, first + count)}
    units: list[Sequence[int]] = [
        (SpanKind.IMAGE.value, 0, i, 1) for i in range(num_images) if i not in frames
    ]
    if not videos[0][7]:
        return sorted([*units, *videos], key=lambda unit: unit[2])
    for row in sorted(videos, key=lambda row: row[7]):
        units.insert(row[7] - 1, row)
    return units


def subtitle_rows(spans: np.ndarray) -> np.ndarray:
    """Selects the SUBTITLE rows of a spans table: int32 [runs, 8]."""
    rows: np.ndarray = spans[spans[:, 0] == SpanKind.SUBTITLE.value]
    return rows


def point_lists(spans: np.ndarray) -> list[PointList]:
    """Reads the POINTS and POINT rows of a spans table; [] where there are none."""
    kinds = spans[:, 0]
    if not np.any(kinds == SpanKind.POINTS.value):
        return []
    heads = spans[kinds == SpanKind.POINTS.value, 1:5].tolist()
    points: list[list[PointRow]] = [[] for _ in heads]
    for number, *row in spans[kinds == SpanKind.POINT.value, 1:].tolist():
        points[number].append(PointRow(*row))
    return [PointList._make((*head, own)) for head, own in zip(heads, points, strict=True)]


def clip_rows(spans: np.ndarray) -> np.ndarray:
    """Selects the VIDEO rows of clips: int32 [clips, 8]."""
    rows = video_rows(spans)
    return rows[rows[:, 4] > 0]


def clip_sizes(spans: np.ndarray, *, tables_first: bool) -> list[int]:
    """Lists the lengths of the members of clips in their order: tables and files.

    Args:
      spans: int32 [S, 8].
      tables_first: Whether all tables come first, or each file directly after its table.
    """
    sizes = clip_rows(spans)[:, 4:6]
    found: list[int] = (sizes.T if tables_first else sizes).flatten().tolist()
    return found


def clip_pairs(members: Sequence[Member], *, tables_first: bool) -> list[tuple[Member, Member]]:
    """Finds the table and the file of each clip among their members.

    Args:
      members: In their order, each in any form.
      tables_first: As for `clip_sizes`.

    >>> clip_pairs(["0.frames.npy", "1.frames.npy", "0.mp4", "1.mp4"], tables_first=True)
    [('0.frames.npy', '0.mp4'), ('1.frames.npy', '1.mp4')]
    """
    half = len(members) // 2
    tables, files = members[::2], members[1::2]
    if tables_first:
        tables, files = members[:half], members[half:]
    return list(zip(tables, files, strict=True))


def num_stored_images(spans: np.ndarray) -> int:
    """Counts the images that have members: all but the frames of clips, which come last."""
    return num_images(spans) - int(clip_rows(spans)[:, 3].sum())


def window_images(spans: np.ndarray) -> list[list[int]]:
    """Lists the images of each window of a sample; [] where it has no windows."""
    found: dict[int, list[int]] = {}
    for _, window, *images in spans[spans[:, 0] == SpanKind.WINDOW.value].tolist():
        found.setdefault(window, []).extend(image for image in images if image >= 0)
    return list(found.values())


def overview_rows(spans: np.ndarray) -> np.ndarray:
    """Selects the OVERVIEW rows of a spans table, as a view: int32 [images or fewer, 8]."""
    stop = len(spans) - num_images(spans)
    return spans[stop - np.count_nonzero(spans[:, 0] == SpanKind.OVERVIEW.value) : stop]


def image_rows(spans: np.ndarray) -> np.ndarray:
    """Selects the IMAGE rows of a spans table, as a view: int32 [M, 8]."""
    return spans[len(spans) - num_images(spans) :]


def num_images(spans: np.ndarray) -> int:
    """Counts the images of a spans table."""
    # A plain integer: NumPy takes 2 µs to convert a member of an enum.
    return int(np.count_nonzero(spans[:, 0] == SpanKind.IMAGE.value))


def codec_of(payload: bytes | memoryview, codec: Codec) -> Codec:
    """Gives the codec of one stored image: that of the dataset, or which of the lossless ones."""
    if codec != "lossless":
        return codec
    return "png" if payload[:8] == _PNG_SIGNATURE else "webp"


def image_suffix(codec: str, *, image: int, several: bool, overview: bool = False) -> str:
    """Names the member of an image or of its overview, without the key.

    >>> image_suffix("jpeg", image=0, several=False), image_suffix("raw", image=1, several=True)
    ('jpg', '1.image.npy')
    >>> image_suffix("png", image=0, several=True, overview=True)
    '0.overview.png'
    """
    suffix = f"overview.{CODEC_SUFFIX[codec]}" if overview else CODEC_SUFFIX[codec]
    return f"{image}.{suffix}" if several else suffix


def encode_array(array: np.ndarray) -> bytes:
    """Serialises an array as .npy with a 128-byte header.

    Raises:
      ValueError: Too many dimensions for a header of that length (never with ours).
    """
    array = np.ascontiguousarray(array)
    return _array_header(array.dtype.str, array.shape) + array.tobytes()


@functools.lru_cache(maxsize=1 << 14)
def _array_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    # The repr of a tuple is what the format requires: (3,) with the comma, (3, 8) without.
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}"
    room = ARRAY_HEADER_BYTES - 11
    if len(header) > room:
        raise ValueError(f"array of shape {shape} does not fit a 128-byte .npy header")
    text = header.ljust(room) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin1")


@functools.lru_cache(maxsize=1 << 14)
def _array_member(
    dtype: str, columns: int | tuple[int, ...] | None, num_bytes: int
) -> tuple[np.dtype, tuple[int, ...], bytes, int]:
    """Returns what a member of `num_bytes` contains: (type, shape, header, bytes left over)."""
    kind = np.dtype(dtype)
    body_bytes = max(0, num_bytes - ARRAY_HEADER_BYTES)
    row = (columns,) if isinstance(columns, int) else columns or ()
    num_rows, rest = divmod(body_bytes, kind.itemsize * math.prod(row))
    shape = (num_rows, *row)
    return kind, shape, _array_header(dtype, shape), rest


def decode_array(
    payload: bytes | memoryview,
    *,
    dtype: str,
    columns: int | tuple[int, ...] | None = None,
    where: str = "",
) -> np.ndarray:
    """Views the payload of an array member without copying.

    Args:
      payload: The whole member.
      dtype: NumPy type string the member must have, such as "<i4".
      columns: Length of the second axis, or of all axes after the first; None for one axis.
      where: Named in the error.

    Raises:
      ShardError: `array_size` (not a whole number of rows), `array_header` (not the header that
        `encode_array` makes for that type and number of rows).
    """
    kind, shape, header, rest = _array_member(dtype, columns, len(payload))
    if rest:
        raise ShardError(
            "array_size", where=where, got_bytes=len(payload) - ARRAY_HEADER_BYTES, rest_bytes=rest
        )
    start = bytes(payload[:ARRAY_HEADER_BYTES])  # memoryviews are compared byte by byte
    if start != header:
        raise ShardError(
            "array_header",
            where=where,
            want_dtype=dtype,
            want_rows=shape[0],
            got=start[10:].rstrip(),
        )
    array: np.ndarray = np.ndarray(shape, kind, payload, ARRAY_HEADER_BYTES)
    return array


def encode_record(record: Mapping[str, Any]) -> bytes:
    """Serialises the record canonically: sorted keys, UTF-8, no spaces, one final newline."""
    text = json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return text.encode() + b"\n"


def sample_members(
    sample: PreparedSample,
    encoded: Sequence[bytes],
    *,
    overviews: Sequence[bytes] = (),
    codec: Codec,
    several: bool,
) -> list[tuple[str, bytes]]:
    """Lays out a sample as tar members, in the contract's order.

    Args:
      sample: What to store; the byte counts of its images and overviews are filled in here.
      encoded: Its images, encoded.
      overviews: Their overviews, encoded: one per OVERVIEW row.
      codec: Of the images.
      several: Whether the dataset's samples may have several images; their names get numbers.

    Returns:
      (member name, payload), json first.
    """
    spans = sample.spans.copy()
    image_rows(spans)[: num_stored_images(spans), 6] = [len(payload) for payload in encoded]
    overview_rows(spans)[:, 4] = [len(payload) for payload in overviews]
    overview_of = dict(zip(overview_rows(spans)[:, 1].tolist(), overviews, strict=True))
    members = [
        ("json", encode_record(sample.record)),
        ("spans.npy", encode_array(spans)),
        ("tokens.npy", encode_array(sample.tokens)),
    ]
    for i, payload in enumerate(encoded):
        own = codec_of(payload, codec)
        members.append((image_suffix(own, image=i, several=several), payload))
        if i in overview_of:
            own = codec_of(overview_of[i], codec)
            suffix = image_suffix(own, image=i, several=several, overview=True)
            members.append((suffix, overview_of[i]))
    files: list[tuple[str, bytes]] = []
    for (_, video, *_), clip in zip(clip_rows(spans).tolist(), sample.clips, strict=True):
        members.append((f"{video}.frames.npy", encode_array(clip.table)))
        files.append((f"{video}.{clip.suffix}", clip.file))
    members += files
    return [(f"{sample.key}.{suffix}", payload) for suffix, payload in members]


def spans_table(
    texts: Sequence[tuple[int, int, int, int, int, int, int]],
    images: Sequence[PreparedImage],
    *,
    leads: Sequence[tuple[int, ...]] = (),
    videos: Sequence[tuple[int, int, int]] = (),
    subtitles: Sequence[tuple[int, int, int, int, int]] = (),
    clips: Sequence[PreparedClip] = (),
    windows: Sequence[Sequence[int]] = (),
    points: Sequence[PointList] = (),
    named: int = 0,
) -> np.ndarray:
    """Builds the spans table of a sample.

    Args:
      texts: (branch, turn, prompt_start, prompt_stop, response_start, response_stop, weight).
      images: In order; their num_bytes stays 0 until the codec has run.
      leads: (start, stop) of the tokens before each image, or (); for a frame also the tokens where
        it is the first of its video, and its time in ms.
      videos: (first image, number of images, place) of each video; frames come after all other
        images.
      subtitles: (video, start, stop, begin_ms, end_ms) of each run of them, in their order.
      clips: Where videos are stored themselves: each of `videos`.
      windows: Where branches are alternatives: the images of each.
      points: The lists of points of the texts.
      named: Videos, from the first, whose frames the texts name.

    Returns:
      int32 [S, 8].
    """
    rows = [(int(SpanKind.TEXT), *text) for text in texts]
    stored = [(0, 0, 0)] * len(videos)
    in_clips: list[tuple[int, ...]] = []
    chosen: dict[int, int] = {}
    for v, clip in enumerate(clips):
        table_bytes = ARRAY_HEADER_BYTES + clip.table.nbytes
        stored[v] = (table_bytes, len(clip.file), len(clip.chosen))
        chosen |= {videos[v][0] + number: 1 for number in clip.chosen}
        sizes = (clip.source_width, clip.source_height, clip.width, clip.height)
        in_clips += [(*sizes, 0, int(clip.geometry))] * clip.num_frames
    for first, count, _ in videos[:named]:
        chosen |= dict.fromkeys(range(first, first + count), ALL_SHOWN)
    for i, lead in enumerate(leads):
        padding = [0] * (5 - len(lead))
        rows.append((int(SpanKind.LEAD), i, *lead, *padding, chosen.get(i, 0)))  # type: ignore[arg-type]
    for v, (first, count, place) in enumerate(videos):
        rows.append((int(SpanKind.VIDEO), v, first, count, *stored[v], place))
    rows += [(int(SpanKind.SUBTITLE), *subtitle, 0, 0) for subtitle in subtitles]
    for w, shown in enumerate(windows):
        for start in range(0, len(shown), _WINDOW_IMAGES):
            part = [*shown[start : start + _WINDOW_IMAGES], *[-1] * _WINDOW_IMAGES]
            rows.append((int(SpanKind.WINDOW), w, *part[:_WINDOW_IMAGES]))  # type: ignore[arg-type]
    rows += [(int(SpanKind.POINTS), *each[:4], 0, 0, 0) for each in points]
    rows += [(int(SpanKind.POINT), n, *row) for n, each in enumerate(points) for row in each.points]
    for i, image in enumerate(images):
        if image.overview is not None:
            height, width = image.overview.shape[:2]
            rows.append((int(SpanKind.OVERVIEW), i, width, height, 0, 0, 0, 0))
    for i, image in enumerate(images):
        source = (image.source_width, image.source_height)
        width, height = source if image.pixels is None else image.pixels.shape[1::-1]
        rows.append((int(SpanKind.IMAGE), i, *source, width, height, 0, int(image.geometry)))
    rows += [(int(SpanKind.IMAGE), i, *row) for i, row in enumerate(in_clips, len(images))]  # type: ignore[misc]
    return np.array(rows, dtype="<i4").reshape(-1, SPAN_COLUMNS)
