"""COMMIT and what it trusts: receipts of this very build, and the dataset's own tokenizer."""

import errno
import os
import shutil

import pytest

from preprocess.job import lease
from preprocess.job.build import BuildContext, build_shard, find_receipts, publish_shard
from preprocess.job.commit import commit
from preprocess.job.job import Job, JobSettings
from preprocess.job.pipeline import run_job
from preprocess.job.planner import load_plan, make_plan
from preprocess.job.stamps import StampWriter
from preprocess.job.verify import verify
from preprocess.recipe import Recipe
from preprocess.text import TextPolicy
from shardspec import storage
from shardspec.errors import ConflictError, StorageError
from shardspec.manifest import load_manifest
from tests.odd_disks import lack


class Silent:
    def stage(self, name, total):
        pass

    def step(self, reason):
        pass

    def sent(self, num_bytes):
        pass

    def note(self, text):
        pass


def settings(tmp_path, seed, split="train"):
    return JobSettings(
        dataset="text_sft",
        source="sample",
        split=split,
        limit=4,
        out=str(tmp_path / "out"),
        cache=str(tmp_path / "cache"),
        recipe=Recipe(text=TextPolicy(num_variants=1), seed=seed),
    )


def context_of(job):
    plan = make_plan(job, Silent())
    return BuildContext(
        preparer=job.preparer,
        dataset=job.settings.dataset,
        split=job.settings.split,
        out=job.settings.out,
        num_shards=plan.num_shards,
        build_key=plan.build_key,
        blobs=job.blobs.url,
        scratch=job.scratch,
    )


def make_shard(context):
    publish_shard(context, 0, build_shard(context, 0, lambda reason: None), lambda part: None)


@pytest.mark.usefixtures("in_this_process")
def test_a_receipt_does_not_outlive_the_bytes_of_its_shard(tmp_path, monkeypatch):
    first = context_of(Job(settings(tmp_path, seed=0)))
    make_shard(first)
    assert [*find_receipts(first)] == [0]

    second = context_of(Job(settings(tmp_path, seed=1)))

    def dies_before_the_receipt(url, payload, *, replacing):
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "compare_and_swap", dies_before_the_receipt)
    with pytest.raises(KeyboardInterrupt):
        make_shard(second)
    monkeypatch.undo()
    assert find_receipts(first) == find_receipts(second) == {}

    outcome = run_job(settings(tmp_path, seed=0), Silent())
    assert outcome.built_shards == 1
    assert verify(str(tmp_path / "out"), Silent()) == []


@pytest.mark.usefixtures("in_this_process")
def test_a_lost_tokenizer_is_noticed_and_put_back(tmp_path):
    made = run_job(settings(tmp_path, seed=0), Silent())
    out = tmp_path / "out"
    shutil.rmtree(out / "tokenizer")
    (found,) = verify(str(out), Silent())
    assert found.reason == "tokenizer_file"
    again = run_job(settings(tmp_path, seed=0), Silent())
    assert again.result.sha256 == made.result.sha256
    assert again.built_shards == 0
    assert verify(str(out), Silent()) == []


def built(tmp_path, split):
    """A job of which nothing is missing but the manifest: job, plan, receipts."""
    job = Job(settings(tmp_path, seed=0, split=split))
    context = context_of(job)
    make_shard(context)
    return job, load_plan(job), [*find_receipts(context).values()]


def test_two_commits_in_the_same_moment_both_end_in_the_manifest(tmp_path, monkeypatch):
    train, validation = built(tmp_path, "train"), built(tmp_path, "validation")
    swap, others = storage.compare_and_swap, [validation]

    def another_comes_first(url, payload, *, replacing):
        if url.endswith("manifest.json") and others:
            commit(*others.pop())
        return swap(url, payload, replacing=replacing)

    monkeypatch.setattr(storage, "compare_and_swap", another_comes_first)
    commit(*train)
    assert sorted(load_manifest(str(tmp_path / "out")).splits) == ["train", "validation"]
    assert verify(str(tmp_path / "out"), Silent()) == []


def test_a_manifest_that_others_write_all_the_time_is_abandoned(tmp_path, monkeypatch):
    train = built(tmp_path, "train")
    monkeypatch.setattr(storage, "compare_and_swap", lambda url, payload, *, replacing: False)
    with pytest.raises(ConflictError) as caught:
        commit(*train)
    assert caught.value.reason == "manifest_conflict"
    assert load_manifest(str(tmp_path / "out")) is None


@pytest.mark.parametrize("suffix", [".tar", ".index.npy"])
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: os.truncate(path, 1)])
def test_no_manifest_names_a_missing_or_short_shard(tmp_path, suffix, damage):
    train = built(tmp_path, "train")
    (path,) = (tmp_path / "out" / "train").glob(f"*{suffix}")
    damage(path)
    with pytest.raises(StorageError) as caught:
        commit(*train)
    assert caught.value.reason == "shards_missing"
    assert load_manifest(str(tmp_path / "out")) is None


def test_a_receipt_of_another_job_is_not_overwritten(tmp_path, monkeypatch):
    context = context_of(Job(settings(tmp_path, seed=0)))
    publish = storage.publish_file

    def another_comes_first(url, source, *, on_part):
        publish(url, source, on_part=on_part)
        storage.publish_bytes(storage.join(context.out, context.receipt_name(0)), b"another's")

    monkeypatch.setattr(storage, "publish_file", another_comes_first)
    with pytest.raises(StorageError) as caught:
        make_shard(context)
    assert caught.value.reason == "output_busy"
    assert find_receipts(context) == {}


def test_a_shard_that_cannot_be_published_leaves_no_scratch(tmp_path, monkeypatch):
    context = context_of(Job(settings(tmp_path, seed=0)))

    def refuse(url, source, *, on_part):
        raise StorageError("no", what="no")

    monkeypatch.setattr(storage, "publish_file", refuse)
    with pytest.raises(StorageError):
        make_shard(context)
    assert list((tmp_path / "out" / ".scratch").iterdir()) == []
    assert find_receipts(context) == {}


def interrupt_cleanup(monkeypatch, out, at):
    """Ends a run at its `at`-th removal after the commit; the list it returns is empty before."""
    seen, interrupted = [], []

    def wrapped(function):
        def remove(url):
            if (out / "manifest.json").exists():
                seen.append(url)
                if len(seen) == at:
                    interrupted.append(url)
                    raise KeyboardInterrupt
            function(url)

        return remove

    for name in ("delete", "delete_temporaries"):
        monkeypatch.setattr(storage, name, wrapped(getattr(storage, name)))
    return interrupted


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("at", range(1, 7))
def test_a_run_killed_between_commit_and_its_last_removal_is_tidied_by_the_next(
    tmp_path, monkeypatch, at
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupted = interrupt_cleanup(patch, out, at)
        if at < 6:
            with pytest.raises(KeyboardInterrupt):
                run_job(settings(tmp_path, seed=0), Silent())
        else:
            run_job(settings(tmp_path, seed=0), Silent())
        assert bool(interrupted) is (at < 6)  # five removals, and each of them is tried
    run_job(settings(tmp_path, seed=0), Silent())
    assert sorted(p.name for p in out.iterdir() if p.name != "run.json") == [
        "manifest.json",
        "plan",
        "receipts",
        "tokenizer",
        "train",
    ]
    assert [p.name for p in (out / "plan").iterdir()] == ["train.json"]


@pytest.mark.parametrize(
    ("kind", "reason"), [("mountpoint", "disk_unfit"), ("read_only", "permission")]
)
def test_a_disk_is_refused_before_the_rows_are_read(kind, reason, tmp_path, monkeypatch):
    lack(monkeypatch, kind)
    with pytest.raises(StorageError) as caught:
        run_job(settings(tmp_path, seed=0), Silent())
    assert caught.value.reason == reason
    assert [*tmp_path.rglob("*.json")] == []


@pytest.mark.usefixtures("in_this_process")
def test_a_disk_without_links_and_locks_gives_the_same_manifest(tmp_path, monkeypatch):
    made = []
    for folder in ("plain", "odd"):
        made.append(run_job(settings(tmp_path / folder, seed=0), Silent()).result.sha256)
        lack(monkeypatch, "gcsfuse")
        lack(monkeypatch, "lustre_without_locks")
    assert made[0] == made[1]
    assert [*tmp_path.rglob(".*")] == []


def test_a_disk_that_is_full_when_a_file_is_closed_is_named(tmp_path, monkeypatch):
    really_close = StampWriter.__exit__

    def close(self, *error):
        really_close(self, *error)
        raise OSError(errno.EDQUOT, "disk quota exceeded")

    monkeypatch.setattr(StampWriter, "__exit__", close)
    with pytest.raises(StorageError) as caught:
        make_plan(Job(settings(tmp_path, seed=0)), Silent())
    assert caught.value.reason == "no_space"


def test_unfinished_files_of_a_run_that_is_killed_at_its_very_end_are_removed(
    tmp_path, monkeypatch
):
    chosen = settings(tmp_path, seed=1)
    left = tmp_path / "out" / f".run.json.tmp-{0:032x}"

    def dies(*_):
        left.write_bytes(b"{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("preprocess.job.pipeline.write_run", dies)
        with pytest.raises(KeyboardInterrupt):
            run_job(chosen, Silent())
    assert left.exists()
    assert not run_job(chosen, Silent()).fresh
    assert not left.exists()
    assert not (tmp_path / "out" / "plan" / "train").exists()


def test_the_lease_of_a_run_that_is_killed_before_it_removes_it_is_removed(tmp_path, monkeypatch):
    chosen = settings(tmp_path, seed=1)
    left = tmp_path / "out" / lease.LEASE_NAME
    with monkeypatch.context() as patched:
        # A process number that is another process's by now.
        ended = {**lease._this_process(), "born": "0"}
        patched.setattr(lease, "_this_process", lambda: ended)
        patched.setattr(lease.Lease, "give_back", lease.Lease._stop_beating)
        run_job(chosen, Silent())
    assert left.exists()
    assert not run_job(chosen, Silent()).fresh
    assert not left.exists()
