"""One core, one model: our loader beside datasets + the model's own processor + a DataLoader.

Both start from JPEG bytes and end with the tensors of `model(**batch)`, labels included: the peer
decodes the original with Pillow, renders and tokenizes the conversation, and resizes; the loader
reads pictures that the job stored at the family's size and tokens that it made. A third row reads
the same shards with pictures stored at their own size (`FAMILY=processor`). Rates are samples per
second of CPU of all processes, so that other work on the machine changes them little.

    python benchmarks/models.py [--family qwen2_vl] [--samples 96] [--size 1152x896]

The peer's torchvision back end is measured where torchvision is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

# Of the packages, not of this folder, whose files have the same names.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from loader import StreamingDataset, View, make_dataloader, model_view
from tests import model_folders

BATCH = 8
ANSWER = "A red ball lies on the grass in front of a white wall. " * 4
BOUNDS = {
    "qwen2_vl": {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280},
    "llava": {"size": 336},
    "internvl": {"size": 448},
    "gemma3": {"size": 896},
}
"""Sizes of real checkpoints, by arguments of `tests.model_folders`."""


def photo(number: int, size: tuple[int, int]) -> bytes:
    """Makes a JPEG with the detail of a photograph: smooth shapes and some noise."""
    rng = np.random.RandomState(number)
    small = Image.fromarray(rng.randint(0, 256, (24, 32, 3)).astype(np.uint8))
    levels = np.asarray(small.resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = np.clip(levels + rng.normal(0, 6, levels.shape).astype(np.int16), 0, 255)
    out = io.BytesIO()
    Image.fromarray(noisy.astype(np.uint8)).save(out, "jpeg", quality=90)
    return out.getvalue()


def cpu_s() -> float:
    """Sums the CPU time of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def rate(batches: Callable[[], Iterator[dict[str, Any]]], samples: int) -> float:
    """Measures samples per second of CPU, after one batch that warms up."""
    next(batches())
    start, done = cpu_s(), 0
    while done < samples:
        for batch in batches():
            done += len(batch["input_ids"])
    return done / (cpu_s() - start)


def build(folder: Path, rows: Path, name: str, model: Path, *options: str) -> str:
    """Builds the rows for a model."""
    command = [sys.executable, "-m", "preprocess", "shards", str(rows), "--model", str(model)]
    command += ["--out", str(folder / name), "--cache", str(folder / "cache"), *options]
    subprocess.run([*command, "--workers", "1", "--num-shards", "1"], check=True)
    return str(folder / name)


def ours(url: str, backend: str) -> Callable[[], Iterator[dict[str, Any]]]:
    """Gives passes of our loader, all in this thread."""
    dataset = StreamingDataset(url, view=View(model=model_view(url, backend=backend)), seed=1)  # type: ignore[arg-type]
    loader = make_dataloader(
        dataset, global_batch_size=BATCH, sequence_length=8192, decode_threads=0
    )
    return lambda: iter(loader)


def theirs(rows: list[dict[str, Any]], processor: Any) -> Callable[[], Iterator[dict[str, Any]]]:
    """Gives passes of `datasets`, the processor and a DataLoader in this process."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "answer": datasets.Value("string")})
    table = datasets.Dataset.from_list(
        [{"image": {"bytes": row["jpeg"], "path": None}, "answer": ANSWER} for row in rows],
        features=features,
    )

    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        chats = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": sample["image"].convert("RGB")},
                        {"type": "text", "text": "What is it?"},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": sample["answer"]}]},
            ]
            for sample in samples
        ]
        batch = processor.apply_chat_template(
            chats, tokenize=True, return_dict=True, return_tensors="pt", padding=True
        )
        # The least a user writes: everything but padding is learned.
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return {**batch, "labels": labels}

    loader: Any = torch.utils.data.DataLoader(
        table,  # type: ignore[arg-type]
        batch_size=BATCH,
        shuffle=True,
        collate_fn=collate,
    )
    return lambda: iter(loader)


def main() -> None:
    """Prints one table for a family."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=sorted(BOUNDS), default="qwen2_vl")
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--size", default="1152x896", help="width x height of the originals")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = tuple(map(int, options.size.split("x")))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write = getattr(model_folders, options.family)
        model = write(folder / "model", **BOUNDS[options.family])
        rows = [{"jpeg": photo(i, size)} for i in range(32)]  # type: ignore[arg-type]
        lines = []
        for i, row in enumerate(rows):
            (folder / f"{i}.jpg").write_bytes(row["jpeg"])
            turns = [("user", "What is it?"), ("assistant", ANSWER)]
            messages = [{"role": role, "content": text} for role, text in turns]
            lines.append(json.dumps({"messages": messages, "images": [f"{i}.jpg"]}))
        (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
        url = build(folder, folder / "rows.jsonl", "own", model)
        through = build(folder, folder / "rows.jsonl", "own-size", model, "--family", "processor")
        found = {
            "our loader, backend torchvision": rate(ours(url, "torchvision"), options.samples),
            "our loader, backend pil": rate(ours(url, "pil"), options.samples),
            "our loader, FAMILY=processor, pil": rate(ours(through, "pil"), options.samples),
        }
        own = model_folders.processor(options.family, folder / "model")
        found["datasets + processor, pil"] = rate(theirs(rows, own), options.samples)
        if importlib.util.find_spec("torchvision"):
            from transformers import AutoProcessor

            own = AutoProcessor.from_pretrained(str(model))
            found["datasets + processor, torchvision"] = rate(theirs(rows, own), options.samples)
    peer = found["datasets + processor, pil"]
    print(f"{options.family}, {options.size} JPEG, batches of {BATCH}, one thread")
    for title, value in found.items():
        print(f"  {title:36} {value:8.1f} samples per CPU second  {value / peer:6.2f} x")


if __name__ == "__main__":
    main()
