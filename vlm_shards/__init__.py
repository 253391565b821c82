"""Both halves in one place: datasets, preprocessors, collators and mixtures, without shards.

`from vlm_shards import ...` has the names that a pipeline in one process is written with. Training
on shards needs `loader` alone, which starts faster: this package imports `preprocess` too.
"""

from loader import (
    Augment,
    DeterministicDataset,
    IterableDatasetMixture,
    MMCollator,
    MolmoPreprocessor,
    StreamingDataset,
    VideoPreprocessor,
    View,
    make_dataloader,
)
from preprocess.datasets import (
    VQA2,
    AOkVqa,
    Dataset,
    DatasetBase,
    DocumentDataset,
    DocumentPolicy,
    HfDataset,
    PixMoAskModelAnything,
    PixMoCap,
    PixMoCapQa,
    PixMoCount,
    PixMoMultiImageQa,
    PixMoPointExplanations,
    PixMoPoints,
    RobotDataset,
    TextSft,
)
from preprocess.text import DataFormatter
from vlm_shards.config import PipelineConfig, get_dataset
from vlm_shards.preprocessors import ImagePreprocessor, InterleavedTextPreprocessor

__all__ = [
    "VQA2",
    "AOkVqa",
    "Augment",
    "DataFormatter",
    "Dataset",
    "DatasetBase",
    "DeterministicDataset",
    "DocumentDataset",
    "DocumentPolicy",
    "HfDataset",
    "ImagePreprocessor",
    "InterleavedTextPreprocessor",
    "IterableDatasetMixture",
    "MMCollator",
    "MolmoPreprocessor",
    "PipelineConfig",
    "PixMoAskModelAnything",
    "PixMoCap",
    "PixMoCapQa",
    "PixMoCount",
    "PixMoMultiImageQa",
    "PixMoPointExplanations",
    "PixMoPoints",
    "RobotDataset",
    "StreamingDataset",
    "TextSft",
    "VideoPreprocessor",
    "View",
    "get_dataset",
    "make_dataloader",
]
