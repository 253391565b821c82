"""Rows of files of every kind, and files that are broken."""

import contextlib
import gzip
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preprocess.formats import (
    BROKEN,
    Spec,
    copies,
    json_files,
    open_records,
    parse_row,
    visible_names,
)
from shardspec.errors import SampleError, SourceError
from tests.examples import examples

ROWS = [{"id": str(i), "text": f"näh {i} \U0001f600", "image": f"{i}.jpg"} for i in range(23)]


def write_tar(path):
    with tarfile.open(path, "w") as archive:
        for row in ROWS:
            members = {"jpg": b"\xff\xd8" + row["id"].encode(), "txt": row["text"].encode()}
            members["json"] = json.dumps({"label": row["id"]}).encode()
            for suffix, payload in members.items():
                info = tarfile.TarInfo(f"shard/{row['id']}.{suffix}")
                info.size = len(payload)
                archive.addfile(info, io.BytesIO(payload))


def lines():
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def csv(delimiter):
    stream = io.BytesIO()
    options = pyarrow.csv.WriteOptions(delimiter=delimiter)
    pyarrow.csv.write_csv(pa.Table.from_pylist(ROWS), stream, options)
    return stream.getvalue()


def zstd(payload):
    return pa.compress(payload, "zstd", asbytes=True)


WRITERS = {
    "rows.json": lambda path: path.write_text(json.dumps(ROWS, ensure_ascii=False)),
    "pretty.json": lambda path: path.write_text(json.dumps(ROWS, indent=4)),
    "bom.json": lambda path: path.write_text("\ufeff" + json.dumps(ROWS)),
    "wrapped.json": lambda path: path.write_text(json.dumps({"data": ROWS})),
    "lines.json": lambda path: path.write_bytes(lines()),
    "rows.jsonl": lambda path: path.write_bytes(lines()),
    "blank.jsonl": lambda path: path.write_bytes(lines().replace(b"\n", b"\r\n\n")),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines())),
    "rows.jsonl.zst": lambda path: path.write_bytes(zstd(lines())),
    "rows.csv": lambda path: path.write_bytes(csv(",")),
    "rows.tsv": lambda path: path.write_bytes(csv("\t")),
    "rows.csv.gz": lambda path: path.write_bytes(gzip.compress(csv(","))),
    "rows.parquet": lambda path: pa.parquet.write_table(
        pa.Table.from_pylist(ROWS), path, row_group_size=5
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_rows_are_read_in_any_order_and_in_another_process(name, tmp_path):
    WRITERS[name](tmp_path / name)
    records = open_records(str(tmp_path / name))
    assert list(records) == ROWS
    sent = pickle.loads(pickle.dumps(records))
    for i in np.random.RandomState(0).permutation(len(ROWS)):
        assert records[int(i)] == sent[int(i)] == ROWS[i]


def test_tar_has_a_row_per_sample_with_members_as_columns(tmp_path):
    write_tar(tmp_path / "a.tar")
    records = open_records(str(tmp_path / "a.tar"))
    assert len(records) == 23
    assert records[7] == {
        "label": "7",
        "image": b"\xff\xd87",
        "text": ROWS[7]["text"],
        "id": "shard/7",
    }


def test_folder_of_images_has_a_row_per_image_with_its_side_files(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.JPG", "a.png", "deep/c.webp"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "a.txt").write_text("A door.")
    (tmp_path / "deep" / "c.json").write_text('{"caption": "A window."}')
    assert list(open_records(str(tmp_path))) == [
        {"text": "A door.", "image": "a.png", "id": "a.png"},
        {"image": "b.JPG", "id": "b.JPG"},
        {"caption": "A window.", "image": "deep/c.webp", "id": "deep/c.webp"},
    ]


def test_side_file_that_cannot_be_read_is_one_bad_row(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "a.txt").symlink_to("a.txt")
    (row,) = open_records(str(tmp_path))
    assert row[BROKEN].reason == "row_side"
    assert row[BROKEN].where == str(tmp_path / "a.txt")


def test_coco_captions_are_joined_to_their_images(tmp_path):
    document = {
        "images": [{"id": 9, "file_name": "9.jpg"}, {"id": 10, "file_name": "10.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 9, "caption": "Soup."},
            {"id": 2, "image_id": 9, "caption": "Lunch."},
        ],
    }
    (tmp_path / "captions.json").write_text(json.dumps(document))
    assert list(open_records(str(tmp_path / "captions.json"))) == [
        {"image": "9.jpg", "image_id": 9, "caption": ["Soup.", "Lunch."]},
        {"image": "10.jpg", "image_id": 10, "caption": []},
    ]


def test_vqa_questions_are_joined_to_the_annotations_beside_them(tmp_path):
    questions = {
        "data_subtype": "train2014",
        "questions": [{"image_id": 9, "question": "How many?", "question_id": 90}],
    }
    answers = {"annotations": [{"question_id": 90, "image_id": 9, "answers": [{"answer": "2"}]}]}
    (tmp_path / "v2_questions.json").write_text(json.dumps(questions))
    with pytest.raises(SourceError) as caught:
        open_records(str(tmp_path / "v2_questions.json"))
    assert caught.value.reason == "source_missing"
    (tmp_path / "v2_annotations.json").write_text(json.dumps(answers))
    (row,) = open_records(str(tmp_path / "v2_questions.json"))
    assert row["image"] == "train2014/COCO_train2014_000000000009.jpg"
    assert (row["question"], row["answers"]) == ("How many?", [{"answer": "2"}])


def test_questions_that_hold_their_answers_need_no_annotations(tmp_path):
    question = {"image_filename": "CLEVR_0.png", "question": "How many?", "answer": "3"}
    document = {"info": {"split": "val"}, "questions": [question]}
    (tmp_path / "CLEVR_val_questions.json").write_text(json.dumps(document))
    (row,) = open_records(str(tmp_path / "CLEVR_val_questions.json"))
    example = parse_row(row, Spec(name="own", format="vqa"))
    assert example["image"] == ["CLEVR_0.png"]
    assert example["message_list"][0]["answer"] == "3"


@pytest.mark.parametrize(
    "line", [b"{", b"3", b"[]", b'{"a": "\xff"}', b'{"a": ' + b"[" * 100_000, b"{'a': 1}"]
)
def test_a_broken_line_is_one_bad_row_with_its_number(line, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"id": 1}\n' + line + b'\n{"id": 3}\n')
    rows = list(open_records(str(tmp_path / "a.jsonl")))
    assert [rows[0], rows[2]] == [{"id": 1}, {"id": 3}]
    assert rows[1][BROKEN].reason == ("row_encoding" if b"\xff" in line else "row_json")
    assert rows[1][BROKEN].where.endswith("a.jsonl row 2")


@pytest.mark.parametrize(
    "payload, line",
    [
        (b'[{"a": 1}\n, {"a": }]', 2),
        (b'[{"a": 1},\n{"a": 2}', 2),
        (b'{"a": 1', 1),
        (b"", 1),
        (b'[{"a": 1} oops]', 1),
    ],
)
def test_a_file_that_is_not_json_names_the_line(payload, line, tmp_path):
    (tmp_path / "a.json").write_bytes(payload)
    with pytest.raises(SourceError) as caught:
        list(open_records(str(tmp_path / "a.json")))
    assert caught.value.reason == "source_json"
    assert caught.value.facts["line"] == line


@pytest.mark.parametrize(
    "name, payload, reason",
    [
        ("a.txt", b"hello", "source_format"),
        ("a.parquet", b"PAR1 and no more", "source_unreadable"),
        ("a.arrow", b"ARROW1", "source_unreadable"),
        ("a.tar", b"x" * 2000, "source_unreadable"),
        ("a.jsonl.gz", b"no gzip", "source_unreadable"),
        ("a.jsonl.zst", b"no zstd", "source_unreadable"),
        ("a.json", b"3", "source_format"),
        ("cut.jsonl.gz", gzip.compress(bytes(range(256)) * 9, mtime=0)[:200], "source_unreadable"),
        (
            "flipped.jsonl.gz",
            gzip.compress(b"x" * 99, mtime=0)[:10] + b"\xff" * 30,
            "source_unreadable",
        ),
        ("twice.csv", b"image,text,text\na,b,c\n", "source_unreadable"),
        ("empty.csv", b"", "source_unreadable"),
        ("ragged.csv", b"image,text\na,b,c\n", "source_unreadable"),
        ("coco.json", b'{"images": ["a"], "annotations": ["b"]}', "source_unreadable"),
        ("coco.json", b'{"images": [{}], "annotations": [{"caption": "b"}]}', "source_unreadable"),
        ("vqa.json", b'{"questions": ["a"], "annotations": []}', "source_unreadable"),
        ("vqa.json", b'{"questions": [{"a": 1}], "annotations": []}', "source_unreadable"),
        ("vqa.json", b'{"questions": [], "annotations": 3}', "source_missing"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name, payload, reason, tmp_path):
    (tmp_path / name).write_bytes(payload)
    with pytest.raises(SourceError) as caught:
        open_records(str(tmp_path / name))
    assert caught.value.reason == reason
    assert caught.value.where == str(tmp_path / name)


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("answers", ["v2_OpenEnded_val_annotations", "v2_val_annotations"])
def test_annotations_are_found_beside_the_questions(answers, packed, tmp_path):
    documents = {
        "v2_OpenEnded_val_questions": {"questions": [{"image_id": 9, "question_id": 90}]},
        answers: {"annotations": [{"question_id": 90, "answers": ["2"]}]},
    }
    for name, document in documents.items():
        payload = json.dumps(document).encode()
        path = tmp_path / f"{name}.json{packed}"
        path.write_bytes(gzip.compress(payload) if packed else payload)
    (row,) = open_records(str(tmp_path / f"v2_OpenEnded_val_questions.json{packed}"))
    assert row["answers"] == ["2"]


def test_damaged_parquet_is_named_and_a_text_that_is_not_utf8_is_one_bad_row(tmp_path):
    table = pa.table({"text": [f"name {i} " * 9 for i in range(8)]})
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(table, path, compression="none", use_dictionary=False)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"name 3", b"na\xffe 3"))
    rows = list(open_records(str(path)))
    assert [BROKEN in row for row in rows] == [i == 3 for i in range(8)]
    assert rows[3][BROKEN].where == f"{path} row 4"
    path.write_bytes(whole[:4] + bytes(40) + whole[44:])
    with pytest.raises(SourceError) as caught:
        list(open_records(str(path)))
    assert (caught.value.reason, caught.value.where) == ("source_unreadable", str(path))


def test_values_of_a_wrapped_list_that_are_not_rows_are_bad_rows(tmp_path):
    (tmp_path / "a.json").write_text('{"data": [{"a": 1}, 3, "x"]}')
    rows = list(open_records(str(tmp_path / "a.json")))
    assert rows[0] == {"a": 1}
    assert [row[BROKEN].reason for row in rows[1:]] == ["row_json", "row_json"]


@pytest.mark.parametrize(
    "name, text, want",
    [
        ("a.csv", '\ufeffimage, caption\r\n1,"a, ""b""\r\nc"\r\n2,NA\r\n', ['a, "b"\r\nc', "NA"]),
        ("a.tsv", 'image\tcaption\n1\t"open quote\n2\tan "inner" one\n3\tc\n', None),
        ("a.tsv", 'image\tcaption\n1\t"a, ""b"""\n2\tc\n', ['a, "b"', "c"]),
        ("a.tsv", 'image\tcaption\n1\t"one\n2\ttwo"\n', ['"one', 'two"']),
        ("a.csv", "image| caption\n1| Two men. \n2| A, dog\n", ["Two men. ", "A, dog"]),
        ("a.csv", "image,caption\n1, x\n", [" x"]),
        ("a.csv", f"image,caption\n1,{'x y ' * 2**19}\n", ["x y " * 2**19]),
    ],
)
def test_tables_keep_their_texts(name, text, want, tmp_path):
    (tmp_path / name).write_text(text, newline="")
    want = want or ['"open quote', 'an "inner" one', "c"]
    rows = list(open_records(str(tmp_path / name)))
    assert [row["caption"] for row in rows] == want
    assert [row["image"] for row in rows] == [str(i + 1) for i in range(len(want))]


def test_hidden_files_of_a_folder_are_not_looked_at(tmp_path):
    for name in ("a.png", "._a.png", ".ipynb_checkpoints/a.png", "__MACOSX/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "b.png").mkdir()
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfA door.")
    (row,) = open_records(str(tmp_path))
    assert row == {"text": "A door.", "image": "a.png", "id": "a.png"}


@pytest.mark.parametrize(
    "members",
    [
        {"jpg": b"a", "JPG": b"b", "txt": b"A."},
        {"jpg": b"a", "txt": b"A.", "TXT": b"B."},
        {"jpg": b"a", "question.txt": b"A?", "answer.txt": b"B."},
        {"jpg": b"a", "json": b"{}", "Json": b"{}"},
    ],
)
def test_sample_of_a_tar_with_two_members_for_one_column_is_one_bad_row(members, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for key, found in (("1", members), ("2", {"jpg": b"c", "txt": b"A.\n", "caption": b"A."})):
            for suffix, payload in found.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(payload)
                archive.addfile(info, io.BytesIO(payload))
    bad, good = open_records(str(tmp_path / "a.tar"))
    assert bad[BROKEN].reason == "row_members"
    assert good == {"image": b"c", "text": "A.", "id": "2"}


def test_image_with_two_side_files_of_other_texts_is_one_bad_row(tmp_path):
    for name, texts in (("a", ("A.", "B.")), ("b", ("A.\r\n", "A.")), ("c", ("A.", "A.\n"))):
        (tmp_path / f"{name}.png").write_bytes(b"x")
        for suffix, text in zip(("txt", "caption"), texts, strict=True):
            (tmp_path / f"{name}.{suffix}").write_text(text, newline="")
    bad, *good = open_records(str(tmp_path))
    assert bad[BROKEN].reason == "row_members"
    assert good == [
        {"text": "A.", "image": "b.png", "id": "b.png"},
        {"text": "A.\n", "image": "c.png", "id": "c.png"},
    ]


def test_text_of_a_tar_that_is_not_utf8_is_one_bad_row(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, payload in (("0.txt", b"\xef\xbb\xbfgood"), ("1.txt", b"caf\xe9")):
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
    good, bad = open_records(str(tmp_path / "a.tar"))
    assert good == {"text": "good", "id": "0"}
    assert bad[BROKEN].reason == "row_encoding"
    assert [row["text"] for row in open_records(str(tmp_path / "a.tar"), "cp1252")][1] == "café"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet", "a.tar", "a.arrow"])
def test_file_that_git_lfs_has_not_downloaded_says_so(name, tmp_path):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    with pytest.raises(SourceError) as caught:
        open_records(str(tmp_path / name))
    assert caught.value.reason == "source_pointer"


def test_rows_of_packs_and_of_several_lines_are_rows(tmp_path):
    rows = [{"id": i, "text": "[{\n}]"} for i in range(4)]
    (tmp_path / "a.json").write_text(json.dumps([[rows[0], rows[1]], [], rows[2], [rows[3]]]))
    assert list(open_records(str(tmp_path / "a.json"))) == rows
    (tmp_path / "a.json").write_text("\n".join(json.dumps(row, indent=1) for row in rows))
    assert list(open_records(str(tmp_path / "a.json"))) == rows
    (tmp_path / "a.json").write_text('{\n"a": 1}\n{\n"a" 2}')
    with pytest.raises(SourceError) as caught:
        open_records(str(tmp_path / "a.json"))
    assert (caught.value.facts["line"], caught.value.facts["column"]) == (4, 5)


ENCODED = {
    "a.csv": 'image,caption\n1.png,"Ein\nTor"\n2.png,Größe\n',
    "a.tsv": "image\tcaption\n1.png\tEin Tor\n2.png\tGröße\n",
    "a.jsonl": '{"caption": "Ein Tor"}\n{"caption": "Größe"}\n',
    "a.json": '[{"caption": "Ein Tor"},\n {"caption": "Größe"}]',
}


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "cp437", "utf-16-be", "utf-8"])
def test_texts_in_another_encoding_are_read_by_its_name(name, encoding, tmp_path):
    (tmp_path / name).write_text(ENCODED[name], encoding=encoding, newline="")
    rows = open_records(str(tmp_path / name), encoding)
    assert [row["caption"] for row in rows][1] == "Größe"


@pytest.mark.parametrize("name", ENCODED)
def test_text_in_another_encoding_is_named_with_its_place_and_the_remedy(name, tmp_path):
    (tmp_path / name).write_text(ENCODED[name], encoding="latin-1", newline="")
    if ".json" in name:
        good, bad = open_records(str(tmp_path / name))
        assert good == {"caption": "Ein Tor"}
        error = bad[BROKEN]
        assert (error.reason, error.where) == ("row_encoding", f"{tmp_path / name} row 2")
        assert "0xf6" in str(error)
    else:
        with pytest.raises(SourceError) as caught:
            open_records(str(tmp_path / name))
        error, whole = caught.value, (tmp_path / name).read_bytes()
        assert (error.reason, error.where) == ("source_encoding", str(tmp_path / name))
        at = whole.index("ö".encode("latin-1"))
        line = whole[:at].count(b"\n") + 1
        want = {"encoding": "utf-8", "byte": "0xf6", "line": line, "at": at}
        assert {name: error.facts[name] for name in want} == want
    assert "encoding = " in error.fix


def test_text_that_is_not_in_the_encoding_of_the_spec_is_named(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"image,caption\n1.png,\x81\n")
    with pytest.raises(SourceError) as caught:
        open_records(str(tmp_path / "a.csv"), "cp1252")
    assert (caught.value.reason, caught.value.facts["line"]) == ("source_encoding", 2)


def test_column_in_another_encoding_and_side_files_of_one(tmp_path):
    (tmp_path / "a.csv").write_bytes("Größe,caption\n1,x\n".encode("cp1252"))
    with pytest.raises(SourceError) as caught:
        open_records(str(tmp_path / "a.csv"))
    assert caught.value.reason == "source_encoding"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"x")
    (tmp_path / "photos" / "a.txt").write_bytes("Größe\r\n".encode("cp1252"))
    (row,) = open_records(str(tmp_path / "photos"), "cp1252")
    assert row["text"] == "Größe\n"
    (row,) = open_records(str(tmp_path / "photos"))
    assert row[BROKEN].reason == "row_encoding"


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("name, by", [("a.csv", ","), ("a.tsv", "\t"), ("a.csv", ";")])
def test_row_with_another_number_of_values_is_one_bad_row(name, by, place, tmp_path):
    lines = [f"{i}.png{by}text {i}" for i in range(3)]
    lines[place:place] = [by.join("abc"), "", "alone"]
    (tmp_path / name).write_text("\n".join([f"image{by}caption", *lines]))
    rows = list(open_records(str(tmp_path / name)))
    assert [BROKEN in row for row in rows] == [place <= i < place + 2 for i in range(5)]
    bad = [row[BROKEN] for row in rows if BROKEN in row]
    assert [each.reason for each in bad] == ["row_columns"] * 2
    assert [each.facts["got"] for each in bad] == [3, 1]
    assert bad[1].where == f"{tmp_path / name} row {place + 2}"
    assert [row["caption"] for row in rows if BROKEN not in row] == [f"text {i}" for i in range(3)]


def test_ragged_rows_keep_their_numbers_over_blocks_and_quotes(tmp_path, monkeypatch):
    monkeypatch.setattr("preprocess.formats.records._CSV_BLOCKS", (400, 2**20))
    lines = [f'{i},"a\n{i}"' if i % 10 else f"{i}" for i in range(200)]
    (tmp_path / "a.csv").write_text("\n".join(["image,caption", *lines]))
    rows = open_records(str(tmp_path / "a.csv"))
    assert [BROKEN in row for row in rows] == [i % 10 == 0 for i in range(200)]
    assert rows[101]["caption"] == "a\n101"
    assert len(pickle.loads(pickle.dumps(rows))) == 200


@pytest.mark.parametrize(
    "rows, line",
    [
        ('0.png,a\n1.png,"b\n2.png,c\n', 3),
        ('0.png,"a\n1.png,b\n2.png,"c"\n', 2),
        ('0.png,"a\nb"\n1.png,"c" d\n', 4),
    ],
)
def test_quote_that_takes_other_rows_into_its_value_is_refused(rows, line, tmp_path):
    (tmp_path / "a.csv").write_text("image,caption\n" + rows)
    with pytest.raises(SourceError) as caught:
        open_records(str(tmp_path / "a.csv"))
    assert (caught.value.reason, caught.value.facts["line"]) == ("source_quotes", line)


def test_quote_that_takes_other_rows_of_tabs_into_its_value_is_a_character(tmp_path):
    (tmp_path / "a.tsv").write_text('image\tcaption\n0.png\t"a\n1.png\tb\n2.png\t"c"\n')
    assert [row["caption"] for row in open_records(str(tmp_path / "a.tsv"))] == ['"a', "b", '"c"']


def test_file_of_which_no_row_fits_its_header_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("image,caption\na\nb\n")
    with pytest.raises(SourceError) as caught:
        open_records(str(tmp_path / "a.csv"))
    assert "row 1 has 1 values, the header has 2" in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    for name in ("a.jsonl", "a.json.gz", "a.parquet", "a.tar"):
        with pytest.raises(SourceError) as caught:
            open_records(str(tmp_path / name))
        assert caught.value.reason == "source_missing"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@given(
    rows=st.lists(st.dictionaries(st.text(max_size=5), json_values, max_size=3), max_size=6),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    chunk=st.integers(1, 40),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_offsets_of_an_array_are_right_wherever_chunks_end(
    rows, indent, ascii_only, chunk, tmp_path, monkeypatch
):
    monkeypatch.setattr(json_files, "CHUNK_BYTES", chunk)
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    (tmp_path / "a.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    assert list(open_records(str(tmp_path / "a.json"))) == rows


_ids = st.integers(-2, 3) | st.sampled_from(["2", 2.0, "ü", "COCO_9"])
_texts = st.text(max_size=4)


def _vqa(questions, answers):
    """What VQA's files mean, with all of them in memory."""
    by_id = {each["question_id"]: each for each in answers}
    return [
        {**each, **by_id.get(each["question_id"], {}), "image": f"v/COCO_v_{i:012d}.jpg"}
        for each in questions
        for i in [each["image_id"]]
    ]


def _coco(images, annotations):
    return [
        {
            "image": each["file_name"],
            "image_id": each["id"],
            "caption": [a["caption"] for a in annotations if a["image_id"] == each["id"]],
        }
        for each in images
    ]


def _gqa(questions):
    return [
        {**each, "question_id": name, "image": f"{each['imageId']}.jpg"}
        for name, each in questions.items()
    ]


@given(
    questions=st.lists(
        st.fixed_dictionaries(
            {"question_id": _ids, "image_id": st.integers(0, 9), "question": _texts}
        ),
        max_size=5,
    ),
    answers=st.lists(st.fixed_dictionaries({"question_id": _ids, "answers": _texts}), max_size=5),
    images=st.lists(st.fixed_dictionaries({"id": _ids, "file_name": _texts}), max_size=4),
    captions=st.lists(st.fixed_dictionaries({"image_id": _ids, "caption": _texts}), max_size=6),
    members=st.dictionaries(
        _texts, st.fixed_dictionaries({"imageId": _texts, "answer": json_values}), min_size=1
    ),
    ascii_only=st.booleans(),
    chunk=st.integers(1, 60),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
def test_files_whose_rows_are_joined_are_read_as_if_they_were_in_memory(
    questions, answers, images, captions, members, ascii_only, chunk, tmp_path, monkeypatch
):
    monkeypatch.setattr(json_files, "CHUNK_BYTES", chunk)
    info = {"info": {"year": 2017}}
    documents = {
        "questions": {**info, "data_subtype": "v", "questions": questions},
        "annotations": {**info, "annotations": answers},
        "coco": {**info, "images": images, "annotations": captions},
        "gqa": members,
    }
    for name, document in documents.items():
        escaped = ascii_only != (name == "annotations")  # two files, of two writers
        text = json.dumps(document, ensure_ascii=escaped, indent=chunk % 2 or None)
        (tmp_path / f"{name}.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    found = {name: list(open_records(str(tmp_path / f"{name}.json"))) for name in documents}
    assert found["questions"] == _vqa(questions, answers)
    assert found["coco"] == _coco(images, captions)
    assert found["gqa"] == _gqa(members)


def test_a_packed_file_is_unpacked_once_until_it_changes(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(lines()))
    unpacked = []
    original = copies._unpacked
    monkeypatch.setattr(copies, "_unpacked", lambda *a: unpacked.append(a) or original(*a))
    for _ in range(3):
        assert len(open_records(str(path))) == len(ROWS)
    assert len(unpacked) == 1
    path.write_bytes(gzip.compress(b'{"id": "other"}\n'))
    assert list(open_records(str(path))) == [{"id": "other"}]


_ROW = '{"id": "%d", "conversations": [{"from": "human", "value": "What is %d plus 7, please?"}]}'


def _write(path, opening, rows, closing="]}", comma=",\n"):
    with path.open("w") as stream:
        stream.write(opening)
        stream.writelines(f"{comma if i else ''}{row}" for i, row in enumerate(rows))
        stream.write(closing)


def write_many(kind, folder, number):
    """Writes a file of a kind with some 200 bytes a row; returns its path."""
    path, numbers = folder / f"many.{kind}", range(number)
    more = "What is it? " * 12
    if kind == "jsonl":
        _write(path, "", (_ROW % (i, i) for i in numbers), "\n", "\n")
    elif kind == "csv":
        _write(path, "image,caption\n", (f"{i}.jpg,{more}" for i in numbers), "\n", "\n")
    elif kind == "tar":
        with tarfile.open(path, "w") as archive:
            for i in numbers:
                info = tarfile.TarInfo(f"{i}.txt")
                info.size = len(more)
                archive.addfile(info, io.BytesIO(more.encode()))
    elif kind == "images":
        path = folder / "images"
        path.mkdir()
        for i in numbers:
            os.mknod(path / f"{i:05}.jpg")
    elif kind == "gqa":
        path = folder / "gqa.json"
        rows = (f'"{i}": {{"imageId": "{i}", "question": "{more}"}}' for i in numbers)
        _write(path, "{", rows, "}")
    elif kind == "vqa":
        path = folder / "questions.json"
        ids = (f'"question_id": {i}, "image_id": {i}' for i in numbers)
        _write(path, '{"questions": [', (f'{{{i}, "question": "{more}"}}' for i in ids))
        ids = (f'"question_id": {i}, "answers": ["{i}"]' for i in numbers)
        _write(folder / "annotations.json", '{"annotations": [', (f"{{{each}}}" for each in ids))
    else:
        path = folder / "coco.json"
        rows = (f'{{"image_id": {i}, "caption": "{more}"}}' for i in numbers)
        _write(path, '{"annotations": [', rows, "],")
        with path.open("a") as stream:
            names = (f'{{"id": {i}, "file_name": "{i}.jpg"}}' for i in numbers)
            stream.write('"images": [' + ",\n".join(names) + "]}")
    return path


KEPT = {"images": 8, "jsonl": 16, "csv": 0, "tar": 16, "gqa": 16, "vqa": 76, "coco": 84}
"""Bytes of memory that stay for a row: offsets, and the ids that rows are joined by."""


def listed(folder):
    """Lists what is visible below a folder in the straightforward way."""
    found = []
    for root, _, files in os.walk(folder):
        found += [str((Path(root) / name).relative_to(folder)) for name in files]
    return sorted(n for n in found if not re.search(r"(?:^|/)(?:\.|__[^/]*/)", n))


PARTS = st.text("ab._-0é ~\n", min_size=1, max_size=3).filter(lambda part: part.strip("."))
SUFFIXES = st.sampled_from([".txt", ".json", ".png", ".JPG"])
TREES = st.lists(st.tuples(st.lists(PARTS, max_size=3), PARTS, SUFFIXES), max_size=8)


@given(TREES)
@settings(max_examples=examples(10), deadline=None)
def test_names_below_a_folder_are_sorted_as_whole_paths(tree):
    with tempfile.TemporaryDirectory() as folder:
        for folders, stem, suffix in tree:
            with contextlib.suppress(NotADirectoryError, FileExistsError, IsADirectoryError):
                place = Path(folder, *folders)
                place.mkdir(parents=True, exist_ok=True)
                (place / (stem + suffix)).write_text("{}" if suffix == ".json" else "a")
        names = listed(folder)
        assert visible_names(folder) == names
        images = [name for name in names if name.lower().endswith((".png", ".jpg"))]
        if not images:
            return
        (rows,) = open_records(folder).parts
        assert [row["image"] for row in rows] == images
        assert rows[-1] == rows[len(images) - 1]
        sides = [str(Path(name).with_suffix(".txt")) in names for name in images]
        assert ["text" in row for row in rows] == sides


@pytest.mark.parametrize("kind", KEPT)
def test_a_row_costs_its_offsets_and_ids_in_memory(kind, tmp_path):
    """Whatever it holds. Reading rows in any order adds nothing that stays."""
    number = {"csv": 20_000, "images": 1_000}.get(kind, 2_000)
    path = write_many(kind, tmp_path, number)
    open_records(str(path))[0]
    arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        rows = open_records(str(path))
        for i in range(0, number, 97):
            assert str(i) in str(rows[i]) or kind == "jsonl"
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert pa.total_allocated_bytes() - arrow < 2**21  # of CSV a part of 1 MiB is held
    assert kept < KEPT[kind] * number * 9 / 8 + 20_000  # arrays grow by an eighth


_MANY = """
import re, sys
from preprocess.datasets import dataset_class
dataset = dataset_class(sys.argv[1])()
for i in range(0, len(dataset), 1000):
    assert dataset[i]["message_list"][0]["messages"][1] == str(i)
# Not ru_maxrss: that of a child counts what its parent had before the exec.
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
print(len(dataset), int(peak) >> 10)
"""


@pytest.mark.slow
def test_two_million_rows_take_less_than_a_gigabyte(tmp_path):
    with (tmp_path / "a.jsonl").open("w") as stream:
        for i in range(2_000_000):
            answer = {"from": "gpt", "value": str(i)}
            stream.write(f"{(_ROW % (i, i))[:-2]}, {json.dumps(answer)}]}}\n")
    command = [sys.executable, "-c", _MANY, str(tmp_path / "a.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    number, peak_mib = map(int, done.stdout.split())
    assert number == 2_000_000
    assert peak_mib < 1024


_ALL = """
import re, sys
from preprocess.formats import open_records
rows = open_records(sys.argv[1])
for i in range(0, len(rows), 1000):
    rows[i]
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) >> 10)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tar", "gqa", "vqa", "coco"])
def test_files_larger_than_the_limit_are_read_in_little_memory(kind, tmp_path):
    """The interpreter takes 40 MiB, a file of JSON 50 MB and four times that as objects."""
    path = write_many(kind, tmp_path, 50_000 if kind == "tar" else 250_000)
    command = [sys.executable, "-c", _ALL, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 120


@pytest.mark.parametrize("end", ['[{"a": 2}]', '{"a": 2}', "x", "\n]"])
def test_text_after_an_array_is_not_dropped(end, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(f'[{{"a": 1}}]\n{end}\n')
    with pytest.raises(SourceError) as caught:
        open_records(str(path))
    assert caught.value.reason == "source_json"
    path.write_text('[{"a": 1}]\n\n')
    assert list(open_records(str(path))) == [{"a": 1}]


@pytest.mark.parametrize("keys", [("train", "validation"), ("data", "rows")])
def test_an_object_of_several_lists_is_refused(keys, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({key: [{"a": 1}] for key in keys}))
    with pytest.raises(SourceError) as caught:
        open_records(str(path))
    assert caught.value.reason == "source_lists"


def test_boxes_of_coco_are_corners_and_sizes_whatever_the_spec_says(tmp_path):
    path = tmp_path / "instances.json"
    document = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 1, "bbox": [5, 6, 20, 30], "category_id": 3}],
        "categories": [{"id": 3, "name": "cup"}],
    }
    path.write_text(json.dumps(document))
    (row,) = open_records(str(path))
    assert row["boxes"] == [{"x": 5, "y": 6, "w": 20, "h": 30}]
    made = parse_row(row, Spec(name="own", format="boxes", box="xywh"))["message_list"][0]
    assert made["boxes"] == [[5, 6, 25, 36]]
    for box in ("xyxy", "cxcywh"):
        with pytest.raises(SampleError) as caught:
            parse_row(row, Spec(name="own", format="boxes", box=box))
        assert caught.value.reason == "box_shape"


@pytest.mark.parametrize("names", [("img{}.jpg", 12), ("{}.png", 11), ("p{}.v2.webp", 3)])
def test_images_of_a_tar_are_in_the_order_of_their_numbers(names, tmp_path):
    form, count = names
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in sorted(form.format(i) for i in range(count)):  # as WebDataset writes them
            info = tarfile.TarInfo(f"a.{name}")
            info.size = len(name)
            archive.addfile(info, io.BytesIO(name.encode()))
    (row,) = open_records(str(tmp_path / "a.tar"))
    assert row["image"] == [form.format(i).encode() for i in range(count)]
