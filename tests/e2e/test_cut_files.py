"""A file that is cut in place while a process reads it is a named error, never a signal."""

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loader import StreamingDataset
from loader.reading import columns as column_files
from preprocess.annotate import AnnotateSettings, annotate, plan_annotation
from preprocess.datasets.rows import local_rows
from preprocess.formats.records import _Groups
from preprocess.job import verify
from preprocess.reshard import ReshardSettings, plan_reshard
from preprocess.reshard import plan as reshard_plan
from shardspec.errors import ShardsError
from tests.inline import Quiet

NUM = 60


@pytest.fixture(scope="module")
def scored(tiny_sample, write_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    url = write_dataset(folder / "set", [tiny_sample(i) for i in range(NUM)])
    table = pa.table(
        {
            "key": [f"sample-{i:04d}" for i in range(NUM)],
            "clip": [[float(i)] * 4096 for i in range(NUM)],
        }
    )
    pq.write_table(table, folder / "clip.parquet")
    settings = AnnotateSettings(
        src=url, columns=str(folder / "clip.parquet"), dst=str(folder / "scored")
    )
    annotate(plan_annotation(settings, Quiet()), Quiet())
    return folder / "scored"


@pytest.fixture
def copy(scored, tmp_path):
    """The files of a dataset that may be cut."""
    shutil.copytree(scored.parent, tmp_path / "all")
    files = {
        name: next((tmp_path / "all").rglob(pattern))
        for name, pattern in {
            "tar": "train/*.tar",
            "index": "train/*.index.npy",
            "columns": "*.columns.npy",
        }.items()
    }
    return SimpleNamespace(url=str(tmp_path / "all" / scored.name), **files)


def in_child(check):
    """Runs a check in a forked child, since a signal would end the suite."""
    child = os.fork()
    if not child:
        status = 1
        try:
            check()
            status = 0
        except BaseException as error:  # noqa: BLE001 - shown, as it cannot be raised here
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def cut(path, left):
    os.truncate(path, int(left * Path(path).stat().st_size))


def reasons(reads):
    """Collects how reads end: their errors' reasons, "" for none."""
    ends = set()
    for read in reads:
        try:
            read()
            ends.add("")
        except ShardsError as error:
            ends.add(error.reason)
    return ends


LEFT = [0, 0.5]


@pytest.mark.parametrize("left", LEFT)
@pytest.mark.parametrize(
    "read",
    ["stored", "members", "record", "name", "index_dtype", "column"],
)
def test_the_index_of_a_local_shard(copy, read, left):
    reader = StreamingDataset(copy.url, seed=3, rank=0, world_size=1).reader

    def check():
        reader.stored(0)
        cut(copy.index, left)
        if read == "column":
            got = reasons(
                lambda i=i: reader.column("num_tokens", np.array([i])) for i in range(NUM)
            )
            got |= reasons([lambda: reader.column("num_tokens", np.arange(NUM))])
        else:
            got = reasons(lambda i=i: getattr(reader, read)(i) for i in range(NUM))
        assert got <= {"", "index_cut"}, got
        if read not in ("name", "index_dtype"):
            assert "index_cut" in got, got

    in_child(check)


@pytest.mark.parametrize("left", LEFT)
def test_a_file_of_added_columns(copy, left, monkeypatch):
    monkeypatch.setattr(column_files, "_MOST_READ_BYTES", 100)
    reader = StreamingDataset(copy.url, seed=3, rank=0, world_size=1).reader

    def check():
        assert reader.column("clip", np.array([7]))[0, 0] == 7
        cut(copy.columns, left)
        got = reasons(lambda i=i: reader.column("clip", np.array([i])) for i in range(NUM))
        got |= reasons([lambda: reader.column("clip", np.arange(NUM))])
        assert got in ({"columns_cut"}, {"columns_cut", ""}), got

    in_child(check)


@pytest.mark.parametrize("left", LEFT)
@pytest.mark.parametrize("file", ["tar", "index"])
def test_the_files_of_verify(copy, file, left, monkeypatch):
    module = sys.modules["preprocess.job.verify"]  # the package exports a function of this name
    whole = module.open_index

    def cut_first(*args, **options):
        if file == "index":
            cut(copy.index, left)
        opened = whole(*args, **options)
        cut(getattr(copy, file), left)
        return opened

    monkeypatch.setattr(module, "open_index", cut_first)

    def check():
        found = {error.reason for error in verify(copy.url, Quiet())}
        assert found, "nothing was noticed"

    in_child(check)


@pytest.mark.parametrize("left", LEFT)
def test_the_index_of_a_source_that_is_resharded(copy, left, tmp_path, monkeypatch):
    whole = reshard_plan._open_table

    def cut_after(*args, **options):
        opened = whole(*args, **options)
        cut(copy.index, left)
        return opened

    monkeypatch.setattr(reshard_plan, "_open_table", cut_after)
    settings = ReshardSettings(sources=(copy.url,), out=str(tmp_path / "out"))

    def check():
        assert reasons([lambda: plan_reshard(settings, Quiet())]) <= {""}

    in_child(check)


@pytest.mark.parametrize("left", LEFT)
@pytest.mark.parametrize("read", ["dataset", "own"])
def test_a_parquet_source(tmp_path, read, left):
    path = tmp_path / "rows.parquet"
    table = pa.table({"text": [os.urandom(2000).hex() for _ in range(400)]})
    pq.write_table(table, path, row_group_size=40)

    def check():
        rows = _Groups(path, "rows")
        if read == "dataset":
            rows = local_rows(str(tmp_path), split="train", want=["text"])
        assert rows[0]["text"]
        cut(path, left)
        got = reasons(lambda i=i: rows[i] for i in range(399, -1, -40))
        assert "source_unreadable" in got, got
        assert got <= {"", "source_unreadable"}, got

    in_child(check)
