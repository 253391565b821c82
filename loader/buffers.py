"""Memory for batches and pictures that is used again: `BufferPool` and `Scratch`.

A batch in fresh memory faults in every page of it, which takes longer than copying the pictures
there. So a pool hands memory out and takes it back when nobody looks at it any more: a buffer goes
out as the root of an array; each view of it, and each tensor made from one, keeps the root alive;
the root's end puts the memory back. Nobody has to return anything, and what is still looked at is
never written to.

Scratch memory belongs to one thread and lives from one picture to the next.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

Allocate = Callable[[tuple[int, ...], Any], np.ndarray]
"""(shape, type) to an array of undefined content: `np.empty`, or a pool's method."""

LEAST_POOLED_BYTES = 1 << 16
"""Smaller arrays come from the allocator, which keeps such blocks mapped by itself."""

_MOST_SCRATCH_BYTES = 1 << 26
"""Larger scratch memory is not kept: one huge picture must not stay for the whole run."""


class BufferPool:
    """Hands out arrays and takes their memory back; safe to share between threads."""

    def __init__(self, *, keep_bytes: int) -> None:
        """Begins empty.

        Args:
          keep_bytes: Most bytes that wait to be used again; what was out longest goes first.
        """
        self.keep_bytes = keep_bytes
        self._lock = threading.Lock()
        self._free: deque[np.ndarray] = deque()
        self._free_bytes = 0
        # Filled by finalizers, which may run anywhere, even where this thread holds the lock.
        self._back: deque[np.ndarray] = deque()

    def __reduce__(self) -> tuple[object, ...]:
        # Memory stays here: in another process a pool begins empty.
        return (partial(BufferPool, keep_bytes=self.keep_bytes), ())

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Gives a C-contiguous array of undefined content, which nothing else looks at."""
        dtype = np.dtype(dtype)
        count = math.prod(shape)
        if count * dtype.itemsize < LEAST_POOLED_BYTES:
            return np.empty(shape, dtype)
        memory = self._take(count * dtype.itemsize)
        # Through a memoryview: NumPy lets views of views refer to the first array that owns its
        # memory, which would be the pool's own.
        root = np.frombuffer(memory.data, dtype, count)
        weakref.finalize(root, self._back.append, memory).atexit = False
        return root.reshape(shape)

    def _take(self, num_bytes: int) -> np.ndarray:
        # Powers of two, so that batches of differing lengths use the same memory; pages that are
        # never touched cost nothing.
        size = 1 << (num_bytes - 1).bit_length()
        with self._lock:
            while self._back:
                memory = self._back.popleft()
                self._free.append(memory)
                self._free_bytes += memory.nbytes
            found = None
            for i in range(len(self._free) - 1, -1, -1):
                if self._free[i].nbytes == size:
                    found = self._free[i]
                    del self._free[i]
                    self._free_bytes -= size
                    break
            while self._free_bytes > self.keep_bytes:
                self._free_bytes -= self._free.popleft().nbytes
        return np.empty(size, np.uint8) if found is None else found


class Scratch:
    """Memory for what a thread needs until its next picture, one buffer per purpose."""

    def __init__(self) -> None:
        self._local = threading.local()

    def __call__(self, purpose: str, shape: tuple[int, ...]) -> np.ndarray:
        """Gives a uint8 array of undefined content, valid until asked for this purpose again."""
        size = math.prod(shape)
        if size > _MOST_SCRATCH_BYTES:
            return np.empty(shape, np.uint8)
        buffers: dict[str, np.ndarray] = self._local.__dict__
        buffer = buffers.get(purpose)
        if buffer is None or buffer.size < size:
            buffer = buffers[purpose] = np.empty(size, np.uint8)
        return buffer[:size].reshape(shape)

    def __reduce__(self) -> tuple[object, ...]:
        return (Scratch, ())
