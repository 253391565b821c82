"""Numbers of classes become the names that the schema of their file has for them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preprocess.formats import Spec, open_records, parse_row
from shardspec.errors import SampleError

CLASSES = {"names": ["cup", "pan"], "_type": "ClassLabel"}
FLOATS = {"feature": {"dtype": "float32", "_type": "Value"}, "length": 4, "_type": "List"}
BOX = [1.0, 2.0, 3.0, 4.0]

COLUMNS = {
    "one": (CLASSES, 1, "pan"),
    "none": (CLASSES, None, None),
    "no label": (CLASSES, -1, None),
    "too many": (CLASSES, 2, None),
    "list": ({"feature": CLASSES, "_type": "List"}, [0, 1, None], ["cup", "pan", None]),
    "old list": ([CLASSES], [1], ["pan"]),
    "record": (
        {"category": CLASSES, "feature": {"dtype": "int64", "_type": "Value"}},
        {"category": 0, "feature": 1},
        {"category": "cup", "feature": 1},
    ),
    "record of lists": (
        {
            "bbox": {"feature": FLOATS, "_type": "List"},
            "category": {"feature": CLASSES, "_type": "List"},
        },
        {"bbox": [BOX], "category": [1]},
        {"bbox": [BOX], "category": ["pan"]},
    ),
    "old record of lists": (
        {"feature": {"bbox": FLOATS, "category": CLASSES}, "_type": "Sequence"},
        {"bbox": [BOX], "category": [1]},
        {"bbox": [BOX], "category": ["pan"]},
    ),
    "list of records": (
        {"feature": {"bbox": FLOATS, "category": CLASSES}, "_type": "List"},
        [{"bbox": BOX, "category": 0}],
        [{"bbox": BOX, "category": "cup"}],
    ),
}


def write(path, features, values):
    described = json.dumps({"info": {"features": features}})
    table = pa.table({name: [value] for name, value in values.items()})
    table = table.replace_schema_metadata({"huggingface": described})
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
            out.write_table(table)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_numbers_of_classes_have_their_names(name, tmp_path):
    values = {column: value for column, (_, value, _) in COLUMNS.items()}
    values |= {"plain": 1, "not there": 1}
    features = {column: feature for column, (feature, _, _) in COLUMNS.items()}
    features |= {"plain": {"dtype": "int64", "_type": "Value"}}
    write(tmp_path / name, features, values)
    (row,) = open_records(str(tmp_path / name))
    want = {column: wanted for column, (_, _, wanted) in COLUMNS.items()}
    assert row == {**want, "plain": 1, "not there": 1}


@pytest.mark.parametrize("described", [b"", b"{}", b"[1]", b'{"info": {"features": [1]}}'])
def test_other_metadata_is_left_alone(described, tmp_path):
    table = pa.table({"a": [1]}).replace_schema_metadata({"huggingface": described})
    pq.write_table(table, tmp_path / "a.parquet")
    assert list(open_records(str(tmp_path / "a.parquet"))) == [{"a": 1}]


@pytest.mark.parametrize(
    "names, options, want",
    [
        (["yes", "no"], None, "no"),
        (["A", "B"], ["x", "y"], 1),
        (["1", "2"], ["x", "y"], 1),  # the second one, not the third
        (["yes", "no"], ["no", "yes"], 0),
    ],
)
def test_answer_that_is_a_class_is_its_name_or_the_option_of_its_number(
    names, options, want, tmp_path
):
    row = {"image": "a.png", "question": "Q?", "answer": 1}
    row |= {"options": options} if options else {}
    write(tmp_path / "a.parquet", {"answer": {"names": names, "_type": "ClassLabel"}}, row)
    (read,) = open_records(str(tmp_path / "a.parquet"))
    (message,) = parse_row(read, Spec(name="own", format="vqa"))["message_list"]
    assert message["answer_idx" if options else "answer"] == want


def test_row_without_a_class_has_no_answer(tmp_path):
    row = {"image": "a.png", "question": "Q?", "answer": -1}
    write(tmp_path / "a.parquet", {"answer": CLASSES}, row)
    (read,) = open_records(str(tmp_path / "a.parquet"))
    with pytest.raises(SampleError) as caught:
        parse_row(read, Spec(name="own", format="vqa"))
    assert caught.value.reason == "row_fields"
