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
finish an epoch together; inside, order.py's stages apply. Datasets too small for lanes are
shuffled as a whole and counted over the run. Each dataset shuffles by its own seed.

Weights come from `mixture_weights`: rates, root-of-size groups as in the Molmo family, nested,
by samples or by tokens. A change of weights or batch size begins a new word at a given step, from
which proportions are counted anew: whole-shuffled datasets continue exactly, datasets in lanes
begin their next epoch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from loader.order import (
    MIN_LANE_LENGTH,
    Line,
    Slots,
    default_canonical_ranks,
    pick_block_size,
    require_slots,
)
from loader.word import MOST_SLOTS, share_out, spread
from shardspec.errors import ConfigError, StateError
from shardspec.keyed import dataset_seed, keyed

MIXTURE_VERSION = 2
"""Version of the order of mixtures: the same configuration and version mean the same samples."""

Weighting = Literal["rate", "root_size", "size"]
Stop = Literal["first_exhausted", "all_exhausted"]

_KEY_WORD = 16
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
    """Other weights or another global batch size from one step on."""

    step: int
    """First step of the change, >= 1."""
    global_batch_size: int
    weights: tuple[float, ...]
    """One weight per member; 0 leaves a dataset out."""


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
            _require(getattr(self, name) >= 1, f"{name} must be at least 1", "mixture_count")
        for name in ("active_blocks", "block_size"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1", "mixture_count")
        _require(bool(self.members), "a mixture needs a dataset", "mixture_empty")
        names = [member.name for member in self.members]
        twice = sorted({name for name in names if names.count(name) > 1})
        _require(not twice, f"a dataset occurs twice in the mixture: {twice}", "mixture_twice")
        for member in self.members:
            _require(member.num_samples >= 1, f"dataset {member.name!r} is empty", "mixture_empty")
        steps = [0, *(change.step for change in self.changes)]
        _require(sorted(set(steps)) == steps, "steps of changes must increase", "mixture_changes")
        for _, batch, weights in self.segments():
            _require(
                len(weights) == len(self.members)
                and all(math.isfinite(w) and w >= 0 for w in weights)
                and sum(weights) > 0,
                f"a mixture needs one weight >= 0 per dataset, not all 0: {list(weights)}",
                "mixture_weights",
            )
            _require(
                batch >= 1 and batch % self.canonical_ranks == 0,
                f"the global batch {batch} is not a multiple of the canonical ranks "
                f"({self.canonical_ranks})",
                "batch_not_divisible",
            )

    def segments(self) -> list[tuple[int, int, tuple[float, ...]]]:
        """Lists (first step, global batch size, weights), the run's start first."""
        first = (0, self.global_batch_size, tuple(member.weight for member in self.members))
        return [first, *((c.step, c.global_batch_size, c.weights) for c in self.changes)]

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
                "the saved mixture is of another version",
                reason="order_version",
                facts={
                    "got": state.get("version"),
                    "want": MIXTURE_VERSION,
                    "other_fields": sorted((set(state) - {"version"}) ^ known),
                },
                fix="resume with the release that wrote the state, or start a new run",
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
    _require(not twice, f"a dataset occurs twice in the mixture: {twice}", "mixture_twice")
    if unit == "samples":
        return flat
    shares = []
    for source, weight in flat:
        if not source.mean_tokens or source.mean_tokens <= 0:
            raise ConfigError(
                "weights by tokens need the mean length of every dataset",
                reason="mixture_mean_tokens",
                where=source.name,
                facts={"mean_tokens": source.mean_tokens},
                fix='set mean_tokens from the manifest, or mix by unit="samples"',
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
        words = [
            _Word(
                segment_weights,
                global_batch_size=batch,
                first_step=step,
                seed=config.seed,
                canonical_ranks=config.canonical_ranks,
                canonical_workers=config.canonical_workers,
            )
            for step, batch, segment_weights in config.segments()
        ]
        # A lane that visits a rare dataset far less than others do would own no sample of it.
        self._laned = self._sizes >= MIN_LANE_LENGTH * lanes
        for word in words:
            self._laned &= word.shortest_lanes(self._sizes) >= 1
        self._segments: list[_Segment] = []
        for (step, _, _), word in zip(config.segments(), words, strict=True):
            self._segments.append(self._continue(word, step))
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
        self, *, step: int, global_batch_size: int, weights: Sequence[float] | None = None
    ) -> MixtureOrder:
        """Returns the order with another global batch size or other weights from a step on.

        Datasets that are shuffled as a whole go on exactly; those in lanes begin their next epoch.

        Raises:
          ConfigError: `mixture_weights`, `mixture_changes`, `batch_not_divisible`.
        """
        config = self.config
        kept = tuple(change for change in config.changes if change.step < step)
        last = kept[-1].weights if kept else tuple(member.weight for member in config.members)
        wanted = last if weights is None else tuple(weights)
        if step == 0:
            same = len(wanted) == len(config.members)
            _require(same, "a mixture needs one weight per dataset", "mixture_weights")
            pairs = zip(config.members, wanted, strict=True)
            members = tuple(replace(member, weight=weight) for member, weight in pairs)
            config = replace(
                config, members=members, global_batch_size=global_batch_size, changes=()
            )
        else:
            change = MixtureChange(step=step, global_batch_size=global_batch_size, weights=wanted)
            config = replace(config, changes=(*kept, change))
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
            raise ConfigError(
                "the stop rule waits for datasets that are never read to their end",
                reason="mixture_never",
                facts={"stop": stop, "datasets": ", ".join(missing)},
                fix="give them a weight, leave them out, or train for a number of steps",
            )
        return min(reached) if stop == "first_exhausted" else max(reached)

    def describe(self) -> list[dict[str, Any]]:
        """Summarises the datasets at the start of the run: weight asked and met, epoch, layout."""
        word = self._segments[0].word
        laned = self._laned
        total = math.fsum(member.weight for member in self.config.members)
        return [
            {
                "name": member.name,
                "num_samples": member.num_samples,
                "weight": member.weight / total,
                "share": int(word.quotas[d]) / word.num_slots,
                "samples_per_step": int(word.quotas[d]) / word.num_slots * word.global_batch_size,
                "layout": "lanes" if laned[d] else "global",
                "block_size": int(self._blocks[d]) if laned[d] else 1,
            }
            for d, member in enumerate(self.config.members)
        ]

    def _continue(self, word: _Word, step: int) -> _Segment:
        """Begins a segment where the one before ends."""
        counted = np.zeros(len(self._sizes), np.int64)
        first_epoch = np.zeros(len(self._sizes), np.int64)
        if self._segments:
            before = self._segments[-1]
            slots = (step - before.step) * before.word.global_batch_size
            counted = before.counted + before.word.counts(slots)
            # The last visit of every lane lies in the last word's length of slots.
            slot = np.arange(max(0, slots - before.word.num_slots), slots)
            words, x = np.divmod(slot, before.word.num_slots)
            dataset = before.word.dataset[x]
            _, length = before.word.lane_slice(x, self._sizes)
            epoch = before.word.lane_taken(words, x) // np.maximum(length, 1)
            first_epoch = before.first_epoch.copy()
            np.maximum.at(first_epoch, dataset, before.first_epoch[dataset] + epoch + 1)
        return _Segment(word=word, step=step, counted=counted, first_epoch=first_epoch)

    def _find(
        self, segment: _Segment, slot: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Finds (dataset, epoch, sample) of slots counted from the segment's start."""
        word = segment.word
        words, x = np.divmod(slot, word.num_slots)
        dataset = word.dataset[x].astype(np.int64)
        epoch, sample = np.empty_like(slot), np.empty_like(slot)

        here = np.flatnonzero(self._laned[dataset])
        line = self._line(dataset[here])
        start, length = word.lane_slice(x[here], self._sizes)
        epoch[here], taken = np.divmod(word.lane_taken(words[here], x[here]), length)
        epoch[here] += segment.first_epoch[dataset[here]]
        sample[here] = line.samples(start, length, epoch=epoch[here], taken=taken)

        here = np.flatnonzero(~self._laned[dataset])
        line = self._line(dataset[here])
        taken = words[here] * word.quotas[dataset[here]] + word.rank[x[here]]
        taken += segment.counted[dataset[here]]
        epoch[here], taken = np.divmod(taken, self._sizes[dataset[here]])
        sample[here] = line.shuffled(taken, epoch=epoch[here])
        return dataset, epoch, sample

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
    first_epoch: np.ndarray
    """int64 [datasets], epoch with which datasets in lanes begin the segment."""


class _Word:
    """The quota word and what a slot x of it needs to know; all tables are [M]."""

    def __init__(
        self,
        weights: Sequence[float],
        *,
        global_batch_size: int,
        first_step: int,
        seed: int,
        canonical_ranks: int,
        canonical_workers: int,
    ) -> None:
        batches = max(_MIN_WORD_BATCHES, -(-_MIN_WORD_SLOTS // global_batch_size))
        batches = min(batches, MOST_SLOTS // global_batch_size - canonical_workers + 1)
        _require(batches > 0, "a mixture's global batch is too large", "mixture_batch")
        batches = -(-batches // canonical_workers) * canonical_workers
        self.global_batch_size = global_batch_size
        self.num_slots = batches * global_batch_size
        self.quotas = share_out(weights, self.num_slots)
        key = keyed(seed, _KEY_WORD, first_step)
        self.dataset = spread(self.quotas, batch=global_batch_size, key=key)
        first = np.cumsum(self.quotas) - self.quotas
        # Sixteen bits are sorted by radix, in a tenth of the time.
        short = self.dataset.astype(np.uint16)
        by_dataset = np.argsort(short, kind="stable")
        self.rank = np.empty(self.num_slots, np.int32)
        self.rank[by_dataset] = np.arange(self.num_slots) - np.repeat(first, self.quotas)
        # Neighbours by (dataset, lane): a group's size is the quota, its offset inside the
        # dataset is what earlier lanes own.
        x = np.arange(self.num_slots)
        share = global_batch_size // canonical_ranks
        worker = (x // global_batch_size + first_step) % canonical_workers
        lane = x % global_batch_size // share * canonical_workers + worker
        lanes = canonical_ranks * canonical_workers
        by_lane = np.argsort(lane.astype(np.min_scalar_type(lanes)), kind="stable")
        by_cell = by_lane[np.argsort(short[by_lane], kind="stable")]
        cell = self.dataset.astype(np.int64) * lanes + lane
        group_start = np.flatnonzero(np.diff(cell[by_cell], prepend=-1))
        group_size = np.diff(group_start, append=self.num_slots)
        group = np.repeat(np.arange(len(group_start)), group_size)
        first_of_dataset = first[self.dataset[by_cell]]
        self.lane_rank, self.lane_quota, self.lane_before = (
            np.empty(self.num_slots, np.int32) for _ in range(3)
        )
        self.lane_rank[by_cell] = x - group_start[group]
        self.lane_quota[by_cell] = group_size[group]
        self.lane_before[by_cell] = group_start[group] - first_of_dataset

    def lane_slice(self, x: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Finds (start, length) of the part of the dataset's line that the slots' lanes own."""
        dataset = self.dataset[x]
        size, quota = sizes[dataset], self.quotas[dataset]
        before = self.lane_before[x].astype(np.int64)
        start = before * size // quota
        return start, (before + self.lane_quota[x]) * size // quota - start

    def lane_taken(self, words: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Counts what the slots' lanes took of the slots' datasets before them: int64."""
        taken: np.ndarray = words * self.lane_quota[x] + self.lane_rank[x]
        return taken

    def shortest_lanes(self, sizes: np.ndarray) -> np.ndarray:
        """Finds the length of each dataset's shortest lane, of those that visit it at all."""
        shortest = np.full(len(sizes), np.iinfo(np.int64).max)
        _, length = self.lane_slice(np.arange(self.num_slots), sizes)
        np.minimum.at(shortest, self.dataset, length)
        return shortest

    def counts(self, slots: int) -> np.ndarray:
        """Counts the datasets' slots among the first `slots`: int64 [datasets]."""
        words, rest = divmod(slots, self.num_slots)
        part = np.bincount(self.dataset[:rest], minlength=len(self.quotas))
        total: np.ndarray = words * self.quotas + part
        return total


def _flatten(group: MixtureGroup, weight: float) -> list[tuple[MixtureSource, float]]:
    _require(bool(group.sources), "a mixture's group needs a source", "mixture_empty")
    powers = {"rate": 0.0, "root_size": 0.5, "size": 1.0}
    _require(group.by in powers, f"unknown weighting {group.by!r}", "mixture_weights")
    raw = []
    for source in group.sources:
        ok = math.isfinite(source.rate) and source.rate >= 0
        _require(ok, f"a rate must be a number >= 0, not {source.rate}", "mixture_weights")
        raw.append(source.rate * _size(source) ** powers[group.by])
    total = math.fsum(raw)
    _require(total > 0, "the weights of a mixture's group are all 0", "mixture_weights")
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


def _require(condition: bool, what: str, reason: str) -> None:
    if not condition:
        raise ConfigError(what, reason=reason, fix="correct the mixture's configuration")
