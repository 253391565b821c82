"""Large clips: of their files no more is read than an example needs, and nothing unverified."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from loader import StreamingDataset, View, make_dataloader
from preprocess.datasets import get_dataset
from preprocess.job import JobSettings, run_job, verify
from preprocess.media import ImagePolicy, VideoPolicy
from preprocess.recipe import Preparer, Recipe
from preprocess.reshard import ReshardSettings, plan_reshard, reshard
from preprocess.text import TextPolicy, load_tokenizer
from shardspec import storage
from shardspec.errors import ShardError
from shardspec.index import open_index
from shardspec.manifest import require_manifest
from shardspec.sample import sample_members
from shardspec.tiling import FrameView
from tests import inline
from tests.e2e.test_video import (
    MIXED,
    SMALL,
    assert_equal_examples,
    in_stored_order,
    mixed_batches,
)
from tests.fault_proxy import FaultProxy
from tests.shardspec.video.test_parts import PART, noisy_clip

pytest.importorskip("av")

RECIPE = Recipe(
    text=TextPolicy(num_variants=1),
    image=ImagePolicy(views=(SMALL,), codec="png"),
    video=VideoPolicy(max_frames=2, store="clip"),
)
VIEW = View(image=SMALL, frames=FrameView(), image_map="pooling")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A clip of more than half a megabyte, and rows about it and about two of it."""
    folder = tmp_path_factory.mktemp("long")
    (folder / "a.mp4").write_bytes(noisy_clip(200, 10, bf=0))
    asked = {"question": "What is it?", "answer": "noise"}
    rows = [
        {"video": "a.mp4", **asked},
        {"video": ["a.mp4", "a.mp4"], **asked},
        {"video": "a.mp4", "start": 4, "end": 4.2, **asked},
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(folder / "rows.jsonl")


def build(rows, folder):
    settings = JobSettings(
        dataset=rows, out=str(folder / "shards"), cache=str(folder / "cache"), recipe=RECIPE
    )
    with mock.patch("shardspec.video.parts.PART_BYTES", PART), inline.jobs():
        run_job(settings, inline.Quiet())
    return settings.out


@pytest.fixture(scope="module")
def built(rows, tmp_path_factory):
    return build(rows, tmp_path_factory.mktemp("parts"))


@pytest.fixture(autouse=True)
def small_is_large():
    with mock.patch("loader.reading.parted.LEAST_BYTES", 4 * PART):
        yield


def index_of(url):
    (file,) = require_manifest(url).files
    path = storage.local_path(storage.resolve_place(url, file.index_url))
    return open_index(str(path), num_samples=file.nsamples, shard_bytes=file.num_bytes)


def examples_of(url, *, epochs=2, **options):
    stream = StreamingDataset(url, seed=5, view=VIEW, **options)
    return [stream.example(i, epoch=epoch) for i in range(3) for epoch in range(epochs)]


def assert_same_examples(got, want):
    for a, b in zip(got, want, strict=True):
        assert a["metadata"] == b["metadata"]
        assert np.array_equal(a["input_ids"], b["input_ids"])
        assert np.array_equal(a["images"], b["images"])


def test_examples_are_those_of_whole_clips(built):
    index = index_of(built)
    files = np.sort(index["num_bytes"] - index["head_bytes"])
    # The clip of less than half a second is read as a whole.
    assert files[0] < 4 * PART < files[1]
    got = examples_of(built)
    with mock.patch("loader.reading.parted.LEAST_BYTES", 1 << 40):
        assert_same_examples(got, examples_of(built))


@pytest.mark.slow
def test_examples_of_parts_equal_the_unsharded_ones(rows, built):
    prepare = Preparer(recipe=RECIPE, tokenizer=load_tokenizer())
    unsharded = in_stored_order(get_dataset(rows), built, prepare)
    assert_equal_examples(built, unsharded, VIEW, prepare.tokenizer.special_ids)
    assert not verify(built, inline.Quiet(), deep=True)


def loader_of(url, *, rank=0, world_size=1, decode_threads=2, **options):
    dataset = StreamingDataset(
        url, seed=5, view=VIEW, rank=rank, world_size=world_size, canonical_ranks=1, **options
    )
    loader = make_dataloader(
        dataset,
        global_batch_size=2,
        sequence_length=384,
        pad_mode="max_len",
        max_images=4,
        decode_threads=decode_threads,
        with_metadata=True,
    )
    return dataset, loader


def batches_of(url, num_epochs=1, **options):
    _, loader = loader_of(url, **options)
    return [batch for _ in range(num_epochs) for batch in loader]


def pixels_of(batch):
    return batch["images"][batch["images"].flatten(2).bool().any(2)]


def assert_same(got, want):
    assert [one["metadata"] for one in got] == [one["metadata"] for one in want]
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a["input_ids"], b["input_ids"])
        assert torch.equal(a["images"], b["images"])


@pytest.fixture
def stored(built, s3_server):
    """The dataset in a store, and a proxy that sees what is read of it."""
    url = s3_server.make_bucket() + "/set"
    s3_server.client().put(built, url, recursive=True)
    with FaultProxy(s3_server.endpoint, seed=6) as proxy, proxy.entered(s3_server):
        yield url, proxy


def fetched_bytes(proxy):
    return sum(get.stop - get.start for get in proxy.gets if ".tar" in get.path)


def test_parts_are_fetched_from_a_store(built, stored):
    url, proxy = stored
    number = int(np.argmax(index_of(built)["num_bytes"]))
    got, want = (StreamingDataset(one, seed=5, view=VIEW).example(number) for one in (url, built))
    assert_same_examples([got], [want])
    assert 0 < fetched_bytes(proxy) < 0.9 * index_of(built)["num_bytes"][number]


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_batches_of_parts_from_a_store_equal_those_of_a_disk(cached, built, stored, tmp_path):
    url, proxy = stored
    cache = str(tmp_path / "cache") if cached else None
    want = batches_of(built, 4)
    assert_same(batches_of(url, 4, cache=cache), want)
    begun = fetched_bytes(proxy)
    assert_same(batches_of(url, 4, cache=cache), want)
    if cached:  # the parts of the first run
        assert fetched_bytes(proxy) == begun


@pytest.mark.slow
def test_packed_mixtures_of_parts_resume_on_other_ranks(built, s3_server, tmp_path):
    """Clips alone and beside a picture, a picture alone and text: from a disk and a store."""
    for name in ("0.mp4", "1.mp4"):
        (tmp_path / name).write_bytes(noisy_clip(150, 12))
    (tmp_path / "mine.py").write_text(MIXED.format(folder=str(tmp_path)))
    urls = [built, build(f"{tmp_path / 'mine.py'}:Mixed", tmp_path)]
    with mock.patch("loader.reading.parted.LEAST_BYTES", 1 << 40):
        want, _ = mixed_batches(urls, 6, world_size=1)
    shown = [one for examples, *_ in want for one in examples]
    assert {len(one.get("frame_times_s", ())) for one in shown} == {0, 2, 4}
    bucket = s3_server.make_bucket()
    stored = [f"{bucket}/{number}" for number in range(len(urls))]
    for url, target in zip(urls, stored, strict=True):
        s3_server.client().put(url, target, recursive=True)
    with FaultProxy(s3_server.endpoint, seed=6) as proxy, proxy.entered(s3_server):
        for places in (urls, stored):
            first, state = mixed_batches(places, 3, world_size=2, decode_threads=2)
            rest, _ = mixed_batches(places, 3, world_size=1, state=state, decode_threads=0)
            assert [*first, *rest] == want


@pytest.mark.slow
def test_eight_of_many_frames_are_a_small_part_of_a_long_clip(tmp_path, s3_server):
    (tmp_path / "a.mp4").write_bytes(noisy_clip(2000, 12))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"video": "a.mp4", "caption": "Noise."}) + "\n")
    recipe = replace(RECIPE, video=replace(RECIPE.video, max_frames=8))
    out, cache = str(tmp_path / "shards"), str(tmp_path / "cache")
    with inline.jobs():
        run_job(JobSettings(dataset=str(rows), out=out, cache=cache, recipe=recipe), inline.Quiet())
    url = s3_server.make_bucket() + "/set"
    s3_server.client().put(out, url, recursive=True)
    with (
        mock.patch("loader.reading.parted.LEAST_BYTES", 4 * 2**20),
        FaultProxy(s3_server.endpoint, seed=6) as proxy,
        proxy.entered(s3_server),
    ):
        got, want = (StreamingDataset(one, seed=5, view=VIEW).example(0) for one in (url, out))
    assert len(got["metadata"]["frame_times_s"]) == 8
    assert_same_examples([got], [want])
    assert fetched_bytes(proxy) < 0.35 * index_of(out)["num_bytes"][0]


@pytest.fixture
def damaged(built, tmp_path):
    """A copy with one wrong byte in a clip."""
    folder = tmp_path / "damaged"
    shutil.copytree(built, folder)
    (tar,) = folder.glob("*/*.tar")
    row = index_of(built)[int(np.argmax(index_of(built)["num_bytes"]))]
    payload = bytearray(tar.read_bytes())
    payload[int(row["offset"] + row["num_bytes"] - 200_000)] ^= 1
    tar.write_bytes(payload)
    return str(folder), row["key"].decode()


def test_damage_is_found_where_it_is_read_and_by_verify(built, damaged):
    url, key = damaged
    good, bad = (StreamingDataset(one, seed=5, view=VIEW) for one in (built, url))
    (number,) = (i for i in range(3) if good.example(i)["metadata"]["key"] == key)
    errors = []
    for epoch in range(12):
        try:
            got = bad.example(number, epoch=epoch)
        except ShardError as error:
            errors.append((error.reason, key in error.where))
        else:
            assert_same_examples([got], [good.example(number, epoch=epoch)])
    assert 0 < len(errors) < 12
    assert set(errors) == {("sample_crc", True)}
    assert [finding.reason for finding in verify(url, inline.Quiet())] == ["shard_sha256"]
    # Whoever takes the sample as it is stored reads all of it.
    with pytest.raises(ShardError, match="checksum"):
        bad.reader.members(number)


@pytest.mark.slow
def test_substitutes_of_damaged_parts_are_the_same_on_any_number_of_ranks(built, damaged):
    """No rank knows of damage what another one does not: it is found anew in each epoch."""
    url, key = damaged
    want = batches_of(url, 6, on_bad="substitute")
    parts = [
        batches_of(url, 6, on_bad="substitute", rank=rank, world_size=2, decode_threads=rank)
        for rank in range(2)
    ]
    told = [one for batch in want for one in batch["metadata"]]
    shown = [one for one in told if one["key"] == key]
    assert [one for both in zip(*parts, strict=True) for b in both for one in b["metadata"]] == told
    for whole, *both in zip(want, *parts, strict=True):
        assert torch.equal(torch.cat([pixels_of(b) for b in both]), pixels_of(whole))
    bad = [one["substitutes"] for one in told if "substitutes" in one]
    assert {(one["key"], one["reason"]) for one in bad} == {(key, "sample_crc")}
    assert shown
    sound = [one for batch in batches_of(built, 6) for one in batch["metadata"]]
    assert len(sound) == len(told) == 18


@pytest.mark.slow
def test_shards_without_heads_are_read_as_a_whole(rows, built, tmp_path):
    """Each file directly after its table, no checksums of parts; and merged with newer ones."""

    def interleaved(sample, *args, **options):
        members, count = sample_members(sample, *args, **options), len(sample.clips)
        tables, files = members[-2 * count : -count], members[-count:]
        pairs = zip(tables, files, strict=True)
        return [*members[: -2 * count], *itertools.chain.from_iterable(pairs)]

    with (
        mock.patch("preprocess.job.build._stores_clips", return_value=False),
        mock.patch("preprocess.job.build.sample_members", interleaved),
        mock.patch("preprocess.media.video.decoder.with_parts", lambda table, file: table),
    ):
        older = build(rows, tmp_path)
    assert "head_bytes" not in index_of(older).dtype.names
    want = examples_of(built)
    assert_same_examples(examples_of(older), want)
    assert not verify(older, inline.Quiet(), deep=True)
    # Merged with a newer one, each sample is read as it was written.
    again, folder = tmp_path / "rows.jsonl", Path(rows).parent
    text = Path(rows).read_text().replace("What is it?", "And this?")
    again.write_text(text.replace("a.mp4", str(folder / "a.mp4")))
    newer, merged = build(str(again), tmp_path / "newer"), str(tmp_path / "merged")
    settings = ReshardSettings(sources=(older, newer), out=merged, num_shards=1, form="copy")
    reshard(plan_reshard(settings, inline.Quiet()), inline.Quiet())
    assert sorted(index_of(merged)["head_bytes"] > 0) == [False] * 3 + [True] * 3
    stream = StreamingDataset(merged, seed=5, view=VIEW)
    times = [len(stream.example(i)["metadata"]["frame_times_s"]) for i in range(6)]
    assert sorted(times) == [2, 2, 2, 2, 4, 4]
    assert not verify(merged, inline.Quiet(), deep=True)
