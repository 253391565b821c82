"""From stored samples to the arrays of a batch: draws, layout of tokens, pixels, collation.

Decides which variants, crops and augmentations an example gets and where its tokens and pixels go.
Never decides which sample comes next, and never opens a shard.
"""

from loader.assembly.assemble import assemble
from loader.assembly.attention import build_attention_mask
from loader.assembly.augment import Augment
from loader.assembly.clip import Clip
from loader.assembly.collate import IGNORE_INDEX, MMCollator, PadSide, finished
from loader.assembly.draft import Draft, describe_question
from loader.assembly.families.collate import ModelCollator, finished_for_model
from loader.assembly.families.example import (
    ModelDraft,
    ModelPack,
    ModelPlan,
    ModelPlanner,
    ModelView,
)
from loader.assembly.families.kernels import Backend, unit_shape, write_units
from loader.assembly.families.masks import num_masks
from loader.assembly.families.unsharded import ModelPreprocessor, assemble_for_model
from loader.assembly.layout import TokenIds
from loader.assembly.ocr_boxes import ocr_boxes
from loader.assembly.own_augment import AugmentFunction, OwnAugment
from loader.assembly.packed import Pack, fitting
from loader.assembly.pixels import (
    MEAN_STD,
    Encoded,
    Normalization,
    normalize,
    patchify,
    render,
)
from loader.assembly.planner import ExamplePlan, Planner
from loader.assembly.questions import Questions
from loader.assembly.unsharded import DeterministicDataset, MolmoPreprocessor, render_image
from loader.assembly.video import VideoPreprocessor
from loader.assembly.view import View, view_collator

__all__ = [
    "IGNORE_INDEX",
    "MEAN_STD",
    "Augment",
    "AugmentFunction",
    "Backend",
    "Clip",
    "DeterministicDataset",
    "Draft",
    "Encoded",
    "ExamplePlan",
    "MMCollator",
    "ModelCollator",
    "ModelDraft",
    "ModelPack",
    "ModelPlan",
    "ModelPlanner",
    "ModelPreprocessor",
    "ModelView",
    "MolmoPreprocessor",
    "Normalization",
    "OwnAugment",
    "Pack",
    "PadSide",
    "Planner",
    "Questions",
    "TokenIds",
    "VideoPreprocessor",
    "View",
    "assemble",
    "assemble_for_model",
    "build_attention_mask",
    "describe_question",
    "finished",
    "finished_for_model",
    "fitting",
    "normalize",
    "ocr_boxes",
    "patchify",
    "render",
    "render_image",
    "num_masks",
    "unit_shape",
    "view_collator",
    "write_units",
]
