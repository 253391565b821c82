"""Which places a manifest may send a reader to: what the user has named, and nothing beyond that.

A view's manifest names files by URL. Whoever wrote it would otherwise choose the hosts that every
process of a training run talks to, inside of a private network too, and the buckets that are read
with its credentials. So a file is read only

* where the dataset itself is: below it, or elsewhere on the same host or in the same bucket,
* on a local disk,
* in a bucket that the entry of a named store lists (`buckets`),
* on a host, or in a bucket or below a prefix (s3://bucket/prefix), that VLM_SHARDS_HOSTS names.

The bucket of the Hugging Face hub is a repository: hf://datasets/owner/name.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from shardspec.errors import ConfigError, StorageError
from shardspec.storage import files
from shardspec.storage.stores import HOSTS_VARIABLE, allowed_hosts, named_stores

_ALIASES = {"s3a": "s3", "gcs": "gs"}
_BUCKETS = frozenset({"s3", "gs", "hf"})
"""Schemes whose URLs name a bucket, and no host."""
_STORES = _BUCKETS | {"abfs", "abfss", "az", "memory", "oss"}
"""Schemes of object stores."""
_HUB_PARTS = 3
"""datasets/owner/name."""


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
    is_plain = scheme != "" and "::" not in resolved
    if is_plain and (scheme == "memory" or _bucket(resolved) == _bucket(base)):
        return resolved
    allowed = allowed_hosts()
    if is_plain and (host in allowed or any(_is_below(resolved, place) for place in allowed)):
        return resolved
    stores = _stores()
    if not is_plain or (scheme not in _BUCKETS and scheme not in stores):
        name = host or scheme
        raise StorageError(
            "foreign_host.host", where=base, file=resolved, host=name, variable=HOSTS_VARIABLE
        )
    if any(_is_below(resolved, f"{scheme}://{place}") for place in stores.get(scheme, ())):
        return resolved
    raise StorageError(
        "foreign_host.bucket",
        where=base,
        file=resolved,
        bucket=_bucket(resolved),
        variable=HOSTS_VARIABLE,
    )


def is_store(url: str, *, base: str) -> bool:
    """Returns True if a URL that a row names is one of a store, or of the source's own kind.

    Others, such as ftp:// and all that chain file systems, would let a row choose hosts.

    >>> is_store("s3://bucket/a.jpg", base=""), is_store("simplecache::http://10.0.0.1/", base="")
    (True, False)
    """
    scheme, _ = _split(url)
    if "::" in url:
        return False
    return scheme in _STORES or scheme == _split(base)[0] or scheme in _stores()


def _place(url: str) -> tuple[str, str]:
    try:
        at = urlsplit(url)
    except ValueError:
        return "", ""
    scheme = at.scheme.lower()
    return _ALIASES.get(scheme, scheme), at.netloc.lower()


def _bucket(url: str) -> str:
    """Names the bucket or host of a URL: s3://bucket, hf://datasets/owner/name."""
    scheme, path = _split(url)
    num = _HUB_PARTS if scheme == "hf" else 1
    bucket = "/".join(path.split("/")[:num])
    return f"{scheme}://{bucket if scheme == 'hf' else bucket.lower()}"


def _is_below(url: str, place: str) -> bool:
    """Returns True if a URL is in a bucket, or below a prefix of one."""
    scheme, path = _split(url)
    its_scheme, its_path = _split(place)
    if scheme != its_scheme or not its_path or ".." in path.split("/"):
        return False
    return f"{path}/".startswith(f"{its_path}/")


def _split(url: str) -> tuple[str, str]:
    scheme, found, path = url.partition("://")
    scheme = scheme.lower() if found else ""
    path = path.strip("/")
    if scheme == "hf":
        path = "/".join(part.partition("@")[0] for part in path.split("/"))  # any revision
    return _ALIASES.get(scheme, scheme), path


def _stores() -> dict[str, tuple[str, ...]]:
    try:
        return {name: store.buckets for name, store in named_stores().items()}
    except ConfigError:
        return {}  # who opens a store of that name says why
