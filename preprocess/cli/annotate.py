"""The verb annotate."""

from __future__ import annotations

import argparse

from preprocess.annotate import AnnotateSettings, annotate, plan_annotation
from preprocess.cli.options import add_settings, read_settings
from preprocess.cli.verbs import Console, Verb
from shardspec.errors import redacted
from shardspec.messages import counted


def _annotate(options: argparse.Namespace, console: Console) -> int:
    settings = read_settings(AnnotateSettings, options)
    annotation = plan_annotation(settings, console)
    done = annotate(annotation, console)
    out = redacted(settings.out)
    assert done.manifest.columns is not None
    lines = []
    for split, joined in annotation.joined.items():
        count = done.manifest.splits[split].num_samples
        lines.append(f"{out}: {split} has {counted(count, 'sample')}")
        lines += [
            f"  {name}: {samples:,} missing, stated as {settings.missing[name]!r}"
            for name, samples in joined.filled.items()
        ]
    types = done.manifest.columns.types
    lines.append("columns: " + ", ".join(f"{name} {types[name]}" for name in sorted(types)))
    unknown = next(iter(annotation.joined.values())).num_unknown
    if unknown:
        lines.append(f"{counted(unknown, 'row')} of {redacted(settings.columns)} without a sample")
    lines.append(f"manifest sha256 {done.sha256}")
    if not done.fresh:
        lines.append("nothing to do: the dataset is already complete")
    console.show("\n".join(lines))
    return 0


VERBS = (
    Verb(
        name="annotate",
        help="add columns to the samples of a dataset, by key, as a view",
        add=lambda parser: add_settings(parser, AnnotateSettings),
        run=_annotate,
    ),
)
