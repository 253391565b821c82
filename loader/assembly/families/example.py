"""The examples of a dataset that was built for a model: `ModelPlanner`, `ModelDraft`, `ModelPack`.

A sample's conversations are alternatives: one is drawn, by the sample's generator. Its tokens are
the model's own, from the first to the last; each picture's placeholder becomes the run of tokens
that the family's plan gives for the picture's size. Labels are those of the same positions: the
models shift them.
"""

# Shape letters: L tokens, n pictures, N rows of pixel_values.

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, get_args

import numpy as np
import torch

from loader.assembly.clip import Clip, ClipFrame, PictureSource, sources_of
from loader.assembly.families.kernels import Backend, write_frame, write_units
from loader.assembly.families.processor import processed
from loader.assembly.features import write_features
from loader.assembly.layout import IGNORED
from loader.assembly.pixels import Encoded
from loader.assembly.questions import Questions, question_at
from loader.buffers import Scratch
from shardspec.errors import ConfigError, SampleError, ShardError, ShardsError
from shardspec.families import (
    Family,
    PaliGemma,
    PicturePlan,
    Processor,
    Qwen2VL,
    StoredModel,
    plan_pictures,
    plan_videos,
)
from shardspec.features import StoredFeatures
from shardspec.index import first_conversations
from shardspec.keyed import draw_below
from shardspec.sample import (
    WEIGHT_ONE,
    SpanKind,
    image_rows,
    lead_rows,
    text_rows,
    video_rows,
    video_units,
    window_images,
)
from shardspec.video import DEFAULT_LIMITS, ClipLimits

Purpose = Literal["train", "inference", "evaluation"]

_TEXT = SpanKind.TEXT.value


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelView:
    """The part of a view that is about a model: its pictures, and whose values they have."""

    family: Family
    backend: Backend = "torchvision"

    def __post_init__(self) -> None:
        if self.backend not in get_args(Backend):
            wanted = "one of " + ", ".join(map(repr, get_args(Backend)))
            raise ConfigError("argument", name="backend", got=repr(self.backend), wanted=wanted)


@dataclass(slots=True, kw_only=True)
class ModelSequence:
    """The tokens of one conversation."""

    ids: np.ndarray
    """int64 [L]."""
    targets: np.ndarray
    """int64 [L], -100 where there is no loss."""
    weight: float
    """Of each token with loss."""
    starts: tuple[int, ...]
    """Position of the first soft token of each picture, and of each block of a video."""
    learns: bool = True
    """False leaves no loss at all, as for padding."""

    @property
    def labels(self) -> np.ndarray:
        return self.targets if self.learns else np.full(len(self.ids), IGNORED)


@dataclass(slots=True, kw_only=True)
class ModelPlan:
    """Everything about an example but its pixels."""

    sequence: ModelSequence
    pictures: tuple[PicturePlan, ...]
    """Pictures and videos, in the order of the sequence."""
    sizes: list[tuple[int, int]]
    """Source (width, height) of each."""
    images: list[range]
    """Numbers of the stored images that each is: of a video those of its frames."""
    seconds: list[float]
    """How long a patch along time of each video takes."""
    visual: int
    """Tokens of all pictures, marks included."""
    asked: tuple[int, int] | None = None
    """Message and exchange of the question that is asked, for evaluation."""
    window: int | None = None
    """The window that it is, of a sample that has windows: a message."""

    @property
    def num_loss_tokens(self) -> int:
        """Positions with loss."""
        return int(np.count_nonzero(self.sequence.labels != IGNORED))


class ModelPlanner:
    """Lays out conversations; safe to share between threads."""

    def __init__(
        self,
        stored: StoredModel,
        view: ModelView,
        *,
        limit: int | None,
        max_images: int | None,
        weight: float,
        purpose: Purpose,
        questions: Questions = "all",
    ) -> None:
        """Joins what the dataset knows of its model and what the run wants.

        Args:
          stored: The dataset's.
          view: The run's family; what it asks for must be stored.
          limit: Longest sequence; text is cut there, pictures never are.
          max_images: Most pictures of a sample; None for any.
          weight: Factor of all loss weights.
          purpose: "train" draws a conversation, "inference" takes the first one; "evaluation" ends
            in front of the answer to a question.
          questions: Which ones an evaluation asks.
        """
        self._stored, self._family = stored, view.family
        self._limit, self._max_images = limit, max_images
        self._weight, self._purpose, self._questions = weight, purpose, questions

    def plan(
        self,
        tokens: np.ndarray,
        spans: np.ndarray,
        rng: np.random.RandomState,
        *,
        key: str = "",
        question: int = 0,
        num_messages: int = 1,
    ) -> ModelPlan:
        """Plans one example; other arguments as `loader.assembly.planner.Planner.plan`.

        Args:
          num_messages: Of the sample's record; for evaluation only.

        Raises:
          SampleError: `too_many_images`, `picture_shape`, `image_placeholder`, `image_cut`,
            `no_loss`; `too_long`, for evaluation.
          ConfigError: `question_number`.
        """
        rows, windows = text_rows(spans), window_images(spans)
        numbers: Sequence[int] = windows[0] if windows else range(len(image_rows(spans)))
        if self._max_images is not None and len(numbers) > self._max_images:
            raise SampleError(
                "too_many_images.view", where=key, images=len(numbers), max_images=self._max_images
            )
        branch, asked, window = 0, None, None
        num_branches = int(rows[-1, 1]) + 1
        if self._purpose == "train":
            branch = draw_below(rng, num_branches) if num_branches > 1 else 0
        if windows:  # each is a message, with equally many conversations
            window = branch * len(windows) // num_branches
        turns = rows[rows[:, 1] == branch].tolist()
        if self._purpose == "evaluation":
            conversations = [
                rows[rows[:, 1] == first].tolist()
                for first in first_conversations(spans, num_messages)
            ]
            answered = [
                [i for i, row in enumerate(each) if row[5] < row[6]] for each in conversations
            ]
            asked = question_at(answered, question, self._questions)
            conversation = conversations[asked[0]]
            turns = [row[:] for row in conversation[: asked[1] + 1]]
            turns[-1][6] = turns[-1][5]
            window = asked[0] if windows else None
        shown = self._shown(numbers if window is None else windows[window], spans)
        if asked is not None:
            seen = self._before(shown, tokens, turns, conversation, key)
            if len(seen) < len(shown) and not len(video_rows(spans)):
                # Alone a picture may have more tiles than beside others.
                seen = self._shown([images[0] for _, images in seen], spans)
            shown = seen
        plans = tuple(plan for plan, _ in shown)
        ids: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        for _, _, _, start, stop, response, end, _ in turns:
            for run, learned in ((tokens[start:stop], False), (tokens[response:end], not asked)):
                ids.append(run)
                labels.append(run if learned else np.full(len(run), IGNORED))
        sequence = self._expanded(np.concatenate(ids), np.concatenate(labels), plans, key)
        sequence.weight = turns[0][7] / WEIGHT_ONE * self._weight
        visual = sum(map(self._stored.block_length, plans))
        if self._stored.inline:
            visual = int(np.count_nonzero(sequence.ids == self._stored.soft_id))
        images = image_rows(spans)
        own = [each for _, each in shown]
        return ModelPlan(
            sequence=sequence,
            pictures=plans,
            sizes=[(int(images[each[0], 2]), int(images[each[0], 3])) for each in own],
            visual=visual,
            asked=asked,
            images=own,
            seconds=self._seconds(shown, spans),
            window=window,
        )

    def _shown(self, numbers: Sequence[int], spans: np.ndarray) -> list[tuple[PicturePlan, range]]:
        """Plans the pictures of these numbers, and all videos, in the order of the texts."""
        images = image_rows(spans).tolist()
        sizes = [(images[i][3], images[i][2]) for i in numbers]
        videos = video_rows(spans).tolist()
        if not videos:
            plans = plan_pictures(self._family, sizes)
            return [(p, range(i, i + 1)) for i, p in zip(numbers, plans, strict=True)]
        shapes = [(row[2], row[3]) for row in videos]
        # The frames of videos come after all pictures.
        pictures = plan_pictures(self._family, sizes[: shapes[0][0]])
        planned = dict(zip(shapes, plan_videos(self._family, sizes, shapes), strict=True))
        return [
            (planned.get((first, count)) or pictures[first], range(first, first + count))
            for _, _, first, count, *_ in video_units(videos, len(sizes))
        ]

    def _seconds(
        self, shown: Sequence[tuple[PicturePlan, range]], spans: np.ndarray
    ) -> list[float]:
        """Gives the mean seconds between the frames of each video, times those of a patch."""
        found, times_ms = [], lead_rows(spans)[:, 6]
        for plan, images in shown:
            if plan.num_frames:
                assert isinstance(self._family, Qwen2VL)
                between = max(plan.num_frames - 1, 1)
                lasts_ms = int(times_ms[images[-1]]) - int(times_ms[images[0]])
                found.append(self._family.temporal_patch * (lasts_ms / 1000 / between or 1.0))
        return found

    def _before(
        self,
        shown: list[tuple[PicturePlan, range]],
        tokens: np.ndarray,
        turns: Sequence[Sequence[int]],
        conversation: Sequence[Sequence[int]],
        key: str,
    ) -> list[tuple[PicturePlan, range]]:
        """Selects the pictures and videos of a sample that come before an answer."""
        wanted = self._stored.soft_id if self._stored.inline else self._stored.placeholder
        count, total = (
            sum(int(np.count_nonzero(tokens[row[3] : row[4]] == wanted)) for row in rows)
            for rows in (turns, conversation)
        )
        if self._stored.inline:
            if count not in (0, total):
                raise SampleError("evaluation_pictures", where=key, images=len(shown))
            return shown if count else []
        number = 0
        while count > 0:
            count -= shown[number][0].num_blocks
            number += 1
        return shown[:number]

    def _expanded(
        self, ids: np.ndarray, labels: np.ndarray, plans: Sequence[PicturePlan], key: str
    ) -> ModelSequence:
        """Puts the tokens of pictures where their placeholders are."""
        places = np.flatnonzero(ids == self._stored.placeholder)
        if self._stored.inline:
            soft = np.flatnonzero(ids == self._stored.soft_id)
            end = int(soft[-1]) + 1 if len(soft) else 0
            return self._cut(ids, labels, end, (), key)
        blocks = [plan for plan in plans for _ in range(plan.num_blocks)]
        if len(places) != len(blocks):
            raise SampleError(
                "image_placeholder.rendered",
                where=key,
                images=len(blocks),
                placeholders=len(places),
            )
        runs: list[np.ndarray] = []
        targets: list[np.ndarray] = []
        starts: list[int] = []
        done = length = end = 0
        for place, plan in zip(places.tolist(), blocks, strict=True):
            block = self._stored.block(plan)
            runs += (ids[done:place], block)
            targets += (labels[done:place], np.full(len(block), IGNORED))
            length += place - done
            soft_id = self._stored.video_id if plan.num_frames else self._stored.soft_id
            starts.append(length + int(np.argmax(block == soft_id)))
            length += len(block)
            done, end = place + 1, length
        runs.append(ids[done:])
        targets.append(labels[done:])
        return self._cut(np.concatenate(runs), np.concatenate(targets), end, tuple(starts), key)

    def _cut(
        self, ids: np.ndarray, labels: np.ndarray, end: int, starts: tuple[int, ...], key: str
    ) -> ModelSequence:
        """Keeps within the limit; the last picture ends at `end`."""
        all_ids, all_targets = ids.astype(np.int64), labels.astype(np.int64)
        limit = self._limit
        if self._purpose == "evaluation":
            if limit is not None and len(all_ids) > limit:
                raise SampleError("too_long", where=key, tokens=len(all_ids), sequence_length=limit)
            return ModelSequence(ids=all_ids, targets=all_targets, weight=1.0, starts=starts)
        if limit is not None and len(all_ids) > limit:
            if end > limit:
                raise SampleError(
                    "image_cut.sample", where=key, image_tokens=end, sequence_length=limit
                )
            all_ids, all_targets = all_ids[:limit], all_targets[:limit]
        # The first token of a sequence is never predicted.
        if not (all_targets[1:] != IGNORED).any():
            raise SampleError(
                "no_loss.sample", where=key, length=len(all_ids), sequence_length=limit
            )
        return ModelSequence(ids=all_ids, targets=all_targets, weight=1.0, starts=starts)


class ModelDraft:
    """The example of one sample before its arrays are made; see `loader.assembly.Draft`."""

    __slots__ = (
        *(
            "dataset",
            "described",
            "error",
            "key",
            "num_crops",
            "num_tokens",
            "num_units",
            "num_video_units",
            "plan",
            "real",
        ),
        *("features", "read_s", "render_s", "scratch", "sources", "stored", "substitutes", "view"),
        *("_clips_s", "_limits"),
    )

    def __init__(
        self,
        plan: ModelPlan,
        sources: Sequence[PictureSource],
        *,
        view: ModelView,
        stored: StoredModel,
        key: str,
        scratch: Scratch,
        features: StoredFeatures | None = None,
        clips: Sequence[Clip] = (),
        limits: ClipLimits = DEFAULT_LIMITS,
    ) -> None:
        """Joins what was planned and the pictures.

        Args:
          plan: As a `ModelPlanner` of the same view makes it.
          sources: A picture for each image of the sample, of which the plan has some or all, but
            for frames of clips; overviews are not used.
          view: What the run wants.
          stored: What the dataset knows of its model.
          key: The sample's.
          scratch: Memory for decoding.
          features: Of a dataset that stores them instead of pictures.
          clips: Whose frames are the images after those.
          limits: Of decoding clips.
        """
        self.plan, self.view, self.stored = plan, view, stored
        self.sources = [sources_of(images, sources, clips) for images in plan.images]
        self._limits = limits
        self.features = features
        self.key, self.scratch = key, scratch
        self.num_tokens = len(plan.sequence.ids)
        self.num_crops = plan.visual
        """Tokens of all pictures: what `max_crops` of packs bounds."""
        self.num_units = sum(p.num_units for p in plan.pictures if not p.num_frames)
        """Rows of `pixel_values`, N."""
        self.num_video_units = sum(p.num_units for p in plan.pictures if p.num_frames)
        """Rows of `pixel_values_videos`."""
        self.substitutes: dict[str, Any] | None = None
        self.dataset: str | None = None
        self.described: Mapping[str, Any] = {}
        """Further metadata."""
        self.real = True
        self.error: ShardsError | None = None
        self.render_s = self._clips_s = 0.0
        self.read_s = 0.0
        """Seconds of reading clips, after it was planned."""

    @property
    def parts(self) -> tuple[ModelDraft, ...]:
        """The examples of the row."""
        return (self,)

    @property
    def decode_s(self) -> float:
        """Seconds of decoding."""
        shown = [one for each in self.sources for one, _ in each]
        return self._clips_s + sum([one.decode_s for one in shown if type(one) is Encoded])

    def positions(self) -> np.ndarray:
        """Counts positions: int64 [L], or [4, L] with multimodal ones.

        Of the four rows the first counts tokens, which keeps packed examples apart; the others are
        time, height and width.
        """
        text = np.arange(self.num_tokens)
        if self.stored.family.positions != "mrope":
            return text + (self.stored.family.positions == "from_one")
        found = np.empty((4, self.num_tokens), np.int64)
        found[0] = text
        merge = getattr(self.view.family, "merge", 1)
        done = at = 0
        seconds = iter(self.plan.seconds)
        each = [(plan, next(seconds) if plan.num_frames else 0.0) for plan in self.plan.pictures]
        blocks = [block for block in each for _ in range(block[0].num_blocks)]
        for start, (picture, patch_s) in zip(self.plan.sequence.starts, blocks, strict=True):
            found[1:, done:start] = np.arange(at, at + start - done)
            at += start - done
            rows, cols = (side // merge for side in picture.grid)
            times = picture.num_times // picture.num_blocks
            cells = np.arange(times * rows * cols)
            stop = start + times * rows * cols
            found[1, start:stop] = at + self._moments(times, patch_s)[cells // (rows * cols)]
            found[2, start:stop] = at + cells // cols % rows
            found[3, start:stop] = at + cells % cols
            at += max(rows, cols)
            done = stop
        found[1:, done:] = np.arange(at, at + self.num_tokens - done)
        return found

    def _moments(self, times: int, patch_s: float) -> np.ndarray:
        """Gives the position of each patch along time, from that of the first: int64 [times]."""
        family = self.view.family
        video = family.video if isinstance(family, Qwen2VL) else None
        if times == 1 or video is None or video.times != "seconds":
            return np.arange(times)
        # In float32, as the models.
        between = np.float32(video.rate) * np.float32(patch_s)
        moments: np.ndarray = np.arange(times, dtype=np.float32) * between
        return moments.astype(np.int64)

    def column(self, name: str) -> np.ndarray:
        """Makes one of the arrays of a value per token, [L]."""
        sequence = self.plan.sequence
        if name == "input_ids":
            return sequence.ids
        if name == "labels":
            return sequence.labels
        if name == self.stored.family.type_ids:
            if isinstance(self.stored.family, PaliGemma):
                answers: np.ndarray = sequence.targets != IGNORED
                return answers.astype(np.int64)
            soft: np.ndarray = (sequence.ids == self.stored.soft_id).astype(np.int64)
            if self.plan.seconds:
                soft[sequence.ids == self.stored.video_id] = 2
            return soft
        if name == "loss_weights":
            return np.where(sequence.labels == IGNORED, 0.0, sequence.weight).astype(np.float32)
        assert name == "subsegment_ids"
        return np.zeros(self.num_tokens, np.int64)

    def write_units(self, out: np.ndarray, videos: np.ndarray) -> None:
        """Renders the pictures and the videos.

        Args:
          out: float32 [N, ...] of the pictures, to be filled.
          videos: float32 [num_video_units, ...], likewise.

        Raises:
          ShardError, SampleError: Of a picture; kept as `error`.
        """
        family, backend, done = self.view.family, self.view.backend, [0, 0]
        with self._rendering():
            for sources, plan in zip(self.sources, self.plan.pictures, strict=True):
                is_video = plan.num_frames > 0
                start = done[is_video]
                done[is_video] += plan.num_units
                rows = (out, videos)[is_video][start : start + plan.num_units]
                in_clip = [one for one, _ in sources if isinstance(one, ClipFrame)]
                if in_clip:
                    self._write_clip(plan, in_clip, rows)
                    continue
                for i, (picture, _) in enumerate(sources):
                    pixels = self._pixels(picture)
                    if is_video:
                        write_frame(family, plan, i, pixels, rows, backend=backend)
                    else:
                        write_units(family, plan, pixels, rows, backend=backend)

    def _write_clip(self, plan: PicturePlan, frames: Sequence[ClipFrame], out: np.ndarray) -> None:
        def put(i: int, pixels: np.ndarray) -> None:
            write_frame(self.view.family, plan, i, pixels, out, backend=self.view.backend)

        decode_s, read_s = frames[0].clip.frames(
            [frame.number for frame in frames], put, scratch=self.scratch, limits=self._limits
        )
        self._clips_s += decode_s
        self.read_s += read_s

    def feature_rows(self) -> list[int]:
        """Counts the rows of features of each picture."""
        assert self.features is not None
        return [
            self.features.num_rows(len(one.payload)) if isinstance(one, Encoded) else 0
            for ((one, _),) in self.sources  # a dataset of features has no videos
        ]

    def write_features(self, out: np.ndarray) -> None:
        """Reads the features of the pictures into [rows, *row].

        Raises:
          ShardError: Of a picture; kept as `error`.
          SampleError: `features_rows`: they were made of other tiles, as those of LLaVA-OneVision
            are where a sample has several pictures and the example one; likewise.
        """
        assert self.features is not None
        counts, ratio = self.feature_rows(), self.features.rows_per_units
        with self._rendering():
            for count, plan in zip(counts, self.plan.pictures, strict=True):
                if ratio is not None and count * ratio[1] != plan.num_units * ratio[0]:
                    raise SampleError(
                        "features_rows.pictures", where=self.key, rows=count, units=plan.num_units
                    )
            write_features([one for (one,) in self.sources], counts, self.features, out)

    def processed(self) -> dict[str, torch.Tensor]:
        """Gives what the model's own image processor makes of the pictures, one at least.

        Raises:
          ShardError, SampleError: As `write_units`.
          ConfigError: `image_processor`.
        """
        family, backend = self.view.family, self.view.backend
        assert isinstance(family, Processor)
        with self._rendering():
            # Copies: decoding the next one may use the same memory.
            pictures = [self._pixels(picture).copy() for ((picture, _),) in self.sources]
            return processed(family, pictures, backend=backend)

    def _pixels(self, picture: np.ndarray | Encoded | ClipFrame) -> np.ndarray:
        if isinstance(picture, Encoded):
            return picture.pixels(self.scratch, "picture")
        assert not isinstance(picture, ClipFrame)
        return picture

    @contextmanager
    def _rendering(self) -> Iterator[None]:
        """Takes the time, and keeps an error of a picture."""
        start_s, read_s = perf_counter(), self.read_s
        try:
            yield
        except (ShardError, SampleError) as error:
            self.error = error
            raise
        self.render_s += perf_counter() - start_s - (self.read_s - read_s)

    def metadata(self) -> dict[str, Any]:
        """Describes the example."""
        described: dict[str, Any] = {
            "key": self.key if self.real else None,
            "images": [
                {
                    "width": width,
                    "height": height,
                    "tokens": self.stored.block_length(picture),
                    **({"frames": picture.num_frames} if picture.num_frames else {}),
                }
                for (width, height), picture in zip(
                    self.plan.sizes, self.plan.pictures, strict=True
                )
            ],
        }
        described |= self.described
        if not self.real:
            described["real"] = False
        if self.substitutes is not None:
            described["substitutes"] = self.substitutes
        if self.dataset is not None:
            described["dataset"] = self.dataset
        return described


class ModelPack:
    """A row of several examples, one after the other; positions restart with each."""

    def __init__(self, parts: Sequence[ModelDraft]) -> None:
        """Joins drafts of one view, at least one."""
        self.parts = tuple(parts)
        self.num_tokens = sum(part.num_tokens for part in parts)
        self.num_crops = sum(part.num_crops for part in parts)

    def metadata(self) -> dict[str, Any]:
        """Describes the row and, as `examples`, its parts."""
        parts = [part.metadata() for part in self.parts]
        return {"key": "+".join([part["key"] for part in parts]), "examples": parts}
