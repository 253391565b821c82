"""Progress: a bar on a terminal, lines in a log."""

import io
import re
import sys
from pathlib import Path

import pytest

from preprocess import __main__ as program
from preprocess.__main__ import TerminalConsole
from preprocess.job import JobSettings, dry_run, run_job, verify
from shardspec.features import FEATURES

ROOT = Path(__file__).parents[3]


class Screen(io.StringIO):
    """Standard error that says whether it is a terminal."""

    def __init__(self, terminal):
        super().__init__()
        self._terminal = terminal

    def isatty(self):
        return self._terminal


def progress(monkeypatch, terminal, *, rows=256):
    screen = Screen(terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    console = TerminalConsole()
    console.stage("plan", rows)
    for i in range(rows):
        console.step("image_missing" if i % 10 == 0 else "")
    console.note("a note")
    console.stage("build", rows)
    for _ in range(rows):
        console.sent(1000)
        console.step("")
    console.close()
    return screen.getvalue()


def test_log_has_lines_and_no_carriage_returns(monkeypatch):
    lines = progress(monkeypatch, terminal=False).splitlines()
    assert "\r" not in "".join(lines)
    assert len(lines) == 5
    assert lines[0].startswith("plan:   0% 0/256")
    assert lines.index("a note") in (1, 2)
    assert "failed: image_missing=26" in "".join(lines[1:3])
    assert lines[-1].startswith("build: 100% 256/256")


def test_log_has_a_line_each_interval(monkeypatch):
    monkeypatch.setattr(program, "LOG_INTERVAL_S", 0.0)
    text = progress(monkeypatch, terminal=False, rows=20)
    assert "\r" not in text
    assert text.count("plan: ") > 5


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(
    ("stage", "unit"), [("build", "row"), ("fetch", "URL"), ("copy", "shard"), ("verify", "file")]
)
def test_a_rate_names_what_a_stage_counts(monkeypatch, terminal, stage, unit):
    monkeypatch.setattr(sys, "stderr", Screen(terminal))
    console = TerminalConsole()
    console.stage(stage, 3)
    console.close()
    assert f"{unit}/s" in sys.stderr.getvalue()


def test_each_stage_with_a_unit_exists():
    sources = "".join(path.read_text() for path in ROOT.glob("[pv]*/**/*.py"))
    begun = {*re.findall(r"\.stage\(\s*\"([a-z ]+)\"", sources), FEATURES}
    assert program._UNITS.keys() <= begun


def test_terminal_has_a_bar(monkeypatch):
    assert "\r" in progress(monkeypatch, terminal=True)


@pytest.mark.parametrize(
    "place, reason",
    [
        (("--source", "https://huggingface.co/datasets/x/y"), "a web server does not list"),
        (("--source", "sample", "--out", "memory://x"), "memory of one process"),
    ],
)
def test_sources_and_outputs_that_cannot_be_are_told_in_clear_words(
    capsys, tmp_path, place, reason
):
    code = program.main(
        ["shards", "text_sft", *place, "--cache", str(tmp_path / "cache"), "--workers", "1"]
    )
    assert code == 1
    told = capsys.readouterr().err
    assert reason in told
    assert "  fix:   " in told


class Stages:
    """Counts the steps of each stage."""

    def __init__(self):
        self.found = []

    def stage(self, name, total):
        self.found.append([name, total, 0])

    def step(self, reason):  # noqa: ARG002
        self.found[-1][2] += 1

    sent = note = lambda *_: None


def test_every_stage_takes_as_many_steps_as_it_says(tmp_path):
    """A bar that stands at 99 % says that a job hangs."""
    stages = Stages()
    settings = JobSettings(
        dataset="text_sft",
        source="sample",
        limit=12,
        out=str(tmp_path / "out"),
        cache=str(tmp_path / "cache"),
    )
    dry_run(settings, stages)
    run_job(settings, stages)
    verify(settings.out, stages)
    assert [steps for _, _, steps in stages.found] == [total for _, total, _ in stages.found]
    names = [name for name, _, _ in stages.found]
    assert names == ["rows", "probe", "rows", "plan", "probe", "write plan", "build", "verify"]
