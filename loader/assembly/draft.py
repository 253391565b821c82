"""Draft: a planned example that writes its arrays into the memory that it is given."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np

from loader.assembly.augment import NO_CHANGE
from loader.assembly.clip import Clip, ClipFrame, PictureSource, sources_of
from loader.assembly.families.example import ModelPlan
from loader.assembly.features import write_features
from loader.assembly.pixels import Encoded, normalize, patch_cells, render
from loader.assembly.planner import ExamplePlan
from loader.assembly.questions import question_record, sample_record, window_record
from loader.assembly.view import View
from loader.buffers import Scratch
from shardspec.errors import SampleError, ShardError, ShardsError
from shardspec.tiling import EXCLUDED, NO_PATCH, image_input_idx, image_masks, token_pooling
from shardspec.video import DEFAULT_LIMITS, ClipLimits


class Draft:
    """The example of one sample before its arrays are made (a `LazyExample`)."""

    __slots__ = (
        *("described", "dataset", "error", "key", "num_crops", "num_tokens", "plan", "real"),
        *("read_s", "render_s", "scratch", "shapes", "sources", "substitutes", "view"),
        *("_clips_s", "_limits"),
    )

    channels_first = False

    def __init__(
        self,
        plan: ExamplePlan,
        sources: Sequence[PictureSource],
        *,
        clips: Sequence[Clip] = (),
        limits: ClipLimits = DEFAULT_LIMITS,
        view: View,
        key: str,
        scratch: Scratch,
    ) -> None:
        """Joins what was planned and the pictures.

        Args:
          plan: As a `Planner` of the same view makes it.
          sources: A picture and its overview for each image of the sample, but for frames of clips.
          clips: Whose frames are the images after those.
          limits: Of decoding clips.
          view: What the run wants.
          key: The sample's.
          scratch: Memory for pictures that are not decoded straight into the batch.
        """
        if plan.images is not None:
            sources = sources_of(plan.images, sources, clips)
        self.plan, self.view, self.key = plan, view, key
        self.sources = sources[: len(plan.sizes)]
        self.scratch, self._limits = scratch, limits
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
        self.read_s = 0.0
        """Seconds of reading clips, after it was planned."""
        self._clips_s = 0.0

    @property
    def decode_s(self) -> float:
        """Seconds of decoding."""
        encoded = [one for pair in self.sources for one in pair if type(one) is Encoded]
        return self._clips_s + sum([one.decode_s for one in encoded])

    def pieces(self, name: str) -> list[np.ndarray]:
        """Lists the arrays that one of the `COLUMNS` consists of; they are only to be read."""
        return self.plan.sequence.pieces(name)

    def write_images(self, out: np.ndarray) -> None:
        """Renders the pictures into `out`, of the type and as many crops as there are.

        Crops are written as [n, S, S, 3]: memory in that order is filled without a copy.

        Raises:
          ShardError, SampleError: As `render`, and kept as `error`.
        """
        start_s, read_s = perf_counter(), self.read_s
        plan, view, done = self.plan, self.view, 0
        if view.features is not None:
            try:
                write_features(self.sources, [seen.crops for seen in plan.seen], view.features, out)
            except ShardError as error:
                self.error = error
                raise
            self.render_s += perf_counter() - start_s
            return
        if view.pixels == "patches":
            cells = patch_cells(out, plan.view.patch_px)
        else:
            cells = out.transpose(0, 2, 3, 1)
        crops = cells
        if view.normalize is not None:
            side = plan.view.size_px
            crops = self.scratch("crops", (plan.num_crops, side, side, 3))
        in_clips: list[tuple[ClipFrame, int, int]] = []
        try:
            for k, ((picture, overview), (width, height), own, seen) in enumerate(
                zip(self.sources, plan.sizes, plan.draws, plan.seen, strict=True)
            ):
                stop = done + seen.crops
                if isinstance(picture, ClipFrame):
                    in_clips.append((picture, k, done))
                elif (
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
            for _, frames in itertools.groupby(in_clips, lambda frame: id(frame[0].clip)):
                self._write_frames(list(frames), crops)
        except (ShardError, SampleError) as error:
            self.error = error
            raise
        if view.normalize is not None:
            normalize(crops.reshape(cells.shape), kind=view.normalize, out=cells)
        self.render_s += perf_counter() - start_s - (self.read_s - read_s)

    def _write_frames(
        self, frames: Sequence[tuple[ClipFrame, int, int]], crops: np.ndarray
    ) -> None:
        """Renders frames of one clip: (the frame, its number here, its first crop) of each."""
        plan = self.plan

        def put(at: int, pixels: np.ndarray) -> None:
            _, k, start = frames[at]
            width, height = plan.sizes[k]
            render(
                pixels,
                source_width=width,
                source_height=height,
                view=plan.seen[k].view,
                draw=plan.draws[k],
                out=crops[start : start + plan.seen[k].crops],
                scratch=self.scratch,
                resample=self.view.resample,
            )

        numbers = [frame.number for frame, _, _ in frames]
        decode_s, read_s = frames[0][0].clip.frames(
            numbers, put, scratch=self.scratch, limits=self._limits
        )
        self._clips_s += decode_s
        self.read_s += read_s

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
    if record is not None and plan.window is not None:
        record = window_record(record, plan.window)
    if record is not None and plan.asked is None:
        described["record"] = sample_record(record)
    elif record is not None and plan.asked is not None:
        branch, turn = plan.asked
        branch = branch if plan.window is None else 0
        described["record"] = question_record(record, branch=branch, turn=turn)
    return described
