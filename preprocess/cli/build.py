"""The verbs that build datasets: shards, plan, commit and datasets."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

from preprocess.cli.config import add_config
from preprocess.cli.options import add_settings, read_settings
from preprocess.cli.unused import DATASET_NEEDS, JOB_NEEDS, require_used, unused_notes
from preprocess.cli.verbs import Console, Verb, default_output, others_text
from preprocess.datasets import dataset_class, dataset_names
from preprocess.job import (
    Downloads,
    DryRun,
    JobSettings,
    Outcome,
    commit_job,
    count_rows,
    dry_run,
    retry_job,
    run_job,
    run_part,
)
from preprocess.media import ImagePolicy
from preprocess.settings import Setting
from preprocess.sizes import age_text, size_text
from shardspec.errors import ConfigError, redacted
from shardspec.messages import counted
from shardspec.tiling import Fit, ImageView, SmallSides

_GROUPS = ("what to build", "text", "images", "videos", "the job", "downloading images")
_STANDARD = ImageView()
_FLAGS = {
    "size_px": "--image-size",
    "margin_patches": "--image-size",
    "patch_px": "--patch-size",
    "max_crops": "--crops",
    "fit": "--image-fit",
}
"""By fields of a view: the flags that they follow from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewSettings:
    """The model's input as a few numbers, from which views and stored size follow."""

    image_size: Annotated[
        int, Setting("side of the model's input, or of a tile, in pixels", group="images")
    ] = _STANDARD.size_px
    patch_size: Annotated[int, Setting("side of a vision patch in pixels", group="images")] = (
        _STANDARD.patch_px
    )
    crops: Annotated[
        int,
        Setting(
            "maximum number of high-resolution tiles beside the overview; 0 for a single crop",
            group="images",
        ),
    ] = 0
    high_res_crops: Annotated[
        int | None,
        Setting("the same of a second resolution; training draws one of the two", group="images"),
    ] = None
    image_fit: Annotated[
        Fit, Setting("how an image is fitted to the model's input", group="images")
    ] = _STANDARD.fit
    small_sides: Annotated[
        SmallSides,
        Setting("whose tiles images with a side inside the margins get", group="images"),
    ] = _STANDARD.small_sides
    image_bound: Annotated[
        str,
        Setting(
            "stored size: canvas, canvas*1.5 (head room for random crops), or the longest side in "
            "pixels",
            group="images",
        ),
    ] = "canvas"

    @property
    def views(self) -> tuple[ImageView, ...]:
        """The views of one or two resolutions."""
        numbers = [self.crops, *([self.high_res_crops] if self.high_res_crops else [])]
        return tuple(self._view(crops) for crops in numbers)

    @property
    def headroom(self) -> float:
        """The factor on the canvas."""
        text = self.image_bound
        if not text.startswith("canvas"):
            return 1.0
        return _number(text.removeprefix("canvas").removeprefix("*") or "1", "--image-bound")

    @property
    def max_side_px(self) -> int | None:
        """The longest side, where that is given instead of a canvas."""
        if self.image_bound.startswith("canvas"):
            return None
        return int(_number(self.image_bound, "--image-bound"))

    def _view(self, crops: int) -> ImageView:
        """Makes the view of one resolution: a single crop, or an overview and tiles."""
        try:
            single = ImageView(
                size_px=self.image_size, patch_px=self.patch_size, fit=self.image_fit
            )
            if not crops:
                return single
            return replace(
                single,
                crop_mode="overlap-and-resize-c2",
                max_crops=crops,
                small_sides=self.small_sides,
            )
        except ConfigError as error:
            name, want = str(error.facts.get("name")), str(error.facts.get("want"))
            if name == "size_px":
                want = f"a multiple of --patch-size {self.patch_size}, 1 or more"
            if name == "margin_patches":
                least = (sum(_STANDARD.margin_patches) + 1) * self.patch_size
                want = f"{least} or more with tiles, or --crops 0"
            if name not in _FLAGS:
                raise
            flag = _FLAGS[name]
            if name == "max_crops":
                flag = flag if crops == self.crops else "--high-res-crops"
                want = "0 or more"
            if name == "fit":
                want = "another than center-crop with tiles, or --crops 0"
            raise ConfigError("image_view.setting", where=flag, name=flag, want=want) from error


def _number(text: str, flag: str) -> float:
    try:
        number = float(text)
        if not math.isfinite(number):
            raise ValueError
        return number
    except ValueError as error:
        raise ConfigError("number_text", flag=flag, got=text) from error


def _add_job(verb: str, parser: argparse.ArgumentParser) -> None:
    add_settings(parser, ViewSettings, JobSettings, verb=verb, groups=_GROUPS)
    add_config(parser)


def job_settings(options: argparse.Namespace, console: Console | None = None) -> JobSettings:
    """Reads the flags of a job.

    Args:
      options: What the verb's parser read.
      console: Told which settings change nothing for this dataset.

    Raises:
      ConfigError: A value is out of range, or changes nothing.
    """
    views = read_settings(ViewSettings, options)
    image = {
        "views": views.views,
        "headroom": views.headroom,
        "max_side_px": views.max_side_px,
    }
    out = options.out or default_output(options.name or dataset_class(options.dataset).name)
    settings = read_settings(JobSettings, options, {JobSettings: {"out": out}, ImagePolicy: image})
    require_used(JOB_NEEDS, (views, settings))
    if console is not None:
        for note in unused_notes(DATASET_NEEDS, (views, settings)):
            console.note(note)
    return settings


def _shards(options: argparse.Namespace, console: Console) -> int:
    settings = job_settings(options, console)
    if settings.part is None:
        console.show(_outcome_text(settings, run_job(settings, console)))
        return 0
    part = run_part(settings, console)
    if part.result is None:
        console.show(others_text(settings.out, part))
    else:
        done = Outcome(
            result=part.result, built_shards=part.built_shards, fresh=part.fresh, seconds=0.0
        )
        console.show(_outcome_text(settings, done))
    return 0


def _retry(options: argparse.Namespace, console: Console) -> int:
    settings = job_settings(options, console)
    done = retry_job(settings, console)
    if done.outcome is not None:
        console.show(_outcome_text(settings, done.outcome))
    console.show(f"{done.recovered:,} of {done.failed:,} missing images have come")
    return 0


def _commit(options: argparse.Namespace, console: Console) -> int:
    settings = job_settings(options, console)
    console.show(_outcome_text(settings, commit_job(settings, console)))
    return 0


def _plan(options: argparse.Namespace, console: Console) -> int:
    settings = job_settings(options, console)
    console.show(_dry_run_text(settings, dry_run(settings, console)))
    return 0


def _datasets(options: argparse.Namespace, console: Console) -> int:  # noqa: ARG001
    console.show("\n".join(dataset_names(offered=True)))
    return 0


def _outcome_text(settings: JobSettings, outcome: Outcome) -> str:
    split, shards = outcome.result.split, outcome.result.manifest.select(settings.split)
    lines = [
        f"{redacted(settings.out)}: {counted(split.num_samples, 'sample')} in "
        f"{counted(len(shards), 'shard')}, {size_text(split.num_bytes)}, "
        f"{counted(split.num_tokens, 'token')}",
        f"manifest sha256 {outcome.result.sha256}",
        *_row_lines(settings, outcome),
    ]
    if not outcome.fresh:
        compared = outcome.compared
        files = ""
        if compared:
            files = f"{counted(compared.num_files, 'file')} of the source {compared.how}"
        what = ["the settings", *([files] if files else [])]
        lines.append(
            f"nothing to do: the dataset is already complete (compared: {', '.join(what)})"
        )
    return "\n".join(lines)


def _row_lines(settings: JobSettings, outcome: Outcome) -> list[str]:
    """Accounts for every row that was read; the numbers add up."""
    manifest = outcome.result.manifest
    counts = count_rows(outcome.result.split)
    rows: list[tuple[str, object]] = [
        ("rows read", f"{counts.read:,}"),
        ("  in samples", f"{counts.in_samples:,}"),
    ]
    if counts.other_split:
        rows.append(("  in another split", f"{counts.other_split:,} (by a hash of the image)"))
    if counts.beyond_limit:
        rows.append(("  beyond LIMIT", f"{counts.beyond_limit:,}"))
    if counts.left_out:
        reasons = ", ".join(f"{name} {n:,}" for name, n in counts.left_out.items())
        total = sum(counts.left_out.values())
        where = f"{redacted(settings.out)}/quarantine"
        rows.append(("  left out", f"{total:,} ({reasons}); see {where}"))
    sizes = ", ".join(f"{name} {entry.num_samples:,}" for name, entry in manifest.splits.items())
    rows.append(("samples by split", sizes))
    return [f"{name:<20} {value}" for name, value in rows]


def _dry_run_text(settings: JobSettings, found: DryRun) -> str:
    rows: list[tuple[str, object]] = [
        ("dataset", f"{settings.dataset}, split {settings.split}, source {settings.source}"),
        ("output", redacted(settings.out)),
        ("rows", f"{found.num_rows:,}"),
        ("image URLs", f"{found.num_urls:,}"),
    ]
    rows += [("source", note) for note in found.notes]
    rows += [(f"  {state}", f"{n:,}") for state, n in found.urls_known.items()]
    if found.downloads is not None:
        rows += _download_lines(settings, found.downloads)
    if found.mean_sample_bytes is None or found.shards is None:
        rows.append(("estimate", "none: no image is available before FETCH has run"))
    else:
        total, core_s = found.mean_sample_bytes * found.num_alive, found.build_core_s or 0.0
        workers = settings.num_workers
        rows += [
            ("bytes per sample", size_text(found.mean_sample_bytes)),
            ("  of them variants", size_text(found.mean_variant_bytes or 0)),
            ("tokens per sample", f"{found.mean_tokens:.0f}"),
            ("shards", f"{found.shards.num_shards} ({found.shards.rule})"),
            ("total", size_text(total)),
            ("build", f"{age_text(core_s)} of one core, {age_text(core_s / workers)} of {workers}"),
            ("objects written", f"{_OBJECTS * found.shards.num_shards:,}, a quarter for a while"),
        ]
    if found.free_bytes is not None:
        rows.append(("free at the output", size_text(found.free_bytes)))
    return "\n".join(f"{name:<20} {value}" for name, value in rows)


_OBJECTS = 4
"""For each shard: its tar, its index, its receipt, and until the commit its planned rows."""


def _download_lines(settings: JobSettings, found: Downloads) -> list[tuple[str, object]]:
    rate = settings.fetch.host_rate
    size = "unknown, as none is there" if found.num_bytes is None else size_text(found.num_bytes)
    return [
        ("downloads", f"{found.num_urls:,} of {counted(found.num_hosts, 'host')}; bytes: {size}"),
        (
            "  at least",
            f"{age_text(found.least_s)}: {found.busiest_urls:,} of {found.busiest_host}"
            + (f", {rate:g} in a second" if rate else ""),
        ),
    ]


VERBS = (
    Verb(
        name="shards",
        help="build the shards of a dataset, or resume an interrupted job",
        add=partial(_add_job, "shards"),
        run=_shards,
    ),
    Verb(
        name="retry",
        help="download what failed for a passing reason, and build again if something came",
        add=partial(_add_job, "retry"),
        run=_retry,
    ),
    Verb(
        name="plan",
        help="print what `shards` would do; writes nothing",
        add=partial(_add_job, "plan"),
        run=_plan,
    ),
    Verb(
        name="commit",
        help="complete a dataset whose shards are all built, as the last part of a job does",
        add=partial(_add_job, "commit"),
        run=_commit,
    ),
    Verb(name="datasets", help="list the datasets", add=lambda _: None, run=_datasets),
)
