"""preview: the page shows the very batch of a step, rank and seed; by structure, not by pixels."""

import base64
import html
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from loader import IterableDatasetMixture, StreamingDataset, View, make_dataloader
from loader.__main__ import main
from loader.assembly import Augment
from loader.cli import preview as preview_module
from loader.cli.preview import as_html, read_preview, row_pieces, writer_of
from loader.stream import stored_view
from preprocess.page import thumbnail
from shardspec.errors import ConfigError
from shardspec.manifest import require_manifest
from tests.pages import checked


@pytest.fixture
def preview(tiny_dataset, tmp_path, capsys):
    """A function that gives the page of the tiny dataset for some flags."""

    def run(*args):
        out = tmp_path / "preview.html"
        code = main(["preview", str(tiny_dataset), "--out", str(out), *map(str, args)])
        assert code == 0, capsys.readouterr().err
        return checked(out.read_text())

    return run


def batch_at(url, step, *, rank=0, ranks=1, rows=4, **settings):
    """The batch that a run gives at a step, from its beginning on."""
    dataset = StreamingDataset(str(url), seed=3, rank=rank, world_size=ranks)
    loader = make_dataloader(
        dataset, global_batch_size=rows, sequence_length=2048, with_metadata=True, **settings
    )
    done = 0
    while True:
        for batch in loader:
            if done == step:
                return batch
            done += 1


def pixels_of(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def contains(image, part, *, left):
    """Returns True if a part is in an image, with its left edge at a column."""
    column = image[:, left : left + part.shape[1]]
    starts = np.flatnonzero((column[: 1 - len(part)] == part[0]).all((1, 2)))
    return any(np.array_equal(column[y : y + len(part)], part) for y in starts)


def test_picture_and_page_show_the_same(preview, tiny_dataset, tmp_path, monkeypatch):
    made = []

    def spied(*args, **settings):
        made.append(read_preview(*args, **settings))
        return made[0]

    monkeypatch.setattr(preview_module, "read_preview", spied)
    flags = ["--seed", 3, "--global-batch", 1, "--pack"]
    path = tmp_path / "a.PNG"
    assert main(["preview", str(tiny_dataset), "--out", str(path), *map(str, flags)]) == 0
    assert as_html(made[0]).decode() == preview(*flags).document
    image = pixels_of(path)
    (card,) = made[0].cards
    assert len(card.texts) > 1
    first = np.asarray(thumbnail(card.figures[0].pixels, longest_px=128))
    assert contains(image, first, left=48)
    at = len(card.figures) % (1184 // 136)
    assert contains(image, card.mask.pixels, left=48 + 136 * at)


def keys_of(batch):
    return [part["key"] for row in batch["metadata"] for part in row.get("examples", [row])]


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(
    "step, rank, ranks",
    [
        pytest.param(0, 0, 1, marks=pytest.mark.slow),
        (2, 1, 2),
        pytest.param(7, 0, 2, marks=pytest.mark.slow),
    ],
)
def test_page_shows_the_batch_of_the_run(preview, tiny_dataset, step, rank, ranks, pack):
    flags = ["--pack"] if pack else []
    page = preview(
        *("--seed", 3, "--step", step, "--rank", rank, "--ranks", ranks, "--global-batch", 4),
        *flags,
    )
    batch = batch_at(tiny_dataset, step, rank=rank, ranks=ranks, pack=pack)
    rows = page.document.split('id="rows"')[1]
    assert re.findall(r'aria-label="Text of (\w{24});', rows) == keys_of(batch)
    crops = len(re.findall(r"<figcaption>(?:sample \d+, )?whole</figcaption>", rows))
    assert crops == len(keys_of(batch))
    assert rows.count("<article") == len(batch["metadata"])


def test_learned_text_is_what_peek_marks(preview, tiny_dataset, capsys):
    page = preview("--seed", 3, "--global-batch", 4)
    marked = re.findall(r"<mark>(.*?)</mark>", page.document.split('id="rows"')[1])
    flags = ["--seed", "3", "--batch-size", "4"]
    capsys.readouterr()
    assert main(["peek", str(tiny_dataset), *flags]) == 0
    peeked = re.findall("⟦(.*?)⟧", capsys.readouterr().out, re.DOTALL)[1:]  # after the legend

    def shown(text):
        return text.replace(" ", "\u200b·").replace("\n", "⏎")

    assert [html.unescape(text) for text in marked[1:]] == [shown(text) for text in peeked]


def test_pixels_are_those_of_the_batch(preview, tiny_dataset):
    page = preview("--seed", 3, "--global-batch", 4, "--augment")
    manifest = require_manifest(str(tiny_dataset))
    view = View(image=stored_view(manifest), augment=Augment.standard())
    dataset = StreamingDataset(str(tiny_dataset), seed=3, view=view, rank=0, world_size=1)
    loader = make_dataloader(dataset, global_batch_size=4, sequence_length=2048)
    images = next(iter(loader))["images"]
    first = [img["src"] for img in page.all("img") if img["alt"] == "Whole"]
    assert len(first) == 4
    for uri, crops in zip(first, images, strict=True):
        payload = base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))
        got = np.asarray(Image.open(io.BytesIO(payload)).convert("RGB").resize((8, 8)), float)
        whole = Image.fromarray(np.ascontiguousarray(crops[0].permute(1, 2, 0).numpy()))
        assert np.abs(got - np.asarray(whole.resize((8, 8)), float)).mean() < 8


def test_same_step_gives_the_same_bytes(preview):
    assert preview("--augment", "--pack").document == preview("--augment", "--pack").document


def test_padding_of_the_page_is_that_of_the_batch(preview, tiny_dataset):
    page = preview("--seed", 3, "--global-batch", 4, "--pad-mode", "max_len")
    mask = batch_at(tiny_dataset, 0, pad_mode="max_len")["attention_mask"]
    told = re.findall(r">([\d,]+) tokens and ([\d,]+) of padding", page.document)
    got = [tuple(int(number.replace(",", "")) for number in pair) for pair in told]
    assert got == [(int(row.sum()), int((1 - row).sum())) for row in mask]


def test_outline_is_the_golden_file(preview, golden):
    page = preview("--seed", 3, "--global-batch", 4, "--pack")
    heads = re.findall(r"<h([1-6])[^>]*>(.*?)</h\1>", page.document)
    lines = ["  " * (int(n) - 1) + re.sub("[0-9a-f]{24}", "KEY", text) for n, text in heads]
    golden("preview-outline.txt", "\n".join(lines) + "\n")


def test_attention_masks_are_drawn_with_what_they_show(preview):
    page = preview("--pack")
    names = [img["alt"] for img in page.all("img") if img["alt"].startswith("Attention mask")]
    rows = page.document.count("<article")
    assert len(names) == rows
    assert all(re.search(r"\d+% are seen$", name) for name in names)


@pytest.mark.parametrize(
    "flags",
    [["--step", -1], ["--rank", 2, "--ranks", 2], ["--pad-mode", "none"], ["--split", "none"]],
)
def test_impossible_settings_are_one_error(tiny_dataset, tmp_path, capsys, flags):
    out = tmp_path / "a.html"
    code = main(["preview", str(tiny_dataset), "--out", str(out), *map(str, flags)])
    assert code == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert not out.exists()


@pytest.mark.parametrize("name", ["preview", "preview.pdf", "a.png/preview", "s3://b/a.png?x=1"])
def test_another_suffix_is_refused_with_those_that_there_are(name):
    with pytest.raises(ConfigError) as caught:
        writer_of(name)
    assert caught.value.reason == "preview_suffix"
    assert ".html" in str(caught.value)
    assert ".png" in str(caught.value)


def test_runs_of_a_row_are_pieces():
    pieces = row_pieces(
        [1, 9, 9, 2, 3, 4], [False, False, False, False, True, True], str, {9: "<im_patch>"}
    )
    assert [(piece.text, piece.learned, piece.symbol) for piece in pieces] == [
        ("[1]", False, False),
        ("2 image tokens", False, True),
        ("[2]", False, False),
        ("[3, 4]", True, False),
    ]


def page_of(batch):
    return as_html(read_preview(batch, title="T", lead="x", decode=str, symbols={})).decode()


def test_text_only_rows_have_no_crops():
    batch = {
        "input_ids": torch.tensor([[1, 2, 0]]),
        "labels": torch.tensor([[2, -100, -100]]),
        "attention_mask": torch.tensor([[1, 1, 0]]),
        "position_ids": torch.tensor([[0, 1, 0]]),
        "subsegment_ids": torch.tensor([[1, 1, -1]]),
        "metadata": [{"key": "a", "images": []}],
    }
    page = checked(page_of(batch))
    assert "2 tokens and 1 of padding; 1 under loss; 0 crops" in page.text


def packed_pair():
    """A pack of two samples: a target of the first is 0, which the second begins with."""
    return {
        "input_ids": torch.tensor([[7, 1, 2, 0, 3, 4, 0]]),
        "labels": torch.tensor([[-100, 2, 0, -100, 4, 5, -100]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 0]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 0]]),
        "subsegment_ids": torch.tensor([[1, 1, 1, 2, 2, 2, -1]]),
        "metadata": [{"key": "a", "examples": [{"key": k, "images": []} for k in "ab"]}],
    }


def test_targets_that_no_position_holds_are_counted_and_mark_no_other_token():
    page = page_of(packed_pair())
    assert "6 tokens and 1 of padding; 4 under loss; 0 crops" in page
    texts = re.findall(r"<(span|mark)>(\[.*?\])</", page.replace("\u200b·", ""))
    assert texts == [("span", "[7,1]"), ("mark", "[2]"), ("span", "[0,3]"), ("mark", "[4]")]


def test_numbers_of_targets_are_those_of_the_batch(preview, tiny_dataset):
    page = preview("--seed", 3, "--global-batch", 4, "--pack")
    labels = batch_at(tiny_dataset, 0, pack=True)["labels"]
    told = [int(n.replace(",", "")) for n in re.findall(r"; ([\d,]+) under loss", page.document)]
    assert told == [int(row) for row in (labels != -100).sum(1)]


def test_page_of_a_mixture_shows_the_batch_of_the_run(
    preview, tiny_dataset, inline_cli, tmp_path, capsys
):
    """Also where the other was built for larger images: those of the run have one view."""
    other = tmp_path / "other"
    source = ("--source", "sample", "--limit", 6, "--name", "other", "--cache", tmp_path / "cache")
    inline_cli.good("shards", "pixmo_cap", *source, "--image-size", 448, "--out", other)
    page = preview(
        *("--with", other, "--weights", "0.5,0.5", "--step", 1, "--seed", 3),
        *("--global-batch", 4),
    )
    view = View(image=stored_view(require_manifest(str(tiny_dataset))))
    datasets = [StreamingDataset(str(url), seed=3, view=view) for url in (tiny_dataset, other)]
    loader = make_dataloader(
        IterableDatasetMixture(datasets, [0.5, 0.5], seed=3),
        global_batch_size=4, sequence_length=2048, with_metadata=True,
    )  # fmt: skip
    batches = iter(loader)
    next(batches)
    rows = page.document.split('id="rows"')[1]
    assert re.findall(r'aria-label="Text of (\w{24});', rows) == keys_of(next(batches))

    assert main(["preview", str(other), "--with", str(tiny_dataset)]) == 1
    refusal = capsys.readouterr().err
    assert "view needs more pixels than the shards have" in refusal
    assert f"where: {tiny_dataset}" in refusal
