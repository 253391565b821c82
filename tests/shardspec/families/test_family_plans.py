"""Plans equal those of transformers' own image processors, for pictures of every shape."""

import itertools

import numpy as np
import pytest

from shardspec.errors import ConfigError, SampleError
from shardspec.families import (
    FixedSize,
    Gemma3,
    InternVL,
    ModelConfig,
    Qwen2VL,
    family_from_dict,
    family_to_dict,
    read_family,
)

SIDES = (1, 2, 13, 14, 27, 28, 29, 42, 56, 97, 100, 223, 224, 336, 420, 448, 640, 1000, 2049, 8000)
SIZES = (
    *itertools.product(SIDES, SIDES),
    *map(tuple, np.random.RandomState(0).randint(1, 5000, (200, 2)).tolist()),
)
"""(height, width): 600 sizes, 1 x N, N x 1 and 8,000 x 8,000 among them."""

HALF = (0.5, 0.5, 0.5)


def processor(name):
    """Gives the class of an image processor with Pillow's resize."""
    module = pytest.importorskip(f"transformers.models.{name}.image_processing_pil_{name}")
    (found,) = [n for n in module.__all__ if n.endswith("ProcessorPil")]
    return getattr(module, found)


@pytest.mark.parametrize(
    "family",
    [
        Qwen2VL(),
        Qwen2VL(patch_px=16, min_pixels=65536, max_pixels=16777216, mean=HALF, std=HALF),
        Qwen2VL(min_pixels=1, max_pixels=100),
        Qwen2VL(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 4),
    ],
)
def test_qwen2_vl_plans_as_the_processor(family):
    kind = processor("qwen2_vl")
    theirs = kind(
        patch_size=family.patch_px, min_pixels=family.min_pixels, max_pixels=family.max_pixels
    )
    refused = 0
    for size in SIZES:
        if max(size) / min(size) > 200:
            with pytest.raises(SampleError) as caught:
                family.plan([size])
            assert caught.value.reason == "picture_shape"
            refused += 1
            continue
        (plan,) = family.plan([size])
        assert plan.num_units == theirs.get_number_of_image_patches(*size)
        assert plan.num_tokens == plan.num_units // 4
        assert plan.resized == (plan.grid[0] * family.patch_px, plan.grid[1] * family.patch_px)
        smart = __import__(kind.__module__, fromlist=["x"]).smart_resize
        want = smart(
            *size,
            factor=family.patch_px * 2,
            min_pixels=family.min_pixels,
            max_pixels=family.max_pixels,
        )
        assert plan.resized == want
    assert 0 < refused < len(SIZES) // 3


@pytest.mark.parametrize("side", [224, 336])
def test_a_fixed_size_is_resized_as_by_the_processor(side):
    from transformers.image_transforms import get_resize_output_image_size

    family = FixedSize(size_px=side)
    for size in SIZES:
        # No memory: only the shape of the array is looked at.
        picture = np.broadcast_to(np.uint8(0), (3, *size))
        want = get_resize_output_image_size(
            picture, size=side, default_to_square=False, input_data_format="channels_first"
        )
        (plan,) = family.plan([size])
        assert plan.resized == want
        assert plan.num_tokens == 576
    (plan,) = FixedSize(size_px=side, fit="squash").plan([(1, 8000)])
    assert plan.resized == (side, side)


@pytest.mark.parametrize("tiles", [(1, 12), (1, 6), (2, 4), (1, 1)])
def test_internvl_plans_as_the_processor(tiles):
    kind = processor("got_ocr2")
    least, most = tiles
    theirs = kind(
        size={"height": 448, "width": 448},
        crop_to_patches=True,
        min_patches=least,
        max_patches=most,
    )
    family = InternVL(min_tiles=least, max_tiles=most)
    canvas = __import__(kind.__module__, fromlist=["x"]).get_optimal_tiled_canvas
    for size in SIZES:
        (plan,) = family.plan([size])
        assert plan.num_units == theirs.get_number_of_image_patches(*size)
        assert plan.grid[::-1] == canvas(tuple(size), (448, 448), least, most)
        assert plan.num_tokens == plan.num_units * 256 + 2


@pytest.mark.parametrize("family", [Qwen2VL(max_pixels=100_000), FixedSize(), InternVL()])
def test_what_is_stored_is_never_larger_and_plans_alike(family):
    for size in SIZES:
        if max(size) / min(size) > 200:
            continue
        stored = family.stored_size(size)
        assert stored[0] <= size[0]
        assert stored[1] <= size[1]
        (plan,) = family.plan([size])
        if plan.resized[0] <= size[0] and plan.resized[1] <= size[1]:
            assert stored == plan.resized
        else:
            assert stored == size


@pytest.mark.parametrize(
    "family", [Qwen2VL(patch_px=16), FixedSize(fit="squash"), InternVL(), Gemma3()]
)
def test_a_family_survives_the_manifest(family):
    document = family_to_dict(family)
    assert family_from_dict(document) == family
    for wrong in ({**document, "kind": "qwen2_vk"}, {**document, "patches": 1}):
        with pytest.raises(ConfigError) as caught:
            family_from_dict(wrong)
        assert caught.value.reason == "family_unknown"


def test_more_pixels_than_were_stored_are_refused_and_fewer_are_not():
    stored = Qwen2VL(max_pixels=500_000)
    assert not Qwen2VL(max_pixels=100_000, min_pixels=1, mean=HALF).unlike(stored)
    assert set(Qwen2VL(max_pixels=500_001).unlike(stored)) == {"max_pixels"}
    assert set(Qwen2VL(patch_px=16).unlike(stored)) == {"patch_px", "max_pixels"}
    assert set(FixedSize().unlike(stored)) == {"kind"}
    assert not InternVL(max_tiles=6).unlike(InternVL())
    assert set(InternVL(max_tiles=13).unlike(InternVL())) == {"max_tiles"}


QWEN = {"model_type": "qwen2_5_vl", "image_token_id": 151655}
PAD = "<|image_pad|>"


def test_every_number_of_qwen2_vl_comes_from_the_files():
    images = {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": list(HALF),
        "image_std": list(HALF),
        "resample": 3,
        "image_processor_type": "Qwen2VLImageProcessor",
    }
    got = read_family(ModelConfig(config=QWEN, image_processor=images, image_token=PAD))
    assert got == Qwen2VL(max_pixels=12845056, mean=HALF, std=HALF)
    images = {"size": {"shortest_edge": 65536, "longest_edge": 16777216}, "patch_size": 16}
    got = read_family(ModelConfig(config=QWEN, image_processor=images, image_token=PAD))
    assert got == Qwen2VL(min_pixels=65536, max_pixels=16777216, patch_px=16)


LLAVA = {
    "model_type": "llava",
    "image_token_index": 32000,
    "vision_feature_select_strategy": "default",
    "vision_config": {"model_type": "clip_vision_model", "patch_size": 14},
}


def test_llava_follows_its_tower_and_its_processor():
    images = {
        "size": {"shortest_edge": 336},
        "crop_size": {"height": 336, "width": 336},
        "do_center_crop": True,
    }

    def read(images, config=LLAVA, **processor):
        return read_family(
            ModelConfig(
                config=config, image_processor=images, processor=processor, image_token="<image>"
            )
        )

    assert read(images) == FixedSize()
    assert read(images, num_additional_image_tokens=0).num_tokens == 575
    assert read(images, vision_feature_select_strategy="full").num_tokens == 577
    siglip = {**LLAVA, "vision_config": {"model_type": "siglip_vision_model", "patch_size": 14}}
    squash = {"size": {"height": 384, "width": 384}, "do_center_crop": None}
    got = read(squash, {**siglip, "vision_feature_select_strategy": "full"})
    assert (got.fit, got.size_px, got.num_tokens) == ("squash", 384, 729)
    for wrong in (
        {"do_pad": True},
        {"resample": 1},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127},
        {"size": {"shortest_edge": 400}},
        {"size": {"height": 3, "width": 4}},
    ):
        with pytest.raises(ConfigError) as caught:
            read({**images, **wrong})
        assert caught.value.reason == "family_setting"


def test_a_model_of_another_family_is_refused_with_the_list_of_those_that_are_known():
    for kind in ("mllama", "gemma4", "qwen3_5", ""):
        with pytest.raises(ConfigError) as caught:
            read_family(ModelConfig(config={"model_type": kind}))
        assert caught.value.reason == "family_unknown"
        assert "qwen2_5_vl" in str(caught.value)
        assert "llava" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        Qwen2VL(patch_px=0)
    assert caught.value.reason == "family_field"
