"""The epoch line of a dataset: how lanes walk along it, and which sample each place of it is.

Stages 3 and 4 of the order (order.py). Every stage is a bijection for each epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loader.order.permutation import keyed_array, permute

# Purposes of the keyed hash, so that no two draws share a stream.
_KEY_BLOCKS, _KEY_INSIDE, _KEY_ROTATION, _KEY_ROWS, _KEY_ALL = 1, 2, 3, 4, 5
_KEY_RUN_BLOCKS, _KEY_RUN_ROTATION, _KEY_GROUP = 7, 8, 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """The epoch line of a dataset: stages 3 and 4 of the module's text.

    Each field is one number, or an array with one per slot where slots belong to several datasets.
    """

    num_samples: int | np.ndarray
    seed: int | np.ndarray
    active_blocks: int | np.ndarray
    block_size: int | np.ndarray
    groups: int = 0
    """Parts of the line that keep their blocks over all epochs, equal ones; 0 where each epoch
    shuffles all blocks over the whole line."""

    def samples(
        self, start: np.ndarray, length: np.ndarray, *, epoch: np.ndarray, taken: np.ndarray
    ) -> np.ndarray:
        """Finds the samples that lanes take.

        Args:
          start: int64, first place of the lane on the line.
          length: int64, places of the lane, >= 1.
          epoch: int64, epoch of the lane.
          taken: int64, samples the lane has taken in this epoch before, 0 to length - 1.

        Returns:
          int64 sample ids, of the arguments' shape.
        """
        return self._scatter(self.places(start, length, epoch=epoch, taken=taken), epoch)

    def places(
        self, start: np.ndarray, length: np.ndarray, *, epoch: np.ndarray, taken: np.ndarray
    ) -> np.ndarray:
        """Finds the places on the line that lanes take: stage 3 alone; as `samples`."""
        long, extra = np.divmod(length, self.active_blocks)
        row, column = np.divmod(taken, self.active_blocks)
        # The first `extra` sub-slices are one longer; they alone reach the last, partial row.
        width = np.where(row < long, self.active_blocks, extra)
        key = keyed_array(self.seed, _KEY_ROWS, epoch, start + row)
        column = permute(column, size=width, key=key)
        places: np.ndarray = start + column * long + np.minimum(column, extra) + row
        return places

    def shuffled(self, place: np.ndarray, *, epoch: np.ndarray) -> np.ndarray:
        """Shuffles the whole line at once: int64 places to int64 sample ids."""
        return permute(place, size=self.num_samples, key=keyed_array(self.seed, _KEY_ALL, epoch))

    def _scatter(self, place: np.ndarray, epoch: np.ndarray) -> np.ndarray:
        """Shuffles the blocks over the line and the places inside them, then rotates."""
        num_blocks = self.num_samples // self.block_size
        block, inside = np.divmod(place, self.block_size)
        # The short block at the end of the line stays where it is; the rotation moves it.
        whole = block < num_blocks
        block, inside = np.where(whole, block, 0), np.where(whole, inside, 0)
        moved = self._moved(block, epoch, np.maximum(num_blocks, 1))
        key = keyed_array(self.seed, _KEY_INSIDE, epoch, block)
        shuffled = permute(inside, size=self.block_size, key=key)
        scattered = np.where(whole, moved * self.block_size + shuffled, place)
        rotated: np.ndarray = (scattered + self._rotation(epoch)) % self.num_samples
        return rotated

    def _moved(
        self, block: np.ndarray, epoch: np.ndarray, num_blocks: np.ndarray | int
    ) -> np.ndarray:
        """Shuffles the blocks: over the whole line each epoch, or inside each group of those that
        one shuffle of the run has dealt to it."""
        if not self.groups:
            key = keyed_array(self.seed, _KEY_BLOCKS, epoch)
            return permute(block, size=num_blocks, key=key)
        group = ((block + 1) * self.groups - 1) // num_blocks
        first = group * num_blocks // self.groups
        size = (group + 1) * num_blocks // self.groups - first
        key = keyed_array(self.seed, _KEY_GROUP, epoch, group)
        inside = first + permute(block - first, size=size, key=key)
        key = keyed_array(self.seed, _KEY_RUN_BLOCKS, np.zeros_like(epoch))
        return permute(inside, size=num_blocks, key=key)

    def blocks(self, sample: np.ndarray, *, epoch: np.ndarray) -> np.ndarray:
        """Undoes the rotation: int64 samples to the numbers of their blocks."""
        unrotated: np.ndarray = (sample - self._rotation(epoch)) % self.num_samples
        blocks: np.ndarray = unrotated // self.block_size
        return blocks

    def _rotation(self, epoch: np.ndarray) -> np.ndarray:
        # Below 2**62 the hash stays positive as int64, and sums cannot overflow.
        if self.groups:
            epoch, purpose = np.zeros_like(epoch), _KEY_RUN_ROTATION
        else:
            purpose = _KEY_ROTATION
        rotation = keyed_array(self.seed, purpose, epoch) % np.uint64(2**62)
        signed: np.ndarray = rotation.astype(np.int64)
        return signed
