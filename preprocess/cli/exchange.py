"""The verbs for datasets of other tools: import and export-index."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Annotated

from preprocess.cli.options import add_settings, read_settings
from preprocess.cli.verbs import Console, Verb
from preprocess.exchange import ExportFormat, ImportSettings, export_index, import_tars
from preprocess.settings import Setting
from preprocess.sizes import size_text
from shardspec.errors import redacted
from shardspec.messages import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSettings:
    """Which index files to write."""

    out: Annotated[str, Setting("folder or URL of the dataset", positional=True)]
    format: Annotated[ExportFormat, Setting("the reader: wids, Megatron-Energon or NVIDIA DALI")]


def _import(options: argparse.Namespace, console: Console) -> int:
    settings = read_settings(ImportSettings, options)
    imported = import_tars(settings, console)
    split = imported.manifest.splits[settings.split]
    lines = [
        f"{redacted(settings.out)}: {counted(split.num_samples, 'sample')} in "
        f"{counted(len(imported.manifest.shards), 'tar')}, "
        f"{size_text(split.num_bytes)}",
        f"manifest sha256 {imported.sha256}",
    ]
    lines += [f"{counted(n, 'file')} skipped: {reason}" for reason, n in imported.skipped.items()]
    if imported.repeated is not None:
        lines.append(f"several samples have the key {imported.repeated}: do not filter by keys")
    lines += [f"note: {redacted(note)}" for note in imported.notes]
    console.show("\n".join(lines))
    return 0


def _export_index(options: argparse.Namespace, console: Console) -> int:
    settings = read_settings(ExportSettings, options)
    written = export_index(settings.out, settings.format, console)
    console.show(redacted("\n".join(written) or f"an index beside each shard of {settings.out}"))
    return 0


def _add_import(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, ImportSettings, groups=("the job",))


VERBS = (
    Verb(
        name="import",
        help="index WebDataset tars in place, to stream them",
        add=_add_import,
        run=_import,
    ),
    Verb(
        name="export-index",
        help="write the index files of other readers",
        add=lambda parser: add_settings(parser, ExportSettings),
        run=_export_index,
    ),
)
