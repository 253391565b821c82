"""Named stores: what `weka://bucket/key` means, and any other name given to an S3-compatible store.

A store is a name for an endpoint that speaks S3. Names come from one TOML file, a table each:

    [weka]
    endpoint_url = "https://weka.example.org:9000"
    profile = "weka"        # in the S3 client's own files; default: its usual search
    region = "us-east-1"
    addressing = "path"     # or "virtual": where requests name the bucket; default "auto"
    buckets = "sets, public/vision"  # that manifests elsewhere may send readers to; default none

The file is `~/.config/vlm-shards/stores.toml`, or the one that VLM_SHARDS_STORES names. Variables
VLM_SHARDS_STORE_WEKA_ENDPOINT_URL, ..._PROFILE, ..._REGION, ..._ADDRESSING and ..._BUCKETS
override it field by field, and define a store by themselves. VLM_SHARDS_OUTAGE_S is how long a
store may be away before a request to it fails, in seconds; VLM_SHARDS_HOSTS names further hosts and
buckets that manifests may send readers to (`shardspec.storage.places`). These are all the
environment variables that the contract reads, and this module is their only reader.

Credentials are never part of this: the client finds them by its own means (profiles, environment,
the machine's role), so nothing of ours can log or store them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from shardspec.errors import ConfigError, nearest
from shardspec.toml import load_toml

STORES_FILE = "~/.config/vlm-shards/stores.toml"
"""Where stores are named, unless the variable VLM_SHARDS_STORES names another file."""

FILE_VARIABLE = "VLM_SHARDS_STORES"
VARIABLE_PREFIX = "VLM_SHARDS_STORE_"

OUTAGE_VARIABLE = "VLM_SHARDS_OUTAGE_S"
HOSTS_VARIABLE = "VLM_SHARDS_HOSTS"
_OUTAGE_S = 120.0
"""Default: restarts and failovers of a store take seconds to two minutes."""

Addressing = Literal["auto", "path", "virtual"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """An S3-compatible store that has a name."""

    name: str
    """The scheme of its URLs: lower-case letters, digits and "-"."""
    endpoint_url: str
    profile: str | None = None
    """Of the S3 client's configuration and credentials files."""
    region: str | None = None
    addressing: Addressing = "auto"
    """Whether requests name the bucket in their path or in the host name."""
    buckets: tuple[str, ...] = ()
    """Buckets, or prefixes in them, that manifests may name which are elsewhere."""

    def __post_init__(self) -> None:
        where = f"store {self.name!r}"
        try:
            address = urlsplit(self.endpoint_url)
            _ = address.port
        except ValueError as error:
            raise ConfigError(
                "store_endpoint.url", where=where, endpoint_url=self.endpoint_url
            ) from error
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ConfigError("store_endpoint.url", where=where, endpoint_url=self.endpoint_url)
        if address.username or address.password or address.query:
            raise ConfigError("store_credentials", where=where)
        if self.addressing not in get_args(Addressing):
            raise ConfigError(
                "store_field.addressing",
                where=where,
                hint=nearest(self.addressing, get_args(Addressing)),
                got=self.addressing,
            )

    def options(self) -> dict[str, Any]:
        """Returns the settings of an S3 file system for this store; none of them is secret."""
        options: dict[str, Any] = {"endpoint_url": self.endpoint_url}
        if self.profile is not None:
            options["profile"] = self.profile
        if self.region is not None:
            options["client_kwargs"] = {"region_name": self.region}
        if self.addressing != "auto":
            options["config_kwargs"] = {"s3": {"addressing_style": self.addressing}}
        return options


def outage_setting_s() -> float:
    """Returns how long an outage of a store is survived unless a policy says otherwise, in seconds.

    Raises:
      ConfigError: `outage_s`.
    """
    text = os.environ.get(OUTAGE_VARIABLE)
    if not text:
        return _OUTAGE_S
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 86_400:
        raise ConfigError("outage_s", where=OUTAGE_VARIABLE, got=repr(text[:40]))
    return seconds


def allowed_hosts() -> frozenset[str]:
    """Returns the hosts and places in stores that manifests may name besides the dataset's.

    Such as "example.org", "example.org:8443", "s3://bucket" and "s3://bucket/prefix", separated by
    commas or blanks. Hosts are in lower case.
    """
    names = _names(os.environ.get(HOSTS_VARIABLE, ""))
    return frozenset(name if "://" in name else name.lower() for name in names)


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.replace(",", " ").split())


def named_stores() -> dict[str, Store]:
    """Reads the stores that are named on this machine: the file, then the environment.

    Raises:
      ConfigError: `stores_file`, `store_name`, `store_field`, `store_endpoint` and
        `store_credentials`.
    """
    chosen = os.environ.get(FILE_VARIABLE)
    path = Path(chosen or STORES_FILE).expanduser()
    try:
        document = load_toml(path)
    except FileNotFoundError as error:
        if chosen:
            raise ConfigError("stores_file.missing", where=str(path)) from error
        document = {}
    except (OSError, ValueError) as error:
        raise ConfigError("stores_file.unreadable", where=str(path), error=error) from error
    return parse_stores(document, environment=os.environ, where=str(path))


def parse_stores(
    document: Mapping[str, Any], *, environment: Mapping[str, str], where: str
) -> dict[str, Store]:
    """Makes stores from a TOML document and from environment variables.

    >>> stores = parse_stores({"weka": {"endpoint_url": "https://w:9000"}}, where="stores.toml",
    ...     environment={"VLM_SHARDS_STORE_WEKA_PROFILE": "lab"})
    >>> stores["weka"].options()
    {'endpoint_url': 'https://w:9000', 'profile': 'lab'}

    Raises:
      ConfigError: As `named_stores`.
    """
    tables: dict[str, dict[str, Any]] = {}
    for name, table in document.items():
        if not isinstance(table, dict):
            raise ConfigError("store_field.table", where=where, name=name, field=name)
        tables[name] = dict(table)
    for variable, value in sorted(environment.items()):
        if variable.startswith(VARIABLE_PREFIX):
            name, field = _split_variable(variable)
            tables.setdefault(name, {})[field] = value
    return {name: _store(name, table, where=where) for name, table in sorted(tables.items())}


_FIELDS = tuple(f.name for f in fields(Store) if f.name != "name")


def _split_variable(variable: str) -> tuple[str, str]:
    rest = variable.removeprefix(VARIABLE_PREFIX).lower()
    for field in _FIELDS:
        name = rest.removesuffix(f"_{field}")
        if name and name != rest:
            return name.replace("_", "-"), field
    raise ConfigError(
        "store_field.variable",
        where=variable,
        known=", ".join(field.upper() for field in _FIELDS),
    )


def _store(name: str, table: Mapping[str, Any], *, where: str) -> Store:
    where = f"{where} [{name}]"
    if re.fullmatch(r"[a-z][a-z0-9-]*", name) is None:
        raise ConfigError("store_name", where=where)
    for field, value in table.items():
        if field not in _FIELDS:
            # The value is not shown: it may be a secret in the wrong field.
            raise ConfigError(
                "store_field.unknown", where=where, hint=nearest(field, _FIELDS), field=field
            )
        if not isinstance(value, str):
            raise ConfigError("store_field.text", where=where, field=field)
    if "endpoint_url" not in table:
        raise ConfigError("store_endpoint.missing", where=where)
    fixed = dict(table)
    return Store(name=name, **{**fixed, "buckets": _names(fixed.get("buckets", ""))})
