"""The command line of the offline half: `python -m preprocess <verb>`."""

from __future__ import annotations

import argparse
import logging
import math
import os
import signal
import sys
import time
from collections import Counter
from typing import Any, NoReturn, get_args

from tqdm import tqdm

from preprocess.cli import add_verbs, outcome_text, plan_text, reshard_settings
from preprocess.datasets import dataset_names
from preprocess.exchange import ExportFormat, ImportSettings, export_index, import_tars
from preprocess.fetch import FetchPolicy
from preprocess.job import (
    DryRun,
    JobSettings,
    Outcome,
    dry_run,
    find_strays,
    output_lock,
    remove_strays,
    run_job,
    verify,
)
from preprocess.media import ImagePolicy
from preprocess.recipe import Recipe
from preprocess.reshard import plan_reshard, reshard
from preprocess.sizes import parse_age_s, parse_bytes, size_text
from preprocess.text import (
    EMBEDDED,
    ChoiceForm,
    MessageFormat,
    PointFormat,
    PromptTemplates,
    SystemPrompt,
    TextPolicy,
)
from shardspec import storage
from shardspec.errors import ConfigError, ShardsError, redacted
from shardspec.tiling import ImageView

INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM, as shells have it (128 + SIGINT)."""

_EPILOG = """
examples:
  python -m preprocess shards pixmo_cap --source sample --limit 64
  python -m preprocess shards pixmo_cap --source /data/pixmo-cap --out s3://bucket/pixmo_cap
  python -m preprocess plan pixmo_cap --source hub
  python -m preprocess verify shards/pixmo_cap --deep
  python -m preprocess gc s3://bucket/pixmo_cap --dry-run
  python -m preprocess reshard shards/pixmo_cap shards/by_16 --nodes 16 --ranks 8 --workers 4 --copy
  python -m preprocess import /data/laion --out shards/laion --name laion
  python -m preprocess filter shards/pixmo_cap shards/short --where "num_tokens < 1024"

exit codes:
  0 done (or nothing to do)      1 the request cannot be honoured
  2 too many failures            3 the output holds the result of another job
  4 stored data is damaged     130 interrupted: the same command goes on
"""


class TqdmReporter:
    """Shows a job's stages as progress bars on standard error."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._reasons: Counter[str] = Counter()
        self._sent_bytes = 0

    def stage(self, name: str, total: int | None) -> None:
        """Begins a bar."""
        self.close()
        self._reasons.clear()
        self._sent_bytes = 0
        self._bar = tqdm(total=total, desc=name, unit="row", smoothing=0.05, dynamic_ncols=True)

    def step(self, reason: str) -> None:
        """Moves the bar; failures are counted behind it, the most frequent first."""
        if self._bar is None:
            return
        if reason:
            self._reasons[reason] += 1
            self._tell()
        self._bar.update()

    def sent(self, num_bytes: int) -> None:
        """Tells behind the bar how much has gone to an object store."""
        self._sent_bytes += num_bytes
        self._tell()

    def _tell(self) -> None:
        if self._bar is None:
            return
        told = []
        if self._sent_bytes:
            told.append(f"sent {size_text(self._sent_bytes)}")
        if self._reasons:
            top = " ".join(f"{name}={n}" for name, n in self._reasons.most_common(3))
            told.append(f"failed: {top}")
        self._bar.set_postfix_str(", ".join(told), refresh=bool(self._sent_bytes))

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def main(argv: list[str] | None = None) -> int:
    """Runs a verb and returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    options = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    report = TqdmReporter()
    try:
        code: int = options.run(options, report)
    except ShardsError as error:
        report.close()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        report.close()
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return INTERRUPTED
    finally:
        report.close()
    return code


def _interrupt(number: int, frame: object) -> NoReturn:  # noqa: ARG001
    raise KeyboardInterrupt


def _shards(options: argparse.Namespace, report: TqdmReporter) -> int:
    settings = _settings(options)
    outcome = run_job(settings, report)
    report.close()
    print(_summary(settings, outcome))
    return 0


def _plan(options: argparse.Namespace, report: TqdmReporter) -> int:
    settings = _settings(options)
    survey = dry_run(settings, report)
    report.close()
    print(_survey_table(settings, survey))
    return 0


def _verify(options: argparse.Namespace, report: TqdmReporter) -> int:
    findings = verify(options.out, report, deep=options.deep)
    report.close()
    for error in findings:
        print(f"error: {error}", file=sys.stderr)
    if findings:
        return findings[0].exit_code
    print(f"{redacted(options.out)}: every shard is what the manifest promises")
    return 0


def _gc(options: argparse.Namespace, report: TqdmReporter) -> int:  # noqa: ARG001
    before = None
    if options.older_than is not None:
        before = time.time() - parse_age_s(options.older_than)
    if not storage.exists(options.out):
        find_strays(options.out)  # says so; to hold the output would make it
    with output_lock(options.out):
        strays = find_strays(options.out, written_before_unix_s=before)
        for each in strays.objects:
            print(f"{size_text(each.num_bytes):>10}  {each.name}")
        for upload in strays.uploads:
            print(f"{'upload':>10}  {upload.name}")
        if not options.dry_run:
            remove_strays(options.out, strays)
    objects, uploads = len(strays.objects), len(strays.uploads)
    verbs = ("would remove", "abort") if options.dry_run else ("removed", "aborted")
    print(
        f"{redacted(options.out)}: {verbs[0]} {objects} objects ({size_text(strays.num_bytes)}), "
        f"{verbs[1]} {uploads} unfinished uploads"
    )
    if options.out.startswith("gs://"):
        print("unfinished uploads to Google Cloud Storage end by themselves after a week")
    return 0


def _datasets(options: argparse.Namespace, report: TqdmReporter) -> int:  # noqa: ARG001
    print("\n".join(dataset_names()))
    return 0


def _reshard(options: argparse.Namespace, report: TqdmReporter) -> int:
    plan = plan_reshard(reshard_settings(options), report)
    report.close()
    print(plan_text(plan), flush=True)
    if options.dry_run:
        return 0
    outcome = reshard(plan, report)
    report.close()
    print(outcome_text(plan, outcome))
    return 0


def _import(options: argparse.Namespace, report: TqdmReporter) -> int:
    settings = ImportSettings(
        tars=tuple(options.tars),
        out=options.out,
        name=options.name,
        split=options.split,
        num_workers=options.jobs or len(os.sched_getaffinity(0)),
    )
    imported = import_tars(settings, report)
    report.close()
    split = imported.manifest.splits[settings.split]
    lines = [
        f"{redacted(settings.out)}: {split.num_samples:,} samples in "
        f"{len(imported.manifest.shards)} tars, "
        f"{size_text(split.num_bytes)}",
        f"manifest sha256 {imported.sha256}",
    ]
    lines += [f"{n:,} files passed over: {reason}" for reason, n in imported.skipped.items()]
    if imported.repeated is not None:
        lines.append(f"several samples have the key {imported.repeated}: do not filter by keys")
    print("\n".join(lines))
    return 0


def _export_index(options: argparse.Namespace, report: TqdmReporter) -> int:
    written = export_index(options.dataset, options.format, report)
    report.close()
    beside = f"an index beside each shard of {options.dataset}"
    print(redacted("\n".join(written) or beside))
    return 0


def _summary(settings: JobSettings, outcome: Outcome) -> str:
    split, shards = outcome.result.split, outcome.result.manifest.select(settings.split)
    lines = [
        f"{redacted(settings.out)}: {split.num_samples:,} samples in {len(shards)} shards, "
        f"{size_text(split.num_bytes)}, {split.num_tokens:,} tokens",
        f"manifest sha256 {outcome.result.sha256}",
    ]
    lost = sum(split.quarantined.values())
    if lost:
        reasons = ", ".join(f"{name} {n}" for name, n in split.quarantined.items())
        lines.append(f"{lost} rows left out ({reasons}); see {redacted(settings.out)}/quarantine")
    if not outcome.fresh:
        lines.append("nothing to do: all of it was here already")
    return "\n".join(lines)


def _survey_table(settings: JobSettings, survey: DryRun) -> str:
    rows: list[tuple[str, object]] = [
        ("dataset", f"{settings.dataset}, split {settings.split}, source {settings.source}"),
        ("output", redacted(settings.out)),
        ("rows", f"{survey.num_rows:,}"),
        ("image URLs", f"{survey.num_urls:,}"),
    ]
    rows += [(f"  {state}", f"{n:,}") for state, n in survey.urls_known.items()]
    if survey.mean_sample_bytes is None or survey.shards is None:
        rows.append(("estimate", "none: no image is at hand before FETCH has run"))
    else:
        total = survey.mean_sample_bytes * survey.num_rows
        rows += [
            ("bytes per sample", size_text(survey.mean_sample_bytes)),
            ("  of them variants", size_text(survey.mean_variant_bytes or 0)),
            ("tokens per sample", f"{survey.mean_tokens:.0f}"),
            ("shards", f"{survey.shards.num_shards} ({survey.shards.rule})"),
            ("total", size_text(total)),
        ]
    if survey.free_bytes is not None:
        rows.append(("free at the output", size_text(survey.free_bytes)))
    return "\n".join(f"{name:<20} {value}" for name, value in rows)


def _settings(options: argparse.Namespace) -> JobSettings:
    bound = options.image_bound
    views = [_view(options, options.crops)]
    if options.high_res_crops:
        views.append(_view(options, options.high_res_crops))
    headroom, max_side = 1.0, None
    if bound.startswith("canvas"):
        headroom = _number(bound.removeprefix("canvas").removeprefix("*") or "1", "--image-bound")
    else:
        max_side = int(_number(bound, "--image-bound"))
    image = ImagePolicy(
        views=tuple(views),
        headroom=headroom,
        max_side_px=max_side,
        codec=options.codec,
        quality=options.quality,
        keep=options.keep,
    )
    text = TextPolicy(
        prompt_templates=options.prompts,
        system_prompt=options.system_prompt,
        message_format=options.message_format,
        num_variants=options.variants,
        point_format=options.point_format,
        choices=options.choices,
        paraphrase=options.paraphrase,
    )
    return JobSettings(
        dataset=options.dataset,
        out=options.out or f"shards/{options.dataset}",
        source=options.source,
        split=options.split,
        mode=options.mode,
        limit=options.limit,
        tokenizer=options.tokenizer,
        pad_to=options.pad_vocab,
        recipe=Recipe(text=text, image=image, seed=options.seed),
        shard_bytes=parse_bytes(options.shard_size),
        num_shards=options.num_shards,
        num_workers=options.workers or len(os.sched_getaffinity(0)),
        cache=options.cache,
        fetch=FetchPolicy(
            allow_hosts=frozenset(options.allow_hosts.split(",")) - {""},
            user_agent=options.user_agent,
            read_timeout_s=options.read_timeout,
            wall_timeout_s=options.wall_timeout,
            attempts=options.attempts,
        ),
        max_dead_links=options.max_dead_links,
        max_bad_samples=options.max_bad_samples,
    )


def _view(options: argparse.Namespace, crops: int) -> ImageView:
    """Makes the view of one resolution: a single crop, or an overview and so many tiles."""
    sizes = {"size_px": options.image_size, "patch_px": options.patch_size}
    if not crops:
        return ImageView(**sizes, fit=options.image_fit)
    return ImageView(
        **sizes, fit=options.image_fit, crop_mode="overlap-and-resize-c2", max_crops=crops
    )


def _number(text: str, flag: str) -> float:
    try:
        number = float(text)
        if not math.isfinite(number):
            raise ValueError
        return number
    except ValueError as error:
        raise ConfigError("number_text", flag=flag, got=text) from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # 1, not argparse's 2: that one means a spent error budget here.
        self.print_usage(sys.stderr)
        self.exit(1, f"error: {message}\n  fix:   see `python -m preprocess --help`\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m preprocess",
        description="Prepare a vision-language dataset into tar shards, ready to stream.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb", parser_class=_Parser)
    shards = verbs.add_parser(
        "shards", help="build the shards of a dataset, or finish an interrupted job"
    )
    _add_job_flags(shards)
    shards.set_defaults(run=_shards)
    plan = verbs.add_parser("plan", help="print what `shards` would do; writes nothing")
    _add_job_flags(plan)
    plan.set_defaults(run=_plan)
    check = verbs.add_parser("verify", help="compare every stored byte with the manifest")
    check.add_argument("out", help="URL or folder of the dataset")
    check.add_argument("--deep", action="store_true", help="decode every image as well")
    check.set_defaults(run=_verify)
    sweep = verbs.add_parser("gc", help="remove what interrupted jobs have left behind")
    sweep.add_argument("out", help="URL or folder of the dataset")
    sweep.add_argument("--dry-run", action="store_true", help="only list it")
    sweep.add_argument("--older-than", metavar="AGE", help="pass over what is younger, e.g. 24h")
    sweep.set_defaults(run=_gc)
    for verb in add_verbs(verbs):
        verb.set_defaults(run=_reshard)
    foreign = verbs.add_parser(
        "import", help="index WebDataset tars where they lie, to stream them"
    )
    foreign.add_argument("tars", help="tars, or folders of them; URLs too", nargs="+")
    foreign.add_argument("--out", required=True, help="folder or URL for manifest and indexes")
    foreign.add_argument("--name", required=True, help="name of the dataset")
    foreign.add_argument("--split", default="train", help="split (default: %(default)s)")
    foreign.add_argument("--jobs", type=int, help="processes; all cores when not given")
    foreign.set_defaults(run=_import)
    export = verbs.add_parser("export-index", help="write the index files of other readers")
    export.add_argument("dataset", help="URL or folder of the dataset")
    text = "whose: wids, Megatron-Energon or NVIDIA DALI"
    export.add_argument("--format", required=True, choices=get_args(ExportFormat), help=text)
    export.set_defaults(run=_export_index)
    names = verbs.add_parser("datasets", help="list the datasets")
    names.set_defaults(run=_datasets)
    return parser


def _add_job_flags(parser: argparse.ArgumentParser) -> None:
    def add(group: Any, flag: str, text: str, **settings: Any) -> None:
        default = " (default: %(default)s)" if settings.get("default") not in (None, "") else ""
        group.add_argument(flag, help=text + default, **settings)

    parser.add_argument("dataset", help="name of the dataset; the verb `datasets` lists them")
    data = parser.add_argument_group("what to build")
    add(data, "--source", "hub, sample (generated, no network) or a local folder", default="hub")
    add(data, "--split", "split to build", default="train")
    add(data, "--mode", "what a row becomes, e.g. captions or transcript_and_caption")
    add(data, "--limit", "rows to use, from the first on", type=int)
    add(data, "--out", "folder or URL; shards/DATASET when not given")
    add(data, "--seed", "seed of the baked draws and of the stored order", type=int, default=0)

    text = parser.add_argument_group("text")
    add(text, "--tokenizer", "hub id, folder with tokenizer.json, or embedded", default=EMBEDDED)
    add(text, "--pad-vocab", "rows of the model's embedding: image symbols start there", type=int)
    policy = TextPolicy()
    for flag, what, kind, default in (
        ("--message-format", "markup around turns", MessageFormat, policy.message_format),
        ("--prompts", "prompt templates", PromptTemplates, policy.prompt_templates),
        ("--system-prompt", "style and length prefix", SystemPrompt, policy.system_prompt),
        ("--point-format", "how points are written", PointFormat, policy.point_format),
        ("--choices", "how multiple choices are asked", ChoiceForm, policy.choices),
    ):
        add(text, flag, what, choices=get_args(kind), default=default)
    add(
        text,
        "--paraphrase",
        "share of variants with a paraphrased user text",
        type=float,
        default=0.0,
    )
    add(text, "--variants", "baked variants per response", type=int, default=8)

    image = parser.add_argument_group("images")
    add(image, "--image-size", "side of the model's input in pixels", type=int, default=336)
    add(image, "--patch-size", "side of a vision patch in pixels", type=int, default=14)
    crops = "most high-resolution tiles beside the overview; 0 for a single crop"
    add(image, "--crops", crops, type=int, default=0)
    add(image, "--high-res-crops", "tiles of a second resolution, drawn when training", type=int)
    choices = ["stretch", "pad", "center-crop"]
    add(image, "--image-fit", "how the image meets it", choices=choices, default="stretch")
    bound = "stored size: canvas, canvas*1.5 (head room to crop), or the longest side in px"
    add(image, "--image-bound", bound, default="canvas")
    choices = ["jpeg", "png", "webp", "raw"]
    add(image, "--codec", "how images are stored", choices=choices, default="jpeg")
    add(image, "--quality", "JPEG quality; chroma is always 4:4:4", type=int, default=95)
    keep = "keep original bytes where nothing needs to change"
    add(image, "--keep", keep, choices=["auto", "never"], default="auto")

    job = parser.add_argument_group("the job")
    add(job, "--workers", "processes; all cores when not given", type=int)
    add(job, "--shard-size", "wanted length of a shard", default="256MiB")
    add(job, "--num-shards", "exact number of shards instead", type=int)
    add(job, "--cache", "folder of downloaded images", default="~/.cache/vlm-shards")
    add(job, "--max-dead-links", "share of image URLs that may fail", type=float, default=0.4)
    add(job, "--max-bad-samples", "share of samples that may fail", type=float, default=0.01)

    fetch = parser.add_argument_group("downloading images")
    agent = "name yourself and a contact when fetching from public hosts"
    add(fetch, "--user-agent", agent, default="vlm-shards")
    add(fetch, "--allow-hosts", "hosts that may have private addresses, by commas", default="")
    add(fetch, "--read-timeout", "longest silence of a server, s", type=float, default=15.0)
    add(fetch, "--wall-timeout", "longest download of one image, s", type=float, default=60.0)
    add(fetch, "--attempts", "most attempts at one image in one run", type=int, default=4)


if __name__ == "__main__":
    sys.exit(main())
