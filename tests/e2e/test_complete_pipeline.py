"""The pipeline without shards, part by part: dataset, preprocessor, collator, DataLoader, model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
LIMIT = 6
BATCH_SIZE = 3


@pytest.fixture(scope="module")
def example():
    """The example as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        import unsharded

        yield unsharded


@pytest.fixture(scope="module")
def tokenizer(example):
    return example.load_tokenizer()


@pytest.fixture(scope="module")
def dataset(example, tokenizer):
    return example.make_dataset(tokenizer, limit=LIMIT)


def make_batches(example, tokenizer, dataset, **settings):
    collate = example.make_collator(tokenizer)
    return list(DataLoader(dataset, batch_size=BATCH_SIZE, collate_fn=collate, **settings))


@pytest.fixture(scope="module")
def batches(example, tokenizer, dataset):
    return make_batches(example, tokenizer, dataset)


def test_batch_has_exactly_the_documented_keys_types_and_shapes(batches):
    for batch in batches:
        length = batch["input_ids"].shape[1]
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()}
        assert found == {
            "input_ids": (torch.int64, (BATCH_SIZE, length)),
            "labels": (torch.int64, (BATCH_SIZE, length)),
            "images": (torch.uint8, (BATCH_SIZE, 1, 3, 336, 336)),
            "image_masks": (torch.float32, (BATCH_SIZE, 1, 576)),
            "image_input_idx": (torch.int64, (BATCH_SIZE, 1)),
            "attention_mask": (torch.int64, (BATCH_SIZE, length)),
        }
        assert length % 128 == 0
    assert len(batches) == LIMIT // BATCH_SIZE


def test_batch_holds_an_image_block_then_text_then_padding(batches, tokenizer):
    ids = tokenizer.special_ids
    for batch in batches:
        tokens, mask = batch["input_ids"], batch["attention_mask"].bool()
        assert (tokens[:, 0] == ids["bos"]).all()
        assert (tokens[:, 1] == ids["<im_start>"]).all()
        assert (batch["image_input_idx"] == 2).all()
        assert (tokens[:, 2:146] == ids["<im_patch>"]).all()  # (336 / 14 / 2)**2 = 144 of them
        assert (tokens[:, 146] == ids["<im_end>"]).all()
        assert (tokens[~mask] == ids["pad"]).all()
        assert (batch["labels"][~mask] == -100).all()
        assert (batch["labels"][:, :146] == -100).all()
        assert not (mask[:, 1:] & ~mask[:, :-1]).any()  # padding is at the right alone


def test_labels_are_the_next_tokens_and_decode_to_the_responses(batches, dataset, tokenizer):
    ids = tokenizer.special_ids
    rows = [dataset.dataset.get(item) for item in range(LIMIT)]
    ids_of_all = torch.cat([batch["input_ids"] for batch in batches])
    labels_of_all = torch.cat([batch["labels"] for batch in batches])
    for row, tokens, labels in zip(rows, ids_of_all, labels_of_all, strict=True):
        learned = labels != -100
        last = labels == ids["eos"]  # a target only: the next branch follows in the input
        inner = (learned & ~last)[:-1]
        assert (tokens[1:][inner] == labels[:-1][inner]).all()
        # The caption and one of the transcripts, in an order that is drawn as well.
        *texts, rest = tokenizer.decode(labels[learned].tolist()).split("<|endoftext|>")
        caption = row["message_list"][0]["text"].strip()
        alternatives = {text.strip() for text in row["message_list"][1]["alternatives"]}
        (transcript,) = {text.strip() for text in texts} - {caption}
        assert transcript in alternatives
        assert len(texts) == 2
        assert rest == ""


@pytest.mark.parametrize(
    "settings",
    [
        {"num_workers": 2, "multiprocessing_context": "fork"},
        pytest.param(
            {"num_workers": 2, "multiprocessing_context": "spawn"}, marks=pytest.mark.slow
        ),
    ],
    ids=["two forked workers", "two spawned workers"],
)
def test_workers_make_the_batches_that_the_main_process_makes(
    settings, example, tokenizer, dataset, batches
):
    again = make_batches(example, tokenizer, dataset, **settings)
    assert len(again) == len(batches)
    for got, want in zip(again, batches, strict=True):
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_next_epoch_draws_other_texts_and_pictures(example, tokenizer, dataset, batches):
    dataset.set_epoch(1)
    try:
        others = make_batches(example, tokenizer, dataset)
    finally:
        dataset.set_epoch(0)
    for got, want in zip(others, batches, strict=True):
        assert not torch.equal(got["images"], want["images"])
        assert got["input_ids"].tolist() != want["input_ids"].tolist()


def test_every_parameter_of_the_model_gets_a_finite_gradient(example, tokenizer, batches):
    torch.manual_seed(0)
    model = example.make_model(tokenizer)
    batch = batches[0]
    loss = model(**batch) / (batch["labels"] != -100).sum()
    loss.backward()
    assert loss.item() == pytest.approx(8.0, abs=0.5)  # ln of 2958 ids
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


@pytest.mark.slow
def test_example_runs_and_its_loss_falls():
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / "unsharded.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(losses) == 8
    assert max(losses[-2:]) < losses[0] - 1.0
