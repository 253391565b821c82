"""Prompts: rows of an evaluation hold what is in front of an answer, and nothing of it.

Whether a token is of an answer is decided by marks: in copies of a sample every response consists
of ids that nothing else has, so a response in a prompt could not be overlooked, whatever texts
share their words or their stored tokens.
"""

import dataclasses
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader import MMCollator, MolmoPreprocessor, View, assemble
from loader.assembly import TokenIds
from loader.assembly.questions import question_record
from preprocess.media.image import ImagePolicy
from preprocess.recipe import Preparer, Recipe
from preprocess.text import TextPolicy
from preprocess.text.styles import STYLES
from preprocess.text.tokens import load_tokenizer
from shardspec.errors import ConfigError, SampleError
from shardspec.index import count_answers, count_questions, first_conversations
from shardspec.sample import SpanKind, text_rows
from shardspec.tiling import ImageView
from tests.chat_shapes import SHAPES, make_tokenizer

MARK = 1_000_000
"""The first of the ids that mark responses: response r consists of MARK + r."""

IMAGE = ImageView(size_px=28, patch_px=14, pool=(1, 1))
POINTS = {"label": "dog", "points": [[90, 20], [10, 33]], "point_scale": 100}
FIELDS = {
    "caption": {"text": "A red ball."},
    "qa": {"question": "What is it?", "answers": ["a cat", "a cat", "dog"]},
    "document": {"question": "What does it say?", "answer": "STOP"},
    "pointing": POINTS,
    "counting": POINTS,
    "inline_points": {
        "question": "What is here?",
        "answer": "A <|POINT|> sits.",
        "answer_annotations": [{"points": [[10, 20]], "inline_text": "cat", "alt_text": "a cat"}],
    },
    "multiple_choice": {"question": "Which?", "options": ["cat", "dog"], "answer_idx": 1},
    "instruction": {"question": "Write a line.", "answer": "A line."},
    "interleaved": {"text": "A red ball."},
    "boxes": {"label": "dog", "boxes": [[1, 2, 3, 4]], "point_scale": 10},
    "video_points": {**POINTS, "timestamps": [1.0, 2.5], "points": [[[90, 20]], [[10, 33]]]},
    "tracking": {
        "label": "dog",
        "point_scale": 1000,
        "frame_trajectories": [
            {"time": time, "points": [{"id": "a", "point": [5, 6], "occluded": False}]}
            for time in (0.0, 0.5)
        ],
    },
    "robot": {"instruction": "pick up the cup", "action": [0.5, -2.0, 1.0]},
}


def message_of(style):
    kind = STYLES[style]
    message = {"style": style, **FIELDS[kind.family]}
    if kind.explained:
        message["explanation"] = "It barks."
    if kind.grouped:
        message["points"] = [POINTS["points"]]
    return message


@cache
def preparer(message_format="role"):
    policy = TextPolicy(
        message_format=message_format, num_variants=3, prompt_templates="uber_model"
    )
    recipe = Recipe(text=policy, image=ImagePolicy(views=(IMAGE,), codec="raw"))
    return Preparer(recipe=recipe, tokenizer=load_tokenizer(policy=policy))


def prepared(*messages, message_format="role", num_images=1):
    pixels = np.zeros((28, 28, 3), np.uint8)
    images = [pixels + i for i in range(num_images)]
    return preparer(message_format)({"image": images, "message_list": list(messages)})


def marked(sample):
    """Copies a sample; every response of it consists of marks instead."""
    spans, tokens = sample.spans.copy(), [sample.tokens]
    end = len(sample.tokens)
    for row in spans[: len(text_rows(spans))]:
        length = row[6] - row[5]
        row[5:7] = end, end + length
        tokens.append(np.full(length, MARK + 100 * row[1] + row[2], np.int32))
        end += length
    return dataclasses.replace(sample, tokens=np.concatenate(tokens), spans=spans)


def ids_of(message_format="role"):
    return TokenIds.from_special_ids(preparer(message_format).tokenizer.special_ids)


def rows_of(sample, *, questions="all", ids=None, **fields):
    view = View(image=IMAGE, purpose="evaluation", questions=questions, **fields)
    branches, turns = count_questions(sample.spans)
    count = turns if questions == "all" else branches
    rng = np.random.RandomState(0)
    return [
        assemble(sample, rng, view=view, ids=ids or ids_of(), question=number)
        for number in range(count)
    ]


def alone(sample, branch):
    """Copies a sample with one of its conversations only."""
    texts = text_rows(sample.spans)
    kept = np.concatenate([texts[texts[:, 1] == branch], sample.spans[len(texts) :]])
    return dataclasses.replace(sample, spans=kept)


def check(sample, ids):
    """Compares the prompts of a marked sample with the training sequences of its conversations."""
    train = View(image=IMAGE, purpose="inference")
    exchanges = list(dict.fromkeys(map(tuple, text_rows(sample.spans)[:, 1:3].tolist())))
    rows = rows_of(sample, ids=ids)
    assert [row["metadata"]["question_idx"] for row in rows] == list(range(len(exchanges)))
    for (branch, turn), row in zip(exchanges, rows, strict=True):
        own = MARK + 100 * branch + turn
        whole = assemble(alone(sample, branch), np.random.RandomState(0), view=train, ids=ids)
        at = whole["input_ids"].tolist().index(own)
        names = ["input_ids", "position_ids", "subsegment_ids"]
        if ids.placeholder in sample.tokens:
            names.pop()  # the prefix ends with the last image, and not all have come
        for name in names:
            assert row[name].tolist() == whole[name][:at].tolist()
        assert own not in row["input_ids"]
        assert set(row["input_ids"][row["input_ids"] >= MARK]) == set(range(own - turn, own))
        assert (row["labels"] == -100).all()
        assert not row["loss_weights"].any()
    firsts = rows_of(sample, ids=ids, questions="first")
    assert len(firsts) == len({branch for branch, _ in exchanges})
    assert all((row["input_ids"] < MARK).all() for row in firsts)


@pytest.mark.parametrize("message_format", ["role", "none", "chatml"])
def test_no_token_of_an_answer_is_in_a_prompt_whatever_the_style(message_format):
    ids = ids_of(message_format)
    for style in STYLES:
        sample = prepared(message_of(style), message_of(style), message_format=message_format)
        check(marked(sample), ids)


def test_a_document_has_no_prompt_and_no_image_of_its_text_is_in_one():
    message = {"style": "interleaved", "text": "One <|image|> two <|image|>."}
    (row,) = rows_of(prepared(message, num_images=2))
    assert row["input_ids"].tolist() == [ids_of().bos]
    assert len(row["images"]) == 0


@pytest.mark.parametrize("shape", ["qwen2", "llama3"])
def test_no_token_of_an_answer_is_in_the_prompt_of_a_chat_template(shape, tmp_path):
    name = str(make_tokenizer(tmp_path / shape, SHAPES[shape]))
    policy = TextPolicy(message_format="template", chat_date="2024-07-26", num_variants=2)
    tokenizer = load_tokenizer(name, policy=policy)
    recipe = Recipe(text=policy, image=ImagePolicy(views=(IMAGE,), codec="raw"))
    told = {"style": "demo", "messages": ["a?", "b", "and?", "c"], "system": "Be brief."}
    example = {"image": np.zeros((28, 28, 3), np.uint8), "message_list": [told, message_of("vqa2")]}
    sample = Preparer(recipe=recipe, tokenizer=tokenizer)(example)
    check(marked(sample), TokenIds.from_special_ids(tokenizer.special_ids))


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 2), st.sampled_from([2, 7])
)
def test_no_token_of_an_answer_is_in_a_prompt_whatever_the_tree(turns, num_images, placeholder):
    messages = [
        {"style": "demo", "messages": [f"text {i}" for i in range(2 * count)]} for count in turns
    ]
    check(marked(prepared(*messages, num_images=num_images)), ids_of())


def test_images_that_a_conversation_places_come_as_far_as_it_goes():
    told = ["<|image|> a?", "b", "and?", "c", "<|image|><|image|> d?", "e"]
    sample = marked(prepared({"style": "demo", "messages": told}, num_images=3))
    check(sample, ids_of())
    rows = rows_of(sample)
    assert [len(row["images"]) for row in rows] == [1, 1, 3]
    assert [row["images"].max() for row in rows] == [0, 0, 2]
    assert [len(row["metadata"]["images"]) for row in rows] == [1, 1, 3]
    text = marked(prepared({"style": "demo", "messages": told[2:4] + told[:2]}, num_images=1))
    assert [len(row["images"]) for row in rows_of(text)] == [0, 1]


def test_the_first_stored_variant_is_asked_whatever_is_drawn():
    sample = prepared(message_of("pointing"))
    assert len(text_rows(sample.spans)) == 3
    view = View(image=IMAGE, purpose="evaluation")
    rows = [
        assemble(sample, np.random.RandomState(seed), view=view, ids=ids_of()) for seed in range(9)
    ]
    assert len({row["input_ids"].tobytes() for row in rows}) == 1
    start, stop = sample.spans[0, 3:5]
    assert rows[0]["input_ids"][-(stop - start) :].tolist() == sample.tokens[start:stop].tolist()


def test_a_prompt_is_refused_rather_than_cut():
    sample = prepared(message_of("vqa2"))
    (row,) = rows_of(sample)
    assert len(rows_of(sample, sequence_length=len(row["input_ids"]))) == 1
    with pytest.raises(SampleError) as caught:
        rows_of(sample, sequence_length=len(row["input_ids"]) - 1)
    assert caught.value.reason == "prompt_length"


def test_a_prompt_without_a_token_is_refused():
    spans = np.array([[0, 0, 0, 0, 0, 0, 2, 1]], np.int32)
    sample = dataclasses.replace(
        prepared(message_of("vqa2")), spans=spans, tokens=np.array([5, 6], np.int32), images=()
    )
    ids = dataclasses.replace(ids_of(), bos=-1)
    with pytest.raises(SampleError) as caught:
        rows_of(sample, ids=ids)
    assert caught.value.reason == "empty_prompt"
    (row,) = rows_of(sample, ids=dataclasses.replace(ids, bos=3))
    assert row["input_ids"].tolist() == [3]


def test_no_question_is_left_out_in_silence():
    view, rng = View(image=IMAGE, purpose="evaluation"), np.random.RandomState(0)
    one, two = prepared(message_of("vqa2")), prepared(message_of("vqa2"), message_of("doc_qa"))
    assert assemble(one, rng, view=view, ids=ids_of())["metadata"]["question_idx"] == 0
    with pytest.raises(ConfigError) as caught:
        assemble(two, rng, view=view, ids=ids_of())
    assert caught.value.reason == "question_number"


@pytest.mark.parametrize("number", [-1, 1])
def test_a_question_that_a_sample_has_not_is_refused(number):
    view = View(image=IMAGE, purpose="evaluation")
    sample, rng = prepared(message_of("vqa2")), np.random.RandomState(0)
    with pytest.raises(ConfigError) as caught:
        assemble(sample, rng, view=view, ids=ids_of(), question=number)
    assert caught.value.reason == "question_number"


@pytest.mark.parametrize("field", ["purpose", "questions"])
def test_views_refuse_names_that_they_do_not_know(field):
    with pytest.raises(ConfigError) as caught:
        View(**{field: "evaluate"})
    assert caught.value.facts == {field: "evaluate"}


def test_records_tell_the_fields_of_the_question_and_of_the_sample():
    chat = {"style": "demo", "messages": ["q", "a", "r", "b"], "weight": 2.0}
    tree = {"multi_turn_messages": [{"question": "u", "style": "vqa2", "answers": ["x", "y"]}]}
    record = {"metadata": {"image_id": 7, "style": "old"}, "message_list": [chat, tree]}
    assert question_record(record, branch=0, turn=1) == {
        **{"image_id": 7, "style": "demo", "weight": 2.0, "question": "r", "answer": "b"}
    }
    assert question_record(record, branch=1, turn=0) == {
        **{"image_id": 7, "style": "vqa2", "question": "u", "answers": ["x", "y"]}
    }
    assert question_record({"key": "old"}, branch=0, turn=0) == {}


def test_the_unsharded_path_asks_every_question_of_an_example():
    prepare = preparer()
    preprocess = MolmoPreprocessor(
        prepare, special_ids=prepare.tokenizer.special_ids, view=View(image=IMAGE)
    )
    example = {
        "image": np.zeros((28, 28, 3), np.uint8),
        "message_list": [message_of("vqa2"), {"style": "demo", "messages": ["q", "a", "r", "b"]}],
        "metadata": {"image_id": 7},
    }
    rows = preprocess.questions(example)
    assert [row["metadata"]["record"].get("question") for row in rows] == ["What is it?", "q", "r"]
    assert {row["metadata"]["record"]["image_id"] for row in rows} == {7}
    view = dataclasses.replace(preprocess.view, purpose="evaluation")
    asking = MolmoPreprocessor(prepare, special_ids=prepare.tokenizer.special_ids, view=view)
    again = asking(example, np.random.RandomState(5), question=2)
    assert again["input_ids"].tolist() == rows[2]["input_ids"].tolist()


@pytest.mark.parametrize("questions", ["all", "first"])
def test_exchanges_of_weight_0_are_context_and_not_asked(questions):
    turns = ["Who?", "Anna", "Where?", "Berlin", "When?", "Today"]
    chat = {"style": "demo", "messages": turns, "turn_weights": [0, 1, 0.5]}
    prepare = preparer()
    view = View(image=IMAGE, questions=questions)
    rows = MolmoPreprocessor(prepare, special_ids=prepare.tokenizer.special_ids, view=view)
    rows = rows.questions({"message_list": [chat, message_of("vqa2")]})
    asked = [row["metadata"]["record"]["question"] for row in rows]
    assert asked == ["Where?", *["When?"] * (questions == "all"), "What is it?"]
    told = prepare.tokenizer.decode(rows[0]["input_ids"].tolist())
    assert [part in told for part in turns] == [True, True, True, False, False, False]


@pytest.mark.parametrize("image_map", ["first", "per_token", "pooling"])
def test_padding_at_the_left_moves_all_that_points_at_tokens(image_map):
    long = {**message_of("vqa2"), "question": "What is it, and " * 9}
    samples = [prepared(long), prepared(message_of("vqa2"), num_images=2)]
    rows = [rows_of(sample, image_map=image_map)[0] for sample in samples]
    common = {"sequence_length": 256, "pad_mode": "to_32", "image_shape": (3, 28, 28)}
    common |= {"num_patches": 4, "extra_keys": ("position_ids",), "pad_token_id": 1}
    common |= {"tokens_per_crop": 4} if image_map == "per_token" else {}
    common |= {"pool": 1} if image_map == "pooling" else {}
    right, left = (MMCollator(pad_side=side, **common)(rows) for side in ("right", "left"))
    assert left["input_ids"].shape == right["input_ids"].shape
    for r, row in enumerate(rows):
        length, width = len(row["input_ids"]), left["input_ids"].shape[1]
        shift = width - length
        assert shift > 0
        for name in ("input_ids", "labels", "attention_mask", "position_ids"):
            assert left[name][r, shift:].tolist() == right[name][r, :length].tolist()
            assert left[name][r, :shift].tolist() == right[name][r, length:].tolist()
        moved, where = left["image_input_idx"][r], right["image_input_idx"][r]
        assert moved.tolist() == where.where(where < 0, where + shift).tolist()
    for name in {"images", "image_masks", "token_pooling"} & left.keys():
        assert left[name].equal(right[name])


def test_unknown_sides_are_refused():
    with pytest.raises(ConfigError) as caught:
        MMCollator(sequence_length=8, pad_side="top")
    assert caught.value.reason == "pad_side"


def test_questions_are_counted_by_their_spans():
    rows = [[0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 3, 0], [SpanKind.IMAGE, 0, 0]]
    spans = np.array([[*row, 0, 0, 0, 0, 1] for row in rows], np.int32)
    assert count_questions(spans) == (3, 4)
    spans[2:4, 7] = 0
    assert count_questions(spans) == (2, 2)
    assert count_questions(spans[-1:]) == (0, 0)
    assert count_questions(spans[:1]) == (1, 1)


def test_variants_of_messages_for_models_are_no_questions_of_their_own():
    # Two messages of two variants each: the first has one answer, the second two and an end.
    rows = [
        (0, branch, turn, 0, 3, 3, 3 + length, 1)
        for branch, lengths in enumerate(((5,), (6,), (2, 2, 0), (3, 3, 0)))
        for turn, length in enumerate(lengths)
    ]
    spans = np.array([*rows, (1, 0, 9, 9, 9, 9, 0, 0)], "<i4")
    assert first_conversations(spans, 2).tolist() == [0, 2]
    assert count_answers(spans, 2) == (2, 3)
    assert count_answers(spans, 4) == (4, 6)
    assert count_answers(spans[-1:], 1) == (0, 0)


HIDDEN = {
    "qa": {"style": "eval_short_answer", "question": "What is it?"},
    "document": {"style": "doc_qa", "question": "What does it say?"},
    "choices": {"style": "a_okvqa_mc", "question": "Which?", "options": ["cat", "dog"]},
    "turns": {"style": "demo", "messages": ["Who?", "Anna", "Where?", ""]},
}
"""Questions without answers; of several turns the last one."""


@pytest.fixture(scope="module")
def templated(tmp_path_factory):
    """A tokenizer with a chat template."""
    return make_tokenizer(tmp_path_factory.mktemp("templated") / "qwen2", SHAPES["qwen2"])


@pytest.mark.parametrize("kind", HIDDEN)
@pytest.mark.parametrize("message_format", ["role", "chatml", "none", "template"])
def test_a_question_without_an_answer_has_the_prompt_that_it_would_have_with_one(
    message_format, kind, templated
):
    policy = TextPolicy(message_format=message_format, num_variants=3, system_prompt="style")
    tokenizer = load_tokenizer(
        templated if message_format == "template" else "embedded", policy=policy
    )
    recipe = Recipe(text=policy, image=ImagePolicy(views=(IMAGE,), codec="raw"))
    prepare = Preparer(recipe=recipe, tokenizer=tokenizer)
    ids = TokenIds.from_special_ids(tokenizer.special_ids)
    message = HIDDEN[kind]
    answer = {"answer_idx": 1} if "options" in message else {"answer": "A long answer."}
    if "messages" in message:
        answer = {"messages": [*message["messages"][:-1], "Berlin"]}
    hidden, known = (
        prepare({"image": np.zeros((28, 28, 3), np.uint8), "message_list": [each]}, key="k")
        for each in ({**message, "unanswered": True}, {**message, **answer})
    )
    assert count_questions(hidden.spans) == count_questions(known.spans)
    rows, wanted = rows_of(hidden, ids=ids), rows_of(known, ids=ids)
    assert [row["input_ids"].tolist() for row in rows] == [w["input_ids"].tolist() for w in wanted]
    record = rows[-1]["metadata"]["record"]
    assert record.pop("unanswered")
    assert not {"answer", "answers", "answer_idx"} & set(record)
    for purpose in ("train", "inference"):
        view = View(image=IMAGE, purpose=purpose)
        with pytest.raises(SampleError) as caught:
            assemble(hidden, np.random.RandomState(0), view=view, ids=ids)
        assert caught.value.reason == "unanswered"
