"""The datasets that loaders are measured on, built by the job itself.

* W1: one crop of 336 px per sample, JPEG quality 95;
* W2: Molmo's tiling, crops of 378 px, at most 8 and the overview, JPEG;
* W3: W1 with the raw codec;
* W4: text alone, instruction following;
* W5: clips of 16 frames of 336 px, as 16 JPEG members of one sample.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.job import PICTURES, TILED, Silent, draw, write_source
from loader import (
    DeterministicDataset,
    MMCollator,
    MolmoPreprocessor,
    StreamingDataset,
    View,
    make_dataloader,
)
from loader.assembly import view_collator
from loader.dataloader import StreamLoader
from preprocess.datasets import get_dataset
from preprocess.job.job import JobSettings
from preprocess.job.pipeline import run_job
from preprocess.media.image import ImagePolicy
from preprocess.recipe import Preparer, Recipe
from preprocess.synthetic.scenes import make_scene
from preprocess.text.tokens import load_tokenizer
from shardspec.index import encode_index, index_dtype, index_row
from shardspec.manifest import ShardEntry, load_manifest
from shardspec.media import encode_stored
from shardspec.sample import Geometry, PreparedImage, PreparedSample, sample_members, spans_table
from shardspec.tar import TarWriter
from shardspec.tiling import ImageView

SEQUENCE_LENGTH = 4096
FRAMES = 16


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A dataset on disk and how it is batched."""

    name: str
    url: str
    batch: int
    dataset: str = "pixmo_cap"
    source: str = ""
    """Where its rows come from; "" where it was not built from a source."""
    view: ImageView = field(default_factory=ImageView)

    def loader(self, **options: int) -> StreamLoader:
        """Opens it with the same order each time."""
        dataset = StreamingDataset(self.url, seed=1, rank=0, world_size=1)
        return make_dataloader(
            dataset, global_batch_size=self.batch, sequence_length=SEQUENCE_LENGTH, **options
        )


def unsharded(workload: Workload) -> tuple[DeterministicDataset, MMCollator]:
    """Gives the path without shards over a workload's rows: a map-style dataset and its collator.

    Each picture is decoded, resized and tiled from its source and each text formatted and tokenized
    whenever a sample is asked for.
    """
    tokenizer = load_tokenizer()
    recipe = Recipe(image=ImagePolicy(views=(workload.view,)))
    view = View(image=workload.view, sequence_length=SEQUENCE_LENGTH)
    preprocess = MolmoPreprocessor(
        Preparer(recipe=recipe, tokenizer=tokenizer), special_ids=tokenizer.special_ids, view=view
    )
    rows = get_dataset(workload.dataset, source=workload.source)
    collator = view_collator(view, sequence_length=SEQUENCE_LENGTH)
    return DeterministicDataset(rows, preprocess, seed=1), collator


def single_crops(folder: Path, *, rows: int, raw: bool = False) -> Workload:
    """Builds W1, or W3 with the same pictures."""
    view, files = ImageView(), []
    for i in range(PICTURES):
        picture = Image.fromarray(make_scene(1, i).pixels)
        small = picture.resize((view.size_px, view.size_px), Image.Resampling.LANCZOS)
        files.append(encode_stored(np.asarray(small), codec="jpeg", quality=95))
    settings = write_source(folder, files, rows=rows, view=view)
    policy = ImagePolicy(views=(view,), codec="raw" if raw else "jpeg")
    run_job(replace(settings, recipe=Recipe(image=policy)), Silent())
    name = "W3" if raw else "W1"
    return Workload(name=name, url=settings.out, batch=32, source=settings.source)


def tiles(folder: Path, *, rows: int) -> Workload:
    """Builds W2 from pictures of 1280 px."""
    settings = write_source(folder, draw(1280), rows=rows, view=TILED)
    run_job(settings, Silent())
    return Workload(name="W2", url=settings.out, batch=16, source=settings.source, view=TILED)


def texts(folder: Path, *, rows: int) -> Workload:
    """Builds W4 from generated rows."""
    settings = JobSettings(
        dataset="text_sft",
        out=str(folder / "out"),
        source="sample",
        cache=str(folder / "cache"),
        limit=rows,
        num_shards=4,
    )
    run_job(settings, Silent())
    return Workload(
        name="W4", url=settings.out, batch=32, dataset="text_sft", source=settings.source
    )


def clips(folder: Path, *, rows: int, like: Workload) -> Workload:
    """Writes W5: the pictures of `like` in 16 frames a sample, with a caption's tokens."""
    reader = StreamingDataset(like.url, rank=0, world_size=1).reader
    source = load_manifest(like.url)
    assert source is not None
    view = ImageView()
    out = folder / "out"
    (out / "train").mkdir(parents=True)
    url = "train/clips-train-00000-of-00001.tar"
    table = []
    blank = np.zeros((view.size_px, view.size_px, 3), np.uint8)
    with (out / url).open("wb") as stream:
        writer = TarWriter(stream)
        for i in range(rows):
            frames = [reader.stored((i * 7 + f) % len(reader)) for f in range(FRAMES)]
            images = [
                PreparedImage(
                    pixels=blank, source_width=336, source_height=336, geometry=Geometry.ALL
                )
                for _ in frames
            ]
            text = frames[0].spans[0].tolist()
            tokens = np.array(frames[0].tokens)
            sample = PreparedSample(
                key=f"clip-{i:06d}",
                tokens=tokens,
                spans=spans_table([(0, 0, *text[3:])], images),
                images=tuple(images),
                record={"key": f"clip-{i:06d}"},
            )
            encoded = [bytes(frame.pictures[0].payload) for frame in frames]
            members = sample_members(sample, encoded, codec="jpeg", several=True)
            place = writer.write_sample(members)
            table.append(
                index_row(
                    sample,
                    place=place,
                    json_bytes=len(members[0][1]),
                    image_sizes=[len(payload) for payload in encoded],
                    views=(view,),
                )
            )
        sha256 = writer.finish()
    rows_table = np.concatenate(table or [np.zeros(0, index_dtype(1))])
    index = encode_index(rows_table)
    totals = {
        name: int(rows_table[name].sum())
        for name in ("num_images", "num_tokens", "num_loss_tokens")
    }
    entry = ShardEntry(
        url=url,
        split="train",
        nsamples=rows,
        num_bytes=writer.num_bytes,
        sha256=sha256,
        index_bytes=len(index),
        index_sha256=hashlib.sha256(index).hexdigest(),
        **totals,
    )
    (out / entry.index_url).write_bytes(index)
    split = replace(
        source.splits["train"],
        num_samples=rows,
        quarantined={},
        num_bytes=writer.num_bytes,
        **totals,
    )
    manifest = replace(source, dataset="clips", splits={"train": split}, shards=(entry,))
    (out / "manifest.json").write_bytes(manifest.encode())
    return Workload(name="W5", url=str(out), batch=4)
