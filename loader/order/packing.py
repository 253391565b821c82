"""Packs: which samples share a sequence, planned from lengths alone, before any data is read.

A *pack* is a set of samples whose tokens and crops fit one sequence. Lengths are known from the
shards' indexes, so packs are planned, and a resumed run plans them again.

* `plan_window` packs one window of samples by best fit, largest first: each sample goes to the
  open pack it leaves the least room in. The emptiest packs of a window are not emitted but handed
  to the next window, where they must leave: no sample waits longer than that.
* `plan_run` chains windows and lets nothing over at its end: a pure function from the lengths of
  a run of samples to its packs. A run of 16 windows loses at most half a pack to its end.
* `PackStream` is an endless sequence of samples cut into runs: pack n is found from (run, number
  of the run's first pack), two integers. One stream per canonical rank keeps packing independent
  of the number of ranks; a stream's sample n is slot (n div b, u * b + n mod b) of the order.
* `balance_ranks` exchanges the packs of one global batch so that ranks get equal cost.

Measured by benchmarks/order.py on captions with images (lognormal, median 650 tokens): with windows
of 256, packs of 4096 are 98.4 % full and packs of 16384 99.4 %, at about 1 µs per sample.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from loader.order.permutation import keyed_array, permute
from loader.order.slots import is_whole
from shardspec.errors import ConfigError

_KEY_PACKS = 32
_FULL = 0.98  # packs below this may wait for the next window
_MOST = {"sequence_length": 2**24, "max_crops": 2**16, "window": 2**20}  # together 63 bits
_MOST_CARRIED = 8  # one pack in eight at most, so that windows stay small
_PASSED = 2**19  # samples whose packs are counted together, all their runs side by side
_FEW_RUNS = 16  # so few are planned faster than counted
_LOOKED_UP = 2**15  # samples whose lengths are looked up together, as fits a core's cache


@dataclass(frozen=True, slots=True, kw_only=True)
class PackConfig:
    """Limits of a pack and of its planning."""

    sequence_length: int
    """Tokens in a pack, 1 to 2**24."""
    max_crops: int | None = None
    """Crops in a pack, 1 to 2**16; None: no limit."""
    window: int = 512
    """Samples that are packed together, 1 to 2**20."""
    windows_per_run: int = 16
    """Windows after which nothing is carried over, >= 1."""
    seed: int = 0
    """Seed of the order of packs in their window."""

    def __post_init__(self) -> None:
        for name in ("sequence_length", "max_crops", "window", "windows_per_run"):
            value = getattr(self, name)
            if value is not None or name != "max_crops":
                _require_positive(name, value, most=_MOST.get(name))

    @property
    def run(self) -> int:
        """Samples in a run."""
        return self.window * self.windows_per_run


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowPlan:
    """What becomes of the samples of one window; numbers are indices into its arrays."""

    packs: list[np.ndarray]
    """int64 [samples of the pack] each, ascending."""
    carried: np.ndarray
    """int64, the samples that wait for the next window, where they must leave."""


def plan_window(
    tokens: np.ndarray,
    crops: np.ndarray,
    *,
    config: PackConfig,
    num_carried: int = 0,
    last: bool = False,
    key: int = 0,
) -> WindowPlan:
    """Packs one window of samples.

    Args:
      tokens: int [n], tokens of each sample, >= 0. A sample over the limit fills a pack alone.
      crops: int [n], crops of each sample, >= 0. One over the limit has all crops of its pack.
      config: The limits.
      num_carried: The first so many samples come from the window before and leave with this one.
      last: Carry nothing.
      key: Shuffles the packs, which are made largest samples first.

    Returns:
      Packs that hold every sample but the carried exactly once.

    >>> plan = plan_window(
    ...     np.array([60, 50, 40, 50]),
    ...     np.zeros(4, int),
    ...     config=PackConfig(sequence_length=100),
    ... )
    >>> sorted(pack.tolist() for pack in plan.packs)
    [[0, 2], [1, 3]]
    """
    filled = _fill(tokens, crops, config=config, num_carried=num_carried)
    pack_of = filled.pack_of[:, 0]
    waits = filled.waits()[:, 0] & (not last)
    leaving = np.flatnonzero(~waits).tolist()
    shuffled = permute(np.arange(len(leaving)), size=max(1, len(leaving)), key=key)
    by_pack = np.argsort(pack_of, kind="stable")
    ends = np.cumsum(np.bincount(pack_of, minlength=len(waits))).tolist()
    members = [by_pack[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return WindowPlan(
        packs=[members[leaving[i]] for i in shuffled.tolist()],
        carried=np.flatnonzero(waits[pack_of]),
    )


def plan_run(
    tokens: np.ndarray, crops: np.ndarray, *, config: PackConfig, key: int = 0
) -> list[np.ndarray]:
    """Packs a run of samples window by window, all of them.

    Args:
      tokens: int [n], tokens of each sample of the run; n need not be a whole number of windows.
      crops: int [n].
      config: The limits.
      key: As for `plan_window`.

    Returns:
      int64 arrays of indices into the run: every sample in exactly one pack.
    """
    packs: list[np.ndarray] = []
    carried = np.zeros(0, np.int64)
    starts = range(0, len(tokens), config.window)
    keys = keyed_array(key, np.array(starts, np.int64)).tolist()
    for start, window_key in zip(starts, keys, strict=True):
        stop = min(start + config.window, len(tokens))
        samples = np.concatenate([carried, np.arange(start, stop)])
        plan = plan_window(
            tokens[samples],
            crops[samples],
            config=config,
            num_carried=len(carried),
            last=stop == len(tokens),
            key=window_key,
        )
        packs.extend(samples[pack] for pack in plan.packs)
        carried = samples[plan.carried]
    return packs


def count_runs(tokens: np.ndarray, crops: np.ndarray, *, config: PackConfig) -> np.ndarray:
    """Counts the packs that `plan_run` makes of each of many runs.

    Runs do not depend on each other, so they are packed side by side: a step places one sample of
    each, and takes as long for one run as for fifty. For a hundred it is ten times faster than
    planning them.

    Args:
      tokens: int [runs, n], tokens of each sample of the runs.
      crops: int [runs, n].
      config: The limits.

    Returns:
      int64 [runs].
    """
    num_runs, size = tokens.shape
    count = np.zeros(num_runs, np.int64)
    # Samples down, runs across. Runs carry differently many: what is not there has no length.
    lengths = np.zeros((2, 0, num_runs), np.int64)
    there = np.zeros((0, num_runs), np.bool_)
    for start in range(0, size, config.window):
        part = slice(start, min(start + config.window, size))
        fresh = np.stack([tokens[:, part].T, crops[:, part].T])
        carried, lengths = there, np.concatenate([lengths, fresh], axis=1)
        there = np.concatenate([carried, np.ones(fresh.shape[1:], np.bool_)])
        filled = _fill_side_by_side(lengths, there, config=config, num_carried=len(carried))
        count += filled.num_packs
        if part.stop < size:
            waits = filled.waits()
            count -= waits.sum(axis=0)
            there &= np.take_along_axis(waits, filled.pack_of, axis=0)
            first = np.argsort(~there, axis=0, kind="stable")[: there.sum(axis=0).max()]
            there = np.take_along_axis(there, first, axis=0)
            lengths = np.take_along_axis(lengths, first[None], axis=1) * there
    return count


@dataclass(frozen=True, slots=True, kw_only=True)
class _Filled:
    """The samples of a window in packs, of one run or of several side by side."""

    pack_of: np.ndarray
    """int64 [n, runs], pack of each sample."""
    tokens_left: np.ndarray
    """int64 [packs, runs], room of each pack; runs may have fewer."""
    crops_left: np.ndarray
    """int64 [packs, runs]."""
    least_left: tuple[float, np.ndarray]
    """(tokens, crops [runs]) that a pack has more of where it may wait."""
    bound: np.ndarray
    """bool [packs, runs], the packs that hold carried samples."""
    num_packs: np.ndarray
    """int64 [runs]."""

    def waits(self) -> np.ndarray:
        """Chooses the emptiest packs without carried samples: bool [packs, runs]."""
        tokens, crops = self.least_left
        number = np.arange(len(self.bound))[:, None]
        may = (self.tokens_left > tokens) & (self.crops_left > crops) & ~self.bound
        may &= number < self.num_packs
        # Of packs that are equally empty, the first one.
        emptiest = np.argsort(np.where(may, -self.tokens_left, 1), axis=0, kind="stable")
        waits: np.ndarray = np.empty_like(may)
        np.put_along_axis(waits, emptiest, number < -(-self.num_packs // _MOST_CARRIED), axis=0)
        waits &= may
        return waits


def _fill(
    tokens: np.ndarray, crops: np.ndarray, *, config: PackConfig, num_carried: int
) -> _Filled:
    """Packs a window by best fit, largest first: the arguments are `plan_window`'s."""
    limit = config.sequence_length
    tokens, crops, crop_limits, share = _limited(tokens[:, None], crops[:, None], config=config)
    # The carried first: their packs are sure to leave, so the others fill them up.
    share[:num_carried] += 2
    by_share = np.argsort(-share[:, 0], kind="stable")

    # A pack is one integer, which compares fast: its tokens left, its number, its crops left.
    crop_bits = int(crop_limits[0]).bit_length()
    crop_mask = (1 << crop_bits) - 1
    token_bits = crop_bits + len(tokens).bit_length()
    need, crop = tokens[by_share, 0] << token_bits, crops[by_share, 0]
    # A pack with less room is full.
    enough = max(1 << token_bits, int(need.min(initial=limit << token_bits)))
    # Packs with room, ascending; the last one is unused, and fits any sample.
    unused = (limit << token_bits) + int(crop_limits[0])
    room = [unused]
    placed: list[int] = []
    columns = need.tolist(), crop.tolist(), (need + crop).tolist()
    for least, least_crops, both in zip(*columns, strict=True):
        place = bisect_left(room, least)
        while room[place] & crop_mask < least_crops:
            place += 1
        pack = room.pop(place)
        if pack == unused:
            unused += 1 << crop_bits
            room.append(unused)
        pack -= both
        placed.append(pack)
        if pack >= enough:
            insort(room, pack, 0, place)

    packs = np.array(placed, np.int64)
    number = (packs >> crop_bits) & ((1 << (token_bits - crop_bits)) - 1)
    pack_of = np.empty_like(number)
    pack_of[by_share] = number
    left = np.empty((int(number.max(initial=-1)) + 1, 1), np.int64)
    left[number, 0] = packs  # the last sample of a pack leaves what is left
    bound = np.zeros(left.shape, np.bool_)
    bound[pack_of[:num_carried]] = True
    return _Filled(
        pack_of=pack_of[:, None],
        tokens_left=left >> token_bits,
        crops_left=left & crop_mask,
        least_left=((1 - _FULL) * limit, (1 - _FULL) * crop_limits),
        bound=bound,
        num_packs=np.array([len(left)]),
    )


def _fill_side_by_side(
    lengths: np.ndarray,
    there: np.ndarray,
    *,
    config: PackConfig,
    num_carried: int,
) -> _Filled:
    """Packs as `_fill` does, a window of each of several runs at once.

    A column's packs are open from the start. Unused ones have most room, so best fit takes the
    first of them where no other pack has enough: a new pack is no case of its own.

    Args:
      lengths: int64 [2, n, runs], tokens and crops.
      there: bool [n, runs]; what is not there has no tokens and no crops.
      config: The limits.
      num_carried: The first so many rows come from the window before.
    """
    size, num_runs = there.shape
    limit = config.sequence_length
    tokens, crops, crop_limits, share = _limited(lengths[0], lengths[1], config=config)
    share[:num_carried] += 2
    share[~there] = -1
    by_share = np.argsort(-share, axis=0, kind="stable")

    # A pack's room is its tokens left, with its number in the lowest bits: the least room in which
    # a sample fits is the best. Unsigned numbers have the highest bit where it does not fit.
    bits = size.bit_length()
    most = max(limit << bits, int(crop_limits.max(initial=0)))
    number: type[np.unsignedinteger[Any]] = np.uint32 if most < 2**31 else np.uint64
    below_zero = number(1 << (np.iinfo(number).bits - 1))
    need = (np.take_along_axis(tokens, by_share, axis=0) << bits).astype(number)
    crop = np.take_along_axis(crops, by_share, axis=0).astype(number)
    at_least = np.maximum(need, number(1 << bits))  # nothing fits a pack without room
    room = np.tile(np.arange(size + 1)[:, None] + (limit << bits), num_runs).astype(number)
    crops_left = np.tile(crop_limits.astype(number), (size + 1, 1))
    placed = np.empty((size, num_runs), np.int64)
    flat = np.arange(num_runs)
    used = 1
    for i in range(size):
        left = room[:used] - at_least[i]
        left |= (crops_left[:used] - crop[i]) & below_zero
        placed[i] = left.min(axis=0) & number((1 << bits) - 1)
        cells = placed[i] * num_runs + flat
        room.reshape(-1)[cells] -= need[i]
        crops_left.reshape(-1)[cells] -= crop[i]
        used = max(used, int(placed[i].max()) + 2)
    pack_of = np.empty_like(placed)
    np.put_along_axis(pack_of, by_share, placed, axis=0)
    bound = np.zeros((used, num_runs), np.bool_)
    row, run = np.nonzero(there[:num_carried])
    bound[pack_of[row, run], run] = True
    return _Filled(
        pack_of=pack_of,
        tokens_left=(room[:used] >> number(bits)).astype(np.int64),
        crops_left=crops_left[:used].astype(np.int64),
        least_left=((1 - _FULL) * limit, (1 - _FULL) * crop_limits),
        bound=bound,
        num_packs=np.where(there, pack_of, -1).max(axis=0, initial=-1) + 1,
    )


def _limited(
    tokens: np.ndarray, crops: np.ndarray, *, config: PackConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Cuts int [n, runs] to the limits; without a limit of crops they do not count.

    Returns:
      (tokens, crops, limit of crops [runs], the larger share of the two limits).
    """
    limit = config.sequence_length
    if config.max_crops is None:
        crops = np.zeros_like(crops)
    crop_limits = np.full(crops.shape[1], config.max_crops or 1)
    tokens = np.minimum(tokens, limit).astype(np.int64)
    crops = np.minimum(crops, crop_limits).astype(np.int64)
    return tokens, crops, crop_limits, np.maximum(tokens / limit, crops / crop_limits)


class PackStream:
    """The packs of an endless sequence of samples, in an order that only lengths decide.

    The place in the stream is (run, number of its first pack). Packs are asked for by number;
    asking for later ones plans the runs between, asking for earlier ones than the current run's
    begins again at the front.
    """

    def __init__(
        self,
        lengths: Callable[[int, int], tuple[np.ndarray, np.ndarray]],
        config: PackConfig,
        *,
        stream: int = 0,
        place: tuple[int, int] = (0, 0),
    ) -> None:
        """Opens the stream.

        Args:
          lengths: Gives (tokens, crops) of the stream's samples start to stop - 1, from indexes.
          config: The limits.
          stream: Number of the stream (canonical rank); part of the shuffle's key.
          place: A `place` of the same stream, from a saved state.
        """
        self._lengths = lengths
        self._config = config
        self._stream = stream
        self._place = place
        self._packs: list[np.ndarray] | None = None

    @property
    def place(self) -> tuple[int, int]:
        """(run, number of its first pack), for the state."""
        return self._place

    def planned(self) -> list[np.ndarray]:
        """Returns the packs of the run that the stream is in; see `pack`."""
        if self._packs is None:
            self._packs = self._plan(self._place[0])
        return self._packs

    def pack(self, n: int) -> np.ndarray:
        """Returns the samples of pack n: int64, numbers in the stream, ascending."""
        if n < self._place[1]:
            self._place, self._packs = (0, 0), None
        packs = self.planned()
        while n >= self._place[1] + len(packs):
            run, first = self._place
            between = (n - first) // len(packs) - 1
            # Looking lengths up may fail: packs of one run must never stand for another's.
            self._packs, self._place = None, (run + 1, first + len(packs))
            self._pass(n, most=min(between, max(1, _PASSED // self._config.run)))
            packs = self.planned()
        return packs[n - self._place[1]]

    def _pass(self, n: int, *, most: int) -> None:
        """Passes runs before the one that holds pack n, by counting: `most` of them."""
        if most < _FEW_RUNS:
            return
        size = self._config.run
        run, first = self._place
        found = [
            self._lengths(start, min(start + _LOOKED_UP, (run + most) * size))
            for start in range(run * size, (run + most) * size, _LOOKED_UP)
        ]
        tokens, crops = (
            np.concatenate(part).reshape(most, size) for part in zip(*found, strict=True)
        )
        ends = first + np.cumsum(count_runs(tokens, crops, config=self._config))
        passed = int(np.searchsorted(ends, n, side="right"))
        if passed:
            self._place = (run + passed, int(ends[passed - 1]))

    def _plan(self, run: int) -> list[np.ndarray]:
        start = run * self._config.run
        tokens, crops = self._lengths(start, start + self._config.run)
        key = int(keyed_array(self._config.seed, _KEY_PACKS, self._stream, run)[0])
        packs = plan_run(tokens, crops, config=self._config, key=key)
        return [start + pack for pack in packs]


def balance_ranks(
    cost: np.ndarray, *, world_size: int, first: np.ndarray | None = None
) -> np.ndarray:
    """Assigns the rows of a global batch to ranks, equal in number and nearly equal in cost.

    Dearest first, each to the rank with the least cost so far that has a place left.

    Args:
      cost: float or int [P], cost of each row (for instance tokens plus patches), >= 0.
      world_size: W, a divisor of P.
      first: bool [P], rows of cost > 0 that are assigned before all others: where there are W of
        them or more, every rank gets one. None: cost alone decides.

    Returns:
      int64 [P], a permutation: rank r takes the rows at [r * P / W, (r + 1) * P / W).

    Raises:
      ConfigError: `batch_not_divisible`.

    >>> balance_ranks(np.array([9, 1, 8, 2]), world_size=2).tolist()
    [0, 1, 2, 3]
    >>> balance_ranks(np.array([9, 1, 8, 2]), world_size=2, first=np.arange(4) % 2 == 1).tolist()
    [2, 3, 0, 1]
    """
    _require_positive("world_size", world_size)
    if len(cost) % world_size:
        raise ConfigError(
            "batch_not_divisible.packs",
            near=-(-len(cost) // world_size) * world_size,
            packs=len(cost),
            ranks=world_size,
        )
    share = len(cost) // world_size
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    load: list[tuple[float, int]] = [(0.0, rank) for rank in range(world_size)]
    dearest = np.argsort(-np.asarray(cost, np.float64), kind="stable")
    if first is not None:
        dearest = np.concatenate([dearest[first[dearest]], dearest[~first[dearest]]])
    for row in dearest.tolist():
        spent, rank = heapq.heappop(load)
        ranks[rank].append(row)
        if len(ranks[rank]) < share:
            heapq.heappush(load, (spent + float(cost[row]), rank))
    return np.array([row for rank in ranks for row in sorted(rank)], np.int64)


def _require_positive(name: str, value: int, *, most: int | None = None) -> None:
    if not is_whole(value) or value < 1 or (most is not None and value > most):
        code = "packing_limit.least" if most is None else "packing_limit.most"
        raise ConfigError(code, where=name, name=name, most=most, got=value)
