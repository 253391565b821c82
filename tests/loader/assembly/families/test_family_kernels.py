"""Kernels give the values of transformers' own image processors, bit for bit."""

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from loader.assembly.families.kernels import has_lanczos, unit_shape, write_units
from shardspec.families import (
    AnyRes,
    FixedSize,
    Gemma3,
    Idefics3,
    InternVL,
    Pixtral,
    Qwen2VL,
    plan_pictures,
)

HALF = (0.5, 0.5, 0.5)
FAMILIES = {
    "qwen2_vl": Qwen2VL(),
    "qwen3_vl": Qwen2VL(patch_px=16, min_pixels=65536, max_pixels=300000, mean=HALF, std=HALF),
    "llava": FixedSize(),
    "siglip": FixedSize(size_px=384, fit="squash", mean=HALF, std=HALF, num_tokens=729),
    "internvl": InternVL(),
    "gemma3": Gemma3(size_px=448),
    "llava_next": AnyRes(),
    "llava_onevision": AnyRes(
        size_px=384,
        resolutions=tuple(itertools.product((384, 768, 1152), repeat=2)),
        patches=27,
        num_tokens=729,
        most_tiles=9,
        single_tiles=True,
        mean=HALF,
        std=HALF,
    ),
    "idefics3": Idefics3(size_px=112, longest_px=448),
    "pixtral": Pixtral(),
}
SIZES = ((61, 97), (427, 640), (1201, 333), (30, 31), (56, 84))
"""(height, width); qwen2_vl resizes nothing of the last one."""

GOLDEN = json.loads((Path(__file__).parents[3] / "golden" / "families.json").read_text())
"""sha256 of float32 `pixel_values` by transformers 5.23.0 with torchvision 0.28.0, of `noise`."""


def noise(size):
    return np.random.RandomState(size[0] * size[1]).randint(0, 256, (*size, 3)).astype(np.uint8)


def ours(family, pixels, backend, count=1):
    """Renders the first of some equal pictures of a sample."""
    plan = plan_pictures(family, [pixels.shape[:2]] * count)[0]
    out = np.full((plan.num_units, *unit_shape(family, [plan])), np.nan, np.float32)
    write_units(family, plan, pixels, out, backend=backend)
    return out


def theirs(name, family):
    mean_std = {"image_mean": list(family.mean), "image_std": list(family.std)}
    if name in ("qwen2_vl", "qwen3_vl"):
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        return Qwen2VLImageProcessorPil(
            patch_size=family.patch_px,
            min_pixels=family.min_pixels,
            max_pixels=family.max_pixels,
            **mean_std,
        )
    if name == "pixtral":
        from transformers.models.pixtral.image_processing_pil_pixtral import (
            PixtralImageProcessorPil,
        )

        return PixtralImageProcessorPil(**mean_std)
    side = {"height": family.size_px, "width": family.size_px}
    if name == "llava":
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        size = {"shortest_edge": family.size_px}
        return CLIPImageProcessorPil(size=size, crop_size=side, **mean_std)
    if name == "siglip":
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

        return SiglipImageProcessorPil(size=side, **mean_std)
    if name == "gemma3":
        from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

        return Gemma3ImageProcessorPil(size=side, **mean_std)
    if name == "llava_next":
        from transformers.models.llava_next.image_processing_pil_llava_next import (
            LlavaNextImageProcessorPil,
        )

        size = {"shortest_edge": family.size_px}
        return LlavaNextImageProcessorPil(size=size, crop_size=side, **mean_std)
    if name == "llava_onevision":
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil,
        )

        pinpoints = [list(each) for each in family.resolutions]
        return LlavaOnevisionImageProcessorPil(
            size=side, image_grid_pinpoints=pinpoints, **mean_std
        )
    if name == "idefics3":
        from transformers.models.smolvlm.image_processing_pil_smolvlm import (
            SmolVLMImageProcessorPil,
        )

        return SmolVLMImageProcessorPil(
            size={"longest_edge": family.longest_px},
            max_image_size={"longest_edge": family.size_px},
            **mean_std,
        )
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    return GotOcr2ImageProcessorPil(size=side, crop_to_patches=True, **mean_std)


@pytest.mark.parametrize("name", FAMILIES)
def test_backend_pil_is_bit_for_bit_that_of_the_processor(name):
    family = FAMILIES[name]
    processor = theirs(name, family)
    for size in SIZES:
        pixels = noise(size)
        want = processor(pixels, return_tensors="np", input_data_format="channels_last")
        made = ours(family, pixels, "pil")
        np.testing.assert_array_equal(made, want["pixel_values"].reshape(made.shape))
        if "image_grid_thw" in want:
            assert want["image_grid_thw"].tolist() == [[1, *family.plan(size).grid]]
        if family.kind == "anyres" and family.single_tiles:
            want = processor([[pixels] * 2], return_tensors="np", input_data_format="channels_last")
            made = ours(family, pixels, "pil", count=2)
            np.testing.assert_array_equal(made, want["pixel_values"][0])


@pytest.mark.parametrize("name", FAMILIES)
def test_backend_torchvision_is_bit_for_bit_that_of_the_processor(name):
    family = FAMILIES[name]
    if family.filter == "lanczos" and not has_lanczos():
        pytest.skip("this torch has no LANCZOS; transformers takes BICUBIC then, as we do")
    for size in SIZES:
        key = f"{name} {size[0]}x{size[1]}"
        made = ours(family, noise(size), "torchvision")
        assert hashlib.sha256(made.tobytes()).hexdigest() == GOLDEN[key]
        if family.kind == "anyres" and family.single_tiles:
            made = ours(family, noise(size), "torchvision", count=2)
            assert hashlib.sha256(made.tobytes()).hexdigest() == GOLDEN[f"{key} of 2"]
