"""Features: what a frozen vision backbone makes of pictures, once, instead of at each step.

Decides which pixels a backbone is shown, how it is called and what identifies it; keeps features of
pictures in memory for inference. Never writes a dataset: `vlm_shards.features` does.
"""

from loader.features.backbone import Backbone, Shown, check_backbone, load_backbone
from loader.features.cache import FeatureCache
from loader.features.extract import extract, show_pictures

__all__ = [
    "Backbone",
    "FeatureCache",
    "Shown",
    "check_backbone",
    "extract",
    "load_backbone",
    "show_pictures",
]
