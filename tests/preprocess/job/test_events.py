"""Events of a job, failures and slow shards in the status of one, and a job that stands still."""

import json
import subprocess
from pathlib import Path

import pytest
from aiohttp import web

from preprocess.fetch import FetchPolicy
from preprocess.job import output_lock, read_status, retry_job, run_job, status_text
from preprocess.job.board import Board
from preprocess.job.events import EventLog
from preprocess.job.job import JobSettings
from preprocess.sizes import age_text
from shardspec.errors import BudgetError
from tests.inline import Quiet, jobs
from tests.preprocess.fetch.faulty_http import FaultyServer

ROOT = Path(__file__).parents[3]


def events(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def job(folder, **more):
    given = {
        "dataset": "text_sft",
        "source": "sample",
        "limit": 8,
        "num_shards": 2,
        "num_workers": 1,
        "cache": str(folder / "cache"),
        "out": str(folder / "out"),
        "events": str(folder / "logs" / "events.jsonl"),
    }
    return JobSettings(**given | more)


def test_a_job_tells_its_stages_its_shards_its_commit_and_its_end(tmp_path):
    with jobs():
        done = run_job(job(tmp_path), Quiet())
    found = events(tmp_path / "logs" / "events.jsonl")
    kinds = [each["event"] for each in found]
    assert (kinds[0], kinds[-2:]) == ("start", ["commit", "end"])
    assert [each["shard"] for each in found if each["event"] == "shard"] == [0, 1]
    assert [e["stage"] for e in found if e["event"] == "stage"][-1] == "build"
    assert found[-2]["manifest_sha256"] == done.result.sha256
    assert found[-1]["outcome"] == "done"
    assert all(each["time_unix_s"] > 0 for each in found)


def test_a_job_that_fails_says_why_and_a_later_one_adds_to_the_file(tmp_path, write_parquet):
    urls = [{"image_url": "http://10.0.0.1/a.png", "caption": "a word", "transcripts": []}]
    source = write_parquet(tmp_path / "rows", urls)
    settings = job(tmp_path, dataset="pixmo_cap", source=str(source), limit=None)
    for _ in range(2):
        with pytest.raises(BudgetError):
            run_job(settings, Quiet())
    found = events(tmp_path / "logs" / "events.jsonl")
    assert [e["outcome"] for e in found if e["event"] == "end"] == ["failed: nothing_left"] * 2
    failures = [e["reasons"] for e in found if e["event"] == "failures"]
    assert {"private_addr": 1} in failures


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


def test_a_stage_without_progress_is_told_once_until_something_happens(tmp_path):
    clock, report = Clock(), Quiet()
    log = tmp_path / "events.jsonl"
    board = Board(report, events=EventLog(str(log)), stall_s=60, clock=clock)
    board.stage("build", 10)
    board.shard(3, "progress")
    for now_s, num_notes in ((59, 0), (60, 1), (500, 1)):
        clock.now_s = now_s
        board.snapshot()
        assert len(report.notes) == num_notes
    assert report.notes == ["no progress in stage build for 60 s, in work: shards 3"]
    board.step("")
    clock.now_s += 60
    board.snapshot()
    assert len(report.notes) == 2
    board.waits("wait for the plan")
    clock.now_s += 600
    assert board.snapshot()["still"] == 600
    assert len(report.notes) == 2
    kinds = [e["event"] for e in events(log)]
    assert kinds == ["stage", "stall", "stall", "stage"]


def test_the_status_of_one_process_has_failures_slow_shards_and_stillness(tmp_path):
    clock, out = Clock(), str(tmp_path / "out")
    board = Board(Quiet(), clock=clock)
    board.stage("build", 100)
    for shard in range(4):
        board.shard(shard, "progress")
        board.step("image_decode" if shard else "")
        clock.now_s += shard
        board.shard(shard, "done")
    board.shard(9, "progress")
    board.shard(9, "lost")
    clock.now_s += 400
    (tmp_path / "out" / "plan").mkdir(parents=True)
    (tmp_path / "out" / "plan" / "train.json").write_text('{"dataset": "d"}')
    with output_lock(out, state=board.snapshot):
        lines = status_text(read_status(out), duration=age_text)
    assert "failed: image_decode 3" in lines
    assert "slowest shards: 3 (3.0 s), 2 (2.0 s), 1 (1.0 s)" in lines
    assert any("stage build" in line and "no progress for" in line for line in lines)


class Once(FaultyServer):
    """Serves a picture from the second request on."""

    async def _late(self, request):
        if self.requests[request.path_qs] == 1:
            return web.Response(status=503)
        return await self._ok(request)


def test_retry_builds_again_with_what_came_and_leaves_the_rest_alone(tmp_path, write_parquet):
    fetch = FetchPolicy(
        attempts=1, host_rate=0.0, allow_hosts=frozenset({"127.0.0.1"}), robots_txt="ignore"
    )
    with jobs(), Once() as server:
        paths = ["/ok/a.png", "/ok/b.png", "/late/c.png", "/status/404"]
        rows = [
            {"image_url": server.url(path), "caption": f"picture {path}", "transcripts": []}
            for path in paths
        ]
        source = write_parquet(tmp_path / "rows", rows)
        settings = job(
            tmp_path, dataset="pixmo_cap", source=str(source), limit=None, fetch=fetch, num_shards=1
        )
        assert run_job(settings, Quiet()).result.split.num_samples == 2
        first = retry_job(settings, Quiet())
        assert (first.failed, first.recovered) == (2, 1)
        assert first.outcome.result.split.num_samples == 3
        assert first.outcome.result.split.quarantined == {"http_404": 1}
        second = retry_job(settings, Quiet())
        assert (second.failed, second.recovered, second.outcome) == (1, 0, None)
        assert set(server.requests.values()) == {1, 2}
        assert server.requests["/status/404"] == 1
        assert not run_job(settings, Quiet()).fresh


def test_make_names_the_exit_code_of_a_verb(tmp_path):
    folder = tmp_path / "venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "python").write_text("#!/bin/sh\nexit 3\n")
    (folder / "python").chmod(0o755)
    (tmp_path / "venv" / "ready").touch()
    command = ["make", "shards", "DATASET=x", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.rstrip().endswith("Error 3")
