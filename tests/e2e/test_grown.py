"""A dataset that grows while models train on it: real processes that are killed, and the loader."""

import hashlib
import json

import numpy as np
import pytest

from loader import StreamingDataset, make_dataloader
from shardspec.errors import StateError

pytestmark = pytest.mark.slow
"""Everyday siblings are in tests/preprocess/job/test_generations.py and tests/loader."""


def job(folder, out):
    source = folder / "rows.jsonl"
    return (
        *("shards", source, "--source", source, "--out", out, "--cache", folder / "cache"),
        *("--num-shards", 3, "--variants", 1, "--workers", 2, "--new-rows", "append"),
    )


def write(folder, number):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{i}?"},
                {"role": "assistant", "content": f"{i}"},
            ]
        }
        for i in range(number)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def sha256(out):
    return hashlib.sha256((out / "manifest.json").read_bytes()).hexdigest()


def texts(out, **more):
    """Loads an epoch, and tells the first tokens of its rows."""
    dataset = StreamingDataset(str(out), seed=3, **more)
    return dataset, make_dataloader(dataset, global_batch_size=4, sequence_length=64)


def test_a_generation_that_is_killed_ends_in_the_same_bytes_and_training_continues(
    cli, inline_cli, tmp_path
):
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    for number in (24, 36):
        write(tmp_path, number)
        inline_cli.good(*job(tmp_path, undisturbed))
    write(tmp_path, 24)
    inline_cli.good(*job(tmp_path, out))
    before = sha256(out)
    _, loader = texts(out)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    want = [batch["input_ids"].numpy().copy() for batch in batches]

    write(tmp_path, 36)
    receipts = out / "receipts"
    for seen in (
        lambda: (out / ".lease").exists(),
        lambda: (out / "plan" / "train" / "plan.json").exists(),
        lambda: any("-g00001-" in path.name for path in receipts.iterdir()),
    ):
        running = cli.start(*job(tmp_path, out))
        running.wait_until(seen)
        running.close()
        assert sha256(out) in (before, sha256(undisturbed))
    cli.good(*job(tmp_path, out))
    assert sha256(out) == sha256(undisturbed) != before

    _, loader = texts(out)
    with pytest.raises(StateError) as caught:
        loader.load_state_dict(state)
    assert caught.value.reason == "state_appended"
    _, loader = texts(out, max_samples=24)
    loader.load_state_dict(state)
    found = [batch["input_ids"].numpy() for batch in loader]
    assert all(map(np.array_equal, found, want))
    assert len(found) == len(want)
    dataset, loader = texts(out)
    loader.load_state_dict(state, allow=("appended",))
    assert (len(dataset), len([*loader]), len([*loader])) == (36, 5, 9)
