"""View: what one training run wants to see of the samples, and the collator of its examples."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Literal, get_args

import numpy as np

from loader.assembly.augment import Augment, Resample
from loader.assembly.collate import IMAGES, MMCollator, PadSide, Shapes
from loader.assembly.families.example import ModelView
from loader.assembly.features import IMAGE_FEATURES
from loader.assembly.layout import LossScale, Tree
from loader.assembly.own_augment import AugmentFunction, OwnAugment
from loader.assembly.pixels import Normalization
from loader.assembly.questions import Questions
from shardspec.errors import ConfigError
from shardspec.features import StoredFeatures
from shardspec.tiling import FrameView, ImageView

_UINT8, _FLOAT32 = np.dtype(np.uint8), np.dtype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What one training run wants to see of the samples."""

    image: ImageView = field(default_factory=ImageView)
    """Crops, patches and tokens."""
    frames: FrameView | None = None
    """The frames of videos; None where the dataset has none. A `StreamingDataset` fills in what its
    shards were made for."""
    high_res: ImageView | None = None
    """Another view of the same stored images, such as 24 instead of 8 crops."""
    high_res_probability: float = 0.0
    """Share of the samples, 0 to 1, that get the view `high_res`, drawn each epoch."""
    augment: Augment | OwnAugment | AugmentFunction = field(default_factory=Augment)
    """Random crops, flips and colour, or a function of your own, `(image, rng) -> image`; off by
    default, and always off for inference."""
    resample: Resample = "bicubic"
    """Filter of what is resized at load. Molmo 1 is trained with "bilinear", Molmo 2 with
    "bilinear-aliased"; docs/streaming.md says what they differ by."""
    normalize: Normalization | None = None
    """"imagenet", "openai" or "siglip" give float32; None leaves uint8 for the device."""
    pixels: Literal["crops", "patches"] = "crops"
    """"crops": [n, 3, S, S]; "patches": [n, patches, patch * patch * 3], for a linear layer."""
    reduced_decoding: bool = False
    """Decode a stored JPEG at 1/2, 1/4 or 1/8 of its sides where they divide by that and the view
    needs no more: less time, and pixels that are within 40 dB of those of the whole picture resized
    (measured on scenes, tests/loader/assembly/test_pixels.py). The unsharded path has no use for
    it."""
    image_map: Literal["first", "per_token", "pooling"] = "first"
    """How a model finds its image tokens. "first": `image_input_idx` [n], the first patch token of
    each crop. "per_token" (Molmo 1): `image_input_idx` [n, tokens per crop], -100 where a token
    belongs to another crop. "pooling" (Molmo 2): `token_pooling` as well, whose k-th row lists the
    patches of the k-th patch token."""
    sequence_length: int | None = None
    """Longest sequence; text is cut there, images never are."""
    max_images: int | None = None
    """Most images in a sample; None for any."""
    branch_order: Literal["shuffled", "stored"] = "shuffled"
    """Order of a sample's conversations: it decides which ones fit the sequence."""
    tree: Tree = "molmo2"
    loss: LossScale = "flat"
    weight: float = 1.0
    """Factor of `loss_weights` for the whole dataset."""
    purpose: Literal["train", "inference", "evaluation"] = "train"
    """"inference" takes the first variant of each turn, in stored order, and augments nothing.
    "evaluation" does the same, and gives a row for each question of a sample that ends in front of
    its answer: nothing of that answer is in it, and there is no loss (docs/evaluation.md)."""
    questions: Questions = "all"
    """For evaluation: "all" asks each question after the exchanges before it in its conversation,
    with the answers of those; "first" asks the first one of each conversation only."""
    model: ModelView | None = None
    """Of a dataset that was built for a model: its family decides what `image`, `pixels`,
    `image_map` and the other settings of the Molmo kind decide otherwise."""
    features: StoredFeatures | None = None
    """Of a dataset that stores features of a backbone instead of pictures; a `StreamingDataset`
    fills them in. What they were made of decides `image`, `resample` and `normalize`, or `model`,
    and pictures cannot be augmented (docs/features.md)."""

    def __post_init__(self) -> None:
        if self.features is not None:
            self._take_features(self.features)
        if self.model is not None:
            usual = {f.name: f.default for f in fields(View)}
            usual |= {"image": ImageView(), "augment": Augment()}
            own: tuple[str, ...] = ("model", "sequence_length", "max_images", "weight")
            own = (*own, "purpose", "questions", "features")
            given = [n for n in usual if n not in own and getattr(self, n) != usual[n]]
            if given:
                raise ConfigError("model_view.settings", names=", ".join(given))
        wrong: dict[str, object] = {}
        if not 0 <= self.high_res_probability <= 1:
            wrong["high_res_probability"] = self.high_res_probability
        if self.high_res_probability and self.high_res is None:
            wrong["high_res"] = None
        if self.high_res and self.high_res.size_px != self.image.size_px:
            wrong["high_res.size_px"] = self.high_res.size_px
        if self.weight < 0:
            wrong["weight"] = self.weight
        if self.resample not in get_args(Resample):
            wrong["resample"] = self.resample
        if self.purpose not in ("train", "inference", "evaluation"):
            wrong["purpose"] = self.purpose
        if self.questions not in get_args(Questions):
            wrong["questions"] = self.questions
        if wrong:
            raise ConfigError("view", facts=wrong)
        if not isinstance(self.augment, Augment | OwnAugment):
            object.__setattr__(self, "augment", OwnAugment(self.augment))

    def _take_features(self, features: StoredFeatures) -> None:
        """Takes over what features were made of where a field has its default.

        Raises:
          ConfigError: `features_view`: a field says otherwise, or changes pictures.
        """
        model = None
        if features.family is not None:
            model = ModelView(family=features.family, backend=features.backend)  # type: ignore[arg-type]
        made_of = {
            "image": features.image or ImageView(),
            "resample": features.resample or "bicubic",
            "normalize": features.normalize,
            "pixels": features.pixels or "crops",
            "model": model,
            "augment": Augment(),
            "high_res": None,
        }
        wrong: dict[str, object] = {}
        for each in fields(View):
            if each.name not in made_of:
                continue
            usual = Augment() if each.name == "augment" else each.default
            usual = ImageView() if each.name == "image" else usual
            value, own = made_of[each.name], getattr(self, each.name)
            if own == usual:
                object.__setattr__(self, each.name, value)
            elif own != value:
                wrong[each.name] = f"{own} asked for, {value} stored"
        if wrong:
            raise ConfigError("features_view.fields", facts=wrong)

    def shapes(self, image: ImageView) -> Shapes:
        """Tells the shapes of what an example in one of the resolutions has for each crop."""
        shape: tuple[int, ...] = (3, image.size_px, image.size_px)
        dtype, key = (_UINT8 if self.normalize is None else _FLOAT32), IMAGES
        if self.pixels == "patches":
            shape = (image.num_patches, image.patch_px**2 * 3)
        if self.features is not None:
            shape, dtype = self.features.row_shape, self.features.array_dtype
            key = IMAGE_FEATURES
        pools = [image.pool, *([self.frames.pool] if self.frames else [])]
        return Shapes(
            image=shape,
            dtype=dtype,
            num_patches=image.num_patches,
            tokens_per_crop=math.prod(image.crop_tokens) if self.image_map == "per_token" else None,
            pool=max(map(math.prod, pools)) if self.image_map == "pooling" else None,
            key=key,
        )


def view_collator(
    view: View,
    *,
    sequence_length: int,
    pad_mode: str = "to_128",
    pad_token_id: int = 0,
    extra_keys: tuple[str, ...] = (),
    with_metadata: bool = False,
    with_real: bool = False,
    min_images: int = 0,
    max_images: int | None = None,
    pad_side: PadSide = "right",
    overlong: Literal["error", "truncate"] = "error",
) -> MMCollator:
    """Makes the collator that fits a view's examples; the arguments are `MMCollator`'s.

    Raises:
      ConfigError: `model_view`, the view is of a model; and as `MMCollator`.
    """
    if view.model is not None:
        raise ConfigError("model_view.collator", family=view.model.family.kind)
    shapes = view.shapes(view.image)
    max_pooled = None
    if max_images is not None and shapes.pool is not None:
        # No crop has more tokens than when all of it is shown, and all are in the sequence.
        images = [image for image in (view.image, view.high_res) if image is not None]
        per_crop = max(math.prod(image.crop_tokens) for image in images)
        max_pooled = max(1, min(max_images * per_crop, sequence_length))
    return MMCollator(
        sequence_length=sequence_length,
        pad_mode=pad_mode,
        pad_token_id=pad_token_id,
        image_shape=shapes.image,
        num_patches=shapes.num_patches,
        tokens_per_crop=shapes.tokens_per_crop,
        pool=shapes.pool,
        extra_keys=extra_keys,
        with_metadata=with_metadata,
        with_real=with_real,
        min_images=min_images,
        max_images=max_images,
        pad_side=pad_side,
        max_pooled=max_pooled,
        image_dtype=shapes.dtype,
        features=view.features,
        overlong=overlong,
    )
