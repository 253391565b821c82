"""Scores of texts, held to what the owners of each metric published."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader.evaluation import METRICS, score_results
from loader.evaluation.texts import (
    anls,
    chosen_option,
    counted,
    edit_distance,
    exact_match,
    normalized_answer,
    relaxed_match,
    vqa_accuracy,
)

# pix2struct/metrics_test.py (google-research/pix2struct): these eight pairs have an exact match of
# 12.5, an ANLS of 47.5 and a relaxed accuracy of 62.5.
PIX2STRUCT = [
    *(("abc", "abc"), ("abc", "Abc"), ("Abc", "abc"), ("100%", "96%"), ("100%", "94%")),
    *(("100%", "0.96"), ("100%", "0.94"), ("Don't", "Won't")),
]


@pytest.mark.parametrize(
    "metric, percent",
    [
        (lambda said, want: exact_match(said, want, ignore_case=False), 12.5),
        (anls, 47.5),
        (relaxed_match, 62.5),
    ],
)
def test_scores_of_pix2struct(metric, percent):
    scores = [metric(said, [want]) for said, want in PIX2STRUCT]
    assert 100 * sum(scores) / len(scores) == pytest.approx(percent)


@pytest.mark.parametrize(
    "said, score",
    # The examples of the Robust Reading Competition, as github.com/shunk031/ANLS lists them.
    [("The Coca", 0), ("CocaCola", 0.89), ("Coca cola", 1), ("Cola", 0), ("Cat", 0)],
)
def test_anls_of_the_robust_reading_competition(said, score):
    assert anls(said, ["Coca Cola", "Coca Cola Company"]) == pytest.approx(score, abs=0.005)


def test_half_of_a_text_is_not_enough_for_anls():
    assert anls("ab", ["abcd"]) == 0  # the normalised distance is the threshold itself
    assert anls("", [""]) == 1


@pytest.mark.parametrize(
    "matching, score",
    # min(1, matching / 3) over all ten choices of nine people (visualqa.org/evaluation).
    [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)],
)
def test_vqa_accuracy_leaves_each_person_out_once(matching, score):
    assert vqa_accuracy("Yes.", ["yes"] * matching + ["no"] * (10 - matching)) == score


@pytest.mark.parametrize(
    "text, normal",
    [
        ("The dog", "dog"),
        ("an apple, a pear", "apple pear"),
        ("two", "2"),
        ("None", "0"),
        ("1,000", "1000"),
        ("blue-green", "blue green"),
        ("3.5 m.", "3.5 m"),
        ("dont", "don't"),
        ("couldn'tve", "couldn't've"),
        ("youre", "you're"),
        ("it's", "it's"),
        ("well", "well"),
        ("yes\n", "yes"),
    ],
)
def test_answers_are_normalised_as_the_official_script_does(text, normal):
    assert normalized_answer(text) == normal


def test_a_single_answer_is_compared_as_it_is():
    assert vqa_accuracy("a cat", ["Cat"]) == 1
    assert vqa_accuracy("dog", ["cat"]) == 0


@given(st.permutations(["red"] * 3 + ["blue"] * 5 + ["green"] * 2))
def test_vqa_accuracy_does_not_depend_on_the_order_of_answers(answers):
    assert vqa_accuracy("red", answers) == 0.9


@given(st.text("ab", max_size=6), st.text("ab", max_size=6))
def test_edit_distance_is_a_distance(a, b):
    distance = edit_distance(a, b)
    assert distance == edit_distance(b, a)
    assert abs(len(a) - len(b)) <= distance <= max(len(a), len(b))
    assert (distance == 0) == (a == b)


@pytest.mark.parametrize(
    "said, want, score",
    [
        *(("105", "100", 1), ("105.1", "100", 0), ("-95", "-100", 1), ("0", "0", 1), ("1", "0", 0)),
        *((" Blue", "blue", 1), ("5%", "0.05", 1), ("nan", "3", 0), ("3 cats", "3", 0)),
    ],
)
def test_numbers_within_five_percent_match(said, want, score):
    assert relaxed_match(said, [want]) == score


@pytest.mark.parametrize(
    "said, number",
    [
        *(("There are none.", 0), ("3", 3), ("Counting the x shows a total of 12.", 12)),
        *(("1,024", 1024), ("2.5", None), ("several", None), ("seven dogs", 7)),
        *(('There are 3 <points coords="1 1 900 400">dogs</points>.', 3), ("4.0", 4), ("", None)),
    ],
)
def test_counts_are_read_from_answers(said, number):
    assert counted(said) == number


@pytest.mark.parametrize(
    "said, option",
    [("A", 0), ("(b)", 1), ("C: owl", 2), ("D", None), ("owl", 2), ("A cat", 0), ("", None)],
)
def test_options_are_read_from_answers(said, option):
    assert chosen_option(said, ["a cat", "dog", "owl"]) == option


RECORDS = {
    "vqa": ({"answers": ["yes"] * 10}, "yes"),
    "exact": ({"answer": "Paris"}, "paris"),
    "relaxed": ({"answer": "100"}, "104"),
    "anls": ({"answers": ["Coca Cola"]}, "coca cola"),
    "choice": ({"options": ["cat", "dog"], "answer_idx": 1}, "B. dog"),
    "count": ({"count": 2}, "2"),
    "pointing": (
        {"points": [[50, 25]], "point_scale": 100},
        '<point x="50.0" y="25.0" alt="x">x</point>',
    ),
}


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_knows_right_from_wrong(name):
    record, right = RECORDS[name]
    rows = [
        {"key": key, "question_idx": 0, "prediction": said, "record": record, "images": []}
        for key, said in (("a", right), ("b", "something else"))
    ]
    (score,) = score_results(rows, metric=name)
    assert (score.score, score.num_questions, score.values) == (0.5, 2, (1.0, 0.0))


def test_scores_are_equal_in_any_order_of_summation():
    draws = random.Random(3)
    rows = [
        {"key": f"{i}", "prediction": "x" * draws.randint(1, 9), "record": {"answer": "xxxxxxx"}}
        for i in range(500)
    ]
    want = score_results(rows, metric="anls")[0].score
    assert score_results(rows[::-1], metric="anls")[0].score == want
