"""Which subtitles are kept, where they are, and in which words."""

import pytest

from preprocess.text.subtitles import AFTER_MS, place_subtitles

LINES = [(0.5, 1.0, "one"), (2.0, 4.25, "two"), (6.0, 7.0, "three")]
AFTER = ["subtitle\n", "0.5 - 1.0 one\n", "2.0 - 4.2 two\n", "6.0 - 7.0 three\n"]


def placed(form="frames", clip=(None, None), frames=(0.0, 3.0), **settings):
    return place_subtitles(LINES, form=form, clip=clip, frame_times_s=frames, count=len, **settings)


def test_lines_have_their_times():
    found = placed()
    assert [(line.text, line.begin_ms, line.end_ms) for line in found.lines] == [
        ("\n0.5 - 1.0 one\n", 500, 1000),
        ("\n2.0 - 4.2 two\n", 2000, 4250),
        ("\n6.0 - 7.0 three\n", 6000, 7000),
    ]
    assert found.left_out == 0


def test_lines_after_the_frames_are_as_molmo_2_writes_them():
    found = placed("after")
    assert [line.text for line in found.lines] == AFTER
    assert {line.begin_ms for line in found.lines} == {AFTER_MS}
    assert placed("none").lines == []


def test_times_are_those_of_the_clip():
    found = placed(clip=(3.0, 6.0))
    assert [line.text for line in found.lines] == ["\n0.0 - 1.2 two\n"]
    assert found.left_out == 0


@pytest.mark.parametrize("form, head", [("frames", 0), ("after", len(AFTER[0]))])
def test_budget_keeps_the_first_lines(form, head):
    lengths = [len(line.text) for line in placed(form).lines][form == "after" :]
    for budget in range(1, head + sum(lengths) + 1):
        found = placed(form, max_tokens=budget)
        fit = sum(head + sum(lengths[: n + 1]) <= budget for n in range(3))
        assert len(found.lines) == (fit + (form == "after") if fit else 0)
        assert found.left_out == 3 - fit


def test_window_keeps_lines_near_a_stored_frame():
    found = placed(window_s=1.0)
    assert [line.text.strip() for line in found.lines] == ["0.5 - 1.0 one", "2.0 - 4.2 two"]
    assert found.left_out == 1
    assert placed(window_s=3.0).left_out == 0
