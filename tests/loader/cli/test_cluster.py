import numpy as np
import pytest

from loader.__main__ import main
from loader.cli.cluster import Cluster, describe_plan, plan_cluster
from loader.order.config import plan_order
from loader.order.order import Order
from shardspec.errors import ConfigError
from shardspec.keyed import dataset_seed
from shardspec.manifest import Manifest, ShardEntry, SplitEntry, TokenizerEntry

TOKENIZER = TokenizerEntry(
    name="n",
    sha256="",
    probe_sha256="",
    vocab_size=1,
    embedding_size=1,
    special_ids={"bos": 0, "eos": 0, "pad": 0},
    special_tokens={"bos": "a", "eos": "a", "pad": "a"},
)


def manifest(counts, *, sample_bytes=100_000):
    """A manifest of shards with so many samples, and nothing behind it."""
    shards = tuple(
        ShardEntry(
            url=f"train/{i:05d}.tar",
            split="train",
            nsamples=count,
            num_bytes=count * sample_bytes,
            sha256="",
            index_bytes=1,
            index_sha256="",
            num_images=0,
            num_tokens=0,
            num_loss_tokens=0,
        )
        for i, count in enumerate(counts)
    )
    total = sum(counts)
    entry = SplitEntry(
        build_key="",
        source={},
        num_samples=total,
        num_images=0,
        num_tokens=0,
        num_loss_tokens=0,
        num_bytes=total * sample_bytes,
        quarantined={},
    )
    return Manifest(
        dataset="synthetic",
        recipe={},
        tokenizer=TOKENIZER,
        libraries={},
        splits={"train": entry},
        shards=shards,
    )


def plan(counts, *, nodes=4, ranks=2, workers=2, batch=16, **options):
    return plan_cluster(
        manifest(counts),
        split="train",
        cluster=Cluster(nodes=nodes, ranks=ranks, workers=workers),
        global_batch_size=batch,
        **options,
    )


def test_plan_counts_what_nodes_touch_as_a_count_by_hand_does():
    counts = [700, 300, 512, 1000, 640, 1100]
    found = plan(counts)
    config = plan_order(sum(counts), global_batch_size=16, seed=dataset_seed(0, "synthetic"))
    assert (found.layout, found.block_size) == ("lanes", config.block_size)
    steps = np.arange(config.steps_per_epoch)[:, None]
    borders = np.cumsum([0, *counts])
    shards, cold, open_at_once = [], [], []
    for node in range(4):
        sample = Order(config).slots(steps, np.arange(4 * node, 4 * node + 4)).sample
        shard = np.searchsorted(borders, sample, side="right") - 1
        shards.append(len(set(shard.ravel().tolist())))
        cold.append(sum(counts[s] for s in set(shard[0].tolist())) * 100_000)
        uses = {s: np.flatnonzero((shard == s).any(axis=1)) for s in set(shard.ravel().tolist())}
        open_at_once.append(
            max(
                sum(counts[s] for s, at in uses.items() if at[0] <= step <= at[-1])
                for step in range(len(shard))
            )
        )
    assert found.simulated_steps == found.steps_per_epoch == config.steps_per_epoch
    assert found.node_shards == max(shards)
    assert found.cold_start_shard_bytes == max(cold)
    assert found.shard_cache_bytes == max(open_at_once) * 100_000
    assert found.node_bytes_per_epoch == sum(counts) * 100_000 // 4


def test_blocks_keep_reads_and_caches_small_where_whole_shards_would_not():
    found = plan([1000] * 200, nodes=16, ranks=4, batch=512)
    assert found.read_amplification < 1.5
    assert found.cache_bytes < found.shard_cache_bytes / 5
    assert found.cold_start_bytes < found.cold_start_shard_bytes / 5


def test_tails_are_the_orders_own():
    found = plan([1000] * 10, batch=48, nodes=3)
    for tail, name in (("drop_last", "dropped_samples"), ("pad", "padded_slots")):
        config = plan_order(10_000, global_batch_size=48, seed=0, tail=tail)
        assert getattr(found, name) == Order(config).describe()[name]
    assert plan([3], batch=48, nodes=3).dropped_samples == 3


def test_large_epochs_are_simulated_in_part_and_say_so(monkeypatch):
    monkeypatch.setattr("loader.cli.cluster._MOST_SLOTS", 1600)
    found = plan([1000] * 20)
    assert found.simulated_steps == 100 < found.steps_per_epoch
    assert "the first 8.0% of an epoch" in describe_plan(found)


@pytest.mark.parametrize(
    "counts, bytes_per_sample, advice",
    [
        ([100] * 400, 10_000, "would help: shards of 1.0 MB are small"),
        ([30] * 2000, 3_000_000, "would help: 30 samples per shard are few"),
        ([20_000] * 2, 1_000_000, "would help: shards of 20.0 GB are large"),
        ([20_000] * 2, 10_000, "would help: 2 shards for 4 nodes"),
        ([4000] * 10, 100_000, "would not help"),
    ],
)
def test_resharding_is_judged_by_the_size_of_shards(counts, bytes_per_sample, advice):
    found = plan_cluster(
        manifest(counts, sample_bytes=bytes_per_sample),
        split="train",
        cluster=Cluster(nodes=4, ranks=1, workers=1),
        global_batch_size=16,
    )
    assert found.resharding.startswith(advice)


def test_ranks_and_workers_that_share_lanes_are_told_how_to_own_them():
    assert plan([1000] * 40).lanes == "every worker owns whole lanes"
    narrow = plan([1000] * 40, nodes=8, canonical_ranks=4)
    assert narrow.lanes == "16 ranks share 4; canonical_ranks=16 gives each its own"
    assert "3 workers share 8" in plan([1000] * 40, workers=3).lanes


def test_batch_that_the_cluster_cannot_share_is_refused():
    with pytest.raises(ConfigError) as caught:
        plan([1000] * 10, nodes=3)
    assert caught.value.reason == "batch_not_divisible"


def test_command_prints_the_plan_of_a_cluster_from_the_manifest_alone(tmp_path, capsys):
    (tmp_path / "manifest.json").write_bytes(manifest([1000] * 100).encode())
    args = ["--nodes", "64", "--ranks", "8", "--workers", "4", "--global-batch", "4096"]
    assert main(["plan", str(tmp_path), *args]) == 0
    out = capsys.readouterr().out
    names = [line.split("  ")[0] for line in out.splitlines()]
    assert names == [
        "samples, shards, bytes",
        "order",
        "steps per epoch",
        "bytes per node per epoch",
        "simulated",
        "distinct shards per node",
        "distinct blocks per node",
        "cache per node",
        "cold start per node",
        "tail",
        'fetched, locality "any"',
        'fetched, locality "node"',
        "blocks of a store",
        "lanes",
        "resharding",
    ]
    assert "156.2 MB" in out
