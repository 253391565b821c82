"""What a verb of `python -m loader` is: its flags, and the text that it prints."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """One verb of the command line."""

    name: str
    help: str
    """What it does, in one clause."""
    add: Callable[[argparse.ArgumentParser], None]
    """Adds its flags to its parser."""
    run: Callable[[argparse.Namespace], str]
    """Does the work and returns what to print."""


def add_dataset(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of every verb that looks at a dataset."""
    parser.add_argument("shards", help="folder of the dataset")
    add_flag(parser, "--split", "split to read", "train")
    add_flag(parser, "--seed", "seed of the order and of the draws", 0)


def add_flag(parser: argparse.ArgumentParser, flag: str, text: str, default: str | float) -> None:
    """Adds a flag whose default says what type it has."""
    help_text = f"{text} (default: %(default)s)"
    parser.add_argument(flag, help=help_text, default=default, type=type(default))
