"""COMMIT and what it trusts: receipts of this very build, and the dataset's own tokenizer."""

import shutil

import pytest

from preprocess.build import BuildContext, build_shard, find_receipts, publish_shard
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

    def sent(self, num_bytes):
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
        scratch=job.scratch,
    )


def make_shard(context):
    publish_shard(context, 0, build_shard(context, 0, lambda reason: None), lambda part: None)


def test_a_receipt_does_not_outlive_the_bytes_of_its_shard(tmp_path, monkeypatch):
    first = context_of(Job(settings(tmp_path, seed=0)))
    make_shard(first)
    assert [*find_receipts(first)] == [0]

    second = context_of(Job(settings(tmp_path, seed=1)))

    def dies_before_the_receipt(url, payload, *, replacing):
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "swap_bytes", dies_before_the_receipt)
    with pytest.raises(KeyboardInterrupt):
        make_shard(second)
    monkeypatch.undo()
    assert find_receipts(first) == find_receipts(second) == {}

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
