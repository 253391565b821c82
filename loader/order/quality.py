"""How well an order shuffles, in closed form: pairs of one shard in what a rank has of a step.

A lane takes b = B / U samples of a turn from A sub-slices, row after row. Samples of different
sub-slices come from blocks that were dealt over the whole line, so two of them share a shard about
as often as in a global shuffle. Two of one sub-slice are neighbours in one block, unless a border
of blocks is between them. They meet in a turn only where it crosses from one row to the next: with
k samples in the first and b - k in the second, k * (b - k) / A times in the mean, over all k that
occur, the multiples of gcd(A, b). Where b divides A no turn crosses: that is what `plan_order`
chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

from loader.order.config import OrderConfig, widened


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneReading:
    """How lanes read one dataset."""

    weight: float
    """Share of the slots; those of all datasets sum to 1."""
    num_samples: int
    active_blocks: int
    """Sub-slices that a lane reads side by side; 0 where the dataset is shuffled as a whole."""
    block_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What a rank has of a step, and where it is drawn from."""

    samples: float
    """Samples that the rank has."""
    groups: float
    """Into which they fall: those of one group come from the same lanes, at nearly the same place.
    Lanes that take turns without packs; with packs the streams of the rank, or the packs
    themselves, as balancing exchanges whole packs between ranks."""
    lanes: int
    """Lanes that a group comes from."""
    taken: float
    """Consecutive samples of each lane that it comes from: those of a turn, or of a window of
    packs."""


def lane_reading(config: OrderConfig, *, global_batch_size: int) -> LaneReading:
    """Tells how lanes read the dataset of an order at a batch size."""
    active, size = widened(config, global_batch_size)
    return LaneReading(
        weight=1.0,
        num_samples=config.num_samples,
        active_blocks=active if config.layout == "lanes" else 0,
        block_size=size,
    )


def pairs_in_groups(
    reading: Sequence[LaneReading], drawn: Drawn, *, num_shards: Sequence[int]
) -> float:
    """Estimates the pairs of one shard in a rank's share, relative to a global shuffle.

    For mixtures and packs. There a lane takes now more, now fewer samples of a dataset at once, so
    that rows are crossed anywhere: n consecutive samples of A sub-slices hold n * (n**2 - 1) / (6 *
    A**2) pairs of one sub-slice in the mean, or (n**2 - n * A + A**2 / 3) / (2 * A) where n > A.
    Counting finds the same to a fifth in mixtures and to a half in packs (test_quality.py).

    Args:
      reading: Of each dataset.
      drawn: The share.
      num_shards: Of each dataset, of about equal size.

    >>> reading = LaneReading(weight=1.0, num_samples=10**6, active_blocks=16, block_size=16)
    >>> packs = Drawn(samples=24, groups=1, lanes=8, taken=32)
    >>> round(pairs_in_groups([reading], packs, num_shards=[1000]), 1)
    5.3
    """
    each = drawn.samples / drawn.groups
    inside = drawn.groups * max(0.0, each * (each - 1)) / 2
    pairs = drawn.samples * (drawn.samples - 1) / 2
    pool = drawn.lanes * drawn.taken
    found = chance = 0.0
    for part, shards in zip(reading, num_shards, strict=True):
        # Of two samples, both are of the dataset; and then of one shard by chance.
        both = part.weight**2
        by_chance = max(0.0, part.num_samples / shards - 1) / max(1, part.num_samples - 1)
        near = 0.0
        if part.active_blocks and pool > 1:
            met = drawn.lanes * _met(drawn.taken * part.weight, part.active_blocks)
            near = min(1.0, met / (both * pool * (pool - 1) / 2))
        together = (part.block_size - 1 + by_chance) / part.block_size
        found += both * (inside * near * together + (pairs - inside * near) * by_chance)
        chance += both * pairs * by_chance
    return found / chance if chance > 0 else 1.0


def _met(taken: float, active: int) -> float:
    """Counts the pairs of one sub-slice among consecutive samples of a lane, in the mean."""
    if taken <= active:
        # Whole samples: now one more, now one fewer.
        few, part = divmod(taken, 1)
        cubes = (1 - part) * few * (few**2 - 1) + part * few * (few + 1) * (few + 2)
        return cubes / (6 * active**2)
    return (taken**2 - taken * active + active**2 / 3) / (2 * active)


def pairs_in_share(config: OrderConfig, *, world_size: int, num_shards: int) -> float:
    """Estimates the pairs of one shard in a rank's share of a step, relative to a global shuffle.

    Args:
      config: The order, at the batch size that it begins with.
      world_size: Ranks.
      num_shards: Shards of the dataset, of about equal size.

    Returns:
      1 is as many as by chance; what a global shuffle of the same samples has.

    >>> from loader.order.config import plan_order
    >>> config = plan_order(10**6, global_batch_size=512, seed=1, canonical_ranks=64)
    >>> round(pairs_in_share(config, world_size=64, num_shards=1000), 2)
    0.99
    """
    share = config.global_batch_size // world_size
    pairs, per_shard = share * (share - 1) / 2, config.num_samples / num_shards
    chance = (per_shard - 1) / max(1, config.num_samples - 1)
    if config.layout != "lanes" or not pairs or num_shards == 1 or chance <= 0:
        return 1.0
    turn = config.global_batch_size // config.canonical_ranks
    active, block = widened(config, config.global_batch_size)
    apart = max(0.0, per_shard - block) / (config.num_samples - block)
    unit = gcd(active, turn)
    met = sum(k * (turn - k) for k in range(unit, turn, unit)) / active * unit / active
    met *= config.canonical_ranks / world_size
    together = (block - 1 + apart) / block
    return (met * together + (pairs - met) * apart) / (pairs * chance)
