"""The training half: from shards to batches, in an order that no number of ranks changes."""

from loader.assembly import (
    Augment,
    DeterministicDataset,
    MMCollator,
    MolmoPreprocessor,
    View,
    assemble,
)
from loader.dataloader import StreamLoader, make_dataloader, view_collator
from loader.delivery import Stats
from loader.device import DevicePrefetcher
from loader.mixture_stream import IterableDatasetMixture
from loader.raw import RawDataset, RawSample
from loader.reading import Network
from loader.stream import StreamingDataset
from shardspec.storage import RetryPolicy

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
