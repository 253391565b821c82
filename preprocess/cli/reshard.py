"""The verbs reshard, merge, split and filter."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from preprocess.cli.options import add_settings, read_settings
from preprocess.cli.unused import RESHARD_NEEDS, require_used, unused_notes
from preprocess.cli.verbs import Console, Verb, others_text
from preprocess.job import OthersMissing
from preprocess.reshard import (
    ReaderCluster,
    Resharded,
    ReshardPlan,
    ReshardSettings,
    plan_reshard,
    reshard_part,
)
from preprocess.settings import Setting
from preprocess.sizes import size_text
from shardspec.errors import ConfigError, redacted
from shardspec.messages import counted

_GROUPS = ("what to make", "how", "the job")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReshardFlags:
    """Flags that are not a field of `ReshardSettings`.

    Readers that deal out whole shards want the same number each: their cluster gives the number.
    """

    nodes: Annotated[
        int | None,
        Setting(
            "machines of a cluster: a number of shards that all its readers can share equally",
            group="what to make",
        ),
    ] = None
    ranks: Annotated[int | None, Setting("likewise, ranks per node", group="what to make")] = None
    workers: Annotated[int | None, Setting("likewise, workers per rank", group="what to make")] = (
        None
    )
    dry_run: Annotated[bool, Setting("print the plan and stop", group="how")] = False

    @property
    def cluster(self) -> ReaderCluster | None:
        """The cluster, if any of its sizes is given."""
        sizes = (self.nodes, self.ranks, self.workers)
        if all(size is None for size in sizes):
            return None
        nodes, ranks, workers = (1 if size is None else size for size in sizes)
        return ReaderCluster(nodes=nodes, ranks=ranks, workers=workers)


def add_reshard(verb: str, parser: argparse.ArgumentParser) -> None:
    """Adds the flags of one of the four verbs."""
    if verb == "merge":
        parser.add_argument("src", nargs="+", help="folders or URLs of the datasets, in order")
    else:
        parser.add_argument("src", nargs=1, help="folder or URL of the dataset")
    parser.add_argument("dst", help="folder or URL of the new dataset")
    add_settings(parser, ReshardSettings, ReshardFlags, verb=verb, groups=_GROUPS)
    form = parser.add_argument_group("view or copy").add_mutually_exclusive_group()
    text = "only name runs of samples in the old files (default, if there are few runs)"
    form.add_argument("--view", dest="form", action="store_const", const="view", help=text)
    text = "write new files"
    form.add_argument("--copy", dest="form", action="store_const", const="copy", help=text)
    parser.set_defaults(form="auto")


def reshard_settings(options: argparse.Namespace) -> ReshardSettings:
    """Reads the flags of any of the four verbs.

    Raises:
      ConfigError: A value is out of range.
    """
    flags = read_settings(ReshardFlags, options)
    given = {
        "sources": tuple(options.src),
        "out": options.dst,
        "form": options.form,
        "cluster": flags.cluster,
    }
    settings = read_settings(ReshardSettings, options, {ReshardSettings: given})
    if options.verb == "filter" and not settings.where and settings.keys is None:
        raise ConfigError("reshard_settings.condition")
    if options.verb == "split" and settings.into is None:
        raise ConfigError("reshard_settings.into")
    require_used(RESHARD_NEEDS, (flags, settings), form=settings.form)
    return settings


def _reshard(options: argparse.Namespace, console: Console) -> int:
    settings = reshard_settings(options)
    plan = plan_reshard(settings, console)
    if plan.view and settings.form == "auto":
        for note in unused_notes(RESHARD_NEEDS, (settings,), form="view"):
            console.note(note)
    console.show(plan_text(plan))
    if not options.dry_run:
        outcome = reshard_part(plan, console)
        if isinstance(outcome, OthersMissing):
            console.show(others_text(plan.settings.out, outcome))
        else:
            console.show(outcome_text(plan, outcome))
    return 0


def plan_text(plan: ReshardPlan) -> str:
    """Describes a plan for people."""
    rows: list[tuple[str, str]] = [("source", redacted(source.url)) for source in plan.sources]
    rows.append(("output", redacted(plan.settings.out)))
    for split in plan.splits:
        counts = f"{counted(len(split.numbers), 'sample')}, {size_text(split.num_bytes)}"
        rows.append((f"split {split.split}", counts))
        if split.num_left_out:
            rows.append(("  left out", f"{split.num_left_out:,}"))
        rows.append(("  shards", f"{split.num_shards} ({split.count.rule})"))
    if plan.num_unknown_keys:
        of = len(plan.settings.keys or ())
        rows.append(("keys", f"{plan.num_unknown_keys:,} of {counted(of, 'key')} without a sample"))
    rows.append(("order", plan.settings.order))
    rows.append(("runs of samples", f"{plan.num_runs:,}"))
    if plan.view:
        rows.append(("form", f"view: {plan.advice.why if plan.advice.view else 'as requested'}"))
    else:
        why = "as requested" if plan.advice.view else plan.advice.why
        rows.append(("form", f"copy: {why}"))
    same = plan.settings.order == "keep" and len(plan.sources) == 1 and plan.settings.into is None
    if same and not any(split.num_left_out for split in plan.splits):
        rows.append(("note", "our loader's order never depends on shards: training on other "))
        rows.append(("", "numbers of nodes, ranks or workers needs no reshard at all"))
    return "\n".join(f"{name:<20} {value}" for name, value in rows)


def outcome_text(plan: ReshardPlan, outcome: Resharded) -> str:
    """Describes the result of a reshard."""
    lines = []
    out = redacted(plan.settings.out)
    for name, split in outcome.manifest.splits.items():
        shards = outcome.manifest.select(name)
        lines.append(
            f"{out}: {name} has {counted(split.num_samples, 'sample')} in "
            f"{counted(len(shards), 'shard')}, {size_text(split.num_bytes)}, "
            f"{counted(split.num_tokens, 'token')}"
        )
    lines.append(f"manifest sha256 {outcome.sha256}")
    if not outcome.fresh:
        lines.append("nothing to do: the dataset is already complete")
    return "\n".join(lines)


_HELP = {
    "reshard": "write the same samples into other shards",
    "merge": "join datasets of one recipe into one",
    "split": "assign the samples of a split to new splits, by key",
    "filter": "keep some samples of a dataset",
}

VERBS = tuple(
    Verb(name=name, help=text, add=partial(add_reshard, name), run=_reshard)
    for name, text in _HELP.items()
)
