"""`python -m loader bench`: how fast a dataset streams here, and whether a model would wait for it.

Measures the loader that training uses, on this machine. What it says of a model's step follows from
the processor time of a batch (`feeding`): no accelerator is needed to ask.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import math
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loader.cli.flame import StackSampler, draw_flame_graph
from loader.cli.opened import add_mixture, open_dataset
from loader.cli.verb import Verb, add_dataset, add_flag
from loader.dataloader import make_dataloader
from loader.delivery import STAGES, Stats
from shardspec import storage
from shardspec.errors import ConfigError
from shardspec.messages import counted


def _add(parser: argparse.ArgumentParser) -> None:
    add_dataset(parser)
    add_mixture(parser)
    add_flag(parser, "--batch-size", "rows of a batch, of one rank", 16)
    add_flag(parser, "--sequence-length", "longest sequence", 2048)
    add_flag(parser, "--steps", "batches to time, after a first one", 30)
    add_flag(parser, "--threads", "threads that make batches ahead", 2)
    add_flag(parser, "--processes", "worker processes instead of threads; 0 for none", 0)
    parser.add_argument("--pack", action="store_true", help="fill rows with several samples")
    parser.add_argument("--augment", action="store_true", help="augment images as in training")
    parser.add_argument(
        "--model-step", type=float, metavar="SECONDS",
        help="time that the model takes for a batch of this size: tells whether it would wait",
    )  # fmt: skip
    parser.add_argument(
        "--profile", metavar="FILE",
        help="write which functions take the time: a flame graph of all threads to FILE.svg, or to "
        "any other FILE a profile (cProfile, for snakeviz), for which batches are made without "
        "threads; without worker processes",
    )  # fmt: skip


def _run(options: argparse.Namespace) -> str:
    if options.steps < 1:
        raise ConfigError("bench_setting", flag="--steps", value=options.steps)
    if options.model_step is not None and not 0 < options.model_step < math.inf:
        raise ConfigError("bench_setting", flag="--model-step", value=options.model_step)
    began = time.perf_counter()
    opened = open_dataset(options, rank=0, world_size=1)
    profiled = options.profile is not None
    graph = profiled and options.profile.endswith(".svg")
    alone = profiled and not graph
    loader = make_dataloader(
        opened.dataset,
        global_batch_size=options.batch_size,
        sequence_length=options.sequence_length,
        pack=options.pack,
        decode_threads=0 if alone else options.threads,
        workers=0 if profiled else options.processes,
    )
    batches = _endless(loader)
    next(batches)
    first_s = time.perf_counter() - began
    before = loader.stats()
    sampler, profile = StackSampler(), cProfile.Profile()
    with sampler if graph else profile if alone else contextlib.nullcontext():
        began = time.perf_counter()
        for _ in range(options.steps):
            next(batches)
        wall_s = time.perf_counter() - began
    stats = loader.stats().since(before)
    batches.close()
    title = f"{opened.name} {options.split}: {options.steps:,} batches of {options.batch_size}"
    lines = [title, *describe_run(stats, first_s=first_s, wall_s=wall_s)]
    if options.model_step is not None:
        lines += ["", describe_feeding(stats, wall_s=wall_s, model_step_s=options.model_step)]
    if profiled:
        with TemporaryDirectory() as folder:
            made = Path(folder) / "made"
            if graph:
                made.write_text(draw_flame_graph(sampler.stacks, title=title), encoding="utf-8")
            else:
                profile.dump_stats(made)
            storage.publish_bytes(options.profile, made.read_bytes())
        lines += ["", f"profile: {options.profile}"]
    return "\n".join(lines)


def _endless(loader: Any) -> Generator[Mapping[str, Any], None, None]:
    while True:
        yield from loader


def describe_run(stats: Stats, *, first_s: float, wall_s: float) -> list[str]:
    """Tabulates a run of a loader without a model.

    Args:
      stats: Of the run.
      first_s: Seconds from opening the dataset to the first batch.
      wall_s: Seconds of the run.
    """
    timings = stats.timings
    busy_s = max(1e-9, timings.busy_s)
    shares = (f"{stage} {getattr(timings, f'{stage}_s') / busy_s:.0%}" for stage in STAGES)
    rows = {
        "first batch": f"{first_s:.2f} s after opening",
        "samples": f"{timings.samples / wall_s:,.0f} per s",
        "tokens": f"{timings.tokens / wall_s:,.0f} per s, padding {stats.padding_share:.0%}",
        "read": f"{timings.read_bytes / wall_s / 1e6:,.1f} MB/s",
        "batch": f"{1e3 * wall_s / timings.batches:,.1f} ms, "
        f"{timings.batch_bytes / timings.batches / 1e6:,.1f} MB",
        "work": f"{1e3 * busy_s / timings.batches:,.1f} ms a batch of one {stats.worker_kind}: "
        + ", ".join(shares),
        "workers": f"{stats.workers} ({stats.worker_kind}), busy {stats.busy_share:.0%}",
    }
    return [f"{name:<12} {text}" for name, text in rows.items()]


def feeding(stats: Stats, *, wall_s: float, model_step_s: float) -> tuple[float, int]:
    """Computes how far a loader is from feeding a model.

    Args:
      stats: Of a run that nothing slowed down but the loader itself.
      wall_s: Seconds of the run.
      model_step_s: Seconds that the model takes for a batch.

    Returns:
      (share of the time, 0 to 1, in which the model would wait; threads or worker processes, each
      on a core of its own, that the work of a batch needs within a step).
    """
    batch_s = wall_s / stats.timings.batches
    work_s = stats.timings.busy_s / stats.timings.batches
    waits = max(0.0, 1 - model_step_s / batch_s)
    return waits, max(1, math.ceil(work_s / model_step_s))


def describe_feeding(stats: Stats, *, wall_s: float, model_step_s: float) -> str:
    """Answers whether a model would wait, and what to change."""
    waits, needed = feeding(stats, wall_s=wall_s, model_step_s=model_step_s)
    batch_s = wall_s / stats.timings.batches
    told = f"A model with {model_step_s:g} s a step"
    if not waits:
        return (
            f"{told} would not wait: a batch is ready every {batch_s:.3f} s. The work needs "
            f"{needed} of the {counted(stats.workers, 'worker')} of a rank."
        )
    return (
        f"{told} would wait {waits:.0%} of its time: a batch is ready every {batch_s:.3f} s. The "
        f"work needs {counted(needed, 'worker')} of a rank, each with a core of its own; this run "
        f"had {stats.workers}. Measured: {stats.verdict}."
    )


BENCH = Verb(
    name="bench", help="time the loader here, and tell whether a model would wait", add=_add,
    run=_run,
)  # fmt: skip
