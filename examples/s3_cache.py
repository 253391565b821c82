"""Streams from an object store through a cache on the local disk: later epochs fetch nothing.

    make shards DATASET=pixmo_cap SOURCE=sample OUT=s3://bucket/pixmo_cap
    python examples/s3_cache.py s3://bucket/pixmo_cap /nvme/cache

Credentials and endpoint are found as those of the AWS command line: profile, role, or environment
(`AWS_ENDPOINT_URL_S3`). With several nodes, `locality="node"` keeps the samples of a node the same.
"""

import argparse
import time

from loader import StreamingDataset, make_dataloader

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("shards")
    parser.add_argument("cache")
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()

    dataset = StreamingDataset(options.shards, seed=42, cache=options.cache, locality="node")
    loader = make_dataloader(dataset, global_batch_size=8, sequence_length=2048)
    before = loader.stats()
    for epoch in range(options.epochs):
        start_s, rows = time.perf_counter(), 0
        for batch in loader:
            rows += len(batch["input_ids"])
        now = loader.stats()
        counted = now.since(before).counters
        before = now
        print(
            f"epoch {epoch}: {rows} rows in {time.perf_counter() - start_s:.1f} s,"
            f" {counted.get('requests', 0)} requests, {counted.get('bytes', 0):,} bytes fetched"
        )
