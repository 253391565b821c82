"""Any bytes in any of our files give a named error, or are right; and the error is short."""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from loader import IterableDatasetMixture, StreamingDataset, make_dataloader
from loader.reading.cache import MARKER, BlockCache
from loader.reading.open_shards import LoadedRows
from preprocess.fetch import FetchResult, read_ledger
from preprocess.job import lease, status
from preprocess.job.build import read_rows
from preprocess.job.planner import Plan, load_plan
from preprocess.job.stamps import compare_files
from shardspec import storage
from shardspec.columns import columns_dtype, encode_columns, parse_columns
from shardspec.errors import ShardsError, StateError, StorageError
from shardspec.manifest import (
    AddedColumns,
    ColumnFile,
    Receipt,
    canonical_json,
    parse_manifest,
    parse_receipt,
    sealed,
)
from shardspec.storage.stores import named_stores
from tests.damage import damaged_bytes, damaged_json

EVERYDAY, MANY = 40, 4000
"""Random changes of bytes, and of JSON documents at most."""


@pytest.fixture(scope="module")
def dataset(tiny_sample, write_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "set"
    return write_dataset(folder, [tiny_sample(i) for i in range(12)], num_shards=2)


@pytest.fixture(scope="module")
def other(tiny_sample, write_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "other"
    return write_dataset(folder, [tiny_sample(i) for i in range(9)], name="other")


def stream_of(url, **options):
    return StreamingDataset(url, seed=3, rank=0, world_size=1, **options)


def loader_of(stream, **options):
    return make_dataloader(
        stream, global_batch_size=4, sequence_length=128, pad_mode="max_len", **options
    )


def survives(read, payloads):
    """Reads each payload; what is raised must be ours, and fit on a screen. Returns their count."""
    refused = 0
    for payload in payloads:
        error = error_of(read, payload)
        if error is not None:
            refused += 1
            assert isinstance(error, ShardsError), f"{payload[:300]!r} ...: {error!r:.300}"
            for text in (str(error), repr(error)):
                assert len(text) < 9000, text[:300]
                text.encode()
    return refused


def error_of(read, payload):
    try:
        read(payload)
    except Exception as error:  # noqa: BLE001 - the caller looks at it
        return error
    return None


def some(payloads, count, seed=5):
    found = list(payloads)
    return found if len(found) <= count else random.Random(seed).sample(found, count)


def all_of(payload, count):
    """The damaged forms of a JSON document."""
    return [
        *some(damaged_json(json.loads(payload)), count * 10),
        *damaged_bytes(payload, seed=len(payload), count=count),
    ]


amounts = pytest.mark.parametrize(
    "count", [EVERYDAY, pytest.param(MANY, marks=pytest.mark.slow)], ids=["some", "many"]
)


# --- the parsers, each as a function of bytes


def manifest(context):
    payload = storage.read_bytes(f"{context.dataset}/manifest.json")
    return payload, lambda changed: parse_manifest(changed, where="manifest.json")


def receipt(context):
    entry = parse_manifest(storage.read_bytes(f"{context.dataset}/manifest.json"), where="m").shards
    value = Receipt(build_key="k", shard=entry[0], quarantined={"twin": 3})
    payload = canonical_json(dataclasses.asdict(value), indent=1)
    assert parse_receipt(payload, where="r") is not None
    return payload, lambda changed: parse_receipt(changed, where="receipt.json")


BAD = {"step": 0, "dataset": 0, "sample": 3, "shard": "a.tar", "key": "k", "stage": "read"}


def loader_state(context):
    return _state_of(context.loader)


def allowed_state(context):
    return _state_of(context.loader, allow=("view", "order", "appended"))


def packed_state(context):
    return _state_of(context.packed)


def mixture_state(context):
    return _state_of(context.mixture)


def changed_mixture_state(context):
    return _state_of(context.unpacked, allow=("mixture", "order"))


def changed_packed_mixture_state(context):
    return _state_of(context.mixture, allow=("mixture",))


def _state_of(loader, **options):
    def load(changed):
        try:
            state = json.loads(changed)
        except (ValueError, RecursionError):
            return  # never gets here
        loader.load_state_dict(state, **options)
        loader.places(loader.step)

    bad = [{**BAD, "reason": "sample_crc"}]
    return canonical_json({**loader.state_dict(), "bad": bad, "removed": {}}), load


def dataset_state(context):
    stream = context.stream
    payload = canonical_json(stream.state_dict())

    def load(changed):
        try:
            state = json.loads(changed)
        except (ValueError, RecursionError):
            return
        stream.load_state_dict(state)

    return payload, load


def ledger(context):
    result = FetchResult(url="http://h/a", status="ok", sha256="0" * 64, num_bytes=3, attempts=1)
    payload = canonical_json(dataclasses.asdict(result))

    def load(changed):
        context.file.write_bytes(changed.replace(b"\n", b"") + b"\n")
        for found in read_ledger(context.file).values():
            assert isinstance(found.num_bytes, int)
            assert found.status in ("ok", "failed")

    return payload, load


def plan(context):
    job = SimpleNamespace(
        url=lambda *parts: "/".join([str(context.folder), *parts]),
        settings=SimpleNamespace(split="train"),
        generation=0,
        identity={"a": 1},
        identity_url=str(context.folder / "identity.json"),
        growth=None,
        compare_files=lambda generation: None,
    )
    (context.folder / "identity.json").write_text('{"a": 1}')
    (context.folder / "plan" / "train").mkdir(parents=True)
    value = Plan(
        build_key="k",
        num_shards=1,
        num_samples=3,
        num_rows=4,
        source={"a": 1},
        quarantined={"x": 1},
    )
    payload = canonical_json(dataclasses.asdict(value), indent=1)

    def load(changed):
        (context.folder / "plan" / "train" / "plan.json").write_bytes(changed)
        found = load_plan(job)
        assert found is None or isinstance(found.num_samples, int)

    load(payload)
    return payload, load


def identity(context):
    payload, load_plan_of = plan(context)
    load_plan_of(payload)
    job = SimpleNamespace(
        url=lambda *parts: "/".join([str(context.folder), *parts]),
        settings=SimpleNamespace(split="train"),
        generation=0,
        identity={"a": 1, "b": {"c": [1]}},
        identity_url=str(context.folder / "identity.json"),
        growth=None,
        compare_files=lambda generation: None,
    )

    def load(changed):
        (context.folder / "identity.json").write_bytes(changed)
        load_plan(job)

    return canonical_json(job.identity), load


def rows(context):
    row = {"position": 3, "key": "a", "image": None, "example": {"messages": [{"a": "b"}]}}

    def load(changed):
        context.file.write_bytes(changed.replace(b"\n", b"") + b"\n")
        read_rows(str(context.file))

    return canonical_json(row).strip(), load


def stamp(context):
    source, url = context.folder / "rows.jsonl", str(context.folder / "files.gz")
    source.write_bytes(b"{}")

    def load(changed):
        Path(url).write_bytes(gzip.compress(changed.replace(b"\n", b"") + b"\n", 1, mtime=0))
        found = compare_files(url, [source], how="content")
        assert isinstance(found.num_changed, int)

    return canonical_json([str(source), 2, 5, "0" * 32, True]), load


def sealed_manifest(context):
    """The fields of a manifest with added columns: what its own digest does not notice."""
    value = parse_manifest(storage.read_bytes(f"{context.dataset}/manifest.json"), where="m")
    files = {shard.url: ColumnFile(num_bytes=9, sha256="0" * 64) for shard in value.shards}
    columns = AddedColumns(types={"score": "float64", "clip": "float32[3]"}, files=files)
    value = dataclasses.replace(value, columns=columns)

    def load(changed):
        with contextlib.suppress(ValueError, TypeError, RecursionError):  # read as it is
            changed = sealed(json.loads(changed))
        parse_manifest(changed, where="manifest.json")

    return value.encode(), load


def lease_record(context):
    holder = {"job": "other", "host": "elsewhere", "pid": 1, "boot": "b", "pids": "p", "born": "9"}
    url = str(context.folder / lease.LEASE_NAME)

    def load(changed):
        Path(url).write_bytes(changed)
        lease.Watch().look(url)
        found = lease.read_lease(url)
        if found is not None:
            lease._is_dead(found)
            lease._is_alive(found)

    return canonical_json(holder), load


def record_of_parts(context):
    record = {"job": "a1b2", "split": "train", "parts": 3, "title": "mine", "host": "h", "pid": 1}
    url = str(context.folder / lease.LEASE_NAME)

    def load(changed):
        Path(url).write_bytes(changed)
        status.read_status(str(context.folder))
        found = lease.read_lease(url)
        if found is not None and "parts" in found:
            lease.require_no_parts(str(context.folder), found)

    return canonical_json(record), load


def cache_marker(context):
    cache = BlockCache(str(context.folder / "cache"), max_bytes=1000)
    payload = (cache.folder / MARKER).read_bytes()

    def load(changed):
        (cache.folder / MARKER).write_bytes(changed)
        BlockCache(str(cache.folder), max_bytes=1000)

    return payload, load


PARSERS = [
    manifest,
    sealed_manifest,
    receipt,
    loader_state,
    allowed_state,
    dataset_state,
    packed_state,
    mixture_state,
    changed_mixture_state,
    changed_packed_mixture_state,
    ledger,
    plan,
    identity,
    rows,
    stamp,
    lease_record,
    record_of_parts,
    cache_marker,
]


@pytest.fixture(scope="module")
def opened(dataset, other):
    """A loader and a dataset, whose states are read; no pass is begun."""
    streams = [stream_of(dataset), stream_of(other)]
    return {
        "loader": loader_of(stream_of(dataset)),
        "packed": loader_of(stream_of(dataset), pack=True),
        "mixture": loader_of(IterableDatasetMixture(streams, [0.5, 0.5], seed=1), pack=True),
        "unpacked": loader_of(IterableDatasetMixture(streams, [0.5, 0.5], seed=1)),
        "stream": stream_of(dataset, batch_size=4),
    }


@pytest.fixture
def context(dataset, opened, tmp_path):
    return SimpleNamespace(dataset=dataset, **opened, folder=tmp_path, file=tmp_path / "file")


@amounts
@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.__name__)
def test_any_bytes_give_a_named_error_or_are_right(context, parser, count):
    if parser.__name__.startswith("changed"):
        count //= 4 if count == MANY else 10  # a mixture takes 10 ms
    payload, read = parser(context)
    read(payload)
    survives(read, all_of(payload, count))
    read(payload)


STORES = b"""
[weka]
endpoint_url = "https://weka.example.org:9000"
profile = "weka"
addressing = "path"
"""
TOML = [b"a = " + b"[" * 50_000, b"a = " + b"9" * 5000, b"weka = 3", b"[weka]\n[weka]", b"[[weka]]"]
TOML += [b"[weka]\nendpoint_url = 3", b'[weka]\nendpoint_url = "http://["', b"a = nan\n[b]\nc = 1"]
TOML += [
    b'[weka]\nendpoint_url = "http://h:99999999"',
    b'[weka]\nendpoint_url = "' + b"x" * 100_000,
]
TOML += [b'["' + b"x" * 300_000 + b'"]\na = 1', b"[w]\n" + b"x" * 300_000 + b" = 1"]


@amounts
def test_any_bytes_of_a_stores_file_give_a_named_error_or_are_right(tmp_path, monkeypatch, count):
    monkeypatch.setenv("VLM_SHARDS_STORES", str(tmp_path / "stores.toml"))

    def read(payload):
        (tmp_path / "stores.toml").write_bytes(payload)
        for store in named_stores().values():
            store.options()

    read(STORES)
    assert survives(read, TOML) == len(TOML)
    survives(read, damaged_bytes(STORES, seed=1, count=count))


@amounts
def test_any_bytes_of_a_list_of_files_give_a_named_error_or_are_right(tmp_path, count):
    lines = b"".join(b'["/none/%d", null, 0, "", false]\n' % i for i in range(40))
    payload, url = gzip.compress(lines, 1, mtime=0), str(tmp_path / "files.gz")

    def read(changed):
        Path(url).write_bytes(changed)
        found = compare_files(url, [], how="time")
        assert (found.num_files % 40, found.num_changed) == (0, 0)

    read(payload)
    assert survives(read, (payload[:at] for at in range(len(payload)))) == len(payload)
    assert error_of(read, payload[:-1]).reason == "plan_files"
    survives(read, damaged_bytes(payload, seed=2, count=count))


@amounts
def test_any_bytes_of_added_columns_give_a_named_error_or_are_right(count):
    types = {"score": "float64", "licence": "text[8]", "clean": "bool", "clip": "float32[3]"}
    table = np.zeros(9, columns_dtype(types))
    table["score"], table["clean"] = np.arange(9), True
    payload = encode_columns(table)

    def read(changed, sha256=None):
        rows = parse_columns(
            memoryview(changed), where="x", types=types, num_samples=9, sha256=sha256
        )
        rows.tolist()
        return rows

    read(payload)
    damaged = [
        *(payload[:at] for at in range(0, len(payload), 7)),
        *damaged_bytes(payload, seed=3, count=count * 10),
    ]
    survives(read, damaged)
    sha256 = hashlib.sha256(payload).hexdigest()
    different = [each for each in damaged if each != payload]
    assert survives(lambda changed: read(changed, sha256), different) == len(different)


# --- keys of an index


@pytest.mark.parametrize("on_bad", ["raise", "substitute"])
@pytest.mark.parametrize("damage", [b"\xff", b"\x80abc", b"\xc3", b"\xed\xa0\x80"])
def test_a_key_that_is_not_text_is_a_named_error(
    tiny_sample, write_dataset, tmp_path, damage, on_bad
):
    url = write_dataset(tmp_path / "set", [tiny_sample(i) for i in range(4)])
    stream = StreamingDataset(url, seed=3, rank=0, world_size=1, on_bad=on_bad)
    shard, _ = stream.reader._locate(0)
    rows = np.array([shard.rows.row(i) for i in range(4)])
    rows["key"] = damage
    broken = dataclasses.replace(shard, rows=LoadedRows(rows))
    stream.reader._locate = lambda i: (broken, i)
    for read in (stream.reader.stored, stream.reader.members):
        with pytest.raises(ShardsError) as caught:
            read(0)
        assert caught.value.reason == "index_key"
    assert stream.reader.name(0)[1]


@pytest.mark.parametrize("left", [0, 600, 0.5])
def test_a_tar_that_is_cut_while_it_is_open_is_a_named_error(
    tiny_sample, write_dataset, tmp_path, left
):
    url = write_dataset(tmp_path / "set", [tiny_sample(i) for i in range(20)])
    (tar,) = (tmp_path / "set" / "train").glob("*.tar")
    reader = StreamingDataset(url, seed=3, rank=0, world_size=1).reader
    child = os.fork()
    if not child:  # a signal would end the suite
        status = 1
        try:
            whole = [bytes(reader.members(i)[1]) for i in range(20)]
            os.truncate(tar, int(left * tar.stat().st_size) if left < 1 else left)
            reasons = set()
            for i in range(20):
                error = error_of(lambda i: reader.stored(i), i)
                if error is None:
                    assert bytes(reader.members(i)[1]) == whole[i]
                else:
                    reasons.add(error.reason)
            assert reasons == {"sample_cut"}
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_metadata_that_is_not_json_is_a_named_error(dataset):
    reader = StreamingDataset(dataset, seed=3, rank=0, world_size=1).reader
    assert reader.record(0)
    shard, _ = reader._locate(0)
    members = bytearray(shard.sample(0, shard.rows.place(0), where=""))
    start = members.index(b"{")

    class Broken:
        url, rows = shard.url, shard.rows

        def sample(self, number, place, *, where):
            del number, place, where
            return memoryview(members)

    reader._locate = lambda i: (Broken(), i)
    members[start] = 0xFF
    with pytest.raises(ShardsError) as caught:
        reader.record(0)
    assert caught.value.reason == "sample_json"


def test_a_plan_whose_last_row_is_cut_is_refused(tmp_path):
    (tmp_path / "rows").write_bytes(b'{"position": 1, "key": "a", "image": 1, "example": {}}')
    with pytest.raises(StorageError) as caught:
        read_rows(str(tmp_path / "rows"))
    assert caught.value.reason == "plan_rows"


# --- errors themselves


class Unprintable:
    def __str__(self):
        raise ValueError("cannot")


FACTS = [10**5000, "x" * 22_000_000, Unprintable(), "\ud800", ["y" * 10**6], {"a": 10**5000}]


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: type(fact).__name__)
@pytest.mark.parametrize("code", ["manifest_version", "state_fields", "manifest_json"])
def test_an_error_can_be_shown_whatever_its_facts_are(code, fact):
    names = ("got", "want", "error", "field", "problems")
    error = StateError(code, where=str("w" * 10**6), facts=dict.fromkeys(names, fact))
    text = str(error)
    assert len(text) < 20_000
    assert len(error.where) < 3000
    text.encode()


def test_an_error_can_be_made_when_no_descriptor_is_left():
    code = """
import os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))
from shardspec.errors import ConfigError
taken = []
try:
    while True:
        taken.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
assert "retry" in str(ConfigError("retry_policy", facts={"wall_s": -1})).lower()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
