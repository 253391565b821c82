"""The token layout: from chosen texts and image blocks to the arrays of one training sequence.

    [BOS] [lead, image block] ... [branch 0] [branch 1] ...      branch = prompt response ...

BOS is left out where the dataset's tokenizer has none (a chat template that writes none).

A lead is text in front of an image, such as "Image 2". Where a text itself says where its images
are (the symbol `<|image|>`), the blocks go there instead; only a lone branch may do so. Blocks
inside of a response, as documents have them, are not learned; the text on both sides of them is.

1. The *prefix* is BOS and the image blocks; every branch is a conversation that sees the prefix and
   itself. Its positions continue those of the prefix, as if it were alone.
2. The arrays are aligned for next-token prediction: `labels[t]` is the target of input position t.
   Targets are the tokens of responses and the EOS that ends each response; all else is -100, and so
   are responses of weight 0.
3. Between turns of a branch EOS is in the input as well; the EOS after the last response of a
   branch is a target only, so that the next branch does not follow an end of text.
4. With a limit, later branches are dropped and the last one is cut; an image block never is.

Pure. The attention rule that goes with `subsegment_ids`: position q may see position k if k <= q
and subsegment[q] <= subsegment[k], which lets branches see the prefix and not one another.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from shardspec.errors import SampleError
from shardspec.sample import WEIGHT_ONE
from shardspec.tiling import ImageTokenIds

IGNORED = -100
"""Label without loss: the default `ignore_index` of torch.nn.CrossEntropyLoss."""

Tree = Literal["molmo2", "molmo1"]
"""How branches are joined. "molmo2": numbered from 0, each ends in front of its EOS. "molmo1":
numbered from 1, the EOS of all but the last is in the input."""

LossScale = Literal["flat", "root_subsegments", "root_length", "root_both"]
"""Weight of a branch's tokens: 1; 1 / sqrt(branches); 2 / sqrt(tokens under loss); both.

The tokens of one branch of several do not count the EOS that ends it: Molmo 2 weighs it later. A
sample of a single conversation counts it."""

PREFIX_SUBSEGMENT = 10_000
"""Subsegment of BOS and images, above every branch's (Molmo's number)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenIds:
    """The special ids that the layout needs."""

    bos: int
    """-1 where sequences begin without one."""
    eos: int
    pad: int
    image: ImageTokenIds
    placeholder: int = -1
    """<|image|>: where a text wants its next image; -1 where texts never say so."""
    frame_start: int = -1
    """<frame_start>; -1 for a tokenizer without it."""
    frame_end: int = -1

    @classmethod
    def from_special_ids(cls, ids: Mapping[str, int]) -> TokenIds:
        """Takes them from the table in a manifest or a tokenizer."""
        return cls(
            bos=ids.get("bos", -1),
            eos=ids["eos"],
            pad=ids["pad"],
            placeholder=ids["<|image|>"],
            frame_start=ids.get("<frame_start>", -1),
            frame_end=ids.get("<frame_end>", -1),
            image=ImageTokenIds(
                im_start=ids["<im_start>"],
                im_end=ids["<im_end>"],
                im_patch=ids["<im_patch>"],
                im_col=ids["<im_col>"],
                low_res_im_start=ids["<low_res_im_start>"],
            ),
        )


# Tuples, and dataclasses that are not frozen: a frozen one takes 1 µs more to make, and each sample
# makes several.


class Turn(NamedTuple):
    """One exchange, as chosen."""

    prompt: np.ndarray
    """int32 [P]."""
    response: np.ndarray
    """int32 [R]."""
    weight: int | None = None
    """Loss weight in millionths; 0 leaves the response in the context, without loss. None for that
    of the branch."""


class BranchTurns(NamedTuple):
    """One conversation, as chosen."""

    turns: list[Turn]
    weight: int = WEIGHT_ONE
    """Loss weight in millionths."""


COLUMNS: Mapping[str, np.dtype] = {
    "input_ids": np.dtype(np.int64),
    "labels": np.dtype(np.int64),
    "position_ids": np.dtype(np.int64),
    "subsegment_ids": np.dtype(np.int64),
    "loss_weights": np.dtype(np.float32),
}
"""The arrays of one value per token, and their types."""


class Sequence1d:
    """One sequence as it was laid out; its arrays are made on demand, or piece by piece.

    input_ids, labels (-100 where there is no loss), position_ids, subsegment_ids (10000 in the
    prefix, k in branch k): int64 [L]; loss_weights: float32 [L], 0 where there is no loss.
    """

    __slots__ = (
        *("_first", "_labels", "_prefix_stop", "_runs", "_spans", "_total", "dropped_branches"),
        *("image_ends", "image_starts", "learns", "length", "weight"),
    )

    def __init__(
        self,
        runs: list[np.ndarray],
        labels: list[np.ndarray],
        spans: list[_Span],
        *,
        total: int,
        limit: int | None,
        prefix_stop: int,
        first: int,
        image_starts: tuple[int, ...],
        image_ends: tuple[int, ...],
        dropped: int,
    ) -> None:
        """Takes over what `lay_out` decided.

        Args:
          runs: Tokens, as consecutive arrays.
          labels: The same for the labels: (gap, targets, EOS) for each response, and a last gap.
            A response with images has such a triple for each of its texts, the EOS in the last.
          spans: The branches.
          total: Tokens before the limit.
          limit: Longest sequence.
          prefix_stop: Where the prefix ends.
          first: Subsegment of the first branch.
          image_starts, image_ends, dropped: See below.
        """
        self._runs, self._labels, self._spans, self._first = runs, labels, spans, first
        self._prefix_stop, self._total = prefix_stop, total
        self.length = total if limit is None else min(limit, total)
        """Tokens, L."""
        self.image_starts = image_starts
        """Position of each image block's first token."""
        self.image_ends = image_ends
        """One past each image block's last token."""
        self.dropped_branches = dropped
        """Branches that did not fit the limit."""
        self.weight = 1.0
        """Factor of all loss weights."""
        self.learns = True
        """False leaves no loss at all, as for padding."""

    def array(self, name: str) -> np.ndarray:
        """Makes one of the `COLUMNS`, [L]."""
        joined: np.ndarray = np.concatenate(
            self.pieces(name), dtype=COLUMNS[name], casting="unsafe"
        )
        return joined

    @property
    def input_ids(self) -> np.ndarray:
        return self.array("input_ids")

    @property
    def labels(self) -> np.ndarray:
        return self.array("labels")

    @property
    def position_ids(self) -> np.ndarray:
        return self.array("position_ids")

    @property
    def subsegment_ids(self) -> np.ndarray:
        return self.array("subsegment_ids")

    @property
    def loss_weights(self) -> np.ndarray:
        return self.array("loss_weights")

    def pieces(self, name: str) -> list[np.ndarray]:
        """Lists the arrays that one of the `COLUMNS` consists of; they are only to be read."""
        if name == "input_ids":
            found = self._runs
        elif name == "labels":
            found = self._labels if self.learns else [np.full(self._total, IGNORED)]
        elif name == "position_ids":
            found = self._positions()
        elif name == "subsegment_ids":
            found = self._segments()
        else:
            found = self._weights()
        return found if self.length == self._total else cut(found, self.length)

    def _positions(self) -> list[np.ndarray]:
        start = self._spans[0].start
        first, *others = self._spans
        found = [np.arange(first.stop)]
        found += [np.arange(start, start + span.stop - span.start) for span in others]
        return found

    def _segments(self) -> list[np.ndarray]:
        found = [np.full(self._prefix_stop, PREFIX_SUBSEGMENT)]
        for b, span in enumerate(self._spans):
            begin = max(span.start, self._prefix_stop)
            found.append(np.full(span.stop - begin, self._first + b))
        return found

    def _weights(self) -> list[np.ndarray]:
        if not self.learns:
            return [np.zeros(self._total, np.float32)]
        found: list[np.ndarray] = []
        gaps = iter(self._labels[::3])
        for span in self._spans:
            for length, own in zip(span.learned, span.weights, strict=True):
                weight = np.float32(own) * np.float32(self.weight)
                gap = np.zeros(len(next(gaps)), np.float32)
                found += (gap, np.full(length, weight, np.float32))
        found.append(np.zeros(len(next(gaps)), np.float32))
        return found


def lay_out(
    blocks: Sequence[np.ndarray],
    branches: Sequence[BranchTurns],
    *,
    ids: TokenIds,
    leads: Sequence[np.ndarray] = (),
    limit: int | None = None,
    tree: Tree = "molmo2",
    loss: LossScale = "flat",
    where: str = "",
) -> Sequence1d:
    """Lays out one sequence.

    Args:
      blocks: int32 token block of each image.
      branches: Conversations, in their order in the sequence.
      ids: Special ids.
      leads: int32 tokens in front of each block; () for none.
      limit: Longest sequence; None for any.
      tree: Whose rules for branches.
      loss: How `loss_weights` scale with branches and their lengths.
      where: The sample's key, for errors.

    Raises:
      SampleError: `image_cut` (the images do not fit the limit), `no_loss` (nothing to learn is
        left within it), `image_placeholder` (a text has another number of image symbols),
        `empty_turn` (one without a token comes before another one: both would be learned at the
        same position).
    """
    placed = _count_placeholders(branches, ids, num_blocks=len(blocks), where=where)
    eos, molmo1 = _single(ids.eos), tree == "molmo1"
    # Everything here is done for each sample: calls and objects that can be spared are.
    runs = [_single(ids.bos)] if ids.bos >= 0 else []
    length = len(runs)
    image_starts: list[int] = []
    image_ends: list[int] = []
    if not placed:
        for b, block in enumerate(blocks):
            if leads:
                runs.append(leads[b])
                length += len(leads[b])
            image_starts.append(length)
            runs.append(block)
            length += len(block)
            image_ends.append(length)
    prefix_stop, images = length, iter(blocks)
    labels: list[np.ndarray] = []
    labelled = 0
    spans: list[_Span] = []
    dropped = 0
    for turns, branch_weight in branches:
        if limit is not None and spans and length + molmo1 + len(turns[0].prompt) >= limit:
            dropped += 1
            continue
        if spans and molmo1:
            # The EOS after a branch is a target only; Molmo 1 keeps it between branches.
            runs.append(eos)
            length += 1
            spans[-1].stop = length
        start = length
        learned: list[int] = []
        weights: list[float] = []
        ends_learned = True
        for prompt, response, weight in turns:
            weight = branch_weight if weight is None else weight
            if length > start:
                runs.append(eos)
                length += 1
            if placed:
                for run, is_block in _placed(prompt, images, ids.placeholder):
                    if is_block:
                        image_starts.append(length)
                        image_ends.append(length + len(run))
                    runs.append(run)
                    length += len(run)
            else:
                runs.append(prompt)
                length += len(prompt)
            if placed:
                *heads, (response, _) = _placed(response, images, ids.placeholder)
                for run, is_block in heads:
                    if is_block:
                        image_starts.append(length)
                        image_ends.append(length + len(run))
                    elif len(run) and weight:
                        targets = run if length else run[1:]  # nothing predicts the very first
                        at = length + len(run) - len(targets)
                        labels += (_ignored(at - 1 - labelled), targets, _NOTHING)
                        learned.append(len(targets))
                        weights.append(weight / WEIGHT_ONE)
                        labelled = at - 1 + len(targets)
                    runs.append(run)
                    length += len(run)
            # Position t predicts the next token; a branch that is not the first does not follow the
            # prefix, which would predict its first token; neither does one without a prefix.
            at, targets = length, response
            runs.append(response)
            length += len(response)
            if at == start and (spans or not start):
                at, targets = at + 1, response[1:]
            if at <= labelled:
                raise SampleError("empty_turn", where=where, position=at)
            ends_learned = weight > 0
            if at <= length and weight:
                labels += (_ignored(at - 1 - labelled), targets, eos)
                learned.append(len(targets) + 1)
                weights.append(weight / WEIGHT_ONE)
                labelled = at + len(targets)
        spans.append(_Span(start, length, learned, weights, ends_learned))
    if limit is not None and image_ends and image_ends[-1] > limit:
        raise SampleError(
            "image_cut.sample", where=where, image_tokens=image_ends[-1], sequence_length=limit
        )
    if not labels or (limit is not None and len(labels[0]) >= limit):
        raise SampleError("no_loss.sample", where=where, length=length, sequence_length=limit)
    labels.append(_ignored(length - labelled))
    if loss != "flat":
        _scale(spans, loss, ends_counted=molmo1 or len(branches) == 1)
    return Sequence1d(
        runs,
        labels,
        spans,
        total=length,
        limit=limit,
        # Images placed inside the text: everything up to the last one is the prefix.
        prefix_stop=image_ends[-1] if placed else prefix_stop,
        first=1 if molmo1 else 0,
        image_starts=tuple(image_starts),
        image_ends=tuple(image_ends),
        dropped=dropped,
    )


def lay_out_prompt(
    blocks: Sequence[np.ndarray],
    branch: BranchTurns,
    *,
    ids: TokenIds,
    leads: Sequence[np.ndarray] = (),
    limit: int | None = None,
    tree: Tree = "molmo2",
    where: str = "",
) -> Sequence1d:
    """Lays out a conversation whose last response is to be generated; nothing in it is learned.

    The tokens are those of a training sequence in front of that response.

    Args:
      blocks: int32 token block of each image that has come by then.
      branch: The conversation; its last response is empty.
      ids, leads, tree, where: As of `lay_out`.
      limit: Longest sequence; None for any. A prompt is never cut.

    Raises:
      SampleError: `prompt_length`; `empty_prompt`, there is nothing to generate from; as `lay_out`.
    """
    if ids.bos < 0 and not blocks and not any(len(turn.prompt) for turn in branch.turns):
        raise SampleError("empty_prompt", where=where)
    # Weights of 0 would leave nothing to learn, which is an error in training alone.
    asked = BranchTurns([turn._replace(weight=None) for turn in branch.turns])
    sequence = lay_out(blocks, [asked], ids=ids, leads=leads, tree=tree, where=where)
    if limit is not None and sequence.length > limit:
        raise SampleError(
            "prompt_length", where=where, tokens=sequence.length, sequence_length=limit
        )
    sequence.learns = False
    return sequence


def count_placed(branches: Sequence[BranchTurns], ids: TokenIds) -> int:
    """Counts the images that the texts of conversations place themselves."""
    texts = [text for branch in branches for turn in branch.turns for text in turn]
    return sum(int(np.count_nonzero(text == ids.placeholder)) for text in texts)


@dataclass(slots=True)
class _Span:
    """A branch in the sequence."""

    start: int
    stop: int
    learned: list[int]
    """Positions under loss of each response that has one, EOS included."""
    weights: list[float]
    """Loss weight of each of them."""
    ends_learned: bool
    """Whether the last response has a loss."""


_NOTHING = np.zeros(0, np.int64)
_NOTHING.setflags(write=False)

_FILL = np.full(1 << 15, IGNORED)
_FILL.setflags(write=False)


def _ignored(length: int) -> np.ndarray:
    return _FILL[:length] if length <= len(_FILL) else np.full(length, IGNORED)


@functools.lru_cache(maxsize=64)
def _single(token: int) -> np.ndarray:
    run = np.array([token])
    run.setflags(write=False)
    return run


@functools.lru_cache(maxsize=64)
def _token_bytes(token: int) -> bytes:
    return token.to_bytes(4, "little", signed=True)


def cut(pieces: Sequence[np.ndarray], length: int) -> list[np.ndarray]:
    """Cuts consecutive arrays to their first `length` values."""
    found = []
    for piece in pieces:
        found.append(piece[:length])
        length -= len(found[-1])
    return found


def _placed(
    text: np.ndarray, images: Iterator[np.ndarray], placeholder: int
) -> Iterator[tuple[np.ndarray, bool]]:
    """Cuts a text at its placeholders: (tokens, whether they are the block of an image)."""
    done = 0
    for at in np.flatnonzero(text == placeholder).tolist():
        yield text[done:at], False
        yield next(images), True
        done = at + 1
    yield text[done:], False


def _count_placeholders(
    branches: Sequence[BranchTurns], ids: TokenIds, *, num_blocks: int, where: str
) -> int:
    count = 0
    mark = _token_bytes(ids.placeholder)
    for branch in branches:
        for turn in branch.turns:
            for text in (turn.prompt, turn.response):
                # Looking for its bytes first takes a quarter of the time, and mostly there is none.
                if mark in text.tobytes():
                    count += int(np.count_nonzero(text == ids.placeholder))
    if count and (count != num_blocks or len(branches) > 1):
        raise SampleError(
            "image_placeholder.place",
            where=where,
            placeholders=count,
            images=num_blocks,
            branches=len(branches),
        )
    return count


def _scale(spans: Sequence[_Span], loss: LossScale, *, ends_counted: bool) -> None:
    for span in spans:
        tokens = sum(span.learned) - (span.ends_learned and not ends_counted)
        if loss in ("root_subsegments", "root_both"):
            span.weights = [weight / math.sqrt(len(spans)) for weight in span.weights]
        if loss in ("root_length", "root_both"):
            factor = 2 / math.sqrt(max(1, tokens))
            span.weights = [weight * factor for weight in span.weights]
