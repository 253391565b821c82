"""The attention rule of message trees and packed sequences, as a mask and as a FlexAttention rule.

Query q may see key k if

    (k <= q, or both are image tokens and images attend both ways)  and
    subsegment[q] <= subsegment[k]  and  k is not padding.

The prefix (BOS and images) has the highest subsegment of its example, so every branch sees it, and
branches, numbered upwards, see only themselves and the prefix: a later branch has a larger number
than an earlier one, and an earlier one does not see later positions. In a packed sequence example e
adds e * 100000 to all its subsegments, which hides earlier examples in the same way.
"""

# Shape letters: B examples, Q queries, K keys (both of length L).

from __future__ import annotations

from collections.abc import Callable

import torch

PACKED_STRIDE = 100_000
"""What each further example of a packed sequence adds to its subsegments (Molmo's number); it
exceeds every subsegment of one example."""

MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(batch, head, query, key) indices to bool, as torch.nn.attention.flex_attention takes it."""


def build_attention_mask(
    subsegment_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    image_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Builds the dense mask: the reference, and what scaled_dot_product_attention takes.

    Args:
      subsegment_ids: int64 [B, L].
      attention_mask: int64 or bool [B, L], 0 for padding.
      image_tokens: bool [B, L]; given, image tokens of one prefix see each other both ways.

    Returns:
      bool [B, L, L], True where query (second axis) may see key (last axis).
    """
    rule = attention_rule(subsegment_ids, attention_mask, image_tokens=image_tokens)
    batch, length = subsegment_ids.shape
    device = subsegment_ids.device
    b = torch.arange(batch, device=device)[:, None, None]
    q = torch.arange(length, device=device)[None, :, None]
    k = torch.arange(length, device=device)[None, None, :]
    return rule(b, torch.zeros_like(b), q, k)


def attention_rule(
    subsegment_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    image_tokens: torch.Tensor | None = None,
) -> MaskMod:
    """Makes the `mask_mod` for `create_block_mask`: no mask of L x L is ever built.

    Args:
      subsegment_ids, attention_mask, image_tokens: As `build_attention_mask`; captured.

    Returns:
      A function of (batch, head, query, key) indices that broadcasts.
    """
    real = attention_mask.bool()

    def mask_mod(
        b: torch.Tensor,
        h: torch.Tensor,  # noqa: ARG001 - all heads see the same
        q: torch.Tensor,
        k: torch.Tensor,
    ) -> torch.Tensor:
        reachable = k <= q
        if image_tokens is not None:
            same = subsegment_ids[b, q] == subsegment_ids[b, k]
            reachable = reachable | (image_tokens[b, q] & image_tokens[b, k] & same)
        return reachable & (subsegment_ids[b, q] <= subsegment_ids[b, k]) & real[b, k]

    return mask_mod
