"""What a verb of `python -m preprocess` is: its flags, and what it does with them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from preprocess.job import Part, Reporter
from shardspec.errors import redacted
from shardspec.messages import counted


class Console(Reporter, Protocol):
    """Where a verb writes: progress while it works, then its results."""

    def show(self, text: str) -> None:
        """Prints a result on standard output."""

    def fail(self, error: object) -> None:
        """Prints an error on standard error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """One verb of the command line."""

    name: str
    help: str
    """What it does, in one clause."""
    add: Callable[[argparse.ArgumentParser], None]
    """Adds its flags to its parser."""
    run: Callable[[argparse.Namespace, Console], int]
    """Does the work and returns the exit code."""


def default_output(dataset: str) -> str:
    """Names the output of a dataset for which no other is given."""
    return f"shards/{dataset}"


class OthersMissing(Protocol):
    """A part whose own shards are done, while others are not."""

    @property
    def part(self) -> Part:
        """Which."""

    @property
    def num_shards(self) -> int:
        """Shards of this part."""

    @property
    def missing_shards(self) -> int:
        """Shards of other parts."""


def others_text(out: str, outcome: OthersMissing) -> str:
    """Describes how such a part has ended."""
    built = counted(outcome.num_shards, "shard")
    return (
        f"{redacted(out)}: part {outcome.part} has built {built}, all of its own; "
        f"{outcome.missing_shards} of other parts are missing, and whoever builds the last of them "
        "commits"
    )
