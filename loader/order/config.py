"""What an order depends on: a dozen integers, and how they are chosen.

Nothing here knows ranks or workers of a run: the same configuration means the same samples on any
number of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np

from loader.order.slots import (
    is_whole,
    require_count,
    require_multiple,
    require_step,
    require_stored,
)
from shardspec.errors import ConfigError, StateError

ORDER_VERSION = 2
"""Version of the order itself: the same configuration and version mean the same samples. Since
version 2 an epoch is exactly N consecutive slots; version 1 counted epochs lane by lane."""


Layout = Literal["lanes", "global", "sequential"]
Tail = Literal["wrap", "drop_last", "pad"]
Locality = Literal["any", "node"]


MIN_LANE_LENGTH = 32
"""Shorter lanes are not planned: the dataset is small enough to be shuffled as a whole."""


_MAX_CANONICAL_RANKS = 192  # default width: 2**6 * 3, divided by 14 numbers of ranks


_BLOCKS_PER_SUBSLICE = 4

_ACTIVE_BLOCKS, ACTIVE_TURNS, BLOCK_SIZE = 8, 4, 16
"""Defaults: blocks of 16 samples, four turns of a lane side by side. The same samples are open at a
time as with one turn of 64, but what sorted data leave of a block's class in later batches is a
quarter of it, in a quarter of the batches (benchmarks/ORDER.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RampStep:
    """A change of the global batch size from one step on."""

    step: int
    """First step with the new size, >= 1."""
    global_batch_size: int
    """Samples per step from there on, a multiple of the canonical ranks."""


MOST_CHANGES = 256
"""Changes of a run whose consequences are not over: those inside the present epoch of a dataset.
What is left of an epoch is known by all of them together, so none can be dropped before it ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderConfig:
    """Everything the order depends on: a dozen integers. `plan_order` fills in good values."""

    num_samples: int
    """N, samples in the dataset, >= 1."""
    global_batch_size: int
    """B, slots per step that the run begins with, >= 1."""
    seed: int
    """Seed of the order, 0 to 2**64 - 1."""
    tail: Tail = "wrap"
    """How an epoch ends. "wrap": the next epoch begins in the next slot, inside the batch; nothing
    is dropped or repeated. "drop_last": an epoch has only full batches; other samples are left out
    each time. "pad": every sample once, the remaining slots of the last batch repeat samples with
    `real` False."""
    layout: Layout = "lanes"
    """See the module's text."""
    canonical_ranks: int = 1
    """U, a divisor of the global batch; best a multiple of the numbers of ranks in use."""
    canonical_workers: int = 8
    """Kc; best a multiple of the numbers of workers in use (8, or 24 for 3, 6, 12 too)."""
    active_blocks: int = 8
    """A, blocks that a lane reads side by side. A lane reads at least as many as it has samples in
    a turn (`widened`)."""
    block_size: int = 1
    """c, samples per block; 1 is a full global shuffle."""
    locality: Locality = "any"
    """"any": each epoch deals all blocks anew to the lanes. "node": blocks are dealt to the
    canonical ranks once per run and reshuffled inside them each epoch, so that a node reads the
    same samples in every epoch; layout "lanes" only."""
    ramp: tuple[RampStep, ...] = ()
    """Later global batch sizes, by increasing step; tail "wrap" only. Where those that are over
    have been dropped, the first one begins at `since`."""
    since: int = 0
    """First step that this order lays out, >= 0."""
    first_epoch: int = 0
    """The first epoch that this order lays out as a whole."""
    owed: int = 0
    """Slots from `since` on that finish the epoch before `first_epoch` (remainder.py)."""
    before: OrderConfig | None = None
    """The order of the steps before, which knows what is owed; None where nothing is, or where that
    is over and only later steps are asked for."""

    def __post_init__(self) -> None:
        counts = ("num_samples", "global_batch_size", "canonical_ranks", "canonical_workers")
        for name in (*counts, "active_blocks", "block_size"):
            require_count(name, getattr(self, name))
        if not is_whole(self.seed) or not 0 <= self.seed < 2**64:
            raise ConfigError("order_seed", seed=self.seed)
        require_name("tail", self.tail, ("wrap", "drop_last", "pad"))
        require_name("layout", self.layout, ("lanes", "global", "sequential"))
        require_name("locality", self.locality, ("any", "node"))
        if self.num_samples >= 2**60 or self.num_lanes >= 2**31:
            raise ConfigError("order_size", num_samples=self.num_samples, num_lanes=self.num_lanes)
        for change in self.ramp:
            require_step(change.step)
            require_count("global_batch_size", change.global_batch_size)
        for batch in (self.global_batch_size, *(change.global_batch_size for change in self.ramp)):
            require_multiple(batch, self.canonical_ranks, of="canonical ranks")
        self._check_before()
        steps = [change.step for change in self.ramp]
        rises = sorted(set(steps)) == steps and all(max(self.since, 1) <= step for step in steps)
        if self.ramp and (self.tail != "wrap" or not rises):
            raise ConfigError("order_ramp", tail=self.tail, steps=steps)
        if len(self.ramp) > MOST_CHANGES:
            raise ConfigError("order_changes", changes=len(self.ramp), most=MOST_CHANGES)
        if self.tail == "drop_last" and self.steps_per_epoch == 0:
            raise ConfigError(
                "order_empty", num_samples=self.num_samples, batch=self.global_batch_size
            )

    def _check_before(self) -> None:
        before = self.before
        if before is None and (self.since, self.first_epoch, self.owed) == (0, 0, 0):
            return
        fits = all(is_whole(n) and n >= 0 for n in (self.since, self.first_epoch, self.owed))
        fits = fits and self.tail == "wrap" and self.since > 0 and self.owed <= self.num_samples
        if before is not None:
            fits = fits and (
                before.tail == "wrap"
                and before.seed == self.seed
                and before.num_samples <= self.num_samples
                and (before.layout == "sequential") == (self.layout == "sequential")
                and before.since < self.since
                and all(change.step < self.since for change in before.ramp)
            )
        if not fits:
            raise ConfigError("order_before", since=self.since, before=before and before.to_dict())

    @property
    def num_lanes(self) -> int:
        """V, lanes of the run."""
        return self.canonical_ranks * self.canonical_workers

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch: exact for "drop_last" and "pad", rounded up for "wrap"."""
        down, rest = divmod(self.num_samples, self.global_batch_size)
        return down + (rest > 0 and self.tail != "drop_last")

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration in plain JSON types, `version` first."""
        chain, after = [], self
        while after.before is not None:
            before = after.before
            own, other = before._values(), after._values()
            chain.append({name: value for name, value in own.items() if value != other[name]})
            after = before
        return {"version": ORDER_VERSION, **self._values(), "before": chain or None}

    def _values(self) -> dict[str, Any]:
        """Lists the fields but `before`, in plain JSON types."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "before"}
        return {**values, "ramp": [asdict(change) for change in self.ramp]}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> OrderConfig:
        """Restores a configuration from `to_dict`.

        Raises:
          StateError: `order_version`, `order_fields` or `order_values`.
          ConfigError: A value is not valid.
        """
        if state.get("version") != ORDER_VERSION:
            raise StateError("order_version.order", got=state.get("version"), want=ORDER_VERSION)
        known = {field.name for field in fields(cls)}
        given = set(state) - {"version"}
        if given != known:
            raise StateError(
                "order_fields", missing=sorted(known - given), unknown=sorted(given - known)
            )
        require_stored(state)
        chain, values = state["before"] or [], {name: state[name] for name in known - {"before"}}
        listed = isinstance(chain, list | tuple) and all(isinstance(one, Mapping) for one in chain)
        if not listed or len(chain) > MOST_CHANGES:
            raise StateError("order_values", got=repr(chain)[:200])
        unknown = sorted({name for one in chain for name in one} - set(values))
        if unknown:
            raise StateError("order_fields", missing=[], unknown=unknown)
        parts = [values]
        for one in chain:
            require_stored(one)
            parts.append({**parts[-1], **one})
        config = None
        for part in reversed(parts):
            try:
                ramp = tuple(RampStep(**change) for change in part["ramp"])
            except (TypeError, AttributeError) as e:
                raise StateError("order_values", got=str(e)) from e
            config = cls(**{**part, "ramp": ramp, "before": config})
        assert config is not None, "the order itself"
        return config


def plan_order(
    num_samples: int,
    *,
    global_batch_size: int,
    seed: int,
    tail: Tail = "wrap",
    shuffle: bool = True,
    canonical_ranks: int | None = None,
    canonical_workers: int = 8,
    active_blocks: int | None = None,
    block_size: int | None = None,
    locality: Locality = "any",
) -> OrderConfig:
    """Chooses the layout and the canonical sizes of a run; never from its ranks or workers.

    Args:
      num_samples: Samples in the dataset, >= 1.
      global_batch_size: Samples per step over all ranks.
      seed: Seed of the order, 0 to 2**64 - 1.
      tail: See `OrderConfig`.
      shuffle: False gives the samples in the order of their ids.
      canonical_ranks: A divisor of the global batch, ideally a multiple of every number of ranks
        that the run may have and at most four times that number. None: the divisor up to 192 that
        has most divisors itself.
      canonical_workers: 8 covers 1, 2, 4, 8 workers; 24 covers 3, 6, 12, 24 as well.
      active_blocks: Blocks that a lane reads side by side. None: four times the lane's samples of
        a turn, at least 8. Fewer than the samples of a turn are never read.
      block_size: Samples per block to aim for. None: 16. Less where the dataset is small, and
        moved up to half again so that reads come evenly (`pick_block_size`). 1 shuffles all
        samples on their own: the best shuffle, for data that is read sample by sample.
      locality: See `OrderConfig`.

    Returns:
      The configuration; store it in the run's state and reuse it on resume.

    >>> plan_order(700_000, global_batch_size=256, seed=1).canonical_ranks
    128
    """
    require_count("num_samples", num_samples)
    require_count("global_batch_size", global_batch_size)
    target = BLOCK_SIZE if block_size is None else block_size
    ranks = canonical_ranks
    if ranks is None:
        ranks = default_canonical_ranks(global_batch_size)
    require_count("canonical_ranks", ranks)
    require_count("canonical_workers", canonical_workers)
    turn = global_batch_size // ranks
    active = active_blocks
    if active is None:
        active = max(_ACTIVE_BLOCKS, ACTIVE_TURNS * turn)
    for name, value in (("active_blocks", active), ("block_size", target)):
        require_count(name, value)
    lanes = ranks * canonical_workers
    active = max(active, turn)
    layout: Layout = "lanes" if num_samples >= MIN_LANE_LENGTH * lanes else "global"
    if not shuffle:
        layout = "sequential"
    if layout == "lanes":
        target = pick_block_size(num_samples, num_lanes=lanes, active_blocks=active, target=target)
    return OrderConfig(
        num_samples=num_samples,
        global_batch_size=global_batch_size,
        seed=seed,
        tail=tail,
        layout=layout,
        canonical_ranks=ranks,
        canonical_workers=canonical_workers,
        active_blocks=active,
        block_size=target if layout == "lanes" else 1,
        locality=locality,
    )


def batch_sizes(config: OrderConfig) -> list[RampStep]:
    """Lists the global batch sizes of an order from `since` on, by their first steps."""
    begins = config.ramp[:1] and config.ramp[0].step == config.since
    first = RampStep(step=config.since, global_batch_size=config.global_batch_size)
    return [*config.ramp] if begins else [first, *config.ramp]


def widened(config: OrderConfig, global_batch_size: int) -> tuple[int, int]:
    """Chooses the active blocks and the block size of a lane for a global batch.

    A lane takes B / U samples in a turn. With fewer active blocks than that, a turn would take
    neighbours out of one block, and batches would clump by shard: 14 times the pairs of a global
    shuffle at 64 samples and 8 blocks (benchmarks/ORDER.md). So the blocks are as many as the
    samples of a turn at least, and smaller where the lane is too short for so many.

    Returns:
      (active blocks, samples per block).
    """
    share = global_batch_size // config.canonical_ranks
    if share <= config.active_blocks or config.layout != "lanes":
        return config.active_blocks, config.block_size
    size = pick_block_size(
        config.num_samples,
        num_lanes=config.num_lanes,
        active_blocks=share,
        target=config.block_size,
    )
    return share, size


def default_canonical_ranks(global_batch_size: int) -> int:
    """Chooses the divisor of the batch, at most 192, that most numbers of ranks divide.

    >>> [default_canonical_ranks(batch) for batch in (32, 48, 256, 1000, 1536)]
    [32, 48, 128, 100, 192]
    """
    limit = min(global_batch_size, _MAX_CANONICAL_RANKS)
    divisors = [n for n in range(1, limit + 1) if global_batch_size % n == 0]
    return max(divisors, key=lambda n: (sum(n % d == 0 for d in range(1, n + 1)), n))


def pick_block_size(num_samples: int, *, num_lanes: int, active_blocks: int, target: int) -> int:
    """Chooses the block size near a target for which blocks are opened at an even pace.

    Sub-slice i of the whole line starts near i * N / (V A), and opens a block whenever it crosses
    a multiple of c. The pace is even if these starts are spread evenly modulo c, over the
    sub-slices of a lane, of a rank's 8 lanes and of a node's 64. Spread is measured by the
    discrepancy: the most sub-slices that any range of residues holds beyond its fair share.

    Args:
      num_samples: N.
      num_lanes: V.
      active_blocks: A.
      target: Samples per block to aim for, >= 1; lowered where sub-slices would be shorter than
        four blocks, so that blocks do get shuffled.

    Returns:
      A block size from 3/4 to 3/2 of the target: the most even, of equals the nearest.
    """
    target = max(1, min(target, num_samples // (_BLOCKS_PER_SUBSLICE * num_lanes * active_blocks)))
    candidates = range(max(1, -(-target * 3 // 4)), max(1, target * 3 // 2) + 1)
    if len(candidates) == 1:  # nothing to choose; there may be as many sub-slices as samples
        return candidates[0]
    cells = num_lanes * active_blocks
    starts = np.arange(min(64 * active_blocks, cells), dtype=np.int64) * num_samples // cells
    crowds = (active_blocks, 8 * active_blocks, 64 * active_blocks)

    def unevenness(size: int) -> tuple[float, int]:
        residues = starts % size
        total = 0.0
        for crowd in crowds:
            seen = residues[:crowd]
            below = np.cumsum(np.bincount(seen, minlength=size)) * size
            excess = below - len(seen) * np.arange(1, size + 1)
            total += int(excess.max() - excess.min()) / size
        return total, abs(size - target)

    return min(candidates, key=unevenness)


def require_name(field: str, name: str, known: tuple[str, ...]) -> None:
    if not isinstance(name, str) or name not in known:
        raise ConfigError(
            f"order_{field}.unknown", where=field, field=field, name=name, known=", ".join(known)
        )
