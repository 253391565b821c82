"""Mixtures of datasets in closed form: which dataset, epoch and sample is in a slot.

The proportions are spelled out once, as the *interleaving pattern* (interleave.py): M slots, a
whole number of batches, in which dataset d has its weight's share, rounded down; what rounding
leaves over is dealt to the datasets from repetition to repetition (pattern.py). The run repeats the
pattern, so

* any prefix of a segment holds each dataset's weight times its slots to within six samples, for
  ever (proven in pattern.py; a random draw per sample is off by hundreds);
* how many slots of d came before a slot, and how many of d in the slot's lane, are closed forms
  over tables of M numbers: every slot of the run is O(1), and the state is the step.

**Each dataset's epochs are exact in its own count**: epoch e of d is the slots e * N_d to
(e + 1) * N_d - 1 of d. The lanes of d own as many places of its epoch line as they have of these
slots; inside, the stages of order.py apply. A dataset too small for lanes is shuffled as a whole.
Each dataset shuffles by its own seed.

Weights come from `mixture_weights` (weights.py). A change of weights, batch size or width begins a
new segment at a given step, from which proportions are counted anew. Each dataset finishes its
epoch first: the remainder (remainder.py) is dealt to its new lanes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np

from loader.order.config import ACTIVE_TURNS, pick_block_size
from loader.order.line import Line
from loader.order.mixture_config import (
    MixtureBase,
    MixtureChange,
    MixtureConfig,
    MixtureMember,
    MixturePast,
)
from loader.order.order import KEPT_STEPS, EpochBorders, groups
from loader.order.pattern import InterleavePattern, require_pattern
from loader.order.permutation import keyed_array, permute
from loader.order.quality import LaneReading
from loader.order.remainder import EpochRemainder
from loader.order.slots import Slots, is_whole, require_slots, require_step
from shardspec.errors import ConfigError
from shardspec.keyed import dataset_seed

Stop = Literal["first_exhausted", "all_exhausted"]


_KEY_REST = 19


def require_stop(stop: Stop | int) -> None:
    """Refuses where a pass cannot end.

    Raises:
      ConfigError: `mixture_stop`.
    """
    steps = is_whole(stop) and 1 <= stop < 2**62  # type: ignore[operator]
    if not steps and not (isinstance(stop, str) and stop in get_args(Stop)):
        raise ConfigError("mixture_stop", got=repr(stop))


def mixture_blocks(weights: Sequence[float], share: int, *, least: int = 8) -> list[int]:
    """Chooses the active blocks of each dataset in a lane that has `share` samples of a turn."""
    active, total = max(least, ACTIVE_TURNS * share), math.fsum(weights)
    return [max(1, math.ceil(active * (weight / total))) for weight in weights]


class MixtureOrder:
    """The order of a mixture; immutable, with tables of M numbers per segment and none of N."""

    def __init__(
        self,
        config: MixtureConfig,
        *,
        stop: Stop | int = "first_exhausted",
        known: Mapping[MixtureChange, InterleavePattern] | None = None,
    ) -> None:
        """Builds the tables.

        Args:
          config: The mixture.
          stop: Where a pass ends: when the first, or the last, dataset has been seen once, or
            after a number of steps.
          known: Patterns of segments of the same datasets, which need not be laid out again.

        Raises:
          ConfigError: `mixture_stop`; `mixture_weights`, more datasets than a pattern can hold;
            `mixture_batch`, a global batch of which it cannot hold one per canonical worker.
        """
        require_stop(stop)
        self.config = config
        self._laid_out = known or {}
        self.stop: Stop | int = stop
        self._pass_steps: int | None = None
        everyone = config.everyone
        self._sizes = np.array([member.num_samples for member in everyone], np.int64)
        self._seeds = np.array(
            [dataset_seed(config.seed, member.name) for member in everyone], np.uint64
        )
        # Ties between datasets go by their names: the order is that of a set of datasets.
        by_name = sorted(range(len(everyone)), key=lambda d: everyone[d].name)
        self._by_name = np.array(by_name, np.int64)
        # Ended parts, then those described: what a dataset owes is found in the parts before.
        self._past: list[_Segment] = []
        for ended in config.past:
            self._past.append(
                self._segment(
                    ended.segment,
                    earlier=tuple(self._past),
                    until=ended.until,
                    counted=np.zeros(len(everyone), np.int64),
                    first_epoch=np.array(ended.first_epoch, np.int64),
                    owed=np.array(ended.owed, np.int64),
                )
            )
        self._segments: list[_Segment] = []
        for part in config.segments():
            self._segments.append(self._continue(part))
        self._starts = np.array([segment.step for segment in self._segments], np.int64)

    def slots(self, step: int | np.ndarray, positions: int | np.ndarray) -> Slots:
        """Evaluates the mixture at slots: O(1) at any step, vectorised over many.

        Args:
          step: Optimizer steps from 0, int64.
          positions: Positions in the global batch; broadcasts with `step`.

        Returns:
          Arrays of the broadcast shape, at least one axis; `real` is True everywhere.

        Raises:
          ConfigError: `order_slot`, a step or position outside the run.
        """
        steps, places = np.broadcast_arrays(
            np.atleast_1d(np.asarray(step, np.int64)), np.asarray(positions, np.int64)
        )
        shape = steps.shape
        steps, places = steps.ravel(), places.ravel()
        dataset, epoch, sample = (np.empty(len(steps), np.int64) for _ in range(3))
        segment_of = np.searchsorted(self._starts, steps, side="right") - 1
        for i, chosen in groups(segment_of):
            segment = self._segments[max(0, i)]
            batch = segment.global_batch_size
            require_slots(steps[chosen], places[chosen], np.array([batch]), since=self.config.since)
            slot = (steps[chosen] - segment.step) * batch + places[chosen]
            dataset[chosen], epoch[chosen], sample[chosen] = segment.find(slot)
        return Slots(
            dataset=dataset.reshape(shape),
            epoch=epoch.reshape(shape),
            sample=sample.reshape(shape),
            real=np.ones(shape, np.bool_),
        )

    def epoch_start(self, epoch: int) -> int:
        """Returns the step at which a pass begins; all passes of a mixture have equally many.

        Datasets keep their own epochs, and go on from one pass to the next without a gap.

        Raises:
          ConfigError: `mixture_never`, as `num_steps`.
        """
        if self._pass_steps is None:
            stop = self.stop
            self._pass_steps = stop if isinstance(stop, int) else self.num_steps(stop)
        return epoch * self._pass_steps

    def batch_at(self, step: int) -> tuple[int, int]:
        """Returns the global batch size of a step, and the first step that has had it since."""
        i = int(np.searchsorted(self._starts, step, side="right")) - 1
        return self._segments[i].global_batch_size, self._segments[i].step

    def changed(
        self,
        *,
        step: int,
        global_batch_size: int,
        weights: Sequence[float] | None = None,
        canonical_ranks: int | None = None,
    ) -> MixtureOrder:
        """Returns the order with another global batch size, weights or width from a step on.

        Every dataset finishes its epoch first. Changes whose consequences are over by then are
        dropped.

        Raises:
          ConfigError: `mixture_weights`, `mixture_changes`, `order_step`, `batch_not_divisible`;
            `mixture_never`, as `num_steps`.
        """
        require_step(step)
        config = self._pruned(step).changed(
            step=step,
            global_batch_size=global_batch_size,
            weights=weights,
            canonical_ranks=canonical_ranks,
        )
        parts = (*self._past, *self._segments)
        known = {part.change: part._pattern for part in parts if part._pattern is not None}
        order = MixtureOrder(config, stop=self.stop, known=known)
        if weights is not None and self.stop == "all_exhausted":
            order.epoch_start(1)  # refuses now what the next pass would
        return order

    def with_members(
        self,
        members: Sequence[MixtureMember],
        *,
        step: int,
        keep: int | None = None,
        global_batch_size: int | None = None,
        canonical_ranks: int | None = None,
    ) -> MixtureOrder:
        """Returns the order of the same run with other datasets from a step on.

        A dataset that stays continues its epoch at its own count. One that is new begins with its
        epoch 0. One that is left out keeps its count as if its weight were 0: if it returns, it
        continues there. Where only the sequence of the datasets differs, no sample moves.

        Args:
          members: All datasets from then on, and their weights.
          step: The first step with them.
          keep: An earlier step from which on the order stays described; None: some steps before.
          global_batch_size, canonical_ranks: From then on; None: as they were.

        Raises:
          ConfigError: As `changed`.
        """
        require_step(step)
        config = self._pruned(step if keep is None else keep).with_members(members, step=step)
        last = config.segments()[-1]
        batch = last.global_batch_size if global_batch_size is None else global_batch_size
        ranks = last.canonical_ranks if canonical_ranks is None else canonical_ranks
        before = {member.name: member.weight for member in self.config.members}
        same = {member.name: member.weight for member in members} == before
        if not same or (batch, ranks) != (last.global_batch_size, last.canonical_ranks):
            config = config.changed(
                step=step,
                global_batch_size=batch,
                weights=None if same else [member.weight for member in members],
                canonical_ranks=ranks,
            )
        return MixtureOrder(config, stop=self.stop)

    def ranks_at(self, step: int) -> int:
        """Returns the canonical ranks of a step."""
        i = max(0, int(np.searchsorted(self._starts, step, side="right")) - 1)
        return self._segments[i].change.canonical_ranks

    def reading_at(self, step: int) -> list[LaneReading]:
        """Tells how lanes read each dataset in a step: those of the mixture, in their sequence."""
        i = max(0, int(np.searchsorted(self._starts, step, side="right")) - 1)
        segment = self._segments[i]
        total, laned = math.fsum(segment.change.weights), segment.pattern.laned
        active, size = (
            np.asarray(values) for values in (segment.line.active_blocks, segment.line.block_size)
        )
        return [
            LaneReading(
                weight=segment.change.weights[d] / total,
                num_samples=member.num_samples,
                active_blocks=int(active[d]) if laned[d] else 0,
                block_size=int(size[d]),
            )
            for d, member in enumerate(self.config.members)
        ]

    def counts(self, step: int) -> np.ndarray:
        """Counts the slots of each dataset before a step: int64 [datasets], in closed form."""
        i = int(np.searchsorted(self._starts, step, side="right")) - 1
        segment = self._segments[i]
        slots = (step - segment.step) * segment.global_batch_size
        counts: np.ndarray = segment.counted + segment.pattern.counts(slots)
        return counts

    def num_steps(self, stop: Stop = "first_exhausted") -> int:
        """Counts the steps until the first, or the last, dataset has been seen once.

        A dataset counts as seen with the step that holds its N-th sample.

        Raises:
          ConfigError: `mixture_never`, a dataset that the rule waits for has weight 0 at the end.
        """
        steps = [self._step_of_last(d) for d in range(len(self.config.members))]  # none removed
        reached = [step for step in steps if step is not None]
        if not reached or (stop == "all_exhausted" and len(reached) < len(steps)):
            missing = [
                member.name
                for member, step in zip(self.config.members, steps, strict=True)
                if step is None
            ]
            raise ConfigError("mixture_never", stop=stop, datasets=", ".join(missing))
        return min(reached) if stop == "first_exhausted" else max(reached)

    def describe(self) -> list[dict[str, Any]]:
        """Summarises the datasets at the start of the run: weight, samples per step, layout."""
        segment = self._segments[0]
        pattern = segment.pattern
        weights = segment.change.weights
        total = math.fsum(weights)
        return [
            {
                "name": member.name,
                "num_samples": member.num_samples,
                "weight": weights[d] / total,
                "samples_per_step": weights[d] / total * segment.global_batch_size,
                "layout": "lanes" if pattern.laned[d] else "global",
                "block_size": int(np.asarray(segment.line.block_size)[d])
                if pattern.laned[d]
                else 1,
            }
            for d, member in enumerate(self.config.members)
        ]

    def _continue(self, part: MixtureChange) -> _Segment:
        """Begins a segment where the one before ends."""
        num, base = len(self._sizes), self.config.base
        counted, owed, first_epoch = (np.zeros(num, np.int64) for _ in range(3))
        if self._segments:
            before = self._segments[-1]
            before.until = part.step
            counted, first_epoch, owed = before.ends()
        elif base is not None:
            counted, owed, first_epoch = (
                np.array(values, np.int64) for values in (base.counted, base.owed, base.first_epoch)
            )
        return self._segment(
            part,
            earlier=(*self._past, *self._segments),
            until=None,
            counted=counted,
            first_epoch=first_epoch,
            owed=owed,
        )

    def _segment(
        self,
        part: MixtureChange,
        *,
        earlier: tuple[_Segment, ...],
        until: int | None,
        counted: np.ndarray,
        first_epoch: np.ndarray,
        owed: np.ndarray,
    ) -> _Segment:
        config = self.config
        require_pattern(part, workers=config.canonical_workers)
        return _Segment(
            part,
            pattern=self._laid_out.get(part),
            make_pattern=partial(
                InterleavePattern,
                part,
                sizes=self._sizes,
                by_name=self._by_name,
                seed=config.seed,
                workers=config.canonical_workers,
            ),
            line=self._line(part),
            earlier=earlier,
            until=until,
            counted=counted,
            first_epoch=first_epoch,
            owed=owed,
        )

    def _line(self, part: MixtureChange) -> Line:
        """Chooses each dataset's active blocks, by weight, and its block size.

        As for one dataset, a lane reads at least as many blocks of a dataset side by side as it
        takes of its samples in a turn.
        """
        config = self.config
        share = part.global_batch_size // part.canonical_ranks
        blocks = mixture_blocks(part.weights, share, least=config.active_blocks)
        lanes = part.canonical_ranks * config.canonical_workers
        sizes = [
            pick_block_size(int(size), num_lanes=lanes, active_blocks=own, target=config.block_size)
            for size, own in zip(self._sizes, blocks, strict=True)
        ]
        return Line(
            num_samples=self._sizes,
            seed=self._seeds,
            active_blocks=np.array(blocks),
            block_size=np.array(sizes),
            groups=part.canonical_ranks if config.locality == "node" else 0,
        )

    def _pruned(self, step: int) -> MixtureConfig:
        """Drops the segments of which nothing is owed any more some steps before a step: those
        who hand out batches ahead of their consumer save states that are a few steps older."""
        step = max(self.config.since, step - KEPT_STEPS)
        i = max(0, int(np.searchsorted(self._starts, step, side="left")) - 1)
        config, segment = self.config, self._segments[i]
        counts = segment.pattern.counts((step - segment.step) * segment.global_batch_size)
        needed: list[_Segment] = []
        for d in np.flatnonzero(counts < segment.owed).tolist():
            needed += segment.read_before(d)
        past = tuple(
            MixturePast(
                segment=part.change,
                until=step if part.until is None else part.until,
                first_epoch=tuple(part.first_epoch.tolist()),
                owed=tuple(part.owed.tolist()),
            )
            for part in segment.earlier
            if any(part is one for one in needed)
        )
        if i == 0:
            return replace(config, past=past)
        return replace(
            config,
            changes=config.changes[i:],
            past=past,
            base=MixtureBase(
                segment=segment.change,
                counted=tuple(segment.counted.tolist()),
                first_epoch=tuple(segment.first_epoch.tolist()),
                owed=tuple(segment.owed.tolist()),
                seen_by=tuple(self._seen_by(d, segment.step) for d in range(len(self._sizes))),
            ),
        )

    def _seen_by(self, dataset: int, step: int) -> int | None:
        found = self._step_of_last(dataset)
        return found if found is not None and found <= step else None

    def _step_of_last(self, dataset: int) -> int | None:
        """Finds the number of steps after which a dataset's N-th sample has been read."""
        base = self.config.base
        if base is not None and base.seen_by[dataset] is not None:
            return base.seen_by[dataset]
        size = int(self._sizes[dataset])
        ends = [*self._starts.tolist()[1:], None]
        for segment, end in zip(self._segments, ends, strict=True):
            if not segment.change.weights[dataset] > 0:
                continue
            slot = segment.pattern.slot_of(dataset, size - 1 - int(segment.counted[dataset]))
            step: int = segment.step + slot // segment.global_batch_size + 1
            if end is None or step <= end:
                return step
        return None


class _Segment:
    """The steps of a run that share weights, batch size and width."""

    def __init__(
        self,
        change: MixtureChange,
        *,
        pattern: InterleavePattern | None,
        make_pattern: Callable[[], InterleavePattern],
        line: Line,
        earlier: tuple[_Segment, ...],
        until: int | None,
        counted: np.ndarray,
        owed: np.ndarray,
        first_epoch: np.ndarray,
    ) -> None:
        self.change, self.step, self.line = change, change.step, line
        self.global_batch_size = change.global_batch_size
        self._make_pattern = make_pattern
        self._pattern = pattern
        self.earlier = earlier
        """The segments before that are known, in sequence."""
        self.until = until
        """Step at which the segment ends; None: it does not."""
        self.counted = counted
        """int64 [datasets], slots of each dataset before the segment."""
        self.owed = owed
        """int64 [datasets], slots of each dataset from here on that finish the epoch before."""
        self.first_epoch = first_epoch
        """int64 [datasets], the epochs after what is owed."""
        # Remainders by dataset. Pure functions of the segment: written twice, they are the same.
        self._rests: dict[int, EpochRemainder[_Part]] = {}
        # Borders by (dataset, number of the epoch), two of each dataset at most: the epoch that a
        # run is in and the next. A dataset's are replaced as a whole, never changed: of two threads
        # that add borders at once one wins, and the other's are computed again.
        self._borders: list[dict[int, EpochBorders]] = [{} for _ in owed]
        # The borders of the epochs that the run is in; replaced as a whole, never changed.
        self._now: _Now | None = None

    @property
    def pattern(self) -> InterleavePattern:
        """The pattern, laid out when it is first needed: of segments that are over it seldom is."""
        if self._pattern is None:
            self._pattern = self._make_pattern()
        return self._pattern

    def rest(self, dataset: int) -> EpochRemainder[_Part]:
        """Finds what a dataset owes of its epoch when the segment begins.

        Raises:
          ConfigError: `order_slot`, the order no longer holds the segments that know it.
        """
        found = self._rests.get(dataset)
        if found is None:
            before = self._reader_before(dataset)
            if before is None:
                raise ConfigError("order_slot.over", where="step", since=self.step)
            found = self._rests[dataset] = before.remainder(dataset)
        return found

    def _reader_before(self, dataset: int) -> _Segment | None:
        """Finds the last segment before this one in which a dataset was not paused."""
        read = (part for part in reversed(self.earlier) if part.change.weights[dataset] > 0)
        return next(read, None)

    def read_before(self, dataset: int) -> list[_Segment]:
        """Lists the segments that know what a dataset owes when this one begins."""
        found: list[_Segment] = []
        before = self._reader_before(dataset)
        while before is not None:
            found.append(before)
            if int(before.end_counts()[dataset]) >= before.owed[dataset]:
                break
            before = before._reader_before(dataset)
        return found

    def end_counts(self) -> np.ndarray:
        """Counts each dataset's slots of the segment, which has ended: int64 [datasets]."""
        assert self.until is not None, "the segment goes on"
        return self.pattern.counts((self.until - self.step) * self.global_batch_size)

    def ends(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Finds what holds after the segment, which has ended: int64 [datasets] each.

        Returns:
          (slots before, the first epochs after what is owed, slots owed).
        """
        counts, sizes = self.end_counts(), np.asarray(self.line.num_samples)
        number, inside = np.divmod(counts - self.owed, sizes)
        begun = counts >= self.owed
        whole = begun & (inside == 0)
        first_epoch = self.first_epoch + np.where(begun, number + ~whole, 0)
        owed = np.where(begun, np.where(whole, 0, sizes - inside), self.owed - counts)
        return self.counted + counts, first_epoch, owed

    def remainder(self, dataset: int) -> EpochRemainder[_Part]:
        """Finds what a dataset owes when the segment ends, in the middle of its epoch."""
        count = int(self.end_counts()[dataset])
        number, owed = -1, int(self.owed[dataset])
        if count >= owed:
            number = (count - owed) // int(np.asarray(self.line.num_samples)[dataset])
        part = _Part(segment=self, dataset=dataset, number=number)
        taken = (
            self.pattern.cell_counts(dataset, count) - self._find_borders(dataset, number).before
        )
        return EpochRemainder(part, taken=taken)

    def find(self, slot: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Finds (dataset, epoch, sample) of slots counted from the segment's start."""
        pattern = self.pattern
        dataset, count, cell, in_cell = pattern.find(slot)
        owed, size = self.owed[dataset], np.asarray(self.line.num_samples)[dataset]
        number = np.where(count < owed, -1, (count - owed) // size)
        # Where each slot's cell begins on its line, how long it is there, and how many slots it had
        # before the epoch.
        start, length = np.zeros_like(count), np.where(number < 0, owed, size)
        before = np.where(number < 0, 0, owed + number * size)
        laned = np.flatnonzero(pattern.laned[dataset])
        if len(laned):
            borders = self._borders_of(dataset[laned], number[laned], cell[laned])
            before[laned], start[laned], length[laned] = borders
        in_cell -= before
        sample = np.empty(len(slot), np.int64)
        new = np.flatnonzero(number >= 0)
        if len(new) == len(slot):
            sample = self._take(dataset, self.first_epoch[dataset] + number, start, length, in_cell)
        else:
            epoch_of = self.first_epoch[dataset[new]] + number[new]
            sample[new] = self._take(dataset[new], epoch_of, start[new], length[new], in_cell[new])
            for (d, _), own in _pairs(dataset, np.where(number < 0, -1, 0)):
                if number[own][0] < 0:
                    sample[own] = self._owed(d, start[own], length[own], in_cell[own])
        return dataset, self.first_epoch[dataset] + number, sample

    def samples(
        self, dataset: int, number: int, track: np.ndarray, count: np.ndarray
    ) -> np.ndarray:
        """Finds the samples that a dataset's cells read after `count` others of an epoch."""
        segment = self
        while number < 0:  # not by recursion: there may be hundreds of changes
            start, length = segment._cells(dataset, number, track)
            rest = segment.rest(dataset)
            track, count = rest.find(segment._owed_places(dataset, start, length, count))
            segment, number = rest.part.segment, rest.part.number
        start, length = segment._cells(dataset, number, track)
        datasets = np.full(len(track), dataset)
        epoch = segment.first_epoch[datasets] + number
        return segment._take(datasets, epoch, start, length, count)

    def _cells(self, dataset: int, number: int, track: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Looks up where cells begin on a dataset's line, and how long they are."""
        borders = self._find_borders(dataset, number)
        return borders.starts[track], borders.lengths[track]

    def lengths(self, dataset: int, number: int) -> np.ndarray:
        """How many samples a dataset's cells have of an epoch: int64 [its cells]."""
        return self._find_borders(dataset, number).lengths

    def _take(
        self,
        dataset: np.ndarray,
        epoch: np.ndarray,
        start: np.ndarray,
        length: np.ndarray,
        count: np.ndarray,
    ) -> np.ndarray:
        """Finds samples of whole epochs."""
        sample = np.empty(len(dataset), np.int64)
        for laned, own in _by_layout(self.pattern.laned[dataset]):
            line = self._line(dataset[own])
            if laned:
                sample[own] = line.samples(
                    start[own], length[own], epoch=epoch[own], taken=count[own]
                )
            else:
                sample[own] = line.shuffled(count[own], epoch=epoch[own])
        return sample

    def _owed(
        self, dataset: int, start: np.ndarray, length: np.ndarray, count: np.ndarray
    ) -> np.ndarray:
        """Finds samples of the remainder of a dataset's epoch."""
        return self.rest(dataset).samples(self._owed_places(dataset, start, length, count))

    def _owed_places(
        self, dataset: int, start: np.ndarray, length: np.ndarray, count: np.ndarray
    ) -> np.ndarray:
        """Finds places on the line of what a dataset owes."""
        since = np.full(len(count), self.step)
        datasets = np.full(len(count), dataset)
        if self.pattern.laned[dataset]:
            return self._line(datasets).places(start, length, epoch=since, taken=count)
        if self.rest(dataset).num_tracks > 1:
            key = keyed_array(np.asarray(self.line.seed)[datasets], _KEY_REST, since)
            return permute(count, size=length, key=key)
        return count  # one track was shuffled as a whole, and continues as it would

    def _line(self, dataset: np.ndarray) -> Line:
        line = self.line
        return Line(
            num_samples=np.asarray(line.num_samples)[dataset],
            seed=np.asarray(line.seed)[dataset],
            active_blocks=np.asarray(line.active_blocks)[dataset],
            block_size=np.asarray(line.block_size)[dataset],
            groups=line.groups,
        )

    def _borders_of(
        self, dataset: np.ndarray, number: np.ndarray, cell: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Looks up (before, start, length) of cells in epochs of their datasets."""
        now = self._now
        if now is None or (number > now.number[dataset]).any():
            now = self._now = self._next(now, dataset, number)
        before, start, length = now.before[cell], now.starts[cell], now.lengths[cell]
        other = np.flatnonzero(number != now.number[dataset])
        for (d, epoch), own in _pairs(dataset[other], number[other]):
            borders, chosen = self._find_borders(d, epoch), other[own]
            track = cell[chosen] - self.pattern.first_cell[d]
            before[chosen] = borders.before[track]
            start[chosen], length[chosen] = borders.starts[track], borders.lengths[track]
        return before, start, length

    def _next(self, now: _Now | None, dataset: np.ndarray, number: np.ndarray) -> _Now:
        """Gathers the borders of each dataset's latest epoch in one table over all cells."""
        latest = np.full(len(self.owed), -2) if now is None else now.number.copy()
        np.maximum.at(latest, dataset, number)
        old = [np.zeros(self.pattern.num_cells, np.int64) for _ in range(3)]
        if now is not None:
            old = [now.before.copy(), now.starts.copy(), now.lengths.copy()]
        moved = latest != (now.number if now is not None else -2)
        for d in np.flatnonzero(moved).tolist():
            cells = slice(*self.pattern.first_cell[d : d + 2].tolist())
            borders = self._find_borders(d, int(latest[d]))
            old[0][cells], old[1][cells], old[2][cells] = (
                borders.before,
                borders.starts,
                borders.lengths,
            )
        return _Now(number=latest, before=old[0], starts=old[1], lengths=old[2])

    def _find_borders(self, dataset: int, number: int) -> EpochBorders:
        known = self._borders[dataset]
        found = known.get(number)
        if found is None:
            size, owed = int(np.asarray(self.line.num_samples)[dataset]), int(self.owed[dataset])
            first, stop = (owed + number * size, owed + (number + 1) * size)
            if number < 0:
                first, stop = 0, owed
            before = self.pattern.cell_counts(dataset, first)
            lengths = self.pattern.cell_counts(dataset, stop) - before
            found = EpochBorders(
                before=before, lengths=lengths, starts=np.cumsum(lengths) - lengths
            )
            self._borders[dataset] = {**dict(list(known.items())[-1:]), number: found}
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Now:
    """The borders of one epoch per dataset: of those asked for, the latest."""

    number: np.ndarray
    """int64 [datasets], numbers of the epochs; -2 where none was asked for."""
    before: np.ndarray
    """int64 [cells], as `EpochBorders`; so are the others."""
    starts: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One epoch of a dataset in a segment, or what is owed of one: an `EpochPart`."""

    segment: _Segment
    dataset: int
    number: int

    @property
    def lengths(self) -> np.ndarray:
        return self.segment.lengths(self.dataset, self.number)

    def samples(self, track: np.ndarray, count: np.ndarray) -> np.ndarray:
        return self.segment.samples(self.dataset, self.number, track, count)


def _pairs(
    dataset: np.ndarray, number: np.ndarray
) -> Iterator[tuple[tuple[int, int], slice | np.ndarray]]:
    """Lists the distinct pairs of (dataset, number of the epoch), and where each is."""
    for d, own in groups(dataset):
        for epoch, part in groups(number[own]):
            if isinstance(part, slice):
                yield (d, epoch), own
            else:
                yield (d, epoch), part if isinstance(own, slice) else own[part]


def _by_layout(laned: np.ndarray) -> list[tuple[bool, np.ndarray]]:
    """Splits places by whether their datasets have lanes."""
    return [(kind, np.flatnonzero(laned == kind)) for kind in (True, False)]
