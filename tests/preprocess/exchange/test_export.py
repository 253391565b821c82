"""Exports, read back by the readers that they are for, or by their documented form."""

import contextlib
import json
import sqlite3
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from preprocess.exchange.export import export_index
from preprocess.exchange.foreign import ImportSettings, import_tars
from preprocess.reshard.plan import ReshardSettings, plan_reshard
from preprocess.reshard.run import reshard
from shardspec.errors import ConfigError, ConflictError
from shardspec.manifest import require_manifest
from tests.inline import Quiet

# Not ours to mend: files that foreign readers leave to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")


@pytest.fixture
def dataset(tiny_sample, write_dataset, tmp_path):
    """Eleven samples in three shards, as files that a test may write beside."""
    return write_dataset(tmp_path / "set", [tiny_sample(i) for i in range(11)], num_shards=3)


def payloads(url):
    """Every member by the standard library: shard url -> {name: payload}."""
    found = {}
    for shard in require_manifest(url).shards:
        with tarfile.open(Path(url, shard.url), "r:") as archive:
            found[shard.url] = {m.name: archive.extractfile(m).read() for m in archive}
    return found


def test_dali_index_gives_every_member_by_its_place(dataset):
    export_index(dataset, "dali", Quiet())
    for url, want in payloads(dataset).items():
        tar = Path(dataset, url).read_bytes()
        head, *lines = Path(dataset, url).with_suffix(".idx").read_text().splitlines()
        assert head == f"v1.2 {len(lines)}"
        got = {}
        for line in lines:
            words = line.split(" ")
            assert len(words) % 4 == 0
            keys = set()
            for suffix, offset, size, name in zip(*[iter(words)] * 4, strict=True):
                assert int(offset) % 512 == 0
                assert name.partition(".")[2] == suffix
                keys.add(name.partition(".")[0])
                got[name] = tar[int(offset) : int(offset) + int(size)]
            assert len(keys) == 1
        assert got == want


@pytest.mark.filterwarnings("ignore:String specifications for transformations:UserWarning")
def test_wids_opens_the_index_of_a_split(dataset, tmp_path, monkeypatch):
    import wids

    monkeypatch.setenv("WIDS_CACHE", str(tmp_path / "cache"))
    assert export_index(dataset, "wids", Quiet()) == [f"{dataset}/wids-train.json"]
    found = wids.ShardListDataset(f"{dataset}/wids-train.json")
    assert [found[i]["__key__"] for i in range(len(found))] == [
        f"sample-{i:04d}" for i in range(11)
    ]


_ENERGON = """
import json, sys
from megatron.energon import (
    Cooker, DefaultTaskEncoder, Sample, WorkerConfig, basic_sample_keys, edataclass,
    get_loader, get_train_dataset, stateless,
)
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.itar_reader import SqliteITarEntryReader

@edataclass
class Fields(Sample):
    fields: dict

@stateless
def cook(sample):
    fields = {name: bytes(v).hex() for name, v in sample.items() if not name.startswith("__")}
    return Fields(**basic_sample_keys(sample), fields=fields)

class Encoder(DefaultTaskEncoder):
    cookers = [Cooker(cook)]
    decoder = None

found = {}
dataset = get_train_dataset(
    sys.argv[1], worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0), batch_size=None,
    shuffle_buffer_size=None, max_samples_per_sequence=None, repeat=False, task_encoder=Encoder(),
)
for sample in get_loader(dataset):
    found[sample.__key__] = sample.fields
by_key = {}
reader = SqliteITarEntryReader(base_path=EPath(sys.argv[1]))
for key, _, _ in reader.list_all_samples():
    sample = reader[key]
    by_key[key] = {n: bytes(v).hex() for n, v in sample.items() if not n.startswith("__")}
parts = sorted([name, size] for name, size, _ in reader.list_all_sample_parts())
json.dump([found, by_key, parts], open(sys.argv[2], "w"))
"""


@pytest.mark.slow
def test_energon_streams_the_dataset_with_the_exported_folder(dataset, tmp_path):
    pytest.importorskip("megatron.energon", reason="megatron-energon is not installed")
    export_index(dataset, "energon", Quiet())
    program, out = tmp_path / "program.py", tmp_path / "found.json"
    program.write_text(_ENERGON)
    done = subprocess.run(
        [sys.executable, program, dataset, out], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found, by_key, parts = json.loads(out.read_text())
    want = {}
    for members in payloads(dataset).values():
        for name, payload in members.items():
            key, _, suffix = name.partition(".")
            want.setdefault(key, {})[suffix] = payload.hex()
    assert {key.rpartition("/")[2]: fields for key, fields in found.items()} == want
    assert by_key == want
    assert parts == sorted(
        [f"{key}.{suffix}", len(payload) // 2]
        for key, fields in want.items()
        for suffix, payload in fields.items()
    )


def test_energon_folder_has_what_its_documentation_lists(dataset):
    written = export_index(dataset, "energon", Quiet())
    names = sorted(url.rpartition("/")[2] for url in written)
    assert names == [
        ".info.json",
        ".info.yaml",
        "dataset.yaml",
        "index.sqlite",
        "index.uuid",
        "split.yaml",
    ]
    folder = Path(dataset) / ".nv-meta"
    assert sorted(path.name for path in folder.iterdir()) == names
    shards = require_manifest(dataset).shards
    split = json.loads((folder / "split.yaml").read_text())
    assert split["split_parts"] == {"train": [shard.url for shard in shards]}
    first = {name: (folder / name).read_bytes() for name in names}
    export_index(dataset, "energon", Quiet())
    assert {name: (folder / name).read_bytes() for name in names} == first


def test_energon_wants_keys_that_differ(tiny_sample, write_dataset, tmp_path):
    twice = write_dataset(tmp_path / "twice", [tiny_sample(i) for i in (0, 1, 0)])
    with pytest.raises(ConflictError) as caught:
        export_index(twice, "energon", Quiet())
    assert caught.value.reason == "key_collision"
    assert "sample_key" in str(caught.value)


def test_a_view_cannot_be_exported(dataset, tmp_path):
    settings = ReshardSettings(sources=(dataset,), out=str(tmp_path / "view"), form="view")
    reshard(plan_reshard(settings, Quiet()), Quiet())
    with pytest.raises(ConfigError) as caught:
        export_index(str(tmp_path / "view"), "wids", Quiet())
    assert caught.value.reason == "export_view"


@pytest.mark.parametrize(
    "dots, keys", [("first", ["22", "23"]), ("last", ["22.05", "22.06", "23"])]
)
def test_exported_samples_are_those_of_the_index(dots, keys, tmp_path):
    path = tmp_path / "tars" / "a.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as archive:
        for name in ("22.05.png", "22.06.png", "22.06.txt", "23.png"):
            archive.addfile(tarfile.TarInfo(name))
    raw = ImportSettings(tars=(str(path),), out=str(tmp_path / "raw"), name="raw", dots=dots)
    import_tars(raw, Quiet())
    cut = ReshardSettings(sources=(raw.out,), out=str(tmp_path / "out"), form="copy", num_shards=1)
    reshard(plan_reshard(cut, Quiet()), Quiet())
    export_index(str(tmp_path / "out"), "energon", Quiet())
    with contextlib.closing(sqlite3.connect(tmp_path / "out/.nv-meta/index.sqlite")) as table:
        got = table.execute("SELECT sample_key FROM samples ORDER BY sample_index").fetchall()
    assert got == [(key,) for key in keys]


def test_names_that_the_index_of_dali_cannot_hold_are_refused(tmp_path):
    path = tmp_path / "tars" / "a.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("two words.txt"))
    import_tars(ImportSettings(tars=(str(path),), out=str(tmp_path / "raw"), name="raw"), Quiet())
    cut = ReshardSettings(sources=(str(tmp_path / "raw"),), out=str(tmp_path / "out"), form="copy")
    reshard(plan_reshard(cut, Quiet()), Quiet())
    with pytest.raises(ConfigError) as caught:
        export_index(str(tmp_path / "out"), "dali", Quiet())
    assert caught.value.reason == "export_name"
