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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from loader.order.interleave import MOST_SLOTS, share_out, spread
from loader.order.order import (
    MIN_LANE_LENGTH,
    Line,
    Slots,
    default_canonical_ranks,
    pick_block_size,
    require_slots,
)
from loader.order.permutation import keyed_array, permute
from loader.order.remainder import EpochRemainder
from shardspec.errors import ConfigError, StateError
from shardspec.keyed import dataset_seed, keyed

MIXTURE_VERSION = 2
"""Version of the order of mixtures: the same configuration and version mean the same samples."""

Weighting = Literal["rate", "root_size", "size"]
Stop = Literal["first_exhausted", "all_exhausted"]

_KEY_WORD, _KEY_REST = 16, 19
_MIN_WORD_BATCHES = 64
_MIN_WORD_SLOTS = 2**18  # shares are then within 4e-6 of the weights; the tables take 5 MB


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureSource:
    """One dataset of a mixture, with its weight among its siblings."""

    name: str
    """Unique name; the dataset's own seed derives from it."""
    num_samples: int
    """Samples in the dataset, >= 1."""
    rate: float = 1.0
    """Factor of its weight, >= 0."""
    size: int | None = None
    """Counts as this many samples in weighting by size; None: as `num_samples`."""
    mean_tokens: float | None = None
    """Mean tokens of a sample; needed where weights are shares of tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureGroup:
    """Sources or groups that share a weight."""

    sources: tuple[MixtureSource | MixtureGroup, ...]
    rate: float = 1.0
    """Factor of the group's weight among its siblings, >= 0."""
    by: Weighting = "rate"
    """How members share: by rate alone, or rate times the size or its square root. A group in a
    group counts with the sum of its members' sizes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureMember:
    """One dataset of a flat mixture."""

    name: str
    num_samples: int
    weight: float
    """Share of the slots, >= 0; weights need not sum to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureChange:
    """Other weights, another global batch size or another width from one step on."""

    step: int
    """First step of the change, >= 1."""
    global_batch_size: int
    weights: tuple[float, ...]
    """One weight per member; 0 leaves a dataset out."""
    canonical_ranks: int
    """A divisor of the global batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureConfig:
    """Everything a mixture's order depends on; never ranks or workers."""

    members: tuple[MixtureMember, ...]
    global_batch_size: int
    """Slots per step, >= 1."""
    seed: int
    """Seed of the run."""
    canonical_ranks: int
    """A divisor of every global batch size; see `OrderConfig`."""
    canonical_workers: int = 8
    active_blocks: int = 8
    """Blocks a lane reads side by side over all datasets, shared out by weight; each has one."""
    block_size: int = 64
    """Samples per block to aim for; each dataset gets its own, as `pick_block_size` says."""
    changes: tuple[MixtureChange, ...] = ()

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "canonical_ranks", "canonical_workers"):
            _require(getattr(self, name) >= 1, "mixture_count", name=name)
        for name in ("active_blocks", "block_size"):
            _require(getattr(self, name) >= 1, "mixture_count", name=name)
        _require(bool(self.members), "mixture_empty.mixture")
        names = [member.name for member in self.members]
        twice = sorted({name for name in names if names.count(name) > 1})
        _require(not twice, "mixture_twice", names=twice)
        for member in self.members:
            _require(member.num_samples >= 1, "mixture_empty.dataset", name=member.name)
        steps = [0, *(change.step for change in self.changes)]
        _require(sorted(set(steps)) == steps, "mixture_changes", steps=steps)
        for segment in self.segments():
            weights, batch = segment.weights, segment.global_batch_size
            ranks = segment.canonical_ranks
            _require(
                len(weights) == len(self.members)
                and all(math.isfinite(w) and w >= 0 for w in weights)
                and sum(weights) > 0,
                "mixture_weights.values",
                weights=list(weights),
            )
            _require(
                batch >= 1 and ranks >= 1 and batch % ranks == 0,
                "batch_not_divisible.canonical_ranks",
                batch=batch,
                ranks=ranks,
            )

    def segments(self) -> list[MixtureChange]:
        """Lists the parts of the run, its start first."""
        first = MixtureChange(
            step=0,
            global_batch_size=self.global_batch_size,
            weights=tuple(member.weight for member in self.members),
            canonical_ranks=self.canonical_ranks,
        )
        return [first, *self.changes]

    def changed(
        self,
        *,
        step: int,
        global_batch_size: int,
        weights: Sequence[float] | None = None,
        canonical_ranks: int | None = None,
    ) -> MixtureConfig:
        """Returns the mixture with a change from a step on; later ones are forgotten.

        Raises:
          ConfigError: `mixture_weights`, `mixture_changes`, `batch_not_divisible`.
        """
        kept = tuple(change for change in self.changes if change.step < step)
        last = replace(self, changes=kept).segments()[-1]
        change = MixtureChange(
            step=step,
            global_batch_size=global_batch_size,
            weights=last.weights if weights is None else tuple(weights),
            canonical_ranks=canonical_ranks or last.canonical_ranks,
        )
        if step:
            return replace(self, changes=(*kept, change))
        same = len(change.weights) == len(self.members)
        _require(same, "mixture_weights.count", datasets=len(self.members))
        pairs = zip(self.members, change.weights, strict=True)
        return replace(
            self,
            members=tuple(replace(member, weight=weight) for member, weight in pairs),
            global_batch_size=global_batch_size,
            canonical_ranks=change.canonical_ranks,
            changes=(),
        )

    def with_width(self, other: MixtureConfig, *, step: int) -> MixtureConfig:
        """Returns the mixture with another one's global batch and width from a step on."""
        last = self.segments()[-1]
        wanted = (other.global_batch_size, other.canonical_ranks)
        if (last.global_batch_size, last.canonical_ranks) == wanted:
            return self
        return self.changed(step=step, global_batch_size=wanted[0], canonical_ranks=wanted[1])

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration in plain JSON types, `version` first."""
        return {
            "version": MIXTURE_VERSION,
            **asdict(self),
            "members": [asdict(member) for member in self.members],
            "changes": [
                {**asdict(change), "weights": list(change.weights)} for change in self.changes
            ],
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> MixtureConfig:
        """Restores a configuration from `to_dict`.

        Raises:
          StateError: `order_version` or `order_fields`.
        """
        known = {field.name for field in fields(cls)}
        if state.get("version") != MIXTURE_VERSION or set(state) - {"version"} != known:
            raise StateError(
                "order_version.mixture",
                got=state.get("version"),
                want=MIXTURE_VERSION,
                other_fields=sorted(set(state) - {"version"} ^ known),
            )
        values = {name: state[name] for name in known}
        values["members"] = tuple(MixtureMember(**member) for member in state["members"])
        values["changes"] = tuple(
            MixtureChange(**{**change, "weights": tuple(change["weights"])})
            for change in state["changes"]
        )
        return cls(**values)


def plan_mixture(
    sources: MixtureGroup | Sequence[MixtureSource],
    *,
    global_batch_size: int,
    seed: int,
    unit: Literal["samples", "tokens"] = "samples",
    canonical_ranks: int | None = None,
    canonical_workers: int = 8,
) -> MixtureConfig:
    """Flattens sources to weights and chooses the canonical sizes, as `plan_order` does."""
    group = sources
    if not isinstance(group, MixtureGroup):
        group = MixtureGroup(sources=tuple(group))
    members = tuple(
        MixtureMember(name=source.name, num_samples=source.num_samples, weight=weight)
        for source, weight in mixture_weights(group, unit=unit)
    )
    return MixtureConfig(
        members=members,
        global_batch_size=global_batch_size,
        seed=seed,
        canonical_ranks=canonical_ranks or default_canonical_ranks(global_batch_size),
        canonical_workers=canonical_workers,
    )


def mixture_weights(
    group: MixtureGroup, *, unit: Literal["samples", "tokens"] = "samples"
) -> list[tuple[MixtureSource, float]]:
    """Flattens nested groups to one weight per source.

    Inside a group a member weighs rate, rate * size or rate * sqrt(size); the weights of a group
    sum to its own weight among its siblings. The root's sum is 1.

    Args:
      group: The root.
      unit: What weights are shares of. With "tokens", a source's share of samples is its weight
        divided by its `mean_tokens`.

    Returns:
      (source, share of the samples), in the order written.

    Raises:
      ConfigError: `mixture_weights`, `mixture_twice` or `mixture_mean_tokens`.

    >>> a = MixtureSource(name="a", num_samples=100)
    >>> b = MixtureSource(name="b", num_samples=900)
    >>> [w for _, w in mixture_weights(MixtureGroup(sources=(a, b), by="root_size"))]
    [0.25, 0.75]
    """
    flat = _flatten(group, 1.0)
    names = [source.name for source, _ in flat]
    twice = sorted({name for name in names if names.count(name) > 1})
    _require(not twice, "mixture_twice", names=twice)
    if unit == "samples":
        return flat
    shares = []
    for source, weight in flat:
        if not source.mean_tokens or source.mean_tokens <= 0:
            raise ConfigError(
                "mixture_mean_tokens", where=source.name, mean_tokens=source.mean_tokens
            )
        shares.append((source, weight / source.mean_tokens))
    total = math.fsum(share for _, share in shares)
    return [(source, share / total) for source, share in shares]


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
            word = _Word(
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

    def _continue(self, word: _Word, step: int) -> _Segment:
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
            word: _Word = segment.word
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
    word: _Word
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


class _Word:
    """The word of a segment and what a slot x of it needs to know; tables are [M] or [cells].

    A cell is a dataset in a lane, or a dataset that has no lanes.
    """

    def __init__(
        self, segment: MixtureChange, *, sizes: np.ndarray, seed: int, workers: int
    ) -> None:
        batch = self.global_batch_size = segment.global_batch_size
        batches = max(_MIN_WORD_BATCHES, -(-_MIN_WORD_SLOTS // batch))
        batches = min(batches, MOST_SLOTS // batch - workers + 1)
        _require(batches > 0, "mixture_batch", global_batch_size=batch)
        batches = -(-batches // workers) * workers
        self.num_slots = batches * batch
        self.quotas = share_out(segment.weights, self.num_slots)
        key = keyed(seed, _KEY_WORD, segment.step)
        self.dataset = spread(self.quotas, batch=batch, key=key)
        x = np.arange(self.num_slots)
        worker = (x // batch + segment.step) % workers
        lane = x % batch // (batch // segment.canonical_ranks) * workers + worker
        num_lanes = segment.canonical_ranks * workers

        # Slots by dataset, by lane, by place; sixteen bits are sorted by radix, the fastest way.
        short = self.dataset.astype(np.uint16)
        by_lane = np.argsort(lane.astype(np.min_scalar_type(num_lanes)), kind="stable")
        by_cell = by_lane[np.argsort(short[by_lane], kind="stable")]
        name = (self.dataset * np.int64(num_lanes) + lane)[by_cell]
        start = np.flatnonzero(np.diff(name, prepend=-1))
        group = np.repeat(np.arange(len(start)), np.diff(start, append=self.num_slots))
        first = np.cumsum(self.quotas) - self.quotas

        self.cell_dataset = name[start] // num_lanes
        self.cell_before = start - first[self.cell_dataset]
        """Slots of the dataset in lanes before: how much of its line these own."""
        self.cell_quota = np.diff(start, append=self.num_slots)
        shortest = np.full(len(sizes), np.iinfo(np.int64).max)
        every_cell = np.arange(len(start))
        np.minimum.at(shortest, self.cell_dataset, self.slices(every_cell, sizes)[1])
        # A lane that visits a rare dataset far less than others do would own no sample of it.
        self.laned: np.ndarray = (sizes >= MIN_LANE_LENGTH * num_lanes) & (shortest >= 1)

        # A dataset without lanes keeps its first cell, for all its slots.
        kept = self.laned[self.cell_dataset] | (self.cell_before == 0)
        self.cell, self.cell_rank = (np.empty(self.num_slots, np.int32) for _ in range(2))
        self.cell[by_cell] = (np.cumsum(kept) - 1)[group]
        self.cell_rank[by_cell] = x - start[group]
        by_dataset = np.argsort(short, kind="stable")
        whole = by_dataset[~self.laned[short[by_dataset]]]
        self.cell_rank[whole] = (x - np.repeat(first, self.quotas))[~self.laned[short[by_dataset]]]
        self.cell_dataset, self.cell_before = self.cell_dataset[kept], self.cell_before[kept]
        self.cell_quota = np.where(
            self.laned[self.cell_dataset], self.cell_quota[kept], self.quotas[self.cell_dataset]
        )

    def slices(self, cell: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Finds (start, length) of what cells own of lines of int64 [datasets] places."""
        dataset = self.cell_dataset[cell]
        size, quota, before = places[dataset], self.quotas[dataset], self.cell_before[cell]
        start: np.ndarray = before * size // quota
        return start, (before + self.cell_quota[cell]) * size // quota - start

    def taken(self, slots: int) -> np.ndarray:
        """Counts what the cells took of the first `slots`: int64 [cells]."""
        words, rest = divmod(slots, self.num_slots)
        part = np.bincount(self.cell[:rest], minlength=len(self.cell_quota))
        taken: np.ndarray = words * self.cell_quota + part
        return taken

    def counts(self, slots: int) -> np.ndarray:
        """Counts the datasets' slots among the first `slots`: int64 [datasets]."""
        words, rest = divmod(slots, self.num_slots)
        part = np.bincount(self.dataset[:rest], minlength=len(self.quotas))
        total: np.ndarray = words * self.quotas + part
        return total


def _by_layout(laned: np.ndarray) -> list[tuple[bool, np.ndarray]]:
    """Splits places by whether their datasets have lanes."""
    return [(kind, np.flatnonzero(laned == kind)) for kind in (True, False)]


def _flatten(group: MixtureGroup, weight: float) -> list[tuple[MixtureSource, float]]:
    _require(bool(group.sources), "mixture_empty.group")
    powers = {"rate": 0.0, "root_size": 0.5, "size": 1.0}
    _require(group.by in powers, "mixture_weights.by", by=group.by)
    raw = []
    for source in group.sources:
        ok = math.isfinite(source.rate) and source.rate >= 0
        _require(ok, "mixture_weights.rate", rate=source.rate)
        raw.append(source.rate * _size(source) ** powers[group.by])
    total = math.fsum(raw)
    _require(total > 0, "mixture_weights.zero")
    flat = []
    for source, share in zip(group.sources, raw, strict=True):
        part = weight * share / total
        if isinstance(source, MixtureGroup):
            flat.extend(_flatten(source, part))
        else:
            flat.append((source, part))
    return flat


def _size(source: MixtureSource | MixtureGroup) -> int:
    if isinstance(source, MixtureGroup):
        return sum(_size(member) for member in source.sources)
    return source.num_samples if source.size is None else source.size


def _require(condition: bool, code: str, **facts: object) -> None:
    if not condition:
        raise ConfigError(code, facts=facts)
