"""Reading a family from the configuration files of a model, as transformers saves them.

Every number comes from the files: a checkpoint's values differ from the defaults of its classes.
What a file asks for and a family does not do is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from shardspec.errors import ConfigError, nearest
from shardspec.families.anyres import AnyRes
from shardspec.families.fixed import FixedSize
from shardspec.families.gemma3 import Gemma3
from shardspec.families.idefics3 import Idefics3
from shardspec.families.internvl import InternVL
from shardspec.families.paligemma import PaliGemma
from shardspec.families.pixtral import Pixtral
from shardspec.families.plan import Family, Filter, VideoSide
from shardspec.families.qwen2_vl import Qwen2VL
from shardspec.families.settings import CLASSES, OF_MODELS

_FILTERS: Mapping[Any, Filter] = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The parsed configuration files of a model."""

    config: Mapping[str, Any]
    """config.json."""
    image_processor: Mapping[str, Any] = field(default_factory=dict)
    """preprocessor_config.json, or the part of processor_config.json."""
    processor: Mapping[str, Any] = field(default_factory=dict)
    """processor_config.json."""
    image_token: str = ""
    """The token of `image_token_id`."""
    tokens: Mapping[str, str] = field(default_factory=dict)
    """Named tokens of the tokenizer, such as `start_image_token`."""
    video_token: str = ""
    """The token of `video_token_id`; "" for a dataset without videos."""
    video_processor: Mapping[str, Any] = field(default_factory=dict)
    """The settings of videos: of processor_config.json, video_preprocessor_config.json, or
    preprocessor_config.json, the first there is."""


def read_family(model: ModelConfig, *, where: str = "") -> Family:
    """Reads the family of a model.

    Raises:
      ConfigError: `family_unknown`, `family_setting`, `family_field`.
    """
    kind = str(model.config.get("model_type", ""))
    if kind not in _READERS:
        raise ConfigError(
            "family_unknown",
            where=where,
            got=kind or "no model_type",
            known=", ".join(_READERS),
            hint=nearest(kind, _READERS),
        )
    return _READERS[kind](_Files(model, where))


class _Files:
    """What readers need of the files of one model."""

    def __init__(self, model: ModelConfig, where: str) -> None:
        self.model, self.where = model, where
        kind, given = str(model.config["model_type"]), model.image_processor
        classes = OF_MODELS[kind]
        if kind == "llava" and self.look("vision_config.model_type") == "pixtral":
            classes = OF_MODELS["mistral3"]
        title = str(given.get("image_processor_type") or classes[0])
        name = title.removesuffix("Pil").removesuffix("Fast").removesuffix("ImageProcessor")
        if name not in classes:
            self.refuse("image_processor_type", title)
        self.images = CLASSES[name].complete(given)
        """The settings of the image processor, with those that files leave out."""
        if unread := CLASSES[name].unread(self.images):
            self.refuse(unread, self.images[unread])
        if abs((self.images["rescale_factor"] or 0) * 255 - 1) > 1e-9:
            self.refuse("rescale_factor", self.images["rescale_factor"])
        # Without them nothing can be done: transformers fails too.
        for name in ("size", "image_mean", "image_std", "max_image_size", "image_grid_pinpoints"):
            if name in self.images and not self.images[name]:
                self.refuse(name, given.get(name))

    def refuse(self, name: str, value: object) -> NoReturn:
        raise ConfigError("family_setting", where=self.where, name=name, got=repr(value))

    def look(self, *names: str) -> Any:
        """Gives the first value among processor_config.json and config.json; dots go deeper."""
        for source in (self.model.processor, self.model.config):
            for name in names:
                found: Any = source
                for part in name.split("."):
                    found = found.get(part) if isinstance(found, Mapping) else None
                if found is not None:
                    return found
        return None

    @property
    def resize(self) -> dict[str, Any]:
        """Filter, mean and standard deviation."""
        number = self.images["resample"]
        # Only one family is tried with LANCZOS.
        if number not in _FILTERS or (number == 1 and "max_image_size" not in self.images):
            self.refuse("resample", number)
        return {
            "filter": _FILTERS[number],
            "mean": tuple(self.images["image_mean"]),
            "std": tuple(self.images["image_std"]),
        }

    @property
    def token(self) -> dict[str, Any]:
        if not self.model.image_token:
            self.refuse("image_token_id", self.look("image_token_id", "image_token_index"))
        return {"image_token": self.model.image_token}

    def patches(self, side: int) -> int:
        """Counts the patches of the tower per side of a square."""
        patch = self.look("patch_size", "vision_config.patch_size")
        if not isinstance(patch, int):
            self.refuse("patch_size", patch)
        return side // patch

    @property
    def more_tokens(self) -> int:
        """Features of a tower that are no patches: the class token of CLIP's; SigLIP's has none."""
        more = self.look("num_additional_image_tokens")
        if more is None:
            more = self.look("vision_config.model_type") == "clip_vision_model"
        return int(more)

    @property
    def fewer_tokens(self) -> int:
        """Features that the model drops."""
        return int(self.look("vision_feature_select_strategy") in ("default", None))

    def sliding_window(self, kind: str, *, without: str = "") -> int | None:
        """Gives how many tokens the sliding layers of the text model see.

        Args:
          kind: Of a text model that has such layers; the default.
          without: Of one that has none: 0.

        Returns:
          None of other kinds, whose masks are not known here.
        """
        text = self.model.config.get("text_config") or {}
        own = text.get("model_type", without or kind)
        if own not in (kind, without):
            return None
        # 4096 is what both classes have where no file says otherwise.
        found = text.get("sliding_window", 4096 if own == kind else 0)
        return int(found or 0)

    def square(self, size: object, name: str) -> int | None:
        """Gives the side of {"height": S, "width": S}."""
        if isinstance(size, Mapping) and "height" in size:
            if size["height"] != size.get("width"):
                self.refuse(name, dict(size))
            return int(size["height"])
        return None


def _qwen2_vl(files: _Files) -> Family:
    images, size = files.images, files.images["size"]
    least = images.get("min_pixels", size.get("shortest_edge", size.get("min_pixels")))
    most = images.get("max_pixels", size.get("longest_edge", size.get("max_pixels")))
    if least is None or most is None:
        files.refuse("size", size)
    return Qwen2VL(
        patch_px=images["patch_size"],
        merge=images["merge_size"],
        temporal_patch=images["temporal_patch_size"],
        min_pixels=least,
        max_pixels=most,
        video=_qwen_videos(files) if files.model.video_token else None,
        **files.resize,
        **files.token,
    )


def _qwen_videos(files: _Files) -> VideoSide:
    """Reads what `Qwen2VLVideoProcessor` and `Qwen3VLVideoProcessor` make of videos."""
    kind = str(files.model.config.get("model_type"))
    newer = kind.startswith("qwen3")
    videos = CLASSES["Qwen3VLVideo" if newer else "Qwen2VLVideo"].complete(
        files.model.video_processor
    )
    shared = ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std")
    for name in (*shared, "resample", "rescale_factor"):
        if files.images[name] != videos[name]:
            files.refuse(f"video_processor.{name}", videos[name])
    if unread := CLASSES["Qwen2VLVideo"].unread(videos):
        files.refuse(f"video_processor.{unread}", videos[unread])
    size = videos["size"]
    least = videos.get("min_pixels") or size.get("shortest_edge")
    most = videos.get("max_pixels") or size.get("longest_edge")
    if not least or not most or (newer and {"min_pixels", "max_pixels"} & videos.keys()):
        files.refuse("video_processor.size", size)
    rate = None
    if kind == "qwen2_5_vl":
        rate = files.look("vision_config.tokens_per_second") or 4
    return VideoSide(
        token=files.model.video_token,
        min_pixels=least,
        max_pixels=most,
        area="video" if newer else "frame",
        times="text" if newer else "none" if rate is None else "seconds",
        rate=1.0 if rate is None else float(rate),
        around=("<|vision_start|>", "<|vision_end|>") if newer else ("", ""),
    )


def _llava(files: _Files) -> Family:
    images = files.images
    if files.look("vision_config.model_type") == "pixtral":
        return _pixtral(files)
    size, crops = images["size"], bool(images["do_center_crop"])
    crop = files.square(images["crop_size"], "crop_size")
    side = files.square(size, "size")
    if side is None:
        short = size.get("shortest_edge")
        if not crops or crop != short or not isinstance(short, int) or "longest_edge" in size:
            files.refuse("size", size)
        side = short
    elif crops and crop != side:
        files.refuse("crop_size", images["crop_size"])
    return FixedSize(
        size_px=side,
        fit="squash" if "height" in size else "center-crop",
        num_tokens=files.patches(side) ** 2 + files.more_tokens - files.fewer_tokens,
        **files.resize,
        **files.token,
    )


def _llava_next(files: _Files) -> Family:
    side, resolutions = _tiles(files)
    patches = files.patches(side)
    return AnyRes(
        size_px=side,
        resolutions=resolutions,
        patches=patches,
        num_tokens=patches**2 + files.more_tokens - files.fewer_tokens,
        **files.resize,
        **files.token,
    )


def _llava_onevision(files: _Files) -> Family:
    side, resolutions = _tiles(files)
    patches = files.patches(side)
    if files.look("num_image_tokens") not in (None, patches**2):
        files.refuse("num_image_tokens", files.look("num_image_tokens"))
    bound = str(files.look("vision_aspect_ratio") or "anyres_max_9")
    if not bound.removeprefix("anyres_max_").isdigit():
        files.refuse("vision_aspect_ratio", bound)
    strategy = files.look("vision_feature_select_strategy")
    return AnyRes(
        size_px=side,
        resolutions=resolutions,
        patches=patches,
        # Its classes keep every feature where no file says otherwise.
        num_tokens=patches**2 - (strategy == "default"),
        most_tiles=int(bound.removeprefix("anyres_max_")),
        single_tiles=True,
        **files.resize,
        **files.token,
    )


def _tiles(files: _Files) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Reads the side of a tile and what tiles may cover."""
    images = files.images
    size, crop = images["size"], files.square(images["crop_size"], "crop_size")
    side = files.square(size, "size") or size.get("shortest_edge")
    if not isinstance(side, int) or "longest_edge" in size:
        files.refuse("size", size)
    # Pictures are cut into tiles of the one and each is resized to the other.
    if crop not in (None, side) or (images["do_center_crop"] and crop is None):
        files.refuse("crop_size", images["crop_size"])
    if files.look("vision_config.image_size") not in (None, side):
        files.refuse("size", size)
    resolutions = tuple((int(high), int(wide)) for high, wide in images["image_grid_pinpoints"])
    # The processor cuts pictures by its own, and the model reads the tiles by its.
    own = files.model.config.get("image_grid_pinpoints")
    if own is not None and [*map(list, resolutions)] != [*map(list, own)]:
        files.refuse("image_grid_pinpoints", images["image_grid_pinpoints"])
    return side, resolutions


def _idefics3(files: _Files) -> Family:
    images, standard = files.images, Idefics3()
    longest = images["size"].get("longest_edge")
    side = images["max_image_size"].get("longest_edge")
    if not isinstance(longest, int):
        files.refuse("size", images["size"])
    if not isinstance(side, int):
        files.refuse("max_image_size", images["max_image_size"])
    scale = files.look("scale_factor")
    tokens = files.look("image_seq_len")
    if tokens is None and scale:
        tokens = (files.patches(side) // scale) ** 2
    return Idefics3(
        size_px=side,
        longest_px=longest,
        splits=bool(images["do_image_splitting"]),
        tokens_per_tile=tokens or standard.tokens_per_tile,
        **files.resize,
        **files.token,
    )


def _pixtral(files: _Files) -> Family:
    images, standard, processor = files.images, Pixtral(), files.model.processor
    size = images["size"]
    longest = size.get("longest_edge") or files.square(size, "size")
    patch = files.look("patch_size", "vision_config.patch_size")
    if not isinstance(longest, int):
        files.refuse("size", size)
    if not isinstance(patch, int):
        files.refuse("patch_size", patch)
    return Pixtral(
        patch_px=patch,
        merge=files.look("spatial_merge_size") or 1,
        longest_px=longest,
        break_token=processor.get("image_break_token", standard.break_token),
        end_token=processor.get("image_end_token", standard.end_token),
        **files.resize,
        **files.token,
    )


def _internvl(files: _Files) -> Family:
    images, standard = files.images, InternVL()
    side = files.square(images["size"], "size")
    tokens = files.model.tokens
    if side is None:
        files.refuse("size", images["size"])
    return InternVL(
        size_px=side,
        min_tiles=images["min_patches"],
        max_tiles=images["max_patches"],
        tokens_per_tile=files.look("image_seq_length") or standard.tokens_per_tile,
        start_token=tokens.get("start_image_token", standard.start_token),
        end_token=tokens.get("end_image_token", standard.end_token),
        **files.resize,
        **files.token,
    )


def _gemma3(files: _Files) -> Family:
    images, standard, tokens = files.images, Gemma3(), files.model.tokens
    both_ways = files.look("text_config.use_bidirectional_attention")
    crops = None
    if images["do_pan_and_scan"]:
        names = ("min_crop_size", "max_num_crops", "min_ratio_to_activate")
        least, most, ratio = (images[f"pan_and_scan_{name}"] for name in names)
        crops = (int(least), int(most), float(ratio))
    side = files.square(images["size"], "size")
    if side is None:
        files.refuse("size", images["size"])
    return Gemma3(
        size_px=side,
        num_tokens=files.look("image_seq_length", "mm_tokens_per_image") or standard.num_tokens,
        start_token=tokens.get("boi_token", standard.start_token),
        end_token=tokens.get("eoi_token", standard.end_token),
        pan_and_scan=crops,
        # A text model that sees both ways has other masks.
        sliding_window=None if both_ways else files.sliding_window("gemma3_text"),
        **files.resize,
        **files.token,
    )


def _paligemma(files: _Files) -> Family:
    images = files.images
    side = files.square(images["size"], "size")
    if side is None:
        files.refuse("size", images["size"])
    tokens = images.get("image_seq_length") or files.patches(side) ** 2
    return PaliGemma(
        size_px=side,
        num_tokens=tokens,
        sliding_window=files.sliding_window("gemma2", without="gemma"),
        **files.resize,
        **files.token,
    )


_READERS: Mapping[str, Callable[[_Files], Family]] = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_vl,
    "qwen3_vl": _qwen2_vl,
    "qwen3_vl_moe": _qwen2_vl,
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "internvl": _internvl,
    "idefics3": _idefics3,
    "smolvlm": _idefics3,
    "gemma3": _gemma3,
    "mistral3": _pixtral,
    "paligemma": _paligemma,
}
"""By `model_type` of config.json."""

MODEL_TYPES = tuple(_READERS)
"""The `model_type`s that are native."""
