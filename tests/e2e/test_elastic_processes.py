"""Global batches of real processes under torchrun, stopped and resumed on other numbers of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import programs

ROOT = Path(__file__).parents[2]

PROGRAM = """
import hashlib, itertools, json, sys
import torch
import torch.distributed as dist
from loader import IterableDatasetMixture, StreamingDataset, make_dataloader

torch.set_num_threads(1)
dist.init_process_group("gloo")
kind, count, old, out, *urls = sys.argv[1:]
if kind == "mixture":
    source = IterableDatasetMixture([StreamingDataset(url) for url in urls], seed=3, by="root_size")
else:
    source = StreamingDataset(urls[0], seed=3)
loader = make_dataloader(
    source, global_batch_size=8, sequence_length=64, pad_mode="max_len", with_metadata=True,
    extra_keys=("position_ids", "loss_weights"), pack=kind == "packed", balance=kind != "packed",
)
if old:
    loader.load_state_dict(json.load(open(old)))
batches = []
while len(batches) < int(count):
    batches += itertools.islice(loader, int(count) - len(batches))

def row(batch, i):
    digest = hashlib.sha256()
    for name in ("input_ids", "labels", "position_ids", "loss_weights"):
        digest.update(batch[name][i].numpy().tobytes())
    return batch["metadata"][i]["key"] + ":" + digest.hexdigest()

mine = [[row(batch, i) for i in range(len(batch["input_ids"]))] for batch in batches]
everyone = [None] * dist.get_world_size()
dist.all_gather_object(everyone, mine)
states = [None] * dist.get_world_size()
dist.all_gather_object(states, loader.state_dict())
if dist.get_rank() == 0:
    if kind != "packed":
        assert all(state == states[0] for state in states)
    joined = [sum(parts, []) for parts in zip(*everyone, strict=True)]
    json.dump({"batches": joined, "state": states[0]}, open(out, "w"))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def urls(tiny_sample, write_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    sizes = {"large": 61, "middle": 17, "small": 3}
    return [
        write_dataset(
            folder / name,
            [tiny_sample(100 * n + i, num_images=i % 2) for i in range(size)],
            num_shards=min(3, size),
            several=True,
            name=name,
        )
        for n, (name, size) in enumerate(sizes.items())
    ]


def torchrun(tmp_path, kind, urls, *, processes, count, state=None):
    program, out, old = tmp_path / "program.py", tmp_path / "out.json", ""
    program.write_text(PROGRAM)
    if state is not None:
        old = tmp_path / "state.json"
        old.write_text(json.dumps(state))
    done = subprocess.run(
        [
            *(sys.executable, *programs.torchrun(processes), str(program)),
            *(kind, str(count), str(old), str(out), *urls),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    return found["batches"], found["state"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["one", "mixture", "packed"])
def test_processes_of_any_number_give_the_same_global_batches_and_resume_each_other(
    kind, urls, tmp_path
):
    want, _ = torchrun(tmp_path, kind, urls, processes=1, count=9)
    for processes in (2, 4):
        got, _ = torchrun(tmp_path, kind, urls, processes=processes, count=9)
        assert got == want
    # Over the end of the first epoch, and resumed twice.
    state, start = None, 0
    for processes in (4, 1, 2):
        got, state = torchrun(tmp_path, kind, urls, processes=processes, count=3, state=state)
        assert got == want[start : start + 3]
        start += 3
