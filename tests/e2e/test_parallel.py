"""The example on a mesh: ranks of a group share batches, and a run resumes on another mesh."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import LEAVING

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def run(shards, checkpoint, *, ranks, shared, steps):
    """Runs the example; gives for each step {group: [(loss, keys) of each of its ranks]}."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")
    around = {name: value for name, value in os.environ.items() if name not in names}
    program = checkpoint.with_suffix(".py")
    program.write_text(LEAVING)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc_per_node={ranks}", str(program)),
            *(str(ROOT / "examples" / "parallel.py"), str(shards)),
            *("--shared", str(shared), "--steps", str(steps), "--checkpoint", str(checkpoint)),
        ],
        env={**around, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = {}
    for step, group, loss, keys in re.findall(
        r"step (\d+) group (\d+) loss (\S+) ([\w ]+)", done.stdout
    ):
        seen.setdefault(int(step), {}).setdefault(int(group), []).append(
            (float(loss), keys.split())
        )
    return seen


def test_a_run_on_a_mesh_resumes_on_another_one_as_if_nothing_had_happened(tiny_dataset, tmp_path):
    lone = run(tiny_dataset, tmp_path / "lone", ranks=1, shared=1, steps=5)
    seen = run(tiny_dataset, tmp_path / "saved", ranks=2, shared=2, steps=3)
    for groups in seen.values():
        assert [len(ranks) for ranks in groups.values()] == [2]
        assert groups[0][0] == groups[0][1]
    seen |= run(tiny_dataset, tmp_path / "saved", ranks=2, shared=1, steps=5)
    assert sorted(seen) == sorted(lone) == [1, 2, 3, 4, 5]
    for step, groups in seen.items():
        first = [groups[group][0] for group in sorted(groups)]
        ((loss, keys),) = lone[step][0]
        assert sum((own for _, own in first), []) == keys
        assert sum(own for own, _ in first) / len(first) == pytest.approx(loss, abs=2e-3)
    assert len(seen[5]) == 2
