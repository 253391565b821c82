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
    "instruction",
    "input",
    "response",
    "query",
    "history",
]
ROWS = st.dictionaries(st.sampled_from(COLUMNS), VALUES, max_size=6)

TURNS = [{"role": "user", "content": "<image>What?"}]
ANSWER = [{"role": "assistant", "content": "That."}]
EXCHANGES = [
    ({"instruction": "<image>What?", "input": "", "output": "That."}, ["What?", "That."]),
    ({"instruction": "Put it in Dutch.", "input": "<image>", "output": "Kat."}, None),
    ({"query": "Left?<image>", "response": "No.", "history": [["Hi", "Oh"]]}, None),
    ({"query": "<image>What?", "response": "That.", "system": "Be short."}, ["What?", "That."]),
    ({"prompt": "What?", "completion": "That."}, ["What?", "That."]),
    ({"prompt": TURNS, "completion": ANSWER}, ["What?", "That."]),
    ({"conversations": [{"human": "What?", "assistant": "That."}]}, ["What?", "That."]),
    ({"query": "Highest?", "label": ["14"], "human_or_machine": 0}, {"question": "Highest?"}),
]


@pytest.mark.parametrize("row, want", EXCHANGES)
def test_rows_of_one_exchange_are_conversations(row, want):
    guess = guess_format([{**row, "images": ["a.jpg"]}])
    example = parse_row({**row, "images": ["a.jpg"]}, Spec(name="own", format=guess.format))
    (message,) = example["message_list"]
    assert example["image"] == ["a.jpg"]
    if isinstance(want, dict):
        assert (message["question"], message["answer"]) == ("Highest?", "14")
    elif want:
        assert message["messages"] == want
    elif "query" in row:
        assert message["messages"] == ["Hi", "Oh", "Left?<|image|>", "No."]
    else:
        assert message["messages"] == ["Put it in Dutch.\n<|image|>", "Kat."]
    assert message.get("system") == row.get("system")


def test_columns_of_an_exchange_may_have_any_name():
    columns = {"prompt": "ask", "response": "say"}
    spec = Spec(name="own", format="messages", columns=columns)
    (message,) = parse_row({"ask": "A?", "say": "B.", "output": "C."}, spec)["message_list"]
    assert message["messages"] == ["A?", "B."]


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
