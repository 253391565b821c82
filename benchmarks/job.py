"""Measures the offline job beside the bare work on pixels that it cannot avoid.

    python benchmarks/job.py

The bare loop decodes, resizes and encodes the same JPEG files from memory, with the same decoder,
resizer and encoder, and does nothing else; where the job stores an overview, so does it. A ratio
of 1 would mean that reading, hashing, formatting, tokenizing, packing and publishing are free.
Ratios are of processor time, so that other programs on the machine disturb them little; waiting for
the disk is in the wall's column.

* one core: a build task in this process, from planned rows to a published shard with its index;
* whole job: `run_job` from a Parquet folder to the committed manifest, with the rows' planning, the
  tokenizer's loading and the workers' start, on one worker and on two; "to one" is how many times
  as fast the shards are built, by wall.

Pictures are generated scenes (JPEG quality 92, about 290 KB at 1280 px), drawn before any clock
runs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from preprocess.job.build import BuildContext, build_shard, publish_shard
from preprocess.job.job import Job, JobSettings
from preprocess.job.pipeline import run_job
from preprocess.job.planner import make_plan
from preprocess.media.image import Decoding, ImagePolicy
from preprocess.recipe import Recipe
from preprocess.synthetic.scenes import make_scene
from shardspec.media import decode_stored, encode_stored
from shardspec.tiling import ImageView, overview_size, stored_size

PICTURES = 64
JOB_ROWS = 2048  # with 512 a tenth of the time is the start of a worker
CORE_ROUNDS, JOB_ROUNDS = 7, 3

TILED = ImageView(size_px=378, crop_mode="overlap-and-resize-c2", max_crops=8)
LARGE = replace(TILED, max_crops=24)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One recipe and the pictures it is fed with."""

    name: str
    view: ImageView
    side_px: int
    """Longer side of the source pictures."""
    decode: Decoding = "full"
    """Of the job; the bare loop decodes them whole."""
    overview: Literal["stored", "resized"] = "stored"
    """Counts for views that tile."""


CASES = (
    Case(name="336 px canvas", view=ImageView(), side_px=1280),
    Case(name="378 px, 8 + 1 crops", view=TILED, side_px=1280),
    Case(name="kept files (640 px)", view=TILED, side_px=640),
    Case(name="kept, no overview", view=TILED, side_px=640, overview="resized"),
    Case(name="kept, 1280 px, no overview", view=LARGE, side_px=1280, overview="resized"),
    Case(name="12 MP to 336, reduced", view=ImageView(), side_px=4000, decode="reduced"),
)


class Timing(NamedTuple):
    """Seconds of each round of one function, float64 [rounds]."""

    wall: np.ndarray
    cpu: np.ndarray
    """Processor time, children included: what a row costs, whoever else uses the machine."""


def main() -> None:
    print(f"{machine()}\n")
    with tempfile.TemporaryDirectory() as folder:
        one_core(Path(folder))
        whole_job(Path(folder))


def machine() -> str:
    """Describes what the numbers were measured on, without naming the host."""
    names = ("torch", "pillow", "numpy", "simplejpeg", "tokenizers")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names]
    cores = f"{os.cpu_count()} cores {platform.machine()}"
    return ", ".join([cores, f"Python {platform.python_version()}", *versions])


def row(name: str, *cells: str) -> None:
    """Prints one row of a table."""
    print(f"{name:<26}" + "".join(f"{cell:>11}" for cell in cells), flush=True)


def paired(
    functions: Mapping[str, Callable[[], object]], *, rounds: int, warm: bool = True
) -> dict[str, Timing]:
    """Times functions in turn, so that a busy moment of the machine meets all of them alike.

    Divide the rounds of two functions before taking a median.
    """
    readings: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for i in range(-1 if warm else 0, rounds):
        for name in list(functions)[:: 1 if i % 2 else -1]:
            wall, cpu = time.perf_counter(), cpu_seconds()
            functions[name]()
            if i >= 0:
                readings[name].append((time.perf_counter() - wall, cpu_seconds() - cpu))
    return {name: Timing(*np.array(values).T) for name, values in readings.items()}


def cpu_seconds() -> float:
    """Reads the processor time of this process, its threads and its finished children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def build_and_publish(context: BuildContext) -> None:
    publish_shard(context, 0, build_shard(context, 0, lambda _: None), lambda _: None)


def one_core(folder: Path) -> None:
    row("one core", "bare, ms", "job, ms", "images/s", "ratio", "by wall")
    for i, case in enumerate(CASES):
        files = draw(case.side_px)
        settings = write_source(folder / f"core-{i}", files, rows=len(files), case=case)
        job = Job(settings)
        plan = make_plan(job, Silent())
        context = BuildContext(
            preparer=job.preparer,
            dataset=settings.dataset,
            split=settings.split,
            out=settings.out,
            num_shards=plan.num_shards,
            build_key=plan.build_key,
            blobs=job.blobs.url,
            scratch=job.scratch,
        )
        seconds = paired(
            {
                "bare": lambda files=files, case=case: bare(files, case),
                "job": lambda context=context: build_and_publish(context),
            },
            rounds=CORE_ROUNDS,
        )
        # A few rows fall into the validation split; the bare loop takes them all.
        bare_ms = 1e3 * seconds["bare"].cpu / len(files)
        job_ms = 1e3 * seconds["job"].cpu / plan.num_samples
        wall = seconds["bare"].wall / len(files) / (seconds["job"].wall / plan.num_samples)
        row(
            case.name,
            f"{np.median(bare_ms):.2f}",
            f"{np.median(job_ms):.2f}",
            f"{1e3 / np.median(job_ms):.0f}",
            f"{np.median(bare_ms / job_ms):.2f}",
            f"{np.median(wall):.2f}",
        )
    print()


def whole_job(folder: Path) -> None:
    case = CASES[0]
    files = draw(case.side_px)
    settings = write_source(folder / "whole", files, rows=JOB_ROWS, case=case)
    runs: list[tuple[int, Stages]] = []

    def job(num_workers: int) -> None:
        name = f"{settings.out}-{len(runs)}"
        stages = Stages()
        run_job(replace(settings, out=name, cache=f"{name}-cache", num_workers=num_workers), stages)
        runs.append((num_workers, stages))

    seconds = paired(
        {"bare": lambda: bare(files, case), "1": lambda: job(1), "2": lambda: job(2)},
        rounds=JOB_ROUNDS,
        warm=False,
    )
    bare_s = seconds["bare"].cpu / len(files)
    rows = runs[0][1].rows
    row(f"whole job, {rows} rows", "plan, s", "build, s", "images/s", "ratio", "to one")
    alone = None
    for num_workers in (1, 2):
        wall, cpu = seconds[str(num_workers)]
        plan = np.array([stages.build_at for n, stages in runs if n == num_workers])
        build = np.array([stages.built_at for n, stages in runs if n == num_workers]) - plan
        alone = build if alone is None else alone
        row(
            f"{num_workers} worker{'s'[: num_workers - 1]}",
            f"{np.median(plan):.1f}",
            f"{np.median(build):.1f}",
            f"{rows / np.median(wall):.0f}",
            f"{np.median(bare_s * rows / cpu):.2f}",
            f"{np.median(alone / build):.2f}",
        )


def bare(files: list[bytes], case: Case) -> None:
    """Decodes, resizes and encodes; a picture that has its stored size already is only decoded."""
    view = case.view
    for payload in files:
        pixels = decode_stored(payload, codec="jpeg")
        size = (pixels.shape[1], pixels.shape[0])
        wanted = {stored_size(*size, [view])} - {size}
        if view.crop_mode != "resize" and case.overview == "stored":
            wanted.add(overview_size(*size, view))
        image = Image.fromarray(pixels) if wanted else None
        for each in wanted:
            resized = np.asarray(image.resize(each, Image.Resampling.LANCZOS))
            encode_stored(resized, codec="jpeg", quality=95)


def draw(side_px: int) -> list[bytes]:
    """Draws scenes whose longer side is exactly `side_px`, as JPEG files."""
    files = []
    for i in range(PICTURES):
        image = Image.fromarray(make_scene(1, i).pixels)
        scale = side_px / max(image.size)
        if scale != 1.0:
            image = image.resize((round(image.width * scale), round(image.height * scale)))
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=92)
        files.append(stream.getvalue())
    return files


def write_source(folder: Path, files: list[bytes], *, rows: int, case: Case) -> JobSettings:
    """Writes rows of PixMo-Cap as Parquet and names the job that builds them as one shard each."""
    import pyarrow
    import pyarrow.parquet

    table: list[dict[str, Any]] = []
    for i in range(rows):
        scene = make_scene(1, i % len(files), max_side_px=128)
        table.append(
            {
                "image": {"bytes": files[i % len(files)], "path": None},
                "caption": f"Picture {i}. {scene.caption}",
                "transcripts": list(scene.transcripts),
            }
        )
    source = folder / "source"
    source.mkdir(parents=True)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(table), source / "train-00000-of-00001.parquet", row_group_size=64
    )
    return JobSettings(
        dataset="pixmo_cap",
        out=str(folder / "out"),
        source=str(source),
        cache=str(folder / "cache"),
        recipe=Recipe(
            image=ImagePolicy(views=(case.view,), decode=case.decode, overview=case.overview)
        ),
        num_shards=max(1, rows // PICTURES),
    )


class Silent:
    """A reporter that says nothing."""

    def stage(self, name: str, total: int | None) -> None:
        """Ignores it."""

    def step(self, reason: str) -> None:
        """Ignores it."""

    def note(self, text: str) -> None:
        """Ignores it."""


class Stages(Silent):
    """A reporter that notes when the building starts and ends, in seconds from its creation."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.build_at = self.built_at = 0.0
        self.rows = 0

    def stage(self, name: str, total: int | None) -> None:
        """Notes the start of the building."""
        if name == "build":
            self.build_at, self.rows = time.perf_counter() - self.start, total or 0

    def step(self, reason: str) -> None:  # noqa: ARG002
        """Notes the last row so far."""
        self.built_at = time.perf_counter() - self.start


if __name__ == "__main__":
    argparse.ArgumentParser().parse_args()  # it has none
    main()
