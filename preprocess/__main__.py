"""The command line of the offline half: `python -m preprocess <verb>`."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NoReturn, TextIO

from tqdm import tqdm

from preprocess.cli import VERBS, make_arguments, with_files
from preprocess.sizes import size_text
from shardspec.errors import ConfigError, ShardsError
from shardspec.program import INTERRUPTED, exit_code

_EPILOG = """
examples:
  python -m preprocess shards pixmo_cap --source sample --limit 64
  python -m preprocess shards pixmo_cap --source /data/pixmo-cap --out s3://bucket/pixmo_cap
  python -m preprocess plan pixmo_cap --source hub
  python -m preprocess verify shards/pixmo_cap --deep
  python -m preprocess report shards/pixmo_cap
  python -m preprocess gc s3://bucket/pixmo_cap --dry-run
  python -m preprocess reshard shards/pixmo_cap shards/by_16 --nodes 16 --ranks 8 --workers 4 --copy
  python -m preprocess import /data/laion --out shards/laion --name laion
  python -m preprocess filter shards/pixmo_cap shards/short --where "num_tokens < 1024"
  python -m preprocess annotate shards/pixmo_cap --columns scores.parquet --dst shards/scored

`make VERB` takes the same settings as variables: IMAGE_SIZE=224 is --image-size 224.

exit codes:
  0 done (or nothing to do)      1 the request cannot be honoured
  2 too many failures            3 the output holds the result of another job
  4 stored data is damaged     130 interrupted: run the same command to resume
141 nobody reads the output any more, as after `| head -1`
  of `status`: 0 complete, 5 all that is left is being done, 6 something is to be started
"""


_PROGRAM = "vlm-shards"
"""Name of the installed program, as pyproject.toml has it."""

_SHELLS = ("bash", "zsh", "tcsh", "fish")

_UNITS = {
    "fetch": "URL",
    "check finished shards": "shard",
    "copy": "shard",
    "verify": "file",
    "read indexes": "file",
    "read headers": "shard",
    "index": "tar",
    "features": "sample",
}
"""What a step of a stage is, by the name of the stage; a row, unless it is named here."""

LOG_INTERVAL_S = 30.0
"""Between two lines of progress where standard error is not a terminal."""


class TerminalConsole:
    """The terminal: progress bars and errors on standard error, results on standard output.

    Where standard error is a file or a pipe, progress is whole lines: one when a stage begins, one
    each `LOG_INTERVAL_S`, and one when it ends.
    """

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._reasons: Counter[str] = Counter()
        self._sent_bytes = 0

    def stage(self, name: str, total: int | None) -> None:
        """Starts a bar."""
        self.close()
        self._reasons.clear()
        self._sent_bytes = 0
        unit = _UNITS.get(name, "row")
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=name, unit=unit, smoothing=0.05, dynamic_ncols=True)
        else:
            self._bar = tqdm(
                total=total,
                desc=name,
                unit=unit,
                smoothing=0.05,
                file=_Lines(sys.stderr),
                mininterval=LOG_INTERVAL_S,
                maxinterval=LOG_INTERVAL_S,
                bar_format="{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, "
                "{rate_fmt}{postfix}]",
            )

    def step(self, reason: str) -> None:
        """Advances the bar; failures are counted after it, the most frequent first."""
        if self._bar is None:
            return
        if reason:
            self._reasons[reason] += 1
            self._update_counts()
        self._bar.update()

    def sent(self, num_bytes: int) -> None:
        """Shows after the bar how much has been uploaded to an object store."""
        self._sent_bytes += num_bytes
        self._update_counts()

    def _update_counts(self) -> None:
        if self._bar is None:
            return
        counts = []
        if self._sent_bytes:
            counts.append(f"sent {size_text(self._sent_bytes)}")
        if self._reasons:
            top = " ".join(f"{name}={n}" for name, n in self._reasons.most_common(3))
            counts.append(f"failed: {top}")
        refresh = bool(self._sent_bytes) and sys.stderr.isatty()
        self._bar.set_postfix_str(", ".join(counts), refresh=refresh)

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        if sys.stderr.isatty():
            tqdm.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def show(self, text: str) -> None:
        """Ends the bar and prints a result."""
        self.close()
        print(text, flush=True)

    def fail(self, error: object) -> None:
        """Ends the bar and prints an error."""
        self.close()
        print(f"error: {error}", file=sys.stderr)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class _Lines:
    """Writes each state of a bar as a line of its own: a log has no carriage returns."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = ""

    def write(self, text: str) -> None:
        line = text.strip()
        if line and line != self._last:
            self._last = line
            self._stream.write(line + "\n")

    def flush(self) -> None:
        self._stream.flush()


def main(argv: list[str] | None = None) -> int:
    """Runs a verb and returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    parser, verbs = command_line()

    def run(console: TerminalConsole) -> int:
        options = parser.parse_args(with_files(made_by_make(arguments, verbs), parser, verbs))
        code: int = options.run(options, console)
        return code

    return run_program(run)


def made_by_make(arguments: list[str], verbs: Mapping[str, argparse.ArgumentParser]) -> list[str]:
    """Turns what the Makefile passes, the target and make's variables, into a verb and flags."""
    return make_arguments(arguments[1:], verbs) if arguments[:1] == ["make"] else arguments


def run_program(run: Callable[[TerminalConsole], int]) -> int:
    """Runs a program in the terminal and returns its exit code; errors and Ctrl-C end it in words.

    Args:
      run: Reads the command line, does what it says, and gives the exit code.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    return exit_code(lambda: _run(run, TerminalConsole()))


def _run(run: Callable[[TerminalConsole], int], console: TerminalConsole) -> int:
    try:
        signal.signal(signal.SIGTERM, _interrupt)
        return run(console)
    except (ShardsError, MemoryError) as error:
        lack = ConfigError("no_memory.job", error=str(error))
        failed = error if isinstance(error, ShardsError) else lack
        console.fail(failed)
        return failed.exit_code
    except KeyboardInterrupt:
        console.close()
        print("interrupted; run the same command to resume", file=sys.stderr)
        return INTERRUPTED
    finally:
        console.close()


def _interrupt(number: int, frame: object) -> NoReturn:  # noqa: ARG001
    raise KeyboardInterrupt


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # 1, not argparse's 2: that one means a spent error budget here.
        self.print_usage(sys.stderr)
        self.exit(1, f"error: {message}\n  fix:   see `python -m preprocess --help`\n")


class _PrintCompletion(argparse.Action):
    """Prints a shell's completion of the installed program, and ends."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        _namespace: argparse.Namespace,
        values: object,
        _option: str | None = None,
    ) -> NoReturn:
        try:
            import shtab
        except ImportError:
            parser.error("completion needs shtab: pip install 'vlm-shards[completion]'")
        parser.prog = _PROGRAM
        print(shtab.complete(parser, shell=str(values)))
        parser.exit()


def command_line() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """Makes the parser of the program, and those of its verbs by name."""
    parser = _Parser(
        prog="python -m preprocess",
        description="Prepare a vision-language dataset into tar shards, ready to stream.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--print-completion", action=_PrintCompletion, choices=_SHELLS, metavar="SHELL",
        help=f"print what lets {', '.join(_SHELLS[:-1])} or {_SHELLS[-1]} complete the verbs and "
        "flags of `vlm-shards`",
    )  # fmt: skip
    group = parser.add_subparsers(dest="verb", required=True, metavar="verb", parser_class=_Parser)
    verbs = {}
    for verb in VERBS:
        verbs[verb.name] = group.add_parser(verb.name, help=verb.help)
        verb.add(verbs[verb.name])
        verbs[verb.name].set_defaults(run=verb.run)
    return parser, verbs


if __name__ == "__main__":
    sys.exit(main())
