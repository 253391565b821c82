"""What a job will cost, before anything runs."""

import pytest

from preprocess.cli.build import _dry_run_text
from preprocess.fetch import FetchPolicy, FetchResult, Ledger
from preprocess.job import dry_run
from preprocess.job.job import Job, JobSettings
from preprocess.recipe import Recipe
from preprocess.text import TextPolicy
from tests.inline import Quiet


@pytest.fixture
def settings(tmp_path, write_parquet):
    """24 URLs, 16 of them of one host, 2 of them dead and 6 downloaded."""
    rows = [
        {"image_url": f"http://{'ab'[i % 3 == 2]}.org/{i}.jpg", "caption": "c", "transcripts": []}
        for i in range(24)
    ]
    return JobSettings(
        dataset="pixmo_cap",
        source=str(write_parquet(tmp_path / "source", rows)),
        out=str(tmp_path / "out"),
        cache=str(tmp_path / "cache"),
        num_workers=4,
        fetch=FetchPolicy(host_rate=0.5),
        recipe=Recipe(text=TextPolicy(num_variants=1)),
    )


def test_downloads_and_the_time_that_they_take_at_least_are_told(settings, small_jpeg):
    found = dry_run(settings, Quiet())
    assert (found.num_rows, found.shards, found.build_core_s) == (24, None, None)
    wait = found.downloads
    assert (wait.num_urls, wait.num_hosts, wait.busiest_host) == (24, 2, "a.org")
    assert (wait.busiest_urls, wait.least_s, wait.num_bytes) == (16, 32.0, None)
    assert "32.0 s: 16 of a.org, 0.5 in a second" in _dry_run_text(settings, found)

    job = Job(settings)
    with Ledger(job.ledger_path()) as ledger, job.blobs.writing():
        for i in range(8):
            url = f"http://{'ab'[i % 3 == 2]}.org/{i}.jpg"
            dead = FetchResult(url=url, status="failed", reason="http_404")
            sha256 = job.blobs.put(small_jpeg(i))
            good = FetchResult(url=url, status="ok", sha256=sha256, num_bytes=100)
            ledger.append(dead if i < 2 else good)
    found = dry_run(settings, Quiet())
    assert (found.num_alive, found.downloads.num_urls, found.downloads.num_bytes) == (22, 16, 1600)
    assert (found.shards.num_shards, found.shards.rule) == (1, "smallest shard size of 4 MiB")
    assert found.build_core_s > 0
    lines = _dry_run_text(settings, found).splitlines()
    [build] = [line for line in lines if line.startswith("build")]
    assert build.endswith(" of 4")
    assert [line.split()[2] for line in lines if line.startswith("objects written")] == ["4,"]
