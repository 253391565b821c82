"""Runs tasks in supervised processes on this machine.

Each worker works on one task at a time, from its own pipe. A task may return its last part as a
`Deferred`: that waits for storage in a thread of the worker while the next task is worked on, one
at a time. A worker that dies (killed, out of memory) loses the work on its tasks only: they go to a
new worker, up to `MAX_ATTEMPTS` times. Nothing hangs when a process disappears, as
multiprocessing.Pool would. Workers ignore Ctrl-C; the supervisor terminates them, with time to
clean up: the next `report` of their task raises SystemExit.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

from shardspec.errors import ShardsError, StorageError

MAX_ATTEMPTS = 3
"""Times that a worker may die with the same task before the job stops."""

TIDY_S = 10.0
"""Seconds that a worker has to clean up before it is killed: uploads end between two parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deferred:
    """The last part of a task, which mostly waits for storage."""

    finish: Callable[[], Any]
    """Gives the task's value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskDone:
    """A task's result."""

    task: int
    value: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskProgress:
    """What a task reported while it ran."""

    task: int
    note: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskLost:
    """A worker died with this task; it will run again."""

    task: int
    exit_code: int | None


Event = TaskDone | TaskProgress | TaskLost
Work = Callable[[Any, Any, Callable[[Any], None]], Any]
"""`(context, task, report) -> value`; the task is its number, or what `given` makes of that."""
Given = Callable[[int], Any]


def number_only(task: int) -> int:
    """Gives a task no more than its number."""
    return task


@dataclass(eq=False)
class _Worker:
    process: Any
    pipe: Connection
    task: int | None = None
    """The one that it works on."""
    deferred: list[int] = field(default_factory=list)
    """Tasks whose last part is still running."""

    @property
    def tasks(self) -> list[int]:
        """All that would be lost with it."""
        return self.deferred if self.task is None else [*self.deferred, self.task]


@dataclass
class _WorkerPool:
    """The live worker processes. Only the supervisor's thread touches it.

    Invariant: each worker of `workers` has a process that was started and not yet joined.
    """

    work: Work
    context: Any
    given: Given
    workers: list[_Worker] = field(default_factory=list)

    def start(self) -> None:
        # spawn: forked children would inherit locks held by the parent's threads.
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_serve, args=(theirs, self.work), daemon=True)
        with _sigint_held():
            process.start()
            theirs.close()
            self.workers.append(_Worker(process=process, pipe=ours))

    def remove(self, worker: _Worker) -> None:
        worker.process.join()
        worker.pipe.close()
        self.workers.remove(worker)

    def stop(self) -> None:
        for worker in self.workers:
            worker.pipe.close()
            if worker.tasks:
                worker.process.terminate()
            else:
                worker.process.kill()  # it has nothing to clean up
        for worker in self.workers:
            worker.process.join(TIDY_S)
            worker.process.kill()
            worker.process.join()
        self.workers.clear()


def run(
    tasks: Sequence[int],
    *,
    work: Work,
    context: Any,
    num_workers: int,
    given: Given = number_only,
) -> Iterator[Event]:
    """Runs tasks in any order and yields what happens.

    Args:
      tasks: Numbers of the tasks.
      work: A module-level function `(context, task, report) -> value`, or `-> Deferred` for a value
        that follows later; `report` sends progress.
      context: Sent to each worker once, pickled.
      num_workers: Processes, >= 1.
      given: Makes what is sent with a task, pickled, when a worker begins it.

    Raises:
      ShardsError: A task raised it; the other workers are terminated.
    """
    todo = deque(tasks)
    attempts = dict.fromkeys(tasks, 0)
    left = len(attempts)
    pool = _WorkerPool(work=work, context=context, given=given)
    try:
        for _ in range(min(num_workers, len(todo))):
            pool.start()
        for worker in pool.workers:
            _begin(pool, worker, todo)
        while left:
            ready = wait([worker.pipe for worker in pool.workers])
            for worker in [w for w in pool.workers if w.pipe in ready]:
                try:
                    kind, task, value = worker.pipe.recv()
                except (EOFError, OSError):
                    pool.remove(worker)
                    yield from _requeue(pool, worker, attempts, todo)
                    continue
                if kind == "progress":
                    yield TaskProgress(task=task, note=value)
                elif kind == "failed":
                    raise value
                elif kind == "deferred":
                    worker.task = None
                    worker.deferred.append(task)
                else:
                    left -= 1
                    if worker.task == task:
                        worker.task = None
                    else:
                        worker.deferred.remove(task)
                    yield TaskDone(task=task, value=value)
                if worker.task is None:
                    _assign(pool, worker, todo)
    finally:
        pool.stop()


def _begin(pool: _WorkerPool, worker: _Worker, todo: deque[int]) -> None:
    # Not as an argument of the process: that pipe's reading end is open in this process as well, so
    # sending more than fits to a child that dies at its start would wait forever.
    with suppress(ConnectionError):
        worker.pipe.send(pool.context)
    _assign(pool, worker, todo)


@contextmanager
def _sigint_held() -> Iterator[None]:
    """Defers Ctrl-C until the block ends; processes started in it never get one.

    They inherit the mask: interrupted in the middle of its imports, a worker would print a
    traceback before it gets to ignore the signal.
    """
    resource_tracker.ensure_running()  # spawn starts it on first use, and that lifts the mask
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    held: list[int] = []
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread:
        # The mask is this thread's alone: another may take the signal, and Python's part of the
        # handler then runs here all the same.
        handler = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if held:
            signal.raise_signal(signal.SIGINT)


def _assign(pool: _WorkerPool, worker: _Worker, todo: deque[int]) -> None:
    worker.task = todo.popleft() if todo else None
    if worker.task is not None:
        own = pool.given(worker.task)
        with suppress(ConnectionError):  # it died between tasks: `wait` reports its pipe
            worker.pipe.send((worker.task, own))


def _requeue(
    pool: _WorkerPool, worker: _Worker, attempts: dict[int, int], todo: deque[int]
) -> Iterator[TaskLost]:
    code = worker.process.exitcode
    for task in worker.tasks:
        attempts[task] += 1
        if attempts[task] >= MAX_ATTEMPTS:
            raise StorageError(
                "worker_died.job", where=f"task {task}", attempts=attempts[task], exit_code=code
            )
        todo.appendleft(task)
    if worker.tasks:
        pool.start()
        _begin(pool, pool.workers[-1], todo)
    yield from (TaskLost(task=task, exit_code=code) for task in worker.tasks)


def _serve(pipe: Connection, work: Work) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ending = threading.Event()

    def end(number: int, frame: object) -> NoReturn:  # noqa: ARG001
        ending.set()
        sys.exit()

    signal.signal(signal.SIGTERM, end)
    sending = threading.Lock()

    def send(kind: str, task: int, value: Any = None) -> None:
        with sending:
            pipe.send((kind, task, value))

    def report(task: int, note: Any) -> None:
        if ending.is_set():
            sys.exit()
        try:
            send("progress", task, note)
        except ConnectionError:
            sys.exit()  # the supervisor is gone

    try:
        context = pipe.recv()
    except EOFError:
        return  # the supervisor is gone
    # At most one deferred part runs at a time: its thread and this one both send, hence `sending`.
    rest: Future[None] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="deferred") as thread:
        try:
            while True:
                task, own = pipe.recv()
                value = value_of(task, partial(work, context, own, partial(report, task)))
                if rest is not None:
                    rest.result()  # no more than one waits for storage
                    rest = None
                if isinstance(value, Deferred):
                    rest = thread.submit(_finish, send, task, value)
                    send("deferred", task)
                else:
                    send("failed" if isinstance(value, Exception) else "done", task, value)
        except (EOFError, ConnectionError):
            pass  # the supervisor is gone
        finally:
            # From here on the thread is joined. A handler that raises there makes Python take the
            # thread for ended (https://github.com/python/cpython/issues/90882), and it would die
            # with the process in the middle of cleaning up.
            signal.signal(signal.SIGTERM, lambda number, frame: ending.set())  # noqa: ARG005


def _finish(send: Callable[[str, int, Any], None], task: int, deferred: Deferred) -> None:
    value = value_of(task, deferred.finish)
    with suppress(ConnectionError):
        send("failed" if isinstance(value, Exception) else "done", task, value)


def value_of(task: int, action: Callable[[], Any]) -> Any:
    """Gives what a part of a task returns, or its error as one that can cross processes."""
    try:
        return action()
    except ShardsError as error:
        return error
    except Exception as error:  # noqa: BLE001 - the task border: it becomes a value
        return RuntimeError(f"task {task} failed:\n{''.join(traceback.format_exception(error))}")
