"""The examples of data: own dataset, own augmentation, mixture, and a store with a cache."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.programs import torchrun

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
KEY = re.compile(r"[0-9a-f]{24}")
STEP = re.compile(r"step (\d+) rank (\d+) (.*)")


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs an example in this process and gives what it prints."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", ["own_dataset", "own_augmentation", "mixture", "s3_cache"])
def test_an_example_is_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 60


@pytest.fixture(scope="module")
def clocks(tmp_path_factory, inline_cli):
    """Shards of the own dataset, by the command of the example."""
    out = tmp_path_factory.mktemp("own") / "clocks"
    flags = ("--limit", 6, "--workers", 1)
    inline_cli.good("shards", f"{EXAMPLES / 'own_dataset.py'}:Clocks", *flags, "--out", out)
    return out


def test_own_dataset_becomes_shards_and_a_batch(run, clocks):
    text = run("own_dataset", clocks)
    assert text.startswith("6 samples\n")
    assert re.search(r"^images +torch.uint8 +\[4, 1, 3, 336, 336\]$", text, re.MULTILINE)

    example = runpy.run_path(str(EXAMPLES / "own_dataset.py"))["Clocks"]().to_example((3, 30))
    assert example["messages"][1]["content"] == "3:30"
    dark = example["image"].max(axis=2) == 0
    assert dark[112 + 80, 112], "the minute hand points down"
    assert dark[112 + 10, 112 + 39], "the hour hand is between three and four"


def test_own_augmentation_moves_points_with_their_pictures(run, movable_dataset):
    text = run("own_augmentation", movable_dataset)
    blocks = re.findall(r"  stored: (.*)\n  epoch 0: (.*)\n  epoch 1: (.*)\n", text)
    assert len(blocks) == 6
    assert any(stored != first for stored, first, _ in blocks)
    for block in blocks:
        numbers, letters = set(), set()
        for answers in block:
            numbers.add(answers)
            letters.add(tuple(sorted(re.sub(r"[\d.]", "", answers).split())))
        assert len(letters) == 1, "nothing but numbers changes"
    assert any(len(set(block)) == 3 for block in blocks), "each epoch draws again"

    shift = runpy.run_path(str(EXAMPLES / "own_augmentation.py"))["Shift"](0.1)
    offsets = set()
    for seed in range(20):
        picture = np.zeros((60, 80, 3), np.uint8)
        picture[20, 30] = 255
        moved = shift(picture, np.random.RandomState(seed))
        points = shift.points([(30, 20)], np.random.RandomState(seed), width=80, height=60)
        assert np.argwhere(moved[..., 0] == 255).tolist() == points[:, ::-1].tolist()
        offsets.add(tuple(points[0]))
    assert len(offsets) > 10


@pytest.fixture
def mixed(tiny_dataset, clocks):
    """The arguments for a mixture of two datasets."""
    return (f"{tiny_dataset}=0.75", f"{clocks}=0.25")


def steps(text):
    """{step: the keys of its packs}, sorted: which rank has which pack depends on their number."""
    found = {}
    for step, _, keys in STEP.findall(text):
        found.setdefault(int(step), []).extend(KEY.findall(keys))
    return {step: sorted(keys) for step, keys in found.items()}


def test_mixture_resumes_in_its_packs(run, mixed, tmp_path):
    text = run("mixture", *mixed, "--checkpoint", tmp_path / "whole.pt", "--steps", 4)
    assert re.findall(r"^(\w+): \d+%", text, re.MULTILINE) == ["clocks", "pixmo_cap"]
    halves = ("mixture", *mixed, "--checkpoint", tmp_path / "halves.pt", "--steps")
    first, rest = (steps(run(*halves, count)) for count in (2, 4))
    assert (list(first), list(rest)) == ([1, 2], [3, 4])
    assert first | rest == steps(text)


@pytest.mark.slow
def test_mixture_resumes_on_two_processes(run, mixed, tmp_path):
    whole = steps(run("mixture", *mixed, "--checkpoint", tmp_path / "whole.pt"))
    checkpoint = ("--checkpoint", tmp_path / "halves.pt")
    run("mixture", *mixed, *checkpoint, "--steps", 4)
    rest = subprocess.run(
        [sys.executable, *torchrun(2), EXAMPLES / "mixture.py", *mixed, *checkpoint],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert rest.returncode == 0, rest.stderr
    assert steps(rest.stdout) == {step: whole[step] for step in range(5, 9)}


@pytest.mark.slow
def test_second_epoch_fetches_nothing_from_the_store(run, s3_server, tiny_dataset, tmp_path):
    url = s3_server.make_bucket() + "/set"
    s3_server.client().put(str(tiny_dataset), url, recursive=True)
    with s3_server.entered():
        text = run("s3_cache", url, tmp_path / "cache")
    first, second = re.findall(r"(\d+) rows in .* s, (\d+) requests, ([\d,]+) bytes", text)
    assert first[0] == second[0] == "24"
    stored = sum(path.stat().st_size for path in (tiny_dataset / "train").iterdir())
    assert 0 < int(first[2].replace(",", "")) <= stored
    assert second[1:] == ("0", "0")
