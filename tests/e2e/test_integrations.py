"""The examples for training libraries: killed in mid-run, each resumes with the exact batches."""

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loader import StreamingDataset, make_dataloader
from tests.programs import KILLING, KILLING_RAY, LEAVING, torchrun

ROOT = Path(__file__).parents[2]
STEP = re.compile(r"step (\d+) rank (\d+) ([0-9a-f ]+)(?:loss (\S+))?")
STEPS, SAVED = 8, 4

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# What says where each example saves, and the arguments that give it some ranks.
EXAMPLES = {
    "ddp": ("--out", lambda ranks: ()),
    "lightning_fit": ("--out", lambda ranks: ("--devices", ranks)),
    "accelerate_loop": ("--out", lambda ranks: ()),
    "stateful_loader": ("--checkpoint", lambda ranks: ()),
    "ray_train": ("--out", lambda ranks: ("--workers", ranks)),
    "parallel": ("--out", lambda ranks: ()),
}
# A controller of Ray Train looks at its workers every two seconds, and waits a minute for them.
RAY = {
    "RAY_DEDUP_LOGS": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "240",
    "RAY_USAGE_STATS_ENABLED": "0",
}
LAUNCHED = ("ddp", "accelerate_loop", "parallel")


@pytest.fixture(scope="module")
def shards(tmp_path_factory, inline_cli):
    """Eighteen generated samples: an epoch ends inside the fifth batch of four."""
    out = tmp_path_factory.mktemp("shards") / "pixmo_cap"
    flags = ("--source", "sample", "--limit", 18, "--image-size", 112, "--workers", 1)
    inline_cli.good("shards", "pixmo_cap", *flags, "--out", out)
    return out


def run(name, shards, saved, *flags, ranks=1, kill_at=None, killing=None):
    """Runs an example, to a step if it is to be killed; gives {step: {rank: (keys, loss)}}."""
    flag, counted = EXAMPLES[name]
    program = [str(ROOT / "examples" / f"{name}.py"), str(shards)]
    if kill_at:
        text, script = [f"step {kill_at} "], KILLING
        if killing:
            text, script = [], killing
        if name == "ray_train":  # whose worker is another process; it saves in each second step
            text, script = [*text, saved / "run", (kill_at - 1) // 2], KILLING_RAY
        program = [f"{saved}-killing.py", *text, *program]
        Path(program[0]).write_text(script)
    elif name == "parallel":
        program = [f"{saved}-leaving.py", *program]
        Path(program[0]).write_text(LEAVING)
    if name in LAUNCHED:
        program = [*torchrun(ranks), *program]
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")
    env = {key: value for key, value in os.environ.items() if key not in names}
    paths = os.pathsep.join((str(ROOT), str(ROOT / "examples")))
    env |= {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    env |= RAY
    command = [*program, *counted(ranks), *flags, flag, saved, "--steps", STEPS]
    with (saved.parent / f"{saved.name}.err").open("ab") as errors:
        program = subprocess.Popen(
            [sys.executable, *map(str, command)],
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
                for step, rank, keys, loss in STEP.findall(line):
                    seen.setdefault(int(step), {})[int(rank)] = keys.split(), float(loss or 0)
            ended, of_rank = program.wait(), -signal.SIGKILL
            # torchrun ends the other ranks, and fails.
            want = (1 if name in LAUNCHED else of_rank) if kill_at else 0
            assert ended == want, Path(errors.name).read_text()[-4000:]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
            program.stdout.close()
            program.wait()
    return seen


def batches(seen):
    """The keys of each step, rank by rank."""
    return {
        step: sum((ranks[rank][0] for rank in sorted(ranks)), []) for step, ranks in seen.items()
    }


def plain(shards):
    """The keys of each step, from a loop without a trainer."""
    dataset = StreamingDataset(str(shards), seed=0)
    loader = make_dataloader(dataset, global_batch_size=4, sequence_length=512, with_metadata=True)
    keys = {}
    while loader.step < STEPS:
        for batch in itertools.islice(loader, STEPS - loader.step):
            keys[loader.step] = [row["key"] for row in batch["metadata"]]
    return keys


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "parallel"])
def test_an_example_that_was_killed_resumes_with_the_exact_batches(name, shards, tmp_path):
    if name == "ray_train":  # which starts for half a minute
        pytest.importorskip("ray", reason="the extra [ray] is not installed")
        whole = plain(shards)
    else:
        whole = batches(run(name, shards, tmp_path / "whole"))
    assert sorted(whole) == list(range(1, STEPS + 1))
    # The checkpoint of step 4 is complete when step 5 begins; the process may be killed later.
    killed = batches(run(name, shards, tmp_path / "killed", kill_at=SAVED + 1))
    assert all(whole[step] == keys for step, keys in killed.items())
    ranks = 1 if name == "stateful_loader" else 2
    resumed = batches(run(name, shards, tmp_path / "killed", ranks=ranks))
    assert min(resumed) > SAVED
    assert resumed == {step: whole[step] for step in range(min(resumed), STEPS + 1)}


KILLED_IN_A_SAVE = """
import os, runpy, signal, sys
import accelerate.accelerator
save, saves = accelerate.accelerator.save_custom_state, []
def die(*args, **named):
    saves.append(1)
    if len(saves) > 1:
        os.kill(os.getpid(), signal.SIGKILL)
    save(*args, **named)
accelerate.accelerator.save_custom_state = die
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_accelerate_resumes_from_the_last_save_that_is_complete(shards, tmp_path):
    saved = tmp_path / "killed"
    names = ("accelerate_loop", shards, saved)
    killed = batches(run(*names, kill_at=5, killing=KILLED_IN_A_SAVE))
    assert sorted(killed) == [1, 2, 3, 4]
    assert min(batches(run(*names))) == 3


def test_a_killed_run_on_a_mesh_resumes_on_another_one_as_if_nothing_had_happened(shards, tmp_path):
    whole = run("parallel", shards, tmp_path / "whole")
    two_by_two = ("--data", 2, "--context", 2)
    killed = run("parallel", shards, tmp_path / "killed", *two_by_two, ranks=4, kill_at=SAVED + 1)
    resumed = run("parallel", shards, tmp_path / "killed", "--tensor", 2, ranks=2)
    assert sorted(killed)[:SAVED] == list(range(1, SAVED + 1))
    assert sorted(resumed) == list(range(SAVED + 1, STEPS + 1))
    for step in range(1, STEPS + 1):
        (keys, loss), ranks = whole[step][0], killed[step] if step <= SAVED else resumed[step]
        if step <= SAVED:  # ranks 0 and 2 are a context group, and so are 1 and 3
            assert (ranks[0][0], ranks[1][0]) == (ranks[2][0], ranks[3][0])
            assert ranks[0][0] + ranks[1][0] == keys
            # Each has the loss of its slice of the sequences, of the same global mean.
            assert sum(part for _, part in ranks.values()) == pytest.approx(loss, abs=2e-3)
            assert all(part < loss / 2 for _, part in ranks.values())
        else:
            assert ranks[0] == ranks[1] == (keys, pytest.approx(loss, abs=2e-3))
