"""Masks of packed rows are those that the models make for each example alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from loader.assembly.families.masks import packed_masks
from shardspec.families import Gemma3, PaliGemma

WINDOW = 6


def config(implementation="eager"):
    return SimpleNamespace(
        _attn_implementation=implementation, sliding_window=WINDOW, is_causal=True
    )


def gemma3_alone(types):
    """Gemma 3's own masks of one example."""
    from transformers.models.gemma3 import modeling_gemma3 as own

    blocks = own.get_block_sequence_ids_for_mask(types[None])
    found = own.create_masks_for_vision_model(
        config=config(),
        inputs_embeds=torch.zeros(1, len(types), 1),
        attention_mask=None,
        past_key_values=None,
        position_ids=None,
        block_sequence_ids=blocks,
    )
    return {kind: mask[0, 0] for kind, mask in found.items()}


def paligemma_alone(types):
    """PaliGemma's own mask of one example."""
    from transformers.masking_utils import create_causal_mask

    return create_causal_mask(
        config=config(),
        inputs_embeds=torch.zeros(1, len(types), 1),
        attention_mask=None,
        past_key_values=None,
        position_ids=None,
        block_sequence_ids=torch.where(types[None] == 0, 0, -1),
    )[0, 0]


def rows_of(*texts):
    return [[np.array([int(c) for c in part]) for part in text.split()] for text in texts]


ROWS = rows_of(
    "0011110000 0 110110 000000000000", "0111111111100 01111111111", "11 11 0000011000110000"
)
"""Pictures longer than the window, at both ends of examples, of neighbours, and of none."""

PROMPTS = rows_of("000011 0 01 0001111", "00000000 1", "0")


DRAWN = {
    "full_attention": "#....... ####.... ####.... ####.... ....#... ....###. ....###. .......#",
    "sliding_attention": "#....... ####.... ####.... .###.... ....#... ....###. ....###. .......#",
    "prompt": "##...... ##...... ###..... ####.... ....#... ....##.. ....###. .......#",
}
"""What each token of a row of eight sees: two examples and padding."""


def test_tokens_of_a_picture_and_of_a_prompt_see_each_other_and_no_other_example():
    masks = packed_masks(Gemma3(sliding_window=3), rows_of("0111 011"), 8)
    masks["prompt"] = packed_masks(PaliGemma(sliding_window=0), rows_of("0011 011"), 8)
    for kind, mask in masks.items():
        rows = ["".join("#" if sees == 0 else "." for sees in row) for row in mask[0, 0]]
        assert " ".join(rows) == DRAWN[kind]


@pytest.mark.slow
def test_gemma3_sees_in_packs_what_it_sees_alone():
    masks = packed_masks(Gemma3(sliding_window=WINDOW), ROWS, 32)
    assert set(masks) == {"full_attention", "sliding_attention"}
    for kind, mask in masks.items():
        assert mask.dtype == torch.float32
        assert mask.shape == (3, 1, 32, 32)
        same_as_alone(mask, ROWS, lambda types, kind=kind: gemma3_alone(types)[kind])


@pytest.mark.slow
def test_paligemma_sees_in_packs_what_it_sees_alone():
    mask = packed_masks(PaliGemma(sliding_window=0), PROMPTS, 20)
    same_as_alone(mask, PROMPTS, paligemma_alone)


def same_as_alone(mask, rows, alone):
    for row, own in enumerate(rows):
        want, done = torch.full(mask.shape[2:], torch.finfo(torch.float32).min), 0
        for types in own:
            stop = done + len(types)
            want[done:stop, done:stop] = alone(torch.from_numpy(types))
            done = stop
        assert torch.equal(mask[row, 0, :done], want[:done])
        # Of padding each sees itself: without anything to see, values would be NaN.
        assert not mask[row, 0, done:].diagonal(done).any()
        assert (mask[row, 0, done:, :done] < 0).all()


def test_one_mask_does_where_no_example_is_longer_than_the_window():
    masks = packed_masks(Gemma3(sliding_window=13), ROWS[:2], 32)
    assert masks["full_attention"] is masks["sliding_attention"]
    assert torch.equal(
        masks["full_attention"],
        packed_masks(Gemma3(sliding_window=6), ROWS[:2], 32)["full_attention"],
    )
