"""Subtitles of SRT and WebVTT files and of columns."""

import pytest

from preprocess.formats import Spec, parse_row, row_subtitles
from shardspec.errors import SampleError

SRT = """1\r
00:00:01,000 --> 00:00:02,500\r
Hello\r
<i>there</i>, {\\an8}Ann.\r
\r
2\r
01:00:03,5 --> 01:00:04,75\r
A < B &amp; C\r
"""
VTT = """\ufeffWEBVTT - a head
Kind: captions

NOTE what is between
--> is a comment

STYLE
::cue { color: red }

intro
00:01.000 --> 00:02.500 align:start position:0%
<v Ann>Hello</v> <00:00:01.500><c.yellow>there</c>, Ann.

3600:00:03.500 --> 3600:00:04.750
A < B & C
"""


def test_files_are_read_without_their_markup():
    assert row_subtitles(SRT) == [
        (1.0, 2.5, "Hello there, Ann."),
        (3603.5, 3604.75, "A < B & C"),
    ]
    assert row_subtitles(VTT) == [
        (1.0, 2.5, "Hello there, Ann."),
        (12960003.5, 12960004.75, "A < B & C"),
    ]
    assert row_subtitles("WEBVTT\n") == row_subtitles("") == row_subtitles(None) == []


@pytest.mark.parametrize(
    "value",
    [
        [[4, 5, "b"], [1.5, 2, " a\n c "], [0, 1, " "]],
        [{"start": 4, "end": 5, "text": "b"}, {"start": 1.5, "end": 2, "text": "a c"}],
        {"start": [1.5, 4], "end": [2, 5], "text": ["a c", "b"]},
    ],
)
def test_values_are_sorted_by_their_times(value):
    assert row_subtitles(value) == [(1.5, 2.0, "a c"), (4.0, 5.0, "b")]


@pytest.mark.parametrize(
    "value, reason",
    [
        ("some words", "subtitles"),
        ("1\n00:00:01 --> soon\nx\n", "subtitles"),
        ([[1, 2]], "subtitles"),
        ([[-1, 2, "x"]], "subtitles"),
        ([["1", 2, "x"]], "subtitles"),
        ([[1, float("nan"), "x"]], "subtitles"),
        ({"start": 1}, "subtitles"),
        (7, "subtitles"),
    ],
)
def test_what_is_not_subtitles_has_a_reason(value, reason):
    with pytest.raises(SampleError) as caught:
        row_subtitles(value)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "video, column, value, want",
    [
        ("a.mp4", "said", [[1, 2, "x"]], [(1.0, 2.0, "x")]),
        ("a.mp4", "said", "subs/A.SRT", {"path": "subs/A.SRT"}),
        ("a.mp4", "said", SRT, row_subtitles(SRT)),
        ("a.v2.mp4", ".vtt", None, {"path": "a.v2.vtt", "optional": True}),
        ("a.mp4", "said", None, []),
        (["a.mp4", "b.mp4"], "said", [None, [[1, 2, "x"]]], [[], [(1.0, 2.0, "x")]]),
        (["a.mp4", "b"], ".srt", None, [{"path": f"{n}.srt", "optional": True} for n in "ab"]),
    ],
)
def test_rows_have_subtitles_in_a_column_or_beside_the_video(video, column, value, want):
    spec = Spec(name="own", format="vqa", columns={"video": "video", "subtitles": column})
    row = {"video": video, "question": "What?", "answer": "x", "said": value}
    assert parse_row(row, spec)["subtitles"] == want


def test_another_number_of_subtitles_than_of_videos_is_refused():
    spec = Spec(name="own", format="vqa", columns={"video": "video", "subtitles": "said"})
    row = {"video": ["a", "b"], "question": "What?", "answer": "x", "said": [[1, 2, "x"]]}
    with pytest.raises(SampleError) as caught:
        parse_row(row, spec)
    assert caught.value.reason == "row_fields"
