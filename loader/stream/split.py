"""OpenSplit: the samples of one dataset that a run uses, and what states say of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from loader.reading import Check, Network, ShardReader, open_dataset
from loader.state import keys_fingerprint, split_fingerprint
from shardspec.errors import ConfigError
from shardspec.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class OpenSplit:
    """A split of a dataset, opened for reading."""

    url: str
    manifest: Manifest
    reader: ShardReader
    name: str
    """Of the split."""
    num_samples: int
    """Samples in use: those of the split, or the first `max_samples` of them."""

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What states say of the data: the sequence of samples, whatever the shards' borders.

        Raises:
          ShardError: An index cannot be read.
        """
        return split_fingerprint(
            self.manifest, self.reader, split=self.name, num_samples=self.num_samples
        )

    def has_grown_from(self, saved: Mapping[str, Any]) -> bool:
        """Returns True if a fingerprint is that of this data before samples were appended."""
        then = saved.get("num_samples")
        if not isinstance(then, int) or not 0 < then < self.num_samples:
            return False
        keys = keys_fingerprint(self.reader, then)
        return dict(saved) == {**self.fingerprint, "num_samples": then, "keys": keys}


def open_split(
    url: str,
    *,
    split: str,
    check: Check,
    cache: str | None,
    cache_bytes: int,
    network: Network | None,
    max_samples: int | None,
) -> OpenSplit:
    """Reads the manifest of a dataset; see `StreamingDataset`.

    Raises:
      ManifestError: There is no readable manifest.
      ConfigError: `unknown_split`, `cache_bytes`, `cache_foreign`, `max_samples`.
      StorageError: The store does not answer.
    """
    manifest, reader = open_dataset(
        url, split=split, check=check, cache=cache, cache_bytes=cache_bytes, network=network
    )
    if max_samples is not None and not 1 <= max_samples <= len(reader):
        raise ConfigError(
            "max_samples",
            where=url,
            num_reader=len(reader),
            got=max_samples,
            samples=len(reader),
        )
    num_samples = len(reader) if max_samples is None else max_samples
    return OpenSplit(url=url, manifest=manifest, reader=reader, name=split, num_samples=num_samples)
