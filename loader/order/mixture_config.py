"""What the order of a mixture depends on: datasets, weights, sizes, and changes on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from loader.order.config import MOST_CHANGES, Locality, default_canonical_ranks, require_name
from loader.order.slots import is_whole, require_count, require_step, require_stored
from loader.order.weights import (
    MixtureGroup,
    MixtureSource,
    Unit,
    is_weight,
    mixture_weights,
    require,
)
from shardspec.errors import ConfigError, StateError

MIXTURE_VERSION = 4
"""Version of the order of mixtures: the same configuration and version mean the same samples. Since
version 3 a dataset's epoch is exactly N consecutive of its own slots; since version 4 counts follow
the weights exactly, and it does not matter in which sequence the datasets are listed.
"""


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

    def to_dict(self) -> dict[str, Any]:
        """Returns the change in plain JSON types."""
        return {**asdict(self), "weights": list(self.weights)}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> MixtureChange:
        """Restores a change from `to_dict`."""
        return cls(**{**state, "weights": tuple(state["weights"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureBase:
    """What came before the first step that a configuration still describes, per dataset."""

    segment: MixtureChange
    """The weights, batch size and width from that step on."""
    counted: tuple[int, ...]
    """Slots of each dataset before."""
    first_epoch: tuple[int, ...]
    """The first epoch of each dataset that is laid out as a whole from there on."""
    owed: tuple[int, ...]
    """Slots of each dataset from there on that finish the epoch before; over by the steps asked."""
    seen_by: tuple[int | None, ...]
    """Steps after which each dataset had been seen once; None where it was not yet."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the base in plain JSON types."""
        counts = {name: list(getattr(self, name)) for name in _PER_DATASET}
        return {"segment": self.segment.to_dict(), **counts}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> MixtureBase:
        """Restores a base from `to_dict`."""
        counts = {name: tuple(state[name]) for name in _PER_DATASET}
        return cls(segment=MixtureChange.from_dict(state["segment"]), **counts)


_PER_DATASET = ("counted", "first_epoch", "owed", "seen_by")


@dataclass(frozen=True, slots=True, kw_only=True)
class MixturePast:
    """An earlier part of the run, which read some of an epoch that a paused dataset has not ended.

    The parts before and after it that no dataset needs any more have been dropped.
    """

    segment: MixtureChange
    until: int
    """Step at which it ended."""
    first_epoch: tuple[int, ...]
    """As `MixtureBase.first_epoch`, at its first step."""
    owed: tuple[int, ...]
    """As `MixtureBase.owed`, at its first step."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the part in plain JSON types."""
        return {
            "segment": self.segment.to_dict(),
            "until": self.until,
            "first_epoch": list(self.first_epoch),
            "owed": list(self.owed),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> MixturePast:
        """Restores a part from `to_dict`."""
        return cls(
            segment=MixtureChange.from_dict(state["segment"]),
            until=state["until"],
            first_epoch=tuple(state["first_epoch"]),
            owed=tuple(state["owed"]),
        )


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
    block_size: int = 16
    """Samples per block to aim for; each dataset gets its own, as `pick_block_size` says."""
    locality: Locality = "any"
    """As `OrderConfig.locality`, for each dataset."""
    changes: tuple[MixtureChange, ...] = ()
    base: MixtureBase | None = None
    """What came before, where changes that are over have been dropped; None from step 0 on."""
    past: tuple[MixturePast, ...] = ()
    """Parts before `base` that datasets which paused in mid-epoch still need, in sequence."""
    removed: tuple[MixtureMember, ...] = ()
    """Datasets that were taken out during the run; their weight is 0 since. They are numbered after
    the members: weights and counts of changes, `base` and `past` have one entry for each."""

    def __post_init__(self) -> None:
        counts = ("global_batch_size", "canonical_ranks", "canonical_workers")
        for name in (*counts, "active_blocks", "block_size"):
            value = getattr(self, name)
            require(is_whole(value) and value >= 1, "mixture_count", name=name, got=repr(value))
        require_name("locality", self.locality, ("any", "node"))
        require(bool(self.members), "mixture_empty.mixture")
        names = [member.name for member in self.everyone]
        twice = sorted({name for name in names if names.count(name) > 1})
        require(not twice, "mixture_twice", names=twice)
        for member in self.everyone:
            samples = member.num_samples
            require(is_whole(samples) and samples >= 1, "mixture_empty.dataset", name=member.name)
        steps = [self.since, *(change.step for change in self.changes)]
        for step in steps:
            require_step(step)
        self._check_base()
        require(sorted(set(steps)) == steps, "mixture_changes", steps=steps)
        changes = len(self.changes) + len(self.past)
        if changes > MOST_CHANGES:
            raise ConfigError("order_changes", changes=changes, most=MOST_CHANGES)
        for segment in [*(part.segment for part in self.past), *self.segments()]:
            weights, batch = segment.weights, segment.global_batch_size
            ranks = segment.canonical_ranks
            require(
                len(weights) == len(self.everyone)
                and all(map(is_weight, weights))
                and sum(weights) > 0,
                "mixture_weights.values",
                weights=list(weights),
            )
            require(
                is_whole(batch) and is_whole(ranks) and batch >= 1 <= ranks and batch % ranks == 0,
                "batch_not_divisible.canonical_ranks",
                batch=batch,
                ranks=ranks,
            )

    def _check_base(self) -> None:
        base = self.base
        if base is None:
            if self.past:
                raise StateError("order_values", got=repr([part.to_dict() for part in self.past]))
            return
        sizes = [member.num_samples for member in self.everyone]
        counts = [getattr(base, name) for name in _PER_DATASET]
        fits = is_whole(base.segment.step) and all(len(values) == len(sizes) for values in counts)
        fits = fits and all(is_whole(n) and n >= 0 for values in counts[:3] for n in values)
        fits = fits and all(n is None or (is_whole(n) and n >= 1) for n in base.seen_by)
        if not (fits and all(n < size for n, size in zip(base.owed, sizes, strict=True))):
            raise StateError("order_values", got=repr(base.to_dict()))
        at = 0
        for part in self.past:
            numbers = (part.until, part.segment.step, *part.first_epoch, *part.owed)
            fits = all(is_whole(n) and n >= 0 for n in numbers)
            fits = fits and len(part.first_epoch) == len(part.owed) == len(sizes)
            fits = fits and at <= part.segment.step < part.until <= base.segment.step
            if not (fits and all(n < size for n, size in zip(part.owed, sizes, strict=True))):
                raise StateError("order_values", got=repr(part.to_dict()))
            at = part.until

    @property
    def everyone(self) -> tuple[MixtureMember, ...]:
        """The members, and after them the removed ones: as everything is numbered."""
        return (*self.members, *self.removed)

    @property
    def since(self) -> int:
        """The first step that is described."""
        return 0 if self.base is None else self.base.segment.step

    def segments(self) -> list[MixtureChange]:
        """Lists the parts of the run, its start first."""
        if self.base is not None:
            return [self.base.segment, *self.changes]
        first = MixtureChange(
            step=0,
            global_batch_size=self.global_batch_size,
            weights=(*(member.weight for member in self.members), *(0.0 for _ in self.removed)),
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
          ConfigError: `mixture_weights`, `mixture_changes`, `order_step`, `batch_not_divisible`.
        """
        require_step(step)
        listed = weights is None or isinstance(weights, Sequence | np.ndarray)
        require(listed, "mixture_weights.values", weights=repr(weights))
        kept = tuple(change for change in self.changes if change.step < step)
        last = [segment for segment in self.segments() if segment.step <= step][-1]
        change = MixtureChange(
            step=step,
            global_batch_size=global_batch_size,
            weights=last.weights if weights is None else (*weights, *(0.0 for _ in self.removed)),
            canonical_ranks=last.canonical_ranks if canonical_ranks is None else canonical_ranks,
        )
        if step > self.since:
            before = [segment for segment in self.segments() if segment.step < step][-1]
            if replace(before, step=step) == change:
                return replace(self, changes=kept)  # a change is taken back
            return replace(self, changes=(*kept, change))
        if self.base is not None:
            return replace(self, base=replace(self.base, segment=change), changes=())
        same = len(change.weights) == len(self.everyone)
        require(same, "mixture_weights.count", datasets=len(self.members))
        pairs = zip(self.members, change.weights, strict=False)
        return replace(
            self,
            members=tuple(replace(member, weight=weight) for member, weight in pairs),
            global_batch_size=global_batch_size,
            canonical_ranks=change.canonical_ranks,
            changes=(),
        )

    def with_members(self, members: Sequence[MixtureMember], *, step: int) -> MixtureConfig:
        """Returns the same run with other members listed, before any change of weights.

        Those that are new have weight 0 and no slot so far; those that are left out are removed,
        unless they never had a slot before `step`. The weights of the run's start become those of
        `members`.
        """
        old = {member.name: i for i, member in enumerate(self.everyone)}
        names = {member.name for member in members}
        segments = self.segments()
        none = (0,) * len(old)
        base = self.base or MixtureBase(
            segment=segments[0],
            counted=none,
            first_epoch=none,
            owed=none,
            seen_by=(None,) * len(old),
        )
        shown = [n > 0 for n in base.counted]
        for change in segments:
            if change.step < step:
                shown = [a or w > 0 for a, w in zip(shown, change.weights, strict=True)]
        removed = tuple(
            replace(member, weight=0.0)
            for i, member in enumerate(self.everyone)
            if member.name not in names and shown[i]
        )
        number = [old.get(member.name) for member in (*members, *removed)]

        def moved(values: Sequence[Any], new: Any) -> tuple[Any, ...]:
            return tuple(new if i is None else values[i] for i in number)

        def change_of(change: MixtureChange) -> MixtureChange:
            return replace(change, weights=moved(change.weights, 0.0))

        base = MixtureBase(
            segment=change_of(base.segment),
            counted=moved(base.counted, 0),
            first_epoch=moved(base.first_epoch, 0),
            owed=moved(base.owed, 0),
            seen_by=moved(base.seen_by, None),
        )
        return replace(
            self,
            members=tuple(members),
            removed=removed,
            changes=tuple(map(change_of, self.changes)),
            base=base,
            past=tuple(
                replace(
                    part,
                    segment=change_of(part.segment),
                    first_epoch=moved(part.first_epoch, 0),
                    owed=moved(part.owed, 0),
                )
                for part in self.past
            ),
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
            "changes": [change.to_dict() for change in self.changes],
            "base": self.base and self.base.to_dict(),
            "past": [part.to_dict() for part in self.past],
            "removed": [asdict(member) for member in self.removed],
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> MixtureConfig:
        """Restores a configuration from `to_dict`.

        Raises:
          StateError: `order_version` or `order_values`.
        """
        known = {field.name for field in fields(cls)}
        if state.get("version") != MIXTURE_VERSION or set(state) - {"version"} != known:
            raise StateError(
                "order_version.mixture",
                got=state.get("version"),
                want=MIXTURE_VERSION,
                other_fields=sorted(set(state) - {"version"} ^ known),
            )
        require_stored(state)
        values = {name: state[name] for name in known}
        try:
            values["members"] = tuple(MixtureMember(**member) for member in state["members"])
            values["changes"] = tuple(map(MixtureChange.from_dict, state["changes"]))
            values["removed"] = tuple(MixtureMember(**member) for member in state["removed"])
            values["past"] = tuple(map(MixturePast.from_dict, state["past"]))
            base = state["base"]
            values["base"] = None if base is None else MixtureBase.from_dict(base)
        except (TypeError, KeyError) as e:
            raise StateError("order_values", got=repr(e)) from e
        named = (*values["members"], *values["removed"])
        if not (is_whole(state["seed"]) and all(isinstance(m.name, str) for m in named)):
            raise StateError("order_values", got=repr([state["seed"], [m.name for m in named]]))
        return cls(**values)


def plan_mixture(
    sources: MixtureGroup | Sequence[MixtureSource],
    *,
    global_batch_size: int,
    seed: int,
    unit: Unit = "samples",
    canonical_ranks: int | None = None,
    canonical_workers: int = 8,
    locality: Locality = "any",
) -> MixtureConfig:
    """Flattens sources to weights and chooses the canonical sizes, as `plan_order` does.

    Raises:
      ConfigError: `order_count`, and as `mixture_weights` and `MixtureConfig`.
    """
    require_count("global_batch_size", global_batch_size)
    require_count("canonical_ranks", 1 if canonical_ranks is None else canonical_ranks)
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
        canonical_ranks=default_canonical_ranks(global_batch_size)
        if canonical_ranks is None
        else canonical_ranks,
        canonical_workers=canonical_workers,
        locality=locality,
    )
