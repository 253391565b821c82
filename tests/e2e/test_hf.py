"""Trainers of Hugging Face, and loops of one's own, over a dataset for a model of transformers."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from loader import StreamingDataset, make_dataloader
from loader.integrations import DistributedState, hf
from shardspec.errors import ConfigError
from tests import model_folders
from tests.programs import KILLING, torchrun

ROOT = Path(__file__).parents[2]
STEPS = 6
"""Of a run: over the end of an epoch."""

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def built(build_once, inline_cli):
    """The folders of a tiny model and of a dataset for it: ten chats about a picture or none."""

    def build(folder):
        model_folders.qwen2_vl(folder / "model")
        rng = np.random.RandomState(0)
        lines = []
        for i in range(10):
            levels = rng.randint(0, 256, (30 + 9 * i, 90, 3)).astype(np.uint8)
            Image.fromarray(levels).save(folder / f"{i}.png")
            answer = " ".join(["red", "ball"] * (i + 1))
            turns = [{"role": "user", "content": f"What is {i}?"}]
            turns += [{"role": "assistant", "content": answer}]
            row = {"messages": turns, "images": [f"{i}.png"] if i % 3 else []}
            lines.append(json.dumps(row) + "\n")
        (folder / "chats.jsonl").write_text("".join(lines))
        inline_cli.good(
            *("shards", folder / "chats.jsonl", "--model", folder / "model", "--codec", "png"),
            *("--out", folder / "shards", "--cache", folder / "cache", "--workers", 1),
        )

    return build_once("hf-model", build)


def load(built, **options):
    dataset = StreamingDataset(str(built / "shards"), seed=0)
    return make_dataloader(dataset, **{"global_batch_size": 4, "sequence_length": 2048, **options})


def copied(batch):
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def same(got, want):
    """Whether two runs had the same batches, to the last bit."""
    return len(got) == len(want) and all(
        one.keys() == other.keys()
        and all(
            torch.equal(one[k], v) if isinstance(v, torch.Tensor) else one[k] == v
            for k, v in other.items()
        )
        for one, other in zip(got, want, strict=True)
    )


@pytest.fixture
def run_example(built, monkeypatch):
    """Runs the example in this process; gives the batches that the Trainer trained on."""
    from transformers import Trainer

    seen = []
    training_step = Trainer.training_step

    def noting(self, model, inputs, *rest, **named):
        seen.append(copied(inputs))
        return training_step(self, model, inputs, *rest, **named)

    monkeypatch.setattr(Trainer, "training_step", noting)

    def run(out, steps, *flags):
        seen.clear()
        words = ("example", built / "shards", built / "model", "--random", "--out", out, *flags)
        monkeypatch.setattr(sys, "argv", [*map(str, words), "--steps", str(steps)])
        runpy.run_path(str(ROOT / "examples" / "hf_trainer.py"), run_name="__main__")
        return list(seen)

    return run


KILLED_IN_STEP = """
import os, runpy, signal, sys
from transformers import Trainer
last, calls, training_step = int(sys.argv.pop(1)), [], Trainer.training_step
def step(*words, **named):
    calls.append(1)
    if len(calls) == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return training_step(*words, **named)
Trainer.training_step = step
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""As `python -c KILLED_IN_STEP N PROGRAM ...`, the process dies in the Nth step of its Trainer."""


def killed(*words):
    """Runs a program of Python that kills itself; gives the lines that it printed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", *map(str, words)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return done.stdout.splitlines()


def weights(folder):
    from safetensors.torch import load_file

    return load_file(str(folder / f"checkpoint-{STEPS}" / "model.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [(), ("--trl",), ("--trl", "--pack", "--batch-size", 1)],
    ids=["trainer", "trl", "packed"],
)
def test_a_killed_trainer_resumes_with_the_batches_of_the_undisturbed_run(
    built, run_example, flags, tmp_path
):
    whole = run_example(tmp_path / "whole", STEPS, *flags)
    assert len(whole) == STEPS
    rows = {"pack": True, "global_batch_size": 1} if "--pack" in flags else {}
    loader, expected = load(built, **rows), []
    while len(expected) < STEPS:
        expected += [copied(batch) for batch in loader]
    assert same(whole, expected[:STEPS])
    program = (ROOT / "examples" / "hf_trainer.py", built / "shards", built / "model", "--random")
    options = (*flags, "--steps", STEPS, "--out", tmp_path / "killed")
    killed(KILLED_IN_STEP, 5, *program, *options)  # saved after step 4
    (tmp_path / "killed" / "checkpoint-6").mkdir()  # as a save that was killed
    assert same(run_example(tmp_path / "killed", STEPS, *flags), whole[4:])
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)


def history(folder):
    """The losses of each step, and the loader's state, in a run's last checkpoint."""
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    return losses, state["stateful_callbacks"]["vlm_shards"]


@pytest.mark.slow
def test_two_ranks_of_which_one_has_no_picture_train_as_one_does(built, run_example, tmp_path):
    steps = run_example(tmp_path / "one", STEPS, "--trl", "--batch-size", 2)
    counts = [len(batch.get("image_grid_thw", ())) for batch in steps]
    assert 1 in counts  # one rank alone has a picture
    launched = [sys.executable, *torchrun(2)]
    flags = ("--random", "--trl", "--batch-size", 2, "--steps", STEPS, "--out", tmp_path / "two")
    program = (ROOT / "examples" / "hf_trainer.py", built / "shards", built / "model", *flags)
    done = subprocess.run(
        [*launched, *map(str, program)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    (losses, state), (expected, alone) = history(tmp_path / "two"), history(tmp_path / "one")
    assert state == alone
    assert losses == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    "name",
    ["ddp", "parallel", "stateful_loader", "accelerate_loop", "lightning_fit", "ray_train"]
    + ["hf_trainer", "plain_loop", "dataset_and_collator"],
)
def test_examples_of_trainers_are_short(name):
    assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) <= 60


def run_program(monkeypatch, built, name, *flags):
    words = (name, built / "shards", built / "model", "--random", *flags)
    monkeypatch.setattr(sys, "argv", [*map(str, words)])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--pack",)], ids=["padded", "packed"])
def test_a_killed_plain_loop_resumes_with_the_batches_and_losses_of_the_undisturbed_run(
    built, monkeypatch, capsys, tmp_path, flags
):
    from transformers import Qwen2VLForConditionalGeneration

    def losses(out, steps):
        options = (*flags, "--steps", steps, "--out", tmp_path / out)
        run_program(monkeypatch, built, "plain_loop", *options)
        return capsys.readouterr().out.splitlines()

    seen = []
    kind = Qwen2VLForConditionalGeneration
    forward = kind.forward
    monkeypatch.setattr(
        kind,
        "forward",
        lambda self, **batch: (seen.append(copied(batch)), forward(self, **batch))[1],
    )
    whole, batches = losses("whole", STEPS), list(seen)
    assert len(whole) == STEPS
    program = (ROOT / "examples" / "plain_loop.py", built / "shards", built / "model", "--random")
    options = (*flags, "--steps", STEPS, "--out", tmp_path / "killed")
    assert killed(KILLING, "step 5 ", *program, *options) == whole[:5]  # saved after step 4
    (tmp_path / "killed" / "step-000006").mkdir()  # as a save that was killed
    seen.clear()
    assert losses("killed", STEPS) == whole[4:]
    assert same(seen, batches[4:])


@pytest.mark.slow
def test_a_trainer_with_a_dataset_and_a_collator_gets_the_batches_of_the_loader(
    built, monkeypatch, tmp_path
):
    from transformers import Trainer

    seen = []
    training_step = Trainer.training_step

    def noting(self, model, inputs, *rest, **named):
        seen.append(copied(inputs))
        return training_step(self, model, inputs, *rest, **named)

    monkeypatch.setattr(Trainer, "training_step", noting)
    options = ("--steps", STEPS, "--out", tmp_path / "out")
    run_program(monkeypatch, built, "dataset_and_collator", *options)
    loader, expected = load(built), []
    while len(expected) < STEPS:
        expected += [copied(batch) for batch in loader]
    assert same(seen, expected[:STEPS])


@pytest.mark.slow
def test_the_loop_of_the_docs_runs_and_resumes_to_the_same_losses(built, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "models.md").read_text()
    (code,) = re.findall(r"^```py\n(from pathlib.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    model_folders.model("qwen2_vl", built / "model").save_pretrained(tmp_path / "model")
    for written, meant in {
        "Qwen/Qwen2.5-VL-7B-Instruct": tmp_path / "model",
        "shards/captions-qwen": built / "shards",
        "global_batch_size=32": "global_batch_size=1",
        "sequence_length=4096": "sequence_length=160",
        "step % 100": "step % 2",
        "lr=1e-5": "lr=1e-2",
    }.items():
        assert written in code
        code = code.replace(written, str(meant))
    noted = "        loss.backward()\n"
    assert noted in code
    code = code.replace(noted, noted + "        losses.append(loss.item())\n")

    def run(folder, steps):
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        names = {"losses": []}
        exec(compile(code.replace("1000", str(steps)), "docs/models.md", "exec"), names)
        return names["losses"]

    whole = run(tmp_path / "whole", STEPS)
    assert len(whole) == STEPS
    assert whole[-1] < whole[0]
    halves = tmp_path / "halves"
    assert run(halves, 2) + run(halves, STEPS) == whole


@pytest.mark.slow
@pytest.mark.parametrize("pack", [False, True])
def test_distributed_checkpoints_keep_the_state_of_a_loader_for_a_model(built, tmp_path, pack):
    import torch.distributed.checkpoint as dcp

    options = {"pack": pack, "global_batch_size": 1, "sequence_length": 160}
    loader, other = (load(built, **options) for _ in range(2))
    batches = iter(loader)
    next(batches)
    dcp.save({"loader": DistributedState(loader)}, checkpoint_id=tmp_path)
    dcp.load({"loader": DistributedState(other)}, checkpoint_id=tmp_path)
    rest = [copied(batch) for batch in batches]
    assert rest
    assert same([copied(batch) for batch in other], rest)


def test_the_stand_ins_of_a_trainer_say_that_no_loader_is_attached():
    (row,) = hf.dataset()
    with pytest.raises(ConfigError) as caught:
        hf.collate([row])
    assert caught.value.reason == "trainer_unattached"
