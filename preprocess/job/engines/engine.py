"""Engine: where the tasks of all stages run, and what another machine must prove before it works.

Whatever has tasks (FETCH, BUILD, the copies of a reshard, VERIFY) opens one engine and runs them
there. How a job is divided among parts is above it: an engine runs the tasks of one part.
"""

from __future__ import annotations

import functools
import hashlib
import platform
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from preprocess.datasets import DatasetBase, dataset_class
from preprocess.fetch import BlobCache
from preprocess.job.conflicts import find_differences, table
from preprocess.job.engines import local, ray_cluster
from preprocess.job.engines.local import Event, Given, Work, number_only
from preprocess.job.job import EngineName, library_versions, version_of
from shardspec import storage
from shardspec.errors import ConflictError, StorageError

_ROOT = Path(__file__).parents[3]
_PACKAGES = ("preprocess", "shardspec", "loader", "vlm_shards")


class EngineSettings(Protocol):
    """What settings say of the engine."""

    @property
    def engine(self) -> EngineName:
        """Which one."""

    @property
    def num_workers(self) -> int:
        """Processes of this machine, or cores of a cluster that is started here."""

    @property
    def ray_address(self) -> str:
        """Of a running cluster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeProof:
    """What a machine must have in common with the one that has planned."""

    libraries: tuple[tuple[str, str], ...]
    """Of the one that has planned; see `node_libraries`."""
    dataset: str = ""
    """Whose code is among them; "" for none."""
    out: str
    mark: str
    """URL of an object of the output; "" where there is none yet."""
    mark_sha256: str
    cache: str = ""
    """Root of the blob cache."""
    cache_token: str = ""
    """Mark that was left there; "" where the tasks need no cache."""


def node_proof(
    out: str, mark: str, *, dataset: str = "", cache: str = "", cache_token: str = ""
) -> NodeProof:
    """Makes what other machines have to prove: that they have this code and see this output.

    Args:
      out: The output.
      mark: URL of an object there that exists, which no other job would have written; "" where
        there is none yet.
      dataset: As settings name it, if its code runs in the tasks.
      cache, cache_token: Of the blob cache, if the tasks need that.
    """
    return NodeProof(
        libraries=node_libraries(dataset),
        dataset=dataset,
        out=out,
        mark=mark,
        mark_sha256=_sha256_of(mark),
        cache=cache,
        cache_token=cache_token,
    )


def node_libraries(dataset: str = "") -> tuple[tuple[str, str], ...]:
    """Lists what must be the same on all machines of a job: libraries, and all of our own code.

    More than what bytes follow from (`library_versions`): tasks are sent as the names of functions.
    """
    kind = dataset_class(dataset) if dataset else DatasetBase
    others = {name: version_of(name) for name in ("aiohttp", "jinja2", "transformers")}
    known = {**library_versions(kind), **others, "sources_sha256": _sources_sha256()}
    return tuple(sorted(known.items()))


@functools.cache
def _sources_sha256() -> str:
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((_ROOT / package).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.cache  # once for each process of a node; what raises is tried again
def check_node(proof: NodeProof) -> None:
    """Makes sure that this machine may work on a job that was planned elsewhere.

    Raises:
      ConflictError: `mixed_cluster`.
      StorageError: `output_not_shared`, `cache_not_shared`.
    """
    node = platform.node()
    found = find_differences(dict(proof.libraries), dict(node_libraries(proof.dataset)))
    if found:
        raise ConflictError(
            "mixed_cluster", where=node, table=table(found, heads=("of the job", "on this node"))
        )
    if _sha256_of(proof.mark) != proof.mark_sha256:
        raise StorageError("output_not_shared", where=proof.out, node=node)
    if proof.cache_token and not BlobCache(proof.cache).has_token(proof.cache_token):
        raise StorageError("cache_not_shared.node", where=proof.cache, node=node)


def _sha256_of(url: str) -> str:
    try:
        return hashlib.sha256(storage.read_bytes(url)).hexdigest() if url else ""
    except FileNotFoundError:
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Proven:
    """A task's work on another machine, behind the proof."""

    work: Work
    proof: NodeProof

    def __call__(self, context: Any, task: Any, report: Any) -> Any:
        check_node(self.proof)
        return self.work(context, task, report)


class Engine:
    """Runs tasks where the settings say. A context manager: a cluster is held until it ends."""

    def __init__(self, settings: EngineSettings) -> None:
        """Starts nothing yet; a cluster is needed by the first task."""
        self._settings = settings
        self._held = ExitStack()
        self._ray: Any = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self._ray = None
        self._held.close()

    @property
    def is_local(self) -> bool:
        """Whether tasks run on this machine, which needs no proof."""
        return self._settings.engine == "local"

    @property
    def num_nodes(self) -> int:
        """Machines that tasks run on, as many as there are now."""
        return 1 if self.is_local else ray_cluster.num_nodes(self._cluster())

    def run(
        self,
        tasks: Sequence[int],
        *,
        work: Work,
        context: Any,
        proof: NodeProof | None,
        given: Given = number_only,
        num_gpus: int = 0,
    ) -> Iterator[Event]:
        """Runs tasks in any order and yields what happens.

        Args:
          tasks: Numbers of the tasks.
          work, context, given: As of `local.run`.
          proof: What other machines prove; None where this is the only one, or without tasks.
          num_gpus: Of a cluster, that a task has for itself.

        Raises:
          ShardsError: A task raised it, or `check_node`; the others are ended.
          ConfigError: `ray_missing`.
          StorageError: `ray_unreachable`, `worker_died`.
        """
        if self.is_local:
            workers = self._settings.num_workers
            return local.run(tasks, work=work, context=context, num_workers=workers, given=given)
        if not tasks:
            return iter(())
        assert proof is not None
        proven = _Proven(work=work, proof=proof)
        return ray_cluster.run(
            self._cluster(), tasks, work=proven, context=context, given=given, num_gpus=num_gpus
        )

    def _cluster(self) -> Any:
        if self._ray is None:
            s = self._settings
            self._ray = self._held.enter_context(
                ray_cluster.connected(s.ray_address, s.num_workers)
            )
        return self._ray
