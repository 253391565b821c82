"""InterleavedTextPreprocessor: shared runs, exact spans, responses apart from their prompts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocess.text.formatter import Branch, Variant
from preprocess.text.interleaved import InterleavedTextPreprocessor
from preprocess.text.tokens import load_tokenizer
from shardspec.errors import SampleError

TOKENIZER = load_tokenizer()
PREPROCESS = InterleavedTextPreprocessor(tokenizer=TOKENIZER)

texts = st.text(max_size=20)
variants = st.builds(Variant, prompt=texts, response=st.text(min_size=1, max_size=20))
turns = st.lists(variants, min_size=1, max_size=4).map(tuple)
branches = st.lists(
    st.builds(
        Branch,
        turns=st.lists(turns, min_size=1, max_size=3).map(tuple),
        weight=st.integers(0, 2_000_000),
    ),
    max_size=3,
)


def one_turn(*pairs, weight=1_000_000):
    made = tuple(Variant(prompt=prompt, response=response) for prompt, response in pairs)
    return Branch(turns=(made,), weight=weight)


@given(branches)
def test_spans_hold_the_ids_of_their_texts_in_the_order_of_the_branches(given_branches):
    got = PREPROCESS(given_branches, key="k")
    want = [
        (b, t, TOKENIZER.encode(v.prompt), TOKENIZER.encode(v.response), branch.weight)
        for b, branch in enumerate(given_branches)
        for t, turn in enumerate(branch.turns)
        for v in turn
    ]
    ids = got.tokens.tolist()
    assert [(b, t, ids[p:q], ids[r:s], weight) for b, t, p, q, r, s, weight in got.rows] == want


@given(branches)
def test_tokens_are_the_distinct_texts_end_to_end(given_branches):
    got = PREPROCESS(given_branches, key="k")
    distinct = {
        text
        for branch in given_branches
        for turn in branch.turns
        for variant in turn
        for text in (variant.prompt, variant.response)
    }
    assert got.tokens.dtype == np.dtype("<i4")
    assert len(got.tokens) == sum(len(TOKENIZER.encode(text)) for text in distinct)


def test_caption_that_answers_eight_prompts_is_stored_once():
    caption = " A red ball on a table."
    got = PREPROCESS([one_turn(*((f"long_caption {n}:", caption) for n in range(8)))], key="k")
    assert len({row[4:6] for row in got.rows}) == 1
    assert len({row[2:4] for row in got.rows}) == 8


def test_branches_share_runs_too():
    got = PREPROCESS([one_turn(("Q", " A")), one_turn(("R", " A"), weight=5)], key="k")
    first, second = got.rows
    assert first[4:6] == second[4:6]
    assert (first[0], second[0], second[6]) == (0, 1, 5)


@given(prompt=texts, other=texts, response=st.text(min_size=1, max_size=20))
def test_ids_of_a_response_do_not_depend_on_the_prompt(prompt, other, response):
    def ids(user):
        got = PREPROCESS([one_turn((user, response))], key="k")
        return got.tokens[got.rows[0][4] : got.rows[0][5]].tolist()

    assert ids(prompt) == ids(other) == TOKENIZER.encode(response)


def test_empty_prompt_is_an_empty_span():
    got = PREPROCESS([one_turn(("", " A"))], key="k")
    assert got.rows[0][2] == got.rows[0][3]


def test_response_without_tokens_is_a_sample_error():
    with pytest.raises(SampleError) as caught:
        PREPROCESS([one_turn(("Q", ""))], key="k7")
    assert (caught.value.reason, caught.value.where) == ("empty_response", "k7")


def test_sample_without_branches_has_no_tokens():
    got = PREPROCESS([], key="k")
    assert got.rows == ()
    assert (got.tokens.shape, got.tokens.dtype) == ((0,), np.dtype("<i4"))
