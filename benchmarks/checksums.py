"""What safe reading costs the loader: the checksum of every sample, and copies instead of maps.

    python benchmarks/checksums.py [--rows 512] [--rounds 9]

W1 and W4 of benchmarks/workloads.py, without threads, so that processor time is the time of the
work itself. Loaders take turns, an epoch each: check="size", check="crc" with the library that
`shardspec.checksum` found, check="crc" with zlib, and check="size" with tars and indexes mapped
into memory, as they would be if no file could be cut during a run. Ratios are medians over the
rounds.
"""

from __future__ import annotations

import argparse
import mmap
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import loader.reading.local as local
from benchmarks.workloads import SEQUENCE_LENGTH, Workload, single_crops, texts
from loader import StreamingDataset, make_dataloader
from loader.reading import Check
from loader.reading.open_shards import LoadedRows
from shardspec import checksum

WAYS: dict[str, tuple[Check, Callable[..., int], bool]] = {
    "size": ("size", zlib.crc32, False),
    "crc": ("crc", checksum.crc32, False),
    "crc, zlib": ("crc", zlib.crc32, False),
    "size, mapped": ("size", zlib.crc32, True),
}
"""Check, function, whether files are mapped."""


class MappedFile:
    """A tar that is memory-mapped, in place of `OpenFile`."""

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        self._view = memoryview(mmap.mmap(descriptor, num_bytes, access=mmap.ACCESS_READ))
        os.close(descriptor)

    def read(self, start: int, stop: int) -> memoryview:
        """Gives bytes [start, stop) of the file."""
        return self._view[start:stop]


def mapped_index(path: str, **checks: Any) -> LoadedRows:
    """Maps an index, in place of `open_index_file`."""
    del checks
    return LoadedRows(np.asarray(np.load(path, mmap_mode="r")))


@contextmanager
def reading(function: Callable[..., int], *, is_mapped: bool) -> Iterator[None]:
    """Reads local shards in another way."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(local, "crc32", function))
        if is_mapped:
            stack.enter_context(mock.patch.object(local, "OpenFile", MappedFile))
            stack.enter_context(mock.patch.object(local, "open_index_file", mapped_index))
        yield


def epoch_s(workload: Workload, check: Check) -> float:
    """Makes one epoch; returns its processor time."""
    dataset = StreamingDataset(workload.url, seed=1, rank=0, world_size=1, check=check)
    batches = make_dataloader(
        dataset,
        global_batch_size=workload.batch,
        sequence_length=SEQUENCE_LENGTH,
        decode_threads=0,
    )
    start_s = time.process_time()
    for _ in batches:
        pass
    return time.process_time() - start_s


def measure(workload: Workload, rounds: int, rows: int) -> None:
    """Prints the ratios of one workload."""
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(rounds + 1):
        for name, (check, function, is_mapped) in WAYS.items():
            with reading(function, is_mapped=is_mapped):
                taken_s = epoch_s(workload, check)
            if number:  # the first one reads the files into memory
                times[name].append(taken_s)
    base = times["size"]
    for name in WAYS:
        ratio = median(a / b for a, b in zip(times[name], base, strict=True))
        per_sample_us = median(times[name]) / rows * 1e6
        print(f"{workload.name} {name:12} {per_sample_us:7.1f} us per sample  ratio {ratio:.3f}")


def main() -> None:
    """Builds the workloads and measures them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    print(f"checksums by {checksum._crc32.__module__}")
    with tempfile.TemporaryDirectory() as folder:
        for make in (single_crops, texts):
            workload = make(Path(folder) / make.__name__, rows=options.rows)
            measure(workload, options.rounds, options.rows)


if __name__ == "__main__":
    main()
