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

from math import gcd

from loader.order.config import OrderConfig, widened


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
