"""What became of every row that a job has read; the numbers add up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shardspec.manifest import SplitEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCounts:
    """Rows of a source: `read` is the sum of all others."""

    read: int
    in_samples: int
    """Rows that samples are made of: several make one where the dataset groups them."""
    other_split: int
    """Rows whose image a hash puts into another split."""
    beyond_limit: int
    """Rows of examples that LIMIT does not want."""
    left_out: Mapping[str, int]
    """Rows that cannot become samples, by reason."""


def count_rows(split: SplitEntry) -> RowCounts:
    """Reads the counts of a split that `make shards` has built from its entry in the manifest."""
    read = int(split.source.get("rows_read", 0))
    not_taken = split.source.get("rows_not_taken", {})
    other, beyond = (int(not_taken.get(why, 0)) for why in ("other_split", "beyond_limit"))
    lost = sum(split.quarantined.values())
    return RowCounts(
        read=read,
        in_samples=read - other - beyond - lost,
        other_split=other,
        beyond_limit=beyond,
        left_out=dict(split.quarantined),
    )
