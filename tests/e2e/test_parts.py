"""Jobs in parts as real processes: killed at random, started at random times, started twice."""

import contextlib
import hashlib
import os
import random
import signal
import time
from collections import Counter

import pytest

pytestmark = pytest.mark.slow
"""Everyday siblings are in tests/preprocess/job/test_parts.py, in one process."""

KILLS = 5


def job(folder, out, *more):
    return (
        *("shards", "pixmo_cap", "--source", "sample", "--limit", 36, "--num-shards", 12),
        *("--workers", 1, "--image-size", 112, "--out", out, "--cache", folder / "cache", *more),
        *(("--own-disk", "allow") if more else ()),
    )


@pytest.fixture(scope="module")
def undisturbed(inline_cli, tmp_path_factory):
    """The sha256 of the manifest of one run on one machine."""
    folder = tmp_path_factory.mktemp("undisturbed")
    inline_cli.good(*job(folder, folder / "out"))
    return hashlib.sha256((folder / "out" / "manifest.json").read_bytes()).hexdigest()


@pytest.fixture(params=["local", "s3"])
def out(request, cli, tmp_path):
    if request.param == "local":
        return tmp_path / "out"
    server = request.getfixturevalue("s3_server")
    cli.env.update(server.env)
    return server.make_bucket() + "/out"


def kill(running, how):
    """Kills a part as a power cut would, its driver alone, or one of its workers."""
    workers = running.workers()
    if how == "worker" and workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(workers[0], signal.SIGKILL)
    elif how == "driver":
        running.process.kill()
        running.process.wait(30)
    else:
        running.close()


def test_parts_killed_at_random_end_in_the_bytes_of_one_run(cli, out, undisturbed, tmp_path):
    rng = random.Random(str(out).partition(":")[0] == "s3")
    running, how_often = {}, Counter()
    for i in range(KILLS):
        for part in ("0/3", "2/3"):  # 1/3 is never started
            if part not in running or running[part].process.poll() not in (None, 0):
                running[part] = cli.start(*job(tmp_path, out, "--part", part))
        victim = running[rng.choice(["0/3", "2/3"])]
        if i % 3:
            victim.wait_until(lambda victim=victim: "build:" in victim.err())
        stop_s = time.monotonic() + rng.uniform(0, 0.6)
        victim.wait_until(lambda stop_s=stop_s: time.monotonic() > stop_s)
        how = ("driver", "worker", "part")[i % 3]
        how_often[how] += victim.process.poll() is None
        kill(victim, how)
    for part in ("0/3", "2/3"):
        if running[part].process.poll() not in (None, 0):
            running[part] = cli.start(*job(tmp_path, out, "--part", part))
    ended = {part: each.wait() for part, each in running.items()}
    assert {part: each.code for part, each in ended.items()} == {"0/3": 0, "2/3": 0}, ended
    assert not any("Traceback" in each.err for each in ended.values()), ended

    status = cli.run("status", out)
    assert status.code == 6, status.out
    assert "1/3   not started" in status.out
    assert "to be started, on any machine: PART=1/3" in status.out

    first = cli.start(*job(tmp_path, out, "--part", "1/3"))
    assert first.wait_until(lambda: "build:" in first.err())
    first.signal_group(signal.SIGSTOP)  # or it might end before the other has begun
    second = cli.run(*job(tmp_path, out, "--part", "1/3"))
    assert second.code == 1, second.err
    assert "another process has PART=1/3" in second.err
    first.signal_group(signal.SIGCONT)
    assert undisturbed in first.wait().out
    cli.good("verify", out)
    assert "removed 0 objects (0 B), aborted 0 unfinished uploads" in cli.good("gc", out).out
    print(dict(how_often))


def test_four_parts_started_at_random_times_of_which_one_never(cli, undisturbed, tmp_path):
    rng, out, running = random.Random(4), tmp_path / "out", []
    for part in ("3/4", "0/4", "1/4"):
        running.append(cli.start(*job(tmp_path, out, "--part", part)))
        stop_s = time.monotonic() + rng.uniform(0, 1)
        running[-1].wait_until(lambda stop_s=stop_s: time.monotonic() > stop_s)
    assert [each.wait().code for each in running] == [0, 0, 0]
    status = cli.run("status", out)
    assert (status.code, "9 of 12 shards" in status.out) == (6, True)
    assert "to be started, on any machine: PART=2/4\n" in status.out
    assert undisturbed in cli.good(*job(tmp_path, out, "--part", "2/4")).out
