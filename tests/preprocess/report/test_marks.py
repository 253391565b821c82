"""Marks: points and boxes of every form that records have, as fractions."""

import pytest

from preprocess.report.marks import Mark, marks

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
