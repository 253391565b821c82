"""Mixtures of datasets in closed form: which dataset, epoch and sample stands in a slot.

The proportions are spelled out once, as the *word* (word.py): M slots, a whole number of batches,
in which dataset d occurs m_d times, m_d / M being its weight to within one slot. The run reads the
word over and over, so

* any prefix of the run holds each dataset's share m_d / M of the slots to within two samples, for
  ever (proven in word.py; a random draw per sample is off by hundreds);
* how many samples of d came before a slot is `words * m_d + its rank in the word`, and in the
  slot's lane `words * quota + its rank among the lane's`: two tables of M numbers make every slot
  of the run O(1), and the state is the step.

Lane w of dataset d owns a part of d's epoch line in proportion to its quota, so all lanes of d
finish an epoch together; inside, order.py's stages apply. A dataset too small for lanes has one
for the whole run, and is shuffled as a whole. Each dataset shuffles by its own seed.

Weights come from `mixture_weights`: rates, root-of-size groups as in the Molmo family, nested,
by samples or by tokens. A change of weights, batch size or width begins a new word at a given step,
from which proportions are counted anew. Each dataset finishes its epoch first: what its lanes still
owe (rest.py) is dealt to its new lanes, so that every sample comes once per epoch all the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from loader.order.config import pick_block_size
from loader.order.line import Line
from loader.order.mixture_config import MixtureConfig
from loader.order.pattern import InterleavePattern
from loader.order.permutation import keyed_array, permute
from loader.order.remainder import EpochRemainder
from loader.order.slots import Slots, require_slots
from shardspec.errors import ConfigError
from shardspec.keyed import dataset_seed

Stop = Literal["first_exhausted", "all_exhausted"]


_KEY_REST = 19


class MixtureOrder:
    """The order of a mixture; immutable, with tables of M numbers per segment and none of N."""

    def __init__(self, config: MixtureConfig, *, stop: Stop | int = "first_exhausted") -> None:
        """Builds the tables.

        Args:
          config: The mixture.
          stop: Where a pass ends: when the first, or the last, dataset has been seen once, or
            after a number of steps.

        Raises:
          ConfigError: `mixture_weights`, more datasets than a word can hold; `mixture_batch`, a
            global batch of which it cannot hold one per canonical worker.
        """
        self.config = config
        self.stop: Stop | int = stop
        self._pass_steps: int | None = None
        self._sizes = np.array([member.num_samples for member in config.members], np.int64)
        self._seeds = np.array(
            [dataset_seed(config.seed, member.name) for member in config.members], np.uint64
        )
        lanes = config.canonical_ranks * config.canonical_workers
        weights = [member.weight for member in config.members]
        shares = [weight / math.fsum(weights) for weight in weights]
        # Fixed for the run, also when weights change, so that a dataset's order is one order.
        self._active = np.array([max(1, round(config.active_blocks * w)) for w in shares])
        self._blocks = np.array(
            [
                pick_block_size(
                    int(size), num_lanes=lanes, active_blocks=int(active), target=config.block_size
                )
                for size, active in zip(self._sizes, self._active, strict=True)
            ]
        )
        self._segments: list[_Segment] = []
        for part in config.segments():
            word = InterleavePattern(
                part, sizes=self._sizes, seed=config.seed, workers=config.canonical_workers
            )
            self._segments.append(self._continue(word, part.step))
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
        for i in np.unique(segment_of).tolist():
            segment = self._segments[max(0, i)]
            chosen = np.flatnonzero(segment_of == i)
            batch = segment.word.global_batch_size
            require_slots(steps[chosen], places[chosen], np.array([batch]))
            slot = (steps[chosen] - segment.step) * batch + places[chosen]
            dataset[chosen], epoch[chosen], sample[chosen] = self._find(segment, slot)
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
        return self._segments[i].word.global_batch_size, self._segments[i].step

    def changed(
        self,
        *,
        step: int,
        global_batch_size: int,
        weights: Sequence[float] | None = None,
        canonical_ranks: int | None = None,
    ) -> MixtureOrder:
        """Returns the order with another global batch size, weights or width from a step on.

        Every dataset finishes its epoch first.

        Raises:
          ConfigError: `mixture_weights`, `mixture_changes`, `batch_not_divisible`.
        """
        config = self.config.changed(
            step=step,
            global_batch_size=global_batch_size,
            weights=weights,
            canonical_ranks=canonical_ranks,
        )
        return MixtureOrder(config, stop=self.stop)

    def counts(self, step: int) -> np.ndarray:
        """Counts the slots of each dataset before a step: int64 [datasets], in closed form."""
        i = int(np.searchsorted(self._starts, step, side="right")) - 1
        segment = self._segments[i]
        slots = (step - segment.step) * segment.word.global_batch_size
        counts: np.ndarray = segment.counted + segment.word.counts(slots)
        return counts

    def num_steps(self, stop: Stop = "first_exhausted") -> int:
        """Counts the steps until the first, or the last, dataset has been seen once.

        A dataset counts as seen with the step that holds its N-th sample.

        Raises:
          ConfigError: `mixture_never`, a dataset that the rule waits for has weight 0 at the end.
        """
        steps = [self._step_of_last(d) for d in range(len(self.config.members))]
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
        """Summarises the datasets at the start of the run: weight asked and met, epoch, layout."""
        word = self._segments[0].word
        total = math.fsum(member.weight for member in self.config.members)
        return [
            {
                "name": member.name,
                "num_samples": member.num_samples,
                "weight": member.weight / total,
                "share": int(word.quotas[d]) / word.num_slots,
                "samples_per_step": int(word.quotas[d]) / word.num_slots * word.global_batch_size,
                "layout": "lanes" if word.laned[d] else "global",
                "block_size": int(self._blocks[d]) if word.laned[d] else 1,
            }
            for d, member in enumerate(self.config.members)
        ]

    def _continue(self, word: InterleavePattern, step: int) -> _Segment:
        """Begins a segment where the one before ends."""
        counted = np.zeros(len(self._sizes), np.int64)
        rests: list[EpochRemainder | None] = [None] * len(self._sizes)
        if self._segments:
            before = self._segments[-1]
            slots = (step - before.step) * before.word.global_batch_size
            counted = before.counted + before.word.counts(slots)
            taken = before.word.taken(slots)
            rests = list(before.rests)
            for dataset in np.flatnonzero(before.word.quotas).tolist():
                lanes = _Lanes(mixture=self, segment=before, dataset=dataset)
                rests[dataset] = EpochRemainder(lanes, taken=taken[lanes.cells])
        return _Segment(
            word=word,
            step=step,
            counted=counted,
            rests=rests,
            owed=np.array([rest.length if rest else 0 for rest in rests], np.int64),
            first_epoch=np.array([rest.first_epoch if rest else 0 for rest in rests], np.int64),
        )

    def _find(
        self, segment: _Segment, slot: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Finds (dataset, epoch, sample) of slots counted from the segment's start."""
        word = segment.word
        words, x = np.divmod(slot, word.num_slots)
        cell = word.cell[x]
        epoch, sample = self._take(segment, cell, words * word.cell_quota[cell] + word.cell_rank[x])
        return word.dataset[x].astype(np.int64), epoch, sample

    def _take(
        self, segment: _Segment, cell: np.ndarray, count: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Finds (epoch, sample) of what lanes take after `count` others of the segment."""
        if not segment.owed.any():
            return self._take_new(segment, cell, count)
        dataset = segment.word.cell_dataset[cell]
        epoch, sample = np.empty_like(count), np.empty_like(count)
        start, length = segment.word.slices(cell, segment.owed)
        old, new = np.flatnonzero(count < length), np.flatnonzero(count >= length)
        place = self._rest_place(segment, dataset[old], start[old], length[old], count[old])
        for number in np.unique(dataset[old]).tolist():
            rest, own = segment.rests[number], dataset[old] == number
            assert rest is not None
            epoch[old[own]], sample[old[own]] = rest.take(place[own])
        epoch[new], sample[new] = self._take_new(segment, cell[new], count[new] - length[new])
        return epoch, sample

    def _take_new(
        self, segment: _Segment, cell: np.ndarray, count: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Finds what lanes take once nothing is owed."""
        word = segment.word
        dataset = word.cell_dataset[cell]
        start, length = word.slices(cell, self._sizes)
        epoch, count = np.divmod(count, length)
        epoch += segment.first_epoch[dataset]
        sample = np.empty_like(count)
        for laned, part in _by_layout(word.laned[dataset]):
            line = self._line(dataset[part])
            if laned:
                sample[part] = line.samples(
                    start[part], length[part], epoch=epoch[part], taken=count[part]
                )
            else:
                sample[part] = line.shuffled(count[part], epoch=epoch[part])
        return epoch, sample

    def _rest_place(
        self,
        segment: _Segment,
        dataset: np.ndarray,
        start: np.ndarray,
        length: np.ndarray,
        count: np.ndarray,
    ) -> np.ndarray:
        """Finds the places that lanes take of the lines that their datasets owe."""
        place: np.ndarray = count.copy()  # what was shuffled as a whole goes on as it would have
        since = np.array([segment.step])
        for laned, part in _by_layout(segment.word.laned[dataset]):
            if laned:
                line = self._line(dataset[part])
                place[part] = line.places(start[part], length[part], epoch=since, taken=count[part])
                continue
            split = np.array([rest is not None and rest.num_tracks > 1 for rest in segment.rests])
            part = part[split[dataset[part]]]
            key = keyed_array(self._seeds[dataset[part]], _KEY_REST, since)
            place[part] = permute(count[part], size=length[part], key=key)
        return place

    def _line(self, dataset: np.ndarray) -> Line:
        return Line(
            num_samples=self._sizes[dataset],
            seed=self._seeds[dataset],
            active_blocks=self._active[dataset],
            block_size=self._blocks[dataset],
        )

    def _step_of_last(self, dataset: int) -> int | None:
        """Finds the number of steps after which a dataset's N-th sample has been read."""
        size = int(self._sizes[dataset])
        ends = [*self._starts.tolist()[1:], None]
        for segment, end in zip(self._segments, ends, strict=True):
            word: InterleavePattern = segment.word
            rest = size - 1 - int(segment.counted[dataset])
            if not word.quotas[dataset]:
                continue
            words, rank = divmod(rest, int(word.quotas[dataset]))
            x = int(np.flatnonzero(word.dataset == dataset)[rank])
            step = segment.step + (words * word.num_slots + x) // word.global_batch_size + 1
            if end is None or step <= end:
                return step
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Segment:
    word: InterleavePattern
    step: int
    counted: np.ndarray
    """int64 [datasets], slots of each dataset before the segment."""
    rests: list[EpochRemainder | None]
    """What each dataset owes when the segment begins; None where it was not begun."""
    owed: np.ndarray
    """int64 [datasets], the lengths of the rests."""
    first_epoch: np.ndarray
    """int64 [datasets], the epochs behind the rests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lanes:
    """The lanes of one dataset in a segment, as `EpochRemainder` asks for them."""

    mixture: MixtureOrder
    segment: _Segment
    dataset: int

    @property
    def cells(self) -> slice:
        bounds = np.searchsorted(self.segment.word.cell_dataset, [self.dataset, self.dataset + 1])
        return slice(int(bounds[0]), int(bounds[1]))

    @property
    def first_epoch(self) -> int:
        return int(self.segment.first_epoch[self.dataset])

    def ends(self, epoch: int) -> np.ndarray:
        word, cells = self.segment.word, np.arange(self.cells.start, self.cells.stop)
        owed = word.slices(cells, self.segment.owed)[1]
        length = word.slices(cells, self.mixture._sizes)[1]
        ends: np.ndarray = owed + (epoch + 1 - self.first_epoch) * length
        return ends

    def take(self, track: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.mixture._take(self.segment, self.cells.start + track, count)


def _by_layout(laned: np.ndarray) -> list[tuple[bool, np.ndarray]]:
    """Splits places by whether their datasets have lanes."""
    return [(kind, np.flatnonzero(laned == kind)) for kind in (True, False)]
