"""A small vision-language model: an image encoder whose features stand in a causal transformer.

The smallest model that uses a batch the way large ones do:

1. A vision transformer turns each picture into a grid of patch features.
2. Groups of patches (2 x 2) are joined and projected: one feature per image token. They replace
   the embeddings of the patch tokens, from `image_input_idx` on.
3. A decoder predicts the next token. A message tree is one sequence: `subsegment_ids` keep its
   branches from seeing one another, `position_ids` let each count on from the images.

`labels[t]` is the target of position t already: nothing is shifted here.
"""

# Shape letters: B examples, M pictures of an example, N pictures of a batch, L tokens, D features.

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from loader.assembly.pixels import normalize
from shardspec.errors import ConfigError
from shardspec.tiling import ImageView


class Block(nn.Module):
    """A pre-norm transformer block, without dropout."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x_BLD: Tensor, visible: Tensor | None = None, context: Any = None) -> Tensor:
        """Mixes and maps tokens; `visible` is bool [B, 1, L, L], None lets all see all."""
        q, k, v = self.qkv(self.attention_norm(x_BLD)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        if context is not None:
            k, v = (Gather.apply(part, context) for part in (k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        x_BLD = x_BLD + self.out(mixed.transpose(1, 2).flatten(2))
        mapped: Tensor = self.mlp(self.mlp_norm(x_BLD))
        return x_BLD + mapped


class ImageEncoder(nn.Module):
    """A vision transformer and a pooling connector: pictures to features of image tokens."""

    def __init__(self, view: ImageView, *, dim: int, num_layers: int, out_dim: int) -> None:
        super().__init__()
        self.side, self.pool = view.patches_per_side, view.pool
        self.embed = nn.Conv2d(3, dim, kernel_size=view.patch_px, stride=view.patch_px)
        self.positions = nn.Parameter(0.02 * torch.randn(view.num_patches, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads=4) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim * view.pool[0] * view.pool[1], out_dim)

    def forward(self, images: Tensor, image_masks: Tensor) -> Tensor:
        """Encodes pictures.

        Args:
          images: float32 [N, 3, S, S], normalised.
          image_masks: float32 [N, patches], the share of each patch that is no padding.

        Returns:
          float32 [N, image tokens, out_dim], row by row.
        """
        x = self.embed(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        x = self.norm(x) * image_masks[..., None]
        rows, cols = self.pool
        grid = x.unflatten(1, (self.side // rows, rows, self.side // cols, cols))
        features: Tensor = self.project(grid.transpose(2, 3).flatten(3).flatten(1, 2))
        return features


class VisionLanguageModel(nn.Module):
    """A decoder-only language model that sees pictures; about 4 million parameters."""

    def __init__(
        self,
        view: ImageView,
        *,
        vocab_size: int,
        sequence_length: int,
        dim: int = 192,
        num_layers: int = 4,
        vision_dim: int = 128,
        vision_layers: int = 2,
    ) -> None:
        """Builds the model.

        Args:
          view: What the batches show of a picture: one crop, without column tokens.
          vocab_size: Rows of the embedding, image symbols included: `embedding_size` of the
            manifest's tokenizer.
          sequence_length: Longest sequence.
          dim, num_layers: Width and depth of the decoder.
          vision_dim, vision_layers: Width and depth of the image encoder.

        Raises:
          ConfigError: The patch tokens of the view's pictures do not stand in one run.
        """
        super().__init__()
        divided = all(view.patches_per_side % pool == 0 for pool in view.pool)
        if view.crop_mode != "resize" or view.overview_column_tokens or not divided:
            raise ConfigError(
                "model_view",
                what="this model needs single crops without column tokens",
                facts=view.to_dict(),
                fix="build the shards without CROPS=",
            )
        self.vision = ImageEncoder(view, dim=vision_dim, num_layers=vision_layers, out_dim=dim)
        self.tokens = nn.Embedding(vocab_size, dim)
        self.positions = nn.Embedding(sequence_length, dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads=6) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        images: Tensor,
        image_masks: Tensor,
        image_input_idx: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        subsegment_ids: Tensor | None = None,
        context: Any = None,
    ) -> Tensor:
        """Sums the cross entropy over the batch's targets.

        The arguments are a batch of `MMCollator`, key by key. The sum, not the mean: only the
        caller knows how many targets the other ranks have.

        Args:
          input_ids, labels, attention_mask: int64 [B, L].
          images: uint8 [B, M, 3, S, S].
          image_masks: float32 [B, M, patches].
          image_input_idx: int64 [B, M], first patch token of each picture, -1 for none.
          position_ids, subsegment_ids: int64 [B, L]; without them a sequence is one conversation.
          context: The process group of ranks that got the same batch and divide its sequences: each
            maps its slice of the tokens and sees the keys of all. Their number divides L.

        Returns:
          float32 [], with `context` that of the slice.
        """
        length = input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device)
        if subsegment_ids is None:
            subsegment_ids = attention_mask - 1  # one segment, and padding as -1
        x = self._place_images(self.tokens(input_ids), images, image_masks, image_input_idx)
        x = x + self.positions(position_ids)
        visible = visibility(subsegment_ids)
        if context is not None:
            size, rank = dist.get_world_size(context), dist.get_rank(context)
            x, labels = (part.chunk(size, dim=1)[rank] for part in (x, labels))
            visible = visible.chunk(size, dim=2)[rank]
        for block in self.blocks:
            x = block(x, visible, context)
        logits = self.head(self.norm(x))
        return functional.cross_entropy(
            logits.flatten(0, 1), labels.reshape(-1), ignore_index=-100, reduction="sum"
        )

    def _place_images(
        self, x_BLD: Tensor, images: Tensor, image_masks: Tensor, image_input_idx: Tensor
    ) -> Tensor:
        """Puts image features in the place of the embeddings of patch tokens."""
        example_N, image_N = (image_input_idx >= 0).nonzero(as_tuple=True)
        # Pictures come as uint8, a quarter of the bytes to move. A batch without any goes the same
        # way, so that the encoder has (zero) gradients on every rank.
        pixels = normalize(images[example_N, image_N], kind="siglip")
        features = self.vision(pixels, image_masks[example_N, image_N])
        start_N1 = image_input_idx[example_N, image_N][:, None]
        places = start_N1 + torch.arange(features.shape[1], device=start_N1.device)
        return x_BLD.index_put((example_N[:, None], places), features)


class Gather(torch.autograd.Function):
    """Joins the slices [B, H, L / ranks, D] of the ranks of a group: the keys that each sees."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts, dim=2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)  # each rank's queries have seen this slice
        return grad.chunk(dist.get_world_size(ctx.group), dim=2)[dist.get_rank(ctx.group)], None


def visibility(subsegment_ids: Tensor) -> Tensor:
    """Says which positions attend to which: int64 [B, L] to bool [B, 1, L, L].

    Position q sees k if k is not later and q's subsegment is not above k's: all see the images
    (10000), a branch sees itself, and nothing real sees padding (-1).
    """
    causal = torch.ones(subsegment_ids.shape[1], subsegment_ids.shape[1], dtype=torch.bool).tril()
    allowed = subsegment_ids[:, :, None] <= subsegment_ids[:, None, :]
    return (causal.to(allowed.device) & allowed)[:, None]
