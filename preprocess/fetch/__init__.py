"""Downloads: URLs to a content-addressed cache, with a ledger of every result.

Decides which hosts may be contacted, how often to retry, and what counts as a usable image. Never
decides which rows become samples.
"""

from typing import TYPE_CHECKING, Any

from preprocess.fetch.blobs import LOCAL_CACHE, BlobCache
from preprocess.fetch.hosts import host_key, host_of
from preprocess.fetch.ledger import (
    FetchResult,
    FetchResults,
    Ledger,
    LedgerReader,
    decode_result,
    encode_result,
    read_ledger,
)
from preprocess.fetch.placeholders import Survey, survey_results
from preprocess.fetch.policy import FetchPolicy
from preprocess.fetch.urls import UrlSpool, redact, unique_urls

if TYPE_CHECKING:
    from preprocess.fetch.download import fetch_all, image_fault

__all__ = [
    "LOCAL_CACHE",
    "BlobCache",
    "FetchPolicy",
    "FetchResult",
    "FetchResults",
    "Ledger",
    "LedgerReader",
    "Survey",
    "UrlSpool",
    "decode_result",
    "encode_result",
    "fetch_all",
    "host_key",
    "host_of",
    "image_fault",
    "read_ledger",
    "redact",
    "survey_results",
    "unique_urls",
]


def __getattr__(name: str) -> Any:
    # The HTTP client takes as long to import as all of ours: only who downloads waits for it.
    if name in ("fetch_all", "image_fault"):
        from preprocess.fetch import download

        return getattr(download, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
