"""The token layout: from chosen texts and image blocks to the arrays of one training sequence.

    [BOS] [image blocks] [branch 0] [branch 1] ...        branch = prompt response prompt response
    ...

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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shardspec.errors import SampleError
from shardspec.sample import WEIGHT_ONE
from shardspec.tiling import ImageTokenIds

IGNORED = -100
"""Label without loss: the default `ignore_index` of torch.nn.CrossEntropyLoss."""

PREFIX_SUBSEGMENT = 10_000
"""Subsegment of BOS and images, above every branch's (Molmo's number)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenIds:
    """The special ids that the layout needs."""

    bos: int
    eos: int
    pad: int
    image: ImageTokenIds

    @classmethod
    def from_special_ids(cls, ids: Mapping[str, int]) -> TokenIds:
        """Takes them from the table in a manifest or a tokenizer."""
        return cls(
            bos=ids["bos"],
            eos=ids["eos"],
            pad=ids["pad"],
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
    limit: int | None = None,
    where: str = "",
) -> Sequence1d:
    """Lays out one sequence.

    Args:
      blocks: int32 token block of each image.
      branches: Conversations, in the order in which they should stand.
      ids: Special ids.
      limit: Longest sequence; None for any.
      where: The sample's key, for errors.

    Raises:
      SampleError: `image_cut` (the images alone exceed the limit), `no_loss` (nothing to learn is
        left within it).
    """
    prefix = np.concatenate([[ids.bos], *blocks]).astype(np.int64)
    edges = np.cumsum([1, *(len(block) for block in blocks)]).tolist()
    if limit is not None and len(prefix) > limit:
        raise SampleError(
            "the images of a sample are longer than a sequence may be",
            reason="image_cut",
            where=where,
            facts={"image_tokens": len(prefix), "sequence_length": limit},
            fix="raise sequence_length, or use a view with fewer crops",
        )
    parts = [_Part(ids=prefix, targets=np.full(len(prefix), IGNORED), weight=0.0)]
    length, dropped = len(prefix), 0
    for branch in branches:
        part = _branch_part(branch, eos=ids.eos)
        prompt = len(branch.turns[0].prompt)
        if limit is not None and len(parts) > 1 and length + prompt >= limit:
            dropped += 1
            continue
        parts.append(part)
        length += len(part.ids)
    # The first token of the first branch is predicted from the end of the prefix.
    if len(parts) > 1 and len(branches[0].turns[0].prompt) == 0:
        parts[0].targets[-1] = parts[1].ids[0]
        parts[0].weight = parts[1].weight
    sequence = _joined(parts, edges=edges, dropped=dropped, limit=limit)
    if not np.any(sequence.labels != IGNORED):
        raise SampleError(
            "nothing to learn is left of a sample within the sequence length",
            reason="no_loss",
            where=where,
            facts={"length": length, "sequence_length": limit},
            fix="raise sequence_length, or use a view with fewer crops",
        )
    return sequence


@dataclass(slots=True, kw_only=True)
class _Part:
    """The prefix or a branch: inputs, and the targets aligned with them."""

    ids: np.ndarray
    targets: np.ndarray
    weight: float


def _branch_part(branch: BranchTurns, *, eos: int) -> _Part:
    tokens: list[np.ndarray] = []
    learned: list[np.ndarray] = []
    for turn in branch.turns:
        tokens += [turn.prompt, turn.response, np.array([eos])]
        learned += [
            np.zeros(len(turn.prompt), dtype=bool),
            np.ones(len(turn.response) + 1, dtype=bool),
        ]
    sequence = np.concatenate(tokens).astype(np.int64)
    mask = np.concatenate(learned)
    targets = np.where(mask[1:], sequence[1:], IGNORED)
    return _Part(ids=sequence[:-1], targets=targets, weight=branch.weight / WEIGHT_ONE)


def _joined(
    parts: Sequence[_Part], *, edges: list[int], dropped: int, limit: int | None
) -> Sequence1d:
    sizes = [len(part.ids) for part in parts]
    start = sizes[0]
    positions = [np.arange(start)] + [np.arange(start, start + size) for size in sizes[1:]]
    segments = [PREFIX_SUBSEGMENT, *range(len(parts) - 1)]
    labels = np.concatenate([part.targets for part in parts])[:limit]
    weights = np.repeat([part.weight for part in parts], sizes)[:limit]
    return Sequence1d(
        input_ids=np.concatenate([part.ids for part in parts])[:limit],
        labels=labels,
        position_ids=np.concatenate(positions)[:limit],
        subsegment_ids=np.repeat(segments, sizes)[:limit],
        loss_weights=np.where(labels != IGNORED, weights, 0.0).astype(np.float32),
        image_starts=tuple(edges[:-1]),
        image_ends=tuple(edges[1:]),
        dropped_branches=dropped,
    )
