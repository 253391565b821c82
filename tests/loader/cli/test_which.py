"""`which` and `get`: what they print is what a loader of the same settings delivers."""

import json
import re
import tarfile

import numpy as np
import pytest
import torch

from loader import IterableDatasetMixture, StreamingDataset, View, make_dataloader
from loader.__main__ import main
from loader.cli.saved_state import find_state
from loader.cli.which import number_of_key, order_of
from shardspec.errors import ConfigError, StateError

NUM = 61
BATCH = 8


@pytest.fixture(scope="module")
def url(tiny_sample, write_dataset, tmp_path_factory):
    samples = [tiny_sample(i, num_images=1) for i in range(NUM)]
    return write_dataset(tmp_path_factory.mktemp("which") / "set", samples, num_shards=3)


def say(capsys, *args):
    code = main([str(arg) for arg in args])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out.splitlines()


def refusal(capsys, *args):
    assert main([str(arg) for arg in args]) != 0
    return capsys.readouterr().err


def make(url, *, batch=BATCH, rank=0, world_size=1, **options):
    dataset = StreamingDataset(url, seed=5, rank=rank, world_size=world_size, **options)
    return make_dataloader(
        dataset, global_batch_size=batch, sequence_length=64, workers=0, with_metadata=True
    )


def delivered(loader, steps):
    """Keys of the batches of a loader's next steps, over passes."""
    found = []
    while len(found) < steps:
        for batch in loader:
            found.append([entry["key"] for entry in batch["metadata"]])
            if len(found) == steps:
                break
    return found


def keys_of(lines):
    return [line.split()[-1] for line in lines[1:]]


@pytest.mark.parametrize("where", [None, "num_tokens > 8"])
def test_step_lists_what_a_loader_delivers_on_each_rank(where, url, capsys):
    flags = ["--seed", 5, "--global-batch", BATCH, "--ranks", 2]
    flags += [] if where is None else ["--where", where]
    batches = {
        rank: delivered(make(url, rank=rank, world_size=2, where=where), 12) for rank in (0, 1)
    }
    for step in (0, 7, 8, 11):  # the first epoch ends in step 7
        lines = say(capsys, "which", url, "--step", step, *flags)
        assert keys_of(lines) == batches[0][step] + batches[1][step]
        own = say(capsys, "which", url, "--step", step, *flags, "--rank", 1)
        assert keys_of(own) == batches[1][step]
        assert {line.split()[1] for line in own[1:]} == {"1"}


def test_key_lists_the_steps_that_deliver_it(url, capsys):
    batches = delivered(make(url), 24)
    for key in ("sample-0000", batches[7][0], batches[7][-1]):
        lines = say(capsys, "which", url, "--key", key, "--seed", 5, "--global-batch", BATCH)
        assert lines[0] == f"{key} is sample {int(key[-4:])} of the split train"
        found = [tuple(map(int, line.split())) for line in lines[2:]]
        assert [epoch for epoch, *_ in found] == [0, 1, 2]
        seen = {(step, position) for _, step, position, _ in found}
        assert {(s, row.index(key)) for s, row in enumerate(batches) if key in row} <= seen


@pytest.mark.parametrize("saved", ["json", "torch"])
def test_state_brings_the_settings_and_the_changes_of_its_run(saved, url, tmp_path, capsys):
    loader = make(url)
    before = delivered(loader, 3)
    loader.change(global_batch_size=16)
    state = loader.state_dict()
    after = delivered(loader, 4)
    path = tmp_path / "state"
    if saved == "json":
        path.write_text(json.dumps({"trainer": {"loader": state}}))
    else:
        torch.save({"model": torch.zeros(3), "loaders": [state]}, path)
    for step, keys in enumerate([*before, *after]):
        assert keys_of(say(capsys, "which", url, "--step", step, "--state", path)) == keys
    lines = say(capsys, "which", url, "--key", after[1][11], "--state", path, "--epochs", 1)
    assert [line.split() for line in lines[2:]] == [["0", "4", "11", "0"]]


def test_what_has_no_single_samples_or_is_of_other_data_is_refused(
    url, tiny_sample, write_dataset, tmp_path, capsys
):
    def refused(state, url=url):
        path = tmp_path / "state.json"
        path.write_text(json.dumps(state))
        return refusal(capsys, "which", url, "--step", 0, "--state", path)

    state = make(url).state_dict()
    assert "single samples" in refused({**state, "packing": {"max_tokens": 3}})
    mixture = IterableDatasetMixture([StreamingDataset(url, rank=0, world_size=1)], seed=5)
    mixed = make_dataloader(mixture, global_batch_size=BATCH, sequence_length=64).state_dict()
    assert "single samples" in refused(mixed)
    with pytest.raises(StateError) as caught:
        order_of(mixed, StreamingDataset(url, seed=5, rank=0, world_size=1))
    assert caught.value.reason == "which_state"
    # An evaluation numbers questions, of which a sample may have several.
    samples = [tiny_sample(i, num_branches=2) for i in range(BATCH)]
    pairs = write_dataset(tmp_path / "pairs", samples)
    asked = View(image=StreamingDataset(pairs).view.image, purpose="evaluation")
    assert "questions" in refused(make(pairs, view=asked, tail="pad").state_dict(), pairs)
    other = write_dataset(tmp_path / "other", [tiny_sample(i) for i in range(9)])
    assert "num_samples: 9 here, 61 asked" in refused(make(other).state_dict())
    message = refusal(capsys, "which", url, "--key", "nobody")
    assert "no sample of the split 'train' has the key 'nobody'" in message
    message = refusal(capsys, "which", url, "--step", 0, "--ranks", 3, "--global-batch", 8)
    assert "not a multiple of the ranks" in message
    assert "step" in refusal(capsys, "which", url, "--step", -1)


def test_key_that_no_sample_has_is_refused_by_get_too(url, tmp_path, capsys):
    stream = StreamingDataset(url, rank=0, world_size=1)
    with pytest.raises(ConfigError) as caught:
        number_of_key(stream, "nobody", split="train")
    assert caught.value.reason == "unknown_key"
    assert "'nobody'" in refusal(capsys, "get", url, "nobody", "--out", tmp_path / "files")
    assert not (tmp_path / "files").exists()


STATE = {"version": 2, "step": 3, "seed": 0, "data": {}, "order": {}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b"\x80\x02nothing",
        b"PK\x03\x04 cut",
        json.dumps({"step": 3}).encode(),
        json.dumps([STATE, {**STATE, "step": 4}]).encode(),
    ],
)
def test_file_without_one_state_is_refused(content, tmp_path):
    path = tmp_path / "state"
    path.write_bytes(content)
    with pytest.raises(StateError) as caught:
        find_state(str(path))
    assert caught.value.reason == "state_file"
    assert len(str(caught.value)) < 1000


def test_state_that_a_checkpoint_holds_twice_is_found(tmp_path):
    path = tmp_path / "state"
    path.write_text(json.dumps({"a": [STATE], "b": {"c": STATE}}))
    assert find_state(str(path)) == STATE


def test_get_writes_the_members_of_the_tar(url, tmp_path, capsys):
    folder = tmp_path / "files"
    lines = say(capsys, "get", url, "sample-0030", "--out", folder)
    assert re.match(r"sample 30 of the split train, .*\.tar sample sample-0030", lines[0])
    want = {}
    for number in range(3):
        with tarfile.open(f"{url}/train/tiny-train-{number:05d}-of-00003.tar") as tar:
            for member in tar:
                if member.name.startswith("sample-0030."):
                    want[member.name] = tar.extractfile(member).read()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == want
    assert len(lines) == 1 + len(want)
    tokens = next(line for line in lines if ".npy" in line)
    array = np.load(tokens.split("  ")[1].strip() if "bytes" not in tokens else tokens.split()[2])
    assert f"{array.dtype} {list(array.shape)}" in tokens


def test_folder_that_cannot_be_made_is_one_error(url, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "error=" in refusal(capsys, "get", url, "sample-0030", "--out", tmp_path / "file")
