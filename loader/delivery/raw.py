"""RawBatches: batches of raw samples, decoded and collated by functions of the user's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from time import perf_counter
from typing import Any

import numpy as np
import torch

from loader.buffers import Allocate
from loader.delivery.batches import MadeBatch
from loader.delivery.stats import StageTimings
from loader.order import Row
from loader.raw import RawBuilder
from loader.user_code import naming_function

Collate = Callable[[list[Any]], Any]
"""Makes a batch of what `decode` returned for the rows of this rank, in their sequence."""


class RawBatches:
    """Makes batches of raw samples; as picklable and as safe to share as the user's functions."""

    def __init__(self, examples: Sequence[RawBuilder], collate: Collate) -> None:
        """Joins what decodes samples, for each dataset as the order numbers them, and collates."""
        self._examples, self._collate = tuple(examples), collate

    def build(
        self,
        rows: list[Row],
        *,
        allocate: Allocate,  # noqa: ARG002 - the user's function takes its own memory
        unwanted: threading.Event | None,
    ) -> MadeBatch:
        """Makes a batch; see `BatchBuilder.build`.

        Raises:
          ShardError: A sample cannot be read.
        """
        read_s = decode_s = 0.0
        read_bytes = 0
        decoded, keys = [], []
        for row in rows:
            if unwanted is not None and unwanted.is_set():
                raise CancelledError
            for ref in row:
                examples = self._examples[ref.dataset]
                begin_s = perf_counter()
                sample = examples.read(ref.sample)
                middle_s = perf_counter()
                decoded.append(examples.decode(sample, ref))
                keys.append(sample.key)
                read_s += middle_s - begin_s
                decode_s += perf_counter() - middle_s
                read_bytes += sum(payload.nbytes for payload in sample.fields.values())
        begin_s = perf_counter()
        with naming_function(self._collate, where=f"samples {', '.join(keys[:8])}"):
            batch = self._collate(decoded)
        timings = StageTimings(
            batches=1,
            samples=len(decoded),
            read_bytes=read_bytes,
            batch_bytes=_num_bytes(batch),
            read_s=read_s,
            decode_s=decode_s,
            collate_s=perf_counter() - begin_s,
        )
        return MadeBatch(batch=batch, bad=[], timings=timings)

    def describe(self) -> dict[str, Any]:
        """States say nothing of the user's functions, which have no fingerprint."""
        return {}

    def expected_bytes(self, num_rows: int) -> int:
        """Guesses that a batch is as large as its samples are in their tars."""
        num_bytes = num_samples = 0
        for examples in self._examples:
            split = examples.data.manifest.splits[examples.data.name]
            num_bytes += split.num_bytes
            num_samples += split.num_samples
        return num_rows * num_bytes // max(1, num_samples)


def _num_bytes(value: Any) -> int:
    """Counts the bytes of the tensors, arrays and byte strings in a batch."""
    if isinstance(value, torch.Tensor | np.ndarray | memoryview):
        return int(value.nbytes)
    if isinstance(value, bytes | bytearray):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_num_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_num_bytes, value))
    return 0
