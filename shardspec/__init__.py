"""The contract between the offline half and the loader: shards, indexes, manifests.

A module belongs here if its change would make existing shards read differently.
"""

from shardspec.errors import (
    BudgetError,
    ConfigError,
    ConflictError,
    FetchError,
    ManifestError,
    SampleError,
    ShardError,
    ShardsError,
    SourceError,
    StateError,
    StorageError,
    WorkerError,
)
from shardspec.manifest import FORMAT_VERSION, Manifest, load_manifest
from shardspec.sample import Geometry, PreparedImage, PreparedSample
from shardspec.tiling import FrameView, ImageView

__all__ = [
    "FORMAT_VERSION",
    "BudgetError",
    "ConfigError",
    "ConflictError",
    "FetchError",
    "FrameView",
    "Geometry",
    "ImageView",
    "Manifest",
    "ManifestError",
    "PreparedImage",
    "PreparedSample",
    "SampleError",
    "ShardError",
    "ShardsError",
    "SourceError",
    "StateError",
    "StorageError",
    "WorkerError",
    "load_manifest",
]
