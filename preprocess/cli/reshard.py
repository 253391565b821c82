"""The verbs reshard, merge, split and filter: their flags, and what they say to people."""

from __future__ import annotations

import argparse
import os
from typing import Any, get_args

from preprocess.reshard import (
    Cluster,
    Order,
    Resharded,
    ReshardPlan,
    ReshardSettings,
    Through,
    parse_shares,
)
from preprocess.sizes import parse_bytes, size_text
from shardspec import storage
from shardspec.errors import ConfigError, redacted


def add_verbs(verbs: Any) -> list[argparse.ArgumentParser]:
    """Adds the four verbs to a command line."""
    reshard = verbs.add_parser("reshard", help="cut a dataset anew: other shards, same samples")
    reshard.add_argument("source", help="URL or folder of the dataset", nargs=1)
    merge = verbs.add_parser("merge", help="join datasets of one recipe into one")
    merge.add_argument("source", help="URLs or folders of the datasets, in order", nargs="+")
    split = verbs.add_parser("split", help="deal the samples of a split to new splits, by key")
    split.add_argument("source", help="URL or folder of the dataset", nargs=1)
    filtered = verbs.add_parser("filter", help="keep some samples of a dataset")
    filtered.add_argument("source", help="URL or folder of the dataset", nargs=1)
    split.add_argument(
        "--into", required=True, help="the new splits' shares, such as train=0.95,validation=0.05"
    )
    split.add_argument("--salt", default="", help="another text deals the samples anew")
    condition = 'condition on index columns, such as "num_tokens < 2048 and width >= 336"'
    filtered.add_argument("--where", default="", help=condition)
    filtered.add_argument("--keys", help="file or URL with the keys to keep, one a line")
    merge.add_argument("--name", help="name of the result, where the sources' names differ")
    made = [reshard, merge, split, filtered]
    for verb in made:
        verb.add_argument("out", help="URL or folder of the new dataset")
        _add_flags(verb)
        verb.set_defaults(**{"into": None, "salt": "", "where": "", "keys": None, "name": None})
    return made


def _add_flags(verb: argparse.ArgumentParser) -> None:
    what = verb.add_argument_group("what to make")
    what.add_argument("--split", help="only this split; all of them when not given")
    what.add_argument("--shards", type=int, help="exact number of shards of each split")
    what.add_argument("--shard-size", default="256MiB", help="wanted length (default: %(default)s)")
    for flag, of in (("nodes", "machines"), ("ranks", "per node"), ("workers", "per rank")):
        text = f"{of}: as many shards for every reader of a cluster that deals out whole shards"
        what.add_argument(f"--{flag}", type=int, help=text)
    orders = get_args(Order)
    text = "the old order, a shuffle by --seed, or short samples first (default: %(default)s)"
    what.add_argument("--order", choices=orders, default="keep", help=text)
    what.add_argument("--seed", type=int, default=0, help="of a shuffle (default: %(default)s)")
    how = verb.add_argument_group("how")
    form = how.add_mutually_exclusive_group()
    text = "name runs of the old files, move nothing (default where that suffices)"
    form.add_argument("--view", dest="form", action="store_const", const="view", help=text)
    text = "make files of their own"
    form.add_argument("--copy", dest="form", action="store_const", const="copy", help=text)
    text = (
        "client: bytes pass here and every sample is checked; store: no sample is checked, and the "
        "file system or the object store copies what it can by itself; auto: the store's way "
        "between objects (default: %(default)s)"
    )
    how.add_argument("--through", choices=get_args(Through), default="auto", help=text)
    text = "hash the new shards as a whole too (slower; samples are always checksummed)"
    how.add_argument("--sha256", action="store_true", help=text)
    how.add_argument("--jobs", type=int, help="processes that copy; all cores when not given")
    how.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    verb.set_defaults(form="auto")


def reshard_settings(options: argparse.Namespace) -> ReshardSettings:
    """Reads the flags of any of the verbs.

    Raises:
      ConfigError: A value is out of range.
    """
    for name in ("shards", "jobs"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError("reshard_settings.least", name=name, got=value)
    shard_bytes = parse_bytes(options.shard_size)
    if shard_bytes < 1:
        raise ConfigError("reshard_settings.shard_size", got=options.shard_size)
    sizes = (options.nodes, options.ranks, options.workers)
    cluster = None
    if any(size is not None for size in sizes):
        nodes, ranks, workers = (1 if size is None else size for size in sizes)
        cluster = Cluster(nodes=nodes, ranks=ranks, workers=workers)
    if options.verb == "filter" and not options.where and options.keys is None:
        raise ConfigError("reshard_settings.condition")
    if options.sha256 and options.through == "store":
        raise ConfigError("reshard_settings.sha256")
    return ReshardSettings(
        sources=tuple(options.source),
        out=options.out,
        split=options.split,
        name=options.name,
        num_shards=options.shards,
        cluster=cluster,
        shard_bytes=shard_bytes,
        order=options.order,
        seed=options.seed,
        where=options.where,
        keys=None if options.keys is None else _read_keys(options.keys),
        into=None if options.into is None else parse_shares(options.into),
        salt=options.salt,
        form=options.form,
        through=options.through,
        sha256=options.sha256,
        num_workers=options.jobs or len(os.sched_getaffinity(0)),
    )


def _read_keys(url: str) -> frozenset[str]:
    try:
        text = storage.read_bytes(url).decode()
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise ConfigError("keys_file", where=url, error=error) from error
    return frozenset(line.removesuffix("\r") for line in text.split("\n")) - {""}


def plan_text(plan: ReshardPlan) -> str:
    """Describes a plan for people."""
    rows: list[tuple[str, str]] = [("source", redacted(source.url)) for source in plan.sources]
    rows.append(("output", redacted(plan.settings.out)))
    for split in plan.splits:
        counts = f"{len(split.numbers):,} samples, {size_text(split.num_bytes)}"
        rows.append((f"split {split.split}", counts))
        if split.num_left_out:
            rows.append(("  left out", f"{split.num_left_out:,}"))
        rows.append(("  shards", f"{split.num_shards} ({split.count.rule})"))
    if plan.num_unknown_keys:
        of = len(plan.settings.keys or ())
        rows.append(("keys", f"{plan.num_unknown_keys:,} of {of:,} keys belong to no sample"))
    rows.append(("order", plan.settings.order))
    rows.append(("runs of samples", f"{plan.num_runs:,}"))
    if plan.view:
        rows.append(("form", f"view: {plan.advice.why if plan.advice.view else 'as asked for'}"))
    else:
        why = "as asked for" if plan.advice.view else plan.advice.why
        rows.append(("form", f"copy: {why}"))
    same = plan.settings.order == "keep" and len(plan.sources) == 1 and plan.settings.into is None
    if same and not any(split.num_left_out for split in plan.splits):
        rows.append(("note", "our loader's order never depends on shards: training on other "))
        rows.append(("", "numbers of nodes, ranks or workers needs no reshard at all"))
    return "\n".join(f"{name:<20} {value}" for name, value in rows)


def outcome_text(plan: ReshardPlan, outcome: Resharded) -> str:
    """Says how a reshard ended."""
    lines = []
    out = redacted(plan.settings.out)
    for name, split in outcome.manifest.splits.items():
        shards = outcome.manifest.select(name)
        lines.append(
            f"{out}: {name} has {split.num_samples:,} samples in {len(shards)} "
            f"shards, {size_text(split.num_bytes)}, {split.num_tokens:,} tokens"
        )
    lines.append(f"manifest sha256 {outcome.sha256}")
    if not outcome.fresh:
        lines.append("nothing to do: all of it was here already")
    return "\n".join(lines)
