"""`assemble`: from a prepared sample to the arrays of a training example.

The online half of the pipeline, and the only place that draws, always from the sample's own
generator and in this order: a variant of each turn, the order of the branches, the resolution,
the augmentation of each image. The rest follows from the draws. It needs no tokenizer and no
formatter, and it does not know whether the sample came out of a shard or straight from `prepare`.

It works in two steps: `plan_example` decides everything from the spans and the tokens alone (so
lengths are known without a pixel), then the arrays are made. The pictures come last: `draft` gives
an example whose `images` is a `Pictures`, which knows their shape and writes them where it is told
to, such as into the batch that they are for. `assemble` writes them into an array.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal

import numpy as np

from loader.augment import Augment, Draw, draw
from loader.buffers import Scratch
from loader.layout import (
    COLUMNS,
    IGNORED,
    BranchTurns,
    Column,
    LossScale,
    Sequence1d,
    TokenIds,
    Tree,
    Turn,
    lay_out,
)
from loader.pixels import Encoded, Normalization, normalize, patch_cells, render
from shardspec.errors import ConfigError, SampleError, ShardError, ShardsError
from shardspec.sample import PreparedSample, SpanKind
from shardspec.tiling import (
    NO_PATCH,
    ImageView,
    first_patch_positions,
    image_input_idx,
    image_masks,
    image_token_ids,
    token_pooling,
)

# Plain integers: comparing with a member of an enum costs as much as all the rest of a row.
_UNCHANGED = Augment()

_TEXT, _IMAGE, _LEAD = SpanKind.TEXT.value, SpanKind.IMAGE.value, SpanKind.LEAD.value


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What one training run wants to see of the samples."""

    image: ImageView = field(default_factory=ImageView)
    """Crops, patches and tokens."""
    high_res: ImageView | None = None
    """Another view of the same stored images, such as 24 instead of 8 crops."""
    high_res_probability: float = 0.0
    """Share of the samples, 0 to 1, that are seen in the view `high_res`, drawn each epoch."""
    augment: Augment = field(default_factory=Augment)
    """Random crops, flips and colour; off by default, and always off for inference."""
    normalize: Normalization | None = None
    """"imagenet", "openai" or "siglip" give float32; None leaves uint8 for the device."""
    pixels: Literal["crops", "patches"] = "crops"
    """"crops": [n, 3, S, S]; "patches": [n, patches, patch * patch * 3], for a linear layer."""
    reduced_decoding: bool = False
    """Decode a stored JPEG at 1/2, 1/4 or 1/8 of its sides where they divide by that and the view
    needs no more: less time, and pixels that are within 40 dB of those of the whole picture resized
    (measured on scenes, tests/loader/test_pixels.py). The unsharded path has no use for it."""
    image_map: Literal["first", "per_token", "pooling"] = "first"
    """How a model finds its image tokens. "first": `image_input_idx` [n], the first patch token of
    each crop. "per_token" (Molmo 1): `image_input_idx` [n, tokens per crop], -100 where a token
    belongs to another crop. "pooling" (Molmo 2): `token_pooling` as well, whose k-th row lists the
    patches of the k-th patch token."""
    sequence_length: int | None = None
    """Longest sequence; text is cut there, images never are."""
    max_images: int | None = None
    """Most images in a sample; None for any."""
    branch_order: Literal["shuffled", "stored"] = "shuffled"
    """Order of a sample's conversations: it decides which ones fit the sequence."""
    tree: Tree = "molmo2"
    loss: LossScale = "flat"
    weight: float = 1.0
    """Factor of `loss_weights` for the whole dataset."""
    purpose: Literal["train", "inference"] = "train"
    """"inference" takes the first variant of each turn, in stored order, and augments nothing."""

    def __post_init__(self) -> None:
        wrong: dict[str, object] = {}
        if not 0 <= self.high_res_probability <= 1:
            wrong["high_res_probability"] = self.high_res_probability
        if self.high_res_probability and self.high_res is None:
            wrong["high_res"] = None
        if self.high_res and self.high_res.size_px != self.image.size_px:
            wrong["high_res.size_px"] = self.high_res.size_px
        if self.weight < 0:
            wrong["weight"] = self.weight
        if wrong:
            raise ConfigError(
                "settings of the view are impossible",
                reason="view",
                facts=wrong,
                fix="a probability needs a high_res view with the same size_px; weights are >= 0",
            )


@dataclass(slots=True, kw_only=True)
class ExamplePlan:
    """Everything about an example but its pixels."""

    sequence: Sequence1d
    view: ImageView
    """The resolution that was drawn."""
    draws: list[Draw]
    """Augmentation of each image."""
    sizes: list[tuple[int, int]]
    """Source (width, height) of each image, in pixels."""
    crops: list[int]
    """Crops of each image."""
    first_patches: np.ndarray
    """int64 [n], position of each crop's first patch token."""

    @property
    def num_tokens(self) -> int:
        """Length of the sequence."""
        return self.sequence.length

    @property
    def num_loss_tokens(self) -> int:
        """Positions with loss."""
        return int(np.count_nonzero(self.sequence.labels != IGNORED))

    @property
    def num_crops(self) -> int:
        """Crops of all images."""
        return sum(self.crops)


def plan_example(
    tokens: np.ndarray,
    rows: Sequence[Sequence[int]],
    rng: np.random.RandomState,
    *,
    view: View,
    ids: TokenIds,
    key: str = "",
) -> ExamplePlan:
    """Makes every draw of an example and lays out its tokens.

    Args:
      tokens: int32 [T], the sample's.
      rows: The sample's spans, as plain integers [S][8].
      rng: The sample's generator for this epoch.
      view: What the run wants.
      ids: Special ids of the dataset's tokenizer.
      key: The sample's, for errors.

    Raises:
      SampleError: `too_many_images`, and as `lay_out`.
    """
    training = view.purpose == "train"
    pictures = [row for row in rows if row[0] == _IMAGE]
    if view.max_images is not None and len(pictures) > view.max_images:
        raise SampleError(
            "sample has more images than the view takes",
            reason="too_many_images",
            where=key,
            facts={"images": len(pictures), "max_images": view.max_images},
            fix="raise max_images, or leave such samples out when building",
        )
    branches = _choose(tokens, rows, rng if training else None)
    if training and view.branch_order == "shuffled" and len(branches) > 1:
        branches = [branches[b] for b in rng.permutation(len(branches)).tolist()]
    image = view.image
    if training and view.high_res is not None:
        image = view.high_res if rng.random_sample() < view.high_res_probability else image
    augment = view.augment if training else _UNCHANGED
    draws = [draw(augment, rng, geometry=row[7], width=row[2], height=row[3]) for row in pictures]
    sizes = [(row[2], row[3]) for row in pictures]
    sequence = lay_out(
        [image_token_ids(*size, image, ids.image) for size in sizes],
        branches,
        ids=ids,
        leads=[tokens[row[2] : row[3]] for row in rows if row[0] == _LEAD],
        limit=view.sequence_length,
        tree=view.tree,
        loss=view.loss,
        where=key,
    )
    firsts = [
        first_patch_positions(*size, image, ids.image) + start
        for size, start in zip(sizes, sequence.image_starts, strict=True)
    ]
    return ExamplePlan(
        sequence=sequence,
        view=image,
        draws=draws,
        sizes=sizes,
        crops=[len(first) for first in firsts],
        first_patches=_stacked(firsts, empty=np.zeros(0, dtype=np.int64)),
    )


class Pictures:
    """The pictures of an example before they are rendered; stands where their array will be."""

    def __init__(self, parts: Sequence[PictureSet], view: View) -> None:
        """Joins the pictures of samples that are seen in the same view."""
        self.parts = tuple(parts)
        image, num = view.image, sum(part.plan.num_crops for part in parts)
        self.shape: tuple[int, ...] = (num, 3, image.size_px, image.size_px)
        if view.pixels == "patches":
            self.shape = (num, image.num_patches, image.patch_px**2 * 3)
        self.dtype = np.dtype(np.uint8 if view.normalize is None else np.float32)
        self._view = view

    def __len__(self) -> int:
        return self.shape[0]

    def write(self, out: np.ndarray) -> None:
        """Renders the pictures into `out`, an array of their shape and type.

        Crops are written as [n, S, S, 3]: memory in that order is filled without a copy.

        Raises:
          ShardError, SampleError: As `render`; the part says which one it was.
        """
        if self._view.pixels == "patches":
            cells = patch_cells(out, self._view.image.patch_px)
        else:
            cells = out.transpose(0, 2, 3, 1)
        done = 0
        for part in self.parts:
            stop = done + part.plan.num_crops
            part.render(cells[done:stop], self._view)
            done = stop

    def array(self) -> np.ndarray:
        """Renders the pictures into a new array, crops with channels last in memory."""
        if self._view.pixels == "patches":
            pixels = np.empty(self.shape, self.dtype)
        else:
            num, _, side, _ = self.shape
            pixels = np.empty((num, side, side, 3), self.dtype).transpose(0, 3, 1, 2)
        self.write(pixels)
        return pixels

    @classmethod
    def joined(cls, several: Sequence[Pictures]) -> Pictures:
        """Joins the pictures of several examples."""
        return cls([part for one in several for part in one.parts], several[0]._view)


class PictureSet:
    """The pictures of one sample and what becomes of them."""

    __slots__ = ("error", "plan", "render_s", "scratch", "sources")

    def __init__(
        self, sources: Sequence[PictureSource], plan: ExamplePlan, scratch: Scratch
    ) -> None:
        """Takes (picture, overview) for each image of the plan."""
        self.sources, self.plan, self.scratch = sources, plan, scratch
        self.error: ShardsError | None = None
        """Why they cannot be rendered, after an attempt."""
        self.render_s = 0.0
        """Seconds spent, decoding included."""

    @property
    def decode_s(self) -> float:
        """Seconds spent on decoding."""
        spent_s = 0.0
        for pair in self.sources:
            for one in pair:
                if type(one) is Encoded:
                    spent_s += one.decode_s
        return spent_s

    def render(self, cells: np.ndarray, view: View) -> None:
        """Writes the crops into [n, S, S, 3], or into patches viewed as [n, P, p, P, p, 3].

        Raises:
          ShardError, SampleError: As `render`, and kept as `error`.
        """
        start_s = perf_counter()
        plan, done = self.plan, 0
        crops = cells
        if view.normalize is not None:
            side = plan.view.size_px
            crops = self.scratch("crops", (plan.num_crops, side, side, 3))
        try:
            for (picture, overview), (width, height), own, count in zip(
                self.sources, plan.sizes, plan.draws, plan.crops, strict=True
            ):
                render(
                    picture,
                    source_width=width,
                    source_height=height,
                    view=plan.view,
                    draw=own,
                    overview=overview,
                    out=crops[done : done + count],
                    scratch=self.scratch,
                    reduced=view.reduced_decoding,
                )
                done += count
        except (ShardError, SampleError) as error:
            self.error = error
            raise
        if view.normalize is not None:
            normalize(crops.reshape(cells.shape), kind=view.normalize, out=cells)
        self.render_s += perf_counter() - start_s


PictureSource = tuple["np.ndarray | Encoded", "np.ndarray | Encoded | None"]
"""A stored picture, uint8 [H, W, 3] or encoded, and its stored overview."""


def assemble(
    sample: PreparedSample, rng: np.random.RandomState, *, view: View, ids: TokenIds
) -> dict[str, Any]:
    """Makes the example of one sample in one epoch.

    Args:
      sample: From a shard or from `prepare`.
      rng: The sample's generator for this epoch.
      view: What the run wants.
      ids: Special ids of the dataset's tokenizer.

    Returns:
      input_ids, labels, position_ids, subsegment_ids: int64 [L]; loss_weights: float32 [L];
      images: uint8 or float32 [n, 3, S, S] or [n, patches, dim], n crops of all images;
      image_masks: float32 [n, patches]; image_input_idx: int64 [n] or [n, tokens per crop];
      token_pooling: int64 [image tokens, pool], with image_map "pooling"; image_end: int64 [n],
      one past the last token of the crop's image; metadata.

    Raises:
      SampleError: As `plan_example`, and as `render`.
    """
    plan = plan_example(
        sample.tokens, sample.spans.tolist(), rng, view=view, ids=ids, key=sample.key
    )
    sources = [(image.pixels, image.overview) for image in sample.images]
    example = draft(plan, sources, view=view, key=sample.key, scratch=Scratch())
    return finished(example)


def draft(
    plan: ExamplePlan,
    sources: Sequence[PictureSource],
    *,
    view: View,
    key: str,
    scratch: Scratch,
) -> dict[str, Any]:
    """Makes an example whose pictures are not rendered yet.

    Args:
      plan: As `plan_example` makes it for the same view.
      sources: A picture and its overview for each image of the sample.
      view: What the run wants.
      key: The sample's.
      scratch: Memory for pictures that are not decoded into their places.

    Returns:
      What `assemble` returns, but the arrays of one value per token are `Column`s, and `images` is
      a `Pictures`.
    """
    sequences = [plan.sequence]
    plan.sequence.weight = view.weight
    example: dict[str, Any] = {
        **{name: Column(name, sequences) for name in COLUMNS},
        "images": Pictures([PictureSet(sources, plan, scratch)], view),
        "image_masks": _masks(plan),
        "image_input_idx": plan.first_patches,
        "image_end": _image_ends(plan),
        "metadata": {
            "key": key,
            "images": [
                {"width": width, "height": height, "crops": crops}
                for (width, height), crops in zip(plan.sizes, plan.crops, strict=True)
            ],
            "dropped_branches": plan.sequence.dropped_branches,
        },
    }
    if view.image_map == "per_token":
        example["image_input_idx"] = _token_positions(plan)
    elif view.image_map == "pooling":
        example["token_pooling"] = _pooled_patches(plan)
    return example


def finished(example: Mapping[str, Any]) -> dict[str, Any]:
    """Makes every array of a `draft`.

    Raises:
      ShardError, SampleError: As `Pictures.write`.
    """
    return {
        name: value.array() if isinstance(value, Column | Pictures) else value
        for name, value in example.items()
    }


def _image_ends(plan: ExamplePlan) -> np.ndarray:
    """One past the last token of each crop's image: int64 [n]."""
    ends = plan.sequence.image_ends
    return np.array(
        [end for end, n in zip(ends, plan.crops, strict=True) for _ in range(n)], np.int64
    )


def _masks(plan: ExamplePlan) -> np.ndarray:
    """Share of each patch that is picture: float32 [n, patches]."""
    view = plan.view
    if view.fit == "pad" and plan.sizes:
        return np.concatenate([image_masks(*size, view) for size in plan.sizes])
    masks = np.empty((plan.num_crops, view.num_patches), dtype=np.float32)
    masks.fill(1.0)
    return masks


def _choose(
    tokens: np.ndarray, rows: Sequence[Sequence[int]], rng: np.random.RandomState | None
) -> list[BranchTurns]:
    """Draws one variant of every turn, branch by branch; the first one without a generator."""
    variants: dict[tuple[int, int], list[Sequence[int]]] = {}
    for row in rows:
        if row[0] == _TEXT:
            at = (row[1], row[2])
            if at in variants:
                variants[at].append(row)
            else:
                variants[at] = [row]
    branches: dict[int, BranchTurns] = {}
    for (branch, _), own in variants.items():
        _, _, _, start, stop, response, end, weight = own[
            0 if rng is None else rng.randint(0, len(own))
        ]
        turn = Turn(tokens[start:stop], tokens[response:end])
        if branch in branches:
            branches[branch].turns.append(turn)
        else:
            branches[branch] = BranchTurns([turn], weight)
    return list(branches.values())


def _token_positions(plan: ExamplePlan) -> np.ndarray:
    """Molmo 1's map: int64 [n, tokens per crop], positions in the sequence or -100."""
    rows, cols = plan.view.crop_tokens
    found = [
        image_input_idx(*size, plan.view, offset=start)
        for size, start in zip(plan.sizes, plan.sequence.image_starts, strict=True)
    ]
    return _stacked(found, empty=np.zeros((0, rows * cols))).astype(np.int64)


def _pooled_patches(plan: ExamplePlan) -> np.ndarray:
    """Molmo 2's map: int64 [image tokens, pool], patches of all crops counted through, or -1."""
    found = []
    crops_before = 0
    for size, count in zip(plan.sizes, plan.crops, strict=True):
        pooled = token_pooling(*size, plan.view)
        shift = crops_before * plan.view.num_patches
        found.append(np.where(pooled == NO_PATCH, NO_PATCH, pooled + shift))
        crops_before += count
    pool = plan.view.pool[0] * plan.view.pool[1]
    return _stacked(found, empty=np.zeros((0, pool), dtype=np.int64))


def _stacked(arrays: Sequence[np.ndarray], *, empty: np.ndarray) -> np.ndarray:
    if len(arrays) == 1:
        return arrays[0]
    return np.concatenate(arrays) if arrays else empty
