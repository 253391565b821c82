"""PreparedBatches: batches of prepared samples, of one per row or of packs.

All rows of a batch are planned first, from tokens and spans alone: then the shapes are known,
memory is taken from a pool, and each picture is decoded straight into the batch.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from time import perf_counter
from typing import Any

import numpy as np
import torch

from loader.assembly import (
    IGNORE_INDEX,
    Draft,
    MMCollator,
    ModelCollator,
    ModelDraft,
    ModelPack,
    OwnAugment,
    Pack,
    finished,
    finished_for_model,
    fitting,
    num_masks,
    unit_shape,
)
from loader.buffers import Allocate
from loader.delivery.arrays import stacked_boxes, stacked_field, without_fields
from loader.delivery.batches import MadeBatch
from loader.delivery.raw import Collate
from loader.delivery.stats import StageTimings
from loader.order import PackConfig, Row, SampleRef
from loader.stream import PlannedExample, PreparedBuilder
from loader.user_code import function_name, naming_function, qualified_name
from shardspec.errors import ConfigError, SampleError, ShardError
from shardspec.keyed import SampleRng
from shardspec.tiling import image_bounds

_Example = Draft | Pack | ModelDraft | ModelPack
MapExample = Callable[[dict[str, Any], np.random.RandomState], Any]
"""Changes the example of a row; all draws are to come from the generator, the sample's own."""


class PreparedBatches:
    """Makes batches of prepared samples; picklable, and safe to share between threads."""

    def __init__(
        self,
        examples: Sequence[PreparedBuilder],
        collator: MMCollator | ModelCollator,
        *,
        packing: PackConfig | None,
        columns: Sequence[str] = (),
        arrays: Sequence[str] = (),
        told: bool | Collection[str] = (),
        map: MapExample | None = None,
        collate: Collate | None = None,
    ) -> None:
        """Joins what makes examples and how they are collated.

        Args:
          examples: For each dataset, as the order numbers them.
          collator: Of the same view.
          packing: The limits of a row of several samples; None where a row is one.
          columns: Added columns that all datasets have, of the same types.
          arrays: Fields of the samples' records to stack; the builders give them as their metadata.
          told: Fields of the records that the batch's metadata keep; True: all.
          map: The user's, of each row's example before it is collated.
          collate: The user's, instead of the collator.

        Raises:
          ConfigError: `user_function`: states cannot name one of the functions.
        """
        self.examples, self.collator, self.packing = tuple(examples), collator, packing
        self.columns = tuple(columns)
        self.arrays, self._told = tuple(arrays), told
        self.map, self._collate = map, collate
        functions = {"map": map, "collate": collate}
        self._names = {name: function_name(f) for name, f in functions.items() if f is not None}
        self._rng = SampleRng()

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
        for attempt in itertools.count():
            try:
                examples = self._joined(planned)
                if self._names:
                    batch = self._made(rows, planned, examples, allocate)
                else:
                    # Of the same view: the collator and the examples are of one kind.
                    batch = self.collator.collate(examples, allocate=allocate)  # type: ignore[arg-type]
                break
            except (SampleError, ShardError):
                # One alone is replaced at once; several together, without a batch for each.
                if not self._replace_broken(rows, planned, all_of_them=attempt > 0):
                    raise
        if self.columns:
            batch |= self._added(rows, planned, examples)
        if self.arrays:
            described = [example.metadata() for example in examples]
            for name in self.arrays:
                boxes = name == "ocr_boxes"
                batch |= (
                    stacked_boxes(described) if boxes else {name: stacked_field(name, described)}
                )
            if "metadata" in batch and self._told is not True:
                batch["metadata"] = [
                    without_fields(one, {*self.arrays} - {*(self._told or ())}, bare=not self._told)
                    for one in batch["metadata"]
                ]
        return MadeBatch(
            batch=batch,
            bad=_substituted(rows, planned),
            timings=_timings(planned, batch, perf_counter() - start_s),
        )

    def _made(
        self,
        rows: list[Row],
        planned: list[list[PlannedExample]],
        examples: Sequence[Any],
        allocate: Allocate,
    ) -> Any:
        """Makes the examples of a batch one by one, for functions of the user's.

        Raises:
          ConfigError: `user_function`: one of them raises, or gives nothing that can be collated.
        """
        made: list[Any] = []
        for row, own, example in zip(rows, planned, examples, strict=True):
            whole: Any = (
                finished_for_model(example)
                if isinstance(example, ModelDraft)
                else finished(example)
            )
            if self.map is not None:
                where = whole["metadata"]["key"] or ""
                builder = self.examples[row[0].dataset]
                rng = self._rng(builder.map_seed(own[0].sample, row[0].epoch))
                known = set(whole)
                with naming_function(self.map, where=where):
                    whole = self.map(whole, rng)
                if whole is None or (self._collate is None and not isinstance(whole, Mapping)):
                    raise ConfigError(
                        "user_function.example",
                        where=where,
                        name=qualified_name(self.map),
                        got=type(whole).__name__,
                    )
                # The collator knows nothing of other keys, and would drop them in silence.
                if self._collate is None and (added := set(whole) - known):
                    names = ", ".join(sorted(map(str, added)))
                    name = qualified_name(self.map)
                    raise ConfigError("user_function.keys", where=where, name=name, keys=names)
            made.append(whole)
        if self._collate is None:
            return self.collator(made, allocate=allocate)
        keys = [one.draft.key for own in planned for one in own]
        with naming_function(self._collate, where=f"samples {', '.join(keys[:8])}"):
            return self._collate(made)

    def _added(
        self,
        rows: list[Row],
        planned: list[list[PlannedExample]],
        examples: Sequence[_Example],
    ) -> dict[str, Any]:
        """Looks up the added columns of the samples of a batch, row after row.

        Returns:
          `column_NAME`: a tensor [S] or [S, length], or a list of S texts; for packs also
          `sample_rows`, int64 [S], the row of each sample.
        """
        found: list[tuple[int, int, int]] = []
        for number, (row, own, example) in enumerate(zip(rows, planned, examples, strict=True)):
            # A substitute that did not fit is not in the pack.
            parts: Sequence[Draft | ModelDraft]
            parts = (example,) if isinstance(example, Draft) else example.parts
            kept = {id(part) for part in parts}
            found += [
                (number, ref.dataset, one.sample)
                for ref, one in zip(row, own, strict=True)
                if id(one.draft) in kept
            ]
        row_of, dataset, sample = np.array(found, np.int64).T
        values: dict[str, np.ndarray] = {}
        for number in np.unique(dataset).tolist():
            of_dataset = np.flatnonzero(dataset == number)
            reader = self.examples[number].data.reader
            for name, part in reader.columns(self.columns, sample[of_dataset]).items():
                if name not in values:
                    values[name] = np.zeros((len(sample), *part.shape[1:]), part.dtype)
                if part.dtype.itemsize > values[name].dtype.itemsize:  # longer texts
                    values[name] = values[name].astype(part.dtype)
                values[name][of_dataset] = part
        batch: dict[str, Any] = {}
        if self.packing is not None:
            batch["sample_rows"] = torch.from_numpy(row_of.copy())
        for name in self.columns:
            column = values[name]
            texts = column.dtype.kind == "S"
            batch[f"column_{name}"] = (
                [text.decode() for text in column.tolist()] if texts else torch.from_numpy(column)
            )
        return batch

    def describe(self) -> dict[str, Any]:
        """Gives the fields `pad_mode` and `functions` of states."""
        functions = {"functions": self._names} if self._names else {}
        return {"pad_mode": self.collator.pad_mode, **functions}

    def expected_bytes(self, num_rows: int) -> int:
        """Guesses that each row has as many crops as one picture can have."""
        view = self.examples[0].view
        if view.features is not None:
            # A unit of a model's picture has a row at most, and crops of Molmo have one.
            if view.model is None:
                units = image_bounds(view.image).num_crops
            else:
                units = view.model.family.plan((1000, 1000)).num_units
            item_bytes = view.features.array_dtype.itemsize
            return num_rows * units * math.prod(view.features.row_shape) * item_bytes
        if view.model is not None:
            family = view.model.family
            plan = family.plan((1000, 1000))
            row = plan.num_units * math.prod(unit_shape(family, [plan]))
            if self.packing is not None:
                row += num_masks(family) * self.packing.sequence_length**2
            return int(num_rows * row * 4)
        crop_bytes = view.image.size_px**2 * 3 * (1 if view.normalize is None else 4)
        return num_rows * image_bounds(view.image).num_crops * crop_bytes

    def _plan(self, ref: SampleRef, after_failed: PlannedExample | None = None) -> PlannedExample:
        return self.examples[ref.dataset].plan_example(ref, after_failed=after_failed)

    def _replace_broken(
        self, rows: list[Row], planned: list[list[PlannedExample]], *, all_of_them: bool
    ) -> bool:
        """Substitutes the sample whose pictures could not be rendered; False: there is none.

        Args:
          rows: The slots of the batch.
          planned: Their examples, of which those before the broken one were rendered.
          all_of_them: Find the other broken ones too, and those among the substitutes, in the order
            in which batches would: every example that was not rendered yet is made alone, once.
        """
        # By identity: the same sample may be in several slots. `planned` and `sound` keep them.
        sound: dict[int, Draft | ModelDraft] = {}
        is_first = True
        while (broken := self._first_broken(planned, sound, make=not is_first)) is not None:
            for row, own in zip(rows, planned, strict=True):
                for i, (ref, one) in enumerate(zip(row, own, strict=True)):
                    if one.draft is broken:
                        own[i] = self._plan(ref, after_failed=one)
            is_first = False
            if not all_of_them:
                break
        return not is_first

    def _first_broken(
        self,
        planned: list[list[PlannedExample]],
        sound: dict[int, Draft | ModelDraft],
        *,
        make: bool,
    ) -> Draft | ModelDraft | None:
        """Finds the first example whose pictures cannot be rendered; `sound` gets those before."""
        for example in self._joined(planned):
            parts = (example,) if isinstance(example, Draft | ModelDraft) else example.parts
            for part in parts:
                if make and id(part) not in sound and part.error is None:
                    with suppress(SampleError, ShardError):
                        finished(part) if isinstance(part, Draft) else finished_for_model(part)
                if part.error is not None:
                    return part
                sound[id(part)] = part
        return None

    def _joined(self, planned: list[list[PlannedExample]]) -> Sequence[_Example]:
        """Gives the examples of the rows."""
        limits = self.packing
        if limits is None:
            return [row[0].draft for row in planned]
        bounds = {"sequence_length": limits.sequence_length, "max_crops": limits.max_crops}
        joined: list[_Example] = []
        for row in planned:
            drafts: list[Any] = [one.draft for one in row]
            kind = Pack if isinstance(drafts[0], Draft) else ModelPack
            joined.append(kind(fitting(drafts, **bounds)))  # type: ignore[arg-type]
        return joined


def _substituted(rows: list[Row], planned: list[list[PlannedExample]]) -> list[dict[str, Any]]:
    return [
        {"dataset": ref.dataset, **one.draft.substitutes}
        for row, own in zip(rows, planned, strict=True)
        for ref, one in zip(row, own, strict=True)
        if one.draft.substitutes is not None
    ]


def _timings(planned: list[list[PlannedExample]], batch: Any, total_s: float) -> StageTimings:
    examples = [one for row in planned for one in row]
    read_s = sum([one.read_s + one.draft.read_s for one in examples])
    layout_s = sum([one.plan_s for one in examples])
    render_s = sum([one.draft.render_s for one in examples])
    decode_s = sum([one.draft.decode_s for one in examples if one.draft.num_crops])
    values = batch.values() if isinstance(batch, Mapping) else ()  # of the user's: of any type
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    positions, tokens, loss_tokens = _count_tokens(examples, values=batch)
    return StageTimings(
        batches=1,
        samples=len(examples),
        positions=positions,
        tokens=tokens,
        loss_tokens=loss_tokens,
        left_alone=sum([_left_alone(one.draft) for one in examples]),
        read_bytes=sum([one.num_bytes for one in examples]),
        batch_bytes=sum(tensor.nbytes for tensor in tensors),
        read_s=read_s,
        layout_s=layout_s,
        decode_s=decode_s,
        # It includes decoding.
        render_s=render_s - decode_s,
        collate_s=total_s - read_s - layout_s - render_s,
    )


def _left_alone(draft: Draft | ModelDraft) -> int:
    """Counts the pictures of an example that a function of the user's does not change."""
    if not isinstance(draft, Draft) or draft.view.purpose != "train":
        return 0
    if not isinstance(draft.view.augment, OwnAugment):
        return 0
    return [draw.own for draw in draft.plan.draws].count(None)


def _count_tokens(examples: list[PlannedExample], *, values: Any) -> tuple[int, int, int]:
    """Counts (positions, tokens, targets) of a batch; 0 of what a user's does not have."""
    named = values if isinstance(values, Mapping) else {}
    ids, mask, labels = (
        value.numpy() if isinstance(value, torch.Tensor) and _is_plain(value) else None
        for value in (named.get(name) for name in ("input_ids", "attention_mask", "labels"))
    )
    positions = 0 if ids is None else ids.size
    # Packs for models have no mask: they are as long as their examples.
    drafted = min(positions, sum([one.draft.num_tokens for one in examples]))
    tokens = drafted if mask is None else int(np.count_nonzero(mask))
    loss_tokens = 0 if labels is None else int(np.count_nonzero(labels != IGNORE_INDEX))
    return positions, tokens, loss_tokens


def _is_plain(value: torch.Tensor) -> bool:
    """Returns True if NumPy can see a tensor: a user's may be of any kind."""
    return value.device.type == "cpu" and value.dtype == torch.int64 and not value.requires_grad
