"""Paraphrases: what is replaced, and above all what is not."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import preprocess.text
from preprocess.text.paraphrase import paraphrase
from shardspec.toml import load_toml

GROUPS = load_toml(Path(preprocess.text.__file__).parent / "templates" / "paraphrase.toml")[
    "groups"
]
SEEDS = range(60)


def drawn(text, **settings):
    return {paraphrase(text, np.random.RandomState(seed), **settings) for seed in SEEDS}


def test_an_expression_becomes_any_of_its_group():
    assert drawn("Describe the image.") == {
        "Describe the image.",
        "Describe the picture.",
        "Describe the photo.",
    }


def test_article_goes_along_with_the_noun():
    assert drawn("It is an image") == {"It is an image", "It is a picture", "It is a photo"}


def test_members_of_a_group_are_drawn_uniformly():
    rng = np.random.RandomState(0)
    counts = Counter(paraphrase("the image", rng) for _ in range(3000))
    assert all(850 < count < 1150 for count in counts.values())
    assert len(counts) == 3


def test_case_is_kept():
    assert drawn("The image") == {"The image", "The picture", "The photo"}
    assert drawn("THE IMAGE") == {"THE IMAGE", "THE PICTURE", "THE PHOTO"}


@pytest.mark.parametrize(
    "text",
    [
        "breathe images",
        "the imagery",
        "the image-based one",
        "the images2",
        "pre-the image",
        'Who said "the image"?',
        "Who said 'the image'?",
        "Who said “the image”?",
        "run `the image`",
        'see <a title="the image">',
        "<the image>",
        "photos 1 2 3",
        "",
    ],
)
def test_parts_of_words_and_quoted_texts_stay(text):
    assert drawn(text) == {text}


def test_apostrophes_do_not_open_quotations():
    got = drawn("Don't describe the image, it's big")
    assert "Don't describe the photo, it's big" in got


@pytest.mark.parametrize("label", ["the picture", "The Picture", "of the picture frame"])
def test_kept_texts_stay_wherever_they_occur(label):
    text = f"In the image, where is {label}? Point to {label}"
    got = drawn(text, keep=[label])
    assert len(got) == 3
    assert all(one.endswith(f", where is {label}? Point to {label}") for one in got)


def test_each_occurrence_is_drawn_on_its_own():
    assert len(drawn("the image and the image")) == 9


@given(st.text(max_size=60), st.integers(0, 2**32 - 1))
def test_same_seed_gives_the_same_text(text, seed):
    first, second = (paraphrase(text, np.random.RandomState(seed)) for _ in range(2))
    assert first == second


@given(st.text(st.sampled_from("ab <>\"'0."), max_size=40), st.integers(0, 9))
def test_texts_without_an_expression_stay(text, seed):
    assert paraphrase(text, np.random.RandomState(seed)) == text


def test_table_has_each_expression_once_in_lower_case():
    phrases = [phrase for group in GROUPS for phrase in group]
    assert len(phrases) == len(set(phrases))
    assert all(phrase == phrase.lower().strip() for phrase in phrases)
    assert all(len(group) > 1 for group in GROUPS)
