"""Shards are plain files: foreign readers give what we stored, with the decoders they come with."""

import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from shardspec.index import open_index, sample_layout
from shardspec.manifest import load_manifest
from shardspec.sample import CODEC_SUFFIX

CODECS = ("jpeg", "png", "webp", "raw")

# Not ours to mend: files that webdataset and datasets leave to the garbage collector.
foreign = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def by_codec(inline_cli, write_parquet, captioned_rows, tmp_path_factory):
    """A function that gives the folder of a small dataset stored with a codec."""
    folder = tmp_path_factory.mktemp("codecs")
    write_parquet(folder / "source", captioned_rows(8))
    built = {}

    def get(codec):
        if codec not in built:
            built[codec] = folder / codec
            inline_cli.good(
                *("shards", "pixmo_cap", "--source", folder / "source", "--out", built[codec]),
                *("--codec", codec, "--num-shards", 2, "--image-size", 112),
                *("--workers", 1, "--cache", folder / "cache"),
            )
        return built[codec]

    return get


def tars(folder):
    return [folder / shard.url for shard in load_manifest(str(folder)).shards]


def members(folder):
    """Cuts the members out of the shards by index and offset alone: key -> suffix -> payload."""
    manifest = load_manifest(str(folder))
    suffix = CODEC_SUFFIX[manifest.recipe["image"]["codec"]]
    found = {}
    for shard in manifest.shards:
        payload = (folder / shard.url).read_bytes()
        rows = open_index(
            str(folder / shard.index_url),
            num_samples=shard.nsamples,
            shard_bytes=shard.num_bytes,
        )
        for row in rows:
            at = sample_layout(row)
            places = {
                "json": (at.json, row["json_bytes"]),
                "spans.npy": (at.spans, row["spans_bytes"]),
                "tokens.npy": (at.tokens, row["tokens_bytes"]),
                suffix: (at.image, row["image_bytes"]),
            }
            base = int(row["offset"])
            found[row["key"].decode()] = {
                name: payload[base + start : base + start + int(length)]
                for name, (start, length) in places.items()
            }
    assert len(found) == sum(shard.nsamples for shard in manifest.shards)
    return found


def pixels(payload):
    """Decodes an image member with nothing but Pillow and NumPy."""
    if payload.startswith(b"\x93NUMPY"):
        return np.load(io.BytesIO(payload), allow_pickle=False)
    return np.asarray(Image.open(io.BytesIO(payload)))


def check_sample(key, sample, want):
    """Compares what a reader decoded with the bytes that the index points at."""
    assert sample["json"] == json.loads(want["json"])
    assert sample["json"]["key"] == key
    for name in ("tokens.npy", "spans.npy"):
        array = np.load(io.BytesIO(want[name]), allow_pickle=False)
        assert array.dtype == np.int32
        assert np.asarray(sample[name]).tolist() == array.tolist()
        assert array.size > 0
    (name,) = set(want) - {"json", "tokens.npy", "spans.npy"}
    picture = pixels(want[name])
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(np.asarray(sample[name]), picture)


def check_webdataset(folder, decoder):
    import webdataset as wds

    want = members(folder)
    urls = [str(path) for path in tars(folder)]
    samples = {s["__key__"]: s for s in wds.WebDataset(urls, shardshuffle=False).decode(decoder)}
    assert samples.keys() == want.keys()
    for key, sample in samples.items():
        check_sample(key, sample, want[key])


@foreign
@pytest.mark.parametrize("decoder", ("pil", pytest.param("rgb8", marks=pytest.mark.slow)))
def test_webdataset_decodes_every_member_of_every_sample(tiny_dataset, decoder):
    check_webdataset(tiny_dataset, decoder)


@foreign
@pytest.mark.parametrize("codec", CODECS)
def test_webdataset_reads_every_codec(by_codec, codec):
    check_webdataset(by_codec(codec), "pil")


@pytest.mark.parametrize("codec", CODECS)
def test_gnu_tar_extracts_the_bytes_that_the_index_points_at(by_codec, codec, tmp_path):
    folder = by_codec(codec)
    for path in tars(folder):
        done = subprocess.run(
            ["tar", "-xf", path, "-C", tmp_path], capture_output=True, text=True, check=True
        )
        assert done.stderr == ""
    want = {
        f"{key}.{suffix}": payload
        for key, sample in members(folder).items()
        for suffix, payload in sample.items()
    }
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == want


@pytest.mark.parametrize("codec", CODECS)
def test_python_tarfile_reads_adjacent_members_in_one_order_with_plain_headers(by_codec, codec):
    folder = by_codec(codec)
    want = members(folder)
    order = [f"{key}.{suffix}" for key, sample in want.items() for suffix in sample]
    names = []
    for path in tars(folder):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                names.append(member.name)
                assert tar.extractfile(member).read() == want[key][suffix]
                assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
                assert member.isreg()
                assert member.pax_headers == {}
    assert names == order


@foreign
@pytest.mark.filterwarnings("ignore:String specifications for transformations:UserWarning")
def test_wids_opens_our_manifest_and_leaves_the_shards_alone(tiny_dataset, tmp_path, monkeypatch):
    import wids

    monkeypatch.setenv("WIDS_CACHE", str(tmp_path / "cache"))
    before = {path: path.read_bytes() for path in tars(tiny_dataset)}
    want = members(tiny_dataset)
    dataset = wids.ShardListDataset(str(tiny_dataset / "manifest.json"))
    assert len(dataset) == len(want) == 24
    # wids keeps the dot of a suffix; the order is the manifest's and the index's.
    for i, key in enumerate(want):
        sample = {name.removeprefix("."): value for name, value in dataset[i].items()}
        assert sample["__key__"] == key
        check_sample(key, sample, want[key])
    assert {path: path.read_bytes() for path in tars(tiny_dataset)} == before


_HUGGING_FACE = """
import json, sys
import numpy as np
import datasets

datasets.disable_progress_bars()
folder, cache, out, streaming, *files = sys.argv[1:]
table = datasets.load_dataset(
    "webdataset", data_files={"train": files}, split="train", cache_dir=cache,
    streaming=streaming == "streaming",
)
rows = {}
for row in table:
    rows[row["__key__"]] = row["json"]
    names = set(row) - {"json", "__key__", "__url__"}
    arrays = {name: np.asarray(row[name]) for name in names}
    np.savez(f"{out}/{row['__key__']}.npz", **arrays)
json.dump(rows, open(f"{out}/rows.json", "w"))
"""


def check_hugging_face(folder, tmp_path, *, streaming):
    # A process of its own: `datasets` reads its offline switch and cache when it is imported.
    env = {"HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    out = tmp_path / "out"
    out.mkdir()
    args = [folder, tmp_path / "cache", out, "streaming" if streaming else "table", *tars(folder)]
    done = subprocess.run(
        [sys.executable, "-c", _HUGGING_FACE, *map(str, args)],
        env={"PATH": "/usr/bin:/bin", **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    records = json.loads((out / "rows.json").read_text())
    want = members(folder)
    assert records.keys() == want.keys()
    for key, record in records.items():
        # A table has one schema: fields that other messages have are there, empty.
        record["message_list"] = [
            {name: value for name, value in message.items() if value is not None}
            for message in record["message_list"]
        ]
        with np.load(out / f"{key}.npz") as arrays:
            check_sample(key, {"json": record, **arrays}, want[key])


@pytest.mark.slow
def test_hugging_face_datasets_streams_the_shards(tiny_dataset, tmp_path):
    check_hugging_face(tiny_dataset, tmp_path, streaming=True)


@pytest.mark.slow
def test_hugging_face_datasets_loads_the_shards_as_a_table(tiny_dataset, tmp_path):
    check_hugging_face(tiny_dataset, tmp_path, streaming=False)


@pytest.mark.slow
@pytest.mark.parametrize("codec", ("png", "webp", "raw"))
def test_hugging_face_datasets_reads_every_codec(by_codec, codec, tmp_path):
    check_hugging_face(by_codec(codec), tmp_path, streaming=True)


def test_lossless_codecs_store_the_same_pixels(by_codec):
    stored = []
    for codec in ("png", "webp", "raw"):
        samples = members(by_codec(codec))
        stored.append({key: pixels(s[CODEC_SUFFIX[codec]]) for key, s in samples.items()})
    assert len(stored[0]) == 8
    for other in stored[1:]:
        assert other.keys() == stored[0].keys()
        for key, picture in other.items():
            np.testing.assert_array_equal(picture, stored[0][key])
