"""Bytes of later epochs: what must hold of the replay whatever the dataset."""

import dataclasses
import time

import pytest

from loader.cli.cluster import Cluster, describe_plan, plan_cluster
from loader.cli.epochs import NUM_EPOCHS, fetched_bytes
from loader.reading import Network
from shardspec.manifest import View
from tests.loader.cli.test_cluster import manifest

SAMPLE = 100_000
COUNTS = [1_000] * 20
TOTAL = SAMPLE * sum(COUNTS)


def replay(found=None, **options):
    fixed = {"nodes": 2, "ranks": 2, "global_batch_size": 8, "locality": "any", "split": "train"}
    fixed["canonical_ranks"] = 8  # with larger blocks than the default has at this size
    fixed |= {"network": Network(block_bytes=16 * SAMPLE), "cache_bytes": 2 * TOTAL}
    return fetched_bytes(found or manifest(COUNTS), **{**fixed, **options})


@pytest.mark.parametrize("locality", ["any", "node"])
def test_one_node_with_room_for_all_fetches_everything_once(locality):
    found = replay(nodes=1, locality=locality)
    assert found.num_bytes == (TOTAL, 0, 0)
    assert found.replayed == 1.0


def test_epochs_shorter_than_a_step_are_those_of_the_first():
    found = replay(manifest([3, 2]), nodes=1, global_batch_size=64, canonical_ranks=64)
    assert found.num_bytes == (5 * SAMPLE, 0, 0)


def test_a_node_keeps_its_own_samples_only_where_the_order_lets_it():
    # A little less than what a node touches of whole blocks.
    by_locality = {
        name: replay(locality=name, cache_bytes=TOTAL).num_bytes for name in ("any", "node")
    }
    for first, *_ in by_locality.values():
        assert TOTAL / 2 <= first < TOTAL
    assert by_locality["node"][1:] == (0, 0)
    assert by_locality["any"][1] > TOTAL / 20


@pytest.mark.parametrize("locality", ["any", "node"])
def test_a_larger_cache_never_fetches_much_more(locality):
    caches = [TOTAL * n // 10 for n in (1, 6, 20)]
    totals = [sum(replay(locality=locality, cache_bytes=c).num_bytes) for c in caches]
    for small, large in zip(totals[:-1], totals[1:], strict=True):
        assert large <= small * 1.02


def test_blocks_of_many_nodes_are_fetched_by_each_of_them():
    small = replay(nodes=8, ranks=1, network=Network(block_bytes=8 * SAMPLE))
    large = replay(nodes=8, ranks=1, network=Network(block_bytes=160 * SAMPLE))
    assert large.num_bytes[0] > 2 * small.num_bytes[0] > TOTAL / 4


def test_a_view_costs_what_its_files_do():
    plain = manifest(COUNTS)
    parts = {shard.url: ((i, 0, shard.nsamples),) for i, shard in enumerate(plain.shards)}
    files = tuple(shard.file for shard in plain.shards)
    view = dataclasses.replace(plain, view=View(files=files, parts=parts))
    assert replay(view).num_bytes == replay(plain).num_bytes


def test_a_part_is_replayed_of_large_datasets_and_the_plan_says_so(monkeypatch):
    monkeypatch.setattr("loader.cli.epochs._MOST_SLOTS", 60_000)
    monkeypatch.setattr("loader.cli.epochs._MOST_USES", 30_000)
    # The same proportions at ten times the size: the figures grow by ten.
    small, large = (
        replay(
            manifest([1_000] * n),
            nodes=4,
            ranks=1,
            cache_bytes=int(0.4 * n * 1_000 * SAMPLE),
            locality="node",
        )
        for n in (40, 400)
    )
    assert large.replayed < small.replayed / 5
    for a, b in zip(small.num_bytes, large.num_bytes, strict=True):
        assert b / 10 == pytest.approx(a, rel=0.2, abs=0.03 * 40_000 * SAMPLE)


@pytest.mark.slow
def test_a_billion_samples_take_seconds():
    began_s = time.process_time()
    plan = plan_cluster(
        manifest([100_000] * 10_000),
        split="train",
        cluster=Cluster(nodes=64, ranks=8, workers=4),
        global_batch_size=4096,
        cache_bytes=10**12,
    )
    assert time.process_time() - began_s < 60  # 7 s on one core of a cloud machine
    assert len(plan.fetched) == 2
    assert all(len(each.num_bytes) == NUM_EPOCHS for each in plan.fetched)
    text = describe_plan(plan)
    assert "(estimated from 0.3% of the data)" in text
    assert "blocks of a store         786.4 kB, the order reads" in text


@pytest.mark.parametrize(
    "num_shards, nodes, block_bytes, names_another",
    [
        (400, 8, 2**22, True),
        (400, 8, None, False),
        (400, 1, 2**22, False),  # nobody else reads its blocks
        (400, 8, 2**20, False),
        (2, 8, 2**22, False),  # a share of a few blocks
    ],
)
def test_other_blocks_are_named_where_they_would_fetch_less(
    num_shards, nodes, block_bytes, names_another, monkeypatch
):
    monkeypatch.setattr("loader.cli.cluster._MOST_SLOTS", 20_000)
    plan = plan_cluster(
        manifest([10_000] * num_shards),
        split="train",
        cluster=Cluster(nodes=nodes, ranks=8, workers=4),
        global_batch_size=512,
        block_bytes=block_bytes,
    )
    assert ("without block_bytes they have 786.4 kB" in plan.blocks) == names_another
