"""min_images= and max_images=: steps in which some ranks have pictures and others none."""

import functools
import itertools

import pytest
import torch

from loader import IterableDatasetMixture, StreamingDataset, View, make_dataloader
from loader.stream import stored_view
from shardspec.errors import ConfigError, SampleError
from shardspec.manifest import require_manifest

NUM, BATCH = 16, 4


@pytest.fixture(scope="module")
def url(tiny_sample, write_dataset, tmp_path_factory):
    """Every fifth sample has pictures: one, or three."""
    samples = [tiny_sample(i, num_images=(i % 2 * 2 + 1) * (i % 5 == 0)) for i in range(NUM)]
    folder = tmp_path_factory.mktemp("images") / "set"
    return write_dataset(folder, samples, num_shards=2, several=True)


def make(url, *, rank=0, world_size=1, view=None, **options):
    view = View(image=stored_view(require_manifest(url)), **(view or {}))
    dataset = StreamingDataset(url, seed=3, view=view, rank=rank, world_size=world_size)
    settings = {"global_batch_size": BATCH, "sequence_length": 96, "pad_mode": "max_len"}
    return make_dataloader(dataset, **{**settings, **options})


VIEWS = [
    {},
    {"normalize": "siglip"},
    {"pixels": "patches", "image_map": "pooling"},
    {"image_map": "per_token"},
]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("limits", [{"min_images": 1}, {"max_images": 4}])
def test_ranks_without_pictures_have_padding_that_nothing_refers_to(url, view, limits):
    plain = list(make(url, view=view))
    num_padded = 0
    for rank in range(4):
        padded = list(make(url, rank=rank, world_size=4, view=view, **limits))
        for batch, whole in zip(padded, plain, strict=True):
            own = slice(rank, rank + 1)
            num = limits.get("max_images") or max(1, _num(whole, own))
            assert batch["images"].shape[:2] == (1, num)
            assert batch["images"].dtype == make_dtype(view)
            real = _num(whole, own)
            for name in ("images", "image_masks", "image_input_idx"):
                assert torch.equal(batch[name][:, :real], whole[name][own, :real]), name
            assert not batch["images"][:, real:].any()
            assert not batch["image_masks"][:, real:].any()
            assert (batch["image_input_idx"][:, real:] < 0).all()
            for name in ("input_ids", "labels", "attention_mask"):
                assert torch.equal(batch[name], whole[name][own])
            if "token_pooling" in batch:
                assert batch["token_pooling"].shape[1] >= 1
                used = batch["token_pooling"].max().item()
                assert used < max(1, real) * batch["image_masks"].shape[2]
            num_padded += real == 0
    assert num_padded > 8


def _num(batch, rows):
    index = (
        batch["image_input_idx"][rows].flatten(2)
        if batch["image_input_idx"].ndim > 2
        else (batch["image_input_idx"][rows][..., None])
    )
    return int((index >= 0).any(-1).sum(1).max()) if index.shape[1] else 0


def make_dtype(view):
    return torch.float32 if "normalize" in view else torch.uint8


@pytest.mark.parametrize("view", VIEWS)
def test_with_max_images_all_steps_of_all_ranks_have_one_shape(url, view):
    shapes = set()
    for rank in range(2):
        for batch in make(url, rank=rank, world_size=2, max_images=3, view=view):
            shapes.add(tuple((k, *v.shape, v.dtype) for k, v in sorted(batch.items())))
    assert len(shapes) == 1


def test_packs_have_no_more_pictures_than_the_fixed_number(url):
    loader = make(url, pack=True, max_images=4, global_batch_size=2)
    assert loader.state_dict()["packing"]["max_crops"] == 4
    assert {batch["images"].shape[1] for batch in loader} == {4}


def test_a_sample_with_more_pictures_is_named(url):
    with pytest.raises(SampleError) as caught:
        list(make(url, max_images=2))
    assert caught.value.reason == "too_many_images"


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"min_images": -1}, "argument"),
        ({"max_images": "2"}, "argument"),
        ({"min_images": 3, "max_images": 2}, "collator_range"),
        ({"max_images": 3, "collate_fn": len}, "loader_options"),
    ],
)
def test_impossible_numbers_of_images_are_refused(url, limits, reason):
    with pytest.raises(ConfigError) as caught:
        make(url, **limits)
    assert caught.value.reason == reason


# --- pictures on every rank: a mixture of texts with 30 % pictures


@pytest.fixture(scope="module")
def mixed(tiny_sample, write_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    texts = [tiny_sample(i, num_images=0) for i in range(70)]
    pictures = [tiny_sample(100 + i, num_images=1 + i % 3) for i in range(30)]
    both = [each for pair in zip(texts[:30], pictures, strict=True) for each in pair]
    return [
        write_dataset(folder / "texts", texts, num_shards=2, name="texts"),
        write_dataset(folder / "pictures", pictures, num_shards=2, name="pictures", several=True),
        write_dataset(folder / "both", [*both, *texts[30:]], num_shards=2, several=True),
    ]


def make_mixed(urls, *, rank, world_size, mixture=True, **options):
    *urls, url = urls
    if mixture:
        parts = [StreamingDataset(url, rank=rank, world_size=world_size) for url in urls]
        mixture = IterableDatasetMixture(parts, weights=[0.7, 0.3], seed=2)
    else:
        mixture = StreamingDataset(url, rank=rank, world_size=world_size, seed=2)
    settings = {"global_batch_size": 40, "sequence_length": 96, "pad_mode": "max_len"}
    return make_dataloader(mixture, **{**settings, **options}, with_metadata=True, decode_threads=0)


def keys_of(batches):
    return sorted(one["key"] for batch in batches for one in batch["metadata"])


def endless(loader):
    return itertools.chain.from_iterable(iter(loader) for _ in itertools.count())


@pytest.mark.parametrize("mixture", [False, True])
def test_every_rank_has_pictures_in_every_step(mixed, mixture):
    made = functools.partial(make_mixed, mixed, mixture=mixture)
    alone = endless(made(rank=0, world_size=1))
    ranks = [endless(made(rank=r, world_size=8, balance="images")) for r in range(8)]
    plain = [endless(made(rank=r, world_size=8)) for r in range(8)]
    num_without = 0
    for _ in range(5):
        batches = [next(rank) for rank in ranks]
        assert [bool(batch["image_masks"].any()) for batch in batches] == [True] * 8
        assert keys_of(batches) == keys_of([next(alone)])
        num_without += sum(not next(rank)["image_masks"].any() for rank in plain)
    if not mixture:  # which spreads its datasets over a batch by itself
        assert num_without


def test_packs_are_shared_by_their_pictures_too(mixed):
    options = {"pack": True, "sequence_length": 64, "global_batch_size": 16}
    alone = make_mixed(mixed, rank=0, world_size=1, **options)
    ranks = [make_mixed(mixed, rank=r, world_size=8, balance="images", **options) for r in range(8)]
    for want, *batches in zip(alone, *ranks, strict=True):
        num = sum(mask.any().item() for mask in want["image_masks"])
        assert sum(batch["image_masks"].any().item() for batch in batches) == min(8, num)
        assert num


@pytest.mark.parametrize("worlds", [(8, 2), (1, 5)])
def test_a_run_that_shares_pictures_continues_on_any_number_of_ranks(mixed, worlds):
    options = {"balance": "images"}
    whole = [keys_of([batch]) for batch in make_mixed(mixed, rank=0, world_size=1)]
    state = None
    seen = []
    for world in worlds:
        ranks = [make_mixed(mixed, rank=r, world_size=world, **options) for r in range(world)]
        for rank in ranks:
            if state is not None:
                rank.load_state_dict(state)
        runs = [iter(rank) for rank in ranks]
        seen.append(keys_of([next(run) for run in runs]))
        states = [rank.state_dict() for rank in ranks]
        assert all(each == states[0] for each in states)
        state = states[0]
    assert seen == whole[:2]


@pytest.mark.parametrize("value", ["pictures", "True", 1, None])
def test_other_values_of_balance_are_refused(url, value):
    with pytest.raises(ConfigError) as caught:
        make(url, balance=value)
    assert caught.value.reason == "argument"
