"""VideoFrames: which frames of a sample's videos an example has, and where their tokens go."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from loader.assembly.layout import Sequence1d, TokenIds
from loader.assembly.seen import Seen, SeenSize
from loader.assembly.view import View
from shardspec.frames import draw_frames, even_frames
from shardspec.sample import ALL_SHOWN, SpanKind
from shardspec.tiling import FrameView

_SUBTITLE = SpanKind.SUBTITLE.value
_LEAD, _VIDEO = SpanKind.LEAD.value, SpanKind.VIDEO.value


class Shown:
    """The images of a sample with videos that an example has."""

    __slots__ = ("begins", "firsts", "images", "is_frame", "times_ms")

    def __init__(
        self, images: list[int], firsts: list[int], begins: list[bool], is_frame: list[bool]
    ) -> None:
        self.images = images
        """Numbers of the stored images, in the order of the sequence."""
        self.firsts = firsts
        """For each, where in this list its video begins; for other images, where it is itself."""
        self.begins = begins
        """For each, whether it is the first that is shown of its video, or no frame."""
        self.is_frame = is_frame
        self.times_ms: list[int] = []
        """Times of the frames."""


class VideoFrames:
    """Draws the frames of the examples of one view and lays out their tokens."""

    def __init__(self, frames: FrameView, view: View, ids: TokenIds) -> None:
        """Joins how frames are seen, what the run wants and the special ids of the tokenizer."""
        self._view, self._ids = frames, ids
        self._seen = Seen(frames.image_view(view.image), view, ids, frames=frames)
        self._random = view.purpose == "train" and frames.sampling == "random"

    def draw(
        self,
        units: Sequence[Sequence[int]],
        sizes: Sequence[tuple[int, int]],
        others: Sequence[Sequence[int]],
        rng: np.random.RandomState,
    ) -> Shown:
        """Draws the frames of each video; other images are all shown.

        Args:
          units: Images and videos, as `video_units` lists them.
          sizes: Source (width, height) of each stored image.
          others: The spans that are neither texts nor images.
          rng: The sample's generator.
        """
        frames = self._view
        leads = [row for row in others if row[0] == _LEAD]
        images: list[int] = []
        firsts: list[int] = []
        begins: list[bool] = []
        is_frame: list[bool] = []
        for unit in units:
            kind, _, start, count = unit[:4]
            if kind != _VIDEO:
                firsts.append(len(images))
                images.append(start)
                begins.append(True)
                is_frame.append(False)
                continue
            most = unit[6] or count
            number = min(most, frames.max_frames or most)
            if frames.max_tokens is not None:
                longest = max(row[3] - row[2] for row in leads[start : start + count])
                each = len(self._seen.of(sizes[start]).block) + frames.timestamps * longest
                room = frames.max_tokens - 2 * (frames.marks == "video")
                number = max(1, min(number, room // each))
            if leads[start][7] == ALL_SHOWN:  # a text names them
                number = count
                drawn = list(range(count))
            elif self._random:
                drawn = draw_frames(count, number, rng).tolist()
            else:
                drawn = even_frames(most, number).tolist()
                if unit[6]:  # among those that the recipe chose, as if these were stored
                    chosen = [i for i in range(count) if leads[start + i][7]]
                    drawn = [chosen[i] for i in drawn]
            firsts += [len(images)] * number
            images += [start + i for i in drawn]
            begins += [True] + [False] * (number - 1)
            is_frame += [True] * number
        return Shown(images, firsts, begins, is_frame)

    def lay_out(
        self,
        images: Seen,
        shown: Shown,
        sizes: Sequence[tuple[int, int]],
        tokens: np.ndarray,
        others: Sequence[Sequence[int]],
    ) -> tuple[list[SeenSize], list[np.ndarray], list[np.ndarray]]:
        """Gives what is seen of each image, the tokens before it, and its block."""
        frames = self._view
        lead_rows = [row for row in others if row[0] == _LEAD]
        seen: list[SeenSize] = []
        leads: list[np.ndarray] = []
        blocks: list[np.ndarray] = []
        around = frames.marks == "video"
        said = _Subtitles(tokens, others)
        for i, (image, size) in enumerate(zip(shown.images, sizes, strict=True)):
            row, first = lead_rows[image], shown.begins[i]
            is_frame = shown.is_frame[i]
            each = (self._seen if is_frame else images).of(size)
            lead = tokens[row[4] : row[5]] if is_frame and first else tokens[row[2] : row[3]]
            block = each.block
            if is_frame:
                shown.times_ms.append(row[6])
                lead = lead if frames.timestamps else lead[:0]
                spoken = said.before(image, row[6])
                if around and first:
                    lead = np.append(np.int32(self._ids.frame_start), lead)
                last = i + 1 == len(sizes) or shown.begins[i + 1]
                if around and last:
                    block = np.append(block, np.int32(self._ids.frame_end))
                if spoken:
                    lead = np.concatenate([*spoken, lead])
                if last and (spoken := said.rest(image)):
                    block = np.concatenate([block, *spoken])
            seen.append(each)
            leads.append(lead)
            blocks.append(block)
        return seen, leads, blocks


class _Subtitles:
    """Hands out the subtitles of the videos of a sample, as their frames come up."""

    def __init__(self, tokens: np.ndarray, others: Sequence[Sequence[int]]) -> None:
        """Takes the tokens of a sample, and its spans that are neither texts nor images."""
        self._tokens = tokens
        videos = [row for row in others if row[0] == _VIDEO]
        lines = [row for row in others if row[0] == _SUBTITLE]
        self._lines = {row[1]: [line for line in lines if line[1] == row[1]] for row in videos}
        self._videos = videos if lines else []

    def before(self, image: int, time_ms: float) -> list[np.ndarray]:
        """Lists what is said before a frame, and not before an earlier one."""
        for _, video, first, count, *_ in self._videos:
            if first <= image < first + count:
                lines = self._lines[video]
                number = sum(line[4] < time_ms for line in lines)
                self._lines[video] = lines[number:]
                return [self._tokens[line[2] : line[3]] for line in lines[:number]]
        return []

    def rest(self, image: int) -> list[np.ndarray]:
        """Lists what is said after the last frame that is shown, which is `image`."""
        return self.before(image, math.inf)


Places = list[tuple[int, int, int]]
"""Of each image: the number of the block that it is in, and where in that it begins and ends."""


def join_frames(
    leads: Sequence[np.ndarray], blocks: Sequence[np.ndarray], shown: Shown
) -> tuple[list[np.ndarray], list[np.ndarray], Places]:
    """Joins the frames of each video, and what is in front of them, into one block.

    One placeholder of a text stands for all of it.

    Returns:
      No leads, the blocks, and where the images are in them.
    """
    runs: list[list[np.ndarray]] = []
    places: Places = []
    length = 0
    for lead, block, first in zip(leads, blocks, shown.begins, strict=True):
        if first:
            runs.append([])
            length = 0
        runs[-1] += [lead, block]
        start = length + len(lead)
        length = start + len(block)
        places.append((len(runs) - 1, start, length))
    return [], [np.concatenate(each) for each in runs], places


def place_images(sequence: Sequence1d, places: Places) -> None:
    """Says where the images are in a sequence that was laid out of joined blocks."""
    starts = sequence.image_starts
    sequence.image_starts = tuple(starts[block] + start for block, start, _ in places)
    sequence.image_ends = tuple(starts[block] + end for block, _, end in places)
