"""The same inputs give the same bytes: any number of workers, and killed wherever it may be."""

import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest

from preprocess.job.job import Job, JobSettings
from preprocess.job.planner import Plan, drop_plan, load_plan
from preprocess.media.image import ImagePolicy
from preprocess.recipe import Recipe
from shardspec.manifest import canonical_json, load_manifest
from shardspec.tiling import ImageView

ROWS = 192
SHARDS = 24


@pytest.fixture(scope="module")
def source(write_parquet, captioned_rows, tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("job") / "source", captioned_rows(ROWS))


def job(source, folder, *, workers=2):
    return (
        *("shards", "pixmo_cap", "--source", source, "--out", folder / "out"),
        *("--cache", source.parent / "cache", "--num-shards", SHARDS, "--workers", workers),
        *("--image-size", 112),
    )


def contents(folder):
    """Hashes what a dataset promises: its manifest, and every file that readers may open."""
    manifest = load_manifest(str(folder / "out"))
    urls = [url for shard in manifest.shards for url in (shard.url, shard.index_url)]
    files = ["manifest.json", "tokenizer/tokenizer.json", *urls]
    return {
        name: hashlib.sha256((folder / "out" / name).read_bytes()).hexdigest() for name in files
    }


def unexpected(folder):
    """Lists the files of a finished output that are neither promised nor kept for people."""
    manifest = load_manifest(str(folder / "out"))
    wanted = {"manifest.json", "run.json", "tokenizer/tokenizer.json"}
    for shard in manifest.shards:
        name = shard.url.rsplit("/")[-1].removesuffix(".tar")
        wanted |= {shard.url, shard.index_url, f"receipts/{name}.json"}
    for split in manifest.splits:
        wanted |= {f"plan/{split}{rest}" for rest in (".json", "-files.jsonl.gz", "-rows.json.gz")}
    found = {
        str(path.relative_to(folder / "out"))
        for path in (folder / "out").rglob("*")
        if path.is_file() or not any(path.iterdir())
    }
    return found - wanted


def num_receipts(folder):
    return len([*(folder / "out" / "receipts").glob("[!.]*.json")])


def held(cli, source, folder, when):
    """Starts a job, and stops it in a state."""
    undo = partial(shutil.rmtree, folder / "out")
    return cli.start_held(*job(source, folder), when=when, undo=undo)


def half_built(cli, source, folder):
    """Starts a job, and stops it when some of its shards are finished, and some not begun."""
    return held(cli, source, folder, lambda _: 3 <= num_receipts(folder) <= SHARDS // 2)


@pytest.fixture(scope="module")
def reference(session_cli, source, tmp_path_factory):
    """The folder of an undisturbed build by one worker; not to be changed."""
    folder = tmp_path_factory.mktemp("reference")
    session_cli.good(*job(source, folder, workers=1))
    assert len(contents(folder)) == 2 + 2 * SHARDS
    return folder


@pytest.fixture
def finished(reference, tmp_path):
    """A copy of the undisturbed build, to be damaged."""
    return shutil.copytree(reference, tmp_path / "copy")


@pytest.mark.slow
def test_killed_while_building_the_same_command_ends_in_the_same_bytes(
    cli, source, reference, tmp_path
):
    half_built(cli, source, tmp_path).kill_group()
    assert not (tmp_path / "out" / "manifest.json").exists()
    kept = {
        path: path.stat().st_ino
        for receipt in (tmp_path / "out" / "receipts").glob("[!.]*.json")
        for path in (tmp_path / "out" / "train").glob(receipt.stem + ".*")
    }
    again = cli.good(*job(source, tmp_path))
    assert f"of {SHARDS} shards are finished" in again.err
    assert len(kept) >= 6
    assert {path: path.stat().st_ino for path in kept} == kept, "finished shards were built again"
    assert contents(tmp_path) == contents(reference)
    assert unexpected(tmp_path) == set()


@pytest.mark.slow
def test_number_of_workers_leaves_no_trace(cli, source, reference, tmp_path):
    cli.good(*job(source, tmp_path, workers=3))
    assert contents(tmp_path) == contents(reference)
    assert unexpected(tmp_path) == unexpected(reference) == set()


@pytest.mark.slow
def test_killed_while_planning_the_same_command_ends_in_the_same_bytes(
    cli, source, reference, tmp_path
):
    spools, plan = tmp_path / "out" / ".scratch", tmp_path / "out" / "plan" / "train" / "plan.json"
    planning = partial(held, cli, source, tmp_path)
    planning(lambda _: any(spools.glob("*/spool.jsonl")) and not plan.exists()).kill_group()
    assert not plan.exists()
    cli.good(*job(source, tmp_path))
    assert contents(tmp_path) == contents(reference)
    assert unexpected(tmp_path) == set()


@pytest.mark.slow
def test_killed_worker_costs_its_shard_and_nothing_else(cli, source, reference, tmp_path):
    running = half_built(cli, source, tmp_path)
    os.kill(running.workers()[0], signal.SIGKILL)
    running.signal_group(signal.SIGCONT)
    ended = running.wait()
    assert ended.code == 0, ended.err
    assert "a worker died (exit code -9); its shard is built again" in ended.err
    assert contents(tmp_path) == contents(reference)
    assert unexpected(tmp_path) == set()


@pytest.mark.slow
def test_workers_killed_between_two_shards_cost_nothing(cli, source, reference, tmp_path):
    running = half_built(cli, source, tmp_path)
    for worker in _wait_for_idle_workers(running):
        os.kill(worker, signal.SIGKILL)
    os.kill(running.pid, signal.SIGCONT)
    ended = running.wait()
    assert ended.code == 0, ended.err
    assert contents(tmp_path) == contents(reference)


def _wait_for_idle_workers(running):
    """Waits until the workers of a job that is stopped have nothing to do but wait for it."""
    workers = running.workers()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, signal.SIGCONT)
    for worker in workers:
        looks = []

        def idle(worker=worker, looks=looks):
            # Asleep, and its processor time (fields 14 and 15 of proc(5)) has not grown for 0.3 s.
            fields = _fields(worker)
            looks.append((fields[0], *fields[11:13]))
            return len(looks) > 150 and set(looks[-150:]) == {("S", *fields[11:13])}

        assert running.wait_until(idle)
    return workers


@pytest.mark.slow
def test_orphans_of_a_killed_supervisor_end_and_do_no_harm(cli, source, reference, tmp_path):
    running = half_built(cli, source, tmp_path)
    orphans = running.workers()
    os.kill(running.pid, signal.SIGKILL)
    running.signal_group(signal.SIGCONT)
    running.wait()
    # At once, without waiting for the orphans.
    cli.good(*job(source, tmp_path))
    assert contents(tmp_path) == contents(reference)
    assert unexpected(tmp_path) == set()
    assert not any(map(_alive, orphans))
    assert running.err().count("Traceback") == 0, running.err()


@pytest.mark.slow
def test_orphans_that_wait_for_work_end_without_a_word(cli, source, tmp_path):
    running = half_built(cli, source, tmp_path)
    orphans = _wait_for_idle_workers(running)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert _end(orphans)
    assert running.err().count("Traceback") == 0, running.err()


def _end(pids, *, timeout_s=60):
    """Waits for processes that are nobody's children any more."""
    stop_s = time.monotonic() + timeout_s
    while any(map(_alive, pids)) and time.monotonic() < stop_s:
        time.sleep(0.01)
    return not any(map(_alive, pids))


def _alive(pid):
    return _fields(pid)[0] != "Z"


def _fields(pid):
    """Reads what /proc says of a process, from its state on; a state of Z where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ["Z"]


@pytest.mark.slow
def test_stray_files_are_ignored_and_unfinished_ones_swept(cli, source, reference, tmp_path):
    out = tmp_path / "out"
    stray = {
        "notes.txt": b"mine",
        "train/pixmo_cap-train-00099-of-00100.tar": b"no tar",
        "receipts/pixmo_cap-train-00001-of-00024.json": b"{no json",
        "receipts/pixmo_cap-train-00002-of-00024.json": b"[]",
        "plan/train/plan.json": b"\0\0\0",
        "plan/train.json": b"7",
    }
    left = {
        ".scratch/tmpabc/shard.tar": b"half",
        "train/.pixmo_cap-train-00003-of-00024.tar.tmp-" + "0" * 32: b"half",
        ".manifest.json.tmp-" + "a" * 32: b"{",
    }
    for name, payload in (stray | left).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(payload)
    cli.good(*job(source, tmp_path))
    assert contents(tmp_path) == contents(reference)
    assert unexpected(tmp_path) == {"notes.txt", "train/pixmo_cap-train-00099-of-00100.tar"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    (
        "truncated",
        pytest.param("deleted", marks=pytest.mark.slow),
        pytest.param("index deleted", marks=pytest.mark.slow),
    ),
)
def test_damaged_shard_is_noticed_and_the_same_command_repairs_it(
    cli, source, reference, finished, damage
):
    shard = load_manifest(str(finished / "out")).shards[5]
    path = finished / "out" / (shard.index_url if damage == "index deleted" else shard.url)
    if damage == "truncated":
        os.truncate(path, shard.num_bytes - 700)
    else:
        path.unlink()
    noticed = cli.run("verify", finished / "out")
    assert noticed.code == 4
    assert path.name in noticed.err
    assert noticed.err.count("error:") == 1

    repaired = cli.good(*job(source, finished))
    assert f"{SHARDS - 1} of {SHARDS} shards are finished" in repaired.err
    assert contents(finished) == contents(reference)
    assert unexpected(finished) == set()
    cli.good("verify", finished / "out", "--deep")


@pytest.mark.slow
def test_flipped_bit_is_noticed_and_its_advice_leads_back(cli, source, reference, finished):
    shard = load_manifest(str(finished / "out")).shards[7]
    path = finished / "out" / shard.url
    payload = bytearray(path.read_bytes())
    payload[len(payload) // 2] ^= 1
    path.write_bytes(payload)
    noticed = cli.run("verify", finished / "out")
    assert noticed.code == 4
    assert path.name in noticed.err
    # What the message advises: remove the shard and its receipt, and run the command again.
    path.unlink()
    (finished / "out" / "receipts" / f"{path.stem}.json").unlink()
    cli.good(*job(source, finished))
    assert contents(finished) == contents(reference)


@pytest.mark.slow
def test_killed_while_repairing_leaves_the_old_manifest_and_can_be_repeated(
    cli, source, reference, finished
):
    manifest = load_manifest(str(finished / "out"))
    for shard in manifest.shards[4:]:
        (finished / "out" / shard.url).unlink()
    train = finished / "out" / "train"
    running = cli.start(*job(source, finished))
    assert running.wait_until(lambda: len([*train.glob("[!.]*.tar")]) >= 6)
    running.kill_group()
    name = "manifest.json"
    assert (finished / "out" / name).read_bytes() == (reference / "out" / name).read_bytes()
    cli.good(*job(source, finished))
    assert contents(finished) == contents(reference)
    assert unexpected(finished) == set()


def test_interrupted_removal_of_a_plan_leaves_no_plan_without_rows(tmp_path, monkeypatch):
    recipe = Recipe(image=ImagePolicy(views=(ImageView(),)))
    out, cache = str(tmp_path / "out"), str(tmp_path / "cache")
    job = Job(
        JobSettings(dataset="pixmo_cap", out=out, source="sample", cache=cache, recipe=recipe)
    )
    folder = tmp_path / "out" / "plan" / "train"
    folder.mkdir(parents=True)
    plan = {"build_key": "k", "num_shards": 1, "num_samples": 1, "num_rows": 1}
    plan |= {"source": {}, "quarantined": {}}
    (folder / "plan.json").write_bytes(canonical_json(plan))
    (folder / "rows-00000.jsonl").write_bytes(b"{}\n")
    (tmp_path / "out" / "plan" / "train.json").write_bytes(canonical_json(job.identity))
    assert load_plan(job) == Plan(**plan)

    def killed(path, **_):
        (folder / "rows-00000.jsonl").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        drop_plan(job)
    assert load_plan(job) is None


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again_at_random_moments_it_ends_in_the_same_bytes(
    cli, source, reference, tmp_path, seed
):
    started_s = time.monotonic()
    cli.good(*job(source, tmp_path / "undisturbed"))
    duration_s = time.monotonic() - started_s
    rng = random.Random(seed)
    folder = tmp_path / "killed"
    moments = []
    for _ in range(12):
        running = cli.start(*job(source, folder))
        # From the imports to the commit; a run that goes on is over sooner.
        delay_s = rng.uniform(0.2, 0.95) * duration_s
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.process.wait(delay_s)
            if moments:
                break
            shutil.rmtree(folder / "out")  # too late for a first time: once more
            continue
        running.kill_group()
        moments.append((round(delay_s, 2), num_receipts(folder)))
        manifest = folder / "out" / "manifest.json"
        if manifest.exists():
            assert manifest.read_bytes() == (reference / "out" / "manifest.json").read_bytes()
    cli.good(*job(source, folder))
    assert moments
    assert contents(folder) == contents(reference), moments
    assert unexpected(folder) == set(), moments


@pytest.mark.slow
@pytest.mark.parametrize("receipts", (0, 1, 7, 15, SHARDS - 1))
def test_killed_at_any_point_of_the_build_it_ends_in_the_same_bytes(
    cli, source, reference, tmp_path, receipts
):
    running = cli.start(*job(source, tmp_path))
    plan = tmp_path / "out" / "plan" / "train" / "plan.json"
    running.wait_until(lambda: plan.exists() and num_receipts(tmp_path) >= receipts)
    running.kill_group()
    cli.good(*job(source, tmp_path))
    assert contents(tmp_path) == contents(reference)
    assert unexpected(tmp_path) == set()
