"""Worker processes that make batches, and the memory they share with the consumer.

For users' Python code that holds the interpreter, and for work that threads speed up little. A
worker writes its batches into anonymous files that it maps, and sends their descriptors over its
pipe: no name ever exists, so nothing is left on the machine, whichever process is killed. The
consumer maps each file once. When the last reference to a tensor is gone, the next task returns its
memory to the worker: the same pages are recycled, and none changes while a tensor refers to it.

The consumer plans, and deals the batches to the workers in turn. A worker that dies is an error
that names its exit code. Workers live as long as their crew, over passes: requests cross the end of
an epoch, and are cancelled where the run continues at another step. Workers end when the crew is
closed or collected, at the end of the consumer's process, and when that is killed.
"""

from __future__ import annotations

import errno
import gc
import logging
import math
import mmap
import multiprocessing
import os
import queue
import resource
import signal
import socket
import sys
import tempfile
import threading
import traceback
import weakref
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing import reduction
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from time import monotonic
from typing import Any

import numpy as np
import torch

from loader.buffers import LEAST_POOLED_BYTES
from loader.delivery.batches import BatchMaker, MadeBatch, Task
from loader.delivery.stats import StageTimings
from loader.delivery.threads import AheadLimit
from loader.delivery.watchdog import stacks, wait_watched
from loader.reading import count_reading
from shardspec.errors import ConfigError, ShardsError, WorkerError
from shardspec.messages import messages

logger = logging.getLogger(__name__)

_MOST_MAPPED = 48
"""Buffers of a worker that its consumer may refer to: each takes a descriptor in both processes, of
the 1024 that Linux commonly grants. A consumer that keeps more batches gets copies."""

_JOIN_S = 5.0
"""Seconds for workers to end by themselves, once their batches are not requested any more."""

_EXIT_S = 1.0
"""The same, where the loader was dropped or the process ends."""


@dataclass(slots=True, kw_only=True)
class _Request:
    """What a worker is to make."""

    task: Task
    freed: list[int]
    """Buffers that the consumer has let go of."""
    turn: int = 0
    """Of the run: a later one has cancelled it."""


@dataclass(frozen=True, slots=True)
class _Cancel:
    """What was requested before a turn is not wanted any more."""

    turn: int


@dataclass(frozen=True, slots=True)
class _Dump:
    """The stacks of all threads are wanted, on standard error."""


@dataclass(slots=True, kw_only=True)
class _Shared:
    """A tensor in a buffer of the worker."""

    buffer: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In bytes."""


@dataclass(slots=True, kw_only=True)
class _Sent:
    """A tensor that goes through the pipe."""

    array: np.ndarray
    """C-contiguous, as pickling leaves it."""
    axes: tuple[int, ...]
    """Which of its axes each axis of the tensor is: channels stay last in memory."""


@dataclass(frozen=True, slots=True)
class _Bits:
    """A tensor of bfloat16, which NumPy lacks: that of its bits."""

    bits: Any


@dataclass(slots=True, kw_only=True)
class _Answer:
    """What a worker sends back; the descriptors of new buffers follow it."""

    batch: Any = None
    """Its tensors are `_Shared`, or `_Sent` where they are small."""
    bad: list[dict[str, Any]] = field(default_factory=list)
    timings: StageTimings = field(default_factory=StageTimings)
    counters: dict[str, int] = field(default_factory=dict)
    """See `MadeBatch.counters`."""
    members: Mapping[int, int] = field(default_factory=dict)
    """See `MadeBatch.members`."""
    new: list[tuple[int, int]] = field(default_factory=list)
    """(Buffer, bytes)."""
    dropped: list[int] = field(default_factory=list)
    """Buffers that are not used any more."""
    error: ShardsError | None = None
    crash: str = ""
    """Traceback of any other exception."""
    unshared: str = ""
    """Why there is no shared memory."""


class WorkerCrew:
    """Worker processes, and what they were requested to make; for the consumer's thread alone."""

    def __init__(self, maker: BatchMaker, *, workers: int, keep_bytes: int) -> None:
        """Starts the processes.

        Args:
          maker: Makes the batches; it is sent to the workers.
          workers: Number of processes, >= 1.
          keep_bytes: Most bytes that wait to be used again, in all workers.
        """
        # Read now: once this process may open no further file, it could not say so.
        messages()
        self._workers: list[_Worker] = []
        # Refers to the list, not to the crew: it also runs where the crew is collected, and at the
        # end of the process, before Python takes its modules down. A forked child runs it too.
        self._pid = os.getpid()
        self._end = weakref.finalize(self, _end, self._workers, self._pid)
        self._pending: deque[_Worker] = deque()
        self._number = self._turn = 0
        try:
            for _ in range(workers):
                self._workers.append(_Worker(maker, keep_bytes=keep_bytes // workers))
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        """Counts the processes."""
        return len(self._workers)

    def make(
        self, tasks: Iterator[Task], *, ahead: AheadLimit, watchdog_s: float | None = None
    ) -> Generator[tuple[MadeBatch, int], None, None]:
        """Makes batches in their sequence; what is still pending of an earlier call comes first.

        Args:
          tasks: The batches; planned here, when there is room for more.
          ahead: How far to go ahead.
          watchdog_s: See `wait_watched`; the workers write their stacks to standard error.

        Yields:
          A batch, and how many after it were ready by then.

        Raises:
          ShardsError: What a worker met; `worker_died`; `worker_crash`, any other exception there;
            `descriptor_limit`, this process may open no further file. The crew is closed then.
        """
        while True:
            try:
                while len(self._pending) < ahead.batches:
                    task = next(tasks, None)
                    if task is None:
                        break
                    self._request(task)
                if not self._pending:
                    return
                ready = sum(worker.is_ready() for worker in self._workers)
                wait_watched(self._pending[0].is_ready, watchdog_s, ask=self._ask_for_stacks)
                made = self._pending[0].answer()
                self._pending.popleft()
                ahead.note(made.timings.batch_bytes)
            except KeyboardInterrupt:
                self._end(0.0)
                raise
            except BaseException:
                # An answer may be half read.
                self.close()
                raise
            yield made, max(0, ready - 1)
            del made

    def _ask_for_stacks(self) -> str:
        pids = [worker.ask_for_stacks() for worker in self._workers]
        return f" (worker processes {pids} write theirs to standard error)"

    def cancel(self) -> None:
        """Drops what is pending: the run continues at another step."""
        if not self._pending:
            return
        self._turn += 1
        for worker in self._pending:
            worker.num_stale += 1
        self._pending.clear()
        for worker in self._workers:
            worker.cancel(self._turn)

    def close(self) -> None:
        """Ends the processes; a crew that is closed makes no more."""
        self._pending.clear()
        self._end(_JOIN_S)

    @property
    def num_pending(self) -> int:
        """Batches that were requested and not given yet."""
        return len(self._pending)

    @property
    def is_closed(self) -> bool:
        """True once the processes were ended, and in a forked child, whose parent has them."""
        return not self._end.alive or os.getpid() != self._pid

    def _request(self, task: Task) -> None:
        worker = self._workers[self._number % len(self._workers)]
        self._number += 1
        worker.request(task, turn=self._turn)
        self._pending.append(worker)


def _end(workers: list[_Worker], pid: int, wait_s: float = _EXIT_S) -> None:
    if os.getpid() != pid:
        return  # a forked child: the pipes and processes are the parent's
    for worker in workers:
        worker.hang_up()
    stop_s = monotonic() + wait_s
    for worker in workers:
        worker.close(stop_s=stop_s)


class _Worker:
    """A worker process as the consumer sees it."""

    def __init__(self, maker: BatchMaker, *, keep_bytes: int) -> None:
        # spawn: a forked child would inherit locks that the parent's threads hold.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=_work, args=(theirs, maker, keep_bytes), name="decode", daemon=True
        )
        try:
            self._process.start()
        except (
            OSError,
            RuntimeError,
            MemoryError,
        ):  # the system's, or Python's advice on `__main__`
            raise
        except Exception as error:
            self._pipe.close()
            message = f"{type(error).__name__}: {error}"
            raise ConfigError("worker_pickle", error=message) from error
        finally:
            theirs.close()
        self._buffers: dict[int, mmap.mmap] = {}
        self._num_mapped = 0
        self.num_stale = 0
        """Answers to cancelled requests that are still to come."""
        # Filled by finalizers, wherever a tensor's last reference goes.
        self._freed: deque[int] = deque()

    def request(self, task: Task, *, turn: int) -> None:
        """Requests a batch."""
        self._send(_Request(task=task, freed=self._take_back(), turn=turn))

    def cancel(self, turn: int) -> None:
        """Cancels what was requested before a turn."""
        self._send(_Cancel(turn))

    def _send(self, message: _Request | _Cancel | _Dump) -> None:
        try:
            self._pipe.send(message)
        except OSError as error:
            raise self._death() from error

    def is_ready(self, timeout_s: float | None = 0.0) -> bool:
        """Tells whether an answer waits, or comes within a time; None: waits for it."""
        return self._pipe.poll(timeout_s)

    def ask_for_stacks(self) -> int:
        """Lets the process write its stacks to standard error; returns its id."""
        self._send(_Dump())
        return self._process.pid or 0

    def answer(self) -> MadeBatch:
        """Waits for the next batch.

        Raises:
          ShardsError: What the worker met; `worker_died`, `worker_crash`, `descriptor_limit`.
        """
        while self.num_stale:
            stale = self._receive()
            _each_value(stale.batch, self._opened)  # let go of at once: its memory goes back
            self.num_stale -= 1
        answer = self._receive()
        if answer.error is not None:
            raise answer.error
        if answer.crash:
            raise WorkerError("worker_crash", crash=answer.crash)
        batch = _each_value(answer.batch, self._opened)
        named = {name: getattr(answer, name) for name in ("bad", "timings", "counters", "members")}
        return MadeBatch(batch=batch, **named)

    def _receive(self) -> _Answer:
        try:
            answer: _Answer = self._pipe.recv()
            for number, num_bytes in answer.new:
                with _naming_limit():
                    descriptor = reduction.recv_handle(self._pipe)
                    try:
                        self._buffers[number] = mmap.mmap(descriptor, num_bytes)
                    finally:
                        os.close(descriptor)
        except (EOFError, OSError) as error:
            raise self._death() from error
        for number in answer.dropped:
            del self._buffers[number]
        if answer.unshared:
            logger.warning(
                "a worker process has no shared memory, so batches are copied: %s", answer.unshared
            )
        return answer

    def hang_up(self) -> None:
        """Lets the process know that nothing more is wanted."""
        # Closing alone would not do: the end that a forked child of the consumer has inherited
        # stays open. Shut down is the connection itself.
        with suppress(OSError), socket.socket(fileno=os.dup(self._pipe.fileno())) as connection:
            connection.shutdown(socket.SHUT_RDWR)
        self._pipe.close()

    def close(self, *, stop_s: float) -> None:
        """Waits for the end of the process, after `hang_up`, up to a time of `monotonic`."""
        self._process.join(max(0.0, stop_s - monotonic()))
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()

    def _opened(self, value: Any) -> Any:
        if isinstance(value, _Bits):
            return self._opened(value.bits).view(torch.bfloat16)
        if isinstance(value, _Sent):
            return torch.from_numpy(value.array.transpose(value.axes))
        if not isinstance(value, _Shared):
            return value
        # The buffer's own root: see `loader.buffers.BufferPool`.
        root = np.frombuffer(self._buffers[value.buffer], np.uint8)
        array: np.ndarray = np.ndarray(
            value.shape, np.dtype(value.dtype), buffer=root, strides=value.strides
        )
        self._num_mapped += 1
        if self._num_mapped > _MOST_MAPPED:
            self._freed.append(value.buffer)
            return torch.from_numpy(array).clone()
        weakref.finalize(root, self._freed.append, value.buffer).atexit = False
        return torch.from_numpy(array)

    def _take_back(self) -> list[int]:
        freed = []
        while self._freed:
            freed.append(self._freed.popleft())
        self._num_mapped -= len(freed)
        return freed

    def _death(self) -> WorkerError:
        self._process.join(_JOIN_S)
        code = self._process.exitcode
        name = signal.Signals(-code).name if code is not None and code < 0 else ""
        return WorkerError(
            "worker_died.loader", exit_code=code, facts={"signal": name} if name else {}
        )


@contextmanager
def _naming_limit() -> Iterator[None]:
    """Names the limit that keeps this process from taking a worker's descriptor."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        # RuntimeError: a message came without its descriptor, for which the system had no room.
        if isinstance(error, OSError) and error.errno != errno.EMFILE:
            raise
        limit, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise ConfigError(
            "descriptor_limit", most_mapped=_MOST_MAPPED, limit=limit, hard_limit=hard_limit
        ) from error


def _work(pipe: Connection, maker: BatchMaker, keep_bytes: int) -> None:
    """Makes batches until the consumer closes the pipe."""
    # Ctrl-C goes to the whole group; the consumer decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    # What the imports have made stays: looking through it takes 0.1 s each time Python does.
    gc.freeze()
    memory = _SharedMemory(keep_bytes)
    reported: Counter[str] = Counter()
    requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
    # The newest turn, written by the thread that receives.
    newest = [0]
    # Read at once: while this process waits for room in the pipe for an answer, the consumer must
    # not wait for room for a task.
    threading.Thread(target=_receive, args=(pipe, requests, newest), daemon=True).start()
    turn = 0
    while (request := requests.get()) is not None:
        memory.free(request.freed)
        if request.turn != turn:
            turn = request.turn
            maker.cancel()
        cancelled = request.turn < newest[0]
        answer = _Answer() if cancelled else _answered(maker, request.task, memory)
        counted = count_reading(maker.readers)
        answer.counters, reported = dict(counted - reported), counted
        descriptors = memory.settle(answer)
        try:
            _send(pipe, answer)
            for descriptor in descriptors:
                reduction.send_handle(pipe, descriptor, None)
                os.close(descriptor)
        except OSError:
            break  # the consumer has hung up
    # What the user's code has printed; there is nothing else left to put in order, and taking torch
    # down takes half a second.
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(0)


def _send(pipe: Connection, answer: _Answer) -> None:
    try:
        pipe.send(answer)
    except OSError:
        raise
    except Exception:  # noqa: BLE001 - the border of the process: the consumer raises it
        # Nothing is in the pipe yet: a batch of the user's that cannot be pickled.
        pipe.send(replace(answer, batch=None, crash=traceback.format_exc()))


def _receive(
    pipe: Connection, requests: queue.SimpleQueue[_Request | None], newest: list[int]
) -> None:
    try:
        while True:
            message = pipe.recv()
            if isinstance(message, _Cancel):
                newest[0] = message.turn
            elif isinstance(message, _Dump):
                sys.stderr.write(f"worker process {os.getpid()}:\n{stacks()}\n")
                sys.stderr.flush()
            else:
                requests.put(message)
    except (EOFError, OSError):
        requests.put(None)


def _answered(maker: BatchMaker, task: Task, memory: _SharedMemory) -> _Answer:
    try:
        made = maker.make(task, allocate=memory.empty)
    except ShardsError as error:
        return _Answer(error=error)
    except Exception:  # noqa: BLE001 - the border of the process: the consumer raises it
        return _Answer(crash=traceback.format_exc())
    batch = memory.described(made.batch)
    return _Answer(batch=batch, bad=made.bad, timings=made.timings, members=made.members)


class _SharedMemory:
    """The worker's buffers."""

    def __init__(self, keep_bytes: int) -> None:
        self._keep_bytes = keep_bytes
        self._mapped: dict[int, mmap.mmap] = {}
        self._free: deque[int] = deque()
        self._taken: dict[int, int] = {}
        """Address to buffer, of the batch that is being made."""
        self._new: list[tuple[int, int, int]] = []
        """(Buffer, bytes, descriptor)."""
        self._count = 0
        self._unshared = ""
        self._warned = False

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Gives a C-contiguous array of undefined content in a buffer of its own."""
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        if num_bytes < LEAST_POOLED_BYTES or self._unshared:
            return np.empty(shape, dtype)
        size = 1 << (num_bytes - 1).bit_length()
        number = next((n for n in reversed(self._free) if len(self._mapped[n]) == size), None)
        if number is None:
            try:
                number = self._make(size)
            except OSError as error:
                self._unshared = str(error)
                return np.empty(shape, dtype)
        else:
            self._free.remove(number)
        array: np.ndarray = np.ndarray(shape, dtype, buffer=self._mapped[number])
        self._taken[array.__array_interface__["data"][0]] = number
        return array

    def free(self, numbers: list[int]) -> None:
        """Takes buffers back."""
        self._free += numbers

    def described(self, batch: Any) -> Any:
        """Replaces the tensors of a batch by where they are; small ones are sent themselves.

        Tensors deeper than one level, and those of types that NumPy lacks, go as torch sends them.
        """
        return _each_value(batch, self._described)

    def _described(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16:
            return _Bits(self._described(value.view(torch.uint16)))
        array = _as_array(value) if isinstance(value, torch.Tensor) else None
        if array is None:
            return value
        number = self._taken.pop(value.data_ptr(), None) if value.numel() else None
        if number is None:
            by_stride = np.argsort([-stride for stride in array.strides], kind="stable")
            axes = tuple(np.argsort(by_stride).tolist())
            dense = array.transpose(by_stride)
            if dense.nbytes >= LEAST_POOLED_BYTES:  # made by a function of the user's
                shared = self.empty(dense.shape, dense.dtype)
                number = self._taken.pop(shared.__array_interface__["data"][0], None)
            if number is None:
                return _Sent(array=dense, axes=axes)
            np.copyto(shared, dense)
            array = shared.transpose(axes)
        return _Shared(
            buffer=number, dtype=array.dtype.str, shape=array.shape, strides=array.strides
        )

    def settle(self, answer: _Answer) -> list[int]:
        """Adds to an answer what the consumer must know.

        Returns:
          The descriptors to send after it.
        """
        # What a failed attempt has taken is free again.
        self._free += self._taken.values()
        self._taken.clear()
        answer.new = [(number, size) for number, size, _ in self._new]
        descriptors = [descriptor for _, _, descriptor in self._new]
        self._new.clear()
        kept = sum(len(self._mapped[number]) for number in self._free)
        while kept > self._keep_bytes and self._free:
            number = self._free.popleft()
            answer.dropped.append(number)
            kept -= len(self._mapped[number])
            del self._mapped[number]
        if self._unshared and not self._warned:
            answer.unshared, self._warned = self._unshared, True
        return descriptors

    def _make(self, size: int) -> int:
        descriptor = _anonymous_file()
        try:
            os.ftruncate(descriptor, size)
            mapped = mmap.mmap(descriptor, size)
        except (OSError, ValueError) as error:
            os.close(descriptor)
            raise OSError(f"{size} bytes cannot be mapped: {error}") from error
        self._count += 1
        self._mapped[self._count] = mapped
        self._new.append((self._count, size, descriptor))
        return self._count


def _each_value(batch: Any, change: Callable[[Any], Any]) -> Any:
    """Changes the values of a dictionary, list or tuple, or the batch itself if it is neither."""
    if type(batch) is dict:
        return {name: change(value) for name, value in batch.items()}
    if type(batch) is list:
        return [change(value) for value in batch]
    if isinstance(batch, tuple):
        values = [change(value) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else tuple(values)
    return change(batch)


def _as_array(tensor: torch.Tensor) -> np.ndarray | None:
    """Gives the memory of a tensor; None where NumPy has no such type or torch forbids it."""
    try:
        array: np.ndarray = tensor.numpy()
    except (TypeError, RuntimeError):
        return None
    return array


def _anonymous_file() -> int:
    """Opens a file that has no name: in memory where the system has such (Linux)."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("batch")
    with tempfile.TemporaryFile() as stream:
        return os.dup(stream.fileno())
