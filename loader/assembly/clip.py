"""A stored clip as a source of pictures: its frames are decoded when an example wants them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from loader.assembly.pixels import Encoded
from loader.buffers import Scratch
from shardspec.errors import SampleError
from shardspec.sample import PreparedSample
from shardspec.video import ClipLimits, RemoteFile, encode_table, read_frames


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """A clip as its sample has it."""

    table: bytes | memoryview
    """Encoded: where the frames are."""
    file: bytes | memoryview | RemoteFile
    width: int
    """Of a frame, in pixels."""
    height: int
    first: int
    """Number of its first frame, among the images of the sample."""
    where: str = ""
    """Shard and key, for errors."""

    def frame(self, image: int) -> ClipFrame:
        """Names a frame by its number among the images of the sample."""
        return ClipFrame(self, image - self.first)

    def frames(
        self,
        numbers: Sequence[int],
        on_frame: Callable[[int, np.ndarray], None],
        *,
        scratch: Scratch,
        limits: ClipLimits,
    ) -> tuple[float, float]:
        """Decodes frames, in another process.

        Args:
          numbers: Of the frames, strictly ascending.
          on_frame: Gets the position in `numbers` and the pixels of each, uint8 [H, W, 3]: only to
            be read, and valid until the next one.
          scratch: Memory for one frame.
          limits: Of the process.

        Returns:
          Seconds of decoding, in which nothing is done with the frames; and of reading the file.

        Raises:
          SampleError: As `read_frames`; `video_size`, a frame has another size than is stored.
          ShardError, StorageError: The file cannot be read.
        """
        start_s, used_s = perf_counter(), 0.0
        before_s = self._read_s
        want = (self.height, self.width, 3)

        def take(at: int, pixels: np.ndarray) -> None:
            nonlocal used_s
            if pixels.shape != want:
                raise SampleError(
                    "video_size.changes", where=self.where, first=want, later=pixels.shape
                )
            begin_s = perf_counter()
            on_frame(at, pixels)
            used_s += perf_counter() - begin_s

        read_frames(
            self.table,
            self.file,
            numbers,
            on_frame=take,
            room=lambda num_bytes: scratch("frame", (num_bytes,)),
            limits=limits,
            where=self.where,
        )
        read_s = self._read_s - before_s
        return perf_counter() - start_s - used_s - read_s, read_s

    @property
    def _read_s(self) -> float:
        return 0.0 if isinstance(self.file, bytes | memoryview) else self.file.read_s


PictureSource = tuple["np.ndarray | Encoded | ClipFrame", "np.ndarray | Encoded | None"]
"""A stored picture, uint8 [H, W, 3] or encoded, or a frame of a clip, and its stored overview."""


@dataclass(frozen=True, slots=True, eq=False)
class ClipFrame:
    """One frame of a clip."""

    clip: Clip
    number: int
    """Counted from the clip's first."""


def prepared_clips(sample: PreparedSample) -> list[Clip]:
    """Gives the clips of a prepared sample."""
    clips: list[Clip] = []
    first = len(sample.images)
    for clip in sample.clips:
        table = encode_table(clip.table)
        clips.append(Clip(table, clip.file, clip.width, clip.height, first, sample.key))
        first += clip.num_frames
    return clips


def sources_of(
    images: Sequence[int], sources: Sequence[PictureSource], clips: Sequence[Clip]
) -> list[PictureSource]:
    """Selects pictures of a sample by their numbers: those with members of their own come first.

    Args:
      images: Numbers of the pictures.
      sources: Of those that have members.
      clips: Whose frames come after them.
    """
    found: list[PictureSource] = []
    for image in images:
        if image < len(sources):
            found.append(sources[image])
        else:
            clip = next(clip for clip in reversed(clips) if clip.first <= image)
            found.append((clip.frame(image), None))
    return found
