"""Who this process is: data-parallel rank, world size, DataLoader worker. The only such reader.

Taken from the arguments, else from an initialised torch.distributed, else from the environment that
torchrun and Slurm set, else one rank alone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch.distributed
from torch.utils.data import get_worker_info

from shardspec.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """The data-parallel place of a process; ranks that share data share a data-parallel rank."""

    rank: int = 0
    """Data-parallel rank, 0 to world_size - 1."""
    world_size: int = 1
    """Data-parallel ranks, >= 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ConfigError("rank", rank=self.rank, world_size=self.world_size)


def find_topology(*, rank: int | None = None, world_size: int | None = None) -> Topology:
    """Finds out the rank and the world size.

    Args:
      rank, world_size: Both or neither; needed where some ranks share data (tensor, pipeline or
        context parallelism), since only the caller knows those groups.

    Raises:
      ConfigError: `rank`, `topology`.
    """
    if (rank is None) != (world_size is None):
        raise ConfigError("topology", rank=rank, world_size=world_size)
    if rank is not None and world_size is not None:
        return Topology(rank=rank, world_size=world_size)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return Topology(
            rank=torch.distributed.get_rank(), world_size=torch.distributed.get_world_size()
        )
    for rank_name, size_name in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank_name in os.environ and size_name in os.environ:
            return Topology(rank=int(os.environ[rank_name]), world_size=int(os.environ[size_name]))
    return Topology()


def find_worker() -> tuple[int, int]:
    """Returns this DataLoader worker's number and their count; (0, 1) outside a worker."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)
