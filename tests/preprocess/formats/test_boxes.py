"""Boxes and points: what their numbers may be, and what says that the unit is another one."""

import json

import pytest

from preprocess.datasets import dataset_class
from preprocess.formats import Spec, parse_row
from preprocess.text import DataFormatter, TextPolicy, chat_frame
from shardspec.errors import ConfigError, SampleError, SourceError

FRAME = chat_frame("none", None)
POLICY = TextPolicy(system_prompt="none", num_variants=1, message_format="none")


def spec(form="xyxy", **more):
    return Spec(name="own", format="boxes", box=form, **more)


def answer(row, made, *, size=(200, 100)):
    example = parse_row({"image": "a.png", **row}, made)
    formatter = DataFormatter(policy=POLICY, frame=FRAME)
    (branch,) = formatter(example, key="k", image_sizes=[size])
    return branch.turns[0][0].prompt, branch.turns[0][0].response.strip()


WANT = ("cup", '[{"bbox_2d": [250, 400, 500, 800], "label": "cup"}]')
FORMS = {
    "pixel": ([50, 40, 100, 80], [50, 40, 50, 40], [75, 60, 50, 40]),
    "1": ([0.25, 0.4, 0.5, 0.8], [0.25, 0.4, 0.25, 0.4], [0.375, 0.6, 0.25, 0.4]),
    "100": ([25, 40, 50, 80], [25, 40, 25, 40], [37.5, 60, 25, 40]),
    "1000": ([250, 400, 500, 800], [250, 400, 250, 400], [375, 600, 250, 400]),
}


def test_labels_in_a_cell_of_a_table_are_one_for_each_box():
    row = {"boxes": "[[50, 40, 100, 80], [0, 0, 20, 10]]", "label": "['cup', 'hat']"}
    _, told = answer(row, spec())
    assert [each["label"] for each in json.loads(told)] == ["cup", "hat"]


def test_object_without_a_label_beside_others_is_refused_and_not_the_labels_dropped():
    objects = [{"bbox": [50, 40, 100, 80], "category": "cup"}, {"bbox": [0, 0, 20, 10]}]
    row = {"question": "Where?", "objects": objects}
    with pytest.raises(SampleError) as caught:
        answer(row, spec())
    assert (caught.value.reason, caught.value.facts["name"]) == ("message_fields", "label")
    del objects[0]["category"]
    _, told = answer(row, spec())
    assert ["label" in each for each in json.loads(told)] == [False, False]


@pytest.mark.parametrize("unit", FORMS)
@pytest.mark.parametrize("i, form", list(enumerate(["xyxy", "xywh", "cxcywh"])))
def test_a_box_reads_the_same_in_every_form_and_unit(unit, i, form):
    made = spec(form, unit=unit)
    box = FORMS[unit][i]
    assert answer({"label": "cup", "boxes": [box]}, made) == WANT
    assert answer({"label": "cup", "bbox": box}, made) == WANT
    assert answer({"label": ["cup"], "boxes": json.dumps([box])}, made) == WANT
    fields = {"xyxy": "x1 y1 x2 y2", "xywh": "x y w h", "cxcywh": "cx cy w h"}[form].split()
    record = dict(zip(fields, box, strict=True))
    lists = {name: [value] for name, value in record.items()}
    for boxes in (box, [record], record, lists):
        assert answer({"label": "cup", "boxes": boxes}, made) == WANT
        assert answer({"label": "cup", "boxes": json.dumps(boxes)}, made) == WANT
        assert answer({"label": "cup", "boxes": str(boxes)}, made) == WANT
    assert answer({"label": "cup", **{k: str(v) for k, v in record.items()}}, made) == WANT
    objects = [{"bbox": [box], "categories": ["cup"]}, [{"bbox_2d": box, "label": "cup"}]]
    for each in [*objects, [{**record, "category": "cup"}]]:
        assert answer({"objects": each}, made) == WANT
        assert answer({"boxes": each}, made) == WANT
        assert answer({"boxes": json.dumps(each)}, made) == WANT


@pytest.mark.parametrize(
    "notation, want",
    [
        (
            "json",
            '[{"bbox_2d": [0, 0, 500, 1000], "label": "Öl"}, '
            '{"bbox_2d": [1, 10, 6, 20], "label": "cup"}]',
        ),
        (
            "ref",
            "<ref>Öl</ref><box>[[0, 0, 500, 1000]]</box><ref>cup</ref><box>[[1, 10, 6, 20]]</box>",
        ),
        ("brackets", "Öl: [0.00, 0.00, 0.50, 1.00]\ncup: [0.00, 0.01, 0.01, 0.02]"),
    ],
)
def test_notations_say_which_box_is_which(notation, want):
    row = {"label": ["Öl", "cup"], "boxes": [[0, 0, 100, 100], [0.2, 1, 1.2, 2]]}
    assert answer(row, spec(notation=notation))[1] == want


def test_no_boxes_are_an_answer_and_a_question_needs_no_label():
    assert answer({"label": "cup", "boxes": []}, spec()) == ("cup", "There are none.")
    row = {"question": "Where?", "boxes": [[0, 0, 100, 100]]}
    assert answer(row, spec()) == ("Where?", '[{"bbox_2d": [0, 0, 500, 1000]}]')


@pytest.mark.parametrize(
    "box, made, reason",
    [
        ([0.2, 0.3, 0.5, 0.9], spec(), "coordinates_unit"),
        ([50, 40, 300, 80], spec(), "coordinates_unit"),
        ([-5, 40, 100, 80], spec(), "coordinates_unit"),
        ([25, 40, 50, 80], spec(unit="1"), "coordinates_unit"),
        ([250, 400, 500, 800], spec(unit="100"), "coordinates_unit"),
        ([250, 400, 500, 1800], spec(unit="1000"), "coordinates_unit"),
        ([100, 80, 50, 40], spec(), "box_shape"),
        ([50, 40, 0, 40], spec("xywh"), "box_shape"),
        ([50, 40, 30], spec(), "box_shape"),
        ([50, 40, 30, "a"], spec(), "box_shape"),
        ([50, 40, 30, float("nan")], spec(), "box_shape"),
        ({"x": 1, "y": 2, "w": 3, "h": 4}, spec(), "box_shape"),
        ({"x1": [1], "y1": [2], "x2": [3]}, spec(), "box_shape"),
        ("10 20 30 40", spec(), "box_shape"),
    ],
)
def test_a_box_that_cannot_be_in_its_unit_is_a_counted_row(box, made, reason):
    with pytest.raises(SampleError) as caught:
        answer({"label": "cup", "boxes": [box]}, made)
    assert caught.value.reason == reason


def test_rounding_may_put_a_corner_on_the_border():
    boxes = [[-0.4, 0, 200.6, 100.2]]
    assert "[0, 0, 1000, 1000]" in answer({"label": "a", "boxes": boxes}, spec())[1]


@pytest.mark.parametrize(
    "points, unit",
    [
        ([[0.4, 0.5]], "pixel"),
        ([[201.5, 5]], "pixel"),
        ([[20, 5]], "1"),
        ([[20, 101]], "100"),
        ([[20, 1010]], "1000"),
        ([[20, -10]], "1000"),
    ],
)
def test_a_point_that_cannot_be_in_its_unit_is_a_counted_row(points, unit):
    made = Spec(name="own", format="points", unit=unit)
    with pytest.raises(SampleError) as caught:
        answer({"label": "cup", "points": points}, made)
    assert caught.value.reason == "coordinates_unit"


@pytest.mark.parametrize("unit", ["100", "1000"])
@pytest.mark.parametrize("kind", ["points", "boxes"])
@pytest.mark.parametrize("full", [1, 100])
def test_a_source_in_a_smaller_unit_is_refused_with_the_likely_one(unit, kind, full, tmp_path):
    values = [[0.013 * full * (i + 1), 0.5 * full] for i in range(12)]
    rows = [{"image": "a.png", "label": "a", "points": [v], "boxes": [[0, 0, *v]]} for v in values]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.toml").write_text(
        f'format = "{kind}"\nsource = "a.jsonl"\nbox = "xyxy"\nunit = "{unit}"\n'
    )
    kind = dataset_class(str(tmp_path / "a.toml"))
    if int(unit) == full:
        assert len(kind()) == 12
        return
    with pytest.raises(SourceError) as caught:
        kind()
    assert caught.value.reason == "source_unit"
    assert f"unit = '{full}'" in str(caught.value)


def test_boxes_whose_numbers_nobody_explains_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"image": "a.png", "label": "a", "bbox": [1, 2, 3, 4]}')
    with pytest.raises(SourceError) as caught:
        dataset_class(str(tmp_path / "a.jsonl"))
    assert "`box` and `unit`" in str(caught.value)
    (tmp_path / "a.toml").write_text('format = "boxes"\nsource = "a.jsonl"\n')
    with pytest.raises(ConfigError) as caught:
        dataset_class(str(tmp_path / "a.toml"))
    assert "xyxy, xywh, cxcywh" in str(caught.value)
