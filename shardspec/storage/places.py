"""Which places a manifest may send a reader to: what the user has named, and no host beyond that.

A view's manifest names files by URL. Whoever wrote it would otherwise choose the hosts that every
process of a training run talks to, inside of a private network too. So a file is read only

* where the dataset itself is: below it, or elsewhere on the same host, store or disk,
* in a store whose address the user's own configuration says (S3, Google Cloud Storage, the hub and
  named stores: the manifest chooses a bucket there, never a host), or on a local disk,
* on a host that VLM_SHARDS_HOSTS names.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from shardspec.errors import ConfigError, StorageError
from shardspec.storage import files
from shardspec.storage.stores import HOSTS_VARIABLE, allowed_hosts, named_stores

_CONFIGURED = frozenset({"file", "s3", "s3a", "gs", "gcs", "hf", "memory"})
"""Schemes whose URLs name no host."""


def resolve_place(base: str, url: str) -> str:
    """Resolves the URL of a file that a manifest names, and refuses hosts that nobody has named.

    Args:
      base: URL of the dataset.
      url: Of the file; relative ones are below the dataset, or beside it.

    Raises:
      StorageError: `foreign_host`.
    """
    resolved = files.resolve(base, url)
    if files.is_local(resolved) or resolved.startswith(f"{base.rstrip('/')}/"):
        return resolved
    scheme, host = _place(resolved)
    # "a::b://..." chains file systems, any of which may name a host.
    is_plain = "::" not in resolved
    is_same = scheme != "" and (scheme, host) == _place(base)
    if is_plain and (
        is_same or scheme in _CONFIGURED or host in allowed_hosts() or _is_named(scheme)
    ):
        return resolved
    name = host or scheme
    raise StorageError(
        "foreign_host", where=base, file=resolved, host=name, variable=HOSTS_VARIABLE
    )


def _place(url: str) -> tuple[str, str]:
    try:
        at = urlsplit(url)
    except ValueError:
        return "", ""
    return at.scheme.lower(), at.netloc.lower()


def _is_named(scheme: str) -> bool:
    try:
        return scheme in named_stores()
    except ConfigError:
        return False  # who opens a store of that name says why
