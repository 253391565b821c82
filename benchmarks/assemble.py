"""Measures `assemble`, pixels already decoded, beside the copying that it cannot avoid.

    python benchmarks/assemble.py

The view has crops of 378 px, at most 8 and the overview. Pictures of 2048 px fill the canvases that
their crops are cut from; of those of 1280 px some are enlarged first, which no copy compares with.
Per picture, on one core:

* copy: as many bytes as its crops have, from one warm buffer into another;
* copy of its crops: its own, cut before, into one warm buffer: like the stored pictures they have
  left the second-level cache since they were made;
* copy into the batch: the same into its place in a batch whose memory is used again (two batches of
  16 take turns), which is the least that training can do with crops that it has;
* cut: the crops copied out of the stored pictures by NumPy, into one warm buffer, where nothing is
  enlarged: what `assemble` cannot avoid, as it begins with pictures;
* as the loader does: draws, token layout, the text's arrays, and crops into their place there;
* assemble: the same into new arrays, as users of single examples have it;
* unsharded path: prepare (decode, resize, format, tokenize) and assemble, as `MolmoPreprocessor`.

Ratios are of processor time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.job import TILED, draw, machine, paired, row
from loader.assembly.assemble import assemble
from loader.assembly.draft import Draft
from loader.assembly.layout import TokenIds
from loader.assembly.pixels import render
from loader.assembly.planner import Planner
from loader.assembly.view import View
from loader.buffers import Scratch
from preprocess.media.image import ImagePolicy
from preprocess.recipe import Preparer, Recipe
from preprocess.synthetic.scenes import plan_scene
from preprocess.text.tokens import load_tokenizer
from shardspec.sample import PreparedImage, PreparedSample
from shardspec.tiling import canvas_size, num_crops, select_tiling

BATCH = 16
ROUNDS = 9


def main() -> None:
    torch.set_num_threads(1)
    print(f"{machine()}\n")
    for side_px in (2048, 1280):
        measure(side_px)


def measure(side_px: int) -> None:
    """Prints the table of pictures whose longer side is `side_px`."""
    tokenizer = load_tokenizer()
    prepare = Preparer(recipe=Recipe(image=ImagePolicy(views=(TILED,))), tokenizer=tokenizer)
    examples = [
        {"image": payload, "message_list": messages(i)} for i, payload in enumerate(draw(side_px))
    ]
    samples = [decoded(prepare(example)) for example in examples]
    images = [sample.images[0] for sample in samples]
    counts = [num_crops(image.source_width, image.source_height, TILED) for image in images]
    view, ids = View(image=TILED), TokenIds.from_special_ids(tokenizer.special_ids)
    rng = np.random.RandomState(0)
    side = TILED.size_px
    source = np.ones((max(counts), side, side, 3), np.uint8)
    target = np.ones_like(source)
    own = [rendered(image) for image in images]
    overviews = [crops[0].copy() for crops in own]
    batches = np.ones((2, BATCH, max(counts), side, side, 3), np.uint8)

    def copy() -> None:
        for count in counts:
            np.copyto(target[:count], source[:count])

    def copy_own() -> None:
        for crops in own:
            np.copyto(target[: len(crops)], crops)

    def copy_to_batch() -> None:
        for i, crops in enumerate(own):
            np.copyto(batches[i // BATCH % 2, i % BATCH, : len(crops)], crops)

    def cut() -> None:
        for image, small in zip(images, overviews, strict=True):
            np.copyto(target[0], small)
            rows, cols = select_tiling(image.source_width, image.source_height, TILED)
            for tile in range(rows * cols):
                y, x = (TILED.window_px * at for at in divmod(tile, cols))
                np.copyto(target[1 + tile], image.pixels[y : y + side, x : x + side])

    scratch, planner = Scratch(), Planner(view, ids)

    def in_place() -> None:
        for i, sample in enumerate(samples):
            rng.seed(i)
            plan = planner.plan(sample.tokens, sample.spans, rng, key=sample.key)
            sources = [(image.pixels, image.overview) for image in sample.images]
            draft = Draft(plan, sources, view=view, key=sample.key, scratch=scratch)
            for name in ("input_ids", "labels"):
                plan.sequence.array(name)
            row = batches[i // BATCH % 2, i % BATCH]
            draft.write_images(row[: plan.num_crops].transpose(0, 3, 1, 2))

    def alone() -> None:
        for i, sample in enumerate(samples):
            rng.seed(i)
            assemble(sample, rng, view=view, ids=ids)

    def unsharded() -> None:
        for i, example in enumerate(examples):
            rng.seed(i)
            assemble(prepare(example), rng, view=view, ids=ids)

    functions: dict[str, Callable[[], None]] = {
        "copy": copy,
        "copy of its crops": copy_own,
        "copy into the batch": copy_to_batch,
        "as the loader does": in_place,
        "assemble": alone,
    }
    if all(image.pixels.shape[1::-1] == canvas(image) for image in images):
        functions["cut"] = cut
    else:
        functions["unsharded path"] = unsharded
    times = paired(functions, rounds=ROUNDS)
    print(
        f"{side_px} px: {np.mean(counts):.1f} crops a picture, "
        f"{np.mean(counts) * side * side * 3 / 1e6:.1f} MB"
    )
    limits = {"copy": "copy", "copy of its crops": "its crops", "copy into the batch": "batch"}
    limits |= {"cut": "cut"} if "cut" in times else {}
    row("", "CPU, ms", *(f"to {short}" for short in limits.values()))
    for name, (_, cpu) in times.items():
        row(
            name,
            f"{1e3 * np.median(cpu) / len(samples):.2f}",
            *(f"{np.median(times[limit].cpu / cpu):.2f}" for limit in limits),
        )
    print()


def messages(i: int) -> list[dict[str, object]]:
    """The texts of a scene, as PixMo-Cap has them."""
    scene = plan_scene(1, i)
    return [
        {"style": "long_caption", "text": scene.caption},
        {"style": "transcript", "alternatives": list(scene.transcripts)},
    ]


def decoded(sample: PreparedSample) -> PreparedSample:
    """Gives a sample as a shard's reader does: its pixels in arrays of their own."""
    images = tuple(
        replace(
            image,
            pixels=image.pixels.copy(),
            overview=None if image.overview is None else image.overview.copy(),
        )
        for image in sample.images
    )
    return replace(sample, images=images)


def canvas(image: PreparedImage) -> tuple[int, int]:
    """Gives the (width, height) that a picture is cut at, in pixels."""
    return canvas_size(image.source_width, image.source_height, TILED)


def rendered(image: PreparedImage) -> np.ndarray:
    """Cuts the crops of a picture: uint8 [n, S, S, 3]."""
    return render(
        image.pixels,
        source_width=image.source_width,
        source_height=image.source_height,
        view=TILED,
        overview=image.overview,
    )


if __name__ == "__main__":
    argparse.ArgumentParser().parse_args()  # it has none
    main()
