"""A budget of memory for decoding, shared by the processes of a machine.

Each process may decode images of up to `share_bytes` at any time. A larger image takes one of
`num_lanes` locks first, and waits where all are taken. Both numbers follow from the budget, so that
all processes together never hold more than `total_bytes`:

    num_lanes * largest + (num_workers - num_lanes) * share <= total

The locks are the kernel's, on files in a local folder: a process that dies gives its lock back.
Nothing but the time at which an image is decoded depends on them.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shardspec import storage
from shardspec.errors import ConfigError

_SHARE_BYTES = 64 * 2**20
"""What an image takes that never waits: an RGB PNG of 16 megapixels, a JPEG of 9."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """How much memory the workers of a job may use for decoding, together."""

    folder: str
    """Local folder of the locks."""
    total_bytes: int
    largest_bytes: int
    """The most that one image takes."""
    num_workers: int

    def __post_init__(self) -> None:
        if self.total_bytes < self.largest_bytes:
            raise ConfigError(
                "memory_budget", image_memory=self.total_bytes, decode_memory=self.largest_bytes
            )

    @property
    def share_bytes(self) -> int:
        """The most that an image takes that need not wait."""
        if self.total_bytes >= self.num_workers * self.largest_bytes:
            return self.largest_bytes
        spare = (self.total_bytes - self.largest_bytes) // max(1, self.num_workers - 1)
        return min(_SHARE_BYTES, spare, self.largest_bytes)

    @property
    def num_lanes(self) -> int:
        """Images above `share_bytes` that are decoded at a time, over all processes."""
        share = self.share_bytes
        if share == self.largest_bytes:
            return self.num_workers
        spare = self.total_bytes - self.num_workers * share
        return max(1, min(self.num_workers, spare // (self.largest_bytes - share)))

    @contextmanager
    def hold(self, num_bytes: int) -> Iterator[None]:
        """Waits until an image that takes this much may be decoded."""
        if num_bytes <= self.share_bytes:
            yield
            return
        with storage.translate_errors(self.folder):
            storage.make_folder(Path(self.folder))
            fd = self._take_lane()
        try:
            yield
        finally:
            os.close(fd)  # which unlocks it

    def _take_lane(self) -> int:
        own = os.getpid() % self.num_lanes
        for lane in (*range(own, self.num_lanes), *range(own)):
            fd = self._open(lane)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
            except BaseException:
                os.close(fd)
                raise
            else:
                return fd
        fd = self._open(own)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _open(self, lane: int) -> int:
        path = os.path.join(self.folder, f"image-{lane:03d}.lock")
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
