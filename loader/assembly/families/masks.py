"""Masks of packed rows, for models whose tokens see some of what follows them.

Where a model is causal, positions that restart keep the examples of a row apart. Gemma 3 lets the
tokens of a picture see each other, PaliGemma all that is not of an answer; transformers (5.23) has
no masks for such rows that keep to one example. So these models are given masks that are made here:
what each example's own mask is when it is alone, and nothing between examples.
"""

# Shape letters: B rows, L tokens of a row, n tokens of an example.

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from shardspec.families import Family, Gemma3, PaliGemma

_HIDDEN = np.finfo(np.float32).min


def num_masks(family: Family) -> int:
    """Counts the masks of L x L that a packed row of a family has.

    >>> num_masks(Gemma3()), num_masks(PaliGemma())
    (2, 1)
    """
    return 2 * isinstance(family, Gemma3) + isinstance(family, PaliGemma)


def packed_masks(
    family: Gemma3 | PaliGemma, rows: Sequence[Sequence[np.ndarray]], length: int
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Makes `attention_mask` of packed rows.

    Args:
      family: Whose model.
      rows: For each row the token types of each of its examples, int64 [n].
      length: L; what follows the last example is padding, of which each token sees those before.

    Returns:
      float32 [B, 1, L, L], 0 where a token may see another; of Gemma 3 one per kind of layer, which
      is one and the same where no example is longer than the sliding window.
    """
    full = _mask(family, rows, length, window=0)
    if isinstance(family, PaliGemma):
        return full
    window = family.sliding_window or 0
    longest = max(len(types) for row in rows for types in row)
    sliding = full if longest <= window else _mask(family, rows, length, window=window)
    return {"full_attention": full, "sliding_attention": sliding}


def _mask(
    family: Gemma3 | PaliGemma, rows: Sequence[Sequence[np.ndarray]], length: int, *, window: int
) -> torch.Tensor:
    # Of its own memory: pools and worker processes look after what a batch has at its top alone.
    mask = np.full((len(rows), 1, length, length), _HIDDEN, np.float32)
    for row, own in enumerate(rows):
        rest = length - sum(map(len, own))
        done = 0
        # Answers, as PaliGemma has it, are causal.
        for types in (*own, np.full(rest, int(isinstance(family, PaliGemma)))):
            stop = done + len(types)
            sees = _sees(family, types, window=window)
            mask[row, 0, done:stop, done:stop][sees] = 0
            done = stop
    return torch.from_numpy(mask)


def _sees(family: Gemma3 | PaliGemma, types: np.ndarray, *, window: int) -> np.ndarray:
    """Says which tokens of an example (last axis) each of them sees: bool [n, n]."""
    mutual = types == int(isinstance(family, Gemma3))
    # Runs of tokens that see each other, each with a number of its own: a picture; the prompt.
    begins = mutual & ~np.concatenate([[False], mutual[:-1]])
    run = np.where(mutual, np.cumsum(begins), -np.arange(1, len(types) + 1))
    sees: np.ndarray = np.tri(len(types), dtype=bool) | (run[:, None] == run)
    if window:
        sees &= ~np.tri(len(types), k=-window, dtype=bool)
    return sees
