"""Placeholders: the one picture that a host gives for all that are gone. Pure.

Contents are counted by sorting 16 bytes of each one's hash, which is all that is held of a URL.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from preprocess.fetch.ledger import FetchResult

_CONTENT = np.dtype("S16")
_SIDES: tuple[Literal["left", "right"], ...] = ("left", "right")


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What the results of all downloads have in common."""

    results: Mapping[str, FetchResult]
    """The results, with those of placeholders failed as "placeholder"."""
    num_urls: int
    """URLs that were looked at."""
    failed: Counter[str]
    """Of these the failed ones, by reason."""
    placeholders: Mapping[str, tuple[int, str]]
    """By the sha256 of each placeholder: how many URLs give it, and the first of them."""
    num_shared: int
    """Other contents that several URLs give."""
    num_sharing: int
    """URLs that give these."""


def survey_results(
    results: Mapping[str, FetchResult], *, num_urls: int, ignored: Container[str] | None = None
) -> Survey:
    """Counts failures and contents; takes contents that many URLs give for placeholders.

    Args:
      results: How each URL has ended.
      num_urls: From this many different URLs on, a content is a placeholder; 0 for never.
      ignored: URLs that are not looked at, and whose results stay.
    """
    failed: Counter[str] = Counter()
    packed, num_looked = bytearray(), 0
    for result in _each(results, ignored):
        num_looked += 1
        if result.status != "ok":
            failed[result.reason] += 1
        elif result.sha256:
            packed += bytes.fromhex(result.sha256)[: _CONTENT.itemsize]
    contents = np.frombuffer(packed, _CONTENT) if packed else np.zeros(0, _CONTENT)
    contents.sort()  # in place: `packed` is nobody else's
    before = np.zeros(len(contents) + 1, np.bool_)
    """Whether the one before is the same."""
    before[1:-1] = contents[1:] == contents[:-1]
    num_shared = int((before[1:] & ~before[:-1]).sum())
    num_sharing = int((before[1:] | before[:-1]).sum())
    survey = Survey(
        results=results,
        num_urls=num_looked,
        failed=failed,
        placeholders={},
        num_shared=num_shared,
        num_sharing=num_sharing,
    )
    found = _counts(contents, at_least=num_urls) if num_urls else {}
    if not found:
        return survey
    firsts: dict[str, str] = {}
    for result in _each(results, ignored):
        if (
            result.status == "ok"
            and bytes.fromhex(result.sha256 or "")[: _CONTENT.itemsize] in found
        ):
            sha256 = str(result.sha256)
            firsts[sha256] = min(result.url, firsts.get(sha256, result.url))
    placeholders = {
        sha256: (found[bytes.fromhex(sha256)[: _CONTENT.itemsize]], url)
        for sha256, url in firsts.items()
    }
    numbers = [number for number, _ in placeholders.values()]
    return replace(
        survey,
        results=_Marked(results, placeholders, ignored or ()),
        failed=failed + Counter(placeholder=sum(numbers)),
        placeholders=placeholders,
        num_shared=num_shared - sum(number > 1 for number in numbers),
        num_sharing=num_sharing - sum(number for number in numbers if number > 1),
    )


class _Marked(Mapping[str, FetchResult]):
    """Results, with those of placeholders failed."""

    def __init__(
        self,
        results: Mapping[str, FetchResult],
        placeholders: Container[str],
        ignored: Container[str],
    ) -> None:
        self._results, self._placeholders, self._ignored = results, placeholders, ignored

    def __len__(self) -> int:
        return len(self._results)

    def __iter__(self) -> Iterator[str]:
        return iter(self._results)

    def __getitem__(self, url: str) -> FetchResult:
        result = self._results[url]
        is_one = result.status == "ok" and result.sha256 in self._placeholders
        if not is_one or url in self._ignored:
            return result
        return replace(result, status="failed", reason="placeholder")


def _counts(contents: np.ndarray, *, at_least: int) -> dict[bytes, int]:
    """Counts how often a content is in a sorted list, of those that are there that often."""
    last = at_least - 1
    found = contents[: max(0, len(contents) - last)]
    found = np.unique(found[found == contents[last:]])
    first, stop = (contents.searchsorted(found, side) for side in _SIDES)
    # As an item, an array gives its bytes without zeros at the end.
    keys = (found[i : i + 1].tobytes() for i in range(len(found)))
    return dict(zip(keys, (stop - first).tolist(), strict=True))


def _each(
    results: Mapping[str, FetchResult], ignored: Container[str] | None
) -> Iterator[FetchResult]:
    if ignored is None:
        return iter(results.values())
    return (result for url, result in results.items() if url not in ignored)
