import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from loader.assembly import view_collator
from loader.assembly.attention import PACKED_STRIDE, build_attention_mask
from loader.assembly.collate import EXTRA_KEYS, finished
from loader.assembly.draft import Draft
from loader.assembly.layout import TokenIds
from loader.assembly.packed import Pack, fitting
from loader.assembly.pixels import Encoded
from loader.assembly.planner import Planner
from loader.assembly.view import View
from loader.buffers import Scratch
from shardspec.errors import ConfigError, SampleError
from shardspec.media import decode_stored, encode_stored
from shardspec.tiling import ImageView

SYMBOLS = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<low_res_im_start>", "<|image|>")
IDS = TokenIds.from_special_ids(
    {"bos": 1, "eos": 2, "pad": 0, **{s: 128 + i for i, s in enumerate(SYMBOLS)}}
)
IMAGE = ImageView(size_px=28, patch_px=14, pool=(1, 1))


def draft_of(sample, view, *, seed=0):
    planner, rng = Planner(view, IDS), np.random.RandomState(seed)
    plan = planner.plan(sample.tokens, sample.spans, rng, key=sample.key)
    sources = [(image.pixels, image.overview) for image in sample.images]
    return Draft(plan, sources, view=view, key=sample.key, scratch=Scratch())


@pytest.fixture
def drafts(tiny_sample):
    def make(**options):
        view = View(image=IMAGE, **options)
        samples = [tiny_sample(i, num_images=i, num_branches=1 + i % 2) for i in (1, 0, 2)]
        return [draft_of(sample, view) for sample in samples]

    return make


@pytest.fixture
def examples(drafts):
    """Makes the examples one by one, and the row of all of them."""

    def make(**options):
        parts = drafts(**options)
        return [finished(part) for part in parts], finished(Pack(parts))

    return make


def test_rows_stand_one_after_the_other_and_positions_begin_again(examples):
    parts, row = examples()
    start = 0
    for e, part in enumerate(parts):
        own = slice(start, start + len(part["input_ids"]))
        for name in ("input_ids", "labels", "position_ids", "loss_weights"):
            assert row[name][own].tolist() == part[name].tolist()
        assert (row["subsegment_ids"][own] - part["subsegment_ids"] == e * PACKED_STRIDE).all()
        start = own.stop
    assert len(row["input_ids"]) == start
    assert row["metadata"]["key"] == "sample-0001+sample-0000+sample-0002"
    assert row["metadata"]["examples"] == [part["metadata"] for part in parts]


@pytest.mark.parametrize("pixels", ["crops", "patches"])
def test_images_are_found_where_their_tokens_went(pixels, examples):
    parts, row = examples(pixels=pixels)
    assert row["images"].tobytes() == b"".join(part["images"].tobytes() for part in parts)
    assert len(row["image_masks"]) == len(row["images"]) == len(row["image_input_idx"])
    assert (row["input_ids"][row["image_input_idx"]] == IDS.image.im_patch).all()
    ends = np.concatenate([part["input_ids"][part["image_end"] - 1] for part in parts])
    assert row["input_ids"][row["image_end"] - 1].tolist() == ends.tolist()
    if pixels == "crops":  # channels last in memory, as single examples are
        assert row["images"].strides[1] == 1


def test_maps_of_single_tokens_and_of_pooled_patches_move_along(examples):
    _, per_token = examples(image_map="per_token")
    at = per_token["image_input_idx"]
    assert (per_token["input_ids"][at[at >= 0]] == IDS.image.im_patch).all()
    _, row = examples(image_map="pooling")
    pooled = row["token_pooling"]
    # Every patch of every crop is pooled once, counted through all crops.
    assert sorted(pooled.ravel().tolist()) == list(range(3 * IMAGE.num_patches))


def test_no_example_of_a_pack_sees_another(examples):
    parts, row = examples()
    subsegments = torch.from_numpy(row["subsegment_ids"])[None]
    mask = build_attention_mask(subsegments, torch.ones_like(subsegments))[0].numpy()
    start = 0
    for part in parts:
        stop = start + len(part["input_ids"])
        own = torch.from_numpy(part["subsegment_ids"])[None]
        alone = build_attention_mask(own, torch.ones_like(own))[0].numpy()
        assert (mask[start:stop, start:stop] == alone).all()
        assert not mask[start:stop, :start].any()
        assert not mask[start:stop, stop:].any()
        start = stop


kinds = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 2)), min_size=1, max_size=4)
views = st.fixed_dictionaries(
    {
        "image_map": st.sampled_from(["first", "per_token", "pooling"]),
        "pixels": st.sampled_from(["crops", "patches"]),
        "normalize": st.sampled_from([None, "siglip"]),
        "loss": st.sampled_from(["flat", "root_both"]),
        "tree": st.sampled_from(["molmo2", "molmo1"]),
        "sequence_length": st.sampled_from([None, 24]),
    }
)


@given(rows=st.lists(kinds, min_size=1, max_size=3), options=views, seed=st.integers(0, 99))
def test_drafts_and_packs_are_collated_as_the_arrays_that_they_stand_for(
    rows, options, seed, tiny_sample
):
    view = View(image=IMAGE, **options)
    made = []
    for row in rows:
        samples = [
            tiny_sample(i, num_images=images, num_branches=branches, num_variants=3)
            for i, (images, branches) in enumerate(row)
        ]
        try:
            drafts = [draft_of(sample, view, seed=seed) for sample in samples]
        except SampleError:  # the images leave no room
            continue
        made.append(drafts[0] if len(drafts) == 1 else Pack(drafts))
    assume(made)
    keys = tuple(EXTRA_KEYS)
    collator = view_collator(view, sequence_length=256, extra_keys=keys, with_metadata=True)
    got, want = collator.collate(made), collator([finished(each) for each in made])
    assert got.keys() == want.keys()
    assert got.pop("metadata") == want.pop("metadata")
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        assert got[name].stride() == tensor.stride()
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("options", [{"normalize": "siglip"}, {"image_map": "per_token"}])
def test_drafts_that_do_not_fit_together_are_refused_by_what_is_wrong_with_them(
    options, tiny_sample
):
    views = [View(image=IMAGE), View(image=IMAGE, **options)]
    parts = [draft_of(tiny_sample(i, num_images=1), view) for i, view in enumerate(views)]
    with pytest.raises(ConfigError) as caught:
        view_collator(views[0], sequence_length=256).collate(parts)
    assert caught.value.reason == "example_mismatch"
    wrong = "images of several types" if "normalize" in options else "image_input_idx"
    assert wrong in caught.value.where
    assert "sample sample-0001 (row 1 of the batch)" in caught.value.facts


@pytest.mark.parametrize("codec", ["jpeg", "png", "raw"])
@pytest.mark.parametrize("options", [{}, {"pixels": "patches"}, {"normalize": "siglip"}])
def test_picture_that_is_its_crop_already_is_decoded_as_any_other(codec, options, tiny_sample):
    view = View(image=IMAGE, **options)
    sample = tiny_sample(1, num_images=1, size=(28, 28))
    stored = memoryview(encode_stored(sample.images[0].pixels, codec=codec))
    plain, encoded = draft_of(sample, view), draft_of(sample, view)
    plain.sources = [(decode_stored(stored, codec=codec), None)]
    encoded.sources = [(Encoded(stored, 28, 28, codec=codec), None)]
    assert np.array_equal(finished(plain)["images"], finished(encoded)["images"])


def test_a_resolution_with_other_patches_is_refused_by_its_shapes(tiny_sample):
    large = ImageView(size_px=28, patch_px=7, pool=(1, 1))
    view = View(image=IMAGE, high_res=large, high_res_probability=1.0, pixels="patches")
    draft = draft_of(tiny_sample(1, num_images=1), view)
    with pytest.raises(ConfigError) as caught:
        view_collator(view, sequence_length=256).collate([draft])
    assert caught.value.reason == "example_mismatch"


def test_resolutions_with_other_patches_do_not_go_into_one_row(tiny_sample):
    views = [View(image=IMAGE), View(image=ImageView(size_px=28, patch_px=7, pool=(1, 1)))]
    parts = [draft_of(tiny_sample(i, num_images=1), view) for i, view in enumerate(views)]
    with pytest.raises(ConfigError) as caught:
        Pack(parts)
    assert caught.value.reason == "example_mismatch"


def test_substitutes_that_do_not_fit_are_left_out(drafts):
    parts = drafts()
    parts[1].substitutes = {"sample": 9, "reason": "sample_crc"}
    total = sum(part.num_tokens for part in parts)
    assert fitting(parts, sequence_length=total, max_crops=3) == parts
    kept = fitting(parts, sequence_length=total - 1, max_crops=3)
    assert [part.key for part in kept] == ["sample-0001", "sample-0002"]
    parts[0].substitutes = {"sample": 8, "reason": "sample_crc"}
    assert fitting(parts, sequence_length=1, max_crops=None) == [parts[2]]
    for part in parts:
        part.substitutes = {"sample": 8, "reason": "sample_crc"}
    assert fitting(parts, sequence_length=1, max_crops=None) == [parts[0]]


def test_samples_are_never_left_out_for_crops_that_one_of_them_has_alone(drafts):
    parts = drafts()[1:]
    total = sum(part.num_tokens for part in parts)
    assert fitting(parts, sequence_length=total, max_crops=1) == parts
    parts[0].substitutes = {"sample": 9, "reason": "sample_crc"}
    assert fitting(parts, sequence_length=total, max_crops=1) == parts
