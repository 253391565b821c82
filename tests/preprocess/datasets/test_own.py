"""A user's own data: specs, files whose format is told, and code, from a folder to batches."""

import functools
import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import threading
from contextlib import nullcontext
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from loader import (
    IterableDatasetMixture,
    RawDataset,
    StreamingDataset,
    View,
    make_dataloader,
)
from preprocess.datasets import DatasetBase, dataset_class, example_images, is_own
from preprocess.datasets.images import resolve_image
from preprocess.datasets.own import OwnDataset, list_files
from preprocess.formats import Spec
from preprocess.recipe import Preparer, Recipe
from preprocess.text import load_tokenizer
from shardspec import storage
from shardspec.errors import ConfigError, SampleError, SourceError
from shardspec.manifest import load_manifest
from shardspec.tiling import ImageView

COLORS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30)]


def photo(i, kind="PNG"):
    stream = io.BytesIO()
    Image.new("RGB", (56, 42), COLORS[i % 4]).save(stream, kind)
    return stream.getvalue()


def chat(i, *texts, image):
    roles = ("human", "gpt")
    turns = [{"from": roles[t % 2], "value": text} for t, text in enumerate(texts)]
    return {"id": f"row-{i}", "conversations": turns, **({"image": image} if image else {})}


@pytest.fixture
def data(tmp_path):
    """Eight conversations about four photos, one of text alone, one that cannot be read."""
    (tmp_path / "photos").mkdir()
    for i in range(4):
        (tmp_path / "photos" / f"{i}.png").write_bytes(photo(i))
    rows = [
        chat(i, f"<image>\nColour {i}?", f"It is {COLORS[i % 4]}.", image=f"{i % 4}.png")
        for i in range(6)
    ]
    rows.append(chat(6, "From <image> to <image>?", "Bluer.", image=["0.png", "2.png"]))
    rows.append(chat(7, "Say hello.", "Hello.", image=None))
    rows.append(chat(8, "Say hello.", image=None))
    (tmp_path / "chats.json").write_text(json.dumps(rows))
    return tmp_path


def build(cli, dataset, out, *more):
    job = ("shards", dataset, "--out", out, "--cache", out.parent / "cache", "--workers", 1)
    return cli.good(*job, "--image-size", 112, *more)


def test_a_file_becomes_shards_without_a_word_about_its_format(inline_cli, data):
    done = build(inline_cli, data / "chats.json", data / "out")
    assert "8 samples" in done.out
    manifest = load_manifest(str(data / "out"))
    split = manifest.splits["train"]
    assert (manifest.dataset, dict(split.quarantined)) == ("chats", {"conversation": 1})
    assert manifest.recipe["data"]["format"] == "llava"
    assert manifest.recipe["text"]["system_prompt"] == "none"  # Molmo's style names mean nothing

    stream = StreamingDataset(str(data / "out"), seed=1)
    tokenizer = load_tokenizer()
    symbols = set(tokenizer.special_ids.values())
    texts, places = {}, {}
    for i in range(stream.num_samples):
        example = stream.example(i)
        row = example["metadata"]["key"]
        ids = example["input_ids"]
        texts[row] = tokenizer.decode([int(t) for t in ids if int(t) not in symbols])
        places[row] = len(example["images"])
    assert sorted(places.values()) == [0, 1, 1, 1, 1, 1, 1, 2]
    joined = "\n".join(texts.values())
    for i in range(6):
        assert f"Colour {i}?" in joined
    assert "From  to ?" in joined


def test_a_spec_says_everything_and_flags_win(inline_cli, data):
    (data / "mine.toml").write_text(
        'name = "mine"\nformat = "llava"\nsource = "chats.json"\nimages = "photos"\n'
        'licence = "CC0"\n[settings]\nimage_size = 224\nvariants = 2\nworkers = 1\n'
    )
    build(inline_cli, data / "mine.toml", data / "out", "--variants", 3)
    manifest = load_manifest(str(data / "out"))
    assert manifest.dataset == "mine"
    assert manifest.recipe["image"]["views"][0]["size_px"] == 112
    assert manifest.recipe["text"]["num_variants"] == 3
    source = manifest.splits["train"].source
    assert (source["kind"], source["files"]) == ("own", ["chats.json"])
    assert source["licence"] == "CC0"


def test_a_name_lets_two_results_of_one_dataset_be_told_apart(inline_cli, data):
    build(inline_cli, data / "chats.json", data / "out", "--name", "second")
    manifest = load_manifest(str(data / "out"))
    assert manifest.dataset == "second"
    assert all("/second-train-" in shard.url for shard in manifest.shards)


CODE = """
from dataclasses import dataclass
from preprocess.datasets import DatasetBase

class MyPhotos(DatasetBase):
    def load(self):
        return [{"image": PHOTO, "caption": f"Photo {i}."} for i in range(5)]

    def to_example(self, row):
        message = {"style": "long_caption", "text": row["caption"]}
        return {"image": row["image"], "message_list": [message]}

class Examples(DatasetBase):
    name = "plain"
    def load(self):
        messages = [{"style": "text_sft", "messages": ["a", f"b{i}"]} for i in range(3)]
        return [{"message_list": [message]} for message in messages]

class Empty(DatasetBase):
    pass

class Failing(DatasetBase):
    def load(self):
        raise KeyError("boom")

class Exiting(DatasetBase):
    def load(self):
        raise SystemExit(7)

class NoRows(DatasetBase):
    def load(self):
        pass

class Generating(DatasetBase):
    def load(self):
        yield {}

class Keyed(DatasetBase):
    def load(self):
        return {"a": 1}

class Slashed(DatasetBase):
    name = "a/b"
    def load(self):
        return []

class Constructed(DatasetBase):
    def __init__(self):
        pass
    def load(self):
        return []

@dataclass
class Row:
    answer: str

class Typed(DatasetBase):
    def load(self):
        return [Row(f"{WORD} {i}") for i in range(3)]
    def to_example(self, row):
        return {
            "image": [PHOTO, FILE],
            "messages": [
                {"role": "user", "content": "From <image> to <image>?"},
                {"role": "assistant", "content": row.answer},
            ],
        }
    several_images = True

OTHER = 3
"""


@pytest.fixture
def code(tmp_path):
    path = tmp_path / "mine.py"
    (tmp_path / f"{tmp_path.name}_word.py").write_text("WORD = 'Redder'\n")
    (tmp_path / "ä b.png").write_bytes(photo(2))
    head = f"from __future__ import annotations\nfrom {tmp_path.name}_word import WORD\n"
    path.write_text(f"{head}PHOTO = {photo(0)!r}\nFILE = {str(tmp_path / 'ä b.png')!r}\n{CODE}")
    return path


def test_a_class_of_a_file_becomes_shards(inline_cli, code, tmp_path):
    build(inline_cli, f"{code}:MyPhotos", tmp_path / "out")
    manifest = load_manifest(str(tmp_path / "out"))
    assert manifest.dataset == "my_photos"
    assert manifest.splits["train"].num_samples == 5
    build(inline_cli, f"{code}:Examples", tmp_path / "plain")
    assert load_manifest(str(tmp_path / "plain")).splits["train"].num_samples == 3


def test_another_version_of_the_code_is_another_job(inline_cli, code, tmp_path):
    build(inline_cli, f"{code}:MyPhotos", tmp_path / "out")
    code.write_text(code.read_text().replace("Photo {i}.", "Picture {i}."))
    job = ("shards", f"{code}:MyPhotos", "--out", tmp_path / "out", "--workers", 1)
    done = inline_cli.run(*job, "--image-size", 112, "--cache", tmp_path / "cache")
    assert done.code == 3
    assert "\n  code " in done.err


TOLD = [{"role": "user", "content": "Colour?"}, {"role": "assistant", "content": "Red."}]


@pytest.mark.parametrize("image", [photo(0), np.zeros((9, 9, 3), np.uint8), None], ids=type)
def test_messages_of_role_and_content_are_understood_everywhere(image):
    """As the rows of a dataset, and by the unsharded path."""

    class Told(DatasetBase):
        def load(self):
            return [{"messages": TOLD, "image": image, "metadata": {"id": 3}}]

    want = {"message_list": [{"style": "demo", "messages": ["Colour?", "Red."]}]}
    got = Told().get(0)
    assert example_images(got) == ([] if image is None else [image])
    assert {**got, "image": 0} == {**want, "metadata": {"id": 3}, "image": 0}
    prepare = Preparer(recipe=Recipe(), tokenizer=load_tokenizer())
    direct = prepare({"messages": TOLD, **({} if image is None else {"image": image})})
    assert direct.record["message_list"] == want["message_list"]
    assert len(direct.images) == (image is not None)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("{}:Nothing", "dataset_code"),
        ("{}:OTHER", "dataset_code"),
        ("{}:Empty", "dataset_code"),
        ("no.such.module:X", "dataset_code"),
        ("nosuch.py:X", "dataset_code"),
        ("{}", "dataset_code"),
    ],
)
def test_code_that_is_not_a_dataset_is_refused(name, reason, code):
    with pytest.raises(ConfigError) as caught:
        dataset_class(name.format(code))
    assert caught.value.reason == reason


@pytest.mark.parametrize("name", ["Failing", "Exiting", "NoRows", "Generating", "Keyed"])
def test_code_that_gives_no_rows_is_refused(name, code):
    kind = dataset_class(f"{code}:{name}")
    with pytest.raises(ConfigError) as caught:
        kind()
    assert caught.value.reason == "dataset_code"
    if name == "Failing":
        assert "KeyError: 'boom'" in str(caught.value)
        assert caught.value.where.startswith(f"{code}:")


@pytest.mark.parametrize("name", ["Slashed", "Constructed"])
def test_class_that_no_job_can_use_is_refused(name, code):
    with pytest.raises(ConfigError) as caught:
        dataset_class(f"{code}:{name}")
    assert caught.value.reason == "dataset_code"


def test_file_that_ends_the_process_is_refused(tmp_path):
    (tmp_path / "a.py").write_text("import sys; sys.exit(3)")
    with pytest.raises(ConfigError) as caught:
        dataset_class(f"{tmp_path}/a.py:A")
    assert "SystemExit: 3" in str(caught.value)


def test_file_may_import_what_is_beside_it_and_name_its_images(inline_cli, code, tmp_path):
    example = dataset_class(f"{code}:Typed")()[0]
    assert example["image"][0] == photo(0)
    assert example["image"][1].read_bytes() == photo(2)
    build(inline_cli, f"{code}:Typed", tmp_path / "out")
    stream = StreamingDataset(str(tmp_path / "out"), seed=1)
    assert {len(stream.example(i)["images"]) for i in range(3)} == {2}


def test_rows_that_are_generated_by_nobody_are_refused(code):
    with pytest.raises(ConfigError) as caught:
        dataset_class(f"{code}:MyPhotos")(source="sample").get(0)
    assert caught.value.reason == "no_sample_rows"


def test_rows_that_are_not_examples_are_bad_rows():
    class Rows(DatasetBase):
        def load(self):
            return [{"caption": "x"}]

    with pytest.raises(SampleError) as caught:
        Rows().get(0)
    assert caught.value.reason == "row_fields"


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "spec_key"),
        ("format = 3", "spec_key"),
        ('format = "lava"', "spec_value"),
        ('format = "llava"\nsauce = "x"', "spec_key"),
        ('format = "llava"\nname = "a b"', "spec_value"),
        ('format = "llava"\nunit = "cm"', "spec_value"),
        ('format = "llava"\nvalidation = 1', "spec_value"),
        ('format = "llava"\ncolumns = "x"', "spec_key"),
        ('format = "llava"\n[columns]\ncaption = "x"', "spec_key"),
        ('format = "llava"\n[columns]\nimage = 3', "spec_key"),
        ('format = "llava"\n[columns]\nmessages = ["a"]', "spec_key"),
        ('format = "captions"\n[columns]\ncaption = []', "spec_key"),
        ('format = "captions"\n[columns]\ncaption = ["a", 3]', "spec_key"),
        ('format = "captions"\nencoding = "utf-9"', "spec_value"),
        ('format = "captions"\nencoding = "base64"', "spec_value"),
        ('format = "llava"\n[splits]\ntrain = 3', "spec_key"),
        ('format = "llava"\n[splits]\ntrain = []', "spec_key"),
        ('format = "llava"\nvalidation = 0.1\n[splits]\ntrain = "a"', "spec_value"),
        ("format = ", "spec_file"),
        (None, "spec_file"),
    ],
)
def test_spec_that_cannot_be_used_is_refused(text, reason, tmp_path):
    if text is not None:
        (tmp_path / "a.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        dataset_class(str(tmp_path / "a.toml"))
    assert caught.value.reason == reason
    assert caught.value.where == str(tmp_path / "a.toml")


def test_misspelt_setting_of_a_spec_is_answered_with_the_nearest(inline_cli, data):
    (data / "mine.toml").write_text(
        'format = "llava"\nsource = "chats.json"\n[settings]\nimage_siz = 3\n'
    )
    done = inline_cli.run("shards", data / "mine.toml", "--out", data / "out")
    assert done.code == 1
    assert "image_size" in done.err


def test_splits_are_those_of_the_spec_or_of_the_names(data):
    rows = json.loads((data / "chats.json").read_text())
    (data / "held_out.json").write_text(json.dumps(rows[:2]))
    (data / "mine.toml").write_text(
        'format = "llava"\nimages = "photos"\n[splits]\ntrain = "chats.json"\n'
        'validation = ["held_out.json"]\n'
    )
    kind = dataset_class(str(data / "mine.toml"))
    assert (len(kind("train")), len(kind("validation"))) == (9, 2)
    with pytest.raises(SourceError) as caught:
        kind("test")
    assert caught.value.reason == "source_split"
    with pytest.raises(SourceError) as caught:
        dataset_class(str(data / "chats.json"))("validation")
    assert caught.value.reason == "source_split"


def test_no_row_is_of_two_splits(data):
    rows = json.loads((data / "chats.json").read_text())
    (data / "held_out.json").write_text(json.dumps(rows[:2]))
    spec = 'format = "llava"\nimages = "photos"\n[splits]\ntrain = "*.json"\n'
    (data / "mine.toml").write_text(spec + 'validation = "held_out.json"\n')
    for split in ("train", "validation"):
        with pytest.raises(SourceError) as caught:
            dataset_class(str(data / "mine.toml"))(split)
        assert caught.value.reason == "source_split"
        assert caught.value.where == str(data / "held_out.json")
    (data / "mine.toml").write_text(spec.replace('"*.json"', '["chats.json", "c*.json"]'))
    assert len(dataset_class(str(data / "mine.toml"))()) == 9


def test_share_leaves_a_validation_split_of_the_source_as_it_is(data):
    rows = json.loads((data / "chats.json").read_text())
    (data / "chats.json").rename(data / "train.json")
    (data / "val.json").write_text(json.dumps(rows[:2]))
    (data / "mine.toml").write_text('format = "llava"\nimages = "photos"\nvalidation = 0.4\n')
    kind = dataset_class(str(data / "mine.toml"))
    assert (len(kind("train")), len(kind("validation"))) == (9, 2)


def test_folder_of_images_that_does_not_exist_is_refused_at_once(data):
    (data / "mine.toml").write_text('format = "llava"\nsource = "chats.json"\nimages = "fotos"\n')
    with pytest.raises(SourceError) as caught:
        dataset_class(str(data / "mine.toml"))()
    assert (caught.value.reason, caught.value.where) == ("source_missing", str(data / "fotos"))


def test_values_that_no_plan_can_hold_are_bad_rows(inline_cli, tmp_path):
    rows = [chat(i, f"Say {i}.", "Yes.", image=None) for i in range(40)]
    rows[1]["id"] = 10**30
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    build(inline_cli, tmp_path / "a.jsonl", tmp_path / "out")
    assert load_manifest(str(tmp_path / "out")).splits["train"].num_samples == 40
    points = [{"points": [[i, 1]], "label": "cup", "image": "a.png"} for i in range(40)]
    points[3]["points"], points[5]["points"] = [[float("nan"), 1]], [[10**30, 1]]
    (tmp_path / "a.png").write_bytes(photo(0))
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, points)))
    build(inline_cli, tmp_path / "p.jsonl", tmp_path / "points", "--max-bad-samples", 1)
    split = load_manifest(str(tmp_path / "points")).splits["train"]
    assert dict(split.quarantined) == {"row_error": 2}


def test_a_share_of_the_images_can_be_set_aside(data):
    (data / "mine.toml").write_text(
        'format = "llava"\nsource = "chats.json"\nimages = "photos"\nvalidation = 0.4\n'
    )
    kind = dataset_class(str(data / "mine.toml"))
    keys = [{str(kind(s).get(i)) for i in range(len(kind(s)))} for s in ("train", "validation")]
    assert not keys[0] & keys[1]
    assert len(keys[0] | keys[1]) == 8


def test_open_dataset_travels_to_another_process(data):
    kind = dataset_class(str(data / "chats.json"))
    rows = kind().rows
    assert pickle.loads(pickle.dumps(rows[0])) == rows[0]


@pytest.mark.parametrize(
    "image, base, want",
    [
        ("a.png", "/data", "/data/a.png"),
        ("/b/a.png", "/data", "/b/a.png"),
        ("file:///b/a.png", "/data", "/b/a.png"),
        ("http://x/a.png", "/data", "http://x/a.png"),
        (" HTTPS://x/a.png\n", "/data", " HTTPS://x/a.png\n"),
        ("az://x/a.png", "/data", "RemoteImage(url='az://x/a.png')"),
        ("ftp://x/a.png", "ftp://x", "RemoteImage(url='ftp://x/a.png')"),
        ("a.png", "https://x/y/", "https://x/y/a.png"),
        ({"bytes": None, "path": "a.png"}, "/data", "/data/a.png"),
        ({"bytes": b"x", "path": "a.png"}, "/data", "b'x'"),
        ("data:image/png;base64,eA==", "/data", "b'x'"),
        ("data:;base64,eA", "/data", "b'x'"),
        ("data:image/png;base64,-_8=", "/data", r"b'\xfb\xff'"),
        ("data:image/png;base64,%2B/8%3D\n", "/data", r"b'\xfb\xff'"),
    ],
)
def test_image_of_a_row_is_found(image, base, want):
    assert str(resolve_image(image, base=base)) == want


@pytest.mark.parametrize(
    "image, reason",
    [
        ("data:image/png;base64,%%%", "row_image_data"),
        ("data:image/svg+xml,%3Csvg/%3E", "row_image_data"),
        (3, "row_image"),
        ("ftp://x/a.png", "row_image_scheme"),
        ("simplecache::http://10.0.0.1/a.png", "row_image_scheme"),
        ("s3://x/a.zip::http://10.0.0.1/a.png", "row_image_scheme"),
        ("https://x/\ud800.png", "row_encoding"),
        ("\ud800.png", "row_encoding"),
    ],
)
def test_image_that_is_none_is_one_bad_row(image, reason):
    with pytest.raises(SampleError) as caught:
        resolve_image(image, base=".")
    assert caught.value.reason == reason


def test_rows_and_images_can_lie_in_an_object_store(s3_server, data):
    url = s3_server.make_bucket() + "/own"
    s3_server.client().put(str(data), url, recursive=True)
    (data / "mine.toml").write_text(
        f'format = "llava"\nsource = "{url}/chats.json"\nimages = "{url}/photos"\n'
    )
    with s3_server.entered():
        counted = mock.patch.object(storage, "read_bytes", wraps=storage.read_bytes)
        with counted as read:
            example = dataset_class(str(data / "mine.toml"))().get(6)
            assert not read.called  # a job asks for each row several times
            assert [each.read() for each in example["image"]] == [photo(0), photo(2)]
        with pytest.raises(SampleError) as caught:
            resolve_image("nine.png", base=f"{url}/photos").read()
    assert caught.value.reason == "image_missing"


@pytest.mark.parametrize("kind", ["memory", pytest.param("s3", marks=pytest.mark.slow)])
def test_folders_of_an_object_store_are_read_as_local_ones(kind, request, tmp_path):
    if kind == "memory":
        url, client, entered = "memory://own-folders", fsspec.filesystem("memory"), nullcontext
    else:
        server = request.getfixturevalue("s3_server")
        url, client, entered = server.make_bucket(), server.client(), server.entered
    photos, saved = tmp_path / "photos", tmp_path / "saved" / "train"
    for folder in (photos / "in", photos / ".hidden", saved):
        folder.mkdir(parents=True)
    for i, name in enumerate(("a.png", "in/b.PNG", ".hidden/c.png")):
        (photos / name).write_bytes(photo(i))
    (photos / "a.txt").write_text("A door.\r\n")
    (photos / "in" / "b.json").write_text('{"caption": "A window."}')
    (saved / "state.json").write_text('{"_data_files": [{"filename": "rows.arrow"}]}')
    (saved / "dataset_info.json").write_text('{"features": {}}')
    rows = pa.Table.from_pylist([{"image": {"bytes": photo(3), "path": None}, "caption": "A cup."}])
    for name in ("rows.arrow", "cache-1.arrow"):
        with pa.ipc.new_stream(saved / name, rows.schema) as out:
            out.write_table(rows)
    client.put(f"{tmp_path}/", url, recursive=True)
    for name, texts in (("photos", ["A door.", "A window."]), ("saved", ["A cup."])):
        local = dataset_class(str(tmp_path / name))()
        with entered():
            stored = dataset_class(f"{url}/{name}")()
            examples = [stored.get(i) for i in range(len(stored))]
            found = [e["message_list"][0]["text"].strip() for e in examples]
            images = [e["image"][0] for e in examples]
            images = [i if isinstance(i, bytes) else i.read() for i in images]
        assert (
            found
            == texts
            == [local.get(i)["message_list"][0]["text"].strip() for i in range(len(local))]
        )
        assert images == ([photo(0), photo(1)] if name == "photos" else [photo(3)])


def test_objects_that_rows_are_read_from_are_files_of_the_source():
    kind = type("Own", (OwnDataset,), {"spec": Spec(name="own", format="llava")})
    url, client = "memory://own-compared", fsspec.filesystem("memory")
    for name in ("rows.jsonl", "photos/a.png", "photos/a.txt", "vqa/v2_questions.json"):
        client.pipe_file(f"{url}/{name}", b"{}")
    client.pipe_file(f"{url}/vqa/v2_annotations.json", b"{}")
    for source, names in (
        ("rows.jsonl", ["rows.jsonl"]),
        ("photos", ["photos/a.png", "photos/a.txt"]),
        ("vqa/v2_questions.json", ["vqa/v2_questions.json", "vqa/v2_annotations.json"]),
    ):
        found = kind.source_files(f"{url}/{source}", "train", unmatched="refuse")
        assert found == [f"{url}/{name}" for name in names]


class WebHandler(SimpleHTTPRequestHandler):
    """Serves a folder as a web server does, and as the hub does a repository of that folder."""

    def log_message(self, *_):
        """Says nothing."""

    def do_GET(self):
        """Answers the hub's questions, and gives files."""
        top, _, below = self.path.partition("?")[0].removeprefix("/api").partition("/main")
        if not self.path.startswith("/api/datasets/me/own"):
            self.path = self.path.removeprefix("/datasets/me/own/resolve/main")
            if "Range" not in self.headers:
                super().do_GET()
                return
            start, stop = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            self._give(Path(self.directory, self.path[1:]).read_bytes()[start : stop + 1], 206)
            return
        folder = Path(self.directory, below.strip("/"))
        found = [{"id": "me/own", "sha": "a" * 40}] if not top.endswith("/tree") else None
        if found is None:
            found = [
                {"type": "directory" if each.is_dir() else "file", "oid": "b" * 40}
                | {"size": each.stat().st_size, "path": each.relative_to(self.directory).as_posix()}
                for each in sorted(folder.glob("**/*" if "recursive=true" in self.path else "*"))
            ]
        self._give(json.dumps(found if top.endswith("/tree") else found[0]).encode(), 200)

    def _give(self, payload, status):
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)


@pytest.fixture
def web(data):
    """Serves the data from loopback; gives its address."""
    lines = [json.dumps(row) for row in json.loads((data / "chats.json").read_text())]
    (data / "chats.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    handler = functools.partial(WebHandler, directory=str(data))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["chats.json", "chats.jsonl.gz"])
def test_rows_and_images_can_be_on_a_web_server(name, web, data):
    dataset = dataset_class(f"{web}/{name}")()
    assert len(dataset) == len(json.loads((data / "chats.json").read_text()))
    example = dataset.get(0)
    assert example["image"] == [f"{web}/0.png"]
    assert example["message_list"][0]["messages"][1] == f"It is {COLORS[0]}."


_HUB = """
import sys
from preprocess.datasets import dataset_class, get_dataset
for name in sys.argv[1:]:
    dataset = dataset_class(name)()
    print(len(dataset), len(dataset.get(6)["image"][1].read()))
print(get_dataset("pixmo_cap", source="hf://datasets/me/own/rows").get(0)["message_list"][0]["text"])
"""


@pytest.mark.slow
def test_rows_and_images_can_be_in_a_repository_of_the_hub(web, data):
    (data / "rows").mkdir()
    rows = [{"image_url": "http://a/b.jpg", "caption": "A door.", "transcripts": []}]
    pq.write_table(pa.Table.from_pylist(rows), data / "rows" / "train.parquet")
    url = "hf://datasets/me/own"
    specs = [data / f"{i}.toml" for i in range(3)]
    for spec, name in zip(specs, ("chats.jsonl.gz", "chats.json", "c*.json"), strict=True):
        images = f'images = "{url}/photos"'
        spec.write_text(f'format = "llava"\nsource = "{url}/{name}"\n{images}\n')
    command = [sys.executable, "-c", _HUB, *map(str, specs)]
    env = {**os.environ, "HF_ENDPOINT": web, "HF_HUB_OFFLINE": "0", "HF_HOME": str(data / "home")}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    size = len(photo(2))
    assert done.stdout.splitlines() == [f"9 {size}"] * 3 + ["A door."], done.stderr


@pytest.mark.parametrize(
    "rows", ["rows.jsonl", "annotations/rows.jsonl", "deep/er/rows.jsonl", "photos/rows.jsonl"]
)
def test_images_are_found_from_the_folders_around_the_rows(rows, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "ä b 0.png").write_bytes(photo(0))
    names = ["photos/ä b 0.png"] if "deep" in rows else ["ä b 0.png", "a" * 5000, "a\0b"]
    (tmp_path / rows).parent.mkdir(exist_ok=True, parents=True)
    written = [json.dumps(chat(0, "<image>\nA?", "B.", image=name)) for name in names]
    (tmp_path / rows).write_text("\n".join(written))
    source = tmp_path / "deep" if "deep" in rows else tmp_path / rows
    if "deep" in rows:  # of several files the first need not be the one that is beside the images
        (tmp_path / "deep" / "a.jsonl").write_text(written[0])
        (tmp_path / "photos").rename(tmp_path / "deep" / "er" / "photos")
    dataset = dataset_class(str(source))()
    assert dataset.image_names[0] >= 1
    assert dataset[0]["image"][0].read_bytes() == photo(0)


@pytest.mark.parametrize("kind", ["files", "folders of images", "below", "spec", "store"])
def test_images_are_those_beside_the_file_that_names_them(kind, tmp_path, inline_cli):
    below = "photos" if kind == "below" else ""
    for i, folder in enumerate(("x", "y", "y/z")):
        place = tmp_path / "rows" / folder
        (place / below).mkdir(parents=True)
        (place / below / "1.png").write_bytes(photo(i))
        if kind == "folders of images":
            (place / "1.txt").write_text(folder)
        else:
            row = {"image": "1.png", "caption": folder}
            (place / "rows.jsonl").write_text(json.dumps(row))
    source = tmp_path / "rows"
    if kind == "folders of images":
        source = f"{source}/*"
    elif kind == "spec":
        source = tmp_path / "a.toml"
        source.write_text('format = "captions"\nsource = "rows/*/**/*.jsonl"\nvalidation = 0.5\n')
    elif kind == "files":
        told = inline_cli.good("inspect", source).out
        assert f"of {source}/y/rows.jsonl: below {source}/y\n" in told
    elif kind == "store":
        url = f"memory://{tmp_path.name}"
        fsspec.filesystem("memory").put(str(source), f"/{tmp_path.name}", recursive=True)
        source = url
    names = ["x", "y", "y/z"]
    splits = ("train", "validation") if kind == "spec" else ("train",)
    found = {}
    for split in splits:
        dataset = dataset_class(str(source))(split)
        for i in range(len(dataset)):
            example = dataset[i]
            (message,) = example["message_list"]
            (image,) = example["image"]
            read = image.read if kind == "store" else image.read_bytes
            found[message["text"]] = read()
    assert found == {name: photo(i) for i, name in enumerate(names)}


def test_rows_stay_in_their_split_when_another_folder_comes(tmp_path):
    spec = tmp_path / "a.toml"
    spec.write_text('format = "captions"\nsource = "rows"\nvalidation = 0.5\n')

    def splits(*folders):
        for folder in folders:
            place = tmp_path / "rows" / folder
            place.mkdir(parents=True)
            num_rows = 12 if folder < "z" else 30  # most of the names that are looked at
            rows = [{"image": f"{i}.png", "caption": f"{folder} {i}"} for i in range(num_rows)]
            (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
            for row in rows:
                (place / row["image"]).write_bytes(b"")
        opened = {split: dataset_class(str(spec))(split) for split in ("train", "validation")}
        held_out = {path for path in opened["train"].held_out()}
        assert held_out == {path for example in opened["validation"] for path in example["image"]}
        return {
            example["message_list"][0]["text"]: split
            for split, dataset in opened.items()
            for example in dataset
        }

    before, after = splits("x"), splits("y", "z")
    assert (len(before), len(after)) == (12, 54)
    assert after.items() >= before.items()


def test_names_of_a_store_start_from_the_folder_above_where_only_that_has_them(tmp_path):
    url = f"memory://{tmp_path.name}"
    names = {
        "rows.jsonl": ("1.png", "1.png"),
        "x/rows.jsonl": ("x/2.png", "x/2.png"),
        "y/rows.jsonl": ("3.png", "y/3.png"),
        "z/rows.jsonl": (f"{url}/z/4.png", "z/4.png"),
    }
    for rows, (name, place) in names.items():
        row = {"image": name, "caption": rows}
        fsspec.filesystem("memory").pipe_file(f"{url}/{rows}", json.dumps(row).encode())
        fsspec.filesystem("memory").pipe_file(f"{url}/{place}", b"")
    dataset = dataset_class(url)("train")
    found = {each["message_list"][0]["text"]: each["image"][0].url for each in dataset}
    assert found == {rows: f"{url}/{place}" for rows, (_, place) in names.items()}
    assert dataset.other_bases == {f"{url}/y/rows.jsonl": f"{url}/y"}


@pytest.mark.parametrize("kind", ["above", "absolute", "beside", "link"])
def test_an_image_of_two_folders_of_rows_is_in_one_split(kind, tmp_path):
    """Each name of it counts as what it means from the first folder, as before the second came."""
    names = {
        "above": "../images",
        "absolute": f"{tmp_path}/images",
        "beside": ".",
        "link": "images",
    }
    spec = tmp_path / "a.toml"
    spec.write_text('format = "captions"\nsource = "rows*"\nvalidation = 0.5\n')
    images = tmp_path / ("rows0" if kind == "beside" else "images")
    images.mkdir()
    for i in range(12):
        (images / f"{i}.png").write_bytes(b"")

    def splits(folder):
        place = tmp_path / folder
        if folder == "rows1" and kind == "beside":
            place.symlink_to("rows0")
            return opened()
        place.mkdir(exist_ok=True)
        if kind == "link":
            (place / "images").symlink_to("../images")
        rows = [{"image": f"{names[kind]}/{i}.png", "caption": f"{folder} {i}"} for i in range(12)]
        (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return opened()

    def opened():
        return [
            {
                os.path.realpath(path)
                for example in dataset_class(str(spec))(split)
                for path in example["image"]
            }
            for split in ("train", "validation")
        ]

    before, after = splits("rows0"), splits("rows1")
    assert after == before
    assert not set.intersection(*after)


@pytest.mark.parametrize(
    "rows, other, reason",
    [
        ("rows.jsonl", "photos/1.png", ""),  # nothing else has the name
        ("rows.jsonl", "masks/1.png", "source_folders"),
        ("rows.jsonl", "copies/1.png", ""),  # the same picture
        ("rows.jsonl", "1.png", ""),  # beside the rows
        ("rows.jsonl", "masks/2.png", ""),
        ("rows.jsonl", ".thumbnails/1.png", ""),
        ("rows.jsonl", "__MACOSX/1.png", ""),
        ("annotations/a.jsonl", "train/1.png", "source_folders"),
        ("annotations/a.jsonl", "annotations/below/1.png", ""),
        ("annotations/a.jsonl", "annotations/1.png", ""),
    ],
)
def test_names_that_mean_others_in_another_folder_are_refused(rows, other, reason, tmp_path):
    for i, name in enumerate(dict.fromkeys(["photos/1.png", other])):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(photo(0 if "copies" in name else i))
    (tmp_path / rows).parent.mkdir(exist_ok=True)
    (tmp_path / rows).write_text(json.dumps({"image": "1.png", "caption": "A."}))
    chosen = "photos/1.png" if rows == "rows.jsonl" and other != "1.png" else other
    if reason:
        with pytest.raises(SourceError) as caught:
            dataset_class(str(tmp_path / rows))()
        assert caught.value.reason == reason
        assert {Path(each).name for each in caught.value.facts["folders"]} == {
            "photos",
            Path(other).parent.name,
        }
        spec = tmp_path / "a.toml"
        spec.write_text(f'format = "captions"\nsource = "{rows}"\nimages = "photos"\n')
        dataset, chosen = dataset_class(str(spec))(), "photos/1.png"
    else:
        dataset = dataset_class(str(tmp_path / rows))()
    (image,) = dataset[0]["image"]
    assert image.read_bytes() == (tmp_path / chosen).read_bytes()


def test_hidden_files_and_answers_are_not_rows_of_their_own(tmp_path):
    for name in ("a.jsonl", ".ipynb_checkpoints/a.jsonl", "__MACOSX/._a.jsonl", ".b.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for name in ("v2_OpenEnded_questions.json", "v2_annotations.json", "annotations.json"):
        (tmp_path / name).write_bytes(b"")
    found = [each.removeprefix(f"{tmp_path}/") for each in list_files(str(tmp_path))]
    assert found == ["a.jsonl", "annotations.json", "v2_OpenEnded_questions.json"]


def test_answers_to_questions_are_files_of_the_source(tmp_path):
    questions = {"questions": [{"image_id": 9, "question_id": 90, "question": "What?"}]}
    answers = {"annotations": [{"question_id": 90, "answers": ["2"]}]}
    (tmp_path / "v2_OpenEnded_questions.json").write_text(json.dumps(questions))
    (tmp_path / "v2_annotations.json").write_text(json.dumps(answers))
    for source in (tmp_path, tmp_path / "v2_OpenEnded_questions.json"):
        kind = dataset_class(str(source))
        found = kind.source_files(kind.source_url(), "train", unmatched="refuse")
        assert [each.name for each in found] == [
            "v2_OpenEnded_questions.json",
            "v2_annotations.json",
        ]
        assert kind()[0]["message_list"][0]["answers"] == ["2"]


def test_files_of_a_folder_are_those_with_rows(tmp_path):
    for name in ("a.jsonl", "b.csv.gz", "deep/c.parquet", "notes.md", "x.jpg", "x.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = [each.removeprefix(f"{tmp_path}/") for each in list_files(str(tmp_path))]
    assert found == ["a.jsonl", "b.csv.gz", "deep/c.parquet"]
    assert list_files(f"{tmp_path}/*.jsonl") == [f"{tmp_path}/a.jsonl"]
    for name in ("a.jsonl", "b.csv.gz", "deep/c.parquet"):
        (tmp_path / name).unlink()
    assert list_files(str(tmp_path)) == [str(tmp_path)]  # images and their side files
    (tmp_path / "x.jpg").unlink()
    (tmp_path / "x.json").unlink()
    with pytest.raises(SourceError) as caught:
        list_files(str(tmp_path))
    assert caught.value.reason == "source_empty"
    with pytest.raises(SourceError) as caught:
        list_files(str(tmp_path / "*.tsv"))
    assert caught.value.reason == "source_missing"


def test_a_folder_of_several_formats_is_refused_with_the_files(tmp_path):
    for i in range(20):
        row = {"image": "a.jpg", "caption": "A cat."} if i < 19 else {"vocab": 3}
        (tmp_path / f"{i:02}.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "00a.jsonl").write_text("{\n")
    assert dataset_class(str(tmp_path / "0*.jsonl")).spec.format == "captions"
    with pytest.raises(SourceError) as caught:
        dataset_class(str(tmp_path))
    assert caught.value.reason == "source_guess"
    assert caught.value.facts["00.jsonl"] == "captions"
    assert "vocab" in caught.value.facts["19.jsonl"]
    # One reader takes all conversations.
    (tmp_path / "in").mkdir()
    llava = {"conversations": [{"from": "human", "value": "A?"}, {"from": "gpt", "value": "B."}]}
    (tmp_path / "in" / "a.jsonl").write_text(json.dumps(llava))
    (tmp_path / "in" / "b.jsonl").write_text(json.dumps({"query": "A?", "response": "B."}))
    assert dataset_class(str(tmp_path / "in")).spec.format == "llava"


def test_file_whose_format_cannot_be_told_is_refused_with_what_it_has(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"vocab": 3}\n')
    with pytest.raises(SourceError) as caught:
        dataset_class(str(tmp_path / "a.jsonl"))
    assert caught.value.reason == "source_guess"
    assert "vocab" in str(caught.value)
    (tmp_path / "a.jsonl").write_text("{\n")
    with pytest.raises(SourceError) as caught:
        dataset_class(str(tmp_path / "a.jsonl"))
    assert caught.value.reason == "source_empty"


@pytest.mark.parametrize(
    "name, want", [("pixmo_cap", False), ("a.jsonl", True), ("s3://b/a", True)]
)
def test_own_data_is_given_by_a_file_or_by_code(name, want):
    assert is_own(name) is want


def test_inspect_shows_a_spec_and_a_row(inline_cli, data):
    done = inline_cli.good("inspect", data / "chats.json")
    assert 'format = "llava"' in done.out
    assert f"exist below {data}/photos" in done.out
    assert "Colour 0?" in done.out
    done = inline_cli.run("inspect", "pixmo_cap")
    assert done.code == 1
    told = ConfigError("inspect_own", dataset="pixmo_cap").what
    assert done.err.splitlines()[0] == f"error: {told}"


def test_inspect_shows_points_of_the_image_and_why_rows_are_left_out(inline_cli, tmp_path):
    (tmp_path / "a.png").write_bytes(photo(0))
    rows = [{"image": "a.png", "label": "cup", "points": p} for p in (3, [[28, 21]])]
    (tmp_path / "it's ä.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = inline_cli.good("inspect", tmp_path / "it's ä.jsonl")
    assert "500 500" in done.out
    assert "left out: 1 (row_fields), first row 0: row has no usable points" in done.out
    (tmp_path / "a.toml").write_text(
        "\n".join(line for line in done.out.splitlines() if " = " in line and "#" not in line)
    )
    assert "500 500" in inline_cli.good("inspect", tmp_path / "a.toml").out


@pytest.mark.parametrize("value", ["absent_module:A", "json:Nope", "json:loads"])
def test_entry_point_that_is_not_a_dataset_is_refused(value, tmp_path, monkeypatch):
    offer(tmp_path, value)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        dataset_class("offered")
    assert caught.value.reason == "dataset_code"
    assert "offered" in caught.value.where


def test_datasets_of_packages_are_listed(inline_cli, tmp_path, monkeypatch):
    offer(tmp_path, "preprocess.datasets.vqa2:DATASET")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "offered" in inline_cli.good("datasets").out.splitlines()
    assert dataset_class("offered").name == "vqa2"


def offer(folder, value):
    info = folder / "offering-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: offering\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[vlm_shards.datasets]\noffered = {value}\n")


def test_web_dataset_tars_become_prepared_shards(inline_cli, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in range(4):
            for suffix, payload in (("png", photo(i)), ("txt", f"Colour no {i}.".encode())):
                info = tarfile.TarInfo(f"{i:05d}.{suffix}")
                info.size = len(payload)
                archive.addfile(info, io.BytesIO(payload))
    build(inline_cli, tmp_path / "a.tar", tmp_path / "out", "--codec", "raw")
    stream = StreamingDataset(str(tmp_path / "out"), seed=0)
    assert stream.num_samples == 4
    colors = {tuple(np.median(stream.example(i)["images"], axis=(0, 2, 3))) for i in range(4)}
    assert len(colors) == 4


@pytest.mark.parametrize("name", ["img_path", "image_local_name", "imageName", "photo"])
def test_images_that_are_not_found_are_not_left_out_in_silence(name, tmp_path):
    rows = tmp_path / "rows.jsonl"
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cup."}]
    for row in ({"conversations": turns}, {"question": "What?", "answer": "A cup."}):
        rows.write_text(json.dumps({**row, name: "a.jpg", "image": None}))
        with pytest.raises(SourceError) as caught:
            dataset_class(str(rows))()
        assert (caught.value.reason, caught.value.facts["columns"]) == ("source_images", [name])
        rows.write_text(json.dumps({**row, name: None, "imagination": "x", "num_images": 0}))
        assert "image" not in dataset_class(str(rows))().get(0)
    spec = tmp_path / "spec.toml"
    rows.write_text(json.dumps({"conversations": turns, name: "a.jpg"}))
    spec.write_text(f'format = "llava"\nsource = "rows.jsonl"\n[columns]\nimage = "{name}"\n')
    assert dataset_class(str(spec))().get(0)["image"] == [tmp_path / "a.jpg"]
    spec.write_text(spec.read_text().replace(name, ""))
    assert "image" not in dataset_class(str(spec))().get(0)
    spec.write_text(spec.read_text().replace('image = ""', 'image = "imgs"'))
    with pytest.raises(SourceError) as caught:
        dataset_class(str(spec))()
    assert caught.value.reason == "source_columns"
    assert caught.value.facts["columns"] == ["conversations", name]
    last = json.dumps({"conversations": turns, "imgs": "a.jpg"})
    rows.write_text(f"{rows.read_text()}\n" * 300 + last)  # rows of JSON may lack a column
    assert "image" not in dataset_class(str(spec))().get(0)


def test_source_without_a_column_of_its_format_is_refused_with_those_it_has(tmp_path):
    (tmp_path / "a.toml").write_text('format = "captions"\nsource = "a.csv"\n')
    (tmp_path / "a.csv").write_text("image,captoin\na.png,x\n")
    with pytest.raises(SourceError) as caught:
        dataset_class(str(tmp_path / "a.toml"))()
    assert caught.value.reason == "source_columns"
    assert caught.value.facts["columns"] == ["image", "captoin"]
    assert "captoin" in str(caught.value).splitlines()[-1]
    # One row that has it is enough: the others are bad rows.
    (tmp_path / "a.toml").write_text('format = "captions"\nsource = "a.jsonl"\n')
    (tmp_path / "a.jsonl").write_text('{"image": "a.png"}\n{"image": "a.png", "caption": "x"}\n')
    assert len(dataset_class(str(tmp_path / "a.toml"))()) == 2


TEXT = "Zoë, 李 and\tÅsa"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_no_row_is_lost_to_an_encoding(encoding, name, tmp_path):
    rows = [{"image": f"{i}.png", "caption": f"{TEXT} {i}"} for i in range(3)]
    separator = "\t" if name.endswith("v") and "tsv" in name else ","
    if name == "a.json":
        text = json.dumps(rows, ensure_ascii=False)
    elif name == "a.jsonl":
        text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    else:
        cells = [["image", "caption"], *(list(row.values()) for row in rows)]
        text = "".join(separator.join(f'"{cell}"' for cell in row) + "\r\n" for row in cells)
        if separator == "\t":
            text = text.replace(TEXT, TEXT.replace("\t", " "))
    (tmp_path / name).write_bytes(text.encode(encoding))
    dataset = dataset_class(str(tmp_path / name))()
    want = [f"{TEXT.replace(chr(9), ' ') if separator == chr(9) else TEXT} {i}" for i in range(3)]
    assert [dataset[i]["message_list"][0]["text"] for i in range(3)] == want
    assert pickle.loads(pickle.dumps(dataset.rows.kind))["files"] == [name]


def test_patterns_name_files_wherever_they_are(s3_server, tmp_path):
    for name in ("a/one.jsonl", "b/two.jsonl", "b/three.csv", "c/d/four.jsonl.gz", "c/x.png"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "in" / name).write_bytes(b"")
    url = s3_server.make_bucket() + "/own"
    s3_server.client().put(str(tmp_path / "in"), url, recursive=True)
    wanted = {
        "{a,b}/*.jsonl": ["a/one.jsonl", "b/two.jsonl"],
        "*/t*": ["b/three.csv", "b/two.jsonl"],
        "**/*.jsonl.gz": ["c/d/four.jsonl.gz"],
        "[ab]/one.jsonl": ["a/one.jsonl"],
    }
    with s3_server.entered():
        for pattern, want in wanted.items():
            for place in (f"{tmp_path}/in", url):
                found = list_files(f"{place}/{pattern}")
                assert [each.removeprefix(f"{place}/") for each in found] == want
        every = ["a/one.jsonl", "b/three.csv", "b/two.jsonl", "c/d/four.jsonl.gz"]
        for folder in (url, f"{url}/"):
            assert [each.removeprefix(f"{url}/") for each in list_files(folder)] == every
        for missing in (f"{url}/*.tar", f"{url}/none/"):
            with pytest.raises(SourceError) as caught:
                list_files(missing)
            assert caught.value.reason == "source_missing"


_PATTERNS = {
    "": ["a/1.jsonl", "b/2.jsonl", "link/3.jsonl", "link/deep/4.jsonl"],
    "/**": ["a/1.jsonl", "b/2.jsonl", "link/3.jsonl", "link/deep/4.jsonl"],
    "/**/*.jsonl": ["a/1.jsonl", "b/2.jsonl", "link/3.jsonl", "link/deep/4.jsonl"],
    "/*/*.jsonl": ["a/1.jsonl", "b/2.jsonl", "link/3.jsonl"],
    "/*": ["a/1.jsonl", "b/2.jsonl", "link/3.jsonl", "link/deep/4.jsonl"],
    "/*/**": ["a/1.jsonl", "b/2.jsonl", "link/3.jsonl", "link/deep/4.jsonl"],
    "/**/deep/**": ["link/deep/4.jsonl"],
    "/{a,link}": ["a/1.jsonl", "link/3.jsonl", "link/deep/4.jsonl"],
    "/.hidden/*": [".hidden/0.jsonl"],
    "/a/.*/*": ["a/.ipynb_checkpoints/1.jsonl"],
    "/__old/*.jsonl": ["__old/0.jsonl"],
    "/{b,__old}": ["__old/0.jsonl", "b/2.jsonl"],
}


@pytest.mark.parametrize("pattern", _PATTERNS)
def test_folders_that_are_links_are_looked_into_and_hidden_ones_are_not(pattern, tmp_path):
    source, disk = tmp_path / "in", tmp_path / "disk"
    hidden = (".hidden/0", "a/.ipynb_checkpoints/1", "__old/0", "a/._1")
    for name in ("in/a/1", "in/b/2", "disk/3", "disk/deep/4", *(f"in/{each}" for each in hidden)):
        (tmp_path / f"{name}.jsonl").parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / f"{name}.jsonl").write_bytes(b"")
    (source / "link").symlink_to(disk)
    (disk / "deep" / "back").symlink_to(disk)
    found = list_files(f"{source}{pattern}")
    assert [each.removeprefix(f"{source}/") for each in found] == _PATTERNS[pattern]


def test_links_give_no_file_twice(tmp_path):
    root = tmp_path / "above" / "in"
    for name in ("v1/1.jsonl", "v1/deep/2.jsonl", ".store/3.jsonl"):
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_bytes(b"")
    links = {"latest": "v1", "part": "v1/deep", "here": ".", "up": "..", "back": root.parent}
    for name, target in {**links, "stored": ".store", "v1/over": "../v1"}.items():
        (root / name).symlink_to(target)
    found = [each.removeprefix(f"{root}/") for each in list_files(str(root))]
    assert found == ["stored/3.jsonl", "v1/1.jsonl", "v1/deep/2.jsonl"]
    (tmp_path / "linked").symlink_to(root)
    assert len(list_files(str(tmp_path / "linked"))) == 3
    assert [*map(os.path.basename, list_files(f"{root}/**/*.jsonl"))] == [
        *map(os.path.basename, found)
    ]


@pytest.mark.parametrize(
    "links, want",
    [
        ({"v1": "v1", "latest": "v1"}, ["latest/1", "latest/deep/2"]),
        ({"a": ".", "b": "v1", "c": "v1/deep"}, ["a/v1/1", "a/v1/deep/2"]),
        ({"a": "v1/deep", "b": "v1", "c": "."}, ["a/2", "b/1"]),
        ({"a": ".", "b": "v1/.store", "c": "v1/.store"}, ["a/v1/1", "a/v1/deep/2", "b/3"]),
    ],
)
def test_links_to_folders_elsewhere_give_no_file_twice(links, want, tmp_path):
    for name in ("v1/1.jsonl", "v1/deep/2.jsonl", "v1/.store/3.jsonl"):
        (tmp_path / "disk" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "disk" / name).write_bytes(b"")
    root = tmp_path / "in"
    root.mkdir()
    for name, target in links.items():
        (root / name).symlink_to(tmp_path / "disk" / target)
    found = [each.removeprefix(f"{root}/") for each in list_files(str(root))]
    assert found == [f"{each}.jsonl" for each in want]


def test_images_below_a_link_have_their_side_files(tmp_path):
    for place in ("in", "disk"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "1.png").write_bytes(photo(0))
        (tmp_path / place / "1.txt").write_text(place)
    (tmp_path / "in" / "link").symlink_to(tmp_path / "disk")
    dataset = dataset_class(str(tmp_path / "in"))()
    assert [each["message_list"][0]["text"] for each in dataset] == ["in", "disk"]


def test_folders_of_save_to_disk_hold_rows_and_no_lists(tmp_path):
    import datasets

    rows = [{"image": {"bytes": photo(i), "path": None}, "caption": f"c{i}"} for i in range(3)]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "two")
    (tmp_path / "one" / "cache-1.arrow").write_bytes(b"")
    for folder in ("one", "two", "two/train"):
        dataset = dataset_class(str(tmp_path / folder))()
        assert [dataset[i]["image"] for i in range(len(dataset))] == [[photo(i)] for i in range(3)]
    assert dataset_class(str(tmp_path / "two"))("test")[2]["message_list"][0]["text"] == "c2"


def write_tars(folder, *, shards=2, samples=3):
    folder.mkdir()
    for s in range(shards):
        with tarfile.open(folder / f"{s:05d}.tar", "w") as archive:
            for i in range(samples):
                number = s * samples + i
                text = f"Colour no {number}."
                for suffix, payload in (("png", photo(number)), ("txt", text.encode())):
                    info = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    info.size = len(payload)
                    archive.addfile(info, io.BytesIO(payload))
    return folder


def files_of(out):
    """The shards of a dataset."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*.tar"))
    }


def test_imported_tars_become_prepared_shards(inline_cli, tmp_path):
    tars = write_tars(tmp_path / "tars")
    inline_cli.good("import", tars, "--out", tmp_path / "raw", "--name", "photos")
    build(inline_cli, tmp_path / "raw", tmp_path / "again", "--name", "photos")
    build(inline_cli, tars, tmp_path / "direct", "--name", "photos")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "direct")
    stream = StreamingDataset(str(tmp_path / "again"), seed=0)
    raw = RawDataset(str(tmp_path / "raw"), decode=lambda sample, _: bytes(sample.fields["txt"]))
    assert stream.num_samples == raw.num_samples == 6


def test_imported_tars_of_which_samples_were_selected_are_refused(inline_cli, tmp_path):
    tars = write_tars(tmp_path / "tars")
    inline_cli.good("import", tars, "--out", tmp_path / "raw", "--name", "photos")
    (tmp_path / "keys").write_text("000000001\n")
    inline_cli.good("filter", tmp_path / "raw", tmp_path / "one", "--keys", tmp_path / "keys")
    with pytest.raises(SourceError) as caught:
        dataset_class(str(tmp_path / "one"))()
    assert caught.value.reason == "source_imported"


def test_tars_of_an_object_store_are_read_once(inline_cli, s3_server, tmp_path):
    tars = write_tars(tmp_path / "tars")
    url = s3_server.make_bucket() + "/tars"
    s3_server.client().put(str(tars), url, recursive=True)
    build(inline_cli, tars, tmp_path / "local", "--name", "photos")
    counted = mock.patch.object(storage, "fetch_file", wraps=storage.fetch_file)
    store = mock.patch.dict(inline_cli.env, s3_server.env)
    with s3_server.entered(), store, counted as fetched:
        build(inline_cli, f"{url}/*.tar", tmp_path / "out", "--name", "photos")
    assert sorted(call.args[0] for call in fetched.call_args_list) == [
        f"{url}/{i:05d}.tar" for i in range(2)
    ]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "local")


def test_two_modes_of_one_dataset_are_in_one_mixture(inline_cli, tmp_path):
    modes = dataset_class("pixmo_points").modes[:2]
    for mode in modes:
        more = ("--source", "sample", "--limit", 6, "--mode", mode, "--name", f"points-{mode}")
        build(inline_cli, "pixmo_points", tmp_path / mode, *more)
    view = View(image=ImageView(size_px=112))
    parts = [StreamingDataset(str(tmp_path / mode), seed=0, view=view) for mode in modes]
    mixture = IterableDatasetMixture(parts, [1.0, 1.0], seed=0)
    loader = make_dataloader(mixture, global_batch_size=4, sequence_length=512)
    tokenizer = load_tokenizer()
    text = tokenizer.decode([int(t) for t in next(iter(loader))["input_ids"].flatten() if t < 2900])
    assert "Counting the <points" in text
    assert "Assistant: <points" in text
