"""The texts of all errors: `errors.toml`, one entry per code.

    [reason]                  or [reason.variant], where one reason has several texts
    error = "ConfigError"     the class that call sites raise
    what = "..."              what is wrong; may name facts of the call site as {name}
    fix = "..."               the next command or setting to try, likewise; absent where none helps

Call sites pass the code and the facts (`shardspec.errors`). Entries are parsed when the first error
is made, which takes 20 ms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Formatter

from shardspec.toml import parse_toml

TABLE = Path(__file__).with_name("errors.toml")
_TEXT = TABLE.read_bytes()
"""Read with this module, which takes 0.1 ms: an error may be that there is no descriptor left."""


def counted(number: int, noun: str) -> str:
    """Writes a number with its noun, whose plural ends in s.

    >>> counted(1, "sample"), counted(1_024, "sample")
    ('1 sample', '1,024 samples')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """The texts of one code, with the facts that they name still in braces."""

    what: str
    fix: str = ""
    error: str = "ShardsError"
    """Name of the class that carries it."""

    @property
    def fields(self) -> frozenset[str]:
        """Names of the facts in the texts."""
        parsed = [*Formatter().parse(self.what), *Formatter().parse(self.fix)]
        return frozenset(name for _, name, _, _ in parsed if name)

    def filled(self, facts: Mapping[str, object]) -> Message:
        """Inserts the facts. A missing fact keeps its braces, rather than to hide the error that is
        being made."""
        return Message(what=_fill(self.what, facts), fix=_fill(self.fix, facts), error=self.error)


@cache
def messages() -> dict[str, Message]:
    """Reads the table.

    Returns:
      The messages by code.
    """
    found = {}
    for reason, entry in parse_toml(_TEXT).items():
        if "what" in entry:
            found[reason] = Message(**entry)
        else:
            found |= {f"{reason}.{variant}": Message(**texts) for variant, texts in entry.items()}
    return found


def _fill(text: str, facts: Mapping[str, object]) -> str:
    try:
        return text.format_map(facts)
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError):
        return text
