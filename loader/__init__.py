"""The training half: from shards to batches, in an order that no number of ranks changes."""

from loader.assemble import View, assemble
from loader.augment import Augment
from loader.collate import MMCollator
from loader.dataloader import StreamLoader, make_dataloader, view_collator
from loader.mixture_stream import IterableDatasetMixture
from loader.molmo import DeterministicDataset, MolmoPreprocessor
from loader.prefetch import Network
from loader.raw import RawDataset, RawSample
from loader.stream import StreamingDataset
from shardspec.ranges import RetryPolicy

__all__ = [
    "Augment",
    "DeterministicDataset",
    "IterableDatasetMixture",
    "MMCollator",
    "MolmoPreprocessor",
    "Network",
    "RawDataset",
    "RawSample",
    "RetryPolicy",
    "StreamLoader",
    "StreamingDataset",
    "View",
    "assemble",
    "make_dataloader",
    "view_collator",
]
