"""Pairs of one shard in a rank's share: the closed form against counting."""

import numpy as np
import pytest

from loader.order import (
    Drawn,
    MixtureGroup,
    MixtureOrder,
    MixtureSource,
    Order,
    PackSchedule,
    lane_reading,
    pairs_in_groups,
    pairs_in_share,
    plan_mixture,
    plan_order,
    plan_packing,
)
from loader.order.permutation import keyed_array
from loader.topology import Topology

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


def repeated(numbers):
    _, counts = np.unique(numbers, return_counts=True)
    return float((counts * (counts - 1) / 2).sum())


def lengths(dataset, sample):
    """Of every sample by its number, far from its neighbours'."""
    return 200 + keyed_array(7, sample).astype(np.int64) % 1000, np.zeros(len(sample), np.int64)


def mixed(batch, ranks):
    sources = [
        MixtureSource(name=name, num_samples=NUM, rate=rate, mean_tokens=1.0)
        for name, rate in (("a", 0.6), ("b", 0.4))
    ]
    group = MixtureGroup(sources=tuple(sources))
    return MixtureOrder(plan_mixture(group, global_batch_size=batch, seed=1, canonical_ranks=ranks))


@pytest.mark.parametrize(("batch", "ranks", "world_size"), [(64, 16, 16), (64, 8, 8), (64, 32, 8)])
def test_mixtures_are_estimated_near_to_what_counting_finds(batch, ranks, world_size):
    order, shards = mixed(batch, ranks), NUM // 100
    drawn = Drawn(
        samples=batch / world_size, groups=ranks / world_size, lanes=1, taken=batch / ranks
    )
    expected = pairs_in_groups(order.reading_at(0), drawn, num_shards=[shards, shards])
    slots = order.slots(np.arange(2000)[:, None], np.arange(batch))
    share = (len(slots.sample), world_size, -1)
    dataset, sample = slots.dataset.reshape(share), slots.sample.reshape(share)
    found = sum(
        repeated(dataset[step, rank] * NUM + sample[step, rank] // 100)
        for step in range(0, 2000, 2)
        for rank in (0, world_size - 1)
    )
    each = batch // world_size
    chance = 2000 * each * (each - 1) / 2 * (0.6**2 + 0.4**2) / shards
    assert expected > 1.3
    assert found / chance == pytest.approx(expected, rel=0.25)


@pytest.mark.parametrize(("batch", "ranks", "balance"), [(64, 16, False), (64, 16, True)])
def test_packs_are_estimated_near_to_what_counting_finds(batch, ranks, balance):
    order = Order(plan_order(NUM, global_batch_size=batch, seed=1, canonical_ranks=ranks))
    limits = plan_packing(order, sequence_length=4096, max_crops=None)
    packs = PackSchedule(order, lengths, limits, patches_per_crop=1, balance=balance)
    assert packs.num_streams == ranks
    found = chance = expected = 0.0
    steps = range(0, 80, 2)
    for step in steps:
        for rank in (0, ranks - 1):
            rows = packs.rows(step, Topology(rank=rank, world_size=ranks))
            samples = np.array([ref.sample for row in rows for ref in row])
            found += repeated(samples // 20)
            chance += len(samples) * (len(samples) - 1) / 2 * 20 / NUM
            drawn = packs.drawn(rows, world_size=ranks)
            reading = lane_reading(order.config, global_batch_size=batch)
            expected += pairs_in_groups([reading], drawn, num_shards=[NUM // 20])
    assert found / chance == pytest.approx(expected / (2 * len(steps)), rel=0.5)
    assert found / chance > 2
