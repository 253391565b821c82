"""The files of added columns: names, types, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest

from shardspec import columns
from shardspec.columns import columns_dtype, encode_columns, name_problem, parse_columns
from shardspec.errors import ManifestError, ShardError
from shardspec.manifest import AddedColumns, ColumnFile, load_manifest, parse_manifest, sealed

TYPES = {
    "clean": "bool",
    "rank": "int64",
    "score": "float64",
    "licence": "text[8]",
    "clip": "float32[3]",
    "box": "int64[4]",
}


def table(num=5):
    rows = np.zeros(num, columns_dtype(TYPES))
    rows["rank"], rows["score"], rows["licence"] = np.arange(num), np.arange(num) / 7, b"cc-by"
    return rows


def parsed(payload, *, num=5, sha256=None):
    return parse_columns(
        memoryview(payload), where="x", types=TYPES, num_samples=num, sha256=sha256
    )


def test_rows_come_back_and_the_same_rows_give_the_same_bytes():
    payload = encode_columns(table())
    assert payload == encode_columns(table())
    assert parsed(payload).tobytes() == table().tobytes()
    assert len(parsed(encode_columns(table(0)), num=0)) == 0


def test_types_and_row_types_name_each_other():
    dtype = columns_dtype(TYPES)
    assert dtype.names == tuple(sorted(TYPES))
    assert {name: columns.column_type(dtype[name]) for name in TYPES} == TYPES


@pytest.mark.parametrize(
    "name", ["num_tokens", "key", "num_members", "view_length", "a b", "1a", "", "and", "x" * 61]
)
def test_a_name_that_no_condition_could_have_is_refused(name):
    assert name_problem(name)


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p[:-1],
        lambda p: p + b"\0",
        lambda p: b"",
        lambda p: p.replace(b"<i8", b"<f8", 1),
        lambda p: p.replace(b"score", b"spare", 1),
        lambda p: p.replace(b"(5,)", b"(4,)", 1),
        lambda p: b"PK" + p[2:],
    ],
)
def test_a_damaged_file_is_refused_by_name(damage):
    with pytest.raises(ShardError) as caught:
        parsed(damage(encode_columns(table())))
    assert caught.value.reason == "columns_format"


def test_every_flipped_byte_is_noticed():
    payload = encode_columns(table())
    digest = columns.hashlib.sha256(payload).hexdigest()
    parsed(payload, sha256=digest)
    for at in range(0, len(payload), 17):
        damaged = bytearray(payload)
        damaged[at] ^= 1
        with pytest.raises(ShardError) as caught:
            parsed(bytes(damaged), sha256=digest)
        assert caught.value.reason == "columns_sha256"


@pytest.fixture
def annotated(tiny_dataset):
    manifest = load_manifest(str(tiny_dataset))
    files = {shard.url: ColumnFile(num_bytes=9, sha256="0" * 64) for shard in manifest.shards}
    return dataclasses.replace(manifest, columns=AddedColumns(types=TYPES, files=files))


def test_a_manifest_with_columns_is_of_version_2_and_comes_back(annotated):
    document = json.loads(annotated.encode())
    assert document["format_version"] == 2
    assert parse_manifest(annotated.encode(), where="x") == annotated


BROKEN = {
    "a list": lambda c: c.update(columns=[]),
    "no types": lambda c: c["columns"].pop("types"),
    "no files": lambda c: c["columns"].pop("files"),
    "unknown type": lambda c: c["columns"]["types"].update(score="float16"),
    "type is a number": lambda c: c["columns"]["types"].update(score=8),
    "long text": lambda c: c["columns"]["types"].update(licence="text[257]"),
    "long vector": lambda c: c["columns"]["types"].update(clip="float32[4097]"),
    "empty vector": lambda c: c["columns"]["types"].update(clip="float32[0]"),
    "name of the index": lambda c: c["columns"]["types"].update(width="int64"),
    "a shard without": lambda c: c["columns"]["files"].popitem(),
    "no hash": lambda c: next(iter(c["columns"]["files"].values())).pop("sha256"),
    "negative length": lambda c: next(iter(c["columns"]["files"].values())).update(num_bytes=-1),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_columns_of_a_manifest_are_refused_by_name(name, annotated):
    document = json.loads(annotated.encode())
    BROKEN[name](document)
    with pytest.raises(ManifestError) as caught:
        parse_manifest(sealed(document), where="x")
    assert caught.value.reason == "manifest_fields"
    assert "columns" in str(caught.value)
