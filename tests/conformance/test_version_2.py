"""Version 2: a view and a raw dataset that every later release reads, and broken ones.

`v2-view/` shows the samples of `v1/` the other way round; `v2-raw/` is a foreign tar with PAX
headers, and its index; `v2-columns/` are the samples of `v1/` with added columns. All were written
once and are never edited.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from loader.raw import RawDataset
from loader.reading.reader import ShardReader
from preprocess.job.verify import verify
from shardspec.errors import ManifestError, ShardsError
from shardspec.manifest import MANIFEST_NAME, require_manifest, sealed
from tests.inline import Quiet

HERE = Path(__file__).parent
VIEW, RAW, COLUMNS = HERE / "v2-view", HERE / "v2-raw" / "index", HERE / "v2-columns"


def texts(sample, rng):
    return sample.key, {name: bytes(payload) for name, payload in sample.fields.items()}


@pytest.mark.parametrize("folder", [VIEW, RAW, COLUMNS])
def test_version_2_verifies(folder):
    assert verify(str(folder), Quiet(), deep=True) == []


def test_the_view_shows_the_samples_of_version_1_the_other_way_round():
    view = ShardReader(str(VIEW), require_manifest(str(VIEW)), split="train", check="crc")
    v1 = HERE / "v1"
    owner = ShardReader(str(v1), require_manifest(str(v1)), split="train", check="crc")
    assert [view.read(i).key for i in range(2)] == ["tiny-1", "tiny-0"]
    for i in range(2):
        got, want = view.read(i), owner.read(1 - i)
        assert got.tokens.tolist() == want.tokens.tolist()
        assert got.spans.tolist() == want.spans.tolist()
        assert got.images[0].pixels.tolist() == want.images[0].pixels.tolist()


def test_the_raw_dataset_reads_as_it_was_meant():
    options = {"decode": texts, "shuffle": False, "tail": "pad", "check": "crc"}
    assert list(RawDataset(str(RAW), **options)) == [
        ("set/0", {"txt": b"text of 0\n", "bin": bytes(range(256)) * 3}),
        ("set/" + "k" * 120, {"txt": "größer".encode()}),
    ]


def test_added_columns_read_as_they_were_meant():
    reader = ShardReader(str(COLUMNS), require_manifest(str(COLUMNS)), split="train", check="crc")
    assert [reader.read(i).key for i in range(2)] == ["tiny-0", "tiny-1"]
    names = ["box", "clean", "clip", "licence", "rank", "score"]
    found = reader.columns(names, np.arange(2))
    assert {name: (values.dtype.str, values.tolist()) for name, values in found.items()} == {
        "box": ("<i8", [[1, 2, 3], [-4, 5, 6]]),
        "clean": ("|b1", [True, False]),
        "clip": ("<f4", [[0.5, -1.0], [2.0, 3.0]]),
        "licence": ("|S8", ["größer".encode(), b""]),
        "rank": ("<i8", [-3, 2**62]),
        "score": ("<f8", [0.25, -1e300]),
    }


def first(document):
    return next(iter(document["view"]["parts"]))


def set_parts(document, text):
    document["view"]["parts"][first(document)] = text


BROKEN = {
    "raw is missing": lambda d: d.pop("raw"),
    "raw is no truth": lambda d: d.update(raw=1),
    "view is a list": lambda d: d.update(view=[]),
    "view has no files": lambda d: d["view"].pop("files"),
    "view has no parts": lambda d: d["view"].pop("parts"),
    "file has no hash": lambda d: d["view"]["files"][0].pop("sha256"),
    "file has an unknown field": lambda d: d["view"]["files"][0].update(split="train"),
    "shard has no parts": lambda d: d["view"]["parts"].pop(first(d)),
    "parts are a list": lambda d: set_parts(d, [[0, 0, 1]]),
    "parts are no runs": lambda d: set_parts(d, "0:0-1"),
    "run is negative": lambda d: set_parts(d, "0:-1+1"),
    "run is empty": lambda d: set_parts(d, "0:0+0 0:1+1"),
    "run is of no file": lambda d: set_parts(d, "1:0+1"),
    "run ends behind the file": lambda d: set_parts(d, "0:2+1"),
    "runs are fewer than the shard's samples": lambda d: set_parts(d, ""),
    "a row stands in the split twice": lambda d: set_parts(d, "0:0+1"),
    "tokenizer is missing": lambda d: d.update(tokenizer=None),
    "version 1 has no views": lambda d: d.update(format_version=1),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_view_is_refused_by_name(name, tmp_path):
    document = json.loads((VIEW / MANIFEST_NAME).read_bytes())
    BROKEN[name](document)
    (tmp_path / MANIFEST_NAME).write_bytes(sealed(document))
    if name == "version 1 has no views":
        # Its shards are no files: whoever ignores the new fields finds nothing.
        assert verify(str(tmp_path), Quiet())[1].reason == "shard_missing"
        return
    with pytest.raises(ManifestError) as caught:
        require_manifest(str(tmp_path))
    assert caught.value.reason == "manifest_fields"


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda d: (d / "v1/train/tiny-train-00000-of-00001.tar").unlink(), "shard_missing"),
        (lambda d: (d / "v1/train/tiny-train-00000-of-00001.index.npy").unlink(), "shard_missing"),
        (
            lambda d: (d / "v1/train/tiny-train-00000-of-00001.tar").write_bytes(b"x" * 9216),
            "shard_sha256",
        ),
        (lambda d: (d / "v2-raw/foreign.tar").write_bytes(b""), "shard_size"),
        (lambda d: (d / "v2-raw/index/train").rename(d / "elsewhere"), "shard_missing"),
    ],
)
def test_files_that_a_view_names_are_checked_where_they_lie(damage, reason, tmp_path):
    for name in ("v1", "v2-view", "v2-raw"):
        shutil.copytree(HERE / name, tmp_path / name)
    damage(tmp_path)
    found = []
    for folder in (tmp_path / "v2-view", tmp_path / "v2-raw" / "index"):
        found += verify(str(folder), Quiet())
    assert [finding.reason for finding in found] == [reason]


@pytest.mark.parametrize("folder", ["v2-view", "v2-raw/index"])
def test_a_reader_refuses_what_a_missing_file_leaves(folder, tmp_path):
    for name in ("v2-view", "v2-raw"):
        shutil.copytree(HERE / name, tmp_path / name)
    (tmp_path / "v2-raw" / "foreign.tar").unlink()
    url = str(tmp_path / folder)
    reader = ShardReader(url, require_manifest(url), split="train")
    with pytest.raises(ShardsError) as caught:
        reader.members(0)
    assert caught.value.reason == "shard_missing"
