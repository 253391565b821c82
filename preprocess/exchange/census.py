"""What the samples of a foreign tar have in common, and which of them differ.

Nothing of it is an error: a tar is imported as webdataset reads it. But three things are more often
mistakes than meant, so each is counted and named:

1. *Scattered*: the files of a key are not adjacent, so each run of them is a sample of its own.
2. *Dotted*: a name has further dots, and what follows the first one is hardly the name of a field:
   it begins with a digit and does not number the files through, or few samples have it.
3. *Lacking*: a sample has not all the fields that at least half of the samples have.

A census is kept for each tar, in plain JSON types, so that an interrupted import knows it too.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardspec.foreign import Dots

_MOST_FIELDS = 8
"""Fields of which a report says how many samples lack them."""


@dataclass(slots=True)
class Census:
    """The samples of one tar, as they are found."""

    _kinds: dict[tuple[str, ...], list[str]] = field(default_factory=lambda: defaultdict(list))
    """Fields of a sample, sorted, to the keys of the samples with these."""
    _runs: Counter[str] = field(default_factory=Counter)
    """Key to the number of samples with it."""

    def add(self, key: str, fields: Iterable[str]) -> None:
        """Counts a sample."""
        self._kinds[tuple(sorted(fields))].append(key)
        self._runs[key] += 1

    def to_dict(self, *, dots: Dots) -> dict[str, Any]:
        """Describes the tar in plain JSON types.

        Of the samples of the most frequent kind the keys are left out, except the first one.
        """
        most = max(self._kinds, key=lambda kind: len(self._kinds[kind]), default=())
        kinds = [
            {
                "fields": list(kind),
                "num_samples": len(keys),
                "keys": keys[:1] if kind == most else keys,
            }
            for kind, keys in sorted(self._kinds.items(), key=lambda item: -len(item[1]))
        ]
        dotted = self._dotted() if dots == "first" else {}
        return {
            "kinds": kinds,
            "scattered": [key for key, runs in self._runs.items() if runs > 1],
            "dotted": [{"key": key, "fields": found} for key, found in dotted.items()],
        }

    def _dotted(self) -> dict[str, list[str]]:
        num_samples = self._runs.total()
        counts: Counter[str] = Counter()
        for kind, keys in self._kinds.items():
            counts.update(dict.fromkeys(kind, len(keys)))
        found: dict[str, list[str]] = {}
        for kind, keys in self._kinds.items():
            odd = [
                name
                for name in kind
                if "." in name
                and (2 * counts[name] < num_samples or name[0].isdigit())
                and not _is_numbered(name, kind)
            ]
            if odd:
                found.update(dict.fromkeys(keys, odd))
        return found


def _is_numbered(name: str, kind: Sequence[str]) -> bool:
    """Returns True for one of the fields 0.jpg, 1.jpg, 2.jpg of a sample.

    >>> _is_numbered("1.jpg", ["0.jpg", "1.jpg"]), _is_numbered("06.png", ["05.png", "06.png"])
    (True, False)
    """
    front, _, rest = name.partition(".")
    fronts = {each.partition(".")[0] for each in kind if each.partition(".")[2] == rest}
    return front in fronts and fronts == {str(i) for i in range(len(fronts))}


def describe(censuses: Mapping[str, Mapping[str, Any]], *, folder: str) -> list[str]:
    """Says in sentences what is notable about the tars of an import.

    Args:
      censuses: By the name of the tar.
      folder: Where people find the whole.
    """
    lines = [*_scattered(censuses), *_dotted(censuses), *_lacking(censuses)]
    return [*lines, f"all of these are named in {folder}"] if lines else []


def _scattered(censuses: Mapping[str, Mapping[str, Any]]) -> list[str]:
    found = [(tar, key) for tar, each in censuses.items() for key in each["scattered"]]
    if not found:
        return []
    return [
        f"{len(found):,} keys come again in the same tar, after other samples: each time they are "
        f"a sample of their own, with part of the fields; first {found[0][1]} in {found[0][0]}"
    ]


def _dotted(censuses: Mapping[str, Mapping[str, Any]]) -> list[str]:
    found = [(tar, each) for tar, census in censuses.items() for each in census["dotted"]]
    if not found:
        return []
    tar, first = found[0]
    names = " and ".join(f"{first['key']}.{name}" for name in first["fields"][:2])
    return [
        f"{len(found):,} samples have files with several dots in their names, of which the first "
        f"ends the key; first {names} in {tar}. DOTS=last lets the last dot end it"
    ]


def _lacking(censuses: Mapping[str, Mapping[str, Any]]) -> list[str]:
    counts: Counter[str] = Counter()
    num_samples = 0
    for census in censuses.values():
        for kind in census["kinds"]:
            counts.update(dict.fromkeys(kind["fields"], kind["num_samples"]))
            num_samples += kind["num_samples"]
    common = [name for name, n in counts.items() if num_samples <= 2 * n < 2 * num_samples]
    rare = [name for name, n in counts.items() if 2 * n < num_samples]
    lines = []
    for name in sorted(common)[:_MOST_FIELDS]:
        tar, key = next(
            (tar, kind["keys"][0])
            for tar, census in censuses.items()
            for kind in census["kinds"]
            if name not in kind["fields"]
        )
        missing = num_samples - counts[name]
        lines.append(
            f"{missing:,} of {num_samples:,} samples lack the field {name}; first {key} in {tar}"
        )
    if len(common) > _MOST_FIELDS:
        lines.append(f"{len(common) - _MOST_FIELDS:,} further fields are lacking in some samples")
    if rare:
        shown = ", ".join(f"{name} ({counts[name]:,})" for name in sorted(rare)[:_MOST_FIELDS])
        more = ", ..." if len(rare) > _MOST_FIELDS else ""
        lines.append(f"fewer than half of the samples have the fields {shown}{more}")
    return lines
