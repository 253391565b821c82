"""Every layout of a user's own data, as its owners publish it: from a file to the text of a batch.

What a model reads is compared as a whole: every text of the source to the letter, and the images
where they were, known by their colour.
"""

import base64
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from loader import StreamingDataset, View
from preprocess.formats import FORMATS
from preprocess.text import load_tokenizer
from shardspec.tiling import ImageView

COLORS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30)]
VIEW = View(image=ImageView(size_px=56), branch_order="stored")
IMAGE = tuple(f"<{i}>" for i in range(4))


def photo(i):
    stream = io.BytesIO()
    Image.new("RGB", (56, 42), COLORS[i]).save(stream, "PNG")
    return stream.getvalue()


def data_url(i):
    return "data:image/png;base64," + base64.b64encode(photo(i)).decode()


def jsonl(*rows, name="rows.jsonl", encoding="utf-8"):
    return {name: "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode(encoding)}


def array(*rows):
    return {"rows.json": json.dumps(rows, indent=1).encode()}


def parquet(*rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), stream)
    return {"rows.parquet": stream.getvalue()}


def tar(members):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, payload in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
    return {"00000.tar": stream.getvalue()}


def hf(i):
    return {"bytes": photo(i), "path": f"{i}.png"}


def turns(*texts, keys=("from", "value"), roles=("human", "gpt")):
    return [{keys[0]: roles[i % 2], keys[1]: text} for i, text in enumerate(texts)]


def said(*texts):
    return turns(*texts, keys=("role", "content"), roles=("user", "assistant"))


def asked(*texts):
    """What the role format makes of user texts and answers in turn."""
    heads = (" User: ", " Assistant: ")
    return "".join(heads[i % 2] + text for i, text in enumerate(texts))


LAYOUTS = {
    "llava": (
        "llava",
        array(
            {
                "id": "r1",
                "image": "photos/0.png",
                "conversations": turns("<image>\nWhat does it say?", "Öpen."),
            },
            {
                "id": "r2",
                "image": ["photos/1.png", "photos/2.png"],
                "conversations": turns("Left: <image> Right: <image>\nNewer?", "The right one."),
            },
            {"id": "r3", "model": "", "conversations": turns("Name a prime.", "7")},
        ),
        [
            IMAGE[0] + asked("What does it say?", "Öpen."),
            asked(f"Left: {IMAGE[1]} Right: {IMAGE[2]}\nNewer?", "The right one."),
            asked("Name a prime.", "7"),
        ],
    ),
    "internvl": (
        "llava",
        jsonl(
            {
                "id": 0,
                "image": ["photos/3.png", "photos/1.png"],
                "width_list": [56, 56],
                "height_list": [42, 42],
                "conversations": turns("Image-1: <image>\nImage-2: <image>\nSame?", "No."),
            }
        ),
        [asked(f"Image-1: {IMAGE[3]}\nImage-2: {IMAGE[1]}\nSame?", "No.")],
    ),
    "sharegpt": (
        "sharegpt",
        jsonl({"conversations": turns("Hello", "Hi.", "2 + 2?", "4"), "images": ["photos/2.png"]}),
        [IMAGE[2] + asked("Hello", "Hi.", "2 + 2?", "4")],
    ),
    "openai": (
        "messages",
        jsonl(
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "Total?"},
                            {
                                "type": "image_url",
                                "image_url": {"url": data_url(2), "detail": "low"},
                            },
                        ],
                    },
                    {"role": "assistant", "content": "12.40", "weight": 1},
                ]
            }
        ),
        [asked(f"Total?{IMAGE[2]}", "12.40")],
    ),
    "trl parquet": (
        "messages",
        parquet(
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "text": None},
                            {"type": "text", "text": "Bird?"},
                        ],
                    },
                    {"role": "assistant", "content": [{"type": "text", "text": "A wren."}]},
                ],
                "images": [hf(1)],
            }
        ),
        [IMAGE[1] + asked("Bird?", "A wren.")],
    ),
    "cauldron": (
        "messages",
        parquet(
            {
                "images": [hf(0), hf(3)],
                "texts": [
                    {"user": "Title?", "assistant": "Sales", "source": "x"},
                    {"user": "Highest?", "assistant": "May", "source": "x"},
                ],
            }
        ),
        [
            f"Image 1{IMAGE[0]}Image 2{IMAGE[3]}"
            + asked("Title?", "Sales")
            + asked("Highest?", "May")
        ],
    ),
    "alpaca and ms-swift": (
        "messages",
        jsonl(
            {
                "instruction": "Name the colour.",
                "input": "<image>",
                "output": "Red.",
                "images": ["photos/0.png"],
            },
            {"query": "<image>Newer?", "response": "Yes.", "images": ["photos/2.png"]},
        ),
        [
            asked(f"Name the colour.\n{IMAGE[0]}", "Red."),
            IMAGE[2] + asked("Newer?", "Yes."),
        ],
    ),
    "chartqa and clevr": (
        "vqa",
        {
            "questions.json": json.dumps(
                {
                    "info": {"split": "val"},
                    "questions": [
                        {"image_filename": "1.png", "question": "How many?", "answer": "3"},
                        {"imgname": "2.png", "query": "Highest?", "answer": None, "label": "14"},
                    ],
                }
            ).encode()
        },
        [IMAGE[1] + asked("How many?", "3"), IMAGE[2] + asked("Highest?", "14")],
    ),
    "captions parquet": (
        "captions",
        parquet({"image": hf(2), "caption": "A red door."}),
        [IMAGE[2] + asked("", "A red door.")],
    ),
    "captions without bytes": (
        "captions",
        parquet({"image": {"bytes": None, "path": "photos/1.png"}, "caption": "A red door."}),
        [IMAGE[1] + asked("", "A red door.")],
    ),
    "open_clip": (
        "captions",
        {"train.csv": b'filepath\ttitle\nphotos/1.png\t"a boat, ""Anna"", in fog"\n'},
        [IMAGE[1] + asked("", 'a boat, "Anna", in fog')],
    ),
    "utf-16 csv": (
        "captions",
        {"rows.csv": "image,caption\nphotos/0.png,Zoë\nphotos/1.png,Bär\n".encode("utf-16")},
        [IMAGE[0] + asked("", "Zoë"), IMAGE[1] + asked("", "Bär")],
    ),
    "imagefolder": (
        "captions",
        jsonl({"file_name": "photos/3.png", "text": "a pan"}, name="metadata.jsonl"),
        [IMAGE[3] + asked("", "a pan")],
    ),
    "side files": (
        "captions",
        {"0.png": photo(0), "0.txt": b"A lamp.", "1.png": photo(1), "1.txt": b"A cat."},
        [IMAGE[0] + asked("", "A lamp."), IMAGE[1] + asked("", "A cat.")],
    ),
    "coco captions": (
        "captions",
        {
            "captions.json": json.dumps(
                {
                    "images": [{"id": 9, "file_name": "photos/1.png", "width": 56, "height": 42}],
                    "annotations": [{"id": 1, "image_id": 9, "caption": "Two bowls of soup."}],
                }
            ).encode()
        },
        [IMAGE[1] + asked("", "Two bowls of soup.")],
    ),
    "vqa v2": (
        "vqa",
        {
            "v2_OpenEnded_mscoco_val2014_questions.json": json.dumps(
                {
                    "data_subtype": "val2014",
                    "questions": [{"image_id": 9, "question": "How many?", "question_id": 90}],
                }
            ).encode(),
            "v2_mscoco_val2014_annotations.json": json.dumps(
                {
                    "annotations": [
                        {"question_id": 90, "image_id": 9, "answers": [{"answer": "2"}] * 3}
                    ]
                }
            ).encode(),
            "val2014/COCO_val2014_000000000009.jpg": photo(3),
        },
        [IMAGE[3] + asked("How many?", "2")],
    ),
    "gqa": (
        "vqa",
        {
            "train_questions.json": json.dumps(
                {
                    "201": {"imageId": "24", "question": "Is it red?", "answer": "no"},
                    "202": {"imageId": "25", "question": "Is it wet?", "answer": "yes"},
                }
            ).encode(),
            "images/24.jpg": photo(0),
            "images/25.jpg": photo(2),
        },
        [IMAGE[0] + asked("Is it red?", "no"), IMAGE[2] + asked("Is it wet?", "yes")],
    ),
    "mmmu": (
        "vqa",
        parquet(
            {
                "id": "val_1",
                "question": "In <image 2>, what is X? See <image 1>.",
                "options": "['3', '4']",
                "answer": "B",
                "image_1": hf(0),
                "image_2": hf(1),
            }
        ),
        [
            asked(
                f"In {IMAGE[1]}, what is X? See {IMAGE[0]}.\n"
                "Only return the correct answer option.\nA. 3\nB. 4",
                "B. 4",
            )
        ],
    ),
    "points": (
        "points",
        jsonl({"image": "photos/2.png", "label": "cup", "points": [{"x": 14, "y": 21}]}),
        [IMAGE[2] + asked("cup", '<points coords="1 1 250 500">cup</points>')],
    ),
    "boxes": (
        'boxes"\nbox = "xywh"\nunit = "100',
        jsonl({"image": "photos/2.png", "label": "cup", "bbox": [25, 50, 50, 25]}),
        [IMAGE[2] + asked("cup", '[{"bbox_2d": [250, 500, 750, 750], "label": "cup"}]')],
    ),
    "coco instances": (
        'boxes"\nbox = "xywh"\nnotation = "ref"\nprompt = "Find {label}.',
        {
            "instances.json": json.dumps(
                {
                    "images": [{"id": 9, "file_name": "photos/1.png", "width": 56, "height": 42}],
                    "annotations": [
                        {"id": 1, "image_id": 9, "category_id": 18, "bbox": [14, 21, 28, 21]},
                        {"id": 2, "image_id": 9, "category_id": 18, "bbox": [0, 0, 7, 10.5]},
                    ],
                    "categories": [{"id": 18, "name": "dog"}],
                }
            ).encode()
        },
        [
            IMAGE[1]
            + asked(
                "Find dog.", "<ref>dog</ref><box>[[250, 500, 750, 1000], [0, 0, 125, 250]]</box>"
            )
        ],
    ),
    "hub objects": (
        'boxes"\nbox = "xyxy"\nnotation = "brackets',
        parquet(
            {
                "image": hf(3),
                "question": "Where is the <image> hat?",
                "objects": {"bbox": [[0.0, 0.0, 28.0, 21.0]], "categories": ["hat"]},
            }
        ),
        [asked(f"Where is the {IMAGE[3]} hat?", "[0.00, 0.00, 0.50, 0.50]")],
    ),
    "webdataset": (
        "captions",
        tar({"a/1.png": photo(0), "a/1.txt": b"One.", "a/2.png": photo(1), "a/2.txt": b"Two."}),
        [IMAGE[0] + asked("", "One."), IMAGE[1] + asked("", "Two.")],
    ),
    "webdataset of conversations": (
        "webdataset",
        tar(
            {
                "7.png": photo(3),
                "7.json": json.dumps({"conversations": turns("<image>\nWho?", "Ann.")}).encode(),
                "8.0.png": photo(0),
                "8.1.png": photo(1),
                "8.txt": b"Two.",
            }
        ),
        [
            IMAGE[3] + asked("Who?", "Ann."),
            f"Image 1{IMAGE[0]}Image 2{IMAGE[1]}" + asked("", "Two."),
        ],
    ),
    "obelics": (
        "interleaved",
        parquet(
            {
                "texts": ["Above the lake. ", None, "And after it.", None],
                "images": [None, "photos/1.png", None, "photos/3.png"],
                "metadata": "[]",
                "general_metadata": "{}",
            }
        ),
        [f"Above the lake. {IMAGE[1]}And after it.{IMAGE[3]}"],
    ),
    "mmc4": (
        "interleaved",
        jsonl(
            {
                "url": "https://x.test/page",
                "text_list": ["A walk.", "We saw a dog.", "Then rain."],
                "image_info": [
                    {"image_name": "0.png", "raw_url": "u", "matched_text_index": 2},
                    {"image_name": "2.png", "raw_url": "u", "matched_text_index": 0},
                ],
                "similarity_matrix": [[0.1, 0.2, 0.3]] * 2,
            }
        ),
        [f"{IMAGE[2]}A walk. We saw a dog.{IMAGE[0]}Then rain."],
    ),
    "parts": (
        "interleaved",
        jsonl({"document": [{"type": "image", "image": "photos/0.png"}, "A.", "B."]}),
        [f"{IMAGE[0]}A.\n\nB."],
    ),
    "text with placeholders": (
        "interleaved",
        jsonl({"text": "From <image> to <image>.", "images": ["photos/0.png", "photos/1.png"]}),
        [f"From {IMAGE[0]} to {IMAGE[1]}."],
    ),
    "documents": (
        "documents",
        jsonl(
            {"pages": ["photos/0.png", "photos/1.png"], "question": "Who?", "answer": "Ann."},
            {"image": "photos/2.png", "question": "Who?", "answer": "Bo."},
        ),
        [
            f"Page 1{IMAGE[0]}Page 2{IMAGE[1]}" + asked("Who?", "Ann."),
            IMAGE[2] + asked("Who?", "Bo."),
        ],
    ),
}
STATED = {
    "webdataset of conversations",
    "boxes",
    "documents",
    "coco instances",
    "hub objects",
    "sharegpt",
    "parts",
    "text with placeholders",
}
"""Layouts that a spec has to name: their rows look like those of another one."""


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def shown(example, tokenizer):
    """The text of an example, each image as the number of its colour."""
    symbols = tokenizer.special_ids
    text, run = "", []
    images = iter(example["images"])
    ids = [int(each) for each in example["input_ids"] if each != symbols["bos"]]
    while ids:
        if ids[0] != symbols["<im_start>"]:
            run.append(ids.pop(0))
            continue
        del ids[: ids.index(symbols["<im_end>"]) + 1]
        color = np.median(next(images), axis=(1, 2))
        nearest = min(range(4), key=lambda i: abs(color - COLORS[i]).sum())
        text, run = text + tokenizer.decode(run) + IMAGE[nearest], []
    return text + tokenizer.decode(run)


def made(inline_cli, folder, files, spec):
    """Writes files and photos to a fresh folder and builds shards from it."""
    rows = [name for name in files if not name.endswith((".png", ".jpg", ".txt"))]
    photos = {f"photos/{i}.png": photo(i) for i in range(4 if rows else 0)}
    for name, payload in {**files, **photos}.items():
        (folder / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "in" / name).write_bytes(payload)
    dataset = folder / "in"
    if rows:
        dataset = dataset / rows[0]
    if spec:
        (folder / "spec.toml").write_text(spec + f'\nsource = "{dataset}"\n')
        dataset = folder / "spec.toml"
    job = ("shards", dataset, "--out", folder / "out", "--cache", folder / "cache", "--workers", 1)
    split = "validation" if any("val2014" in name for name in files) else "train"
    settings = ("--split", split, "--image-size", 56, "--codec", "raw", "--variants", 1)
    inline_cli.good(*job, *settings)
    stream = StreamingDataset(str(folder / "out"), seed=0, split=split, view=VIEW)
    return [stream.example(i) for i in range(stream.num_samples)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_text_of_a_batch_is_that_of_the_source(name, inline_cli, tmp_path, tokenizer):
    kind, files, want = LAYOUTS[name]
    spec = f'format = "{kind}"' if name in STATED else ""
    if name == "mmc4":
        spec = f'format = "{kind}"\nimages = "{tmp_path}/in/photos"  # mmc4'
    examples = made(inline_cli, tmp_path, files, spec)
    assert sorted(shown(each, tokenizer) for each in examples) == sorted(want)


def test_every_format_has_a_layout():
    # That of tracks, which have videos alone, is in test_video.py.
    kinds = {kind.partition('"')[0] for kind, _, _ in LAYOUTS.values()}
    assert kinds == set(FORMATS) - {"tracks"}
