"""What cutting shards anew costs, against `cp` of the same files and webdataset's read and write.

    .venv/bin/python benchmarks/reshard.py

* cp: `cp` of every shard, then fsync of the copies, as every shard of ours is flushed before it
  gets its name. "cp, unflushed" leaves that out.
* reshard, 1 core: the job's own tasks in kept order, in this process: each sample's checksum
  compared, index, receipt, fsync. "unchecked" (`--through store`) looks at no sample and compares
  versions only.
* reshard, 2 jobs: as `make reshard JOBS=2` runs it, with the start of its processes.
* webdataset: `WebDataset` read of raw bytes into `ShardWriter`, shards of the same size; of the
  first two shards only, as it takes twenty times as long.

In turn, so that a busy moment meets all alike. Cold rounds drop the sources from the page cache
first. Ratios are of the medians.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from preprocess.exchange.foreign import ImportSettings, import_tars
from preprocess.reshard import run as job
from preprocess.reshard.plan import ReshardSettings, plan_reshard
from preprocess.reshard.run import reshard
from shardspec.tar import TarWriter
from tests import inline
from tests.inline import Quiet

SHARDS, SAMPLES, ROUNDS = 32, 1000, 3
REWRITTEN = 2
"""Shards that webdataset reads and writes."""
OLD_PER_NEW = 3.4
"""Old shards, of 65 MB, in a new one: about 220 MB, near the job's own 256 MiB."""
SAMPLE_BYTES = 64_000  # a JPEG of 336 px at quality 95 and its arrays


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tars = make_source(folder / "tars", num_shards())
        names = tuple(map(str, tars))
        settings = ImportSettings(tars=names, out=str(folder / "source"), name="bench")
        import_tars(settings, Quiet())
        source = folder / "source"
        ways = {
            "cp": lambda out: copy(tars, out, flush=True),
            "cp, unflushed": lambda out: copy(tars, out, flush=False),
            "reshard, 1 core": lambda out: recut_here(source, out, through="client"),
            "  unchecked": lambda out: recut_here(source, out, through="store"),
            "reshard, 2 jobs": lambda out: recut(source, out, through="client", num_workers=2),
            "  unchecked, 2 jobs": lambda out: recut(source, out, through="store", num_workers=2),
            "webdataset": lambda out: rewrite(tars[:REWRITTEN], out),
        }
        num_bytes = sum(tar.stat().st_size for tar in tars)
        print(f"{num_bytes / 2**20:.0f} MiB in {len(tars)} shards to {num_new()}\n")
        for cache in ("warm", "cold"):
            report(cache, measure(ways, tars, folder, cold=cache == "cold"), num_bytes)


def make_source(folder: Path, count: int) -> list[Path]:
    """Writes plain shards of random samples."""
    folder.mkdir()
    paths = []
    for shard in range(count):
        rng = np.random.RandomState(shard)
        paths.append(folder / f"{shard:05d}.tar")
        with paths[-1].open("wb") as stream:
            writer = TarWriter(stream)
            for i in range(SAMPLES):
                key = f"{shard:05d}{i:04d}"
                members = [(f"{key}.json", b"{}\n"), (f"{key}.spans.npy", rng.bytes(416))]
                members += [(f"{key}.tokens.npy", rng.bytes(1200))]
                members += [(f"{key}.jpg", rng.bytes(SAMPLE_BYTES))]
                writer.write_sample(members)
            writer.finish()
            os.fsync(stream.fileno())
    return paths


def copy(tars: list[Path], out: Path, *, flush: bool) -> None:
    out.mkdir()
    subprocess.run(["cp", *map(str, tars), str(out)], check=True)
    for path in out.iterdir() if flush else ():
        with path.open("rb+") as stream:
            os.fsync(stream.fileno())


def recut(source: Path, out: Path, *, through: str, num_workers: int = 1) -> None:
    settings = ReshardSettings(
        sources=(str(source),),
        out=str(out),
        num_shards=num_new(),
        form="copy",
        through=through,
        num_workers=num_workers,
    )
    reshard(plan_reshard(settings, Quiet()), Quiet())


def recut_here(source: Path, out: Path, *, through: str) -> None:
    with mock.patch.object(job.local, "run", inline.run):
        recut(source, out, through=through)


def rewrite(tars: list[Path], out: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import webdataset as wds

        out.mkdir()
        pattern = str(out / "%05d.tar")
        with wds.ShardWriter(pattern, maxcount=SAMPLES, maxsize=2**40, verbose=0) as sink:
            for sample in wds.WebDataset([str(tar) for tar in tars], shardshuffle=False):
                sink.write({name: v for name, v in sample.items() if name != "__url__"})


def measure(
    ways: dict[str, Callable[[Path], None]], tars: list[Path], folder: Path, *, cold: bool
) -> dict[str, tuple[list[float], list[float]]]:
    """Gives wall and processor seconds of each round, children included."""
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ways}
    for i in range(ROUNDS + 1):
        for name in list(ways)[:: 1 if i % 2 else -1]:
            os.sync()
            for tar in tars:
                with tar.open("rb") as stream:
                    if cold:
                        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    else:
                        while stream.read(2**22):
                            pass
            out = folder / "out"
            wall, cpu = time.perf_counter(), cpu_seconds()
            ways[name](out)
            if i:  # the first round warms the imports
                found[name][0].append(time.perf_counter() - wall)
                found[name][1].append(cpu_seconds() - cpu)
            shutil.rmtree(out)
    return found


def cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def report(cache: str, found: dict[str, tuple[list[float], list[float]]], num_bytes: int) -> None:
    print(f"{cache:<26}{'MB/s':>8}{'of cp':>8}{'CPU s/GB':>10}{'of webdataset':>15}")
    rates: dict[str, tuple[float, float]] = {}
    for name, (wall, cpu) in found.items():
        moved = num_bytes * REWRITTEN / num_shards() if name == "webdataset" else num_bytes
        rates[name] = moved / statistics.median(wall), statistics.median(cpu) / moved
    for name, (speed, cost) in rates.items():
        print(
            f"{name:<26}{speed / 1e6:>8.0f}{speed / rates['cp'][0]:>8.2f}"
            f"{cost * 1e9:>10.3f}{cost / rates['webdataset'][1]:>15.2f}"
        )
    print(flush=True)


def num_shards() -> int:
    """Reads the number of shards off the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("shards", type=int, nargs="?", default=SHARDS)
    num: int = parser.parse_args().shards
    return num


def num_new() -> int:
    """Counts the shards that become of them; not a divisor, so that new shards have seams."""
    return max(2, round(num_shards() / OLD_PER_NEW))


if __name__ == "__main__":
    main()
