"""Settings of the image processors of transformers, complete.

What a file leaves out is what the processor's class has; null is a value of its own, as if it were
False. A family reads some of the settings; others change neither pixels nor tokens; the rest is
refused where it is not what the class has, so that nothing that a file asks for is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_CLIP = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3}
_HALF = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
_CROPS = {
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
}
_COMMON: Mapping[str, Any] = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "rescale_factor": 1 / 255,
    "default_to_square": False,
    "do_center_crop": None,
    "crop_size": None,
    "do_pad": None,
    "pad_size": None,
    "data_format": "channels_first",
    "input_data_format": None,
}

_READ = frozenset({"rescale_factor", "resample", "image_mean", "image_std", "size"})
"""What every family reads."""


_NULL_IS_USUAL = frozenset({"do_convert_rgb", "data_format"})
"""Pictures are RGB here whatever it says, and values are what they are in any order of the axes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageClass:
    """A class of image processors."""

    defaults: Mapping[str, Any]
    """What it has where a file says nothing."""
    read: tuple[str, ...] = ()
    """Settings that its family reads, besides `_READ`."""
    unused: tuple[str, ...] = ()
    """Settings that change nothing, or that the model's processor always passes itself."""
    null_is_usual: tuple[str, ...] = ()
    """Settings whose null is what the class has."""
    known: Mapping[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "known", {**_COMMON, **self.defaults})

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Adds what a file leaves out; whole numbers as sizes become what the class makes of them.

        >>> CLASSES["Siglip"].complete({"size": 384})["size"]
        {'shortest_edge': 384}
        """
        null = {name for name, value in given.items() if value is None}
        kept = null - {*_NULL_IS_USUAL, *self.null_is_usual}
        found = {**self.known, **{n: v for n, v in given.items() if n in kept or n not in null}}
        square = {"size": found["default_to_square"], "crop_size": True}
        for name, is_square in square.items():
            if isinstance(found.get(name), int):
                side = found[name]
                found[name] = (
                    {"height": side, "width": side} if is_square else {"shortest_edge": side}
                )
        for name in ("image_mean", "image_std"):
            value = found[name]
            found[name] = (value,) * 3 if isinstance(value, int | float) else tuple(value or ())
        return found

    def unread(self, complete: Mapping[str, Any]) -> str:
        """Names a setting that no family would heed; "" where there is none."""
        heeded = {*_READ, *self.read, *self.unused, "default_to_square"}
        for name, usual in self.known.items():
            value = complete[name]
            if name not in heeded and value != usual and (value or usual):
                return name
        return ""


_PAN_AND_SCAN = {
    "pan_and_scan_min_crop_size": 256,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}
"""Numbers of the processor, which hold where files have nulls."""

_PADS = ("do_pad", "pad_size")
_PLAIN = ("crop_size", "do_center_crop", *_PADS)


def _video(values: Mapping[str, Any], *, patch_size: int) -> ImageClass:
    side = 2 * patch_size
    return ImageClass(
        defaults={
            **values,
            "size": {"shortest_edge": 128 * side**2, "longest_edge": 768 * side**2},
            "default_to_square": True,
            "patch_size": patch_size,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "cap_pixels_per_frame": None,
        },
        read=("patch_size", "temporal_patch_size", "merge_size"),
        unused=_PLAIN,
        null_is_usual=("size", "min_pixels", "max_pixels"),
    )


CLASSES: Mapping[str, ImageClass] = {
    "Qwen2VL": ImageClass(
        defaults={
            **_CLIP,
            "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
        },
        read=("patch_size", "temporal_patch_size", "merge_size"),
        unused=_PLAIN,
        null_is_usual=("size", "min_pixels", "max_pixels"),
    ),
    "CLIP": ImageClass(
        defaults={**_CLIP, **_CROPS, "use_square_size": None},
        read=("crop_size", "do_center_crop"),
    ),
    "Llava": ImageClass(
        defaults={**_CLIP, **_CROPS, "do_pad": False}, read=("crop_size", "do_center_crop")
    ),
    "Siglip": ImageClass(defaults={**_HALF, "resample": 3, "size": {"height": 224, "width": 224}}),
    "LlavaNext": ImageClass(
        defaults={
            **_CLIP,
            **_CROPS,
            "do_pad": True,
            "image_grid_pinpoints": (
                *((336, 672), (672, 336), (672, 672)),
                *((1008, 336), (336, 1008)),
            ),
        },
        read=("crop_size", "do_center_crop", "image_grid_pinpoints"),
        unused=_PADS,
    ),
    "LlavaOnevision": ImageClass(
        defaults={
            **_CLIP,
            "size": {"height": 384, "width": 384},
            "do_pad": True,
            "image_grid_pinpoints": tuple(
                (high, wide) for high in range(384, 2305, 384) for wide in range(384, 2305, 384)
            ),
        },
        read=("crop_size", "do_center_crop", "image_grid_pinpoints"),
        unused=_PADS,
    ),
    "GotOcr2": ImageClass(
        defaults={
            **_CLIP,
            "size": {"height": 384, "width": 384},
            "default_to_square": True,
            "crop_to_patches": False,
            "min_patches": 1,
            "max_patches": 12,
        },
        read=("min_patches", "max_patches"),
        unused=("crop_to_patches", *_PLAIN),
    ),
    "Idefics3": ImageClass(
        defaults={
            **_HALF,
            "resample": 1,
            "size": {"longest_edge": 4 * 364},
            "default_to_square": True,
            "do_pad": True,
            "max_image_size": {"longest_edge": 364},
            "do_image_splitting": True,
            "return_row_col_info": False,
        },
        read=("max_image_size", "do_image_splitting"),
        unused=("return_row_col_info", *_PLAIN),
    ),
    "Gemma3": ImageClass(
        defaults={
            **_HALF,
            "resample": 2,
            "size": {"height": 224, "width": 224},
            "default_to_square": True,
            "do_pan_and_scan": None,
            **_PAN_AND_SCAN,
        },
        read=("do_pan_and_scan", *_PAN_AND_SCAN),
        unused=_PLAIN,
        null_is_usual=tuple(_PAN_AND_SCAN),
    ),
    "Pixtral": ImageClass(
        defaults={
            **_CLIP,
            "size": {"longest_edge": 1024},
            "default_to_square": True,
            "do_pad": True,
            "patch_size": {"height": 16, "width": 16},
        },
        # The model's processor passes its own patch_size.
        unused=("patch_size", *_PADS),
    ),
}
"""By the name of a class, without its ending `ImageProcessor`; as in transformers 5.23."""
CLASSES = {
    **CLASSES,
    "SmolVLM": CLASSES["Idefics3"],
    "Qwen2VLVideo": _video(_CLIP, patch_size=14),
    "Qwen3VLVideo": _video({**_HALF, "resample": 3}, patch_size=16),
}

OF_MODELS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), ("Qwen2VL",)),
    "llava": ("Llava", "CLIP", "Siglip"),
    "llava_next": ("LlavaNext",),
    "llava_onevision": ("LlavaOnevision",),
    "internvl": ("GotOcr2",),
    "idefics3": ("Idefics3", "SmolVLM"),
    "smolvlm": ("SmolVLM", "Idefics3"),
    "gemma3": ("Gemma3",),
    "mistral3": ("Pixtral",),
    "paligemma": ("Siglip",),
}
"""By `model_type`: the classes that a family is made after; first that of files that name none."""
