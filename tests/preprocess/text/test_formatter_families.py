"""DataFormatter: the families of styles, from a message's fields to the exact texts."""

import importlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import preprocess.text.styles
from preprocess.formats import parse_messages
from preprocess.recipe import Preparer, Recipe
from preprocess.text import (
    DataFormatter,
    TextPolicy,
    chat_frame,
    image_prefixes,
    message_styles,
    message_texts,
    safe_geometry,
)
from preprocess.text.actions import action_text
from preprocess.text.chat import ChatFrame
from preprocess.text.styles import STYLES
from preprocess.text.styles.base import TEMPLATES, prompt_templates
from preprocess.text.styles.counting import asks_for_count
from preprocess.text.tokens import load_tokenizer
from shardspec.errors import ConfigError, SampleError
from shardspec.sample import Geometry
from shardspec.toml import load_toml

ROOT = Path(__file__).parents[3]
BARE = ChatFrame(first="", later="|", suffix="", response_prefix="")
PLAIN = {"system_prompt": "none"}
NO_POINTING = load_toml(TEMPLATES / "question.toml")["no_pointing"]

QUESTION = {"style": "vqa2", "question": "What is it?", "answer": "a cat"}
POINTS = {
    "style": "pointing",
    "label": "Dog",
    "points": [[90, 20], [10.34, 33.333]],
    "point_scale": 100,
}
CHOICE = {
    "style": "science_qa",
    "question": "Which animal?",
    "options": ["cat", "dog"],
    "answer_idx": 1,
}
EXPLANATION = {
    "style": "point_qa",
    "question": "What is here?",
    "answer": "A <|POINT|> sits.",
    "answer_annotations": [{"points": [[10, 20]], "inline_text": "cat", "alt_text": "a cat"}],
}
ROBOT = {"style": "robot_action", "instruction": "pick up the cup", "action": [0.5, -2.0, 1.0]}
CAPTION = {"style": "long_caption", "text": "A red ball."}
TIMED = {
    "style": "video_point",
    "label": "Dog",
    "timestamps": [1.5, 0.7],
    "points": [[[90, 20], [10.34, 33.333]], [[50, 50]]],
    "point_scale": 100,
}
TRACK = {
    "style": "video_point_track_per_frame",
    "label": "Dog",
    "frame_trajectories": [{"time": t, "points": [{"id": 7, "point": [t, 50]}]} for t in (0, 1)],
    "point_scale": 100,
}

EXAMPLE_OF_FAMILY = {
    "caption": CAPTION,
    "qa": QUESTION,
    "document": {**QUESTION, "style": "doc_qa"},
    "pointing": POINTS,
    "counting": {**POINTS, "style": "point_count"},
    "inline_points": EXPLANATION,
    "multiple_choice": CHOICE,
    "instruction": {**QUESTION, "style": "user_qa"},
    "robot": ROBOT,
    "interleaved": {"style": "interleaved", "text": "A red ball."},
    "video_points": TIMED,
    "tracking": TRACK,
    "boxes": {"style": "boxes", "label": "cat", "boxes": [[1, 2, 3, 4]], "point_scale": 10},
}


def formatter(*, seed=0, frame=BARE, **policy):
    return DataFormatter(policy=TextPolicy(**{**PLAIN, **policy}), frame=frame, seed=seed)


def branches(*messages, key="key", image_sizes=(), **settings):
    example = {"message_list": list(messages)}
    return formatter(**settings)(example, key=key, image_sizes=image_sizes)


def turns(message, **settings):
    (branch,) = branches(message, **settings)
    return branch.turns


def drawn(message, **settings):
    """The (prompt, response) pairs of a message of one turn."""
    (variants,) = turns(message, **settings)
    return [(variant.prompt, variant.response) for variant in variants]


def only(message, **settings):
    """The one pair of a message without anything to draw."""
    (pair,) = drawn(message, **settings)
    return pair


def message_of(style):
    message = {**EXAMPLE_OF_FAMILY[STYLES[style].family], "style": style}
    if STYLES[style].grouped:
        message["points"] = [message["points"]]
    if STYLES[style].explained:
        message["explanation"] = "It purrs."
    return message


def refused(message, **settings):
    with pytest.raises(SampleError) as caught:
        branches(message, key="k7", **settings)
    assert caught.value.where == "k7"
    return caught.value


# --- the table


@pytest.mark.parametrize("style", sorted(STYLES))
@pytest.mark.parametrize("templates", ["none", "uber_model", "uber_model_v2"])
def test_every_style_gives_a_conversation_and_leaves_the_message_as_json(style, templates):
    message = message_of(style)
    before = json.dumps(message)
    pairs = drawn(message, prompt_templates=templates, choices="varied")
    assert all(response.strip() for _, response in pairs)
    textless = STYLES[style].family in ("caption", "interleaved")
    assert textless or all(user.strip() for user, _ in pairs)
    assert json.dumps(message) == before


@pytest.mark.parametrize("family", sorted(EXAMPLE_OF_FAMILY))
def test_every_family_can_be_drawn_alone(family):
    message = EXAMPLE_OF_FAMILY[family]
    assert formatter().draw(message, np.random.RandomState(0)) == only(message)


VIDEO_STYLES = {
    *("video_point", "video_point_count", "video_count_point", "video_count"),
    *("video_point_track_per_frame", "video_point_ground_start_end"),
    "video_single_point_track_per_frame",
}


def styles_with(**facts):
    return {
        name
        for name, style in STYLES.items()
        if all(getattr(style, fact) == value for fact, value in facts.items())
    }


def test_styles_whose_prefix_differs_are_those_of_molmo():
    assert styles_with(demo=True) == {
        "long_caption",
        "short_caption",
        "user_qa",
        "pointing",
        "point_count",
        "cosyn_point",
        "correction_qa",
        "text_sft",
        "multi_image_pointing",
        "multi_image_counting",
        "multi_image_point_then_count",
        "multi_image_count_then_point",
        *VIDEO_STYLES,
        *(f"video_{name}_caption" for name in ("short", "merged", "long")),
    }
    assert styles_with(unnamed=True) == {"android_control", "demo"}
    images = {"pointing", "point_count", "cosyn_point"}
    assert styles_with(length_hint=False) == {*images, *VIDEO_STYLES}
    assert {name: style.trained_as for name, style in STYLES.items() if style.trained_as} == {
        "eval_short_answer": "vqa2",
        "eval_multiple_choice": "a_okvqa_mc",
        "eval_multi_image_mc": "multi_image_mc",
        "video_eval_multiple_choice": "video_multiple_choice",
        "video_eval_short_answer": "video_short_answer",
    }


def test_each_style_belongs_to_one_family():
    modules = [
        importlib.import_module(f"preprocess.text.styles.{path.stem}")
        for path in sorted(Path(preprocess.text.styles.__file__).parent.glob("*.py"))
        if path.stem not in ("__init__", "base")
    ]
    assert sorted(name for module in modules for name in module.STYLES) == sorted(STYLES)


@pytest.mark.parametrize("style", sorted(STYLES))
def test_templates_of_a_style_all_have_the_field_that_its_family_fills(style):
    field = {
        "caption": [],
        "document": ["question"],
        "pointing": ["label"],
        "counting": ["label"],
        "video_points": ["label"],
        "tracking": ["label"],
        "robot": ["instruction"],
    }
    if STYLES[style].template:
        for template in prompt_templates(STYLES[style].template):
            assert re.findall(r"\{(\w*)\}", template) == field[STYLES[style].family]


# --- questions and answers


def test_question_and_answer_are_taken_as_they_are():
    assert only({**QUESTION, "question": " What is IT? "}) == (" What is IT? ", "a cat")


def test_explicit_prompt_wins_over_the_question():
    assert only({**QUESTION, "prompt": "Say it."}) == ("Say it.", "a cat")


def test_most_common_answer_wins():
    message = {"style": "vqa2", "question": "Q?", "answers": ["no"] * 3 + ["yes"] * 6 + ["maybe"]}
    assert only(message) == ("Q?", "yes")


@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=10), st.integers(1, 9))
def test_tied_answers_are_stored_equally_often(answers, num_variants):
    message = {"style": "vqa2", "question": "Q?", "answers": answers}
    settings = {"num_variants": num_variants, "system_prompt": "style_and_length"}
    counts = Counter(response for _, response in drawn(message, **settings))
    votes = Counter(answers)
    assert set(counts) == {a for a in votes if votes[a] == max(votes.values())}
    assert len(set(counts.values())) == 1


def test_empty_votes_do_not_count():
    message = {"style": "vqa2", "question": "Q?", "answers": ["", " ", "", " red", "red "]}
    assert only(message) == ("Q?", "red")


def test_first_answer_is_the_first_in_the_alphabet():
    message = {"style": "vqa2", "question": "Q?", "answers": ["yes", "yes", "no"]}
    assert only(message, select_answer="first") == ("Q?", "no")


def test_method_called_alone_draws_one_of_the_tied_answers():
    message = {"style": "vqa2", "question": "Q?", "answers": ["yes", "no"]}
    rng = np.random.RandomState(0)
    assert {formatter().draw(message, rng)[1] for _ in range(40)} == {"yes", "no"}


def test_explanation_stands_before_the_answer():
    message = {
        "style": "cosyn_chart_exp",
        "question": "How tall?",
        "explanation": "Both bars add up.",
        "answer": "7",
    }
    assert only(message) == ("How tall?", "Both bars add up. Answer: 7")


def test_second_uber_model_asks_for_explanations_by_templates():
    message = message_of("cosyn_chart_exp")
    assert {user for user, _ in drawn(message, prompt_templates="uber_model")} == {"What is it?"}
    users = {user for user, _ in drawn(message, prompt_templates="uber_model_v2", num_variants=99)}
    assert len(users) > 3
    assert all("What is it?" in user for user in users)


def test_braces_in_a_question_stay_what_they_are():
    message = {**message_of("cosyn_chart_exp"), "question": "What is {question}?"}
    for user, _ in drawn(message, prompt_templates="uber_model_v2"):
        assert user.count("What is {question}?") == 1


@pytest.mark.parametrize(
    "message, field",
    [
        ({"style": "vqa2", "answer": "a"}, "question"),
        ({"style": "vqa2", "question": " ", "answer": "a"}, "question"),
        ({"style": "vqa2", "question": "Q?"}, "text"),
        ({"style": "vqa2", "question": "Q?", "answer": ""}, "answer"),
        ({"style": "vqa2", "question": "Q?", "answer": 3}, "answer"),
        ({"style": "vqa2", "question": "Q?", "answers": []}, "answers"),
        ({"style": "vqa2", "question": "Q?", "answers": ["", ""]}, "answers"),
        ({"style": "vqa2", "question": "Q?", "answers": "yes"}, "answers"),
        ({"style": "vqa2", "question": "Q?", "answers": ["a", 1]}, "answers"),
        ({"style": "cosyn_math_exp", "question": "Q?", "answer": "a"}, "explanation"),
        ({"style": "pointing", "points": []}, "question"),
        ({"style": "pointing", "label": "cat"}, "points"),
        ({"style": "pointing", "label": "cat", "points": [[1, 2]]}, "point_scale"),
        ({"style": "count", "label": "cat", "count": -1}, "count"),
        ({"style": "count", "label": "cat"}, "count"),
        ({**POINTS, "point_scale": 0}, "point_scale"),
        ({**POINTS, "point_scale": "100"}, "point_scale"),
        ({"style": "science_qa", "question": "Q?", "answer_idx": 0}, "options"),
        ({**CHOICE, "options": "ab"}, "options"),
        ({**CHOICE, "options": []}, "options"),
        ({**CHOICE, "question": ""}, "question"),
        ({"style": "science_qa", "question": "Q?", "options": ["a"]}, "answer_idx"),
        ({"style": "point_qa", "question": "Q?", "answer": "a"}, "answer_annotations"),
        ({"style": "robot_action", "instruction": "go"}, "action"),
        ({**ROBOT, "action": [float("nan")]}, "action"),
        ({**ROBOT, "action": [[0.1], [0.1, 0.2]]}, "action"),
        ({"style": "robot_action", "action": [0.0]}, "question"),
        ({"style": "user_qa", "messages": []}, "messages"),
        ({"style": "user_qa", "messages": ["Q?", "A", "R?"]}, "messages"),
        ({"style": "user_qa", "messages": ["Q?", ""]}, "answer"),
        ({"style": "user_qa", "multi_turn_messages": []}, "multi_turn_messages"),
    ],
)
def test_missing_and_unusable_fields_are_named_with_the_style(message, field):
    error = refused(message)
    assert error.reason == "message_fields"
    assert (error.facts["field"], error.facts["style"]) == (field, message["style"])
    assert field in str(error)
    assert message["style"] in str(error)


# --- points


@pytest.mark.parametrize(
    "point_format, tag",
    [
        ("xml", '<points x1="10.3" y1="33.3" x2="90.0" y2="20.0" alt="dog">dog</points>'),
        ("coords", '<points coords="1 1 103 333 2 900 200">dog</points>'),
    ],
)
def test_answers_of_the_pointing_styles(point_format, tag):
    answers = {
        style: only({**POINTS, "style": style}, point_format=point_format)
        for style in ("pointing", "point_count", "point_then_count", "count_then_point", "count")
    }
    counted = ("dog", f"Counting the {tag} shows a total of 2.")
    assert answers == {
        "pointing": ("dog", tag),
        "point_count": counted,
        "point_then_count": counted,
        "count_then_point": ("dog", f"There are 2 {tag}."),
        "count": ("dog", "2"),
    }


@pytest.mark.parametrize(
    "style", [name for name, style in STYLES.items() if style.template.startswith("pointing")]
)
def test_no_points_are_said_in_words(style):
    points = [[], []] if STYLES[style].grouped or style in VIDEO_STYLES else []
    assert only({**message_of(style), "points": points})[1] == "There are none."


def test_count_without_points_comes_from_the_count():
    assert only({"style": "count", "label": "dogs", "count": 7}) == ("dogs", "7")
    assert only({"style": "count", "label": "dogs", "count": 0}) == ("dogs", "There are none.")


def test_pixels_are_fractions_of_the_image():
    message = {"style": "pointing", "label": "cat", "points": [[64, 48]]}
    settings = {"image_sizes": [(640, 480)], "point_format": "xml"}
    assert only(message, **settings)[1] == '<point x="10.0" y="10.0" alt="cat">cat</point>'


def test_point_scale_wins_over_the_size_of_the_image():
    got = only(POINTS, image_sizes=[(7, 7)])[1]
    assert got == '<points coords="1 1 103 333 2 900 200">dog</points>'


def test_points_are_clipped_where_the_message_says_so():
    message = {**POINTS, "points": [[120, -5]], "clip_points": True}
    want = '<point x="100.0" y="0.0" alt="dog">dog</point>'
    assert only(message, point_format="xml")[1] == want
    message["clip_points"] = False
    want = '<point x="120.0" y="-5.0" alt="dog">dog</point>'
    assert only(message, point_format="xml")[1] == want


def test_points_of_several_images_are_scaled_each_by_its_own_size():
    message = {
        "style": "multi_image_point_then_count",
        "label": "Red Cup",
        "points": [[[64, 48]], [], [[10, 10], [5, 90]]],
    }
    got = only(message, image_sizes=[(640, 480), (9, 9), (100, 100)])
    tag = '<points coords="1 1 100 100;3 2 050 900 3 100 100">Red Cup</points>'
    assert got == ("Red Cup", f"Counting the {tag} shows a total of 3.")


def test_points_of_several_images_have_no_xml():
    message = {**message_of("multi_image_pointing"), "points": [[[1, 2]], [[3, 4]]]}
    with pytest.raises(ConfigError) as caught:
        branches(message, point_format="xml")
    assert caught.value.reason == "point_format"


@pytest.mark.parametrize(
    "points, style, image_sizes",
    [
        ([[1, 2, 3]], "pointing", ()),
        ([1, 2], "pointing", ()),
        ("ab", "point_count", ()),
        ([[1, 2]], "multi_image_pointing", ()),
        (5, "multi_image_pointing", ()),
        ([[[1, 2]], [[1, 2]]], "multi_image_pointing", [(9, 9)]),
    ],
)
def test_points_of_another_shape_are_refused(points, style, image_sizes):
    message = {**POINTS, "style": style, "points": points}
    assert refused(message, image_sizes=image_sizes).reason == "points_shape"


def test_question_about_points_is_asked_and_named_as_it_is():
    message = {**POINTS, "question": "Where is Rex?", "points": [[10, 20]]}
    del message["label"]
    for templates in ("none", "uber_model_v2"):
        got = only(message, prompt_templates=templates)
        assert got == ("Where is Rex?", '<points coords="1 1 100 200">Where is Rex?</points>')


def test_cased_label_keeps_its_case():
    message = {**POINTS, "label_cased": "Rex"}
    del message["label"]
    user, response = only(message)
    assert user == "Rex"
    assert response.endswith(">Rex</points>")


@pytest.mark.parametrize("style", ["pointing", "point_count", "count", "multi_image_pointing"])
def test_uber_model_puts_the_label_into_a_template(style):
    pairs = drawn(message_of(style), prompt_templates="uber_model", num_variants=200)
    label = "Dog" if STYLES[style].grouped else "dog"
    assert len(pairs) == 200
    assert len({user for user, _ in pairs}) > 5
    assert all(user.count(label) == 1 and "{" not in user for user, _ in pairs)
    assert len({response for _, response in pairs}) == 1


def test_inline_points_in_xml():
    want = 'A <point x="10.0" y="20.0" alt="a cat">cat</point> sits.'
    assert only(EXPLANATION, point_format="xml") == ("What is here?", want)


def test_inline_points_in_coords():
    want = 'A <points alt="a cat" coords="1 1 100 200">cat</points> sits.'
    assert only(EXPLANATION) == ("What is here?", want)


def test_inline_points_stand_at_their_own_placeholders_and_within_the_image():
    message = {
        **EXPLANATION,
        "answer": "<|POINT|> and <|POINT|>, no <|POINT|>",
        "answer_annotations": [
            {"points": [[130, -3]], "inline_text": "b", "alt_text": "B"},
            {"points": [[30, 40], [10, 20]], "inline_text": "a", "alt_text": "A"},
            {"points": [], "inline_text": "c", "alt_text": "C"},
        ],
    }
    assert only(message, point_format="xml")[1] == (
        '<point x="100.0" y="0.0" alt="B">b</point> and '
        '<points x1="10.0" y1="20.0" x2="30.0" y2="40.0" alt="A">a</points>, no c'
    )


def test_other_number_of_annotations_than_placeholders_is_refused():
    error = refused({**EXPLANATION, "answer": "none here"})
    assert error.reason == "message_fields"
    assert error.facts["placeholders"] == 0


# --- multiple choice


def test_standard_choice():
    question = "Which animal?\nOnly return the correct answer option.\nA. cat\nB. dog"
    assert only(CHOICE) == (question, "B. dog")


def test_choice_in_the_letter_form():
    assert only(CHOICE, choices="letter") == ("Which animal?\nA: cat\nB: dog\n", "B")


def test_choice_between_names_of_their_own():
    message = {"style": "ai2_diagram", "question": "Which?", "answer_idx": 1}
    message["unlabelled_options"] = ["E", "K"]
    assert only(message) == ("Which?\nOnly return the correct answer option.\nE\nK", "K")


def test_varied_choices_differ_between_variants_and_always_name_the_right_option():
    pairs = drawn(CHOICE, choices="varied", num_variants=300)
    assert len({user for user, _ in pairs}) > 200
    for user, response in pairs:
        assert "dog" in response or re.search(rf"{re.escape(response)}\W*dog", user)
        assert "cat" not in response


@pytest.mark.parametrize("choices", ["standard", "varied"])
def test_choice_with_an_explicit_prompt_is_answered_in_the_standard_form(choices):
    message = {**CHOICE, "prompt": "Cat or dog?"}
    assert only(message, choices=choices) == ("Cat or dog?", "B. dog")


@pytest.mark.parametrize("answer_idx", [2, -1, True, "B"])
def test_answer_that_is_not_an_option_is_refused(answer_idx):
    assert refused({**CHOICE, "answer_idx": answer_idx}).reason == "answer_idx"


# --- conversations


def test_messages_become_turns_with_the_prefix_on_the_first_alone():
    message = {"style": "user_qa", "messages": ["Q?", "A", "R?", "B", "S?", "C"]}
    got = turns(message, system_prompt="style")
    assert [[(v.prompt, v.response) for v in turn] for turn in got] == [
        [("user_qa: Q?", "A")],
        [("|R?", "B")],
        [("|S?", "C")],
    ]


def test_conversation_in_the_role_format():
    message = {"style": "user_qa", "messages": ["Q?", "A", "R?", "B"]}
    got = turns(message, frame=chat_frame("role", None))
    text = "".join(variants[0].prompt + variants[0].response for variants in got)
    assert text == " User: Q? Assistant: A User: R? Assistant: B"


def test_turns_of_several_styles_follow_each_other():
    message = {
        "style": "user_qa",
        "weight": 0.5,
        "multi_turn_messages": [CHOICE, {"question": "Q?", "answer": "A"}, POINTS],
    }
    (branch,) = branches(message, system_prompt="style")
    assert branch.weight == 500_000
    assert [variants[0].response for variants in branch.turns] == [
        "B. dog",
        "A",
        '<points coords="1 1 103 333 2 900 200">dog</points>',
    ]
    assert branch.turns[0][0].prompt.startswith("science_qa: Which animal?")
    assert [variants[0].prompt for variants in branch.turns[1:]] == ["|Q?", "|dog"]


def test_length_hint_of_a_conversation_measures_its_last_response():
    message = {"style": "user_qa", "messages": ["Q?", "A", "R?", "x" * 3000]}
    first, second = turns(message, system_prompt="style_and_length_v2", num_variants=50)
    hints = [int(found[1]) for v in first if (found := re.search(r"user_qa (\d+):", v.prompt))]
    assert len(hints) > 30
    assert all(180 < hint < 220 for hint in hints)
    assert {v.prompt for v in second} == {"|R?"}


def test_turns_draw_apart():
    message = {"style": "user_qa", "multi_turn_messages": [POINTS, POINTS]}
    first, second = turns(message, prompt_templates="uber_model", num_variants=20)
    assert [v.prompt for v in first] != [v.prompt.removeprefix("|") for v in second]


def test_points_of_a_later_turn_know_the_size_of_the_image():
    turn = {"style": "pointing", "label": "cat", "points": [[64, 48]]}
    message = {"multi_turn_messages": [QUESTION, turn]}
    got = turns(message, image_sizes=[(640, 480)])
    assert got[1][0].response == '<points coords="1 1 100 100">cat</points>'


@pytest.mark.parametrize("style", ["user_qa", "synthetic_qa"])
def test_each_counting_question_of_a_conversation_is_told_not_to_point(style):
    message = {"style": style, "messages": ["What is it?", "Dogs.", "How many dogs?", "Two."]}
    first, second = turns(message, num_variants=300)
    assert [v.prompt for v in first] == ["What is it?"]
    assert {v.prompt for v in second} == {f"|{prefix} How many dogs?" for prefix in NO_POINTING}
    assert {v.response for v in second} == {"Two."}


@pytest.mark.parametrize("style", ["vqa2", "text_sft", "correction_qa", "tally_qa"])
def test_counting_questions_of_other_styles_stay_as_they_are(style):
    message = {"style": style, "question": "How many dogs?", "answer": "2"}
    assert only(message) == ("How many dogs?", "2")


@pytest.mark.parametrize(
    "question",
    [
        "How many dogs are there?",
        "so, how many of them?",
        "Count the dogs.",
        "Can you count the dogs?",
        "What is the number of dogs?",
        "Tell me the number of the dogs.",
    ],
)
def test_questions_for_a_count_are_found(question):
    assert asks_for_count(question)


@pytest.mark.parametrize(
    "question",
    [
        "What is the number of the bus?",
        "What can you count on?",
        "Which country is it?",
        "What is the phone number?",
        "A number of dogs run.",
    ],
)
def test_other_questions_are_not_taken_for_a_count(question):
    assert not asks_for_count(question)


@pytest.mark.parametrize("question", ["HOW MANY dogs?", "COUNT them", "The Number Of dogs?"])
def test_requests_for_a_count_are_found_in_any_case(question):
    assert asks_for_count(question)


# --- robot


def test_action_is_written_in_bins():
    assert only(ROBOT) == ("pick up the cup", "192 0 255")
    assert only({**ROBOT, "action": [[0.0, -1], [1, 0.25]]})[1] == "128 0; 255 160"


@pytest.mark.parametrize("form", ["bins", "tokens", "openvla"])
def test_structured_actions_are_text_in_any_form(form):
    steps = ["move_forward", "turn left", "stop"]
    assert action_text(steps, form) == "move_forward; turn left; stop"
    records = [{"turn_deg": 15, "forward_m": 0.25}, {"name": "stop"}]
    assert json.loads(action_text(records, form)) == records
    assert json.loads(action_text(records[0], form)) == records[:1]


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=8))
def test_middle_of_a_bin_is_within_half_a_bin_of_the_action(action):
    bins = [int(word) for word in action_text(action).split()]
    assert all(0 <= b <= 255 for b in bins)
    assert all(
        abs((b + 0.5) / 128 - 1 - a) < 1 / 256 + 1e-9 for b, a in zip(bins, action, strict=True)
    )


def test_bins_have_equal_width():
    values = [(i + 0.5) / 128 - 1 for i in range(256)]
    assert action_text(values) == " ".join(map(str, range(256)))


@pytest.mark.parametrize(
    "action",
    [[], [[]], [[0.1], []], [True], ["0"], [None], 0.5, "go", [[0.1], 0.2], [[[0.1]]], {}, [{}]]
    + [["a", 0.1], ["<|x|>"], ["a;"], [{"<|x|>": 1}], [{"a": None}], [{"a": [1]}], [{"a": 1e999}]],
)
def test_what_is_not_an_action_is_refused(action):
    with pytest.raises(ValueError, match="action"):
        action_text(action)


# --- prefixes


@pytest.mark.parametrize(
    "mode, style, prefixes",
    [
        ("none", "vqa2", {""}),
        ("style", "vqa2", {"vqa2:"}),
        ("style", "pointing", {"pointing:"}),
        ("demo_or_style", "pointing", {"", "pointing:"}),
        ("demo_or_style", "vqa2", {"vqa2:"}),
        ("demo_or_style", "science_qa", {"science_qa:"}),
        ("demo_or_style", "android_control", {""}),
        ("demo_or_style", "demo", {""}),
        ("demo_or_style_v2", "pointing", {""}),
        ("demo_or_style_v2", "short_caption", {""}),
        ("demo_or_style_v2", "science_qa", {""}),
        ("demo_or_style_v2", "eval_multiple_choice", {""}),
        ("demo_or_style_v2", "vqa2", {"vqa2:"}),
        ("demo_or_style_v2", "cosyn_chart_exp", {"cosyn_chart_exp:"}),
        ("style_and_length_v2", "pointing", {"pointing:"}),
        ("style_and_length_v2", "point_count", {"point_count:"}),
        ("style_and_length_v2", "cosyn_point", {"cosyn_point:"}),
        ("style", "eval_short_answer", {"vqa2:"}),
        ("style", "eval_multiple_choice", {"a_okvqa_mc:"}),
    ],
)
def test_prefixes_without_a_hint(mode, style, prefixes):
    rng = np.random.RandomState(0)
    own = formatter(system_prompt=mode)
    assert {own.system_prefix(style, "x" * 300, rng) for _ in range(200)} == prefixes


@pytest.mark.parametrize(
    "mode, bare",
    [
        ("style_and_length", "transcript :"),
        ("style_and_length_v2", "transcript:"),
        ("style_and_length_v3", "transcript:"),
    ],
)
def test_prefixes_with_a_hint_equal_the_formulas_on_the_same_draws(mode, bare):
    own = formatter(system_prompt=mode)
    for seed in range(100):
        rng = np.random.RandomState(seed)
        if rng.random_sample() >= 0.9:
            want = bare
        elif mode == "style_and_length_v3":
            want = f"transcript {int(600 * np.clip(rng.normal(1, 0.05), 0.5, 1.5) / 25)}:"
        else:
            want = f"transcript {(600 + int(rng.normal(scale=25))) // 15}:"
        assert own.system_prefix("transcript", "x" * 600, np.random.RandomState(seed)) == want


def test_third_length_hint_is_exact_without_noise():
    class Quiet:
        def random_sample(self):
            return 0.0

        def normal(self, loc, scale):
            return loc

    own = formatter(system_prompt="style_and_length_v3")
    assert own.system_prefix("long_caption", "x" * 1249, Quiet()) == "long_caption 49:"


# --- paraphrases


def test_paraphrases_are_off_by_default():
    message = {**QUESTION, "question": "What is in the image?"}
    assert only(message) == ("What is in the image?", "a cat")


def test_share_of_paraphrased_variants_is_the_policys():
    message = {**QUESTION, "question": "Describe the image."}
    users = Counter(user for user, _ in drawn(message, paraphrase=0.3, num_variants=1000))
    # A paraphrase is one of three wordings, the original among them.
    assert set(users) == {f"Describe the {noun}." for noun in ("image", "picture", "photo")}
    assert 740 < users["Describe the image."] < 860


def test_responses_are_never_paraphrased():
    message = {**QUESTION, "question": "Describe the image.", "answer": "the image, please"}
    assert {r for _, r in drawn(message, paraphrase=1, num_variants=99)} == {"the image, please"}


def test_labels_and_options_are_never_paraphrased():
    pointing = {**POINTS, "label": "The Image"}
    for user, response in drawn(pointing, paraphrase=1, prompt_templates="uber_model"):
        assert "the image" in user
        assert ">the image<" in response
    choice = {**CHOICE, "options": ["an image", "a photo"], "answer_idx": 1}
    for user, response in drawn(choice, paraphrase=1, choices="varied", num_variants=99):
        assert user.count("an image") == user.count("a photo") == 1
        assert "an image" not in response


def test_question_that_is_named_in_its_answer_is_not_paraphrased():
    message = {**POINTS, "question": "Where is the image?"}
    del message["label"]
    assert only(message, paraphrase=1)[0] == "Where is the image?"


def test_prefix_is_not_paraphrased():
    message = {**QUESTION, "question": "Describe the image."}
    users = [u for u, _ in drawn(message, paraphrase=1, system_prompt="style", num_variants=99)]
    assert all(user.startswith("vqa2: Describe the ") for user in users)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_share_of_paraphrases_out_of_range_is_refused(share):
    with pytest.raises(ConfigError) as caught:
        TextPolicy(paraphrase=share)
    assert caught.value.reason == "paraphrase"


@pytest.mark.parametrize(
    "name",
    [
        "prompt_templates",
        "system_prompt",
        "message_format",
        "point_format",
        "choices",
        "select_answer",
    ],
)
def test_settings_that_do_not_exist_are_refused_by_name(name):
    with pytest.raises(ConfigError) as caught:
        TextPolicy(**{name: "styles"})
    assert caught.value.reason == "text_policy"
    assert caught.value.facts["got"] == "styles"
    assert name in str(caught.value)


# --- geometry, texts, images


@pytest.mark.parametrize(
    "style",
    ["pointing", "count", "point_qa", "doc_qa", "text_vqa", "cosyn_music", "robot_action"],
)
def test_points_pages_and_motions_stay_where_they_are(style):
    assert safe_geometry(["two dogs"], styles=["vqa2", style]) == Geometry.COLOR


@pytest.mark.parametrize(
    "text",
    [
        "[0.25, 0.1, 0.6, 0.84]",
        "<ref>cup</ref><box>[[253, 231, 733, 787]]</box>",
        "<ref>cup</ref><box>(588,499),(725,789)</box>",
        "<|box_start|>(1,2),(3,4)<|box_end|>",
        '[{"bbox_2d": [1, 2, 3, 4], "label": "cup"}]',
        '{"point_2d": "10 20"}',
        '<point x="61.5" y="40.2" alt="cup">cup</point>',
        '<points coords="1 1 500 300">cups</points>',
        "<loc0123><loc0001><loc0002><loc0003> cat",
        "pyautogui.click(x=0.3, y=0.4)",
        "Click(352, 512)",
        '{"x": 0.25, "y": 0.5}',
        '{"xmin": 12, "ymin": 30}',
        "cup<loc_120><loc_44>",
        "<patch_index_0044><patch_index_0863>",
        "[.25, .1]",
        "tap (25%, 40%)",
    ],
)
def test_texts_with_coordinates_stay_where_they_are(text):
    told = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": text}]
    example = parse_messages({"image": "a.jpg", "messages": told})
    got = safe_geometry(message_texts(example), styles=["demo"])
    assert got == Geometry.COLOR


@pytest.mark.parametrize(
    "text", ["1,200 people (see below)", "2019, 2020 and 2021", "a ratio of 3:4", "[1] f(2)"]
)
def test_other_numbers_are_no_coordinates(text):
    assert safe_geometry([text], styles=["demo"]) == Geometry.ALL


def test_questions_without_sides_may_be_flipped():
    assert safe_geometry(["What is it?", "a cat"], styles=["vqa2"]) == Geometry.ALL


def test_count_forbids_the_crop_but_not_the_flip():
    got = safe_geometry(["How many dogs?", "2"], styles=["vqa2"])
    assert got == Geometry.FLIP | Geometry.COLOR


@pytest.mark.parametrize(
    "message",
    [
        {**QUESTION, "question": "What is on the left?"},
        {**CHOICE, "options": ["the left one", "the other one"]},
        {"style": "vqa2", "question": "Where?", "answers": ["table", "on the right"]},
        {"style": "user_qa", "messages": ["Where?", "There.", "Is it on the left?", "No."]},
        {"multi_turn_messages": [QUESTION, {**QUESTION, "question": "What does it say?"}]},
    ],
)
def test_sides_are_found_in_every_field(message):
    texts = message_texts({"message_list": [message]})
    assert Geometry.FLIP not in safe_geometry(texts, styles=["vqa2"])


def test_texts_and_styles_of_an_example_are_found_at_any_depth():
    example = {"message_list": [{"style": "user_qa", "multi_turn_messages": [EXPLANATION]}]}
    assert message_styles(example) == ["user_qa", "point_qa"]
    assert message_texts(example) == ["What is here?", "A <|POINT|> sits.", "cat", "a cat"]


def test_images_are_named_where_there_are_several():
    assert image_prefixes(0) == []
    assert image_prefixes(1) == [""]
    assert image_prefixes(3) == ["Image 1", "Image 2", "Image 3"]


def test_prepared_sample_has_pixel_points_by_the_upright_image_and_rigid_geometry():
    recipe = Recipe(text=TextPolicy(**PLAIN, num_variants=1))
    tokenizer = load_tokenizer()
    example = {
        "image": np.zeros((480, 640, 3), np.uint8),
        "message_list": [{"style": "pointing", "label": "cat", "points": [[64, 48]]}],
    }
    sample = Preparer(recipe=recipe, tokenizer=tokenizer)(example)
    assert '<points coords="1 1 100 100">cat</points>' in tokenizer.decode(sample.tokens.tolist())
    assert sample.images[0].geometry == Geometry.COLOR


# --- draws


@pytest.mark.parametrize("style", sorted(STYLES))
def test_same_key_and_seed_give_the_same_variants(style):
    settings = {
        "prompt_templates": "uber_model_v2",
        "system_prompt": "style_and_length",
        "choices": "varied",
        "paraphrase": 0.5,
    }
    first, second = (branches(message_of(style), seed=3, **settings) for _ in range(2))
    assert first == second
    other = branches(message_of(style), seed=3, key="other", **settings)
    assert (other != first) is not STYLES[style].bare  # nothing is drawn for a document


def test_exchange_in_which_nothing_differs_is_stored_once_per_answer():
    message = {"style": "vqa2", "question": "Q?", "answers": ["yes", "no"]}
    assert drawn(message, num_variants=8) == [("Q?", "yes"), ("Q?", "no")]


def test_exchange_in_which_anything_differs_is_stored_whole():
    message = {"style": "vqa2", "question": "Q?", "answers": ["yes", "no"]}
    assert len(drawn(message, num_variants=8, system_prompt="style_and_length")) == 16


def test_draws_do_not_depend_on_the_hash_seed():
    script = """
import json
from preprocess.text import DataFormatter, TextPolicy, chat_frame
policy = TextPolicy(prompt_templates="uber_model_v2", choices="varied", paraphrase=1.0)
formatter = DataFormatter(policy=policy, frame=chat_frame("role", None))
messages = json.load(open(0))
print([branch.turns for branch in formatter({"message_list": messages}, key="k")])
"""
    tied = {"style": "vqa2", "question": "Is the image big?", "answers": list("edcba")}
    messages = json.dumps([*map(message_of, sorted(STYLES)), tied])
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            input=messages,
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(outputs) == 1
    assert len(outputs.pop()) > 10_000
