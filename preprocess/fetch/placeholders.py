"""Placeholders: the one picture that a host gives for all that are gone. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from preprocess.fetch.blobs import FetchResult


def mark_placeholders(
    results: Mapping[str, FetchResult], *, num_urls: int
) -> tuple[Mapping[str, FetchResult], dict[str, list[str]]]:
    """Takes contents that many URLs give for placeholders.

    Args:
      results: How each URL has ended.
      num_urls: From this many different URLs on; 0 for never.

    Returns:
      The results, with those of placeholders failed as "placeholder"; and, by the sha256 of each
      placeholder, its URLs in order.
    """
    urls: dict[str, set[str]] = {}
    for result in results.values():
        if num_urls and result.status == "ok" and result.sha256:
            urls.setdefault(result.sha256, set()).add(result.url)
    found = {sha256: sorted(each) for sha256, each in urls.items() if len(each) >= num_urls}
    if not found:
        return results, {}
    marked = {
        url: replace(result, status="failed", reason="placeholder")
        if result.status == "ok" and result.sha256 in found
        else result
        for url, result in results.items()
    }
    return marked, found
