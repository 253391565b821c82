"""Images that nobody should decode become quarantined rows of a finished job."""

import json
from pathlib import Path

import pytest

from preprocess.job import JobSettings, run_job
from preprocess.recipe import Recipe
from preprocess.text import TextPolicy
from shardspec.errors import ConfigError
from shardspec.manifest import load_manifest
from tests.inline import Quiet
from tests.preprocess.media.odd_images import odd_images

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture
def settings(write_parquet, captioned_rows, tmp_path):
    def make(payloads=(), **more):
        rows = captioned_rows(20 + len(payloads))
        for row, payload in zip(rows, payloads, strict=False):
            row["image"] = {"bytes": payload, "path": None}
        return JobSettings(
            dataset="pixmo_cap",
            source=str(write_parquet(tmp_path / "source", rows)),
            out=str(tmp_path / "out"),
            cache=str(tmp_path / "cache"),
            recipe=Recipe(text=TextPolicy(num_variants=1)),
            **more,
        )

    return make


def test_bombs_are_quarantined_by_name(settings):
    bombs = [odd.payload for odd in odd_images().values() if odd.refused == "image_bomb"]
    job = settings(bombs, max_bad_samples=1.0)
    run_job(job, Quiet())
    split = load_manifest(job.out).splits["train"]
    num_bombs = split.quarantined["image_bomb"]
    assert dict(split.quarantined) == {"image_bomb": num_bombs}
    assert num_bombs >= len(bombs) // 2  # some bombs are drawn for the validation split
    assert split.num_samples == 20
    listed = [
        json.loads(line)
        for path in Path(job.out, "quarantine").glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert len(listed) == num_bombs
    for line in listed:
        assert line["reason"] == "image_bomb"
        assert line["key"]
        assert "image" in line["message"] or "JPEG" in line["message"]


def test_the_result_does_not_depend_on_the_memory_budget(settings, tmp_path):
    shas = set()
    for megabytes in (400, 4000):
        job = settings(image_memory=megabytes * 2**20, num_workers=4)
        shas.add(run_job(job, Quiet()).result.sha256)
        Path(job.out).rename(tmp_path / f"out-{megabytes}")
    assert len(shas) == 1


def test_budget_below_the_memory_of_one_image_is_refused(settings):
    with pytest.raises(ConfigError) as caught:
        run_job(settings(image_memory=2**20), Quiet())
    assert caught.value.reason == "memory_budget"
