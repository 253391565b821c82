"""Pairs of one shard in a rank's share: the closed form against counting."""

import numpy as np
import pytest

from loader.order.config import plan_order
from loader.order.order import Order
from loader.order.quality import pairs_in_share

NUM, PER_SHARD = 200_000, 1000


def counted(config, *, world_size):
    """Pairs of one shard in the shares of ranks, relative to a global shuffle."""
    batch = config.global_batch_size
    share = batch // world_size
    slots = Order(config).slots(np.arange(NUM // batch)[:, None], np.arange(batch))
    shards = np.sort(slots.sample.reshape(-1, share) // PER_SHARD, axis=1)
    pairs = sum(int((np.diff(shards[:, [a, b]], axis=1) == 0).sum()) for a, b in pairs_of(share))
    chance = (PER_SHARD - 1) / (NUM - 1)
    return pairs / (len(shards) * share * (share - 1) / 2 * chance)


def pairs_of(size):
    return [(a, b) for a in range(size) for b in range(a)]


@pytest.mark.parametrize(
    ("ranks", "options", "world_size"),
    [
        (32, {}, 32),
        (32, {"active_blocks": 9}, 32),
        (32, {"active_blocks": 12}, 32),
        (32, {"active_blocks": 12}, 8),
        (32, {"active_blocks": 12, "block_size": 1}, 32),
        (32, {"active_blocks": 8}, 32),
        (16, {"active_blocks": 40, "block_size": 4}, 16),
    ],
)
def test_the_closed_form_is_what_counting_finds(ranks, options, world_size):
    config = plan_order(NUM, global_batch_size=256, seed=3, canonical_ranks=ranks, **options)
    expected = pairs_in_share(config, world_size=world_size, num_shards=NUM // PER_SHARD)
    assert counted(config, world_size=world_size) == pytest.approx(expected, rel=0.1, abs=0.05)


@pytest.mark.parametrize("batch", [64, 256, 384, 4096, 16_384])
def test_defaults_never_clump(batch):
    for ranks in (None, 1, 4, 32, 64):
        config = plan_order(10**8, global_batch_size=batch, seed=3, canonical_ranks=ranks)
        for world_size in (1, 4, 32):
            assert pairs_in_share(config, world_size=world_size, num_shards=10**4) <= 1.0


def test_what_has_no_pairs_or_no_lanes_is_as_a_global_shuffle():
    for batch, num, shards in ((4, 10**6, 1000), (64, 100, 5), (64, 10**6, 1), (64, 10**6, 10**6)):
        config = plan_order(num, global_batch_size=batch, seed=3, canonical_ranks=4)
        assert pairs_in_share(config, world_size=4, num_shards=shards) <= 1.0
