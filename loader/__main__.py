"""The command line of the training half: `python -m loader <verb>`."""

from __future__ import annotations

import argparse
import sys

from loader.cli import VERBS
from shardspec.errors import ConfigError, ShardsError
from shardspec.program import INTERRUPTED, exit_code


def main(argv: list[str] | None = None) -> int:
    """Runs a verb and returns the exit code."""
    return exit_code(lambda: _run(argv))


def _run(argv: list[str] | None) -> int:
    options = _parser().parse_args(argv)
    run = next(verb.run for verb in VERBS if verb.name == options.verb)
    try:
        print(run(options))
    except (ShardsError, MemoryError) as error:
        lack = ConfigError("no_memory.loader", error=str(error))
        failed = error if isinstance(error, ShardsError) else lack
        print(f"error: {failed}", file=sys.stderr)
        return failed.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loader", description="Look at shards the way training sees them."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")
    for verb in VERBS:
        verb.add(verbs.add_parser(verb.name, help=verb.help))
    return parser


if __name__ == "__main__":
    sys.exit(main())
