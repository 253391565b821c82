"""Runs tasks in supervised processes on this machine.

Each worker takes one task at a time from its own pipe. A worker that dies (killed, out of memory)
costs its task's work only: the task goes to a new worker, up to `MAX_ATTEMPTS` times. Nothing
hangs when a process vanishes, as multiprocessing.Pool would. Workers ignore Ctrl-C; the
supervisor ends them.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from shardspec.errors import ShardsError, StorageError

MAX_ATTEMPTS = 3
"""Times that a task may take its worker down before the job stops."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskDone:
    """A task's result."""

    task: int
    value: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskProgress:
    """What a task reported on its way."""

    task: int
    note: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskLost:
    """A worker died with this task; it will run again."""

    task: int
    exit_code: int | None


Event = TaskDone | TaskProgress | TaskLost
Work = Callable[[Any, int, Callable[[Any], None]], Any]


@dataclass(eq=False)
class _Worker:
    process: Any
    pipe: Connection
    task: int | None = None


@dataclass
class _Crew:
    work: Work
    context: Any
    workers: list[_Worker] = field(default_factory=list)

    def hire(self) -> None:
        # spawn: forked children would inherit locks held by the parent's threads.
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_serve, args=(theirs, self.work), daemon=True)
        with _sigint_held():
            process.start()
            theirs.close()
            self.workers.append(_Worker(process=process, pipe=ours))

    def release(self, worker: _Worker) -> None:
        worker.process.join()
        worker.pipe.close()
        self.workers.remove(worker)

    def dismiss(self) -> None:
        for worker in self.workers:
            worker.pipe.close()
            worker.process.terminate()
        for worker in self.workers:
            worker.process.join()
        self.workers.clear()


def run(tasks: Sequence[int], *, work: Work, context: Any, num_workers: int) -> Iterator[Event]:
    """Runs tasks in any order and yields what happens.

    Args:
      tasks: Numbers of the tasks.
      work: A module-level function `(context, task, report) -> value`; `report` sends progress.
      context: Sent to each worker once, pickled.
      num_workers: Processes, >= 1.

    Raises:
      ShardsError: A task raised it; the other workers are ended.
    """
    todo = deque(tasks)
    attempts = dict.fromkeys(tasks, 0)
    left = len(attempts)
    crew = _Crew(work=work, context=context)
    try:
        for _ in range(min(num_workers, len(todo))):
            crew.hire()
        for worker in crew.workers:
            _begin(crew, worker, todo)
        while left:
            ready = wait([worker.pipe for worker in crew.workers])
            for worker in [w for w in crew.workers if w.pipe in ready]:
                try:
                    kind, value = worker.pipe.recv()
                except (EOFError, OSError):
                    crew.release(worker)
                    if worker.task is not None:
                        yield _requeue(crew, worker, attempts, todo)
                    continue
                assert worker.task is not None
                if kind == "progress":
                    yield TaskProgress(task=worker.task, note=value)
                elif kind == "failed":
                    raise value
                else:
                    left -= 1
                    yield TaskDone(task=worker.task, value=value)
                    _assign(worker, todo)
    finally:
        crew.dismiss()


def _begin(crew: _Crew, worker: _Worker, todo: deque[int]) -> None:
    # Not as an argument of the process: that pipe's reading end is open in this process as well, so
    # sending more than fits to a child that dies at its start would wait forever.
    with suppress(ConnectionError):
        worker.pipe.send(crew.context)
    _assign(worker, todo)


@contextmanager
def _sigint_held() -> Iterator[None]:
    """Holds Ctrl-C back until the block ends; processes started in it never see one.

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


def _assign(worker: _Worker, todo: deque[int]) -> None:
    worker.task = todo.popleft() if todo else None
    if worker.task is not None:
        with suppress(ConnectionError):  # it died between tasks: its pipe says so to `wait`
            worker.pipe.send(worker.task)


def _requeue(crew: _Crew, worker: _Worker, attempts: dict[int, int], todo: deque[int]) -> TaskLost:
    task, code = worker.task, worker.process.exitcode
    assert task is not None
    attempts[task] += 1
    if attempts[task] >= MAX_ATTEMPTS:
        raise StorageError(
            "a build task took down its worker again and again",
            reason="worker_died",
            where=f"task {task}",
            facts={"attempts": attempts[task], "exit_code": code},
            fix="exit code -9 is mostly lack of memory: use fewer WORKERS=",
        )
    todo.appendleft(task)
    crew.hire()
    _begin(crew, crew.workers[-1], todo)
    return TaskLost(task=task, exit_code=code)


def _serve(pipe: Connection, work: Work) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        context = pipe.recv()
    except EOFError:
        return  # the supervisor is gone

    def report(note: Any) -> None:
        try:
            pipe.send(("progress", note))
        except ConnectionError:
            sys.exit()  # the supervisor is gone

    while True:
        try:
            task = pipe.recv()
        except (EOFError, ConnectionError):
            return  # the supervisor is gone
        try:
            message = ("done", work(context, task, report))
        except ShardsError as error:
            message = ("failed", error)
        except Exception as error:  # noqa: BLE001 - the task border: it becomes a value
            text = "".join(traceback.format_exception(error))
            message = ("failed", RuntimeError(f"task {task} failed:\n{text}"))
        try:
            pipe.send(message)
        except ConnectionError:
            return
