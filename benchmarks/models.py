"""One core, one model: our loader beside datasets + the model's own processor + a DataLoader.

Both start from JPEG bytes and end with the tensors of `model(**batch)`, labels included: the peer
decodes the original with Pillow, renders and tokenizes the conversation, and resizes; the loader
reads pictures that the job stored at the family's size, where that is smaller, and tokens that it
made. Both values are float32. Rates are samples per second of CPU of this process, in which both do
all their work: a peer with workers would have to send its batches as well. Contenders take turns,
a pass at a time, so that other work on the machine slows all of them; rates are medians.

    python benchmarks/models.py [--family qwen2_vl] [--rounds 7] [--size 1152x896]

Last come the times of a picture in this family's kernel, and of the steps that no kernel can do
without: decoding the stored picture, and writing as many bytes once.

The peer's torchvision back end is measured where torchvision is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

# Of the packages, not of this folder, whose files have the same names.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from loader import StreamingDataset, View, make_dataloader, model_view
from loader.assembly import unit_shape, write_units
from shardspec.families import plan_pictures
from shardspec.media import decode_stored, encode_stored
from tests import model_folders

BATCH = 8
ANSWER = "A red ball lies on the grass in front of a white wall. " * 4
GRIDS = [[height, width] for height in range(384, 2305, 384) for width in range(384, 2305, 384)]
QWEN2_VL_PIXELS = 28 * 28 * 1280
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "qwen2_vl": {"images": {"min_pixels": 56 * 56, "max_pixels": QWEN2_VL_PIXELS}},
    "llava": {
        "images": {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
        "vision": {"image_size": 336},
    },
    "gemma3": {
        "images": {"size": {"height": 896, "width": 896}},
        "vision": {"image_size": 896},
        "processor": {"image_seq_length": 256},
    },
    "internvl": {
        "images": {"size": {"height": 448, "width": 448}, "max_patches": 12},
        "vision": {"image_size": [448, 448]},
        "processor": {"image_seq_length": 256},
    },
    "llava_onevision": {
        "images": {"size": {"height": 384, "width": 384}, "image_grid_pinpoints": GRIDS},
        "vision": {"image_size": 384, "patch_size": 14},
        "processor": {"num_image_tokens": 729, "vision_aspect_ratio": "anyres_max_9"},
        "config": {"image_grid_pinpoints": GRIDS, "vision_aspect_ratio": "anyres_max_9"},
    },
    "idefics3": {
        "images": {
            "size": {"longest_edge": 4 * 364},
            "max_image_size": {"longest_edge": 364},
        },
        "vision": {"image_size": 364},
        "processor": {"image_seq_len": 169},
    },
}
"""Pictures of real checkpoints, as changes to the files of `tests.model_folders`."""

Passes: TypeAlias = Callable[[], Iterator[dict[str, Any]]]


def write_model(family: str, folder: Path, **images: int) -> Path:
    """Writes the folder of a tiny model that sees pictures of a real one's size."""
    settings = SETTINGS[family]
    getattr(model_folders, family)(folder)
    for name, changes in (
        ("config.json", settings.get("processor", {}) | settings.get("config", {})),
        ("preprocessor_config.json", settings["images"] | images),
        ("processor_config.json", settings.get("processor", {})),
    ):
        path = folder / name
        known = json.loads(path.read_text()) if path.exists() else {}
        if name == "config.json":
            known["vision_config"] |= settings.get("vision", {})
        path.write_text(json.dumps(known | changes))
    return folder


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


def rates(contenders: dict[str, Passes], rounds: int) -> dict[str, float]:
    """Measures samples per second of CPU: a pass of each in turn, after one that warms up."""
    found: dict[str, list[float]] = {title: [] for title in contenders}
    for number in range(rounds + 1):
        for title, batches in contenders.items():
            start = cpu_s()
            done = sum(len(batch["input_ids"]) for batch in batches())
            if number:
                found[title].append(done / (cpu_s() - start))
    return {title: statistics.median(each) for title, each in found.items()}


def build(folder: Path, rows: Path, name: str, model: Path, *options: str) -> str:
    """Builds the rows for a model."""
    command = [sys.executable, "-m", "preprocess", "shards", str(rows), "--model", str(model)]
    command += ["--out", str(folder / name), "--cache", str(folder / "cache"), *options]
    subprocess.run([*command, "--workers", "1", "--num-shards", "1"], check=True)
    return str(folder / name)


def ours(url: str, backend: str, **changes: int) -> Passes:
    """Gives passes of our loader, all in this thread."""
    model = model_view(url, backend=backend, **changes)  # type: ignore[arg-type]
    dataset = StreamingDataset(url, view=View(model=model), seed=1)
    loader = make_dataloader(
        dataset, global_batch_size=BATCH, sequence_length=8192, decode_threads=0
    )
    return lambda: iter(loader)


def theirs(rows: list[dict[str, Any]], processor: Any) -> Passes:
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


def budget(url: str, jpeg: bytes, size: tuple[int, int]) -> dict[str, float]:
    """Times what no loader can leave out for a picture, in milliseconds of CPU."""
    family = model_view(url).family
    width, height = size
    (plan,) = plan_pictures(family, [(height, width)])
    high, wide = family.stored_size((height, width))
    pixels = decode_stored(jpeg, codec="jpeg")
    if (high, wide) != (height, width):
        pixels = np.asarray(Image.fromarray(pixels).resize((wide, high), Image.Resampling.BICUBIC))
        jpeg = encode_stored(pixels, codec="jpeg")
    # As many as a batch has, so that none stays in the cache.
    shape = (plan.num_units, *unit_shape(family, [plan]))
    outs = itertools.cycle([np.zeros(shape, np.float32) for _ in range(BATCH)])
    decoded = np.empty_like(pixels)
    steps: dict[str, Callable[[], Any]] = {
        "decode the stored JPEG": lambda: decode_stored(jpeg, codec="jpeg", out=decoded),
        "kernel": lambda: write_units(family, plan, pixels, next(outs), backend="torchvision"),
        "of that, writing as many bytes once": lambda: next(outs).fill(1),
    }
    found = {}
    for title, step in steps.items():
        times = []
        for _ in range(3 * BATCH):
            start = time.thread_time()
            step()
            times.append(time.thread_time() - start)
        found[title] = 1000 * statistics.median(times)
    return found


def main() -> None:
    """Prints one table for a family."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=sorted(SETTINGS), default="qwen2_vl")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", default="1152x896", help="width x height of the originals")
    options = parser.parse_args()
    torch.set_num_threads(1)
    width, height = map(int, options.size.split("x"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_model(options.family, folder / "model")
        rows = [{"jpeg": photo(i, (width, height))} for i in range(32)]
        lines = []
        for i, row in enumerate(rows):
            (folder / f"{i}.jpg").write_bytes(row["jpeg"])
            turns = [("user", "What is it?"), ("assistant", ANSWER)]
            messages = [{"role": role, "content": text} for role, text in turns]
            lines.append(json.dumps({"messages": messages, "images": [f"{i}.jpg"]}))
        source = folder / "rows.jsonl"
        source.write_text("\n".join(lines) + "\n")
        own = build(folder, source, "own", model)
        raw = build(folder, source, "raw", model, "--codec", "raw")
        contenders = {
            "our loader, backend torchvision": ours(own, "torchvision"),
            "our loader, backend pil": ours(own, "pil"),
            "the same, CODEC=raw": ours(raw, "torchvision"),
        }
        if options.family == "qwen2_vl":  # the others store these pictures as they are
            larger = write_model("qwen2_vl", folder / "larger", max_pixels=width * height * 2)
            url = build(folder, source, "original", larger)
            pixels = {"max_pixels": QWEN2_VL_PIXELS}
            contenders["stored at its own size, torchvision"] = ours(url, "torchvision", **pixels)
            through = build(folder, source, "through", model, "--family", "processor")
            contenders["our loader, FAMILY=processor, pil"] = ours(through, "pil")
        kind, image_kind, settings = model_folders.PROCESSORS[options.family]
        settings = {**settings, **SETTINGS[options.family].get("processor", {})}
        model_folders.PROCESSORS[options.family] = (kind, image_kind, settings)
        processor = model_folders.processor(options.family, model)
        contenders["datasets + processor, pil"] = theirs(rows, processor)
        if importlib.util.find_spec("torchvision"):
            from transformers import AutoProcessor

            processor = AutoProcessor.from_pretrained(str(model))
            contenders["datasets + processor, torchvision"] = theirs(rows, processor)
        found = rates(contenders, options.rounds)
        steps = budget(own, rows[0]["jpeg"], (width, height))
    print(f"{options.family}, {options.size} JPEG, batches of {BATCH}, one thread")
    for title, value in found.items():
        ratios = [
            f"{value / peer:6.2f} x {backend}"
            for backend in ("pil", "torchvision")
            if (peer := found.get(f"datasets + processor, {backend}"))
        ]
        print(f"  {title:36} {value:8.1f} samples per CPU second  {'  '.join(ratios)}")
    for title, value in steps.items():
        print(f"  {title:36} {value:8.2f} ms")


if __name__ == "__main__":
    main()
