"""EpisodeFrames: the frames of an episode's cameras, decoded a run at a time.

Samples (windows, or segments of several) are read in order, and neighbours share frames. So one
that follows the one before it decodes the frames of the next ones too: opening a video costs a pass
over its packets. A sample out of order decodes its own frames alone.

At most `AHEAD` frames of a camera are held, besides those of one sample. What a camera cannot be
read for is held as well: every sample that needs the frame is refused for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from preprocess.episodes.episode import CameraVideo, EpisodeTable
from preprocess.episodes.fields import is_deep
from preprocess.episodes.windows import (
    WindowPolicy,
    history_rows,
    num_segments,
    segment_steps,
)
from preprocess.media import VideoDecoder
from shardspec.errors import SampleError

AHEAD = 32
"""Frames that are decoded at once: 29 MB of 640 x 480 pixels."""

Held = np.ndarray | SampleError


class EpisodeFrames:
    """Reads the frames that the samples of one episode show."""

    def __init__(
        self,
        table: EpisodeTable,
        decoder: VideoDecoder,
        *,
        policy: WindowPolicy,
        fps: float,
        where: str,
    ) -> None:
        """Joins an episode and what decodes its videos."""
        self._table, self._decoder, self._policy = table, decoder, policy
        self._step, self._fps = policy.step(fps), fps
        self._where = where
        self._held: dict[str, dict[int, Held]] = {}
        self._next: dict[str, int] = {}
        """Number of the sample that would follow the last one, of each camera."""

    def frame(self, camera: str, row: int, *, segment: int) -> np.ndarray | bytes:
        """Gives the frame of a camera at a step.

        Args:
          camera: Its name.
          row: The step.
          segment: Number of the sample that is read, of whose steps `row` is one.

        Returns:
          uint8 [H, W, 3], or an encoded image.

        Raises:
          SampleError: `robot_frame`, and what a video is refused for.
        """
        frames = self._table.cameras.get(camera)
        if frames is None:
            raise SampleError("robot_frame.camera", where=self._where, camera=camera)
        if not isinstance(frames, CameraVideo):
            steps = len(self._table.times_L)
            # Of another rate, or cut; one may follow the last action.
            if len(frames) not in (steps, steps + 1):
                raise SampleError(
                    "robot_frame.many",
                    where=self._where,
                    camera=camera,
                    got=len(frames),
                    want=steps,
                )
            image = frames[row]
            if image is None or len(image) == 0:
                raise SampleError("robot_frame.empty", where=self._where, camera=camera, step=row)
            if is_deep(image):
                raise SampleError("robot_frame.depth", where=self._where, camera=camera, step=row)
            return image
        held = self._held.setdefault(camera, {})
        if row not in held:
            wanted = {row, *self._rows(segment), *self._ahead(camera, segment)}
            kept = {number: held[number] for number in wanted if number in held}
            made = self._decoded(camera, frames, sorted(wanted - kept.keys()))
            self._held[camera] = held = {**kept, **made}
        self._next[camera] = segment + 1
        found = held[row]
        if isinstance(found, SampleError):
            raise found
        return found

    def _rows(self, segment: int) -> set[int]:
        steps = segment_steps(len(self._table.times_L), segment, self._policy)
        history = self._policy.history
        rows = [row for t in steps for row in history_rows(t, history=history, step=self._step)]
        return {max(row, 0) for row in rows}

    def _ahead(self, camera: str, segment: int) -> set[int]:
        """Lists the steps that the next samples show, where this one is read in order."""
        follows = self._next.get(camera, 0)
        if segment not in (follows, follows - 1):  # or the same one again
            return set()
        rows: set[int] = set()
        for number in range(segment, num_segments(len(self._table.times_L), self._policy)):
            rows |= self._rows(number)
            if len(rows) >= AHEAD:
                break
        return rows

    def _decoded(self, camera: str, video: CameraVideo, rows: Sequence[int]) -> dict[int, Held]:
        """Decodes the frames of some steps; what one is refused for comes in its place."""
        times_s = (video.start_s + self._table.times_L[list(rows)]).tolist()
        where = f"{self._where}, camera {camera}"
        if not video.path.is_file():
            error = SampleError("robot_frame.file", where=where, path=str(video.path))
            return dict.fromkeys(rows, error)
        try:
            found = self._decoder(
                video.path, lambda pixels, _: pixels, instants_s=times_s, where=where
            )
        except SampleError as error:
            return dict.fromkeys(rows, error)
        shown_s = np.array(found.times_s)
        made: dict[int, Held] = {}
        for row, time_s in zip(rows, times_s, strict=True):
            nearest = int(np.argmin(np.abs(shown_s - time_s)))
            off_s = float(shown_s[nearest]) - time_s
            ended = time_s > video.end_s - 0.5 / self._fps
            if abs(off_s) <= self._policy.tolerance_s and not ended:
                made[row] = found.frames[nearest]
                continue
            if found.info["damaged"]:
                code = "robot_frame.damaged"
            elif ended or time_s >= float(found.info["end_s"]) - self._policy.tolerance_s:
                code = "robot_frame.end"
            else:
                code = "robot_frame.time"
            made[row] = SampleError(
                code,
                where=where,
                camera=camera,
                step=row,
                off_s=f"{off_s:+.6f}",
                tolerance_s=self._policy.tolerance_s,
            )
        return made
