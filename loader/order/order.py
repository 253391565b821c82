"""The order of samples: a pure function from (step, position) to (epoch, sample).

A *slot* is position p of the global batch of optimizer step t. `Order.slots` says which sample
stands in it. Nothing else does: rank r of W takes the positions `rank_positions(r, W, B)`, worker
k of K builds the steps t with t mod K = k, and neither W nor K enters the function. So global
batches are the same for any number of ranks, workers and threads; resuming is evaluating at
another step; the state is the step and the few integers of `OrderConfig`.

How the sample of a slot is found, in the layout "lanes":

1. *Slot to lane.* The run has U canonical ranks with Kc canonical workers each, U * Kc lanes.
   Position p lies in the share of canonical rank u = p div (B/U); step t is built by canonical
   worker k = t mod Kc; the lane is w = u * Kc + k. A rank or worker of any run that divides the
   canonical ones owns whole lanes, and so few shards.
2. *Lane to line.* An epoch is a line of N places. Lane w owns the places floor(wN/V) up to
   floor((w+1)N/V) of V lanes, and takes its turns along them, epoch after epoch. All lanes finish
   an epoch within one turn of each other, so no rank can run dry.
3. *Along a lane.* The slice is cut into A sub-slices that are read side by side: row after row,
   one place from each, in an order shuffled per row. So neighbours in a lane come from A distant
   places, while only A blocks per lane are open at a time.
4. *Line to sample.* Blocks of c consecutive places are shuffled over the whole line, the places of
   a block are shuffled inside it, and the result is rotated by a different amount each epoch
   (blocks then meet the shards' borders, and the short last block other samples, elsewhere).

Every stage is a bijection for each epoch, so **every sample stands in exactly one slot per epoch**.
Samples are numbered through the concatenated shards, which may be uneven; a block is a range of
one shard (two where it crosses a border), the unit in which remote data is read.

An order can go on with another one (`Order.continued`): it then shows what that one still owed of
its epoch (rest.py), dealt to its own lanes, before its own epochs begin.

The layout "global" is for datasets too small to fill the lanes: slot g of the run is place g mod N
of a shuffle of the whole epoch g div N. "sequential" is "global" without the shuffle.

What a small block costs: the sub-slices must not all change blocks in the same row (a burst of
reads). No phases are needed for that, only a block size for which the sub-slices' starts are
spread evenly modulo c; `pick_block_size` finds one near the size that was asked for.

Integer arithmetic only; memory is proportional to the number of slots asked for, and nothing of
length N exists. This module decides no reading, no mixing (mixture.py) and no packing (packing.py).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from loader.order.config import OrderConfig, RampStep
from loader.order.line import Line
from loader.order.permutation import keyed_array, permute
from loader.order.remainder import EpochRemainder
from loader.order.slots import Slots, require_slots

_KEY_REST = 6


class Order:
    """The order of one dataset; immutable, cheap to build and to send to other processes."""

    def __init__(self, config: OrderConfig) -> None:
        self.config = config
        self._before: Order | None = None
        self._rest: EpochRemainder | None = None
        if config.before is not None:
            self._before = Order(config.before)
            self._rest = EpochRemainder(self._before, taken=self._before.taken(config.since))
        self.first_epoch: int = 0 if self._rest is None else self._rest.first_epoch
        """The first epoch that is laid out here; what comes before is another order's rest."""
        batches = [config.global_batch_size, *(c.global_batch_size for c in config.ramp)]
        self._starts = np.array([config.since, *(c.step for c in config.ramp)], np.int64)
        self._batches = np.array(batches, np.int64)
        self._line = Line(
            num_samples=config.num_samples,
            seed=config.seed,
            active_blocks=config.active_blocks,
            block_size=config.block_size,
        )
        # What was taken before each segment of the ramp: by the run, and per lane of worker k.
        lengths = np.diff(self._starts)
        taken = np.cumsum(lengths * self._batches[:-1])
        self._taken = np.concatenate([np.zeros(1, np.int64), taken])
        workers = np.arange(config.canonical_workers)
        turns = np.diff(_turns_before(self._starts[:, None], workers, len(workers)), axis=0)
        shares = self._batches[:-1, None] // config.canonical_ranks
        self._lane_taken = np.zeros((len(batches), len(workers)), np.int64)
        self._lane_taken[1:] = np.cumsum(turns * shares, axis=0)

    def slots(self, step: int | np.ndarray, positions: int | np.ndarray) -> Slots:
        """Evaluates the order at slots: O(1) at any step, vectorised over many.

        Args:
          step: Optimizer steps from `since` on, int64.
          positions: Positions in the global batch, 0 to B - 1; broadcasts with `step`, so
            `slots(np.arange(4)[:, None], positions)` looks four steps ahead.

        Returns:
          Arrays of the broadcast shape, at least one axis.

        Raises:
          ConfigError: `order_slot`, a step or position outside the run.
        """
        config = self.config
        steps, places = np.broadcast_arrays(
            np.atleast_1d(np.asarray(step, np.int64)), np.asarray(positions, np.int64)
        )
        segment = np.searchsorted(self._starts, steps, side="right") - 1
        require_slots(steps, places, self._batches[segment], since=config.since)
        pass_number: np.ndarray | None = None
        if config.tail != "wrap":
            pass_number, steps = np.divmod(steps, config.steps_per_epoch)
        track, count = self._track(steps, places, segment)
        real = np.ones(steps.shape, np.bool_)
        if pass_number is None:
            epoch, sample = self.take(track, count)
        else:
            # What exceeds the epoch is padding that repeats from its start.
            start, length = self._slice(track, config.num_samples)
            beyond, count = np.divmod(count, length)
            epoch, real = pass_number, beyond == 0
            sample = self._find(start, length, epoch, count)
        return Slots(dataset=np.zeros_like(epoch), epoch=epoch, sample=sample, real=real)

    def take(self, track: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Finds what tracks take: a lane is a track, and without lanes the whole run is one.

        Args:
          track: int64, numbers of the tracks.
          count: int64, what they have taken before, since the step `since`.

        Returns:
          (epoch, sample), int64 of the arguments' shape.
        """
        if self._rest is None:
            return self._take_new(track, count)
        start, length = self._slice(track, self._rest.length)
        epoch, sample = np.empty_like(count), np.empty_like(count)
        old = count < length
        place = self._rest_place(start[old], length[old], count[old])
        epoch[old], sample[old] = self._rest.take(place)
        epoch[~old], sample[~old] = self._take_new(track[~old], count[~old] - length[~old])
        return epoch, sample

    def taken(self, step: int) -> np.ndarray:
        """Counts what each track has taken from step `since` up to a step: int64 [tracks]."""
        config = self.config
        segment = max(0, int(np.searchsorted(self._starts, step)) - 1)
        batch, since = self._batches[segment], self._starts[segment]
        if config.layout != "lanes":
            return np.array([self._taken[segment] + (step - since) * batch], np.int64)
        workers = np.arange(config.canonical_workers)
        turns = _turns_before(np.array(step), workers, len(workers))
        turns = turns - _turns_before(np.array(since), workers, len(workers))
        by_worker = self._lane_taken[segment] + turns * (batch // config.canonical_ranks)
        return np.tile(by_worker, config.canonical_ranks)

    def ends(self, epoch: int) -> np.ndarray:
        """Counts what each track has taken when it has finished an epoch: int64 [tracks]."""
        tracks = np.arange(self.config.num_lanes if self.config.layout == "lanes" else 1)
        ends = (epoch + 1 - self.first_epoch) * self._slice(tracks, self.config.num_samples)[1]
        return ends if self._rest is None else ends + self._slice(tracks, self._rest.length)[1]

    def epoch_start(self, epoch: int) -> int:
        """Returns the step at which a pass over the data begins; epoch 0 begins at step 0.

        With "wrap" it is the first step that starts at or past `epoch * N` samples, so passes
        differ by at most one step and follow each other without a gap.
        """
        config = self.config
        if config.tail != "wrap":
            return epoch * config.steps_per_epoch
        wanted = self._counted(epoch)
        if self._before is not None and wanted <= 0:
            return self._before.epoch_start(epoch)
        segment = int(np.searchsorted(self._taken, wanted, side="right")) - 1
        rest = wanted - int(self._taken[segment])
        return int(self._starts[segment]) + -(-rest // int(self._batches[segment]))

    def _counted(self, epoch: int) -> int:
        """Counts the slots between the step `since` and the start of an epoch."""
        if self._before is None or self._rest is None:
            return epoch * self.config.num_samples
        if epoch < self.first_epoch:
            return self._before._counted(epoch) - int(self._before.taken(self.config.since).sum())
        return self._rest.length + (epoch - self.first_epoch) * self.config.num_samples

    def num_steps(self, epoch: int = 0) -> int:
        """Counts the steps of a pass over the data; exact, from the numbers alone."""
        return self.epoch_start(epoch + 1) - self.epoch_start(epoch)

    def batch_at(self, step: int) -> tuple[int, int]:
        """Returns the global batch size of a step, and the first step that has had it since."""
        segment = int(np.searchsorted(self._starts, step, side="right")) - 1
        return int(self._batches[segment]), int(self._starts[segment])

    def continued(self, config: OrderConfig, *, step: int) -> Order:
        """Returns the order that goes on from a step as another configuration lays it out.

        The epoch is finished first: what this order still owes is laid out anew in the other
        width, then the other order's epochs follow. Every sample comes once per epoch; samples
        that the other configuration has more come from the next epoch on.

        Raises:
          ConfigError: `order_before`.
        """
        if step <= self.config.since:
            return Order(replace(config, since=self.config.since, before=self.config.before))
        ramp = tuple(change for change in self.config.ramp if change.step < step)
        before = replace(self.config, ramp=ramp)
        return Order(replace(config, since=step, before=before))

    def changed(self, *, step: int, global_batch_size: int) -> Order:
        """Returns the order with another global batch size from a step on.

        Every lane goes on where it stands, so the epoch still shows each sample once.

        Raises:
          ConfigError: `order_ramp`, `batch_not_divisible`.
        """
        if step == self.config.since:
            return Order(replace(self.config, global_batch_size=global_batch_size, ramp=()))
        kept = tuple(change for change in self.config.ramp if change.step < step)
        change = RampStep(step=step, global_batch_size=global_batch_size)
        return Order(replace(self.config, ramp=(*kept, change)))

    def blocks(self, slots: Slots) -> np.ndarray:
        """Numbers the blocks that the samples of slots are read in: int64, of the slots' shape.

        Block j of an epoch is `block_size` consecutive samples; numbers of different epochs have
        nothing to do with each other.
        """
        return self._line.blocks(slots.sample, epoch=slots.epoch)

    def describe(self) -> dict[str, int | str]:
        """Summarises one epoch for people and logs, in plain JSON types."""
        config = self.config
        slots = config.steps_per_epoch * config.global_batch_size
        lanes = config.layout == "lanes"
        return {
            "layout": config.layout,
            "tail": config.tail,
            "steps_per_epoch": config.steps_per_epoch,
            "padded_slots": slots - config.num_samples if config.tail == "pad" else 0,
            "dropped_samples": config.num_samples - slots if config.tail == "drop_last" else 0,
            "num_lanes": config.num_lanes if lanes else 0,
            "open_blocks": config.num_lanes * config.active_blocks if lanes else 0,
            "open_samples": min(
                config.num_samples,
                config.num_lanes * config.active_blocks * config.block_size
                if lanes
                else config.num_samples,
            ),
        }

    def _track(
        self, steps: np.ndarray, places: np.ndarray, segment: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Finds the track of slots, and what it has taken before them."""
        config = self.config
        since, batch = self._starts[segment], self._batches[segment]
        if config.layout != "lanes":
            count = self._taken[segment] + places + (steps - since) * batch
            return np.zeros_like(count), count
        share = batch // config.canonical_ranks
        rank, place = np.divmod(places, share)
        worker = steps % config.canonical_workers
        turns = _turns_before(steps, worker, config.canonical_workers)
        turns = turns - _turns_before(since, worker, config.canonical_workers)
        count = self._lane_taken[segment, worker] + turns * share + place
        return rank * config.canonical_workers + worker, count

    def _slice(self, track: np.ndarray, places: int) -> tuple[np.ndarray, np.ndarray]:
        """Finds (start, length) of the part that tracks own of a line: equal parts."""
        num_tracks = self.config.num_lanes if self.config.layout == "lanes" else 1
        start = track * places // num_tracks
        return start, (track + 1) * places // num_tracks - start

    def _take_new(self, track: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Finds what tracks take once nothing is owed."""
        start, length = self._slice(track, self.config.num_samples)
        epoch, count = np.divmod(count, length)
        epoch += self.first_epoch
        return epoch, self._find(start, length, epoch, count)

    def _find(
        self, start: np.ndarray, length: np.ndarray, epoch: np.ndarray, count: np.ndarray
    ) -> np.ndarray:
        """Finds the samples that slices of the line give in an epoch after `count` others."""
        if self.config.layout == "lanes":
            return self._line.samples(start, length, epoch=epoch, taken=count)
        if self.config.layout == "global":
            return self._line.shuffled(count, epoch=epoch)
        return count

    def _rest_place(self, start: np.ndarray, length: np.ndarray, count: np.ndarray) -> np.ndarray:
        """Finds the places of the rest's line that tracks take, in the manner of the layout."""
        assert self._rest is not None
        config = self.config
        since = np.full(count.shape, config.since)
        if config.layout == "lanes":
            # No blocks to be shuffled: old lanes are, and each had its own.
            return self._line.places(start, length, epoch=since, taken=count)
        if config.layout == "global":
            key = keyed_array(config.seed, _KEY_REST, config.since)
            return permute(count, size=max(1, self._rest.length), key=key)
        return count


def _turns_before(steps: np.ndarray, worker: np.ndarray, num_workers: int) -> np.ndarray:
    """Counts the steps before `steps` that are `worker` modulo `num_workers`: int64."""
    turns: np.ndarray = (steps - worker + num_workers - 1) // num_workers
    return turns
