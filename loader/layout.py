"""The token layout: from chosen texts and image blocks to the arrays of one training sequence.

    [BOS] [lead, image block] ... [branch 0] [branch 1] ...      branch = prompt response ...

A lead is text in front of an image, such as "Image 2". Where a text says itself where its images
stand (the symbol `<|image|>`), the blocks go there instead; only a lone branch may do so.

1. The *prefix* is BOS and the image blocks; every branch is a conversation that sees the prefix and
   itself. Its positions count on from the prefix, as if it stood there alone.
2. The arrays are aligned for next-token prediction: `labels[t]` is the target of input position t.
   Targets are the tokens of responses and the EOS that ends each response; all else is -100.
3. Between turns of a branch EOS stands in the input as well; the EOS behind the last response of a
   branch is a target only, so that the next branch does not follow an end of text.
4. With a limit, later branches are dropped and the last one is cut; an image block never is.

Pure. The attention rule that goes with `subsegment_ids`: position q may see position k if k <= q
and subsegment[q] <= subsegment[k], which lets branches see the prefix and not one another.
"""

from __future__ import annotations

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
"""How branches stand side by side. "molmo2": numbered from 0, each ends in front of its EOS.
"molmo1": numbered from 1, the EOS of all but the last stands in the input."""

LossScale = Literal["flat", "root_subsegments", "root_length", "root_both"]
"""Weight of a branch's tokens: 1; 1 / sqrt(branches); 2 / sqrt(tokens under loss); both."""

PREFIX_SUBSEGMENT = 10_000
"""Subsegment of BOS and images, above every branch's (Molmo's number)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenIds:
    """The special ids that the layout needs."""

    bos: int
    eos: int
    pad: int
    image: ImageTokenIds
    placeholder: int = -1
    """<|image|>: where a text wants its next image; -1 where texts never say so."""

    @classmethod
    def from_special_ids(cls, ids: Mapping[str, int]) -> TokenIds:
        """Takes them from the table in a manifest or a tokenizer."""
        return cls(
            bos=ids["bos"],
            eos=ids["eos"],
            pad=ids["pad"],
            placeholder=ids["<|image|>"],
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


class BranchTurns(NamedTuple):
    """One conversation, as chosen."""

    turns: list[Turn]
    weight: int = WEIGHT_ONE
    """Loss weight in millionths."""


@dataclass(slots=True, kw_only=True)
class Sequence1d:
    """The arrays of one sequence, all [L]."""

    input_ids: np.ndarray
    """int64."""
    labels: np.ndarray
    """int64, -100 where there is no loss."""
    position_ids: np.ndarray
    """int64."""
    subsegment_ids: np.ndarray
    """int64: 10000 in the prefix, k in branch k."""
    loss_weights: np.ndarray
    """float32, 0 where there is no loss."""
    image_starts: tuple[int, ...]
    """Position of each image block's first token."""
    image_ends: tuple[int, ...]
    """One past each image block's last token."""
    dropped_branches: int
    """Branches that did not fit the limit."""


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
      branches: Conversations, in the order in which they should stand.
      ids: Special ids.
      leads: int32 tokens in front of each block; () for none.
      limit: Longest sequence; None for any.
      tree: Whose rules for branches.
      loss: How `loss_weights` scale with branches and their lengths.
      where: The sample's key, for errors.

    Raises:
      SampleError: `image_cut` (the images do not fit the limit), `no_loss` (nothing to learn is
        left within it), `image_placeholder` (a text asks for another number of images).
    """
    placed = _count_placeholders(branches, ids, num_blocks=len(blocks), where=where)
    draft = _Draft(eos=ids.eos, placeholder=ids.placeholder)
    draft.add(_ONE * ids.bos)
    if not placed:
        for b, block in enumerate(blocks):
            if leads:
                draft.add(leads[b])
            draft.add_block(block)
    prefix_end = draft.length
    spans: list[_Span] = []
    dropped = 0
    for branch in branches:
        prompt = len(branch.turns[0].prompt)
        length = draft.length + (tree == "molmo1")
        if limit is not None and spans and length + prompt >= limit:
            dropped += 1
            continue
        if spans and tree == "molmo1":
            # The EOS behind a branch is a target only; Molmo 1 keeps it between branches.
            draft.add_eos(spans[-1])
        spans.append(draft.add_branch(branch, blocks=blocks if placed else (), lone=not spans))
    if limit is not None and draft.image_ends and draft.image_ends[-1] > limit:
        raise SampleError(
            "the images of a sample do not fit the sequence",
            reason="image_cut",
            where=where,
            facts={"image_tokens": draft.image_ends[-1], "sequence_length": limit},
            fix='raise sequence_length, use a view with fewer crops, or on_bad="substitute"',
        )
    learned = [at for span in spans for at, _ in span.learned]
    if not learned or (limit is not None and learned[0] >= limit):
        raise SampleError(
            "nothing to learn is left of a sample within the sequence length",
            reason="no_loss",
            where=where,
            facts={"length": draft.length, "sequence_length": limit},
            fix='raise sequence_length, use a view with fewer crops, or on_bad="substitute"',
        )
    _scale(spans, loss)
    sequence = draft.written(spans, prefix_end, first=1 if tree == "molmo1" else 0)
    return Sequence1d(
        **{name: array[:limit] for name, array in sequence.items()},
        image_starts=tuple(draft.image_starts),
        image_ends=tuple(draft.image_ends),
        dropped_branches=dropped,
    )


@dataclass(slots=True)
class _Span:
    """A branch in the sequence."""

    start: int
    stop: int
    learned: list[tuple[int, np.ndarray]]
    """(Position, targets) of each response, in front of the EOS that ends it."""
    weight: float


_ONE = np.ones(1, dtype=np.int64)


class _Draft:
    """A sequence as runs of tokens and where they go, before any array is made."""

    def __init__(self, *, eos: int, placeholder: int) -> None:
        self.length = 0
        self.runs: list[tuple[int, np.ndarray]] = []
        """(Position, tokens) of the input."""
        self.image_starts: list[int] = []
        self.image_ends: list[int] = []
        self._eos, self._placeholder = eos, placeholder
        self._eos_run = _ONE * eos

    def add(self, tokens: np.ndarray) -> None:
        """Appends tokens."""
        self.runs.append((self.length, tokens))
        self.length += len(tokens)

    def add_block(self, block: np.ndarray) -> None:
        """Appends an image."""
        self.image_starts.append(self.length)
        self.add(block)
        self.image_ends.append(self.length)

    def add_eos(self, span: _Span) -> None:
        """Appends an EOS to the branch that was added last."""
        self.add(self._eos_run)
        span.stop = self.length

    def add_branch(self, branch: BranchTurns, *, blocks: Sequence[np.ndarray], lone: bool) -> _Span:
        """Appends a conversation without its last EOS.

        Args:
          branch: The conversation.
          blocks: Images that go where its placeholders stand; () for none.
          lone: Whether it stands right behind the prefix, which then predicts its first token.
        """
        span = _Span(self.length, self.length, [], branch.weight / WEIGHT_ONE)
        images = iter(blocks)
        for turn in branch.turns:
            if span.learned:
                self.add(self._eos_run)
            if blocks:
                self._add_placed(turn.prompt, images)
            else:
                self.add(turn.prompt)
            # Position t predicts the token behind it.
            response, at = turn.response, self.length
            self.add(response)
            skipped = int(at == span.start and not lone)
            span.learned.append((at - 1 + skipped, response[skipped:]))
        span.stop = self.length
        return span

    def _add_placed(self, prompt: np.ndarray, images: Iterator[np.ndarray]) -> None:
        done = 0
        for at in np.flatnonzero(prompt == self._placeholder).tolist():
            self.add(prompt[done:at])
            self.add_block(next(images))
            done = at + 1
        self.add(prompt[done:])

    def written(self, spans: list[_Span], prefix_end: int, *, first: int) -> dict[str, np.ndarray]:
        """Makes the arrays, each [length]; branches are numbered from `first` on."""
        length = self.length
        ids = np.empty(length, dtype=np.int64)
        labels = np.empty(length, dtype=np.int64)
        labels.fill(IGNORED)
        positions = np.arange(length)
        segments = np.empty(length, dtype=np.int64)
        weights = np.zeros(length, dtype=np.float32)
        for at, tokens in self.runs:
            ids[at : at + len(tokens)] = tokens
        segments[:prefix_end] = PREFIX_SUBSEGMENT
        for b, span in enumerate(spans):
            if b:
                positions[span.start : span.stop] -= span.start - prefix_end
            segments[span.start : span.stop] = first + b
            for at, targets in span.learned:
                stop = at + len(targets)
                labels[at:stop] = targets
                labels[stop] = self._eos
                weights[at : stop + 1] = span.weight
        if self.image_ends:
            # Images placed inside the text: what stands up to the last one is the prefix.
            segments[: self.image_ends[-1]] = PREFIX_SUBSEGMENT
        return {
            "input_ids": ids,
            "labels": labels,
            "position_ids": positions,
            "subsegment_ids": segments,
            "loss_weights": weights,
        }


def _count_placeholders(
    branches: Sequence[BranchTurns], ids: TokenIds, *, num_blocks: int, where: str
) -> int:
    count = sum(
        [
            np.count_nonzero(turn.prompt == ids.placeholder)
            for branch in branches
            for turn in branch.turns
        ]
    )
    if count and (count != num_blocks or len(branches) > 1):
        raise SampleError(
            "a text may place its images only in a lone branch, and all of them",
            reason="image_placeholder",
            where=where,
            facts={"placeholders": count, "images": num_blocks, "branches": len(branches)},
            fix="correct the row, or leave the placeholders out",
        )
    return count


def _scale(spans: Sequence[_Span], loss: LossScale) -> None:
    for span in spans:
        if loss in ("root_subsegments", "root_both"):
            span.weight /= math.sqrt(len(spans))
        if loss in ("root_length", "root_both"):
            learned = sum(len(targets) + 1 for _, targets in span.learned)
            span.weight *= 2 / math.sqrt(max(1, learned))
