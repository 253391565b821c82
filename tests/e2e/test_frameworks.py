"""Examples in frameworks that are in no environment of ours: run where they are installed."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.test_hf import built

__all__ = ["built"]

ROOT = Path(__file__).parents[2]
RECIPE = """
output_dir: {out}
resume_from_checkpoint: false
model:
dataset:
checkpointer:
tokenizer: {{_component_: types.SimpleNamespace}}
metric_logger: {{_component_: torchtune.training.metric_logging.DiskLogger, log_dir: {out}/logs}}
optimizer: {{_component_: torch.optim.AdamW, lr: 0.001}}
loss: {{_component_: torch.nn.CrossEntropyLoss}}
optimizer_in_bwd: false
gradient_accumulation_steps: 1
batch_size: 4
shuffle: true
compile: false
seed: 0
device: cpu
dtype: fp32
epochs: {epochs}
max_steps_per_epoch: 3
"""
ON_CPU = """
import runpy, sys, types
import torch
from torchtitan.tools import utils

# torchtitan 0.3.0 runs on GPUs alone, and on a torch later than 2.13.
device = types.ModuleType("device")
device.__dict__.update(vars(torch.cpu), memory_stats=lambda *_: {})
device.get_device_name = lambda *_: "cpu"
device.get_device_properties = lambda *_: types.SimpleNamespace(total_memory=1 << 30)
device.reset_peak_memory_stats = device.empty_cache = device.current_device = lambda *_: 0
utils.device_type, utils.device_module = "cpu", device
utils.get_local_device = lambda: torch.device("cpu")
if not hasattr(torch.distributed, "set_timeout"):
    torch.distributed.set_timeout = lambda *_: None
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
LAUNCHER = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
LAUNCHER |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def run(package, program, *words):
    """Runs a program where its package is, and returns what it prints."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    launcher = LAUNCHER if package == "torchtitan" else {}
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *map(str, (*program, *words))],
        env={**os.environ, **launcher, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return re.sub(r"\x1b\[[\d;]*m", "", done.stdout + done.stderr)


@pytest.mark.slow
def test_a_recipe_of_torchtune_resumes_to_the_losses_of_the_undisturbed_run(built, tmp_path):
    def losses(out, epochs):
        folder = tmp_path / out
        folder.mkdir(exist_ok=True)
        (folder / "recipe.yaml").write_text(RECIPE.format(out=folder, epochs=epochs))
        program = [ROOT / "examples" / "torchtune_recipe.py"]
        run("torchtune", program, built / "shards", built / "model", folder / "recipe.yaml")
        logs = "".join(path.read_text() for path in sorted((folder / "logs").iterdir()))
        return re.findall(r"Step (\d+) \| loss:([\d.]+)", logs)

    whole = losses("whole", 2)
    assert len(whole) == 6
    losses("halves", 1)
    assert sorted(losses("halves", 2)) == sorted(whole)


@pytest.mark.slow
def test_torchtitan_resumes_to_the_losses_of_the_undisturbed_run(built, tmp_path):
    def losses(out, steps):
        program = ["-c", ON_CPU, ROOT / "examples" / "torchtitan_trainer.py"]
        words = (built / "shards", built / "model", steps, tmp_path / out)
        return re.findall(r"step: +(\d+) +loss: +([\d.]+)", run("torchtitan", program, *words))

    whole = losses("whole", 6)
    assert len(whole) == 6
    assert losses("halves", 3) + losses("halves", 6) == whole


@pytest.mark.slow
def test_the_trainer_of_llama_factory_trains_on_the_batches_of_the_loader(built, tmp_path):
    program = [ROOT / "examples" / "llamafactory_trainer.py"]
    words = (built / "shards", built / "model", "--random", "--out", tmp_path / "out")
    first = run("llamafactory", program, *words, "--steps", 4)
    assert len(re.findall(r"'loss': ", first)) == 4
    # It has a checkpoint after the fourth step.
    assert len(re.findall(r"'loss': ", run("llamafactory", program, *words, "--steps", 6))) == 2
