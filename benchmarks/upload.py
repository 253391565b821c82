"""Measures uploads of shards to an S3 server on loopback beside the client's own upload.

    python benchmarks/upload.py

Both send the same file of 256 MiB in parts of 8 MiB, four at a time, through the same s3fs client.
Ours hashes each part, has the store compare it, and compares length and checksum at the end; it
reads a part when it is sent. A ratio of 1 would mean that this is free. Each upload has a process
of its own, so that its peak of memory is its own too; they take turns.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from shardspec import storage  # noqa: E402
from tests.servers import s3_server  # noqa: E402

FILE_BYTES = 256 * 2**20
PART_BYTES = 8 * 2**20
ROUNDS = 3


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, s3_server(Path(folder) / "server") as server:
        source = Path(folder) / "shard.tar"
        source.write_bytes(np.random.RandomState(0).bytes(FILE_BYTES))
        bucket = server.make_bucket()
        seen: dict[str, list[list[float]]] = {"ours": [], "s3fs": []}
        for i in range(ROUNDS + 1):
            for who in list(seen)[:: 1 if i % 2 else -1]:
                done = subprocess.run(
                    [sys.executable, __file__, "--send", who, f"{bucket}/{who}", str(source)],
                    env={**os.environ, **server.env},
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                if i:  # the server's first objects wait for its volumes
                    seen[who].append([float(value) for value in done.stdout.split()])
    print(f"{platform.machine()}, {os.cpu_count()} cores, {ROUNDS} rounds")
    for who, rounds in seen.items():
        wall_s, cpu_s, grown_bytes = np.median(np.array(rounds), axis=0)
        rate = FILE_BYTES / 1e6 / wall_s
        print(
            f"{who}: {rate:.0f} MB/s, {cpu_s:.2f} CPU s, memory grew by {grown_bytes / 1e6:.0f} MB"
        )
    ours, theirs = (np.array(seen[who]) for who in ("ours", "s3fs"))
    print(f"ours / s3fs: wall {np.median(theirs[:, 0] / ours[:, 0]):.2f}, CPU ", end="")
    print(f"{np.median(theirs[:, 1] / ours[:, 1]):.2f}")


def send(who: str, url: str, source: Path) -> None:
    """Uploads once and prints wall seconds, CPU seconds and by how much memory has grown."""
    fs, path = storage.filesystem(url)
    fs.exists(path)  # the client is made and connected
    copy = source.with_suffix(f".{who}")
    os.link(source, copy)  # ours moves the file
    before, peak = resource.getrusage(resource.RUSAGE_SELF), peak_bytes()
    wall = time.perf_counter()
    if who == "ours":
        storage.publish_file(url, copy)
    else:
        fs.put_file(str(copy), path, chunksize=PART_BYTES, max_concurrency=4)
        copy.unlink()
    wall = time.perf_counter() - wall
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(wall, cpu, peak_bytes() - peak)


def peak_bytes() -> int:
    """Reads the most memory that this program has held; ru_maxrss would count the parent's too."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["--send"]:
        send(sys.argv[2], sys.argv[3], Path(sys.argv[4]))
    else:
        argparse.ArgumentParser().parse_args()  # it has none
        main()
