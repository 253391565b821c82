"""docs/robots.png: two rows of a batch of the simulated arm, drawn here.

UPDATE_GOLDEN=1 draws it anew.
"""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from loader import StreamingDataset, View, make_dataloader
from preprocess.job.job import JobSettings
from preprocess.job.pipeline import run_job
from preprocess.media import ImagePolicy
from preprocess.recipe import Recipe
from shardspec.tiling import ImageView
from tests import inline

PICTURE = Path(__file__).parents[2] / "docs" / "robots.png"
VIEW = ImageView(size_px=112, patch_px=14, max_crops=1)
CODE = """
from preprocess.datasets import LeRobot
from preprocess.episodes import WindowPolicy


class Arm(LeRobot):
    window = WindowPolicy(history=2, history_hz=5.0, chunk=4)
"""
ARRAYS = ("actions", "action_mask", "history_mask", "state")
GAP, TEXT, WIDTH = 8, 34, 700


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arm")
    (folder / "arm.py").write_text(CODE)
    settings = JobSettings(
        dataset=f"{folder / 'arm.py'}:Arm",
        source="sample",
        limit=24,
        out=str(folder / "shards"),
        cache=str(folder / "cache"),
        recipe=Recipe(image=ImagePolicy(views=(VIEW,), codec="png")),
        num_shards=1,
    )
    with inline.jobs():
        run_job(settings, inline.Quiet())
    stream = StreamingDataset(settings.out, seed=1, view=View(image=VIEW))
    metadata = ("episode", "step", "views", "message_list")
    loader = make_dataloader(
        stream, global_batch_size=24, sequence_length=256, arrays=ARRAYS, metadata=metadata
    )
    return next(iter(loader))


def draw(batch, rows):
    """Draws rows below each other: the images in their order, the values beside them."""
    side = VIEW.size_px
    height = len(rows) * (side + 2 * TEXT)
    picture = Image.new("RGB", (WIDTH, height), "white")
    pen = ImageDraw.Draw(picture)
    for r, row in enumerate(rows):
        top = r * (side + 2 * TEXT)
        record = batch["metadata"][row]["record"]
        told = record["message_list"][0]["instruction"]
        pen.text((GAP, top + 4), f"row {row}: step {record['step']}. {told}", fill="black")
        real = batch["history_mask"][row].tolist()
        num_views = len(record["views"]) // len(real)
        for i, view in enumerate(record["views"]):
            left = GAP + i * (side + GAP)
            pixels = batch["images"][row, i].permute(1, 2, 0).numpy()
            picture.paste(Image.fromarray(pixels), (left, top + TEXT))
            label = f"{view}, t{(i // num_views - len(real) + 1) * 0.2:+.1f} s"
            color = "black" if real[i // num_views] else "silver"
            pen.text((left, top + 20), label, fill=color)
        left = 2 * GAP + len(record["views"]) * (side + GAP)
        pen.text((left, top + 20), "actions: x, y, gripper", fill="black")
        pairs = zip(batch["actions"][row].tolist(), batch["action_mask"][row].tolist(), strict=True)
        for n, (action, is_real) in enumerate(pairs):
            line = "  ".join(f"{value:+.3f}" for value in action)
            color = "black" if is_real else "silver"
            pen.text((left, top + TEXT + 16 * n), line, fill=color)
        state = "  ".join(f"{value:+.3f}" for value in batch["state"][row].tolist())
        pen.text((left, top + TEXT + 80), f"state: {state}", fill="black")
    return picture


def chosen_rows(batch):
    """Finds the first step of the episode, and its last but one: both masks have something."""
    steps = [one["record"]["step"] for one in batch["metadata"]]
    return [steps.index(0), steps.index(22)]


@pytest.mark.slow
def test_the_picture_of_the_docs_shows_a_batch(batch):
    drawn = draw(batch, chosen_rows(batch))
    if os.environ.get("UPDATE_GOLDEN"):
        drawn.quantize(64).save(PICTURE, optimize=True)
    with Image.open(PICTURE) as opened:
        stored = np.asarray(opened.convert("RGB"), np.int16)
    want = np.asarray(drawn, np.int16)
    assert stored.shape == want.shape
    for r in range(2):  # fonts differ between releases of Pillow, pictures do not
        top = r * (VIEW.size_px + 2 * TEXT) + TEXT
        part = slice(top, top + VIEW.size_px), slice(GAP, GAP + 4 * (VIEW.size_px + GAP) - GAP)
        assert np.abs(stored[part] - want[part]).mean() < 3
