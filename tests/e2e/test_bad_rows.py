"""Bad rows of a user's own data: each kind has a reason, a count and a message.

The messages are golden files: tests/golden/bad-*.txt.
"""

import io
import json

import pytest
from PIL import Image

from preprocess.datasets import dataset_class
from shardspec.errors import ShardsError
from shardspec.manifest import load_manifest

CSV = {
    "image,caption": "",
    'a.png,"A cup, a hat"': "",
    "a.png,A cup, a hat": "row_columns",
    "a.png": "row_columns",
    "b.png,A hat": "image_missing",
}


def photo():
    stream = io.BytesIO()
    Image.new("RGB", (56, 42), (200, 30, 30)).save(stream, "PNG")
    return stream.getvalue()


FILE = {"type": "input_image", "file_id": "file-1"}
TURNS = ("human", "gpt", "system", "gpt")


def said(*texts, roles=("human", "gpt")):
    return [{"from": roles[i % len(roles)], "value": text} for i, text in enumerate(texts)]


PLACES = "placeholder_without_image"
DEEP = "[" * 100_000

ROWS = {
    "llava": [
        ({"image": "a.png", "conversations": said("<image>\nWhat?", "A cup.")}, ""),
        ('{"image": "a.png", "conversations": [}', "row_json"),
        ("[1, 2]", "row_json"),
        (DEEP, "row_json"),
        ({"image": "a.png", "text": "x"}, "row_fields"),
        ({"image": "none.png", "conversations": said("<image>?", "x")}, "image_missing"),
        ({"conversations": said("See <img>none.png</img>.", "x")}, "image_missing"),
        ({"image": ".", "conversations": said("<image>?", "x")}, "image_missing"),
        ({"image": "data:image/png,%00", "conversations": said("?", "x")}, "row_image_data"),
        ({"conversations": said("<image>?", "x")}, "placeholder_without_image"),
        ({"image": "a.png", "conversations": said("<image 2>?", "x")}, "placeholder_without_image"),
        (
            {"image": ["a.png"] * 2, "conversations": said("<image>?", "x")},
            "image_without_placeholder",
        ),
        ({"conversations": said("What?", " ")}, "empty_answer"),
        ({"conversations": said("Hi!", "Hi.", roles=("gpt", "human"))[:1]}, "assistant_first"),
        ({"conversations": said("Hi!", "Hi.", "And?")}, "conversation"),
        ({"conversations": said("Hi!", "Hi.", roles=("human", "human"))}, "conversation"),
        ({"conversations": said("Hi!", "Hi.", roles=("human", "poet"))}, "conversation"),
        ({"conversations": []}, "conversation"),
        ({"conversations": said("?", "x", "Be brief.", "x", roles=TURNS)}, "conversation"),
        ({"messages": [{"role": "user", "content": [FILE]}]}, "conversation"),
        ({"conversations": said("", "x")}, "empty_user"),
        ({"conversations": said("Play <video>.", "x")}, "media_placeholder"),
        ({"conversations": said("Say <|endoftext|>.", "x")}, "control_token"),
    ],
    "vqa": [
        ({"image": "a.png", "question": "What?", "answer": "A cup."}, ""),
        ({"image": "a.png", "question": "What?", "answer": ""}, "empty_answer"),
        ({"image": "a.png", "question": "What?", "answers": [" "]}, "empty_answer"),
        ({"image": "a.png", "question": "What?"}, "row_fields"),
        ({"image": "a.png", "question": "?", "options": ["a", "b"], "answer": "z"}, "row_answer"),
        ({"image": "a.png", "answer": "x"}, "row_fields"),
    ],
    "captions": [
        ({"image": "a.png", "caption": "A cup."}, ""),
        ({"image": "a.png", "caption": "\n"}, "empty_answer"),
        ({"image": None, "caption": "A cup."}, "row_image"),
        ({"image": 3, "caption": "A cup."}, "row_image"),
    ],
    "points": [
        ({"image": "a.png", "points": [[1, 2]], "label": "cup"}, ""),
        ({"image": "a.png", "points": [[1, 2]], "question": "<image>"}, "row_fields"),
        ({"image": "a.png", "points": [[1, 2]], "label": " "}, "row_fields"),
        ({"image": "a.png", "points": [[1, 2]], "question": "<image><image>?"}, PLACES),
    ],
    "interleaved": [
        ({"document": ["A cup ", {"image": "a.png"}, "."]}, ""),
        ({"document": [{"image": "a.png"}]}, "document_no_text"),
        ({"texts": ["a", None], "images": ["a.png", None]}, "document"),
        ({"texts": ["a"], "images": ["a.png", None]}, "document"),
        ({"text_list": ["a"], "image_info": [{"matched_text_index": 4}]}, "document"),
    ],
}


@pytest.mark.parametrize("kind", ROWS)
def test_every_bad_row_is_quarantined_with_its_number_file_and_reason(
    kind, inline_cli, golden, tmp_path
):
    (tmp_path / "a.png").write_bytes(photo())
    lines = [row if isinstance(row, str) else json.dumps(row) for row, _ in ROWS[kind]]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "spec.toml").write_text(f'format = "{kind}"\nsource = "rows.jsonl"\n')
    job = ("shards", tmp_path / "spec.toml", "--out", tmp_path / "out", "--workers", 1)
    inline_cli.good(*job, "--image-size", 56, "--max-lost-rows", 1, "--max-bad-samples", 1)
    want = {i: reason for i, (_, reason) in enumerate(ROWS[kind]) if reason}
    lost = sorted(
        (
            json.loads(line)
            for path in (tmp_path / "out" / "quarantine").iterdir()
            for line in path.read_text().splitlines()
        ),
        key=lambda each: each["row"],
    )
    assert {each["row"]: each["reason"] for each in lost} == want
    assert {each["file"] for each in lost} == {str(tmp_path / "rows.jsonl")}
    counts = load_manifest(str(tmp_path / "out")).splits["train"].quarantined
    assert counts == {reason: list(want.values()).count(reason) for reason in want.values()}
    told = [
        f"{each['row']:>2} {each['reason']}: {each['message']}"
        + "".join(f"\n     {name}: {value}" for name, value in sorted(each["facts"].items()))
        for each in lost
    ]
    golden(f"bad-rows-{kind}.txt", "\n".join(told).replace(str(tmp_path), "DIR") + "\n")


def test_ragged_rows_of_a_table_are_quarantined_with_their_numbers(inline_cli, tmp_path):
    (tmp_path / "a.png").write_bytes(photo())
    (tmp_path / "rows.csv").write_text("\n".join(CSV))
    job = ("shards", tmp_path / "rows.csv", "--out", tmp_path / "out", "--workers", 1)
    inline_cli.good(*job, "--image-size", 56, "--max-lost-rows", 1)
    (path,) = (tmp_path / "out" / "quarantine").iterdir()
    lost = [json.loads(line) for line in path.read_text().splitlines()]
    want = [(i - 1, reason) for i, reason in enumerate(CSV.values()) if reason]
    assert [(each["row"], each["reason"]) for each in lost] == want
    assert load_manifest(str(tmp_path / "out")).splits["train"].num_samples == 1


FILES = {
    "rows.json": [
        '[{"image": "a.png", "caption": "x"},\n {"image": "b.png" "caption": "y"}]',
        '[{"image": "a.png", "caption": "x"},',
        '{"questions": [], ',
        "",
    ],
    "rows.jsonl": [
        '{"picture": "a.png", "title_of_it": "x"}\n{"picture": "b.png", "title_of_it": "y"}',
        "",
    ],
    "rows.csv": [
        *("image,image\na,b\n", "image,words\na.png,x\n", "image,caption\na\n"),
        "image,caption\na.png,caf\udce9\n",
    ],
    "rows.parquet": ["no parquet"],
    "rows.tar": ["no tar"],
    "rows.xml": ["<a/>"],
}


def test_every_bad_file_is_refused_with_what_is_wrong_and_where(golden, tmp_path):
    told = []
    for name, texts in FILES.items():
        for text in texts:
            (tmp_path / name).write_text(text, errors="surrogateescape")
            (tmp_path / "spec.toml").write_text(f'format = "captions"\nsource = "{name}"\n')
            with pytest.raises(ShardsError) as caught:
                dataset_class(str(tmp_path / "spec.toml"))()
            told += [f"{text[:60]!r}", str(caught.value).replace(str(tmp_path), "DIR"), ""]
    golden("bad-files.txt", "\n".join(told))
