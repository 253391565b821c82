import dataclasses
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from loader.assembly import view_collator
from loader.assembly.augment import Augment
from loader.assembly.view import View
from loader.dataloader import make_dataloader
from loader.stream import StreamingDataset, check_view, stored_view
from shardspec.errors import ConfigError, ManifestError, ShardError
from shardspec.manifest import require_manifest
from shardspec.tiling import ImageView

NUM = 37


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread():
    """Tiny pictures are not worth torch's threads, which wait for each other on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


# Python 3.12 warns of forking beside threads; forked workers start in a tenth of the time.
forks = pytest.mark.filterwarnings(
    "ignore:.*use of fork:DeprecationWarning", "ignore:This DataLoader will create:UserWarning"
)


@pytest.fixture(scope="module")
def samples(tiny_sample):
    return [tiny_sample(i, num_images=i % 3) for i in range(NUM)]


@pytest.fixture(scope="module")
def url(samples, write_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream") / "set"
    return write_dataset(folder, samples, num_shards=3, several=True)


@pytest.fixture(scope="module")
def augmented(url):
    return View(image=stored_view(require_manifest(url)), augment=Augment.standard())


def bounded(manifest, max_side_px):
    """The manifest of a dataset whose pictures were bounded by their longer side."""
    image = {**manifest.recipe["image"], "max_side_px": max_side_px}
    return dataclasses.replace(manifest, recipe={**manifest.recipe, "image": image})


def key_of(example):
    return example["metadata"]["key"]


def contents(example):
    """Gives everything of an example in a form that can be compared and counted."""
    arrays = {k: v.tobytes() for k, v in example.items() if k != "metadata"}
    return key_of(example), tuple(sorted(arrays.items()))


def stream(url, *, world_size=1, rank=0, global_batch_size=12, **options):
    return StreamingDataset(
        url,
        batch_size=global_batch_size // world_size,
        rank=rank,
        world_size=world_size,
        **options,
    )


def one_pass(dataset, epoch=0):
    dataset.set_epoch(epoch)
    examples = list(dataset)
    assert len(examples) == len(dataset)
    return examples


def global_batches(url, *, world_size, epoch=0, global_batch_size=12, **options):
    """Joins the batches of all ranks: a list of lists of examples."""
    ranks = [
        one_pass(
            stream(
                url,
                world_size=world_size,
                rank=rank,
                global_batch_size=global_batch_size,
                **options,
            ),
            epoch,
        )
        for rank in range(world_size)
    ]
    assert len({len(examples) for examples in ranks}) == 1
    share = global_batch_size // world_size
    steps = range(0, len(ranks[0]), share)
    return [[example for own in ranks for example in own[i : i + share]] for i in steps]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_together_see_every_sample_once_per_epoch(world_size, url):
    keys = [
        key_of(example)
        for epoch in range(3)
        for batch in global_batches(url, world_size=world_size, epoch=epoch)
        for example in batch
    ]
    assert len(keys) >= 3 * NUM
    for epoch in range(3):
        seen = keys[epoch * NUM : (epoch + 1) * NUM]
        assert sorted(seen) == [f"sample-{i:04d}" for i in range(NUM)]


@pytest.mark.parametrize("tail", ["wrap", "drop_last", "pad"])
def test_global_batches_are_the_same_for_any_number_of_ranks(tail, url, augmented):
    for epoch in (0, 2):
        options = {"tail": tail, "view": augmented, "seed": 5, "epoch": epoch}
        want = global_batches(url, world_size=1, **options)
        for world_size in (2, 3, 4, 12):
            got = global_batches(url, world_size=world_size, **options)
            assert [list(map(contents, b)) for b in got] == [list(map(contents, b)) for b in want]


def test_large_datasets_in_lanes_see_every_sample_once_too(
    tiny_sample, write_dataset, tmp_path_factory
):
    samples = [tiny_sample(i, num_images=0, num_variants=1) for i in range(1100)]
    url = write_dataset(tmp_path_factory.mktemp("lanes") / "set", samples, num_shards=2)
    assert stream(url, global_batch_size=4)._stream.order.config.layout == "lanes"
    seen = {}
    for world_size in (1, 4):
        batches = global_batches(
            url, world_size=world_size, global_batch_size=4, tail="pad", seed=1
        )
        keys = [[key_of(example) for example in batch] for batch in batches]
        real = [[bool((e["labels"] != -100).any()) for e in batch] for batch in batches]
        seen[world_size] = keys
        pairs = zip(np.ravel(keys).tolist(), np.ravel(real).tolist(), strict=True)
        counts = Counter(key for key, counted in pairs if counted)
        assert counts == Counter(sample.key for sample in samples)
    assert seen[1] == seen[4]


@forks
@pytest.mark.parametrize("tail", ["wrap", "pad"])
def test_dataloader_gives_the_same_batches_for_any_number_of_workers(tail, url, augmented):
    def batches(num_workers):
        dataset = StreamingDataset(url, batch_size=5, view=augmented, tail=tail, seed=3)
        context = "fork" if num_workers else None
        loader = DataLoader(
            dataset,
            batch_size=5,
            num_workers=num_workers,
            collate_fn=list,
            multiprocessing_context=context,
        )
        assert len(loader) == 8
        got = list(loader)
        assert len(got) == len(loader)
        return [[contents(example) for example in batch] for batch in got]

    want = batches(0)
    assert [batches(n) for n in (1, 2, 3)] == [want] * 3


def test_epoch_and_seed_change_the_order_and_shuffle_false_keeps_the_stored_one(url):
    def keys(epoch=0, **options):
        return [key_of(e) for e in one_pass(stream(url, global_batch_size=1, **options), epoch)]

    stored = [f"sample-{i:04d}" for i in range(NUM)]
    shuffled = [keys(), keys(epoch=1), keys(seed=1)]
    assert all(sorted(order) == stored for order in shuffled)
    assert len({tuple(order) for order in [stored, *shuffled]}) == 4
    assert keys() == shuffled[0]
    assert [keys(shuffle=False), keys(shuffle=False, epoch=1)] == [stored, stored]


def test_datasets_of_other_names_have_other_orders(samples, url, write_dataset, tmp_path):
    other = write_dataset(tmp_path / "set", samples, num_shards=3, several=True, name="other")
    orders = [[key_of(example) for example in stream(u, seed=1)] for u in (url, other)]
    assert orders[0] != orders[1]


def test_draws_of_a_sample_change_with_the_epoch_and_with_nothing_else(url, augmented):
    one = stream(url, view=augmented, seed=2)
    other = stream(url, world_size=3, rank=2, view=augmented, seed=2, shuffle=False)
    for i in (4, 1, 4):
        assert contents(one.example(i, epoch=1)) == contents(other.example(i, epoch=1))
    seen = {contents(one.example(4, epoch=epoch)) for epoch in range(5)}
    assert len(seen) == 5


def test_examples_of_a_pass_are_those_of_their_epoch(url, augmented):
    dataset = stream(url, view=augmented, seed=2, shuffle=False)
    by_key = {f"sample-{i:04d}": i for i in range(NUM)}
    first, second = one_pass(dataset, 0), one_pass(dataset, 1)
    # "wrap": 37 samples fill three batches of 12; the fourth goes on into the next epoch.
    assert len(first) == 48
    for position, example in enumerate(first + second):
        want = dataset.example(by_key[key_of(example)], epoch=position // NUM)
        assert contents(example) == contents(want)


def test_wrap_continues_where_the_last_pass_stopped(url):
    dataset = stream(url, shuffle=False)
    keys = [key_of(e) for epoch in range(4) for e in one_pass(dataset, epoch)]
    assert keys == [f"sample-{i % NUM:04d}" for i in range(len(keys))]
    assert len(keys) == -(-4 * NUM // 12) * 12


def test_drop_last_gives_full_batches_and_leaves_out_other_samples_each_epoch(url):
    dataset = stream(url, tail="drop_last", seed=4)
    passes = [[key_of(e) for e in one_pass(dataset, epoch)] for epoch in range(4)]
    assert [len(set(keys)) for keys in passes] == [36] * 4
    assert len({frozenset(keys) for keys in passes}) > 1


@pytest.mark.parametrize("world_size", [1, 4])
def test_pad_gives_every_sample_once_and_fillers_without_loss(world_size, url, augmented):
    batches = global_batches(url, world_size=world_size, tail="pad", view=augmented)
    examples = [example for batch in batches for example in batch]
    assert len(examples) == 48
    real = [e for e in examples if (e["labels"] != -100).any()]
    fillers = [e for e in examples if not (e["labels"] != -100).any()]
    assert sorted(map(key_of, real)) == [f"sample-{i:04d}" for i in range(NUM)]
    assert len(fillers) == 11
    assert {key_of(example) for example in fillers} == {None}
    assert [example["metadata"].get("real", True) for example in real] == [True] * NUM
    collate = view_collator(augmented, sequence_length=128, with_metadata=True, with_real=True)
    flags = [collate(batch)["real"].tolist() for batch in batches]
    assert flags == [[key_of(example) is not None for example in batch] for batch in batches]
    for example in fillers:
        assert example["loss_weights"].dtype == np.float32
        assert not example["loss_weights"].any()
        assert example["labels"].dtype == np.int64


def test_dataset_without_a_batch_size_streams_single_samples(url):
    dataset = StreamingDataset(url, tail="pad")
    assert len(dataset) == NUM
    assert sorted(map(key_of, dataset)) == [f"sample-{i:04d}" for i in range(NUM)]


@pytest.mark.parametrize("tail", ["wrap", "pad"])
def test_more_ranks_than_samples_still_get_equally_many(tail, tiny_sample, write_dataset, tmp_path):
    url = write_dataset(tmp_path / "set", [tiny_sample(i) for i in range(3)])
    (batch,) = global_batches(url, world_size=4, global_batch_size=4, tail=tail)
    keys = {key_of(example) for example in batch}
    assert keys == {f"sample-{i:04d}" for i in range(3)} | ({None} if tail == "pad" else set())
    assert sum((e["labels"] != -100).any() for e in batch) == (4 if tail == "wrap" else 3)


@forks
def test_persistent_workers_see_a_new_epoch(url):
    dataset = stream(url, global_batch_size=4)
    loader = DataLoader(
        dataset,
        batch_size=4,
        num_workers=2,
        persistent_workers=True,
        collate_fn=list,
        multiprocessing_context="fork",
    )
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        got = [key_of(example) for batch in loader for example in batch]
        assert got == [key_of(e) for e in one_pass(stream(url, global_batch_size=4), epoch)]


@forks
def test_several_workers_need_the_batch_size(url):
    loader = DataLoader(
        StreamingDataset(url),
        batch_size=4,
        num_workers=2,
        collate_fn=list,
        multiprocessing_context="fork",
    )
    with pytest.raises(RuntimeError, match="dataset must know the batch size"):
        next(iter(loader))


@pytest.mark.parametrize("batch_size", [0, -4])
def test_batch_size_below_1_is_refused(batch_size, url):
    with pytest.raises(ConfigError) as caught:
        len(StreamingDataset(url, batch_size=batch_size))
    assert caught.value.reason == "argument"


def test_default_view_is_the_stored_one(url):
    dataset = StreamingDataset(url)
    assert dataset.view == View(image=ImageView(size_px=28, patch_px=14, pool=(1, 1)))
    assert next(iter(dataset))["images"].shape[1:] == (3, 28, 28)


@pytest.mark.parametrize(
    "view",
    [
        ImageView(size_px=42, patch_px=14, pool=(1, 1)),
        ImageView(size_px=28, patch_px=7, crop_mode="overlap-and-resize-c2", margin_patches=(1, 1)),
    ],
    ids=["larger", "tiled"],
)
def test_view_of_more_pixels_than_stored_is_refused(view, url):
    with pytest.raises(ConfigError) as caught:
        StreamingDataset(url, view=View(image=view))
    assert caught.value.reason == "view_bound"
    assert caught.value.where == url
    assert caught.value.facts["stored"] == (28, 28)


def test_smaller_view_is_accepted(url):
    view = View(image=ImageView(size_px=14, patch_px=14, pool=(1, 1)))
    assert next(iter(StreamingDataset(url, view=view)))["images"].shape[1:] == (3, 14, 14)


@pytest.mark.parametrize(
    "view",
    [
        ImageView(),
        ImageView(size_px=1792),
        ImageView(size_px=1036, fit="center-crop"),
        ImageView(size_px=378, crop_mode="overlap-and-resize-c2", max_crops=36),
        ImageView(size_px=1120, crop_mode="overlap-and-resize-c2", fit="pad"),
    ],
    ids=["default", "large", "center-crop", "many tiles", "large tiles"],
)
def test_view_that_shards_were_made_for_is_never_refused(
    view, tiny_sample, write_dataset, tmp_path
):
    # Large views enlarge long thin pictures: no more than the source's pixels can be stored.
    url = write_dataset(tmp_path / "set", [tiny_sample(0)], view=view)
    manifest = require_manifest(url)
    check_view(manifest, view, where=url)
    check_view(bounded(manifest, 512), view, where=url)
    if view.crop_mode == "resize":  # the same pixels, other tokens
        check_view(manifest, dataclasses.replace(view, column_tokens=False), where=url)


def test_bound_of_the_longer_side_is_a_bound_on_views(url):
    manifest = bounded(require_manifest(url), 512)
    tiled = ImageView(crop_mode="overlap-and-resize-c2")
    check_view(manifest, ImageView(size_px=504), where=url)
    for view in (ImageView(size_px=518), tiled):
        with pytest.raises(ConfigError) as caught:
            check_view(manifest, view, where=url)
        assert caught.value.reason == "view_bound"


def test_missing_dataset_and_split_are_refused(url, tmp_path):
    with pytest.raises(ManifestError) as caught:
        StreamingDataset(str(tmp_path / "nothing"))
    assert caught.value.reason == "manifest_missing"
    with pytest.raises(ConfigError) as unknown:
        StreamingDataset(url, split="validation")
    assert unknown.value.reason == "unknown_split"
    with pytest.raises(ConfigError) as small:
        StreamingDataset(url, cache=str(tmp_path / "cache"), cache_bytes=2**20)
    assert small.value.reason == "cache_bytes"


def test_checksums_are_verified_unless_only_lengths_are_asked_for(
    tiny_sample, write_dataset, tmp_path
):
    url = write_dataset(tmp_path / "set", [tiny_sample(0)])
    path = Path(url, require_manifest(url).shards[0].url)
    payload = bytearray(path.read_bytes())
    payload[-1025 - 512] ^= 1  # the last pixel rows of the picture
    path.write_bytes(payload)
    assert len(list(StreamingDataset(url, check="size"))) == 1
    with pytest.raises(ShardError) as caught:
        list(StreamingDataset(url))
    assert caught.value.reason == "sample_crc"


def test_dataset_in_use_can_be_sent_to_another_process(url, augmented):
    dataset = stream(url, view=augmented, seed=9)
    want = [contents(example) for example in one_pass(dataset, 1)]
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.epoch == 1
    assert [contents(example) for example in copy] == want


def test_other_batch_size_keeps_every_other_setting(url, augmented):
    dataset = stream(
        url, world_size=2, rank=1, view=augmented, seed=9, tail="pad", shuffle=False, check="crc"
    )
    other = dataset._resized(4, sequence_length=77)
    (one,), (another,) = other._stream.parts, dataset._stream.parts
    names = ("data", "topology", "tail", "shuffle")
    assert [getattr(one, n) for n in names] == [getattr(another, n) for n in names]
    assert (other._stream.seed, other._stream.plan) == (9, dataset._stream.plan)
    assert other.reader.check == "crc"
    assert other._stream.batch_size == 2
    assert other.view.sequence_length == 77
    assert other.view.augment == augmented.augment
    assert dataset._stream.batch_size == 6


def test_second_resolution_beyond_the_stored_bound_is_refused_too(
    write_dataset, tiny_sample, tmp_path
):
    few = ImageView(
        size_px=56, crop_mode="overlap-and-resize-c2", max_crops=4, margin_patches=(1, 1)
    )
    many = dataclasses.replace(few, max_crops=24)
    samples = [tiny_sample(i) for i in range(3)]
    url = write_dataset(tmp_path / "set", samples, view=few)
    StreamingDataset(url, view=View(image=few))
    for view in (View(image=many), View(image=few, high_res=many, high_res_probability=0.1)):
        with pytest.raises(ConfigError) as caught:
            StreamingDataset(url, view=view)
        assert caught.value.reason == "view_bound"


def test_substitutions_of_a_loader_are_counted_at_the_dataset_that_was_given(
    write_dataset, tiny_sample, tmp_path
):
    url = write_dataset(tmp_path / "set", [tiny_sample(i, num_images=i % 2) for i in range(8)])
    view = View(image=stored_view(require_manifest(url)), max_images=0)
    dataset = StreamingDataset(url, view=view, on_bad="substitute")
    list(make_dataloader(dataset, global_batch_size=4, sequence_length=64))
    assert dataset.bad["too_many_images"] >= 4
