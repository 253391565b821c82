"""The training example as its reader runs it: alone, under torchrun, killed and resumed."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.programs import KILLING, torchrun

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
STEP = re.compile(r"step +(\d+) +loss (\S+) +\S+ samples/s +data wait +\d+%")
STEPS, SAVED, KILLED = 12, 6, 8

# Sums over ranks round otherwise; measured: the four decimals are equal for 1, 2 and 4 processes.
SUM_ORDER = 3e-4


@pytest.fixture(scope="module")
def shards(tmp_path_factory, inline_cli):
    """Eighteen generated samples: an epoch ends inside the fifth batch of four."""
    out = tmp_path_factory.mktemp("shards") / "pixmo_cap"
    flags = ("--source", "sample", "--limit", 18, "--image-size", 112, "--workers", 1)
    inline_cli.good("shards", "pixmo_cap", *flags, "--out", out)
    return out


def run_training(shards, *flags, processes=1, killed_at=None):
    """Runs the example and returns {step: loss} as it printed them."""
    command = [sys.executable]
    if killed_at is not None:
        command += ["-c", KILLING, f"step {killed_at:4d} "]
    if processes > 1:
        command += torchrun(processes)
    command += [str(EXAMPLES / "train.py"), str(shards), "--batch-size", "4", *map(str, flags)]
    # One thread everywhere, as torchrun sets it: two processes share this machine's two cores.
    paths = os.pathsep.join((str(ROOT), str(EXAMPLES)))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == (0 if killed_at is None else -signal.SIGKILL), done.stderr
    losses = {int(step): float(loss) for step, loss in STEP.findall(done.stdout)}
    assert len(losses) == done.stdout.count("step "), done.stdout
    return losses


@pytest.fixture(scope="module")
def losses(shards):
    """The losses of one process, uninterrupted."""
    return run_training(shards, "--steps", STEPS)


@pytest.mark.slow
def test_loss_falls_when_the_example_trains_on_shards(losses):
    values = list(losses.values())
    assert list(losses) == list(range(1, STEPS + 1))
    assert values[0] == pytest.approx(7.99, abs=0.3)  # ln 2958: nothing is known yet
    assert max(values[-3:]) < values[0] - 1.0


@pytest.mark.slow
def test_two_processes_print_the_losses_of_one(shards, losses):
    assert run_training(shards, "--steps", STEPS, processes=2) == pytest.approx(
        losses, abs=SUM_ORDER
    )


@pytest.fixture(scope="module")
def killed(shards, tmp_path_factory):
    """The checkpoint of a run that was killed two steps after it, and the losses until there."""
    checkpoint = tmp_path_factory.mktemp("killed") / "run.pt"
    flags = ("--steps", STEPS, "--checkpoint", checkpoint, "--save-every", SAVED)
    seen = run_training(shards, *flags, killed_at=KILLED)
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
    return checkpoint, seen


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "tolerance"), [(1, 0.0), (2, SUM_ORDER)])
def test_run_resumed_after_sigkill_prints_the_losses_of_the_whole_one(
    processes, tolerance, killed, shards, losses, tmp_path
):
    checkpoint, seen = killed
    assert list(seen) == list(range(1, KILLED + 1))
    copy = shutil.copy(checkpoint, tmp_path / "run.pt")
    flags = ("--steps", STEPS, "--checkpoint", copy)
    rest = run_training(shards, *flags, processes=processes)
    assert list(rest) == list(range(SAVED + 1, STEPS + 1))
    assert {step: losses[step] for step in seen} == seen
    assert seen | rest == pytest.approx(losses, abs=tolerance)
    assert torch.load(copy, weights_only=True)["loader"]["step"] == STEPS


@pytest.fixture
def model(monkeypatch):
    """The example's model, small."""
    monkeypatch.syspath_prepend(EXAMPLES)
    from model import VisionLanguageModel

    from shardspec.tiling import ImageView

    torch.manual_seed(0)
    view = ImageView(size_px=56)
    return VisionLanguageModel(view, vocab_size=50, sequence_length=32, dim=48, vision_dim=32)


def batch_of(input_ids, *, subsegment_ids, num_images):
    """A batch of one example whose picture, if any, stands at the positions 2 to 5."""
    length = len(input_ids)
    images = torch.arange(num_images * 3 * 56 * 56, dtype=torch.int64) % 251
    return {
        "input_ids": torch.tensor([input_ids]),
        "labels": torch.tensor([[*input_ids[1:], 0]]),
        "images": images.to(torch.uint8).view(1, num_images, 3, 56, 56),
        "image_masks": torch.ones(1, num_images, 16),
        "image_input_idx": torch.full((1, num_images), 2),
        "attention_mask": torch.ones(1, length, dtype=torch.int64),
        "position_ids": torch.arange(length)[None],
        "subsegment_ids": torch.tensor([subsegment_ids]),
    }


def test_branch_of_a_message_tree_does_not_see_its_sibling(model):
    segments = [10_000] * 7 + [0] * 3 + [1] * 3
    losses = []
    for sibling in ([11, 12, 13], [21, 22, 23]):
        ids = [1, 2, 3, 3, 3, 3, 4, *sibling, 31, 32, 33]
        batch = batch_of(ids, subsegment_ids=segments, num_images=1)
        batch["labels"][:, :10] = -100  # the second branch alone
        losses.append(model(**batch).item())
    assert losses[0] == losses[1]


def test_image_changes_what_a_branch_predicts(model):
    ids, segments = [1, 2, 3, 3, 3, 3, 4, 11, 12], [10_000] * 7 + [0] * 2
    batch = batch_of(ids, subsegment_ids=segments, num_images=1)
    batch["labels"][:, :7] = -100
    seen = model(**batch).item()
    batch["images"] = 255 - batch["images"]
    assert model(**batch).item() != seen


def test_embeddings_of_patch_tokens_give_way_to_image_features(model):
    segments = [10_000] * 7 + [0] * 2
    losses = []
    for patch in (3, 40):
        ids = [1, 2, *[patch] * 4, 4, 11, 12]
        batch = batch_of(ids, subsegment_ids=segments, num_images=1)
        batch["labels"][:, :6] = -100  # positions whose target is no patch token
        losses.append(model(**batch).item())
    assert losses[0] == losses[1]


def test_padding_changes_neither_loss_nor_gradients(model):
    ids, segments = [1, 2, 3, 3, 3, 3, 4, 11, 12], [10_000] * 7 + [0] * 2
    plain = batch_of(ids, subsegment_ids=segments, num_images=1)
    padded = batch_of([*ids, 0, 0, 0], subsegment_ids=[*segments, -1, -1, -1], num_images=1)
    padded["labels"][:, len(ids) - 1 :] = plain["labels"][:, -1:].new_tensor([0, -100, -100, -100])
    padded["attention_mask"][:, len(ids) :] = 0
    found = []
    for batch in (plain, padded):
        model.zero_grad()
        loss = model(**batch)
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1])


def test_text_only_batch_leaves_the_image_encoder_zero_gradients(model):
    batch = batch_of([1, 11, 12, 13], subsegment_ids=[10_000, 0, 0, 0], num_images=0)
    model(**batch).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.vision.parameters())


def test_view_whose_patch_tokens_are_apart_is_refused(model):
    from shardspec.tiling import ImageView

    with pytest.raises(ValueError, match="single crops"):
        type(model)(ImageView(overview_column_tokens=True), vocab_size=9, sequence_length=9)
