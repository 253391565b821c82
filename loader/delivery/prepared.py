"""PreparedBatches: batches of prepared samples, of one per row or of packs.

All rows of a batch are planned first, from tokens and spans alone: then the shapes are known,
memory is taken from a pool, and each picture is decoded straight into the batch.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError
from time import perf_counter
from typing import Any

import torch

from loader.assembly import Draft, MMCollator, Pack, fitting
from loader.buffers import Allocate
from loader.delivery.batches import MadeBatch
from loader.delivery.stats import StageTimings
from loader.order import PackConfig, Row, SampleRef
from loader.stream import PlannedExample, PreparedBuilder
from shardspec.errors import SampleError, ShardError
from shardspec.tiling import image_bounds


class PreparedBatches:
    """Makes batches of prepared samples; picklable, and safe to share between threads."""

    def __init__(
        self,
        examples: Sequence[PreparedBuilder],
        collator: MMCollator,
        *,
        packing: PackConfig | None,
    ) -> None:
        """Joins what makes examples and how they are collated.

        Args:
          examples: For each dataset, as the order numbers them.
          collator: Of the same view.
          packing: The limits of a row of several samples; None where a row is one.
        """
        self.examples, self.collator, self.packing = tuple(examples), collator, packing

    def build(
        self, rows: list[Row], *, allocate: Allocate, unwanted: threading.Event | None
    ) -> MadeBatch:
        """Makes a batch; see `BatchBuilder.build`.

        Raises:
          ShardError, SampleError: A sample cannot be read, laid out or decoded, and is not to be
            substituted.
        """
        start_s = perf_counter()
        planned: list[list[PlannedExample]] = []
        for row in rows:
            if unwanted is not None and unwanted.is_set():
                raise CancelledError
            planned.append([self._plan(ref) for ref in row])
        while True:
            try:
                batch = self.collator.collate(self._joined(planned), allocate=allocate)
                break
            except (SampleError, ShardError):
                if not self._replace_broken(rows, planned):
                    raise
        return MadeBatch(
            batch=batch,
            bad=_substituted(rows, planned),
            timings=_timings(planned, batch, perf_counter() - start_s),
        )

    def describe(self) -> dict[str, Any]:
        """Gives the field `pad_mode` of states."""
        return {"pad_mode": self.collator.pad_mode}

    def expected_bytes(self, num_rows: int) -> int:
        """Guesses that each row has as many crops as one picture can have."""
        view = self.examples[0].view
        crop_bytes = view.image.size_px**2 * 3 * (1 if view.normalize is None else 4)
        return num_rows * image_bounds(view.image).num_crops * crop_bytes

    def _plan(self, ref: SampleRef, after_failed: PlannedExample | None = None) -> PlannedExample:
        return self.examples[ref.dataset].plan_example(ref, after_failed=after_failed)

    def _replace_broken(self, rows: list[Row], planned: list[list[PlannedExample]]) -> bool:
        """Substitutes the sample whose pictures could not be rendered; False: there is none."""
        for row, own in zip(rows, planned, strict=True):
            for i, (ref, one) in enumerate(zip(row, own, strict=True)):
                if one.draft.error is not None:
                    own[i] = self._plan(ref, after_failed=one)
                    return True
        return False

    def _joined(self, planned: list[list[PlannedExample]]) -> Sequence[Draft | Pack]:
        """Gives the examples of the rows."""
        limits = self.packing
        if limits is None:
            return [row[0].draft for row in planned]
        return [
            Pack(
                fitting(
                    [one.draft for one in row],
                    sequence_length=limits.sequence_length,
                    max_crops=limits.max_crops,
                )
            )
            for row in planned
        ]


def _substituted(rows: list[Row], planned: list[list[PlannedExample]]) -> list[dict[str, Any]]:
    return [
        {"dataset": ref.dataset, **one.draft.substitutes}
        for row, own in zip(rows, planned, strict=True)
        for ref, one in zip(row, own, strict=True)
        if one.draft.substitutes is not None
    ]


def _timings(
    planned: list[list[PlannedExample]], batch: dict[str, Any], total_s: float
) -> StageTimings:
    examples = [one for row in planned for one in row]
    read_s = sum([one.read_s for one in examples])
    layout_s = sum([one.plan_s for one in examples])
    render_s = sum([one.draft.render_s for one in examples])
    decode_s = sum([one.draft.decode_s for one in examples if one.draft.num_crops])
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    return StageTimings(
        batches=1,
        samples=len(examples),
        read_bytes=sum([one.num_bytes for one in examples]),
        batch_bytes=sum(tensor.nbytes for tensor in tensors),
        read_s=read_s,
        layout_s=layout_s,
        decode_s=decode_s,
        # It includes decoding.
        render_s=render_s - decode_s,
        collate_s=total_s - read_s - layout_s - render_s,
    )
