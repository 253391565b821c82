"""Measures the order: its cost at full size, and the quality of its shuffle beside simple peers.

    python benchmarks/order.py

Cost is measured for 1e10 samples in 1e6 shards on 16,384 ranks, in a fresh interpreter. Quality is
measured on 1,024 shards of 1,000 samples, 8 nodes of 8 ranks with 4 workers, 8 samples per rank:

* pairs: pairs of samples from one shard in a batch, relative to a global shuffle (1 is ideal);
* met again: pairs of one batch that share a batch of the next epoch too, relative to chance.

Over batch and width, on 10,240 shards of 1,000 samples (peers: 1,024 shards):

* autocorrelation: of the numbers of samples of each of ten classes in a batch, where the data are
  sorted by class, at the lag up to 128 steps where it is highest;
* inflation: how much larger the variance of these numbers is over 128 steps than in a global
  shuffle; what a block of one class leaves in the batches that it is spread over.

The peers are written here from their documented behaviour: webdataset's split of shuffled shards
over workers with a shuffle buffer of 1000; the same with four shards read side by side, as Hugging
Face datasets does; whole shards in random order, shuffled inside (litData); MosaicML's py1e, which
moves every sample by up to half a block of 32,768 within its node's sequence of shards.

Resuming is measured at 90 % of an epoch of 1e8 samples. Clumping of
mixtures and packs in a rank's share is counted, and estimated as the loader's warning does, on a
million samples in 1,000 shards. The share of short samples is what packs of a mixture hold of them
from the start of the run. ORDER.md holds the numbers.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from loader.order.config import plan_order
from loader.order.mixture import MixtureOrder
from loader.order.mixture_config import plan_mixture
from loader.order.order import Order
from loader.order.packing import PackConfig, balance_ranks, plan_run
from loader.order.permutation import _by_feistel, keyed_array, permute
from loader.order.quality import Drawn, lane_reading, pairs_in_groups
from loader.order.schedule import PackSchedule, SlotSchedule, plan_packing
from loader.order.slots import rank_positions
from loader.order.weights import MixtureGroup, MixtureSource
from loader.topology import Topology

SHARDS, PER_SHARD = 1024, 1000
SAMPLES = SHARDS * PER_SHARD
RANKS, WORKERS, PER_RANK = 64, 4, 8
BATCH = RANKS * PER_RANK


def main() -> None:
    print(f"{platform.machine()}, Python {platform.python_version()}, NumPy {np.__version__}\n")
    cost_at_full_size()
    cost_of_permutations()
    resuming()
    shuffle_quality()
    width_and_batch()
    locality()
    mixture_and_packing()
    mixture_deviations()
    packed_shares()
    clumping()


def cost_at_full_size() -> None:
    run = subprocess.run(
        [sys.executable, __file__, "--full-size"], check=True, capture_output=True, text=True
    )
    print("1e10 samples, 1e6 shards, 16,384 ranks")
    for name, value in json.loads(run.stdout).items():
        print(f"  {name:<44}{value:>10.2f}")
    print()


def full_size() -> None:
    """Prints the cost as JSON; runs alone in its process, so that memory can be told."""
    start_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    # What a loader needs to turn a sample id into (shard, offset): 8 bytes per shard.
    borders = np.arange(10**6 + 1, dtype=np.int64) * 10**4
    order = Order(plan_order(10**10, global_batch_size=131_072, seed=1, canonical_ranks=16_384))
    positions = rank_positions(9_999, 16_384, 131_072)
    samples = order.slots(1_000_000, positions).sample
    np.searchsorted(borders, samples, side="right")
    first_ms = (time.perf_counter() - begin) * 1e3
    begin = time.perf_counter()
    for step in range(100):
        order.slots(step, positions)
    batch_ms = (time.perf_counter() - begin) * 10
    steps = np.arange(1024)[:, None]
    begin = time.perf_counter()
    order.slots(steps, positions)
    ahead_us = (time.perf_counter() - begin) * 1e6 / (1024 * len(positions))
    end_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {
        "first batch of a rank after load, ms": first_ms,
        "next batch of a rank, ms": batch_ms,
        "1,024 steps ahead, us per sample": ahead_us,
        "peak memory over the interpreter, MB": (end_kb - start_kb) / 1024,
        "state, bytes": len(json.dumps(order.config.to_dict())),
    }
    print(json.dumps(result))


def cost_of_permutations() -> None:
    print("permutations       us per index   bias   bias of the Feistel network alone")
    for size in (5, 17, 64, 256, 4096, 4097, 10**6, 10**10):
        index = (keyed_array(5, np.arange(500_000)) % np.uint64(size)).astype(np.int64)
        begin = time.perf_counter()
        permute(index, size=size, key=1)
        cost = (time.perf_counter() - begin) * 2
        print(
            f"  n = {size:<14,}{cost:>11.3f}{bias(size, permute):>7.2f}{bias(size, feistel):>12.2f}"
        )
    print()


def bias(size: int, method: Callable[..., np.ndarray]) -> float:
    """Chi-square / df of the distance of the images of 0 and n-1 over 40,000 keys; 1 is none."""
    keys = keyed_array(3, np.arange(40_000))
    apart = method(size - 1, size=size, key=keys) - method(0, size=size, key=keys)
    apart = apart % size - 1  # 0 to n-2, each equally likely
    bins = min(64, size - 1)
    seen = np.bincount(apart * bins // (size - 1), minlength=bins)
    edges = -(-np.arange(bins + 1) * (size - 1) // bins)
    expected = len(keys) * np.diff(edges) / (size - 1)
    return float(((seen - expected) ** 2 / expected).sum()) / (bins - 1)


def feistel(index: int, *, size: int, key: np.ndarray) -> np.ndarray:
    return _by_feistel(np.full(len(key), index), np.full(len(key), size), key)


def resuming() -> None:
    size, batch = 10**8, 4096
    tokens, crops = captions(10**6)

    def lengths(_: np.ndarray, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return tokens[sample % len(tokens)], crops[sample % len(crops)]

    def unpacked(step: int) -> None:
        order = Order(plan_order(size, global_batch_size=batch, seed=1))
        SlotSchedule(order).rows(step, Topology(rank=3, world_size=64))

    def packed(step: int) -> PackSchedule:
        order = Order(plan_order(size, global_batch_size=512, seed=1))
        config = plan_packing(order, sequence_length=4096, max_crops=48)
        schedule = PackSchedule(order, lengths, config, patches_per_crop=576, balance=False)
        if step:
            # The places that a state saves: the run that holds the step's first pack.
            share = 512 // schedule.num_streams
            run = step * share * 6 // config.run
            schedule.go_to([[u, run, step * share] for u in range(schedule.num_streams)])
        schedule.rows(step, Topology(rank=3, world_size=64))
        return schedule

    print("resuming at 90 % of an epoch of 1e8 samples, ms to the first rows of a rank of 64")
    for name, start, late in (
        ("batches of 4,096", unpacked, size // batch * 9 // 10),
        ("packs of 4,096 tokens, saved places", packed, 30_000),
    ):
        times = {step: [] for step in (0, late)}
        for _ in range(15):
            for step, found in times.items():
                begin = time.perf_counter()
                start(step)
                found.append((time.perf_counter() - begin) * 1e3)
        zero, later = (min(times[step]) for step in (0, late))
        print(f"  {name:<38}{zero:>8.1f} at 0{later:>8.1f} at 90 %   ratio {later / zero:.2f}")
    order = Order(plan_order(size, global_batch_size=8, seed=1, canonical_ranks=8))
    config = plan_packing(order, sequence_length=4096, max_crops=48)
    schedule = PackSchedule(order, lengths, config, patches_per_crop=576, balance=False)
    begin = time.perf_counter()
    schedule.rows(160_000, Topology(rank=0, world_size=8))  # packs of six samples
    spent = time.perf_counter() - begin
    planned = schedule.places(160_001)[0][1] * config.run / 1e6
    print(f"  without saved places, s per million samples of a stream{spent / planned:>8.2f}\n")


def captions(count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.RandomState(0)
    tokens = np.clip(rng.lognormal(np.log(650), 0.35, count), 300, 1400).astype(np.int64)
    return tokens, np.clip(tokens // 170, 1, 8)


def mixture_deviations() -> None:
    print("\nmixture of 40 datasets by the root of their sizes (2,000 to 55 million samples)")
    print("  counts per global batch: standard deviation, relative to independent draws")
    sources = [MixtureSource(name=f"d{i}", num_samples=int(2000 * 1.3**i)) for i in range(40)]
    group = MixtureGroup(sources=tuple(sources), by="root_size")
    for batch, steps in ((256, 2000), (512, 2000), (4096, 500), (16_384, 125)):
        order = MixtureOrder(plan_mixture(group, global_batch_size=batch, seed=1))
        share = np.array([row["weight"] for row in order.describe()])
        found = order.slots(np.arange(steps)[:, None], np.arange(batch)).dataset
        counts = np.stack([np.bincount(row, minlength=40) for row in found])
        relative = counts.std(axis=0) / np.sqrt(batch * share * (1 - share))
        drawn = np.random.RandomState(0).choice(40, size=found.size, p=share)
        print(
            f"  batch {batch:<7}median {np.median(relative):.2f}, most {relative.max():.2f};"
            f" farthest from the proportion: {farthest(found.ravel(), share):.1f} samples,"
            f" drawn: {farthest(drawn, share):.0f}"
        )
    print("mixtures made to drift, batch 256: farthest from the proportion, in samples")
    for name, rates in {
        "a quarter, 1,000 small, one slot": [0.25, *[0.75e-3] * 1000, 1e-9],
        "halves of halves": [2.0**-i for i in range(30)],
        "all but a thousandth, ten small": [0.999, *[1e-4] * 10],
    }.items():
        sources = [
            MixtureSource(name=f"d{i}", num_samples=10**6, rate=rate)
            for i, rate in enumerate(rates)
        ]
        order = MixtureOrder(plan_mixture(sources, global_batch_size=256, seed=1))
        share = np.array([row["weight"] for row in order.describe()])
        found = order.slots(np.arange(1100)[:, None], np.arange(256)).dataset.ravel()
        later = order.slots(10**6 + np.arange(1100)[:, None], np.arange(256)).dataset.ravel()
        ahead = order.counts(10**6) - share * 256e6
        print(
            f"  {name:<36}{farthest(found, share):.1f}"
            f", after 1e6 steps {farthest(later, share, ahead=ahead):.1f}"
        )
    print("a rank's own windows, batch 256: deviations of counts, relative to independent draws")
    for name, rates in {
        "roots of 40 sizes": [1.3 ** (i / 2) for i in range(40)],
        "3 : 2": [3, 2],
        "99 : 1": [99, 1],
    }.items():
        sources = [
            MixtureSource(name=f"d{i}", num_samples=10**7, rate=rate)
            for i, rate in enumerate(rates)
        ]
        order = MixtureOrder(plan_mixture(sources, global_batch_size=256, seed=1))
        share = np.array([row["weight"] for row in order.describe()])
        found = order.slots(np.arange(2048)[:, None], np.arange(256)).dataset
        for ranks in (8, 128):
            row = [f"{of_windows(found, share, ranks, steps):.2f}" for steps in (1, 16, 256, 1024)]
            print(f"  {name:<18}{ranks:>4} ranks, 1, 16, 256, 1,024 steps: {'  '.join(row)}")


def of_windows(dataset: np.ndarray, share: np.ndarray, ranks: int, steps: int) -> float:
    """Median over the datasets of how a rank's counts in windows deviate, relative to draws."""
    windows = dataset.reshape(-1, steps, ranks, dataset.shape[1] // ranks).transpose(0, 2, 1, 3)
    rows = windows.reshape(-1, windows.shape[2] * windows.shape[3])
    counts = np.stack([(rows == d).sum(axis=1) for d in range(len(share))], axis=1)
    expected = rows.shape[1] * share
    deviation = np.sqrt(((counts - expected) ** 2).mean(axis=0))
    return float(np.median(deviation / np.sqrt(expected * (1 - share))))


def farthest(dataset: np.ndarray, share: np.ndarray, *, ahead: np.ndarray | None = None) -> float:
    """The farthest that any prefix is from the proportion, in samples of any dataset."""
    taken = np.arange(1, len(dataset) + 1)
    before = np.zeros(len(share)) if ahead is None else ahead
    return max(
        float(np.abs(before[d] + np.cumsum(dataset == d) - part * taken).max())
        for d, part in enumerate(share)
    )


def shuffle_quality() -> None:
    print("shuffle quality             pairs in rank batch   in global batch   met again")
    rows = {
        "global shuffle": lambda epoch: global_shuffle(epoch),
        "lanes (plan_order)": lambda epoch: lanes(epoch, canonical_ranks=None),
        "lanes, 64 ranks, block 16": lambda epoch: lanes(epoch, canonical_ranks=64, block_size=16),
        "shard split + buffer 1000": shard_split_with_buffer,
        "the same, 4 shards at once": lambda epoch: shard_split_with_buffer(epoch, side_by_side=4),
        "whole shards": whole_shards,
        "py1e, block 32,768": py1e,
    }
    for name, make in rows.items():
        epochs = [make(epoch) for epoch in (0, 1)]
        shards = np.concatenate(epochs) // PER_SHARD
        by_rank = same_shard_pairs(shards.reshape(-1, PER_RANK))
        print(
            f"  {name:<26}{by_rank:>18.2f}{same_shard_pairs(shards):>18.2f}"
            f"{met_again(*epochs):>12.2f}"
        )
    print()


def same_shard_pairs(shards: np.ndarray) -> float:
    size = shards.shape[1]
    pairs = sum(int((n * (n - 1) // 2).sum()) for n in map(np.bincount, shards))
    return pairs / (len(shards) * size * (size - 1) / 2 * (PER_SHARD - 1) / (SAMPLES - 1))


def width_and_batch() -> None:
    head = f"{'batch':>8}{'ranks':>7}{'A':>7}{'c':>4}"
    print(f"order by batch and canonical ranks\n{head}   {_QUALITY}")
    size = 10 * SAMPLES
    for batch in (64, 512, 4096, 16_384):
        for width in (1, 8, 64, 1024):
            if width > batch:
                continue
            config = plan_order(size, global_batch_size=batch, seed=8, canonical_ranks=width)
            # Of small batches more steps: pairs are rare there.
            steps = np.arange(max(256, min(30_000, 2 * 10**6 // batch)))[:, None]
            samples = Order(config).slots(steps, np.arange(batch)).sample
            row = f"{batch:>8}{width:>7}{config.active_blocks:>7}{config.block_size:>4}"
            print(f"{row}   {quality(samples, size)}")
    print(f"peers by batch, 64 ranks\n{'':<26}{'batch':>8}   {_QUALITY}")
    peers = {
        "global shuffle": global_shuffle,
        "shard split + buffer 1000": shard_split_with_buffer,
        "whole shards": whole_shards,
        "py1e, block 32,768": py1e,
    }
    for name, make in peers.items():
        samples = make(0).ravel()
        for batch in (64, 512, 4096):
            # The same run in other steps: each rank's share of some steps is one share, or part.
            rows = regrouped(samples, batch)
            print(f"  {name:<24}{batch:>8}   {quality(rows, SAMPLES)}")
    print()


_QUALITY = "pairs in rank's share   in batch   autocorrelation at lag   inflation"


def regrouped(samples: np.ndarray, batch: int) -> np.ndarray:
    """Batches of another size, of ranks that read what they read: [steps, batch]."""
    by_rank = samples.reshape(-1, RANKS, PER_RANK).transpose(1, 0, 2).reshape(RANKS, -1)
    share = batch // RANKS
    steps = by_rank.shape[1] // share
    parts = by_rank[:, : steps * share].reshape(RANKS, steps, share)
    return parts.transpose(1, 0, 2).reshape(steps, batch)


def quality(samples: np.ndarray, size: int) -> str:
    steps, batch = samples.shape
    share = batch // RANKS
    in_batch = pairs_of(samples // PER_SHARD, size)
    of_rank = pairs_of(samples.reshape(-1, share) // PER_SHARD, size) if share > 1 else np.nan
    labels = samples * 10 // size
    counts = np.stack([np.bincount(row, minlength=10) for row in labels]) - batch / 10
    variance = (counts**2).mean()
    lags = range(1, min(128, steps // 2))
    correlation = [(counts[:-lag] * counts[lag:]).mean() / variance for lag in lags]
    highest = int(np.argmax(correlation))
    windows = counts[: steps // 128 * 128].reshape(-1, 128, 10).sum(axis=1)
    drawn = 128 * batch * 0.09 * (1 - 128 * batch / size)
    return (
        f"{of_rank:>21.2f}{in_batch:>11.2f}"
        f"{correlation[highest]:>18.2f} at {lags[highest]:<3}{(windows**2).mean() / drawn:>12.1f}"
    )


def pairs_of(shards: np.ndarray, size: int) -> float:
    """Pairs of one shard in the rows, relative to a global shuffle."""
    ordered = np.sort(shards, axis=1)
    new = np.ones(ordered.shape, np.bool_)
    new[:, 1:] = np.diff(ordered, axis=1) != 0
    lengths = np.diff(np.flatnonzero(new.ravel()), append=ordered.size)
    chance = (PER_SHARD - 1) / (size - 1) * shards.shape[1] * (shards.shape[1] - 1) / 2
    return float((lengths * (lengths - 1) // 2).sum() / (len(shards) * chance))


def locality() -> None:
    print("locality: what a node of 8 reads again of its first epoch, and how well it shuffles")
    size = 10 * SAMPLES
    for kind in ("any", "node"):
        config = plan_order(size, global_batch_size=BATCH, seed=8, locality=kind)
        order = Order(config)
        steps = np.arange(2 * config.steps_per_epoch)
        own = order.slots(steps[:, None], rank_positions(3, 8, BATCH))
        first, second = own.sample[own.epoch == 0], own.sample[own.epoch == 1]
        again = np.isin(second, first).mean()
        whole = [
            order.slots(steps[:2000, None] + s, np.arange(BATCH)) for s in (0, len(steps) // 2)
        ]
        print(f"  {kind:<6}{again:>7.1%}   {quality(whole[1].sample, size)}")
    print()


def met_again(first: np.ndarray, second: np.ndarray) -> float:
    batch_of = np.full((2, SAMPLES), -1, np.int64)
    for epoch, batches in enumerate((first, second)):
        batch_of[epoch, batches.ravel()] = np.repeat(np.arange(len(batches)), BATCH)
    batch_of = batch_of[:, (batch_of >= 0).all(axis=0)]
    together = np.unique(batch_of[0] * len(second) + batch_of[1], return_counts=True)[1]
    seen = batch_of.shape[1]
    chance = seen * (seen - 1) / 2 / (len(first) * len(second))
    return float((together * (together - 1) // 2).sum() / chance)


def global_shuffle(epoch: int) -> np.ndarray:
    order = np.random.RandomState(epoch).permutation(SAMPLES)
    return order[: SAMPLES // BATCH * BATCH].reshape(-1, BATCH)


def lanes(epoch: int, *, canonical_ranks: int | None, block_size: int | None = None) -> np.ndarray:
    config = plan_order(
        SAMPLES,
        global_batch_size=BATCH,
        seed=7,
        tail="drop_last",
        canonical_ranks=canonical_ranks,
        block_size=block_size,
    )
    order = Order(config)
    steps = np.arange(config.steps_per_epoch) + order.epoch_start(epoch)
    return order.slots(steps[:, None], np.arange(BATCH)).sample


def py1e(epoch: int, *, nodes: int = 8, block: int = 32_768) -> np.ndarray:
    rng = np.random.RandomState(epoch)
    shards = rng.permutation(SHARDS).reshape(nodes, -1)
    streams = []
    for own in shards:
        stream = (own[:, None] * PER_SHARD + np.arange(PER_SHARD)).ravel()
        moved = np.arange(len(stream)) + rng.uniform(-block / 2, block / 2, len(stream))
        streams.append(stream[np.argsort(moved, kind="stable")])
    # A node's ranks take turns in its stream, batch after batch.
    per_node = np.stack(streams)[:, : SAMPLES // nodes // (BATCH // nodes) * (BATCH // nodes)]
    return per_node.reshape(nodes, -1, BATCH // nodes).transpose(1, 0, 2).reshape(-1, BATCH)


def shard_split_with_buffer(epoch: int, *, side_by_side: int = 1) -> np.ndarray:
    rng = np.random.RandomState(epoch)
    shards = rng.permutation(SHARDS).reshape(-1, RANKS * WORKERS)
    return from_workers(
        [_buffered(shards[:, w], rng, side_by_side=side_by_side) for w in range(RANKS * WORKERS)]
    )


def _buffered(
    shards: np.ndarray, rng: np.random.RandomState, size: int = 1000, *, side_by_side: int = 1
) -> np.ndarray:
    groups = (shards[:, None] * PER_SHARD + np.arange(PER_SHARD)).reshape(
        -1, side_by_side, PER_SHARD
    )
    stream = groups.transpose(0, 2, 1).ravel().tolist()
    buffer, out = stream[:size], []
    for sample, i in zip(stream[size:], rng.randint(0, size, len(stream) - size), strict=True):
        out.append(buffer[i])
        buffer[i] = sample
    return np.array(out + [buffer[i] for i in rng.permutation(size)])


def whole_shards(epoch: int) -> np.ndarray:
    rng = np.random.RandomState(epoch)
    shards = rng.permutation(SHARDS).reshape(-1, RANKS * WORKERS)
    inside = [
        np.concatenate([shard * PER_SHARD + rng.permutation(PER_SHARD) for shard in shards[:, w]])
        for w in range(RANKS * WORKERS)
    ]
    return from_workers(inside)


def from_workers(streams: list[np.ndarray]) -> np.ndarray:
    """Batches of all ranks; a rank's workers deliver in turn."""
    batches = np.stack(streams).reshape(RANKS, WORKERS, -1, PER_RANK)
    return batches.transpose(2, 1, 0, 3).reshape(-1, BATCH)


def mixture_and_packing() -> None:
    sources = [MixtureSource(name=f"d{i}", num_samples=int(2000 * 1.3**i)) for i in range(40)]
    print("mixture of 40 datasets")
    for batch in (256, 16_384):
        begin = time.perf_counter()
        order = MixtureOrder(plan_mixture(sources, global_batch_size=batch, seed=1))
        order.slots(0, 0)  # lays the pattern out
        build_ms = (time.perf_counter() - begin) * 1e3
        begin = time.perf_counter()
        slots = order.slots(np.arange(1024)[:, None], np.arange(32))
        ahead_us = (time.perf_counter() - begin) * 1e6 / slots.sample.size
        print(
            f"  batch {batch:<7}built in {build_ms:.0f} ms;"
            f" 1,024 steps ahead {ahead_us:.2f} us per sample"
        )
    print()

    rng = np.random.RandomState(0)
    tokens, crops = captions(65_536)
    print("packing captions with images (lognormal, median 650 tokens)")
    for length in (4096, 16_384):
        for window in (256, 1024):
            config = PackConfig(sequence_length=length, max_crops=length // 100, window=window)
            begin = time.perf_counter()
            packs = 0
            for start in range(0, len(tokens), config.run):
                part = slice(start, start + config.run)
                packs += len(plan_run(tokens[part], crops[part], config=config))
            cost = (time.perf_counter() - begin) * 1e6 / len(tokens)
            fill = tokens.sum() / (packs * length)
            print(f"  length {length:<7} window {window:<6} fill {fill:.4f}{cost:>8.2f} us/sample")
    cost_of = rng.lognormal(0, 0.5, 512)
    for name, costs in (("as they come", cost_of), ("balanced", None)):
        if costs is None:
            costs = cost_of[balance_ranks(cost_of, world_size=64)]
        by_rank = costs.reshape(64, -1).sum(axis=1)
        print(f"  dearest rank / mean, {name:<16}{by_rank.max() / by_rank.mean():>8.3f}")


def packed_shares() -> None:
    """The share of short samples in the packs of a mixture, from the start of the run."""
    rng, size, counted = np.random.RandomState(5), 50_000, (4, 16, 64, 256, 1000)
    tokens = np.exp(rng.normal(np.log([[1200], [60]]), 0.4, (2, size))).astype(np.int64)
    print("\nshare of short samples (60 tokens beside 1,200) in packs of 2,048 up to a step")
    print(f"  weight, packs of a step, canonical ranks; steps {', '.join(map(str, counted))}")
    for weight in (0.25, 0.3):
        for batch, ranks in ((8, 1), (8, 2), (8, 8), (64, 64)):
            found = np.zeros((len(counted), 2))
            for seed in range(8 if batch == 8 else 2):
                sources = tuple(
                    MixtureSource(name=name, num_samples=size, rate=rate)
                    for name, rate in (("long", 1 - weight), ("short", weight))
                )
                order = MixtureOrder(
                    plan_mixture(
                        MixtureGroup(sources=sources),
                        global_batch_size=batch,
                        seed=seed,
                        canonical_ranks=ranks,
                    )
                )
                packs = PackSchedule(
                    order,
                    lambda dataset, sample: (tokens[dataset, sample], 0 * sample),
                    plan_packing(order, sequence_length=2048, max_crops=None),
                    patches_per_crop=0,
                    balance=False,
                )
                drawn = np.zeros(2)
                for step in range(counted[-1]):
                    rows = packs.rows(step, Topology(rank=0, world_size=1))
                    drawn += np.bincount([ref.dataset for row in rows for ref in row], minlength=2)
                    if step + 1 in counted:
                        found[counted.index(step + 1)] += drawn
            shares = "".join(f"{short / (long + short):>8.3f}" for long, short in found)
            print(f"  {weight:<6}{batch:>4}{ranks:>4}  {shares}")


def clumping() -> None:
    """Pairs of one shard in a rank's share of a step, relative to a global shuffle."""
    size, shards = 10**6, 1000
    print("\npairs in a rank's share of mixtures (60 % and 40 %) and packs: counted, estimated")
    for batch, ranks, world_size in ((1024, 128, 128), (1024, 128, 32), (4096, 128, 8)):
        sources = [
            MixtureSource(name=name, num_samples=size, rate=rate)
            for name, rate in (("a", 0.6), ("b", 0.4))
        ]
        group = MixtureGroup(sources=tuple(sources))
        order = MixtureOrder(
            plan_mixture(group, global_batch_size=batch, seed=1, canonical_ranks=ranks)
        )
        drawn = Drawn(
            samples=batch / world_size, groups=ranks / world_size, lanes=1, taken=batch / ranks
        )
        expected = pairs_in_groups(order.reading_at(0), drawn, num_shards=[shards, shards])
        steps = np.arange(0, 20_000, 7 if batch == 1024 else 70)[:, None]
        slots = order.slots(steps, np.arange(batch // world_size))
        found = sum(map(_repeated, slots.dataset * size + slots.sample // (size // shards)))
        chance = sum(map(_repeated, slots.dataset)) / shards
        print(
            f"  mixture, batch {batch}, {ranks} canonical ranks on {world_size:<4}"
            f"{found / chance:>8.2f}{expected:>8.2f}"
        )
    tokens, crops = captions(size)
    for world_size, active in ((64, None), (64, 128), (8, None)):
        config = plan_order(
            size, global_batch_size=256, seed=1, canonical_ranks=64, active_blocks=active
        )
        one = Order(config)
        limits = plan_packing(one, sequence_length=4096, max_crops=None)
        packs = PackSchedule(
            one,
            lambda _, sample: (tokens[sample], crops[sample]),
            limits,
            patches_per_crop=576,
            balance=True,
        )
        found = chance = expected = 0.0
        for step in range(0, 300, 3):
            rows = packs.rows(step, Topology(rank=step % world_size, world_size=world_size))
            sample = np.array([ref.sample for row in rows for ref in row])
            found += _repeated(sample // (size // shards))
            chance += len(sample) * (len(sample) - 1) / 2 / shards
            expected += pairs_in_groups(
                [lane_reading(config, global_batch_size=256)],
                packs.drawn(rows, world_size=world_size),
                num_shards=[shards],
            )
        print(
            f"  packs, batch 256, 64 canonical ranks on {world_size:<4}{config.active_blocks:>5}"
            f" active blocks{found / chance:>8.2f}{expected / 100:>8.2f}"
        )


def _repeated(numbers: np.ndarray) -> float:
    _, counts = np.unique(numbers, return_counts=True)
    return float((counts * (counts - 1) / 2).sum())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--full-size", action="store_true", help="only the cost at full size")
    if parser.parse_args().full_size:
        full_size()
    else:
        main()
