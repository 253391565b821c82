"""Setting: what people read about a field of a settings dataclass, and how they spell it.

A setting is written once, as a field with a type, a default and a `Setting`:

    num_variants: Annotated[int, Setting("baked variants per response", flag="variants")] = 8

The flag `--variants`, its type, its line of `--help` and the variable of `make shards VARIANTS=8`
follow from it (`preprocess.cli.options`, `preprocess.cli.make`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Setting:
    """What the command line needs to know of a field besides its type and its default."""

    help: str
    """What it means, with the unit: one clause in lower case, without the default."""
    _: KW_ONLY
    flag: str = ""
    """Its name on the command line, without dashes in front; "" for the field's own."""
    positional: bool = False
    """Whether it is an argument without a flag."""
    group: str = ""
    """Heading under which `--help` lists it."""
    verbs: tuple[str, ...] = ()
    """The verbs that have it; () for every verb of the dataclass."""
    metavar: str = ""
    """Placeholder of the value in `--help`; "" for one that follows from the type."""
    parse: Callable[[str], Any] | None = None
    """Reads the text of the command line; None where the type says how."""
    shown: str = ""
    """The default as people write it, where that is not `str` of it."""
    unset: Callable[[], Any] | None = None
    """Gives the value where the flag is missing, if it is not the field's default."""


def usable_cores() -> int:
    """Counts the processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


def usable_memory() -> int:
    """Returns the bytes of memory that this machine, or the container around the process, has."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no control group of version 2, or "max": no limit
        return min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return machine
