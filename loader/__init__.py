"""The training half: from shards to batches, in an order that no number of ranks changes."""

from loader.assembly import (
    Augment,
    DeterministicDataset,
    MMCollator,
    ModelPreprocessor,
    ModelView,
    MolmoPreprocessor,
    VideoPreprocessor,
    View,
    assemble,
    view_collator,
)
from loader.dataloader import StreamLoader, make_dataloader
from loader.delivery import Stats
from loader.device import DevicePrefetcher
from loader.mixture_stream import IterableDatasetMixture
from loader.order import Order, OrderConfig, SampleRef, plan_order
from loader.raw import RawDataset, RawSample
from loader.reading import Network
from loader.stream import StreamingDataset, group_by, model_view
from shardspec.storage import RetryPolicy
from shardspec.video import ClipLimits

__all__ = [
    "Augment",
    "ClipLimits",
    "DeterministicDataset",
    "DevicePrefetcher",
    "IterableDatasetMixture",
    "MMCollator",
    "ModelPreprocessor",
    "ModelView",
    "MolmoPreprocessor",
    "Network",
    "Order",
    "OrderConfig",
    "RawDataset",
    "RawSample",
    "RetryPolicy",
    "SampleRef",
    "Stats",
    "StreamLoader",
    "StreamingDataset",
    "VideoPreprocessor",
    "View",
    "assemble",
    "group_by",
    "make_dataloader",
    "model_view",
    "plan_order",
    "view_collator",
]
