"""Downloads: URLs to a content-addressed cache, with a ledger of every result.

Decides which hosts may be contacted, how often to retry, and what counts as a usable image. Never
decides which rows become samples.
"""

from preprocess.fetch.blobs import BlobCache, FetchResult, Ledger, read_ledger, redact
from preprocess.fetch.download import FetchPolicy, fetch_all

__all__ = [
    "BlobCache",
    "FetchPolicy",
    "FetchResult",
    "Ledger",
    "fetch_all",
    "read_ledger",
    "redact",
]
