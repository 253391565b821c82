"""Who this process is: data-parallel rank, world size, DataLoader worker. The only such reader.

The rank is looked up when it is needed, not when a dataset is made: process groups are often
initialised later, or in another process that the dataset is sent to. In this order:

1. `rank=` and `world_size=`, which only the caller knows where some ranks share data;
2. an initialised torch.distributed;
3. what torch.distributed said before: in the process that sent this dataset here (a DataLoader
   worker has no process group), or before the group was destroyed;
4. the variables of a launcher, where a launcher set them: those that remain of an allocation
   (an sbatch script, an interactive shell) count for nothing;
5. one rank alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch.distributed
from torch.utils.data import get_worker_info

from shardspec.errors import ConfigError

logger = logging.getLogger(__name__)

_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Slurm's steps from here on are batch scripts, interactive shells and the like: one process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """The data-parallel place of a process; ranks that share data share a data-parallel rank."""

    rank: int = 0
    """Data-parallel rank, 0 to world_size - 1."""
    world_size: int = 1
    """Data-parallel ranks, >= 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ConfigError("rank.range", rank=self.rank, world_size=self.world_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Launcher:
    """Variables that a launcher sets for each process."""

    name: str
    rank: str
    world_size: str
    proof: tuple[str, ...] = ()
    """Any of these shows that the launcher started this process; (): the two themselves do."""


_LAUNCHERS = (
    # Whatever sets RANK for torch.distributed sets the address of its store too.
    _Launcher(
        name="torchrun",
        rank="RANK",
        world_size="WORLD_SIZE",
        proof=("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "LOCAL_RANK"),
    ),
    _Launcher(name="mpirun", rank="OMPI_COMM_WORLD_RANK", world_size="OMPI_COMM_WORLD_SIZE"),
    _Launcher(name="mpirun", rank="PMI_RANK", world_size="PMI_SIZE"),
    # SLURM_NTASKS is the allocation's, in every process inside of it.
    _Launcher(
        name="srun",
        rank="SLURM_PROCID",
        world_size="SLURM_STEP_NUM_TASKS",
        proof=("SLURM_STEP_ID", "SLURM_STEPID"),
    ),
)

_LEFT_OVER = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
"""Rank and world size as they also appear where no launcher started the process."""


class CurrentTopology:
    """The rank and the world size, as they are when they are asked for; picklable."""

    def __init__(self, *, rank: int | None = None, world_size: int | None = None) -> None:
        """Takes the numbers that the caller gives; looks nothing up yet.

        Raises:
          ConfigError: `rank`, `topology`.
        """
        if (rank is None) != (world_size is None):
            raise ConfigError("topology", rank=rank, world_size=world_size)
        self._given: Topology | None = None
        if rank is not None and world_size is not None:
            self._given = Topology(rank=rank, world_size=world_size)
        # What torch.distributed said last; it outlives the process group, and travels along.
        self._from_group: Topology | None = None
        self._logged: tuple[Topology, str] | None = None

    def now(self) -> Topology:
        """Looks the numbers up.

        Raises:
          ConfigError: `rank`, the environment names impossible ones.
        """
        return self._found()[0]

    def settle(self) -> Topology:
        """Looks the numbers up for a pass that begins now, and logs once where they are from.

        Raises:
          ConfigError: `rank`.
        """
        found, source = self._found()
        if self._logged != (found, source):
            self._logged = (found, source)
            _log(found, source)
        return found

    def _found(self) -> tuple[Topology, str]:
        if self._given is not None:
            return self._given, "rank= and world_size="
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._from_group = Topology(
                rank=torch.distributed.get_rank(), world_size=torch.distributed.get_world_size()
            )
        if self._from_group is not None:
            return self._from_group, "torch.distributed"
        for launcher in _LAUNCHERS:
            found = _launched(launcher, os.environ)
            if found is not None:
                return found, launcher.name
        return Topology(), ""

    def __getstate__(self) -> dict[str, object]:
        self._found()  # a DataLoader worker is to know what the process group says here
        return {**self.__dict__, "_logged": None}


def find_topology(*, rank: int | None = None, world_size: int | None = None) -> Topology:
    """Finds out the rank and the world size at this moment.

    Args:
      rank, world_size: Both or neither; needed where some ranks share data (tensor, pipeline or
        context parallelism), since only the caller knows those groups.

    Raises:
      ConfigError: `rank`, `topology`.
    """
    return CurrentTopology(rank=rank, world_size=world_size).now()


def find_worker() -> tuple[int, int]:
    """Returns this DataLoader worker's number and their count; (0, 1) outside a worker."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def _launched(launcher: _Launcher, environ: Mapping[str, str]) -> Topology | None:
    """Reads a launcher's variables; None where it did not start this process."""
    if launcher.rank not in environ or launcher.world_size not in environ:
        return None
    if launcher.proof and not any(name in environ for name in launcher.proof):
        return None
    if launcher.name == "srun" and _is_shell(environ):
        return None
    names = (launcher.rank, launcher.world_size)
    return Topology(
        rank=_number(environ[launcher.rank], names),
        world_size=_number(environ[launcher.world_size], names),
    )


def _is_shell(environ: Mapping[str, str]) -> bool:
    """Returns True in a step of Slurm that is a shell or a batch script, not a task of many."""
    step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID", ""))
    special = step.isdecimal() and int(step) >= _FIRST_SPECIAL_STEP
    return special or "SLURM_PTY_PORT" in environ


def _number(text: str, names: tuple[str, str]) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError("rank.environment", names=" and ".join(names), got=text[:40]) from error


def _contradictions(
    found: Topology, source: str, environ: Mapping[str, str]
) -> list[tuple[str, Topology]]:
    """Lists what other launchers say, where it cannot be meant.

    A launcher that starts another one has at most as many processes. torchrun numbers them anew;
    whoever sets RANK by hand sets that of the launcher.
    """
    names = [launcher.name for launcher in _LAUNCHERS]
    if source not in names:
        return []
    others = []
    for launcher in _LAUNCHERS:
        other = None
        with suppress(ConfigError):  # nobody asked for its numbers
            other = _launched(launcher, environ) if launcher.name != source else None
        if other is None or other.world_size < found.world_size:
            continue
        renumbered = source != "torchrun" or "TORCHELASTIC_RUN_ID" in environ
        same_size = other.world_size == found.world_size
        if not same_size or (other.rank != found.rank and not renumbered):
            others.append((launcher.name, other))
    return others


def _log(found: Topology, source: str) -> None:
    number, count = found.rank, found.world_size
    if source:
        logger.info("reading as rank %d of %d, from %s", number, count, source)
        for name, other in _contradictions(found, source, os.environ):
            logger.warning(
                "reading as rank %d of %d, as the variables of %s say, but %s started this process "
                "as rank %d of %d: where these train together, they read the same samples; unset "
                "what is left over of another run, or pass rank= and world_size=",
                *(number, count, source, name, other.rank, other.world_size),
            )
        return
    for rank, world_size in _LEFT_OVER:
        if os.environ.get(world_size, "1") != "1" and rank in os.environ:
            logger.warning(
                "reading as the only rank: %s=%s is set, but no launcher started this process and "
                "torch.distributed is not initialised; otherwise pass rank= and world_size=",
                world_size,
                os.environ[world_size],
            )
            return
    for launcher in _LAUNCHERS:
        given = [n for n in (launcher.rank, launcher.world_size) if n in os.environ]
        # Batch scripts of Slurm have SLURM_PROCID alone; a world of one process needs no rank.
        alone = launcher.name == "srun" or os.environ.get(launcher.world_size) == "1"
        if len(given) == 1 and not alone:
            logger.warning(
                "reading as the only rank: %s=%s is set, without %s; set both, or pass rank= and "
                "world_size=",
                given[0],
                os.environ[given[0]],
                *({launcher.rank, launcher.world_size} - {*given}),
            )
            return
    logger.info("reading as the only rank: no process group, no launcher")
