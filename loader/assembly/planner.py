"""Planner: every draw of an example, and where its tokens go, without a pixel.

The only place that draws, always from the sample's own generator and in this order: one of the
sample's windows, if it has any, a variant of each turn, the order of the branches, the resolution,
the frames of each video, the augmentation of each image (of all frames of a video together), the
filter of their resize. The rest follows from the draws.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from loader.assembly.augment import NO_CHANGE, Augment, Draw, draw, draw_filter, draw_own
from loader.assembly.collate import Shapes
from loader.assembly.frames import Shown, VideoFrames, join_frames, place_images
from loader.assembly.layout import (
    IGNORED,
    BranchTurns,
    Sequence1d,
    TokenIds,
    Turn,
    count_placed,
    lay_out,
    lay_out_prompt,
)
from loader.assembly.moved import draw_with_points
from loader.assembly.own_augment import OwnAugment
from loader.assembly.questions import prompt_of, question_of
from loader.assembly.seen import Seen, SeenSize
from loader.assembly.view import View
from shardspec.coordinates import replace_runs
from shardspec.errors import SampleError
from shardspec.keyed import draw_below, draw_order
from shardspec.sample import SpanKind, point_lists, video_units, window_images
from shardspec.tiling import ImageView

_UNCHANGED = Augment()

# Plain integers: comparing with a member of an enum costs as much as all the rest of a row.
_TEXT, _IMAGE, _LEAD = SpanKind.TEXT.value, SpanKind.IMAGE.value, SpanKind.LEAD.value
_VIDEO, _WINDOW = SpanKind.VIDEO.value, SpanKind.WINDOW.value
_POINTS = SpanKind.POINTS.value


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
    seen: list[SeenSize]
    """What the view makes of each image."""
    shapes: Shapes
    """Of what it has for each crop."""
    shown: Shown | None = None
    """Which images of a sample with videos it has; None for another one."""
    asked: tuple[int, int] | None = None
    """Conversation and exchange of the question that is asked, for evaluation."""
    images: Sequence[int] | None = None
    """Numbers of the stored images that it has; None for the first ones, in order."""
    window: int | None = None
    """The window that it is, of a sample that has windows."""

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


class Planner:
    """Makes every draw of the examples of one view and lays out their tokens.

    Safe to share between threads.
    """

    def __init__(self, view: View, ids: TokenIds) -> None:
        """Joins what the run wants and the special ids of the dataset's tokenizer."""
        self.view, self.ids = view, ids
        self._training = view.purpose == "train"
        self._augments = self._training and view.augment != _UNCHANGED
        self._images = Seen(view.image, view, ids)
        self._frames = None
        if view.frames is not None:
            self._frames = VideoFrames(view.frames, view, ids)
        self._high_res = None
        if self._training and view.high_res is not None:
            self._high_res = Seen(view.high_res, view, ids)

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
          SampleError: `too_many_images`; `unanswered`, a question has no answer, and the view
            is not for evaluation; `video_view`, the view does not say how frames are seen; and as
            `lay_out` or `lay_out_prompt`.
          ConfigError: `question_number`.
        """
        view = self.view
        kinds = spans[:, 0].tolist()
        num_texts, num_images = kinds.count(_TEXT), kinds.count(_IMAGE)
        most = num_images  # placeholders that there is something for
        texts, window = spans[:num_texts], None
        windows = window_images(spans) if _WINDOW in kinds else []
        if windows and view.purpose != "evaluation":
            drawn = self._training and len(windows) > 1
            window = draw_below(rng, len(windows)) if drawn else 0
            texts = texts[texts[:, 1] == window]
        chosen = _choose(texts, rng if self._training else None)
        if self._training and view.branch_order == "shuffled" and len(chosen) > 1:
            chosen = [chosen[b] for b in draw_order(rng, len(chosen))]
        branches = _branches(tokens, chosen)
        images = self._images
        if self._high_res is not None and rng.random_sample() < view.high_res_probability:
            images = self._high_res
        asked = None
        if view.purpose == "evaluation":
            placed = count_placed(branches, self.ids)
            asked = question_of(branches, question, view.questions)
            branches = [prompt_of(branches[asked[0]], asked[1])]
            if placed:  # images that the conversation places itself come only as far as it goes
                most = count_placed(branches, self.ids)
                num_images = num_images if _VIDEO in kinds else most
            window = asked[0] if windows else None
        elif any(row[5] == row[6] for rows in chosen for row in rows):
            raise SampleError("unanswered.view", where=key)
        first_image = kinds.index(_IMAGE) if num_images else 0
        pictures = spans[first_image : first_image + num_images].tolist()
        shown_images = None
        if window is not None:
            shown_images = windows[window]
            pictures = [pictures[i] for i in shown_images]
        others = spans[num_texts:first_image].tolist() if first_image > num_texts else []
        shown, frames = None, self._frames
        videos = [row for row in others if row[0] == _VIDEO]
        if videos:
            sizes = [(row[2], row[3]) for row in pictures]
            if frames is None:
                raise SampleError("video_view", where=key)
            shown = frames.draw(video_units(videos, num_images)[:most], sizes, others, rng)
            shown_images = shown.images
            pictures = [pictures[i] for i in shown_images]
        if view.max_images is not None and len(pictures) > view.max_images:
            raise SampleError(
                "too_many_images.view", where=key, images=len(pictures), max_images=view.max_images
            )
        draws = [NO_CHANGE] * len(pictures)
        if self._augments and _POINTS in kinds:
            lists = point_lists(spans)
            draws, changes = draw_with_points(view.augment, pictures, lists, tokens, rng, key=key)
            draws = _with_filter(draws, view.augment, rng)
            if changes:
                moved, positions = replace_runs(tokens, changes)
                branches = _branches(moved, _elsewhere(chosen, positions))
        elif self._augments:
            draws = self._draw_changes(pictures, shown, rng, key)
        sizes = [(row[2], row[3]) for row in pictures]
        if shown is None or frames is None:
            seen = [images.of(size) for size in sizes]
            leads = [tokens[row[2] : row[3]] for row in others if row[0] == _LEAD]
            blocks = [each.block for each in seen]
        else:
            seen, leads, blocks = frames.lay_out(images, shown, sizes, tokens, others)
        places = None
        if shown is not None and count_placed(branches, self.ids):
            leads, blocks, places = join_frames(leads, blocks, shown)
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
        else:
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
        if places is not None:
            place_images(sequence, places)
        return ExamplePlan(
            sequence,
            images.view,
            draws,
            sizes,
            seen,
            images.shapes,
            shown,
            asked,
            shown_images,
            window,
        )

    def _draw_changes(
        self,
        pictures: Sequence[Sequence[int]],
        shown: Shown | None,
        rng: np.random.RandomState,
        key: str,
    ) -> list[Draw]:
        """Draws the augmentation of each picture; the frames of a video have one draw."""
        seen_as = [(row[2], row[3], row[7]) for row in pictures]
        if shown is None:
            return draw_pictures(self.view, seen_as, rng, key=key)
        own = [i for i, begins in enumerate(shown.begins) if begins]
        made = draw_pictures(self.view, [seen_as[i] for i in own], rng, key=key)
        draw_of = dict(zip(own, made, strict=True))
        return [draw_of[first] for first in shown.firsts]


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
    return _with_filter(draws, augment, rng)


def _with_filter(draws: list[Draw], augment: object, rng: np.random.RandomState) -> list[Draw]:
    chosen = draw_filter(augment, rng) if isinstance(augment, Augment) else None
    return draws if chosen is None else [replace(each, resample=chosen) for each in draws]


def _choose(texts: np.ndarray, rng: np.random.RandomState | None) -> list[list[list[int]]]:
    """Draws one variant of every turn, branch by branch; the first one without a generator.

    Returns:
      The TEXT rows of each branch.
    """
    chosen: list[list[list[int]]] = []
    turns = texts[:, 1:3].tolist()
    last = -1
    first = 0
    while first < len(turns):
        # The variants of a turn are adjacent.
        turn_end = bisect_right(turns, turns[first], first)
        drawn = first
        if rng is not None and turn_end - first > 1:
            drawn += draw_below(rng, turn_end - first)
        row = texts[drawn].tolist()
        if row[1] == last:
            chosen[-1].append(row)
        else:
            chosen.append([row])
            last = row[1]
        first = turn_end
    return chosen


def _branches(tokens: np.ndarray, chosen: Sequence[Sequence[Sequence[int]]]) -> list[BranchTurns]:
    """Takes the tokens of chosen rows."""
    return [
        BranchTurns(
            [Turn(tokens[a:b], tokens[c:d], weight) for _, _, _, a, b, c, d, weight in rows],
            rows[0][7],
        )
        for rows in chosen
    ]


def _elsewhere(
    chosen: Sequence[Sequence[Sequence[int]]], positions: np.ndarray
) -> list[list[list[int]]]:
    """Gives the rows for tokens of which each has another position."""
    return [
        [[*row[:3], *positions[list(row[3:7])].tolist(), row[7]] for row in rows] for rows in chosen
    ]
