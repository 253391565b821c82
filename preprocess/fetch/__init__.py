"""Downloads: URLs to a content-addressed cache, with a ledger of every result.

Decides which hosts may be contacted, how often to retry, and what counts as a usable image. Never
decides which rows become samples.
"""

from typing import TYPE_CHECKING, Any

from preprocess.fetch.blobs import (
    LOCAL_CACHE,
    BlobCache,
    FetchResult,
    Ledger,
    decode_results,
    encode_results,
    read_ledger,
    redact,
)
from preprocess.fetch.hosts import host_key, host_of
from preprocess.fetch.placeholders import mark_placeholders
from preprocess.fetch.policy import FetchPolicy

if TYPE_CHECKING:
    from preprocess.fetch.download import fetch_all, image_fault

__all__ = [
    "LOCAL_CACHE",
    "BlobCache",
    "FetchPolicy",
    "FetchResult",
    "Ledger",
    "decode_results",
    "encode_results",
    "fetch_all",
    "host_key",
    "host_of",
    "image_fault",
    "mark_placeholders",
    "read_ledger",
    "redact",
]


def __getattr__(name: str) -> Any:
    # The HTTP client takes as long to import as all of ours: only who downloads waits for it.
    if name in ("fetch_all", "image_fault"):
        from preprocess.fetch import download

        return getattr(download, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
