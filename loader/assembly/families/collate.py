"""ModelCollator: the batch that a model's `forward` takes, with its names and shapes.

    input_ids         int64   [B, L]         padding: pad_token_id
    labels            int64   [B, L]         those of the same positions (the models shift them);
                                             -100 on pictures, markup and padding
    attention_mask    int64   [B, L]         without packs only
    position_ids      int64   [B, L]         with packs: restarting with each example, which keeps
                              or [4, B, L]   them apart; four rows for multimodal positions
    attention_mask    float32 [B, 1, L, L]   with packs of PaliGemma: added to the scores of the
                              attention. Gemma 3 has two of them, by kind of layer
    use_cache         False                  with packs: models with a cache ignore the restarts
    mm_token_type_ids int64   [B, L]         1 for tokens of pictures, 2 of videos: qwen2_vl; Gemma
                                             3 calls it token_type_ids, PaliGemma's are 1 for
                                             answers; others have none
    pixel_values      float32 [N, ...]       the rows of all pictures of the batch, without padding:
                                             tiles of LLaVA-NeXT and -OneVision are not padded to
                                             the picture with most of them, and those of Idefics3
                                             and SmolVLM are one row, [1, N, ...]. Only Pixtral's
                                             pictures are padded, to the largest
    image_grid_thw    int64   [n, 3]         qwen2_vl: (1, rows, columns) of patches
    pixel_values_videos  float32 [N, ...]    the same of all frames of videos: qwen2_vl
    video_grid_thw    int64   [videos, 3]    (times, rows, columns) of patches
    second_per_grid_ts  float32 [videos]     Qwen2.5-VL: mean seconds between the frames of a video
                                             times those of a patch
    image_sizes       int64   [n, 2]         (height, width): anyres of the originals, pixtral
                                             without padding
    batch_num_images  int64   [...]          LLaVA-OneVision: pictures of each example that has any
    image_features    [N, ...]               instead of pixel_values, of a dataset of features

Those of pictures are absent from a batch without pictures, and those of videos likewise, as a
processor leaves them out. On request `subsegment_ids` (number of the example in its row, padding:
-1), `loss_weights`, `position_ids` without packs, `metadata` and `real`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from loader.assembly.collate import IGNORE_INDEX, PadSide, parse_pad_mode
from loader.assembly.families.example import ModelDraft, ModelPack
from loader.assembly.families.kernels import unit_shape
from loader.assembly.families.masks import packed_masks
from loader.assembly.families.processor import joined
from loader.assembly.features import IMAGE_FEATURES, as_tensor
from loader.buffers import Allocate
from shardspec.errors import ConfigError, SampleError, nearest
from shardspec.families import (
    AnyRes,
    Family,
    Gemma3,
    Idefics3,
    PaliGemma,
    Pixtral,
    Processor,
    Qwen2VL,
)
from shardspec.features import StoredFeatures

_Example: TypeAlias = "ModelDraft | ModelPack | _Finished"

EXTRA_KEYS = ("position_ids", "subsegment_ids", "loss_weights")

_PADDING: dict[str, float] = {
    "labels": IGNORE_INDEX,
    "mm_token_type_ids": 0,
    "token_type_ids": 0,
    "subsegment_ids": -1,
    "loss_weights": 0.0,
}


class ModelCollator:
    """Collates the examples of a dataset that was built for a model; stateless and picklable."""

    def __init__(
        self,
        family: Family,
        *,
        sequence_length: int,
        pad_mode: str = "to_128",
        pad_token_id: int = 0,
        packed: bool = False,
        pad_side: PadSide = "right",
        extra_keys: tuple[str, ...] = (),
        with_metadata: bool = False,
        with_real: bool = False,
        features: StoredFeatures | None = None,
    ) -> None:
        """Builds the collator.

        Args:
          family: The view's.
          sequence_length: Most tokens of a row, >= 1.
          pad_mode: As of `MMCollator`.
          pad_token_id: Padding of `input_ids`.
          packed: Whether rows may be of several examples.
          pad_side: As of `MMCollator`.
          extra_keys: Of `EXTRA_KEYS`, to be delivered as well.
          with_metadata, with_real, features: As of `MMCollator`.

        Raises:
          ConfigError: `pad_mode`, `extra_key`.
        """
        for name in extra_keys:
            if name not in EXTRA_KEYS:
                raise ConfigError("extra_key", hint=nearest(name, EXTRA_KEYS), got=name)
        self.family, self.sequence_length, self.pad_mode = family, sequence_length, pad_mode
        self.pad_token_id, self.packed = pad_token_id, packed
        self.with_metadata, self.with_real = with_metadata, with_real
        self.pad_side, self.features = pad_side, features
        self._multiple = parse_pad_mode(pad_mode, sequence_length=sequence_length)
        unknown = isinstance(family, Processor) and not family.packs
        if unknown and "position_ids" in extra_keys:
            raise ConfigError("extra_positions")
        self._positions = packed or "position_ids" in extra_keys
        columns = ["input_ids", "labels"]
        columns += [family.type_ids] if family.type_ids else []
        self._columns = (*columns, *(name for name in extra_keys if name != "position_ids"))

    def __call__(
        self, examples: Sequence[Mapping[str, Any]], *, allocate: Allocate = np.empty
    ) -> dict[str, Any]:
        """Collates finished examples, as `finished_for_model` makes them.

        Raises:
          SampleError, ConfigError: As `collate`.
        """
        rows = [_Finished(example, self.family) for example in examples]
        return self.collate(rows, allocate=allocate)

    def collate(
        self, examples: Sequence[_Example], *, allocate: Allocate = np.empty
    ) -> dict[str, Any]:
        """Collates examples whose arrays are still to be made.

        Args:
          examples: At least one.
          allocate: Gives the memory of each tensor.

        Raises:
          SampleError: `too_long`, and as `ModelDraft.write_units`.
          ConfigError: `empty_batch`.
        """
        if not examples:
            raise ConfigError("empty_batch")
        longest = max(example.num_tokens for example in examples)
        if longest > self.sequence_length:
            key = next(e for e in examples if e.num_tokens == longest).metadata()["key"]
            raise SampleError(
                "too_long", where=key, tokens=longest, sequence_length=self.sequence_length
            )
        width = min(-(-longest // self._multiple) * self._multiple, self.sequence_length)
        arrays = {name: self._column(name, examples, width, allocate) for name in self._columns}
        if not self.packed:
            mask = arrays["attention_mask"] = allocate((len(examples), width), np.int64)
            lengths = np.array([example.num_tokens for example in examples])
            numbers = np.arange(width)[:: -1 if self.pad_side == "left" else 1]
            np.less(numbers, lengths[:, None], out=mask)
        if self._positions:
            arrays["position_ids"] = self._position_ids(examples, width, allocate)
        batch: dict[str, Any] = {name: torch.from_numpy(a) for name, a in arrays.items()}
        if self.packed:
            # With a cache, models do not look at where positions restart, and examples see each
            # other: transformers, masking_utils.py.
            batch["use_cache"] = False
            if isinstance(self.family, Gemma3 | PaliGemma):
                # Its tokens see some of what follows them.
                types = [[p.column(self.family.type_ids) for p in e.parts] for e in examples]
                batch["attention_mask"] = packed_masks(self.family, types, width)
        batch |= self._pictures(examples, allocate)
        if self.with_metadata:
            batch["metadata"] = [example.metadata() for example in examples]
        if self.with_real:
            real = [bool(example.metadata().get("real", True)) for example in examples]
            batch["real"] = torch.tensor(real)
        return batch

    def _column(
        self,
        name: str,
        examples: Sequence[_Example],
        width: int,
        allocate: Allocate,
    ) -> np.ndarray:
        dtype = np.float32 if name == "loss_weights" else np.int64
        array = allocate((len(examples), width), dtype)
        padding = self.pad_token_id if name == "input_ids" else _PADDING[name]
        for row, example in enumerate(examples):
            done = self._first(example, width)
            array[row, :done] = padding
            parts: Sequence[ModelDraft | _Finished] = example.parts
            for number, part in enumerate(parts):
                stop = done + part.num_tokens
                array[row, done:stop] = part.column(name)
                if name == "subsegment_ids":
                    array[row, done:stop] = number
                elif name == "labels" and number:
                    # The token in front of it is another example's: nobody predicts it.
                    array[row, done] = IGNORE_INDEX
                done = stop
            array[row, done:] = padding
        return array

    def _first(self, example: _Example, width: int) -> int:
        """Gives the position of the first token of a row."""
        return width - example.num_tokens if self.pad_side == "left" else 0

    def _position_ids(
        self, examples: Sequence[_Example], width: int, allocate: Allocate
    ) -> np.ndarray:
        mrope = self.family.positions == "mrope"
        shape = (4, len(examples), width) if mrope else (len(examples), width)
        array = allocate(shape, np.int64)
        for row, example in enumerate(examples):
            done = self._first(example, width)
            array[..., row, :done] = 0
            for part in example.parts:
                stop = done + part.num_tokens
                array[..., row, done:stop] = part.positions()
                done = stop
            # Padding counts as an example of its own.
            array[..., row, done:] = np.arange(width - done)
        return array

    def _pictures(
        self, examples: Sequence[_Example], allocate: Allocate
    ) -> dict[str, torch.Tensor]:
        parts = [
            part
            for example in examples
            for part in example.parts
            if part.num_units or part.num_video_units
        ]
        drafts = [part for part in parts if isinstance(part, ModelDraft)]
        found: dict[str, torch.Tensor]
        if not drafts:
            found = joined([part.pictures for part in parts if isinstance(part, _Finished)])
            if self.features is not None and found:
                found[IMAGE_FEATURES] = as_tensor(found[IMAGE_FEATURES].numpy(), self.features)
        elif isinstance(self.family, Processor):
            found = joined([draft.processed() for draft in drafts])
        else:
            found = self._rendered(drafts, allocate)
        if isinstance(self.family, Idefics3) and found:
            # Its models drop rows of zeros, which pad the pictures of one example to those of
            # another, and take all others one after the other: so one row needs no padding.
            found = {n: v[None] if n == "pixel_values" else v for n, v in found.items()}
        return found

    def _rendered(
        self, drafts: Sequence[ModelDraft], allocate: Allocate
    ) -> dict[str, torch.Tensor]:
        if self.features is not None:
            return _read(drafts, self.features, allocate) | {
                name: torch.from_numpy(array)
                for name, array in _described(self.family, drafts).items()
            }
        found = _rendered(self.family, drafts, allocate)
        return {name: torch.from_numpy(array) for name, array in found.items()}


def _read(
    drafts: Sequence[ModelDraft], stored: StoredFeatures, allocate: Allocate
) -> dict[str, torch.Tensor]:
    counts = [sum(draft.feature_rows()) for draft in drafts]
    array = allocate((sum(counts), *stored.row_shape), stored.array_dtype)
    done = 0
    for draft, count in zip(drafts, counts, strict=True):
        draft.write_features(array[done : done + count])
        done += count
    return {IMAGE_FEATURES: as_tensor(array, stored)}


class _Finished:
    """A finished example, as a row to collate."""

    def __init__(self, example: Mapping[str, Any], family: Family) -> None:
        self._example = example
        self.parts: tuple[_Finished, ...] = (self,)
        self.num_tokens = len(example["input_ids"])
        known = {"input_ids", "labels", "metadata", "position_ids", *EXTRA_KEYS, family.type_ids}
        self.pictures = {k: torch.as_tensor(v) for k, v in example.items() if k not in known}
        self.num_units = self.num_video_units = len(self.pictures)

    def column(self, name: str) -> np.ndarray:
        return np.asarray(self._example[name])

    def positions(self) -> np.ndarray:
        return np.asarray(self._example["position_ids"])

    def metadata(self) -> dict[str, Any]:
        found: dict[str, Any] = self._example["metadata"]
        return found


def _rendered(
    family: Family, drafts: Sequence[ModelDraft], allocate: Allocate
) -> dict[str, np.ndarray]:
    """Renders the pictures and videos of some examples, and lists what models want to know."""
    plans = [picture for draft in drafts for picture in draft.plan.pictures]
    shape = unit_shape(family, plans)
    sums = [sum(d.num_units for d in drafts), sum(d.num_video_units for d in drafts)]
    # Without videos no memory is asked for them.
    made = [allocate((n, *shape), np.float32) if n else np.empty((0, *shape)) for n in sums]
    done = [0, 0]
    for draft in drafts:
        stops = [done[0] + draft.num_units, done[1] + draft.num_video_units]
        draft.write_units(made[0][done[0] : stops[0]], made[1][done[1] : stops[1]])
        done = stops
    names = ("pixel_values", "pixel_values_videos")
    found = {name: array for name, array in zip(names, made, strict=True) if len(array)}
    return {**found, **_described(family, drafts)}


def _described(family: Family, parts: Sequence[ModelDraft]) -> dict[str, np.ndarray]:
    """Lists what models want to know of the pictures of some examples besides their pixels."""
    plans = [picture for part in parts for picture in part.plan.pictures]
    if isinstance(family, Qwen2VL):
        grids = [[], []]  # type: list[list[tuple[int, ...]]]
        for plan in plans:
            grids[plan.num_frames > 0].append((plan.num_times, *plan.grid))
        seconds = [patch_s for part in parts for patch_s in part.plan.seconds]
        named = {"image_grid_thw": np.array(grids[0], np.int64)} if grids[0] else {}
        named |= {"video_grid_thw": np.array(grids[1], np.int64)} if grids[1] else {}
        if grids[1] and family.video and family.video.times == "seconds":
            named["second_per_grid_ts"] = np.array(seconds, np.float32)
        return named
    if isinstance(family, Pixtral):
        return {"image_sizes": np.array([plan.resized for plan in plans], np.int64)}
    if not isinstance(family, AnyRes):
        return {}
    sizes = [size[::-1] for part in parts for size in part.plan.sizes]
    found = {"image_sizes": np.array(sizes, np.int64)}
    if family.single_tiles:
        counts = [len(part.plan.pictures) for part in parts]
        found["batch_num_images"] = np.array(counts, np.int64)
    return found


def finished_for_model(draft: ModelDraft) -> dict[str, Any]:
    """Makes every array of an example: the keys of a batch, without their axis of rows.

    Raises:
      ShardError, SampleError: As `ModelDraft.write_units`.
    """
    family = draft.view.family
    names = ["input_ids", "labels", "subsegment_ids", "loss_weights"]
    names += [family.type_ids] if family.type_ids else []
    made: dict[str, Any] = {name: draft.column(name) for name in names}
    made["position_ids"] = draft.positions()
    if draft.num_units and isinstance(family, Processor):
        made |= {name: value.numpy() for name, value in draft.processed().items()}
    elif draft.num_units and draft.features is not None:
        rows = np.empty(
            (sum(draft.feature_rows()), *draft.features.row_shape), draft.features.array_dtype
        )
        draft.write_features(rows)
        made |= {IMAGE_FEATURES: rows, **_described(family, [draft])}
    elif draft.plan.pictures:
        made |= _rendered(family, [draft], np.empty)
    made["metadata"] = draft.metadata()
    return made
