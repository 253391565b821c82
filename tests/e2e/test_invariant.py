"""Shards change speed, never content.

With a lossless codec, what comes out of shards equals, bit for bit, what the unsharded path gives
for the same (seed, samples, epoch): every array, with augmentation on, in several epochs. The
number of a sample in its seed is its place in the stored order, so the unsharded rows are put in
that order first, by their keys.
"""

import io
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from loader import (
    Augment,
    DeterministicDataset,
    MMCollator,
    MolmoPreprocessor,
    StreamingDataset,
    View,
    make_dataloader,
)
from preprocess.datasets import get_dataset
from preprocess.job.job import JobSettings
from preprocess.job.pipeline import run_job
from preprocess.job.verify import verify
from preprocess.media.image import ImagePolicy
from preprocess.recipe import Preparer, Recipe
from preprocess.text import TextPolicy
from preprocess.text.tokens import load_tokenizer
from shardspec.errors import SampleError
from shardspec.keyed import dataset_seed
from shardspec.tiling import ImageView
from tests import inline

SEED = 7
EPOCHS = (0, 1)
BATCH_SIZE = 4
SMALL = {"size_px": 112, "patch_px": 14}
TILED = {
    **SMALL,
    "crop_mode": "overlap-and-resize-c2",
    "max_crops": 4,
    "margin_patches": (2, 2),
}
EXTRA_KEYS = ("position_ids", "subsegment_ids", "loss_weights")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is built, and how it is looked at."""

    image: ImagePolicy
    text: TextPolicy = field(default_factory=lambda: TextPolicy(num_variants=3))
    mode: str = "transcript_and_caption"
    source: str = "folder"
    augment: Augment = field(default_factory=Augment.standard)
    normalize: str | None = None
    sequence_length: int = 2048

    @property
    def recipe(self):
        return Recipe(text=self.text, image=self.image, seed=3)

    @property
    def view(self):
        return View(
            image=self.image.views[0],
            augment=self.augment,
            normalize=self.normalize,
            sequence_length=self.sequence_length,
        )


def stored(codec, *, headroom=1.0, max_side_px=None, keep="auto", **view):
    return ImagePolicy(
        views=(ImageView(**view),),
        codec=codec,
        headroom=headroom,
        max_side_px=max_side_px,
        keep=keep,
    )


LOSSLESS = {
    "png-stretch-role": Case(image=stored("png", **SMALL)),
    "raw-pad-chatml-captions": Case(
        image=stored("raw", **SMALL, fit="pad"),
        text=TextPolicy(message_format="chatml", num_variants=3),
        mode="captions",
    ),
    "webp-center-crop-bare-templates-transcripts": Case(
        image=stored("webp", **SMALL, fit="center-crop"),
        text=TextPolicy(message_format="none", prompt_templates="uber_model", num_variants=3),
        mode="transcripts",
    ),
    "png-headroom-style-transcript": Case(
        image=stored("png", headroom=1.5, **SMALL),
        text=TextPolicy(system_prompt="style", num_variants=1),
        mode="transcript",
        normalize="siglip",
    ),
    "raw-tiles-demo-transcript1_and_caption": Case(
        image=stored("raw", **TILED),
        text=TextPolicy(
            system_prompt="demo_or_style", prompt_templates="uber_model", num_variants=3
        ),
        mode="transcript1_and_caption",
    ),
    "webp-tiles-pad-per-crop-headroom": Case(
        image=stored("webp", headroom=1.5, **TILED, fit="pad", pooling="per-crop"),
        text=TextPolicy(
            system_prompt="none", prompt_templates="uber_model", message_format="chatml"
        ),
    ),
    # Without random crops: every picture shows its stored overview.
    "png-tiles-uncropped": Case(
        image=stored("png", **TILED),
        augment=Augment(flip_probability=0.5, brightness=0.2, contrast=0.2),
    ),
    "png-longest-side-cut-sequence": Case(
        image=stored("png", max_side_px=300, **SMALL), sequence_length=60
    ),
    "raw-default-view-generated": Case(image=stored("raw"), source="sample"),
}

# Everything that JPEG does not touch; and pictures that are stored as they came.
JPEG = {
    "jpeg-kept": Case(image=stored("jpeg", max_side_px=1024, **SMALL), source="jpegs"),
    "jpeg-encoded": Case(image=stored("jpeg", keep="never", **SMALL)),
}


class Silent:
    """A reporter for jobs that nobody watches."""

    def stage(self, name, total):
        pass

    def step(self, reason):
        pass

    def note(self, text):
        pass


def picture(i, width, height, channels=3):
    """Smooth colours with a little grain, as photographs have it."""
    rng = np.random.RandomState(i)
    coarse = rng.randint(0, 256, (5, 6, channels), np.uint8)
    planes = [Image.fromarray(plane).resize((width, height), 3) for plane in coarse.T]
    grain = rng.randint(-4, 5, (height, width, 1))
    pixels = np.stack([np.asarray(plane) for plane in planes], axis=-1) + grain
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).squeeze())


def encoded(image, kind, **settings):
    stream = io.BytesIO()
    image.save(stream, kind, **settings)
    return stream.getvalue()


def mixed_pictures():
    """Files of many kinds: formats, sizes on both sides of the view's, colours, orientation."""
    turned = Image.Exif()
    turned[0x0112] = 6
    return [
        encoded(picture(0, 320, 240), "JPEG", quality=90),
        encoded(picture(1, 150, 260), "PNG"),
        encoded(picture(2, 90, 70), "PNG"),
        encoded(picture(3, 517, 233), "WEBP", lossless=True),
        encoded(picture(4, 200, 200, channels=1), "JPEG"),
        encoded(picture(5, 133, 210, channels=4), "PNG"),
        encoded(picture(6, 240, 180), "JPEG", exif=turned),
        encoded(picture(7, 64, 640), "JPEG", progressive=True),
        encoded(picture(8, 112, 112), "PNG"),
        encoded(picture(9, 300, 301), "GIF"),
    ]


def row(i, image):
    """A PixMo-Cap row; even ones name a side, so that they must not be flipped."""
    place = " on the left" if i % 2 == 0 else ""
    return {
        "image": {"bytes": image, "path": None},
        "image_url": f"http://example.com/{i}",
        "caption": f"Picture {i}: a smooth field of colours{place}, café 你好. "
        + "And so on. " * i,
        "transcripts": [f"so, {n}, this is picture {i}{place}" for n in range(1 + i % 3)],
    }


@pytest.fixture(scope="module")
def sources(tmp_path_factory, write_parquet):
    """The sources by name."""
    jpegs = [encoded(picture(i, 320 - 20 * i, 200 + 9 * i), "JPEG", quality=90) for i in range(10)]
    folder = tmp_path_factory.mktemp("sources")
    pictures = {"folder": mixed_pictures(), "jpegs": jpegs}
    made = {
        name: str(write_parquet(folder / name, [row(i, image) for i, image in enumerate(images)]))
        for name, images in pictures.items()
    }
    return {**made, "sample": "sample"}


@dataclass(frozen=True, kw_only=True)
class Both:
    """The two paths to the same examples."""

    case: Case
    url: str
    stream: StreamingDataset
    unsharded: DeterministicDataset
    kept: list[bool]
    """Per sample of the unsharded path: its image is stored as it came."""


class InStoredOrder:
    """The rows of a dataset in another order."""

    def __init__(self, rows, items):
        self.rows, self.items = rows, items

    def __len__(self):
        return len(self.items)

    def get(self, item, rng):
        return self.rows.get(self.items[item], rng)


def build(case, source, folder, *, limit=None):
    """Runs the job of a case; its shards are in `folder / "shards"`."""
    settings = JobSettings(
        dataset="pixmo_cap",
        out=str(folder / "shards"),
        source=source,
        mode=case.mode,
        limit=limit,
        recipe=case.recipe,
        num_shards=2,
        cache=str(folder / "cache"),
    )
    with inline.jobs():
        return run_job(settings, Silent())


def open_both(case, sources, folder):
    source, url = sources[case.source], str(folder / "shards")
    limit = 5 if case.source == "sample" else None
    build(case, source, folder, limit=limit)
    stream = StreamingDataset(url, seed=SEED, view=case.view)

    tokenizer = load_tokenizer()
    rows = get_dataset("pixmo_cap", source=source, mode=case.mode, limit=limit)
    prepare = Preparer(recipe=case.recipe, tokenizer=tokenizer)
    prepared = [prepare(rows.get(item)) for item in range(len(rows))]
    item_of = {sample.key: item for item, sample in enumerate(prepared)}
    items = [item_of[stream.reader.read(number).key] for number in range(stream.num_samples)]
    assert sorted(items) == list(range(len(rows)))
    unsharded = DeterministicDataset(
        InStoredOrder(rows, items),
        MolmoPreprocessor(prepare, special_ids=tokenizer.special_ids, view=case.view),
        seed=dataset_seed(SEED, "pixmo_cap"),
    )
    kept = [prepared[item].images[0].kept is not None for item in items]
    return Both(case=case, url=url, stream=stream, unsharded=unsharded, kept=kept)


def case_fixture(cases):
    @pytest.fixture(scope="module", params=cases)
    def opened(request, sources, tmp_path_factory):
        return open_both(cases[request.param], sources, tmp_path_factory.mktemp("case"))

    return opened


lossless = case_fixture(LOSSLESS)
jpeg = case_fixture(JPEG)


def assert_same_example(got, want, *, but=()):
    """Compares all arrays by their bytes, except those named."""
    want = {**want, "metadata": dict(want["metadata"])}
    assert want["metadata"].pop("valid")
    assert got["metadata"] == want["metadata"]
    assert got.keys() == want.keys()
    for name in got.keys() - {"metadata", *but}:
        assert got[name].dtype == want[name].dtype, name
        assert got[name].shape == want[name].shape, name
        assert got[name].tobytes() == want[name].tobytes(), name


def test_examples_from_lossless_shards_equal_the_unsharded_ones(lossless):
    numbers = range(lossless.stream.num_samples)
    for number in numbers:
        for epoch in EPOCHS:
            want = lossless.unsharded.get(number, epoch=epoch)
            assert_same_example(lossless.stream.example(number, epoch=epoch), want)


def test_tiled_pictures_are_stored_with_their_overviews(lossless):
    tiled = lossless.case.image.views[0].crop_mode != "resize"
    reader = lossless.stream.reader
    for number in range(len(reader)):
        (image,) = reader.read(number).images
        assert (image.overview is not None) == tiled
    assert verify(lossless.url, Silent(), deep=True) == []


def test_augmentation_changes_what_is_compared(lossless):
    """Without this the test above might compare pictures that nothing was done to."""
    changed = [
        not np.array_equal(*(lossless.unsharded.get(n, epoch=e)["images"] for e in EPOCHS))
        for n in range(len(lossless.unsharded))
    ]
    assert all(changed)


def by_make_dataloader(both):
    """Two epochs of batches from `make_dataloader`."""
    loader = make_dataloader(
        both.stream,
        global_batch_size=BATCH_SIZE,
        sequence_length=both.case.sequence_length,
        extra_keys=EXTRA_KEYS,
        with_metadata=True,
    )
    for epoch in EPOCHS:
        assert loader.epoch == epoch
        yield from loader


def by_torch_dataloader(both):
    """Two epochs of batches from a StreamingDataset under torch's DataLoader."""
    dataset = StreamingDataset(both.url, seed=SEED, view=both.case.view, batch_size=BATCH_SIZE)
    for epoch in EPOCHS:
        dataset.set_epoch(epoch)
        yield from DataLoader(dataset, batch_size=BATCH_SIZE, collate_fn=collator(both))


def collator(both):
    view = both.case.view.image
    return MMCollator(
        sequence_length=both.case.sequence_length,
        pad_token_id=load_tokenizer().special_ids["pad"],
        image_shape=(3, view.size_px, view.size_px),
        num_patches=view.num_patches,
        extra_keys=EXTRA_KEYS,
        with_metadata=True,
    )


@pytest.mark.parametrize("batches_of", [by_make_dataloader, by_torch_dataloader])
def test_batches_from_lossless_shards_equal_the_unsharded_ones(lossless, batches_of):
    """Which samples stand in a batch is read from its metadata; all else must follow from that."""
    unsharded, collate = lossless.unsharded, collator(lossless)
    number_of = {unsharded[n]["metadata"]["key"]: n for n in range(len(unsharded))}
    seen = Counter()
    for got in batches_of(lossless):
        examples = []
        for metadata in got["metadata"]:
            number = number_of[metadata["key"]]
            # Each epoch has every sample once: how often it came before is its epoch.
            examples.append(unsharded.get(number, epoch=seen[number]))
            seen[number] += 1
        want = collate(examples)
        assert got.keys() == want.keys()
        for name in got.keys() - {"metadata"}:
            assert got[name].dtype == want[name].dtype, name
            assert torch.equal(got[name], want[name]), name
    # Every sample once per epoch; the last batch of the second one holds the start of the third.
    total = 2 * len(unsharded)
    assert sum(seen.values()) == -(-total // BATCH_SIZE) * BATCH_SIZE
    assert set(seen) == set(range(len(unsharded)))
    assert min(seen.values()) == 2


def test_jpeg_touches_pixels_only_and_only_where_they_are_encoded_again(jpeg):
    worst_db = np.inf
    for number in range(jpeg.stream.num_samples):
        for epoch in EPOCHS:
            got = jpeg.stream.example(number, epoch=epoch)
            want = jpeg.unsharded.get(number, epoch=epoch)
            assert_same_example(got, want, but=() if jpeg.kept[number] else ("images",))
            difference = got["images"].astype(np.float64) - want["images"]
            error = np.mean(difference**2)
            worst_db = min(worst_db, 10 * np.log10(255**2 / max(error, 1e-9)))
    if jpeg.case.image.keep == "auto":
        assert all(jpeg.kept)
    else:
        assert not any(jpeg.kept)
        assert 35 < worst_db < 60, worst_db


def test_row_without_a_message_in_its_mode_is_refused_by_both_paths(tmp_path, write_parquet):
    """Stored, it would stop every training run that meets it: there is nothing to learn."""
    rows = [row(i, image) for i, image in enumerate(mixed_pictures()[:3])]
    rows[1]["transcripts"] = []
    source = str(write_parquet(tmp_path / "source", rows))
    case = Case(image=stored("png", **SMALL), mode="transcripts")
    outcome = build(case, source, tmp_path)
    assert outcome.result.split.quarantined == {"no_message": 1}
    assert StreamingDataset(str(tmp_path / "shards")).num_samples == 2

    unsharded = get_dataset("pixmo_cap", source=source, mode="transcripts")
    prepare = Preparer(recipe=case.recipe, tokenizer=load_tokenizer())
    with pytest.raises(SampleError) as caught:
        prepare(unsharded.get(1))
    assert caught.value.reason == "no_message"
