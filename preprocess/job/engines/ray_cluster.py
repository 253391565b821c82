"""Runs tasks on a Ray cluster: one that is named by its address, or one of this machine alone.

A task is a Ray core task; how often it reported what comes with its result, and before that through
an actor on the driver's node. Ray runs a task again whose worker or node dies, on another node, up
to `MAX_ATTEMPTS` times; what the first attempt reported is not counted again. A node that was only
cut off may still finish its attempt: tasks must be safe to run twice at once. Errors of a task are
values and end the run at once. Results are small: a task returns what it has published, not its
bytes.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from preprocess.job.engines.local import (
    MAX_ATTEMPTS,
    Deferred,
    Event,
    Given,
    TaskDone,
    TaskProgress,
    Work,
    number_only,
    value_of,
)
from shardspec.errors import ConfigError, StorageError

OBJECT_STORE_BYTES = 256 * 2**20
"""Of a cluster that is started here: it holds the context of the tasks."""

WAIT_S = 5.0
"""Between two looks at how many cores the cluster has, and at what tasks report."""

REPORT_S = 1.0
"""Between two reports that a task sends before its end."""


@contextmanager
def connected(address: str, num_workers: int) -> Iterator[Any]:
    """Connects this process to a cluster, unless the program around it has done that.

    Args:
      address: Of a running cluster; "" starts one on this machine, and ends it with the block.
      num_workers: Cores of a cluster that is started here.

    Yields:
      The module `ray`.

    Raises:
      ConfigError: `ray_missing`.
      StorageError: `ray_unreachable`.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError("ray_missing") from error
    if ray.is_initialized():
        yield ray
        return
    known: dict[str, Any] = {"address": address}
    if not address:
        known = {
            "address": "local",
            "num_cpus": num_workers,
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
    try:
        with _own_sigterm():
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **known)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise StorageError("ray_unreachable", where=address or "local", error=error) from error
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keeps this program's answer to SIGTERM: Ray puts its own in place, which raises SystemExit.

    In the block it is Ray's: its core sets a handler for all threads.
    """
    before = signal.getsignal(signal.SIGTERM)
    is_main = threading.current_thread() is threading.main_thread()
    try:
        yield
    except SystemExit:
        if is_main and callable(before):
            before(signal.SIGTERM, None)
        raise
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)


def num_nodes(ray: Any) -> int:
    """Counts the machines of a cluster that are alive."""
    return max(1, sum(bool(node["Alive"]) for node in ray.nodes()))


def run(
    ray: Any,
    tasks: Sequence[int],
    *,
    work: Work,
    context: Any,
    given: Given = number_only,
    num_gpus: int = 0,
) -> Iterator[Event]:
    """Runs tasks in any order and yields what happens.

    Args:
      ray: What `connected` gives.
      tasks: Numbers of the tasks.
      work, given: As of `local.run`.
      context: Sent to each node once, pickled.
      num_gpus: That a task has for itself.

    Raises:
      ShardsError: A task raised it; StorageError `worker_died`.
    """
    # Spread: tasks of which there is one for each node wait for the network, not for a core.
    remote = ray.remote(
        num_cpus=1, num_gpus=num_gpus, max_retries=MAX_ATTEMPTS, scheduling_strategy="SPREAD"
    )(_run_task)
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=True
    )
    notes = ray.remote(num_cpus=0, scheduling_strategy=here)(_Notes).remote()
    asked = notes.take.remote()
    shared = ray.put(context)
    todo = deque(tasks)
    running: dict[Any, int] = {}
    # Of each task that is running, how often it has reported what, as far as that was yielded.
    told: dict[int, Counter[Any]] = {}
    try:
        while todo or running:
            # Twice the cores: none waits for the driver, and an autoscaler sees the demand.
            window = max(1, 2 * int(ray.cluster_resources().get("CPU", 1)))
            while todo and len(running) < window:
                task = todo.popleft()
                told[task] = Counter()
                running[remote.remote(work, shared, task, given(task), notes)] = task
            ready, _ = ray.wait([*running], num_returns=1, timeout=WAIT_S)
            if asked is not None and ray.wait([asked], timeout=0)[0]:
                try:
                    found = ray.get(asked)
                    asked = notes.take.remote()
                except ray.exceptions.RayError:
                    found, asked = {}, None  # it died: notes come with the results
                for task in found.keys() & told.keys():
                    yield from _progress(task, told[task], found[task])
            for each in ready:
                task = running.pop(each)
                yield from _events(ray, each, task, told.pop(task))
    finally:
        for each in running:
            ray.cancel(each, force=True)
        ray.kill(notes)


def _progress(task: int, told: Counter[Any], notes: Mapping[Any, int]) -> Iterator[Event]:
    """Yields what is new; `told` is made to hold it."""
    for note, count in notes.items():
        for _ in range(count - told[note]):
            yield TaskProgress(task=task, note=note)
        told[note] = max(told[note], count)


def _events(ray: Any, reference: Any, task: int, told: Counter[Any]) -> Iterator[Event]:
    try:
        notes, value = ray.get(reference)
    except ray.exceptions.RayError as error:
        raise StorageError(
            "worker_died.job",
            where=f"task {task}",
            attempts=MAX_ATTEMPTS + 1,
            exit_code=type(error).__name__,
        ) from error
    yield from _progress(task, told, notes)
    if isinstance(value, Exception):
        raise value
    yield TaskDone(task=task, value=value)


class _Notes:
    """An actor that holds what tasks have reported since the driver last asked."""

    def __init__(self) -> None:
        self._found: dict[int, Mapping[Any, int]] = {}

    def put(self, task: int, notes: Mapping[Any, int]) -> None:
        """Called by a task with all that it has reported until now."""
        self._found[task] = notes

    def take(self) -> dict[int, Mapping[Any, int]]:
        """Gives it to the driver, by task."""
        found, self._found = self._found, {}
        return found


def _run_task(
    work: Work, context: Any, task: int, own: Any, notes: Any
) -> tuple[Mapping[Any, int], Any]:
    """Runs a task where Ray has put it; returns how often it reported what, and its value.

    Args:
      work, context, task, own: As of `local.run`.
      notes: The actor.
    """
    reported: Counter[Any] = Counter()
    next_s = 0.0
    lock = threading.Lock()  # uploads report from threads of their own

    def report(note: Any) -> None:
        nonlocal next_s
        with lock:
            reported[note] += 1
            if time.monotonic() >= next_s:
                notes.put.remote(task, dict(reported))
                next_s = time.monotonic() + REPORT_S

    def both_parts() -> Any:
        value = work(context, own, report)
        return value.finish() if isinstance(value, Deferred) else value

    value = value_of(task, both_parts)
    return dict(reported), value
