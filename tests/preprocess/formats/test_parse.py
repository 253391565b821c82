"""Rows of any shape: each is an example or one bad row, in every format."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess.formats import FORMATS, PIECE, Spec, guess_format, parse_row
from preprocess.formats.spec import BOXES
from shardspec.errors import SampleError
from tests.examples import examples

TEXTS = ["<image>", "<image 2>", "<|image|>", "a.png", "A", "[1, 2]", " "]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(TEXTS),
)
KEYS = [
    "type",
    "text",
    "image",
    "user",
    "assistant",
    "role",
    "content",
    "from",
    "value",
    "bytes",
    "path",
    "url",
    "source",
    "x",
    "y",
    "w",
    "h",
    "x1",
    "y1",
    "x2",
    "y2",
    "bbox",
    "categories",
    "matched_text_index",
    "image_name",
    "raw_url",
]
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=12,
)
COLUMNS = [
    "image",
    "images",
    "texts",
    "text_list",
    "image_info",
    "document",
    "content",
    "parts",
    "text",
    "boxes",
    "bbox",
    "objects",
    "label",
    "question",
    "answer",
    "points",
    "messages",
    "conversations",
    "caption",
    "options",
    "answers",
]
ROWS = st.dictionaries(st.sampled_from(COLUMNS), VALUES, max_size=6)


@pytest.mark.parametrize("name", FORMATS)
@given(row=ROWS, budget=st.integers(0, 2), box=st.sampled_from(BOXES))
@settings(max_examples=examples(100))
def test_a_row_of_any_shape_is_an_example_or_one_bad_row(name, row, budget, box):
    spec = Spec(name="own", format=name, box=box, max_images=budget, max_chars=3 * budget)
    guess_format([row])
    count = FORMATS[name].count
    for piece in range(1 if count is None else count(row, spec)):
        with contextlib.suppress(SampleError):
            example = parse_row({**row, PIECE: piece}, spec)
            assert example["message_list"] or name == "documents"  # they are read first
