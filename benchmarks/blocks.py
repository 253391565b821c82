"""Counts the bytes that an S3 server gives to nodes of a cluster, by the size of cached blocks.

    python benchmarks/blocks.py

32,768 samples of 60 kB in an S3 server on loopback, eight nodes of one rank with batches of four
samples, each with a cache of its own with room for 40 % of the data. Two of the nodes read the
first two epochs. Beside what the server gave is what `python -m loader plan` says of the same
cluster. Two gigabytes of disk and some three minutes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.job import machine, row
from loader import Network, StreamingDataset, make_dataloader
from loader.cli.epochs import fetched_bytes
from loader.reading import cached
from shardspec.manifest import require_manifest
from tests import conftest, servers
from tests.fault_proxy import FaultProxy

NODES = 8
SIMULATED = (0, 5)
BATCH = 4 * NODES
SAMPLES = 32_768
SAMPLE_BYTES = 60_000
CACHE = 0.4
EPOCHS = 2


def main() -> None:
    print(f"{machine()}\n")
    # Blocks that are open stay readable when the cache has evicted them: of so few, half would be.
    cached._MAX_OPEN = 16
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        small = conftest._tiny_sample(0)
        padded = [
            replace(small, key=f"s{i:06d}", record={"pad": "x" * SAMPLE_BYTES})
            for i in range(SAMPLES)
        ]
        manifest = require_manifest(conftest._write_dataset(folder / "set", padded, num_shards=16))
        total = sum(file.num_bytes for file in manifest.files)
        row("block_bytes", "node", "first", "second", "plan", "", "requests")
        with servers.s3_server(folder / "s3") as server:
            place = server.make_bucket() + "/set"
            server.client().put(str(folder / "set"), place, recursive=True)
            for block_bytes in (4 * 2**20, None, 2**18):
                network = Network(block_bytes=block_bytes, ahead_steps=16)
                options = {"cache_bytes": int(CACHE * total), "network": network}
                plan = fetched_bytes(
                    manifest,
                    split="train",
                    nodes=NODES,
                    ranks=1,
                    global_batch_size=BATCH,
                    locality="any",
                    seed=3,
                    **options,
                )
                planned = [f"{each / total * NODES:.2f}" for each in plan.num_bytes[:EPOCHS]]
                for node in SIMULATED:
                    with (
                        tempfile.TemporaryDirectory(
                            dir=folder, ignore_cleanup_errors=True
                        ) as cache,
                        FaultProxy(server.endpoint, seed=6) as proxy,
                        proxy.entered(server),
                    ):
                        dataset = StreamingDataset(
                            place,
                            seed=3,
                            rank=node,
                            world_size=NODES,
                            cache=cache + "/cache",
                            **options,
                        )
                        loader = make_dataloader(
                            dataset, global_batch_size=BATCH, sequence_length=64
                        )
                        found, before = [], 0
                        for _ in range(EPOCHS):
                            for _ in loader:
                                pass
                            gets = [get for get in proxy.gets if ".tar" in get.path]
                            given = sum(get.stop - get.start for get in gets)
                            found.append(f"{(given - before) / total * NODES:.2f}")
                            before = given
                    row(block_bytes or "default", node, *found, *planned, f"{len(gets):,}")
    print("\nbytes as multiples of a node's share of the data")


if __name__ == "__main__":
    argparse.ArgumentParser().parse_args()  # it has none
    main()
