"""A clip as it is stored: the packets of its video in a file of its own, and a table of them.

`store_clip` copies packets into MP4 and decodes nothing anew: from the last key frame at which
decoding gives the clip's first frame rightly, to the last packet that a frame of the clip needs.
What the file becomes is one of three (`stored` of its facts):

    "cut"    begins at a key frame of the video
    "whole"  begins at the video's first packet: no later key frame gives the same frames, or the
             clip begins there anyway
    "file"   the bytes of the file itself: packets do not name its frames (MPEG-TS, AVI, GIF ...),
             or it is damaged; frames are found by decoding from the beginning

A copy is taken only if it has the packets of the video with timestamps that differ by a constant,
if all its frames can be decoded, and if those around its beginning and those that were chosen are
those of the video, bit for bit. The table (`VideoReader.table`) says which of its frames are the
clip's: others before them are needed for decoding alone.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from shardspec.errors import SampleError
from shardspec.sample import decode_array, encode_array
from shardspec.video.extract import Chosen, Request, choose
from shardspec.video.parts import MissingPartError, PartedFile, file_parts
from shardspec.video.reader import MissingFrameError, VideoReader, import_av

TABLE_COLUMNS = 4

_COMPARED = 48
"""Frames from the beginning of a clip that are compared with those of the video."""

_STARTS = 3
"""Key frames that are tried, from the clip's first frame backwards."""

_MUXER = {"fflags": "+bitexact", "use_editlist": "0"}
"""Neither the muxer's name and the date, nor a list of edits: the table says what is shown."""


def encode_table(table: np.ndarray) -> bytes:
    """Serialises the table of a clip as .npy."""
    return encode_array(table)


def decode_table(payload: bytes | memoryview, *, where: str = "") -> np.ndarray:
    """Reads the table of a clip: int64 [rows, 4].

    Raises:
      ShardError: As `decode_array`.
    """
    return decode_array(payload, dtype="<i8", columns=TABLE_COLUMNS, where=where)


def read_clip(
    source: bytes,
    *,
    table_bytes: int,
    numbers: list[int],
    where: str,
    parts: list[list[int]] | None = None,
) -> Iterator[dict[str, Any] | np.ndarray]:
    """Decodes frames of a stored clip: uint8 [H, W, 3] each.

    Args:
      source: Its encoded table, and its file.
      table_bytes: Length of the table.
      numbers: Of the frames, counted from the clip's first, strictly ascending.
      where: Named in errors.
      parts: (start, stop, ...) of the parts of the file that there are; None: all of it.

    Yields:
      The frames; a dict at last where other parts are needed.

    Raises:
      SampleError: As `VideoReader`; `video_stream`, it has other frames than its table says.
    """
    table = decode_table(source[:table_bytes], where=where)
    file: bytes | PartedFile = source[table_bytes:]
    if parts is not None:
        file = PartedFile(source[table_bytes:], parts, file_parts(table)[-1].stop)
    try:
        with VideoReader(file, where=where, table=table) as reader:
            try:
                for pixels in reader.read(numbers):
                    if isinstance(file, PartedFile) and file.is_incomplete:
                        break  # a library may take the error for an end
                    yield pixels
            except MissingFrameError as error:
                raise SampleError("video_stream.changed", where=where) from error
    except (SampleError, MissingPartError):
        if not (isinstance(file, PartedFile) and file.is_incomplete):
            raise
    if isinstance(file, PartedFile) and file.is_incomplete:
        yield {"incomplete": True}


def store_clip(
    source: Path | bytes, request: Request, *, where: str
) -> Iterator[dict[str, Any] | np.ndarray]:
    """Makes the clip that is stored of a video.

    Yields:
      A dict: `info` of the video; `times` of all frames of the clip, in seconds from its beginning;
      `numbers` of those that the request chooses, counted from the clip's first; `first`, the
      number of that one in the video; `stored`; `size`, the stored width and height, upright. Then
      the table, int64, and the file, uint8.

    Raises:
      SampleError: As `VideoReader` and `choose`; `video_clip`: it is longer than
        `request.max_bytes`.
    """
    with VideoReader(source, where=where, max_pixels=request.max_pixels) as reader:
        made = None
        if reader.access == "index" and not reader.info.damaged:
            try:
                chosen = choose(reader, request, where)
                made = _copied(reader, chosen)
            except MissingFrameError:
                made = None
        if made is None:
            if reader.access == "index":
                reader.rescan()
            chosen = choose(reader, request, where)
            file = source if isinstance(source, bytes) else source.read_bytes()
            made = "file", reader.table(_shown(chosen)), file
        stored, table, file = made
        if len(file) > request.max_bytes:
            raise SampleError(
                "video_clip.bytes", where=where, num_bytes=len(file), max_bytes=request.max_bytes
            )
        yield {
            "info": asdict(reader.info),
            "times": chosen.times_s.tolist(),
            "numbers": chosen.numbers.tolist(),
            "first": chosen.first,
            "stored": stored,
            "size": reader.upright_size,
        }
        yield table
        yield np.frombuffer(file, np.uint8)


def _shown(chosen: Chosen) -> range:
    return range(chosen.first, chosen.first + len(chosen.times_s))


def _copied(reader: VideoReader, chosen: Chosen) -> tuple[str, np.ndarray, bytes] | None:
    """Copies the packets of a clip; None where no copy gives the frames of the video."""
    shown, packets = _shown(chosen), reader.packets
    pts = {reader.pts[n] for n in shown}
    stop = 1 + max(i for i, packet in enumerate(packets) if packet[0] in pts)
    before = [i for i, (p, _, _, key) in enumerate(packets) if key and p <= reader.pts[shown[0]]]
    starts = before[: -_STARTS - 1 : -1] if before else []
    if 0 not in starts:
        starts.append(0)
    compared = sorted({*range(min(_COMPARED, len(shown))), *chosen.numbers.tolist()})
    for start in starts:
        file = _muxed(reader, start, stop)
        if file is None:
            return None
        table = _checked(file, reader, start, stop, pts=pts)
        if table is not None and _equal(file, table, reader, shown, compared):
            return ("cut" if start else "whole"), table, file
    return None


def _muxed(reader: VideoReader, start: int, stop: int) -> bytes | None:
    """Copies packets into MP4; None where that cannot hold them."""
    av = import_av()
    stream, packets = reader.demuxed()
    file = io.BytesIO()
    try:
        with av.open(file, "w", format="mp4", options=_MUXER) as container:
            out = container.add_stream_from_template(stream, opaque=True)
            out.time_base = stream.time_base
            for i, packet in enumerate(packets):
                if i >= stop:
                    break
                if i >= start:
                    packet.stream = out
                    container.mux(packet)
    except (av.error.FFmpegError, ValueError) as error:
        if isinstance(error, MemoryError):
            raise
        return None
    return file.getvalue()


def _checked(
    file: bytes, reader: VideoReader, start: int, stop: int, *, pts: set[int]
) -> np.ndarray | None:
    """Makes the table of a copy; None if it has other packets, or other distances in time."""
    try:
        copy = VideoReader(file, where=reader.where)
    except SampleError:
        return None
    with copy:
        own = reader.packets[start:stop]
        if copy.access != "index" or len(copy.packets) != len(own):
            return None
        # A key frame of the one is a key frame of the other: decoding begins at the same places.
        same = all(a[3] == b[3] for a, b in zip(copy.packets, own, strict=True))
        shifts = {
            a[0] * copy.time_base - b[0] * reader.time_base
            for a, b in zip(copy.packets, own, strict=True)
        }
        if not same or len(shifts) != 1:
            return None
        table = copy.table([])
        table[2:, 3] |= [2 * (packet[0] in pts) for packet in own]
        return table


def _equal(
    file: bytes, table: np.ndarray, reader: VideoReader, shown: range, compared: list[int]
) -> bool:
    """Compares some frames of a copy with the video's, and decodes all of them."""
    with VideoReader(file, where=reader.where, table=table) as copy:
        try:
            mine = copy.read(compared)
            theirs = reader.read([shown[n] for n in compared])
            for pixels in theirs:
                try:
                    if not np.array_equal(pixels, next(mine)):
                        return False
                except MissingFrameError:
                    return False
        except SampleError:
            return False
        return copy.decodes(range(len(shown)))
