"""Accelerate, Trainer and Lightning on two real ranks: each sample once, or a refusal."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import torchrun

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "e2e" / "launched.py"
NUM = 39
BATCH = 4
ONCE = ("late_loader", "late_dataset", "accelerate_alone", "accelerate_recipe")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def url(tiny_sample, write_dataset, tmp_path_factory):
    samples = [tiny_sample(i, num_images=i % 2) for i in range(NUM)]
    folder = tmp_path_factory.mktemp("launchers") / "set"
    return write_dataset(folder, samples, num_shards=3, several=True)


def start(command, out, url, *scenarios):
    out.mkdir()
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")
    around = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, *command, str(PROGRAM), str(out), url, *scenarios],
        cwd=out,
        env={**around, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}


@pytest.fixture(scope="module")
def alone(url, tmp_path_factory):
    """What one process sees: the global batches of 16 steps; and processes that it spawns."""
    return start([], tmp_path_factory.mktemp("alone") / "out", url, "alone", "spawned")


@pytest.fixture(scope="module")
def run(alone):
    return alone["alone.0"]["seen"]


def joined(found, name):
    """Gives the global batches of a scenario, of the batches that two ranks have seen."""
    ranks = [found[f"{name}.{rank}"]["seen"] for rank in range(2)]
    return [sum(parts, []) for parts in zip(*ranks, strict=True)]


def test_every_trainer_on_two_ranks_sees_each_sample_once_or_refuses(url, run, tmp_path):
    scenarios = ("late_group", "accelerate_plain", "accelerate_alone")
    scenarios += ("accelerate_recipe", "trainer_plain", "trainer_adapter")
    found = start(torchrun(2), tmp_path / "out", url, *scenarios)
    epoch = run[: NUM // BATCH + 1]
    assert len(set(sum(epoch, [])[:NUM])) == NUM
    for name in ONCE:
        assert joined(found, name) == epoch, name
    assert joined(found, "trainer_adapter") == run
    twice = [name for name in found if name.startswith(("accelerate_plain", "trainer_plain"))]
    assert len(twice) == 2 * (4 + 1)
    for name in twice:
        assert "divided between the ranks twice" in found[name]["refused"]
        assert "seen" not in found[name]
    for rank in range(2):
        assert "another size" in found[f"other_batch.{rank}"]["refused"]


def test_lightning_that_starts_its_ranks_itself_sees_each_sample_once_and_resumes(
    url, run, tmp_path
):
    found = start([], tmp_path / "out", url, "lightning")
    assert joined(found, "lightning") == run


def test_a_loader_that_the_parent_of_all_ranks_made_gives_each_its_share(alone, run):
    assert joined(alone, "spawned") == run[: NUM // BATCH + 1]


def test_a_sharded_model_steps_where_only_some_ranks_have_pictures(
    tiny_sample, write_dataset, tmp_path
):
    samples = [tiny_sample(i, num_images=i % 5 < 2) for i in range(NUM)]
    url = write_dataset(tmp_path / "set", samples, num_shards=3, several=True)
    found = start(torchrun(2), tmp_path / "out", url, "fsdp")
    lone = {}
    for name in ("least", "fixed", "shared"):
        one, other = (found[f"fsdp_{name}.{rank}"] for rank in range(2))
        assert len(one["losses"]) == NUM // BATCH + 1
        assert one["weights"] == other["weights"]
        lone[name] = sum(a != b for a, b in zip(one["real"], other["real"], strict=True))
    # Steps in which a rank alone would have run the encoder; fewer where pictures are shared.
    assert lone["least"] == lone["fixed"] > lone["shared"]
