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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One exchange, as chosen."""

    prompt: np.ndarray
    """int32 [P]."""
    response: np.ndarray
    """int32 [R]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchTurns:
    """One conversation, as chosen."""

    turns: Sequence[Turn]
    weight: int = WEIGHT_ONE
    """Loss weight in millionths."""


@dataclass(frozen=True, slots=True, kw_only=True)
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
    prefix = _Prefix(ids=[np.array([ids.bos])], starts=[], ends=[])
    if not placed:
        for b, block in enumerate(blocks):
            prefix.add(leads[b] if leads else block[:0], block)
    head = prefix.joined()
    parts = [_Part(ids=head, targets=np.full(len(head), IGNORED), weight=0.0)]
    length, dropped = len(head), 0
    for branch in branches:
        prompt = len(branch.turns[0].prompt)
        if limit is not None and len(parts) > 1 and length + prompt >= limit:
            dropped += 1
            continue
        part = _branch_part(branch, eos=ids.eos)
        if placed:
            part = _with_blocks(part, blocks, ids.placeholder, start=length, prefix=prefix)
        parts.append(part)
        length += len(part.ids) + (tree == "molmo1")
    if limit is not None and prefix.ends and prefix.ends[-1] > limit:
        raise SampleError(
            "the images of a sample do not fit the sequence",
            reason="image_cut",
            where=where,
            facts={"image_tokens": prefix.ends[-1], "sequence_length": limit},
            fix='raise sequence_length, use a view with fewer crops, or on_bad="substitute"',
        )
    # The first token of the first branch is predicted from the end of the prefix.
    from_prefix = len(parts) > 1 and len(branches[0].turns[0].prompt) == 0
    _scale(parts[1:], loss, from_prefix=from_prefix)
    if from_prefix:
        parts[0].targets[-1] = parts[1].ids[0]
        parts[0].weight = parts[1].weight
    if tree == "molmo1":
        for part in parts[1:-1]:
            part.ids = np.append(part.ids, ids.eos)
            part.targets = np.append(part.targets, IGNORED)
    sequence = _joined(parts, prefix, tree=tree, dropped=dropped, limit=limit)
    if not np.any(sequence.labels != IGNORED):
        raise SampleError(
            "nothing to learn is left of a sample within the sequence length",
            reason="no_loss",
            where=where,
            facts={"length": length, "sequence_length": limit},
            fix='raise sequence_length, use a view with fewer crops, or on_bad="substitute"',
        )
    return sequence


@dataclass(slots=True, kw_only=True)
class _Part:
    """The prefix or a branch: inputs, and the targets aligned with them."""

    ids: np.ndarray
    targets: np.ndarray
    weight: float


@dataclass(slots=True, kw_only=True)
class _Prefix:
    """BOS and the image blocks, and where the blocks stand in the sequence."""

    ids: list[np.ndarray]
    starts: list[int]
    ends: list[int]

    def add(self, lead: np.ndarray, block: np.ndarray) -> None:
        start = sum(map(len, self.ids)) + len(lead)
        self.ids += [lead, block]
        self.starts.append(start)
        self.ends.append(start + len(block))

    def joined(self) -> np.ndarray:
        return np.concatenate(self.ids, dtype=np.int64, casting="same_kind")


def _count_placeholders(
    branches: Sequence[BranchTurns], ids: TokenIds, *, num_blocks: int, where: str
) -> int:
    counts = [
        sum(int(np.count_nonzero(turn.prompt == ids.placeholder)) for turn in branch.turns)
        for branch in branches
    ]
    count = sum(counts)
    if count and (count != num_blocks or len(branches) > 1):
        raise SampleError(
            "a text may place its images only in a lone branch, and all of them",
            reason="image_placeholder",
            where=where,
            facts={"placeholders": counts, "images": num_blocks},
            fix="correct the row, or leave the placeholders out",
        )
    return count


def _branch_part(branch: BranchTurns, *, eos: int) -> _Part:
    length = sum(len(turn.prompt) + len(turn.response) + 1 for turn in branch.turns)
    ids = np.empty(length, dtype=np.int64)
    learned = np.full(length, IGNORED)
    start = 0
    for turn in branch.turns:
        response = start + len(turn.prompt)
        end = response + len(turn.response)
        ids[start:response] = turn.prompt
        ids[response:end] = turn.response
        ids[end] = eos
        learned[response : end + 1] = ids[response : end + 1]
        start = end + 1
    # Position t predicts the token behind it, and nothing stands behind the last one.
    return _Part(ids=ids[:-1], targets=learned[1:], weight=branch.weight / WEIGHT_ONE)


def _with_blocks(
    part: _Part, blocks: Sequence[np.ndarray], placeholder: int, *, start: int, prefix: _Prefix
) -> _Part:
    """Puts the blocks where a branch's placeholders stand, and notes where that is."""
    ids: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    done = 0
    for block, at in zip(blocks, np.flatnonzero(part.ids == placeholder).tolist(), strict=True):
        ids += [part.ids[done:at], block.astype(np.int64)]
        targets += [part.targets[done:at], np.full(len(block), IGNORED)]
        # The token behind the placeholder is now predicted from the block's last one.
        targets[-1][-1] = part.targets[at]
        prefix.starts.append(start + sum(map(len, ids[:-1])))
        prefix.ends.append(prefix.starts[-1] + len(block))
        done = at + 1
    return _Part(
        ids=np.concatenate([*ids, part.ids[done:]]),
        targets=np.concatenate([*targets, part.targets[done:]]),
        weight=part.weight,
    )


def _scale(branches: Sequence[_Part], loss: LossScale, *, from_prefix: bool) -> None:
    for b, branch in enumerate(branches):
        if loss in ("root_subsegments", "root_both"):
            branch.weight /= math.sqrt(len(branches))
        if loss in ("root_length", "root_both"):
            learned = int(np.count_nonzero(branch.targets != IGNORED))
            learned += int(from_prefix and b == 0)
            branch.weight *= 2 / math.sqrt(max(1, learned))


def _joined(
    parts: Sequence[_Part], prefix: _Prefix, *, tree: Tree, dropped: int, limit: int | None
) -> Sequence1d:
    labels = np.concatenate([part.targets for part in parts])
    positions = np.arange(len(labels))
    segments = np.full(len(labels), PREFIX_SUBSEGMENT)
    weights = (labels != IGNORED).astype(np.float32)
    first = 1 if tree == "molmo1" else 0
    prefix_end = start = len(parts[0].ids)
    weights[:start] *= parts[0].weight
    for b, part in enumerate(parts[1:]):
        stop = start + len(part.ids)
        positions[start:stop] -= start - prefix_end
        segments[start:stop] = first + b
        weights[start:stop] *= part.weight
        start = stop
    if prefix.ends:
        # Images placed inside the text: what stands up to the last one is the prefix.
        segments[: prefix.ends[-1]] = PREFIX_SUBSEGMENT
    return Sequence1d(
        input_ids=np.concatenate([part.ids for part in parts])[:limit],
        labels=labels[:limit],
        position_ids=positions[:limit],
        subsegment_ids=segments[:limit],
        loss_weights=weights[:limit],
        image_starts=tuple(prefix.starts),
        image_ends=tuple(prefix.ends),
        dropped_branches=dropped,
    )
