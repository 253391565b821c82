"""Measures the loader beside the bare decoding of the same pictures.

    python benchmarks/loader.py

The bare loop decodes the shards' JPEG payloads from memory into one recycled buffer, one after
another, on one core. The loader reads them from local shards in a shuffled order, draws, lays out
tokens and makes whole batches; nobody consumes them. Every loader makes one epoch per round.

* ratio: processor time of a sample in the bare loop / in the loader, so that other programs on the
  machine disturb it little; 1 would mean that everything but decoding is free.
* by wall: the same in samples per second, which is where two threads show, on an idle machine.

A second table says where the processor time of a sample goes.
"""

from __future__ import annotations

import pkgutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.job import PICTURES, Silent, machine, paired, row, write_source
from loader import StreamingDataset, make_dataloader
from preprocess.image import ImagePolicy
from preprocess.pipeline import run_job
from preprocess.recipe import Recipe
from preprocess.scenes import make_scene
from shardspec.media import decode_stored, encode_stored
from shardspec.sample import Codec
from shardspec.tiling import ImageView

ROWS = 1024
BATCH = 32
ROUNDS = 9

STAGES = {
    "read": "loader.reader.ShardReader.read",
    "decode": "loader.reader.decode_stored",
    "layout": "loader.assemble.plan_example",
    "render": "loader.assemble.render",
    "the rest of assemble": "loader.stream.assemble",
    "collate": "loader.collate.MMCollator.__call__",
}
"""What is timed in the second table; each without the parts that are listed themselves."""


def main() -> None:
    torch.set_num_threads(1)
    print(f"{machine()}\n")
    view = ImageView()
    payloads = []
    for i in range(PICTURES):
        picture = Image.fromarray(make_scene(1, i).pixels)
        stored = picture.resize((view.size_px, view.size_px), Image.Resampling.LANCZOS)
        payloads.append(encode_stored(np.asarray(stored), codec="jpeg", quality=95))
    mean_kb = np.mean([len(payload) for payload in payloads]) / 1e3
    with tempfile.TemporaryDirectory() as folder:
        urls = {codec: build(Path(folder), payloads, codec, view) for codec in ("jpeg", "raw")}
        print(f"{view.size_px} px pictures, JPEG of {mean_kb:.0f} KB or raw, batches of {BATCH}")
        against_decoding(urls, payloads, view)
        by_stage(urls)


def against_decoding(urls: dict[str, str], payloads: list[bytes], view: ImageView) -> None:
    # A few rows may have fallen into the validation split.
    num_samples = StreamingDataset(urls["jpeg"]).num_samples
    buffer = np.empty((view.size_px, view.size_px, 3), np.uint8)

    def bare() -> None:
        for i in range(num_samples):
            decode_stored(payloads[i % len(payloads)], codec="jpeg", out=buffer)

    epochs = {
        f"{codec}, {threads} thread{'s'[: threads - 1]}": epoch(url, threads)
        for codec, url in urls.items()
        for threads in (1, 2)
    }
    times = paired({"bare decoding": bare, **epochs}, rounds=ROUNDS)
    row("", "CPU, us", "ratio", "samples/s", "by wall")
    for name, (wall, cpu) in times.items():
        row(
            name,
            f"{1e6 * np.median(cpu) / num_samples:.0f}",
            f"{np.median(times['bare decoding'].cpu / cpu):.2f}",
            f"{num_samples / np.median(wall):.0f}",
            f"{np.median(times['bare decoding'].wall / wall):.2f}",
        )
    print()


def by_stage(urls: dict[str, str]) -> None:
    row("CPU of a sample, us", *urls)
    num_samples = StreamingDataset(urls["jpeg"]).num_samples
    columns = []
    for url in urls.values():
        run = epoch(url, threads=1)
        run()
        with timed_stages() as own:
            start = time.process_time()
            run()
            whole = time.process_time() - start
        columns.append({**own, "order, threads, timers": whole - sum(own.values())})
    for name in columns[0]:
        row(name, *(f"{1e6 * column[name] / num_samples:.0f}" for column in columns))


def epoch(url: str, threads: int) -> Callable[[], None]:
    """Makes a function that runs a loader for one epoch and drops its batches."""
    dataset = StreamingDataset(url, seed=1)
    batches = make_dataloader(
        dataset, global_batch_size=BATCH, sequence_length=2048, decode_threads=threads
    )

    def run() -> None:
        for _ in batches:
            pass

    return run


@contextmanager
def timed_stages() -> Iterator[dict[str, float]]:
    """Times the functions of `STAGES` while they run in one thread.

    Gives a dictionary of seconds that is complete when the context ends.
    """
    own: dict[str, float] = defaultdict(float)
    inner = [0.0]

    def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **settings: Any) -> Any:
            inner.append(0.0)
            start = time.thread_time()
            try:
                return function(*args, **settings)
            finally:
                took = time.thread_time() - start
                own[stage] += took - inner.pop()
                inner[-1] += took

        return wrapper

    with ExitStack() as stack:
        for stage, target in STAGES.items():
            wrapper = timed(stage, pkgutil.resolve_name(target))
            stack.enter_context(mock.patch(target, wrapper))
        yield own


def build(folder: Path, payloads: list[bytes], codec: Codec, view: ImageView) -> str:
    """Builds a dataset whose JPEG files are kept as they are, or decoded once for raw."""
    settings = write_source(folder / codec, payloads, rows=ROWS, view=view)
    policy = ImagePolicy(views=(view,), codec=codec)
    run_job(replace(settings, recipe=Recipe(image=policy)), Silent())
    return settings.out


if __name__ == "__main__":
    main()
