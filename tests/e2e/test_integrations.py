"""The examples for training libraries: killed in mid-run, each resumes with the exact batches."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import KILLING

ROOT = Path(__file__).parents[2]
STEP = re.compile(r"step (\d+) rank (\d+) ([0-9a-f ]+)")
STEPS, SAVED = 8, 4

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def launched(ranks):
    # Workers of torchrun outlive a launcher that was killed, so a run to be killed has none.
    if ranks == 1:
        return ()
    return (*("-m", "torch.distributed.run", "--standalone"), f"--nproc_per_node={ranks}")


# What starts each example on some ranks, and the argument that says where it saves.
EXAMPLES = {
    "lightning_fit": lambda ranks: ((), ("--devices", ranks), "--out"),
    "accelerate_loop": lambda ranks: (launched(ranks), (), "--out"),
    "stateful_loader": lambda ranks: ((), (), "--checkpoint"),
    "ray_train": lambda ranks: ((), ("--workers", ranks), "--out"),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory, inline_cli):
    """Eighteen generated samples: an epoch ends inside the fifth batch of four."""
    out = tmp_path_factory.mktemp("shards") / "pixmo_cap"
    flags = ("--source", "sample", "--limit", 18, "--image-size", 112, "--workers", 1)
    inline_cli.good("shards", "pixmo_cap", *flags, "--out", out)
    return out


def run(name, shards, saved, *, ranks=1, kill_at=None):
    """Runs an example, to a step if it is to be killed; gives {step: its keys, rank by rank}."""
    before, after, flag = EXAMPLES[name](ranks)
    if kill_at and name != "ray_train":  # whose workers are other processes
        before = ("-c", KILLING, f"step {kill_at} ")
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")
    env = {key: value for key, value in os.environ.items() if key not in names}
    paths = os.pathsep.join((str(ROOT), str(ROOT / "examples")))
    env |= {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    env |= {"RAY_DEDUP_LOGS": "0", "RAY_TRAIN_V2_ENABLED": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    with (saved.parent / f"{saved.name}.err").open("ab") as errors:
        program = subprocess.Popen(
            [
                *(sys.executable, *before, str(ROOT / "examples" / f"{name}.py"), str(shards)),
                *(str(value) for value in (*after, flag, saved, "--steps", STEPS)),
            ],
            env=env,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            cwd=saved.parent,
        )
        seen = {}
        try:
            for line in program.stdout:
                for step, rank, keys in STEP.findall(line):
                    seen.setdefault(int(step), {})[int(rank)] = keys.split()
                if name == "ray_train" and kill_at in seen:
                    break
            else:
                want = -signal.SIGKILL if kill_at else 0
                assert program.wait() == want, Path(errors.name).read_text()[-4000:]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
            program.stdout.close()
            program.wait()
    return {
        step: [key for rank in sorted(keys) for key in keys[rank]] for step, keys in seen.items()
    }


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_that_was_killed_resumes_with_the_exact_batches(name, shards, tmp_path):
    if name == "ray_train":
        pytest.importorskip("ray")
    whole = run(name, shards, tmp_path / "whole")
    assert sorted(whole) == list(range(1, STEPS + 1))
    # The checkpoint of step 4 is complete when step 5 begins; the process may be killed later.
    killed = run(name, shards, tmp_path / "killed", kill_at=SAVED + 1)
    assert all(whole[step] == keys for step, keys in killed.items())
    ranks = 1 if name == "stateful_loader" else 2
    resumed = run(name, shards, tmp_path / "killed", ranks=ranks)
    assert min(resumed) > SAVED
    assert resumed == {step: whole[step] for step in range(min(resumed), STEPS + 1)}


@pytest.mark.parametrize("name", [*EXAMPLES, "hf_trainer"])
def test_an_example_is_short(name):
    assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) <= 60
