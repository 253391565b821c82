"""Downloads: URLs to a content-addressed cache, with a ledger of every result.

Decides which hosts may be contacted, how often to retry, and what counts as a usable image. Never
decides which rows become samples.
"""

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
from preprocess.fetch.download import fetch_all, image_fault
from preprocess.fetch.hosts import host_key, host_of
from preprocess.fetch.placeholders import mark_placeholders
from preprocess.fetch.policy import FetchPolicy

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
