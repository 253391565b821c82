"""Lanes: which lane a slot belongs to, and how many slots each lane has among the first G.

A run has U canonical ranks with Kc canonical workers each. Position p of the global batch belongs
to canonical rank u = p div (B/U); step t, counted from where the batch size began, to canonical
worker k = t mod Kc; the lane is u * Kc + k. With b = B/U,

    T, R = divmod(G, B)
    C(G, u, k) = (T - k + Kc - 1) div Kc * b  +  [T mod Kc = k] * clip(R - u * b, 0, b)

counts the slots of a lane among the first G. So any run of consecutive slots, an epoch for
instance, is dealt to the lanes in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Lanes:
    """The lanes of a run while its global batch stays the same."""

    global_batch_size: int
    """B, a multiple of the ranks."""
    ranks: int
    """U."""
    workers: int
    """Kc."""

    @property
    def share(self) -> int:
        """b, slots of a canonical rank in a step: what a lane takes in a turn."""
        return self.global_batch_size // self.ranks

    def counts(self, slots: int) -> np.ndarray:
        """Counts the slots of each lane among the first `slots`: int64 [lanes].

        >>> Lanes(global_batch_size=4, ranks=2, workers=2).counts(7).tolist()
        [2, 2, 2, 1]
        """
        steps, rest = divmod(slots, self.global_batch_size)
        turns = (steps - np.arange(self.workers) + self.workers - 1) // self.workers
        counts = np.empty((self.ranks, self.workers), np.int64)
        counts[:] = turns * self.share
        begun = np.clip(rest - np.arange(self.ranks) * self.share, 0, self.share)
        counts[:, steps % self.workers] += begun
        return counts.ravel()

    def find(self, step: np.ndarray, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Finds (lane, slots of the lane before) of slots: int64, of the arguments' shape."""
        rank, inside = np.divmod(position, self.share)
        turn, worker = np.divmod(step, self.workers)
        return rank * self.workers + worker, turn * self.share + inside


@dataclass(frozen=True, slots=True, kw_only=True)
class OneTrack:
    """No lanes: all slots are one track. The same methods as `Lanes`."""

    global_batch_size: int

    def counts(self, slots: int) -> np.ndarray:
        """Counts the slots of the track among the first `slots`: int64 [1]."""
        return np.array([slots], np.int64)

    def find(self, step: np.ndarray, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Finds (0, slots before) of slots: int64, of the arguments' shape."""
        before = step * self.global_batch_size + position
        return np.zeros_like(before), before
