"""From stored samples to the arrays of a batch: draws, layout of tokens, pixels, collation.

Decides which variants, crops and augmentations an example gets and where its tokens and pixels go.
Never decides which sample comes next, and never opens a shard.
"""

from loader.assembly.assemble import (
    Draft,
    ExamplePlan,
    Planner,
    View,
    assemble,
    describe_question,
    view_collator,
)
from loader.assembly.augment import Augment
from loader.assembly.collate import MMCollator, PadSide, finished
from loader.assembly.layout import TokenIds
from loader.assembly.own_augment import AugmentFunction, OwnAugment
from loader.assembly.packed import Pack, fitting
from loader.assembly.pixels import MEAN_STD, Encoded, Normalization, normalize
from loader.assembly.questions import Questions
from loader.assembly.unsharded import DeterministicDataset, MolmoPreprocessor, render_image
from loader.assembly.video import VideoPreprocessor

__all__ = [
    "MEAN_STD",
    "Augment",
    "AugmentFunction",
    "DeterministicDataset",
    "Draft",
    "Encoded",
    "ExamplePlan",
    "MMCollator",
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
    "describe_question",
    "finished",
    "fitting",
    "normalize",
    "render_image",
    "view_collator",
]
