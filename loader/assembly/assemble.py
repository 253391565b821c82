"""`assemble`: from a prepared sample to the arrays of a training example.

The online half of the pipeline, and the only place that draws, always from the sample's own
generator and in this order: a variant of each turn, the order of the branches, the resolution, the
frames of each video, the augmentation of each image (of all frames of a video together), the filter
of their resize. The rest follows from the draws. It
needs no tokenizer and no formatter, and it does not know whether the sample came out of a shard or
straight from `prepare`.

It works in two steps: a `Planner` decides everything from the spans and the tokens alone (so
lengths are known without a pixel), then the arrays are made. A `Draft` is between the two: it
knows their shapes and writes each into the memory that it is given, such as that of the batch, so
that no array of a single sample is made on the way there. `assemble` has it write into new ones.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from time import perf_counter
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from loader.assembly.augment import (
    NO_CHANGE,
    Augment,
    Draw,
    Resample,
    draw,
    draw_filter,
    draw_own,
)
from loader.assembly.collate import MMCollator, PadSide, Shapes, finished
from loader.assembly.families.example import ModelPlan, ModelView
from loader.assembly.layout import (
    IGNORED,
    BranchTurns,
    LossScale,
    Sequence1d,
    TokenIds,
    Tree,
    Turn,
    count_placed,
    lay_out,
    lay_out_prompt,
)
from loader.assembly.own_augment import AugmentFunction, OwnAugment
from loader.assembly.pixels import Encoded, Normalization, normalize, patch_cells, render
from loader.assembly.questions import (
    Questions,
    prompt_of,
    question_of,
    question_record,
    sample_record,
)
from loader.buffers import Scratch
from shardspec.errors import ConfigError, SampleError, ShardError, ShardsError
from shardspec.frames import draw_frames, even_frames
from shardspec.index import count_questions
from shardspec.keyed import draw_below, draw_order
from shardspec.sample import PreparedSample, SpanKind
from shardspec.tiling import (
    EXCLUDED,
    NO_PATCH,
    FrameView,
    ImageView,
    first_patch_positions,
    image_input_idx,
    image_masks,
    image_token_ids,
    overview_size,
    token_pooling,
)

_UNCHANGED = Augment()

# Plain integers: comparing with a member of an enum costs as much as all the rest of a row.
_TEXT, _IMAGE, _LEAD = SpanKind.TEXT.value, SpanKind.IMAGE.value, SpanKind.LEAD.value
_VIDEO = SpanKind.VIDEO.value

_UINT8, _FLOAT32 = np.dtype(np.uint8), np.dtype(np.float32)

_MOST_SIZES = 1 << 14
"""Sizes of pictures that a planner remembers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What one training run wants to see of the samples."""

    image: ImageView = field(default_factory=ImageView)
    """Crops, patches and tokens."""
    frames: FrameView | None = None
    """The frames of videos; None where the dataset has none. A `StreamingDataset` fills in what its
    shards were made for."""
    high_res: ImageView | None = None
    """Another view of the same stored images, such as 24 instead of 8 crops."""
    high_res_probability: float = 0.0
    """Share of the samples, 0 to 1, that get the view `high_res`, drawn each epoch."""
    augment: Augment | OwnAugment | AugmentFunction = field(default_factory=Augment)
    """Random crops, flips and colour, or a function of your own, `(image, rng) -> image`; off by
    default, and always off for inference."""
    resample: Resample = "bicubic"
    """Filter of what is resized at load. Molmo 1 is trained with "bilinear", Molmo 2 with
    "bilinear-aliased"; docs/streaming.md says what they differ by."""
    normalize: Normalization | None = None
    """"imagenet", "openai" or "siglip" give float32; None leaves uint8 for the device."""
    pixels: Literal["crops", "patches"] = "crops"
    """"crops": [n, 3, S, S]; "patches": [n, patches, patch * patch * 3], for a linear layer."""
    reduced_decoding: bool = False
    """Decode a stored JPEG at 1/2, 1/4 or 1/8 of its sides where they divide by that and the view
    needs no more: less time, and pixels that are within 40 dB of those of the whole picture resized
    (measured on scenes, tests/loader/assembly/test_pixels.py). The unsharded path has no use for
    it."""
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
    purpose: Literal["train", "inference", "evaluation"] = "train"
    """"inference" takes the first variant of each turn, in stored order, and augments nothing.
    "evaluation" does the same, and gives a row for each question of a sample that ends in front of
    its answer: nothing of that answer is in it, and there is no loss (docs/evaluation.md)."""
    questions: Questions = "all"
    """For evaluation: "all" asks each question after the exchanges before it in its conversation,
    with the answers of those; "first" asks the first one of each conversation only."""
    model: ModelView | None = None
    """Of a dataset that was built for a model: its family decides what `image`, `pixels`,
    `image_map` and the other settings of the Molmo kind decide otherwise."""

    def __post_init__(self) -> None:
        if self.model is not None:
            usual = {f.name: f.default for f in fields(View)}
            usual |= {"image": ImageView(), "augment": Augment()}
            own = ("model", "sequence_length", "max_images", "weight", "purpose")
            given = [n for n in usual if n not in own and getattr(self, n) != usual[n]]
            given += ["purpose"] if self.purpose == "evaluation" else []
            if given:
                raise ConfigError("model_view.settings", names=", ".join(given))
        wrong: dict[str, object] = {}
        if not 0 <= self.high_res_probability <= 1:
            wrong["high_res_probability"] = self.high_res_probability
        if self.high_res_probability and self.high_res is None:
            wrong["high_res"] = None
        if self.high_res and self.high_res.size_px != self.image.size_px:
            wrong["high_res.size_px"] = self.high_res.size_px
        if self.weight < 0:
            wrong["weight"] = self.weight
        if self.resample not in get_args(Resample):
            wrong["resample"] = self.resample
        if self.purpose not in ("train", "inference", "evaluation"):
            wrong["purpose"] = self.purpose
        if self.questions not in get_args(Questions):
            wrong["questions"] = self.questions
        if wrong:
            raise ConfigError("view", facts=wrong)
        if not isinstance(self.augment, Augment | OwnAugment):
            object.__setattr__(self, "augment", OwnAugment(self.augment))

    def shapes(self, image: ImageView) -> Shapes:
        """Tells the shapes of what an example in one of the resolutions has for each crop."""
        crops = (3, image.size_px, image.size_px)
        patches = (image.num_patches, image.patch_px**2 * 3)
        pools = [image.pool, *([self.frames.pool] if self.frames else [])]
        return Shapes(
            image=patches if self.pixels == "patches" else crops,
            dtype=_UINT8 if self.normalize is None else _FLOAT32,
            num_patches=image.num_patches,
            tokens_per_crop=math.prod(image.crop_tokens) if self.image_map == "per_token" else None,
            pool=max(map(math.prod, pools)) if self.image_map == "pooling" else None,
        )


class Planner:
    """Makes every draw of the examples of one view and lays out their tokens.

    Safe to share between threads. It remembers what the view makes of pictures of the sizes that it
    has met: asking `shardspec.tiling` takes longer than all the rest.
    """

    def __init__(self, view: View, ids: TokenIds) -> None:
        """Joins what the run wants and the special ids of the dataset's tokenizer."""
        self.view, self.ids = view, ids
        self._training = view.purpose == "train"
        self._augments = self._training and view.augment != _UNCHANGED
        self._images = _Seen(view.image, view, ids)
        self._frames = None
        if view.frames is not None:
            self._frames = _Seen(view.frames.image_view(view.image), view, ids, frames=view.frames)
        self._high_res = None
        if self._training and view.high_res is not None:
            self._high_res = _Seen(view.high_res, view, ids)

    def plan(
        self,
        tokens: np.ndarray,
        spans: np.ndarray,
        rng: np.random.RandomState,
        *,
        key: str = "",
        question: int = 0,
    ) -> ExamplePlan:
        """Plans one example.

        Args:
          tokens: int32 [T], the sample's.
          spans: int32 [S, 8], the sample's.
          rng: The sample's generator for this epoch.
          key: The sample's, for errors.
          question: Number of the question that is asked; for evaluation only.

        Raises:
          SampleError: `too_many_images`, and as `lay_out` or `lay_out_prompt`.
          ConfigError: `question_number`.
        """
        view = self.view
        kinds = spans[:, 0].tolist()
        num_texts, num_images = kinds.count(_TEXT), kinds.count(_IMAGE)
        branches = _choose(tokens, spans[:num_texts], rng if self._training else None)
        if self._training and view.branch_order == "shuffled" and len(branches) > 1:
            branches = [branches[b] for b in draw_order(rng, len(branches))]
        images = self._images
        if self._high_res is not None and rng.random_sample() < view.high_res_probability:
            images = self._high_res
        asked = None
        if view.purpose == "evaluation":
            placed = count_placed(branches, self.ids)
            asked = question_of(branches, question, view.questions)
            branches = [prompt_of(branches[asked[0]], asked[1])]
            # Images that the conversation places itself come only as far as it goes.
            num_images = count_placed(branches, self.ids) if placed else num_images
        first_image = kinds.index(_IMAGE) if num_images else 0
        pictures = spans[first_image : first_image + num_images].tolist()
        others = spans[num_texts:first_image].tolist() if first_image > num_texts else []
        shown = None
        videos = [row for row in others if row[0] == _VIDEO]
        if videos:
            sizes = [(row[2], row[3]) for row in pictures]
            shown = self._draw_frames(videos, sizes, others, rng, key)
            pictures = [pictures[i] for i in shown.images]
        if view.max_images is not None and len(pictures) > view.max_images:
            raise SampleError(
                "too_many_images.view", where=key, images=len(pictures), max_images=view.max_images
            )
        draws = [NO_CHANGE] * len(pictures)
        if self._augments:
            seen_as = [(row[2], row[3], row[7]) for row in pictures]
            if shown is None:
                draws = draw_pictures(view, seen_as, rng, key=key)
            else:  # one draw for all frames of a video
                own = [i for i, begins in enumerate(shown.begins) if begins]
                made = draw_pictures(view, [seen_as[i] for i in own], rng, key=key)
                draw_of = dict(zip(own, made, strict=True))
                draws = [draw_of[first] for first in shown.firsts]
        sizes = [(row[2], row[3]) for row in pictures]
        if shown is None:
            seen = [images.of(size) for size in sizes]
            leads = [tokens[row[2] : row[3]] for row in others if row[0] == _LEAD]
            blocks = [each.block for each in seen]
        else:
            seen, leads, blocks = self._lay_frames(images, shown, sizes, tokens, others)
        if asked is not None:
            sequence = lay_out_prompt(
                blocks,
                branches[0],
                ids=self.ids,
                leads=leads,
                limit=view.sequence_length,
                tree=view.tree,
                where=key,
            )
            return ExamplePlan(
                sequence, images.view, draws, sizes, seen, images.shapes, shown, asked
            )
        sequence = lay_out(
            blocks,
            branches,
            ids=self.ids,
            leads=leads,
            limit=view.sequence_length,
            tree=view.tree,
            loss=view.loss,
            where=key,
        )
        sequence.weight = view.weight
        return ExamplePlan(sequence, images.view, draws, sizes, seen, images.shapes, shown)

    def _draw_frames(
        self,
        videos: Sequence[Sequence[int]],
        sizes: Sequence[tuple[int, int]],
        others: Sequence[Sequence[int]],
        rng: np.random.RandomState,
        key: str,
    ) -> _Shown:
        """Draws the frames of each video; other images are all shown.

        Raises:
          SampleError: `video_view`: the view does not say how frames are seen.
        """
        frames, num_images = self.view.frames, len(sizes)
        if frames is None or self._frames is None:
            raise SampleError("video_view", where=key)
        leads = [row for row in others if row[0] == _LEAD]
        images: list[int] = []
        firsts: list[int] = []
        begins: list[bool] = []
        is_frame: list[bool] = []
        done = 0
        for _, _, start, count, *_ in [*videos, (0, 0, num_images, 0)]:
            for i in range(done, start):
                firsts.append(len(images))
                images.append(i)
                begins.append(True)
                is_frame.append(False)
            number = min(count, frames.max_frames or count)
            if not number:
                continue
            if frames.max_tokens is not None:
                longest = max(row[3] - row[2] for row in leads[start : start + count])
                each = len(self._frames.of(sizes[start]).block) + frames.timestamps * longest
                room = frames.max_tokens - 2 * (frames.marks == "video")
                number = max(1, min(number, room // each))
            drawn = (
                draw_frames(count, number, rng)
                if self._training and frames.sampling == "random"
                else even_frames(count, number)
            ).tolist()
            firsts += [len(images)] * number
            images += [start + i for i in drawn]
            begins += [True] + [False] * (number - 1)
            is_frame += [True] * number
            done = start + count
        return _Shown(images, firsts, begins, is_frame)

    def _lay_frames(
        self,
        images: _Seen,
        shown: _Shown,
        sizes: Sequence[tuple[int, int]],
        tokens: np.ndarray,
        others: Sequence[Sequence[int]],
    ) -> tuple[list[_Size], list[np.ndarray], list[np.ndarray]]:
        """Gives what is seen of each image, the tokens before it, and its block."""
        frames, seen_frames = self.view.frames, self._frames
        assert frames is not None
        assert seen_frames is not None
        lead_rows = [row for row in others if row[0] == _LEAD]
        seen: list[_Size] = []
        leads: list[np.ndarray] = []
        blocks: list[np.ndarray] = []
        around = frames.marks == "video"
        for i, (image, size) in enumerate(zip(shown.images, sizes, strict=True)):
            row, first = lead_rows[image], shown.begins[i]
            is_frame = shown.is_frame[i]
            each = (seen_frames if is_frame else images).of(size)
            lead = tokens[row[4] : row[5]] if is_frame and first else tokens[row[2] : row[3]]
            block = each.block
            if is_frame:
                shown.times_ms.append(row[6])
                lead = lead if frames.timestamps else lead[:0]
                if around and first:
                    lead = np.append(np.int32(self.ids.frame_start), lead)
                last = i + 1 == len(sizes) or shown.begins[i + 1]
                if around and last:
                    block = np.append(block, np.int32(self.ids.frame_end))
            seen.append(each)
            leads.append(lead)
            blocks.append(block)
        return seen, leads, blocks


class _Shown:
    """The images of a sample with videos that an example has."""

    __slots__ = ("begins", "firsts", "images", "is_frame", "times_ms")

    def __init__(
        self, images: list[int], firsts: list[int], begins: list[bool], is_frame: list[bool]
    ) -> None:
        self.images = images
        """Numbers of the stored images, ascending."""
        self.firsts = firsts
        """For each, where in this list its video begins; for other images, where it is itself."""
        self.begins = begins
        """For each, whether it is the first that is shown of its video, or no frame."""
        self.is_frame = is_frame
        self.times_ms: list[int] = []
        """Times of the frames."""


def draw_pictures(
    view: View,
    pictures: Sequence[tuple[int, int, int]],
    rng: np.random.RandomState,
    *,
    key: str = "",
) -> list[Draw]:
    """Draws the augmentation of the pictures of a sample.

    Args:
      view: Says how.
      pictures: (width, height, geometry) of each: of its original in pixels, and what it allows.
      rng: The sample's generator.
      key: The sample's, for errors.
    """
    augment = view.augment
    if isinstance(augment, OwnAugment):
        return [draw_own(augment, rng, geometry=allowed, where=key) for _, _, allowed in pictures]
    assert isinstance(augment, Augment)
    draws = [
        draw(augment, rng, geometry=allowed, width=width, height=height)
        for width, height, allowed in pictures
    ]
    chosen = draw_filter(augment, rng)
    return draws if chosen is None else [replace(each, resample=chosen) for each in draws]


@dataclass(slots=True)
class ExamplePlan:
    """Everything about an example but its pixels."""

    sequence: Sequence1d
    view: ImageView
    """The resolution that was drawn."""
    draws: list[Draw]
    """Augmentation of each image."""
    sizes: list[tuple[int, int]]
    """Source (width, height) of each image, in pixels."""
    seen: list[_Size]
    """What the view makes of each image."""
    shapes: Shapes
    """Of what it has for each crop."""
    shown: _Shown | None = None
    """Which images of a sample with videos it has; None for all images of another one."""
    asked: tuple[int, int] | None = None
    """Conversation and exchange of the question that is asked, for evaluation."""

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
        return sum([each.crops for each in self.seen])


class _Size(NamedTuple):
    """What a view makes of pictures of one size."""

    crops: int
    block: np.ndarray
    """int32 [tokens], the image's token block; read-only."""
    first_patches: np.ndarray
    """int64 [crops], where in the block each crop's first patch token is; read-only."""
    ready: tuple[int, int, int] | None
    """Shape of a stored picture that is its only crop as it is; None where there is none."""
    view: ImageView


class _Seen:
    """What a view makes of pictures, by their sizes."""

    def __init__(
        self, image: ImageView, view: View, ids: TokenIds, *, frames: FrameView | None = None
    ) -> None:
        self.view, self._ids, self.shapes = image, ids, view.shapes(image)
        self._frames = frames
        self._sizes: dict[tuple[int, int], _Size] = {}

    def of(self, size: tuple[int, int]) -> _Size:
        """Looks up what becomes of pictures of a source's (width, height), in pixels."""
        found = self._sizes.get(size)
        if found is None:
            firsts = first_patch_positions(*size, self.view, self._ids.image)
            block = image_token_ids(*size, self.view, self._ids.image)
            if self._frames is not None:
                block = block.copy()
                block[0], block[-1] = self._ids.frame_start, self._ids.frame_end
                if self._frames.marks != "frame":
                    block, firsts = block[1:-1], firsts - 1
            if len(self._sizes) >= _MOST_SIZES:
                self._sizes.clear()
            side = self.view.size_px
            alone = len(firsts) == 1 and overview_size(*size, self.view) == (side, side)
            ready = (side, side, 3) if alone else None
            found = self._sizes[size] = _Size(len(firsts), block, firsts, ready, self.view)
        return found


class Draft:
    """The example of one sample before its arrays are made (a `LazyExample`)."""

    __slots__ = (
        *("described", "dataset", "error", "key", "num_crops", "num_tokens", "plan", "real"),
        *("render_s", "scratch", "shapes", "sources", "substitutes", "view"),
    )

    channels_first = False

    def __init__(
        self,
        plan: ExamplePlan,
        sources: Sequence[PictureSource],
        *,
        view: View,
        key: str,
        scratch: Scratch,
    ) -> None:
        """Joins what was planned and the pictures.

        Args:
          plan: As a `Planner` of the same view makes it.
          sources: A picture and its overview for each image of the sample.
          view: What the run wants.
          key: The sample's.
          scratch: Memory for pictures that are not decoded straight into the batch.
        """
        if plan.shown is not None:
            sources = [sources[i] for i in plan.shown.images]
        self.plan, self.view, self.key = plan, view, key
        self.sources = sources[: len(plan.sizes)]
        self.scratch = scratch
        self.shapes = plan.shapes
        self.num_tokens = plan.sequence.length
        """Length of the sequence, L."""
        self.num_crops = plan.num_crops
        """Crops of all pictures, n."""
        self.substitutes: dict[str, Any] | None = None
        """The bad sample that it substitutes, for its metadata."""
        self.dataset: str | None = None
        """The dataset's name, for its metadata."""
        self.described: Mapping[str, Any] = {}
        """What else its metadata say."""
        self.real = True
        """False for a repeat that fills the last batch of an evaluation: it has no key."""
        self.error: ShardsError | None = None
        """Why its pictures cannot be rendered, after an attempt."""
        self.render_s = 0.0
        """Seconds of rendering pictures, decoding included."""

    @property
    def decode_s(self) -> float:
        """Seconds of decoding."""
        return sum([one.decode_s for pair in self.sources for one in pair if type(one) is Encoded])

    def pieces(self, name: str) -> list[np.ndarray]:
        """Lists the arrays that one of the `COLUMNS` consists of; they are only to be read."""
        return self.plan.sequence.pieces(name)

    def write_images(self, out: np.ndarray) -> None:
        """Renders the pictures into `out`, of the type and as many crops as there are.

        Crops are written as [n, S, S, 3]: memory in that order is filled without a copy.

        Raises:
          ShardError, SampleError: As `render`, and kept as `error`.
        """
        start_s = perf_counter()
        plan, view, done = self.plan, self.view, 0
        if view.pixels == "patches":
            cells = patch_cells(out, plan.view.patch_px)
        else:
            cells = out.transpose(0, 2, 3, 1)
        crops = cells
        if view.normalize is not None:
            side = plan.view.size_px
            crops = self.scratch("crops", (plan.num_crops, side, side, 3))
        try:
            for (picture, overview), (width, height), own, seen in zip(
                self.sources, plan.sizes, plan.draws, plan.seen, strict=True
            ):
                stop = done + seen.crops
                if (
                    own is NO_CHANGE
                    and overview is None
                    and type(picture) is Encoded
                    and picture.shape == seen.ready == crops.shape[1:]
                ):
                    # `render` would find out the same again for each picture: 5 µs of 80.
                    picture.decode(crops[done])
                else:
                    render(
                        picture,
                        source_width=width,
                        source_height=height,
                        view=seen.view,
                        draw=own,
                        overview=overview,
                        out=crops[done:stop],
                        scratch=self.scratch,
                        resample=view.resample,
                        reduced=view.reduced_decoding,
                    )
                done = stop
        except (ShardError, SampleError) as error:
            self.error = error
            raise
        if view.normalize is not None:
            normalize(crops.reshape(cells.shape), kind=view.normalize, out=cells)
        self.render_s += perf_counter() - start_s

    def write_masks(self, out: np.ndarray) -> None:
        """Writes the share of each patch that is picture: float32 [n, patches]."""
        plan, done = self.plan, 0
        if plan.view.fit != "pad":
            out.fill(1.0)
            return
        for size, seen in zip(plan.sizes, plan.seen, strict=True):
            out[done : done + seen.crops] = image_masks(*size, seen.view)
            done += seen.crops

    def write_input_idx(self, out: np.ndarray) -> None:
        """Writes where the image tokens are: int64 [n], or [n, tokens per crop] (Molmo 1)."""
        plan, done = self.plan, 0
        per_token = self.view.image_map == "per_token"
        for size, seen, start in zip(
            plan.sizes, plan.seen, plan.sequence.image_starts, strict=True
        ):
            own = out[done : done + seen.crops]
            if per_token:
                found = image_input_idx(*size, seen.view, offset=start)
                if plan.shown is not None:  # frames pool more, and may have no start token
                    found = np.where(found == EXCLUDED, EXCLUDED, found + seen.first_patches[0] - 1)
                own[:, : found.shape[1]] = found
                own[:, found.shape[1] :] = EXCLUDED
            else:
                np.add(seen.first_patches, start, out=own)
            done += seen.crops

    def image_ends(self) -> list[int]:
        """Lists, for each crop, one past the last token of its image."""
        ends: list[int] = []
        for seen, end in zip(self.plan.seen, self.plan.sequence.image_ends, strict=True):
            ends += [end] * seen.crops
        return ends

    def pooling(self) -> np.ndarray:
        """Makes Molmo 2's map: int64 [image tokens, pool], patches of all crops counted, or -1."""
        plan, found, crops_before = self.plan, [], 0
        for size, seen in zip(plan.sizes, plan.seen, strict=True):
            pooled = token_pooling(*size, seen.view)
            shift = crops_before * plan.view.num_patches
            found.append(np.where(pooled == NO_PATCH, NO_PATCH, pooled + shift))
            crops_before += seen.crops
        pool = self.shapes.pool or plan.view.pool[0] * plan.view.pool[1]
        for k, pooled in enumerate(found):
            if pooled.shape[1] < pool:
                found[k] = np.full((len(pooled), pool), NO_PATCH, np.int64)
                found[k][:, : pooled.shape[1]] = pooled
        if len(found) == 1:
            return found[0]
        return np.concatenate(found) if found else np.zeros((0, pool), np.int64)

    def metadata(self) -> dict[str, Any]:
        """Describes the example."""
        plan = self.plan
        described: dict[str, Any] = {
            "key": self.key if self.real else None,
            "images": [
                {"width": width, "height": height, "crops": seen.crops}
                for (width, height), seen in zip(plan.sizes, plan.seen, strict=True)
            ],
            "dropped_branches": plan.sequence.dropped_branches,
        }
        if plan.shown is not None:
            described["frame_times_s"] = [ms / 1000 for ms in plan.shown.times_ms]
        described |= self.described
        if not self.real:
            described["real"] = False
        if self.substitutes is not None:
            described["substitutes"] = self.substitutes
        if self.dataset is not None:
            described["dataset"] = self.dataset
        return described


PictureSource = tuple["np.ndarray | Encoded", "np.ndarray | Encoded | None"]
"""A stored picture, uint8 [H, W, 3] or encoded, and its stored overview."""


def describe_question(
    plan: ExamplePlan | ModelPlan, question: int, record: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Makes what the metadata of an example say beside its pictures.

    Args:
      plan: Of the example.
      question: The number that it was asked for.
      record: Of the sample; None: what it says is not wanted.

    Returns:
      `question_idx`, for evaluation; `record`: what it says of the question, or of the sample.
    """
    described: dict[str, Any] = {} if plan.asked is None else {"question_idx": question}
    if record is not None and plan.asked is None:
        described["record"] = sample_record(record)
    elif record is not None and plan.asked is not None:
        branch, turn = plan.asked
        described["record"] = question_record(record, branch=branch, turn=turn)
    return described


def assemble(
    sample: PreparedSample,
    rng: np.random.RandomState,
    *,
    view: View,
    ids: TokenIds,
    question: int | None = None,
) -> dict[str, Any]:
    """Makes the example of one sample in one epoch.

    Args:
      sample: From a shard or from `prepare`.
      rng: The sample's generator for this epoch.
      view: What the run wants.
      ids: Special ids of the dataset's tokenizer.
      question: Number of the question that is asked, for evaluation: a sample with several gives
        one example for each, see `shardspec.index.count_questions`. None: the only one.

    Returns:
      input_ids, labels, position_ids, subsegment_ids: int64 [L]; loss_weights: float32 [L];
      images: uint8 or float32 [n, 3, S, S] or [n, patches, dim], n crops of all images;
      image_masks: float32 [n, patches]; image_input_idx: int64 [n] or [n, tokens per crop];
      token_pooling: int64 [image tokens, pool], with image_map "pooling"; image_end: int64 [n],
      one past the last token of the crop's image; metadata.

    Raises:
      SampleError: As `Planner.plan`, and as `render`.
      ConfigError: `question_number`: there is no such question, or several and none is named.
    """
    if question is None and view.purpose == "evaluation":
        count = count_questions(sample.spans)[view.questions == "all"]
        if count > 1:
            raise ConfigError("question_number.several", where=sample.key, questions=count)
    question = question or 0
    planner = _planner(view, ids)
    plan = planner.plan(sample.tokens, sample.spans, rng, key=sample.key, question=question)
    sources = [(image.pixels, image.overview) for image in sample.images]
    draft = Draft(plan, sources, view=view, key=sample.key, scratch=Scratch())
    if plan.asked is not None:
        draft.described = describe_question(plan, question, sample.record)
    return finished(draft)


def view_collator(
    view: View,
    *,
    sequence_length: int,
    pad_mode: str = "to_128",
    pad_token_id: int = 0,
    extra_keys: tuple[str, ...] = (),
    with_metadata: bool = False,
    with_real: bool = False,
    min_images: int = 0,
    max_images: int | None = None,
    pad_side: PadSide = "right",
    overlong: Literal["error", "truncate"] = "error",
) -> MMCollator:
    """Makes the collator that fits a view's examples; the arguments are `MMCollator`'s.

    Raises:
      ConfigError: `model_view`, the view is of a model; and as `MMCollator`.
    """
    if view.model is not None:
        raise ConfigError("model_view.collator", family=view.model.family.kind)
    shapes = view.shapes(view.image)
    max_pooled = None
    if max_images is not None and shapes.pool is not None:
        # No crop has more tokens than when all of it is shown, and all are in the sequence.
        images = [image for image in (view.image, view.high_res) if image is not None]
        per_crop = max(math.prod(image.crop_tokens) for image in images)
        max_pooled = max(1, min(max_images * per_crop, sequence_length))
    return MMCollator(
        sequence_length=sequence_length,
        pad_mode=pad_mode,
        pad_token_id=pad_token_id,
        image_shape=shapes.image,
        num_patches=shapes.num_patches,
        tokens_per_crop=shapes.tokens_per_crop,
        pool=shapes.pool,
        extra_keys=extra_keys,
        with_metadata=with_metadata,
        with_real=with_real,
        min_images=min_images,
        max_images=max_images,
        pad_side=pad_side,
        max_pooled=max_pooled,
        image_dtype=shapes.dtype,
        overlong=overlong,
    )


@functools.lru_cache(maxsize=16)
def _planner(view: View, ids: TokenIds) -> Planner:
    return Planner(view, ids)


def _choose(
    tokens: np.ndarray, texts: np.ndarray, rng: np.random.RandomState | None
) -> list[BranchTurns]:
    """Draws one variant of every turn, branch by branch; the first one without a generator."""
    branches: list[BranchTurns] = []
    turns = texts[:, 1:3].tolist()
    last = -1
    first = 0
    while first < len(turns):
        # The variants of a turn are adjacent.
        turn_end = bisect_right(turns, turns[first], first)
        drawn = first
        if rng is not None and turn_end - first > 1:
            drawn += draw_below(rng, turn_end - first)
        _, branch, _, start, stop, response, end, weight = texts[drawn].tolist()
        turn = Turn(tokens[start:stop], tokens[response:end], weight)
        if branch == last:
            branches[-1].turns.append(turn)
        else:
            branches.append(BranchTurns([turn], weight))
            last = branch
        first = turn_end
    return branches
