"""Measures the loader beside the limits that physics sets.

    python benchmarks/loader.py [--quick]

W1 to W3 of benchmarks/workloads.py. Every function makes one epoch per round; nobody consumes the
batches. The limits:

* decode: `decode_stored` on the same payloads from memory, each into its place in one batch;
* decode + memcpy (W2): the same for canvases and overviews into one buffer each, and a copy of as
  many bytes as the crops have, between warm buffers;
* unsharded path (W2): prepare and assemble and collate, from the source rows, in one process.

"ratio" is of processor time per sample, limit / loader, so that other programs on the machine
disturb it little. "by wall" is what threads and processes gain, against one core's limit times
their number; it needs an idle machine. The rows "GIL held" keep the interpreter busy in another
thread for half of the time, 5 ms on and 5 ms off, as a training loop in Python may.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.job import TILED, machine, paired, row
from benchmarks.workloads import Workload, single_crops, tiles, unsharded
from loader.dataloader import StreamLoader
from loader.delivery.stats import STAGES
from shardspec.media import decode_stored
from shardspec.sample import image_rows
from shardspec.tiling import num_crops

SHORT_S = 0.0005
SHORT = f"switch interval {1e3 * SHORT_S} ms"

HELD_S = 0.005
"""Seconds for which a thread holds the interpreter, and then lets go of it for as long."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the loader beside its limits.")
    parser.add_argument("--quick", action="store_true", help="few rows, two rounds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}\n")
    rows, tiled_rows, rounds = (512, 64, 2) if options.quick else (2048, 256, 7)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one = single_crops(folder / "W1", rows=rows)
        raw = single_crops(folder / "W3", rows=rows, raw=True)
        tiled = tiles(folder / "W2", rows=tiled_rows)
        single(one, raw, rounds=rounds)
        many(tiled, rounds=min(rounds, 5))
        stages([one, raw, tiled])


def single(one: Workload, raw: Workload, *, rounds: int) -> None:
    """W1 and W3."""
    payloads, num = pictures(one)
    places = np.zeros((one.batch, 336, 336, 3), np.uint8)

    def decode() -> None:
        for i, payload in enumerate(payloads):
            decode_stored(payload, codec="jpeg", out=places[i % len(places)])

    functions: dict[str, Callable[[], None]] = {"W1 decode, one core": decode}
    cores: dict[str, int] = {}
    for name, workload, settings in (
        ("W1 no threads", one, {"decode_threads": 0}),
        ("W1 1 thread", one, {"decode_threads": 1}),
        ("W1 2 threads", one, {"decode_threads": 2}),
        ("W3 no threads", raw, {"decode_threads": 0}),
        ("W3 2 threads", raw, {"decode_threads": 2}),
    ):
        functions[name] = partial(consume, workload.loader(**settings))
        cores[name] = max(1, settings["decode_threads"])
    functions["W1 1 thread, GIL held"] = partial(hold, one.loader(decode_threads=1))
    functions["W1 2 threads, GIL held"] = partial(hold, one.loader(decode_threads=2))
    cores |= {"W1 1 thread, GIL held": 1, "W1 2 threads, GIL held": 2}
    for name in ("W1 2 threads", "W1 2 threads, GIL held"):
        functions[f"{name}, {SHORT}"] = partial(at_short_intervals, functions[name])
        cores[f"{name}, {SHORT}"] = 2
    times = paired(functions, rounds=rounds)
    limit = times["W1 decode, one core"]
    row("", "CPU, us", "ratio", "samples/s", "by wall")
    for name, (wall, cpu) in times.items():
        row(
            name,
            f"{1e6 * np.median(cpu) / num:.0f}",
            # The consumer's own work is not the loader's.
            "" if "held" in name else f"{np.median(limit.cpu / cpu):.2f}",
            f"{num / np.median(wall):.0f}",
            f"{np.median(limit.wall / wall) / cores.get(name, 1):.2f}",
        )
    for threads, behind in (("1 thread", ""), ("2 threads", ""), ("2 threads", f", {SHORT}")):
        free, held = (times[f"W1 {threads}{how}{behind}"].wall for how in ("", ", GIL held"))
        share = np.median(free / held)
        print(f"GIL held half of the time, {threads}{behind}: {share:.2f} of the rate")
    for name, workload in (("W1", one), ("W3", raw)):
        rates = [steady(workload.loader(workers=2)) for _ in range(max(1, rounds // 2))]
        share = np.median(rates) / (2 * num / np.median(limit.wall))
        print(f"{name} 2 workers: {np.median(rates):.0f} samples/s, {share:.2f} of 2 x decode")
    print()


def many(tiled: Workload, *, rounds: int) -> None:
    """W2."""
    loader = tiled.loader(decode_threads=0)
    stored = [loader.dataset.reader.stored(i) for i in range(loader.dataset.num_samples)]
    num = len(stored)
    crops, jobs = 0, []
    for sample in stored:
        _, _, width, height, *_ = image_rows(sample.spans)[0].tolist()
        crops += num_crops(width, height, TILED)
        for picture in filter(None, (*sample.pictures, *sample.overviews)):
            place = np.zeros((picture.height, picture.width, 3), np.uint8)
            jobs.append((bytes(picture.payload), place))
    side = TILED.size_px
    source = np.ones((9, side, side, 3), np.uint8)
    target = np.ones_like(source)

    def limit() -> None:
        for payload, out in jobs:
            decode_stored(payload, codec="jpeg", out=out)
        for _ in range(crops // 9):
            np.copyto(target, source)
        np.copyto(target[: crops % 9], source[: crops % 9])

    times = paired(
        {
            "W2 decode + memcpy": limit,
            "W2 no threads": partial(consume, loader),
            "W2 2 threads": partial(consume, tiled.loader(decode_threads=2)),
            "unsharded path": without_shards(tiled, rows=min(num, 32)),
        },
        rounds=rounds,
    )
    counts = {"unsharded path": min(num, 32)}
    bound = times["W2 decode + memcpy"]
    path = times["unsharded path"].cpu / counts["unsharded path"]
    row("", "CPU, ms", "ratio", "samples/s", "x unsharded")
    for name, (wall, cpu) in times.items():
        own = cpu / counts.get(name, num)
        row(
            name,
            f"{1e3 * np.median(own):.2f}",
            f"{np.median(bound.cpu / num / own):.2f}",
            f"{counts.get(name, num) / np.median(wall):.0f}",
            f"{np.median(path / own):.1f}",
        )
    print(f"{crops / num:.1f} crops a sample\n")


def without_shards(tiled: Workload, *, rows: int) -> Callable[[], None]:
    """The path without shards, on the rows that W2 was built from."""
    dataset, collate = unsharded(tiled)

    def run() -> None:
        for start in range(0, rows, tiled.batch):
            collate([dataset[i] for i in range(start, min(start + tiled.batch, rows))])

    return run


def stages(workloads: list[Workload]) -> None:
    """Prints where the time of a sample goes, as `loader.stats()` tells it."""
    columns = []
    for workload in workloads:
        loader = workload.loader(decode_threads=0)
        consume(loader)
        first = loader.stats()
        consume(loader)
        columns.append(loader.stats().since(first))
    row("time of a sample, us", *(workload.name for workload in workloads))
    for stage in STAGES:
        seconds = [getattr(c.timings, f"{stage}_s") / c.timings.samples for c in columns]
        row(stage, *(f"{1e6 * s:.0f}" for s in seconds))
    row("plan", *(f"{1e6 * c.plan_s / c.timings.samples:.0f}" for c in columns))
    rest = [c.wait_s - c.timings.busy_s - c.plan_s for c in columns]
    each = zip(rest, columns, strict=True)
    row("the rest", *(f"{1e6 * r / c.timings.samples:.0f}" for r, c in each))
    print(f"\n{columns[0].verdict}\n{columns[0].line()}")


def pictures(workload: Workload) -> tuple[list[bytes], int]:
    """Reads the encoded pictures of a workload into memory."""
    dataset = workload.loader(decode_threads=0).dataset
    payloads = [
        bytes(dataset.reader.stored(i).pictures[0].payload) for i in range(dataset.num_samples)
    ]
    return payloads, dataset.num_samples


def consume(loader: StreamLoader) -> None:
    """Runs one epoch and drops its batches."""
    for _ in loader:
        pass


def hold(loader: StreamLoader) -> None:
    """Runs one epoch while another thread computes in Python for half of the time."""
    over = threading.Event()

    def compute() -> None:
        while not over.is_set():
            stop_s = time.perf_counter() + HELD_S
            while time.perf_counter() < stop_s:
                pass
            time.sleep(HELD_S)

    thread = threading.Thread(target=compute)
    thread.start()
    consume(loader)
    over.set()
    thread.join()


def at_short_intervals(function: Callable[[], None]) -> None:
    """Lets waiting threads have the interpreter ten times as soon as by default."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SHORT_S)
    function()
    sys.setswitchinterval(before)


def steady(loader: StreamLoader) -> float:
    """Measures samples per second behind the first batches, which wait for processes to start."""
    start_s, stop_s, samples = 0.0, 0.0, 0
    for number, batch in enumerate(loader):
        stop_s = time.perf_counter()  # not behind the loop: it waits for processes to end
        if number < 6:
            start_s = stop_s
        else:
            samples += len(batch["input_ids"])
    return samples / (stop_s - start_s)


if __name__ == "__main__":
    main()
