"""Network: how remote shards are read, in numbers that a user may set."""

from __future__ import annotations

from dataclasses import dataclass, field

from shardspec.errors import ConfigError
from shardspec.storage import RetryPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """How remote shards are read. The defaults suit object stores of 20 to 100 ms."""

    block_bytes: int = 4 * 2**20
    """Size of the blocks that a cache holds."""
    ahead_steps: int = 64
    """Steps that are planned ahead, each of this rank's share."""
    ahead_bytes: int = 256 * 2**20
    """Most memory for samples that are read ahead without a cache."""
    cold_steps: int = 4
    """Samples of this many steps at the start of a run or pass are fetched before their blocks."""
    requests: int = 32
    """Requests for single samples at a time."""
    streams: int = 8
    """Requests for blocks at a time."""
    stall_s: float | None = None
    """Reading has stalled if nothing arrives for this long, in seconds; None: 300, or more where
    `retry` takes longer to give up."""
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    """How long to try for one range."""

    def __post_init__(self) -> None:
        names = ("block_bytes", "ahead_steps", "ahead_bytes", "cold_steps", "requests", "streams")
        wrong = {name: getattr(self, name) for name in names if getattr(self, name) < 1}
        if wrong or (self.stall_s is not None and self.stall_s <= 0):
            raise ConfigError("network", facts=wrong or {"stall_s": self.stall_s})


def patience_s(network: Network) -> float:
    """Returns how long nothing may arrive before reading has stalled, in seconds."""
    if network.stall_s is not None:
        return network.stall_s
    return max(300.0, network.retry.limit_s + network.retry.idle_s)
