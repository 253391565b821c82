"""Every program of examples/ and benchmarks/ says how it is called, whatever it is called with."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = {"model.py", "workloads.py"}  # which programs import
PROGRAMS = [
    *(file for folder in ("examples", "benchmarks") for file in (ROOT / folder).glob("*.py"))
]
PROGRAMS = sorted(file.relative_to(ROOT) for file in PROGRAMS if file.name not in MODULES)
# Importing these trainers takes seconds.
SLOW = {"dataset_and_collator.py", "hf_trainer.py", "plain_loop.py"}
SLOW |= {"accelerate_loop.py", "lightning_fit.py", "parallel.py"}
WANTING = ["s3_cache.py shards", "mixture.py shards", "train.py shards --steps many"]


@pytest.fixture
def start(monkeypatch, capsys):
    """A function that runs a program here; gives its exit status, and what it printed."""

    def start(program, *arguments):
        monkeypatch.setattr(sys, "argv", [str(program), *arguments])
        monkeypatch.setattr(sys, "path", [str(ROOT / program.parent), *sys.path])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / program), run_name="__main__")
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return start


@pytest.mark.parametrize(
    "program",
    [pytest.param(it, marks=[pytest.mark.slow] * (it.name in SLOW)) for it in PROGRAMS],
    ids=str,
)
def test_programs_tell_their_usage(start, program):
    status, out, err = start(program, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: {program.name} ")
    status, out, err = start(program, "--no-such-flag")
    assert (status, out) == (2, "")
    assert err.startswith(f"usage: {program.name} ")


@pytest.mark.parametrize("line", WANTING)
def test_programs_refuse_arguments_that_do_not_fit(start, line):
    name, *arguments = line.split()
    status, out, err = start(Path("examples") / name, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"usage: {name} ")
