"""Collation: examples of different lengths and image counts become one batch of tensors.

Pads text at the right (at the left on request) and images at the end of their axis, and nothing
else: no value is computed, no randomness, no state. The batch has exactly these keys, whatever the
examples hold:

    input_ids        int64   [B, L]           padding: pad_token_id
    labels           int64   [B, L]           padding: -100 (aligned with input_ids, see below)
    images           as given [B, M, C, H, W] padding: 0
    image_masks      float32 [B, M, patches]  padding: 0
    image_input_idx  int64   [B, M]           padding: -1
    attention_mask   int64   [B, L]           1 for tokens of the example, 0 for padding

and, where asked for, `position_ids` (0), `subsegment_ids` (-1), `loss_weights` (0), `metadata` (a
list of dictionaries) and `real` (bool [B], False for rows that only fill the batch). L follows from
the pad mode, M is the batch's maximum or a fixed number.

Features of a backbone that stand for pictures (`View.features`) are `image_features` instead of
`images`: [B, M, *row], of the type that is stored.

Two other forms of pictures are taken as the view gives them: `images` as patches [B, M, P, D], and
maps from image to tokens: `image_input_idx` per token [B, M, T] (padding -100, as for tokens of
other crops), or `token_pooling` int64 [B, R, pool] (padding -1), R the batch's most image tokens.

`labels[t]` is the target of input position t: examples come shifted, and the model must not shift
them again.

Pictures usually come as [n, C, H, W] views of [n, H, W, C] memory. The batch keeps that order: its
memory is [B, M, H, W, C], and `images` is a permuted view (channels last, as convolutions like it),
so that pictures are copied row by row and no value is ever moved by itself. Examples whose arrays
are not made yet (`LazyExample`) write them straight into the batch.
"""

# Shape letters: B examples, L tokens, M images per example, C channels, H x W pixels, n images of
# one example.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch

from loader.assembly.features import IMAGE_FEATURES, as_tensor
from loader.assembly.layout import COLUMNS, cut
from loader.buffers import Allocate
from shardspec.errors import ConfigError, SampleError, nearest
from shardspec.features import StoredFeatures
from shardspec.tiling import EXCLUDED, NO_PATCH

IGNORE_INDEX = -100
"""Label of positions without loss: the default `ignore_index` of torch.nn.CrossEntropyLoss."""

EXTRA_KEYS: Mapping[str, tuple[type[np.generic], float]] = {
    "position_ids": (np.int64, 0),
    "subsegment_ids": (np.int64, -1),
    "loss_weights": (np.float32, 0.0),
}
"""Optional keys of one value per token: their type in the batch and their padding."""

_PIXEL_TYPES = (np.dtype(np.uint8), np.dtype(np.float32))

PadSide = Literal["right", "left"]
"""Where texts are padded: models that generate need the left, so that all prompts end together."""

IMAGES = "images"
_MAPS = ("image_masks", "image_input_idx")

Example = Mapping[str, Any]


class Shapes(NamedTuple):
    """The shapes of what an example has for each crop, without the axis of the crops."""

    image: tuple[int, ...]
    """(C, H, W), or (patches, dim)."""
    dtype: np.dtype
    """Of images."""
    num_patches: int
    """Of a mask."""
    tokens_per_crop: int | None
    """Of `image_input_idx`, where it maps every token."""
    pool: int | None
    """Of `token_pooling`'s rows; None without it."""
    key: str = IMAGES
    """What they are called: pictures, or features."""


class LazyExample(Protocol):
    """An example whose arrays are still to be made: a sample's (`Draft`), a row's (`Pack`)."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def num_crops(self) -> int: ...
    @property
    def shapes(self) -> Shapes: ...
    @property
    def channels_first(self) -> bool:
        """Whether its pictures are [n, C, H, W] in memory."""

    def pieces(self, name: str) -> list[np.ndarray]:
        """Lists the arrays that `input_ids`, `labels` or one of `EXTRA_KEYS` consists of."""

    def write_images(self, out: np.ndarray) -> None:
        """Writes the pictures: [n, C, H, W] or [n, patches, dim]."""

    def write_masks(self, out: np.ndarray) -> None:
        """Writes `image_masks`: float32 [n, patches]."""

    def write_input_idx(self, out: np.ndarray) -> None:
        """Writes `image_input_idx`: int64 [n] or [n, tokens per crop]."""

    def image_ends(self) -> Sequence[int]:
        """Lists, for each crop, one past the last token of its image."""

    def pooling(self) -> np.ndarray:
        """Makes `token_pooling`: integers [image tokens, pool]."""

    def metadata(self) -> Mapping[str, Any]:
        """Describes the example; its `key` names it in errors."""


class MMCollator:
    """Collates multimodal examples; stateless, picklable and safe to call from several threads.

    An example maps `input_ids` and `labels` (integers [n_tokens]), and for pictures `images` (uint8
    or float32 [n, C, H, W]), `image_masks` ([n, patches]) and `image_input_idx` (integers [n], the
    position in `input_ids` of each image's first patch token) to numpy arrays. Without pictures
    these three are absent or have n == 0. `image_end` (integers [n], one past the last token of
    each image), where present, makes the check of "truncate" exact. Extra keys are [n_tokens].
    """

    def __init__(
        self,
        *,
        sequence_length: int,
        pad_mode: str = "to_128",
        pad_token_id: int = 0,
        image_shape: tuple[int, ...] = (3, 336, 336),
        num_patches: int = 576,
        tokens_per_crop: int | None = None,
        pool: int | None = None,
        min_images: int = 0,
        max_images: int | None = None,
        max_pooled: int | None = None,
        image_dtype: type[np.generic] | np.dtype = np.uint8,
        features: StoredFeatures | None = None,
        overlong: Literal["error", "truncate"] = "error",
        with_metadata: bool = False,
        with_real: bool = False,
        extra_keys: tuple[str, ...] = (),
        pad_side: PadSide = "right",
    ) -> None:
        """Builds the collator.

        Args:
          sequence_length: Most tokens of an example, >= 1.
          pad_mode: "max_len" pads to `sequence_length`; "batch_max" to the longest example;
            "to_N" to the next multiple of N from there, but never beyond `sequence_length`.
          pad_token_id: Padding of `input_ids`.
          image_shape: (C, H, W) of every image, or (patches, dim) for images as patches.
          num_patches: Patches of one image, the second axis of `image_masks`.
          tokens_per_crop: Second axis of `image_input_idx` where it maps every token of a crop.
          pool: Second axis of `token_pooling`; None leaves that key out.
          min_images: Least images per row of the batch, where its examples have fewer: the rest is
            padding, which no token refers to. With 1, batches without any picture have a padding
            picture per row, and one row of `token_pooling`.
          max_images: Fixed number of images per row of the batch; None takes the most of the batch.
          max_pooled: Fixed number of rows of `token_pooling`, at least as many as image tokens;
            None takes the most of the batch.
          image_dtype: Of `images` where no example of the batch has any, but there is padding.
          features: What stands for pictures, of the shape `image_shape` for each; None: pictures.
          overlong: What happens to an example longer than `sequence_length`: refused, or cut where
            that loses no image and leaves something to learn.
          with_metadata: Hand over the examples' `metadata`, {} where there is none.
          with_real: Add `real`, which is False for rows whose `metadata` says so: repeats that fill
            the last batch of an evaluation.
          extra_keys: Names of `EXTRA_KEYS` to hand over; every example must have them.
          pad_side: "left" puts the padding of the texts in front of them, for generation; what
            `image_input_idx` points at moves along.

        Raises:
          ConfigError: `pad_side`, `pad_mode`, `overlong`, `extra_key` or `collator_range`.
        """
        numbers = {"sequence_length": sequence_length, "num_patches": num_patches}
        axes = {3: ("channels", "height", "width"), 2: ("patches", "dim")}.get(
            len(image_shape), ("dim",)
        )
        numbers |= dict(zip(axes, image_shape, strict=True))
        numbers |= {"tokens_per_crop": 1 if tokens_per_crop is None else tokens_per_crop}
        numbers |= {"pool": 1 if pool is None else pool}
        numbers |= {"max_pooled": 1 if max_pooled is None else max_pooled}
        bad: dict[str, object] = {name: value for name, value in numbers.items() if value < 1}
        if min_images < 0 or (max_images is not None and max_images < min_images):
            bad |= {"min_images": min_images, "max_images": max_images}
        if bad:
            raise ConfigError("collator_range", facts=bad)
        if overlong not in ("error", "truncate"):
            raise ConfigError("overlong", got=repr(overlong))
        if pad_side not in ("right", "left"):
            raise ConfigError("pad_side", got=repr(pad_side))
        for name in extra_keys:
            if name not in EXTRA_KEYS:
                raise ConfigError("extra_key", hint=nearest(name, EXTRA_KEYS), got=name)
        self.sequence_length = sequence_length
        self.pad_mode = pad_mode
        self.pad_token_id = pad_token_id
        self.image_shape = tuple(image_shape)
        self.num_patches = num_patches
        self.tokens_per_crop = tokens_per_crop
        self.pool = pool
        self.min_images, self.max_images = min_images, max_images
        self.max_pooled = max_pooled
        self.image_dtype = np.dtype(image_dtype)
        self.features = features
        self.image_key = IMAGES if features is None else IMAGE_FEATURES
        self.overlong = overlong
        self.with_metadata = with_metadata
        self.with_real = with_real
        self.extra_keys = tuple(extra_keys)
        self.pad_side = pad_side
        self._multiple = parse_pad_mode(pad_mode, sequence_length=sequence_length)
        self._text_specs: dict[str, tuple[type[np.generic], float]] = {
            "input_ids": (np.int64, pad_token_id),
            "labels": (np.int64, IGNORE_INDEX),
            **{name: EXTRA_KEYS[name] for name in self.extra_keys},
        }

    def __call__(
        self, examples: Sequence[Example], *, allocate: Allocate = np.empty
    ) -> dict[str, Any]:
        """Collates examples into a batch: the keys of the module docstring.

        The examples are only read, and the tensors share nothing with them.

        Args:
          examples: At least one.
          allocate: As of `collate`.

        Raises:
          As `collate`.
        """
        counts = [_num_images(example, self.image_key) for example in examples]
        self._check(examples, counts)
        made = [_Made(*pair, self.image_key) for pair in zip(examples, counts, strict=True)]
        return self.collate(made, allocate=allocate)

    def collate(
        self, examples: Sequence[LazyExample], *, allocate: Allocate = np.empty
    ) -> dict[str, Any]:
        """Collates examples whose arrays are still to be made, in memory of the caller's choice.

        Args:
          examples: At least one.
          allocate: Gives the memory of each tensor, C-contiguous and of any content.

        Raises:
          SampleError: `too_long`, `image_cut`, `no_loss` or `too_many_images`, naming the example
            by the `key` of its metadata, or else by its row; as `LazyExample.write_images`.
          ConfigError: `empty_batch`; `example_mismatch`, for examples whose arrays do not fit each
            other or the collator, listing all of them.
        """
        if not examples:
            raise ConfigError("empty_batch")
        self._require_fitting(examples)
        lengths = [example.num_tokens for example in examples]
        if max(lengths) > self.sequence_length or self.max_images is not None:
            lengths = [self._kept_length(row, example) for row, example in enumerate(examples)]
        batch: dict[str, Any] = {**self._collate_text(examples, lengths, allocate)}
        shifts = [0] * len(examples)
        if self.pad_side == "left":
            shifts = [batch["input_ids"].shape[1] - length for length in lengths]
        batch |= self._collate_images(examples, allocate, shifts)
        if self.with_metadata:
            batch["metadata"] = [example.metadata() for example in examples]
        if self.with_real:
            real = [bool(example.metadata().get("real", True)) for example in examples]
            batch["real"] = torch.tensor(real)
        return batch

    def _collate_text(
        self, examples: Sequence[LazyExample], lengths: list[int], allocate: Allocate
    ) -> dict[str, torch.Tensor]:
        longest = max(lengths)
        padded = -(-longest // self._multiple) * self._multiple
        shape = (len(examples), min(padded, self.sequence_length))
        arrays = {}
        for name, (dtype, pad) in self._text_specs.items():
            padding = np.full(shape[1], pad, dtype)
            pieces: list[np.ndarray] = []
            for example, length in zip(examples, lengths, strict=True):
                own = example.pieces(name)
                own = own if length == example.num_tokens else cut(own, length)
                filling = padding[length:]
                pieces += (filling, *own) if self.pad_side == "left" else (*own, filling)
            arrays[name] = allocate(shape, dtype)
            # One call for all rows: writing them one by one takes five times as long.
            np.concatenate(pieces, out=arrays[name].reshape(-1), casting="unsafe")
        mask = arrays["attention_mask"] = allocate(shape, np.int64)
        numbers = np.arange(shape[1])
        if self.pad_side == "left":
            numbers = numbers[::-1]
        np.less(numbers, np.array(lengths)[:, None], out=mask)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _collate_images(
        self, examples: Sequence[LazyExample], allocate: Allocate, shifts: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        num = self.max_images
        if num is None:
            num = max(self.min_images, *[example.num_crops for example in examples])
        images = self._image_buffer(examples, num, allocate)
        masks = allocate((len(examples), num, self.num_patches), np.float32)
        index_shape: tuple[int, ...] = (len(examples), num)
        index_pad = -1
        if self.tokens_per_crop is not None:
            index_shape, index_pad = (*index_shape, self.tokens_per_crop), EXCLUDED
        input_idx = allocate(index_shape, np.int64)
        # Batches of texts mostly have no room for pictures: nothing to write.
        rows = list(enumerate(examples)) if num else []
        for row, example in rows:
            n = example.num_crops
            if n:
                example.write_masks(masks[row, :n])
                example.write_input_idx(input_idx[row, :n])
                if shifts[row]:
                    input_idx[row, :n][input_idx[row, :n] >= 0] += shifts[row]
            if n < num:
                images[row, n:] = 0
                masks[row, n:] = 0
                input_idx[row, n:] = index_pad
        arrays = {"image_masks": masks, "image_input_idx": input_idx}
        if self.pool is not None:
            arrays["token_pooling"] = self._collate_pooling(examples, self.pool, allocate)
        pixels = torch.from_numpy(images)
        if self.features is not None:
            pixels = as_tensor(images, self.features)
        tensors = {self.image_key: pixels}
        tensors |= {name: torch.from_numpy(array) for name, array in arrays.items()}
        # After all the rest: a decoder evicts everything else from the caches.
        for row, example in rows:
            if n := example.num_crops:
                example.write_images(images[row, :n])
        return tensors

    def _collate_pooling(
        self, examples: Sequence[LazyExample], pool: int, allocate: Allocate
    ) -> np.ndarray:
        rows = [example.pooling() for example in examples]
        least = 1 if self.min_images or self.max_images else 0
        num = self.max_pooled
        if num is None:
            num = max(least, *map(len, rows))
        for row, (example, array) in enumerate(zip(examples, rows, strict=True)):
            if len(array) > num:
                where = _name(row, example.metadata())
                facts = {"image_tokens": len(array), "max_pooled": num}
                raise SampleError("too_many_images.batch", where=where, facts=facts)
        pooling = allocate((len(rows), num, pool), np.int64)
        for row, array in enumerate(rows):
            pooling[row, : len(array)] = array
            pooling[row, len(array) :] = NO_PATCH
        return pooling

    def _image_buffer(
        self, examples: Sequence[LazyExample], num: int, allocate: Allocate
    ) -> np.ndarray:
        """Allocates [B, M, C, H, W] with the type and the memory order of the first pictures.

        Batches without pictures have channels last.
        """
        first = next((example for example in examples if example.num_crops), None)
        dtype = np.dtype(np.uint8)
        if num:
            dtype = self.image_dtype if first is None else first.shapes.dtype
        shape = (len(examples), num)
        if len(self.image_shape) != 3 or (first is not None and first.channels_first):
            return allocate((*shape, *self.image_shape), dtype)
        channels, height, width = self.image_shape
        buffer = allocate((*shape, height, width, channels), dtype)
        return np.moveaxis(buffer, -1, 2)

    def _require_fitting(self, examples: Sequence[LazyExample]) -> None:
        """Refuses examples with pictures that do not fit each other or the collator."""
        seen = {example.shapes for example in examples if example.num_crops}
        if len({shapes.dtype for shapes in seen}) > 1 or not all(map(self._fits, seen)):
            made = [finished(example) for example in examples]
            self._check(made, [example.num_crops for example in examples])

    def _fits(self, shapes: Shapes) -> bool:
        return (
            shapes.image == self.image_shape
            and shapes.key == self.image_key
            and shapes.num_patches == self.num_patches
            and shapes.tokens_per_crop == self.tokens_per_crop
            and self.pool in (None, shapes.pool)
        )

    def _kept_length(self, row: int, example: LazyExample) -> int:
        """Counts the tokens to keep of an example, at most `sequence_length`."""
        limit, length, num = self.sequence_length, example.num_tokens, example.num_crops
        if self.max_images is not None and num > self.max_images:
            raise SampleError(
                "too_many_images.batch",
                where=_name(row, example.metadata()),
                images=num,
                max_images=self.max_images,
            )
        if length <= limit:
            return length
        facts = {"tokens": length, "sequence_length": limit}
        if self.overlong == "error":
            raise SampleError("too_long", where=_name(row, example.metadata()), facts=facts)
        if num:
            end = max(example.image_ends())
            if end > limit:
                raise SampleError(
                    "image_cut.example",
                    where=_name(row, example.metadata()),
                    facts=facts | {"image_end": end},
                )
        if not any((piece != IGNORE_INDEX).any() for piece in cut(example.pieces("labels"), limit)):
            raise SampleError("no_loss.example", where=_name(row, example.metadata()), facts=facts)
        return limit

    def _check(self, examples: Sequence[Example], counts: list[int]) -> None:
        """Refuses examples that do not fit each other or the collator, and lists all of them."""
        pairs = list(zip(examples, counts, strict=True))
        problems = [problem for pair in pairs for problem in self._problems(*pair)]
        types = {
            example[self.image_key].dtype
            for example, num in pairs
            if num and isinstance(example.get(self.image_key), np.ndarray)
        }
        if len(types) > 1:
            problems.append(f"{self.image_key} of several types")
        if problems:
            specs = {
                _name(row, _metadata(example)): _spec(example)
                for row, example in enumerate(examples)
            }
            raise ConfigError(
                "example_mismatch.batch",
                where="; ".join(dict.fromkeys(problems)),
                want=f"{self.image_key} {self._type_names} "
                f"[n, {_joined(self.image_shape)}], "
                f"image_masks [n, {self.num_patches}], image_input_idx [n"
                + (f", {self.tokens_per_crop}]" if self.tokens_per_crop else "]"),
                facts=specs,
            )

    def _problems(self, example: Example, num: int) -> list[str]:
        """Lists what is wrong with one example of `num` images by itself."""
        missing = [key for key in self._text_specs if key not in example]
        image_keys = (self.image_key, *_MAPS)
        if num:
            missing += [key for key in image_keys if key not in example]
        if missing:
            return [f"{key} is missing" for key in missing]
        if "pixel_values" in example:
            return [
                "pixel_values are of a dataset for a model, whose batches make_dataloader makes"
            ]
        known = (*self._text_specs, *image_keys, "image_end", "token_pooling")
        if wrong := [key for key in known if key in example and not _is_listed(example[key])]:
            return [f"{key} is not an array: {type(example[key]).__name__}" for key in wrong]
        if num and len({len(example[key]) for key in image_keys}) > 1:
            return [f"{', '.join(image_keys)} differ in length"]
        want: dict[str, tuple[int, ...]]
        want = dict.fromkeys(self._text_specs, (len(example["input_ids"]),))
        if num:
            want[self.image_key] = (num, *self.image_shape)
            want["image_masks"] = (num, self.num_patches)
            per_token = () if self.tokens_per_crop is None else (self.tokens_per_crop,)
            want["image_input_idx"] = (num, *per_token)
            if self.pool is not None:
                if "token_pooling" not in example:
                    return ["token_pooling is missing"]
                want["token_pooling"] = (len(example["token_pooling"]), self.pool)
            if "image_end" in example:
                want["image_end"] = (num,)
        found = [f"{key} has another shape" for key in want if example[key].shape != want[key]]
        found += [
            f"{key} is not of integers"
            for key in ("input_ids", "labels", "image_input_idx")
            if key in want and example[key].dtype.kind not in "iu"
        ]
        if num and example[self.image_key].dtype not in self._types:
            found.append(f"{self.image_key} of a type that is not {self._type_names}")
        return found

    @property
    def _types(self) -> tuple[np.dtype, ...]:
        return _PIXEL_TYPES if self.features is None else (self.features.array_dtype,)

    @property
    def _type_names(self) -> str:
        return " or ".join(map(str, self._types))


class _Made:
    """An example whose arrays are there."""

    def __init__(self, example: Example, num_crops: int, image_key: str) -> None:
        self._example, self.num_crops, self._image_key = example, num_crops, image_key
        self.num_tokens = len(example["input_ids"])

    @property
    def shapes(self) -> Shapes:
        images, input_idx = self._example[self._image_key], self._example["image_input_idx"]
        pooling = self._example.get("token_pooling")
        return Shapes(
            image=images.shape[1:],
            dtype=images.dtype,
            num_patches=self._example["image_masks"].shape[1],
            tokens_per_crop=input_idx.shape[1] if input_idx.ndim == 2 else None,
            pool=None if pooling is None else pooling.shape[1],
            key=self._image_key,
        )

    @property
    def channels_first(self) -> bool:
        strides: tuple[int, ...] = self._example[self._image_key].strides
        return strides[1] > strides[-1]

    def pieces(self, name: str) -> list[np.ndarray]:
        return [self._example[name]]

    def write_images(self, out: np.ndarray) -> None:
        np.copyto(out, self._example[self._image_key])

    def write_masks(self, out: np.ndarray) -> None:
        out[...] = self._example["image_masks"]

    def write_input_idx(self, out: np.ndarray) -> None:
        out[...] = self._example["image_input_idx"]

    def image_ends(self) -> list[int]:
        # Without image_end only the position of the first token of an image is known.
        example = self._example
        ends = example["image_end"] if "image_end" in example else example["image_input_idx"] + 1
        found: list[int] = np.ravel(ends).tolist()
        return found

    def pooling(self) -> np.ndarray:
        found: np.ndarray = self._example.get("token_pooling", np.zeros((0, 1), np.int64))
        return found

    def metadata(self) -> Mapping[str, Any]:
        return _metadata(self._example)


def parse_pad_mode(pad_mode: str, *, sequence_length: int) -> int:
    """Turns a pad mode into the number that lengths are rounded up to a multiple of.

    >>> [parse_pad_mode(m, sequence_length=2048) for m in ("max_len", "batch_max", "to_128")]
    [2048, 1, 128]
    """
    if pad_mode == "max_len":
        return sequence_length
    if pad_mode == "batch_max":
        return 1
    multiple = pad_mode.removeprefix("to_")
    if pad_mode.startswith("to_") and multiple.isascii() and multiple.isdigit() and int(multiple):
        return int(multiple)
    raise ConfigError("pad_mode", got=repr(pad_mode))


def finished(example: LazyExample) -> dict[str, Any]:
    """Makes every array of an example, as `loader.assembly.assemble.assemble` describes them.

    Raises:
      ShardError, SampleError: As `LazyExample.write_images`.
    """
    num, shapes = example.num_crops, example.shapes
    made: dict[str, Any] = {
        name: np.concatenate(example.pieces(name), dtype=dtype, casting="unsafe")
        for name, dtype in COLUMNS.items()
    }
    if len(shapes.image) == 3:
        channels, height, width = shapes.image
        images = np.empty((num, height, width, channels), shapes.dtype).transpose(0, 3, 1, 2)
    else:
        images = np.empty((num, *shapes.image), shapes.dtype)
    made[shapes.key] = images
    made["image_masks"] = np.empty((num, shapes.num_patches), np.float32)
    per_token = () if shapes.tokens_per_crop is None else (shapes.tokens_per_crop,)
    made["image_input_idx"] = np.empty((num, *per_token), np.int64)
    if num:
        example.write_images(images)
        example.write_masks(made["image_masks"])
        example.write_input_idx(made["image_input_idx"])
    made["image_end"] = np.array(example.image_ends(), np.int64)
    made["metadata"] = example.metadata()
    if shapes.pool is not None:
        made["token_pooling"] = example.pooling()
    return made


def _num_images(example: Example, image_key: str) -> int:
    most = 0
    for key in (image_key, *_MAPS):
        if key in example:
            # What has no length is refused as no array.
            most = max(most, len(example[key]) if _is_listed(example[key]) else 1)
    return most


def _is_listed(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.ndim > 0


def _metadata(example: Example) -> Mapping[str, Any]:
    found: Mapping[str, Any] = example.get("metadata") or {}
    return found


def _name(row: int, metadata: Mapping[str, Any]) -> str:
    key = metadata.get("key")
    return f"row {row} of the batch" if key is None else f"sample {key} (row {row} of the batch)"


def _spec(example: Example) -> str:
    """Describes the arrays of an example: "input_ids int64 [12], images uint8 [1, 3, 336, 336]"."""
    arrays = {key: value for key, value in example.items() if isinstance(value, np.ndarray)}
    return ", ".join(f"{key} {a.dtype} [{_joined(a.shape)}]" for key, a in arrays.items())


def _joined(shape: Sequence[int]) -> str:
    return ", ".join(str(n) for n in shape)
