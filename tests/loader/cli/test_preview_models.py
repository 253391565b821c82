"""preview and report of datasets for models: what is shown are the pixels that the model gets."""

import base64
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from loader.__main__ import main
from loader.assembly.families.kernels import unit_shape, write_units
from loader.cli.batch_rows import model_pictures
from preprocess.report import ReportSettings, make_report
from shardspec.families import FixedSize, Gemma3, InternVL, Qwen2VL
from tests import model_folders
from tests.inline import Quiet
from tests.pages import checked

FAMILIES = {
    "qwen": (Qwen2VL(min_pixels=28 * 28), (56, 84)),
    "qwen with patches of 16": (Qwen2VL(patch_px=16, min_pixels=32 * 32), (64, 32)),
    "one size": (FixedSize(size_px=28, num_tokens=4), (28, 28)),
    "gemma": (Gemma3(size_px=28, num_tokens=4), (28, 28)),
    "one tile": (InternVL(size_px=28, tokens_per_tile=1), (28, 28)),
}


def rendered(family, pixels):
    plan = family.plan(pixels.shape[:2])
    units = np.zeros((plan.num_units, *unit_shape(family, [plan])), np.float32)
    write_units(family, plan, pixels, units, backend="pil")
    return plan, model_pictures(family, plan, units)


@pytest.mark.parametrize("name", FAMILIES)
def test_pictures_that_need_no_resizing_come_back_exactly(name):
    family, size = FAMILIES[name]
    pixels = np.random.RandomState(0).randint(0, 256, (*size, 3)).astype(np.uint8)
    _, (shown,) = rendered(family, pixels)
    assert np.array_equal(shown, pixels)


def test_tiles_are_shown_one_by_one_with_the_thumbnail():
    family = InternVL(size_px=28, tokens_per_tile=1)
    pixels = np.random.RandomState(0).randint(0, 256, (28, 56, 3)).astype(np.uint8)
    plan, (left, right, _) = rendered(replace(family, max_tiles=2), pixels)
    assert plan.num_units == 3
    assert np.array_equal(np.concatenate([left, right], axis=1), pixels)


@pytest.fixture(scope="module")
def chats(inline_cli, build_once):
    """Three chats, one of them without a picture, for a tiny Qwen2-VL."""

    def build(folder):
        model_folders.qwen2_vl(folder / "model")
        lines = []
        for i in range(3):
            levels = np.full((56, 84, 3), (40 * i, 100, 200), np.uint8)
            Image.fromarray(levels).save(folder / f"{i}.png")
            said = "<image>\nWhat is it?" if i else "Say hello."
            turns = [
                {"role": "user", "content": said},
                {"role": "assistant", "content": f"It, {i}"},
            ]
            lines.append(json.dumps({"messages": turns, "images": [f"{i}.png"] if i else []}))
        (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
        inline_cli.good(
            *("shards", folder / "chats.jsonl", "--model", folder / "model", "--codec", "png"),
            *("--out", folder / "out", "--cache", folder / "cache", "--workers", 1),
        )

    return build_once("preview-chats", build) / "out"


@pytest.mark.parametrize("pack", [False, True])
def test_preview_shows_answers_and_pictures_of_a_model(chats, tmp_path, pack):
    out = tmp_path / "a.html"
    flags = ["--global-batch", "1" if pack else "3", *(["--pack"] if pack else [])]
    assert main(["preview", str(chats), "--out", str(out), *flags]) == 0
    page = checked(out.read_text())
    rows = page.document.split('id="rows"')[1]
    marked = [text for text in re.findall("<mark>(.*?)</mark>", rows) if text != "background"]
    assert sorted(re.findall(r"It,·\d", "".join(marked).replace("\u200b", ""))) == [
        "It,·0",
        "It,·1",
        "It,·2",
    ]
    assert all(text.startswith("It,") for text in marked)
    colours = set()
    for img in page.all("img"):
        if img["alt"].endswith(("Whole", "whole")):
            payload = base64.b64decode(img["src"].partition(",")[2])
            colours.add(int(np.asarray(Image.open(io.BytesIO(payload)))[..., 0].mean() / 40 + 0.5))
    assert colours == {1, 2}


def test_report_of_a_dataset_for_a_model_says_its_tokens(chats, tmp_path):
    out = tmp_path / "a.html"
    make_report(ReportSettings(out=str(chats), to=str(out)), Quiet())
    page = checked(out.read_text())
    assert "Tokens of the pictures of a sample" in page.text
    assert "Crops of a sample" not in page.text
    # After the last answer a template has a line break, which is no exchange.
    assert "exchange 1" in page.text
    assert "exchange 2" not in page.text
    assert "3 exchanges: " in page.text
    # 2 x 3 tokens of 28 x 28 pixels each, or as many as the smallest picture has.
    assert re.search(r"\d+ image tokens at \d+×\d+", page.all("svg")[-1]["aria-label"] + page.text)
