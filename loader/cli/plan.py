"""`python -m loader plan`: what a cluster of any size will read; see `plan_cluster`."""

from __future__ import annotations

import argparse

from loader.cli.cluster import Cluster, describe_plan, plan_cluster
from loader.cli.verb import Verb, add_dataset, add_flag
from loader.stream import require_argument
from shardspec.manifest import require_manifest


def _add(parser: argparse.ArgumentParser) -> None:
    add_dataset(parser)
    add_flag(parser, "--nodes", "machines", 1)
    add_flag(parser, "--ranks", "data-parallel ranks per machine", 8)
    add_flag(parser, "--workers", "threads or worker processes per rank", 4)
    add_flag(parser, "--global-batch", "samples per step over all ranks", 256)
    add_flag(parser, "--cache-gb", "cache of remote data per machine, in GB (10^9 bytes)", 64.0)
    parser.add_argument(
        "--block-bytes", type=int, help="bytes of a block of remote data (default: chosen)"
    )
    parser.add_argument("--canonical-ranks", type=int, help="width of the order (default: chosen)")


def _run(options: argparse.Namespace) -> str:
    gigabytes = options.cache_gb
    require_argument(0 <= gigabytes <= 1e9, "cache_gb", gigabytes, "a number from 0 to 10^9")
    plan = plan_cluster(
        require_manifest(options.shards),
        split=options.split,
        cluster=Cluster(nodes=options.nodes, ranks=options.ranks, workers=options.workers),
        global_batch_size=options.global_batch,
        canonical_ranks=options.canonical_ranks,
        seed=options.seed,
        cache_bytes=round(gigabytes * 1e9),
        block_bytes=options.block_bytes,
    )
    return describe_plan(plan)


PLAN = Verb(
    name="plan",
    help="print what a cluster would read, from the manifest alone",
    add=_add,
    run=_run,
)
