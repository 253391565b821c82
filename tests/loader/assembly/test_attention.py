"""The attention rule: branches see the prefix and themselves, packed examples only themselves."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from loader.assembly.attention import PACKED_STRIDE, attention_rule, build_attention_mask

PREFIX = 10_000


def tree(*branches: int, prefix: int = 3, offset: int = 0) -> list[int]:
    """Subsegment ids of one example with branches of these lengths."""
    ids = [PREFIX] * prefix + [k for k, length in enumerate(branches) for _ in range(length)]
    return [offset + i for i in ids]


def mask_of(ids: list[int], **options) -> torch.Tensor:
    row = torch.tensor([ids])
    return build_attention_mask(row, torch.ones_like(row), **options)[0]


def test_branches_see_the_prefix_and_their_own_past_only():
    mask = mask_of(tree(2, 2, prefix=2))
    want = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]
    assert mask.int().tolist() == want


def test_one_conversation_is_plain_causal_attention():
    mask = mask_of(tree(7))
    assert torch.equal(mask, torch.ones(10, 10).tril().bool())


def test_padding_is_never_seen():
    ids = torch.tensor([tree(3) + [-1, -1]])
    real = torch.tensor([[1] * 6 + [0, 0]])
    mask = build_attention_mask(ids, real)[0]
    assert not mask[:, 6:].any()


def test_image_tokens_see_each_other_both_ways_when_asked():
    ids = tree(2, prefix=4)
    image = torch.tensor([[False, True, True, False, False, False]])
    mask = mask_of(ids, image_tokens=image)
    assert mask[1, 2]
    assert mask[2, 1]
    assert not mask[0, 1]
    assert not mask[1, 3]


@given(
    examples=st.lists(
        st.tuples(st.integers(1, 4), st.lists(st.integers(1, 4), min_size=1, max_size=4)),
        min_size=1,
        max_size=3,
    )
)
def test_no_query_sees_another_branch_or_another_example(examples):
    ids: list[int] = []
    owner: list[tuple[int, int]] = []  # (example, branch), branch -1 for the prefix
    for e, (prefix, branches) in enumerate(examples):
        ids += tree(*branches, prefix=prefix, offset=e * PACKED_STRIDE)
        owner += [(e, -1)] * prefix
        owner += [(e, k) for k, length in enumerate(branches) for _ in range(length)]
    mask = mask_of(ids)
    for q, (example, branch) in enumerate(owner):
        for k, (other, side) in enumerate(owner):
            allowed = k <= q and example == other and side in (-1, branch)
            assert bool(mask[q, k]) == allowed


def test_flex_attention_takes_the_rule():
    ids = torch.tensor([tree(60, 65), tree(125)])
    real = torch.ones_like(ids)
    rule = attention_rule(ids, real)
    blocks = create_block_mask(rule, B=2, H=None, Q_LEN=128, KV_LEN=128, device="cpu")
    dense = build_attention_mask(ids, real)
    seen = torch.vmap(
        torch.vmap(torch.vmap(rule, (None, None, None, 0)), (None, None, 0, None)),
        (0, None, None, None),
    )(torch.arange(2), torch.tensor(0), torch.arange(128), torch.arange(128))
    assert torch.equal(seen, dense)
    assert blocks.shape == (2, 1, 128, 128)
