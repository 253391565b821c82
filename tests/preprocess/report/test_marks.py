"""Marks: points and boxes of every form that records have, as fractions."""

import re

import pytest

from preprocess.report.actions import action_table
from preprocess.report.marks import Mark, marks, words

SIZES = [(200, 100), (50, 50)]

FORMS = {
    "percent": ({"points": [[50, 25]], "point_scale": 100, "label": "a"}, [(0, "a", (0.5, 0.25))]),
    "pixels": ({"points": [[50, 25]]}, [(0, "", (0.25, 0.25))]),
    "by image": (
        {"points": [[[100, 50]], [[25, 5], [50, 50]]], "label": "b"},
        [(0, "b", (0.5, 0.5)), (1, "b", (0.5, 0.1)), (1, "b", (1.0, 1.0))],
    ),
    "second image only": ({"points": [[], [[25, 5]]]}, [(1, "", (0.5, 0.1))]),
    "no points": ({"points": [], "label": "c"}, []),
    "annotations": (
        {"answer_annotations": [{"points": [[10, 20]], "inline_text": "d"}]},
        [(0, "d", (0.1, 0.2))],
    ),
    "annotations with a scale": (
        {"point_scale": 10, "answer_annotations": [{"points": [[1, 2]], "inline_text": "d"}]},
        [(0, "d", (0.1, 0.2))],
    ),
    "boxes": (
        {"boxes": [[0, 0, 100, 50], [20, 10, 40, 20]], "label": ["e", "f"]},
        [(0, "e", (0, 0, 0.5, 0.5)), (0, "f", (0.1, 0.1, 0.2, 0.2))],
    ),
    "turns": (
        {"multi_turn_messages": [{"points": [[10, 10]], "point_scale": 20, "question": "g?"}]},
        [(0, "g?", (0.5, 0.5))],
    ),
    "texts": ({"points": "none", "boxes": {"a": 1}, "label": 3}, []),
    "other numbers": ({"points": [[1, 2, 3]], "boxes": [[1, 2]]}, []),
    "not finite": ({"points": [[float("nan"), 1]]}, []),
    "more images than there are": ({"points": [[], [], [[1, 1]]]}, []),
}


@pytest.mark.parametrize("form", FORMS)
def test_marks_are_fractions_of_their_image(form):
    message, want = FORMS[form]
    assert marks({"message_list": [message]}, SIZES) == [Mark(*each) for each in want]


@pytest.mark.parametrize("record", [{}, {"message_list": None}, {"message_list": ["a", 1]}])
def test_records_without_messages_have_none(record):
    assert marks(record, SIZES) == []


def test_words_of_pages_are_boxes_and_what_has_another_form_is_left_out():
    page = {"width": 200, "height": 100, "words": [["Sum", 50, 25, 100, 50, 0], ["no box"], "Sum"]}
    record = {"metadata": {"ocr": [page, None, {"words": page["words"]}, {**page, "height": 50}]}}
    first = Mark(0, "Sum", (0.25, 0.25, 0.5, 0.5))
    assert words(record, num_images=1) == [first]
    assert words(record, num_images=4) == [first, Mark(3, "Sum", (0.25, 0.5, 0.5, 1.0))]
    for metadata in (None, {}, {"ocr": "Sum"}, {"ocr": [3]}):
        assert words({"metadata": metadata}, num_images=1) == []


def test_actions_are_a_table_of_the_first_window():
    runs = {"actions": [[0.5, 1], [0.25, 1], [0.25, 0]], "action_mask": [True, True, False]}
    each = {"step": [7, 8]}
    windows = {"each": each, "first": [1, 0], "rows": 2, "runs": runs}
    (shown, rest) = action_table({"metadata": {"windows": windows}}, ["x"])
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", str(shown))
    assert cells == ["step", "x", "2", "7", "0.25", "1", "8, after the end", "0.25", "0"]
    assert "1 more windows." in str(rest)
    lone = {"metadata": {**runs, "step": 7}}
    assert str(action_table(lone, [])[0]).count("<tr>") == 4
    for metadata in (None, {}, {"actions": "left"}, {"actions": [["a"]]}):
        assert action_table({"metadata": metadata}, []) == []
