import dataclasses
import itertools
import json
import os
import resource
from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader

from loader.assembly.augment import Augment
from loader.assembly.view import View
from loader.dataloader import make_dataloader
from loader.mixture_stream import IterableDatasetMixture
from loader.order.weights import mixture_weights
from loader.stream import StreamingDataset, stored_view
from shardspec.errors import ConfigError, StateError
from shardspec.manifest import MANIFEST_NAME, require_manifest
from shardspec.tiling import ImageView

SIZES = {"ant": 16, "bee": 36, "cat": 4}


@pytest.fixture(autouse=True, scope="module")
def short_word():
    """A mixture's word of 64 batches: built in 2 ms instead of 100."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loader.order.pattern._MIN_PATTERN_SLOTS", 1)
        yield


@pytest.fixture(scope="module")
def urls(tiny_sample, write_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    return {
        name: write_dataset(
            folder / name,
            [tiny_sample(100 * n + i, num_images=i % 2) for i in range(size)],
            num_shards=2,
            several=True,
            name=name,
        )
        for n, (name, size) in enumerate(SIZES.items())
    }


def dataset(url, **options):
    view = View(image=stored_view(require_manifest(url)), augment=Augment.standard())
    return StreamingDataset(url, **{"view": view, **options})


def mixture(urls, weights=None, *, seed=1, **options):
    return IterableDatasetMixture(
        [dataset(url) for url in urls.values()], weights, seed=seed, **options
    )


def make(source, *, batch=4, **options):
    return make_dataloader(
        source, global_batch_size=batch, sequence_length=64, with_metadata=True, **options
    )


def take(loader, count):
    batches = []
    while len(batches) < count:
        batches += itertools.islice(loader, count - len(batches))
    return [
        [
            (entry["dataset"], entry["key"], ids.tolist())
            for entry, ids in zip(batch["metadata"], batch["input_ids"], strict=True)
        ]
        for batch in batches
    ]


def shares(source):
    return {
        member.name: round(weight, 6)
        for member, weight in mixture_weights(source._stream.plan.group)
    }


def test_weights_follow_rates_sizes_and_roots_of_sizes(urls):
    assert set(shares(mixture(urls)).values()) == {0.333333}
    assert shares(mixture(urls, [1, 1, 2])) == {"ant": 0.25, "bee": 0.25, "cat": 0.5}
    roots = shares(mixture(urls, by="root_size"))
    assert roots == {"ant": round(4 / 12, 6), "bee": 0.5, "cat": round(2 / 12, 6)}
    sizes = shares(mixture(urls, by="size"))
    assert sizes["bee"] == round(36 / 56, 6)


def test_weights_by_tokens_divide_by_the_mean_tokens_of_the_manifests(urls):
    source = mixture(urls, [2, 1, 1], unit="tokens")
    splits = [require_manifest(url).splits["train"] for url in urls.values()]
    means = [split.num_tokens / split.num_samples for split in splits]
    want = [rate / mean for rate, mean in zip([2, 1, 1], means, strict=True)]
    got = [
        member.weight
        for member in source._resized(8, sequence_length=None)._stream.order.config.members
    ]
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b / sum(want))


def test_nested_mixture_takes_its_share_as_a_whole(urls):
    ant, bee, cat = (dataset(url) for url in urls.values())
    inner = IterableDatasetMixture([bee, cat], [3, 1], seed=9)
    outer = IterableDatasetMixture([ant, inner], [1, 1], seed=1)
    assert shares(outer) == {"ant": 0.5, "bee": 0.375, "cat": 0.125}
    assert [part.manifest.dataset for part in outer.datasets] == ["ant", "bee", "cat"]
    assert {part._stream.seed for part in outer.datasets} == {1}
    counts = Counter(name for batch in take(make(outer, batch=8), 32) for name, *_ in batch)
    assert all(abs(counts[name] - 256 * s) <= 2 for name, s in shares(outer).items())


def test_samples_are_the_datasets_own_with_seeds_of_their_own(urls):
    source = make(mixture(urls, seed=5)).dataset
    for number, url in enumerate(urls.values()):
        alone = dataset(url, seed=5)._resized(1, sequence_length=64)
        for sample, epoch in ((0, 0), (3, 2)):
            own = source.datasets[number].example(sample, epoch=epoch)
            want = alone.example(sample, epoch=epoch)
            assert own["images"].tobytes() == want["images"].tobytes()
            assert own["input_ids"].tolist() == want["input_ids"].tolist()
    assert len({part._stream.plan.seed for part in source.datasets}) == 3


def test_datasets_that_were_given_stay_as_they_are(urls):
    parts = [dataset(url, seed=3, batch_size=4) for url in urls.values()]
    make(IterableDatasetMixture(parts, seed=1, batch_size=4))
    streams = [part._stream for part in parts]
    assert [(stream.seed, stream.batch_size) for stream in streams] == [(3, 4)] * 3
    assert [part.view.sequence_length for part in parts] == [None] * 3


@pytest.mark.parametrize("stop, steps", [("first_exhausted", 3), ("all_exhausted", 27), (5, 5)])
def test_passes_end_by_the_stop_rule_and_continue(stop, steps, urls):
    loader = make(mixture(urls, stop=stop))
    assert len(loader) in (steps, steps + 1)  # the word's hash decides in which batch it falls
    count = len(loader)
    first, second = list(loader), list(loader)
    assert (len(first), len(second), loader.epoch) == (count, count, 2)
    undisturbed = take(make(mixture(urls, stop=1000)), 2 * count)
    assert take(make(mixture(urls, stop=stop)), 2 * count) == undisturbed


def test_every_dataset_shows_every_sample_once_per_epoch_of_its_own(urls):
    shown = [row for batch in take(make(mixture(urls)), 60) for row in batch]
    for name, size in SIZES.items():
        keys = [key for dataset, key, _ in shown if dataset == name]
        for start in range(0, len(keys) - size + 1, size):
            assert len(set(keys[start : start + size])) == size


def test_weights_and_batch_size_can_change_and_the_state_brings_the_change(urls):
    loader = make(mixture(urls, canonical_ranks=2))
    take(loader, 4)
    loader.change(global_batch_size=8, weights=[0, 1, 0])
    later = take(loader, 2)
    assert {row[0] for batch in later for row in batch} == {"bee"}
    assert [len(batch) for batch in later] == [8, 8]
    state = json.loads(json.dumps(loader.state_dict()))
    want = take(loader, 3)
    resumed = make(mixture(urls, canonical_ranks=2))
    resumed.load_state_dict(state)
    assert take(resumed, 3) == want


def test_state_of_other_datasets_or_weights_is_refused_field_by_field(urls):
    state = make(mixture(urls)).state_dict()
    two = dict(list(urls.items())[:2])
    with pytest.raises(StateError) as caught:
        make(mixture(two)).load_state_dict(state)
    assert caught.value.reason == "state_mixture"
    assert caught.value.facts == {"removed": ["cat"]}
    for other, field in (
        (mixture(urls, [1, 1, 2]), "state.order.members"),
        (mixture(urls, seed=2), "state.seed: 1 here, 2 asked"),
    ):
        with pytest.raises(StateError) as caught:
            make(other).load_state_dict(state)
        assert caught.value.reason == "state_mismatch"
        assert field in caught.value.facts["differences"]


def test_dataset_that_grew_is_named_in_a_mixture_too(urls, tiny_sample, write_dataset, tmp_path):
    state = json.loads(json.dumps(make(mixture(urls)).state_dict()))
    longer = [tiny_sample(100 + i, num_images=i % 2) for i in range(40)]
    grown = write_dataset(tmp_path / "set", longer, several=True, name="bee")
    with pytest.raises(StateError) as caught:
        make(mixture({**urls, "bee": grown})).load_state_dict(state)
    assert caught.value.reason == "state_appended"
    assert caught.value.facts["then"] == SIZES
    parts = [
        dataset(url, max_samples=36 if name == "bee" else None)
        for name, url in {**urls, "bee": grown}.items()
    ]
    make(IterableDatasetMixture(parts, seed=1)).load_state_dict(state)


def test_plain_dataloader_streams_a_mixture(urls):
    source = mixture(urls, batch_size=4, stop=6)
    loader = DataLoader(source, batch_size=4, collate_fn=list)
    assert len(loader) == 6
    got = [[e["metadata"]["key"] for e in batch] for batch in loader]
    want = take(make(mixture(urls, stop=6)), 6)
    assert got == [[key for _, key, _ in batch] for batch in want]


def refused(parts, **options):
    with pytest.raises(ConfigError) as caught:
        IterableDatasetMixture(parts, seed=1, **options)
    return caught.value


def test_datasets_of_another_view_are_refused_with_the_difference(urls):
    view = View(image=ImageView(size_px=14, patch_px=14, pool=(1, 1)))
    error = refused([dataset(urls["ant"]), dataset(urls["bee"], view=view)])
    assert (error.reason, error.where) == ("mixture_view", "ant and bee")
    assert error.facts["differences"] == "view.image.size_px: 28 here, 14 asked"


def test_datasets_of_another_tokenizer_are_refused_with_the_difference(
    urls, tiny_sample, write_dataset, tmp_path
):
    url = write_dataset(tmp_path / "set", [tiny_sample(0)], name="dog")
    manifest = require_manifest(url)
    ids = {**manifest.tokenizer.special_ids, "eos": 3}
    other = dataclasses.replace(
        manifest, tokenizer=dataclasses.replace(manifest.tokenizer, special_ids=ids)
    )
    (tmp_path / "set" / MANIFEST_NAME).write_bytes(other.encode())
    error = refused([dataset(urls["ant"]), dataset(url)])
    assert error.reason == "mixture_tokenizer"
    assert error.facts["differences"] == "tokenizer.special_ids.eos: 2 here, 3 asked"


def test_mixtures_that_make_no_sense_are_refused(urls):
    ant = dataset(urls["ant"])
    bee = dataset(urls["bee"], rank=1, world_size=2)
    assert refused([ant, bee]).reason == "mixture_topology"
    assert refused([ant, ant]).reason == "mixture_twice"
    assert refused([ant], weights=[1, 2]).reason == "mixture_weights"
    assert refused([ant], weights=[0]).reason == "mixture_weights"
    assert refused([dataset(urls["ant"], tail="pad")]).reason == "mixture_tail"
    assert refused([]).reason == "mixture_empty"


def test_packs_mix_datasets(urls):
    loader = make(mixture(urls, by="size"), pack=True, max_crops=3)
    batches = list(itertools.islice(loader, 10))
    names = Counter(
        entry["dataset"]
        for batch in batches
        for row in batch["metadata"]
        for entry in row["examples"]
    )
    assert set(names) == set(SIZES)
    for batch in batches:
        assert batch["input_ids"].shape[1] <= 64
        assert (batch["image_input_idx"] >= 0).sum(dim=1).max() <= 3
        assert set(batch) >= {"position_ids", "subsegment_ids"}
        assert isinstance(batch["subsegment_ids"], torch.Tensor)


@pytest.fixture
def granted():
    """Lets the system grant this process few more descriptors; tells how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(number) for number in os.listdir("/proc/self/fd")}
    # The limit is one of numbers, and those in use may have gaps.
    free = (number for number in itertools.count() if number not in taken)
    limit = next(itertools.islice(free, 59, None)) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    yield len(taken) + 60
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_datasets_of_many_shards_share_the_descriptors_of_the_process(
    tiny_sample, write_dataset, tmp_path, granted
):
    samples = [tiny_sample(i) for i in range(40)]
    datasets = [
        dataset(
            write_dataset(tmp_path / name, samples, num_shards=40, name=name), on_bad="substitute"
        )
        for name in SIZES
    ]
    loader = make(IterableDatasetMixture(datasets, seed=1), decode_threads=0)
    assert len(take(loader, 60)) == 60
    # A lack of descriptors makes no sample bad.
    assert loader.bad_samples == []
    assert len(os.listdir("/proc/self/fd")) <= granted


def test_what_a_mixture_does_not_take_is_refused_by_its_type(urls):
    url = urls["bee"]
    error = refused([dataset(urls["ant"]), url])
    assert error.reason == "mixture_dataset"
    assert (error.where, error.facts) == (url, {"number": 1, "type": "str"})
