"""The dataset of each format version is still read, and broken ones are refused by name.

`v1/` was written once and is never edited: it is what version 1 means. Each broken dataset is that
one with a single thing wrong, named in the table with the reason that a reader must give.
"""

import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from loader.reading.reader import ShardReader
from preprocess.job.verify import verify
from shardspec.errors import ShardsError
from shardspec.index import INDEX_DTYPE, encode_index, index_row
from shardspec.manifest import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    Manifest,
    ShardEntry,
    SplitEntry,
    TokenizerEntry,
    canonical_json,
    require_manifest,
    sealed,
)
from shardspec.media import encode_stored
from shardspec.sample import Geometry, PreparedImage, PreparedSample, sample_members, spans_table
from shardspec.tar import BLOCK, END_OF_ARCHIVE, TarWriter
from tests.inline import Quiet

V1 = Path(__file__).parent / "v1"
TAR = "train/tiny-train-00000-of-00001.tar"
INDEX = "train/tiny-train-00000-of-00001.index.npy"


def samples():
    """Two samples: a picture each, two baked variants of a turn, two branches; one has a lead."""
    made = []
    for number, (height, width) in enumerate([(2, 3), (4, 1)]):
        pixels = np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)
        image = PreparedImage(
            pixels=pixels + np.uint8(100 * number),
            source_width=width * 10,
            source_height=height * 10,
            geometry=Geometry.FLIP | Geometry.COLOR,
        )
        texts = [
            (0, 0, 0, 2, 5, 8, 1_000_000),
            (0, 0, 2, 5, 5, 8, 1_000_000),
            (1, 0, 0, 2, 8, 9, 500_000),
        ]
        made.append(
            PreparedSample(
                key=f"tiny-{number}",
                tokens=np.arange(10 * number, 10 * number + 9, dtype="<i4"),
                spans=spans_table(texts, [image], leads=[(4, 6)] * number),
                images=(image,),
                record={"key": f"tiny-{number}", "message_list": [], "metadata": {"text": "Grün"}},
            )
        )
    return made


TOKENIZER = (
    b'{"added_tokens":[{"id":0,"content":"<s>","special":true},'
    b'{"id":1,"content":"</s>","special":true},{"id":2,"content":"<pad>","special":true}],'
    b'"model":{"vocab":{}}}\n'
)
"""Stands for a tokenizer.json: the contract knows its hash, and the ids of the special tokens."""


def write_dataset(folder):
    """Writes the dataset of version 1 from its samples."""
    stream, rows = io.BytesIO(), []
    writer = TarWriter(stream)
    for sample in samples():
        encoded = [encode_stored(image.pixels, codec="raw") for image in sample.images]
        members = sample_members(sample, encoded, codec="raw", several=False)
        place = writer.write_sample(members)
        sizes = [len(payload) for payload in encoded]
        json_bytes = len(members[0][1])
        rows.append(index_row(sample, place=place, json_bytes=json_bytes, image_sizes=sizes))
    sha256, table = writer.finish(), np.concatenate(rows)
    index = encode_index(table)
    totals = {n: int(table[n].sum()) for n in ("num_images", "num_tokens", "num_loss_tokens")}
    shard = ShardEntry(
        url=TAR,
        split="train",
        nsamples=2,
        num_bytes=writer.num_bytes,
        sha256=sha256,
        index_bytes=len(index),
        index_sha256=hashlib.sha256(index).hexdigest(),
        **totals,
    )
    split = SplitEntry(
        build_key="0" * 64,
        source={"kind": "conformance"},
        num_samples=2,
        num_bytes=writer.num_bytes,
        quarantined={},
        **totals,
    )
    manifest = Manifest(
        dataset="tiny",
        recipe={"image": {"codec": "raw"}},
        tokenizer=TokenizerEntry(
            name="none",
            sha256=hashlib.sha256(TOKENIZER).hexdigest(),
            probe_sha256="0" * 64,
            vocab_size=100,
            embedding_size=108,
            special_ids={"bos": 0, "eos": 1, "pad": 2},
            special_tokens={"bos": "<s>", "eos": "</s>", "pad": "<pad>"},
        ),
        libraries={},
        splits={"train": split},
        shards=(shard,),
    )
    (folder / "train").mkdir(parents=True)
    (folder / TAR).write_bytes(stream.getvalue())
    (folder / INDEX).write_bytes(index)
    (folder / TOKENIZER_NAME).parent.mkdir()
    (folder / TOKENIZER_NAME).write_bytes(TOKENIZER)
    (folder / MANIFEST_NAME).write_bytes(manifest.encode())


def test_writers_still_make_version_1_byte_for_byte(tmp_path):
    write_dataset(tmp_path / "now")
    for name in (MANIFEST_NAME, TOKENIZER_NAME, TAR, INDEX):
        assert (tmp_path / "now" / name).read_bytes() == (V1 / name).read_bytes(), name


def test_version_1_verifies():
    assert verify(str(V1), Quiet(), deep=True) == []


def test_version_1_reads_as_it_was_meant():
    manifest = require_manifest(str(V1))
    reader = ShardReader(str(V1), manifest, split="train", check="crc")
    assert len(reader) == 2
    for number, want in enumerate(samples()):
        got = reader.read(number)
        assert got.key == want.key
        assert got.tokens.tolist() == want.tokens.tolist()
        assert got.spans[:-1].tolist() == want.spans[:-1].tolist()
        assert [image.pixels.tolist() for image in got.images] == [
            image.pixels.tolist() for image in want.images
        ]
        assert reader.record(number) == want.record
    assert got.spans[-1].tolist() == [1, 0, 10, 40, 1, 4, 128 + 12, 5]


def test_version_1_is_readable_without_our_code():
    table = np.load(V1 / INDEX, allow_pickle=False)
    with tarfile.open(V1 / TAR, "r:") as archive:
        payloads = {m.name: archive.extractfile(m).read() for m in archive.getmembers()}
    assert list(payloads) == [
        f"tiny-{i}.{suffix}"
        for i in range(2)
        for suffix in ("json", "spans.npy", "tokens.npy", "image.npy")
    ]
    assert table["key"].tolist() == [b"tiny-0", b"tiny-1"]
    assert table["num_tokens"].tolist() == [9, 9]
    assert np.load(io.BytesIO(payloads["tiny-1.tokens.npy"])).tolist() == list(range(10, 19))
    assert np.load(io.BytesIO(payloads["tiny-0.image.npy"])).shape == (2, 3, 3)
    assert json.loads(payloads["tiny-0.json"])["metadata"] == {"text": "Grün"}


def rewrite(folder, *, tar=None, index=None, shard=None, document=None):
    """Replaces files and makes the manifest's sums fit them again, so that only depth can tell."""
    read = json.loads((folder / MANIFEST_NAME).read_bytes())
    entry = read["shardlist"][0]
    for payload, name, size, digest in (
        (tar, TAR, "num_bytes", "sha256"),
        (index, INDEX, "index_bytes", "index_sha256"),
    ):
        if payload is not None:
            (folder / name).write_bytes(payload)
            entry[size], entry[digest] = len(payload), hashlib.sha256(payload).hexdigest()
    entry.update(shard or {})
    read.update(document or {})
    (folder / MANIFEST_NAME).write_bytes(sealed(read))


def edited(name, *, at, payload):
    """The bytes of a file of the dataset with some of them replaced."""
    found = bytearray((V1 / name).read_bytes())
    found[at : at + len(payload)] = payload
    return bytes(found)


def cut(name, count):
    payload = (V1 / name).read_bytes()
    return payload[: len(payload) - count]


def retokenized(name, i):
    entry = without()["tokenizer"]
    return {**entry, "special_ids": {**entry["special_ids"], name: i}}


def rows(**columns):
    table = np.load(V1 / INDEX)
    for name, value in columns.items():
        table[name] = value
    return encode_index(table)


def second_row():
    return int(np.load(V1 / INDEX)["offset"][1])


def resealed_header(*, at, field):
    """The shard with a changed first header whose checksum is right."""
    header = bytearray((V1 / TAR).read_bytes()[:BLOCK])
    header[at : at + len(field)] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return edited(TAR, at=0, payload=bytes(header))


def member_start(suffix):
    with tarfile.open(V1 / TAR, "r:") as archive:
        return archive.getmember(f"tiny-0.{suffix}").offset_data


def without(*names):
    read = json.loads((V1 / MANIFEST_NAME).read_bytes())
    return {name: value for name, value in read.items() if name not in names}


# What is wrong, how it is made, the reason that `verify` must give.
BROKEN = {
    "manifest is gone": (lambda d: (d / MANIFEST_NAME).unlink(), "manifest_missing"),
    "manifest is cut": (
        lambda d: (d / MANIFEST_NAME).write_bytes(cut(MANIFEST_NAME, 5)),
        "manifest_json",
    ),
    "manifest is of an unknown version": (
        lambda d: rewrite(d, document={"format_version": 3}),
        "manifest_version",
    ),
    "manifest has no tokenizer": (
        lambda d: (d / MANIFEST_NAME).write_bytes(sealed(without("tokenizer"))),
        "manifest_fields",
    ),
    "manifest has no digest": (
        lambda d: (d / MANIFEST_NAME).write_bytes(canonical_json(without("digest"), indent=1)),
        "manifest_digest",
    ),
    "manifest has another byte": (
        lambda d: (d / MANIFEST_NAME).write_bytes(
            edited(MANIFEST_NAME, at=cut(MANIFEST_NAME, 0).index(b'"eos": 1') + 7, payload=b"2")
        ),
        "manifest_digest",
    ),
    "special id is another": (
        lambda d: rewrite(d, document={"tokenizer": retokenized("eos", 2)}),
        "tokenizer_file",
    ),
    "special id is outside the embedding": (
        lambda d: rewrite(d, document={"tokenizer": retokenized("eos", 108)}),
        "manifest_fields",
    ),
    "shard's path leads outside": (
        lambda d: rewrite(d, shard={"url": f"../{V1.name}/{TAR}"}),
        "manifest_fields",
    ),
    "shard is named twice": (
        lambda d: rewrite(d, document={"shardlist": 2 * without()["shardlist"]}),
        "manifest_fields",
    ),
    "shard is gone": (lambda d: (d / TAR).unlink(), "shard_missing"),
    "shard is shorter": (lambda d: (d / TAR).write_bytes(cut(TAR, 1)), "shard_size"),
    "shard has another bit": (
        lambda d: (d / TAR).write_bytes(edited(TAR, at=member_start("json"), payload=b"[")),
        "shard_sha256",
    ),
    "shard lacks its last block": (lambda d: rewrite(d, tar=cut(TAR, BLOCK)), "tar_truncated"),
    "shard goes on after its end": (
        lambda d: rewrite(d, tar=(V1 / TAR).read_bytes() + END_OF_ARCHIVE),
        "tar_header",
    ),
    "shard has a lone zero block": (
        lambda d: rewrite(d, tar=edited(TAR, at=0, payload=bytes(BLOCK))),
        "tar_header",
    ),
    "header has a wrong checksum": (
        lambda d: rewrite(d, tar=edited(TAR, at=148, payload=b"000000")),
        "tar_header",
    ),
    "header has no octal checksum": (
        lambda d: rewrite(d, tar=edited(TAR, at=148, payload=b"999999")),
        "tar_header",
    ),
    "member is a symbolic link": (
        lambda d: rewrite(d, tar=resealed_header(at=156, field=b"2")),
        "tar_header",
    ),
    "member has a negative size": (
        lambda d: rewrite(d, tar=resealed_header(at=124, field=b"-0000001000")),
        "tar_header",
    ),
    "member has a prefix": (
        lambda d: rewrite(d, tar=resealed_header(at=345, field=b"../..")),
        "tar_header",
    ),
    "member is of another sample": (
        lambda d: rewrite(d, tar=resealed_header(at=0, field=b"tiny-9")),
        "member_layout",
    ),
    "spans are of another type": (
        lambda d: rewrite(d, tar=edited(TAR, at=member_start("spans.npy") + 21, payload=b"<u4")),
        "array_header",
    ),
    "tokens are fewer than their header says": (
        lambda d: rewrite(
            d,
            tar=(V1 / TAR).read_bytes().replace(b"'shape': (9,), }", b"'shape': (8,), }"),
        ),
        "array_header",
    ),
    "spans point past the tokens": (
        lambda d: rewrite(
            d,
            tar=edited(TAR, at=member_start("spans.npy") + 128 + 4 * 6, payload=b"\x7f\0\0\0"),
        ),
        "span_range",
    ),
    "token is outside the embedding": (
        lambda d: rewrite(
            d, tar=edited(TAR, at=member_start("tokens.npy") + 128, payload=b"\x6c\0\0\0")
        ),
        "token_range",
    ),
    "token is negative": (
        lambda d: rewrite(
            d, tar=edited(TAR, at=member_start("tokens.npy") + 128, payload=b"\xff" * 4)
        ),
        "token_range",
    ),
    "texts are out of order": (
        lambda d: rewrite(
            d,
            tar=edited(TAR, at=member_start("spans.npy") + 128 + 4 * 1, payload=b"\x01"),
        ),
        "span_order",
    ),
    "window has an image that is not there": (
        lambda d: rewrite(
            d,
            tar=edited(TAR, at=member_start("spans.npy") + 128 + 4 * 16, payload=b"\x06"),
        ),
        "span_windows",
    ),
    "picture's size is another": (
        lambda d: rewrite(
            d,
            tar=edited(TAR, at=member_start("spans.npy") + 128 + 4 * 30, payload=b"\x7f"),
        ),
        "image_sizes",
    ),
    "picture is damaged": (
        lambda d: rewrite(d, tar=edited(TAR, at=member_start("image.npy"), payload=b"JUNK")),
        "image_decode",
    ),
    "index is gone": (lambda d: (d / INDEX).unlink(), "shard_missing"),
    "index has another bit": (
        lambda d: (d / INDEX).write_bytes(rows(width=1)),
        "shard_sha256",
    ),
    "index is no array": (lambda d: rewrite(d, index=b"no array"), "index_format"),
    "index is cut": (lambda d: rewrite(d, index=cut(INDEX, 1)), "index_format"),
    "index lacks a column": (
        lambda d: rewrite(d, index=renamed_column("crc32", "crc64")),
        "index_format",
    ),
    "index has fewer rows": (
        lambda d: rewrite(d, index=encode_index(np.load(V1 / INDEX)[:1])),
        "index_count",
    ),
    "index points past its shard": (
        lambda d: rewrite(d, index=rows(num_bytes=10**6)),
        "index_range",
    ),
    "index has its samples swapped": (
        lambda d: rewrite(d, index=encode_index(np.load(V1 / INDEX)[::-1].copy())),
        "member_layout",
    ),
    "index lacks the last sample of the shard": (
        lambda d: rewrite(
            d,
            index=encode_index(np.load(V1 / INDEX)[:1]),
            shard={"nsamples": 1},
            document={"splits": {"train": {**without()["splits"]["train"], "num_samples": 1}}},
        ),
        "member_extra",
    ),
}


def renamed_column(old, new):
    table = np.load(V1 / INDEX)
    table.dtype.names = tuple(new if name == old else name for name in INDEX_DTYPE.names)
    stream = io.BytesIO()
    np.save(stream, table)
    return stream.getvalue()


@pytest.fixture
def broken(tmp_path, request):
    folder = tmp_path / "v1"
    shutil.copytree(V1, folder)
    BROKEN[request.param][0](folder)
    return folder


@pytest.mark.parametrize(
    "broken, reason", [(name, reason) for name, (_, reason) in BROKEN.items()], indirect=["broken"]
)
def test_broken_dataset_is_refused_by_name(broken, reason):
    try:
        findings = verify(str(broken), Quiet(), deep=True)
    except ShardsError as error:
        findings = [error]
    assert [error.reason for error in findings] == [reason]
    assert str(broken) in findings[0].where or findings[0].reason.startswith("index_")
    assert findings[0].fix


# Wrong in ways that only a checksum or a walk through the tar can see; the training path goes by
# the index, and sees what `verify` sees only where it asks for checksums.
BEYOND_THE_INDEX = {
    "shard has another bit",
    "shard goes on after its end",
    "shard has a lone zero block",
    "header has a wrong checksum",
    "header has no octal checksum",
    "member is a symbolic link",
    "member has a negative size",
    "member has a prefix",
    "member is of another sample",
    "index has its samples swapped",
    "index lacks the last sample of the shard",
    "shard lacks its last block",
    "index has another bit",
    "special id is another",
}


@pytest.mark.parametrize("broken", sorted(set(BROKEN) - BEYOND_THE_INDEX), indirect=True)
def test_training_path_refuses_a_broken_dataset(broken):
    with pytest.raises(ShardsError):
        read_all(broken, check="crc")


def read_all(folder, *, check):
    reader = ShardReader(str(folder), require_manifest(str(folder)), split="train", check=check)
    return [reader.read(i) for i in range(len(reader))]
