"""Network: how remote shards are read, in numbers that a user may set."""

from __future__ import annotations

from dataclasses import dataclass, field

from loader.reading.blocks import fitting_block_bytes
from shardspec.errors import ConfigError
from shardspec.manifest import FileEntry
from shardspec.storage import RetryPolicy

UNCACHED_BLOCK_BYTES = 4 * 2**20
"""Size of blocks where none is cached: they only say which samples may travel together."""

_MOST = 2**62  # as counts of the order


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """How remote shards are read. The defaults suit object stores of 20 to 100 ms."""

    block_bytes: int | None = None
    """Size of the blocks that a cache holds; None: as each shard's samples need
    (`fitting_block_bytes`)."""
    ahead_steps: int = 64
    """Steps that are planned ahead, each of this rank's share."""
    ahead_bytes: int = 256 * 2**20
    """Most memory for samples that are read ahead without a cache."""
    cold_steps: int = 4
    """Samples of this many steps at the start of a run or pass are fetched before their blocks."""
    requests: int = 32
    """Requests for single samples at a time."""
    streams: int | None = None
    """Requests for blocks at a time; None: 8, and up to `requests` while they take no more than 32
    MiB together."""
    stall_s: float | None = None
    """Reading has stalled if nothing arrives for this long, in seconds; None: 300, or more where
    `retry` takes longer to give up."""
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    """How long to try for one range."""

    def __post_init__(self) -> None:
        names = ("block_bytes", "ahead_steps", "ahead_bytes", "cold_steps", "requests", "streams")
        given = {name: getattr(self, name) for name in names}
        wrong = {
            name: value
            for name, value in given.items()
            if value is not None and not 1 <= value < _MOST
        }
        if wrong or (self.stall_s is not None and self.stall_s <= 0):
            raise ConfigError("network", facts=wrong or {"stall_s": self.stall_s})


def blocks_of(network: Network, file: FileEntry, *, cached: bool = True) -> int:
    """Returns where a shard is cut into blocks, in bytes.

    It follows from the settings and from the shard alone, so all ranks, runs and views that read a
    shard through one cache cut it alike.

    Args:
      network: The settings.
      file: The shard.
      cached: There is a cache.
    """
    if network.block_bytes is not None:
        return network.block_bytes
    fitting = fitting_block_bytes(file.num_bytes, file.nsamples)
    return fitting if cached else max(fitting, UNCACHED_BLOCK_BYTES)


def patience_s(network: Network) -> float:
    """Returns how long nothing may arrive before reading has stalled, in seconds."""
    if network.stall_s is not None:
        return network.stall_s
    return max(300.0, network.retry.limit_s + network.retry.idle_s)
