"""min_images= and max_images=: steps in which some ranks have pictures and others none."""

import pytest
import torch

from loader import StreamingDataset, View, make_dataloader
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


def test_with_max_images_all_steps_of_all_ranks_have_one_shape(url):
    shapes = set()
    for rank in range(2):
        for batch in make(url, rank=rank, world_size=2, max_images=3):
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


@pytest.mark.parametrize("limits", [{"min_images": -1}, {"min_images": 3, "max_images": 2}])
def test_impossible_numbers_of_images_are_refused(url, limits):
    with pytest.raises(ConfigError) as caught:
        make(url, **limits)
    assert caught.value.reason == "collator_range"
