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

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, Protocol

import numpy as np

from loader.order.permutation import keyed_array, permute
from loader.order.remainder import EpochRemainder
from shardspec.errors import ConfigError, StateError

ORDER_VERSION = 1
"""Version of the order itself: the same configuration and version mean the same samples."""

Layout = Literal["lanes", "global", "sequential"]
Tail = Literal["wrap", "drop_last", "pad"]

MIN_LANE_LENGTH = 32
"""Shorter lanes are not planned: their borders would cost more than 3 % of padding or drops."""

# Purposes of the keyed hash, so that no two draws share a stream.
_KEY_BLOCKS, _KEY_INSIDE, _KEY_ROTATION, _KEY_ROWS, _KEY_ALL, _KEY_REST = 1, 2, 3, 4, 5, 6

_MAX_CANONICAL_RANKS = 192  # default width: 2**6 * 3, divided by 14 numbers of ranks
_BLOCKS_PER_SUBSLICE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RampStep:
    """A change of the global batch size from one step on."""

    step: int
    """First step with the new size, >= 1."""
    global_batch_size: int
    """Samples per step from there on, a multiple of the canonical ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderConfig:
    """Everything the order depends on: a dozen integers. `plan_order` fills in good values."""

    num_samples: int
    """N, samples in the dataset, >= 1."""
    global_batch_size: int
    """B, slots per step, >= 1."""
    seed: int
    """Seed of the order, 0 to 2**64 - 1."""
    tail: Tail = "wrap"
    """How an epoch ends. "wrap": the next epoch begins inside the batch, nothing is dropped or
    repeated. "drop_last": an epoch has only full turns; other samples are left out each time.
    "pad": every sample once, the remaining slots repeat samples with `real` False."""
    layout: Layout = "lanes"
    """See the module's text."""
    canonical_ranks: int = 1
    """U, a divisor of the global batch; best a multiple of the numbers of ranks in use."""
    canonical_workers: int = 8
    """Kc; best a multiple of the numbers of workers in use (8, or 24 for 3, 6, 12 too)."""
    active_blocks: int = 8
    """A, blocks that a lane reads side by side."""
    block_size: int = 1
    """c, samples per block; 1 is a full global shuffle."""
    ramp: tuple[RampStep, ...] = ()
    """Later global batch sizes, by increasing step; tail "wrap" only."""
    since: int = 0
    """First step that this order lays out, >= 0."""
    before: OrderConfig | None = None
    """The order of the steps before, of the same seed; its epoch is finished first (rest.py)."""

    def __post_init__(self) -> None:
        counts = ("num_samples", "global_batch_size", "canonical_ranks", "canonical_workers")
        for name in (*counts, "active_blocks", "block_size"):
            _require_count(name, getattr(self, name))
        if not 0 <= self.seed < 2**64:
            raise ConfigError("order_seed", seed=self.seed)
        _require_name("tail", self.tail, ("wrap", "drop_last", "pad"))
        _require_name("layout", self.layout, ("lanes", "global", "sequential"))
        if self.num_samples * self.num_lanes >= 2**62:
            raise ConfigError("order_size", num_samples=self.num_samples, num_lanes=self.num_lanes)
        if self.layout == "lanes" and self.num_samples < self.num_lanes:
            raise ConfigError(
                "order_layout.few", num_samples=self.num_samples, num_lanes=self.num_lanes
            )
        for batch in (self.global_batch_size, *(change.global_batch_size for change in self.ramp)):
            _require_multiple(batch, self.canonical_ranks, of="canonical ranks")
        self._check_before()
        steps = [self.since, *(change.step for change in self.ramp)]
        if self.ramp and (self.tail != "wrap" or sorted(set(steps)) != steps):
            raise ConfigError("order_ramp", tail=self.tail, steps=steps[1:])
        if self.tail == "drop_last" and self.steps_per_epoch == 0:
            raise ConfigError(
                "order_empty", num_samples=self.num_samples, batch=self.global_batch_size
            )

    def _check_before(self) -> None:
        before = self.before
        if before is None and self.since == 0:
            return
        if before is None or not (
            before.tail == self.tail == "wrap"
            and before.seed == self.seed
            and before.num_samples <= self.num_samples
            and (before.layout == "sequential") == (self.layout == "sequential")
            and before.since < self.since
            and all(change.step < self.since for change in before.ramp)
        ):
            raise ConfigError("order_before", since=self.since, before=before and before.to_dict())

    @property
    def num_lanes(self) -> int:
        """V, lanes of the run."""
        return self.canonical_ranks * self.canonical_workers

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch: exact for "drop_last" and "pad", rounded up for "wrap"."""
        if self.tail == "wrap" or self.layout != "lanes":
            down, rest = divmod(self.num_samples, self.global_batch_size)
            return down + (rest > 0 and self.tail != "drop_last")
        share = self.global_batch_size // self.canonical_ranks
        shortest, longer = divmod(self.num_samples, self.num_lanes)
        if self.tail == "drop_last":
            return self.canonical_workers * (shortest // share)
        return self.canonical_workers * -(-(shortest + (longer > 0)) // share)

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration in plain JSON types, `version` first."""
        return {
            "version": ORDER_VERSION,
            **asdict(self),
            "ramp": [asdict(c) for c in self.ramp],
            "before": self.before and self.before.to_dict(),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> OrderConfig:
        """Restores a configuration from `to_dict`.

        Raises:
          StateError: `order_version` or `order_fields`.
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
        values = {name: state[name] for name in known}
        values["ramp"] = tuple(RampStep(**change) for change in state["ramp"])
        values["before"] = state["before"] and cls.from_dict(state["before"])
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """What stands in some slots; all arrays have the shape that was asked for."""

    dataset: np.ndarray
    """int64, number of the dataset in the mixture; 0 without a mixture."""
    epoch: np.ndarray
    """int64, epoch of the sample, from 0."""
    sample: np.ndarray
    """int64, sample id in its dataset, 0 to N - 1."""
    real: np.ndarray
    """bool, False in the padding of tail "pad": the slot counts with weight 0."""


def plan_order(
    num_samples: int,
    *,
    global_batch_size: int,
    seed: int,
    tail: Tail = "wrap",
    shuffle: bool = True,
    canonical_ranks: int | None = None,
    canonical_workers: int = 8,
    active_blocks: int = 8,
    block_size: int = 64,
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
      active_blocks: Blocks that a lane reads side by side.
      block_size: Samples per block to aim for; less where the dataset is small, and moved up to
        half again so that reads come evenly (`pick_block_size`).

    Returns:
      The configuration; store it in the run's state and reuse it on resume.

    >>> plan_order(700_000, global_batch_size=256, seed=1).canonical_ranks
    128
    """
    _require_count("num_samples", num_samples)
    _require_count("global_batch_size", global_batch_size)
    for name, value in (("active_blocks", active_blocks), ("block_size", block_size)):
        _require_count(name, value)
    ranks = canonical_ranks or default_canonical_ranks(global_batch_size)
    lanes = ranks * canonical_workers
    # With "drop_last" and "pad" an epoch is rounded to turns of Kc steps: lanes must be long in
    # turns for that to be small, not only long in samples.
    turn = 1 if tail == "wrap" else max(1, global_batch_size // ranks)
    layout: Layout = "lanes" if num_samples >= MIN_LANE_LENGTH * lanes * turn else "global"
    if not shuffle:
        layout = "sequential"
    if layout == "lanes":
        block_size = pick_block_size(
            num_samples, num_lanes=lanes, active_blocks=active_blocks, target=block_size
        )
    return OrderConfig(
        num_samples=num_samples,
        global_batch_size=global_batch_size,
        seed=seed,
        tail=tail,
        layout=layout,
        canonical_ranks=ranks,
        canonical_workers=canonical_workers,
        active_blocks=active_blocks,
        block_size=block_size if layout == "lanes" else 1,
    )


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """The epoch line of a dataset: stages 3 and 4 of the module's text.

    Each field is one number, or an array with one per slot where slots belong to several datasets.
    """

    num_samples: int | np.ndarray
    seed: int | np.ndarray
    active_blocks: int | np.ndarray
    block_size: int | np.ndarray

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
        key = keyed_array(self.seed, _KEY_BLOCKS, epoch)
        moved = permute(block, size=np.maximum(num_blocks, 1), key=key)
        key = keyed_array(self.seed, _KEY_INSIDE, epoch, block)
        shuffled = permute(inside, size=self.block_size, key=key)
        scattered = np.where(whole, moved * self.block_size + shuffled, place)
        rotated: np.ndarray = (scattered + self._rotation(epoch)) % self.num_samples
        return rotated

    def blocks(self, sample: np.ndarray, *, epoch: np.ndarray) -> np.ndarray:
        """Undoes the rotation: int64 samples to the numbers of their blocks."""
        unrotated: np.ndarray = (sample - self._rotation(epoch)) % self.num_samples
        blocks: np.ndarray = unrotated // self.block_size
        return blocks

    def _rotation(self, epoch: np.ndarray) -> np.ndarray:
        # Below 2**62 the hash stays positive as int64, and sums cannot overflow.
        rotation = keyed_array(self.seed, _KEY_ROTATION, epoch) % np.uint64(2**62)
        signed: np.ndarray = rotation.astype(np.int64)
        return signed


class Passes(Protocol):
    """What knows where passes over the data begin."""

    def epoch_start(self, epoch: int) -> int:
        """Returns the step at which a pass begins: 0 for epoch 0, never less for later ones."""


def epoch_of(passes: Passes, step: int) -> int:
    """Finds the pass that a step belongs to: the last one that has begun."""
    above = 1
    while passes.epoch_start(above) <= step:
        above *= 2
    below = above // 2
    while above - below > 1:
        middle = (below + above) // 2
        if passes.epoch_start(middle) <= step:
            below = middle
        else:
            above = middle
    return below


def rank_positions(rank: int, world_size: int, global_batch_size: int) -> np.ndarray:
    """Lists the positions of the global batch that a rank takes: int64 [B / W], consecutive.

    With gradient accumulation, micro-batch i of m samples is the slice [i * m, (i + 1) * m).

    Raises:
      ConfigError: `batch_not_divisible`, naming the nearest valid batch; `rank`.

    >>> rank_positions(1, 4, 8).tolist()
    [2, 3]
    """
    _require_count("world_size", world_size)
    if not 0 <= rank < world_size:
        raise ConfigError("rank", rank=rank, world_size=world_size)
    _require_multiple(global_batch_size, world_size, of="ranks")
    share = global_batch_size // world_size
    return np.arange(rank * share, (rank + 1) * share, dtype=np.int64)


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


def _turns_before(steps: np.ndarray, worker: np.ndarray, num_workers: int) -> np.ndarray:
    """Counts the steps before `steps` that are `worker` modulo `num_workers`: int64."""
    turns: np.ndarray = (steps - worker + num_workers - 1) // num_workers
    return turns


def require_slots(
    steps: np.ndarray, positions: np.ndarray, batches: np.ndarray, *, since: int = 0
) -> None:
    """Refuses slots outside the run, or before the step from which an order lays it out.

    Raises:
      ConfigError: `order_slot`.
    """
    if steps.size and (steps.min() < since or positions.min() < 0 or (positions >= batches).any()):
        raise ConfigError(
            "order_slot",
            since=since,
            min_step=int(steps.min()),
            positions=f"{int(positions.min())} to {int(positions.max())}",
            global_batch_size=int(batches.min()),
        )


def _require_count(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError("order_count", where=name, name=name, got=value)


def _require_name(field: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ConfigError(
            f"order_{field}.unknown", where=field, field=field, name=name, known=", ".join(known)
        )


def _require_multiple(global_batch_size: int, divisor: int, *, of: str) -> None:
    if global_batch_size % divisor:
        below = global_batch_size // divisor * divisor
        near = [str(batch) for batch in (below, below + divisor) if batch]
        raise ConfigError(
            "batch_not_divisible.unit",
            of=of,
            near=" or ".join(near),
            global_batch_size=global_batch_size,
            facts={of: divisor},
        )
