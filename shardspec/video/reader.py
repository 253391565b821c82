"""A video file as frames with timestamps: exact, with PyAV (the libraries of FFmpeg).

1. *Open.* The first video stream that is not a cover picture; what cannot be decoded rightly is
   refused by name.
2. *Index.* In MP4, Matroska and WebM the packets say when each frame is shown, so nothing is
   decoded. Elsewhere (MPEG-TS, AVI, GIF ...), and where packets and frames turn out to differ, the
   whole file is decoded once to see which frames it has.
3. *Read.* Frames are named by their presentation timestamp. A reader goes to the key frame before
   the wanted one, decodes from there, and compares timestamps; without an index it decodes from
   the beginning and counts.

Times are seconds from the start of the file, as players show them. A frame that the decoder calls
damaged is not a frame of the video: it is left out and counted, as is all that cannot be decoded.
Runs in a process of its own (`worker`): a decoder may hang or die.
"""

# Shape letters: N frames of the video, H x W pixels.

from __future__ import annotations

import bisect
import io
import mmap
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from shardspec.errors import ConfigError, SampleError
from shardspec.video.parts import PartedFile

_INDEXED_CONTAINERS = frozenset({"mov", "mp4", "m4a", "matroska", "webm"})
_INDEXED_CODECS = frozenset({"h264", "hevc", "vp9", "av1", "libdav1d", "mpeg4"})
"""Containers and codecs of which a packet is a frame and says when it is shown."""

_HDR_TRANSFERS = {16: "PQ (SMPTE ST 2084)", 18: "HLG (ARIB STD-B67)"}
"""Transfer characteristics (ITU-T H.273, table 3) that look flat when shown as they are."""

_ENCRYPTED_TAGS = frozenset({"encv", "drmi"})

_MATRIX_ONE = 1 << 16

_SKIPPING_CODECS = frozenset({"h264", "hevc"})
"""Codecs that mark the pictures to which no other refers."""

_KEY, _SHOWN = 1, 2
_TABLE_COLUMNS = 4

_KEPT_FRAMES = 20
"""Frames that a decoder holds: 16 that others refer to, and those on their way."""

_SHORT_S, _SHORT_SHARE = 0.5, 0.02
"""A file that ends this much before its header says is taken for a truncated one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoInfo:
    """What a video file is, in plain JSON types."""

    container: str
    codec: str
    width: int
    """Of the upright picture with square pixels, in pixels."""
    height: int
    rotation: int
    """Degrees, clockwise, by which the stored picture is turned to be upright."""
    sample_aspect: tuple[int, int]
    """Width : height of a stored pixel, before the rotation."""
    transfer: int
    """Colour transfer characteristics (ITU-T H.273); 2 for unspecified."""
    interlaced: bool
    fps: float
    """Mean frames per second."""
    num_frames: int
    start_s: float
    """When the first frame is shown."""
    end_s: float
    """When the last frame ends."""
    variable_rate: bool
    """Whether frames differ in how long they are shown, by more than the clock's rounding."""
    has_audio: bool
    decoder: str
    """Who decodes it."""
    access: str
    """"index": frames are found by the packets' timestamps; "scan": by decoding everything."""
    damaged: int
    """Frames, at least, that are missing or damaged; 0 for a sound file."""


@dataclass(slots=True)
class _Frames:
    """The frames of a stream, in the order in which they are shown."""

    pts: list[int] = field(default_factory=list)
    key_pts: list[int] = field(default_factory=list)
    key_goals: list[int] = field(default_factory=list)
    """Another place to seek each key frame at: its decoding timestamp, if that is earlier."""
    kept: list[int] = field(default_factory=list)
    """Of a scan: the number, among all that are decoded, of each frame."""
    packets: list[tuple[int, int, int, int]] = field(default_factory=list)
    """Of an index: (pts, dts, bytes, 1 for a key frame) of every packet, in the file's order."""
    data_start: int = 0
    """Of an index: where the first packet is in the file; 0 where others do not follow directly."""
    last_duration: int = 0
    damaged: int = 0
    interlaced: bool = False


class _Unindexed(Exception):
    """Packets do not say which frames there are."""


class VideoReader:
    """One video file, opened for reading frames."""

    def __init__(
        self,
        source: Path | bytes | PartedFile,
        *,
        where: str = "",
        max_pixels: int = 1 << 26,
        table: np.ndarray | None = None,
    ) -> None:
        """Opens a file and finds its frames.

        Args:
          source: A local file, its bytes, or those of them that the frames to be read need.
          where: Named in errors.
          max_pixels: Larger pictures are refused.
          table: What `table` gave for this file: nothing is searched for then.

        Raises:
          SampleError: `video_open`, `video_stream`, `video_hdr`, `video_size`, `video_rotation`,
            `video_time`.
          ConfigError: `video_extra`, without PyAV.
        """
        self._av = import_av()
        self._source, self.where = source, where
        self._container, self._stream = self._open()
        try:
            self._turn: tuple[int, int, int, int] | None = None
            self._graph: tuple[Any, ...] | None = None
            self._skips = False
            self._check_stream(max_pixels)
            self.access = "index"
            if table is not None:
                self._use_table(table)
                return
            self._first_look()
            try:
                self._frames = self._index()
            except _Unindexed:
                self.rescan()
            else:
                self._require_frames()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the file."""
        self._container.close()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def times_N(self) -> np.ndarray:
        """When each frame is shown, float64 [N], in seconds, ascending."""
        base = self._time_base
        origin = self._origin
        times = np.array([float(pts * base - origin) for pts in self._frames.pts])
        return np.maximum.accumulate(times)

    @property
    def info(self) -> VideoInfo:
        """What the file is."""
        context, frames = self._stream.codec_context, self._frames
        times = self.times_N
        aspect = self._aspect
        width, height = shown_size(self._size, aspect, turned=self._swaps)
        last_s = float(frames.last_duration * self._time_base)
        steps = np.diff(np.array(frames.pts, np.int64))
        if not last_s and len(steps):
            last_s = float(np.median(steps) * self._time_base)
        end_s = float(times[-1]) + last_s
        span_s = end_s - float(times[0])
        return VideoInfo(
            container=self._container.format.name,
            codec=context.codec.canonical_name,
            width=width,
            height=height,
            rotation=_ROTATIONS.get(self._turn or _UPRIGHT, 0),
            sample_aspect=(aspect.numerator, aspect.denominator),
            transfer=self._transfer,
            interlaced=frames.interlaced or self._interlaced,
            fps=len(times) / span_s if span_s > 0 else 0.0,
            num_frames=len(times),
            start_s=float(times[0]),
            end_s=end_s,
            variable_rate=bool(len(steps)) and int(steps.max() - steps.min()) > _rounding(steps),
            has_audio=bool(self._container.streams.audio),
            decoder=f"PyAV {self._av.__version__}",
            access=self.access,
            damaged=frames.damaged,
        )

    @property
    def key_frames(self) -> list[int]:
        """Numbers of the frames at which decoding can begin; [] without an index."""
        number = {pts: i for i, pts in enumerate(self._frames.pts)}
        return [number[pts] for pts in self._frames.key_pts if pts in number]

    def table(self, shown: Sequence[int] | None = None) -> np.ndarray:
        """Describes where frames are, so that a reader of the same bytes need not search for them.

        Args:
          shown: Numbers of the frames that the reader with this table has; None for all.

        Returns:
          int64 [2 + packets, 4]: (numerator, denominator of the clock, 1 if frames are found by
          decoding everything, turn), (stored width, height, 1 if interlaced, where the first packet
          is in the file, or 0 where the packets have gaps), then a row for each packet in
          the file's order (pts, dts, bytes, 1 for a key frame + 2 if shown); where everything is
          decoded, a row for each frame that is shown (pts, number among all, 0, 2).
        """
        frames = self._frames
        wanted = range(len(frames.pts)) if shown is None else shown
        scanned = self.access == "scan"
        turn = 0 if self._turn is None else 1 + _TURNS.index(self._turn)
        rows = [(self._time_base.numerator, self._time_base.denominator, int(scanned), turn)]
        interlaced = int(frames.interlaced or self._interlaced)
        rows.append((*self._size, interlaced, frames.data_start))
        if scanned:
            rows += [(frames.pts[n], frames.kept[n], 0, _SHOWN) for n in wanted]
        else:
            pts = {frames.pts[n] for n in wanted}
            rows += [(p, d, size, key | _SHOWN * (p in pts)) for p, d, size, key in frames.packets]
        return np.array(rows, "<i8").reshape(-1, _TABLE_COLUMNS)

    def decodes(self, numbers: Sequence[int]) -> bool:
        """Returns True if all of some frames can be decoded; their pixels are not made."""
        try:
            return sum(1 for _ in self._read_indexed(numbers)) == len(numbers)
        except MissingFrameError:
            return False

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height of the frames that `read` gives."""
        width, height = self._size
        return (height, width) if self._swaps else (width, height)

    @property
    def packets(self) -> list[tuple[int, int, int, int]]:
        """(pts, dts, bytes, 1 for a key frame) of every packet, in the file's order."""
        return self._frames.packets

    @property
    def pts(self) -> list[int]:
        """Presentation timestamps of the frames, ascending, in units of `time_base`."""
        return self._frames.pts

    @property
    def time_base(self) -> Fraction:
        """Seconds of a unit of timestamps."""
        base: Fraction = self._time_base
        return base

    def demuxed(self) -> tuple[Any, Iterator[Any]]:
        """Gives the stream, and its packets from the beginning, in the order of `packets`."""
        self._reopen()
        found = self._container.demux(self._stream)
        return self._stream, (p for p in found if p.size and not p.is_corrupt)

    def read(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        """Decodes frames.

        Args:
          numbers: Of the frames, strictly ascending, each below `len(times_N)`.

        Yields:
          uint8 [H, W, 3], upright, in the stored pixels (`VideoInfo.sample_aspect`).

        Raises:
          MissingFrameError: The index names a frame that cannot be decoded. `rescan`, and choose
            again.
        """
        found = self._read_indexed(numbers) if self.access == "index" else self._read_scan(numbers)
        for frame in found:
            yield self._pixels(frame)

    def thumbnails(self, first: int, stop: int, side_px: int) -> Iterator[np.ndarray]:
        """Decodes frames and shrinks each, for measures of content: uint8 [side, side, 3].

        Raises:
          MissingFrameError: As `read`.
        """
        numbers = range(first, stop)
        found = self._read_indexed(numbers) if self.access == "index" else self._read_scan(numbers)
        for frame in found:
            small = frame.reformat(side_px, side_px, format="rgb24", interpolation="AREA")
            yield small.to_ndarray()

    def rescan(self) -> None:
        """Finds the frames by decoding the whole file."""
        declared = self._frames.damaged if hasattr(self, "_frames") else 0
        self.access = "scan"
        self._reopen()
        self._frames = self._scan()
        self._frames.damaged = max(self._frames.damaged, declared)
        self._require_frames()

    # Opening.

    def _use_table(self, table: np.ndarray) -> None:
        numerator, denominator, scanned, turn = table[0].tolist()
        if Fraction(numerator, denominator) != self._time_base:
            raise SampleError("video_stream.changed", where=self.where)
        *size, self._interlaced, _ = table[1].tolist()
        self._size = tuple(size)
        # Of a whole video no more is known than its packets say: frames are read from it in full.
        codec = self._stream.codec_context.codec.name
        self._skips = codec in _SKIPPING_CODECS and not self._interlaced
        self._turn = _TURNS[turn - 1] if turn else None
        self._frames = found = _Frames()
        rows = table[2:]
        shown = rows[rows[:, 3] & _SHOWN > 0]
        if scanned:
            self.access = "scan"
            found.pts, found.kept = shown[:, 0].tolist(), shown[:, 1].tolist()
            return
        found.pts = sorted(shown[:, 0].tolist())
        keys = rows[rows[:, 3] & _KEY > 0, :2]
        keys = keys[np.argsort(keys[:, 0], kind="stable")]
        found.key_pts, found.key_goals = keys[:, 0].tolist(), keys.min(axis=1).tolist()

    def _open(self) -> tuple[Any, Any]:
        av = self._av
        # MJPEG and others warn of what is no error; the process has no terminal to show it on.
        av.logging.set_level(av.logging.PANIC)
        source = self._source
        opened: Any = io.BytesIO(source) if isinstance(source, bytes) else str(source)
        if isinstance(source, PartedFile):
            source.seek(0)
            opened = source
        try:
            container = av.open(
                opened,
                metadata_errors="replace",
            )
        except FileNotFoundError as error:
            raise SampleError("video_open.missing", where=self.where) from error
        except (av.error.FFmpegError, OSError, ValueError) as error:
            _require_memory(error)
            raise SampleError("video_open.format", where=self.where, error=error) from error
        streams = [s for s in container.streams.video if not _is_cover(s)]
        if not streams:
            kinds = sorted({s.type for s in container.streams})
            container.close()
            raise SampleError("video_stream.none", where=self.where, streams=kinds)
        stream = streams[0]
        if stream.codec_context is None:
            container.close()
            raise SampleError("video_stream.codec", where=self.where, error="no decoder")
        stream.codec_context.thread_count = 1  # the job has a process for each core
        return container, stream

    def _reopen(self) -> None:
        self._container.close()
        self._container, self._stream = self._open()

    def _check_stream(self, max_pixels: int) -> None:
        context = self._stream.codec_context
        if context.codec_tag in _ENCRYPTED_TAGS:
            raise SampleError("video_stream.encrypted", where=self.where)
        self._require_size(context.width, context.height, max_pixels)
        self._max_pixels = max_pixels
        self._time_base = self._stream.time_base
        if not self._time_base:
            raise SampleError("video_time", where=self.where, error="no time base")
        start_s = Fraction(self._container.start_time or 0, self._av.time_base)
        own_s = (self._stream.start_time or 0) * self._time_base
        # The container's is rounded to microseconds.
        self._origin = own_s if abs(own_s - start_s) <= Fraction(2, self._av.time_base) else start_s
        self._aspect = self._stream.sample_aspect_ratio or Fraction(1)
        self._transfer = int(context.color_trc)
        self._interlaced = False
        self._size = context.width, context.height

    def _require_size(self, width: int, height: int, max_pixels: int) -> None:
        if width * height > max_pixels:
            raise SampleError(
                "video_size.pixels",
                where=self.where,
                width=width,
                height=height,
                max_pixels=max_pixels,
            )

    def _first_look(self) -> None:
        """Decodes the first frame: it says more than the header."""
        if self._is_encrypted():  # what is encrypted can pass for a picture by chance
            raise SampleError("video_stream.encrypted", where=self.where)
        self._reopen()
        frame = next(self._decoded(strict=False), None)
        self._reopen()
        if frame is None:
            self._require_room()
            raise SampleError("video_stream.empty", where=self.where)
        self._size = frame.width, frame.height
        self._require_size(frame.width, frame.height, self._max_pixels)
        transfer = int(frame.color_trc)
        self._transfer = transfer if transfer != 2 else self._transfer
        if self._transfer in _HDR_TRANSFERS:
            raise SampleError(
                "video_hdr", where=self.where, transfer=_HDR_TRANSFERS[self._transfer]
            )
        self._turn = self._read_turn(frame)
        self._interlaced = bool(frame.interlaced_frame)

    def _is_encrypted(self) -> bool:
        try:
            packet = next(self._container.demux(self._stream), None)
        except self._av.error.FFmpegError:
            return False
        found = [] if packet is None else list(packet.iter_sidedata())
        return any(each.data_type == "encryption_info" for each in found)

    def _read_turn(self, frame: Any) -> tuple[int, int, int, int] | None:
        kinds = self._av.sidedata.sidedata.Type
        found = frame.side_data.get(kinds.DISPLAYMATRIX)
        if found is None:
            return None
        a, b, _, c, d, *_ = struct.unpack("=9i", bytes(found))
        turn = tuple(_unit(value) for value in (a, b, c, d))
        if turn == _UPRIGHT:
            return None
        if turn not in _TURNS:
            raise SampleError("video_rotation", where=self.where, matrix=[a, b, c, d])
        return turn  # type: ignore[return-value]

    @property
    def _swaps(self) -> bool:
        return self._turn is not None and not self._turn[0]

    def _require_room(self) -> None:
        """Tells want of memory from damage: decoders report both alike.

        Raises:
          MemoryError: There is not enough for the frames that a decoder keeps.
        """
        width, height = self._size
        try:
            mmap.mmap(-1, max(1, _KEPT_FRAMES * 3 * width * height)).close()
        except OSError as error:
            raise MemoryError from error

    def _require_frames(self) -> None:
        if self._frames.damaged:
            self._require_room()
        if not self._frames.pts:
            raise SampleError("video_stream.empty", where=self.where)

    # Which frames there are.

    def _index(self) -> _Frames:
        """Lists the frames of the packets."""
        names = set(self._container.format.name.split(","))
        if not names & _INDEXED_CONTAINERS:
            raise _Unindexed
        if self._stream.codec_context.codec.name not in _INDEXED_CODECS:
            raise _Unindexed
        found = _Frames()
        shown: list[tuple[int, int]] = []
        keys: list[tuple[int, int]] = []
        num_packets, position = 0, None
        try:
            for packet in self._container.demux(self._stream):
                if packet.size == 0:
                    continue
                if position is None:
                    position = found.data_start = packet.pos or 0
                if packet.pos != position:
                    found.data_start = 0
                position += packet.size
                num_packets += 1
                if packet.pts is None:
                    raise _Unindexed
                if packet.is_corrupt:
                    found.damaged += 1
                    continue
                dts = packet.pts if packet.dts is None else packet.dts
                found.packets.append((packet.pts, dts, packet.size, int(packet.is_keyframe)))
                if packet.is_keyframe:
                    keys.append((packet.pts, min(packet.pts, dts)))
                if not packet.is_discard:
                    shown.append((packet.pts, packet.duration or 0))
        except self._av.error.FFmpegError as error:
            _require_memory(error)
            found.damaged += 1
        shown.sort()
        found.pts = [pts for pts, _ in shown]
        if not shown or not keys or len(set(found.pts)) < len(found.pts):
            raise _Unindexed
        found.last_duration = shown[-1][1]
        keys.sort()
        found.key_pts = [pts for pts, _ in keys]
        found.key_goals = [goal for _, goal in keys]
        found.damaged += self._missing(num_packets, found)
        return found

    def _missing(self, num_packets: int, found: _Frames) -> int:
        """Counts the frames that the header promises and the file lacks; 1 for an unknown count."""
        if self._stream.frames > num_packets:
            return int(self._stream.frames) - num_packets
        declared = self._container.duration
        if self._stream.frames or not declared or self._container.streams.audio:
            return 0
        # Matroska counts from 0, others from the first frame.
        begin = min(0, found.pts[0])
        got = float((found.pts[-1] + found.last_duration - begin) * self._time_base)
        want = declared / self._av.time_base
        return int(want - got > max(_SHORT_S, _SHORT_SHARE * want))

    def _scan(self) -> _Frames:
        """Decodes the file to see which frames it has."""
        found = _Frames()
        before, tainted = 0, False
        for number, frame in enumerate(self._decoded(strict=False, damaged=found)):
            if frame.pts is None:
                raise SampleError("video_time", where=self.where, error="a frame has no timestamp")
            # What follows on damage is built on it, until a key frame begins anew.
            tainted = (tainted or found.damaged > before or frame.is_corrupt) and (
                frame.is_corrupt or not frame.key_frame
            )
            before = found.damaged
            if tainted:
                found.damaged += 1
                before += 1
            else:
                found.pts.append(frame.pts)
                found.kept.append(number)
                found.last_duration = frame.duration or 0
                found.interlaced |= bool(frame.interlaced_frame)
        return found

    # Decoding.

    def _decoded(
        self,
        *,
        strict: bool,
        damaged: _Frames | None = None,
        key_pts: int | None = None,
        wanted: frozenset[int] | None = None,
    ) -> Iterator[Any]:
        """Decodes from where the container is.

        Args:
          strict: Raise `MissingFrameError` for what cannot be decoded, instead of leaving it out.
          damaged: Counts what is left out.
          key_pts: The key frame that the container was sent to: it must not be past it.
          wanted: Timestamps of the frames that are wanted, if others may be left out: those to
            which no frame refers are not decoded. None: all.
        """
        errors = self._av.error.FFmpegError
        context = self._stream.codec_context
        skips = False
        context.skip_frame = "DEFAULT"
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
            except errors as error:
                _require_memory(error)
                if strict:
                    raise MissingFrameError from error
                if damaged is not None:
                    damaged.damaged += 1
                packet = None
            if packet is None:
                break
            if key_pts is not None and packet.size:
                if packet.pts is None or packet.pts > key_pts:
                    raise _TooFarError
                key_pts = None
            if wanted is not None and skips != (packet.pts not in wanted):
                skips = not skips
                context.skip_frame = "NONREF" if skips else "DEFAULT"
            try:
                frames = packet.decode()
            except EOFError:
                break
            except errors as error:
                _require_memory(error)
                if strict:
                    raise MissingFrameError from error
                if damaged is not None:
                    damaged.damaged += 1
                continue
            yield from frames
        # The last packet of `demux` is an empty one, which drains the decoder.

    def _read_scan(self, numbers: Sequence[int]) -> Iterator[Any]:
        self._reopen()
        wanted = [self._frames.kept[number] for number in numbers]
        at = 0
        for count, frame in enumerate(self._decoded(strict=False)):
            if at == len(wanted):
                return
            if count == wanted[at]:
                at += 1
                yield frame
        if at < len(wanted):
            raise SampleError("video_stream.changed", where=self.where)

    def _read_indexed(self, numbers: Sequence[int]) -> Iterator[Any]:
        frames = self._frames
        decoded: Iterator[Any] = iter(())
        position: int | None = None  # timestamp of the frame that was decoded last
        all_wanted = frozenset(frames.pts[number] for number in numbers)
        for number in numbers:
            wanted = frames.pts[number]
            key = bisect.bisect_right(frames.key_pts, wanted) - 1
            ahead = position is not None and (key < 0 or frames.key_pts[key] <= position < wanted)
            frame = None
            if ahead:
                frame, position = self._next(decoded, wanted, position)
            starts = self._starts(key, all_wanted)
            while frame is None:
                found = next(starts, None)
                if found is None:
                    raise MissingFrameError
                decoded = found
                with suppress(_TooFarError):
                    frame, position = self._next(decoded, wanted, None)
            if frame.is_corrupt:
                raise MissingFrameError
            yield frame

    def _starts(self, key: int, wanted: frozenset[int]) -> Iterator[Iterator[Any]]:
        """Decodes from a key frame on, then from earlier ones, at last from the beginning.

        With `_skips` frames that are not wanted are left out at the first attempt: a decoder that
        does not know how many frames are out of order learns it from them.

        Containers seek by either kind of timestamp: in MP4 the decoding timestamp of a key frame
        leads to the one before it, in others the other one to the one after it (`_TooFarError`).
        """
        frames = self._frames
        if self._skips and key >= 0:
            self._seek(frames.key_pts[key])
            yield self._decoded(strict=True, key_pts=frames.key_pts[key], wanted=wanted)
        for k in range(key, -1, -1):
            for goal in dict.fromkeys((frames.key_pts[k], frames.key_goals[k])):
                self._seek(goal)
                yield self._decoded(strict=True, key_pts=frames.key_pts[k])
        self._reopen()
        yield self._decoded(strict=True)

    def _seek(self, goal: int) -> None:
        try:
            self._container.seek(goal, stream=self._stream, backward=True)
        except self._av.error.FFmpegError as error:
            _require_memory(error)
            self._reopen()

    def _next(
        self, decoded: Iterator[Any], wanted: int, position: int | None
    ) -> tuple[Any, int | None]:
        """Decodes up to a frame; None where it does not come."""
        for frame in decoded:
            if frame.pts is None:
                raise MissingFrameError
            position = frame.pts
            if frame.pts == wanted:
                return frame, position
            if frame.pts > wanted:
                break
        return None, position

    def _pixels(self, frame: Any) -> np.ndarray:
        if (frame.width, frame.height) != self._size:
            raise SampleError(
                "video_size.changes",
                where=self.where,
                first=self._size,
                later=(frame.width, frame.height),
            )
        pixels = self._to_rgb(frame)
        if self._turn is not None:
            pixels = _turned(pixels, self._turn)
        return np.ascontiguousarray(pixels)

    def _to_rgb(self, frame: Any) -> np.ndarray:
        """Converts a frame as the program `ffmpeg` does it, by a graph with its scaler.

        `frame.to_ndarray` takes other paths for 10 bits and for interlaced chroma: up to 100 and
        200 grey levels apart.
        """
        kind = (frame.format.name, int(frame.colorspace), int(frame.color_range))
        if self._graph is None or self._graph[0] != kind:
            graph = self._av.filter.Graph()
            source = graph.add_buffer(
                width=frame.width,
                height=frame.height,
                format=frame.format,
                time_base=self._time_base,
                name="in",
            )
            chain = [source, graph.add("scale", "flags=bicubic"), graph.add("format", "rgb24")]
            chain.append(graph.add("buffersink"))
            for a, b in zip(chain, chain[1:], strict=False):
                a.link_to(b)
            graph.configure()
            self._graph = kind, graph, source, chain[-1]
        _, _, source, sink = self._graph
        source.push(frame)
        pixels: np.ndarray = sink.pull().to_ndarray()
        return pixels


class MissingFrameError(Exception):
    """A frame that the index names cannot be decoded."""


class _TooFarError(Exception):
    """A seek ended behind its target."""


def _require_memory(error: BaseException) -> None:
    """Lets through what is no fault of the file: the process was refused memory."""
    if isinstance(error, MemoryError):
        raise error


def import_av() -> Any:
    """Imports PyAV.

    Raises:
      ConfigError: `video_extra`.
    """
    try:
        import av
        import av.filter
        import av.logging
        import av.sidedata.sidedata
    except ImportError as error:
        raise ConfigError("video_extra", error=error) from error
    return av


def shown_size(size: tuple[int, int], aspect: Fraction, *, turned: bool = False) -> tuple[int, int]:
    """Computes the size of a picture with square pixels: (width, height).

    Args:
      size: Stored width and height, in pixels, before it is turned upright.
      aspect: Width : height of a stored pixel.
      turned: Whether width and height are exchanged then.

    Returns:
      The stored size with one side enlarged, none shrunk; rounded half up.

    >>> shown_size((720, 576), Fraction(16, 15)), shown_size((100, 50), Fraction(1, 2))
    ((768, 576), (100, 100))
    """
    width, height = size
    if aspect > 1:
        width = int(width * aspect + Fraction(1, 2))
    elif aspect < 1:
        height = int(height / aspect + Fraction(1, 2))
    return (height, width) if turned else (width, height)


_UPRIGHT = (1, 0, 0, 1)

_TURNS = (
    # (a, b, c, d) of the display matrix: x' = a x + c y, y' = b x + d y, y downwards.
    (0, 1, -1, 0),
    (-1, 0, 0, -1),
    (0, -1, 1, 0),
    (-1, 0, 0, 1),
    (1, 0, 0, -1),
    (0, 1, 1, 0),
    (0, -1, -1, 0),
)

_ROTATIONS = {(0, 1, -1, 0): 90, (-1, 0, 0, -1): 180, (0, -1, 1, 0): 270}


def _turned(pixels: np.ndarray, turn: tuple[int, int, int, int]) -> np.ndarray:
    """Applies a display matrix: pixel (x, y) goes to (a x + c y, b x + d y)."""
    a, b, c, d = turn
    if a:
        mirrored: np.ndarray = pixels[::d, ::a]
        return mirrored
    # x' = c y, y' = b x: exchanged, then mirrored where a factor is negative.
    turned: np.ndarray = pixels.swapaxes(0, 1)[::b, ::c]
    return turned


def _unit(value: int) -> int | None:
    """Gives -1, 0 or 1 for an entry of a display matrix; None for any other factor."""
    return {0: 0, _MATRIX_ONE: 1, -_MATRIX_ONE: -1}.get(value)


def _is_cover(stream: Any) -> bool:
    return bool(stream.disposition & stream.disposition.__class__.attached_pic)


def _rounding(steps: np.ndarray) -> int:
    """How far the steps of a constant rate may differ, in ticks of the clock."""
    return max(1, int(np.median(steps)) // 50) if int(np.median(steps)) > 1 else 0
