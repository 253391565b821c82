"""The training half: from shards to batches, in an order that no number of ranks changes."""

from loader.assemble import View, assemble
from loader.augment import Augment
from loader.collate import MMCollator
from loader.dataloader import StreamLoader, make_dataloader, view_collator
from loader.device import DevicePrefetcher
from loader.mixture_stream import IterableDatasetMixture
from loader.molmo import DeterministicDataset, MolmoPreprocessor
from loader.prefetch import Network
from loader.raw import RawDataset, RawSample
from loader.stats import Stats
from loader.stream import StreamingDataset
from shardspec.ranges import RetryPolicy

__all__ = [
    "Augment",
    "DeterministicDataset",
    "DevicePrefetcher",
    "IterableDatasetMixture",
    "MMCollator",
    "MolmoPreprocessor",
    "Network",
    "RawDataset",
    "RawSample",
    "RetryPolicy",
    "Stats",
    "StreamLoader",
    "StreamingDataset",
    "View",
    "assemble",
    "make_dataloader",
    "view_collator",
]
