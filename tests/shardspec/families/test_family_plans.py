"""Plans equal those of transformers' own image processors, for pictures of every shape."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from shardspec.errors import ConfigError, SampleError
from shardspec.families import (
    AnyRes,
    FixedSize,
    Gemma3,
    Idefics3,
    InternVL,
    ModelConfig,
    PaliGemma,
    Pixtral,
    Processor,
    Qwen2VL,
    family_from_dict,
    family_to_dict,
    plan_pictures,
    read_family,
)
from tests import model_folders

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
                family.plan(size)
            assert caught.value.reason == "picture_shape"
            refused += 1
            continue
        plan = family.plan(size)
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
        plan = family.plan(size)
        assert plan.resized == want
        assert plan.num_tokens == 576
    plan = FixedSize(size_px=side, fit="squash").plan((1, 8000))
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
        plan = family.plan(size)
        assert plan.num_units == theirs.get_number_of_image_patches(*size)
        assert plan.grid[::-1] == canvas(tuple(size), (448, 448), least, most)
        assert plan.num_tokens == plan.num_units * 256 + 2


ONEVISION = AnyRes(
    size_px=384,
    resolutions=tuple(itertools.product(range(384, 2305, 384), repeat=2)),
    patches=27,
    num_tokens=729,
    most_tiles=9,
    single_tiles=True,
)


@pytest.mark.parametrize("family", [AnyRes(), ONEVISION], ids=["llava_next", "llava_onevision"])
def test_llava_next_and_onevision_plan_as_their_processors(family):
    from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
    from transformers.models.llava_onevision.processing_llava_onevision import (
        LlavaOnevisionProcessor,
    )

    resolutions = [list(each) for each in family.resolutions]
    # Only its arithmetic: no tokenizer, no model.
    theirs = object.__new__(LlavaOnevisionProcessor if family.single_tiles else LlavaNextProcessor)
    theirs.image_processor = SimpleNamespace(image_grid_pinpoints=resolutions)
    theirs.patch_size, theirs.num_additional_image_tokens = 14, 0
    theirs.num_image_tokens, theirs.vision_aspect_ratio = 729, "anyres_max_9"
    side, reduced = family.size_px, 0
    for size in SIZES:
        plan = family.plan(size)
        best = select_best_resolution(size, resolutions)
        assert plan.grid == (best[0] // side, best[1] // side)
        assert plan.num_units == plan.grid[0] * plan.grid[1] + 1
        picture = np.broadcast_to(np.uint8(0), (3, *size))
        assert plan.resized == get_patch_output_size(picture, best, "channels_first")
        assert plan.num_tokens == theirs._get_number_of_features(*size, side, side)
        reduced += plan.num_tokens < 729 + 0.9 * plan.grid[0] * plan.grid[1] * 729
        both = plan_pictures(family, [size, (100, 100)])
        if family.single_tiles:
            assert [each.num_tokens for each in both] == [730, 730]
            assert [each.num_units for each in both] == [1, 1]
        else:
            assert both == (plan, family.plan((100, 100)))
    assert reduced


@pytest.mark.parametrize(
    "family",
    [
        Idefics3(),
        Idefics3(size_px=512, longest_px=2048, tokens_per_tile=64),
        Idefics3(splits=False),
    ],
)
def test_idefics3_plans_and_writes_tokens_as_the_processor(family):
    from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

    kind = processor("idefics3")
    images = kind(
        size={"longest_edge": family.longest_px},
        max_image_size={"longest_edge": family.size_px},
        do_image_splitting=family.splits,
    )
    module = __import__(kind.__module__, fromlist=["x"])
    theirs = object.__new__(Idefics3Processor)
    theirs.fake_image_token, theirs.image_token = family.around_token, family.image_token
    theirs.global_image_tag, theirs.image_seq_len = family.whole_token, family.tokens_per_tile
    seen, canvas = set(), []
    for size in SIZES:
        plan = family.plan(size)
        picture = np.broadcast_to(np.uint8(0), (3, *size))
        assert plan.resized == module.get_resize_output_image_size(picture, family.longest_px)
        if family.splits:
            canvas.clear()
            images.resize_for_vision_encoder.__func__(
                SimpleNamespace(resize=lambda _, size, **__: canvas.append(size)),
                np.broadcast_to(np.uint8(0), (3, *plan.resized)),
                family.size_px,
            )
            high, wide = canvas[0].height, canvas[0].width
            assert plan.grid == (high // family.size_px, wide // family.size_px)
        rows, cols = plan.grid if plan.num_units > 1 else (0, 0)
        assert plan.num_units == rows * cols + 1
        grid = {"rows": [[rows]], "cols": [[cols]]}
        text = "".join(symbol * count for symbol, count in plan.layout)
        if plan.grid not in seen:
            assert text == theirs.replace_image_token(grid, 0)
        seen.add(plan.grid)
        assert {symbol for symbol, _ in plan.layout} <= set(family.tokens.symbols)
    assert len(seen) > 5 or not family.splits


@pytest.mark.parametrize("family", [Pixtral(), Pixtral(patch_px=14, merge=2, longest_px=1540)])
def test_pixtral_plans_and_writes_tokens_as_the_processor(family):
    module = pytest.importorskip("transformers.models.pixtral.image_processing_pil_pixtral")
    theirs = object.__new__(model_folders.pixtral_processor_class())
    theirs.patch_size, theirs.spatial_merge_size = family.patch_px, family.merge
    theirs.image_token, theirs.image_break_token = family.image_token, family.break_token
    theirs.image_end_token = family.end_token
    refused = 0
    for size in SIZES:
        picture = np.broadcast_to(np.uint8(0), (3, *size))
        want = module.get_resize_output_image_size(
            picture, family.longest_px, family.patch_px * family.merge, "channels_first"
        )
        if 0 in want:
            with pytest.raises(SampleError) as caught:
                family.plan(size)
            assert caught.value.reason == "picture_shape"
            refused += 1
            continue
        plan = family.plan(size)
        assert plan.resized == want
        text = "".join(symbol * count for symbol, count in plan.layout)
        assert text == theirs.replace_image_token({"image_sizes": [want]}, 0)
    assert 0 < refused < len(SIZES) // 3


@pytest.mark.parametrize(
    "family",
    [
        Qwen2VL(max_pixels=100_000),
        FixedSize(),
        InternVL(),
        AnyRes(),
        ONEVISION,
        Idefics3(longest_px=100),
        Pixtral(longest_px=100),
    ],
)
def test_what_is_stored_is_never_larger_and_plans_alike(family):
    for size in SIZES:
        if max(size) / min(size) > 100:
            continue
        stored = family.stored_size(size)
        assert stored[0] <= size[0]
        assert stored[1] <= size[1]
        plan = family.plan(size)
        if plan.resized[0] <= size[0] and plan.resized[1] <= size[1]:
            assert stored == plan.resized
        else:
            assert stored == size


@pytest.mark.parametrize(
    "family",
    [
        Qwen2VL(patch_px=16),
        FixedSize(fit="squash"),
        InternVL(),
        Gemma3(),
        ONEVISION,
        Idefics3(),
        Pixtral(),
        PaliGemma(),
        Processor(
            model_type="aria",
            image_processor="AriaImageProcessor",
            settings="{}",
            image_token="<image>",
            marker="<image>",
            unused=("num_crops",),
        ),
    ],
)
def test_a_family_survives_the_manifest(family):
    document = family_to_dict(family)
    assert family_from_dict(document) == family
    for wrong in ({**document, "kind": "qwen2_vk"}, {**document, "patchez": 1}):
        with pytest.raises(ConfigError) as caught:
            family_from_dict(wrong)
        assert caught.value.reason == "family_unknown"


def test_more_pixels_than_were_stored_are_refused_and_fewer_are_not():
    stored = Qwen2VL(max_pixels=500_000)
    assert not Qwen2VL(max_pixels=100_000, min_pixels=1, mean=HALF).unlike(stored)
    assert set(Qwen2VL(max_pixels=500_001).unlike(stored)) == {"max_pixels"}
    assert set(Qwen2VL(patch_px=16).unlike(stored)) == {"patch_px", "max_pixels"}
    assert set(FixedSize().unlike(stored)) == {"kind"}
    assert not Pixtral(longest_px=100).unlike(Pixtral())
    assert set(Pixtral(longest_px=2000).unlike(Pixtral())) == {"longest_px"}
    assert not Idefics3(splits=False, longest_px=364).unlike(Idefics3())
    assert set(Idefics3().unlike(Idefics3(splits=False))) == {"splits"}
    assert set(AnyRes().unlike(ONEVISION)) >= {"size_px", "resolutions", "single_tiles"}
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


SIGLIP = {**LLAVA, "model_type": "paligemma"}
NEXT = {**LLAVA, "model_type": "llava_next"}
SMOL = {"model_type": "smolvlm", "vision_config": {"patch_size": 14}, "scale_factor": 1}
SQUARE = {"height": 224, "width": 224}

IGNORED_BEFORE = {
    "a class of another kind": (LLAVA, {"image_processor_type": "ViTImageProcessor"}),
    "a null that means no": (LLAVA, {"do_normalize": None}),
    "no crop of a picture whose short side is given": (LLAVA, {"do_center_crop": None}),
    "a crop": (SIGLIP, {"do_center_crop": True, "crop_size": SQUARE}),
    "a short side": (SIGLIP, {"size": 224}),
    "tiles of another size": (NEXT, {"do_center_crop": False, "crop_size": SQUARE, "size": 336}),
    "no filter": (SMOL, {"resample": None}),
    "no mean": (SMOL, {"image_mean": None}),
    "an order of axes": (SMOL, {"data_format": "channels_last"}),
}


@pytest.mark.parametrize("name", IGNORED_BEFORE)
def test_what_no_family_would_heed_is_refused_by_name(name):
    config, images = IGNORED_BEFORE[name]
    with pytest.raises(ConfigError) as caught:
        read_family(ModelConfig(config=config, image_processor=images, image_token="<image>"))
    assert caught.value.reason == "family_setting"
    assert any(each in str(caught.value) for each in (*images, "size"))


def test_what_files_leave_out_is_what_the_class_has():
    def read(config, images):
        return read_family(
            ModelConfig(config=config, image_processor=images, image_token="<image>")
        )

    assert read(LLAVA, {}) == FixedSize(size_px=224, num_tokens=256)
    assert read(SIGLIP, {}) == PaliGemma(image_token="<image>", sliding_window=0)
    assert read({"model_type": "gemma3"}, {}).size_px == 224
    assert not read(SMOL, {"do_image_splitting": None}).splits
    assert read(SMOL, {"do_convert_rgb": None, "image_mean": 0.5}).mean == HALF
    # Its processor cuts pictures whatever the file says.
    assert read({"model_type": "internvl"}, {"crop_to_patches": False}).max_tiles == 12


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


def test_newer_llavas_idefics3_and_pixtral_follow_their_files():
    def read(config, images, **processor):
        return read_family(
            ModelConfig(
                config=config, image_processor=images, processor=processor, image_token="<image>"
            )
        )

    clip = {"model_type": "clip_vision_model", "patch_size": 14, "image_size": 336}
    grid = {"image_grid_pinpoints": [list(each) for each in AnyRes().resolutions]}
    config = {"model_type": "llava_next", "vision_config": clip, **grid}
    images = {
        "size": {"shortest_edge": 336},
        "crop_size": {"height": 336, "width": 336},
        "do_center_crop": True,
        **grid,
    }
    assert read(config, images) == AnyRes()
    assert read(config, images, vision_feature_select_strategy="full").num_tokens == 577
    siglip = {"model_type": "siglip_vision_model", "patch_size": 14, "image_size": 384}
    config = {
        "model_type": "llava_onevision",
        "vision_config": siglip,
        "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_select_strategy": "full",
        "image_grid_pinpoints": [list(each) for each in ONEVISION.resolutions],
    }
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    tiles = {"size": {"height": 384, "width": 384}, **half}
    assert read(config, tiles) == replace(ONEVISION, mean=HALF, std=HALF)
    for wrong in ({"vision_aspect_ratio": "pad"}, {"vision_config": {**siglip, "image_size": 1}}):
        with pytest.raises(ConfigError) as caught:
            read({**config, **wrong}, tiles)
        assert caught.value.reason == "family_setting"
    smol = {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}
    tower = {"vision_config": {"patch_size": 16}, "scale_factor": 4}
    got = read({"model_type": "smolvlm", **tower}, smol)
    assert got == Idefics3(size_px=512, longest_px=2048, tokens_per_tile=64)
    assert not read({"model_type": "idefics3"}, {**smol, "do_image_splitting": False}).splits
    pixtral = {"model_type": "llava", "vision_config": {"model_type": "pixtral", "patch_size": 16}}
    images = {"size": {"longest_edge": 1024}, "patch_size": {"height": 16, "width": 16}}
    assert read(pixtral, images) == Pixtral(image_token="<image>")
    got = read({**pixtral, "model_type": "mistral3"}, images, patch_size=14, spatial_merge_size=2)
    assert (got.patch_px, got.merge) == (14, 2)
    with pytest.raises(ConfigError) as caught:
        AnyRes(resolutions=((336, 500),))
    assert caught.value.reason == "family_field"
