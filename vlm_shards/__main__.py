"""The command line of what needs both halves: `python -m vlm_shards features`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping

from preprocess.__main__ import made_by_make, run_program
from preprocess.cli import Console, add_settings, others_text, read_settings
from preprocess.job import OthersMissing
from shardspec.errors import redacted
from shardspec.messages import counted
from vlm_shards.features import FeatureSettings, make_features, plan_features


def main(argv: list[str] | None = None) -> int:
    """Runs a verb and returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    parser, verbs = command_line()
    return run_program(
        lambda console: _features(parser.parse_args(made_by_make(arguments, verbs)), console)
    )


def command_line() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """Makes the parser of the program, and those of its verbs by name."""
    parser = argparse.ArgumentParser(
        prog="python -m vlm_shards", description="What needs shards and a model."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")
    features = verbs.add_parser(
        "features", help="store what a frozen vision backbone makes of a dataset's pictures"
    )
    add_settings(features, FeatureSettings, verb="features", groups=("the job",))
    return parser, {"features": features}


def _features(options: argparse.Namespace, console: Console) -> int:
    settings = read_settings(FeatureSettings, options)
    plan = plan_features(settings, console)
    done = make_features(plan, console)
    if isinstance(done, OthersMissing):
        console.show(others_text(settings.out, done))
        return 0
    made = plan.features
    shape = ", ".join(map(str, made.row_shape))
    lines = [f"{redacted(settings.out)}: {made.dtype} [{shape}] for each row of a picture"]
    for split in plan.splits:
        entry = done.manifest.splits[split]
        lines.append(
            f"{split} has {counted(entry.num_samples, 'sample')}, "
            f"{counted(entry.num_images, 'picture')}, {counted(entry.num_bytes, 'byte')}"
        )
    lines.append(f"backbone {made.fingerprint}")
    lines.append(f"manifest sha256 {done.sha256}")
    if not done.fresh:
        lines.append("nothing to do: the dataset is already complete")
    console.show("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
