"""Resharding real datasets on disk: the same samples, bytes and order in other shards."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.lib.recfunctions
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loader.reading.reader import ShardReader
from loader.state.fingerprint import split_fingerprint
from preprocess.__main__ import command_line
from preprocess.annotate import AnnotateSettings, annotate, plan_annotation
from preprocess.cli.reshard import VERBS, plan_text, reshard_settings
from preprocess.job.gc import find_strays, remove_strays
from preprocess.job.verify import verify
from preprocess.reshard import run as job
from preprocess.reshard.assign import ReaderCluster
from preprocess.reshard.copy import scratch_of
from preprocess.reshard.plan import ReshardSettings, plan_reshard
from preprocess.reshard.run import portable_url, reshard
from shardspec import storage
from shardspec.errors import (
    ConfigError,
    ConflictError,
    ManifestError,
    ShardError,
    StorageError,
)
from shardspec.manifest import load_manifest, require_manifest, sealed
from tests import inline
from tests.examples import examples
from tests.inline import Quiet

pytestmark = pytest.mark.usefixtures("in_this_process")


def recut(sources, out, **options):
    sources = (sources,) if isinstance(sources, str) else tuple(sources)
    wanted = ReshardSettings(sources=sources, out=str(out), **{"form": "copy", **options})
    return reshard(plan_reshard(wanted, Quiet()), Quiet())


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def tree(folder):
    """Every file of a folder, by its sha256."""
    folder = Path(folder)
    return {str(p.relative_to(folder)): digest(p) for p in folder.rglob("*") if p.is_file()}


def contents(url, split="train"):
    """The samples of a split in order: (key, sha256 of its bytes in the tar)."""
    reader = ShardReader(str(url), require_manifest(str(url)), split=split, check="crc")
    found = []
    for i in range(len(reader)):
        key, members, _ = reader.members(i)  # compares its checksum
        found.append((key, hashlib.sha256(members).hexdigest()))
    return found


def totals(url):
    names = ("num_samples", "num_images", "num_tokens", "num_loss_tokens")
    return {
        name: [getattr(split, n) for n in names]
        for name, split in require_manifest(str(url)).splits.items()
    }


@pytest.fixture(scope="module")
def samples(tiny_sample):
    return [tiny_sample(i, num_branches=1 + i % 3, size=(20 + i, 28)) for i in range(23)]


@pytest.fixture(scope="module")
def dataset(samples, write_dataset, tmp_path_factory):
    """A dataset of 23 samples in 4 shards, which no test may change."""
    return write_dataset(tmp_path_factory.mktemp("reshard") / "source", samples, num_shards=4)


@pytest.fixture(scope="module")
def other(tiny_sample, write_dataset, tmp_path_factory):
    """Nine other samples of the same recipe, as a later run would append them."""
    folder = tmp_path_factory.mktemp("other") / "later"
    return write_dataset(folder, [tiny_sample(100 + i) for i in range(9)], num_shards=2)


@pytest.fixture
def own(dataset, tmp_path):
    """A copy of it, to be damaged."""
    shutil.copytree(dataset, tmp_path / "own")
    return str(tmp_path / "own")


# --- copies


@settings(max_examples=examples(25), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(1, 23), before=st.integers(1, 7), between=st.integers(1, 12))
def test_there_and_back_in_kept_order_gives_the_same_bytes(
    count, before, between, samples, write_dataset, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("back")
    before = min(before, count)
    source = write_dataset(folder / "a", samples[:count], num_shards=before)
    recut(source, folder / "b", num_shards=between)
    recut(str(folder / "b"), folder / "c", num_shards=before)
    assert len(require_manifest(str(folder / "b")).shards) == min(between, count)
    assert tree(folder / "a" / "train") == tree(folder / "c" / "train")
    assert contents(folder / "a") == contents(folder / "b")
    assert totals(folder / "a") == totals(folder / "b") == totals(folder / "c")
    shutil.rmtree(folder)


@settings(max_examples=examples(25), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_shards=st.integers(1, 9),
    order=st.sampled_from(["keep", "shuffle", "length"]),
    seed=st.integers(0, 5),
    through=st.sampled_from(["client", "store"]),
)
def test_whatever_the_order_the_samples_are_the_same_multiset(
    num_shards, order, seed, through, dataset, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("order")
    done = recut(
        dataset,
        folder / "out",
        num_shards=num_shards,
        order=order,
        seed=seed,
        through=through,
    )
    assert Counter(contents(folder / "out")) == Counter(contents(dataset))
    assert totals(folder / "out") == totals(dataset)
    assert len(done.manifest.shards) == num_shards
    counts = [shard.nsamples for shard in done.manifest.shards]
    assert max(counts) - min(counts) <= 1
    shutil.rmtree(folder)


def test_the_same_request_gives_the_same_bytes_whoever_copies(dataset, tmp_path):
    options = {"num_shards": 3, "order": "shuffle", "seed": 4}
    recut(dataset, tmp_path / "a", **options)
    recut(dataset, tmp_path / "b", through="store", num_workers=2, **options)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_by_length_shards_begin_with_the_short_samples(dataset, tmp_path):
    recut(dataset, tmp_path / "out", num_shards=2, order="length")
    reader = ShardReader(
        str(tmp_path / "out"), require_manifest(str(tmp_path / "out")), split="train"
    )
    lengths = reader.column("view_length", np.arange(len(reader)))[:, 0].tolist()
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 3


def test_a_copy_verifies_and_its_shards_have_no_hash_but_their_samples_sums(dataset, tmp_path):
    done = recut(dataset, tmp_path / "out", num_shards=3)
    assert {shard.sha256 for shard in done.manifest.shards} == {""}
    findings = verify(str(tmp_path / "out"), Quiet(), deep=True)
    # The tiny dataset was written without a tokenizer.
    assert [finding.reason for finding in findings] == ["tokenizer_file"]
    path = tmp_path / "out" / done.manifest.shards[1].url
    payload = bytearray(path.read_bytes())
    payload[payload.index(b"\x93NUMPY") + 140] ^= 4  # a number in an array
    path.write_bytes(payload)
    findings = verify(str(tmp_path / "out"), Quiet())
    assert [finding.reason for finding in findings[1:]] == ["sample_crc"]


def test_hashes_are_those_of_the_files_where_they_are_asked_for(dataset, tmp_path):
    done = recut(dataset, tmp_path / "out", num_shards=3, sha256=True)
    for shard in done.manifest.shards:
        assert shard.sha256 == digest(tmp_path / "out" / shard.url)


def test_a_shard_that_stays_whole_keeps_its_hash(dataset, tmp_path):
    done = recut(dataset, tmp_path / "out", num_shards=4)
    before = require_manifest(dataset).shards
    assert [shard.sha256 for shard in done.manifest.shards] == [shard.sha256 for shard in before]


def test_a_cluster_gets_a_shard_for_every_reader(dataset, tmp_path):
    done = recut(dataset, tmp_path / "out", cluster=ReaderCluster(nodes=2, ranks=3, workers=2))
    assert len(done.manifest.shards) == 12


RESULTS = {
    "fewer shards": {"num_shards": 2},
    "more shards": {"num_shards": 7},
    "as many": {"num_shards": 4},
    "one sample each": {"num_shards": 23},
    "shuffled": {"num_shards": 5, "order": "shuffle", "seed": 1},
    "by length": {"num_shards": 5, "order": "length"},
    "unchecked": {"num_shards": 3, "through": "store"},
    "hashed": {"num_shards": 3, "sha256": True},
    "filtered": {"where": "width >= 30"},
    "by keys": {"keys": frozenset({"sample-0003", "sample-0011"})},
    "dealt out": {"into": {"train": 0.6, "held-out": 0.4}},
    "merged": {"num_shards": 3},
}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("between", ["", "view"])
def test_webdataset_wids_and_gnu_tar_read_every_result(
    name, between, dataset, other, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    sources = [dataset, other] if name == "merged" else [dataset]
    if between:
        recut(sources, tmp_path / "view", form="view", **RESULTS[name])
        recut(str(tmp_path / "view"), out)
    else:
        recut(sources, out, **RESULTS[name])
    manifest = require_manifest(str(out))
    keys = [key for split in sorted(manifest.splits) for key, _ in contents(out, split)]
    urls = [str(out / shard.url) for shard in manifest.shards]
    want = {}
    for url in urls:
        with tarfile.open(url, "r:") as archive:
            want |= {m.name: archive.extractfile(m).read() for m in archive}
    assert [name.split(".")[0] for name in want if name.endswith(".json")] == keys
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import webdataset as wds
        import wids

        samples = list(wds.WebDataset(urls, shardshuffle=False, empty_check=False))
        monkeypatch.setenv("WIDS_CACHE", str(tmp_path / "cache"))
        listed = wids.ShardListDataset(str(out / "manifest.json"))
        assert [listed[i]["__key__"] for i in range(len(listed))] == keys
    assert [sample["__key__"] for sample in samples] == keys
    got = {
        f"{sample['__key__']}.{name}": payload
        for sample in samples
        for name, payload in sample.items()
        if not name.startswith("__")
    }
    assert got == want
    (tmp_path / "files").mkdir()
    for url in urls:
        done = subprocess.run(
            ["tar", "-xf", url, "-C", tmp_path / "files"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
    assert {p.name: p.read_bytes() for p in (tmp_path / "files").iterdir()} == want


# --- views


def test_a_view_reads_like_the_dataset_that_it_shows(dataset, samples, tmp_path):
    done = recut(dataset, tmp_path / "view", num_shards=7, form="view")
    assert done.copied_shards == 0
    assert set(tree(tmp_path / "view")) == {"manifest.json"}  # and no tokenizer: there was none
    manifest = require_manifest(str(tmp_path / "view"))
    assert len(manifest.shards) == 7
    assert contents(tmp_path / "view") == contents(dataset)
    assert totals(tmp_path / "view") == totals(dataset)
    prints = []
    for url in (dataset, str(tmp_path / "view")):
        manifest = require_manifest(url)
        reader = ShardReader(url, manifest, split="train")
        prints.append(split_fingerprint(manifest, reader, split="train", num_samples=23))
        backwards = np.arange(23)[::-1]
        assert reader.column("key", backwards).tolist() == [s.key.encode() for s in samples[::-1]]
        assert reader.read(13).key == "sample-0013"
    assert prints[0] == prints[1]


@settings(max_examples=examples(25), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shards=st.lists(st.integers(1, 23), min_size=1, max_size=3),
    order=st.sampled_from(["keep", "shuffle", "length"]),
)
def test_views_of_views_and_copies_of_them_have_the_same_samples(
    shards, order, dataset, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("views")
    url = dataset
    for i, num_shards in enumerate(shards):
        recut(url, folder / str(i), num_shards=num_shards, order=order, seed=i, form="view")
        want = Counter(contents(dataset))
        assert Counter(contents(folder / str(i))) == want
        url = str(folder / str(i))
    files = require_manifest(url).view.files
    assert {storage.resolve(url, file.url) for file in files} == {
        f"{dataset}/{shard.url}" for shard in require_manifest(dataset).shards
    }
    recut(url, folder / "copy", num_shards=2)
    assert contents(folder / "copy") == contents(url)
    shutil.rmtree(folder)


def test_a_view_suffices_unless_asked_otherwise_and_says_why(dataset, tmp_path):
    settings = ReshardSettings(sources=(dataset,), out=str(tmp_path / "out"), num_shards=3)
    plan = plan_reshard(settings, Quiet())
    assert plan.view
    assert "no byte needs to move" in plan_text(plan)
    assert "needs no reshard at all" in plan_text(plan)
    assert not (tmp_path / "out").exists()
    reshard(plan, Quiet())
    assert require_manifest(str(tmp_path / "out")).view is not None


@pytest.mark.parametrize("words, notes", [(["--sha256"], 1), ([], 0), (["--sha256", "--copy"], 0)])
def test_what_a_view_that_was_not_requested_ignores_is_told(dataset, tmp_path, words, notes):
    class Told(Quiet):
        def show(self, text):
            pass

    told = Told()
    parser, _ = command_line()
    words = ["reshard", str(dataset), str(tmp_path / "out"), "--dry-run", *words]
    assert VERBS[0].run(parser.parse_args(words), told) == 0
    assert sum(note.startswith("no effect: --sha256") for note in told.notes) == notes


def test_a_view_of_too_many_runs_becomes_a_copy(dataset, tmp_path, monkeypatch):
    from preprocess.reshard import assign as arithmetic

    monkeypatch.setattr(arithmetic, "MAX_VIEW_RUNS", 5)
    plan = plan_reshard(
        ReshardSettings(sources=(dataset,), out=str(tmp_path / "out"), order="shuffle"), Quiet()
    )
    assert not plan.view
    assert "copy: a view would list" in plan_text(plan)
    reshard(plan, Quiet())
    assert require_manifest(str(tmp_path / "out")).view is None


def test_a_folder_with_a_dataset_and_its_view_may_be_moved(own, tmp_path):
    folder = tmp_path / "sets"
    folder.mkdir()
    shutil.move(own, folder / "a")
    recut(str(folder / "a"), folder / "view", num_shards=2, form="view")
    want = contents(folder / "view")
    folder.rename(tmp_path / "moved")
    assert contents(tmp_path / "moved" / "view") == want
    assert verify(str(tmp_path / "moved" / "view"), Quiet())[1:] == []


def test_a_view_elsewhere_names_its_files_in_full(tmp_path):
    assert portable_url(str(tmp_path / "x/view"), str(tmp_path / "y/a.tar")) == str(
        (tmp_path / "y/a.tar").resolve()
    )
    assert portable_url("s3://bucket/view", str(tmp_path / "a.tar")) == str(tmp_path / "a.tar")
    assert portable_url("s3://bucket", "s3://other/a.tar") == "s3://other/a.tar"


def test_a_view_keeps_no_password(tmp_path):
    with pytest.raises(ConfigError) as caught:
        portable_url(str(tmp_path / "view"), "s3://me:hunter2@bucket/a.tar")
    assert caught.value.reason == "url_secret"
    assert "hunter2" not in str(caught.value)


def test_a_view_tells_old_readers_that_it_is_not_for_them(dataset, tmp_path):
    recut(dataset, tmp_path / "view", num_shards=2, form="view")
    document = json.loads((tmp_path / "view" / "manifest.json").read_bytes())
    assert document["format_version"] == 2
    assert "__kind__" not in document  # no wids index either: its shards are no files


# --- merge, split, filter


@pytest.mark.parametrize("form", ["view", "copy"])
def test_datasets_of_one_recipe_are_joined_in_order(form, dataset, other, tmp_path):
    done = recut([dataset, other], tmp_path / "out", num_shards=3, form=form)
    assert contents(tmp_path / "out") == contents(dataset) + contents(other)
    assert [s.nsamples for s in done.manifest.shards] == [10, 11, 11]
    # A run that began with the first alone goes on: its samples stand first, in their order.
    manifest = require_manifest(str(tmp_path / "out"))
    reader = ShardReader(str(tmp_path / "out"), manifest, split="train")
    old = require_manifest(dataset)
    assert split_fingerprint(manifest, reader, split="train", num_samples=23) == split_fingerprint(
        old, ShardReader(dataset, old, split="train"), split="train", num_samples=23
    )


def test_a_shared_key_is_refused(dataset, own, tmp_path):
    with pytest.raises(ConflictError) as caught:
        recut([dataset, own], tmp_path / "out")
    assert caught.value.reason == "key_collision"
    assert caught.value.facts["key"].startswith("sample-00")
    assert not (tmp_path / "out").exists()


def test_another_recipe_is_refused_by_its_field(dataset, samples, write_dataset, tmp_path):
    jpeg = write_dataset(tmp_path / "png", samples[:3], codec="png")
    with pytest.raises(ConflictError) as caught:
        recut([dataset, jpeg], tmp_path / "out")
    assert caught.value.reason == "recipe_conflict"
    assert ["CODEC", "raw", "png"] in [row.split() for row in caught.value.what.splitlines()]


def test_differing_names_want_one(dataset, tiny_sample, write_dataset, tmp_path):
    named = write_dataset(tmp_path / "b", [tiny_sample(500)], name="other")
    with pytest.raises(ConfigError) as caught:
        recut([dataset, named], tmp_path / "out")
    assert caught.value.reason == "dataset_name"
    done = recut([dataset, named], tmp_path / "out", name="both", num_shards=1)
    assert done.manifest.shards[0].url == "train/both-train-00000-of-00001.tar"


@pytest.mark.parametrize("form", ["view", "copy"])
def test_splits_share_the_samples_and_are_cut_again_together(form, dataset, tmp_path):
    recut(dataset, tmp_path / "a", into={"train": 0.6, "held-out": 0.4}, salt="s", form=form)
    train, held_out = contents(tmp_path / "a"), contents(tmp_path / "a", "held-out")
    assert 0 < len(held_out) < len(train)
    assert sorted(train + held_out) == sorted(contents(dataset))
    recut(str(tmp_path / "a"), tmp_path / "b", num_shards=2)
    assert contents(tmp_path / "b") == train
    assert contents(tmp_path / "b", "held-out") == held_out
    only = recut(str(tmp_path / "a"), tmp_path / "c", split="held-out")
    assert set(only.manifest.splits) == {"held-out"}


def test_a_filter_keeps_what_its_condition_says_and_counts_the_rest(dataset, samples, tmp_path):
    done = recut(dataset, tmp_path / "out", where="width >= 30 and num_images == 1")
    assert [key for key, _ in contents(tmp_path / "out")] == [s.key for s in samples[10:]]
    assert done.manifest.splits["train"].source["left_out"] == 10


def test_a_filter_by_keys_keeps_these(dataset, tmp_path):
    keys = frozenset({"sample-0003", "sample-0011", "no-such-key"})
    recut(dataset, tmp_path / "out", keys=keys)
    assert [key for key, _ in contents(tmp_path / "out")] == ["sample-0003", "sample-0011"]


def test_a_filter_that_keeps_nothing_is_refused(dataset, tmp_path):
    with pytest.raises(ConfigError) as caught:
        recut(dataset, tmp_path / "out", where="width > 99999")
    assert caught.value.reason == "empty_result"


# --- what is refused, and what stays as it was


def test_the_same_command_has_nothing_to_do_and_another_is_refused(dataset, tmp_path):
    first = recut(dataset, tmp_path / "out", num_shards=3)
    before = tree(tmp_path / "out")
    again = recut(dataset, tmp_path / "out", num_shards=3)
    assert (first.fresh, again.fresh) == (True, False)
    with pytest.raises(ConflictError) as caught:
        recut(dataset, tmp_path / "out", num_shards=3, order="length")
    assert caught.value.reason == "job_conflict"
    rows = [row.split() for row in caught.value.what.splitlines()]
    assert ["splits.train.order", "keep", "length"] in rows
    with pytest.raises(ConflictError) as caught:
        recut(dataset, tmp_path / "out", num_shards=2)
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("out", ["", "/", "/inside", "/../source"])
def test_an_output_in_its_source_is_refused(out, dataset):
    before = tree(dataset)
    with pytest.raises(ConfigError) as caught:
        recut(dataset, dataset + out)
    assert caught.value.reason == "reshard_in_place"
    assert tree(dataset) == before


@pytest.mark.parametrize("names", [("s3", "s3a"), ("s3a", "s3"), ("gs", "gcs"), ("gcs", "gs")])
@pytest.mark.parametrize("out", ["set", "set/inside", ""])
def test_an_output_in_its_source_is_refused_by_any_name_of_the_store(
    names, out, dataset, monkeypatch
):
    manifest = Path(dataset, "manifest.json").read_bytes()
    monkeypatch.setattr(storage, "read_bytes", lambda url: manifest)
    with pytest.raises(ConfigError) as caught:
        recut(f"{names[0]}://bucket/set", f"{names[1]}://bucket/{out}")
    assert caught.value.reason == "reshard_in_place"


def test_a_source_without_a_manifest_is_refused(tmp_path):
    with pytest.raises(ManifestError) as caught:
        recut(str(tmp_path), tmp_path / "out")
    assert caught.value.reason == "manifest_missing"


def cut_tar(path):
    os.truncate(path, path.stat().st_size - 512)


def flip_byte(path, at=2000):
    times = path.stat()
    payload = bytearray(path.read_bytes())
    payload[at] ^= 1
    path.write_bytes(payload)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


DAMAGES = {
    "tar cut": (lambda d, e: cut_tar(d / e.url), "shard_size"),
    "tar gone": (lambda d, e: (d / e.url).unlink(), "shard_missing"),
    "tar changed": (lambda d, e: flip_byte(d / e.url), "sample_crc"),
    "index cut": (lambda d, e: cut_tar(d / e.index_url), "index_sha256"),
    "index gone": (lambda d, e: (d / e.index_url).unlink(), "index_missing"),
    "index changed": (lambda d, e: flip_byte(d / e.index_url, at=700), "index_sha256"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_source_is_noticed_before_anything_is_published(name, own, tmp_path):
    damage, reason = DAMAGES[name]
    damage(Path(own), require_manifest(own).shards[2])
    before = tree(own)
    with pytest.raises(ShardError) as caught:
        recut(own, tmp_path / "out", num_shards=3)
    assert caught.value.reason == reason
    assert caught.value.fix
    assert load_manifest(str(tmp_path / "out")) is None
    assert tree(own) == before


@pytest.mark.parametrize("through", ["client", "store"])
@pytest.mark.parametrize("form", ["view", "copy"])
def test_a_source_that_changes_under_our_hands_is_noticed(form, through, own, tmp_path):
    settings = ReshardSettings(
        sources=(own,), out=str(tmp_path / "out"), num_shards=3, form=form, through=through
    )
    plan = plan_reshard(settings, Quiet())
    path = Path(own) / require_manifest(own).shards[3].url
    path.write_bytes(path.read_bytes())  # the same bytes, but nobody can know that
    with pytest.raises(ShardError) as caught:
        reshard(plan, Quiet())
    assert caught.value.reason == "source_changed"
    assert load_manifest(str(tmp_path / "out")) is None


def test_a_finished_shard_is_not_copied_again_and_a_lost_one_is(dataset, tmp_path):
    settings = ReshardSettings(
        sources=(dataset,), out=str(tmp_path / "out"), num_shards=5, form="copy"
    )
    reshard(plan_reshard(settings, Quiet()), Quiet())
    want = tree(tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    lost = sorted((tmp_path / "out" / "train").glob("*.tar"))[2]
    lost.unlink()
    report = Quiet()
    done = reshard(plan_reshard(settings, report), report)
    assert done.copied_shards == 1
    assert report.notes[0] == "4 of 5 shards are finished"
    assert tree(tmp_path / "out") == want


def test_indexes_that_count_no_questions_are_joined_with_those_that_do(dataset, other, tmp_path):
    counts = ("num_branches", "num_turns")
    older = without_columns(other, tmp_path / "older", *counts)
    recut([dataset, older], tmp_path / "out", num_shards=1)
    recut([dataset, str(other)], tmp_path / "new", num_shards=1)
    (path,), (newer,) = ((tmp_path / name).glob("*/*.index.npy") for name in ("out", "new"))
    joined, whole = np.load(path), np.load(newer)
    assert [*joined.dtype.names, *counts] == list(whole.dtype.names)
    assert all(np.array_equal(joined[name], whole[name]) for name in joined.dtype.names)


def test_indexes_with_other_columns_cannot_be_joined(dataset, other, tmp_path):
    older = without_columns(other, tmp_path / "older", "loss_length")
    with pytest.raises(ConflictError) as caught:
        recut([dataset, older], tmp_path / "out", num_shards=1)
    assert caught.value.reason == "index_columns"


def without_columns(source, folder, *left_out):
    """Copies a dataset as a release that had fewer columns would have built it."""
    shutil.copytree(source, folder)
    document = json.loads((folder / "manifest.json").read_bytes())
    for entry in document["shardlist"]:
        path = folder / entry["url"].replace(".tar", ".index.npy")
        rows = np.load(path)
        names = [name for name in rows.dtype.names if name not in left_out]
        with path.open("wb") as stream:
            np.save(stream, numpy.lib.recfunctions.repack_fields(rows[names]))
        entry["index_bytes"], entry["index_sha256"] = path.stat().st_size, digest(path)
    (folder / "manifest.json").write_bytes(sealed(document))
    return str(folder)


def test_settings_are_values():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ReshardSettings(sources=(), out="").out = "x"


# --- requests that cannot be honoured, and what an interrupted one leaves


def options_of(*words):
    parser, _ = command_line()
    return reshard_settings(parser.parse_args([str(word) for word in words]))


@pytest.mark.parametrize(
    "verb, words, reason",
    [
        ("reshard", ("--shard-size", "0"), "reshard_settings"),
        ("reshard", ("--shards", "0"), "reshard_settings"),
        ("reshard", ("--jobs", "0"), "reshard_settings"),
        ("reshard", ("--sha256", "--through", "store"), "reshard_settings"),
        ("reshard", ("--seed", "3"), "unused_setting"),
        ("merge", ("--seed", "3", "--order", "keep"), "unused_setting"),
        ("reshard", ("--shards", "3", "--shard-size", "1MiB"), "unused_setting"),
        ("reshard", ("--shards", "3", "--nodes", "2"), "unused_setting"),
        ("reshard", ("--shards", "3", "--workers", "2"), "unused_setting"),
        ("reshard", ("--shard-size", "9" * 400), "size_text"),
        ("reshard", ("--nodes", "0"), "cluster"),
        ("filter", (), "reshard_settings"),
        ("filter", ("--keys", "/no/such/file"), "keys_file"),
        ("split", (), "reshard_settings"),
        ("split", ("--into", "a"), "split_shares"),
    ],
)
def test_requests_that_make_no_sense_are_refused(verb, words, reason, dataset, tmp_path):
    with pytest.raises(ConfigError) as caught:
        options_of(verb, dataset, tmp_path / "out", "--copy", *words)
    assert caught.value.reason == reason
    assert caught.value.fix


def test_list_of_keys_that_is_not_a_text_is_refused(dataset, tmp_path):
    keys = tmp_path / "keys.txt"
    keys.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError) as caught:
        options_of("filter", dataset, tmp_path / "out", "--keys", keys)
    assert (caught.value.reason, caught.value.where) == ("keys_file", str(keys))


def test_keys_are_whole_lines_and_those_that_no_sample_has_are_counted(dataset, tmp_path):
    keys = tmp_path / "keys.txt"
    keys.write_bytes(b"sample-0003\r\nsample 0004\nsample-0005\n\n")
    settings = options_of("filter", dataset, tmp_path / "out", "--keys", keys)
    assert settings.keys == {"sample-0003", "sample 0004", "sample-0005"}
    plan = plan_reshard(settings, Quiet())
    assert [len(split.numbers) for split in plan.splits] == [2]
    assert "1 of 3 keys without a sample" in plan_text(plan)


def test_a_copy_that_will_not_fit_is_refused_before_it_begins(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "free_bytes", lambda url: 1000)
    with pytest.raises(StorageError) as caught:
        recut(dataset, tmp_path / "out", num_shards=2)
    assert caught.value.reason == "no_space"
    assert caught.value.facts["free_bytes"] == 1000
    assert not list((tmp_path / "out").rglob("*.tar"))
    recut(dataset, tmp_path / "view", num_shards=2, form="view")


def interrupted(source, out, **options):
    """A copy that ends behind its second shard, as a kill would end it."""

    def run(tasks, **settings):
        yield from list(inline.run(tasks[:2], **settings))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job.local, "run", run)
        with pytest.raises(KeyboardInterrupt):
            recut(source, out, **options)


def test_gc_keeps_what_an_interrupted_copy_continues_from_and_removes_the_rest(dataset, tmp_path):
    out = tmp_path / "out"
    interrupted(dataset, out, num_shards=5)
    tars = sorted((out / "train").glob("*.tar"))
    assert len(tars) == 2
    half = out / "train" / tars[1].name.replace("00001", "00002")
    half.write_bytes(b"its receipt was not written")
    assert [each.name for each in find_strays(str(out)).objects] == [f"train/{half.name}"]
    # Another request gives the first one up.
    interrupted(dataset, out, num_shards=4)
    strays = {each.name for each in find_strays(str(out)).objects}
    assert {f"train/{tar.name}" for tar in [*tars, half]} <= strays
    remove_strays(str(out), find_strays(str(out)))
    report = Quiet()
    settings = ReshardSettings(sources=(dataset,), out=str(out), num_shards=4, form="copy")
    done = reshard(plan_reshard(settings, report), report)
    assert (done.copied_shards, report.notes[0]) == (2, "2 of 4 shards are finished")
    recut(dataset, tmp_path / "undisturbed", num_shards=4)
    assert tree(out) == tree(tmp_path / "undisturbed")


def test_the_unfinished_work_of_another_job_is_not_mixed_with_a_copy(dataset, tmp_path):
    plan = tmp_path / "out" / "plan" / "train" / "plan.json"
    plan.parent.mkdir(parents=True)
    plan.write_text(json.dumps({"build_key": "k", "num_shards": 3}))
    with pytest.raises(ConflictError) as caught:
        recut(dataset, tmp_path / "out", num_shards=3)
    assert caught.value.reason == "job_conflict"
    assert plan.exists()


@pytest.mark.parametrize("name", ["train.json", "held-out.json", "held-out/plan.json"])
@pytest.mark.parametrize("form", ["copy", "view"])
def test_an_output_that_another_job_has_begun_is_refused_whatever_its_split(
    name, form, dataset, tmp_path
):
    # `make shards` names itself first, and plans when it has fetched.
    begun = tmp_path / "out" / "plan" / name
    begun.parent.mkdir(parents=True)
    begun.write_text(json.dumps({"dataset": "pixmo_cap"}))
    with pytest.raises(ConflictError) as caught:
        recut(dataset, tmp_path / "out", num_shards=3, form=form)
    assert caught.value.reason == "job_conflict"
    assert caught.value.where == str(begun)
    assert list(tree(tmp_path / "out")) == [f"plan/{name}"]


def test_a_tokenizer_that_is_not_the_one_of_the_manifest_is_not_passed_on(own, tmp_path):
    path = Path(own) / "tokenizer" / "tokenizer.json"
    path.parent.mkdir()
    path.write_bytes(b"{}")
    with pytest.raises(ShardError) as caught:
        recut(own, tmp_path / "out", num_shards=2)
    assert caught.value.reason == "tokenizer_file"
    assert load_manifest(str(tmp_path / "out")) is None


def test_samples_of_two_sources_with_one_key_are_refused_in_any_two_splits(dataset, own, tmp_path):
    recut(own, tmp_path / "held-out", into={"held-out": 1.0}, num_shards=1)
    with pytest.raises(ConflictError) as caught:
        recut([dataset, str(tmp_path / "held-out")], tmp_path / "out")
    assert caught.value.reason == "key_collision"


def test_what_a_kill_after_the_commit_has_left_goes_with_the_next_run(dataset, tmp_path):
    out = tmp_path / "out"
    recut(dataset, out, num_shards=3)
    want = tree(out)
    for name in ("plan/train/plan.json", ".scratch/x/shard.tar"):
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text('{"kind": "reshard"}')
    assert not recut(dataset, out, num_shards=3).fresh
    assert tree(out) == want


@pytest.mark.parametrize("form", ["copy", "view"])
def test_notes_of_a_copy_that_was_abandoned_go_whatever_its_splits(form, dataset, tmp_path):
    out = tmp_path / "out"
    interrupted(dataset, out, num_shards=3, into={"a": 0.5, "b": 0.5})
    assert len(list(out.glob("plan/*/plan.json"))) == 2
    recut(dataset, out, num_shards=2, form=form)
    assert list(out.glob("plan/*")) == []
    remove_strays(str(out), find_strays(str(out)))
    recut(dataset, tmp_path / "undisturbed", num_shards=2, form=form)
    assert tree(out) == tree(tmp_path / "undisturbed")
    # Also where a run was killed behind its commit.
    (out / "plan" / "b").mkdir(parents=True)
    (out / "plan" / "b" / "plan.json").write_text('{"kind": "reshard"}')
    (out / "plan" / "c").mkdir()
    (out / "plan" / "c" / "plan.json").write_text('{"kind": "another"}')
    assert not recut(dataset, out, num_shards=2, form=form).fresh
    assert [path.name for path in out.glob("plan/*")] == ["c"]


@pytest.mark.parametrize("at", range(1, 4))
def test_a_copy_killed_between_commit_and_its_last_removal_is_tidied_by_the_next(
    dataset, tmp_path, monkeypatch, at
):
    out = tmp_path / "out"
    seen = []

    def ending(function):
        def remove(url):
            if (out / "manifest.json").exists():
                seen.append(url)
                if len(seen) == at:
                    raise KeyboardInterrupt
            function(url)

        return remove

    with monkeypatch.context() as patch:
        for name in ("delete", "delete_temporaries"):
            patch.setattr(storage, name, ending(getattr(storage, name)))
        with pytest.raises(KeyboardInterrupt):
            recut(dataset, out)
    # What other threads of a killed process leave.
    scratch = Path(scratch_of(str(out)))
    scratch.mkdir(parents=True, exist_ok=True)
    recut(dataset, out)
    assert not scratch.exists()
    assert not [p for p in out.rglob("*") if p.name.startswith(".") or p.name == "plan.json"]


# --- groups: samples that stay in one shard and one split

# As a job stores them: mixed within a shard, two samples of none. In this order: at most 4 shards.
GROUPS = [7, 8, 7, 8, 8, 5, 5, 0, 5, 5, 5, 4, 3, 4, 3, 4, 3, 2, 0, 2, 9, 2, 9]


@pytest.fixture(scope="module")
def grouped(samples, write_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grouped") / "source"
    return write_dataset(folder, samples, num_shards=4, groups=GROUPS)


def group_of(key):
    return GROUPS[int(key[-4:])] or key


def places(url):
    """Of each group the shards that it is in."""
    found = {}
    manifest = require_manifest(str(url))
    for split in manifest.splits:
        keys = [group_of(key) for key, _ in contents(url, split)]
        counts = [shard.nsamples for shard in manifest.select(split)]
        for key, shard in zip(keys, np.repeat(np.arange(len(counts)), counts), strict=True):
            found.setdefault(key, set()).add((split, int(shard)))
    return found


@settings(max_examples=examples(15))
@given(
    num_shards=st.none() | st.integers(1, 9),
    order=st.sampled_from(["shuffle", "length", "keep"]),
    seed=st.integers(0, 5),
    into=st.none() | st.just({"train": 0.5, "held-out": 0.5}),
    salt=st.text(max_size=2),
    where=st.sampled_from(["", "width > 22", "width % 2 == 0"]),
)
def test_a_group_is_in_one_shard_and_one_split_whatever_is_planned(
    num_shards, order, seed, into, salt, where, grouped
):
    wanted = {"num_shards": num_shards, "order": order, "seed": seed, "where": where}
    request = ReshardSettings(
        sources=(grouped,), out="nowhere", shard_bytes=4096, into=into, salt=salt, **wanted
    )
    plan = None
    with suppress(ConfigError):
        plan = plan_reshard(request, Quiet())
    if plan is None:
        with pytest.raises(ConfigError) as caught:
            plan_reshard(request, Quiet())
        # A split without samples, or a border that the kept order has not.
        reasons = {"empty_result", "group_shards"} if order == "keep" else {"empty_result"}
        assert caught.value.reason in reasons
        return
    found = {}
    for split in plan.splits:
        for shard in range(split.num_shards):
            for number in split.shard_numbers(shard).tolist():
                group = GROUPS[number] or f"sample {number}"
                found.setdefault(group, set()).add((split.split, shard))
        if order == "keep":
            assert split.numbers.tolist() == sorted(split.numbers.tolist())
    assert all(len(own) == 1 for own in found.values())


def test_groups_stay_together_when_a_result_is_cut_again(grouped, tmp_path):
    a, b, c = (str(tmp_path / name) for name in "abc")
    recut(grouped, a, form="view", order="shuffle", num_shards=7)
    recut(a, b, num_shards=3)
    with pytest.raises(ConfigError) as caught:
        recut(grouped, tmp_path / "e", num_shards=5)
    assert caught.value.reason == "group_shards"
    recut(b, c, form="view", into={"x": 0.5, "y": 0.5}, salt="c")
    keys = [key for split in "xy" for key, _ in contents(c, split)]
    columns = tmp_path / "c.jsonl"
    columns.write_text("".join(json.dumps({"key": key, "score": 1.0}) + "\n" for key in keys))
    settings = AnnotateSettings(src=c, columns=str(columns))
    annotate(plan_annotation(settings, Quiet()), Quiet())
    assert places(settings.out) == places(c)
    for url in (a, b, c):
        assert all(len(own) == 1 for own in places(url).values())


def test_a_group_in_two_splits_is_refused(grouped, tmp_path):
    for split, keys in {"train": "sample-0000", "held-out": "sample-0002"}.items():
        recut(grouped, tmp_path / split, into={split: 1.0}, keys=frozenset([keys]))
    with pytest.raises(ConflictError) as caught:
        recut([str(tmp_path / "train"), str(tmp_path / "held-out")], tmp_path / "out")
    assert caught.value.reason == "group_splits"


@pytest.mark.parametrize("windows", [True, False])
def test_a_source_that_does_not_name_its_groups_is_refused(
    windows, grouped, other, tmp_path, write_dataset, samples
):
    if windows:  # of an earlier release: known by its recipe
        url = write_dataset(tmp_path / "old", samples, num_shards=2)
        manifest = require_manifest(url)
        recipe = {**manifest.recipe, "window": {"chunk": 8}}
        changed = dataclasses.replace(manifest, recipe=recipe)
        (tmp_path / "old" / "manifest.json").write_bytes(changed.encode())
        recut(url, tmp_path / "one", num_shards=1)
        sources = [url]
    else:
        sources = [grouped, other]
    with pytest.raises(ConflictError) as caught:
        recut(sources, tmp_path / "out", num_shards=2)
    assert caught.value.reason == "index_groups"
