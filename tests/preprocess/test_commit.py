"""COMMIT and what it trusts: receipts of this very build, and the dataset's own tokenizer."""

import contextlib
import shutil

from preprocess.build import BuildContext, build_shard, find_receipt
from preprocess.formatter import TextPolicy
from preprocess.job import Job, JobSettings
from preprocess.pipeline import run_job
from preprocess.planner import make_plan
from preprocess.recipe import Recipe
from preprocess.verify import verify
from shardspec import storage


class Silent:
    def stage(self, name, total):
        pass

    def step(self, reason):
        pass

    def note(self, text):
        pass


def settings(tmp_path, seed):
    return JobSettings(
        dataset="text_sft",
        source="sample",
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
        blobs=str(job.blobs.root),
    )


def test_a_receipt_does_not_outlive_the_bytes_of_its_shard(tmp_path, monkeypatch):
    first = context_of(Job(settings(tmp_path, seed=0)))
    build_shard(first, 0, lambda reason: None)
    assert find_receipt(first, 0) is not None

    second = context_of(Job(settings(tmp_path, seed=1)))
    publish = storage.publish_bytes

    def dies_before_the_receipt(url, payload):
        if "receipts" in url:
            raise KeyboardInterrupt
        publish(url, payload)

    monkeypatch.setattr(storage, "publish_bytes", dies_before_the_receipt)
    with contextlib.suppress(KeyboardInterrupt):
        build_shard(second, 0, lambda reason: None)
    monkeypatch.undo()
    assert find_receipt(first, 0) is None

    outcome = run_job(settings(tmp_path, seed=0), Silent())
    assert outcome.built_shards == 1
    assert verify(str(tmp_path / "out"), Silent()) == []


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
