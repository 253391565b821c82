"""Model families: what a model sees of a picture of some size, and which tokens stand for it.

Each family is a frozen dataclass of plain values with a pure `plan`; the kernels that make tensors
of pixels are in `loader.assembly.families`. Never touches pixels. Molmo's own tiling is
`shardspec.tiling`.
"""

from shardspec.families.anyres import AnyRes
from shardspec.families.configs import MODEL_TYPES, ModelConfig, read_family
from shardspec.families.fixed import FixedSize
from shardspec.families.gemma3 import Gemma3
from shardspec.families.idefics3 import Idefics3
from shardspec.families.internvl import InternVL
from shardspec.families.paligemma import PaliGemma
from shardspec.families.pixtral import Pixtral
from shardspec.families.plan import (
    Family,
    Filter,
    PicturePlan,
    PictureTokens,
    Size,
    VideoSide,
    same_tokens,
)
from shardspec.families.processor import Processor, packs_as_plain_decoder, refusal
from shardspec.families.qwen2_vl import Qwen2VL
from shardspec.families.stored import (
    StoredModel,
    family_from_dict,
    family_to_dict,
    plan_pictures,
    plan_videos,
)

__all__ = [
    "MODEL_TYPES",
    "AnyRes",
    "Family",
    "Filter",
    "FixedSize",
    "Gemma3",
    "Idefics3",
    "InternVL",
    "ModelConfig",
    "PaliGemma",
    "PicturePlan",
    "PictureTokens",
    "Pixtral",
    "Processor",
    "Qwen2VL",
    "Size",
    "StoredModel",
    "VideoSide",
    "family_from_dict",
    "family_to_dict",
    "packs_as_plain_decoder",
    "plan_pictures",
    "plan_videos",
    "read_family",
    "refusal",
    "same_tokens",
]
