"""plan_cluster: what a cluster of any size will read, from the manifest and the order.

Nothing is read but the manifest. The order is evaluated for the ranks of a few nodes, over an
epoch or its first steps, and what these nodes touch is counted: shards, and blocks (the ranges of
neighbouring samples that a lane reads together). Bytes are the dataset's mean per sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loader.cli.epochs import EpochBytes, fetched_bytes
from loader.order import Locality, Order, Slots, Tail, plan_order, rank_positions
from loader.reading import Network, blocks_of
from shardspec.keyed import dataset_seed
from shardspec.manifest import FileEntry, Manifest
from shardspec.messages import counted

_MOST_SLOTS = 2_000_000  # evaluated per plan: about two seconds
_MOST_NODES = 4
_LOCALITIES: tuple[Locality, ...] = ("any", "node")
_GOOD_SHARD_BYTES = (64 << 20, 4 << 30)
"""Smaller shards cost more requests and directory entries than they save; of larger ones a node
copies too much before it can begin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The machines of a run."""

    nodes: int
    ranks: int
    """Data-parallel ranks per node."""
    workers: int
    """Threads or worker processes per rank."""

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.nodes * self.ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPlan:
    """What the plan found; per node, the most of the nodes that were simulated."""

    num_samples: int
    num_shards: int
    num_bytes: int
    """Of the split."""
    world_size: int
    canonical_ranks: int
    layout: str
    block_size: int
    """Samples per block; 1 where the dataset is shuffled as a whole."""
    steps_per_epoch: int
    simulated_steps: int
    """Steps that were evaluated; below `steps_per_epoch` the counts below are of these steps."""
    node_samples: int
    """Samples that a node consumes in the simulated steps."""
    node_bytes: int
    """Bytes of these samples."""
    node_bytes_per_epoch: int
    node_shards: int
    """Distinct shards that a node touches in the simulated steps."""
    node_blocks: int
    """Distinct blocks that a node touches in the simulated steps."""
    read_amplification: float
    """Samples in the blocks that all the simulated nodes fetch, per sample they consume."""
    cache_bytes: int
    """Most bytes of blocks between first and last use on a node."""
    shard_cache_bytes: int
    """The same where whole shards are fetched."""
    cold_start_bytes: int
    """Bytes of the blocks that a node's first batch touches."""
    cold_start_shard_bytes: int
    """The same where whole shards are fetched."""
    dropped_samples: int
    """Left out of an epoch with tail "drop_last"."""
    padded_slots: int
    """Added to an epoch with tail "pad"; "wrap" drops and pads nothing."""
    fetched: tuple[EpochBytes, ...]
    """What a node fetches in each of the first epochs, by locality; () where none was asked for."""
    blocks: str
    """Whether other blocks would fetch less from a store, and why."""
    lanes: str
    """Whether ranks and workers own whole lanes, and so few shards."""
    resharding: str
    """Whether other shards would help, and why."""


def plan_cluster(
    manifest: Manifest,
    *,
    split: str,
    cluster: Cluster,
    global_batch_size: int,
    canonical_ranks: int | None = None,
    seed: int = 0,
    cache_bytes: int | None = None,
    block_bytes: int | None = None,
) -> ClusterPlan:
    """Simulates an epoch, and with a cache the first three of each locality.

    Args:
      manifest: Of the dataset.
      split: Split to plan.
      cluster: The machines.
      global_batch_size: Samples per step over all ranks; the ranks must divide it.
      canonical_ranks: As `plan_order`.
      seed: Of the run.
      cache_bytes: Bound of each node's cache of remote data; None: nothing is said of later epochs.
      block_bytes: As `Network`.

    Raises:
      ConfigError: `unknown_split`, `network`, `batch_not_divisible`, and as `plan_order`.
    """
    shards = manifest.select(split)
    entry = manifest.splits[split]
    borders = np.concatenate([[0], np.cumsum([shard.nsamples for shard in shards])])
    shard_bytes = np.array([shard.num_bytes for shard in shards], np.int64)
    mean_bytes = entry.num_bytes / entry.num_samples

    def order_of(tail: Tail) -> Order:
        config = plan_order(
            entry.num_samples,
            global_batch_size=global_batch_size,
            seed=dataset_seed(seed, manifest.dataset, split),
            tail=tail,
            canonical_ranks=canonical_ranks,
        )
        return Order(config)

    order = order_of("wrap")
    config = order.config
    rank_positions(0, cluster.world_size, global_batch_size)

    share = global_batch_size // cluster.nodes
    nodes = sorted({cluster.nodes * i // _MOST_NODES for i in range(_MOST_NODES)})
    steps = min(config.steps_per_epoch, max(1, _MOST_SLOTS // (share * len(nodes))))
    simulated = [
        _Node(order, node=node, share=share, steps=steps, borders=borders) for node in nodes
    ]
    network = Network(block_bytes=block_bytes)
    fetched_by = tuple(
        fetched_bytes(
            manifest,
            split=split,
            nodes=cluster.nodes,
            ranks=cluster.ranks,
            global_batch_size=global_batch_size,
            cache_bytes=cache_bytes,
            locality=locality,
            canonical_ranks=canonical_ranks,
            seed=seed,
            network=network,
        )
        for locality in _LOCALITIES
        if cache_bytes is not None
    )
    order_bytes = mean_bytes * config.block_size
    fetched = sum(len(node.blocks) for node in simulated) * config.block_size
    consumed = sum(node.samples for node in simulated)
    return ClusterPlan(
        num_samples=entry.num_samples,
        num_shards=len(shards),
        num_bytes=entry.num_bytes,
        world_size=cluster.world_size,
        canonical_ranks=config.canonical_ranks,
        layout=config.layout,
        block_size=config.block_size,
        steps_per_epoch=config.steps_per_epoch,
        simulated_steps=steps,
        node_samples=share * steps,
        node_bytes=round(share * steps * mean_bytes),
        node_bytes_per_epoch=round(entry.num_bytes / cluster.nodes),
        node_shards=max(len(node.shards) for node in simulated),
        node_blocks=max(len(node.blocks) for node in simulated),
        read_amplification=max(1.0, fetched / consumed),
        cache_bytes=round(max(node.open_blocks for node in simulated) * order_bytes),
        shard_cache_bytes=max(node.open_shard_bytes(shard_bytes) for node in simulated),
        cold_start_bytes=round(max(node.first_blocks for node in simulated) * order_bytes),
        cold_start_shard_bytes=max(int(shard_bytes[node.first_shards].sum()) for node in simulated),
        # Fewer samples than a batch: all of them are dropped, and no such order exists.
        dropped_samples=entry.num_samples
        if entry.num_samples < global_batch_size
        else int(order_of("drop_last").describe()["dropped_samples"]),
        padded_slots=int(order_of("pad").describe()["padded_slots"]),
        fetched=fetched_by,
        blocks=_block_advice(
            order,
            files=[segment.file for segment in manifest.segments(split)],
            mean_bytes=mean_bytes,
            network=network,
            nodes=cluster.nodes,
        ),
        lanes=_lane_advice(order, cluster),
        resharding=_advice(shard_bytes, entry.num_samples, order, cluster),
    )


def describe_plan(plan: ClusterPlan) -> str:
    """Formats a plan for people, one fact per line."""
    part = plan.simulated_steps / plan.steps_per_epoch
    scope = "an epoch" if part >= 1 else f"the first {part:.1%} of an epoch"
    rows = [
        (
            "samples, shards, bytes",
            f"{plan.num_samples:,}, {plan.num_shards:,}, {_size(plan.num_bytes)}",
        ),
        (
            "order",
            f"{plan.layout}, {counted(plan.canonical_ranks, 'canonical rank')}, "
            f"blocks of {plan.block_size}",
        ),
        ("steps per epoch", f"{plan.steps_per_epoch:,} on {counted(plan.world_size, 'rank')}"),
        ("bytes per node per epoch", _size(plan.node_bytes_per_epoch)),
        ("simulated", f"{scope}, {counted(plan.node_samples, 'sample')} per node"),
        ("distinct shards per node", f"{plan.node_shards:,} of {plan.num_shards:,}"),
        (
            "distinct blocks per node",
            f"{plan.node_blocks:,}, {plan.read_amplification:.3f} samples read per sample used",
        ),
        (
            "cache per node",
            f"{_size(plan.cache_bytes)} by blocks, {_size(plan.shard_cache_bytes)} by whole shards",
        ),
        (
            "cold start per node",
            f"{_size(plan.cold_start_bytes)} by blocks, "
            f"{_size(plan.cold_start_shard_bytes)} by whole shards",
        ),
        (
            "tail",
            f"wrap: none; drop_last: {counted(plan.dropped_samples, 'sample')} left out; "
            f"pad: {counted(plan.padded_slots, 'slot')} without weight",
        ),
        *[(f'fetched, locality "{each.locality}"', _epochs(each)) for each in plan.fetched],
        ("blocks of a store", plan.blocks),
        ("lanes", plan.lanes),
        ("resharding", plan.resharding),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _epochs(fetched: EpochBytes) -> str:
    """Describes the bytes of each epoch."""
    first, *later = map(_size, fetched.num_bytes)
    of = "" if fetched.replayed >= 1 else f" (estimated from {fetched.replayed:.1%} of the data)"
    return f"{first} per node in the first epoch, then {', '.join(later)}{of}"


class _Node:
    """What one node touches: distinct shards and blocks, and how many are open at once."""

    def __init__(
        self, order: Order, *, node: int, share: int, steps: int, borders: np.ndarray
    ) -> None:
        step = np.arange(steps)[:, None]
        slots = order.slots(step, np.arange(node * share, (node + 1) * share))
        shard_of = np.searchsorted(borders, slots.sample, side="right") - 1
        block_of = _epoch_blocks(order, slots)
        self.samples = slots.sample.size
        self.shards, self._shard_life = _lives(shard_of)
        self.blocks, life = _lives(block_of)
        self.open_blocks = _most_open(life, np.ones(len(self.blocks), np.int64))
        self.first_blocks = len(np.unique(block_of[0]))
        self.first_shards = np.unique(shard_of[0])

    def open_shard_bytes(self, shard_bytes: np.ndarray) -> int:
        """Counts the most bytes of whole shards between first and last use."""
        return _most_open(self._shard_life, shard_bytes[self.shards])


def _epoch_blocks(order: Order, slots: Slots) -> np.ndarray:
    """Numbers blocks through all epochs: int64, of the slots' shape."""
    if order.config.layout != "lanes":
        return slots.sample
    per_epoch = order.config.num_samples // order.config.block_size + 1
    numbers: np.ndarray = slots.epoch * per_epoch + order.blocks(slots)
    return numbers


def _lives(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds distinct numbers, and (first, last) step of each: int64 [n], int64 [2, n]."""
    steps = np.repeat(np.arange(len(numbers)), numbers.shape[1])
    distinct, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
    last = np.zeros(len(distinct), np.int64)
    np.maximum.at(last, inverse.ravel(), steps)
    return distinct, np.stack([steps[first], last])


def _most_open(life: np.ndarray, weight: np.ndarray) -> int:
    change = np.zeros(int(life.max()) + 2, np.int64)
    np.add.at(change, life[0], weight)
    np.add.at(change, life[1] + 1, -weight)
    return int(np.cumsum(change).max())


def _block_advice(
    order: Order,
    *,
    files: Sequence[FileEntry],
    mean_bytes: float,
    network: Network,
    nodes: int,
) -> str:
    """Compares the blocks that a cache keeps with what a lane reads together."""
    together = mean_bytes * order.config.block_size
    sizes = sorted({blocks_of(network, file) for file in files})
    fitting = max(blocks_of(Network(), file) for file in files)
    share = mean_bytes * order.config.num_samples / nodes
    text = " to ".join(_size(size) for size in sorted({sizes[0], sizes[-1]}))
    if nodes > 1 and sizes[-1] > 2 * fitting and share > 256 * sizes[-1]:
        return (
            f"{text} hold samples of several nodes, which fetch them all; the order reads "
            f"{_size(together)} together: without block_bytes they have {_size(fitting)}"
        )
    return f"{text}, the order reads {_size(together)} together"


def _lane_advice(order: Order, cluster: Cluster) -> str:
    config = order.config
    if config.layout != "lanes":
        return "none: the dataset is small and shuffled as a whole"
    advice = []
    if config.canonical_ranks % cluster.world_size:
        own = f"; canonical_ranks={cluster.world_size} gives each its own"
        hint = "" if config.global_batch_size % cluster.world_size else own
        advice.append(f"{cluster.world_size:,} ranks share {config.canonical_ranks}{hint}")
    if config.canonical_workers % cluster.workers:
        advice.append(f"{cluster.workers} workers share {config.canonical_workers}; use 1, 2, 4, 8")
    return ", ".join(advice) or "every worker owns whole lanes"


def _advice(shard_bytes: np.ndarray, num_samples: int, order: Order, cluster: Cluster) -> str:
    mean = float(shard_bytes.mean())
    per_shard = num_samples / len(shard_bytes)
    low, high = _GOOD_SHARD_BYTES
    total = int(shard_bytes.sum())
    wanted = max(1, math.ceil(total / (256 << 20)))
    if mean < low and len(shard_bytes) > wanted:
        return f"would help: shards of {_size(mean)} are small; {wanted:,} would be enough"
    if per_shard < 4 * order.config.block_size and len(shard_bytes) > wanted:
        return (
            f"would help: {per_shard:.0f} samples per shard are few for blocks of "
            f"{order.config.block_size}; {wanted:,} shards would be enough"
        )
    if mean > high:
        return f"would help: shards of {_size(mean)} are large; {wanted:,} start sooner"
    if len(shard_bytes) < cluster.nodes and total > cluster.nodes * low:
        return f"would help: {len(shard_bytes):,} shards for {cluster.nodes:,} nodes"
    return "would not help: the order reads parts of shards, and theirs are of a good size"


def _size(num_bytes: float) -> str:
    """Formats bytes.

    >>> _size(3_250_000)
    '3.2 MB'
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
