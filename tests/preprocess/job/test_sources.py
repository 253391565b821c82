"""Sources under a job: files that change, rows that are odd, and where every row went."""

import dataclasses
import functools
import gzip
import hashlib
import json
import os
import shutil
import threading
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preprocess.datasets import EpisodeDataset, dataset_class, dataset_names, get_dataset
from preprocess.exchange import ImportSettings, import_tars
from preprocess.formats import Spec
from preprocess.job import build, count_rows
from preprocess.job import verify as verify_job
from preprocess.job.job import Job, JobSettings
from preprocess.job.pipeline import run_job
from preprocess.job.planner import load_plan, make_plan
from preprocess.job.stamps import StampWriter, compare_files, stamp_rows
from preprocess.recipe import Recipe
from preprocess.text import TextPolicy
from shardspec import storage
from shardspec.errors import BudgetError, ConfigError, ConflictError, SourceError, StorageError
from shardspec.manifest import load_manifest
from tests.inline import Quiet

pytestmark = pytest.mark.usefixtures("in_this_process")


def job_settings(tmp_path, source, **more):
    given = {
        "dataset": "pixmo_cap",
        "source": str(source),
        "out": str(tmp_path / "out"),
        "cache": str(tmp_path / "cache"),
        "recipe": Recipe(text=TextPolicy(num_variants=1)),
    }
    return JobSettings(**{**given, **more})


def quarantine(tmp_path):
    return [
        json.loads(line)
        for path in sorted((tmp_path / "out" / "quarantine").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]


def shard_bytes(tmp_path):
    return {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*.tar")}


@pytest.fixture
def source(tmp_path, captioned_rows, write_parquet, small_jpeg):
    """A folder whose rows name pictures by their paths; nothing of it is in "validation"."""
    rows = []
    for i, row in enumerate(captioned_rows(6)):
        path = tmp_path / "source" / "pictures" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(small_jpeg(i))
        rows.append({**row, "image": {"bytes": None, "path": f"pictures/{i}.jpg"}})
    return write_parquet(tmp_path / "source", rows)


# --- sources in an object store


def test_a_folder_of_a_store_gives_the_shards_of_a_local_one(tmp_path, source, s3_server):
    shutil.move(source / "part.parquet", source / "rows-train.parquet")
    (source / "more").mkdir()
    pq.write_table(
        pq.read_table(source / "rows-train.parquet").slice(0, 3),
        source / "more" / "rows.parquet",
        row_group_size=2,
    )
    (source / "README.md").write_text(
        "---\nconfigs:\n- data_files:\n  - {split: train, path: '*.parquet'}\n"
        "  - {split: validation, path: more/*}\n---\n"
    )
    url = s3_server.make_bucket() + "/captions"
    s3_server.client().put(str(source), url, recursive=True)
    for name, given in (("local", source), ("stored", url)):
        (tmp_path / name).mkdir()
        with s3_server.entered():
            run_job(job_settings(tmp_path / name, given, split="validation"), Quiet())
    assert shard_bytes(tmp_path / "stored") == shard_bytes(tmp_path / "local") != {}
    splits = load_manifest(str(tmp_path / "stored" / "out")).splits
    assert splits["validation"].num_samples == 3


def test_a_store_without_rows_is_refused_by_its_url(s3_server):
    url = s3_server.make_bucket()
    with s3_server.entered():
        for path, reason in (("nothing", "source_missing"), ("photos", "source_empty")):
            storage.publish_bytes(f"{url}/photos/a.jpg", b"x")
            with pytest.raises(SourceError) as caught:
                get_dataset("pixmo_cap", source=f"{url}/{path}")
            assert (caught.value.reason, f"{url}/{path}" in str(caught.value)) == (reason, True)


# --- changed sources


def replace_picture(source, small_jpeg):
    (source / "pictures" / "2.jpg").write_bytes(small_jpeg(77))


def remove_picture(source, small_jpeg):  # noqa: ARG001
    (source / "pictures" / "2.jpg").unlink()


def same_size_and_later(source, small_jpeg):  # noqa: ARG001
    path = source / "pictures" / "2.jpg"
    payload = bytearray(path.read_bytes())
    payload[-20] ^= 1
    path.write_bytes(payload)
    os.utime(path, ns=(1, 1))


def touch_rows(source, small_jpeg):  # noqa: ARG001
    os.utime(source / "part.parquet", ns=(1, 1))


def more_rows(source, small_jpeg):  # noqa: ARG001
    (source / "more.parquet").write_bytes((source / "part.parquet").read_bytes())


CHANGES = [replace_picture, remove_picture, same_size_and_later, touch_rows, more_rows]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_source_is_noticed_by_the_same_command(tmp_path, source, small_jpeg, change):
    settings = job_settings(tmp_path, source)
    run_job(settings, Quiet())
    again = run_job(settings, Quiet())
    assert (again.fresh, again.compared.num_files) == (False, 7)
    before = shard_bytes(tmp_path)
    change(source, small_jpeg)
    with pytest.raises(ConflictError) as caught:
        run_job(settings, Quiet())
    assert caught.value.reason == "source_changed"
    assert caught.value.facts["changed"] == 1
    assert caught.value.facts["compared"] == 7
    assert "FORCE=1" in caught.value.fix
    assert shard_bytes(tmp_path) == before


def test_comparison_names_the_file_and_what_changed(tmp_path, source, small_jpeg):
    settings = job_settings(tmp_path, source)
    run_job(settings, Quiet())
    replace_picture(source, small_jpeg)
    with pytest.raises(ConflictError) as caught:
        run_job(settings, Quiet())
    path = str(source / "pictures" / "2.jpg")
    assert "bytes, had" in caught.value.facts[path]


@pytest.mark.parametrize("change", [touch_rows, replace_picture])
def test_comparison_by_content_goes_by_content(tmp_path, source, small_jpeg, change):
    settings = job_settings(tmp_path, source, compare="content")
    run_job(settings, Quiet())
    for i in range(6):  # a copy without times, of the same content
        os.utime(source / "pictures" / f"{i}.jpg", ns=(i, i))
    change(source, small_jpeg)
    if change is touch_rows:
        assert run_job(settings, Quiet()).compared.num_changed == 0
    else:
        with pytest.raises(ConflictError):
            run_job(settings, Quiet())


def test_no_comparison_costs_nothing_and_says_so(tmp_path, source, small_jpeg):
    run_job(job_settings(tmp_path, source), Quiet())
    replace_picture(source, small_jpeg)
    outcome = run_job(job_settings(tmp_path, source, compare="none"), Quiet())
    assert (outcome.fresh, outcome.compared) == (False, None)


@pytest.fixture(params=["s3", pytest.param("gcs", marks=pytest.mark.slow), "http"])
def stored(request, tmp_path):
    """A store: its URL, and what writes an object."""
    if request.param != "http":
        server = request.getfixturevalue(f"{request.param}_server")
        url = server.make_bucket()
        entered = server.entered()

        def put(name, payload):
            storage.publish_bytes(f"{url}/{name}", payload)

    else:
        entered = served(tmp_path / "served")

        def put(name, payload):
            (tmp_path / "served" / name).write_bytes(payload)

    with entered as address:
        yield address if request.param == "http" else url, put


@contextmanager
def served(folder):
    """Serves a folder with ETags, which follow from the content."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def end_headers(self):
            payload = Path(self.translate_path(self.path))
            if payload.is_file():
                digest = hashlib.sha256(payload.read_bytes()).hexdigest()
                self.send_header("ETag", f'"{digest}"')
            super().end_headers()

    folder.mkdir()
    handler = functools.partial(Handler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def chats(*answers):
    rows = [
        {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": answer}]}
        for answer in answers
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.slow
def test_changed_object_of_a_store_is_noticed_as_a_file_is(tmp_path, stored):
    url, put = stored
    put("rows.jsonl", chats("No.", "Yes."))
    settings = job_settings(tmp_path, f"{url}/rows.jsonl", dataset=f"{url}/rows.jsonl")
    run_job(settings, Quiet())
    again = run_job(settings, Quiet())
    assert (again.fresh, again.compared.num_files) == (False, 1)
    put("rows.jsonl", chats("No.", "Yes?"))  # as many bytes
    with pytest.raises(ConflictError) as caught:
        run_job(settings, Quiet())
    assert caught.value.facts[f"{url}/rows.jsonl"] == "has another version"
    put("rows.jsonl", chats("No.", "Yes.", "Perhaps."))
    with pytest.raises(ConflictError, match="bytes, had"):
        run_job(settings, Quiet())
    assert run_job(dataclasses.replace(settings, compare="none"), Quiet()).fresh is False
    forced = run_job(dataclasses.replace(settings, force=True), Quiet())
    assert forced.result.split.num_samples == 3
    assert run_job(settings, Quiet()).fresh is False


@pytest.mark.slow
def test_plan_of_objects_that_have_changed_is_made_again(tmp_path, s3_server, small_jpeg):
    url = s3_server.make_bucket()
    row = json.loads(chats("No."))
    row |= {"image": "a.jpg"}
    spec = tmp_path / "mine.toml"
    spec.write_text(f'format = "llava"\nsource = "{url}/rows.jsonl"\n')
    with s3_server.entered():
        storage.publish_bytes(f"{url}/rows.jsonl", json.dumps(row).encode())
        storage.publish_bytes(f"{url}/a.jpg", small_jpeg(1))
        settings = job_settings(tmp_path, "hub", dataset=str(spec))
        make_plan(Job(settings), Quiet())
        assert Job(settings).compare_files().num_files == 2
        assert load_plan(Job(settings)) is not None
        payload = bytearray(small_jpeg(1))
        payload[-20] ^= 1
        storage.publish_bytes(f"{url}/a.jpg", bytes(payload))
        report = Quiet()
        assert load_plan(Job(settings), report) is None
    assert f"({url}/a.jpg has another version)" in report.notes[0]


@pytest.mark.slow
def test_folder_of_a_store_is_compared_as_a_local_one(tmp_path, source, s3_server, small_jpeg):
    url = s3_server.make_bucket() + "/captions"
    s3_server.client().put(str(source), url, recursive=True)
    settings = job_settings(tmp_path, url)
    with s3_server.entered():
        run_job(settings, Quiet())
        assert run_job(settings, Quiet()).compared.num_files == 7
        storage.publish_bytes(f"{url}/pictures/2.jpg", small_jpeg(77))
        with pytest.raises(ConflictError) as caught:
            run_job(settings, Quiet())
    assert f"{url}/pictures/2.jpg" in caught.value.facts


def test_object_is_compared_with_its_stamp(tmp_path, stored):
    url, put = stored
    put("a", b"a")
    stamps = stamp_rows([f"{url}/a", f"{url}/missing"], content=True)
    with StampWriter(tmp_path / "files") as writer:
        for stamp in stamps:
            writer.add(stamp)
    places = [f"{url}/a", f"{url}/missing"]
    assert compare_files(str(tmp_path / "files"), places, how="content").num_changed == 0
    put("missing", b"")
    for again, why in ((b"?", "has another version"), (b"longer", "has 6 bytes, had 1")):
        put("a", again)
        for how in ("time", "content"):
            changed = compare_files(str(tmp_path / "files"), places, how=how).changed
            assert changed == {places[0]: why, places[1]: "was missing"}


def test_plan_of_a_source_with_a_signature_does_not_hold_it(tmp_path):
    with served(tmp_path / "served") as address:
        (tmp_path / "served" / "rows.jsonl").write_bytes(chats("No."))
        url = f"{address}/rows.jsonl?sig=s3cr3t"
        job = Job(job_settings(tmp_path, url, dataset=url))
        kept = json.dumps([job.identity, job.dataset.rows.kind])
    kept += json.dumps(Spec(name="a", format="llava", images="https://a/b?sig=s3cr3t").to_dict())
    assert ("s3cr3t" in kept, kept.count("?sig=***")) == (False, 3)


def test_stamps_of_urls_hold_no_secrets():
    stamp = stamp_rows(["memory://own/a.jsonl?token=abc"], content=False)[0]
    assert (stamp.num_bytes, "abc" in stamp.path) == (None, False)


def test_file_that_an_adapter_reads_besides_its_rows_is_compared(tmp_path, source, monkeypatch):
    kind = dataset_class("pixmo_cap")
    side, own = tmp_path / "labels.json", kind.source_files

    def source_files(source, split, *, unmatched):
        return [*own(source, split, unmatched=unmatched), side]

    monkeypatch.setattr(kind, "source_files", source_files)
    side.write_text("{}")
    settings = job_settings(tmp_path, source)
    run_job(settings, Quiet())
    side.write_text("{'a': 1}")
    with pytest.raises(ConflictError) as caught:
        run_job(settings, Quiet())
    assert str(side) in caught.value.facts


def test_force_builds_the_split_again(tmp_path, source, small_jpeg):
    settings = job_settings(tmp_path, source)
    first = run_job(settings, Quiet())
    replace_picture(source, small_jpeg)
    forced = run_job(dataclasses.replace(settings, force=True), Quiet())
    assert (forced.fresh, forced.built_shards) == (True, 1)
    assert forced.result.split.build_key != first.result.split.build_key
    assert verify_job(settings.out, Quiet()) == []
    assert run_job(settings, Quiet()).fresh is False


def test_forced_build_of_an_unchanged_source_gives_the_same_bytes(tmp_path, source):
    settings = job_settings(tmp_path, source)
    first = run_job(settings, Quiet())
    forced = run_job(dataclasses.replace(settings, force=True), Quiet())
    assert forced.built_shards == 1
    assert forced.result.sha256 == first.result.sha256


def test_force_replaces_a_result_of_other_settings_only_where_it_is_alone(tmp_path):
    settings = job_settings(tmp_path, "sample", dataset="text_sft", limit=3)
    run_job(settings, Quiet())
    other = dataclasses.replace(settings, recipe=Recipe(seed=7), force=True)
    assert run_job(other, Quiet()).fresh
    run_job(dataclasses.replace(other, split="validation"), Quiet())
    with pytest.raises(ConflictError) as caught:
        run_job(dataclasses.replace(settings, force=True), Quiet())
    assert caught.value.reason == "recipe_conflict"
    assert set(load_manifest(settings.out).splits) == {"train", "validation"}


def test_interrupted_force_leaves_no_mixture_and_resumes(tmp_path, source, monkeypatch, small_jpeg):
    settings = job_settings(tmp_path, source)
    run_job(settings, Quiet())
    replace_picture(source, small_jpeg)
    forced = dataclasses.replace(settings, force=True)

    def dies(*args, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("preprocess.job.pipeline.make_plan", dies)
        with pytest.raises(KeyboardInterrupt):
            run_job(forced, Quiet())
    assert load_manifest(settings.out) is None
    assert run_job(forced, Quiet()).fresh


def test_plan_of_a_source_that_has_changed_is_made_again(tmp_path, source, small_jpeg):
    settings = job_settings(tmp_path, source)
    make_plan(Job(settings), Quiet())
    assert load_plan(Job(settings)) is not None
    replace_picture(source, small_jpeg)
    report = Quiet()
    assert load_plan(Job(settings), report) is None
    assert "1 file of the source changed" in report.notes[0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda payload: payload[: len(payload) // 2],
        lambda payload: b"no gzip" + payload,
        lambda payload: payload[:20] + b"\xff" + payload[21:],
        lambda payload: gzip.compress(b"[1, 2]\n"),  # noqa: ARG005
        lambda payload: gzip.compress(b'{"a": 1}\n'),  # noqa: ARG005
        lambda payload: gzip.compress(b'["a", "b", "c", "d", "e"]\n'),  # noqa: ARG005
    ],
)
def test_damaged_stamps_are_named_and_both_ways_out_work(tmp_path, source, damage):
    settings = job_settings(tmp_path, source)
    first = run_job(settings, Quiet())
    stamps = tmp_path / "out" / "plan" / "train-files.jsonl.gz"
    stamps.write_bytes(damage(stamps.read_bytes()))
    with pytest.raises(StorageError) as caught:
        run_job(settings, Quiet())
    assert caught.value.reason == "plan_files"
    assert not run_job(dataclasses.replace(settings, compare="none"), Quiet()).fresh
    again = run_job(dataclasses.replace(settings, force=True), Quiet())
    assert again.result.sha256 == first.result.sha256
    assert run_job(settings, Quiet()).compared.num_changed == 0


def test_plan_whose_stamps_are_damaged_is_made_again(tmp_path, source):
    settings = job_settings(tmp_path, source)
    make_plan(Job(settings), Quiet())
    (tmp_path / "out" / "plan" / "train-files.jsonl.gz").write_bytes(b"x")
    assert load_plan(Job(settings)) is None
    assert run_job(settings, Quiet()).compared is None


# --- split files


def test_job_says_which_files_make_which_split_and_refuses_others(tmp_path, source):
    (source / "part.parquet").rename(source / "train.parquet")
    report = Quiet()
    run_job(job_settings(tmp_path, source), report)
    assert "split train: 1 file: train.parquet (by names)" in report.notes
    (source / "held_out.parquet").write_bytes((source / "train.parquet").read_bytes())
    settings = job_settings(tmp_path, source, out=str(tmp_path / "second"))
    with pytest.raises(SourceError) as caught:
        run_job(settings, Quiet())
    assert caught.value.reason == "source_split"
    skipped = run_job(dataclasses.replace(settings, unmatched="skip"), Quiet())
    assert skipped.result.split.num_samples == 6
    settings = job_settings(tmp_path, source, out=str(tmp_path / "third"), unmatched="take")
    assert count_rows(run_job(settings, Quiet()).result.split).left_out == {"duplicate": 6}


# --- odd rows


def test_exception_of_an_adapter_is_a_quarantined_row(
    tmp_path, source, monkeypatch, captioned_rows, write_parquet
):
    write_parquet(source / "b", captioned_rows(3))
    own = dataset_class("pixmo_cap").to_example

    def to_example(self, row):
        if row["caption"] == "a picture with number 1, all colours and no sense":
            return row["no such column"]
        return own(self, row)

    monkeypatch.setattr(dataset_class("pixmo_cap"), "to_example", to_example)
    outcome = run_job(job_settings(tmp_path, source), Quiet())
    assert outcome.result.split.quarantined["row_error"] == 2
    lines = [line for line in quarantine(tmp_path) if line["reason"] == "row_error"]
    assert [(line["file"], line["row"]) for line in lines] == [
        ("b/part.parquet", 1),
        ("part.parquet", 1),
    ]
    assert "KeyError: 'no such column'" in lines[0]["message"]


@pytest.mark.parametrize("dataset", ["pixmo_cap", "vqa2"])
def test_row_that_cannot_be_read_is_quarantined(tmp_path, captioned_rows, dataset, monkeypatch):
    kind, first = dataset_class(dataset), dataset_class("pixmo_cap")
    monkeypatch.setattr(kind, "COLUMNS", ("image",))
    monkeypatch.setattr(kind, "to_example", first.to_example)
    monkeypatch.setattr(kind, "modes", first.modes)
    rows = captioned_rows(20)
    captions = [row["caption"].encode() for row in rows]
    captions[7] = b"\xff"
    table = pa.Table.from_pylist(rows)
    bad = pa.Array.from_buffers(pa.string(), 20, pa.array(captions, pa.binary()).buffers())
    at = table.schema.get_field_index("caption")
    (tmp_path / "source").mkdir()
    pq.write_table(table.set_column(at, "caption", bad), tmp_path / "source" / "a.parquet")
    settings = job_settings(tmp_path, tmp_path / "source", dataset=dataset)
    split = run_job(settings, Quiet()).result.split
    assert split.num_samples == 19
    assert dict(split.quarantined) == {"row_error": 1}
    (line,) = quarantine(tmp_path)
    assert (line["file"], line["row"]) == ("a.parquet", 7)
    assert "UnicodeDecodeError" in line["message"]


@pytest.mark.parametrize(
    "example",
    [
        None,
        {"image": None},
        {"message_list": [{"style": "long_caption", "text": {1, 2}}]},
        {"message_list": [{"style": "long_caption", "text": "a"}], "metadata": {"at": object()}},
        {"message_list": "text"},
        {"message_list": [{"style": "long_caption"}]},
    ],
)
@pytest.mark.parametrize("dataset", ["pixmo_cap", "vqa2"])
def test_row_that_is_not_an_example_is_quarantined(tmp_path, source, monkeypatch, dataset, example):
    kind = dataset_class(dataset)
    first = dataset_class("pixmo_cap").to_example

    def to_example(self, row):
        return example if "number 1," in row["caption"] else first(self, row)

    monkeypatch.setattr(kind, "to_example", to_example)
    monkeypatch.setattr(kind, "COLUMNS", ("image",))
    monkeypatch.setattr(kind, "modes", dataset_class("pixmo_cap").modes)
    split = run_job(job_settings(tmp_path, source, dataset=dataset), Quiet()).result.split
    assert split.num_samples == 5
    assert sum(split.quarantined.values()) == 1
    (line,) = quarantine(tmp_path)
    assert (line["file"], line["row"]) == ("part.parquet", 1)


def test_missing_local_pictures_are_not_dead_links(tmp_path, source):
    (source / "pictures" / "2.jpg").unlink()
    settings = job_settings(tmp_path, source, max_dead_links=1.0, max_lost_rows=0.0)
    with pytest.raises(BudgetError) as caught:
        run_job(settings, Quiet())
    assert caught.value.facts["setting"] == "MAX_LOST_ROWS"
    loose = dataclasses.replace(settings, max_dead_links=0.0, max_lost_rows=0.2)
    assert run_job(loose, Quiet()).result.split.quarantined == {"image_missing": 1}


def test_duplicates_are_dropped_or_kept(tmp_path, captioned_rows, write_parquet):
    rows = captioned_rows(3)
    folder = write_parquet(tmp_path / "source", [*rows, rows[0], rows[0]])
    dropped = run_job(job_settings(tmp_path, folder), Quiet()).result.split
    assert (dropped.num_samples, dropped.quarantined) == (3, {"duplicate": 2})
    kept = job_settings(tmp_path, folder, duplicates="keep", out=str(tmp_path / "kept"))
    split = run_job(kept, Quiet()).result.split
    assert (split.num_samples, split.quarantined) == (5, {})
    assert verify_job(kept.out, Quiet()) == []
    keys = {line["key"] for line in planned(kept)}
    assert len(keys) == 5


def planned(settings):
    job = Job(dataclasses.replace(settings, out=settings.out + "-plan"))
    make_plan(job, Quiet())
    folder = f"{job.settings.out}/plan/{settings.split}"
    return [
        json.loads(line)
        for name in sorted(os.listdir(folder))
        if name.startswith("rows-")
        for line in Path(folder, name).read_text().splitlines()
    ]


# --- where every row went


WITH_SOURCES = [
    name
    for name in dataset_names()
    if not (dataset_class(name).videos or issubclass(dataset_class(name), EpisodeDataset))
]
"""The dataset of generated clips has no other source, and those of robots no rows in Parquet."""


@pytest.mark.parametrize(
    "name, limit", [*((name, None) for name in WITH_SOURCES), ("pixmo_points", 2), ("vqa2", 2)]
)
def test_rows_add_up_for_every_dataset(
    tmp_path, name, limit, write_parquet, monkeypatch, small_jpeg
):
    """Generated rows as a folder source, with duplicates, a broken row, and a hash-made split."""
    monkeypatch.setattr(dataset_class(name), "validation_share", 0.3)
    rows = plain_rows(name, tmp_path / "source", small_jpeg)
    rows += [rows[0], rows[1], broken(rows[2])]
    source = write_parquet(tmp_path / "source", rows)
    counts = {}
    for split in ("train", "validation"):
        settings = job_settings(
            tmp_path, source, dataset=name, split=split, limit=limit, max_lost_rows=1.0
        )
        report = Quiet()
        made = run_job(settings, report).result.split
        found = counts[split] = count_rows(made)
        parts = (found.in_samples, found.other_split, found.beyond_limit)
        assert sum(parts) + sum(found.left_out.values()) == found.read
        dataset = get_dataset(name, split, source=str(source), limit=limit)
        planned = [len(dataset.row_numbers(i)) for i in range(len(dataset))]
        lost = sum(found.left_out.values()) - sum(dataset.left_out.values())
        assert found.in_samples == sum(planned) - lost
        if not dataset.grouped:
            assert found.in_samples == made.num_samples
        note = f"{found.other_split:,} of {found.read:,} rows are in the split"
        assert any(line.startswith(note) for line in report.notes)
    if limit is None:
        train, validation = counts["train"], counts["validation"]
        assert train.read == validation.read == len(rows)
        assert train.left_out
        assert train.beyond_limit == validation.beyond_limit == 0
        # Rows that are left out on opening are of neither side.
        opened = sum(dataset.left_out.values())
        for mine, other in ((train, validation), (validation, train)):
            lost = sum(other.left_out.values()) - opened
            assert mine.other_split == other.in_samples + lost


def plain_rows(name, folder, small_jpeg):
    """Generated rows as Parquet holds them: pictures are files of the folder."""
    dataset = get_dataset(name, source="sample", limit=8)
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for i in range(len(dataset.rows)):
        row = dict(dataset.rows[i])
        for field in ("image", "images"):
            if field in row:
                scenes = row[field] if field == "images" else [row[field]]
                names = []
                for scene in scenes:
                    path = folder / f"{scene.idx}.jpg"
                    path.write_bytes(small_jpeg(scene.idx))
                    names.append(path.name)
                row[field] = names if field == "images" else names[0]
        found.append(row)
    return found


def broken(row):
    """A row that no adapter can read: its texts are empty, its answers gone."""
    return {
        name: value if name in ("image", "images", "image_url", "id") else emptied(value)
        for name, value in row.items()
    }


def emptied(value):
    return type(value)() if isinstance(value, str | list | dict) else None


# --- finished shards whose bytes change before the commit


def test_finished_shard_with_a_flipped_bit_is_built_again(tmp_path, monkeypatch):
    settings = job_settings(tmp_path, "sample", limit=6, num_shards=2)

    def stops(*args, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("preprocess.job.pipeline.commit", stops)
        with pytest.raises(KeyboardInterrupt):
            run_job(settings, Quiet())
    want = shard_bytes(tmp_path)
    for suffix in (".tar", ".index.npy"):
        path = next((tmp_path / "out" / "train").glob(f"*-00001-of-*{suffix}"))
        payload = bytearray(path.read_bytes())
        payload[len(payload) // 2] ^= 1
        path.write_bytes(payload)
    report = Quiet()
    assert run_job(settings, report).built_shards == 1
    assert shard_bytes(tmp_path) == want
    assert verify_job(settings.out, Quiet()) == []
    assert any("built again" in note for note in report.notes)


# --- an output that is removed under the job


class Removing(Quiet):
    """A reporter that removes a folder at the k-th thing it is told."""

    def __init__(self, folder, k):
        super().__init__()
        self._folder, self._left = folder, k

    def _count(self):
        self._left -= 1
        if self._left == 0:
            shutil.rmtree(self._folder)

    def stage(self, name, total):  # noqa: ARG002
        self._count()

    def step(self, reason):
        super().step(reason)
        self._count()

    @property
    def removed(self):
        return self._left <= 0


def test_output_that_is_removed_at_any_moment_is_a_named_error(tmp_path):
    k, codes = 0, set()
    while True:
        k += 2
        settings = job_settings(
            tmp_path, "sample", dataset="text_sft", limit=2, num_shards=2, out=str(tmp_path / "o")
        )
        report = Removing(tmp_path / "o", k)
        try:
            run_job(settings, report)
        except StorageError as error:
            codes.add(error.reason)
        if not report.removed:
            break
        shutil.rmtree(tmp_path / "o", ignore_errors=True)
    assert k > 12
    assert codes == {"output_removed"}


def test_part_of_an_output_that_is_removed_is_named(tmp_path):
    report = Removing(tmp_path / "out" / "plan", 22)
    settings = job_settings(tmp_path, "sample", dataset="text_sft", limit=4, num_shards=4)
    with pytest.raises(StorageError) as caught:
        run_job(settings, report)
    assert caught.value.reason == "output_removed"
    assert caught.value.where.startswith(str(tmp_path / "out" / "plan"))


# --- samples that the index cannot hold


@pytest.mark.parametrize("num_bytes, num_samples", [(2**32 - 512, 4), (2**32, 3)])
def test_sample_of_four_gibibytes_is_quarantined(tmp_path, monkeypatch, num_bytes, num_samples):
    lengths = iter([None, num_bytes])  # of the second sample; four gibibytes cost too much here
    real = build.tar_length

    def tar_length(members):
        return next(lengths, None) or real(members)

    monkeypatch.setattr(build, "tar_length", tar_length)
    settings = job_settings(tmp_path, "sample", dataset="text_sft", limit=4)
    split = run_job(settings, Quiet()).result.split
    assert split.num_samples == num_samples
    if num_samples == 3:
        assert split.quarantined == {"sample_length": 1}
        (line,) = quarantine(tmp_path)
        assert (line["reason"], line["facts"]["num_bytes"]) == ("sample_length", str(2**32))
        assert verify_job(settings.out, Quiet()) == []


# --- named pipes: reading one would wait for a writer


def test_named_pipes_are_refused_and_not_waited_for(tmp_path, source):
    (source / "pictures" / "2.jpg").unlink()
    os.mkfifo(source / "pictures" / "2.jpg")
    outcome = run_job(job_settings(tmp_path, source, compare="content"), Quiet())
    assert outcome.result.split.quarantined == {"image_missing": 1}
    os.mkfifo(source / "more.parquet")
    settings = job_settings(tmp_path, source, out=str(tmp_path / "second"), compare="content")
    with pytest.raises(SourceError) as caught:
        run_job(settings, Quiet())
    assert caught.value.reason == "source_unreadable"
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(ConfigError) as refused:
        import_tars(
            ImportSettings(tars=(str(tmp_path / "x.tar"),), out=str(tmp_path / "third"), name="x"),
            Quiet(),
        )
    assert refused.value.reason == "import_tars"
