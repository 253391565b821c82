"""Captions, questions and points of flat columns, and how formats are told apart."""

import pytest

from preprocess.formats import Spec, guess_format, parse_row
from shardspec.errors import SampleError


def message(row, name, **options):
    example = parse_row(row, Spec(name="own", format=name, **options))
    return example["message_list"][0], example.get("image")


@pytest.mark.parametrize(
    "row, want",
    [
        ({"image": "a.jpg", "caption": "A door."}, {"text": "A door."}),
        ({"image": "a.jpg", "TEXT": "A door."}, {"text": "A door."}),
        ({"image": "a.jpg", "caption": ["One.", "Two."]}, {"alternatives": ["One.", "Two."]}),
        ({"image": "a.jpg", "text": "x", "question": "Q?"}, {"text": "x", "question": "Q?"}),
        ({"URL": "a.jpg", "TEXT": '["One.", "Two."]'}, {"alternatives": ["One.", "Two."]}),
        ({"image": "a.jpg", "caption": "[1, 2]"}, {"text": "[1, 2]"}),
        ({"image": "a.jpg", "caption": "['A b.'\n 'C d.']"}, {"alternatives": ["A b.", "C d."]}),
        ({"image": "a.jpg", "caption": '["One.", null]'}, {"text": "One."}),
    ],
)
def test_captions(row, want):
    assert message(row, "captions") == ({"style": "long_caption", **want}, ["a.jpg"])


def test_captions_and_images_may_be_in_several_columns():
    columns = {"caption": ["short", "long"], "image": ["left", "right"]}
    row = {"left": "a", "right": "b", "short": "One.", "long": "", "text": "not this", "id": "1"}
    for more, want in (
        ({}, {"text": "One."}),
        ({"long": "Two."}, {"alternatives": ["One.", "Two."]}),
    ):
        got, images = message({**row, **more}, "captions", columns=columns)
        assert (got, images) == ({"style": "long_caption", **want}, ["a", "b"])
    with pytest.raises(SampleError) as caught:
        message({"left": "a"}, "captions", columns=columns)
    assert caught.value.facts["name"] == "short"


OPTIONS = ["a cat", "a dog", "a cow"]


@pytest.mark.parametrize(
    "row, want",
    [
        ({"answer": "yes"}, {"style": "vqa2", "answer": "yes"}),
        ({"answer": 3}, {"style": "vqa2", "answer": "3"}),
        ({"answers": ["yes", "no", "yes"]}, {"style": "vqa2", "answers": ["yes", "no", "yes"]}),
        ({"answers": [{"answer": "a"}, {"answer": "b"}]}, {"style": "vqa2", "answers": ["a", "b"]}),
        ({"options": OPTIONS, "answer": 1}, {"answer_idx": 1}),
        ({"options": OPTIONS, "answer": "B"}, {"answer_idx": 1}),
        ({"options": OPTIONS, "answer": "(C)"}, {"answer_idx": 2}),
        ({"options": OPTIONS, "answer": "a cow"}, {"answer_idx": 2}),
        ({"options": "['a cat', 'a dog', 'a cow']", "answer": "A"}, {"answer_idx": 0}),
        ({"choices": OPTIONS, "answer": 2}, {"answer_idx": 2}),
        (
            {"choices": {"text": OPTIONS, "label": ["1", "2", "3"]}, "answer": "1"},
            {"answer_idx": 0},
        ),
        ({"choices": {"text": OPTIONS, "label": list("ABC")}, "answer": 1}, {"answer_idx": 1}),
        (
            {"options": {"3": OPTIONS[2], "1": OPTIONS[0], "2": OPTIONS[1]}, "answer": 2},
            {"answer_idx": 1},
        ),
        ({"options": None, "choices": OPTIONS, "answer": "B"}, {"answer_idx": 1}),
        ({"options": [*OPTIONS, None, ""], "answer": "B"}, {"answer_idx": 1}),
        (
            {"options": {**dict(zip("ABC", OPTIONS, strict=True)), "D": None}, "answer": "C"},
            {"answer_idx": 2},
        ),
        (
            {
                "choices": [{"label": n, "text": t} for n, t in zip("ABC", OPTIONS, strict=True)],
                "answer": "B",
            },
            {"answer_idx": 1},
        ),
        ({"options": "['a cat' 'a dog'\n 'a cow']", "answer": "B"}, {"answer_idx": 1}),
        ({"options": [], "choices": None, "answer": "a cat"}, {"style": "vqa2", "answer": "a cat"}),
        ({**dict(zip("ABC", OPTIONS, strict=True)), "D": "", "answer": "C"}, {"answer_idx": 2}),
        (
            {f"choice_{letter}": text for letter, text in zip("abc", OPTIONS, strict=True)}
            | {"answer": "B"},
            {"answer_idx": 1},
        ),
        (
            {f"option_{letter}": text for letter, text in zip("ABC", OPTIONS, strict=True)}
            | {"option_D": None, "answer": "a dog"},
            {"answer_idx": 1},
        ),
        ({"answers": "yes"}, {"style": "vqa2", "answers": ["yes"]}),
        ({"answers": 3}, {"style": "vqa2", "answers": ["3"]}),
        ({"answers": "['yes', 'no']"}, {"style": "vqa2", "answers": ["yes", "no"]}),
        ({"answers": '["yes", null]'}, {"style": "vqa2", "answers": ["yes"]}),
        ({"answers": "['yes' \"no\"]"}, {"style": "vqa2", "answers": ["yes", "no"]}),
        ({"answers": "[sic] yes"}, {"style": "vqa2", "answers": ["[sic] yes"]}),
        ({"answers": {"answer": ["a", "b"]}}, {"style": "vqa2", "answers": ["a", "b"]}),
        ({"answers": {"text": ["a"], "start": [3]}}, {"style": "vqa2", "answers": ["a"]}),
    ],
)
def test_questions(row, want):
    if "answer_idx" in want:
        want = {"style": "a_okvqa_mc", "options": OPTIONS, **want}
    got, images = message({"image": "a.jpg", "question": "Q?", **row}, "vqa")
    assert got == {"question": "Q?", **want}
    assert images == ["a.jpg"]


@pytest.mark.parametrize("name", ["vqa", "captions", "points"])
@pytest.mark.parametrize(
    "question, images, want, placed",
    [
        ("<image>\nWhat?", ["a"], "What?", ["a"]),
        ("What?", ["a", "b"], "What?", ["a", "b"]),
        ("Is <image 2> in <image 1>?", ["a", "b"], "Is <|image|> in <|image|>?", ["b", "a"]),
        ("From <image> to <image>?", ["a", "b"], "From <|image|> to <|image|>?", ["a", "b"]),
    ],
)
def test_images_of_a_question_stay_where_their_placeholders_are(
    name, question, images, want, placed
):
    rest = {"answer": "x", "caption": "x", "label": "x", "points": [[1, 2]]}
    got, found = message({"question": question, "image": images, **rest}, name)
    assert (got["question"], found) == (want, placed)


@pytest.mark.parametrize("name", ["vqa", "captions", "points", "boxes"])
def test_missing_placeholder_of_a_question_can_be_refused(name):
    rest = {
        "answer": "x",
        "caption": "x",
        "label": "x",
        "points": [[1, 2]],
        "boxes": [[1, 2, 3, 4]],
    }
    spec = Spec(name="own", format=name, box="xyxy", missing_placeholder="refuse")
    row = {"image": "a", **rest}
    assert parse_row({**row, "question": "<image> What?"}, spec)["image"] == ["a"]
    with pytest.raises(SampleError) as caught:
        parse_row({**row, "question": "What?"}, spec)
    assert caught.value.reason == "image_without_placeholder"
    without = {key: value for key, value in row.items() if key != "image"}
    if name == "vqa":
        assert "image" not in parse_row({**without, "question": "What?"}, spec)


@pytest.mark.parametrize(
    "row",
    [
        {"image_1": "a", "image_2": None, "image_3": "c"},
        {"image": ["a", None, "c"]},
        {"images": ["a", {"bytes": None, "path": None}, "c", None]},
    ],
)
def test_empty_place_between_images_keeps_its_number(row):
    row = {**row, "answer": "x"}
    got, found = message({**row, "question": "Is <image 3> in <image 1>?"}, "vqa")
    assert (got["question"], found) == ("Is <|image|> in <|image|>?", ["c", "a"])
    with pytest.raises(SampleError) as caught:
        message({**row, "question": "Is <image 2> in <image 1>?"}, "vqa")
    assert caught.value.reason == "placeholder_without_image"


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"question": "In <image 2>?", "image_1": "a"}, "placeholder_without_image"),
        (
            {"question": "In <image 1>?", "image_1": "a", "image_2": "b"},
            "image_without_placeholder",
        ),
        ({"question": "In <image>?"}, "placeholder_without_image"),
        ({"question": "Which?", "image": "a", "options": ["<image 1>", "x"]}, "image_placeholder"),
    ],
)
def test_placeholder_of_a_question_without_its_image_is_a_bad_row(row, reason):
    with pytest.raises(SampleError) as caught:
        message({**row, "answer": "x"}, "vqa")
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "unit, scale",
    [("pixel", {}), ("1", {"point_scale": 1.0}), ("100", {"point_scale": 100.0})],
)
@pytest.mark.parametrize(
    "points",
    [
        *([[1, 2]], [{"x": 1, "y": 2}], {"x": [1], "y": [2]}, {"x": 1, "y": 2}, [1, 2], ((1, 2),)),
        *("[[1, 2]]", '[{"x": 1, "y": 2}]', "{'x': [1], 'y': [2]}", '{"x": 1, "y": 2}', "(1, 2)"),
    ],
)
def test_points(points, unit, scale):
    row = {"image": "a.jpg", "points": points, "label": "cup"}
    columns = {"image": "a.jpg", "x": "1", "y": "2.0", "label": "cup"}
    assert message(columns, "points", unit=unit)[0]["points"] == [[1, 2]]
    got, _ = message(row, "points", unit=unit)
    assert got == {
        "style": "pointing",
        "points": [[1, 2]],
        "label": "cup",
        "bounds": "strict",
        **scale,
    }


@pytest.mark.parametrize(
    "question, label, want",
    [
        ("<image>", "cup", {"label": "cup"}),
        ("<image>\nWhere?", None, {"question": "Where?"}),
        (
            "Where in <image> is it?",
            None,
            {"question": "Where in <|image|> is it?", "label_cased": "Where in is it?"},
        ),
        ("Where in <image>?", "cup", {"question": "Where in <|image|>?", "label": "cup"}),
    ],
)
def test_question_about_points_says_no_more_than_its_text(question, label, want):
    row = {"image": "a", "points": [[1, 2]], "question": question, "label": label}
    got, _ = message(row, "points")
    fields = ("label", "label_cased", "question")
    assert {name: got[name] for name in fields if name in got} == want


def test_placeholder_alone_is_a_question_about_the_image():
    row = {"image": "a", "question": "<image>", "answer": "x", "caption": "x"}
    assert message(row, "vqa")[0]["question"] == "<|image|>"
    assert "question" not in message(row, "captions")[0]


@pytest.mark.parametrize(
    "name, row, reason",
    [
        ("points", {"image": "a.jpg", "points": [[1, 2]], "question": "<image>"}, "row_fields"),
        ("points", {"image": "a.jpg", "points": [[1, 2], None], "label": "x"}, "row_fields"),
        (
            "points",
            {"image": "a.jpg", "points": {"x": [1], "y": [1, 2]}, "label": "x"},
            "row_fields",
        ),
        ("points", {"image": "a.jpg", "x": "one", "y": "2", "label": "x"}, "row_fields"),
        ("captions", {"image": "a.jpg", "caption": " "}, "empty_answer"),
        ("captions", {"caption": "x"}, "row_image"),
        ("captions", {"caption": "x", "image": float("nan")}, "row_image"),
        ("vqa", {"image": "a.jpg", "answer": "yes"}, "row_fields"),
        ("vqa", {"image": "a.jpg", "question": "Q?"}, "row_fields"),
        ("vqa", {"question": "Q?", "options": OPTIONS, "answer": "E"}, "row_answer"),
        ("vqa", {"question": "Q?", "options": OPTIONS, "answer": 3}, "row_answer"),
        ("vqa", {"question": "Q?", "options": OPTIONS, "answer": "AB"}, "row_answer"),
        ("vqa", {"question": "Q?", "options": OPTIONS, "answer": ")"}, "row_answer"),
        ("vqa", {"question": "Q?", "options": ["1", "3"], "answer": "1"}, "row_answer"),
        ("vqa", {"question": "Q?", "options": [2, 3, 4], "answer": 2}, "row_answer"),
        ("vqa", {"question": "Q?", "options": ["B", "A"], "answer": "A"}, "row_answer"),
        ("vqa", {"question": "Q?", "A": "x", "B": "y", "D": "z", "answer": "A"}, "row_fields"),
        ("vqa", {"question": "Q?", "options": "A. x\nB. y", "answer": "B"}, "row_fields"),
        ("vqa", {"question": "Q?", "answer": "x", "video": "a.mp4"}, "row_media"),
        ("vqa", {"question": "Q?", "options": ["x", None, "y"], "answer": "A"}, "row_fields"),
        ("vqa", {"question": "Q?", "options": [{"x": 1}, {"x": 2}], "answer": "A"}, "row_fields"),
        ("vqa", {"question": "Q?", "answers": [None]}, "row_fields"),
        ("vqa", {"question": "Q?", "answers": "[]"}, "row_fields"),
        ("captions", {"image": "a.jpg", "caption": "[]"}, "row_fields"),
        ("vqa", {"question": "Q?", "answers": {"a": 1}}, "row_fields"),
        ("points", {"image": "a.jpg", "label": "cup", "points": {"x": [1]}}, "row_fields"),
        ("points", {"image": "a.jpg", "label": "cup", "points": "1 2"}, "row_fields"),
        ("points", {"image": "a.jpg", "label": "cup"}, "row_fields"),
        ("points", {"image": "a.jpg", "points": [[1, 2]]}, "row_fields"),
    ],
)
def test_row_that_lacks_something_names_it_and_what_is_there(name, row, reason):
    with pytest.raises(SampleError) as caught:
        message(row, name)
    assert caught.value.reason == reason
    assert caught.value.facts["fields"] == sorted(row)


@pytest.mark.parametrize(
    "row, want",
    [
        ({"conversations": [{"from": "human", "value": "x"}], "image": "a"}, "llava"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "llava"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages"),
        ({"image": "a", "caption": "x"}, "captions"),
        ({"URL": "http://a/b", "url": "http://a/b", "TEXT": "x"}, "captions"),
        ({"image": "a", "question": "x", "answer": "y"}, "vqa"),
        ({"image": "a", "points": [], "label": "x"}, "points"),
        ({"messages": [{"role": "user", "content": "x"}], "chosen": "a"}, ""),
        ({"image": "a", "prompt": "x"}, "captions"),
        ({"image": "a", "prompt": "x", "response": "y"}, "messages"),
        ({"image": "a", "text": "x", "question_id": 1}, ""),
        ({"id": 1, "regions": [{"phrase": "x"}]}, ""),
        ({"12": {"imageURL": "http://a/b", "questions": ["x"], "answers": ["y"]}}, ""),
        ({"image": "a", "prompt": "x", "label": "y"}, ""),
        ({"image": "a", "text": "x", "answer": "y"}, ""),
        ({"vocab_size": 3}, ""),
    ],
)
def test_format_is_told_from_the_fields(row, want):
    guess = guess_format([row] * 20)
    assert guess.format == want
    assert guess.reason


def test_format_that_most_rows_do_not_have_is_not_taken():
    rows = [{"image": "a", "caption": "x"}] * 9 + [{"other": 1}]
    guess = guess_format(rows)
    assert guess.format == ""
    assert "9 of 10" in guess.reason


def test_format_is_told_whatever_the_columns_of_each_row_are_called():
    rows = [{"image": "a", "caption": "x"}, {"image": "a", "text": "x"}, {"url": "a", "alt": "x"}]
    assert guess_format(rows).format == "captions"


@pytest.mark.parametrize(
    "images, names",
    [
        ("a.jpg", ["a.jpg"]),
        (["a.jpg", "b.jpg"], ["a.jpg", "b.jpg"]),
        ("https://h/a.jpg?w=9&token=xyz", ["https://h/a.jpg?w=9&token=***3608bca1e44ea6c4"]),
        ("data:image/png;base64,AAAA", None),
        ({"bytes": b"GIF", "path": None}, None),
    ],
)
def test_images_are_named_for_evaluators_without_secrets(images, names):
    row = {"image": images, "caption": "A door.", "id": 7}
    want = {"id": 7} if names is None else {"id": 7, "image_names": names}
    assert parse_row(row, Spec(name="own", format="captions"))["metadata"] == want


@pytest.mark.parametrize(
    "start, end, want",
    [(1, 2.5, [1, 2.5]), ("1", "2.5", [1.0, 2.5]), ("", " ", None), ("", "3", [None, 3.0])],
)
def test_times_of_a_clip_may_be_written_as_texts(start, end, want):
    row = {"video": "a.mp4", "caption": "x", "start": start, "end": end}
    spec = Spec(name="own", format="captions", columns={"video": "video"})
    assert parse_row(row, spec).get("clip") == want
    assert parse_row({**row, "end": "late"}, spec)["clip"][1] == "late"  # refused by the job


TRAJECTORIES = [{"frame": 0, "time": 0.0, "points": [{"id": 1, "point": [3, 4]}]}]


@pytest.mark.parametrize(
    "form, row, unit, want",
    [
        (
            "points",
            {"label": "cup", "timestamps": [0.5], "points": [[[1, 2]]], "fps": 4},
            "100",
            {"style": "video_point", "timestamps": [0.5], "points": [[[1, 2]]], "label": "cup"}
            | {"fps": 4, "point_scale": 100.0},
        ),
        (
            "tracks",
            {"expression": "the cup", "frame_trajectories": TRAJECTORIES, "fps": 30}
            | {"sampling_fps": 2, "width": 640, "height": 480},
            "pixel",
            {"style": "video_point_track_per_frame", "frame_trajectories": TRAJECTORIES}
            | {"label": "the cup", "sampling_fps": 2, "point_size": [640, 480]},
        ),
    ],
)
def test_points_and_tracks_of_videos(form, row, unit, want):
    spec = Spec(name="own", format=form, unit=unit, columns={"video": "video"})
    example = parse_row({"video": "a.mp4", **row}, spec)
    assert example["video"] == "a.mp4"
    assert example["message_list"] == [want]


@pytest.mark.parametrize("wrong", [{"label": None}, {"frame_trajectories": "x"}])
def test_tracks_without_a_label_or_a_list_are_refused(wrong):
    spec = Spec(name="own", format="tracks", columns={"video": "video"})
    row = {"video": "a.mp4", "label": "cup", "frame_trajectories": TRAJECTORIES, **wrong}
    with pytest.raises(SampleError) as caught:
        parse_row(row, spec)
    assert caught.value.reason == "row_fields"
