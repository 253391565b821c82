"""The order of samples: a pure function from (step, position) to (epoch, sample).

A *slot* is position p of the global batch of optimizer step t; slots are numbered g = t * B + p.
`Order.slots` says which sample is in a slot. Nothing else does: rank r of W takes the positions
`rank_positions(r, W, B)`, worker k of K builds the steps t with t mod K = k, and neither W nor K
enters the function. So global batches are the same for any number of ranks, workers and threads;
resuming is evaluating at another step; the state is the step and the few integers of `OrderConfig`.

**An epoch is exactly N consecutive slots**: epoch e is the slots e * N to (e + 1) * N - 1. How the
sample of a slot is found, in the layout "lanes":

1. *Slot to lane* (lanes.py). The run has U canonical ranks with Kc canonical workers each, U * Kc
   lanes. Position p belongs to canonical rank u = p div (B/U), step t to canonical worker
   k = t mod Kc. A rank or worker of any run that divides the canonical ones owns whole lanes, and
   so few shards.
2. *Lane to line.* An epoch is a line of N places. How many of the epoch's slots a lane has is known
   in closed form; the lanes own that many places each, one lane after the other, and a lane's slots
   take its places in turn. This is a bijection of the epoch's slots and the line's places for all
   N, B, U and Kc.
3. *Along a lane* (line.py). The slice is cut into A sub-slices that are read side by side: row
   after row, one place from each, in an order shuffled per row. So neighbours in a lane come from A
   distant places, while only A blocks per lane are open at a time. A is at least B/U, the samples
   of one turn of a lane.
4. *Line to sample* (line.py). Blocks of c consecutive places are shuffled over the whole line, the
   places of a block are shuffled inside it, and the result is rotated by a different amount each
   epoch (blocks then meet the shards' borders, and the short last block other samples, elsewhere).

Samples are numbered through the concatenated shards, which may be uneven; a block is a range of
one shard (two where it crosses a border), the unit in which remote data is read.

The layout "global" is for datasets too small to fill the lanes: slot n of an epoch is place n of a
shuffle of the whole epoch. "sequential" is "global" without the shuffle.

A change of the batch size (`ramp`), of the width or of the number of samples (`before`) begins a
new *segment*: its slots are counted from its first step. It first shows the remainder of the epoch
that the segment before was in (remainder.py), dealt to its own lanes, then its own epochs.

What a small block costs: the sub-slices must not all change blocks in the same row (a burst of
reads). No phases are needed for that, only a block size for which the sub-slices' starts are
spread evenly modulo c; `pick_block_size` finds one near the size that was asked for.

Integer arithmetic only; memory is proportional to the number of slots asked for and to the lanes,
and nothing of length N exists. This module decides no reading, no mixing (mixture.py) and no
packing (packing.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from loader.order.config import MOST_CHANGES, OrderConfig, RampStep, batch_sizes, widened
from loader.order.lanes import Lanes, OneTrack
from loader.order.line import Line
from loader.order.permutation import keyed_array, permute
from loader.order.remainder import EpochRemainder
from loader.order.slots import Slots, require_count, require_slots, require_step
from shardspec.errors import ConfigError

_KEY_REST = 6

_KEPT_EPOCHS = 4

KEPT_STEPS = 64
"""Steps before a change that stay described after it."""


class Order:
    """The order of one dataset; immutable, cheap to build and to send to other processes."""

    def __init__(self, config: OrderConfig) -> None:
        """Builds the segments.

        Raises:
          ConfigError: `order_before`, the configuration owes something else than the order before.
        """
        self.config = config
        chain = [config]
        while chain[-1].before is not None:
            chain.append(chain[-1].before)
        known: list[_Segment] = []
        for part in reversed(chain):
            segments = _segments(part, known[-1] if known else None)
            known += segments
        if len(known) > MOST_CHANGES + 1:
            raise ConfigError("order_changes", changes=len(known) - 1, most=MOST_CHANGES)
        self._segments = segments
        self._known = tuple(known)
        self._starts = np.array([segment.step for segment in segments], np.int64)
        self._batches = np.array([s.lanes.global_batch_size for s in segments], np.int64)

    def slots(self, step: int | np.ndarray, positions: int | np.ndarray) -> Slots:
        """Evaluates the order at slots: O(1) at any step, vectorised over many.

        Args:
          step: Optimizer steps from `since` on, int64.
          positions: Positions in the global batch, 0 to B - 1; broadcasts with `step`, so
            `slots(np.arange(4)[:, None], positions)` looks four steps ahead.

        Returns:
          Arrays of the broadcast shape, at least one axis.

        Raises:
          ConfigError: `order_slot`, a step or position outside the run, or a step whose samples are
            owed by an order that the configuration no longer holds.
        """
        config = self.config
        steps, places = np.broadcast_arrays(
            np.atleast_1d(np.asarray(step, np.int64)), np.asarray(positions, np.int64)
        )
        shape = steps.shape
        steps, places = steps.ravel(), places.ravel()
        segment_of = np.searchsorted(self._starts, steps, side="right") - 1
        require_slots(steps, places, self._batches[segment_of], since=config.since)
        epoch, sample = np.empty(len(steps), np.int64), np.empty(len(steps), np.int64)
        real = np.ones(len(steps), np.bool_)
        if config.tail != "wrap":
            epoch, steps = np.divmod(steps, config.steps_per_epoch)
            count = steps * config.global_batch_size + places
            # What exceeds the epoch is padding that repeats it from its start.
            real = count < config.num_samples
            steps, places = np.divmod(count % config.num_samples, config.global_batch_size)
            for number, chosen in groups(epoch):
                part = self._segments[0].whole_epoch(number)
                sample[chosen] = part.at(steps[chosen], places[chosen])
        else:
            for i, own in groups(segment_of):
                segment = self._segments[i]
                epoch[own], sample[own] = segment.find(steps[own] - segment.step, places[own])
        return Slots(
            dataset=np.zeros(shape, np.int64),
            epoch=epoch.reshape(shape),
            sample=sample.reshape(shape),
            real=real.reshape(shape),
        )

    def epoch_start(self, epoch: int) -> int:
        """Returns the step at which a pass over the data begins; epoch 0 begins at step 0.

        With "wrap" it is the first step whose slots all belong to this epoch or later ones: the
        batch at the border holds the end of one epoch and the beginning of the next, and counts
        to the pass of the first.
        """
        config = self.config
        if config.tail != "wrap":
            return epoch * config.steps_per_epoch
        known = [segment for segment in self._known if segment.first_epoch <= epoch]
        if not known:  # over before what is known begins
            return self._known[0].step if epoch > 0 else 0
        segment = known[-1]
        slots = segment.owed + (epoch - segment.first_epoch) * segment.num_samples
        return segment.step + -(-slots // segment.lanes.global_batch_size)

    def num_steps(self, epoch: int = 0) -> int:
        """Counts the steps of a pass over the data; exact, from the numbers alone."""
        return self.epoch_start(epoch + 1) - self.epoch_start(epoch)

    def batch_at(self, step: int) -> tuple[int, int]:
        """Returns the global batch size of a step, and the first step that has had it since."""
        segment = int(np.searchsorted(self._starts, step, side="right")) - 1
        return int(self._batches[segment]), int(self._starts[segment])

    def continued(self, config: OrderConfig, *, step: int) -> Order:
        """Returns the order that continues from a step as another configuration lays it out.

        The epoch is finished first: its remainder is laid out anew in the other width, then the
        other order's epochs follow. Every sample comes once per epoch; samples that the other
        configuration has more come from the next epoch on. Of this order only what is still owed
        at the step is kept.

        Raises:
          ConfigError: `order_before`.
        """
        own = self.config
        if step <= own.since:
            past = {name: getattr(own, name) for name in ("since", "first_epoch", "owed", "before")}
            return Order(replace(config, **past))
        if self._is_laid_out_as(config, step=step):
            return self
        begun = [segment for segment in self._segments if segment.step < step]
        last = begun[-1]
        before = replace(own, ramp=tuple(change for change in own.ramp if change.step < step))
        if (step - last.step) * last.lanes.global_batch_size >= last.owed:
            before = replace(
                own,
                global_batch_size=last.lanes.global_batch_size,
                ramp=(),
                since=last.step,
                first_epoch=last.first_epoch,
                owed=last.owed,
                before=None,
            )
        first_epoch, rest = last.remainder(step)
        return Order(
            replace(
                config,
                since=step,
                first_epoch=first_epoch,
                owed=rest.length if rest else 0,
                before=before if rest else None,
            )
        )

    def _is_laid_out_as(self, config: OrderConfig, *, step: int) -> bool:
        own = self.config
        batch = self.batch_at(step)[0]
        if own.ramp and own.ramp[-1].step >= step:
            return False
        past = {name: getattr(own, name) for name in ("since", "first_epoch", "owed", "before")}
        return replace(config, **past) == replace(own, global_batch_size=batch, ramp=())

    def changed(self, *, step: int, global_batch_size: int) -> Order:
        """Returns the order with another global batch size from a step on.

        The epoch is finished first, so it still shows each sample once. Changes that are over by
        then are dropped.

        Raises:
          ConfigError: `change_tail`, `order_step`, `order_count`, `order_changes`,
            `batch_not_divisible`.
        """
        require_step(step)
        require_count("global_batch_size", global_batch_size)
        if step > 0 and self.config.tail != "wrap":
            raise ConfigError("change_tail", tail=self.config.tail, step=step)
        config = self._pruned(step)
        change = RampStep(step=step, global_batch_size=global_batch_size)
        if step == 0:
            return Order(replace(config, global_batch_size=global_batch_size, ramp=()))
        kept = tuple(change for change in config.ramp if change.step < step)
        if step > config.since and (kept or (config,))[-1].global_batch_size == global_batch_size:
            return Order(replace(config, ramp=kept))  # a change is taken back
        return Order(replace(config, ramp=(*kept, change)))

    def _pruned(self, step: int) -> OrderConfig:
        """Drops the segments of which nothing is owed any more some steps before a step: those
        who hand out batches ahead of their consumer save states that are a few steps older."""
        config, step = self.config, max(self.config.since, step - KEPT_STEPS)
        begun = [segment for segment in self._segments if segment.step <= step]
        ends = [*(segment.step for segment in begun[1:]), step]
        for i in reversed(range(len(begun))):
            segment, batch = begun[i], begun[i].lanes.global_batch_size
            if (ends[i] - segment.step) * batch < segment.owed:
                continue  # what is left of an epoch is known by the segments before
            if segment.step == 0:
                return config
            ramp = tuple(change for change in config.ramp if change.step > segment.step)
            first = RampStep(step=segment.step, global_batch_size=batch)
            return replace(
                config,
                ramp=(first, *ramp),
                since=segment.step,
                first_epoch=segment.first_epoch,
                owed=segment.owed,
                before=None,
            )
        return config

    def blocks(self, slots: Slots) -> np.ndarray:
        """Numbers the blocks that the samples of slots are read in: int64, of the slots' shape.

        Block j of an epoch is `block_size` consecutive samples; numbers of different epochs have
        nothing to do with each other.
        """
        return self._segments[-1].line.blocks(slots.sample, epoch=slots.epoch)

    def describe(self) -> dict[str, int | str]:
        """Summarises one epoch for people and logs, in plain JSON types."""
        config = self.config
        slots = config.steps_per_epoch * config.global_batch_size
        lanes = config.layout == "lanes"
        active, size = widened(config, config.global_batch_size)
        return {
            "layout": config.layout,
            "tail": config.tail,
            "steps_per_epoch": config.steps_per_epoch,
            "padded_slots": slots - config.num_samples if config.tail == "pad" else 0,
            "dropped_samples": config.num_samples - slots if config.tail == "drop_last" else 0,
            "num_lanes": config.num_lanes if lanes else 0,
            "open_blocks": config.num_lanes * active if lanes else 0,
            "open_samples": min(
                config.num_samples,
                config.num_lanes * active * size if lanes else config.num_samples,
            ),
        }


def _segments(config: OrderConfig, before: _Segment | None) -> list[_Segment]:
    """Lays out the segments of a configuration, which continues the last one before."""
    first_epoch, rest = config.first_epoch, None
    if before is not None:
        first_epoch, rest = before.remainder(config.since)
        if (first_epoch, rest.length if rest else 0) != (config.first_epoch, config.owed):
            was = config.before and replace(config.before, before=None).to_dict()
            raise ConfigError("order_before", since=config.since, before=was)
    owed, segments = config.owed, list[_Segment]()
    for change in batch_sizes(config):
        if segments:
            first_epoch, rest = segments[-1].remainder(change.step)
            owed = rest.length if rest else 0
        segments.append(
            _Segment(
                config,
                step=change.step if segments else config.since,
                global_batch_size=change.global_batch_size,
                first_epoch=first_epoch,
                owed=owed,
                rest=rest,
            )
        )
    return segments


class _Segment:
    """The steps of a run that share one batch size; its slots are counted from its first step."""

    def __init__(
        self,
        config: OrderConfig,
        *,
        step: int,
        global_batch_size: int,
        first_epoch: int,
        owed: int,
        rest: EpochRemainder[_Part] | None,
    ) -> None:
        self.step, self.first_epoch, self.owed, self.rest = step, first_epoch, owed, rest
        self.layout, self._seed, self.num_samples = config.layout, config.seed, config.num_samples
        active, size = widened(config, global_batch_size)
        self.line = Line(
            num_samples=config.num_samples,
            seed=config.seed,
            active_blocks=active,
            block_size=size,
            groups=config.canonical_ranks if config.locality == "node" else 0,
        )
        self.lanes: Lanes | OneTrack = OneTrack(global_batch_size=global_batch_size)
        if config.layout == "lanes":
            self.lanes = Lanes(
                global_batch_size=global_batch_size,
                ranks=config.canonical_ranks,
                workers=config.canonical_workers,
            )
        # Borders by (first slot, slots), those asked for last. Replaced as a whole, never changed:
        # of two threads that add borders at once one wins, and the other's are computed again.
        self._borders: dict[tuple[int, int], EpochBorders] = {}

    def find(self, steps: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Finds (epoch, sample) of slots; steps are counted from the segment's first."""
        count = steps * self.lanes.global_batch_size + places
        number = np.where(count < self.owed, -1, (count - self.owed) // self.num_samples)
        sample = np.empty(len(steps), np.int64)
        for i, chosen in groups(number):
            sample[chosen] = self._part(i).at(steps[chosen], places[chosen])
        return self.first_epoch + number, sample

    def remainder(self, step: int) -> tuple[int, EpochRemainder[_Part] | None]:
        """Finds the first epoch after the one that a step is in, and what is left of that.

        Returns:
          (first epoch, remainder), None where the step begins with a new epoch.
        """
        count = (step - self.step) * self.lanes.global_batch_size
        number = -1
        if count >= self.owed:
            number, inside = divmod(count - self.owed, self.num_samples)
            if not inside:
                return self.first_epoch + number, None
        part = self._part(number)
        taken = self.lanes.counts(count) - part.borders.before
        return self.first_epoch + number + 1, EpochRemainder(part, taken=taken)

    def whole_epoch(self, epoch: int) -> _Part:
        """An epoch that begins with the segment's first slot, as every pass of a tail does."""
        return _Part(segment=self, borders=self._find_borders(0, self.num_samples), epoch=epoch)

    def _part(self, number: int) -> _Part:
        """Gives epoch `first_epoch + number`; number -1 is what is owed of the one before."""
        size = self.num_samples
        if number < 0:
            return _Part(
                segment=self,
                borders=self._find_borders(0, self.owed),
                epoch=self.first_epoch - 1,
                owed=True,
            )
        borders = self._find_borders(self.owed + number * size, size)
        return _Part(segment=self, borders=borders, epoch=self.first_epoch + number)

    def _find_borders(self, first: int, slots: int) -> EpochBorders:
        key = (first, slots)
        found = self._borders.get(key)
        if found is None:
            before = self.lanes.counts(first)
            lengths = self.lanes.counts(first + slots) - before
            found = EpochBorders(
                before=before, lengths=lengths, starts=np.cumsum(lengths) - lengths
            )
            kept = list(self._borders.items())[1 - _KEPT_EPOCHS :]
            self._borders = {**dict(kept), key: found}
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochBorders:
    """How a run of slots is dealt to the tracks: int64 [tracks] each."""

    before: np.ndarray
    """Slots of each track before the first."""
    lengths: np.ndarray
    """Slots of each track in the run."""
    starts: np.ndarray
    """First place of each track on the line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One epoch of a segment, or what the segment owes of the epoch before: an `EpochPart`."""

    segment: _Segment
    borders: EpochBorders
    epoch: int
    owed: bool = False

    @property
    def lengths(self) -> np.ndarray:
        return self.borders.lengths

    def at(self, steps: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Finds the samples of slots; steps are counted from the segment's first."""
        track, count = self.segment.lanes.find(steps, places)
        return self.samples(track, count - self.borders.before[track])

    def samples(self, track: np.ndarray, count: np.ndarray) -> np.ndarray:
        part = self
        while part.owed:  # not by recursion: there may be hundreds of changes
            rest = part.segment.rest
            if rest is None:
                raise ConfigError("order_slot.over", where="step", since=part.segment.step)
            track, count = rest.find(part._place(track, count))
            part = rest.part
        start, length = part.borders.starts[track], part.borders.lengths[track]
        line, layout = part.segment.line, part.segment.layout
        epoch = np.full(count.shape, part.epoch)
        if layout == "lanes":
            return line.samples(start, length, epoch=epoch, taken=count)
        return line.shuffled(count, epoch=epoch) if layout == "global" else count

    def _place(self, track: np.ndarray, count: np.ndarray) -> np.ndarray:
        """Finds places on the line of what is owed."""
        segment = self.segment
        if segment.layout == "lanes":
            # No blocks to be shuffled: those of the old lanes are.
            start, length = self.borders.starts[track], self.borders.lengths[track]
            since = np.full(count.shape, segment.step)
            return segment.line.places(start, length, epoch=since, taken=count)
        if segment.layout == "global":
            key = keyed_array(segment._seed, _KEY_REST, segment.step)
            return permute(count, size=max(1, segment.owed), key=key)
        return count


def groups(number: np.ndarray) -> list[tuple[int, slice | np.ndarray]]:
    """Lists the distinct values of an array, and where each is."""
    found = np.unique(number).tolist()
    if len(found) == 1:
        return [(found[0], slice(None))]
    return [(one, np.flatnonzero(number == one)) for one in found]
